"""`smoke --original` on conversions that are wrong in one thing each: of the classes with tiles, several feature layers and videos."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_weights as lw
from llava_weights.cli.toy import make_llava
from llava_weights.families import targets
from llava_weights.families.originals import ORIGINALS
from llava_weights.smoke import image_features

FAMILIES = {
    name: next(row for row in ORIGINALS if row.name == name) for name in ("LLaVA-OneVision", "LLaVA v1.5 and v1.6, videos", "ViP-LLaVA")
}
ONEVISION, NEXT_VIDEO, VIP = FAMILIES
FEWER = {"image_aspect_ratio": ("anyres_max_2",)}  # so that the toy's four tiles are shrunk
FAMILIES[ONEVISION] = replace(FAMILIES[ONEVISION], says={**FAMILIES[ONEVISION].says, **FEWER})
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`llava` and `hf` of a family, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = made[name] = tmp_path_factory.mktemp("family")
            make_llava(folder, FAMILIES[name])
            lw.execute(lw.make_plan(lw.convert(folder / "llava", "llava-hf")), folder / "hf")
        return made[name]

    return make


def change(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    (path,) = folder.glob("*.safetensors")
    found = load_file(path)
    edit(found)
    save_file(found, path, metadata={"format": "pt"})


def zero(name: str) -> Callable[[Path], None]:
    return lambda folder: tensors(folder, lambda found: found[name].zero_())


def swapped(first: str, second: str) -> Callable[[Path], None]:
    def edit(found: dict[str, torch.Tensor]) -> None:
        found[first], found[second] = found[second].clone(), found[first].clone()

    return lambda folder: tensors(folder, edit)


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder, "config.json", **values)


def part(name: str, **values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        inner = json.loads((folder / "config.json").read_text(encoding="utf-8"))[name]
        change(folder, "config.json", **{name: {**inner, **values}})

    return edit


FIRST, SECOND = (f"vision_tower.vision_model.encoder.layers.{number}.mlp.fc1.weight" for number in (0, 1))
WRONG: tuple[tuple[str, str, Callable[[Path], None]], ...] = (
    (ONEVISION, "the layer off by one", config(vision_feature_layer=-2)),
    (ONEVISION, "no tiles", config(image_grid_pinpoints=[[28, 28]])),
    (ONEVISION, "pinpoints as the original has them", config(image_grid_pinpoints=[[28, 56], [56, 28]])),
    (ONEVISION, "the newline dropped", zero("image_newline")),
    (ONEVISION, "another limit of tiles", config(vision_aspect_ratio="anyres_max_3")),
    (ONEVISION, "another activation of the tower", part("vision_config", hidden_act="quick_gelu")),
    (ONEVISION, "another activation of the projector", config(projector_hidden_act="relu")),
    (ONEVISION, "two layers of the tower swapped", swapped(FIRST, SECOND)),
    (ONEVISION, "another rope", part("text_config", rope_theta=500.0)),
    (ONEVISION, "mean and deviation of CLIP", lambda folder: change(folder, "preprocessor_config.json", **CLIP)),
    (NEXT_VIDEO, "the layer off by one", config(vision_feature_layer=-1)),
    (NEXT_VIDEO, "the class token kept", config(vision_feature_select_strategy="full")),
    (NEXT_VIDEO, "the newline dropped", zero("image_newline")),
    (NEXT_VIDEO, "the largest in place of the mean", config(spatial_pool_mode="max")),
    (NEXT_VIDEO, "frames not pooled", config(spatial_pool_stride=1)),
    (NEXT_VIDEO, "mean and deviation of SigLIP", lambda folder: change(folder, "preprocessor_config.json", image_mean=[0.5] * 3)),
    (VIP, "one layer off by one", config(vision_feature_layer=[-2, -5, -8, -11, 7], vision_feature_layers=[-2, -5, -8, -11, 7])),
    (VIP, "the layers in another order", config(vision_feature_layer=[-5, -2, -8, -11, 6], vision_feature_layers=[-5, -2, -8, -11, 6])),
    (VIP, "the layernorm dropped", zero("multi_modal_projector.projector_layernorm.weight")),
    (VIP, "another epsilon", config(projector_layernorm_eps=1.0)),
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_right_one_passes(converted: Callable[[str], Path], name: str) -> None:
    smoke = lw.smoke_test(converted(name) / "hf", original=converted(name) / "llava")
    probes = {row.probe for row in smoke.rows}
    assert ("video" in probes) == (name != VIP)
    assert ("image-shrunk" in probes) == (name == ONEVISION)


@pytest.mark.parametrize(("name", "what", "spoil"), WRONG, ids=lambda part: part if isinstance(part, str) else "")
def test_each_wrong_one_fails(
    converted: Callable[[str], Path], tmp_path: Path, name: str, what: str, spoil: Callable[[Path], None]
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(converted(name) / "hf", wrong)
    spoil(wrong)
    with pytest.raises((lw.VerificationError, lw.InputError)):
        lw.smoke_test(wrong, original=converted(name) / "llava")


def test_pooling_behind_the_projector_is_another_model(converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers pools before it, as LLaVA-NeXT-Video's release did, later code behind it: that difference is seen."""
    video = targets.TARGET_BY_TYPE["llava_next_video"].video
    assert video
    later = replace(video, pooled_first=False)
    init = image_features.InputEmbeddings.__init__
    monkeypatch.setattr(image_features.InputEmbeddings, "__init__", lambda self, *parts: init(self, *parts[:-1], later))
    folder = converted(NEXT_VIDEO)
    with pytest.raises(lw.VerificationError, match="video"):
        lw.smoke_test(folder / "hf", original=folder / "llava")
