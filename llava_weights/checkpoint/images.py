"""What a config of the original layout says of tiles: whether images are joined by a newline, and grids that are written as a text."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

LONGEST_TEXT = 1 << 16  # characters of grids that are written as a text; the longest published list has 1,500
MOST_PAIRS = 1024


def reads_newline(config: Mapping[str, Any]) -> bool:
    """Whether LLaVA's code puts `model.image_newline` behind the rows of an image's tiles (`prepare_inputs_labels_for_multimodal`)."""
    return "unpad" in str(config.get("mm_patch_merge_type") or "flat") and "anyres" in str(config.get("image_aspect_ratio"))


def read_pinpoints(value: Any, size: int) -> Any:
    """`image_grid_pinpoints` as a list where it is a text, which LLaVA's code evaluates: a list in Python's words, or a range such as
    `(1x1),...,(6x6)` in tiles of `size` pixels. Anything else comes back as it is, and a text that is none of them as None."""
    if not isinstance(value, str):
        return value
    if len(value) > LONGEST_TEXT:
        return None
    if tiles := re.findall(r"\((\d{1,2})x(\d{1,2})\)", value):
        (wide, high), (widest, highest) = (tuple(map(int, tiles[place])) for place in (0, -1))
        return [[size * x, size * y] for x in range(wide, widest + 1) for y in range(high, highest + 1)][: MOST_PAIRS + 1]
    if not re.fullmatch(r"[\s\d,\[\]()]*", value):
        return None
    try:
        found = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return [list(pair) if isinstance(pair, tuple) else pair for pair in found] if isinstance(found, list | tuple) else None
