"""What people who do this job have reported of such tools, and siblings: another key style, dtype, family or spelling, in shards."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transforms.test_silent_errors import tensors_of

import llava_weights as lw
from llava_weights.cli.toy import make_llava
from llava_weights.errors import InputError
from llava_weights.families.decoders import DECODERS
from llava_weights.families.originals import ORIGINALS

Tensors = dict[str, torch.Tensor]
ROWS = {row.name: row for row in ORIGINALS}
V15, QWEN, TILES = "LLaVA v1.5 and v1.6", "LLaVA on Qwen", "LLaVA on another decoder, images in tiles"
MM = r"model\.(mm_projector|vision_tower|image_newline).*"
EOS, START = 256, 257  # of the toys' byte-level tokenizer


def read(folder: Path, name: str = "config.json") -> Any:
    return json.loads((folder / name).read_text())


def configured(folder: Path, file: str = "config.json", **keys: Any) -> Path:
    (folder / file).write_text(json.dumps({**(read(folder, file) if (folder / file).exists() else {}), **keys}))
    return folder


def put(folder: Path, tensors: Tensors) -> Path:
    """The folder with these weights, in one file, and no records of others."""
    gone = ("*.safetensors", "pytorch_model*", "*.index.json", "SHA256SUMS", "*.manifest.json")
    for path in [path for pattern in gone for path in folder.glob(pattern)]:
        path.unlink()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def written(checkpoint: lw.Checkpoint, out: Path) -> Path:
    lw.execute(lw.make_plan(checkpoint), out)
    return out


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def failed(folder: Path) -> list[str]:
    return [each.text for each in lw.verify(folder).findings if each.verdict == "failed"]


def toy(folder: Path, name: str = V15, *, decoder: str = "", tower: str = "") -> Path:
    """A toy of this row in the original layout, its tower inside."""
    make_llava(folder, ROWS[name], decoder=decoder, tower=tower)
    return put(folder / "llava", tensors_of(folder / "llava"))


def hub(folder: Path, name: str = V15, **how: str) -> Path:
    """The same in the llava-hf layout, without records."""
    source = toy(folder, name, **how)
    out = written(lw.convert(source, "llava-hf"), folder / "hub")
    return put(out, tensors_of(out))


def of_452(name: str) -> str:
    """A name of the Hub's style as transformers 4.52 saves it."""
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    return re.sub(r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1", name)


def of_523(name: str) -> str:
    """As 5.23 saves it."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


STYLES: dict[str, Callable[[str], str]] = {"hub": lambda name: name, "4.52": of_452, "5.23": of_523}


def styled(folder: Path, style: str) -> Path:
    return put(folder, {STYLES[style](name): tensor for name, tensor in tensors_of(folder).items()})


# --- ids of a text model without tokenizer.model, and lists of them ---------------------------------------------------


def qwen_base(folder: Path, dtype: torch.dtype = torch.float16) -> tuple[Path, Path]:
    """(A Qwen whose generation config lists two ends, an adapter of LLaVA's training for it.)"""
    source = toy(folder, QWEN)
    tensors, config = tensors_of(source), read(source)
    base, lora = folder / "base", folder / "lora"
    shutil.copytree(source, base)
    put(base, {name: tensor.to(dtype) for name, tensor in tensors.items() if not re.fullmatch(MM, name)})
    text = {key: value for key, value in config.items() if not key.startswith(("mm_", "image_", "use_mm", "tune_", "freeze", "unfreeze"))}
    ids = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS}
    (base / "config.json").write_text(json.dumps({**text, **ids, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    configured(base, "generation_config.json", **{**ids, "eos_token_id": [EOS, START]})
    lora.mkdir()
    (lora / "config.json").write_text(json.dumps({**config, **ids}))
    modules = [f"model.layers.{number}.self_attn.q_proj" for number in range(2)]
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 64, generator=generator), torch.randn(64, 2, generator=generator)
    prefix = "base_model.model."
    factors = {f"{prefix}{name}.lora_{which}.weight": x.clone() for name in modules for which, x in (("A", a), ("B", b))}
    save_file(factors, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}))
    projector = {f"{prefix}{name}": x for name, x in tensors.items() if "mm_projector" in name}
    torch.save(projector, lora / "non_lora_trainables.bin")
    return base, lora


@pytest.mark.parametrize(("dtype", "shards"), [(torch.float16, False), (torch.bfloat16, False), (torch.float16, True)])
def test_a_merge_keeps_the_ids_of_a_base_without_tokenizer_model(tmp_path: Path, dtype: torch.dtype, shards: bool) -> None:
    base, lora = qwen_base(tmp_path, dtype)
    if shards:
        lw.execute(lw.make_plan(lw.open_checkpoint(base), max_shard_size=40_000), tmp_path / "sharded")
        base = tmp_path / "sharded"
        assert len(list(base.glob("*.safetensors"))) > 2
    merged = written(lw.merge_lora(base, lora), tmp_path / "merged")
    assert read(merged)["eos_token_id"] == EOS
    assert read(merged, "generation_config.json")["eos_token_id"] == [EOS, START]
    assert failed(merged) == []
    there = written(lw.convert(merged, "llava-hf", tower=tmp_path / "tower"), tmp_path / "hf")
    assert EOS in read(there, "generation_config.json")["eos_token_id"]
    assert START in read(there, "generation_config.json")["eos_token_id"]
    one_pass = lw.convert(lw.merge_lora(base, lora), "llava-hf", tower=tmp_path / "tower")
    assert same(tensors_of(written(one_pass, tmp_path / "straight")), tensors_of(there))


def test_a_projector_alone_and_an_adapter_alone_keep_them_too(tmp_path: Path) -> None:
    base, lora = qwen_base(tmp_path)
    projector = (lora / "non_lora_trainables.bin").rename(tmp_path / "mm_projector.bin")
    (lora / "config.json").unlink()
    for number, adapter in enumerate((lora, projector)):
        merged = written(lw.merge_lora(base, adapter), tmp_path / f"merged-{number}")
        assert read(merged, "generation_config.json")["eos_token_id"] == [EOS, START]
        assert read(merged)["eos_token_id"] == EOS


@pytest.mark.parametrize("name", [V15, QWEN])
@pytest.mark.parametrize("style", STYLES)
def test_a_list_of_ends_stays_in_every_direction(tmp_path: Path, name: str, style: str) -> None:
    source = toy(tmp_path, name)
    end = EOS if name == QWEN else 2
    configured(source, "generation_config.json", bos_token_id=1, eos_token_id=[end, 7], pad_token_id=0)
    there = written(lw.convert(source, "llava-hf"), tmp_path / "hf")
    assert {end, 7} <= set(read(there, "generation_config.json")["eos_token_id"])
    again = written(lw.convert(styled(there, style), "llava-hf"), tmp_path / "again")
    back = written(lw.convert(there, "llava"), tmp_path / "back")
    for out in (again, back):
        assert {end, 7} <= set(read(out, "generation_config.json")["eos_token_id"])


# --- several layers of the tower --------------------------------------------------------------------------------------


def several(folder: Path, layers: list[int]) -> Path:
    """A llava-hf folder whose projector reads several layers of its tower."""
    tensors = tensors_of(folder)
    name = next(name for name in tensors if name.endswith("multi_modal_projector.linear_1.weight"))
    tensors[name] = torch.cat([tensors[name] * (1 + place / 4) for place in range(len(layers))], 1)
    return configured(put(folder, tensors), vision_feature_layer=layers)


def logits(folder: Path) -> torch.Tensor:
    """Of a text with an image, by the class of transformers itself."""
    config = read(folder)
    kind = getattr(transformers, config["architectures"][0])
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    tiles, image = config["model_type"] != "llava", config["image_token_index"]
    pixels = torch.randn(1, 3, 3, 28, 28, generator=generator) if tiles else torch.randn(1, 3, 28, 28, generator=generator)
    more = {"image_sizes": torch.tensor([[28, 56]])} if tiles else {}
    count = 4 + 12 - 2 if tiles else config["image_seq_length"]
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[1, 5, *[image] * count, 7, 8]]), pixel_values=pixels, **more).logits


