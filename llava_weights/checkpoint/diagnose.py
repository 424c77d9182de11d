"""What a few MB of a checkpoint's values show: an unapplied delta, a wrong base, damage by bfloat16.

Shapes and names do not show these, and no published hash is needed. Everything here is a pure function of the values: rows are
sampled evenly (no random numbers) and names are sorted, so the container and its order do not matter. A model of zeros gives
"unknown" or "too few", never an error. Thresholds without a measurement beside them are the usual orders of magnitude: no
statistics of LLaMA's values were found.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import numpy as np

from ..errors import InputError
from ..storage.reading import Workspace
from ..tensors.lazy import FLOATS, LazyTensor, each, read_rows
from ..tensors.sampling import LARGEST_ROW, chosen_rows, deviation, even, finite_only, read_some, sample, sample_both
from ..tensors.windows import WINDOW_BYTES, row_ranges
from .checkpoint import Checkpoint

Tensors = Mapping[str, LazyTensor]

# Sampling: 13B has 282 matrices of 10-28 KB a row, so the round trip reads 14 MB of each side, all else together 10 MB.
MATRICES = 32  # sampled where the question is about a whole model
MORE, TIMES = 32, 3  # after an unclear round trip, so many matrices are sampled again, so many times the rows of each
LONGEST_NORM = 1 << 16

NORM = r"(.*\.)?(input_layernorm|post_attention_layernorm|attention_norm|ffn_norm|norm)\.weight"
NOT_TEXT = r"(.*\.)?(vision_tower|vision_model|mm_projector|multi_modal_projector)\..*"  # a delta holds these whole

POSITIVE = 0.9  # least share of positive entries in a model's RMSNorm vector, and of the vectors that must have it
BALANCED = (0.3, 0.7)  # the same share in a delta, without exact zeros (most entries are zero where the learning rate was small)
SMALL_NORM = 5e-2  # greatest median |x| in a delta; the tests' deltas have 1.2e-2 and 1.3e-2
SMALL_MATRIX = 5e-3  # greatest standard deviation in a delta (LLaMA: 1e-2 to 3e-2; other models may have less, so it decides nothing alone)

PASS, FAIL = 1e-3, 5e-3  # share of failing elements. Right base: 0 to 4e-5; Vicuna as base: 1e-2 to 2e-1; unrelated: 0.3
ENOUGH = 1024  # elements: if none of so many fails, the share is below 0.3 % (95 % confidence)
ENOUGH_OF_ONE, FAILING_OF_ONE = 256, 8  # elements, and failing ones, to call one matrix bad: fewer may be chance

PLAUSIBLE = 0.5  # greatest |delta| / |base|. Expected 0.005 to 0.3, measured 0.0005 to 0.1 for changes of 1e-5 to 2e-3
SAME_SIZE = (0.5, 2.0)
ALIGNED = 0.8  # least |cosine|. Of a tuned model with its base: > 0.95; of (unrelated model - base) with the base: -0.71
MODELS = ("llama", "llava", "llava-hf")  # layouts that hold RMSNorm vectors to judge by
EXTRA_ROWS_STD = (0.1, 10.0)  # standard deviation of added rows, as a multiple of the trained rows'
LLAMA1_EPS_1E6 = (4096, 5120, 6656)  # hidden sizes of LLaMA 1 with rms_norm_eps 1e-6; 65B has 1e-5 (Meta's params.json)


@dataclass(frozen=True)
class State:
    """Whole weights or an unapplied delta: medians over the RMSNorm vectors, and the median standard deviation of matrices."""

    verdict: Literal["weights", "delta", "unknown"]
    norms: int
    median: float
    matrix_std: float
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class RoundTrip:
    """How much of a delta can't come from this base. `worst` are matrices with their shares; of `tensors` matrices, `bad` surely fail."""

    share: float
    sampled: int
    failing: int
    worst: tuple[tuple[str, float], ...]
    verdict: Literal["right", "wrong", "unclear", "too few"]
    tensors: int
    bad: int


@dataclass(frozen=True)
class Pair:
    """Size and direction of a delta beside its base: medians over matrices of |delta| / |base| and of the cosine."""

    verdict: Literal["plausible", "full model", "subtracted twice", "identical", "swapped", "unlike", "too few"]
    ratio: float
    cosine: float
    tensors: int
    evidence: str


