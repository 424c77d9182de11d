"""llama.cpp itself under its Python binding, run in its own environment by llama_cpp_runs.py."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama, mtmd_cpp

F32 = 0  # GGML_TYPE_F32: of the KV cache, which is F16 by default
NEVER = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED


def load(path: str) -> Llama:
    return Llama(path, n_ctx=256, n_batch=256, n_threads=1, n_threads_batch=1, type_k=F32, type_v=F32, logits_all=True, verbose=False)


def continued(model: Llama, count: int) -> list[int]:
    """The next tokens, the likeliest each time."""
    found = []
    for _ in range(count):
        found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(found[-1:])
    return found


def text(jobs: dict[str, Any]) -> None:
    """For each file the logits of `ids`, the tokens that follow, and the ids of `prompt`."""
    for job in jobs["jobs"]:
        model = load(job["file"])
        model.eval(job["ids"])
        logits = model.scores[: len(job["ids"])].copy()
        ids = model.tokenize(job["prompt"].encode(), add_bos=True, special=True)
        np.savez(job["out"], logits=logits, tokens=continued(model, job["count"]), ids=ids)
        model.close()


def image(jobs: dict[str, Any]) -> None:
    """For each pair of files the features of an image, the ids of the prompt around it, and the tokens that follow."""
    for job in jobs["jobs"]:
        pixels = np.ascontiguousarray(np.load(job["pixels"]))
        model = load(job["file"])
        settings = mtmd_cpp.mtmd_context_params_default()
        settings.use_gpu, settings.n_threads, settings.print_timings, settings.warmup = False, 1, False, False
        settings.flash_attn_type = NEVER
        tower = mtmd_cpp.mtmd_init_from_file(job["mmproj"].encode(), model._model.model, settings)
        bitmap = mtmd_cpp.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        prompt = job["prompt"].replace("<image>", mtmd_cpp.mtmd_default_marker().decode()).encode()
        asked = mtmd_cpp.mtmd_input_text(text=prompt, text_len=len(prompt), add_special=True, parse_special=True)
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
        assert mtmd_cpp.mtmd_tokenize(tower, chunks, ctypes.byref(asked), bitmaps, 1) == 0
        ids: list[int] = []
        place = ctypes.c_int32(0)
        for number in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
            chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, number)
            count = ctypes.c_size_t(mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk))
            if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
                tokens = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                ids += (part := [int(tokens[i]) for i in range(count.value)])
                model.eval(part)
            else:
                assert mtmd_cpp.mtmd_encode_chunk(tower, chunk) == 0
                width = model.n_embd()
                features = np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(tower), (count.value, width)).copy()
                ids += [-1] * count.value
                done = mtmd_cpp.mtmd_helper_eval_chunk_single(
                    tower, model._ctx.ctx, chunk, model.n_tokens, 0, 256, False, ctypes.byref(place)
                )
                assert done == 0
                model.n_tokens = place.value
        np.savez(job["out"], features=features, ids=ids, tokens=continued(model, job["count"]))
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        mtmd_cpp.mtmd_bitmap_free(bitmap)
        mtmd_cpp.mtmd_free(tower)
        model.close()


if __name__ == "__main__":
    {"text": text, "image": image}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
    sys.stdout.write("{}\n")
