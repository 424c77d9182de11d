"""The figures as an SVG: bars of the ratios, lines of the growth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import Any

from benchmarks.report import AXES, MIB, Figures, ratios

WIDTH, LEFT, RIGHT, ROW = 960, 330, 90, 20
PANEL_WIDTH, PANEL_HEIGHT = 290, 210
COLOURS = ("#2166ac", "#b2182b")
GRID = "#d0d0d0"
STYLE = "font-family='sans-serif' font-size='12'"


def draw(figures: Figures) -> str:
    """Bars of the cold runs above, one panel per axis of growth below."""
    bars, height = list(ratio_bars(figures["cases"].values())), 76
    body = [text(LEFT, 20, "time of others / time of llava-weights, cold cache (log scale)", bold=True), *legend(LEFT, 42)]
    if bars:
        highest = max(2.0, *(high for *_, high in bars if high))
        lowest = min(0.5, *(low for _, _, low, _ in bars if low))
        body += draw_bars(bars, height, lowest, highest)
        height += ROW * len(bars) + 50
    if figures["growth"]:
        body += draw_growth(figures["growth"]["rows"], height)
        height += 2 * (PANEL_HEIGHT + 60)
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' {STYLE}>"
    return "\n".join([head, f"<rect width='{WIDTH}' height='{height}' fill='white'/>", *body, "</svg>"]) + "\n"


Bar = tuple[str, float, float, float]  # label, median, lowest, highest; a heading has zeros


def ratio_bars(cases: Any) -> Iterator[Bar]:
    for case in cases:
        if not case["cold"]:
            continue
        yield (case["name"], 0.0, 0.0, 0.0)
        first = next(iter(case["cold"].values()))
        for name, rounds in list(case["cold"].items())[1:]:
            if values := ratios(first, rounds):
                yield (name.replace("`", ""), statistics.median(values), min(values), max(values))


def legend(left: float, y: float) -> Iterator[str]:
    for colour, words in zip(COLOURS, ("takes longer than llava-weights", "takes less time"), strict=True):
        yield f"<rect x='{left:.1f}' y='{y - 10}' width='14' height='12' fill='{colour}'/>"
        yield text(left + 20, y, words)
        left += 220
    yield f"<line x1='{left - 60:.1f}' y1='{y - 4}' x2='{left - 36:.1f}' y2='{y - 4}' stroke='black'/>"
    yield text(left - 30, y, "lowest to highest")


def draw_bars(bars: Sequence[Bar], top: float, lowest: float, highest: float) -> Iterator[str]:
    def across(ratio: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(ratio / lowest) / math.log(highest / lowest)

    bottom = top + ROW * len(bars)
    for ratio in (0.0625, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16):  # behind the bars and their labels
        if lowest <= ratio <= highest:
            colour = "#606060" if ratio == 1 else GRID
            yield f"<line x1='{across(ratio):.1f}' y1='{top - 14}' x2='{across(ratio):.1f}' y2='{bottom}' stroke='{colour}'/>"
            yield text(across(ratio), bottom + 14, f"{ratio:g}x", anchor="middle")
    for row, (label, middle, low, high) in enumerate(bars):
        y = top + ROW * row
        yield text(LEFT - 10, y, label, anchor="end", bold=not middle)
        if middle:
            begin, end = sorted((across(1), across(middle)))
            yield f"<rect x='{begin:.1f}' y='{y - 11}' width='{max(end - begin, 1):.1f}' height='13' fill='{COLOURS[middle < 1]}'/>"
            yield f"<line x1='{across(low):.1f}' y1='{y - 4}' x2='{across(high):.1f}' y2='{y - 4}' stroke='black'/>"
            x, words = max(across(high), across(1)) + 6, f"{middle:.2f}"
            yield f"<rect x='{x - 2:.1f}' y='{y - 11}' width='{7 * len(words) + 4}' height='14' fill='white'/>"
            yield text(x, y, words)


def draw_growth(rows: Sequence[Figures], top: float) -> Iterator[str]:
    """Wall seconds in the upper row of panels, peak memory in the lower, one column per axis."""
    for column, axis in enumerate(AXES):
        key, along, _ = AXES[axis]
        here = [row for row in rows if row["axis"] == axis]
        series = {command: list(group) for command, group in groupby(sorted(here, key=command_of), command_of)}
        for line, (measure, unit, words, short) in enumerate((("wall", 1, "wall time", "s"), ("peak", MIB, "peak memory", "MiB"))):
            points = {name: [(row[key], row["run"][measure] / unit) for row in group] for name, group in series.items()}
            yield from panel(points, 60 + column * 305, top + line * (PANEL_HEIGHT + 60), f"{words} by {along}", along, short)


def command_of(row: Figures) -> str:
    return str(row["command"])


def panel(series: dict[str, list[tuple[float, float]]], left: float, top: float, title: str, along: str, unit: str) -> Iterator[str]:
    """One diagram from zero on both axes, with ticks and units; the names of the series stand between title and data."""
    across, up = (ticks(max((point[i] for points in series.values() for point in points), default=1)) for i in (0, 1))
    wide, high = PANEL_WIDTH - 60, PANEL_HEIGHT - 55
    bottom = top + 35 + high
    yield text(left, top, title, bold=True)
    for tick in up:
        y = bottom - tick / up[-1] * high
        yield f"<line x1='{left}' y1='{y:.1f}' x2='{left + wide}' y2='{y:.1f}' stroke='{GRID}'/>"
        yield text(left - 5, y + 4, f"{tick:g}" + (f" {unit}" if tick == up[-1] else ""), anchor="end")
    for tick in across:
        x = left + tick / across[-1] * wide
        yield f"<line x1='{x:.1f}' y1='{bottom}' x2='{x:.1f}' y2='{bottom + 4}' stroke='black'/>"
        yield text(x, bottom + 17, f"{tick:g}" + (f" {along}" if tick == across[-1] else ""), anchor="middle")
    yield f"<path d='M{left} {bottom - high}V{bottom}H{left + wide}' fill='none' stroke='black'/>"
    begin = left
    for (name, points), colour in zip(series.items(), COLOURS, strict=False):
        placed = [(left + x / across[-1] * wide, bottom - y / up[-1] * high) for x, y in points]
        yield f"<polyline points='{' '.join(f'{x:.1f},{y:.1f}' for x, y in placed)}' fill='none' stroke='{colour}'/>"
        yield from (f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>" for x, y in placed)
        yield f"<circle cx='{begin + 5:.1f}' cy='{top + 14}' r='4' fill='{colour}'/>"
        yield text(begin + 14, top + 18, name, colour=colour)
        begin += 30 + 7 * len(name)


def ticks(most: float) -> list[float]:
    """From 0 in round steps to the first that is no less than `most`: four to six of them."""
    step = 10 ** math.floor(math.log10(most))
    step = next(step * factor for factor in (0.1, 0.2, 0.5, 1, 2) if most / (step * factor) <= 5)
    return [round(step * number, 10) for number in range(math.ceil(most / step) + 1)]


def text(x: float, y: float, words: str, *, anchor: str = "start", bold: bool = False, colour: str = "black") -> str:
    weight = " font-weight='bold'" if bold else ""
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{colour}'{weight}>{escape(words)}</text>"
