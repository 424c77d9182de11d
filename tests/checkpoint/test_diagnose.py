"""What samples of values show: every mistake that users made (LLaVA #51, #207; FastChat #275, #285, #890) is found, and no right input
is blamed.

Synthetic models have realistic magnitudes (weights 0.02, changes 1e-4 to 1e-3); the reference data has tiny shapes and other magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llava_weights.checkpoint import diagnose
from llava_weights.checkpoint.diagnose import bf16_damaged, extra_rows, llama2_hints, non_finite, pair, round_trip, state
from llava_weights.errors import InputError
from llava_weights.formats.safetensors import index_safetensors
from llava_weights.formats.torch_zip import index_torch_zip
from llava_weights.storage.reading import SourceFile, Workspace
from llava_weights.tensors.lazy import LazyTensor, PermuteRope, Stored

Arrays = dict[str, np.ndarray]
Index = Callable[[Mapping[str, np.ndarray | torch.Tensor]], dict[str, LazyTensor]]

HIDDEN, HEADS, LAYERS, VOCABULARY = 128, 4, 4, 320
RIGHT = 5e-5  # failing share of the right base, measured over 30 million elements: 3e-7 for changes of 1e-4, 7e-6 for 2e-3
REFERENCE_WEIGHTS = (
    "base-hf-bin",
    "base-hf-from-meta13B-by-tf4.37.2-BF16",
    "target-307/llava-tiny-v0",
    "expected-307-by-main",
    "expected-308-by-may4",
)
REFERENCE_DELTAS = {"delta-307-apr17": 3, "delta-308-may4": 4}  # and the rows that they add


def half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16)


def llama(seed: int = 0, std: float = 0.02) -> Arrays:
    """A LLaMA in fp16 with weights of the usual size."""
    random = np.random.default_rng(seed)
    matrices = {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            matrices[f"model.layers.{layer}.self_attn.{name}"] = (HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj", "down_proj"):
            matrices[f"model.layers.{layer}.mlp.{name}"] = (HIDDEN, HIDDEN)
    norms = ["model.norm"] + [f"model.layers.{i}.{n}_layernorm" for i in range(LAYERS) for n in ("input", "post_attention")]
    model = {f"{name}.weight": half(random.normal(0, std, shape)) for name, shape in matrices.items()}
    return model | {f"{name}.weight": half(random.normal(0.4, 0.1, HIDDEN)) for name in norms}


def tuned(model: Arrays, std: float, seed: int = 1) -> Arrays:
    random = np.random.default_rng(seed)
    return {name: half(x.astype(np.float32) + random.normal(0, std, x.shape)) for name, x in model.items()}


def minus(a: Arrays, b: Arrays) -> Arrays:
    """What `make_delta` computes: one subtraction in fp16."""
    return {name: a[name] - b[name] for name in a}


def plus(a: Arrays, b: Arrays) -> Arrays:
    return {name: a[name] + b[name] for name in a}


def through_bf16(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float32)).bfloat16()


def matrices(model: Arrays) -> list[str]:
    return [name for name, x in model.items() if x.ndim == 2]


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Write tensors as a safetensors file and index it."""

    def write(tensors: Mapping[str, np.ndarray | torch.Tensor]) -> dict[str, LazyTensor]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({name: torch.as_tensor(x).contiguous() for name, x in tensors.items()}, path)
        return dict(index_safetensors(path)[0])

    return write


def read_folder(folder: Path) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".bin":
            tensors |= index_torch_zip(path)
        elif path.suffix == ".safetensors":
            tensors |= index_safetensors(path)[0]
    return tensors


@pytest.fixture
def reference(fixtures: Path) -> Callable[[str], dict[str, LazyTensor]]:
    return lambda name: read_folder(fixtures / "A-delta-v0" / name)


# Round trip


