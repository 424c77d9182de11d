"""transformers itself: the float32 reference of all others, `pipeline`, and bitsandbytes beneath it."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import torch
import transformers
from exchange import Json, answer
from PIL import Image

STEPS = 3


def load(folder: str, **options: Any) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options).eval()


def inputs_of(job: Json) -> Any:
    processor = transformers.AutoProcessor.from_pretrained(job["folder"])
    pictures = [Image.open(job["picture"])] if job["picture"] else None
    return processor(images=pictures, text=job["prompt"], return_tensors="pt")


def chosen(model: Any, given: Any, many: int, folder: str) -> Json:
    """Logits behind the prompt, and the tokens that follow, the most likely each time, whatever ends a text."""
    with torch.inference_mode():
        logits = model(**given).logits[0, -1].float()
        made = model.generate(
            **given, max_new_tokens=many, min_new_tokens=many, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    steps = [step[0].float().log_softmax(-1) for step in made.logits]
    tokens = made.sequences[0, given["input_ids"].shape[1] :].tolist()
    return {
        "ids": given["input_ids"][0].tolist(),
        "logits": logits.tolist(),
        "tokens": tokens,
        "text": transformers.AutoTokenizer.from_pretrained(folder).decode(tokens, skip_special_tokens=True),
        "logprobs": [float(step[token]) for step, token in zip(steps, tokens, strict=True)],
        "leads": [float(step.topk(2).values.diff().abs()) for step in steps],
    }


def reference(job: Json, given: Json) -> Json:
    return chosen(load(job["folder"]), inputs_of(job), given["tokens"], job["folder"])


def quantised(bits: int) -> Any:
    def task(job: Json, given: Json) -> Json:
        more = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
        config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **(more if bits == 4 else {}))
        return chosen(load(job["folder"], quantization_config=config), inputs_of(job), given["tokens"], job["folder"])

    return task


def pipeline(job: Json, given: Json) -> Json:
    made, many = transformers.pipeline("image-text-to-text", model=job["folder"], dtype=torch.float32), given["tokens"]
    content = [{"type": "image", "url": job["picture"]}, {"type": "text", "text": job["question"]}]
    settings = {"min_new_tokens": many, "do_sample": False}
    (found,) = made(text=[{"role": "user", "content": content}], max_new_tokens=many, generate_kwargs=settings, return_tensors=True)
    whole = [int(token) for token in found["generated_token_ids"]]
    return {"ids": whole[:-many], "tokens": whole[-many:]}


def train(job: Json, given: Json) -> Json:
    """A LoRA on attention and projector, trained for some steps to say something else, and what base and adapter then compute."""
    import peft

    torch.manual_seed(0)
    settings: Any = {"r": 4, "lora_alpha": 8, "target_modules": r".*(q_proj|v_proj|linear_[12])", "init_lora_weights": "gaussian"}
    model, inputs = peft.get_peft_model(load(job["folder"]), peft.LoraConfig(**settings)), inputs_of(job)
    steps = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-3)
    losses = []
    for _ in range(STEPS):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(float(loss))
    model.save_pretrained(job["adapter"])
    return {**chosen(model.eval(), inputs, given["tokens"], job["folder"]), "losses": losses}


TASKS: dict[str, Any] = {"reference": reference, "8bit": quantised(8), "4bit": quantised(4), "pipeline": pipeline, "train": train}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    task = sys.argv[1]
    more = ("bitsandbytes",) if "bit" in task else ("peft",) if task == "train" else ()
    answer(TASKS, (*more, "transformers", "torch"))
