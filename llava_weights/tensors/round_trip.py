"""A weight after a round trip through bitsandbytes: quantised to 4 or 8 bits as it was while a QLoRA was trained, and back.

4 bits (`nf4`, `fp4`): blocks of 64 values of the flattened tensor, across the ends of rows, share a scale, their largest magnitude in
float32; each value becomes the nearest of 16 in a table, and comes back as that times the scale, in the dtype of the weight. With double
quantisation the scales themselves are stored in 8 bits: their mean is taken off, and blocks of 256 of them share a scale. So a value can
depend on the whole tensor, which is then read twice.

8 bits (`int8`, LLM.int8()): the weight is rounded to float16, each row has a scale, and comes back as float32.

The bits are those of bitsandbytes 0.50.2 on the CPU with one thread (`quantize_4bit`, `quantize_blockwise`, `int8_vectorwise_quant` and
what undoes them), and the same on every machine: every step is one IEEE operation in a fixed order, the mean of the scales included.
Where a row is no multiple of 64 values, its compiled CPU kernel takes the scale of another block; here its other backends are followed.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..families.quantised import CODES
from ..storage.reading import Workspace
from .dtypes import TORCH_DTYPE, as_torch, count_non_finite, load_torch
from .lazy import LazyTensor

if TYPE_CHECKING:
    import torch

Rounding = Literal["nf4", "fp4", "int8"]
BLOCK = 64  # values that share a scale
SCALES = 256  # scales that share a scale of their own
PIECE = 2048 * BLOCK  # values that are rounded at a time, so that they stay in cache
WINDOW_BYTES = 1 << 20  # of the weight, read at a time to find its scales
LANES, COLUMNS, LEVELS = 8, 4, 4  # how torch sums: four vectors of eight side by side, partial sums on four levels
STEPS = 1 << 16  # of the table in which bitsandbytes looks the 8-bit code of a value up


@dataclass(frozen=True, kw_only=True)
class RoundTrip(LazyTensor):
    """`source`, a matrix, as the model in training had it: in its dtype, or in "F32" for `int8`. Made by `round_trip`.

    `rounding` is the kind, `double` says whether the scales of 4 bits were quantised too.
    """

    source: LazyTensor
    rounding: Rounding
    double: bool

    @property
    def uses_torch(self) -> bool:
        return True

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.source,)

    @property
    def columns(self) -> int:
        """Values of a row."""
        return math.prod(self.shape[1:])

    @property
    def row_unit(self) -> int:
        aligned = 1 if self.rounding == "int8" else BLOCK // math.gcd(self.columns, BLOCK)
        return math.lcm(self.source.row_unit, min(aligned, max(self.rows, 1)))

    def scratch(self, rows: int) -> int:
        around = 2 * -(-BLOCK // max(self.columns, 1)) if rows < self.rows and self.rounding != "int8" else 0
        reading = (rows + around) * self.source.row_nbytes + self.source.scratch(rows + around)
        values = max(PIECE, self.columns) if self.rounding == "int8" else PIECE
        held = 4 * -(-self.numel // BLOCK) if self.double else 0  # the scales, float32
        window = self._window
        finding = 8 * held + window * self.source.row_nbytes + self.source.scratch(window) if self.double else 0
        return held + max(reading + 5 * 4 * values, finding + 2 * 4 * values)

    @property
    def _window(self) -> int:
        unit = self.row_unit
        return min(max(WINDOW_BYTES // max(self.source.row_nbytes * unit, 1), 1) * unit, self.rows)

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        if not len(out):
            return
        if self.rounding == "int8":
            self._rows_of_8_bits(out, start, stop, work)
        else:
            scales = work.latest(self, self._scales) if self.double else None
            self._rows_of_4_bits(out, start, stop, scales, work)
        work.tallies["non_finite"] += count_non_finite(out, self.dtype, work)

    def _rows_of_8_bits(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        torch = load_torch()
        with work.scratch((stop - start) * self.source.row_nbytes) as raw:
            self.source.rows_into(raw, start, stop, work)
            stored = as_torch(raw, self.source.dtype).view(stop - start, self.columns)
            made = as_torch(out, self.dtype).view(stop - start, self.columns)
            height = max(PIECE // self.columns, 1)
            for first in range(0, stop - start, height):
                half = stored[first : first + height].to(torch.float16)
                scale = half.abs().amax(1).float()[:, None]
                codes = torch.round(half * (127.0 / scale)).to(torch.float32)
                codes[(scale == 0).expand_as(codes)] = 0.0
                made[first : first + height] = codes.add_(0.0).mul_(scale).mul_(7.874015718698502e-3)  # an integer has no -0

    def _rows_of_4_bits(self, out: memoryview, start: int, stop: int, scales: np.ndarray | None, work: Workspace) -> None:
        """Rows [start, stop), by the blocks that they touch; the values of those blocks in rows around are read too."""
        columns = self.columns
        begin, end = start * columns // BLOCK * BLOCK, min(-(-stop * columns // BLOCK) * BLOCK, self.numel)
        first, last = begin // columns, -(-end // columns)
        with work.scratch((last - first) * self.source.row_nbytes) as raw:
            self.source.rows_into(raw, first, last, work)
            stored, made = as_torch(raw, self.source.dtype), as_torch(out, self.dtype)
            for at in range(begin, end, PIECE):
                until = min(at + PIECE, end)
                given = None if scales is None else scales[at // BLOCK : -(-until // BLOCK)]
                rounded = self._rounded(stored[at - first * columns : until - first * columns], given)
                low, high = max(at, start * columns), min(until, stop * columns)
                if low < high:
                    made[low - start * columns : high - start * columns] = rounded[low - at : high - at]

    def _rounded(self, stored: torch.Tensor, given: np.ndarray | None) -> torch.Tensor:
        """Whole blocks there and back, in the dtype of the weight; the last may be short. `given` are scales in place of their own."""
        loaded = load_torch()
        table = codebook(self.rounding)
        values = stored.float()
        scale = largest(values)
        codes = nearest(in_units(values, scale), table)
        back = loaded.from_numpy(table)[codes.int()]
        used = scale if given is None else loaded.from_numpy(given)
        full = len(back) // BLOCK
        back[: full * BLOCK].view(full, BLOCK).mul_(used[:full, None])
        back[full * BLOCK :].mul_(used[full:])
        rounded: torch.Tensor = back.to(getattr(loaded, TORCH_DTYPE[self.dtype]))
        return rounded

    def _scales(self) -> np.ndarray:
        """The scale of each block after its own round trip through 8 bits, float32. Reads all of the weight, with files of its own: what
        is read twice shall be checked once."""
        scales, rows = np.empty(-(-self.numel // BLOCK), np.float32), self._window
        with closing(Workspace(drop_cache=False)) as work:
            for first in range(0, self.rows, rows):
                last = min(first + rows, self.rows)
                with work.scratch((last - first) * self.source.row_nbytes) as raw:
                    self.source.rows_into(raw, first, last, work)
                    stored, begin = as_torch(raw, self.source.dtype), first * self.columns // BLOCK  # windows end with their blocks
                    for at in range(0, len(stored), PIECE):
                        part = largest(stored[at : at + PIECE].float()).numpy()
                        scales[begin + at // BLOCK : begin + at // BLOCK + len(part)] = part
        mean = mean_as_torch(scales)
        scales -= mean
        back = round_scales(scales)
        back += mean
        return back


def round_trip(source: LazyTensor, rounding: Rounding, *, double: bool = False) -> RoundTrip:
    """`source`, a matrix of floats, as bitsandbytes gives it back after quantising it."""
    dtype = "F32" if rounding == "int8" else source.dtype
    return RoundTrip(dtype=dtype, shape=source.shape, source=source, rounding=rounding, double=double and rounding != "int8")


@cache
def codebook(rounding: Rounding) -> np.ndarray:
    """The values of a 4-bit code in ascending order, float32. FP4 has 0 twice, of which the order of its bits does not matter here."""
    return np.array(sorted(CODES[rounding]), np.float32)


def largest(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each block of flat float32 `values`; of a short last one it is at least 1e-38."""
    loaded = load_torch()
    full = len(values) // BLOCK * BLOCK
    found: torch.Tensor = values[:full].view(-1, BLOCK).abs().amax(1)
    if full < len(values):
        found = loaded.cat([found, values[full:].abs().max().clamp(min=1e-38)[None]])
    return found


