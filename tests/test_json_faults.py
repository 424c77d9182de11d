"""Whatever stands in a small file of a checkpoint, a command ends with an answer: never with a traceback, and never without a hint.

json_faults.py has the table; `faults` runs all of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import pytest
from json_faults import CLIP, HUB, PLACES, USES, VALUES, Fault, every, places, some
from test_hostile import run

QUICK = 80
ANSWERS = (0, 2, 3, 4, 5)
MANIFEST = "llava-weights.manifest.json"


def problem(line: str, **given: Path) -> str:
    """How a command ended that should have ended with an answer; empty where it did."""
    try:
        ended = run([word.format(**PLACES, **given) for word in line.split()])
    except BaseException as error:
        return f"{line}: {error!r}"
    bare = "error: " in ended.err and "hint: " not in ended.err
    return f"{line}: {ended.code} {ended.err[-600:]}" if ended.code not in ANSWERS or "Traceback" in ended.err or bare else ""


def broken(folder: Path, faults: Iterable[Fault], *, uses: int | None = None) -> list[str]:
    """The faults that end otherwise. `uses`: commands for each, in turn; all of them by default."""
    found = []
    for kind, group in groupby(faults, key=lambda fault: fault.kind):
        it, out = folder / "it", folder / "out"
        shutil.copytree(kind, it, copy_function=shutil.copyfile)
        for number, fault in enumerate(group):
            file = it / fault.file
            sound = file.read_bytes()
            file.write_text(fault.text(), encoding="utf-8")
            for turn in range(min(uses or 100, len(USES[kind]))):
                line = USES[kind][(number + turn) % len(USES[kind])]
                found += [f"{fault}, {why}"] if (why := problem(line, it=it, out=out)) else []
                for made in (out, folder / "out.partial"):
                    shutil.rmtree(made, ignore_errors=True)
            file.write_bytes(sound)
        shutil.rmtree(it)
    return found


def broken_manifests(folder: Path, step: int) -> list[str]:
    """As `broken`, for every `step`th fault of the manifest of a small checkpoint."""
    it = folder / "it"
    shutil.copytree(CLIP, it, copy_function=shutil.copyfile)
    assert run(["checksum", str(it)]).code == 0
    shutil.copytree(it, folder / "sound")
    content = json.loads((it / MANIFEST).read_bytes())
    faults = [Fault(folder / "sound", MANIFEST, place, value) for place in places(content) for value in VALUES]
    lines = ("verify {it}", "verify {it} --deep", "verify {clip} --against {it}/" + MANIFEST, "checksum {it}")
    found = []
    for number, fault in enumerate(faults[::step]):
        (it / MANIFEST).write_text(fault.text(), encoding="utf-8")
        found += [f"{fault}, {why}"] if (why := problem(lines[number % len(lines)], it=it)) else []
    return found


@pytest.mark.parametrize("value", ["null", "[]", '"x"', "3", "true"])
@pytest.mark.parametrize("line", ["convert {it} --to llava -o {out}", "smoke {it} --original {whole}", "verify {it}", "inspect {it}"])
def test_a_vision_config_that_is_no_object(tmp_path: Path, value: str, line: str) -> None:
    fault = Fault(HUB, "config.json", ("vision_config",), value)
    shutil.copytree(HUB, tmp_path / "it", copy_function=shutil.copyfile)
    (tmp_path / "it/config.json").write_text(fault.text())
    assert problem(line, it=tmp_path / "it", out=tmp_path / "out") == ""
    assert not (tmp_path / "out").exists() or value == "null"  # as if it were missing: sizes come from the shapes


def test_wrong_values_are_told(tmp_path: Path) -> None:
    known = [fault for fault in every() if not fault.new]
    new = [fault for fault in every() if fault.new]
    assert broken(tmp_path, [*some(known, QUICK), *some(new, QUICK // 2)], uses=1) == []


def test_wrong_manifests_are_told(tmp_path: Path) -> None:
    assert broken_manifests(tmp_path, 31) == []


@pytest.mark.faults
@pytest.mark.timeout(36000)
def test_every_wrong_value_is_told(tmp_path: Path) -> None:
    assert broken(tmp_path, every()) == []


@pytest.mark.faults
def test_every_wrong_manifest_is_told(tmp_path: Path) -> None:
    assert broken_manifests(tmp_path, 1) == []
