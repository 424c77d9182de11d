"""Wrong checkpoints against every way of `verify`: what each mode can know it says, and none claims what it did not read.

The table is in wrong_checkpoints.py and, as it came out, in docs/reliability.md. By default what a rule sees is tried plainly, and
every change in one other mode, in turn; the slow test tries each in all modes with all records.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from wrong_checkpoints import MANIFEST, MODES, RIGHT, WRONG, Records, Wrong, documented, expected, make_good, options, spoiled, table

from llava_weights.checks.verify import Verification, checksum, verify
from llava_weights.cli import report

Try = Callable[[str, str, Records], Verification]
TURNS = [(mode, records) for records, mode in product(("stale", "rewritten", "none"), MODES) if (mode, records) != ("plain", "rewritten")]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The good checkpoints. Not to be changed."""
    return make_good(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def manifests(good: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their manifests, kept elsewhere."""
    folder = tmp_path_factory.mktemp("manifests")
    return {name: Path(shutil.copy(place / MANIFEST, folder / f"{name}.json")) for name, place in good.items()}


@pytest.fixture
def run(good: dict[str, Path], manifests: dict[str, Path], tmp_path: Path) -> Try:
    def tried(name: str, mode: str, records: Records) -> Verification:
        folder, wrong = tmp_path / records, WRONG[name]
        if not folder.exists():
            spoiled(wrong, good[wrong.good], folder, records)
        return verify(folder, **options(mode, wrong.good, good[wrong.good], manifests[wrong.good]))

    return tried


def check(found: Verification, wrong: Wrong, mode: str, records: Records) -> None:
    code, warned = expected(wrong, mode, records)
    headline = report.verdict(found.findings, found.exit_code)
    assert found.exit_code == code, headline
    if warned:
        assert any(each.verdict == "warning" and each.rule != "recorded" for each in found.findings), headline
    if code != 4:  # then nothing outside the folder was asked, or it can't know: the headline claims no more than its own records do
        assert mode in wrong.blind or "(by " not in headline.replace("(by its manifest)", ""), headline
        assert mode != "plain" or wrong.part != "weights" or "not read" in headline, headline


def test_the_good_ones_pass_in_every_mode(good: dict[str, Path], manifests: dict[str, Path]) -> None:
    for name, folder in good.items():
        for mode in MODES:
            found = verify(folder, **options(mode, name, folder, manifests[name]))
            assert (found.exit_code, [each.text for each in found.findings if each.verdict == "warning"]) == (0, []), (name, mode)


@pytest.mark.parametrize("name", [name for name, wrong in WRONG.items() if "rewritten" in wrong.records and wrong.seen != "reference"])
def test_what_plain_verify_sees_by_itself(name: str, run: Try) -> None:
    check(run(name, "plain", "rewritten"), WRONG[name], "plain", "rewritten")


@pytest.mark.parametrize("number", range(len(WRONG)), ids=list(WRONG))
def test_each_change_in_another_mode(number: int, run: Try) -> None:
    name, wrong = list(WRONG.items())[number]
    mode, records = next(turn for turn in TURNS[number % len(TURNS) :] + TURNS if turn[1] in wrong.records)
    check(run(name, mode, records), wrong, mode, records)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_each_change_in_every_mode(name: str, run: Try) -> None:
    for records, mode in product(WRONG[name].records, MODES):
        check(run(name, mode, records), WRONG[name], mode, records)


@pytest.mark.parametrize("name", [name for name, wrong in WRONG.items() if wrong.seen == "warning"])
def test_strict_fails_what_a_warning_names(name: str, good: dict[str, Path], tmp_path: Path) -> None:
    folder = spoiled(WRONG[name], good[WRONG[name].good], tmp_path / "x", "rewritten")
    assert verify(folder, strict=True).exit_code == 4


@pytest.mark.parametrize("name", RIGHT)
def test_what_means_the_same_passes(name: str, good: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good["hf"], tmp_path / "hf"))
    RIGHT[name](folder)
    checksum(folder, force=True)
    for mode in MODES:
        found = verify(folder, **options(mode, "hf", good["hf"], good["hf"] / MANIFEST))
        assert found.exit_code == 0, [each.text for each in found.findings if each.verdict in ("failed", "unproved")]


def test_there_are_enough_of_them() -> None:
    assert len(WRONG) >= 60
    assert {wrong.part for wrong in WRONG.values()} == {"weights", "config", "tokenizer", "processor", "template", "generation"}


def test_the_documented_table_is_the_measured_one() -> None:
    """What each cell says is tried above."""
    assert documented() == table()


def test_every_change_is_one(good: dict[str, Path], tmp_path: Path) -> None:
    """Else a mode that says 0 would be right."""
    before = {name: {path.name: path.read_bytes() for path in folder.iterdir()} for name, folder in good.items()}
    for number, (name, wrong) in enumerate(WRONG.items()):
        folder = spoiled(wrong, good[wrong.good], tmp_path / str(number), "stale")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} != before[wrong.good], name
        shutil.rmtree(folder)
