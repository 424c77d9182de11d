"""merge-lora against what LLaVA's scripts and PEFT wrote, across layouts, and with adapters that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.cli.toy import make_llava
from llava_weights.errors import InputError, LlavaWeightsError, MismatchError, UsageError
from llava_weights.families.layouts import BaseNames, canonical
from llava_weights.families.originals import ORIGINALS
from llava_weights.tensors.dtypes import to_dtype
from llava_weights.tensors.low_rank import Arithmetic
from llava_weights.transforms.adapter import open_adapter
from llava_weights.transforms.delta import apply_delta
from llava_weights.transforms.lora import merge_lora, open_weighted, to_arithmetic
from llava_weights.write.execute import Report, execute
from llava_weights.write.plan import make_plan


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            found |= load_file(path)
        elif path.suffix == ".bin":
            found |= torch.load(path, weights_only=True)
    return {name: tensor for name, tensor in found.items() if "inv_freq" not in name}


def different(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names that only one has, or whose values differ in a bit."""
    return sorted(set(a) ^ set(b)) + [n for n in set(a) & set(b) if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])]


def merge(base: Path, out: Path, *loras: str | Path, arithmetic: Arithmetic = "peft", **options: object) -> Report:
    merged = merge_lora(open_checkpoint(base), [open_weighted(str(lora)) for lora in loras], arithmetic=arithmetic, **options)  # type: ignore[arg-type]
    return execute(make_plan(merged, max_shard_size="100kB"), out)


# Each merge with the arithmetic that the reference README says it used (fact B 1 and 2).
LLAVA = {
    "merged-of-llava-v1.5-tiny-lora-by-main-peft0.10.0": ("llava-v1.5-tiny-lora", "peft-half"),
    "merged-of-llava-v1-tiny-lora-imstartend-by-main-peft0.10.0": ("llava-v1-tiny-lora-imstartend", "peft-half"),
    "merged-of-llava-v1-tiny-lora-imstartend-by-v1.0.2": ("llava-v1-tiny-lora-imstartend", "peft"),
}


@pytest.mark.parametrize("expected", LLAVA)
def test_llavas_own_merges(fixtures: Path, tmp_path: Path, expected: str) -> None:
    adapter, arithmetic = LLAVA[expected]
    folder = fixtures / "B-lora"
    merge(folder / "base-vicuna-tiny", tmp_path / "out", folder / adapter, arithmetic=to_arithmetic(arithmetic))
    original_tensors = {name: tensor for name, tensor in tensors_of(folder / expected).items() if "vision_tower" not in name}
    assert different(tensors_of(tmp_path / "out"), original_tensors) == []
    found, original = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "out", folder / expected))
    for key in ("architectures", "vocab_size", "mm_hidden_size", "mm_use_im_start_end", "mm_vision_tower", "hidden_size", "eos_token_id"):
        assert found[key] == original[key]
    if "imstartend" in adapter:
        tokens = json.loads((folder / expected / "added_tokens.json").read_text())
        assert json.loads((tmp_path / "out/added_tokens.json").read_text()) == tokens


PEFT = ["plain", "rslora", "dora", "patterns", "modules-to-save", "embedding-lora"]


@pytest.mark.parametrize("base", ["base-fp32", "base-fp16"])
@pytest.mark.parametrize("case", PEFT)
def test_pefts_own_merges(fixtures: Path, tmp_path: Path, case: str, base: str) -> None:
    folder = fixtures / "F-peft"
    if (case, base) == ("modules-to-save", "base-fp16"):
        base = "base-fp32"  # the reference has only that one
    merge(folder / base, tmp_path / "out", folder / case / "adapter")
    assert different(tensors_of(tmp_path / "out"), load_file(folder / case / f"merged-{base}.safetensors")) == []


def test_loha_is_refused_by_name(fixtures: Path) -> None:
    with pytest.raises(InputError, match="LoHa"):
        open_adapter(fixtures / "F-peft/not-lora-loha/adapter")


