"""Conversion, held against what the original programs and transformers' own converters made of the same checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forwards
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.cli.toy import make_llava
from llava_weights.errors import InputError, LlavaWeightsError, UsageError
from llava_weights.families.layouts import SPELLINGS, canonical, spelled
from llava_weights.families.originals import ORIGINALS
from llava_weights.families.targets import TARGETS
from llava_weights.transforms.convert import convert
from llava_weights.transforms.delta import apply_delta
from llava_weights.transforms.lora import merge_lora, open_weighted
from llava_weights.write.execute import execute
from llava_weights.write.plan import make_plan

MAIN = "merged-of-{}-by-main-peft0.10.0"
SOURCES = {  # name: original checkpoint, tower, logits, their prefix
    "A-307": ("A-delta-v0/expected-307-by-main", "clip-tiny-28px", "A-delta-v0", "v307."),
    "A-308": ("A-delta-v0/expected-308-by-may4", "clip-tiny-28px", "A-delta-v0", "v308."),
    "B-v1.5": ("B-lora/" + MAIN.format("llava-v1.5-tiny-lora"), "clip-tiny-28px", "B-lora-v1.5", ""),
    "B-imstartend": ("B-lora/" + MAIN.format("llava-v1-tiny-lora-imstartend"), "clip-tiny-28px", "B-lora-imstartend", ""),
    "C-bin": ("C-v1.5/original-no-vision-bin", "clip-tiny-42px", "C-v1.5", ""),
    "C-tower": ("C-v1.5/original-with-vision-safetensors", "clip-tiny-42px", "C-v1.5", ""),
    "D": ("D-v1.6/original-vicuna", "clip-tiny-42px", "D-v1.6", ""),
}
LINEAR = ("A-307", "A-308", "B-imstartend")
Tensors = dict[str, torch.Tensor]


def tensors_of(folder: Path) -> Tensors:
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))] + [torch.load(path) for path in sorted(folder.glob("*.bin"))]
    return {name: tensor for file in files for name, tensor in file.items() if not name.endswith("inv_freq")}


def write(checkpoint: Any, out: Path, **options: Any) -> Path:
    execute(make_plan(checkpoint, **options), out)
    return out


def hub(fixtures: Path, name: str, out: Path, **options: Any) -> Path:
    source, tower, _, _ = SOURCES[name]
    made = convert(open_checkpoint(fixtures / source), "llava-hf", tower=open_checkpoint(fixtures / "common" / tower), **options)
    return write(made, out)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.fixture(scope="module")
def made(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A source in llava-hf, converted once a module."""
    folder, done = tmp_path_factory.mktemp("made"), {}

    def make(name: str, form: str | None = None) -> Path:
        if (name, form) not in done:
            done[name, form] = hub(fixtures, name, folder / f"{name}-{form}", projector_form=form)
        return done[name, form]

    return make


@pytest.mark.parametrize("name", SOURCES)
def test_logits_are_the_originals(fixtures: Path, made: Callable[..., Path], name: str) -> None:
    model, keys = forwards.load_model(made(name))
    assert keys == {"missing_keys": [], "unexpected_keys": []}
    found = forwards.worst(model, fixtures / "E-logits" / SOURCES[name][2], SOURCES[name][3])
    assert len(found) >= 3
    assert max(found.values()) <= forwards.ATOL, found


@pytest.mark.parametrize("form", ["relu", "gelu"])
@pytest.mark.parametrize("name", LINEAR)
def test_portable_projector_forms(fixtures: Path, made: Callable[..., Path], name: str, form: str) -> None:
    model, keys = forwards.load_model(made(name, form))
    assert keys == {"missing_keys": [], "unexpected_keys": []}
    assert max(forwards.worst(model, fixtures / "E-logits" / SOURCES[name][2], SOURCES[name][3]).values()) <= 2e-5


@pytest.mark.parametrize(("name", "converters"), [("C-bin", "C-v1.5/hf-by-tf4.47.1"), ("D", "D-v1.6/hf-by-tf4.47.1-vicuna")])
def test_tensors_are_the_converters(fixtures: Path, made: Callable[..., Path], name: str, converters: str) -> None:
    found, expected = tensors_of(made(name)), tensors_of(fixtures / converters)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        old = 304 if key.endswith(("embed_tokens.weight", "lm_head.weight")) else len(tensor)
        assert found[key].shape == tensor.shape
        assert same_bits(found[key][:old], tensor[:old]), key


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("form", ["identity", "relu", "gelu"])
def test_there_and_back(fixtures: Path, made: Callable[..., Path], tmp_path: Path, name: str, form: str) -> None:
    if form != "identity" and name not in LINEAR:
        pytest.skip("its projector has two layers")
    back = tensors_of(write(convert(open_checkpoint(made(name, form if name in LINEAR else None)), "llava"), tmp_path / "back"))
    original = tensors_of(fixtures / SOURCES[name][0])
    assert original.keys() <= back.keys()
    assert all("vision_tower" in key for key in back.keys() - original.keys())
    for key, tensor in original.items():
        assert same_bits(back[key], tensor), key


