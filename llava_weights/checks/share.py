"""A fixed N-th of the bytes of a checkpoint, so that a nightly job of an hour reads 200 GB in a week: `verify --deep --part 3/7`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UsageError
from ..text import size

MOST_PARTS = 9999


@dataclass(frozen=True)
class Share:
    """Part `number`, from 1, of `count`: these tensors and these whole files. `nbytes` of the `total` bytes of all parts are its own."""

    number: int
    count: int
    tensors: frozenset[str]
    files: frozenset[str]
    nbytes: int
    total: int

    def __str__(self) -> str:
        return f"part {self.number}/{self.count}"

    @property
    def amount(self) -> str:
        """How much of everything it is, in words."""
        percent = 100 * self.nbytes / self.total if self.total else 100.0
        return f"{size(self.nbytes)} of {size(self.total)}, {percent:.3g} %"


def to_part(text: object) -> tuple[int, int]:
    """The number and the count in "3/7", from 1. Raises UsageError for anything else."""
    found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text) if isinstance(text, str) else None
    if found is None or not 1 <= int(found[1]) <= int(found[2]) <= MOST_PARTS:
        raise UsageError(f"`--part {text}` is no part", hint="write it as 3/7: the third of seven, counted from 1")
    return int(found[1]), int(found[2])


def share_of(part: tuple[int, int], tensors: Mapping[str, int], files: Mapping[str, int]) -> Share:
    """Part `part` of these tensors and whole files, each with its bytes: the same for the same names and sizes.

    The tensors in their order, then the files, are cut into stretches of equal size. Each belongs to the part in which its middle lies, so
    every part has what belongs to no other, and no part has more than its N-th and the largest of them.
    """
    number, count = part
    total = sum(tensors.values()) + sum(files.values())
    mine: list[list[str]] = [[], []]
    at = nbytes = 0
    for kind, units in enumerate((tensors, files)):
        for name, held in units.items():
            if min((2 * at + held) * count // (2 * total), count - 1) + 1 == number if total else number == 1:
                mine[kind].append(name)
                nbytes += held
            at += held
    return Share(number, count, frozenset(mine[0]), frozenset(mine[1]), nbytes, total)
