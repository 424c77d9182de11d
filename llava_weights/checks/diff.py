"""Two checkpoints, tensor by tensor: across layouts, containers, dtypes and shard sizes.

Tensors are paired by name, then by canonical name. Both sides are read in windows of rows, so memory does not grow with the
model; where the bits of a window are equal nothing is decoded. Sums are float64 over a fixed grid: the same inputs give the
same numbers, whatever `jobs` is.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from ..checkpoint.checkpoint import Checkpoint, CheckpointSource, opened
from ..errors import MOST_JOBS, UsageError, finite, whole_number
from ..events import Listener, Progress, Started, check_listener
from ..families.layouts import VOCABULARY_TABLES, BaseNames, canonical
from ..formats.folder import same_header
from ..storage.reading import Workspace, check_crcs, steady
from ..storage.threads import in_threads
from ..tensors.dtypes import ITEMSIZE, one_thread, raw_bits, to_float32
from ..tensors.lazy import FLOATS, LazyTensor
from ..tensors.windows import WINDOW_BYTES, row_ranges
from ..text import brief, fold_names
from ..transforms.gguf import as_llava_hf, left_out_of_gguf

Status = Literal["equal", "differs", "shape", "only A", "only B"]
STATUSES: tuple[Status, ...] = ("shape", "differs", "only A", "only B", "equal")  # worst first, as `table` lists them

CHUNK_VALUES = 1 << 17  # values measured at once: small enough for the processor's cache, large enough for two threads


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of A, `name`, beside its partner `other` in B; `canonical` is the name that both have in no layout. `status` is "equal",
    "differs", "shape", "only A" or "only B"; dtypes and shapes are "" and () where there is no partner.

    `elements` values were compared (of a vocabulary table the rows that both have). `different` of them have other bits, or other values
    where dtypes differ; `beyond` of these are further apart than the tolerance and decide `status`. Over finite values: `max_abs` and
    `mean_abs` of |B - A| (the mean over `elements`), `relative` = |B - A| / |A| (Frobenius norms in float64, infinite where A is zero),
    `max_ulps` the most steps between neighbouring floats (-0.0 and 0.0 are one; None for integers and where dtypes differ). `non_finite_a`
    and `non_finite_b` count inf and NaN among the different ones. `note` says what else there is to know.
    """

    name: str
    other: str
    canonical: str
    dtype_a: str
    dtype_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    status: Status
    elements: int = 0
    different: int = 0
    beyond: int = 0
    max_abs: float = 0.0
    mean_abs: float = 0.0
    max_ulps: int | None = None
    relative: float = 0.0
    non_finite_a: int = 0
    non_finite_b: int = 0
    note: str = ""

    def __repr__(self) -> str:
        apart = f", {self.different} of {self.elements} values, max |d| {self.max_abs:.1e}" if self.different else ""
        return f"TensorDifference({brief(self.name or self.other, 80)}, {self.status!r}{apart})"


@dataclass(frozen=True)
class Difference:
    """What `diff` found: the `tensors` in the order of A, then what only B has. `name_a` and `name_b` are the names of the checkpoints.
    `ignored_a` and `ignored_b` count buffers that no program reads and that were left out.
    """

    tensors: tuple[TensorDifference, ...]
    name_a: str
    name_b: str
    tolerance: float = 0.0
    ignored_a: int = 0
    ignored_b: int = 0

    def __repr__(self) -> str:
        found = ", ".join(f"{count} {status}" for status, count in self.counts.items() if count)
        return f"Difference({brief(self.name_a)}, {brief(self.name_b)}, tensors: {found or 'none'})"

    @property
    def equal(self) -> bool:
        """Whether every tensor has an equal partner."""
        return all(tensor.status == "equal" for tensor in self.tensors)

    @property
    def counts(self) -> dict[Status, int]:
        """How many tensors have each status, zeros included."""
        found = Counter(tensor.status for tensor in self.tensors)
        return {status: found[status] for status in STATUSES}


