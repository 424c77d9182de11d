"""Low-rank updates, lazily: `W + s B A` in blocks of rows, with PEFT's bits on the same machine or with portable ones.

The last bits of a matrix product depend on the kernel that a BLAS picks, and for a few rows or columns it picks another (below
4 rows or 12 columns with AVX2, for 1 row with AVX-512). So products are made on a fixed grid of blocks, whatever rows are asked
for, and the bits depend neither on windows nor on workers. Several adapters are summed first and rounded once: W + the sum of
w_i s_i B_i A_i. (PEFT merges them one after another, with a rounding each; its `add_weighted_adapter("linear")` mixes factors.)

How much of an update D survives in the rounded result W' is tallied while rows are merged, on a fixed sample of the rows of large
matrices. Tallies, each also as `<label>.<name>`: elements that an update was to change (`updated`: D != 0) and that it did change
(`moved`), and the sums of squares `update_sq` of D and `lost_sq` of W' - W - D in units of `SQUARE`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import MismatchError
from ..storage.reading import Workspace
from .dtypes import TORCH_DTYPE, as_torch, count_non_finite
from .exact import exact_slices, round_once, row_sums
from .lazy import FLOATS, LazyTensor

if TYPE_CHECKING:
    import torch


SQUARE = 2.0**-100  # squares are summed as whole numbers of this, so that the order of the rows does not matter


@dataclass(frozen=True)
class Retention:
    """How much of the updates survived the rounding: `updated` elements were to change, `moved` ones did; `kept` is 1 minus the norm
    of what is missing, divided by the norm of the updates."""

    updated: int
    moved: int
    kept: float


def retention(tallies: Mapping[str, int], label: str = "") -> Retention | None:
    """The retention of all updates, or of those of one kind of module such as "q_proj"; None where there were none."""
    start = f"{label}." if label else ""
    updated, moved, lost, update = (tallies.get(start + name, 0) for name in ("updated", "moved", "lost_sq", "update_sq"))
    return Retention(updated, moved, max(0.0, 1 - math.sqrt(lost / update))) if update else None


def tally(tallies: Counter[str], label: str, before: torch.Tensor, after: torch.Tensor, update: torch.Tensor, wanted: slice) -> None:
    """Add to the tallies the `wanted` rows of W, W' and D (before any rounding), which are float32 or float64."""
    change = after - before
    moved, updated = _non_zero(change[wanted]), _non_zero(update[wanted])
    counts = {"moved": moved, "updated": updated, "update_sq": _squares(update, wanted), "lost_sq": _squares(change - update, wanted)}
    for name, number in counts.items():
        tallies[name] += number
        tallies[f"{label}.{name}"] += number


def _non_zero(values: torch.Tensor) -> int:
    """numpy compares and counts 8 times as fast as torch."""
    return int(np.count_nonzero(values.numpy() != 0))


def _squares(values: torch.Tensor, wanted: slice) -> int:
    """The sum of squares of these rows. A row that overflows is left out: its result is not finite, which ends the run."""
    import torch

    norms: list[float] = torch.linalg.vector_norm(values, dim=1)[wanted].tolist()
    return sum(int(norm * norm / SQUARE) for norm in norms if math.isfinite(norm))


UpdateKind = Literal["linear", "embedding", "conv", "parameter", "bias"]
Arithmetic = Literal["peft", "peft-safe", "peft-half", "exact"]
"""How W, of dtype d, and an update D are rounded. The rules of PEFT 0.21.2, `tuners/lora/layer.py` and `variants.py`:

- `peft`, `merge_and_unload()`: factors and D in float32, W + D rounded once. Only embeddings and parameters round D to d first.
- `peft-safe`, `safe_merge=True`: D is rounded to d first, but not that of a bias or of a DoRA.
- `peft-half`, `autocast_adapter_dtype=False`, also PEFT 0.7-0.11, so LLaVA's own merges of 2024: the factors are rounded to d,
  widened for the product, and D is rounded to d.
- `exact`: all in float64 and rounded once; the same bits on every machine.
"""