@pytest.mark.parametrize(
    ("name", "how", "style"),
    [
        (TILES, {"decoder": "granite"}, "5.23"),
        (TILES, {"decoder": "qwen3"}, "hub"),
        (V15, {"tower": "siglip"}, "4.52"),
        (V15, {"tower": "clip"}, "5.23"),
    ],
)
def test_a_list_of_feature_layers_is_renamed_verified_and_run(tmp_path: Path, name: str, how: dict[str, str], style: str) -> None:
    source = several(hub(tmp_path, name, **how), [-2, 1, -1])
    before = logits(source)
    plain = tensors_of(source)
    made = lw.convert(styled(source, style), "llava-hf")
    out = written(made, tmp_path / "out")
    assert same(tensors_of(out), plain)
    assert read(out)["vision_feature_layer"] == [-2, 1, -1]
    assert read(out) == {**read(source), **{key: value for key, value in read(out).items() if key not in read(source)}}
    assert failed(out) == []
    assert torch.equal(logits(out), before)
    lw.record(out, tmp_path / "recording.safetensors")
    assert lw.smoke_test(source, reference=tmp_path / "recording.safetensors").exit_code == 0
    with pytest.raises(InputError, match="the original layout can't hold this model"):
        lw.convert(out, "llava")
    fewer = configured(source, vision_feature_layer=[-2, -1])
    with pytest.raises(InputError, match="the projector is not one"):
        lw.convert(fewer, "llava-hf")


