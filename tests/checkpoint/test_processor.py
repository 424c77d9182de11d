"""The files that AutoProcessor reads: from towers of any age, for every kind of image processor, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava_weights.checkpoint.chat_template import QUESTION, chat_template, example
from llava_weights.checkpoint.processor import ImageSettings, original_vision_settings, processor_files, read_image_settings
from llava_weights.errors import InputError, MismatchError
from llava_weights.families.prompts import CONVERSATIONS
from llava_weights.families.targets import TARGETS
from llava_weights.families.towers import TOWERS
from llava_weights.storage.strict_json import parse_json

(LLAVA, NEXT), (CLIP_ROW, SIGLIP_ROW) = TARGETS, TOWERS
TEMPLATE = chat_template(CONVERSATIONS["vicuna_v1"], "<image>")
CLIP = read_image_settings(None, size=336, patch=14, tower=CLIP_ROW)
SIGLIP = read_image_settings(None, size=384, patch=14, tower=SIGLIP_ROW)
PINPOINTS = [[336, 672], [672, 336], [336, 1008]]  # height, width


def made(settings: ImageSettings, **choices: Any) -> dict[str, bytes]:
    """The files for a LLaVA 1.5, but for `choices`."""
    usual = {"target": LLAVA, "image_token": "<image>", "select_strategy": "default", "aspect": "square", "pinpoints": None}
    return processor_files(settings, **{**usual, **choices}, template=TEMPLATE)


def parsed(files: dict[str, bytes], name: str) -> dict[str, Any]:
    value: dict[str, Any] = parse_json(files[name], name=name)
    return value


KINDS: dict[str, tuple[ImageSettings, dict[str, Any], str]] = {
    "clip": (CLIP, {}, "CLIPImageProcessor"),
    "pad": (CLIP, {"aspect": "pad"}, "LlavaImageProcessor"),
    "next": (CLIP, {"target": NEXT, "pinpoints": PINPOINTS}, "LlavaNextImageProcessor"),
    "siglip": (SIGLIP, {"select_strategy": "full"}, "SiglipImageProcessor"),
}


@pytest.mark.parametrize("age", ["clip-tiny-28px", "clip-tiny-42px"])
def test_towers_of_2022_and_2024_are_read(fixtures: Path, age: str) -> None:
    preprocessor = json.loads((fixtures / "common" / age / "preprocessor_config.json").read_text())
    size = int(age.removeprefix("clip-tiny-").removesuffix("px"))
    settings = read_image_settings(preprocessor, size=size, patch=14, tower=CLIP_ROW)
    assert settings == read_image_settings(None, size=size, patch=14, tower=CLIP_ROW)
    assert (settings.size, settings.patch, settings.resample, settings.rescale) == (size, 14, 3, 1 / 255)
    assert list(settings.mean) == preprocessor["image_mean"]
    assert list(settings.std) == preprocessor["image_std"]


def test_own_numbers_of_a_tower_are_kept() -> None:
    given = {
        "image_mean": [0, 0.25, 0.5],
        "image_std": [1, 0.5, 0.25],
        "resample": 2,
        "rescale_factor": 0.5,
        "size": {"height": 8, "width": 8},
    }
    settings = read_image_settings(given, size=8, patch=2, tower=SIGLIP_ROW)
    assert settings == ImageSettings(SIGLIP_ROW, 8, 2, (0.0, 0.25, 0.5), (1.0, 0.5, 0.25), 2, 0.5)
    written = parsed(made(settings), "preprocessor_config.json")
    assert {key: written[key] for key in given} == given


def test_defaults_of_siglip() -> None:
    assert (SIGLIP.mean, SIGLIP.std, SIGLIP.resample, SIGLIP.rescale) == ((0.5,) * 3, (0.5,) * 3, 3, 1 / 255)


@pytest.mark.parametrize(
    "bad",
    [
        {"size": {"shortest_edge": 336, "longest_edge": 400}}, {"size": [336]}, {"size": {}}, {"size": {"shortest_edge": {}}},
        {"crop_size": True}, {"image_mean": [0.5, 0.5]}, {"image_mean": 0.5}, {"image_mean": ["0.5"] * 3},
        {"image_std": [0.5, 0.5, 0]}, {"image_std": [10**400] * 3}, {"resample": 6}, {"resample": 3.0}, {"resample": True},
        {"rescale_factor": 0}, {"rescale_factor": "1/255"}, {"do_normalize": False}, {"do_resize": 0}, {"do_rescale": "yes"},
    ],
)  # fmt: skip
def test_absurd_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        read_image_settings(bad, size=336, patch=14, tower=CLIP_ROW)


def test_the_preprocessor_of_another_tower_is_refused() -> None:
    for key in ("size", "crop_size"):
        with pytest.raises(MismatchError) as refusal:
            read_image_settings({key: 224}, size=336, patch=14, tower=CLIP_ROW)
        assert refusal.value.facts == {f"`{key}` in preprocessor_config.json": "224 pixels", "the vision tower": "336 pixels"}


@pytest.mark.parametrize("kind", KINDS)
def test_files_say_what_they_should(kind: str) -> None:
    settings, choices, image_processor = KINDS[kind]
    files = made(settings, **choices)
    assert sorted(files) == ["chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"]
    assert parsed(files, "chat_template.json") == {"chat_template": files["chat_template.jinja"].decode()}
    preprocessor, processor = parsed(files, "preprocessor_config.json"), parsed(files, "processor_config.json")
    assert preprocessor["image_processor_type"] == image_processor
    assert preprocessor.get("do_pad") == (True if kind in ("pad", "next") else None)
    assert preprocessor.get("image_grid_pinpoints") == choices.get("pinpoints")
    assert processor == {
        "image_token": "<image>",
        "num_additional_image_tokens": 0 if kind == "siglip" else 1,
        "patch_size": 14,
        "processor_class": "LlavaNextProcessor" if kind == "next" else "LlavaProcessor",
        "vision_feature_select_strategy": "full" if kind == "siglip" else "default",
    }
    assert preprocessor["processor_class"] == processor["processor_class"]


def test_clip_files_are_those_of_the_converter(fixtures: Path) -> None:
    tower = json.loads((fixtures / "common" / "clip-tiny-42px" / "preprocessor_config.json").read_text())
    files = made(read_image_settings(tower, size=42, patch=14, tower=CLIP_ROW), image_token="<im_patch>")
    converter = json.loads((fixtures / "C-v1.5" / "hf-by-tf4.47.1" / "preprocessor_config.json").read_text())
    assert parsed(files, "preprocessor_config.json") == converter
    assert parsed(files, "processor_config.json")["image_token"] == "<im_patch>"


@pytest.mark.parametrize("pinpoints", [None, [], [[336]], [[336, 0]], [[336, 672.0]], [336, 672], "ab", [[1, 1]] * 1025])
def test_absurd_pinpoints_are_refused(pinpoints: Any) -> None:
    with pytest.raises(InputError, match="image_grid_pinpoints"):
        made(CLIP, target=NEXT, pinpoints=pinpoints)
    if pinpoints is not None:
        with pytest.raises(InputError, match="image_grid_pinpoints"):
            original_vision_settings({"image_grid_pinpoints": pinpoints}, {})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("clip", {"image_aspect_ratio": "square"}),
        ("siglip", {"image_aspect_ratio": "square"}),
        ("pad", {"image_aspect_ratio": "pad"}),
        ("next", {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[672, 336], [336, 672], [1008, 336]]}),
    ],
)
def test_the_way_back(kind: str, expected: dict[str, Any]) -> None:
    settings, choices, _ = KINDS[kind]
    files = made(settings, **choices)
    preprocessor, processor = parsed(files, "preprocessor_config.json"), parsed(files, "processor_config.json")
    assert original_vision_settings(preprocessor, processor) == expected
    assert original_vision_settings({}, {**processor, "image_processor": preprocessor}) == expected  # as transformers 5 saves it


def test_the_way_back_knows_next_without_pinpoints_and_a_pad_that_does_nothing() -> None:
    assert original_vision_settings({}, {"processor_class": "LlavaNextProcessor"}) == {"image_aspect_ratio": "anyres"}
    assert original_vision_settings({"image_processor_type": "LlavaNextImageProcessorFast"}, {}) == {"image_aspect_ratio": "anyres"}
    assert original_vision_settings({"image_processor_type": "CLIPImageProcessor", "do_pad": True}, {}) == {"image_aspect_ratio": "pad"}


def folder_of(files: dict[str, bytes], model_type: str, fixtures: Path, folder: Path) -> Path:
    """A llava-hf folder without weights: the files, a config and the reference's tokenizer, whose `<image>` is 304."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        shutil.copy(fixtures / "C-v1.5" / "hf-by-tf4.47.1" / name, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "image_token_index": 304}))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_transformers_renders_the_template(fixtures: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder_of(made(CLIP), "llava", fixtures, tmp_path))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == example(CONVERSATIONS["vicuna_v1"], "<image>")


@pytest.mark.parametrize(("kind", "tokens"), [("clip", 576), ("pad", 576), ("next", 1176), ("siglip", 729)])
def test_transformers_reads_the_files(fixtures: Path, tmp_path: Path, kind: str, tokens: int) -> None:
    pytest.importorskip("PIL")
    import numpy
    from transformers import AutoProcessor

    settings, choices, image_processor = KINDS[kind]
    files = made(settings, **choices)
    processor = AutoProcessor.from_pretrained(folder_of(files, "llava_next" if kind == "next" else "llava", fixtures, tmp_path))
    assert type(processor).__name__ == parsed(files, "processor_config.json")["processor_class"]
    assert type(processor.image_processor).__name__.startswith(image_processor)
    for key in ("image_mean", "image_std", "resample", "rescale_factor", "do_pad", "image_grid_pinpoints"):
        if key in (written := parsed(files, "preprocessor_config.json")):
            assert getattr(processor.image_processor, key) in (
                written[key],
                tuple(written[key]) if isinstance(written[key], list) else None,
            )
    prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    square = numpy.zeros((settings.size, settings.size, 3), dtype=numpy.uint8)
    read = processor(images=square, text=prompt)
    assert list(read["input_ids"][0]).count(304) == tokens