def diff(
    a: CheckpointSource,
    b: CheckpointSource,
    *,
    tolerance: float = 0.0,
    rows: bool = True,
    jobs: int = 2,
    on_event: Listener = lambda event: None,
) -> Difference:
    """Compare every tensor of `a` with its partner in `b`, across layouts, dtypes and shards. Every byte is read, nothing is written.

    GGUF is compared under the names of llava-hf, quantised values as float32, and without what llama.cpp does not read of the tower.
    Of one dtype, equal means equal bits; of two, equal values or both NaN. Values with |a - b| <= `tolerance` count as equal too. With
    `rows`, vocabulary tables of different lengths are compared on the rows that both have. `jobs` is the number of threads, from 1 to 64;
    the figures are the same with any. `on_event` is called in this thread with each Event, such as a ProgressBar; bytes are those read of
    both.

    Raises UsageError for a value that an option can't have, InputError where an input is damaged or changes meanwhile, HubError where the
    Hub can't serve one.
    """
    check_listener(on_event)
    if not 0 <= finite("tolerance", tolerance) < math.inf:
        hint = "pass 0 for equal bits, or a small number such as 1e-3"
        raise UsageError(f"the tolerance is {tolerance}, it must be a number from 0 on", hint=hint)
    whole_number("jobs", jobs, most=MOST_JOBS)
    a, b = opened(a, "first checkpoint", gguf=True), opened(b, "second checkpoint", gguf=True)
    tensors_a, tensors_b = _comparable(a, b), _comparable(b, a)
    pairs = list(_pairs(tensors_a, tensors_b, rows))
    files = {leaf.file for tensors in (tensors_a, tensors_b) for tensor in tensors.values() for leaf in tensor.leaves()}
    found = steady(lambda: _measure_all(pairs, tolerance, jobs, on_event), files, same_header)
    ignored = len(a.tensors) - len(tensors_a), len(b.tensors) - len(tensors_b)
    return Difference(tuple(found), a.origin.name, b.origin.name, tolerance, *ignored)


def _comparable(one: Checkpoint, other: Checkpoint) -> dict[str, LazyTensor]:
    """The tensors of `one` that a program reads; beside a GGUF those that such a file has, and of one under the names of llava-hf."""
    tensors = as_llava_hf(one).parameters()
    if (one.origin.container == "gguf") == (other.origin.container == "gguf"):
        return tensors
    absent = left_out_of_gguf(one, as_llava_hf(other)) if other.origin.container == "gguf" else set()
    return {name: tensor for name, tensor in tensors.items() if name not in absent}


def _measure_all(
    pairs: Sequence[tuple[TensorDifference, _Pair | None]], tolerance: float, jobs: int, on_event: Listener
) -> list[TensorDifference]:
    nbytes = [pair.a.nbytes + pair.b.nbytes if pair else 0 for _, pair in pairs]
    on_event(Started(shards=len(pairs), nbytes=sum(nbytes), what="Comparing"))
    workspaces = [Workspace() for _ in range(jobs)]
    idle, done = list(workspaces), accumulate(nbytes)  # one workspace for each thread

    def report(tensor: TensorDifference) -> None:
        on_event(Progress(next(done), tensor.name or tensor.other))

    try:
        with one_thread():
            found = in_threads(lambda task: _measure(task[0], task[1], tolerance, idle), pairs, jobs, then=report)
        for workspace in workspaces:
            workspace.recheck_sources()
        check_crcs(workspaces)
    finally:
        for workspace in workspaces:
            workspace.close()
    return found


