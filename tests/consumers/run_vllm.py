"""vLLM on the CPU, each model in an engine of its own."""

from __future__ import annotations

import os
from typing import Any

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")

from exchange import Json, answer
from PIL import Image
from vllm import LLM, SamplingParams


def task(job: Json, given: Json) -> Json:
    many = given["tokens"]
    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2560, "max_num_seqs": 1, "seed": 0}
    engine = LLM(model=job["folder"], limit_mm_per_prompt={"image": 1}, **options)
    prompt: Any = {"prompt": job["prompt"], "multi_modal_data": {"image": Image.open(job["picture"])}}
    settings = SamplingParams(temperature=0, max_tokens=many, min_tokens=many, ignore_eos=True, logprobs=1)
    (done,) = engine.generate(prompt, settings, use_tqdm=False)
    made = done.outputs[0]
    tokens = list(made.token_ids)
    return {
        "ids": list(done.prompt_token_ids),
        "tokens": tokens,
        "logprobs": [step[token].logprob for step, token in zip(made.logprobs, tokens, strict=True)],
    }


if __name__ == "__main__":
    answer({"run": task}, ("vllm-cpu", "transformers", "torch"))
