"""`inspect`: what a checkpoint is, as fields, as the report of the command, and as its JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

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
    head = {"type": "summary", "schema": 1, "exit_code": 0}
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
    assert lw.inspect(TUNED).next.startswith("llava-weights convert ")


def test_what_was_computed_can_be_inspected_too() -> None:
    assert "LLaVA" in lw.inspect(lw.apply_delta(BASE, DELTA)).what


def test_raises_as_opening_does(tmp_path: Path) -> None:
    with pytest.raises(lw.InputError):
        lw.inspect(tmp_path / "nowhere")


def test_each_kind_has_its_lines_and_a_next_step(tmp_path: Path) -> None:
    hub, base, clip = lw.inspect(HUB), lw.inspect(BASE), lw.inspect(CLIP)
    lora = lw.inspect(FIXTURES / "B-lora/llava-v1.5-tiny-lora")
    assert hub.family == "llava on llama"
    assert hub.model_class == "LlavaForConditionalGeneration, model_type llava"
    assert hub.decoder.startswith("llama, 2 layers of 48, 4 heads")
    assert hub.vocabulary.startswith("320 rows")
    assert hub.projector == "mlp2x_gelu, 24 to 48"
    assert hub.tower.startswith("CLIP, ")
    assert base.decoder.startswith("llama, ")
    assert "--delta" in base.next
    assert clip.what.startswith("vision tower")
    assert clip.tower.startswith("CLIP, ")
    assert "--vision-tower" in clip.next
    assert lora.adapter.startswith("rank 4, alpha 12, 14 modules")
    assert "`non_lora_trainables.bin`" in lora.beside
    assert lora.next.startswith("llava-weights merge-lora --base ")
    quantised = spoilt(tmp_path, lambda config: config)
    assert "quantised (FP8)" in quantised.what
    assert "16 checkpoint" in quantised.next
    foreign = spoilt(tmp_path, lambda config: {**config, "model_type": "mini_gemini"}, plain=True)
    assert "MGM" in foreign.what
    assert "MGM" in foreign.family


def spoilt(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], *, plain: bool = False) -> lw.Inspection:
    """HUB with another config, in FP8 unless `plain`."""
    copy = folder / f"copy-{plain}"
    copy.mkdir()
    for path in HUB.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = copy / "config.json"
    config.write_text(json.dumps(change(json.loads(config.read_text()))))
    if not plain:
        tensors = load_file(copy / "model.safetensors")
        packed = {name: tensor.to(torch.float8_e4m3fn) if "_proj.weight" in name else tensor for name, tensor in tensors.items()}
        save_file(packed, copy / "model.safetensors", {"format": "pt"})
    return lw.inspect(copy)