def table(difference: Difference, *, limit: int = 20) -> list[str]:
    """Lines for people: one for each pattern of names with the same result, worst first, at most `limit`, then what is equal."""
    groups: dict[tuple[object, ...], list[TensorDifference]] = {}
    for tensor in difference.tensors:
        if tensor.status != "equal":
            name = tensor.name or tensor.other
            pattern = re.sub(r"(?<=\.)(0|[1-9][0-9]{0,8})(?=\.|$)", "{}", name, count=1)
            groups.setdefault((tensor.status, pattern, tensor.note, _kinds(tensor)), []).append(tensor)
    worst = sorted(groups.values(), key=lambda group: (STATUSES.index(group[0].status), -max(tensor.relative for tensor in group)))
    rows = [
        (group[0].status, ", ".join(fold_names(tensor.name or tensor.other for tensor in group)), _description(group)) for group in worst
    ]
    shown = rows[:limit]
    width = max((len(name) for _, name, _ in shown), default=0)
    lines = [f"{status:<7}  {name:<{width}}  {text}" for status, name, text in shown]
    if len(rows) > limit:
        lines.append(f"and {len(rows) - limit} more patterns")
    notes = Counter(tensor.note for tensor in difference.tensors if tensor.status == "equal" and tensor.note)
    more = "".join(f"; {count} {note}" for note, count in notes.items())
    lines.append(f"equal    {difference.counts['equal']} of {len(difference.tensors)} tensors{more}")
    if difference.ignored_a or difference.ignored_b:
        lines.append(f"ignored  {difference.ignored_a} buffers in A, {difference.ignored_b} in B: no program reads them")
    return lines


def document(difference: Difference) -> dict[str, Any]:
    """The same as plain data for `--json`, every tensor on its own; a `relative` without end is null."""
    tensors = [asdict(tensor) | {"relative": tensor.relative if math.isfinite(tensor.relative) else None} for tensor in difference.tensors]
    verdict = {"equal": difference.equal, "tolerance": difference.tolerance, "counts": dict(difference.counts)}
    ignored = {"a": difference.ignored_a, "b": difference.ignored_b}
    return {"a": difference.name_a, "b": difference.name_b, **verdict, "ignored": ignored, "tensors": tensors}


@dataclass(frozen=True, kw_only=True)
class _Pair(LazyTensor):
    """What is compared of two tensors: the same rows of both. Never made, only cut into row ranges that suit both."""

    a: LazyTensor
    b: LazyTensor

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.a, self.b)


def _pairs(
    tensors_a: Mapping[str, LazyTensor], tensors_b: Mapping[str, LazyTensor], rows: bool
) -> Iterator[tuple[TensorDifference, _Pair | None]]:
    """Every tensor of A, then what only B has, each with what there is to compare."""
    partner = {name: name for name in tensors_a if name in tensors_b}
    left, right = (BaseNames(name for name in side if name not in partner).canonical for side in (tensors_a, tensors_b))
    partner |= {name: right[key] for key, name in left.items() if key in right}
    for name, a in tensors_a.items():
        if name in partner:
            b = tensors_b[partner[name]]
            known = TensorDifference(name, partner[name], canonical(name), a.dtype, b.dtype, a.shape, b.shape, "shape")
            yield known, _common(known, a, b, rows)
        else:
            yield TensorDifference(name, "", canonical(name), a.dtype, "", a.shape, (), "only A"), None
    taken = set(partner.values())
    for name, b in tensors_b.items():
        if name not in taken:
            yield TensorDifference("", name, canonical(name), "", b.dtype, (), b.shape, "only B"), None


def _common(known: TensorDifference, a: LazyTensor, b: LazyTensor, rows: bool) -> _Pair | None:
    """What can be compared of the two: all of it, the common rows of a vocabulary table, or nothing."""
    table = rows and known.canonical in VOCABULARY_TABLES and len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[1]
    if a.shape != b.shape and not table:
        return None
    larger = max(a.dtype, b.dtype, key=ITEMSIZE.__getitem__)
    return _Pair(dtype=larger, shape=min(a.shape, b.shape), a=a, b=b)


