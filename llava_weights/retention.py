"""How much of an update arrives: counted while rows are merged, on a fixed sample of the rows of large matrices.

Tallies, each also as `<label>.<name>`: elements that an update was to change (`updated`: D != 0) and that it did change (`moved`),
and the sums of squares `update_sq` of D and `lost_sq` of W' - W - D in units of `SQUARE`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SQUARE = 2.0**-100  # whole numbers of it are summed, so that the order of the rows does not matter


@dataclass(frozen=True)
class Retention:
    """What became of the updates: `updated` elements were to change, `moved` ones did, and of the updates as a whole the share
    `kept` survived the rounding: 1 less the norm of what is missing over the norm of the updates."""

    updated: int
    moved: int
    kept: float


def retention(tallies: Mapping[str, int], label: str = "") -> Retention | None:
    """Of all updates, or of those of one kind of module such as "q_proj"; None where there were none."""
    start = f"{label}." if label else ""
    updated, moved, lost, update = (tallies.get(start + name, 0) for name in ("updated", "moved", "lost_sq", "update_sq"))
    return Retention(updated, moved, max(0.0, 1 - math.sqrt(lost / update))) if update else None


def tally(tallies: Counter[str], label: str, before: torch.Tensor, after: torch.Tensor, update: torch.Tensor, wanted: slice) -> None:
    """Count the `wanted` rows of W, W' and D, which are float32 or float64, D before any rounding."""
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
    """The squares of these rows; a row that overflows counts nothing, since a result that is not finite ends the run."""
    import torch

    norms: list[float] = torch.linalg.vector_norm(values, dim=1)[wanted].tolist()
    return sum(int(norm * norm / SQUARE) for norm in norms if math.isfinite(norm))
