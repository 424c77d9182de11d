"""Vision towers: taken from repositories and from inside a LLaVA, against transformers' own models and configs; and refused ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_weights.checkpoint.checkpoint import Checkpoint, Origin, open_checkpoint
from llava_weights.checkpoint.hf_config import select_layer
from llava_weights.checkpoint.tower import VisionTower, complete_config, open_tower, own_tower, tower_hint, tower_shapes
from llava_weights.errors import InputError, MismatchError
from llava_weights.families.targets import TARGET_BY_TYPE
from llava_weights.families.towers import TOWER_BY_KIND, TOWER_BY_TYPE
from llava_weights.storage.reading import Workspace
from llava_weights.tensors.lazy import LazyTensor, read_rows
from llava_weights.transforms.convert import convert

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
CLIP_28, CLIP_42 = FIXTURES / "common/clip-tiny-28px", FIXTURES / "common/clip-tiny-42px"
ORIGINAL, ORIGINAL_NEXT = FIXTURES / "C-v1.5/original-with-vision-safetensors", FIXTURES / "D-v1.6/original-vicuna"
CONVERTED = FIXTURES / "C-v1.5/hf-by-tf4.47.1"
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
TINY = {"hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 42, "patch_size": 14}
TINY_CLIP, TINY_SIGLIP = {"model_type": CLIP, **TINY}, {"model_type": SIGLIP, **TINY}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
LARGE_336 = {"model_type": CLIP, **LARGE, "image_size": 336, "projection_dim": 768}
HUGE = {"model_type": CLIP, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14}
HUGE |= {"num_attention_heads": 16, "projection_dim": 1024, "hidden_act": "gelu"}
# What transformers' converter writes for llava-interleave: one layer fewer than the published 27.
SO400M = {"model_type": SIGLIP, "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16}
SO400M |= {"image_size": 384, "patch_size": 14}


def transformers_model(config: Mapping[str, Any]) -> Any:
    """transformers' own tower of a config, without its weights."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    keys = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        if config["model_type"] == CLIP:
            return CLIPVisionModel(CLIPVisionConfig(**keys))
        return SiglipVisionModel(SiglipVisionConfig(**{**keys, "vision_use_head": False}))


def lazy(config: Mapping[str, Any], prefix: str = "", **dtype: str) -> dict[str, LazyTensor]:
    """The tensors of a tower, without values, under the names of a LLaVA."""
    return {prefix + name: LazyTensor(dtype=dtype.get("dtype", "F16"), shape=shape) for name, shape in tower_shapes(config).items()}


