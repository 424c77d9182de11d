"""The streamed forward: transformers' own bits for the models it has, the original programs' logits for those it has not."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file

from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.errors import InputError, MismatchError, UsageError
from llava_weights.smoke.forward import Places, Probe, Runner, load_forward, load_original
from llava_weights.smoke.image_features import best_grid, unpad
from llava_weights.smoke.streaming import Most, Streamed
from llava_weights.tensors.lazy import Stored

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97}
TEXT = {
    "llama": ("Llama", SMALL | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("Mistral", SMALL | {"num_key_value_heads": 2, "sliding_window": 5}),
    "qwen2": ("Qwen2", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
}
IDS = np.array([1, 5, 96, 5, 40, 7, 7, 13, 88, 2, 61, 3])
CLOSE = {"rtol": 0, "atol": 5e-5}  # the tolerance of the reference data: the smallest mistake moves the logits by 1.4e-4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine cost more than these products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def text_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A random model, saved in `folder` by transformers; every value is drawn, norms and biases too."""
    family, settings = TEXT[kind]
    config = getattr(transformers, f"{family}Config")(**settings, attn_implementation="eager")
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(folder)
    return getattr(transformers, f"{family}ForCausalLM").from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def whole_model(folder: Path) -> Any:
    """transformers' model of a llava-hf folder, as a user gets it, in float32."""
    kind = {"llava": "Llava", "llava_next": "LlavaNext"}[json.loads((folder / "config.json").read_text())["model_type"]]
    loader = getattr(transformers, f"{kind}ForConditionalGeneration")
    return loader.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def cases(folder: Path, *, hf: bool, prefix: str = "") -> list[Probe]:
    """The inputs of a folder of E-logits as probes, in the form of the originals or of llava-hf."""
    stored = load_file(folder / "inputs.safetensors")
    probes = []
    for name in sorted({key.removesuffix(".input_ids") for key in stored if key.endswith("input_ids") and ".hf." not in key}):
        if not name.startswith(prefix):
            continue
        ids = stored.get(f"{name}.hf.input_ids" if hf else "", stored[f"{name}.input_ids"])
        pixels = stored.get(f"{name}.pixel_values")
        if images := [stored[key] for key in sorted(stored) if key.startswith(f"{name}.image") and key.endswith("pixel_values")]:
            tiles = max(image.shape[0] for image in images)
            pixels = np.stack([np.pad(i, [(0, tiles - i.shape[0]), *[(0, 0)] * (i.ndim - 1)]) for i in images])
        probes.append(Probe(name, ids[0], pixels, stored.get(f"{name}.hf.image_sizes")))
    assert len(probes) >= 3
    return probes


def expected(folder: Path, name: str) -> np.ndarray:
    """The original program's logits of a case, [T, V]."""
    return load_file(next(folder.glob("original-*.safetensors")))[f"{name}.float32"][0]


def tensors(probe: Probe) -> dict[str, torch.Tensor]:
    """A probe as transformers takes it."""
    inputs = {"input_ids": torch.tensor(probe.ids)[None]}
    if probe.pixel_values is not None:
        inputs["pixel_values"] = torch.tensor(probe.pixel_values)
        if probe.pixel_values.ndim == 5:
            inputs["image_sizes"] = torch.tensor(probe.image_sizes)
    return inputs


def swapped(source: Path, target: Path) -> Path:
    """The converted v1.6 with each pair of pinpoints swapped: the original reads (width, height), transformers the other way."""
    target.mkdir()
    shutil.copy(source / "model.safetensors", target)
    config = json.loads((source / "config.json").read_text())
    config["image_grid_pinpoints"] = [pair[::-1] for pair in config["image_grid_pinpoints"]]
    (target / "config.json").write_text(json.dumps(config))
    return target


def real_parameters(runner: Runner) -> list[str]:
    """Names of the parameters that have values now."""
    return [name for name, parameter in runner._model.named_parameters() if not parameter.is_meta]