BLOCK_ROWS = 128  # rows of a product, the last block up to 255: far from where kernels change, and 7 MB of float32 for 13824 columns
COUNTED = 8  # blocks of each matrix, evenly spread, that are tallied: tallying all took half as long as the products
PART_VALUES = 1 << 17  # elements that are rounded and tallied at a time, so that they stay in cache
SLICES = 3  # of a factor in `exact`, unless its values differ by more than 2**60 along r


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """One adapter's update `weight * scale * B @ A` of one tensor, with the factors as stored.

    kind         tensor                          a                    b
    linear       (out, in)                       (r, in)              (out, r)
    embedding    (vocabulary, out)               (r, vocabulary)      (out, r)
    conv         (out, in, kernel...)            (r, in, kernel...)   (out, r, 1...)
    parameter    (out, in), (experts, out, in)   (experts * r, in)    (out, r * experts)
    bias         (out,)                          none                 (out,)

    `fan_in_fan_out` says that a linear tensor, or each matrix of a stack of experts, is stored (in, out); for experts, PEFT reads this
    from the module's `is_transposed`. `parameter` is PEFT's `target_parameters`. A `magnitude`, of `out` values, makes it a DoRA; then
    `weight` scales the whole change of the tensor. `mlx` stands for the rules of MLX's `fuse` in every arithmetic but "exact": the scale
    goes into the factor of the outputs, D is rounded before it is added, and a DoRA takes the norms of that sum, rounded too.
    """

    kind: UpdateKind
    b: LazyTensor
    a: LazyTensor | None = None
    scale: float  # alpha / r, or alpha / sqrt(r) with rsLoRA
    weight: float = 1.0
    magnitude: LazyTensor | None = None
    fan_in_fan_out: bool = False
    mlx: bool = False

    @property
    def transposed(self) -> bool:
        return self.kind == "embedding" or self.fan_in_fan_out

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        return tuple(tensor for tensor in (self.a, self.b, self.magnitude) if tensor is not None)

    @property
    def is_product(self) -> bool:
        """Whether PEFT multiplies matrices: it makes a spatial convolution by convolving, and a bias has one factor."""
        return self.kind != "bias" and (self.kind != "conv" or (self.a is not None and self.a.shape[2:] == (1, 1)))