def test_a_list_of_one_layer_has_a_way_back(tmp_path: Path) -> None:
    source = configured(hub(tmp_path), vision_feature_layer=[-2])
    assert lw.convert(source, "llava-hf").config["vision_feature_layer"] == [-2]
    back = lw.convert(source, "llava")
    assert back.config["mm_vision_select_layer"] == -2
    assert not any("vision_feature_layer" in text for text in back.history[-1].warnings)


# --- a llava-hf checkpoint stays itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-1, -2, 2, -3])
@pytest.mark.parametrize(
    ("name", "how"), [(V15, {"tower": "siglip"}), (V15, {"tower": "clip"}), ("LLaVA v1.5 and v1.6, SigLIP, images in tiles", {})]
)
def test_the_layer_and_the_class_of_a_llava_hf_checkpoint_stay(tmp_path: Path, name: str, how: dict[str, str], layer: int) -> None:
    source = configured(hub(tmp_path, name, **how), vision_feature_layer=layer)
    kept = {
        key: read(source).get(key)
        for key in ("model_type", "vision_feature_layer", "vision_feature_select_strategy", "image_grid_pinpoints")
    }
    plain = tensors_of(source)
    for style in STYLES:
        made = lw.convert(styled(source, style), "llava-hf")
        out = written(made, tmp_path / f"out-{style}")
        assert {key: read(out).get(key) for key in kept} == kept
        assert same(tensors_of(out), plain)
        assert not any("swapped" in text for text in made.history[-1].notes)
        put(source, plain)


@pytest.mark.parametrize("row", DECODERS, ids=lambda row: row.model_type)
def test_what_a_text_config_leaves_out_is_what_its_class_takes(tmp_path: Path, row: Any) -> None:
    source = hub(tmp_path, "xtuner's folders, on another decoder", decoder=row.model_type)
    config = read(source)
    text = config["text_config"]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    # What transformers' own save leaves out: what its class takes anyway.
    text = {key: value for key, value in text.items() if key not in row.defaults or key in (*sizes, *row.computed) or "token_id" in key}
    configured(source, text_config=text)
    kind = getattr(transformers, row.config_class)
    read_by_it = kind(**text).to_dict()
    for to in ("llava-hf", "llava"):
        made = lw.convert(source, to).config
        found = kind(**(made["text_config"] if to == "llava-hf" else made)).to_dict()
        for key in row.defaults.keys() & read_by_it.keys() - {"vocab_size"}:
            if "token_id" not in key:
                assert found[key] == read_by_it[key], (to, key)


# --- two saves in one folder ------------------------------------------------------------------------------------------


