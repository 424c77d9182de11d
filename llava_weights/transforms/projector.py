"""The projector of LLaVA v0 and v1 is one Linear, that of llava-hf always two: how the one is written as two, and recognised again.

    form      activation  linear_1            linear_2               why it is the same map
    identity  linear      W, b                I, 0                   exact
    relu      relu        rows I, -I, 0       columns W, -W, 0 ; b   relu(x) - relu(-x) = x
    gelu      gelu        rows I, -I, 0       columns W, -W, 0 ; b   gelu(x) - gelu(-x) = x, for every gate with g(x) + g(-x) = 1

vLLM knows no "linear" activation, llama.cpp and mlx-vlm apply gelu whatever the config says.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from ..errors import InputError, UsageError
from ..families.projectors import LINEAR_NAMES, PROJECTOR_ACTIVATION, PROJECTOR_FORMS, PROJECTOR_NAMES
from ..storage.reading import Workspace
from ..tensors.dtypes import ITEMSIZE, as_rows, to_float32
from ..tensors.lazy import FromRows, LazyTensor
from ..tensors.windows import row_ranges

ONE = {"F16": 0x3C00, "BF16": 0x3F80, "F32": 0x3F800000, "F64": 0x3FF0000000000000}


@dataclass(frozen=True, kw_only=True)
class Diagonals(LazyTensor):
    """Matrices of `width` rows, one below the other: each `sign` times the identity, and zeros below the last."""

    width: int
    signs: tuple[int, ...]

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        out[:] = bytes(len(out))
        values = np.frombuffer(out, f"<u{ITEMSIZE[self.dtype]}").reshape(stop - start, -1)
        for row in range(start, min(stop, self.width * len(self.signs))):
            sign = (self.signs[row // self.width] < 0) << (8 * ITEMSIZE[self.dtype] - 1)
            values[row - start, row % self.width] = ONE[self.dtype] | sign


@dataclass(frozen=True, kw_only=True)
class SignedPair(FromRows):
    """Columns of `source`, then the same with the other sign, then zeros."""

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        kind, width = f"<u{ITEMSIZE[self.dtype]}", self.source.shape[1]
        with work.scratch((stop - start) * self.source.row_nbytes) as raw:
            self.source.rows_into(raw, start, stop, work)
            bits = np.frombuffer(raw, kind).reshape(stop - start, -1)
            both = np.frombuffer(out, kind).reshape(stop - start, -1)
            both[:, :width], both[:, 2 * width :] = bits, 0
            both[:, width : 2 * width] = bits ^ np.array(1 << (8 * ITEMSIZE[self.dtype] - 1), kind)


@dataclass(frozen=True, kw_only=True)
class Columns(FromRows):
    """The first columns of `source`."""

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        with work.scratch((stop - start) * self.source.row_nbytes) as raw:
            self.source.rows_into(raw, start, stop, work)
            as_rows(out, stop - start)[:] = as_rows(raw, stop - start)[:, : self.row_nbytes]


def paired(weight: LazyTensor, bias: LazyTensor, form: str) -> dict[str, LazyTensor]:
    """A Linear of shape (D, d) as the two of `form`, by canonical names, in the same dtype.

    Raises UsageError for an unknown form, InputError where a form with pairs has no room (2 d > D).
    """
    if form not in PROJECTOR_FORMS:
        raise UsageError(f"there is no projector form `{form}`", hint=f"choose one of {', '.join(PROJECTOR_FORMS)}")
    (wide, narrow), dtype = weight.shape, weight.dtype
    square, zeros = (wide, wide), Diagonals(dtype=dtype, shape=(wide,), width=1, signs=())
    if form == "identity":
        return dict(zip(PROJECTOR_NAMES, (weight, bias, Diagonals(dtype=dtype, shape=square, width=wide, signs=(1,)), zeros), strict=True))
    if 2 * narrow > wide:
        what = f"the projector form `{form}` needs a decoder at least twice as wide as the tower"
        raise InputError(what, facts={"projector": list(weight.shape)}, hint="use `--projector-form identity`")
    inner = Diagonals(dtype=dtype, shape=weight.shape, width=narrow, signs=(1, -1))
    return dict(zip(PROJECTOR_NAMES, (inner, zeros, SignedPair(dtype=dtype, shape=square, source=weight), bias), strict=True))


def zero_biases(parts: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Zeros for the biases of a projector that has none, of one layer or two, which compute the same."""
    pairs = ((PROJECTOR_NAMES[1], PROJECTOR_NAMES[0]), (PROJECTOR_NAMES[3], PROJECTOR_NAMES[2]), (LINEAR_NAMES[1], LINEAR_NAMES[0]))
    return {
        bias: Diagonals(dtype=parts[weight].dtype, shape=parts[weight].shape[:1], width=1, signs=())
        for bias, weight in pairs
        if weight in parts and bias not in parts
    }


def single(tensors: Mapping[str, LazyTensor], activation: str) -> tuple[LazyTensor, LazyTensor] | None:
    """Weight and bias of the one Linear that these four tensors stand for; None where they are two layers of their own.

    Reads their values. Raises InputError for two without anything between them, or with an activation that LLaVA lacks.
    """
    first, inner, second, outer = (tensors[name] for name in PROJECTOR_NAMES)
    (wide, narrow), dtype = first.shape, first.dtype
    if activation == "linear":
        form = paired(first, inner, "identity")
        if _equal(second, form[PROJECTOR_NAMES[2]]) and _equal(outer, form[PROJECTOR_NAMES[3]]):
            return first, inner
    elif 2 * narrow <= wide:
        weight = Columns(dtype=dtype, shape=first.shape, source=second)
        form = paired(weight, outer, "relu")
        if all(_equal(tensors[name], form[name]) for name in PROJECTOR_NAMES[:3]):
            return weight, outer
    if activation != PROJECTOR_ACTIVATION:
        what = f"the original layout has no projector of two layers with `{activation}` between them"
        raise InputError(what, hint="only gelu, or one of the forms that `--projector-form` writes, has a counterpart there")
    return None


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether the values are the same numbers; the sign of a zero does not matter."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    with closing(Workspace()) as work:
        for start, stop in row_ranges(one, 1 << 20):
            made = [bytearray((stop - start) * one.row_nbytes) for _ in range(2)]
            for tensor, raw in zip((one, other), made, strict=True):
                tensor.rows_into(memoryview(raw), start, stop, work)
            if not np.array_equal(to_float32(made[0], one.dtype), to_float32(made[1], one.dtype)):
                return False
    return True
