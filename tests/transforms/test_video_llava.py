"""Video-LLaVA, which has a tower for images and one for videos: what its class has no place for is lost only where the user says so."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_weights as lw
from llava_weights.checkpoint.tower import own_tower, tower_shapes
from llava_weights.cli.toy import make_llava
from llava_weights.families.layouts import spelled
from llava_weights.families.originals import ORIGINALS

LOST = "model.video_tower.video_tower.encoder.layers.*.temporal_*"
TEMPORAL = 33  # of three layers: an embedding, a norm and four projections
SINGLE = {"image_tower.vision_model.": "image_tower.", "video_tower.vision_model.": "video_tower."}
WITHIN = {
    "language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model.", "image_tower.": "model.image_tower.",
    "video_tower.": "model.video_tower.", "multi_modal_projector.": "model.multi_modal_projector.",
}  # fmt: skip
STYLES = {
    "as 5.23 saves it": lambda name: replaced(name, SINGLE),
    "in memory, 4.52": lambda name: replaced(name, WITHIN),
    "in memory, 5.6": lambda name: replaced(replaced(name, SINGLE), WITHIN),
}


def replaced(name: str, prefixes: dict[str, str]) -> str:
    return next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llava`, and `hf` made of it."""
    folder = tmp_path_factory.mktemp("video")
    make_llava(folder, next(row for row in ORIGINALS if row.target == "video_llava"))
    lw.execute(lw.make_plan(lw.convert(folder / "llava", "llava-hf", lossy=True)), folder / "hf")
    return folder


def copied(folder: Path, to: Path, **config: Any) -> Path:
    """A copy without records, with these keys in its config.json."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*manifest*", "SHA256SUMS", "README.md"))
    path = to / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return to


def renamed(folder: Path, rename: Callable[[str], str | None]) -> Path:
    """`folder` with its tensors under other names, without those of no name."""
    path = next(folder.glob("*.safetensors"))
    tensors = {new: tensor for name, tensor in load_file(path).items() if (new := rename(name))}
    save_file(tensors, path, {"format": "pt"})
    return folder


def failed(folder: Path) -> list[str]:
    return [each.text for each in lw.verify(folder).findings if each.verdict == "failed"]


@pytest.mark.parametrize("command", ["convert", "merge-lora"])
def test_nothing_is_lost_without_a_word(made: Path, tmp_path: Path, cli: Any, command: str) -> None:
    given = [str(made / "llava")]
    if command == "merge-lora":
        module = "base_model.model.model.layers.0.mlp.gate_proj.lora_"
        (tmp_path / "lora").mkdir()
        (tmp_path / "lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
        save_file(
            {f"{module}A.weight": torch.ones(1, 64), f"{module}B.weight": torch.ones(96, 1)}, tmp_path / "lora/adapter_model.safetensors"
        )
        given = ["--base", str(made / "llava"), "--lora", str(tmp_path / "lora")]
    refused = cli(command, *given, "--to", "llava-hf", "-o", str(tmp_path / "out"))
    assert refused.code == 3
    assert f"{TEMPORAL} tensors" in refused.stderr
    assert LOST in refused.stderr
    assert "--lossy" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = cli(command, *given, "--to", "llava-hf", "-o", str(tmp_path / "out"), "--lossy")
    assert done.code == 0, done.stderr
    for text in (done.stderr, (tmp_path / "out/README.md").read_text()):
        assert f"{TEMPORAL} tensors are lost" in text
    assert any(each.rule == "recorded" and LOST in each.text for each in lw.verify(tmp_path / "out").findings)


def test_every_other_tensor_has_its_values(made: Path) -> None:
    found = lw.verify(made / "hf", against=made / "llava", deep=True)
    assert found.exit_code == 0
    assert f"{TEMPORAL} tensors of `llava` that the class of a conversion does not read" in "\n".join(each.text for each in found.findings)
    assert lw.verify(made / "hf", base=made / "llava", deep=True).exit_code == 0  # by the recipe, with the option in it


def test_what_its_class_counts(made: Path) -> None:
    """transformers' configuration_video_llava.py: 256 patches of 224 pixels, 8 frames with a class token each; here 4."""
    config = json.loads((made / "hf/config.json").read_text())
    assert (config["image_seq_length"], config["video_seq_length"]) == (4, 40)
    assert (config["image_token_index"], config["video_token_index"], config["pad_token_id"]) == (320, 321, 322)
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-2, "default")
    images, frames = (json.loads((made / "hf" / f"{kind}preprocessor_config.json").read_text()) for kind in ("", "video_"))
    assert (images["image_processor_type"], frames["video_processor_type"]) == ("VideoLlavaImageProcessor", "VideoLlavaVideoProcessor")
    assert images["crop_size"] == frames["crop_size"] == {"height": 28, "width": 28}
    template = (made / "hf/chat_template.jinja").read_text()
    assert "<image>" in template
    assert "<video>" in template