@dataclass
class _Tally:
    """What is found so far. `absolute` and `squares` are sums over finite differences, `norm` over the finite squares of A."""

    different: int = 0
    beyond: int = 0
    non_finite_a: int = 0
    non_finite_b: int = 0
    ulps: int = 0
    largest: float = 0.0
    absolute: float = 0.0
    squares: float = 0.0
    norm: float = 0.0

    def add(self, bits: tuple[np.ndarray, np.ndarray], dtypes: tuple[str, str], tolerance: float) -> None:
        """Measure one chunk, given as the bits of A and B."""
        same = dtypes[0] == dtypes[1]
        a, b = _values(bits[0], dtypes[0]), _values(bits[1], dtypes[1])
        apart = bits[0] != bits[1] if same else a != b
        distance, far = np.abs(b - a), 0
        if not math.isfinite(distance.sum()):
            apart &= same or ~(np.isnan(a) & np.isnan(b))  # torch converts NaNs to other bits from lane to lane
            finite_a, finite_b = np.isfinite(a), np.isfinite(b)
            self.non_finite_a += int(np.count_nonzero(apart & ~finite_a))
            self.non_finite_b += int(np.count_nonzero(apart & ~finite_b))
            finite = finite_a & finite_b
            far = int(np.count_nonzero(apart & ~finite))
            distance, bits = distance[finite], (bits[0][finite], bits[1][finite]) if same else bits
        different = int(np.count_nonzero(apart))
        self.different += different
        self.beyond += int(np.count_nonzero(distance > tolerance)) + far if tolerance else different
        self.norm += _squares(a)
        self.largest = max(self.largest, float(distance.max(initial=0.0)))
        self.absolute += float(distance.sum())
        self.squares += float(np.square(distance, out=distance).sum())
        if same and dtypes[0] in FLOATS:
            self.ulps = max(self.ulps, _steps(*bits))


@np.errstate(all="ignore")  # inf - inf
def _measure(known: TensorDifference, pair: _Pair | None, tolerance: float, idle: list[Workspace]) -> TensorDifference:
    """`known` with its measures and its true status, where there is something to compare."""
    if pair is None:
        return known
    work = idle.pop()
    try:
        tally = _compare(pair, tolerance, work)
    finally:
        idle.append(work)
    relative = math.sqrt(tally.squares) / math.sqrt(tally.norm) if tally.norm else math.inf if tally.squares else 0.0
    return replace(
        known,
        status="differs" if tally.beyond else "equal" if known.shape_a == known.shape_b else "shape",
        elements=pair.numel,
        different=tally.different,
        beyond=tally.beyond,
        max_abs=tally.largest,
        mean_abs=tally.absolute / max(pair.numel, 1),
        max_ulps=tally.ulps if known.dtype_a == known.dtype_b and known.dtype_a in FLOATS else None,
        relative=relative,
        non_finite_a=tally.non_finite_a,
        non_finite_b=tally.non_finite_b,
        note=", ".join(_notes(known, pair, tally)),
    )


def _notes(known: TensorDifference, pair: _Pair, tally: _Tally) -> Iterator[str]:
    if known.dtype_a != known.dtype_b:
        yield f"{'' if tally.different else 'equal values, '}{known.dtype_a} vs {known.dtype_b}"
    elif tally.different and known.dtype_a in FLOATS and not (tally.ulps or tally.non_finite_a or tally.non_finite_b):
        yield "equal in value, signs of zeros differ"
    if tally.different and not tally.beyond:
        yield "within the tolerance"
    if extra := pair.b.rows - pair.a.rows:
        yield f"{pair.rows:,} common rows {'differ' if tally.beyond else 'equal'}, {abs(extra):,} more in {'B' if extra > 0 else 'A'}"


