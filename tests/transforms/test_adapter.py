"""Adapters as PEFT and LLaVA write them: every tensor gets the place that PEFT gives it, or the adapter is refused by name."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from llava_weights.errors import InputError
from llava_weights.storage.hub import FetchedRepo, HubSource
from llava_weights.storage.reading import Workspace
from llava_weights.tensors.lazy import LazyTensor, read_rows
from llava_weights.transforms.adapter import Adapter, open_adapter
from llava_weights.transforms.adapter_config import LoraRules, quantised_base, read_rules, short_base

Tensors = dict[str, torch.Tensor]
Q = "base_model.model.model.layers.0.self_attn.q_proj"
CASES = ("plain", "rslora", "dora", "patterns", "modules-to-save", "embedding-lora")
LORAS = ("llava-v1.5-tiny-lora", "llava-v1-tiny-lora-imstartend")


def lora(name: str = Q, rank: int = 2, **more: torch.Tensor) -> Tensors:
    """The tensors of one adapted linear module of shape [6, 4]."""
    return {f"{name}.lora_A.weight": torch.rand(rank, 4), f"{name}.lora_B.weight": torch.rand(6, rank), **more}


def write(folder: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """An adapter of rank 2 and alpha 3 in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora() if tensors is None else tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config}))
    return folder


def same(tensor: LazyTensor, expected: torch.Tensor) -> bool:
    """Whether the lazy tensor is that one, values and all."""
    with closing(Workspace()) as work:
        found = torch.from_numpy(read_rows(tensor, 0, tensor.rows, work).copy()).reshape(tensor.shape)
    return tensor.shape == tuple(expected.shape) and torch.equal(found, expected.float())


def refusal(folder: Path, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        open_adapter(folder, **options)
    return caught.value


def all_text(error: InputError) -> str:
    return "\n".join([error.what, *error.facts.values(), error.hint or ""])


# --- folders of LLaVA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LORAS)
def test_llava_folder(fixtures: Path, name: str) -> None:
    folder = fixtures / "B-lora" / name
    adapter = open_adapter(folder)
    stored = torch.load(folder / "non_lora_trainables.bin")
    assert len(adapter.modules) == 14
    assert {(module.kind, module.rank, module.scale) for module in adapter.modules} == {("linear", 4, 3.0)}
    assert {f"base_model.model.{key}" for key in adapter.replacements} == stored.keys()
    assert all(same(tensor, stored[f"base_model.model.{key}"]) for key, tensor in adapter.replacements.items())
    assert adapter.config["mm_vision_tower"] == "common/clip-tiny-28px"
    assert adapter.peft["base_model_name_or_path"] == "B-lora/base-vicuna-tiny"
    assert {Path(file.path).name for file in adapter.origin.files} >= {"non_lora_trainables.bin"}
    assert open_adapter(next(folder.glob("adapter_model.*"))).modules == adapter.modules


def test_factors_are_those_of_the_file(fixtures: Path) -> None:
    folder = fixtures / "B-lora" / LORAS[0]
    stored = load_file(folder / "adapter_model.safetensors")
    for module in open_adapter(folder).modules:
        assert same(module.a, stored[f"base_model.model.{module.name}.lora_A.weight"])
        assert same(module.b, stored[f"base_model.model.{module.name}.lora_B.weight"])


@pytest.fixture
def llava(tmp_path: Path, fixtures: Path) -> Path:
    """A copy of a LLaVA LoRA that may be changed."""
    return Path(shutil.copytree(fixtures / "B-lora" / LORAS[0], tmp_path / "run"))


def checkpoint(run: Path, *, state: bool = True) -> Path:
    """What the Trainer leaves in `checkpoint-8`: the adapter, its own state, and neither config nor projector."""
    folder = run / "checkpoint-8"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / name, folder)
    if state:
        (folder / "trainer_state.json").write_text("{}")
    return folder


