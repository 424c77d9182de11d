"""Health on real files: converted ones and those of transformers' own converter pass, and each fault is found, one by one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.checks.health import health
from llava_weights.findings import Finding
from llava_weights.transforms.convert import convert
from llava_weights.write.execute import execute
from llava_weights.write.plan import make_plan

SOURCES = {
    "C": ("C-v1.5/original-with-vision-safetensors", "clip-tiny-42px"),
    "A": ("A-delta-v0/expected-307-by-main", "clip-tiny-28px"),
    "D": ("D-v1.6/original-vicuna", "clip-tiny-42px"),
}
JSON_FILES = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json",
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
)  # fmt: skip
PLACES = 5  # of each file, to hold odd values
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def healthy(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each source converted to llava-hf, and those converted back."""
    out, made = tmp_path_factory.mktemp("healthy"), {}
    for name, (source, tower) in SOURCES.items():
        there = convert(open_checkpoint(fixtures / source), "llava-hf", tower=open_checkpoint(fixtures / "common" / tower))
        execute(make_plan(there), out / name)
        execute(make_plan(convert(open_checkpoint(out / name), "llava")), out / f"{name}-back")
        made |= {name: out / name, f"{name}-back": out / f"{name}-back"}
    return made


@pytest.fixture
def copy(healthy: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(healthy[name], tmp_path / name))

    return copied


def found(folder: Path) -> list[Finding]:
    return list(health(open_checkpoint(folder), folder if folder.is_dir() else None))


def bad(folder: Path) -> list[tuple[str, str, str]]:
    return [(f.verdict, f.subject, f.text) for f in found(folder) if f.verdict not in ("ok", "note")]


def edit(folder: Path, file: str, change: Callable[[Any], Any]) -> None:
    value = json.loads((folder / file).read_bytes())
    (folder / file).write_text(json.dumps(change(value) or value))


def setting(file: str, *keys: str, to: Any = None) -> Callable[[Path], None]:
    """A change of one value in a JSON file; without `to` the key goes."""

    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        if to is None:
            del value[keys[-1]]
        else:
            value[keys[-1]] = to

    return lambda folder: edit(folder, file, change)


def without(*files: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / file).unlink() for file in files] and None


def rewrite(change: Callable[[Tensors], Any], metadata: dict[str, str] | None = None) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        assert len(files) == 1
        tensors = load_file(files[0])
        tensors = change(tensors) or tensors
        save_file(tensors, files[0], {"format": "pt"} if metadata is None else metadata)

    return apply


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return rewrite(lambda tensors: {name.replace(old, new, 1): tensor for name, tensor in tensors.items()})


def lacking(name: str) -> Callable[[Path], None]:
    return rewrite(lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name})


def copied_row(name: str, source: int, target: int) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][target] = tensors[name][source]

    return rewrite(change)


def filled(name: str, value: float, row: int | None = None) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        (tensors[name] if row is None else tensors[name][row]).fill_(value)

    return rewrite(change)


def special(flag: bool) -> Callable[[Path], None]:
    def change(value: Any) -> None:
        next(entry for entry in value["added_tokens"] if entry["content"] == "<image>")["special"] = flag

    return lambda folder: edit(folder, "tokenizer.json", change)


def metaspace(folder: Path) -> None:
    before = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    edit(folder, "tokenizer.json", lambda value: {**value, "normalizer": None, "pre_tokenizer": before})