@pytest.mark.parametrize("style", STYLES)
def test_other_names_of_llava_hf_become_those_of_the_hub(made: Path, tmp_path: Path, style: str) -> None:
    folder = renamed(copied(made / "hf", tmp_path / "there", mm_own_key=[1, "two"], vision_feature_layer=-1), STYLES[style])
    assert not failed(folder)
    again, config = lw.convert(folder, "llava-hf"), json.loads((folder / "config.json").read_text())
    assert set(again.tensors) == set(lw.open_checkpoint(made / "hf").tensors)
    assert {key: again.config[key] for key in config} == config


def test_the_original_layout_keeps_all_and_is_not_made_of_llava_hf(made: Path, tmp_path: Path) -> None:
    kept = lw.convert(made / "llava", "llava")
    lw.execute(lw.make_plan(kept), tmp_path / "kept")
    assert lw.diff(made / "llava", tmp_path / "kept").equal
    assert kept.config["mm_image_tower"] == "tower"
    with pytest.raises(lw.InputError, match="can't go back to the original layout") as refused:
        lw.convert(made / "hf", "llava")
    assert LOST in refused.value.facts.values()


def test_options_that_change_nothing_or_can_not_be(made: Path, fixtures: Path) -> None:
    for source in (made / "hf", fixtures / "C-v1.5/hf-by-tf4.47.1"):
        with pytest.raises(lw.UsageError, match="lossy"):
            lw.convert(source, "llava-hf", lossy=True)
    with pytest.raises(lw.UsageError, match="lossy"):
        lw.convert(made / "llava", "llava", lossy=True)
    with pytest.raises(lw.UsageError, match="image-aspect pad"):
        lw.convert(made / "llava", "llava-hf", lossy=True, image_aspect="pad")


OTHER_CLASS = {
    "llava on tensors of video_llava": ("llava", lambda name: name),
    "llava on another tower's name": ("llava", lambda name: None if name.startswith("video_tower.") else name),
    "video_llava without its tower for videos": ("video_llava", lambda name: None if name.startswith("video_tower.") else name),
    "video_llava on tensors of llava": ("video_llava", lambda name: name.replace("image_tower.", "vision_tower.")),
}


@pytest.mark.parametrize("case", OTHER_CLASS)
def test_a_class_that_the_tensors_contradict(made: Path, tmp_path: Path, case: str) -> None:
    kind, rename = OTHER_CLASS[case]
    folder = renamed(copied(made / "hf", tmp_path / "there", model_type=kind), rename)
    with pytest.raises(lw.InputError, match=f"is not the {kind} that its config.json says"):
        lw.convert(folder, "llava-hf")
    assert any(text.startswith(f"`model_type` is {kind}, but") for text in failed(folder))


def test_a_tower_for_videos_that_is_not_whole(made: Path, tmp_path: Path) -> None:
    lacking = "video_tower.vision_model.encoder.layers.1.mlp.fc1.bias"
    folder = renamed(copied(made / "hf", tmp_path / "there"), lambda name: None if name == lacking else name)
    with pytest.raises(lw.InputError, match=r"tower for videos of `there` lacks `encoder\.layers\.1\.mlp\.fc1\.bias`"):
        lw.convert(folder, "llava-hf")
    assert any("tower for videos" in text for text in failed(folder))