def in_units(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`values` in units of their blocks' scales, in place: times the reciprocal, but the short last block divided."""
    full = len(values) // BLOCK
    values[: full * BLOCK].view(full, BLOCK).mul_((1.0 / scale[:full].clamp(min=1e-38))[:, None])
    if full < len(scale):
        values[full * BLOCK :].div_(scale[full])
    return values.clamp_(-1, 1)


def nearest(values: torch.Tensor, table: np.ndarray) -> torch.Tensor:
    """The place in the ascending `table` of the entry that is nearest to each value, the lower one of two: the number of midpoints below
    it, counted, which is faster than searching."""
    loaded = load_torch()
    places: torch.Tensor = loaded.zeros(len(values), dtype=loaded.uint8)
    for middle in ((table[:-1] + table[1:]) / np.float32(2)).tolist():
        places.add_(values > middle)
    return places


def mean_as_torch(values: np.ndarray) -> np.float32:
    """The mean of float32 values in the order in which torch's CPU kernel of one thread adds them, which is not the exact sum."""
    width = LANES if len(values) >= LANES else 1
    vectors = values[: len(values) // width * width].reshape(-1, width)
    rows = vectors[: len(vectors) // COLUMNS * COLUMNS].reshape(-1, COLUMNS * width)
    step = 1 << max(4, ((len(rows) - 1).bit_length() if len(rows) > 1 else 0) // LEVELS)
    total = np.zeros(COLUMNS * width, np.float32)
    for level in range(LEVELS):
        full = len(rows) // step if level < LEVELS - 1 else 0
        rest = np.zeros(COLUMNS * width, np.float32)
        for row in rows[full * step :]:
            rest += row
        total += rest
        groups, rows = rows[: full * step].reshape(full, step, COLUMNS * width), np.zeros((full, COLUMNS * width), np.float32)
        for place in range(step):
            rows += groups[:, place]
    lanes = total.reshape(COLUMNS, width)
    for vector in vectors[len(vectors) // COLUMNS * COLUMNS :]:
        lanes[0] += vector
    for other in lanes[1:]:
        lanes[0] += other
    found = np.float32(0)
    for value in (*values[len(vectors) * width :], *lanes[0]):
        found += value
    return np.float32(found / np.float32(len(values)))


@cache
def dynamic_map() -> np.ndarray:
    """The 256 values of bitsandbytes' 8-bit code for scales, ascending, float32: a sign, a decimal exponent, and a fraction with the bits
    that the exponent leaves (`create_dynamic_map`)."""
    found = [0.0, 1.0]
    for exponent in range(7):
        count = (1 << exponent) + 1
        step = float((np.float32(1) - np.float32(0.1)) / np.float32(count - 1))
        places = np.arange(count)
        upward, downward = float(np.float32(0.1)) + step * places, 1 - step * places[::-1]  # rounded once, as torch's `linspace`
        ends = np.where(places < count // 2, upward, downward).astype(np.float32)
        means = (ends[:-1] + ends[1:]) / np.float32(2)
        scaled = (means * np.float32(10.0 ** (exponent - 6))).tolist()
        found += scaled + [-value for value in scaled]
    return np.array(sorted(found), np.float32)


@cache
def _places_of_steps() -> np.ndarray:
    """The code of each of the 65536 steps from -1 to 1 into which bitsandbytes rounds a value before it looks its code up."""
    table = dynamic_map()
    steps = np.float32(-1) + (np.float32(2) * np.arange(STEPS, dtype=np.float32)) / np.float32(STEPS - 1)
    return np.searchsorted(np.float32(0.5) * (table[:-1] + table[1:]), steps, side="left").astype(np.uint8)


def round_scales(scales: np.ndarray) -> np.ndarray:
    """Float32 scales, their mean taken off, after a round trip through 8 bits."""
    table, back = dynamic_map(), np.empty_like(scales)
    for first in range(0, len(scales), SCALES):
        block = scales[first : first + SCALES]
        top = np.float32(np.abs(block).max())
        if top == 0 or not np.isfinite(top):
            back[first : first + SCALES] = table[0] * top if top else 0.0
            continue
        units = np.clip(block * (np.float32(1) / top), np.float32(-1), np.float32(1))
        steps = ((units + np.float32(1)) * np.float32(0.5)) * np.float32(STEPS - 1) + np.float32(0.5)
        back[first : first + SCALES] = table[_places_of_steps()[np.minimum(steps, STEPS - 1).astype(np.int64)]] * top
    return back
