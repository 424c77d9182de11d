"""Every type of projector that LLaVA's code makes: converted both ways, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_weights as lw
from llava_weights.cli.toy import make_llava
from llava_weights.errors import InputError
from llava_weights.families.originals import ORIGINALS

Tensors = dict[str, torch.Tensor]
ROW = next(row for row in ORIGINALS if row.name == "LLaVA v1.5 and v1.6")
FIRST, SECOND = "model.mm_projector.0.", "model.mm_projector.2."


def llava(folder: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """A toy of LLaVA v1.5 with another projector."""
    make_llava(folder, ROW)
    whole = folder / "llava"
    tensors = change(torch.load(whole / "pytorch_model.bin"))
    (whole / "pytorch_model.bin").unlink()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, whole / "model.safetensors", {"format": "pt"})
    path = whole / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return whole


def without(*words: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: x for name, x in tensors.items() if not any(word in name for word in words)}


def written(checkpoint: lw.Checkpoint, out: Path) -> tuple[Tensors, dict[str, Any]]:
    lw.execute(lw.make_plan(checkpoint), out)
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("form", [None, "gelu"])
def test_a_stack_of_one_layer_is_a_single_linear(tmp_path: Path, form: str | None) -> None:
    source = llava(tmp_path, without(SECOND), mm_projector_type="mlp1x_gelu")
    given = load_file(source / "model.safetensors")
    tower = tmp_path / "tower"
    made = lw.convert(source, "llava-hf", tower=tower, projector_form=form)
    assert made.history[-1].checks["projector_form"] == (form or "identity")
    assert "Vicuna" in made.history[-1].summary["prompt"]
    tensors, config = written(made, tmp_path / "hub")
    act = {"linear": lambda x: x, "gelu": torch.nn.functional.gelu}[config["projector_hidden_act"]]
    seen = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    one, two = ({kind: tensors[f"multi_modal_projector.linear_{n}.{kind}"].float() for kind in ("weight", "bias")} for n in (1, 2))
    found = torch.nn.functional.linear(act(torch.nn.functional.linear(seen, **one)), **two)
    expected = torch.nn.functional.linear(seen, given[FIRST + "weight"].float(), given[FIRST + "bias"].float())
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 if form else 0)
    back, config = written(lw.convert(tmp_path / "hub", "llava", tower_name="tower"), tmp_path / "back")
    assert config["mm_projector_type"] == "mlp1x_gelu"
    assert same(back, given)
    again, config = written(lw.convert(source, "llava", tower=tower), tmp_path / "again")
    assert config["mm_projector_type"] == "mlp1x_gelu"
    assert same(again, given)
    compared = lw.verify(tmp_path / "hub", against=source, vision_tower=tower)
    assert [x.text for x in compared.findings if x.verdict == "failed"] == []
    assert compared.exit_code == 0


def test_inspect_and_smoke_know_it(tmp_path: Path) -> None:
    source = llava(tmp_path, without(SECOND), mm_projector_type="mlp1x_gelu")
    assert lw.inspect(source).projector == "mlp1x_gelu, 32 to 64"
    assert not [x for x in lw.verify(source).findings if x.rule == "config/projector" and x.verdict == "failed"]


def three(tensors: Tensors) -> Tensors:
    return tensors | {f"model.mm_projector.4.{kind}": tensors[SECOND + kind] for kind in ("weight", "bias")}


def narrow(tensors: Tensors) -> Tensors:
    return tensors | {FIRST + "weight": tensors[FIRST + "weight"][:48], FIRST + "bias": tensors[FIRST + "bias"][:48],
                      SECOND + "weight": tensors[SECOND + "weight"][:, :48]}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "config", "told"),
    [
        (three, {"mm_projector_type": "mlp3x_gelu"}, "the projector is `mlp3x_gelu`"),
        (three, {}, "the projector is `mlp3x_gelu`"),
        (narrow, {}, "not one that llava-hf can hold"),
        (without("mm_projector"), {"mm_projector_type": "identity"}, r"without a projector \(`identity`\)"),
        (without(FIRST + "bias"), {}, "not one that llava-hf can hold"),
    ],
)
@pytest.mark.parametrize("to", ["llava-hf", "llava"])
def test_what_no_class_holds_is_refused(tmp_path: Path, change: Any, config: dict[str, Any], told: str, to: str) -> None:
    source = llava(tmp_path, change, **config)
    with pytest.raises(InputError, match=told):
        lw.convert(source, to, tower=tmp_path / "tower")


@pytest.mark.parametrize("single", [False, True])
def test_no_biases_there_and_back(tmp_path: Path, single: bool) -> None:
    words = (FIRST + "bias", SECOND + "bias", *((SECOND,) if single else ()))
    source = llava(tmp_path, without(*words), mm_projector_type="mlp1x_gelu" if single else "mlp2x_gelu")
    with pytest.raises(InputError) as refused:
        lw.convert(source, "llava-hf", tower=tmp_path / "tower")
    assert "`multimodal_projector_bias` false" in (refused.value.hint or "")
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "multimodal_projector_bias": False}))
    tensors, config = written(lw.convert(source, "llava-hf", tower=tmp_path / "tower"), tmp_path / "hub")
    assert config["multimodal_projector_bias"] is single
    assert any(name.startswith("multi_modal_projector") and name.endswith("bias") for name in tensors) == single
    back, config = written(lw.convert(tmp_path / "hub", "llava", tower_name="tower"), tmp_path / "back")
    assert "multimodal_projector_bias" not in config
    biases = [tensor for name, tensor in back.items() if "mm_projector" in name and name.endswith("bias")]
    assert len(biases) == (1 if single else 2)
    assert not any(tensor.any() for tensor in biases)