def test_the_originals_config_comes_back(fixtures: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("C-bin", "D", "A-308"):
        config = json.loads((write(convert(open_checkpoint(made(name)), "llava"), tmp_path / name) / "config.json").read_text())
        original = json.loads((fixtures / SOURCES[name][0] / "config.json").read_text())
        for key in ("hidden_size", "vocab_size", "mm_hidden_size", "image_grid_pinpoints", "mm_patch_merge_type", "image_aspect_ratio",
                    "mm_use_im_start_end", "rms_norm_eps", "max_position_embeddings", "mm_vision_select_layer"):  # fmt: skip
            default = {"image_aspect_ratio": "square", "max_position_embeddings": 2048}.get(key)
            assert config.get(key) == original.get(key, default), (name, key)


def test_hub_style_again_is_the_same(made: Callable[..., Path], tmp_path: Path) -> None:
    for name in SOURCES:
        again = write(convert(open_checkpoint(made(name)), "llava-hf"), tmp_path / name)
        for path in made(name).iterdir():
            if path.name not in ("README.md", "SHA256SUMS", "llava-weights.manifest.json"):
                assert path.read_bytes() == (again / path.name).read_bytes(), (name, path.name)


STYLES = {  # Hub name -> the name under which that style keeps it
    "S2": lambda name: "lm_head.weight" if "lm_head" in name else f"model.{name.replace('language_model.model.', 'language_model.')}",
    "S3": lambda name: STYLES["S2"](name).replace(".vision_model.", "."),
    "S4": lambda name: name.replace(".vision_model.", "."),
    "S5": lambda name: name if "lm_head" in name else f"model.{name}",
}


@pytest.mark.parametrize("style", STYLES)
def test_every_key_style_becomes_the_hubs(made: Callable[..., Path], tmp_path: Path, style: str) -> None:
    for name in ("C-bin", "D"):
        folder = tmp_path / name
        shutil.copytree(made(name), folder)
        save_file({STYLES[style](key): x for key, x in tensors_of(folder).items()}, folder / "model.safetensors", {"format": "pt"})
        again = write(convert(open_checkpoint(folder), "llava-hf"), tmp_path / f"{name}-again")
        assert (again / "model.safetensors").read_bytes() == (made(name) / "model.safetensors").read_bytes()


def test_what_transformers_5_saves_is_repaired(made: Callable[..., Path], tmp_path: Path) -> None:
    """Its own save of a model that it built from a config: keys without `vision_model`, `rope_parameters`, no preprocessor file."""
    from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

    source = made("C-bin")
    model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(source))
    model.load_state_dict(forwards.load_model(source)[0].state_dict())
    model.half().save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "saved")
    again = write(convert(open_checkpoint(tmp_path / "saved"), "llava-hf"), tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    found, expected = (json.loads((folder / "config.json").read_text()) for folder in (again, source))
    for config in (found, expected):
        config["vision_config"].pop("_name_or_path", None)
    assert found == expected


def test_one_pass_is_step_by_step(fixtures: Path, tmp_path: Path) -> None:
    base, delta, tower = fixtures / "A-delta-v0/base-hf-bin", fixtures / "A-delta-v0/delta-308-may4", fixtures / "common/clip-tiny-28px"
    lora = fixtures / "B-lora/llava-v1.5-tiny-lora"
    adapter = tmp_path / "lora"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(lora / name, adapter)
    options = {"max_shard_size": "70kB"}
    merged = apply_delta(open_checkpoint(base), open_checkpoint(delta))
    both = merge_lora(merged, [open_weighted(str(adapter))])
    one = write(convert(both, "llava-hf", tower=open_checkpoint(tower)), tmp_path / "one", **options)
    first = write(merged, tmp_path / "first", **options)
    second = write(merge_lora(open_checkpoint(first), [open_weighted(str(adapter))]), tmp_path / "second", **options)
    third = write(convert(open_checkpoint(second), "llava-hf", tower=open_checkpoint(tower)), tmp_path / "third", **options)
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in third.iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) > 3
    for name in names - {"README.md", "SHA256SUMS", "llava-weights.manifest.json"}:  # these tell the way
        assert (one / name).read_bytes() == (third / name).read_bytes(), name