def both(*changes: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda folder: [change(folder) for change in changes] and None


EMBED, Q = "language_model.model.embed_tokens.weight", "language_model.model.layers.{}.self_attn.q_proj.weight"
MLP = "language_model.model.layers.0.mlp.up_proj.weight"
HF_FAULTS = {  # name: (model, change, verdict, subject, part of the text)
    "vocab_size": ("C", setting("config.json", "vocab_size", to=321), "failed", "config.json", "`vocab_size` is 321"),
    "text vocab_size": ("C", setting("config.json", "text_config", "vocab_size"), "failed", "config.json", "is 32000, but the embedding"),
    "hidden_size": (
        "C", setting("config.json", "text_config", "hidden_size", to=64),
        "failed", "config.json", "[320, 48], by config.json [320, 64]",
    ),
    "layers": ("C", setting("config.json", "text_config", "num_hidden_layers", to=3), "failed", "config.json", "missing: model.layers.2"),
    "image id beyond": ("C", setting("config.json", "image_token_index", to=32000), "failed", "config.json", "is 32000, the embedding"),
    "image id of another": ("C", setting("config.json", "image_token_index", to=303), "failed", "config.json", "`<image>` has the id 304"),
    "image ids differ": ("C", setting("config.json", "image_token_id", to=7), "failed", "config.json", "`image_token_id` 7"),
    "image_token_id alone": (
        "C", both(setting("config.json", "image_token_id", to=304), setting("config.json", "image_token_index")),
        "warning", "config.json", "there is only `image_token_id`",
    ),
    "image_seq_length": ("C", setting("config.json", "image_seq_length", to=576), "failed", "config.json", "gives 9 features"),
    "image_seq_length missing": ("C", setting("config.json", "image_seq_length"), "failed", "config.json", "`image_seq_length` is missing"),
    "image_size": ("C", setting("config.json", "vision_config", "image_size", to=28), "failed", "config.json", "2 patches a side, but 3"),
    "patch_size": ("C", setting("config.json", "vision_config", "patch_size", to=7), "failed", "config.json", "`patch_size` is 7"),
    "activation": (
        "C", setting("config.json", "projector_hidden_act", to="identity"),
        "failed", "config.json", '"identity", which transformers',
    ),
    "feature layer": ("C", setting("config.json", "vision_feature_layer", to=-9), "failed", "config.json", "-9, the vision tower has 2"),
    "feature layers": ("C", setting("config.json", "vision_feature_layer", to=[-1, -2]), "failed", "config.json", "expected [48, 48]"),
    "strategy": (
        "C", setting("config.json", "vision_feature_select_strategy", to="cls_patch"),
        "failed", "config.json", "not default or full",
    ),
    "pad beyond": ("C", setting("config.json", "pad_token_id", to=400), "failed", "config.json", "`pad_token_id` is 400"),
    "pad of another": ("C", setting("config.json", "pad_token_id", to=3), "warning", "config.json", "the tokenizer pads with id 305"),
    "model type": ("C", setting("config.json", "model_type", to="made_up"), "warning", "config.json", '"made_up", not llava or'),
    "architectures": ("C", setting("config.json", "architectures"), "warning", "config.json", "`architectures` is missing"),
    "newline": ("D", lacking("image_newline"), "failed", "config.json", "no tensor `image_newline`"),
    "pinpoints missing": (
        "D", setting("config.json", "image_grid_pinpoints"),
        "failed", "config.json", "`image_grid_pinpoints` is missing",
    ),
    "pinpoints odd": (
        "D", setting("config.json", "image_grid_pinpoints", to=[[42, 43]]),
        "failed", "config.json", "multiples of the tower",
    ),
    "pinpoints differ": (
        "D", setting("preprocessor_config.json", "image_grid_pinpoints", to=[[42, 84]]),
        "failed", "preprocessor_config.json", "is [[42, 84]]",
    ),
    "projector bias": (
        "C", lacking("multi_modal_projector.linear_2.bias"),
        "failed", "config.json", "`multi_modal_projector.linear_2.bias` has shape missing, expected [48]",
    ),
    "tower tensor": (
        "C", lacking("vision_tower.vision_model.post_layernorm.bias"),
        "failed", "config.json", "lacks `post_layernorm.bias`",
    ),
    "unknown tensor": (
        "C", rewrite(lambda t: {**t, "resampler.x": torch.ones(2)}),
        "failed", "config.json", "of no part of a LLaVA: resampler.x",
    ),
    "no generation_config": ("C", without("generation_config.json"), "failed", "generation_config.json", "never stops"),
    "eos": ("C", setting("generation_config.json", "eos_token_id", to=1), "failed", "generation_config.json", "tokenizer's eos is id 2"),
    "no eos": ("C", setting("generation_config.json", "eos_token_id"), "failed", "generation_config.json", "`eos_token_id` is missing"),
    "bos": ("C", setting("generation_config.json", "bos_token_id", to=0), "failed", "generation_config.json", "tokenizer's bos is id 1"),
    "generation pad": ("C", setting("generation_config.json", "pad_token_id", to=0), "failed", "generation_config.json", "pad is id 305"),
    "no tokenizer": ("C", without("tokenizer.model", "tokenizer.json"), "failed", "tokenizer", "there is no tokenizer"),
    "token without row": ("C", setting("added_tokens.json", "<x>", to=320), "failed", "tokenizer", "`<x>` has the id 320"),
    "token with two ids": ("C", setting("added_tokens.json", "<image>", to=306), "failed", "tokenizer", "`<image>` has the id 304 in"),
    "two tokenizers": (
        "C", setting("tokenizer.json", "model", "vocab", "zzz", to=304),
        "failed", "tokenizer", "305 tokens, `tokenizer.model` 304",
    ),
    "bos is eos": ("C", setting("special_tokens_map.json", "bos_token", to="</s>"), "warning", "tokenizer", '"</s>" as bos'),
    "empty bos": ("C", setting("tokenizer_config.json", "bos_token", to=""), "warning", "tokenizer", '"" as bos'),
    "legacy": ("C", setting("tokenizer_config.json", "legacy", to=False), "warning", "tokenizer_config.json", "`legacy` is false"),
    "no legacy": ("C", setting("tokenizer_config.json", "legacy"), "warning", "tokenizer_config.json", "`legacy` is missing"),
    "class": (
        "C", setting("tokenizer_config.json", "tokenizer_class", to="TokenizersBackend"),
        "failed", "tokenizer_config.json", "transformers 4",
    ),
    "Metaspace": ("C", metaspace, "warning", "tokenizer.json", 'its form is "Metaspace"'),
    "no tokenizer.json": ("C", without("tokenizer.json"), "warning", "tokenizer.json", "it is missing"),
    "image not special": ("C", special(False), "warning", "tokenizer.json", "is no special token"),
    "image no token": (
        "C", setting("processor_config.json", "image_token", to="<picture>"),
        "failed", "tokenizer.json", "is not one token",
    ),
    "no processor": ("C", without("processor_config.json"), "failed", "processor_config.json", "it is missing"),
    "class token": (
        "C", setting("processor_config.json", "num_additional_image_tokens"),
        "failed", "processor_config.json", "the model needs 1",
    ),
    "processor patch": (
        "C", setting("processor_config.json", "patch_size", to=16),
        "failed", "processor_config.json", "the model needs 14",
    ),
    "processor strategy": (
        "C", setting("processor_config.json", "vision_feature_select_strategy", to="full"),
        "failed", "processor_config.json", 'needs "default"',
    ),
    "processor class": (
        "C", setting("processor_config.json", "processor_class", to="X"),
        "failed", "processor_config.json", 'needs "LlavaProcessor"',
    ),
    "no preprocessor": ("C", without("preprocessor_config.json"), "failed", "preprocessor_config.json", "it is missing"),
    "crop": (
        "C", setting("preprocessor_config.json", "crop_size", to={"height": 28, "width": 28}),
        "failed", "preprocessor_config.json", "belongs to another vision tower",
    ),
    "no template": ("C", without("chat_template.json", "chat_template.jinja"), "warning", "chat_template.json", "no chat template at all"),
    "only jinja": ("C", without("chat_template.json"), "warning", "chat_template.json", "4.47 and later read chat_template.jinja"),
    "template differs": (
        "C", setting("chat_template.json", "chat_template", to="<image> {{ 1 }}"),
        "failed", "chat_template.json", "it differs",
    ),
    "template without image": (
        "C", both(setting("chat_template.json", "chat_template", to="x"), lambda folder: (folder / "chat_template.jinja").write_text("x")),
        "warning", "chat_template.json", "never writes `<image>`",
    ),
    "S2": (
        "C", rewrite(lambda t: {("model." + n).replace("model.language_model.model", "model.language_model"): x for n, x in t.items()}),
        "warning", "tensors", "4.52 and later",
    ),
    "S3/S4": ("C", renamed("vision_tower.vision_model", "vision_tower"), "warning", "tensors", "5.23"),
    "buffer": (
        "C", rewrite(lambda t: {**t, "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}),
        "warning", "tensors", "1 tensors are buffers",
    ),
    "format": ("C", rewrite(lambda tensors: None, {}), "warning", "model.safetensors", "`format: pt` is missing"),
    "auto_map": ("C", setting("config.json", "auto_map", to={"AutoModel": "x.Y"}), "warning", "config.json", "`auto_map` makes"),
    "nested auto_map": (
        "C", setting("tokenizer_config.json", "init_kwargs", to=[{"auto_map": 1}]), "warning", "tokenizer_config.json", "`auto_map` makes",
    ),
    "program": ("C", lambda folder: (folder / "modeling_x.py").write_text("1"), "warning", "modeling_x.py", "never runs"),
    "pickle": (
        "C", lambda folder: (folder / "training_args.bin").write_text("1"),
        "warning", "training_args.bin", "pickles by their names",
    ),
    "NaN": ("C", filled(MLP, float("nan")), "failed", MLP, "inf or NaN"),
    "zero": ("C", filled(MLP, 0.0), "failed", MLP, "every sampled value is 0"),
    "constant": ("C", filled("language_model.model.norm.weight", 1.0), "warning", "language_model.model.norm.weight", "value is 1"),
    "two layers equal": (
        "C", rewrite(lambda t: {**t, Q.format(1): t[Q.format(0)].clone()}), "warning", Q.format(0), "layers.{0,1}.self_attn.q_proj",
    ),
    "zero row": ("C", filled(EMBED, 0.0, 2), "warning", EMBED, "`2 </s>` are zero"),
    "zero padding": ("C", filled(EMBED, 0.0, 319), "warning", EMBED, "the padding rows `319` are zero"),
    "untrained token": ("A", copied_row(EMBED, 305, 306), "warning", EMBED, "305 <im_start>`, `306 <im_end>"),
    "bfloat16": (
        "C", rewrite(lambda t: {n: x.bfloat16().half() for n, x in t.items()}),
        "warning", "language_model.lm_head.weight", "F16, but hold no more",
    ),
    "half negated": (
        "C", rewrite(lambda t: [x[::2].neg_() for n, x in t.items() if "norm" in n and n.startswith("lang")] and None),
        "warning", "C", "neither a model nor a delta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [name + back for name in SOURCES for back in ("", "-back")])
def test_converted_is_healthy(healthy: dict[str, Path], name: str) -> None:
    assert bad(healthy[name]) == []
    subjects = {finding.subject for finding in found(healthy[name])}
    assert {"config.json", "generation_config.json", "tokenizer", "weight files", "code", "values", "state", "vocabulary"} <= subjects


@pytest.mark.parametrize("fault", HF_FAULTS)
def test_each_fault_is_named(copy: Callable[[str], Path], fault: str) -> None:
    model, change, verdict, subject, text = HF_FAULTS[fault]
    folder = copy(model)
    change(folder)
    matching = [f for f in found(folder) if (f.verdict, f.subject) == (verdict, subject) and text in f.text]
    assert len(matching) == 1, bad(folder)
    assert matching[0].remedy
    assert matching[0].text.isprintable()


def test_what_transformers_own_converter_wrote(fixtures: Path) -> None:
    """Known: facts llava-hf 1.4, 3.4 and 3.6."""
    expected = [
        ("warning", "tokenizer.json", 'its form is "Metaspace"'),
        ("warning", "tokenizer_config.json", "`legacy` is false"),
        ("warning", "processor_config.json", "`patch_size` and `vision_feature_select_strategy` are missing"),
        ("warning", "chat_template.json", "it is missing"),
    ]
    got = bad(fixtures / "C-v1.5/hf-by-tf4.47.1")
    assert [(verdict, subject) for verdict, subject, _ in got] == [(verdict, subject) for verdict, subject, _ in expected]
    assert all(start in text for (_, _, text), (_, _, start) in zip(got, expected, strict=True))


def test_converting_it_repairs_it(fixtures: Path, tmp_path: Path) -> None:
    execute(make_plan(convert(open_checkpoint(fixtures / "C-v1.5/hf-by-tf4.47.1"), "llava-hf")), tmp_path / "out")
    assert bad(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["delta-307-apr17", "delta-308-may4"])
def test_unapplied_delta(fixtures: Path, name: str) -> None:
    values = [finding for finding in found(fixtures / "A-delta-v0" / name) if finding.level == "L1"]
    assert [(f.verdict, f.subject) for f in values] == [("failed", name)]
    assert "never applied" in values[0].text
    assert "apply-delta" in values[0].remedy


def test_base_in_bfloat16(fixtures: Path) -> None:
    got = [f for f in found(fixtures / "A-delta-v0/base-hf-from-meta13B-by-tf4.37.2-BF16") if f.level == "L1" and f.verdict == "failed"]
    assert [f.subject for f in got] == ["lm_head.weight"]
    assert "16 sampled matrices are stored as bfloat16" in got[0].text
    assert "a LLaMA 1 that a converter damaged" in got[0].text
    assert "Meta" in got[0].remedy


@pytest.mark.parametrize(
    "name", ["A-delta-v0/base-hf-bin", "A-delta-v0/base-meta", "A-delta-v0/expected-308-by-may4", "C-v1.5/original-no-vision-bin"]
)
def test_sound_pickles_get_one_warning(fixtures: Path, name: str) -> None:
    got = bad(fixtures / name)
    assert [verdict for verdict, _, _ in got] == ["warning"]
    assert "pickles" in got[0][2]


def test_sound_adapter(fixtures: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fixtures / "F-peft/plain/adapter", tmp_path / "adapter")
    assert bad(folder) == []
    rewrite(lambda t: [x.zero_() for n, x in t.items() if "lora_B" in n] and None)(folder)
    edit(folder, "adapter_config.json", lambda value: {**value, "auto_map": {}})
    assert [(verdict, subject.endswith(("adapter_config.json", "lora_B.weight"))) for verdict, subject, _ in bad(folder)] == [
        ("warning", True)
    ] * 2


ORIGINAL_FAULTS = {
    "ids of 2023": (
        {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1},
        "failed", "`bos_token_id` is 0, but the tokenizer's bos is id 1",
    ),
    "pad of 2023": ({"pad_token_id": -1}, "failed", "`pad_token_id` is -1"),
    "pad beyond": ({"pad_token_id": 32003}, "failed", "`pad_token_id` is 32003, the embedding table has 304 rows"),
    "vocab_size": ({"vocab_size": 305}, "failed", "`vocab_size` is 305, but `lm_head.weight` has 304 rows"),
    "model type": ({"model_type": "llama"}, "warning", '`model_type` is "llama"'),
    "architectures": ({"architectures": ["LlamaForCausalLM"]}, "warning", "no class of LLaVA"),
    "projector": ({"mm_projector_type": "linear"}, "failed", "the tensors are mlp2x_gelu"),
    "no projector": ({"mm_projector_type": None}, "failed", "`mm_projector_type` is missing"),
    "width": ({"mm_hidden_size": 1024}, "failed", "takes features of 24"),
    "no tower": ({"mm_vision_tower": None}, "failed", "`mm_vision_tower` is missing"),
    "path": ({"mm_vision_tower": "/home/x/clip"}, "warning", "a path on its author's machine"),
    "frozen": ({"unfreeze_mm_vision_tower": False}, "warning", "LLaVA replaces them"),
    "old length": ({"max_sequence_length": 2048, "max_position_embeddings": None}, "warning", "`max_sequence_length` is the name"),
    "patch token": ({"mm_use_im_patch_token": None}, "warning", "it adds a token and a row"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ORIGINAL_FAULTS)
def test_each_fault_of_an_original_is_named(copy: Callable[[str], Path], fault: str) -> None:
    change, verdict, text = ORIGINAL_FAULTS[fault]
    folder = copy("C-back")
    edit(folder, "config.json", lambda value: {k: v for k, v in {**value, **change}.items() if v is not None})
    matching = [f for f in found(folder) if (f.verdict, f.subject) == (verdict, "config.json") and text in f.text]
    assert len(matching) == 1, bad(folder)


def test_pad_token_of_2023_has_no_row(fixtures: Path, tmp_path: Path) -> None:
    """As in the published LLaVA-13b-delta-v0, whose [PAD] is 32003 of 32003 rows (LLaVA #69)."""
    folder = shutil.copytree(fixtures / "A-delta-v0/expected-307-by-main", tmp_path / "model")
    edit(folder, "added_tokens.json", lambda value: {**value, "[PAD]": 307})
    assert ("failed", "tokenizer", "`[PAD]` has the id 307, but the embedding table has 307 rows") in bad(folder)


def test_index_with_another_size(fixtures: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fixtures / "D-v1.6/original-vicuna", tmp_path / "model")
    assert bad(folder) == []
    edit(folder, "model.safetensors.index.json", lambda value: {**value, "metadata": {"total_size": 1}})
    assert [(verdict, subject) for verdict, subject, _ in bad(folder)] == [("warning", "model.safetensors.index.json")]


@pytest.mark.parametrize("file", [name for name in JSON_FILES if name != "config.json"])
@pytest.mark.parametrize("data", [b"{"])
def test_unreadable_file_is_a_finding_that_names_it(copy: Callable[[str], Path], file: str, data: bytes) -> None:
    folder = copy("C")
    (folder / file).write_bytes(data)
    assert [subject for verdict, subject, _ in bad(folder) if verdict == "failed" and subject == file] == [file]


ODD = (None, True, -1, 10**30, 1.5, "x", "", [], [[]], {}, {"x": []}, [None])


@pytest.mark.parametrize("file", JSON_FILES)
def test_no_value_crashes_it(copy: Callable[[str], Path], file: str) -> None:
    """Keys of the file, and of the objects in it, hold something of another type; each time another one."""
    folder = copy("D")
    value = json.loads((folder / file).read_bytes())
    places = [(value, key) for key in value] + [(inner, key) for inner in value.values() if isinstance(inner, dict) for key in inner]
    for number, (inner, key) in enumerate(places[:: max(1, len(places) // PLACES)]):
        kept, inner[key] = inner[key], ODD[number % len(ODD)]
        (folder / file).write_text(json.dumps(value))
        assert found(folder)
        inner[key] = kept
