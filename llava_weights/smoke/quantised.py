"""Linear layers as bitsandbytes computes them in transformers: the matrix in 8 bits, or in 4 as LLaVA's `--load-4bit` has it.

8 bits: LLM.int8() with transformers' threshold of 6.0 for outliers. 4 bits: NF4 in blocks of 64 whose scales are quantised too. On a CPU
with AVX512-BF16 bitsandbytes computes 4 bits in bfloat16 whatever dtype is asked for. Sources: `replace_with_bnb_linear` of transformers
5.23, `load_pretrained_model` of LLaVA, `Linear4bit.forward` of bitsandbytes 0.50.2.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError, UsageError, one_of

if TYPE_CHECKING:
    import torch
    from torch import nn

Bits = Literal["8bit", "4bit"]
BITS: tuple[Bits, ...] = ("8bit", "4bit")
OLDEST = (0, 46)  # the first tried; older ones want a GPU
BLOCK = 64  # values of a matrix with one scale; 0.50.2 on a CPU is silently wrong, or fails, where a row is no multiple of it
PACKED_ROWS = 32  # that the code for AVX512-BF16 takes at a time; it fails for other numbers
THRESHOLD = 6.0  # of an activation, from which on its column is not rounded to 8 bits
KERNELS = "kernels"


def to_bits(text: str | None) -> Bits | None:
    """The kind of quantisation called `text`. Raises UsageError for others."""
    return None if text is None else one_of("quantize", text, BITS)  # type: ignore[return-value]


class Quantiser:
    """Makes quantised layers that compute in `kind`. Raises InputError where bitsandbytes is missing or too old."""

    def __init__(self, bits: Bits, kind: torch.dtype) -> None:
        self.bits, self._kind = bits, kind
        self._bnb = _bitsandbytes()

    def check(self, shape: tuple[int, ...], device: str) -> None:
        """Raise UsageError for a matrix that bitsandbytes can't compute with on `device`, or computes wrongly."""
        if self.bits != "4bit" or device != "cpu":
            return
        rows, columns = shape
        packed = getattr(self._bnb.functional, "has_avx512bf16", bool)()
        if columns % BLOCK == 0 and not (packed and rows % PACKED_ROWS):
            return
        what = "bitsandbytes can't compute with a matrix of this model in 4 bits on this processor"
        needs = f"rows of a multiple of {BLOCK} values" + (f", and a multiple of {PACKED_ROWS} rows" if packed else "")
        raise UsageError(what, facts={"matrix": f"{rows} x {columns}", "needed": needs}, hint="quantise to `8bit`, or run it on a GPU")

    def layer(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
        """A Linear whose matrix is `weight` after quantisation."""
        from torch import nn

        made: Any
        bnb, (rows, columns), device = self._bnb.nn, weight.shape, weight.device
        options = {"bias": bias is not None, "device": "meta"}
        if self.bits == "8bit":
            made = bnb.Linear8bitLt(columns, rows, has_fp16_weights=False, threshold=THRESHOLD, **options)
            made.weight = bnb.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
        else:
            double: Any = {"quant_type": "nf4", "compress_statistics": True}
            made = bnb.Linear4bit(columns, rows, compute_dtype=self._kind, **double, **options)
            made.weight = bnb.Params4bit(weight, requires_grad=False, **double, module=made).to(device)
        if bias is not None:
            made.bias = nn.Parameter(bias, requires_grad=False)
        layer: nn.Module = made.eval()
        return layer

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, bitsandbytes does not log that it casts what enters a layer."""
        with _hushed():
            yield


def _bitsandbytes() -> ModuleType:
    hint = f"install it: `pip install 'bitsandbytes>={'.'.join(map(str, OLDEST))}'`"
    before = sys.modules.get(KERNELS)
    # Where the package `kernels` is installed, importing bitsandbytes would fetch compiled code from the Hub and run it.
    sys.modules[KERNELS] = None  # type: ignore[assignment]
    try:
        with _hushed():
            import bitsandbytes
    except ImportError as error:
        raise InputError("quantising needs the package `bitsandbytes`, which is not installed", hint=hint) from error
    finally:
        del sys.modules[KERNELS]
        if before is not None:
            sys.modules[KERNELS] = before
    found = version("bitsandbytes")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise InputError(f"bitsandbytes {found} is too old to quantise on every machine", hint=hint)
    module: ModuleType = bitsandbytes
    return module


@contextmanager
def _hushed() -> Iterator[None]:
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