def checkpoint(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(tensors=tensors, config=config, origin=Origin("tiny", Path("nowhere"), "safetensors", ()))


def tower_inside(config: Mapping[str, Any], *, named: str | None = None, reference: VisionTower | None = None) -> VisionTower:
    """The tower found inside an original LLaVA, from the shapes that a tower with this config has."""
    tensors = lazy(config, "model.vision_tower.vision_tower.vision_model.")
    tower = own_tower(tensors, vision_config=None, model=checkpoint(tensors, {"mm_vision_tower": named}), reference=reference)
    assert tower is not None
    return tower


def values(tensors: Mapping[str, LazyTensor]) -> dict[str, np.ndarray]:
    work = Workspace()
    try:
        return {name: read_rows(tensor, 0, tensor.rows, work).reshape(tensor.shape) for name, tensor in tensors.items()}
    finally:
        work.close()


def same(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def edited(source: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a repository whose config.json went through `change`."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    change(config)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


@pytest.mark.parametrize(
    "config",
    [TINY_CLIP, TINY_SIGLIP, LARGE_336, HUGE, SO400M, {"model_type": CLIP}, {"model_type": SIGLIP}, {**TINY_SIGLIP, "num_channels": 4}],
    ids=["tiny", "tiny siglip", "L/14-336", "H/14", "so400m, 26 layers", "CLIP's defaults", "SigLIP's defaults", "4 channels"],
)
def test_expected_tensors_are_those_of_transformers(config: dict[str, Any]) -> None:
    state = transformers_model(config).state_dict()
    assert tower_shapes(config) == {name.removeprefix("vision_model."): tuple(tensor.shape) for name, tensor in state.items()}


def test_large_336_has_the_published_number_of_tensors_and_parameters() -> None:
    shapes = tower_shapes(LARGE_336)
    assert (len(shapes), sum(int(np.prod(shape)) for shape in shapes.values())) == (391, 303_507_456)


def test_defaults_are_those_of_transformers() -> None:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    for expected in (CLIPVisionConfig(), SiglipVisionConfig(vision_use_head=False)):
        found = TOWER_BY_TYPE[expected.model_type].defaults
        assert found == {key: expected.to_dict()[key] for key in found}


@pytest.mark.parametrize(("folder", "patches"), [(CLIP_28, 4), (CLIP_42, 9)])
def test_clip_repository(folder: Path, patches: int) -> None:
    """Once .bin with `position_ids` and a long config of 4.28, once safetensors with a short one of 4.37."""
    import torch
    from transformers import CLIPVisionConfig

    tower = open_tower(open_checkpoint(folder))
    stored: dict[str, Any] = (
        torch.load(folder / "pytorch_model.bin", weights_only=True) if patches == 4 else load_file(folder / "model.safetensors")
    )
    wanted = {name.removeprefix("vision_model."): np.asarray(value) for name, value in stored.items() if name.startswith("vision_model.")}
    wanted.pop("embeddings.position_ids", None)
    assert same(values(tower.tensors), wanted)
    assert list(tower.tensors) == list(tower_shapes(tower.config))
    expected = CLIPVisionConfig.from_pretrained(folder).to_dict()
    assert tower.config == {key: expected[key] for key in ("model_type", *TOWER_BY_TYPE[CLIP].defaults)}
    assert (tower.kind, tower.class_token, tower.patches, tower.hidden, tower.patch_size) == ("clip", True, patches, 24, 14)
    assert tower.image_size == (28 if patches == 4 else 42)
    assert tower.preprocessor == json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert tower.origin is not None
    assert tower.origin.name == folder.name
    assert tower.notes == ()


def test_siglip_repository_loses_its_head(tmp_path: Path) -> None:
    import torch
    from transformers import SiglipConfig, SiglipModel

    text = {"hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": 8}
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    model = SiglipModel(SiglipConfig(vision_config=TINY, text_config=text))
    model.save_pretrained(tmp_path)
    tower = open_tower(open_checkpoint(tmp_path))
    assert (tower.kind, tower.class_token, tower.patches, tower.preprocessor) == ("siglip", False, 9, None)
    assert tower.config == {"model_type": SIGLIP, **TOWER_BY_TYPE[SIGLIP].defaults, **TINY, "vision_use_head": False}
    assert len(tower.notes) == 1
    assert "head" in tower.notes[0]
    stored = {name.removeprefix("vision_model."): tensor.numpy() for name, tensor in model.vision_model.state_dict().items()}
    assert same(values(tower.tensors), {name: value for name, value in stored.items() if not name.startswith("head.")})
    weights = {name: torch.from_numpy(value) for name, value in values(tower.tensors).items()}
    bare = transformers_model(tower.config)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in bare.state_dict()) else ""
    bare.load_state_dict({prefix + name: value for name, value in weights.items()}, strict=True, assign=True)


@pytest.mark.parametrize("prefix", ["vision_model.", ""], ids=["with prefix", "as transformers 5.6 saves it"])
def test_vision_model_alone(tmp_path: Path, prefix: str) -> None:
    """CLIPVisionModel: the config is the vision config itself, the names may lack their prefix."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["CLIPVisionModel"], **TINY_CLIP}), encoding="utf-8")
    save_file(
        {prefix + name: np.zeros(shape, "float16") for name, shape in tower_shapes(TINY_CLIP).items()}, tmp_path / "model.safetensors"
    )
    tower = open_tower(open_checkpoint(tmp_path))
    assert tower.config == complete_config(TINY_CLIP)
    assert set(tower.tensors) == set(tower_shapes(TINY_CLIP))


@pytest.mark.parametrize("key", ["vision_config", "vision_config_dict"])
def test_vision_half_of_an_old_config(key: str) -> None:
    """Early repositories write what differs only, no `model_type` inside, once under another name."""
    shapes = {f"vision_model.{name}": tensor for name, tensor in lazy({**LARGE_336, "image_size": 224}).items()}
    tower = open_tower(checkpoint(shapes, {"model_type": "clip", "vision_config": None, key: {**LARGE, "architectures": None}}))
    assert tower.config == complete_config({**LARGE, "projection_dim": 512, "image_size": 224})


def test_own_tower_is_the_converters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Original layout: sizes from the shapes, heads from the folder that `mm_vision_tower` names."""
    monkeypatch.chdir(FIXTURES)
    model = open_checkpoint(ORIGINAL)
    tower = own_tower(model.tensors, vision_config=None, model=model)
    assert tower is not None
    assert tower.origin is None
    assert tower.preprocessor is None
    expected = load_file(CONVERTED / "model.safetensors")
    prefix = "vision_tower.vision_model."
    assert same(values(tower.tensors), {k.removeprefix(prefix): v.astype("float32") for k, v in expected.items() if k.startswith(prefix)})
    assert tower.config == open_tower(open_checkpoint(CLIP_42)).config
    assert tower.notes == ("vision tower: the checkpoint's own, 39 tensors", "vision_config: from `common/clip-tiny-42px`")


def test_tuned_tower_is_the_checkpoints_own() -> None:
    """D's tower differs from the CLIP that it was trained from: the config may be borrowed, tensors never."""
    model, stock = open_checkpoint(ORIGINAL_NEXT), open_tower(open_checkpoint(CLIP_42))
    tower = own_tower(model.tensors, vision_config=None, model=model, reference=stock)
    assert tower is not None
    assert tower.config == stock.config
    assert tower.preprocessor == stock.preprocessor
    found, expected = values(tower.tensors), values(stock.tensors)
    assert not any(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "prefix",
    [
        "model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model.", "model.vision_tower.vision_model.",
        "model.vision_tower.", "vision_tower.",
    ],
)  # fmt: skip
def test_every_key_style_gives_the_same_tower(prefix: str) -> None:
    model = open_checkpoint(CONVERTED)
    renamed = {name.replace("vision_tower.vision_model.", prefix): tensor for name, tensor in model.tensors.items()}
    renamed[f"{prefix}embeddings.position_ids"] = LazyTensor(dtype="I64", shape=(1, 10))
    tower = own_tower(renamed, vision_config=model.config["vision_config"], model=model)
    plain = own_tower(model.tensors, vision_config=model.config["vision_config"], model=model)
    assert tower is not None
    assert tower == plain
    assert tower.config == complete_config({**TINY, "projection_dim": 16})
    assert tower.preprocessor == json.loads((CONVERTED / "preprocessor_config.json").read_text(encoding="utf-8"))


def test_no_tower_inside() -> None:
    model = open_checkpoint(FIXTURES / "B-lora/base-vicuna-tiny")
    assert own_tower(model.tensors, vision_config=None, model=model) is None


def test_own_siglip_loses_its_head() -> None:
    tensors = lazy(TINY_SIGLIP, "vision_tower.vision_model.")
    tensors["vision_tower.vision_model.head.probe"] = LazyTensor(dtype="F16", shape=(1, 1, 24))
    tower = own_tower(tensors, vision_config=TINY_SIGLIP, model=None)
    assert tower is not None
    assert tower.tensors.keys() == tower_shapes(TINY_SIGLIP).keys()
    assert "head" in tower.notes[-1]
    assert tower.config["vision_use_head"] is False


@pytest.mark.parametrize(
    ("config", "named", "note"),
    [
        (LARGE_336, "openai/clip-vit-large-patch14-336", "16 heads and quick_gelu as in openai/clip-vit-large-patch14"),
        ({**LARGE_336, "image_size": 224}, None, "16 heads and quick_gelu"),
        ({**LARGE_336, "hidden_act": "gelu"}, "laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "16 heads and gelu as in laion/"),
        (HUGE, None, "16 heads and gelu as in laion/CLIP-ViT-H-14"),
        ({**LARGE_336, "num_hidden_layers": 12}, "author/tuned", "16 heads"),
        (SO400M, "google/siglip-so400m-patch14-384", "16 heads and gelu_pytorch_tanh as in google/siglip-so400m-patch14-384"),
        ({**SO400M, "image_size": 224}, None, "16 heads"),
        ({"model_type": CLIP}, None, "12 heads and quick_gelu as in openai/clip-vit-base-patch32"),
        ({"model_type": SIGLIP, "image_size": 512}, None, "12 heads"),
        ({"model_type": CLIP, "hidden_size": 640, "num_attention_heads": 10}, None, "10 heads, guessed"),
    ],
)
def test_config_from_shapes(config: dict[str, Any], named: str | None, note: str) -> None:
    """What no tensor tells comes from the published tower with these widths, else from 64 channels per head."""
    tower = tower_inside(config, named=named)
    assert tower.config == complete_config(config)
    assert note in tower.notes[1]


@pytest.mark.parametrize("named", [None, "openai/clip", "no/such/folder", "\0", "\ud800", "x" * 5000, "/dev/null"])
def test_unknown_heads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None) -> None:
    """Also where a config.json lies in the working directory itself."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_CLIP), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="how many attention heads") as caught:
        tower_inside(TINY_CLIP, named=named)
    assert "--vision-tower" in str(caught.value.hint)


def test_small_towers_are_not_guessed() -> None:
    """A toy of 128 has any number of heads, two of 64 least of all."""
    with pytest.raises(InputError, match="how many attention heads"):
        tower_inside({**TINY_CLIP, "hidden_size": 128, "num_attention_heads": 4})


def test_heads_from_a_reference_with_more_layers() -> None:
    """lmms-lab dropped SigLIP's last layer before saving."""
    whole = complete_config({**TINY_SIGLIP, "num_hidden_layers": 3})
    reference = VisionTower(lazy(whole), whole, {"size": 42}, Origin("whole", Path("nowhere"), "safetensors", ()), ())
    tower = tower_inside(TINY_SIGLIP, named="no/such", reference=reference)
    assert tower.config == complete_config(TINY_SIGLIP)
    assert tower.preprocessor == {"size": 42}
    assert "from `whole`, of whose 3 layers the checkpoint has the first 2" in tower.notes[1]


@pytest.mark.parametrize(
    "other",
    [{"num_hidden_layers": 1}, {"image_size": 28}, {"hidden_size": 48}, {"intermediate_size": 64}, {"model_type": SIGLIP}],
    ids=str,
)
def test_reference_of_another_tower_is_refused(other: dict[str, Any]) -> None:
    config = complete_config({**TINY_CLIP, **other})
    with pytest.raises(MismatchError, match=f"(?s)`{next(iter(other))}`.*the given tower.*`(embeddings|encoder)"):
        tower_inside(TINY_CLIP, reference=VisionTower(lazy(config), config, None, None, ()))


def test_named_folder_of_another_tower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)
    with pytest.raises(MismatchError, match="`image_size` is 28 in `common/clip-tiny-28px`"):
        tower_inside(TINY_CLIP, named="common/clip-tiny-28px")
    with pytest.raises(InputError, match=r"no config\.json of a CLIP or SigLIP"):
        tower_inside(TINY_CLIP, named="B-lora/base-vicuna-tiny")


@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [
        ("hidden_size", 48, "embeddings.patch_embedding.weight"),
        ("num_channels", 1, "embeddings.patch_embedding.weight"),
        ("patch_size", 7, "embeddings.patch_embedding.weight"),
        ("intermediate_size", 64, "encoder.layers.0.mlp.fc1.weight"),
        ("num_hidden_layers", 3, "encoder.layers.1"),
        ("image_size", 28, "embeddings.position_embedding.weight"),
        ("model_type", SIGLIP, "embeddings.class_embedding"),
    ],
)
def test_config_that_contradicts_the_tensors(tmp_path: Path, key: str, value: Any, tensor: str) -> None:
    def change(config: dict[str, Any]) -> None:
        config["vision_config"][key] = value

    with pytest.raises(InputError, match=f"(?s)`{key}` is .*{value}.* in the config.json of `copy`.*`{tensor}`"):
        open_tower(open_checkpoint(edited(CLIP_42, tmp_path / "copy", change)))
    tensors = lazy(TINY_CLIP, "vision_tower.vision_model.")
    with pytest.raises(InputError, match=f"(?s)`{key}` is .* in the `vision_config`.*`{tensor}`"):
        own_tower(tensors, vision_config={**TINY_CLIP, key: value}, model=None)