def in_shards(folder: Path, tensors: Tensors, suffix: str) -> None:
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names, weight_map = list(tensors), {}
    for place, (start, stop) in enumerate(pairwise((0, len(names) // 2, len(names))), 1):
        file, part = f"{stem}-0000{place}-of-00002{suffix}", {name: tensors[name] for name in names[start:stop]}
        save_file(part, folder / file, {"format": "pt"}) if suffix == ".safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("layout", ["llava", "llava-hf"])
def test_the_one_file_is_read_and_an_index_left_beside_it_is_not(tmp_path: Path, suffix: str, layout: str) -> None:
    source = toy(tmp_path) if layout == "llava" else hub(tmp_path)
    new = tensors_of(source)
    old = {name: tensor + 1 for name, tensor in new.items()}
    single = source / ("model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin")
    if suffix == ".bin":
        (source / "model.safetensors").unlink()
        torch.save(new, single)
    expected = tensors_of(written(lw.convert(source, "llava-hf"), tmp_path / "expected"))
    in_shards(source, old, suffix)
    with pytest.raises(InputError, match="two checkpoints lie in one folder") as refused:
        lw.convert(source, "llava-hf")
    assert single.name in str(refused.value)
    for path in source.glob("*-of-*"):
        path.unlink()
    made = lw.convert(source, "llava-hf")
    assert same(tensors_of(written(made, tmp_path / "out")), expected)
    assert any("is left from another save" in text for text in made.history[0].notes)
    in_shards(source, new, suffix)
    again = lw.convert(source, "llava-hf")
    assert any("hold the same" in text for text in again.history[0].notes)


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["llava", *STYLES])
def test_a_tied_pair_is_read_as_it_is_stored(tmp_path: Path, style: str) -> None:
    source = toy(tmp_path) if style == "llava" else hub(tmp_path)
    plain = tensors_of(source)
    embed, head = (next(name for name in plain if name.endswith(end)) for end in ("embed_tokens.weight", "lm_head.weight"))
    stored = {
        "embedding": {name: x for name, x in plain.items() if name != head},
        "head": {**{name: x for name, x in plain.items() if name != embed}, head: plain[embed]},
        "both": {**plain, head: plain[embed]},
    }

    def kept(which: str, **keys: Any) -> Path:
        folder = tmp_path / which
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        configured(folder, **keys)
        if style != "llava":
            configured(folder, text_config={**read(folder)["text_config"], **keys})
        return put(folder, {(name if style == "llava" else STYLES[style](name)): x for name, x in stored[which].items()})

    made = {which: lw.convert(kept(which, tie_word_embeddings=True), "llava-hf") for which in stored}
    outs = {which: tensors_of(written(each, tmp_path / f"out-{which}")) for which, each in made.items()}
    assert same(outs["embedding"], outs["head"])
    assert not any("lm_head" in name for name in outs["embedding"])
    assert {name: x for name, x in outs["both"].items() if "lm_head" not in name}.keys() == outs["head"].keys()
    assert failed(tmp_path / "out-both") == []
    with pytest.raises(InputError, match="not those that config"):
        lw.convert(kept("embedding", tie_word_embeddings=False), "llava-hf")
    stored["own"] = plain
    assert any("values of its own" in text for text in lw.convert(kept("own", tie_word_embeddings=True), "llava-hf").history[-1].warnings)


# --- what is quantised, or was ----------------------------------------------------------------------------------------

LEFT_OVER: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def adapter(folder: Path, module: str, width: int = 64, **more: torch.Tensor) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    factors = {
        f"base_model.model.{module}.lora_A.weight": torch.ones(1, width),
        f"base_model.model.{module}.lora_B.weight": torch.ones(width, 1),
    }
    save_file({**factors, **more}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(("style", "place"), [("llava", ""), *((style, place) for style in STYLES for place in ("", "text_config"))])
def test_a_left_over_quantization_config_goes_from_every_output(tmp_path: Path, style: str, place: str) -> None:
    source = toy(tmp_path) if style == "llava" else hub(tmp_path)
    given = {"quantization_config": LEFT_OVER}
    configured(source, **({place: {**read(source)[place], **given}} if place else given))
    source = styled(source, style) if style != "llava" else source
    module = next(
        name for name in tensors_of(source) if re.search(r"(?<!tower)\.layers\.0\.self_attn\.q_proj\.weight", name) and "vision" not in name
    )
    lora = adapter(tmp_path / "lora", module.removesuffix(".weight"))
    made = [lw.convert(source, "llava-hf"), lw.convert(source, "llava"), lw.merge_lora(source, lora)]
    for each in made:
        assert "quantization_config" not in json.dumps(dict(each.config))
        assert any("`quantization_config`" in text or "quantization_config` (bitsandbytes)" in text for text in each.history[-1].repairs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("layout", ["llava", "llava-hf"])
def test_quantised_matrices_are_called_so_before_anything_else(tmp_path: Path, dtype: torch.dtype, layout: str) -> None:
    source = toy(tmp_path) if layout == "llava" else hub(tmp_path)
    tensors = tensors_of(source)
    for name in [name for name in tensors if name.endswith("mlp.up_proj.weight")]:
        packed = tensors[name].to(dtype) if dtype != torch.uint8 else torch.zeros(tensors[name].numel() // 2, 1, dtype=dtype)
        tensors |= {name: packed, **({f"{name}.absmax": torch.ones(4)} if dtype == torch.uint8 else {})}
    put(source, tensors)
    module = next(name for name in tensors if name.endswith("layers.0.self_attn.o_proj.weight"))
    lora = adapter(tmp_path / "lora", module.removesuffix(".weight"))
    for act in (lambda: lw.convert(source, "llava-hf"), lambda: lw.convert(source, "llava"), lambda: lw.merge_lora(source, lora)):
        with pytest.raises(InputError, match="is quantised"):
            act()
    assert "quantised" in lw.inspect(source).what


# --- adapters of other programs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_a_projector_that_was_saved_as_a_module_lands_in_every_layout(tmp_path: Path, style: str) -> None:
    source = hub(tmp_path)
    original = tmp_path / "llava"
    values = {name: torch.full_like(x, 0.5) for name, x in tensors_of(source).items() if name.startswith("multi_modal_projector")}
    module = STYLES[style]("language_model.model.layers.1.self_attn.q_proj")
    lora = adapter(tmp_path / "lora", module, **{f"base_model.model.{STYLES[style](name)}": x for name, x in values.items()})
    outs = [tensors_of(written(lw.merge_lora(base, lora), tmp_path / name)) for base, name in ((source, "one"), (original, "two"))]
    for name, value in values.items():
        assert torch.equal(outs[0][name], value)
        assert torch.equal(outs[1][re.sub(r".*linear_(\d)", lambda x: f"model.mm_projector.{2 * int(x[1]) - 2}", name)], value)
    absent = adapter(tmp_path / "absent", STYLES[style]("language_model.model.layers.2.self_attn.q_proj"))
    with pytest.raises(InputError, match=r"not in the base: .*layers\.2"):
        lw.merge_lora(source, absent)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_gathered_training_state_is_an_adapter_with_its_projector(tmp_path: Path, shards: bool, suffix: str) -> None:
    source = toy(tmp_path)
    tensors = tensors_of(source)
    projector = {name: torch.full_like(x, 0.25) for name, x in tensors.items() if "mm_projector" in name}
    module = "model.layers.0.self_attn.q_proj"
    a, b = torch.full((1, 64), 0.5), torch.full((64, 1), 0.5)
    state = {
        f"base_model.model.{name}": x for name, x in (tensors | projector).items() if not name.startswith(module) and "tower" not in name
    }
    state |= {f"base_model.model.{module}.base_layer.weight": tensors[f"{module}.weight"]}
    state |= {f"base_model.model.{module}.lora_{which}.default.weight": x for which, x in (("A", a), ("B", b))}
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    if shards:
        in_shards(folder, state, suffix)
    elif suffix == ".bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file({name: x.clone() for name, x in state.items()}, folder / "model.safetensors")
    merged = tensors_of(written(lw.merge_lora(source, folder), tmp_path / "out"))
    expected = tensors | projector | {f"{module}.weight": (tensors[f"{module}.weight"].float() + 2 * (b @ a)).half()}
    assert same(merged, expected)
