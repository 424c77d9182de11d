"""Conversions that are wrong in one thing each, of every class: `smoke --original` fails, or `verify` where all that is computed is right.

`WRONG` is the list of what sees what. `verify` here has neither manifest nor checksums, only the files' own agreement.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_weights as lw
from llava_weights.cli.toy import make_llava
from llava_weights.families import targets
from llava_weights.families.originals import ORIGINALS
from llava_weights.smoke import image_features

Spoil = Callable[[Path], None]
Seen = Literal["smoke", "verify", "against"]  # `smoke --original`, `verify`, or only `verify --against` the original
FAMILIES = {
    "llava": "LLaVA v1.5 and v1.6", "llava_next": "LLaVA v1.5 and v1.6, images in tiles", "llava_onevision": "LLaVA-OneVision",
    "llava_next_video": "LLaVA v1.5 and v1.6, videos", "vipllava": "ViP-LLaVA",
}  # fmt: skip
TILES = ("llava_next", "llava_onevision", "llava_next_video")
CLIPS = ("llava", "llava_next", "llava_next_video", "vipllava")
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
# What is not as its class would assume, so that it counts whether it is carried over; the toy's four tiles are more than two.
SAYS = {"rope_theta": (500000.0,), "rms_norm_eps": (1e-5,)}
FEWER = {"image_aspect_ratio": ("anyres_max_2",)}
OTHER_LAYERS, OTHER_ORDER = [-2, -5, -8, -11, 7], [-5, -2, -8, -11, 6]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`llava` and `hf` of a class, made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = made[kind] = tmp_path_factory.mktemp(kind)
            family = next(row for row in ORIGINALS if row.name == FAMILIES[kind])
            says = {**family.says, **SAYS, **(FEWER if kind == "llava_onevision" else {})}
            make_llava(folder, replace(family, says=says))
            lw.execute(lw.make_plan(lw.convert(folder / "llava", "llava-hf")), folder / "hf")
        return made[kind]

    return make


def change(file: str, **values: Any) -> Spoil:
    """Keys of a JSON file set, those with None taken out."""

    def edit(folder: Path) -> None:
        found = {**json.loads((folder / file).read_text(encoding="utf-8")), **values}
        (folder / file).write_text(json.dumps({key: value for key, value in found.items() if value is not None}), encoding="utf-8")

    return edit


def config(**values: Any) -> Spoil:
    return change("config.json", **values)


def pixels(**values: Any) -> Spoil:
    return change("preprocessor_config.json", **values)


def processor(**values: Any) -> Spoil:
    return change("processor_config.json", **values)


def frames(**values: Any) -> Spoil:
    return change("video_preprocessor_config.json", **values)


def part(name: str, **values: Any) -> Spoil:
    def edit(folder: Path) -> None:
        inner = {**json.loads((folder / "config.json").read_text(encoding="utf-8"))[name], **values}
        change("config.json", **{name: {key: value for key, value in inner.items() if value is not None}})(folder)

    return edit


def all_of(*spoils: Spoil) -> Spoil:
    def edit(folder: Path) -> None:
        for spoil in spoils:
            spoil(folder)

    return edit


def turned(folder: Path) -> None:
    """Pinpoints as the original has them, width first, in both files."""
    for file in ("config.json", "preprocessor_config.json"):
        found = json.loads((folder / file).read_text(encoding="utf-8"))["image_grid_pinpoints"]
        change(file, image_grid_pinpoints=[[width, height] for height, width in found[:-1]])(folder)


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        (path,) = folder.glob("*.safetensors")
        found = load_file(path)
        edit(found)
        save_file({name: value.contiguous() for name, value in found.items()}, path, metadata={"format": "pt"})

    return spoil


def tensor(name: str, made: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return tensors(lambda found: found.update({name: made(found[name])}))


def removed(name: str) -> Spoil:
    return tensors(lambda found: found.pop(name))


def swapped(first: str, second: str) -> Spoil:
    return tensors(lambda found: found.update({first: found[second], second: found[first]}))


def meta_order(weight: torch.Tensor) -> torch.Tensor:
    """Rows of q or k as Meta stores them: pairs side by side, not halves of each head of 16."""
    rows, columns = weight.shape
    return weight.view(rows // 16, 2, 8, columns).transpose(1, 2).reshape(rows, columns)


EMBED, HEAD, ATTENTION = (
    "language_model.model.embed_tokens.weight",
    "language_model.lm_head.weight",
    "language_model.model.layers.0.self_attn",
)
ONE, TWO, NORM = (f"multi_modal_projector.{name}.weight" for name in ("linear_1", "linear_2", "projector_layernorm"))
LAYERS = tuple(f"vision_tower.vision_model.encoder.layers.{number}.mlp.fc1.weight" for number in (0, 1))
TIED = all_of(config(tie_word_embeddings=True), part("text_config", tie_word_embeddings=True))
NO_RATIO = all_of(config(vision_aspect_ratio=None), processor(vision_aspect_ratio=None))  # the class assumes anyres_max_9
FEW = [[56, 28], [28, 56]]  # of the toy's three grids

WRONG: tuple[tuple[str, tuple[str, ...], Spoil, Seen], ...] = (
    ("rope_theta dropped", tuple(FAMILIES), part("text_config", rope_theta=None), "smoke"),
    ("rms_norm_eps of another model", tuple(FAMILIES), part("text_config", rms_norm_eps=1e-6), "smoke"),
    ("projector with relu", tuple(FAMILIES), config(projector_hidden_act="relu"), "smoke"),
    ("linear_1 with its rows moved by one", tuple(FAMILIES), tensor(ONE, lambda weight: weight.roll(1, 0)), "smoke"),
    ("linear_2 transposed", tuple(FAMILIES), tensor(TWO, torch.t), "smoke"),
    ("q in Meta's order", tuple(FAMILIES), tensor(f"{ATTENTION}.q_proj.weight", meta_order), "smoke"),
    ("k in Meta's order", tuple(FAMILIES), tensor(f"{ATTENTION}.k_proj.weight", meta_order), "smoke"),
    ("head tied and left out", tuple(FAMILIES), all_of(TIED, removed(HEAD)), "smoke"),
    ("head tied and stored", tuple(FAMILIES), TIED, "verify"),
    ("embeddings moved by one row", tuple(FAMILIES), tensor(EMBED, lambda table: table.roll(1, 0)), "smoke"),
    ("two layers of the tower swapped", tuple(FAMILIES), swapped(*LAYERS), "smoke"),
    ("other heads of the tower", tuple(FAMILIES), part("vision_config", num_attention_heads=2), "smoke"),
    ("another epsilon of the tower", tuple(FAMILIES), part("vision_config", layer_norm_eps=1.0), "smoke"),
    ("pixels not scaled", tuple(FAMILIES), pixels(rescale_factor=1.0), "smoke"),
    ("pixels not normalised", tuple(FAMILIES), pixels(do_normalize=False), "smoke"),
    ("another filter", tuple(FAMILIES), pixels(resample=2), "smoke"),
    ("images of another size", tuple(FAMILIES), pixels(size={"height": 42, "width": 42}), "smoke"),
    ("images cropped", CLIPS, pixels(crop_size={"height": 14, "width": 14}), "smoke"),
    ("mean and deviation of SigLIP", CLIPS, pixels(**HALF), "smoke"),
    ("mean and deviation of CLIP", ("llava_onevision",), pixels(**CLIP), "smoke"),
    ("images of no size, not cropped", ("llava", "vipllava"), pixels(image_processor_type="CLIPImageProcessor", do_center_crop=False,
     size={"shortest_edge": 28}), "verify"),
    ("squares in place of padding", ("llava",), pixels(do_pad=False), "against"),
    ("another id of the image token", tuple(FAMILIES), config(image_token_index=3), "verify"),
    ("the processor counts a class token", CLIPS, processor(vision_feature_select_strategy="full"), "verify"),
    ("the processor has other patches", CLIPS, processor(patch_size=7), "verify"),
    ("the layer off by one", CLIPS[:3], config(vision_feature_layer=-1), "smoke"),
    ("the class token kept", CLIPS[:3], config(vision_feature_select_strategy="full"), "smoke"),
    ("activation of the tower", CLIPS, part("vision_config", hidden_act="gelu"), "smoke"),
    ("the newline dropped", TILES, tensor("image_newline", torch.zeros_like), "smoke"),
    ("the newline in no file", TILES, removed("image_newline"), "smoke"),
    ("no tiles", TILES, config(image_grid_pinpoints=[[28, 28]]), "smoke"),
    ("pinpoints as the original has them", TILES, turned, "smoke"),
    ("pinpoints missing", TILES, config(image_grid_pinpoints=None), "smoke"),
    ("fewer pinpoints", TILES, all_of(config(image_grid_pinpoints=FEW), pixels(image_grid_pinpoints=FEW)), "smoke"),
    ("other pinpoints of the processor", TILES, pixels(image_grid_pinpoints=FEW), "verify"),
    ("pinpoints missing in the processor", TILES, pixels(image_grid_pinpoints=None), "verify"),
    ("an image processor without tiles", TILES, pixels(image_processor_type="CLIPImageProcessor"), "verify"),
    ("another id of the video token", TILES[1:], config(video_token_index=4), "verify"),
    ("frames of another size", TILES[1:], frames(size={"height": 14, "width": 14}), "verify"),
    ("frames with another mean", TILES[1:], frames(image_mean=[0.4] * 3), "verify"),
    ("the layer off by one", ("llava_onevision",), config(vision_feature_layer=-2), "smoke"),
    ("a patch taken for a class token", ("llava_onevision",), config(vision_feature_select_strategy="default"), "smoke"),
    ("fewer features of an image", ("llava_onevision",), config(vision_aspect_ratio="anyres_max_1"), "smoke"),
    ("more features of an image", ("llava_onevision",), NO_RATIO, "smoke"),
    ("the processor counts other features", ("llava_onevision",), processor(vision_aspect_ratio="anyres_max_9"), "verify"),
    ("the processor counts other patches", ("llava_onevision",), processor(num_image_tokens=5), "verify"),
    ("activation of the tower", ("llava_onevision",), part("vision_config", hidden_act="quick_gelu"), "smoke"),
    ("the largest in place of the mean", ("llava_next_video",), config(spatial_pool_mode="max"), "smoke"),
    ("frames not pooled", ("llava_next_video",), config(spatial_pool_stride=1), "smoke"),
    ("one layer off by one", ("vipllava",), config(vision_feature_layer=OTHER_LAYERS, vision_feature_layers=OTHER_LAYERS), "smoke"),
    ("layers in another order", ("vipllava",), config(vision_feature_layer=OTHER_ORDER, vision_feature_layers=OTHER_ORDER), "smoke"),
    ("the layernorm dropped", ("vipllava",), tensor(NORM, torch.ones_like), "smoke"),
    ("the layernorm in no file", ("vipllava",), removed(NORM), "smoke"),
    ("another epsilon of the layernorm", ("vipllava",), config(projector_layernorm_eps=1.0), "smoke"),
    ("the usual epsilon of another layernorm", ("vipllava",), config(projector_layernorm_eps=1e-6), "against"),
)  # fmt: skip
CASES = [pytest.param(kind, spoil, seen, id=f"{kind}: {what}") for what, kinds, spoil, seen in WRONG for kind in kinds]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_right_one_passes(converted: Callable[[str], Path], kind: str) -> None:
    smoke = lw.smoke_test(converted(kind) / "hf", original=converted(kind) / "llava")
    probes = {row.probe for row in smoke.rows}
    assert ("video" in probes) == (kind in TILES[1:])
    assert ("image-shrunk" in probes) == (kind == "llava_onevision")
    assert lw.verify(converted(kind) / "hf").exit_code == 0


@pytest.mark.parametrize(("kind", "spoil", "seen"), CASES)
def test_each_wrong_one_fails(converted: Callable[[str], Path], tmp_path: Path, kind: str, spoil: Spoil, seen: Seen) -> None:
    wrong, original = tmp_path / "wrong", converted(kind) / "llava"
    shutil.copytree(converted(kind) / "hf", wrong, ignore=shutil.ignore_patterns("SHA256SUMS", "*manifest*"))
    spoil(wrong)
    if seen == "smoke":
        with pytest.raises((lw.VerificationError, lw.InputError)):
            lw.smoke_test(wrong, original=original)
    else:
        assert lw.smoke_test(wrong, original=original).exit_code == 0  # else the list says too little
        found = lw.verify(wrong).findings if seen == "verify" else lw.verify(wrong, against=original).findings
        assert any(finding.verdict == "failed" for finding in found)


def test_pooling_behind_the_projector_is_another_model(converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers pools before it, as LLaVA-NeXT-Video's release did, later code behind it: that difference is seen."""
    video = targets.TARGET_BY_TYPE["llava_next_video"].video
    assert video
    later = replace(video, pooled_first=False)
    init = image_features.InputEmbeddings.__init__
    monkeypatch.setattr(image_features.InputEmbeddings, "__init__", lambda self, *parts: init(self, *parts[:-1], later))
    folder = converted("llava_next_video")
    with pytest.raises(lw.VerificationError, match="video"):
        lw.smoke_test(folder / "hf", original=folder / "llava")
