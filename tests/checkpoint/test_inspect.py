"""`inspect`: what a checkpoint is, as fields, as the report of the command, and as its JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

import llava_weights as lw

FIXTURES = Path(__file__).resolve().parent.parent.parent / "fixtures"
BASE, DELTA, TUNED = (FIXTURES / "A-delta-v0" / name for name in ("base-hf-bin", "delta-307-apr17", "target-307/llava-tiny-v0"))
HUB, CLIP = FIXTURES / "C-v1.5/hf-by-tf4.47.1", FIXTURES / "common/clip-tiny-42px"


def test_fields_say_what_the_report_says() -> None:
    found = lw.inspect(DELTA)
    assert (found.name, found.layout, found.container, found.is_delta, found.revision) == (DELTA.name, "llava", "torch", True, None)
    assert found.what.startswith("unapplied delta of a LLaVA")
    assert found.next == f"llava-weights apply-delta --base BASE --delta {DELTA} -o OUT"
    assert found.dtypes == {"F16": 23, "F32": 2}
    assert found.tensors["lm_head.weight"].shape == (307, 48)
    assert found.nbytes == sum(tensor.nbytes for tensor in found.tensors.values()) == lw.open_checkpoint(DELTA).nbytes
    assert [file.size for file in found.files] == [(DELTA / "pytorch_model.bin").stat().st_size]
    lines = str(found).splitlines()
    assert lines[0] == DELTA.name
    assert [line.split()[0] for line in lines[1:4]] == ["what", "evidence", "family"]
    assert all(text in str(found) for text in (found.what, *found.evidence, found.family, found.weights, found.vocabulary, found.next))
    with pytest.raises(FrozenInstanceError):
        found.what = "another thing"  # type: ignore[misc]


@pytest.mark.parametrize("source", [BASE, DELTA, TUNED, HUB, CLIP], ids=lambda path: path.name)
def test_the_command_prints_it(source: Path, cli: Callable[..., Any]) -> None:
    found = lw.inspect(source)
    assert cli("inspect", source).stdout == f"{found}\n"
    assert cli("inspect", source, "--tensors").stdout.splitlines() == found.lines(tensors=True)
    head = {"type": "summary", "schema": 1}
    for more in (False, True):
        document = json.loads(cli("inspect", source, "--json", *(["--tensors"] if more else [])).stdout)
        assert document == head | {"schema": document["schema"]} | json.loads(json.dumps(found.document(tensors=more)))


def test_an_open_checkpoint_goes_by_its_name_or_as_is_said() -> None:
    opened = lw.open_checkpoint(DELTA)
    assert f"--delta {DELTA.name} -o OUT" in lw.inspect(opened).next
    assert "--delta my-delta -o OUT" in lw.inspect(opened, given="my-delta").next
    assert lw.inspect(str(DELTA)).what == lw.inspect(DELTA).what == lw.inspect(opened).what


def test_a_lossless_delta_is_one_and_shows_what_it_packs(tmp_path: Path) -> None:
    lw.execute(lw.make_plan(lw.make_delta(BASE, TUNED, codec="integer")), tmp_path / "delta")
    found = lw.inspect(tmp_path / "delta")
    assert (found.is_delta, found.what) == (True, "integer-difference delta (lossless)")
    assert found.tensors["lm_head.weight"].shape == lw.open_checkpoint(TUNED).tensors["lm_head.weight"].shape
    assert not lw.inspect(TUNED).is_delta
    assert lw.inspect(TUNED).next == ""


def test_what_was_computed_can_be_inspected_too() -> None:
    assert "LLaVA" in lw.inspect(lw.apply_delta(BASE, DELTA)).what


def test_raises_as_opening_does(tmp_path: Path) -> None:
    with pytest.raises(lw.InputError):
        lw.inspect(tmp_path / "nowhere")
