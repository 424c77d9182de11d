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
PANEL_WIDTH, PANEL_HEIGHT = 290, 190
COLOURS = ("#2166ac", "#b2182b")
STYLE = "font-family='sans-serif' font-size='12'"


def draw(figures: Figures) -> str:
    """Bars of the cold runs above, one panel per axis of growth below."""
    bars, height = list(ratio_bars(figures["cases"].values())), 50
    body = [text(LEFT, 20, "wall time / llava-weights, cold cache; median, lowest to highest (log scale)", bold=True)]
    if bars:
        highest = max(2.0, *(high for *_, high in bars if high))
        lowest = min(0.5, *(low for _, _, low, _ in bars if low))
        body += draw_bars(bars, height, lowest, highest)
        height += ROW * len(bars) + 40
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


def draw_bars(bars: Sequence[Bar], top: float, lowest: float, highest: float) -> Iterator[str]:
    def across(ratio: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(ratio / lowest) / math.log(highest / lowest)

    for row, (label, middle, low, high) in enumerate(bars):
        y = top + ROW * row
        yield text(LEFT - 10, y, label, anchor="end", bold=not middle)
        if middle:
            begin, end = sorted((across(1), across(middle)))
            yield f"<rect x='{begin:.1f}' y='{y - 11}' width='{max(end - begin, 1):.1f}' height='13' fill='{COLOURS[middle < 1]}'/>"
            yield f"<line x1='{across(low):.1f}' y1='{y - 4}' x2='{across(high):.1f}' y2='{y - 4}' stroke='black'/>"
            yield text(max(across(high), across(1)) + 6, y, f"{middle:.2f}")
    bottom = top + ROW * len(bars)
    for ratio in (0.0625, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16):
        if lowest <= ratio <= highest:
            yield f"<line x1='{across(ratio):.1f}' y1='{top - 14}' x2='{across(ratio):.1f}' y2='{bottom}' stroke='#bbbbbb'/>"
            yield text(across(ratio), bottom + 14, f"{ratio:g}", anchor="middle")


def draw_growth(rows: Sequence[Figures], top: float) -> Iterator[str]:
    """Wall seconds in the upper row of panels, peak memory in the lower, one column per axis."""
    for column, axis in enumerate(AXES):
        here = [row for row in rows if row["axis"] == axis]
        series = {command: list(group) for command, group in groupby(sorted(here, key=command_of), command_of)}
        for line, (key, unit, title) in enumerate((("wall", 1, "wall s"), ("peak", MIB, "peak MiB"))):
            points = {name: [(row[AXES[axis][0]], row["run"][key] / unit) for row in group] for name, group in series.items()}
            yield from panel(points, 40 + column * 310, top + line * (PANEL_HEIGHT + 60), f"{title} by {AXES[axis][1]}")


def command_of(row: Figures) -> str:
    return str(row["command"])


def panel(series: dict[str, list[tuple[float, float]]], left: float, top: float, title: str) -> Iterator[str]:
    """One diagram from zero on both axes, a colour per series."""
    most_x, most_y = (max((point[i] for points in series.values() for point in points), default=1) for i in (0, 1))
    wide, high = PANEL_WIDTH - 50, PANEL_HEIGHT - 30
    bottom = top + 15 + high
    yield text(left, top, title, bold=True)
    yield f"<path d='M{left} {top + 15}V{bottom}H{left + wide}' fill='none' stroke='black'/>"
    yield text(left - 4, top + 22, f"{most_y:.3g}", anchor="end")
    yield text(left + wide, bottom + 15, f"{most_x:.4g}", anchor="end")
    for row, ((name, points), colour) in enumerate(zip(series.items(), COLOURS, strict=False)):
        placed = [(left + x / most_x * wide, bottom - y / most_y * high) for x, y in points]
        yield f"<polyline points='{' '.join(f'{x:.1f},{y:.1f}' for x, y in placed)}' fill='none' stroke='{colour}'/>"
        yield from (f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>" for x, y in placed)
        yield text(left + 12, bottom - 10 - 16 * row, name, colour=colour)


def text(x: float, y: float, words: str, *, anchor: str = "start", bold: bool = False, colour: str = "black") -> str:
    weight = " font-weight='bold'" if bold else ""
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{colour}'{weight}>{escape(words)}</text>"