@pytest.mark.parametrize("std", [1e-5, 1e-4, 3e-4, 1e-3, 3e-3])
def test_the_right_base_passes(index: Index, std: float) -> None:
    base = llama()
    found = round_trip(index(base), index(minus(tuned(base, std), base)))
    assert (found.verdict, found.bad, found.tensors) == ("right", 0, len(matrices(base)))
    assert found.sampled > 2e5
    assert found.share < RIGHT


def shifted(base: Arrays, delta: Arrays) -> Arrays:
    return {name: np.roll(x, 1, axis=0) for name, x in base.items()}


WRONG_BASES: dict[str, Callable[[Arrays, Arrays], Mapping[str, np.ndarray | torch.Tensor]]] = {
    "bfloat16": lambda base, delta: {name: through_bf16(x) for name, x in base.items()},
    "bfloat16 saved as float16": lambda base, delta: {name: through_bf16(x).half() for name, x in base.items()},
    "bfloat16 saved as float32": lambda base, delta: {name: through_bf16(x).float() for name, x in base.items()},
    "sibling, as Vicuna": lambda base, delta: tuned(base, 5e-4, seed=7),
    "already merged": plus,
    "unrelated, as Llama 2": lambda base, delta: llama(seed=8),
    "rows shifted by one": shifted,
}


@pytest.mark.parametrize("std", [1e-4, 1e-3])
@pytest.mark.parametrize("mistake", WRONG_BASES)
def test_a_wrong_base_fails(index: Index, mistake: str, std: float) -> None:
    base = llama()
    delta = minus(tuned(base, std), base)
    found = round_trip(index(WRONG_BASES[mistake](base, delta)), index(delta))
    assert found.verdict == "wrong"
    low, high = (0.25, 0.35) if mistake.startswith(("unrelated", "rows")) else (0.005, 0.15)
    assert low < found.share < high
    assert found.bad > 0.5 * found.tensors


@pytest.mark.parametrize("mistake", WRONG_BASES)
def test_the_smallest_changes_still_tell_a_wrong_base(index: Index, mistake: str) -> None:
    """Changes of 1e-5 leave only 0.2 % failing for the closest bases: the second look decides."""
    base = llama()
    delta = minus(tuned(base, 1e-5), base)
    assert round_trip(index(WRONG_BASES[mistake](base, delta)), index(delta)).verdict == "wrong"


@pytest.mark.parametrize("base_std", [0.005, 0.02, 0.2])
@settings(max_examples=8)
@given(seed=st.integers(0, 1 << 30), relative=st.floats(1e-3, 0.3))
def test_no_right_base_is_ever_blamed(tmp_path_factory: pytest.TempPathFactory, base_std: float, seed: int, relative: float) -> None:
    random = np.random.default_rng(seed)
    base = {f"{i}.weight": half(random.normal(0, base_std, (int(random.integers(4, 300)), int(random.integers(4, 300))))) for i in range(6)}
    delta = minus(tuned(base, base_std * relative, seed + 1), base)
    folder = tmp_path_factory.mktemp("pair")
    for name, tensors in (("base", base), ("delta", delta)):
        save_file({key: torch.from_numpy(x) for key, x in tensors.items()}, folder / f"{name}.safetensors")
    found = round_trip(index_safetensors(folder / "base.safetensors")[0], index_safetensors(folder / "delta.safetensors")[0])
    assert found.verdict in ("right", "too few")
    assert found.bad == 0


def test_one_bad_matrix_among_many_is_found_and_named(index: Index) -> None:
    base = llama()
    delta = minus(tuned(base, 3e-4), base)
    name = "model.layers.2.mlp.up_proj.weight"
    found = round_trip(index({**base, name: through_bf16(base[name]).half()}), index(delta))
    assert found.share < diagnose.PASS, "the average alone would have let it pass"
    assert (found.verdict, found.bad, found.worst[0][0]) == ("wrong", 1, name)
    assert 0.005 < found.worst[0][1] < 0.05