@pytest.mark.parametrize("config", [TINY_CLIP, TINY_SIGLIP], ids=["clip", "siglip"])
def test_every_missing_or_reshaped_tensor_is_named(config: dict[str, Any]) -> None:
    """`post_layernorm` among them, which no LLaVA uses but transformers misses."""
    whole = lazy(config)
    for name, tensor in whole.items():
        lacking = {f"vision_tower.{other}": value for other, value in whole.items() if other != name}
        with pytest.raises(InputError, match=f"lacks `{name}`|`model_type` is") as caught:
            own_tower(lacking, vision_config=config, model=None)
        assert name in caught.value.what
        wrong = {**lacking, f"vision_tower.{name}": replace(tensor, shape=(*tensor.shape, 2))}
        with pytest.raises(InputError, match=f"`{name}` of `the checkpoint` has shape"):
            own_tower(wrong, vision_config=config, model=None)


def test_a_layer_is_missing() -> None:
    def without(layer: int, count: int) -> dict[str, LazyTensor]:
        tensors = lazy({**TINY_CLIP, "num_hidden_layers": count}, "vision_model.")
        return {name: tensor for name, tensor in tensors.items() if f".{layer}." not in name}

    config = {"model_type": "clip", "vision_config": {**TINY, "num_hidden_layers": 3}}
    with pytest.raises(InputError, match=r"`num_hidden_layers` is 3 .* but 2 by `encoder.layers.1`"):
        open_tower(checkpoint(without(2, 3), config))
    with pytest.raises(InputError, match=r"lacks `encoder.layers.1.self_attn.k_proj.weight`.* and 11 more"):
        open_tower(checkpoint(without(1, 3), config))
    with pytest.raises(InputError, match=r"lacks `encoder.layers.0.mlp.fc1.weight`"):
        open_tower(checkpoint(without(0, 3), config))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("vision_model.adapter.weight", LazyTensor(dtype="F16", shape=(2,)), "no rule knows: `adapter.weight`"),
        ("classifier.weight", LazyTensor(dtype="F16", shape=(2,)), "no rule knows: `classifier.weight`"),
        ("vision_model.encoder.layers.5000.x", LazyTensor(dtype="F16", shape=(2,)), "5,001 layers"),
        ("vision_model.embeddings.position_embedding.weight", LazyTensor(dtype="F16", shape=(9, 24)), "no square"),
        ("vision_model.embeddings.patch_embedding.weight", LazyTensor(dtype="F16", shape=(24, 588)), "expected 4 axes"),
        ("vision_model.post_layernorm.bias", LazyTensor(dtype="I8", shape=(24,)), "stored as I8"),
    ],
)
def test_odd_tensors_are_refused(name: str, tensor: LazyTensor, message: str) -> None:
    tensors = {**lazy(TINY_CLIP, "vision_model."), name: tensor}
    with pytest.raises(InputError, match=message):
        open_tower(checkpoint(tensors, TINY_CLIP))


