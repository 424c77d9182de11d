"""The small files of the original layout: tokenizer.json beside tokenizer.model, the tower's name, keys that only its own code reads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transforms.test_convert import hub, write

from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.cli.toy import make_llava
from llava_weights.families.originals import ORIGINALS
from llava_weights.transforms.convert import convert
from llava_weights.transforms.delta import apply_delta
from llava_weights.transforms.lora import merge_lora

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
SLOW = json.loads((FIXTURES / "common/tokenizer/slow-ids.json").read_text())
CLIP = FIXTURES / "common/clip-tiny-42px"


def parsed(path: Path) -> Any:
    return json.loads(path.read_bytes())


def made_by(command: str, out: Path) -> Path:
    if command == "apply-delta":
        return write(apply_delta(FIXTURES / "A-delta-v0/base-hf-bin", FIXTURES / "A-delta-v0/delta-307-apr17"), out)
    if command == "merge-lora":
        return write(merge_lora(FIXTURES / "B-lora/base-vicuna-tiny", FIXTURES / "B-lora/llava-v1.5-tiny-lora"), out)
    if command == "convert":
        return write(convert(FIXTURES / "C-v1.5/original-no-vision-bin", "llava", tower=CLIP), out)
    return write(convert(hub(FIXTURES, "C-tower", out.parent / "hub"), "llava"), out)


@pytest.mark.filterwarnings("ignore:`rope_scaling`:FutureWarning")
@pytest.mark.parametrize("command", ["apply-delta", "merge-lora", "convert", "the way back"])
def test_every_command_writes_a_tokenizer_json_of_the_slow_ids(command: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    one, other = (made_by(command, tmp_path / str(number) / "model") for number in (1, 2))
    path = one / "tokenizer.json"
    assert path.read_bytes() == (other / "tokenizer.json").read_bytes()
    assert hashlib.sha256(path.read_bytes()).hexdigest() in (one / "llava-weights.manifest.json").read_text()
    legacy = parsed(one / "tokenizer_config.json")["legacy"]
    assert legacy is (command == "apply-delta")
    expected = SLOW["ids"][f"plain, legacy {str(legacy).lower()}"]
    tokens = [text for text in SLOW["texts"] if command != "apply-delta" or "<im_" not in text]  # which are tokens of a v0
    loaded = AutoTokenizer.from_pretrained(one)
    assert [loaded(text).input_ids for text in tokens] == [expected[SLOW["texts"].index(text)] for text in tokens]


@pytest.mark.parametrize(
    "told",
    [
        {"image_crop_resolution": 224, "image_split_resolution": 224},
        {"image_crop_resolution": None, "tokenizer_model_max_length": 99},
        {"mm_spatial_pool_mode": "max"},
        {},
    ],
)
@pytest.mark.parametrize("folder", ["C-v1.5/original-with-vision-safetensors", "D-v1.6/original-vicuna"])
def test_keys_that_only_the_originals_code_reads_survive(folder: str, told: dict[str, Any], tmp_path: Path) -> None:
    source = open_checkpoint(FIXTURES / folder)
    if "mm_spatial_pool_mode" in told and "D-" not in folder:
        pytest.skip("of a model that takes tiles")
    source = replace(source, config={key: value for key, value in source.config.items() if "_resolution" not in key} | told)
    there = write(convert(source, "llava-hf", tower=CLIP), tmp_path / "hub")
    again = write(convert(there, "llava-hf"), tmp_path / "again")
    assert parsed(again / "config.json") == parsed(there / "config.json")
    for hf in (there, again):
        back = convert(hf, "llava").config
        assert {key: back[key] for key in told} == told
        for key in ("image_crop_resolution", "image_split_resolution"):
            assert back.get(key, "none") == told.get(key, 42 if "D-" in folder else "none")


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14-336", "./vit/clip", None])
@pytest.mark.parametrize("inside", [True, False])
def test_the_config_names_a_tower_that_llavas_code_finds(name: str | None, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository stays; else it is the folder given, wherever the program that loads it is started."""
    source = open_checkpoint(FIXTURES / "C-v1.5" / ("original-with-vision-safetensors" if inside else "original-no-vision-bin"))
    source = replace(source, config={**source.config, "mm_vision_tower": name, "unfreeze_mm_vision_tower": False})
    monkeypatch.chdir(CLIP.parent)
    made = convert(source, "llava", tower=CLIP.name)
    there = convert(convert(source, "llava-hf", tower=CLIP), "llava", tower=CLIP.name)
    for config in (made.config, there.config):
        assert config["mm_vision_tower"] == (name if name and name.startswith("openai") else str(CLIP))
        assert config["unfreeze_mm_vision_tower"] is True
    (note,) = (text for text in made.history[-1].notes if "`mm_vision_tower` is" in text)
    assert ("another machine" in note) is not bool(name and name.startswith("openai"))


