"""LLaVA's own program, commit c121f04, on the original layout, in float32. Its loader can only load float16: what follows are its steps."""

from __future__ import annotations

import sys
import warnings

import torch
from exchange import Json, answer
from PIL import Image


def task(job: Json, given: Json) -> Json:
    sys.path.insert(0, job["program"])
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model import LlavaLlamaForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["folder"], use_fast=False)
    model = LlavaLlamaForCausalLM.from_pretrained(job["folder"], torch_dtype=torch.float32).eval()
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model()
    tower.to(dtype=torch.float32)
    picture = Image.open(job["picture"]).convert("RGB")
    pixels = process_images([picture], tower.image_processor, model.config)
    ids = tokenizer_image_token(job["prompt"], tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    tokens, logprobs, first = [], [], None
    for _ in range(given["tokens"]):
        with torch.inference_mode():
            longer = torch.cat([ids, torch.tensor([tokens], dtype=ids.dtype)], dim=1)
            last = model(longer, images=pixels, image_sizes=[picture.size], use_cache=False).logits[0, -1].float()
        first = last.tolist() if first is None else first
        tokens.append(int(last.argmax()))
        logprobs.append(float(last.log_softmax(-1)[tokens[-1]]))
    return {"ids": ids[0].tolist(), "logits": first, "tokens": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    answer({"run": task}, ("transformers", "torch"))
