"""optimum-intel: the model exported to OpenVINO, and computed by it."""

from __future__ import annotations

import logging
import warnings

import torch
from exchange import Json, answer
from optimum.intel import OVModelForVisualCausalLM
from PIL import Image
from transformers import AutoProcessor

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}  # as by default neither the arithmetic nor the cache is


def task(job: Json, given: Json) -> Json:
    many = given["tokens"]
    model = OVModelForVisualCausalLM.from_pretrained(job["folder"], export=True, load_in_8bit=False, ov_config=FLOAT32)
    processor = AutoProcessor.from_pretrained(job["folder"])
    inputs = processor(images=[Image.open(job["picture"])], text=job["prompt"], return_tensors="pt")
    made = model.generate(
        **inputs, max_new_tokens=many, min_new_tokens=many, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    steps = [torch.as_tensor(step[0]).float().log_softmax(-1) for step in made.logits]
    return {
        "ids": inputs["input_ids"][0].tolist(),
        "logits": torch.as_tensor(made.logits[0][0]).tolist(),
        "tokens": tokens,
        "logprobs": [float(step[token]) for step, token in zip(steps, tokens, strict=True)],
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    answer({"run": task}, ("optimum-intel", "openvino", "transformers", "torch"))
