"""One adapter under the names of every trainer, onto one base under the names of every version: always the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_weights as lw
from llava_weights.errors import InputError
from llava_weights.families.layouts import canonical

Tensors = dict[str, torch.Tensor]
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def to_hub(name: str) -> str:
    """The original's name as the Hub writes it."""
    for old, new in (
        ("model.mm_projector.0", "multi_modal_projector.linear_1"),
        ("model.mm_projector.2", "multi_modal_projector.linear_2"),
        ("lm_head", "language_model.lm_head"),
        ("model.", "language_model.model."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise AssertionError(name)


def to_five(name: str) -> str:
    """As transformers 4.52 and later call it in memory."""
    hub = to_hub(name)
    return (
        "lm_head" + hub.removeprefix("language_model.lm_head")
        if "lm_head" in hub
        else "model." + hub.replace("language_model.model", "language_model")
    )


# How a trainer may have named what the original calls `name`: the whole model, the model without its head, the text model alone.
STYLES: dict[str, Callable[[str], str]] = {
    "original": lambda name: name,
    "original, without model.": lambda name: name.removeprefix("model."),
    "original, twice model.": lambda name: name if name.startswith("lm_head") else f"model.{name}",
    "Hub": to_hub,
    "Hub, twice model.": lambda name: f"model.{to_hub(name)}" if "projector" in name else to_hub(name),
    "transformers 5": to_five,
    "transformers 5, without model.": lambda name: to_five(name).removeprefix("model."),
    "transformers 5.4": lambda name: f"model.{to_hub(name)}",
}
WRAPPED: dict[str, Callable[[str], str]] = {
    "PEFT": lambda name: f"base_model.model.{name}",
    "bare": lambda name: name,
    "twice PEFT": lambda name: f"base_model.model.base_model.model.{name}",
    "compiled": lambda name: f"_orig_mod.base_model.model.{name}",
    "compiled within": lambda name: f"base_model.model._orig_mod.{name}",
    "parallel": lambda name: f"module.base_model.model.{name}",
    "parallel, compiled": lambda name: f"_orig_mod.module.base_model.model.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.base_model.model.{name.replace('self_attn', '_fsdp_wrapped_module.self_attn')}",
}


@pytest.fixture(scope="module")
def whole(fixtures: Path) -> Tensors:
    """A LLaVA of the original layout without its tower."""
    folder = fixtures / "B-lora/merged-of-llava-v1.5-tiny-lora-by-main-peft0.10.0"
    return {name: tensor for path in folder.glob("*.bin") for name, tensor in torch.load(path).items() if "vision_tower" not in name} or {
        name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items() if "vision_tower" not in name
    }


def with_small_files(folder: Path, source: Path) -> Path:
    for path in source.iterdir():
        if path.suffix in (".json", ".model") and "index" not in path.name:
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def bases(fixtures: Path, whole: Tensors, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for style in ("original", "Hub", "transformers 5", "transformers 5.4"):
        folder = tmp_path_factory.mktemp("base")
        save_file({STYLES[style](name): tensor for name, tensor in whole.items()}, folder / "model.safetensors")
        found[style] = folder
    with_small_files(found["original"], fixtures / "B-lora/merged-of-llava-v1.5-tiny-lora-by-main-peft0.10.0")
    return found


def parts(whole: Tensors) -> tuple[Tensors, Tensors]:
    """LoRA of two modules and of the head, by the original's names; and a tuned projector."""
    generator = torch.Generator().manual_seed(5)
    factors = {}
    for module in (Q, V, "lm_head"):
        out, inside = whole[f"{module}.weight"].shape
        factors[f"{module}.lora_A"] = torch.randn(2, inside, generator=generator)
        factors[f"{module}.lora_B"] = torch.randn(out, 2, generator=generator) / 100
    return factors, {name: tensor * 2 for name, tensor in whole.items() if "mm_projector" in name}


def adapter(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}))
    return folder


def merged(base: Path, lora: Path, out: Path) -> Tensors:
    lw.execute(lw.make_plan(lw.merge_lora(base, lora)), out)
    return {canonical(name): tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def expected(whole: Tensors) -> Tensors:
    factors, replaced = parts(whole)
    tensors = {**whole, **replaced}
    for module in (Q, V, "lm_head"):
        weight = whole[f"{module}.weight"]
        tensors[f"{module}.weight"] = (weight.float() + factors[f"{module}.lora_B"] @ factors[f"{module}.lora_A"]).to(weight.dtype)
    return {canonical(name): tensor for name, tensor in tensors.items()}


def check(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("base", ["original", "Hub", "transformers 5", "transformers 5.4"])
@pytest.mark.parametrize("style", STYLES)
def test_the_place_does_not_depend_on_the_names(
    tmp_path: Path, bases: dict[str, Path], whole: Tensors, expected: Tensors, style: str, base: str
) -> None:
    factors, replaced = parts(whole)
    for number, (wrap, between) in enumerate((w, b) for w in ("PEFT", "bare") for b in ("", ".default")):
        named = {WRAPPED[wrap](STYLES[style](name)) + f"{between}.weight": tensor for name, tensor in factors.items()}
        saved = "" if not between else ".modules_to_save.default"
        for name, tensor in replaced.items():
            module, _, end = STYLES[style](name).rpartition(".")
            named[WRAPPED[wrap](f"{module}{saved}.{end}")] = tensor
        lora = adapter(tmp_path / f"lora{number}", named)
        check(merged(bases[base], lora, tmp_path / f"out{number}"), expected)


@pytest.mark.parametrize("wrap", WRAPPED)
def test_what_wrappers_put_before_names_is_no_part_of_them(
    tmp_path: Path, bases: dict[str, Path], whole: Tensors, expected: Tensors, wrap: str
) -> None:
    factors, replaced = parts(whole)
    named = {WRAPPED[wrap](name) + ".weight": tensor for name, tensor in factors.items()}
    lora = adapter(tmp_path / "lora", named | {WRAPPED[wrap](name): tensor for name, tensor in replaced.items()})
    check(merged(bases["Hub"], lora, tmp_path / "out"), expected)


@pytest.mark.parametrize("style", ["Hub", "transformers 5", "original, without model."])
def test_a_projector_under_any_name_is_new_to_a_text_model(
    tmp_path: Path, fixtures: Path, whole: Tensors, expected: Tensors, style: str
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    with_small_files(folder, fixtures / "B-lora/base-vicuna-tiny")
    save_file({name: tensor for name, tensor in whole.items() if "mm_projector" not in name}, folder / "model.safetensors")
    factors, replaced = parts(whole)
    named = {f"base_model.model.{STYLES[style](name)}.weight": tensor for name, tensor in factors.items()}
    lora = adapter(tmp_path / "lora", named | {f"base_model.model.{STYLES[style](name)}": tensor for name, tensor in replaced.items()})
    found = merged(folder, lora, tmp_path / "out")
    check(found, expected)
    assert "model.mm_projector.0.weight" in load_file(tmp_path / "out/model.safetensors")


# --- several in one place -------------------------------------------------------------------------------------------


def two(whole: Tensors) -> tuple[Tensors, Tensors]:
    factors, _ = parts(whole)
    named = {f"base_model.model.{name}.default.weight": tensor for name, tensor in factors.items()}
    return named, {name.replace(".default.", ".reference."): tensor * 3 for name, tensor in named.items()}


def test_one_of_several_adapters_is_chosen(tmp_path: Path, bases: dict[str, Path], whole: Tensors, cli: Any) -> None:
    first, second = two(whole)
    both, one = adapter(tmp_path / "both", first | second), adapter(tmp_path / "one", second)
    assert lw.open_adapter(both, adapter="reference").modules[0].name == lw.open_adapter(one).modules[0].name
    expected = merged(bases["original"], one, tmp_path / "expected")
    code, _, _ = cli("merge-lora", "--base", bases["original"], "--lora", both, "--adapter", "reference", "-o", "out")
    assert code == 0
    check({canonical(name): tensor for name, tensor in load_file(tmp_path / "out/model.safetensors").items()}, expected)
    code, _, error = cli("merge-lora", "--base", bases["original"], "--lora", both, "-o", "no")
    assert code == 3
    assert "--adapter default" in error
    assert "`reference`" in error
    with pytest.raises(InputError, match="no adapter `third`") as refused:
        lw.open_adapter(both, adapter="third")
    assert "`default`" in str(refused.value)
    assert lw.open_adapter(one, adapter="reference").modules == lw.open_adapter(one).modules
    for which, words in ((both, ["--adapter", "reference"]), (one, [])):
        assert cli("convert-lora", which, *words, "--to", "llava", "-o", f"lora-{which.name}")[0] == 0
    check(load_file(tmp_path / "lora-both/adapter_model.safetensors"), load_file(tmp_path / "lora-one/adapter_model.safetensors"))


def test_the_folder_of_a_named_adapter_is_chosen(tmp_path: Path, whole: Tensors) -> None:
    factors, _ = parts(whole)
    run = adapter(tmp_path / "run", {f"base_model.model.{name}.weight": tensor for name, tensor in factors.items()})
    shutil.copytree(run, run / "second")
    assert lw.open_adapter(run, adapter="second").modules == lw.open_adapter(run / "second").modules
    with pytest.raises(InputError, match="no adapter `third`"):
        lw.open_adapter(run, adapter="third")


# --- MLX --------------------------------------------------------------------------------------------------------------


def mlx(folder: Path, factors: Tensors, style: str, *, more: Tensors | None = None, dora: Tensors | None = None, **config: Any) -> Path:
    folder.mkdir()
    named = {}
    for name, tensor in factors.items():
        module, _, part = name.rpartition(".")
        named[f"{STYLES[style](module)}.{part.lower()}"] = tensor.T.contiguous()
    named |= {f"{STYLES[style](module)}.m": tensor for module, tensor in (dora or {}).items()}
    save_file(named | (more or {}), folder / "adapters.safetensors")
    save_file(named, folder / "0000100_adapters.safetensors")
    settings = {"rank": 2, "scale": 3.0, "dropout": 0.0}
    kind = "dora" if dora else "lora"
    (folder / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": kind, "num_layers": 8, "lora_parameters": settings, "model": "me/base", **config})
    )
    return folder


@pytest.mark.parametrize("style", ["original", "Hub", "transformers 5"])
def test_an_adapter_of_mlx_is_merged_by_its_formula(tmp_path: Path, bases: dict[str, Path], whole: Tensors, style: str) -> None:
    factors, _ = parts(whole)
    lora = mlx(tmp_path / "mlx", factors, style)
    opened = lw.open_adapter(lora)
    assert [each.scale for each in opened.modules] == [3.0] * 3
    found = merged(bases["Hub"], lora, tmp_path / "out")
    for module in (Q, V, "lm_head"):
        weight = whole[f"{module}.weight"]
        update = ((3.0 * factors[f"{module}.lora_B"]) @ factors[f"{module}.lora_A"]).to(weight.dtype)
        assert torch.equal(found[canonical(f"{module}.weight")], weight + update)


def test_an_adapter_of_mlx_becomes_one_of_peft(tmp_path: Path, whole: Tensors) -> None:
    """Its factors turned, its scale as alpha; the merge of it is PEFT's, which the plan says."""
    factors = {name: tensor for name, tensor in parts(whole)[0].items() if "layers" in name}  # tables want a base
    lora = mlx(tmp_path / "mlx", factors, "Hub")
    made = lw.convert_lora(lora, "llava")
    assert any("MLX" in note for note in made.history[-1].notes)
    lw.execute(lw.make_plan(made), tmp_path / "out")
    there = {module.name: module for module in lw.open_adapter(tmp_path / "out").modules}
    for module in lw.open_adapter(lora).modules:
        turned = next(each for name, each in there.items() if canonical(f"{name}.weight") == canonical(f"{module.name}.weight"))
        assert (turned.scale, turned.rank, turned.mlx) == (module.scale, module.rank, False)


def test_a_dora_of_mlx_takes_its_norms_of_the_rounded_sum(tmp_path: Path, bases: dict[str, Path], whole: Tensors) -> None:
    factors, _ = parts(whole)
    factors = {name: tensor for name, tensor in factors.items() if "self_attn" in name}
    dora = {module: whole[f"{module}.weight"].float().norm(dim=1) * 1.1 for module in (Q, V)}
    found = merged(bases["original"], mlx(tmp_path / "mlx", factors, "Hub", dora=dora), tmp_path / "out")
    for module in (Q, V):
        weight = whole[f"{module}.weight"]
        moved = (weight + ((3.0 * factors[f"{module}.lora_B"]) @ factors[f"{module}.lora_A"]).to(weight.dtype)).float()
        expected = (dora[module] / torch.linalg.vector_norm(moved, dim=1))[:, None] * moved
        assert torch.equal(found[canonical(f"{module}.weight")], expected.to(weight.dtype))


def test_a_tuned_projector_in_a_file_of_mlx_is_used(tmp_path: Path, bases: dict[str, Path], whole: Tensors) -> None:
    factors, replaced = parts(whole)
    lora = mlx(tmp_path / "mlx", factors, "Hub", more={to_hub(name): tensor for name, tensor in replaced.items()})
    found = merged(bases["original"], lora, tmp_path / "out")
    assert all(torch.equal(found[canonical(name)], tensor) for name, tensor in replaced.items())


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"fine_tune_type": "full"}, "`full`"),
        ({"lora_parameters": {"rank": 2, "alpha": 16}}, "lora_parameters.scale"),
        ({"lora_parameters": {"rank": 0, "scale": 1}}, "lora_parameters.rank"),
        ({"lora_parameters": {"rank": 3, "scale": 1}}, "the rank"),
        ({"fine_tune_type": "dora"}, "all parts"),
    ],
)
def test_what_mlx_does_otherwise_is_refused_by_name(tmp_path: Path, whole: Tensors, config: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as refused:
        lw.open_adapter(mlx(tmp_path / "mlx", parts(whole)[0], "Hub", **config))
    assert named in str(refused.value)


def test_experts_and_kernels_of_mlx_are_refused_by_name(tmp_path: Path, whole: Tensors) -> None:
    factors = parts(whole)[0]
    experts = {
        "model.layers.0.mlp.switch_mlp.up_proj.lora_a": torch.rand(4, 2, 8),
        "model.layers.0.mlp.switch_mlp.up_proj.lora_b": torch.rand(4, 8, 2),
    }
    with pytest.raises(InputError, match="no two matrices") as refused:
        lw.open_adapter(mlx(tmp_path / "experts", factors, "Hub", more=experts))
    assert "switch_mlp" in str(refused.value)
    kernel = {"vision_tower.vision_model.embeddings.patch_embedding.weight": torch.rand(2, 3, 3, 3)}
    with pytest.raises(InputError, match="patch_embedding"):
        lw.open_adapter(mlx(tmp_path / "kernel", factors, "Hub", more=kernel))
    with pytest.raises(InputError, match="no name"):
        lw.open_adapter(mlx(tmp_path / "named", factors, "Hub"), adapter="default")