@pytest.mark.parametrize(("kind", "stored"), [("llama", torch.float16), ("mistral", torch.bfloat16), ("qwen2", torch.float32)])
def test_text_models_give_the_bits_of_transformers(kind: str, stored: torch.dtype, tmp_path: Path) -> None:
    model = text_model(kind, tmp_path, stored)
    runner = load_forward(open_checkpoint(tmp_path))
    outcome = runner(Probe("text", IDS))
    with torch.inference_mode():
        whole = model(torch.tensor(IDS)[None], output_hidden_states=True)
    assert torch.equal(torch.tensor(outcome.logits), whole.logits[0])
    assert list(outcome.hidden) == ["embeddings", "layer.0", "layer.1", "layer.2"]
    for name, value in list(outcome.hidden.items())[:-1]:  # transformers keeps the last one behind the norm
        index = 0 if name == "embeddings" else int(name[6:]) + 1
        assert torch.equal(torch.tensor(value), whole.hidden_states[index][0]), name
    again = runner(Probe("text", IDS[:4]))
    np.testing.assert_allclose(again.logits, outcome.logits[:4], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_generate_gives_the_tokens_of_transformers(kind: str, tmp_path: Path) -> None:
    model = text_model(kind, tmp_path)
    runner = load_forward(open_checkpoint(tmp_path))
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    whole = model.generate(torch.tensor(IDS)[None], attention_mask=torch.ones(1, len(IDS)), eos_token_id=1000, **options)
    tokens = whole[0, len(IDS) :].tolist()
    assert len(set(tokens)) > 2
    assert runner.generate(IDS, new_tokens=20, eos=[1000]) == tokens
    stop = tokens[7]
    assert runner.generate(IDS, new_tokens=20, eos=[stop]) == tokens[: tokens.index(stop) + 1]
    assert runner.generate(IDS, new_tokens=1, eos=[1000]) == tokens[:1]


@pytest.mark.parametrize("version", ["C-v1.5", "D-v1.6"])
def test_llava_hf_gives_the_bits_of_transformers_and_the_logits_of_the_original(version: str, fixtures: Path, tmp_path: Path) -> None:
    folder = fixtures / "C-v1.5/hf-by-tf4.47.1"
    if version == "D-v1.6":
        folder = swapped(fixtures / "D-v1.6/hf-by-tf4.47.1-vicuna", tmp_path / "swapped")
    model, runner = whole_model(folder), load_forward(open_checkpoint(folder))
    for probe in cases(fixtures / "E-logits" / version, hf=True):
        outcome = runner(probe)
        with torch.inference_mode():
            whole = model(**tensors(probe))
        assert torch.equal(torch.tensor(outcome.logits), whole.logits[0]), probe.name
        reference = expected(fixtures / "E-logits" / version, probe.name)
        np.testing.assert_allclose(outcome.logits[:, : reference.shape[1]], reference, **CLOSE)
        assert ("vision" in outcome.hidden) == (probe.pixel_values is not None)
    probe = cases(fixtures / "E-logits" / version, hf=True)[0]
    whole = model.generate(**tensors(probe), do_sample=False, max_new_tokens=12, eos_token_id=1000, pad_token_id=0)
    images = {"pixel_values": probe.pixel_values, "image_sizes": probe.image_sizes}
    assert runner.generate(probe.ids, **images, new_tokens=12, eos=[1000]) == whole[0, len(probe.ids) :].tolist()


@pytest.mark.parametrize("rows", [307, 308])
def test_linear_projector_in_llava_hf_gives_the_original_logits(rows: int, fixtures: Path) -> None:
    runner = load_forward(open_checkpoint(fixtures / f"A-delta-v0/hf-linear-projector-{rows}"))
    for probe in cases(fixtures / "E-logits/A-delta-v0", hf=False, prefix=f"v{rows}."):
        np.testing.assert_allclose(runner(probe).logits, expected(fixtures / "E-logits/A-delta-v0", probe.name), **CLOSE)


LORA = "B-lora/merged-of-llava-v1"
ORIGINALS = [
    ("A-delta-v0/expected-307-by-main", "common/clip-tiny-28px", "A-delta-v0", "v307."),
    ("A-delta-v0/expected-308-by-may4", "common/clip-tiny-28px", "A-delta-v0", "v308."),
    (f"{LORA}.5-tiny-lora-by-main-peft0.10.0", "common/clip-tiny-28px", "B-lora-v1.5", ""),
    (f"{LORA}-tiny-lora-imstartend-by-main-peft0.10.0", "common/clip-tiny-28px", "B-lora-imstartend", ""),
    ("C-v1.5/original-no-vision-bin", "common/clip-tiny-42px", "C-v1.5", ""),
    ("C-v1.5/original-with-vision-safetensors", "common/clip-tiny-42px", "C-v1.5", ""),
    ("D-v1.6/original-vicuna", "common/clip-tiny-42px", "D-v1.6", ""),
]


@pytest.mark.parametrize(("folder", "tower", "recorded", "prefix"), ORIGINALS, ids=[each[0] for each in ORIGINALS])
def test_original_layout_gives_the_logits_of_the_original_programs(
    folder: str, tower: str, recorded: str, prefix: str, fixtures: Path
) -> None:
    runner = load_original(open_checkpoint(fixtures / folder), tower=open_checkpoint(fixtures / tower))
    for probe in cases(fixtures / "E-logits" / recorded, hf=False, prefix=prefix):
        outcome = runner(probe)
        np.testing.assert_allclose(outcome.logits, expected(fixtures / "E-logits" / recorded, probe.name), **CLOSE)
        entered = load_file(next((fixtures / "E-logits" / recorded).glob("original-*"))).get(f"{probe.name}.inputs_embeds.float32")
        if entered is not None:
            np.testing.assert_allclose(outcome.hidden["embeddings"], entered[0], rtol=0, atol=1e-5)


def test_both_paths_agree_layer_by_layer(fixtures: Path) -> None:
    converted = load_forward(open_checkpoint(fixtures / "C-v1.5/hf-by-tf4.47.1"))
    original = load_original(
        open_checkpoint(fixtures / "C-v1.5/original-no-vision-bin"), tower=open_checkpoint(fixtures / "common/clip-tiny-42px")
    )
    hub_case, original_case = (cases(fixtures / "E-logits/C-v1.5", hf=hf)[0] for hf in (True, False))
    one, other = converted(hub_case), original(original_case)
    assert one.hidden.keys() == other.hidden.keys()
    for name, value in one.hidden.items():
        np.testing.assert_allclose(value, other.hidden[name], rtol=0, atol=2e-5, err_msg=name)


def test_hidden_states_name_the_first_wrong_layer(tmp_path: Path) -> None:
    text_model("llama", tmp_path)
    before = load_forward(open_checkpoint(tmp_path))(Probe("text", IDS))
    weights = load_torch_file(tmp_path / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"] *= 1.01
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    after = load_forward(open_checkpoint(tmp_path))(Probe("text", IDS))
    wrong = [name for name, value in after.hidden.items() if not np.array_equal(value, before.hidden[name])]
    assert wrong == ["layer.1", "layer.2"]


def test_only_one_leaf_has_values_at_a_time(tmp_path: Path) -> None:
    model = text_model("qwen2", tmp_path)
    runner = load_forward(open_checkpoint(tmp_path))
    assert not real_parameters(runner)
    seen: list[list[str]] = []
    for module in runner._model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_: seen.append(real_parameters(runner)), prepend=True)
    runner(Probe("text", IDS))
    leaves = {tuple(sorted({name.rpartition(".")[0] for name in names})) for names in seen}
    assert all(len(leaf) <= 1 for leaf in leaves)
    assert len(leaves - {()}) == len({name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)})
    assert not real_parameters(runner)