def test_towers_that_are_only_named(made: Path, tmp_path: Path) -> None:
    names = {"mm_image_tower": "LanguageBind/LanguageBind_Image", "mm_video_tower": "LanguageBind/LanguageBind_Video_merge"}
    folder = copied(made / "llava", tmp_path / "there", **names)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({name: tensor for name, tensor in tensors.items() if "_tower." not in name}, folder / "pytorch_model.bin")
    with pytest.raises(lw.InputError, match="a tower for videos, and it is in no file") as refused:
        lw.convert(folder, "llava-hf", lossy=True)
    assert names["mm_video_tower"] in refused.value.facts.values()


@pytest.mark.parametrize("videos", [True, False])
def test_the_activation_is_that_of_the_published_tower(videos: bool) -> None:
    """LanguageBind's and OpenAI's have the same shapes, and other activations."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    shapes = tower_shapes({**sizes, "model_type": "clip_vision_model", "image_size": 224})
    names = {f"{part}.{name}": shape for part in ("tower", "video_tower")[: 1 + videos] for name, shape in shapes.items()}
    tensors = {spelled(name, "two-towers"): lw.LazyTensor(dtype="F16", shape=shape) for name, shape in names.items()}
    origin = lw.Origin("model", Path("/nowhere"), "torch", ())
    found = own_tower(tensors, vision_config=None, model=lw.Checkpoint(tensors, {}, origin))
    assert found is not None
    assert found.config["hidden_act"] == ("gelu" if videos else "quick_gelu")
    assert re.search("LanguageBind" if videos else "openai", " ".join(found.notes))


def test_smoke_sees_the_image_as_the_original(made: Path) -> None:
    found = lw.smoke_test(made / "hf", original=made / "llava")
    assert found.exit_code == 0
    assert {row.probe for row in found.rows} >= {"text", "image"}


def test_inspect_names_it(made: Path) -> None:
    original, hub = lw.inspect(made / "llava"), lw.inspect(made / "hf")
    assert original.family.startswith("Video-LLaVA:")
    assert "--lossy" in original.next
    assert "video_llava" in hub.family
    assert "VideoLlavaForConditionalGeneration" in hub.model_class
    for each in (original, hub):
        assert "and one for videos" in each.tower


def test_an_adapter_that_names_its_tower_as_video_llava_does_brings_its_config(made: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    module = "base_model.model.model.layers.0.mlp.gate_proj.lora_"
    save_file({f"{module}A.weight": torch.ones(1, 64), f"{module}B.weight": torch.ones(96, 1)}, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    config = json.loads((made / "llava/config.json").read_text())
    (lora / "config.json").write_text(json.dumps({**config, "mm_image_tower": "of/the-adapter"}))
    projector = {f"base_model.model.model.mm_projector.{n}.{part}": torch.ones(1) for n in (0, 2) for part in ("weight", "bias")}
    original = torch.load(made / "llava/pytorch_model.bin", weights_only=True)
    torch.save({name: original[name.removeprefix("base_model.model.")] for name in projector}, lora / "non_lora_trainables.bin")
    merged = lw.merge_lora(made / "llava", lora)
    assert merged.config["mm_image_tower"] == "of/the-adapter"
    assert not [text for text in merged.history[-1].warnings if "vision tower" in text]


@pytest.mark.parametrize("layout", ["llava", "hf"])
def test_smoke_answers_a_prompt_with_a_picture(made: Path, tmp_path: Path, cli: Any, layout: str) -> None:
    """Its image processor has names of its own for what it gives, before transformers 5.23 others."""
    from PIL import Image

    Image.new("RGB", (40, 56), (200, 30, 90)).save(tmp_path / "picture.png")
    done = cli("smoke", made / layout, "--prompt", "Where?", "--image", tmp_path / "picture.png")
    assert done.code == 0, done.stderr
