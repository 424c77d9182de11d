"""The table of families, measured: what each conversion loads as, and how far its logits are from the original's. Run by `make peer`.

One toy of each class on each decoder and tower that the rows of `originals` name, in the oldest and the newest version that rows are tested
with. Pixels, tiles and splice of the original are written by hand in `run_families.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from peers.environments import MAIN, NEWEST, Json, run, without_error

import llava_weights as lw
from llava_weights.cli.toy import make_llava
from llava_weights.families.originals import ORIGINALS, Original
from llava_weights.families.targets import TARGET_BY_TYPE as TARGETS

VERSIONS = ("4.57.6", MAIN, NEWEST)
ATOL = 1e-5  # of logits up to about 3 in float32
FEW = {"image_aspect_ratio": ("anyres_max_2",)}  # fewer than a toy's largest grid, so that pictures are shrunk


def cases() -> dict[str, tuple[Original, str, str]]:
    """The first row for each target, decoder and tower."""
    found: dict[str, tuple[Original, str, str]] = {}
    for row in ORIGINALS:
        if TARGETS[row.target].two_towers:  # of which nothing comes back: test_video_llava.py
            continue
        for decoder in row.decoders:
            for tower in row.towers:
                found.setdefault(f"{row.target}-{decoder}-{tower}", (row, decoder, tower))
    return found


CASES = cases()
BROKEN = {("4.57.6", "llava_onevision-stablelm-siglip"): "logits_to_keep"}  # which this StableLM does not take of this class
pytestmark = [pytest.mark.peer, pytest.mark.timeout(900)]
every = pytest.mark.parametrize(
    ("version", "name"), [(version, name) for version in VERSIONS for name in CASES if (version, name) not in BROKEN]
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By case the folder that holds `llava`, `tower` and `hf`."""
    made = {}
    for name, (row, decoder, tower) in CASES.items():
        folder = made[name] = tmp_path_factory.mktemp(name)
        capped = TARGETS[row.target].capped
        make_llava(folder, replace(row, says={**row.says, **FEW}) if capped else row, decoder=decoder, tower=tower)
        lw.execute(lw.make_plan(lw.convert(folder / "llava", "llava-hf")), folder / "hf")
    return made


@pytest.fixture(scope="module")
def seen(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Json]:
    """What a version says of a case: one process a version."""
    folder, done = tmp_path_factory.mktemp("jobs"), {}

    def see(version: str, name: str) -> Json:
        if version not in done:
            done[version] = run(version, "read", {key: job(path, *CASES[key]) for key, path in folders.items()}, folder, "run_families.py")
        return done[version][name]

    return see


def job(folder: Path, row: Original, decoder: str, _: str) -> dict[str, Any]:
    target = TARGETS[row.target]
    return {"folder": str(folder), "decoder": decoder, "tiles": target.tiles, "video": asdict(target.video) if target.video else None}


@every
def test_every_key_has_its_place(seen: Callable[[str, str], Json], version: str, name: str) -> None:
    assert without_error(seen(version, name))["keys"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}


@every
def test_logits_are_those_of_a_splice_by_hand(seen: Callable[[str, str], Json], version: str, name: str) -> None:
    found = without_error(seen(version, name))
    video = {"video"} if TARGETS[CASES[name][0].target].video else set()
    assert set(found["logits"]) == {"square", "tall", "wide", "small", "large"} | video
    assert found["largest"] > 0.1
    assert max(found["logits"].values()) <= ATOL, found["logits"]


@every
def test_the_processor_makes_the_pixels_and_counts_of_the_original(seen: Callable[[str, str], Json], version: str, name: str) -> None:
    found = without_error(seen(version, name))
    assert max(found["pixels"].values()) <= ATOL, found["pixels"]
    assert all(counted == features for counted, features in found["counted"].values()), found["counted"]


@pytest.mark.parametrize(("version", "name"), BROKEN)
def test_what_a_version_cannot_run(seen: Callable[[str, str], Json], version: str, name: str) -> None:
    assert BROKEN[version, name] in seen(version, name)["error"]


@pytest.mark.parametrize("name", CASES)
def test_verify_is_clean_and_the_way_back_bit_for_bit(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = folders[name]
    assert not [each.text for each in lw.verify(folder / "hf", against=folder / "llava", deep=True).findings if each.verdict == "failed"]
    lw.execute(lw.make_plan(lw.convert(folder / "hf", "llava")), tmp_path / "back")
    assert lw.diff(folder / "llava", tmp_path / "back").equal
    assert json.loads((tmp_path / "back" / "config.json").read_text())["mm_projector_type"] == CASES[name][0].projector