def edited(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of an adapter with other tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    return target


def test_a_tensor_without_a_place_stops_everything(fixtures: Path, tmp_path: Path) -> None:
    plain, base = fixtures / "F-peft/plain/adapter", fixtures / "F-peft/base-fp32"

    def extra(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(6, 24)
        tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight"] = torch.zeros(24, 6)

    def misnamed(tensors: dict[str, torch.Tensor]) -> None:
        for part in "AB":
            old = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"
            tensors[old.replace("q_proj", "query")] = tensors.pop(old)

    def strange(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"] = torch.zeros(2)

    for name, change, words in (
        ("extra", extra, "layers.7.self_attn.q_proj"),
        ("misnamed", misnamed, "query"),
        ("strange", strange, "lora_C"),
    ):
        adapter = edited(plain, tmp_path / name, change)
        with pytest.raises(InputError, match=words) as caught:
            merge(base, tmp_path / "out", adapter)
        assert caught.value.exit_code == 3
    assert not list(tmp_path.glob("out*"))


def test_another_size_is_refused(fixtures: Path, tmp_path: Path) -> None:
    with pytest.raises(LlavaWeightsError, match=r"does not fit|not in the base"):
        merge(fixtures / "B-lora/base-vicuna-tiny", tmp_path / "out", fixtures / "F-peft/plain/adapter")


def hub_style(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reference LLaVA v1.5 under llava-hf's names, by the table of the reference README (fact C 1)."""
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in (
            ("model.mm_projector.0", "multi_modal_projector.linear_1"),
            ("model.mm_projector.2", "multi_modal_projector.linear_2"),
            ("lm_head", "language_model.lm_head"),
            ("model.vision_tower.vision_tower.", "vision_tower."),
            ("model.", "language_model.model."),
        ):
            if name.startswith(old):
                renamed[new + name.removeprefix(old)] = tensor
                break
    return renamed


@pytest.mark.parametrize("names", ["Hub style", "transformers 4.52"])
def test_an_adapter_finds_its_base_in_another_layout(fixtures: Path, tmp_path: Path, names: str) -> None:
    """A LLaVA adapter, with its projector, onto llava-hf names: the same values as onto the original names."""
    folder = fixtures / "B-lora"
    base = tensors_of(folder / "merged-of-llava-v1.5-tiny-lora-by-main-peft0.10.0")
    base = {name: tensor * 0 if "mm_projector" in name else tensor for name, tensor in base.items()}
    (tmp_path / "original").mkdir()
    (tmp_path / "renamed").mkdir()
    save_file(base, tmp_path / "original/model.safetensors")
    renamed = hub_style(base)
    if names != "Hub style":
        renamed = {
            "lm_head.weight" if "lm_head" in name else "model." + name.replace("language_model.model", "language_model"): tensor
            for name, tensor in renamed.items()
        }
    save_file(renamed, tmp_path / "renamed/model.safetensors")
    for name in ("original", "renamed"):
        merge(tmp_path / name, tmp_path / f"{name}-out", folder / "llava-v1.5-tiny-lora")
    found = {canonical(name): tensor for name, tensor in tensors_of(tmp_path / "renamed-out").items()}
    expected = {canonical(name): tensor for name, tensor in tensors_of(tmp_path / "original-out").items()}
    assert different(found, expected) == []
    assert set(tensors_of(tmp_path / "renamed-out")) == set(renamed)
    assert len(different(expected, {canonical(name): tensor for name, tensor in base.items()})) == 18  # 14 modules, 4 of the projector


def test_canonical_names_are_one_to_one(fixtures: Path) -> None:
    """Every name of the reference layouts has a canonical form of its own, and the layouts agree on it."""
    original = open_checkpoint(fixtures / "B-lora/merged-of-llava-v1.5-tiny-lora-by-main-peft0.10.0").tensors
    hub = hub_style(dict.fromkeys(original, torch.zeros(1)))
    assert len({canonical(name) for name in original}) == len(original)
    assert {canonical(name) for name in original} == {canonical(name) for name in hub}
    found, lost = BaseNames(hub).match(original)
    assert (len(found), lost) == (len(original), [])


def test_several_adapters_are_summed_before_the_rounding(fixtures: Path, tmp_path: Path) -> None:
    folder = fixtures / "F-peft"
    merge(folder / "base-fp16", tmp_path / "out", folder / "plain/adapter", f"{folder / 'rslora/adapter'}@0.5")
    base, name = load_file(folder / "base-fp16/model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    total = base[name].double()
    for case, weight in (("plain", 1.0), ("rslora", 0.5)):
        config = json.loads((folder / case / "adapter/adapter_config.json").read_text())
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        factors = load_file(folder / case / "adapter/adapter_model.safetensors")
        a, b = (factors[f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight"].double() for part in "AB")
        total += weight * scale * (b @ a)
    merged = tensors_of(tmp_path / "out")[name]
    assert (merged != total.half()).sum() <= 1  # fp64 here, fp32 there


def test_weights_and_scale_multiply(fixtures: Path, tmp_path: Path) -> None:
    folder = fixtures / "F-peft"
    merge(folder / "base-fp32", tmp_path / "a", f"{folder / 'plain/adapter'}@0.5", scale=4.0)
    merge(folder / "base-fp32", tmp_path / "b", folder / "plain/adapter", scale=2.0)
    assert different(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")) == []


def test_a_tied_head_gets_its_own_weights(fixtures: Path, tmp_path: Path) -> None:
    """An adapter on the head of a tied model: the embedding stays, the head is written, the config says untied."""
    folder, base = fixtures / "F-peft", tmp_path / "tied"
    base.mkdir()
    tensors = load_file(folder / "base-fp32/model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, base / "model.safetensors")
    config = json.loads((folder / "base-fp32/config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))

    def head_only(factors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in factors if "lm_head.lora" not in name]:
            del factors[name]

    adapter = edited(folder / "embedding-lora/adapter", tmp_path / "head", head_only)
    merge(base, tmp_path / "out", adapter)
    merged = tensors_of(tmp_path / "out")
    assert torch.equal(merged["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_rows_that_nobody_holds_are_refused(fixtures: Path, tmp_path: Path) -> None:
    """The original merges uninitialised memory where an adapter speaks of added tokens and brings no rows for them."""
    adapter = tmp_path / "adapter"
    shutil.copytree(fixtures / "B-lora/llava-v1-tiny-lora-imstartend", adapter)
    kept = {k: v for k, v in torch.load(adapter / "non_lora_trainables.bin", weights_only=True).items() if "mm_projector" in k}
    torch.save(kept, adapter / "non_lora_trainables.bin")
    with pytest.raises(MismatchError, match="307 rows of vocabulary"):
        merge(fixtures / "B-lora/base-vicuna-tiny", tmp_path / "out", adapter)


def test_one_pass_is_step_by_step(fixtures: Path, tmp_path: Path) -> None:
    base, delta = (open_checkpoint(fixtures / "A-delta-v0" / name) for name in ("base-hf-bin", "delta-307-apr17"))
    adapter = open_adapter(edited_r48(fixtures, tmp_path))
    execute(make_plan(merge_lora(apply_delta(base, delta), [adapter])), tmp_path / "one")
    execute(make_plan(apply_delta(base, delta)), tmp_path / "first")
    execute(make_plan(merge_lora(open_checkpoint(tmp_path / "first"), [adapter])), tmp_path / "second")
    for name in (
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.model",
        "added_tokens.json",
        "tokenizer_config.json",
    ):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def edited_r48(fixtures: Path, tmp_path: Path) -> Path:
    """The v1.5 adapter without its projector: what fine-tuning the merged v0 model might leave."""
    target = tmp_path / "plain-lora"
    target.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(fixtures / "B-lora/llava-v1.5-tiny-lora" / name, target)
    return target


def test_another_kind_of_projector_takes_the_place_of_the_old_one(fixtures: Path, tmp_path: Path) -> None:
    """An adapter with an mlp2x_gelu projector onto a merged v0 model, whose projector is one linear layer."""
    base = fixtures / "B-lora/merged-of-llava-v1-tiny-lora-imstartend-by-v1.0.2"
    (tmp_path / "base").mkdir()
    save_file({n: t for n, t in tensors_of(base).items() if "vision_tower" not in n}, tmp_path / "base/model.safetensors")
    for path in base.glob("*.json"):
        shutil.copy(path, tmp_path / "base")
    shutil.copy(base / "tokenizer.model", tmp_path / "base")
    merge(tmp_path / "base", tmp_path / "out", fixtures / "B-lora/llava-v1.5-tiny-lora")
    names = sorted(name for name in tensors_of(tmp_path / "out") if "projector" in name)
    assert names == [f"model.mm_projector.{part}" for part in ("0.bias", "0.weight", "2.bias", "2.weight")]
    assert json.loads((tmp_path / "out/config.json").read_text())["mm_projector_type"] == "mlp2x_gelu"


def test_dtype_of_the_output(fixtures: Path, tmp_path: Path) -> None:
    folder = fixtures / "F-peft"
    merge(folder / "base-fp16", tmp_path / "out", folder / "plain/adapter", dtype="F32")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.float32}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


def test_retention_is_counted(fixtures: Path, tmp_path: Path) -> None:
    """An update far below a bfloat16's last digit: hardly a value moves."""
    folder = fixtures / "F-peft"
    tallies = merge(folder / "base-fp16", tmp_path / "tiny", folder / "plain/adapter", scale=1e-4, dtype="BF16").tallies
    assert 0 < tallies["moved"] < 0.2 * tallies["updated"]
    whole = merge(folder / "base-fp32", tmp_path / "whole", folder / "plain/adapter").tallies
    assert whole["moved"] > 0.99 * whole["updated"]
    assert whole["lost_sq"] < 1e-9 * whole["update_sq"]


def test_exact_gives_the_same_digest_everywhere(fixtures: Path, tmp_path: Path) -> None:
    folder = fixtures / "F-peft"
    roots = set()
    for number, options in enumerate(({"jobs": 1}, {"jobs": 3}, {"max_memory": "320MB"})):
        merged = merge_lora(open_checkpoint(folder / "base-fp16"), [open_adapter(folder / "plain/adapter")], arithmetic="exact")
        roots.add(execute(make_plan(merged, **options), tmp_path / str(number)).root)  # type: ignore[arg-type]
    assert len(roots) == 1


def test_bad_words(fixtures: Path) -> None:
    with pytest.raises(UsageError, match="no arithmetic `fast`"):
        to_arithmetic("fast")
    with pytest.raises(UsageError, match="no output dtype `int8`"):
        to_dtype("int8")
    assert open_weighted(f"{fixtures / 'F-peft/plain/adapter'}@-0.25")[1] == -0.25


def test_square_experts_are_refused(tmp_path: Path) -> None:
    """Which way they are stored decides the result, and neither names nor shapes tell."""
    from llava_weights.formats.safetensors import index_safetensors
    from llava_weights.tensors.low_rank import LowRank
    from llava_weights.transforms.lora import oriented

    save_file(
        {"w": torch.zeros(2, 8, 8), "wide": torch.zeros(2, 8, 6), "a": torch.zeros(4, 8), "b": torch.zeros(8, 4)},
        tmp_path / "x.safetensors",
    )
    found = index_safetensors(tmp_path / "x.safetensors")[0]
    update = LowRank(kind="parameter", a=found["a"], b=found["b"], scale=1.0)
    with pytest.raises(MismatchError, match="square"):
        oriented(update, found["w"])


def test_a_projector_alone_onto_a_text_model(fixtures: Path, tmp_path: Path) -> None:
    folder = fixtures / "B-lora"
    trained = torch.load(folder / "llava-v1.5-tiny-lora/non_lora_trainables.bin", weights_only=True)
    (tmp_path / "projector").mkdir()
    torch.save({name.removeprefix("base_model.model."): t for name, t in trained.items()}, tmp_path / "projector/mm_projector.bin")
    merged = merge_lora(open_checkpoint(folder / "base-vicuna-tiny"), [open_adapter(tmp_path / "projector")])
    assert any("mm_vision_tower" in warning for warning in merged.history[-1].warnings)
    execute(make_plan(merged), tmp_path / "out")
    expected = tensors_of(folder / "base-vicuna-tiny") | {name.removeprefix("base_model.model."): t.half() for name, t in trained.items()}
    assert different(tensors_of(tmp_path / "out"), expected) == []
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["mm_projector_type"], config["mm_hidden_size"]) == ("llava", "mlp2x_gelu", 24)


def test_a_base_of_vip_llava_in_its_own_layout(tmp_path: Path) -> None:
    """Whose projector has names of its own."""
    make_llava(tmp_path, next(row for row in ORIGINALS if row.name == "ViP-LLaVA"))
    (tmp_path / "lora").mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    rows, columns = open_checkpoint(tmp_path / "llava").tensors["model.layers.0.self_attn.q_proj.weight"].shape
    save_file(
        {f"{name}.lora_A.weight": torch.rand(2, columns), f"{name}.lora_B.weight": torch.rand(rows, 2)},
        tmp_path / "lora/adapter_model.safetensors",
    )
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    merged = merge_lora(tmp_path / "llava", tmp_path / "lora")
    assert merged.config["mm_projector_type"] == "mlp2x_gelu"
    assert merged.config["mm_hidden_size"] == merged.tensors["model.mm_projector.final_linear.0.weight"].shape[1]
