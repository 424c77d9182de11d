"""Raw bytes as numbers: views of buffers for torch and numpy, which neither copy nor own them.

dtypes are spelled as safetensors does: "F16", "BF16", "F32", ...
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UsageError
from ..storage.reading import Workspace

if TYPE_CHECKING:
    import torch


ITEMSIZE = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
# Quantised dtypes of GGUF: values of a block, and its bytes (ggml-common.h of llama.cpp). A row is whole blocks.
BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "Q8_K": (256, 292),
}  # fmt: skip
MAX_AXES = 8  # of a tensor in any file that is read
TORCH_DTYPE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}


def to_dtype(text: str | None) -> str | None:
    """A dtype as safetensors spells it, from that or torch's spelling. Raises UsageError for others."""
    names = {
        spelled: dtype for dtype in ("F16", "BF16", "F32") for spelled in (dtype, dtype.replace("F", "FLOAT"), dtype.replace("F", "FP"))
    }
    if text is None:
        return None
    if not isinstance(text, str) or text.upper() not in names:
        raise UsageError(f"there is no output dtype `{text}`", hint="choose F16, BF16 or F32")
    return names[text.upper()]


def bytes_of(dtype: str, numel: int) -> int:
    """Bytes of `numel` values, which of a quantised dtype are whole blocks."""
    values, nbytes = BLOCKS[dtype] if dtype in BLOCKS else (1, ITEMSIZE[dtype])
    return numel // values * nbytes


def to_float32(raw: bytes | bytearray | memoryview, dtype: str) -> np.ndarray:
    """Decode raw values. BF16 is the upper half of a float32, and numpy has no type for it."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    if dtype in ("F16", "F32", "F64"):
        return np.frombuffer(raw, f"<f{ITEMSIZE[dtype]}").astype("<f4", copy=False)
    return np.frombuffer(raw, {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"}.get(dtype, f"<u{ITEMSIZE[dtype]}"))


def raw_bits(raw: bytes | bytearray | memoryview, dtype: str) -> np.ndarray:
    """The values as unsigned integers of their own width."""
    return np.frombuffer(raw, f"<u{ITEMSIZE[dtype]}")


class _Threads:
    """How many `one_thread` are open, and how many threads torch had before the first of them, 0 while it is not imported."""

    turn, users, before = threading.Lock(), 0, 0


def load_torch() -> ModuleType:
    """torch, which has one thread of its own inside `one_thread`."""
    import torch

    if _Threads.users and not _Threads.before:
        with _Threads.turn:
            if _Threads.users and not _Threads.before:
                _Threads.before = torch.get_num_threads()
                torch.set_num_threads(1)
    return torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch has one thread of its own, since the workers are the parallelism: the barriers between its threads made blocks
    3 to 20 times slower on a busy machine with 2 cores. When the last one that is open ends, it has as many as before. Does not
    import torch."""
    with _Threads.turn:
        _Threads.users += 1
    try:
        if "torch" in sys.modules:
            load_torch()
        yield
    finally:
        with _Threads.turn:
            _Threads.users -= 1
            before = 0 if _Threads.users else _Threads.before
            if before:
                _Threads.before = 0
                sys.modules["torch"].set_num_threads(before)


@contextmanager
def all_threads() -> Iterator[None]:
    """Inside, torch has as many threads as outside of `one_thread`: for whole matrices, on which no other worker computes."""
    torch = load_torch()
    threads = torch.get_num_threads()
    torch.set_num_threads(_Threads.before or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def as_torch(raw: memoryview, dtype: str) -> torch.Tensor:
    """A flat torch view of a buffer; writing to it writes the buffer."""
    loaded = load_torch()
    kind = getattr(loaded, TORCH_DTYPE[dtype])
    view: torch.Tensor = loaded.frombuffer(raw, dtype=kind) if len(raw) else loaded.empty(0, dtype=kind)
    return view


def as_rows(raw: memoryview, rows: int) -> np.ndarray:
    """A (rows, bytes per row) view of a buffer, for moving rows and columns whatever their dtype."""
    return np.frombuffer(raw, np.uint8).reshape(rows, -1)


def count_non_finite(raw: memoryview, dtype: str, work: Workspace) -> int:
    """1 if a value is inf or NaN, else 0. Looks for exponent bits that are all ones, on integers: `isfinite` is 20 times slower."""
    torch = load_torch()
    if dtype not in ("F16", "BF16") or not len(raw):
        return int(bool(len(raw)) and not bool(torch.isfinite(as_torch(raw, dtype)).all()))
    bits = torch.frombuffer(raw, dtype=torch.int16)
    with work.scratch(len(raw)) as spare:
        magnitude = torch.bitwise_and(bits, 0x7FFF, out=torch.frombuffer(spare, dtype=torch.int16))
        return int(int(magnitude.max()) >= (0x7C00 if dtype == "F16" else 0x7F80))
