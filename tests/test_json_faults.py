"""Whatever stands in a small file of a checkpoint, a command ends with an answer: never with a traceback.

json_faults.py has the table; `faults` runs all of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import pytest
from json_faults import PLACES, USES, Fault, every, some
from test_hostile import run

QUICK = 150
ANSWERS = (0, 2, 3, 4, 5)


def broken(folder: Path, faults: Iterable[Fault], *, uses: int | None = None) -> list[str]:
    """The faults that end otherwise, with what was said. `uses`: commands for each, in turn; all of them by default."""
    found = []
    for kind, group in groupby(faults, key=lambda fault: fault.kind):
        it, out = folder / "it", folder / "out"
        shutil.copytree(kind, it, copy_function=shutil.copyfile)
        for number, fault in enumerate(group):
            file = it / fault.file
            sound = file.read_bytes()
            file.write_text(fault.text(), encoding="utf-8")
            lines = USES[kind] if uses is None else [USES[kind][(number + i) % len(USES[kind])] for i in range(min(uses, len(USES[kind])))]
            for line in lines:
                try:
                    ended = run([word.format(**PLACES, it=it, out=out) for word in line.split()])
                    if ended.code not in ANSWERS or "Traceback" in ended.err:
                        found.append(f"{fault}, {line}: {ended.code} {ended.err[-600:]}")
                except BaseException as error:
                    found.append(f"{fault}, {line}: {error!r}")
                for made in (out, folder / "out.partial"):
                    shutil.rmtree(made, ignore_errors=True)
            file.write_bytes(sound)
        shutil.rmtree(it)
    return found


def test_wrong_values_are_told(tmp_path: Path) -> None:
    assert broken(tmp_path, some(every(), QUICK), uses=1) == []


@pytest.mark.faults
@pytest.mark.timeout(36000)
def test_every_wrong_value_is_told(tmp_path: Path) -> None:
    assert broken(tmp_path, every()) == []