def _compare(pair: _Pair, tolerance: float, work: Workspace) -> _Tally:
    tally, skipped, dtypes = _Tally(), list[tuple[int, int]](), (pair.a.dtype, pair.b.dtype)
    for start, stop in row_ranges(pair, WINDOW_BYTES):
        with work.scratch((stop - start) * pair.a.row_nbytes) as raw_a, work.scratch((stop - start) * pair.b.row_nbytes) as raw_b:
            pair.a.rows_into(raw_a, start, stop, work)
            pair.b.rows_into(raw_b, start, stop, work)
            a, b = raw_bits(raw_a, dtypes[0]), raw_bits(raw_b, dtypes[1])
            if dtypes[0] == dtypes[1] and np.array_equal(a, b):
                skipped.append((start, stop))
                continue
            for first in range(0, len(a), CHUNK_VALUES):
                tally.add((a[first : first + CHUNK_VALUES], b[first : first + CHUNK_VALUES]), dtypes, tolerance)
    for start, stop in skipped if tally.different else ():  # they count in the norm of A, which is only needed where something differs
        with work.scratch((stop - start) * pair.a.row_nbytes) as raw_a:
            pair.a.rows_into(raw_a, start, stop, work)
            a = raw_bits(raw_a, dtypes[0])
            tally.norm += sum(_squares(_values(a[first : first + CHUNK_VALUES], dtypes[0])) for first in range(0, len(a), CHUNK_VALUES))
    return tally


def _values(bits: np.ndarray, dtype: str) -> np.ndarray:
    """float64, exact for every float dtype; integers past 2^53 are rounded."""
    if dtype in ("F64", "F32", "F16"):
        return bits.view(f"<f{bits.itemsize}").astype(np.float64)
    if dtype == "F8_E5M2":  # the upper byte of a float16
        return (bits.astype("<u2") << 8).view("<f2").astype(np.float64)
    if dtype == "F8_E4M3":  # as float16 with one exponent bit less, its bias 7 for 15; no infinity, NaN is all ones
        half = (bits.astype("<u2") & 0x80) << 8 | (bits.astype("<u2") & 0x7F) << 7
        return np.where(bits & 0x7F == 0x7F, np.nan, half.view("<f2").astype(np.float64) * 256)
    return to_float32(bits.data, dtype).astype(np.float64)


def _squares(values: np.ndarray) -> float:
    """The sum of the finite squares."""
    total = float(np.square(values).sum())
    return total if math.isfinite(total) else float(np.square(values[np.isfinite(values)]).sum())


def _steps(a: np.ndarray, b: np.ndarray) -> int:
    """The most neighbouring floats between two of these, given as unsigned sign-magnitude bits; both zeros are one float."""
    ranks = []
    for bits in (a, b):
        signed = bits.view(f"<i{bits.itemsize}")
        sign = signed >> (8 * bits.itemsize - 1)  # -1 or 0
        ranks.append((signed ^ (sign & np.iinfo(signed.dtype).max)) - sign)
    return int((np.maximum(*ranks).view(a.dtype) - np.minimum(*ranks).view(a.dtype)).max(initial=0))  # unsigned: no overflow


def _kinds(tensor: TensorDifference) -> str:
    """Dtypes and shapes where they are the news: "F16 [304, 48], F16 [320, 48]"."""
    sides = ((tensor.dtype_a, tensor.shape_a), (tensor.dtype_b, tensor.shape_b))
    return ", ".join(f"{dtype} {list(shape)}" for dtype, shape in sides if dtype) if tensor.status not in ("equal", "differs") else ""


def _description(group: Sequence[TensorDifference]) -> str:
    """What happened to these tensors, which are alike: shares over all, the worst of every measure."""
    parts = [_kinds(group[0])]
    if different := sum(tensor.different for tensor in group):
        elements = sum(tensor.elements for tensor in group)
        parts.append(f"{different:,} of {elements:,} values ({different / elements:.2%}), max {max(t.max_abs for t in group):.2g}")
        ulps = max((tensor.max_ulps for tensor in group if tensor.max_ulps is not None), default=None)
        parts.append("" if ulps is None else "1 ulp" if ulps == 1 else f"{ulps:,} ulps")
        parts.append(f"relative {max(tensor.relative for tensor in group):.2g}")
    if odd := sum(max(tensor.non_finite_a, tensor.non_finite_b) for tensor in group):
        parts.append(f"{odd:,} inf or NaN")
    return ", ".join(part for part in [*parts, group[0].note] if part)