def unpermuted(x: np.ndarray) -> np.ndarray:
    """HF's rows of q or k back in Meta's order."""
    return x.reshape(HEADS, 2, HIDDEN // HEADS // 2, -1).swapaxes(1, 2).reshape(x.shape)


def test_a_missing_permutation_blames_q_and_k_alone(index: Index) -> None:
    base = llama()
    delta = index(minus(tuned(base, 3e-4), base))
    rotary = [name for name in base if "q_proj" in name or "k_proj" in name]
    meta = index({name: unpermuted(x) if name in rotary else x for name, x in base.items()})
    found = round_trip(meta, delta)
    assert (found.verdict, found.bad) == ("wrong", 2 * LAYERS)
    assert {name for name, _ in found.worst} == set(rotary)
    permuted = {n: PermuteRope(dtype=t.dtype, shape=t.shape, source=t, heads=HEADS) if n in rotary else t for n, t in meta.items()}
    assert round_trip(permuted, delta).share < RIGHT


def test_added_rows_and_other_shapes_are_left_out(index: Index) -> None:
    base = llama()
    delta = minus(tuned(base, 3e-4), base)
    added = half(np.random.default_rng(5).normal(0, 0.02, (3, HIDDEN)))
    grown = {name: np.concatenate([x, added]) if x.shape[0] == VOCABULARY else x for name, x in delta.items()}
    grown["model.layers.0.mlp.down_proj.weight"] = np.ones((HIDDEN, HIDDEN + 1), np.float16)
    grown["model.mm_projector.weight"] = np.ones((HIDDEN, 64), np.float16)
    found = round_trip(index(base), index(grown))
    assert (found.verdict, found.tensors) == ("right", len(matrices(base)) - 1)
    assert found.share < RIGHT


def test_zeros_and_what_can_not_be_judged_give_no_verdict(index: Index) -> None:
    base = llama()
    zeros = {name: np.zeros_like(x) for name, x in base.items()}
    few = {"lm_head.weight": base["lm_head.weight"][:2]}
    for first, second in ((base, zeros), (zeros, zeros), ({}, {}), (base, {}), (few, few)):
        assert round_trip(index(first), index(second)).verdict == "too few"


@pytest.mark.parametrize(("failing", "verdict"), [(0, "right"), (4, "right"), (6, "unclear"), (12, "unclear"), (18, "wrong")])
def test_few_samples_decide_only_what_they_can(index: Index, failing: int, verdict: str) -> None:
    """Of 4096 elements; a difference far below the last bit of its weight can't come from a subtraction in fp16."""
    base = half(np.random.default_rng(3).uniform(0.02, 0.03, (64, 64)))
    delta = half(np.full_like(base, 2**-10))
    delta.reshape(-1)[np.arange(failing) * 100] = 2**-24
    found = round_trip(index({"a": base}), index({"a": delta}))
    assert (found.verdict, found.failing, found.sampled) == (verdict, failing, 4096)


def test_a_second_look_decides_what_the_first_could_not(index: Index) -> None:
    """3 elements in 1,000 fail: 12 of the first 4,096 may still be chance, 36 of three times as many can't be."""
    base = half(np.random.default_rng(3).uniform(0.02, 0.03, (512, 512)))
    delta = half(np.full_like(base, 2**-10))
    delta[:, 0] = delta[::2, 1] = 2**-24
    found = round_trip(index({"a": base}), index({"a": delta}))
    assert (found.verdict, found.sampled, found.bad) == ("wrong", 3 * 4096, 0)


def test_infinities_are_left_to_other_checks(index: Index) -> None:
    base = llama()
    delta = minus(tuned(base, 3e-4), base)
    delta["lm_head.weight"][:] = np.inf
    broken = {name: x.astype(np.float32) for name, x in base.items()}
    broken["model.embed_tokens.weight"][:, 0] = 1e30
    broken["model.embed_tokens.weight"][:, 1] = np.nan
    found = round_trip(index(broken), index(delta))
    assert (found.verdict, found.share < RIGHT) == ("right", True)
    for name in matrices(delta):
        delta[name][-1, -1] = np.nan
    assert pair(index(broken), index(delta)).ratio == pytest.approx(3e-4 / 0.02, rel=0.05)


@pytest.mark.parametrize("delta", REFERENCE_DELTAS)
def test_reference_bases(reference: Callable[[str], dict[str, LazyTensor]], delta: str) -> None:
    second = {name: tensor for name, tensor in reference(delta).items() if "mm_projector" not in name}  # merged models have one too
    right = round_trip(reference("base-hf-bin"), second)
    assert (right.verdict, right.failing, right.tensors) == ("right", 0, 16)
    for name in REFERENCE_WEIGHTS[1:]:
        found = round_trip(reference(name), second)
        assert (found.verdict, found.bad) == ("wrong", 16)
        assert 0.02 < found.share < 0.15


# Pair


def test_size_and_direction_of_the_pair(index: Index) -> None:
    base = llama()
    whole = tuned(base, 1e-3)
    delta = minus(whole, base)
    first = index(base)
    assert pair(first, index(delta)).verdict == "plausible"
    assert pair(first, index(delta)).ratio == pytest.approx(1e-3 / 0.02, rel=0.05)
    assert pair(first, index(whole)).verdict == "full model"
    assert pair(first, index(minus(delta, base))).verdict == "subtracted twice"
    assert pair(index(delta), first).verdict == "swapped"
    assert pair(first, index(minus(base, base))).verdict == "identical"
    assert pair(first, index(llama(seed=9))).verdict == "unlike"
    assert pair(first, index(minus(llama(seed=9), base))).verdict == "unlike"
    assert pair(index(minus(base, base)), first).verdict == "too few"
    assert pair({}, {}).verdict == "too few"


def test_a_tuned_model_instead_of_a_difference(index: Index) -> None:
    base = llama()
    first = index(base)
    assert pair(first, index(base), difference=False).verdict == "identical"
    assert pair(first, index(tuned(base, 1e-3)), difference=False).verdict == "plausible"
    assert pair(first, index(llama(seed=9)), difference=False).verdict == "unlike"


def test_one_trained_matrix_is_not_identical(index: Index) -> None:
    base = llama()
    delta = minus(base, base)
    delta["lm_head.weight"] = half(np.full_like(delta["lm_head.weight"], 1e-4))
    assert pair(index(base), index(delta)).verdict == "plausible"


def test_reference_pairs(reference: Callable[[str], dict[str, LazyTensor]]) -> None:
    base, delta, merged = (reference(name) for name in ("base-hf-bin", "delta-308-may4", "expected-308-by-may4"))
    assert pair(base, delta).verdict == "plausible"
    assert pair(base, merged).verdict == "full model"
    assert pair(delta, base).verdict == "swapped"
    assert pair(base, base, difference=False).verdict == "identical"


# State


def test_state_of_models_and_deltas(index: Index) -> None:
    base = llama()
    assert state(index(base)).verdict == "weights"
    for std in (1e-5, 1e-4, 1e-3):
        whole = tuned(base, std)
        found = state(index(minus(whole, base)))
        assert (state(index(whole)).verdict, found.verdict) == ("weights", "delta")
        assert found.norms == 2 * LAYERS + 1
        assert 0 < found.matrix_std < 5e-3


def test_a_delta_whose_norms_never_moved(index: Index) -> None:
    base = llama()
    delta = minus(tuned(base, 1e-4), base)
    frozen = {name: x if x.ndim == 2 else np.zeros_like(x) for name, x in delta.items()}
    found = state(index(frozen))
    assert (found.verdict, found.median) == ("delta", 0.0)


def test_a_model_of_small_weights_is_no_delta(index: Index) -> None:
    assert state(index(llama(std=0.003))).verdict == "weights"


def test_what_does_not_decide_is_unknown(index: Index) -> None:
    base = llama()
    delta = minus(tuned(base, 1e-4), base)
    mixed = {name: (base if i % 2 else delta)[name] for i, name in enumerate(base)}
    zeros = {name: np.zeros_like(x) for name, x in base.items()}
    without = {name: base[name] for name in matrices(base)}
    for tensors in (mixed, zeros, without, {name: delta[name] for name in matrices(base)}, {}):
        assert state(index(tensors)).verdict == "unknown"


def test_the_vision_tower_has_no_vote(index: Index) -> None:
    delta = minus(tuned(llama(), 1e-4), llama())
    tower = {f"model.vision_tower.vision_tower.{i}.norm.weight": np.ones(64, np.float16) for i in range(99)}
    tower["model.vision_tower.vision_tower.fc.weight"] = np.ones((64, 64), np.float16)
    assert state(index(delta | tower)) == state(index(delta))


def test_reference_states(reference: Callable[[str], dict[str, LazyTensor]]) -> None:
    for name in REFERENCE_WEIGHTS:
        assert state(reference(name)).verdict == "weights"
    for name in REFERENCE_DELTAS:
        assert state(reference(name)).verdict == "delta"


# bfloat16


def test_genuine_fp16_is_not_damaged_whatever_holds_it(index: Index) -> None:
    base = llama()
    for tensors in (base, {name: x.astype(np.float32) for name, x in base.items()}):
        found = bf16_damaged(index(tensors))
        assert (found.damaged, found.names) == (False, ())
        assert found.share == pytest.approx(1 / 8, abs=0.005)


@pytest.mark.parametrize(("code", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)])
def test_bf16_damage_shows_in_every_dtype(index: Index, code: str, dtype: torch.dtype) -> None:
    base = llama()
    found = bf16_damaged(index({name: through_bf16(x).to(dtype) for name, x in base.items()}))
    assert (found.damaged, found.share, found.dtype) == (True, 1.0, code)
    assert found.names == tuple(sorted(matrices(base)))