@dataclass(frozen=True)
class Bf16:
    """The share of sampled non-zero values that bfloat16 can hold, the commonest dtype, and the matrices with no other values."""

    share: float
    sampled: int
    dtype: str
    names: tuple[str, ...]

    @property
    def damaged(self) -> bool:
        return bool(self.names)


@dataclass(frozen=True)
class ExtraRows:
    """Rows that a delta adds to one tensor: their number, and their standard deviation as a multiple of the base's rows'."""

    name: str
    count: int
    finite: bool
    std: float
    ratio: float
    verdict: Literal["plausible", "odd", "unknown"]


@np.errstate(all="ignore")
def state(tensors: Tensors) -> State:
    """Judge one checkpoint by its RMSNorm vectors: of ordinary size and positive in a model, small and of both signs in a delta.

    Where their signs do not decide (all zero: never trained), it is a delta if its vectors and its matrices are small.
    """
    norms = {name: t for name, t in sorted(tensors.items()) if _is_norm(name, t)}
    matrices = _spread([name for name in float_matrices(tensors) if not re.fullmatch(NOT_TEXT, name)], MATRICES)
    read = each(lambda name, work: finite_only(read_rows(norms[name], 0, min(norms[name].rows, LONGEST_NORM), work).ravel()), norms, norms)
    vectors = list(read.values())
    with closing(Workspace(drop_cache=False)) as work:
        matrix_std = median([deviation(finite_only(sample(tensors[name], work))) for name in matrices] or [0.0])
    shares = [float(np.mean(x > 0)) if x.size else 0.0 for x in vectors]
    sizes = [float(np.median(np.abs(x))) if x.size else 0.0 for x in vectors]
    like_model = sum(share > POSITIVE for share in shares)
    signs = [float(np.mean(x[x != 0] > 0)) for x in vectors if np.any(x)]
    like_delta = sum(BALANCED[0] <= sign <= BALANCED[1] for sign in signs)
    typical = median(sizes or [0.0])
    verdict: Literal["weights", "delta", "unknown"] = "unknown"
    if norms and like_model >= POSITIVE * len(norms):
        verdict = "weights"
    elif norms and typical < SMALL_NORM and (like_delta >= max(1, POSITIVE * len(signs)) or 0 < matrix_std < SMALL_MATRIX):
        verdict = "delta"
    evidence = (
        f"{like_model} of {len(norms)} RMSNorm vectors are positive as in a model, {like_delta} have both signs; median size {typical:.2g}",
        f"matrix values have a standard deviation of {matrix_std:.2g}",
    )
    return State(verdict, len(norms), typical, matrix_std, evidence)


def role_of(checkpoint: Checkpoint) -> str:
    """The role of a checkpoint for `holes.Watch`, by its names and values: "lora" or "delta" for differences, "" for values."""
    if checkpoint.layout == "adapter":
        return "lora"
    with suppress(InputError):  # reading all values will raise it again
        if checkpoint.layout in MODELS and state(checkpoint.parameters()).verdict == "delta":
            return "delta"
    return ""


@np.errstate(all="ignore")
def round_trip(base: Tensors, delta: Tensors) -> RoundTrip:
    """Whether `delta` was made by subtracting this `base` in fp16. If so, `fp16(fp16(b + d) - b) == d`; for other bases it often fails.

    Looks at matrices only, at rows that both have, where `d != 0` and all is finite; one bad matrix is enough for "wrong". Swapped
    arguments and a delta that was subtracted twice are for `pair` to find.
    """
    names = _common(base, delta)
    counts = each(lambda name, work: _failing(base[name], delta[name], work), names, base, delta)
    judged = _judge(counts)
    if judged.verdict != "unclear":
        return judged
    again = sorted((name for name in names if counts[name][0]), key=lambda name: (-counts[name][0], name))[:MORE]
    counts |= each(lambda name, work: _failing(base[name], delta[name], work, times=TIMES), again, base, delta)
    return _judge(counts, final=True)


