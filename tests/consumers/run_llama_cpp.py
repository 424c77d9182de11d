"""llama.cpp under its Python binding, with a cache in float32: its default in float16 moves logits by 7e-3."""

from __future__ import annotations

import numpy as np
from exchange import Json, answer
from llama_cpp import Llama

F32 = 0  # GGML_TYPE_F32


def task(job: Json, given: Json) -> Json:
    model = Llama(job["folder"], n_ctx=512, n_batch=512, type_k=F32, type_v=F32, logits_all=True, verbose=False)
    ids = model.tokenize(job["prompt"].encode(), add_bos=True, special=True)
    model.eval(ids)
    tokens, logprobs, first = [], [], None
    for _ in range(given["tokens"]):
        last = model.scores[model.n_tokens - 1].astype(np.float64)
        first = last.tolist() if first is None else first
        tokens.append(int(last.argmax()))
        logprobs.append(float(last.max() - np.logaddexp.reduce(last)))
        model.eval(tokens[-1:])
    return {"ids": ids, "logits": first, "tokens": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    answer({"run": task}, ("llama_cpp",))