def changed(source: Path, target: Path, change: Callable[[Tensors, dict[str, Any]], None], **files: Any) -> Path:
    """A copy with other tensors or config keys."""
    shutil.copytree(source, target)
    for path in [*target.glob("*.safetensors"), *target.glob("*.bin"), *target.glob("*.index.json")]:
        path.unlink()
    tensors, config = tensors_of(source), json.loads((source / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (target / f"{name}.json").write_text(json.dumps(content))
    return target


REFUSED: dict[str, tuple[str, Callable[[Tensors, dict[str, Any]], Any], str]] = {
    "unknown name": (
        "C-tower",
        lambda t, c: t.update({"model.layers.0.mlp.gate.weight": torch.zeros(2)}),
        "model.layers.0.mlp.gate.weight",
    ),
    "unknown part": ("C-tower", lambda t, c: t.update({"vision_resampler.x": torch.zeros(2)}), "vision_resampler.x"),
    "missing tensor": ("C-tower", lambda t, c: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
    "missing in the tower": (
        "C-tower",
        lambda t, c: t.pop("model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"),
        "encoder.layers.0.mlp.fc1.bias",
    ),
    "config and shapes": ("C-tower", lambda t, c: c.update(intermediate_size=256), "`intermediate_size` is 256"),
    "three layers": (
        "C-tower",
        lambda t, c: t.update({"model.mm_projector.4.weight": torch.zeros(48, 48).half()}),
        "the projector is `mlp3x_gelu`",
    ),
    "projector of another tower": (
        "C-tower",
        lambda t, c: t.update({"model.mm_projector.0.weight": torch.zeros(48, 32).half()}),
        "does not fit its tower",
    ),
    "Mixtral": ("C-tower", lambda t, c: c.update(model_type="llava_mixtral"), "`llava_mixtral`"),
    "OneVision": (
        "C-tower",
        lambda t, c: c.update(image_aspect_ratio="anyres_max_9", mm_patch_merge_type="spatial_unpad"),
        "`image_newline` is in no file",
    ),
    "tiles side by side": (
        "C-tower",
        lambda t, c: c.update(image_aspect_ratio="anyres", mm_patch_merge_type="flat"),
        "images in tiles",
    ),
    "NeXT without newline": ("D", lambda t, c: t.pop("model.image_newline"), "`image_newline` is in no file"),
    "pinpoints": ("D", lambda t, c: c.update(image_grid_pinpoints=[[84, 41]]), "image_grid_pinpoints"),
    "MPT": ("C-tower", lambda t, c: (t.clear(), t.update({"transformer.blocks.0.attn.Wqkv.weight": torch.zeros(2, 2)})), "LLaVA-MPT"),
    "plain LLaMA": ("C-tower", lambda t, c: [t.pop(name) for name in list(t) if "mm_" in name or "vision" in name], "is not a LLaVA"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_names(fixtures: Path, tmp_path: Path, case: str) -> None:
    name, change, words = REFUSED[case]
    source = changed(fixtures / SOURCES[name][0], tmp_path / "changed", change)
    with pytest.raises(InputError) as caught:
        convert(open_checkpoint(source), "llava-hf", tower=open_checkpoint(fixtures / "common" / SOURCES[name][1]))
    assert caught.value.exit_code == 3
    assert words in f"{caught.value} {caught.value.facts}"


def test_no_tower(fixtures: Path) -> None:
    with pytest.raises(InputError, match="holds no vision tower") as caught:
        convert(open_checkpoint(fixtures / "C-v1.5/original-no-vision-bin"), "llava-hf")
    assert "--vision-tower" in str(caught.value.hint)


def test_an_image_token_without_a_row(fixtures: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    source = changed(fixtures / SOURCES["C-tower"][0], tmp_path / "x", lambda t, c: None, added_tokens={"<im_patch>": 304})
    with pytest.raises(InputError, match="`<im_patch>` has the id 304, but the vocabulary has only 304 rows"):
        convert(open_checkpoint(source), "llava-hf", tower=open_checkpoint(fixtures / "common/clip-tiny-42px"))
    wrong = changed(made("C-bin"), tmp_path / "y", lambda t, c: c.update(image_token_index=320))
    with pytest.raises(InputError, match="the image token's id is 320, the vocabulary has 320 rows"):
        convert(open_checkpoint(wrong), "llava-hf")


def test_an_unapplied_delta_is_refused(fixtures: Path) -> None:
    with pytest.raises(InputError, match="is an unapplied delta"):
        convert(open_checkpoint(fixtures / "A-delta-v0/delta-308-may4"), "llava-hf")


def test_unknown_choices(fixtures: Path) -> None:
    source = open_checkpoint(fixtures / SOURCES["A-307"][0])
    tower = open_checkpoint(fixtures / "common/clip-tiny-28px")
    for options in ({"to": "onnx"}, {"projector_form": "tanh"}, {"conv_mode": "llava_v9"}, {"to": "llava", "image_token": "<x>"}):
        with pytest.raises(UsageError):
            convert(source, **{"to": "llava-hf", **options}, tower=tower)


def test_options(fixtures: Path, tmp_path: Path) -> None:
    out = hub(fixtures, "A-307", tmp_path / "out", image_token="<image>", vocab_size=330, dtype="F32", conv_mode="llava_v0")
    config = json.loads((out / "config.json").read_text())
    tensors = tensors_of(out)
    assert (config["image_token_index"], config["vocab_size"], config["torch_dtype"]) == (307, 330, "float32")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert "###Human: <im_start><image><im_end>" in (out / "README.md").read_text()
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert torch.equal(tensors[name][307:], tensors[name][:307].double().mean(0).float().expand(23, 48))
    with pytest.raises(LlavaWeightsError, match="--vocab-size 300"):
        hub(fixtures, "C-bin", tmp_path / "small", vocab_size=300)


def test_the_tower_of_the_checkpoint_wins(fixtures: Path, made: Callable[..., Path]) -> None:
    """D's tower is tuned: every tensor differs from the CLIP that was given."""
    found, original = tensors_of(made("D")), tensors_of(fixtures / SOURCES["D"][0])
    prefix = "model.vision_tower.vision_tower."
    for name in original:
        if name.startswith(prefix):
            assert same_bits(found[f"vision_tower.{name.removeprefix(prefix)}"], original[name])
    assert "the checkpoint itself" in (made("D") / "README.md").read_text()


@pytest.mark.parametrize("family", ["LLaVA-OneVision", "LLaVA v1.5 and v1.6, videos", "ViP-LLaVA"])
@pytest.mark.parametrize("style", STYLES)
def test_key_styles_of_other_classes(tmp_path: Path, family: str, style: str) -> None:
    make_llava(tmp_path, next(row for row in ORIGINALS if row.name == family))
    execute(make_plan(convert(tmp_path / "llava", "llava-hf")), tmp_path / "hf")
    names = list(tensors_of(tmp_path / "hf"))
    shutil.copytree(tmp_path / "hf", tmp_path / "styled")
    renamed = {STYLES[style](key): tensor for key, tensor in load_file(tmp_path / "hf" / "model.safetensors").items()}
    save_file(renamed, tmp_path / "styled" / "model.safetensors", {"format": "pt"})
    assert set(convert(tmp_path / "styled", "llava-hf").tensors) == set(names)
    assert len(names) == len(renamed)


def test_a_tensor_without_a_place_is_refused_by_its_name(tmp_path: Path) -> None:
    """LLaVA-Video-72B's token behind fast frames."""
    make_llava(tmp_path, next(row for row in ORIGINALS if row.name == "LLaVA-Video"))
    tensors = torch.load(tmp_path / "llava" / "pytorch_model.bin", weights_only=True)
    torch.save({**tensors, "model.faster_token": torch.ones(64).half()}, tmp_path / "llava" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model\.faster_token"):
        convert(tmp_path / "llava", "llava-hf")


def test_names_are_total_injective_and_inverse(fixtures: Path, made: Callable[..., Path]) -> None:
    for layout, names in (("llava-hf", tensors_of(made("D"))), ("llava", tensors_of(fixtures / SOURCES["D"][0]))):
        assert [spelled(canonical(name), layout) for name in names] == list(names)
        assert len({canonical(name) for name in names}) == len(names)
    adapted = {"llava-hf adapted", "llava-hf trained"}
    assert set(SPELLINGS) == adapted | {name for row in TARGETS for name in (row.spelling, row.hub_spelling)}
    towers = ("tower.post_layernorm.bias", "video_tower.post_layernorm.bias")
    for layout in ("two-towers", "two-towers-hf"):
        assert [canonical(spelled(name, layout)) for name in towers] == list(towers)
    vip = ("projector.norm.weight", "projector.norm.bias", "projector.0.weight", "projector.2.bias", "text.norm.weight")
    for layout in ("vip-llava", "llava-hf"):
        assert [canonical(spelled(name, layout)) for name in vip] == list(vip)


def test_every_key_is_explicit(made: Callable[..., Path]) -> None:
    """Facts: llava-hf 3.1; what another program would otherwise fill in by its own defaults."""
    config = json.loads((made("D") / "config.json").read_text())
    top = """architectures model_type image_token_index image_seq_length pad_token_id projector_hidden_act multimodal_projector_bias
        vision_feature_layer vision_feature_select_strategy tie_word_embeddings torch_dtype dtype vocab_size image_grid_pinpoints
        ignore_index"""
    text = """model_type architectures hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
        hidden_act rms_norm_eps max_position_embeddings rope_theta rope_scaling attention_bias bos_token_id eos_token_id pad_token_id
        vocab_size torch_dtype"""
    assert set(top.split()) <= config.keys()
    assert set(text.split()) <= config["text_config"].keys()
    assert config["image_grid_pinpoints"] == [[42, 84], [84, 42], [84, 84], [126, 42], [42, 126]]  # (height, width)
    assert config["image_seq_length"] == 9
