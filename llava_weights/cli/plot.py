"""Where two checkpoints differ, as a picture: a heat map of the relative change of every tensor, by layer and kind of module.

A picture is a list of boxes and words at fixed places. SVG is written here; PNG is the same list drawn by matplotlib.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from ..checks.diff import STATUSES, Difference, Status, TensorDifference
from ..errors import UsageError
from ..storage.output_file import check_file, write_report
from ..text import redact, shown, visible

SUFFIXES = (".svg", ".png")
LAYER_NAME = r"(?P<block>(?:.*\.)?(?:layers|blocks|h))\.(?P<layer>[0-9]{1,6})\.(?P<kind>.+)"  # LLaMA and CLIP, MPT, GPT-2
SCALE = ("#fff3c4", "#fdb863", "#e66101", "#a6261d", "#4a0d1f")  # light to dark, so it reads in grey and for the colour-blind
PLAIN: dict[Status, str] = {"equal": "#eef1f4", "shape": "#8d99a6", "only A": "#a8c8ec", "only B": "#5e8fc7"}
WORDS: dict[Status, str] = {
    "equal": "equal", "shape": "of other shape", "differs": "differ", "only A": "only in A", "only B": "only in B",
}  # fmt: skip
UNMEASURED = "#000000"  # every value that differs is inf or NaN, or A is all zeros
DECADES = 6  # of relative change at most; less has the lightest colour
WIDTH, HEIGHT, GAP, LETTERS = 22, 14, 40, 11  # pixels: a cell, between panels, height of letters
LAYER = "layer"  # above the numbers of the rows
LONGEST_LABEL = 80  # characters of a label


@dataclass(frozen=True)
class Panel:
    """One block of layers, or all that lies outside: `cells` by (row label, column label). Rows are layers, columns kinds. Title and
    columns have the names that stand in A, or in B what A lacks."""

    title: str
    cells: dict[tuple[str, str], TensorDifference] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[str, ...]:
        """Layers by number, other names in their order."""
        found = dict.fromkeys(row for row, _ in self.cells)
        return tuple(sorted(found, key=int) if all(row.isdecimal() for row in found) else found)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for _, column in self.cells))


@dataclass(frozen=True)
class Box:
    """A filled rectangle in pixels from the top left; `tip` says what it stands for."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    tip: str = ""


@dataclass(frozen=True)
class Words:
    """Text with its baseline at `y`: it starts at `x`, has its middle or its end there, or, `upwards`, is turned and starts there."""

    x: float
    y: float
    text: str
    place: str = "start"  # or "middle", "end", "upwards"
    large: bool = False


def heat_map(difference: Difference) -> tuple[Panel, ...]:
    """A panel for each block of layers in the order of A, then one for everything outside of layers."""
    panels: dict[str, Panel] = {}
    outside = Panel("outside of layers")
    for tensor in difference.tensors:
        found, name = re.fullmatch(LAYER_NAME, tensor.canonical), tensor.name or tensor.other
        panel, place = outside, (name, "")
        if found:  # a stored name in which the layer has another place, as in a GGUF, gives way to the canonical one
            named = re.fullmatch(LAYER_NAME, name) or found
            panel, place = panels.setdefault(found["block"], Panel(named["block"])), (str(int(found["layer"])), named["kind"])
        rival = panel.cells.get(place)
        if rival is None or STATUSES.index(tensor.status) < STATUSES.index(rival.status):  # two names for one thing: the worse
            panel.cells[place] = tensor
    return (*panels.values(), *([outside] if outside.cells else []))