def test_one_damaged_matrix_is_named(index: Index) -> None:
    base = llama()
    name = "model.layers.3.self_attn.o_proj.weight"
    found = bf16_damaged(index({**base, name: through_bf16(base[name]).half()}))
    assert (found.damaged, found.names) == (True, (name,))


def test_zeros_and_ones_are_no_damage(index: Index) -> None:
    found = bf16_damaged(index({"a": np.zeros((64, 64), np.float16), "b": np.eye(64, dtype=np.float16)}))
    assert not found.damaged
    assert bf16_damaged({}) == diagnose.Bf16(0.0, 0, "", ())
    assert bf16_damaged(index({"a": torch.zeros(4, 4, dtype=torch.bfloat16)})).damaged, "the dtype says it all"


def test_reference_bf16(reference: Callable[[str], dict[str, LazyTensor]]) -> None:
    for name in REFERENCE_WEIGHTS:
        assert bf16_damaged(reference(name)).damaged == ("BF16" in name)


# Extra rows, non-finite values, config


@pytest.mark.parametrize(("delta", "count"), REFERENCE_DELTAS.items())
def test_reference_extra_rows(reference: Callable[[str], dict[str, LazyTensor]], delta: str, count: int) -> None:
    found = extra_rows(reference(delta), reference("base-hf-bin"))
    assert [rows.name for rows in found] == ["lm_head.weight", "model.embed_tokens.weight"]
    assert {(rows.count, rows.verdict) for rows in found} == {(count, "plausible")}
    assert extra_rows(reference("base-hf-bin"), reference(delta)) == ()