def test_the_command_takes_the_folder_of_a_tower(cli: Any, tmp_path: Path) -> None:
    source, out = tmp_path / "hub", tmp_path / "out"
    hub(FIXTURES, "C-bin", source)
    config = parsed(source / "config.json")
    config["vision_config"].pop("_name_or_path", None)
    (source / "config.json").write_text(json.dumps(config))
    code, _, stderr = cli("convert", source, "--to", "llava", "--vision-tower", CLIP, "-o", out)
    assert code == 0, stderr
    assert parsed(out / "config.json")["mm_vision_tower"] == str(CLIP)
    assert "the folder given" in stderr
    assert "the folder given" in (out / "README.md").read_text()


# --- images of v1.5 -------------------------------------------------------------------------------------------------


def original_pixels(picture: Any, size: int, mean: list[float], std: list[float], *, pad: bool) -> Any:
    """What LLaVA's `process_images` gives: a square in the mean colour (`expand2square` of mm_utils.py at c121f04) or none, then CLIP's
    resize of the shorter side, crop of the middle, and normalisation."""
    from PIL import Image

    width, height = picture.size
    if pad and width != height:
        side = max(width, height)
        square = Image.new(picture.mode, (side, side), tuple(int(x * 255) for x in mean))
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        picture = square
    width, height = picture.size
    short = min(width, height)
    picture = picture.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    values = np.asarray(picture.crop((left, top, left + size, top + size)), dtype=np.float64) / 255
    return ((values - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize("shape", [(42, 42), (97, 50), (50, 97), (200, 60), (23, 31)])
@pytest.mark.parametrize("aspect", [None, "square", "pad"])
def test_default_pixels_are_the_originals(shape: tuple[int, int], aspect: str | None, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    picture = Image.fromarray(np.random.default_rng(7).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8))
    made = convert(FIXTURES / "C-v1.5/original-no-vision-bin", "llava-hf", tower=CLIP, image_aspect=aspect)
    settings = made.files["preprocessor_config.json"]
    assert isinstance(settings, bytes)
    (tmp_path / "preprocessor_config.json").write_bytes(settings)
    found = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(picture, return_tensors="np")["pixel_values"][0]
    told = json.loads(settings)
    expected = original_pixels(picture, 42, told["image_mean"], told["image_std"], pad=aspect != "square")
    assert np.abs(found - expected).max() < 1e-5
    notes = " ".join(made.history[-1].notes)
    assert ("4.49" in notes) is (aspect != "square")
    assert ("cropped" in notes) is (aspect == "square") or "--image-aspect square" in notes


@pytest.mark.parametrize(("ratio", "pads"), [("pad", True), ("square", False), (None, False)])
@pytest.mark.parametrize("family", ["LLaVA v1.5 and v1.6", "LLaVA v1.5 and v1.6, SigLIP", "ViP-LLaVA"])
def test_images_are_padded_where_the_original_pads(ratio: str | None, pads: bool, family: str, tmp_path: Path) -> None:
    make_llava(tmp_path, next(row for row in ORIGINALS if row.name == family))
    source = tmp_path / "llava"
    config = {**parsed(source / "config.json"), "image_aspect_ratio": ratio}
    config |= {"mm_vision_tower": "clip_4layers_336"} if family == "ViP-LLaVA" else {}
    (source / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    made = write(convert(source, "llava-hf", tower=tmp_path / "tower"), tmp_path / "hub")
    assert (parsed(made / "preprocessor_config.json")["image_processor_type"] == "LlavaImageProcessor") is pads
    again = write(convert(made, "llava-hf"), tmp_path / "again")
    assert (again / "preprocessor_config.json").read_bytes() == (made / "preprocessor_config.json").read_bytes()
    back = convert(again, "llava", tower=None if "SigLIP" in family else tmp_path / "tower").config
    assert back["image_aspect_ratio"] == (ratio or "square")
    if family == "ViP-LLaVA":
        assert back["mm_vision_tower"] == "clip_4layers_336"  # which its own code knows
