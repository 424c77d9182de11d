"""How time and memory grow: with bytes, with tensors, with shards. Inputs are sparse files of true shapes, outputs are real."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import llava_weights
from benchmarks.inputs import SIZES
from benchmarks.measure import measure
from benchmarks.synthetic import SHARD, TINY, cut_to, shapes, write_base, write_delta, write_lora
from llava_weights.families.decoders import Size

HEAD = 128  # channels of a head in every LLaMA
RANK = 64


@dataclass(frozen=True)
class Point:
    """One checkpoint: its shape, into files of how many bytes it is cut (inputs and output), and which command makes it."""

    axis: str
    command: str
    size: Size
    limit: int = SHARD

    @property
    def gigabytes(self) -> float:
        return sum(2 * rows_times(shape) for _, shape in shapes(self.size, 32000)) / 1e9

    @property
    def tensors(self) -> int:
        return len(list(shapes(self.size, 32000)))


def rows_times(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def points(gigabytes: float, width: str) -> Iterator[Point]:
    """Sizes up to 4 x `gigabytes`; at `gigabytes` narrower layers, so up to some 13 x the tensors; and up to 10 x the shards.

    Sizes and shards are in half the width: the vocabulary of a 13B alone is more than half a gigabyte, and a shard holds a tensor at least.
    """
    size, half = SIZES[width], narrowed(SIZES[width], 2)
    for command in ("apply-delta", "merge-lora"):
        for factor in (0.25, 0.5, 1, 2, 4):
            yield Point("size", command, cut_to(gigabytes * factor, half))
    for divisor in (1, 1.5, 2, 3.2):
        yield Point("tensors", "apply-delta", cut_to(gigabytes, narrowed(size, divisor)))
    for shards in (1, 3, 10):
        yield Point("shards", "apply-delta", cut_to(gigabytes, half), limit=int(1.05e9 * gigabytes / shards) if shards > 1 else 1 << 62)


def narrowed(size: Size, divisor: float) -> Size:
    """The same architecture with its width divided, in whole heads where there are some."""
    unit = 32 if size == TINY else HEAD
    hidden = round(size.hidden / divisor / unit) * unit
    return replace(size, hidden=hidden, heads=hidden // unit, intermediate=round(size.intermediate / divisor / 32) * 32)


def grow(root: Path, out: Path, gigabytes: float, width: str) -> Iterator[dict[str, Any]]:
    """One run per point, as rows for the report. Raises Failed."""
    for point in points(gigabytes, width):
        base, other = root / "base", root / "other"
        shutil.rmtree(root, ignore_errors=True)
        write_base(base, point.size, sparse=True, limit=point.limit)
        if point.command == "apply-delta":
            write_delta(other, point.size, sparse=True, limit=point.limit)
            options = ["--base", base, "--delta", other]
        else:
            write_lora(other, point.size, RANK, sparse=True)
            options = ["--base", base, "--lora", other]
        size = f"{min(point.limit, SHARD)}B"
        command = llava_weights(point.command, *options, "-o", out / "result", "--accept-values", "--max-shard-size", size)
        run = measure([command], [base, other], out)
        shards = len(list((out / "result").glob("*.safetensors")))
        facts = {"gigabytes": point.gigabytes, "tensors": point.tensors, "shards": shards}
        yield {"axis": point.axis, "command": point.command, **facts, "run": asdict(run)}
    shutil.rmtree(root)