@pytest.mark.parametrize(("scale", "verdict"), [(1, "plausible"), (0.2, "plausible"), (0.01, "odd"), (100, "odd"), (0, "odd")])
def test_extra_rows_are_compared_with_the_base(index: Index, scale: float, verdict: str) -> None:
    base = llama()
    delta = minus(tuned(base, 1e-4), base)["lm_head.weight"]
    added = half(np.random.default_rng(5).normal(0, 0.02, (5, HIDDEN)) * scale)
    (found,) = extra_rows(index({"lm_head.weight": np.concatenate([delta, added])}), index(base))
    assert (found.count, found.finite, found.verdict) == (5, True, verdict)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_extra_rows_must_be_finite(index: Index, value: float) -> None:
    base = llama()["lm_head.weight"]
    grown = np.concatenate([base, base[:5]])
    grown[-1, -1] = value
    (found,) = extra_rows(index({"a": grown}), index({"a": base}))
    assert (found.finite, found.verdict) == (False, "odd")


def test_extra_rows_on_zeros_are_unknown(index: Index) -> None:
    (found,) = extra_rows(index({"a": np.zeros((9, 64), np.float16)}), index({"a": np.zeros((5, 64), np.float16)}))
    assert (found.count, found.verdict, found.ratio) == (4, "unknown", 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("window", [1, 999, 4 << 20])
def test_non_finite_values_are_found_anywhere(index: Index, value: float, window: int) -> None:
    tensors: dict[str, np.ndarray | torch.Tensor] = {"ids": np.arange(9), "none": np.ones((0, 4), np.float16)}
    tensors |= {name: np.ones((100, 7), np.float16) for name in ("good", "0", "350", "699")}
    for place in (0, 350, 699):
        tensors[f"{place}"].reshape(-1)[place] = value
    tensors["bfloat16"] = torch.full((3,), value, dtype=torch.bfloat16)
    names = ["699", "good", "0", "ids", "none", "bfloat16", "350"]
    assert non_finite(index(tensors), names, window=window) == ["699", "0", "bfloat16", "350"]


def test_llama2_hints() -> None:
    llama1 = {"hidden_size": 5120, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "num_attention_heads": 40}
    llama2 = llama1 | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_key_value_heads": 40}
    assert llama2_hints(llama1) == ()
    assert llama2_hints(llama2) == ("max_position_embeddings 4096 (LLaMA 1: 2048)", "rms_norm_eps 1e-05 (LLaMA 1: 1e-06)")
    assert llama2_hints({"hidden_size": 8192, "rms_norm_eps": 1e-5}) == (), "LLaMA 65B has this too"
    assert len(llama2_hints({"num_attention_heads": 64, "num_key_value_heads": 8})) == 1
    assert llama2_hints({"hidden_size": "5120", "rms_norm_eps": None, "max_position_embeddings": [4096]}) == ()


# How it reads


@pytest.mark.parametrize("delta", REFERENCE_DELTAS)
def test_the_container_does_not_matter(reference: Callable[[str], dict[str, LazyTensor]], fixtures: Path, index: Index, delta: str) -> None:
    """The same tensors in .bin shards, in one safetensors file, and in reverse order give the same numbers."""

    def load(name: str) -> dict[str, torch.Tensor]:
        shards = [torch.load(path, weights_only=True) for path in (fixtures / "A-delta-v0" / name).glob("*.bin")]
        return {name: tensor for shard in shards for name, tensor in shard.items()}

    def ask(base: dict[str, LazyTensor], delta: dict[str, LazyTensor]) -> tuple[object, ...]:
        alone = [question(tensors) for question in (state, bf16_damaged) for tensors in (base, delta)]
        return (round_trip(base, delta), round_trip(delta, base), pair(base, delta), extra_rows(delta, base), *alone)

    names = ("base-hf-bin", delta)
    first = [reference(name) for name in names]
    again = [index(load(name)) for name in names]
    backwards = [dict(reversed(tensors.items())) for tensors in first]
    assert ask(*first) == ask(*again) == ask(*backwards)


@dataclass(frozen=True, kw_only=True)
class Tiled(LazyTensor):
    """Rows cut from one long block, so that a model of 26 GB needs no memory; counts what is read."""

    block: np.ndarray = field(repr=False)
    asked: list[int] = field(repr=False)

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        self.asked.append(len(out))
        at = start * self.row_nbytes // 2 % (self.block.size - len(out) // 2)
        out[:] = memoryview(self.block[at : at + len(out) // 2]).cast("B")


def shapes_of_13b() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (5120,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (32000, 5120))
    for i in range(40):
        shapes |= {f"model.layers.{i}.self_attn.{n}_proj.weight": (5120, 5120) for n in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.{n}_proj.weight": (13824, 5120) for n in ("gate", "up")}
        shapes |= {f"model.layers.{i}.mlp.down_proj.weight": (5120, 13824)}
        shapes |= {f"model.layers.{i}.{n}_layernorm.weight": (5120,) for n in ("input", "post_attention")}
    return shapes


def test_a_13b_pair_costs_little() -> None:
    """All questions together read less than 64 MB of 26 GB, even where a wrong base shows so little that a second look is needed."""
    asked: list[int] = []
    random = np.random.default_rng(0)
    base = half(random.normal(0, 0.02, 1 << 20))
    delta = half(base.astype(np.float32) + random.normal(0, 1e-5, base.size)) - base
    sibling = half(base.astype(np.float32) + random.normal(0, 1e-5, base.size))

    def model(block: np.ndarray) -> dict[str, LazyTensor]:
        return {name: Tiled(dtype="F16", shape=shape, block=block, asked=asked) for name, shape in shapes_of_13b().items()}

    first, second = model(sibling), model(delta)
    found = round_trip(first, second)
    assert (found.verdict, found.tensors, found.bad) == ("wrong", 282, 0)
    assert diagnose.PASS < found.share < diagnose.FAIL
    assert pair(first, second).verdict == "plausible"
    state(first), state(second), bf16_damaged(first), extra_rows(second, first)
    assert sum(asked) < 64 << 20


def test_a_sparse_13b_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(32000 * 5120 * 2)
    source = SourceFile.at(path)
    tensors = {name: Stored(dtype="F16", shape=shape, file=source, offset=0) for name, shape in shapes_of_13b().items()}
    assert state(tensors).verdict == "unknown"
    assert round_trip(tensors, tensors).verdict == "too few"
    assert pair(tensors, tensors).verdict == "too few"
    assert not bf16_damaged(tensors).damaged


def test_odd_tensors_are_passed_over(index: Index) -> None:
    odd: dict[str, np.ndarray | torch.Tensor] = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(64, np.float32),
        "model.vision_tower.embeddings.position_ids": np.arange(64).reshape(1, 64),
        "model.layers.0.input_layernorm.weight": np.ones(0, np.float16),  # ZeRO-3 that was not gathered
        "model.layers.0.self_attn.q_proj.weight": np.ones((0, 64), np.float16),
        "model.layers.0.self_attn.k_proj.weight": np.ones((64, 0), np.float16),
        "scalar": np.array(1.0, np.float16),
        "convolution": np.ones((4, 3, 2, 2), np.float16),
        "one row": np.ones((1, 3 << 20), np.float16),
    }
    tensors = index(odd)
    assert state(tensors).verdict == "unknown"
    assert (round_trip(tensors, tensors).verdict, pair(tensors, tensors).verdict) == ("too few", "too few")
    assert (bf16_damaged(tensors).sampled, extra_rows(tensors, tensors)) == (0, ())


def test_a_file_that_changed_is_an_input_error(index: Index) -> None:
    tensors = index(llama())
    leaf = next(iter(tensors.values()))
    assert isinstance(leaf, Stored)
    with Path(leaf.file.path).open("r+b") as file:
        file.truncate(leaf.file.size // 2)
    with pytest.raises(InputError, match="changed while it was being read"):
        state(tensors)
