"""What a version of transformers does with llava-hf folders, and what its own converters make of original ones.

Run in the environment of that version: `python run_transformers.py TASK JOBS.json` prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import forwards
import torch
import transformers
from safetensors.torch import save_file

STATE_DICT = "model_state_dict.bin"
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
PROCESSOR = VERSION >= (4, 45)  # before, AutoProcessor refuses a processor_config.json with keys that it does not know
SINGLE = VERSION < (4, 48)  # one image token an image may stand in the ids, which the model widens
WIDENED = VERSION >= (4, 45)  # one image token a feature may stand in the ids
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]
NEW = {"max_new_tokens": 5, "do_sample": False}

Json = dict[str, Any]


def read(job: Json) -> Json:
    """A converted folder: its keys, logits, greedy answers, and ids by tokenizer and processor."""
    folder, reference = Path(job["folder"]), Path(job["reference"])
    config = json.loads((folder / "config.json").read_text())
    if not hasattr(transformers, config["architectures"][0]):
        return {"lacks": config["architectures"][0]}
    model, keys = forwards.load_model(folder)
    image = config["image_token_index"]
    found: Json = {"keys": keys, "logits": {}, "generated": {}}
    for form, wanted in (("widened", WIDENED), ("single", SINGLE)):
        if wanted:
            single = image if form == "single" else None
            found["logits"][form] = forwards.worst(model, reference, job["prefix"], single=single)
            cases = forwards.cases(reference, job["prefix"], tiled=config["model_type"] == "llava_next", single=single)
            found["generated"][form] = {case: generated(model, given) for case, given in cases.items()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found["tokenized"] = {case: tokenizer(text).input_ids for case, (text, _) in job["prompts"].items()}
    slow = transformers.AutoTokenizer.from_pretrained(folder, use_fast=False)  # transformers 5 has one kind only
    found["slowly"] = {case: slow(text).input_ids for case, (text, _) in job["prompts"].items()}
    if PROCESSOR:
        found |= processed(folder, model, job)
    return found


def generated(model: Any, given: Json) -> list[int]:
    """What the model adds to the ids."""
    with torch.inference_mode():
        ids = model.generate(**{key: value for key, value in given.items() if key != "logits"}, **NEW)
    return answers(model, ids, given)[0]


def answers(model: Any, ids: Any, given: Json) -> list[list[int]]:
    """What is new in each row, up to the end of text; behind it a batch is padded."""
    eos = model.generation_config.eos_token_id
    new = ids[:, given["input_ids"].shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in new]


def processed(folder: Path, model: Any, job: Json) -> Json:
    """The ids of each prompt with its pictures, the prompt of a conversation, and answers one by one and as a batch."""
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(folder)
    pictures = {case: [Image.open(path) for path in paths] for case, (_, paths) in job["prompts"].items()}
    inputs = {case: processor(text=text, images=pictures[case] or None, return_tensors="pt") for case, (text, _) in job["prompts"].items()}
    found: Json = {
        "processed": {case: given["input_ids"][0].tolist() for case, given in inputs.items()},
        "prompt": processor.apply_chat_template(MESSAGES, add_generation_prompt=True),
    }
    if square := job["square"]:
        expected = forwards.cases(Path(job["reference"]), square, tiled=model.config.model_type == "llava_next")[square]["logits"]
        with torch.inference_mode():
            found["square"] = float((model(**inputs[square]).logits[0, :, : expected.shape[1]] - expected).abs().max())
    if job["batch"]:
        texts, images = [job["prompts"][case][0] for case in job["batch"]], [pictures[case][0] for case in job["batch"]]
        batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
        with torch.inference_mode():
            together = answers(model, model.generate(**batch, **NEW), batch)
        found["batched"] = dict(zip(job["batch"], together, strict=True))
        found["alone"] = {case: generated(model, inputs[case]) for case in job["batch"]}
    return found


CONFIGS = {"LlavaConfig", "LlavaNextConfig", "LlavaOnevisionConfig", "LlavaNextVideoConfig", "VipLlavaConfig", "VideoLlavaConfig"}
VIP_LAYERS = 5


class Saved(Exception):
    """The converter has written its output; what follows in it compares with published models."""


def convert(job: Json) -> Json:
    """An original folder with random weights, and what transformers' own converter makes of it.

    Its look-ups on the Hub give the folders of `job`, and constants of published models are replaced by those of the tiny ones.
    """
    folder = Path(job["folder"])
    make_original(folder, job)
    specification = importlib.util.find_spec(f"transformers.models.{job['module']}")
    assert specification is not None
    assert specification.origin is not None
    source = Path(specification.origin).read_text()
    for old, new in job["replaced"].items():
        assert old in source, old
        source = source.replace(old, str(new))
    script: Json = {"__name__": "converter"}
    exec(compile(source, specification.origin, "exec"), script)
    original = folder / "original"
    script["snapshot_download"] = lambda **_: str(original)
    script["hf_hub_download"] = lambda *_, filename=STATE_DICT, **__: str(original / filename)
    script["gc"] = SimpleNamespace(collect=stop)
    for kind in CONFIGS & script.keys():
        script[kind] = with_vision(script[kind], job["vision"], job["assumed"])
    for kind in (transformers.PreTrainedModel, transformers.ProcessorMixin):
        kind.push_to_hub = kind.save_pretrained
    with contextlib.suppress(Saved), contextlib.redirect_stdout(sys.stderr):
        script[job["function"]](*job["arguments"])
    torch.set_default_dtype(torch.float32)
    return {}


def stop() -> None:
    raise Saved


def with_vision(kind: Any, vision: Json, assumed: Json) -> Callable[..., Any]:
    """A config class whose default tower is a tiny one, and whose other defaults are `assumed`."""
    return lambda **given: kind(**{**assumed, **given, "vision_config": given.get("vision_config") or vision})


def make_original(folder: Path, job: Json) -> None:
    """`text`, a config; the tower's own folder; `original`, as LLaVA's code stores it; and the state dict that a converter asks for.

    LLaVA keeps a SigLIP without its last layer and a tied head not at all.
    """
    torch.manual_seed(77)
    config = transformers.AutoConfig.for_model(**job["text"])
    decoder = randomized(transformers.AutoModelForCausalLM.from_config(config))
    siglip = job["vision"]["model_type"] == "siglip_vision_model"
    kind = "Siglip" if siglip else "CLIP"
    vision = {**job["vision"], "num_hidden_layers": job["vision"]["num_hidden_layers"] + siglip}
    tower = randomized(getattr(transformers, f"{kind}VisionModel")(getattr(transformers, f"{kind}VisionConfig")(**vision)))
    config.save_pretrained(folder / "text")
    tower.save_pretrained(folder / job["tower"])
    last = f"encoder.layers.{job['vision']['num_hidden_layers']}."
    tensors = {name: tensor for name, tensor in decoder.state_dict().items() if not (config.tie_word_embeddings and "lm_head" in name)}
    stored = {name: x for name, x in tower.state_dict().items() if last not in name}
    if job["two"]:  # another for videos, with tensors for what lies between the frames
        plain = {name.removeprefix("vision_model."): x for name, x in stored.items()}
        tensors |= {f"model.image_tower.image_tower.{name}": x for name, x in plain.items()}
        tensors |= {f"model.video_tower.video_tower.{name}": torch.randn_like(x.float()) * 0.1 for name, x in plain.items()}
        tensors["model.video_tower.video_tower.encoder.layers.0.temporal_embedding"] = torch.randn(1, 8, vision["hidden_size"])
    else:
        tensors |= {f"model.vision_tower.vision_tower.{name}": x for name, x in stored.items()}
    hidden, wide = config.hidden_size, vision["hidden_size"]
    wide *= VIP_LAYERS if job["norm"] else 1
    sizes = {"0.weight": (hidden, wide), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    if job["norm"]:
        norm = {"clip_layernorm.weight": (wide,), "clip_layernorm.bias": (wide,)}
        sizes = {**norm, **{f"final_linear.{name}": size for name, size in sizes.items()}}
    tensors |= {f"model.mm_projector.{name}": torch.randn(size) * 0.1 for name, size in sizes.items()}
    tensors |= {"model.image_newline": torch.randn(hidden) * 0.1} if job["newline"] else {}
    tensors = {name: tensor.to(getattr(torch, job["dtype"])).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "original" / "model.safetensors", {"format": "pt"})
    torch.save(tensors, folder / "original" / STATE_DICT)
    written = {**config.to_dict(), **job["config"], "torch_dtype": job["dtype"], "mm_hidden_size": wide}
    (folder / "original" / "config.json").write_text(json.dumps(written))


def randomized(model: Any) -> Any:
    for name, values in model.state_dict().items():
        values.copy_(torch.randn_like(values) * 0.1 + ("norm" in name and name.endswith("weight")))
    return model


def compare(job: Json) -> Json:
    """The keys of two folders with the same model, the largest difference of their logits, and their configs as this version sees them."""
    found: Json = {}
    logits = []
    for name in ("ours", "theirs"):
        model, keys = forwards.load_model(Path(job["folder"]) / name)
        found[name] = {"keys": keys, "config": model.config.to_dict()}
        torch.manual_seed(7)
        ids = torch.tensor(job["ids"])
        ids = forwards.one_an_image(ids, job["image"]) if SINGLE and not job["widened"] else ids  # 4.47 goes by `image_seq_length`
        given = {"input_ids": ids.view(1, -1), job["pixels_are"]: torch.randn(job["pixels"])}
        given |= {"image_sizes": torch.tensor([job["image_size"]])} if job["image_size"] else {}
        with torch.inference_mode():
            logits.append(model(**given, attention_mask=torch.ones_like(given["input_ids"])).logits[0, :, : job["rows"]])
    return found | {"difference": float((logits[0] - logits[1]).abs().max()), "spread": float(logits[0].std())}


def tokenize(job: Json) -> Json:
    """The ids of texts, by AutoTokenizer and, where this version has one, by the slow tokenizer."""
    fast, slow = (transformers.AutoTokenizer.from_pretrained(job["folder"], **more) for more in ({}, {"use_fast": False}))
    return {"fast": [fast(text).input_ids for text in job["texts"]], "slow": [slow(text).input_ids for text in job["texts"]]}


def video_llava(job: Json) -> Json:
    """A converted Video-LLaVA beside a splice of its original's parts."""
    import run_video_llava  # whose class came with 4.41

    return run_video_llava.run(job)


def attempt(task: Callable[[Json], Json], job: Json) -> Json:
    try:
        return task(job)
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[2]).read_text())
    task = {"read": read, "compare": compare, "convert": convert, "tokenize": tokenize, "video_llava": video_llava}[sys.argv[1]]
    sys.stdout.write(json.dumps({name: attempt(task, job) for name, job in jobs.items()}))
