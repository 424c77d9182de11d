"""L4: the output of every command that writes is made again from its sources, and every fault is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llava_weights.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llava_weights.checkpoint.manifest import MANIFEST
from llava_weights.checks.remake import compare_remade, remake
from llava_weights.transforms.convert import convert
from llava_weights.transforms.delta import apply_delta
from llava_weights.transforms.lora import merge_lora, open_weighted
from llava_weights.write.execute import execute
from llava_weights.write.plan import make_plan


@pytest.fixture
def sources(fixtures: Path) -> dict[str, Checkpoint]:
    places = {"base": "A-delta-v0/base-hf-bin", "delta": "A-delta-v0/delta-308-may4", "tower": "common/clip-tiny-28px"}
    return {role: open_checkpoint(fixtures / place) for role, place in places.items()} | {
        "other": open_checkpoint(fixtures / "B-lora/base-vicuna-tiny")
    }


def written(checkpoint: Checkpoint, out: Path) -> Checkpoint:
    execute(make_plan(checkpoint), out)
    return open_checkpoint(out)


@pytest.mark.parametrize("form", ["identity", "relu", "gelu"])
def test_delta_and_conversion(sources: dict[str, Checkpoint], tmp_path: Path, form: str) -> None:
    given = {"delta": sources["delta"], "tower": sources["tower"]}
    merged = apply_delta(sources["base"], sources["delta"])
    made = written(convert(merged, "llava-hf", tower=sources["tower"], projector_form=form, dtype="F32"), tmp_path / "out")
    assert [found.verdict for found in compare_remade(made, remake(made, sources["base"], **given))] == ["ok"]
    (tmp_path / "out" / MANIFEST).rename(tmp_path / "aside")  # without it the values are read, and the options are the defaults
    plain = compare_remade(made, remake(made, sources["base"], **given))
    assert {found.verdict for found in plain} == {"failed"}
    wrong = compare_remade(made, remake(made, sources["other"], **given))
    assert any("self_attn.q_proj" in found.text for found in wrong)


def test_lora_with_its_recorded_options(fixtures: Path, sources: dict[str, Checkpoint], tmp_path: Path) -> None:
    lora = str(fixtures / "B-lora/llava-v1.5-tiny-lora")
    merged = merge_lora(sources["other"], [(open_weighted(lora)[0], 0.5)], arithmetic="exact", scale=2.0)
    made = written(merged, tmp_path / "out")
    assert [found.verdict for found in compare_remade(made, remake(made, sources["other"], lora=[f"{lora}@0.5"]))] == ["ok"]
    assert {found.verdict for found in compare_remade(made, remake(made, sources["other"], lora=[lora]))} == {"failed"}


def test_from_the_command_line(cli, fixtures: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    given = ["--delta", fixtures / "A-delta-v0/delta-308-may4", "--vision-tower", fixtures / "common/clip-tiny-28px"]
    assert cli("convert", fixtures / "A-delta-v0/base-hf-bin", *given, "-o", "out", "-q").code == 0
    done = cli("verify", "out", "--base", fixtures / "A-delta-v0/base-hf-bin", *given, "-v")
    assert done.code == 0, done
    assert "64 tensors made again from the sources, every bit equal" in done.stdout
    done = cli("verify", "out", "--base", fixtures / "B-lora/base-vicuna-tiny", *given)
    assert done.code == 4
    assert "is not what the sources give" in done.stdout
    assert cli("verify", "out", *given).code == 2
    shutil.rmtree(tmp_path / "out")