@pytest.mark.parametrize("kind", TEXT)
def test_large_weights_and_values_are_computed_in_pieces(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head by its rows, attention by its queries, a feed-forward by its places: the same but for the order of sums."""
    monkeypatch.setitem(TEXT, kind, (TEXT[kind][0], TEXT[kind][1] | {"vocab_size": 150_000, "tie_word_embeddings": False}))
    text_model(kind, tmp_path)
    whole = load_forward(open_checkpoint(tmp_path))(Probe("text", IDS))
    sizes: dict[str, list[int]] = {"weights": [], "queries": [], "places": []}
    read, file = Streamed.values, importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    eager = file.eager_attention_forward

    def reading(self: Streamed, *given: Any) -> torch.Tensor:
        value = read(self, *given)
        sizes["weights"].append(value.nbytes)
        return value

    def attending(module: Any, query: torch.Tensor, *given: Any, **named: Any) -> Any:
        sizes["queries"].append(query.shape[2])
        return eager(module, query, *given, **named)

    monkeypatch.setattr(Streamed, "values", reading)
    monkeypatch.setattr(file, "eager_attention_forward", attending)
    runner = load_forward(open_checkpoint(tmp_path), most=Most(weights=17_000_000, values=600))
    for layer in runner._model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda _, given, __: sizes["places"].append(given[0].shape[1]))
    pieces = runner(Probe("text", IDS))
    np.testing.assert_allclose(pieces.logits, whole.logits, rtol=0, atol=1e-4)
    assert max(sizes["weights"]) < 17_000_000 < 150_000 * 32 * 4 <= sum(sizes["weights"])
    assert set(sizes["queries"]) == {3}  # 4 heads x 12 keys x 4 bytes, of 600
    assert set(sizes["places"]) == {2}  # 64 x 4 bytes


def test_images_in_pieces_are_the_same(fixtures: Path) -> None:
    checkpoint = open_checkpoint(fixtures / "C-v1.5/hf-by-tf4.47.1")
    probe = next(probe for probe in cases(fixtures / "E-logits/C-v1.5", hf=True) if probe.sees)
    whole, pieces = (load_forward(checkpoint, most=most)(probe) for most in (Most(), Most(values=1000)))
    np.testing.assert_allclose(pieces.hidden["vision"], whole.hidden["vision"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(pieces.logits, whole.logits, rtol=0, atol=1e-5)


def test_only_the_places_that_are_asked_for_are_kept(tmp_path: Path) -> None:
    text_model("qwen2", tmp_path)
    runner = load_forward(open_checkpoint(tmp_path))
    whole = runner(Probe("text", IDS))
    some = runner(Probe("text", IDS), Places(lambda length: np.array([1, length - 2]), lambda name, length: np.array([0, length - 1])))
    assert (some.length, some.hidden.keys()) == (len(IDS), whole.hidden.keys())
    np.testing.assert_allclose(some.logits, whole.logits[[1, -2]], rtol=0, atol=1e-4)
    for name, value in some.hidden.items():
        assert np.array_equal(value, whole.hidden[name][[0, -1]]), name


def test_only_the_rows_of_the_ids_are_read(tmp_path: Path) -> None:
    text_model("llama", tmp_path)
    runner = load_forward(open_checkpoint(tmp_path))
    shapes: list[torch.Size] = []
    table = runner._model.model.embed_tokens
    table.register_forward_hook(lambda module, *_: shapes.append(module.weight.shape), prepend=True)
    runner(Probe("text", IDS))
    assert shapes == [torch.Size([len(set(IDS.tolist())), 32])]


def test_resident_reads_once_and_gives_the_same_bits(tmp_path: Path) -> None:
    text_model("mistral", tmp_path)
    streamed = load_forward(open_checkpoint(tmp_path))(Probe("text", IDS))
    runner = load_forward(open_checkpoint(tmp_path), resident=True)
    for _ in range(2):
        assert np.array_equal(runner(Probe("text", IDS)).logits, streamed.logits)
        (tmp_path / "model.safetensors").unlink(missing_ok=True)


def test_other_dtypes_round_as_transformers_does(tmp_path: Path) -> None:
    text_model("llama", tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    with torch.inference_mode():
        whole = model(torch.tensor(IDS)[None]).logits[0].float()
    outcome = load_forward(open_checkpoint(tmp_path), dtype="BF16")(Probe("text", IDS))
    assert torch.equal(torch.tensor(outcome.logits), whole)


def test_precision_settings_hold_inside_and_come_back(tmp_path: Path) -> None:
    text_model("llama", tmp_path)
    runner = load_forward(open_checkpoint(tmp_path))
    inside: list[tuple[object, ...]] = []

    def settings(*_: Any) -> tuple[object, ...]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_num_threads()

    runner._model.lm_head.register_forward_hook(lambda *_: inside.append(settings()))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        runner(Probe("text", IDS))
        assert settings()[:2] == (True, True)
        assert inside == [(False, False, torch.get_num_threads())]
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("style", ["S2", "S3", "S5"])
def test_every_style_of_names_gives_the_same_bits(style: str, fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "C-v1.5/hf-by-tf4.47.1"
    text, head, tower = "language_model.model.", "language_model.lm_head", "vision_tower.vision_model."
    rules = {
        "S2": {text: "model.language_model.", head: "lm_head", "vision_tower.": "model.vision_tower.", "multi_": "model.multi_"},
        "S3": {text: "model.language_model.", head: "lm_head", tower: "model.vision_tower.", "multi_": "model.multi_"},
        "S5": {text: "model.language_model.model.", "vision_tower.": "model.vision_tower.", "multi_": "model.multi_"},
    }

    def renamed(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in rules[style].items() if name.startswith(old)), name)

    weights = load_torch_file(source / "model.safetensors")
    save_file({renamed(name): value for name, value in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(source / "config.json", tmp_path)
    probe = cases(fixtures / "E-logits/C-v1.5", hf=True)[0]
    one, other = (load_forward(open_checkpoint(folder))(probe).logits for folder in (source, tmp_path))
    assert np.array_equal(one, other)


def test_tensors_that_are_not_the_model_are_named(tmp_path: Path) -> None:
    text_model("llama", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    lost = dict(checkpoint.tensors)
    lost["model.layers.0.extra.weight"] = lost.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(InputError) as caught:
        load_forward(replace(checkpoint, tensors=lost))
    assert "text.layers.1.mlp.up_proj.weight" in caught.value.facts["missing"]
    assert "text.layers.0.extra.weight" in caught.value.facts["without a place"]
    with pytest.raises(MismatchError, match=r"text.embed_tokens.weight.*97"):
        load_forward(replace(checkpoint, config={**checkpoint.config, "vocab_size": 98}))
    with pytest.raises(InputError, match="twice"):
        load_forward(replace(checkpoint, tensors={**lost, "model.language_model.norm.weight": lost["model.norm.weight"]}))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"},
        {"model_type": ["llama"]},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "two"},
        {"hidden_act": "no such"},
        {"rope_scaling": {"rope_type": "no such"}, "rope_parameters": {"rope_type": "no such"}},
    ],
    ids=str,
)
def test_configs_that_describe_nothing_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    text_model("llama", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(InputError):
        load_forward(replace(checkpoint, config={**checkpoint.config, **change}))


def test_no_code_of_a_checkpoint_is_looked_for(tmp_path: Path) -> None:
    text_model("llama", tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"}, "quantization_config": {"quant_method": "x"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    plain = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    probe = Probe("text", IDS)
    assert np.array_equal(load_forward(checkpoint)(probe).logits, load_forward(replace(checkpoint, config=plain))(probe).logits)


@pytest.mark.parametrize("ids", [[97], [-1], [-200], [], [[1, 2]]], ids=str)
def test_ids_without_a_row_are_refused(ids: list[Any], tmp_path: Path) -> None:
    text_model("llama", tmp_path)
    with pytest.raises(InputError):
        load_forward(open_checkpoint(tmp_path))(Probe("text", np.array(ids, np.int64)))


def test_images_without_a_place_are_refused(fixtures: Path) -> None:
    clip = open_checkpoint(fixtures / "common/clip-tiny-42px")
    checkpoint = open_checkpoint(fixtures / "C-v1.5/original-no-vision-bin")
    probe = next(probe for probe in cases(fixtures / "E-logits/C-v1.5", hf=False) if probe.pixel_values is not None)
    text = replace(probe, pixel_values=None)
    original = load_original(checkpoint, tower=clip)
    for wrong, why in ((text, "place"), (replace(probe, ids=probe.ids[probe.ids >= 0]), "place")):
        with pytest.raises(InputError, match=why):
            original(wrong)
    with pytest.raises(InputError, match="vision tower"):
        load_original(checkpoint)(probe)
    converted = load_forward(open_checkpoint(fixtures / "C-v1.5/hf-by-tf4.47.1"))
    with pytest.raises(InputError, match="does not fit"):
        converted(replace(probe, ids=np.array([1, 304, 5])))
    with pytest.raises(InputError, match="ids of probe"):
        converted(probe)


def test_layouts_and_places_that_can_not_run_are_refused(fixtures: Path, tmp_path: Path) -> None:
    original, clip = fixtures / "C-v1.5/original-no-vision-bin", fixtures / "common/clip-tiny-42px"
    with pytest.raises(InputError, match="no forward pass"):
        load_forward(open_checkpoint(original))
    with pytest.raises(InputError, match="no LLaVA"):
        load_original(open_checkpoint(clip))
    text_model("llama", tmp_path)
    for wrong in ({"dtype": "F8_E4M3"}, {"device": "cuda:99" if not torch.cuda.is_available() else "tpu"}, {"device": "cpu:0; x"}):
        with pytest.raises(UsageError):
            load_forward(open_checkpoint(tmp_path), **wrong)


def test_a_file_that_changes_under_the_forward_is_noticed(tmp_path: Path) -> None:
    text_model("llama", tmp_path)
    runner = load_forward(open_checkpoint(tmp_path))
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match="changed"):
        runner(Probe("text", IDS))


def test_a_damaged_record_is_noticed(fixtures: Path, tmp_path: Path) -> None:
    shutil.copytree(fixtures / "C-v1.5/original-no-vision-bin", tmp_path / "damaged")
    tensor = open_checkpoint(tmp_path / "damaged").tensors["model.layers.1.mlp.up_proj.weight"]
    assert isinstance(tensor, Stored)
    with open(tensor.file.path, "r+b") as file:
        file.seek(tensor.offset)
        byte = file.read(1)
        file.seek(tensor.offset)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(InputError, match="damaged"):
        load_original(open_checkpoint(tmp_path / "damaged"))(Probe("text", IDS))


def test_grids_and_crops_are_those_of_the_original() -> None:
    pinpoints = [[84, 42], [42, 84], [84, 84], [42, 126], [126, 42]]
    assert best_grid((22, 18), pinpoints, 42) == (1, 2)  # a tie: 84 wide comes first
    assert best_grid((36, 90), pinpoints, 42) == (1, 3)
    assert best_grid((80, 33), pinpoints, 42) == (2, 1)
    picture = torch.arange(6 * 6).view(6, 6, 1)
    assert torch.equal(unpad(picture, (10, 30)), picture[2:4])
    assert torch.equal(unpad(picture, (30, 10)), picture[:, 2:4])
    for bad in (None, "[(84, 42)]", [], [[0, 42]], [[84]], [[84, "42"]]):
        with pytest.raises(InputError):
            best_grid((22, 18), bad, 42)
