"""mlx-vlm on Linux: its own processor, and the logits behind the prompt; what follows, by running the longer text again."""

from __future__ import annotations

import mlx.core as mx
from exchange import Json, answer
from mlx_vlm import load
from PIL import Image


def task(job: Json, given: Json) -> Json:
    model, processor = load(job["folder"])
    inputs = processor(text=[job["prompt"]], images=[Image.open(job["picture"])], return_tensors="np")
    ids = inputs["input_ids"][0].tolist()
    pixels = mx.array(inputs["pixel_values"])
    more = {"image_sizes": mx.array(inputs["image_sizes"])} if "image_sizes" in inputs else {}
    tokens, logprobs, first = [], [], None
    for _ in range(given["tokens"]):
        output = model(mx.array([ids + tokens]), pixels, mask=None, **more)
        last = (output.logits if hasattr(output, "logits") else output)[0, -1].astype(mx.float32)
        first = last.tolist() if first is None else first
        steps = last - mx.logsumexp(last)
        tokens.append(int(mx.argmax(steps)))
        logprobs.append(float(steps[tokens[-1]]))
    return {"ids": ids, "logits": first, "tokens": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    answer({"run": task}, ("mlx-vlm", "mlx", "transformers"))
