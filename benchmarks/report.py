"""Figures as Markdown: medians and ranges, ratios pair by pair, straight lines through the growth."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

EARLIER = "## More figures"
Figures = Mapping[str, Any]
Rounds = Mapping[str, Mapping[str, float]]  # one contender's runs by number of the round

MIB, GB = 1 << 20, 1e9
# Heading, key of a run, unit, digits.
COLUMNS = (
    ("wall s", "wall", 1, 2),
    ("then sync s", "settle", 1, 2),
    ("CPU s", "cpu", 1, 2),
    ("peak MiB", "peak", MIB, 0),
    ("anonymous MiB", "anonymous", MIB, 0),
    ("file MiB", "file", MIB, 0),
    ("disk read GB", "disk_read", GB, 2),
    ("disk written GB", "disk_written", GB, 2),
)
AXES = {"size": ("gigabytes", "GB", "GB"), "tensors": ("tensors", "tensors", "1,000 tensors"), "shards": ("shards", "shards", "shard")}
INTRODUCTION = """\
# Benchmarks

Made by `make bench`; everything above "More figures" is overwritten by the next run. Seconds hold for one machine only; ratios and memory
travel better. Every run is a fresh process, start-up and imports included, and its output is deleted before it. All contenders of a case
run in rounds, each round beginning with the next one and every other round backwards, since what ran before decides what the page cache
costs; ratios are taken within a round, so 2.00 means twice as long as llava-weights in the same minute. Figures are medians, in brackets
the lowest and the highest. Cold: the inputs are dropped from the page cache; warm: read once before. Some slow ones run in fewer rounds.

`then sync` is how long a `sync` takes afterwards: what a program left in memory to be written; llava-weights has
it on the disk when it ends. `peak` is the largest resident size of all its processes together; anonymous and file have peaks of
their own. Disk bytes are those of the block layer: a cached read is not among them.
"""


def render(figures: Figures, picture: str, earlier: str) -> str:
    """The whole page. `earlier` is kept as it is."""
    parts = [INTRODUCTION, machine(figures["machine"]), f"![ratios and growth]({picture})"]
    parts += [text for case in figures["cases"].values() for text in case_text(case)]
    if not_run := list(unable(figures["cases"].values())):
        parts += ["## Not run", "\n".join(not_run)]
    if figures["growth"]:
        parts += growth_text(figures["growth"])
    return "\n\n".join(part.strip() for part in (*parts, earlier) if part) + "\n"


def earlier_part(path: Path) -> str:
    """What stands in an existing page from "More figures" on."""
    _, heading, rest = (path.read_text() if path.exists() else "").partition(EARLIER)
    return heading + rest


def machine(facts: Mapping[str, str]) -> str:
    return "\n".join(["| machine | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])


def case_text(case: Figures) -> Iterator[str]:
    yield f"## {case['name']}: {case['title']}"
    yield f"{case['gigabytes']:g} GB, shapes of {case['width']}; inputs on the disk: {case['bytes'] / GB:.2f} GB."
    for cache in ("cold", "warm"):
        if case[cache]:
            yield f"### {case['name']}, {cache} cache"
            yield contenders_table(case[cache])


def contenders_table(runs: Mapping[str, Rounds]) -> str:
    """One row per contender; the first is what the others are compared with."""
    titles = ["", "runs", *(title for title, *_ in COLUMNS), "wall / llava-weights", "wall and sync / llava-weights"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    first = next(iter(runs.values()))
    for name, rounds in runs.items():
        cells = [spread([run[key] / unit for run in rounds.values()], digits) for _, key, unit, digits in COLUMNS]
        cells += [spread(ratios(first, rounds, keys), 2) for keys in (("wall",), ("wall", "settle"))]
        lines.append(f"| {name} | {len(rounds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratios(first: Rounds, other: Rounds, keys: Sequence[str] = ("wall",)) -> list[float]:
    """other / first of every round in which both ran."""
    shared = [number for number in other if number in first]
    return [sum(other[number][key] for key in keys) / max(sum(first[number][key] for key in keys), 1e-9) for number in shared]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (lowest-highest), the range left out where it rounds to nothing."""
    if not values:
        return ""
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low}-{high})"


def unable(cases: Any) -> Iterator[str]:
    for case in cases:
        for name, reason in case["not_run"].items():
            yield f"- {case['name']}, {name}: {reason}"


def growth_text(growth: Figures) -> Iterator[str]:
    yield "## Growth"
    yield (
        "One run of llava-weights per row, default options. Inputs are sparse files of true shapes, so reading them costs no disk; outputs "
        "are real. The slopes are of a straight line fitted by least squares; beside them the largest distance of a point from the line."
    )
    for (axis, command), group in groupby(growth["rows"], lambda row: (row["axis"], row["command"])):
        yield f"### {command}, by {axis}"
        yield growth_table(axis, list(group))


def growth_table(axis: str, rows: Sequence[Figures]) -> str:
    key, _, per = AXES[axis]
    lines = ["| GB | tensors | shards | wall s | CPU s | peak MiB | anonymous MiB |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        run = row["run"]
        cells = [f"{row['gigabytes']:.2f}", f"{row['tensors']:,}", f"{row['shards']}", f"{run['wall']:.2f}", f"{run['cpu']:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{run['peak'] / MIB:,.0f}", f"{run['anonymous'] / MIB:,.0f}"]) + " |")
    scale = 1000 if axis == "tensors" else 1
    xs = [row[key] / scale for row in rows]
    if len(set(xs)) < 2:
        return "\n".join(lines)
    slopes = []
    for name, unit, size in (("wall", "s", 1), ("cpu", "CPU s", 1), ("peak", "MiB", MIB)):
        begin, slope, off = line(xs, [row["run"][name] / size for row in rows])
        slopes.append(f"{slope:.2f} {unit} per {per} on {begin:.1f} {unit} (off by at most {off:.1f})")
    return "\n".join([*lines, "", "Slopes: " + "; ".join(slopes) + "."])


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """(value at 0, slope, largest distance of a point) of the straight line through the points, by least squares."""
    slope, begin = statistics.linear_regression(xs, ys)
    return begin, slope, max(abs(begin + slope * x - y) for x, y in zip(xs, ys, strict=True))