def test_checkpoint_points_to_the_folder_above(llava: Path) -> None:
    folder = checkpoint(llava)
    above = llava / "non_lora_trainables.bin"
    assert f"--non-lora {above}" in str(refusal(folder).hint)
    adapter = open_adapter(folder, non_lora=above)
    assert adapter.replacements == open_adapter(llava).replacements
    assert adapter.config == open_adapter(llava).config
    above.unlink()
    assert "zero_to_fp32.py" in str(refusal(folder).hint)


def test_finished_folder_without_the_file(llava: Path) -> None:
    (llava / "non_lora_trainables.bin").unlink()
    assert "non_lora_trainables.bin" in refusal(llava).what


def test_checkpoint_name_alone_is_no_evidence(llava: Path, tmp_path: Path) -> None:
    assert open_adapter(checkpoint(llava, state=False)).replacements == {}
    plain = write(tmp_path / "text" / "checkpoint-8")
    (plain / "trainer_state.json").write_text("{}")
    (tmp_path / "text" / "config.json").write_text('{"model_type": "llama"}')
    adapter = open_adapter(plain)
    assert len(adapter.modules) == 1
    assert any("--non-lora" in note for note in adapter.notes)


def test_prefix_rule_drops_a_second_model_only_if_some_name_has_two(tmp_path: Path) -> None:
    folder = write(tmp_path)
    one, two = "base_model.model.lm_head.weight", "base_model.model.model.image_newline"
    torch.save({one: torch.rand(3, 4), two: torch.rand(4)}, folder / "non_lora_trainables.bin")
    assert set(open_adapter(folder).replacements) == {"lm_head.weight", "model.image_newline"}
    torch.save({one: torch.rand(3, 4)}, folder / "non_lora_trainables.bin")
    assert set(open_adapter(folder).replacements) == {"model.lm_head.weight"}


def test_empty_non_lora_is_legal(llava: Path) -> None:
    torch.save({}, llava / "non_lora_trainables.bin")
    adapter = open_adapter(llava)
    assert adapter.replacements == {}
    assert any("is empty" in note for note in adapter.notes)


