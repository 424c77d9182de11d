"""Readers of strangers' files: every seed and every finding of fuzzing again, random damage to them, and libFuzzer for a while."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.targets import SEEDS, TARGETS, attempt

from llava_weights.errors import InputError

SOME, FEW = 200, 40  # damaged inputs a target; few where one costs milliseconds
SLOW = {"index_json", "integer_delta", "job_plan", "journal", "reference", "tokenizer_files"}


def seeds_of(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((SEEDS / name).iterdir())]


def test_every_target_has_seeds() -> None:
    assert {folder.name for folder in SEEDS.iterdir() if folder.is_dir()} == TARGETS.keys()


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_findings(name: str, tmp_path: Path) -> None:
    accepted = [attempt(TARGETS[name], data, tmp_path) for data in seeds_of(name)]
    assert any(accepted)  # a target that refuses all of them looks at nothing


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_seeds(name: str, tmp_path: Path) -> None:
    draw, seeds = random.Random(name), [data for data in seeds_of(name) if len(data) < 2000]
    for number in range(FEW if name in SLOW else SOME):
        data = damaged(seeds[number % len(seeds)], draw, draw.choice(seeds))
        try:
            attempt(TARGETS[name], data, tmp_path)
        except Exception as error:
            pytest.fail(f"{data!r}: {error!r}")


def damaged(data: bytes, draw: random.Random, other: bytes) -> bytes:
    """One to four edits: a byte, a bit, a range lost or repeated, a piece of another seed, a number as large as it gets."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, start = draw.randrange(len(changed) + 1), draw.randrange(len(other) + 1)
        length, kind = draw.choice((1, 1, 2, 4, 16)), draw.randrange(6)
        if kind == 0:
            changed[at : at + 1] = draw.choice((bytes([draw.randrange(256)]), draw.choice(b'{}[]":,0-e\\.\n').to_bytes()))
        elif kind == 1 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif kind == 4:
            changed[at : at + length] = other[start : start + length]
        else:
            changed[at : at + length] = draw.choice((b"\xff" * length, bytes(length), b"9" * length, b"null", b"1e999"))
    return bytes(changed)


@pytest.mark.parametrize(
    "raised", [ValueError("a bug"), InputError("\x1b[2J is damaged"), InputError("damaged", facts={"why": "a" * 10_000})]
)
def test_what_counts_as_a_finding(raised: Exception, tmp_path: Path) -> None:
    def target(data: bytes, folder: Path) -> None:
        raise raised

    with pytest.raises((ValueError, AssertionError)):
        attempt(target, b"", tmp_path)


@pytest.mark.faults
@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="atheris is not installed")
@pytest.mark.parametrize("name", TARGETS)
def test_libfuzzer_finds_nothing(name: str, tmp_path: Path) -> None:
    script = Path(__file__).parent / "fuzz/run.py"
    folders = ("--corpus", tmp_path / "corpus", "--findings", tmp_path / "findings")
    command = [sys.executable, script, name, "--seconds", "30", *folders]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name} " in done.stdout
    assert " 0 executions" not in done.stdout