@dataclass(frozen=True)
class Factors:
    """An update in memory: pairs of A (experts, r, in) and B (experts, out, r), whose products are summed in this order; or the
    `whole` unscaled update, where PEFT does not multiply matrices. For a DoRA also the magnitude of each row, or the factor of each
    column where the tensor is stored (in, out)."""

    update: LowRank
    pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    whole: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

    def product(self, matrix: int, rows: slice, columns: slice = slice(None)) -> torch.Tensor:
        """A part of `scale * B @ A`, laid out as the tensor is; of a DoRA without its weight. Made with PEFT's own calls, for its bits."""
        import torch

        update = self.update
        scale = update.scale if update.magnitude else update.scale * update.weight
        if self.whole is not None:
            return self.whole[rows] * scale
        total: torch.Tensor | None = None
        for a, b in self.pairs:
            a, b = a[matrix], b[matrix]
            if update.kind == "parameter":
                part = a.T[rows] @ b.T if update.transposed else b[rows] @ a
            else:
                part = (b[columns] @ a[:, rows]).T if update.transposed else b[rows] @ a
            total = part if total is None else total.add_(part)
        assert total is not None
        if total.dtype == torch.float64:
            total.add_(0.0)  # whether a zero is negative is up to the BLAS
        return total.mul_(scale).to(torch.promote_types(total.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class AddLowRank(LazyTensor):
    """`base` plus all `updates`, in the base's dtype; made and checked by `add_low_rank`. Its tallies are those of the module's top."""

    base: LazyTensor
    updates: tuple[LowRank, ...]
    arithmetic: Arithmetic
    label: str

    @property
    def uses_torch(self) -> bool:
        return True

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.base, *(tensor for update in self.updates for tensor in update.tensors))

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(count, rows, columns): a stack of experts is many matrices; a convolution's kernel lies in its columns."""
        if self.updates[0].kind == "parameter" and len(self.shape) == 3:
            return self.shape[0], self.shape[1], self.shape[2]
        return 1, self.rows, math.prod(self.shape[1:])

    @property
    def lines(self) -> int:
        """How many rows of matrices one row of the tensor holds."""
        return self.matrices[0] * self.matrices[1] // max(self.rows, 1)

    @property
    def row_unit(self) -> int:
        return math.lcm(self.base.row_unit, max(min(BLOCK_ROWS, self.rows), 1) if self.lines == 1 else 1)

    def scratch(self, rows: int) -> int:
        _, size, columns = self.matrices
        exact, factors = self.arithmetic == "exact", [tensor for update in self.updates for tensor in update.tensors]
        wide = 8 if exact or self.dtype == "F64" else 4
        held = wide * (SLICES if exact else 1) * sum(tensor.numel for tensor in factors)
        held += wide * sum(self.numel for update in self.updates if not update.is_product)
        merging = wide * columns * min(2 * BLOCK_ROWS, size) * (len(self.updates) + 1)
        merging += wide * columns * (PART_VALUES // max(columns, 1) + 2) * 8  # W, W + D, what was rounded, what was lost, squares...
        if rows != self.rows and rows % self.row_unit:
            merging += (rows + 2 * self.row_unit) * self.row_nbytes
        loading = max(tensor.nbytes + tensor.scratch(tensor.rows) + 3 * wide * tensor.numel for tensor in factors)
        if any(update.magnitude and update.transposed for update in self.updates):
            loading = max(loading, self.nbytes + wide * size * min(2 * BLOCK_ROWS, columns) * 6)
        return held + max(loading, merging) + self.base.scratch(rows)

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        if not len(out):
            return
        lines, nbytes = self.lines, self.row_nbytes
        factors = work.latest(self, lambda: [load(update, self, work) for update in self.updates])
        blocks = blocks_touched(start * lines, stop * lines, self.matrices[1], BLOCK_ROWS)
        first, last = blocks[0].start // lines, blocks[-1].stop // lines
        with work.scratch((last - first) * nbytes if (first, last) != (start, stop) else 0) as around:
            target = around or out
            self.base.rows_into(target, first, last, work)
            weight = as_torch(target, self.dtype).view(-1, self.matrices[2])
            for block in blocks:
                here = weight[block.start - first * lines : block.stop - first * lines]
                wanted = slice(max(start * lines - block.start, 0), min(stop * lines, block.stop) - block.start)
                self._merge(here, factors, block.start, wanted, work)
            if around:
                out[:] = around[(start - first) * nbytes : (stop - first) * nbytes]
        work.tallies["non_finite"] += count_non_finite(out, self.dtype, work)

    def _merge(self, weight: torch.Tensor, factors: Sequence[Factors], at: int, wanted: slice, work: Workspace) -> None:
        """Merge a block in place; its first line is line `at` of the tensor. Lines that are not `wanted` may stay as they are."""
        matrix, begin = divmod(at, self.matrices[1])
        counts = begin // BLOCK_ROWS % max(self.matrices[1] // BLOCK_ROWS // COUNTED, 1) == 0
        changes = [factor.product(matrix, slice(begin, begin + len(weight))) for factor in factors]
        if not (counts or self._rounds_first or any(factor.magnitude is not None for factor in factors) or changes[0].element_size() > 4):
            add_wide(weight[wanted], [change[wanted] for change in changes])
            return
        for part in blocks_touched(wanted.start, wanted.stop, len(weight), max(PART_VALUES // weight.shape[1], 2)):
            before = weight[part].to(changes[0].dtype, copy=True)
            rows = slice(begin + part.start, begin + part.stop)
            update, result = self._result(before, factors, [change[part] for change in changes], rows)
            weight[part] = round_once(result, weight.dtype)
            if counts:
                counted = slice(max(wanted.start - part.start, 0), min(wanted.stop, part.stop) - part.start)
                tally(work.tallies, self.label, before, weight[part].to(before.dtype), update, counted)

    def _result(
        self, weight: torch.Tensor, factors: Sequence[Factors], changes: Sequence[torch.Tensor], rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """D before any rounding, and W' before its last."""
        total: torch.Tensor | None = None
        for factor, change in zip(factors, changes, strict=True):
            if factor.magnitude is not None:
                moved = self.moved(weight, change)
                ratio = factor.magnitude if factor.update.transposed else (factor.magnitude[rows] / self.norms(moved))[:, None]
                merged = (ratio * moved).to(weight.dtype)
                if len(factors) == 1 and factor.update.weight == 1:
                    return merged - weight, merged
                change = (merged - weight) * factor.update.weight
            total = change if total is None else total + change
        assert total is not None
        return total, weight + (self.rounded(total) if self._rounds_first else total)

    @property
    def _rounds_first(self) -> bool:
        kind = self.updates[0].kind
        if self._by_mlx:
            return True
        rules = {"peft": kind in ("embedding", "parameter"), "peft-safe": kind != "bias", "peft-half": True, "exact": False}
        return rules[self.arithmetic]

    @property
    def _by_mlx(self) -> bool:
        return self.arithmetic != "exact" and any(update.mlx for update in self.updates)

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        import torch

        return values.to(getattr(torch, TORCH_DTYPE[self.dtype]))

    def moved(self, weight: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """W + D in a DoRA, whose every step `peft-half` rounds; MLX takes the norms of the sum after its rounding."""
        if self._by_mlx:
            return self.rounded(weight + self.rounded(change)).to(weight.dtype)
        return self.rounded(weight + self.rounded(change)) if self.arithmetic == "peft-half" else weight + change

    def norms(self, rows: torch.Tensor) -> torch.Tensor:
        import torch

        return row_sums(rows * rows).sqrt() if self.arithmetic == "exact" else torch.linalg.vector_norm(rows, dim=1)


def add_wide(weight: torch.Tensor, changes: Sequence[torch.Tensor]) -> None:
    """Add float32 `changes`, of which the first is used up, to `weight` in float32, and round once; the same bits as `_result` and
    `round_once`, with one buffer in cache in place of three new tensors: less than half of the time."""
    import torch

    total = changes[0]
    for change in changes[1:]:
        total.add_(change)
    step = max(PART_VALUES // weight.shape[1], 2)
    wide = torch.empty((min(step, len(weight)), weight.shape[1]), dtype=total.dtype)
    for start in range(0, len(weight), step):
        part = weight[start : start + step]
        wide[: len(part)].copy_(part).add_(total[start : start + step])
        part.copy_(wide[: len(part)])


def blocks_touched(start: int, stop: int, size: int, unit: int) -> list[slice]:
    """The blocks of `unit` lines that lines [start, stop) touch. Each matrix, of `size` lines, begins with a new block; lines that are
    left over at its end belong to its last block."""
    found, last = [], max(size // unit, 1) - 1
    for first in range(start // size * size, stop, size):
        for number in range(min(max(start - first, 0) // unit, last), min((min(stop - first, size) - 1) // unit, last) + 1):
            found.append(slice(first + number * unit, first + (size if number == last else (number + 1) * unit)))
    return found


def load(update: LowRank, target: AddLowRank, work: Workspace) -> Factors:
    """Read an update's factors and round, widen or slice them as the arithmetic says."""
    import torch

    exact, half = target.arithmetic == "exact", target.arithmetic == "peft-half"
    dtype = getattr(torch, TORCH_DTYPE[target.dtype])
    wide = torch.float64 if exact else torch.promote_types(dtype, torch.float32)

    def read(tensor: LazyTensor) -> torch.Tensor:
        with work.scratch(tensor.nbytes) as raw:
            tensor.rows_into(raw, 0, tensor.rows, work)
            stored = as_torch(raw, tensor.dtype).view(tensor.shape)
            return (stored.to(dtype) if half else stored).to(wide, copy=True)

    b = read(update.b)
    if update.a is None:
        return Factors(update, (), b[:, None])
    a, magnitude = read(update.a), read(update.magnitude).flatten() if update.magnitude else None
    if update.mlx and not exact:
        (a if update.kind == "embedding" else b).mul_(update.scale)
        update = replace(update, scale=1.0)
    if magnitude is not None and half:
        magnitude = magnitude.to(dtype)
    if not exact and not update.is_product:
        convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[a.dim() - 3]
        return Factors(update, (), convolve(a.transpose(0, 1), b).transpose(0, 1).flatten(1), magnitude)
    count = target.matrices[0]
    a = a.view(count, len(a) // count, -1)
    b = b.view(len(b), -1, count).permute(2, 0, 1)  # experts vary fastest in B, slowest in A
    if half and len(target.shape) == 3 and update.kind == "parameter":
        a, b = a.to(dtype), b.to(dtype)  # PEFT multiplies these as they are
    slices = (exact_slices(a, 1), exact_slices(b, 2)) if exact else ([a], [b])
    pairs = [(i + j, x, y) for i, x in enumerate(slices[0]) for j, y in enumerate(slices[1])]
    pairs.sort(key=lambda pair: -pair[0])  # the smallest products first
    factors = Factors(update, tuple((x, y) for _, x, y in pairs), None, magnitude)
    if magnitude is None or not update.transposed:
        return factors
    return replace(factors, magnitude=magnitude / column_norms(factors, target, work))


def column_norms(factors: Factors, target: AddLowRank, work: Workspace) -> torch.Tensor:
    """Norms of the columns of W + D, for which all of W is read. A transposed view, not a copy, keeps PEFT's order of summing."""
    import torch

    assert factors.magnitude is not None
    norms = torch.empty_like(factors.magnitude)
    with work.scratch(target.nbytes) as raw:
        target.base.rows_into(raw, 0, target.rows, work)
        weight = as_torch(raw, target.dtype).view(target.shape)
        for columns in blocks_touched(0, len(norms), len(norms), BLOCK_ROWS):
            change = factors.product(0, slice(None), columns)
            norms[columns] = target.norms(target.moved(weight[:, columns].to(change.dtype), change).T)
    return norms


def add_low_rank(base: LazyTensor, updates: Sequence[LowRank], arithmetic: Arithmetic = "peft", *, name: str) -> LazyTensor:
    """`base`, the tensor `name`, plus the weighted sum of `updates`; `base` itself where there are none.

    Raises MismatchError, with names and shapes, where an update does not fit the tensor or two are of different kinds.
    """
    for update in updates:
        if not fits(update, base.shape) or {tensor.dtype for tensor in (base, *update.tensors)} - set(FLOATS):
            parts = {"tensor": base, "A": update.a, "B": update.b, "magnitude": update.magnitude}
            facts = {part: f"{tensor.dtype} {list(tensor.shape)}" for part, tensor in parts.items() if tensor}
            hint = "give the base that the adapter was trained on"
            raise MismatchError(f"the adapter does not fit `{name}`", facts={"kind": update.kind, **facts}, hint=hint)
        if update.kind != updates[0].kind:
            what = f"the adapters change `{name}` in different ways, one as {updates[0].kind}, one as {update.kind}"
            raise MismatchError(what, hint="merge them one after the other")
    label = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    made = AddLowRank(dtype=base.dtype, shape=base.shape, base=base, updates=tuple(updates), arithmetic=arithmetic, label=label)
    return made if updates else base


def fits(update: LowRank, shape: tuple[int, ...]) -> bool:
    """Whether the factors have the shapes that the table of `LowRank` gives for a tensor of this shape."""
    a, b = update.a.shape if update.a else (), update.b.shape
    if update.kind == "bias":
        return not a and len(shape) == 1 and b == shape and not update.magnitude
    if len(shape) < 2 or len(b) < 2 or not b[1] or (update.magnitude and (update.kind == "parameter" or update.magnitude.numel != b[0])):
        return False
    if update.kind == "conv":
        return len(shape) in (3, 4, 5) and a == (b[1], *shape[1:]) and b == (shape[0], b[1], *(1 for _ in shape[2:]))
    stacked = update.kind == "parameter" and len(shape) == 3
    outer, inner = shape[-2:][::-1] if update.transposed else shape[-2:]
    return len(shape) == 2 + stacked and b == (outer, b[1]) and a == (b[1], inner) and b[1] % (shape[0] if stacked else 1) == 0