def test_one_tower_under_two_names_is_refused() -> None:
    tensors = lazy(TINY_CLIP, "vision_tower.") | lazy(TINY_CLIP, "vision_tower.vision_model.")
    with pytest.raises(InputError, match="twice"):
        own_tower(tensors, vision_config=TINY_CLIP, model=None)
    with pytest.raises(InputError, match="twice"):
        open_tower(checkpoint(lazy(TINY_CLIP) | lazy(TINY_CLIP, "vision_model."), TINY_CLIP))


def test_text_models_are_no_towers() -> None:
    with pytest.raises(InputError, match="`base-vicuna-tiny` is no vision tower") as caught:
        open_tower(open_checkpoint(FIXTURES / "B-lora/base-vicuna-tiny"))
    assert caught.value.facts["layout"] == "llama"
    assert "the model was trained with" in str(caught.value.hint)
    text = {"text_model.encoder.layers.0.mlp.fc1.weight": LazyTensor(dtype="F16", shape=(2, 2))}
    with pytest.raises(InputError, match="no vision tower"):
        open_tower(checkpoint(text, {"model_type": "clip_text_model"}))


@pytest.mark.parametrize("config", [{}, {"model_type": "siglip2"}, {"model_type": ["clip"]}, {"model_type": "clip", "vision_config": [1]}])
def test_config_of_something_else_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        open_tower(checkpoint(lazy(TINY_CLIP, "vision_model."), config))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 0}, {"hidden_size": "24"}, {"hidden_size": True}, {"hidden_size": 10**9}, {"num_hidden_layers": 5000},
        {"num_attention_heads": 5}, {"hidden_act": "os.system"}, {"hidden_act": []}, {"layer_norm_eps": -1}, {"layer_norm_eps": "small"},
        {"image_size": [42, 42]}, {"image_size": 13}, {"model_type": "pixtral"}, {"model_type": {}},
    ],
    ids=str,
)  # fmt: skip
def test_absurd_configs_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(change))}`.* in the vision config"):
        tower_shapes({**TINY_CLIP, **change})


def test_only_known_keys_come_along() -> None:
    hostile = {**TINY_CLIP, "auto_map": {"AutoModel": "x.Y"}, "architectures": ["X"], "vocab_size": 32000, "attention_dropout": 0}
    assert complete_config(hostile) == complete_config(TINY_CLIP)
    assert complete_config({**TINY_SIGLIP, "vision_use_head": True})["vision_use_head"] is False


# --- the tower that a config names ------------------------------------------------------------------------------------

LARGE_224 = {**LARGE_336, "image_size": 224}
OPENAI, OPENAI_336, LAION = "openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14-336", "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"
BLIND = FIXTURES / "C-v1.5/original-no-vision-bin"


def clip(config: Mapping[str, Any], name: str) -> Checkpoint:
    return Checkpoint(lazy(config, "vision_model."), config, Origin(name, Path("nowhere"), "safetensors", ()))


def blind(width: int = 1024, **config: Any) -> Checkpoint:
    """A tiny LLaVA without a tower, whose projector takes features of this width."""
    opened = open_checkpoint(BLIND)
    wide = opened.tensors["model.norm.weight"].rows
    tensors = {**opened.tensors, "model.mm_projector.0.weight": LazyTensor(dtype="F16", shape=(wide, width))}
    return replace(opened, tensors=tensors, config={**opened.config, "mm_hidden_size": width, **config})


def converted(model: Checkpoint, tower: Checkpoint, **options: Any) -> tuple[tuple[str, ...], tuple[str, ...], Any]:
    """The notes and the warnings about the tower, and the name that the output gives it."""
    made = convert(model, "llava-hf", tower=tower, **options)
    notes, warnings = (tuple(text for text in texts if "tower" in text) for texts in (made.history[-1].notes, made.history[-1].warnings))
    return notes, warnings, made.config["vision_config"].get("_name_or_path")


@pytest.mark.parametrize(
    ("named", "given", "real"),
    [
        (OPENAI, LARGE_336, OPENAI_336),
        (OPENAI_336, LARGE_224, OPENAI),
        (OPENAI_336.upper() + "/", LARGE_224, OPENAI),
        (OPENAI, {**LARGE_224, "hidden_act": "gelu"}, LAION),
        (LAION, LARGE_224, OPENAI),
    ],
    ids=["336 for 224", "224 for 336", "spelled otherwise", "LAION's for OpenAI's", "OpenAI's for LAION's"],
)
def test_a_published_tower_that_is_not_the_named_one_is_refused(named: str, given: dict[str, Any], real: str) -> None:
    """Whatever the folder is called: shapes and config decide."""
    model, tower = blind(mm_vision_tower=named), clip(given, named.rpartition("/")[2])
    with pytest.raises(MismatchError, match="is not the vision tower that the model was trained with") as caught:
        convert(model, "llava-hf", tower=tower)
    said, right = f"{caught.value}", f"`--vision-tower {named.rstrip('/')}`"
    assert all(words in said for words in (named, real, "224 pixels", "24 layers of 1024", "--accept-tower"))
    assert right.lower() in said.lower()
    notes, warnings, name = converted(model, tower, accept_tower=True)
    assert (len(warnings), notes, name) == (1, (), real)


@pytest.mark.parametrize(("named", "given"), [(OPENAI, LARGE_224), (OPENAI_336, LARGE_336), (None, LARGE_336)])
def test_the_named_tower_is_taken_without_a_word(named: str | None, given: dict[str, Any]) -> None:
    folder = named.rpartition("/")[2] if named else "clip"
    assert converted(blind(mm_vision_tower=named), clip(given, folder)) == ((), (), named)


@pytest.mark.parametrize(
    ("model", "given", "notes", "warnings"),
    [
        (blind(mm_vision_tower="/data/clip-of-mine"), LARGE_336, 1, 0),  # nobody knows what that was
        (blind(mm_vision_tower="someone/clip-large"), LARGE_336, 1, 0),
        (blind(mm_vision_tower="/data/clip-vit-large-patch14"), LARGE_336, 1, 0),  # a folder's name proves nothing
        (blind(mm_vision_tower=OPENAI_336), {**LARGE_336, "image_size": 448}, 0, 1),
        (blind(mm_vision_tower=OPENAI_336), {**LARGE_336, "num_hidden_layers": 23}, 0, 1),
        (blind(mm_vision_tower=OPENAI_336, unfreeze_mm_vision_tower=True), LARGE_336, 0, 1),
        (blind(24, mm_vision_tower=OPENAI_336), TINY_CLIP, 1, 0),  # the projector tells that the name is not its tower's
        (blind(24, mm_vision_tower=str(CLIP_28)), TINY_CLIP, 0, 1),  # other images than the folder that is named
    ],
    ids=["a path", "a repository", "a path with a known name", "other images", "fewer layers", "trained", "tiny", "a folder that is there"],
)
def test_what_is_not_known_is_a_warning_where_a_fact_differs_and_else_a_note(
    model: Checkpoint, given: dict[str, Any], notes: int, warnings: int
) -> None:
    said = converted(model, clip(given, "given"))
    assert (len(said[0]), len(said[1])) == (notes, warnings), said


def test_a_tower_inside_is_not_doubted_but_a_name_given_for_it_is() -> None:
    """`--to llava --vision-tower NAME` names the tower that is inside."""
    inside = blind(mm_vision_tower=OPENAI)
    inside = replace(inside, tensors={**inside.tensors, **lazy(LARGE_336, "model.vision_tower.vision_tower.vision_model.")})
    assert convert(inside, "llava-hf").history[-1].warnings == ()
    assert convert(inside, "llava", tower_name=OPENAI_336).config["mm_vision_tower"] == OPENAI_336
    with pytest.raises(MismatchError, match=f"it is {OPENAI_336}, named is `{OPENAI}`"):
        convert(inside, "llava", tower_name=OPENAI)
    assert len(convert(inside, "llava", tower_name=OPENAI, accept_tower=True).history[-1].warnings) == 1


def test_another_tower_can_not_take_the_place_of_the_one_inside_of_a_llava_hf() -> None:
    """One with the same config gets a note that it is not used, any other is refused."""
    for to in ("llava-hf", "llava"):
        with pytest.raises(MismatchError, match="holds its own vision tower"):
            convert(CONVERTED, to, tower=CLIP_28)
        kept = convert(CONVERTED, to, tower=CLIP_42)
        assert "the vision tower inside is kept" in " ".join(kept.history[-1].notes)
        assert kept.tensors.keys() == convert(CONVERTED, to).tensors.keys()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """`llava`, which names OpenAI's CLIP at 224 pixels, and `clip`, which has the shapes of the one at 336 and no values."""
    model = blind(mm_vision_tower=OPENAI)
    weights = values({name: tensor for name, tensor in model.tensors.items() if name != "model.mm_projector.0.weight"})
    weights["model.mm_projector.0.weight"] = np.zeros(model.tensors["model.mm_projector.0.weight"].shape, np.float16)
    shutil.copytree(BLIND, tmp_path / "llava", ignore=shutil.ignore_patterns("*.bin", "*.index.json"))
    save_file(weights, tmp_path / "llava/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "llava/config.json").write_text(json.dumps(dict(model.config)))
    (tmp_path / "clip").mkdir()
    header, end = {}, 0
    for name, tensor in lazy(LARGE_336, "vision_model.").items():
        header[name] = {"dtype": "F16", "shape": tensor.shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    with open(tmp_path / "clip/model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "clip/config.json").write_text(json.dumps(LARGE_336))
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        "convert llava -o out",
        "smoke llava --original llava",
        "smoke llava --record new.safetensors",
        "smoke llava --image {image} --prompt a",
        f"verify {CONVERTED} --base llava",
    ],
)
def test_every_command_refuses_the_wrong_tower_and_its_hint_names_the_right_one(
    cli: Callable[..., Any], published: Path, words: str
) -> None:
    """Also where the model is compared with itself, with the same wrong tower on both sides."""
    image = next((FIXTURES / "common/images").glob("*.png"))
    code, out, err = cli(*words.format(image=image).split(), "--vision-tower", "clip", cwd=published)
    assert code == 3, out + err
    assert all(text in err for text in (OPENAI_336, f"`--vision-tower {OPENAI}`", "--accept-tower"))
    assert sorted(path.name for path in published.iterdir()) == ["clip", "llava"]


@pytest.mark.parametrize("words", ["convert llava -o out", "smoke llava --image {image} --prompt a"])
def test_the_hint_names_the_tower_of_the_config(cli: Callable[..., Any], published: Path, words: str) -> None:
    image = next((FIXTURES / "common/images").glob("*.png"))
    code, _, err = cli(*words.format(image=image).split(), cwd=published)
    assert code == 3
    assert OPENAI in err
    assert "336" not in err


@pytest.mark.parametrize(("stored", "layer"), [(27, -2), (26, -1)])
def test_the_layer_of_a_siglip_is_counted_from_the_published_one(stored: int, layer: int) -> None:
    """LLaVA-NeXT's code stores 26 of so400m's 27 and takes the last, Bunny's and nanoLLaVA's keep 27 and take the last but one."""
    row = TOWER_BY_KIND["siglip"]
    config = {**row.defaults, "model_type": row.model_type, "num_hidden_layers": stored}
    tower = VisionTower({}, config, None, None, (), whole_layers=27)
    assert select_layer({"mm_vision_select_layer": -2}, tower, TARGET_BY_TYPE["llava"]) == layer
    assert select_layer({"vision_feature_layer": -3}, tower, TARGET_BY_TYPE["llava"]) == -3
    with pytest.raises(InputError):
        select_layer({}, replace(tower, config={**config, "num_hidden_layers": 25}), TARGET_BY_TYPE["llava"])


VIP_TOWER = "clip_4layers_336"  # what ViP-LLaVA's configs call OpenAI's at 336 pixels, of which it takes five layers


def test_a_name_that_only_the_original_code_knows_stands_for_its_repository(cli: Callable[..., Any], tmp_path: Path) -> None:
    assert OPENAI_336 in tower_hint({"mm_vision_tower": VIP_TOWER})
    with pytest.raises(MismatchError) as caught:
        convert(blind(5 * 1024, mm_vision_tower=VIP_TOWER), "llava-hf", tower=clip(LARGE_224, "clip"))
    assert all(words in f"{caught.value}" for words in (VIP_TOWER, OPENAI, f"`--vision-tower {OPENAI_336}`"))
    shutil.copytree(BLIND, tmp_path / "vip")
    config = json.loads((BLIND / "config.json").read_text()) | {"mm_vision_tower": VIP_TOWER}
    (tmp_path / "vip/config.json").write_text(json.dumps(config))
    assert f"--vision-tower {OPENAI_336}" in cli("inspect", "vip", cwd=tmp_path)[1]


def test_a_tower_with_too_few_layers_for_its_model_is_refused() -> None:
    row = TOWER_BY_KIND["clip"]
    tower = VisionTower({}, {**row.defaults, "num_hidden_layers": 3}, None, None, ())
    with pytest.raises(InputError, match="has 3 layers") as caught:
        select_layer({}, tower, TARGET_BY_TYPE["vipllava"])
    assert all(text in caught.value.what for text in ("vipllava", "-11"))
    assert select_layer({}, replace(tower, config={**tower.config, "num_hidden_layers": 10}), TARGET_BY_TYPE["vipllava"])[-1] == 6