@np.errstate(all="ignore")
def round_trip_of(samples: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> RoundTrip:
    """As `round_trip`, of values of the base and of the delta at the same places of each matrix, when there are no others to look at."""
    return _judge({name: _count(base, delta) for name, (base, delta) in samples.items()}, final=True)


@np.errstate(all="ignore")
def pair(base: Tensors, delta: Tensors, *, difference: bool = True) -> Pair:
    """Whether `delta` has the size and direction of a difference. With `difference=False` it is a tuned model: `base` is subtracted."""
    ratios, cosines, elements, moved = [], [], 0, False
    with closing(Workspace(drop_cache=False)) as work:
        for name in _spread(_common(base, delta), MATRICES):
            b, d = (values.astype(np.float64) for values in sample_both(base[name], delta[name], work))
            d = d if difference else d - b
            known = np.isfinite(b) & np.isfinite(d) & (b != 0)
            b, d = b[known], d[known]
            elements, moved = elements + b.size, moved or bool(np.any(d))
            if np.any(d):
                bb, dd, db = (float(np.sum(product)) for product in (b * b, d * d, d * b))  # not by BLAS, whose order of adding varies
                ratios.append(math.sqrt(dd / bb))
                cosines.append(db / math.sqrt(dd * bb))
    ratio, cosine = median(ratios or [0.0]), median(cosines or [0.0])
    verdict: Literal["plausible", "full model", "subtracted twice", "identical", "swapped", "unlike", "too few"] = "unlike"
    if elements < ENOUGH:
        verdict = "too few"
    elif not moved:
        verdict = "identical"
    elif ratio <= PLAUSIBLE:
        verdict = "plausible"
    elif ratio > SAME_SIZE[1]:
        verdict = "swapped"
    elif abs(cosine) > ALIGNED and ratio >= SAME_SIZE[0]:
        verdict = "full model" if cosine > 0 else "subtracted twice"
    evidence = f"{ratio:.3g} times the base's size, cosine with the base {round(cosine, 2) + 0.0:.2f}"
    return Pair(verdict, ratio, cosine, len(ratios), evidence)


@np.errstate(all="ignore")
def bf16_damaged(tensors: Tensors) -> Bf16:
    """Whether these weights went through bfloat16, whatever their dtype is now. Of genuine fp16 values, bfloat16 can hold 1 in 8.

    For weights only: the values of a delta are small multiples of the weights' last bit, and bfloat16 can hold nearly all.
    """
    matrices = float_matrices(tensors)
    names, sampled, fitting = [], 0, 0
    with closing(Workspace(drop_cache=False)) as work:
        for name in _spread(matrices, MATRICES):
            values = sample(tensors[name], work)
            values = values[values != 0]
            fits = int(np.count_nonzero((values.view(np.uint32) & 0xFFFF) == 0))
            sampled, fitting = sampled + values.size, fitting + fits
            if tensors[name].dtype == "BF16" or fits == values.size >= ENOUGH_OF_ONE:
                names.append(name)
    dtypes = Counter(tensors[name].dtype for name in matrices).most_common(1)
    return Bf16(fitting / sampled if sampled else 0.0, sampled, dtypes[0][0] if dtypes else "", tuple(names))


@np.errstate(all="ignore")
def extra_rows(delta: Tensors, base: Tensors) -> tuple[ExtraRows, ...]:
    """The rows of each matrix of `delta` that `base` lacks (added tokens): a delta holds them whole, so they should look like weights."""
    found = []
    with closing(Workspace(drop_cache=False)) as work:
        for name in _common(base, delta):
            first, rows = base[name].rows, delta[name].rows
            if rows <= first:
                continue
            values = read_some(delta[name], [first + i for i in chosen_rows(rows - first, delta[name], MATRICES)], work)
            finite = bool(np.all(np.isfinite(values)))
            std, usual = deviation(finite_only(values)), deviation(finite_only(sample(base[name], work)))
            ratio = std / usual if usual else 0.0
            sane = finite and EXTRA_ROWS_STD[0] <= ratio <= EXTRA_ROWS_STD[1]
            verdict: Literal["plausible", "odd", "unknown"] = "plausible" if sane else "odd" if usual or not finite else "unknown"
            found.append(ExtraRows(name, rows - first, finite, std, ratio, verdict))
    return tuple(found)


@np.errstate(all="ignore")
def non_finite(tensors: Tensors, names: Iterable[str], *, window: int = WINDOW_BYTES) -> list[str]:
    """Those of `names` that hold inf or NaN anywhere. Reads them whole, window by window: for small tensors."""
    bad = []
    with closing(Workspace(drop_cache=False)) as work:
        for name in names:
            tensor = tensors[name]
            if tensor.dtype not in FLOATS or not tensor.numel:
                continue
            windows = (read_rows(tensor, start, stop, work) for start, stop in row_ranges(tensor, window))
            if not all(np.isfinite(values).all() for values in windows):
                bad.append(name)
    return bad


def llama2_hints(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What in a config suggests Llama 2 where LLaMA 1 is needed: evidence only, since configs get edited."""

    def number(key: str) -> float:
        value = config.get(key)
        return float(value) if isinstance(value, int | float) else 0.0

    hints = []
    if number("max_position_embeddings") == 4096:
        hints.append("max_position_embeddings 4096 (LLaMA 1: 2048)")
    if number("hidden_size") in LLAMA1_EPS_1E6 and math.isclose(number("rms_norm_eps"), 1e-5, rel_tol=1e-3):
        hints.append("rms_norm_eps 1e-05 (LLaMA 1: 1e-06)")
    if 0 < number("num_key_value_heads") < number("num_attention_heads"):
        hints.append("grouped key/value heads (LLaMA 1: none)")
    return tuple(hints)


def is_llama1(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a LLaMA 1 up to 30B: 65B has the rms_norm_eps of Llama 2, so its config can't show it."""
    eps = config.get("rms_norm_eps")
    return isinstance(eps, float) and math.isclose(eps, 1e-6, rel_tol=1e-3) and not llama2_hints(config)


def _judge(counts: Mapping[str, tuple[int, int]], *, final: bool = False) -> RoundTrip:
    failing, sampled = (sum(column) for column in zip(*counts.values(), strict=True)) if counts else (0, 0)
    share = failing / sampled if sampled else 0.0
    shares = {name: f / n for name, (f, n) in counts.items() if f and n >= ENOUGH_OF_ONE}
    bad = sum(share > FAIL and counts[name][0] >= FAILING_OF_ONE for name, share in shares.items())
    verdict: Literal["right", "wrong", "unclear", "too few"] = "unclear"
    if sampled < ENOUGH:
        verdict = "too few"
    elif share > FAIL or bad or (final and share - 3 * math.sqrt(share / sampled) > PASS):  # 3 standard errors
        verdict = "wrong"
    elif share < PASS:
        verdict = "right"
    worst = sorted(shares.items(), key=lambda item: (-item[1], item[0]))[:8]
    return RoundTrip(share, sampled, failing, tuple(worst), verdict, sum(n > 0 for _, n in counts.values()), bad)


def _failing(base: LazyTensor, delta: LazyTensor, work: Workspace, *, times: int = 1) -> tuple[int, int]:
    """How many sampled elements do not survive the round trip, and how many were sampled."""
    return _count(*sample_both(base, delta, work, times=times))


def _count(base: np.ndarray, delta: np.ndarray) -> tuple[int, int]:
    b, d = base.astype(np.float16), delta.astype(np.float16)
    asked = np.isfinite(b) & np.isfinite(d) & (d != 0)
    return int(np.count_nonzero(((b + d) - b != d) & asked)), int(np.count_nonzero(asked))


def _is_norm(name: str, tensor: LazyTensor) -> bool:
    text = re.fullmatch(NORM, name) and not re.fullmatch(NOT_TEXT, name)
    return bool(text) and len(tensor.shape) == 1 and tensor.rows > 0 and tensor.dtype in FLOATS


def float_matrices(tensors: Tensors) -> list[str]:
    """Names of the matrices of floats, sorted: containers order tensors differently."""
    matrices = {name: t for name, t in tensors.items() if len(t.shape) == 2 and t.numel and t.dtype in FLOATS}
    return sorted(name for name, t in matrices.items() if t.row_nbytes <= LARGEST_ROW)


def _common(base: Tensors, delta: Tensors) -> list[str]:
    """Names of the matrices that both have, with rows of the same length."""
    in_base = set(float_matrices(base))
    return [name for name in float_matrices(delta) if name in in_base and base[name].shape[1:] == delta[name].shape[1:]]


def _spread(names: Sequence[str], count: int) -> list[str]:
    return [names[i] for i in even(len(names), count)]