def check_plot(path: Path, *, force: bool = False, inputs: Iterable[str | Path] = ()) -> None:
    """Check, before hours of comparing, that `write_plot` can write `path`.

    Raises UsageError for another suffix than .svg or .png and for .png without matplotlib, OutputError where the file exists, unless
    `force`, is one of `inputs`, or can't be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"a plot is written as .svg or .png, not as {shown(path.name)}", hint="name it `diff.svg`")
    if path.suffix.lower() == ".png" and find_spec("matplotlib") is None:
        raise UsageError("a .png needs matplotlib, which is not installed", hint="pip install 'llava-weights[plot]', or name it `.svg`")
    check_file(path, force=force, inputs=inputs)


def write_plot(difference: Difference, path: Path, *, force: bool = False) -> None:
    """Draw `heat_map(difference)` into `path`, .svg or .png by its suffix. The same difference gives the same bytes.

    Raises as `check_plot` does, and OutputError where the file can't be written.
    """
    check_plot(path, force=force)
    items = list(_picture(difference))
    width = max(_right(item) for item in items) + GAP / 2
    height = max(item.y + (item.height if isinstance(item, Box) else 0) for item in items) + GAP / 2
    data = _svg(items, width, height, difference) if path.suffix.lower() == ".svg" else _png(items, width, height)
    write_report(path, data, force=force)


def _picture(difference: Difference) -> Iterator[Box | Words]:
    """Title, legend, and the panels side by side."""
    panels, scale = heat_map(difference), _scale(difference.tensors)
    left, top = GAP / 2, GAP / 2 + LETTERS
    yield Words(left, top, _title(difference), large=True)
    yield Words(left, top + 1.8 * LETTERS, f"a box for each tensor, its colour the relative change |B - A| / |A|; {_summary(difference)}")
    top += 3.2 * LETTERS
    yield from _legend(difference, left, top, scale)
    top += HEIGHT + 3 * LETTERS + max((_length(column.removesuffix(".weight")) for panel in panels for column in panel.columns), default=0)
    for panel in panels:
        labels = max(_length(LAYER) if all(panel.columns) else 0, *map(_length, panel.rows))
        yield from _draw(panel, left + labels + 6, top, scale)
        left += labels + 6 + max(WIDTH * len(panel.columns), _length(panel.title)) + GAP


def _draw(panel: Panel, left: float, top: float, scale: tuple[int, int]) -> Iterator[Box | Words]:
    if all(panel.columns):
        yield Words(left - 6, top - 5, LAYER, "end")
    rows, columns = ({label: number for number, label in enumerate(labels)} for labels in (panel.rows, panel.columns))
    for label, number in rows.items():
        yield Words(left - 6, top + HEIGHT * number + LETTERS, _label(label), "end")
    for label, number in columns.items():
        yield Words(left + WIDTH * number + WIDTH / 2 + LETTERS / 3, top - 5, _label(label.removesuffix(".weight")), "upwards")
    for (row, column), tensor in panel.cells.items():
        x, y = left + WIDTH * columns[column], top + HEIGHT * rows[row]
        yield Box(x, y, WIDTH - 1, HEIGHT - 1, _colour(tensor, scale), f"{_label(tensor.name or tensor.other)}: {_measures(tensor)}")
    yield Words(left, top + HEIGHT * len(rows) + 1.5 * LETTERS, _label(panel.title))


def _legend(difference: Difference, left: float, top: float, scale: tuple[int, int]) -> Iterator[Box | Words]:
    """The colours of what has no measure, as far as they occur, then those of the powers of ten."""
    used = {_colour(tensor, scale) for tensor in difference.tensors}
    for colour, text in (*((colour, WORDS[status]) for status, colour in PLAIN.items()), (UNMEASURED, "no measure")):
        if colour in used:
            yield Box(left, top, WIDTH - 1, HEIGHT - 1, colour)
            yield Words(left + WIDTH + 4, top + LETTERS, text)
            left += WIDTH + 4 + _length(text) + GAP / 2
    if difference.counts["differs"]:
        words = "relative change"
        yield Words(left, top + LETTERS, words)
        left += _length(words) + 8
        steps, ends = 8 * (scale[1] - scale[0]), [f"1e{power}" for power in scale]
        yield Words(left, top + LETTERS, ends[0])
        left += _length(ends[0]) + 6
        for step in range(steps):
            yield Box(left + WIDTH / 4 * step, top, WIDTH / 4, HEIGHT - 1, _shade(step / (steps - 1)))
        for power in range(scale[0] + 1, scale[1]):
            yield Words(left + 2 * WIDTH * (power - scale[0]), top + HEIGHT + LETTERS, f"1e{power}", "middle")
        yield Words(left + WIDTH / 4 * steps + 6, top + LETTERS, ends[1])


def _scale(tensors: Iterable[TensorDifference]) -> tuple[int, int]:
    """The powers of ten between which the relative changes lie."""
    changes = [tensor.relative for tensor in tensors if tensor.status == "differs" and 0 < tensor.relative < math.inf]
    high = math.ceil(math.log10(max(changes, default=1.0)))
    low = math.floor(math.log10(min(changes, default=1.0)))
    return max(min(low, high - 1), high - DECADES), high


def _colour(tensor: TensorDifference, scale: tuple[int, int]) -> str:
    if tensor.status != "differs":
        return PLAIN[tensor.status]
    odd = not tensor.relative and (tensor.non_finite_a or tensor.non_finite_b)
    if odd or math.isinf(tensor.relative):
        return UNMEASURED
    return _shade((math.log10(tensor.relative) - scale[0]) / (scale[1] - scale[0]) if tensor.relative else 0.0)


def _shade(share: float) -> str:
    """A colour of SCALE, `share` of the way from the first to the last, straight between two neighbours."""
    place = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    first = min(int(place), len(SCALE) - 2)
    pairs = ((int(SCALE[first][i : i + 2], 16), int(SCALE[first + 1][i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(low + (high - low) * (place - first)):02x}" for low, high in pairs)


def _measures(tensor: TensorDifference) -> str:
    if tensor.status != "differs":
        return ", ".join(filter(None, (WORDS[tensor.status], tensor.note)))
    share = f"{tensor.different:,} of {tensor.elements:,} values"
    return ", ".join(filter(None, (f"relative change {tensor.relative:.2g}, {share}, at most {tensor.max_abs:.2g}", tensor.note)))


def _summary(difference: Difference) -> str:
    """ "14 differ, 43 only in B, 7 equal" """
    return ", ".join(f"{number} {WORDS[status]}" for status, number in difference.counts.items() if number) or "no tensors"


def _title(difference: Difference) -> str:
    return f"A {_label(difference.name_a)}, B {_label(difference.name_b)}"


def _label(text: str) -> str:
    """On one line, of bounded length, and without characters that reverse the text."""
    clean = visible(redact(text))
    return clean if len(clean) <= LONGEST_LABEL else f"{clean[: LONGEST_LABEL - 3]}..."


def _length(label: str) -> float:
    """Pixels, about: letters are 0.6 times as wide as high."""
    return 0.6 * LETTERS * len(_label(label))


def _right(item: Box | Words) -> float:
    if isinstance(item, Box):
        return item.x + item.width
    return item.x + (0.6 * LETTERS * len(item.text) * (1.3 if item.large else 1) if item.place == "start" else 0)


def _svg(items: Iterable[Box | Words], width: float, height: float, difference: Difference) -> bytes:
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
        f' role="img" aria-labelledby="title description" font-family="sans-serif" font-size="{LETTERS}">',
        f'<title id="title">{escape(_title(difference))}</title>',
        f'<desc id="description">Relative change of each tensor by layer and module: {_summary(difference)}</desc>',
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        *map(_element, items),
        "</svg>",
    ]
    return ("\n".join(lines) + "\n").encode()


def _element(item: Box | Words) -> str:
    at = f'x="{item.x:g}" y="{item.y:g}"'
    if isinstance(item, Box):
        tip = f"<title>{escape(item.tip)}</title>" if item.tip else ""
        return f'<rect {at} width="{item.width:g}" height="{item.height:g}" fill="{item.colour}">{tip}</rect>'
    turned = f' transform="rotate(-90 {item.x:g} {item.y:g})"' if item.place == "upwards" else ""
    anchor = f' text-anchor="{item.place}"' if item.place in ("middle", "end") else ""
    size = f' font-size="{1.3 * LETTERS:g}"' if item.large else ""
    return f"<text {at}{anchor}{size}{turned}>{escape(item.text)}</text>"


def _png(items: Iterable[Box | Words], width: float, height: float) -> bytes:
    """The same picture, twice as fine, without pyplot: that would look for a display."""
    rectangle = import_module("matplotlib.patches").Rectangle
    figure = import_module("matplotlib.figure").Figure(figsize=(width / 72, height / 72), dpi=144, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for item in items:
        if isinstance(item, Box):
            axes.add_patch(rectangle((item.x, item.y), item.width, item.height, facecolor=item.colour, linewidth=0))
            continue
        turned = 90 if item.place == "upwards" else 0
        style = {
            "size": LETTERS * (1.3 if item.large else 1),
            "ha": {"end": "right", "middle": "center"}.get(item.place, "left"),
            "rotation": turned,
        }
        if turned:  # matplotlib places the turned box, not the baseline
            style |= {"ha": "right", "va": "bottom"}
        axes.text(item.x, item.y, item.text, parse_math=False, **style)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