def test_what_both_files_hold_comes_from_the_adapter(tmp_path: Path) -> None:
    """train.py with `bias=all` writes the biases twice; a consolidated ZeRO-3 state holds the LoRA too."""
    bias = f"{Q}.base_layer.bias"
    tensors = lora() | {bias: torch.rand(6)}
    folder = write(tmp_path, tensors, bias="all")
    dump = {key.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"): tensor for key, tensor in tensors.items()}
    torch.save(dump | {bias: torch.rand(6)}, folder / "non_lora_trainables.bin")
    adapter = open_adapter(folder)
    assert same(adapter.replacements["model.layers.0.self_attn.q_proj.bias"], tensors[bias])
    assert any("in both files" in note for note in adapter.notes)
    torch.save({f"{Q}.lora_A.weight": torch.rand(2, 4), f"{Q}x.lora_A.weight": torch.rand(2, 4)}, folder / "non_lora_trainables.bin")
    assert "q_projx" in refusal(folder).what


@pytest.mark.parametrize("file", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_zero_3_leftovers_are_named(llava: Path, file: str) -> None:
    (llava / "adapter_model.safetensors").rename(llava / "kept")
    tensors = load_file(llava / "kept")
    torch.save({key: tensor.float() for key, tensor in tensors.items()}, llava / "adapter_model.bin")
    stored = torch.load(llava / file)
    torch.save({key: torch.empty(0) for key in stored}, llava / file)
    error = refusal(llava)
    assert "zero_to_fp32.py" in str(error.hint)
    assert ("layers.{0,1}" if file.startswith("adapter") else "mm_projector.{0,2}") in error.facts["tensors"]


def test_from_the_hub(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(source: HubSource, *, revision: str | None, progress: bool | None) -> FetchedRepo:
        asked.append((source, revision))
        return FetchedRepo(llava, source.repo_id, "0" * 40, from_cache=True)

    monkeypatch.setattr("llava_weights.transforms.adapter.fetch", fetch)
    adapter = open_adapter("someone/llava-lora", revision="v2")
    assert asked == [(HubSource("someone/llava-lora"), "v2")]
    assert (adapter.origin.name, adapter.origin.revision, len(adapter.modules)) == ("someone/llava-lora", "0" * 40, 14)
    assert "cache" in adapter.notes[-1]
    assert "no revision" in refusal(llava, revision="v2").what


# --- projectors -------------------------------------------------------------------------------------------------------


def projector(prefix: str = "model.", mlp: bool = True) -> Tensors:
    places = ("0.", "2.") if mlp else ("",)
    return {
        f"{prefix}mm_projector.{place}{end}": torch.rand(shape) for place in places for end, shape in (("weight", (4, 4)), ("bias", (4,)))
    }


@pytest.mark.parametrize("mlp", [True, False])
@pytest.mark.parametrize("prefix", ["model.", "base_model.model.model.", "module.model.", "_fsdp_wrapped_module.model."])
def test_projector_alone(tmp_path: Path, prefix: str, mlp: bool) -> None:
    torch.save(projector(prefix, mlp), tmp_path / "mm_projector.bin")
    for source in (tmp_path, tmp_path / "mm_projector.bin"):
        adapter = open_adapter(source)
        assert set(adapter.replacements) == projector(mlp=mlp).keys()
        assert (adapter.modules, adapter.rows, adapter.peft) == ((), {}, {})


def test_projector_with_trained_tokens(tmp_path: Path) -> None:
    table = torch.rand(7, 4)
    torch.save(projector() | {"model.embed_tokens.weight": table}, tmp_path / "checkpoint-24.bin")
    assert same(open_adapter(tmp_path / "checkpoint-24.bin").replacements["model.embed_tokens.weight"], table)
    torch.save(projector() | {"model.embed_tokens.weight": table[-2:].clone()}, tmp_path / "checkpoint-24.bin")
    adapter = open_adapter(tmp_path / "checkpoint-24.bin")
    (name, (indices, rows)), *others = adapter.rows.items()
    assert (name, indices, others) == ("model.embed_tokens.weight", (-2, -1), [])
    assert same(rows, table[-2:])
    assert "model.embed_tokens.weight" not in adapter.replacements


@pytest.mark.parametrize(
    "extra", ["model.vision_resampler.weight", "lm_head.weight", "model.mm_projector.0.scale", "x.mm_projector.0.bias"]
)
def test_projector_with_something_else(tmp_path: Path, extra: str) -> None:
    torch.save(projector() | {extra: torch.rand(4)}, tmp_path / "mm_projector.bin")
    assert extra in refusal(tmp_path / "mm_projector.bin").what


def test_projector_of_a_lora_is_only_a_part(llava: Path) -> None:
    assert "a part of an adapter" in refusal(llava / "non_lora_trainables.bin").what


# --- against PEFT -----------------------------------------------------------------------------------------------------


Module = tuple[str, str, int, float]  # name, parameter, rank, scale


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT and transformers warn of their own affairs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def found_by_us(adapter: Adapter) -> set[Module]:
    return {(module.name, module.parameter, module.rank, module.scale) for module in adapter.modules}


def found_by_peft(model: Any) -> set[Module]:
    """The adapted modules of a loaded PEFT model."""
    from peft.tuners.lora import LoraLayer

    return {
        (name.replace(".base_layer", ""), getattr(module, "parameter_name", ""), module.r["default"], module.scaling["default"])
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize("case", CASES)
def test_modules_and_scales_are_those_of_peft(fixtures: Path, case: str) -> None:
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = fixtures / "F-peft" / case / "adapter"
    base = LlamaForCausalLM(LlamaConfig(**json.loads((fixtures / "F-peft/base-fp32/config.json").read_text())))
    adapter = open_adapter(folder)
    with quiet():
        model = PeftModel.from_pretrained(base, folder)
    assert found_by_us(adapter) == found_by_peft(model)
    assert all((module.magnitude is not None) == (case == "dora") for module in adapter.modules)
    replaced = {
        "modules-to-save": {"lm_head.weight", *(f"model.layers.{layer}.post_attention_layernorm.weight" for layer in (0, 1))},
        "embedding-lora": {"model.embed_tokens.weight", "lm_head.weight"},
    }
    assert set(adapter.replacements) == replaced.get(case, set())


class Experts(nn.Module):
    """A stack of three experts as transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.rand(3, 8, 6))
        self.down_proj = nn.Parameter(torch.rand(3, 6, 4))


class Net(nn.Module):
    """One module of each kind that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.block = nn.ModuleDict({"q_proj": nn.Linear(6, 8), "k_proj": nn.Linear(6, 8), "experts": Experts()})
        self.conv = nn.Conv2d(4, 6, 3)
        self.point = nn.Conv1d(4, 6, 1)
        self.head = nn.Linear(6, 9)


VARIANTS: dict[str, dict[str, Any]] = {
    "linear and conv": {"target_modules": ["q_proj", "conv", "point"]},
    "dora": {"target_modules": ["q_proj", "conv", "point", "embed"], "use_dora": True},
    "lora bias": {"target_modules": ["q_proj", "conv"], "lora_bias": True},
    "bias all": {"target_modules": ["q_proj", "embed"], "bias": "all"},
    "bias lora_only": {"target_modules": ["q_proj", "conv"], "bias": "lora_only"},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["head", "conv"]},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "head"],
        "rank_pattern": {"block.q_proj": 3, "(k|v)_proj": 5},
        "alpha_pattern": {"^block\\..*": 7},
        "use_rslora": True,
    },
    "one parameter": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "two parameters": {
        "target_modules": [],
        "target_parameters": ["block.experts.down_proj", "experts.gate_up_proj"],
        "rank_pattern": {"experts.down_proj": 5},
    },
    "parameter of a linear": {"target_modules": ["k_proj"], "target_parameters": ["q_proj.weight"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed": [7, 2]}},
    "by expression": {"target_modules": r".*\.(q|k)_proj", "init_lora_weights": "gaussian"},
    "fan in": {"target_modules": ["q_proj"], "fan_in_fan_out": False, "layers_to_transform": None, "lora_dropout": 0.1},
}


@pytest.fixture(scope="module")
def trained() -> Callable[[dict[str, Any]], Any]:
    """A PEFT model of Net with a configuration, its adapter filled with random numbers."""
    from peft import LoraConfig, get_peft_model

    def make(options: dict[str, Any]) -> Any:
        torch.manual_seed(1)
        with quiet():
            model = get_peft_model(Net(), LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.uniform_(parameter)
        return model

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_saves_and_what_a_raw_dump_holds(tmp_path: Path, trained: Any, variant: str) -> None:
    """Saved by PEFT, and dumped with `.default.` in the names as DeepSpeed and train.py see them: the same adapter."""
    model = trained(VARIANTS[variant])
    with quiet():
        model.save_pretrained(tmp_path / "saved")
    saved = open_adapter(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "dump")
    (tmp_path / "dump" / "adapter_model.safetensors").unlink()
    dump = {key: parameter.detach().clone() for key, parameter in model.named_parameters() if parameter.requires_grad}
    torch.save(dump, tmp_path / "dump" / "adapter_model.bin")
    dumped = open_adapter(tmp_path / "dump")
    assert found_by_us(saved) == found_by_us(dumped) == found_by_peft(model)
    assert len(load_file(tmp_path / "saved/adapter_model.safetensors")) == sum(
        2 + (m.magnitude is not None) + (m.bias is not None) for m in saved.modules
    ) + len(saved.replacements) + len(saved.rows)
    trainable = dict(model.base_model.model.named_parameters())
    for adapter in (saved, dumped):
        for module in adapter.modules:
            for tensor, part in ((module.a, "A"), (module.b, "B")):
                names = [f"{module.name}{wrap}.lora_{part}.default.weight" for wrap in ("", ".base_layer")]
                names.append(f"{module.name}.lora_embedding_{part}.default")
                assert any(name in trainable and same(tensor, trainable[name].detach()) for name in names)
        for name, tensor in adapter.replacements.items():
            head, _, end = name.rpartition(".")
            spellings = (name, f"{head}.base_layer.{end}", f"{head}.modules_to_save.default.{end}")
            assert any(spelling in trainable and same(tensor, trainable[spelling].detach()) for spelling in spellings)


def test_kinds_magnitudes_and_biases(tmp_path: Path, trained: Any) -> None:
    for variant in ("dora", "lora bias", "two parameters", "rows"):
        with quiet():
            trained(VARIANTS[variant]).save_pretrained(tmp_path / variant)
    kinds = {module.name: module.kind for module in open_adapter(tmp_path / "dora").modules}
    assert kinds == {"block.q_proj": "linear", "conv": "conv", "point": "conv", "embed": "embedding"}
    assert all(module.bias is not None for module in open_adapter(tmp_path / "lora bias").modules)
    experts = {
        module.parameter: (module.kind, module.a.shape, module.b.shape) for module in open_adapter(tmp_path / "two parameters").modules
    }
    assert experts == {"gate_up_proj": ("parameter", (12, 6), (8, 12)), "down_proj": ("parameter", (15, 4), (6, 15))}
    indices, rows = open_adapter(tmp_path / "rows").rows["embed.weight"]
    assert (indices, rows.shape) == ((7, 2), (2, 6))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [22, 20]}])
def test_resized_vocabulary(tmp_path: Path, tied: bool, options: dict[str, Any]) -> None:
    """PEFT then saves the whole tables, under up to three spellings."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 12, "vocab_size": 20}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied))
    with quiet():
        model.config.save_pretrained(tmp_path / "base")
        model.name_or_path = str(tmp_path / "base")
        model.resize_token_embeddings(24)
        peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], **options))
        peft.save_pretrained(tmp_path / "adapter")
    adapter = open_adapter(tmp_path / "adapter")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(adapter.replacements)
    assert all(tensor.shape == (24, 8) for tensor in adapter.replacements.values())
    assert {indices for indices, _ in adapter.rows.values()} == ({(22, 20)} if "trainable_token_indices" in options else set())


@given(
    key=st.sampled_from(
        ["q_proj", "layers.1.q", "^model.*", r".*\.1\..*_proj", "(q|k)_proj", "q|k_proj", r"[qk]_proj", "layers\\.\\d+\\.q_proj?", "1", ""]
    ),
    module=st.sampled_from(["model.layers.1.q_proj", "model.layers.11.k_proj", "q_proj", "layers.1.q", "xq_proj", "model.layers.0.mlp.1"]),
)
def test_patterns_match_as_in_peft(tmp_path_factory: pytest.TempPathFactory, key: str, module: str) -> None:
    from peft.utils.other import get_pattern_key

    folder = write(tmp_path_factory.mktemp("pattern"), rank_pattern={key: 5, "k_proj": 7}, alpha_pattern={key: 11})
    rules = read_rules(folder / "adapter_config.json")
    rank = {key: 5, "k_proj": 7}.get(get_pattern_key([key, "k_proj"], module), 2)
    assert rules.rank_of(module) == rank
    assert rules.scale_of(module) == {key: 11}.get(get_pattern_key([key], module), 3) / rank


# --- refused by name --------------------------------------------------------------------------------------------------


def test_another_method_is_named(fixtures: Path, tmp_path: Path) -> None:
    assert "LoHa" in refusal(fixtures / "F-peft/not-lora-loha/adapter").what
    for method, name in (("LOKR", "LoKr"), ("ADALORA", "AdaLoRA"), ("IA3", "IA3"), ("VERA", "VeRA"), ("OFT", "OFT"), ("BOFT", "BOFT")):
        assert name in refusal(write(tmp_path, peft_type=method)).what
    hada = {f"{Q}.hada_w1_a": torch.rand(4, 2)}
    assert "hada_w1_a" in refusal(write(tmp_path, lora() | hada)).what


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer replication"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"arrow_config": {"top_k": 3}}, "Arrow"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"kasa_config": {}, "velora_config": {"rank": 1}}, "VeLoRA"),
        ({"monteclora_config": {"a": 0}}, "MonteCLoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": "OLoRA"}, "OLoRA"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"init_lora_weights": "news"}, "news"),
        ({"use_magic": True}, "use_magic"),
        ({"curvature": 0.5}, "curvature"),
    ],
)
def test_variants_are_named(tmp_path: Path, setting: dict[str, Any], named: str) -> None:
    error = refusal(write(tmp_path, **setting))
    assert f"{named}" in error.what
    assert error.hint
    assert error.exit_code == 3


def test_settings_that_change_nothing(tmp_path: Path) -> None:
    for start in (True, False, None, "gaussian", "eva", "orthogonal", "mica"):
        assert open_adapter(write(tmp_path, init_lora_weights=start, use_magic=False, curvature=None, task_type="CAUSAL_LM")).modules


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({f"{Q}.lora_A.weight": None}, "q_proj"),
        ({"base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": (6, 2)}, "layers.1.self_attn.q_proj"),
        ({f"{Q}.lora_E.weight": (2, 1)}, "lora_E"),
        ({f"{Q}.lora_A.weight.absmax": (2, 1)}, "absmax"),
        ({f"{Q}.lora_embedding_A": (2, 4)}, "q_proj"),
        ({f"{Q}.base_layer.lora_A.weight": (2, 4), f"{Q}.base_layer.lora_B.weight": (6, 2)}, "q_proj"),
        ({f"{Q}.original_module.weight": (6, 4)}, "original_module"),
        ({f"{Q}.lora_A.weight": (3, 4)}, "not rank 2"),
        ({f"{Q}.lora_B.weight": (6, 3)}, "not rank 2"),
        ({f"{Q}.lora_A.weight": (2, 4, 1, 1)}, "not rank 2"),
        ({f"{Q}.lora_magnitude_vector": (6,)}, "use_dora"),
        ({f"{Q}.lora_B.bias": (6,)}, "lora_bias"),
        ({f"{Q}.token_adapter.trainable_tokens_delta": (2, 4)}, "trained rows"),
        ({f"{Q}.lora_A.default.weight": (2, 4)}, "the same thing"),
        (
            {f"{Q}.lora_A.one.weight": (2, 4), f"{Q}.lora_B.two.weight": (6, 2), f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None},
            "several",
        ),
    ],
)
def test_a_tensor_too_many_or_misnamed(tmp_path: Path, change: dict[str, tuple[int, ...] | None], named: str) -> None:
    tensors = lora() | {key: torch.rand(shape) for key, shape in change.items() if shape is not None}
    error = refusal(write(tmp_path, {key: tensor for key, tensor in tensors.items() if change.get(key, ()) is not None}))
    assert named in all_text(error)
    assert error.exit_code == 3


def test_sizes_that_contradict_each_other(tmp_path: Path) -> None:
    head = "base_model.model.lm_head"
    assert "not rank 2" in all_text(refusal(write(tmp_path, lora(rank=3))))
    two = {f"{head}.weight": torch.rand(6, 4), f"{head}.modules_to_save.default.weight": torch.rand(7, 4)}
    assert "modules_to_save" in refusal(write(tmp_path, lora() | two)).what
    rows = {"base_model.model.embed.token_adapter.trainable_tokens_delta": torch.rand(2, 4)}
    assert "trained rows of `embed`" in refusal(write(tmp_path, lora() | rows, trainable_token_indices=[1])).what
    folder = write(tmp_path, lora() | {f"{head}.weight": torch.rand(6, 4)})
    torch.save({f"{head}.weight": torch.rand(7, 4), "base_model.model.model.x": torch.rand(1)}, folder / "non_lora_trainables.bin")
    assert "lm_head.weight" in refusal(folder).what
    torch.save({"base_model.model.model.x": torch.rand(1), "model.model.x": torch.rand(1)}, folder / "non_lora_trainables.bin")
    assert refusal(folder).what.endswith(", model.model.x")


def test_what_the_config_announces_must_be_there(tmp_path: Path) -> None:
    assert "magnitude of DoRA" in all_text(refusal(write(tmp_path, use_dora=True)))
    assert "bias" in all_text(refusal(write(tmp_path, lora_bias=True)))
    notes = open_adapter(write(tmp_path, target_modules=["q_proj", "k_proj"], modules_to_save=["lm_head"])).notes
    assert any("`k_proj`, `lm_head`" in note for note in notes)


def test_magnitude_with_weight_behind(tmp_path: Path) -> None:
    for name in (
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "lora_magnitude_vector.default",
        "lora_magnitude_vector.default.weight",
    ):
        adapter = open_adapter(write(tmp_path, lora() | {f"{Q}.{name}": torch.rand(6)}, use_dora=True))
        assert adapter.modules[0].magnitude is not None


def test_experts_in_an_unknown_order(tmp_path: Path) -> None:
    """PEFT nests them as the module registers them, which its names do not tell."""
    name = "base_model.model.experts"
    tensors = lora(name) | lora(f"{name}.base_layer")
    assert "not clear" in refusal(write(tmp_path, tensors, target_parameters=["experts.left", "experts.right"])).what
    assert "not clear" in refusal(write(tmp_path, lora(name), target_parameters=["experts.gate_up_proj", "experts.down_proj"])).what


def test_integers_are_refused(tmp_path: Path) -> None:
    tensors = lora() | {f"{Q}.lora_A.weight": torch.ones(2, 4, dtype=torch.int8)}
    assert "do not hold floats" in refusal(write(tmp_path, tensors)).what


def test_folders_that_are_no_adapter(tmp_path: Path, fixtures: Path) -> None:
    assert "no adapter" in refusal(fixtures / "F-peft/base-fp32").what
    write(tmp_path / "here" / "inner")
    assert "inner" in str(refusal(tmp_path / "here").hint)
    (tmp_path / "here/inner/adapter_config.json").unlink()
    assert "adapter_config.json" in refusal(tmp_path / "here/inner").what
    (tmp_path / "here/inner/adapter_model.safetensors").unlink()
    (tmp_path / "here/inner/adapter_config.json").write_text("{}")
    torch.save(projector(), tmp_path / "here/inner/mm_projector.bin")  # half a download is not a projector
    assert "no adapter" in refusal(tmp_path / "here/inner").what


# --- hostile configs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        *({"r": value} for value in (0, -1, 65537, True, "8", 2.0, None, [2])),
        *({"lora_alpha": value} for value in (True, "8", None, 10**30, -1e13)),
        *({"rank_pattern": value} for value in ([1], {"q": 0}, {"q": "1"}, {"q": None})),
        *({"alpha_pattern": value} for value in ("q", {"q": []})),
        *({"trainable_token_indices": value} for value in ([], [-1], [1, 1], [True], "1", {"embed": 3}, [1 << 40])),
        *({key: 1} for key in ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias")),
        *({key: [1]} for key in ("target_parameters", "modules_to_save", "target_modules")),
    ],
)
def test_absurd_values(tmp_path: Path, setting: dict[str, Any]) -> None:
    (key,) = setting
    assert f"`{key}`" in refusal(write(tmp_path, **setting)).what


@pytest.mark.parametrize("text", ['{"r": NaN}', '{"r": 1, "r": 2}', "[]", "{", '{"lora_alpha": 1e999}', "[" * 100_000])
def test_json_that_lies(tmp_path: Path, text: str) -> None:
    (write(tmp_path) / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refusal(tmp_path).what


@pytest.mark.parametrize(
    "key",
    [
        "(a+)+$", "(a|a)*b", "((a*)*)*", "(?:a*){20}", r"(a)\1", "(?=a)", "(?i)a", "(?P<x>a)", "(", "a)|(b", "[",
        "*a", "a{2}{3}", "a" * 201,
        ".*.*.*x", "a?" * 13 + "a" * 13, "(a|a)" * 13, "[[a]", "x" + "a*" * 30,
    ],
)  # fmt: skip
def test_expressions_that_run_away(tmp_path: Path, key: str) -> None:
    tensors = lora(f"base_model.model.{'a' * 400}")
    for setting in ("rank_pattern", "alpha_pattern"):
        assert f"`{setting}`" in refusal(write(tmp_path, tensors, **{setting: {key: 2}})).what


def test_work_is_bounded_as_a_whole(tmp_path: Path) -> None:
    """What is accepted one by one may still be too much together."""
    rules = read_rules(write(tmp_path, rank_pattern={f".*a.*b{number}": 2 for number in range(50)}) / "adapter_config.json")
    rules.check_effort([f"model.layers.{number}.self_attn.q_proj" for number in range(32)])
    with pytest.raises(InputError, match="too costly"):
        rules.check_effort([f"{'a' * 400}{number}" for number in range(32)])


def test_the_longest_accepted_expression_is_quick(tmp_path: Path) -> None:
    rules = read_rules(write(tmp_path, rank_pattern={".*.*b": 3}) / "adapter_config.json")
    assert rules.rank_of("a." * 200) == 2


# --- where it was trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recorded", "short"),
    [
        ("liuhaotian/llava-v1.5-7b", "liuhaotian/llava-v1.5-7b"),
        ("./checkpoints/vicuna-7b-v1-5", "vicuna-7b-v1-5"),
        ("/home/someone/models/vicuna/", "vicuna"),
        ("C:\\models\\vicuna", "vicuna"),
    ],
)
def test_base_without_its_authors_folders(tmp_path: Path, recorded: str, short: str) -> None:
    assert short_base(recorded) == short
    adapter = open_adapter(write(tmp_path, base_model_name_or_path=recorded))
    assert adapter.notes == (f"trained on `{short}`, by adapter_config.json",)
    assert adapter.peft["base_model_name_or_path"] == recorded


def test_quantised_base_is_noticed(llava: Path, tmp_path: Path) -> None:
    for name in ("unsloth/llama-3-8b-bnb-4bit", "TheBloke/Llama-2-7B-GPTQ", "x/model_int8"):
        assert any("quantised" in note for note in open_adapter(write(tmp_path / "a", base_model_name_or_path=name)).notes)
    for name in ("lmsys/vicuna-7b-v1.5", "x/bnbx-model", "./checkpoints/4bitter/vicuna"):
        assert quantised_base(name, {}) == ""
    config = json.loads((llava / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (llava / "config.json").write_text(json.dumps(config))
    assert open_adapter(llava).peft["quantised"] == "`quantization_config` in config.json (4 bits)"


def test_scale_is_computed_in_doubles() -> None:
    assert LoraRules(3, 10.0).scale_of("x") == 10 / 3
    assert LoraRules(3, 10.0, rslora=True).scale_of("x") == 10 / math.sqrt(3)
