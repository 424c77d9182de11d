"""Low-rank updates: PEFT's bits in every arithmetic, for every kind of layer and any rows; the same on every machine in `exact`."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from llava_weights.errors import MismatchError
from llava_weights.formats.folder import index_folder
from llava_weights.formats.safetensors import index_safetensors
from llava_weights.formats.torch_zip import index_torch_zip
from llava_weights.storage.reading import Workspace
from llava_weights.tensors.exact import exact_slices, round_once, row_sums
from llava_weights.tensors.lazy import LazyTensor, cast
from llava_weights.tensors.low_rank import BLOCK_ROWS, Arithmetic, LowRank, UpdateKind, add_low_rank, retention
from llava_weights.tensors.windows import row_ranges

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
ARITHMETICS: tuple[Arithmetic, ...] = ("peft", "peft-safe", "peft-half", "exact")


def saved(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return dict(index_safetensors(path)[0])


def made(tensor: LazyTensor, *cuts: int, work: Workspace | None = None) -> torch.Tensor:
    """The tensor, made piece by piece, cut before these rows."""
    out = bytearray(tensor.nbytes)
    mine = work or Workspace()
    edges = [0, *cuts, tensor.rows]
    for start, stop in pairwise(edges):
        tensor.rows_into(memoryview(out)[start * tensor.row_nbytes : stop * tensor.row_nbytes], start, stop, mine)
    mine.close()
    return torch.frombuffer(out, dtype=DTYPES[tensor.dtype]).view(tensor.shape)


def differing(result: torch.Tensor, expected: torch.Tensor) -> int:
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    return int((result != expected).sum())


class Experts(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed  # PEFT reads it
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 270, 20) * 0.05), nn.Parameter(torch.randn(3, 20, 135) * 0.05)


class Net(nn.Module):
    """One layer of each kind, most with more rows than fit in one block of the grid, and a rest."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(7)
        self.config = {"model_type": "custom"}
        self.wide, self.narrow, self.head = nn.Linear(40, 300), nn.Linear(300, 20), nn.Linear(24, 261, bias=False)
        self.embed, self.gpt2 = nn.Embedding(300, 24), Conv1D(280, 290)
        self.conv1, self.conv2 = nn.Conv1d(6, 140, 3), nn.Conv2d(3, 15, (3, 2))
        self.conv3, self.point = nn.Conv3d(2, 10, (2, 3, 3)), nn.Conv2d(12, 265, 1)
        self.experts, self.swapped = Experts(False), Experts(True)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "target_modules": ["wide", "narrow", "head"], "rank_pattern": {"narrow": 48}, "alpha_pattern": {"narrow": 20}},
    "rslora": {"r": 12, "use_rslora": True, "target_modules": ["wide", "narrow"]},
    "dora": {"use_dora": True, "target_modules": ["wide", "narrow"]},
    "lora bias": {"lora_bias": True, "target_modules": ["wide", "gpt2"]},
    "fan in fan out": {"fan_in_fan_out": True, "use_rslora": True, "target_modules": ["gpt2"]},
    "fan in fan out dora": {"fan_in_fan_out": True, "use_dora": True, "target_modules": ["gpt2"]},
    "embedding": {"target_modules": ["embed", "head"]},
    "embedding dora": {"use_dora": True, "target_modules": ["embed"]},
    "conv": {"target_modules": ["conv1", "conv2", "conv3", "point"]},
    "conv dora": {"use_dora": True, "target_modules": ["conv1", "conv2", "conv3", "point"]},
    "parameters": {
        "target_modules": [],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "swapped.gate_up_proj", "swapped.down_proj", "wide.weight"],
    },
}


@cache
def net(dtype: str) -> Net:
    return Net().to(DTYPES[dtype])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, LazyTensor]]:
    folder = tmp_path_factory.mktemp("bases")
    return {dtype: saved(folder / f"{dtype}.safetensors", net(dtype).state_dict()) for dtype in DTYPES}


def write_adapter(case: str, dtype: str, folder: Path) -> None:
    """An adapter of this dtype as PEFT writes it, every value random."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(net("F32")), LoraConfig(**{"r": 6, "lora_alpha": 15, **CASES[case]}))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.1 + ("magnitude" in name)
            parameter.data = values.to(DTYPES[dtype])
    model.save_pretrained(folder, save_embedding_layers=False)


def updates_of(model: nn.Module, stored: Mapping[str, LazyTensor]) -> dict[str, LowRank]:
    """What PEFT made of an adapter, by the names of the base's tensors. It computed the scales itself."""
    found = {}
    for key, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        name, scale = re.sub("(\\.base_layer)*$", "", key.removeprefix("base_model.model.")), layer.scaling["default"]
        a = stored.get(f"{key}.lora_A.weight") or stored[f"{key}.lora_embedding_A"]
        b = stored.get(f"{key}.lora_B.weight") or stored[f"{key}.lora_embedding_B"]
        if hasattr(layer, "parameter_name"):
            stacked = layer.num_experts > 1 and layer.get_base_layer().is_transposed
            update = LowRank(kind="parameter", a=a, b=b, scale=scale, fan_in_fan_out=stacked)
            found[f"{name}.{layer.parameter_name}"] = update
            continue
        kind: UpdateKind = "embedding" if f"{key}.lora_embedding_A" in stored else "conv" if len(a.shape) > 2 else "linear"
        magnitude = stored.get(f"{key}.lora_magnitude_vector")
        transposed = kind == "linear" and layer.fan_in_fan_out
        found[f"{name}.weight"] = LowRank(kind=kind, a=a, b=b, scale=scale, magnitude=magnitude, fan_in_fan_out=transposed)
        if bias := stored.get(f"{key}.lora_B.bias"):
            found[f"{name}.bias"] = LowRank(kind="bias", b=bias, scale=scale)
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """As many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_peft(case: str, bases: dict[str, dict[str, LazyTensor]], tmp_path: Path) -> None:
    """Base and adapter in three dtypes each, factors widened or not, merged safely or not: 36 merges.

    Twelve of them with two threads of torch in PEFT; this program uses one.
    """
    from peft import PeftModel

    for stored_dtype in DTYPES:
        folder = tmp_path / stored_dtype
        with warnings.catch_warnings(action="ignore"):
            write_adapter(case, stored_dtype, folder)
        stored = dict(index_safetensors(folder / "adapter_model.safetensors")[0])
        for base_dtype, widen, safe in product(DTYPES, (True, False), (True, False)):
            with warnings.catch_warnings(action="ignore"), threads(2 if stored_dtype == "BF16" else 1):
                model = PeftModel.from_pretrained(copy.deepcopy(net(base_dtype)), folder, autocast_adapter_dtype=widen)
                updates = updates_of(model, stored)
                merged = model.merge_and_unload(safe_merge=safe).state_dict()
            assert {tensor for update in updates.values() for tensor in update.tensors} == set(stored.values())
            arithmetic: Arithmetic = ("peft-safe" if safe else "peft") if widen else "peft-half"
            for name, update in updates.items():
                result = made(add_low_rank(bases[base_dtype][name], [update], arithmetic, name=name))
                assert differing(result, merged[name]) == 0, (name, stored_dtype, base_dtype, arithmetic, safe)
                assert differing(result, net(base_dtype).state_dict()[name])


# --- The reference data ---


def reference_update(module: str, adapter: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> LowRank | None:
    start = f"base_model.model.{module}"
    if f"{start}.lora_embedding_A" in adapter:
        kind, a, b = "embedding", adapter[f"{start}.lora_embedding_A"], adapter[f"{start}.lora_embedding_B"]
    elif f"{start}.lora_A.weight" in adapter:
        kind, a, b = "linear", adapter[f"{start}.lora_A.weight"], adapter[f"{start}.lora_B.weight"]
    else:
        return None
    own = [value for key, value in config.get("alpha_pattern", {}).items() if re.match(rf"(.*\.)?({key})$", module)]
    alpha, rank = own[0] if own else config["lora_alpha"], a.shape[0]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LowRank(kind=kind, a=a, b=b, scale=scale, magnitude=adapter.get(f"{start}.lora_magnitude_vector"))


def check_reference(base: Path, adapter: Path, merged: Mapping[str, torch.Tensor], arithmetic: Arithmetic) -> int:
    """How many tensors are as the recorded program merged them: all that the adapter changes."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    files = {".safetensors": lambda path: index_safetensors(path)[0], ".bin": index_torch_zip}
    stored = next(files[path.suffix](path) for path in adapter.glob("adapter_model.*"))
    count = 0
    for name, tensor in index_folder(base).tensors.items():
        module = name.removesuffix(".weight")
        if update := reference_update(module, stored, config):
            saved_rows = stored.get(f"base_model.model.{module}.base_layer.weight")
            result = made(add_low_rank(cast(saved_rows or tensor, tensor.dtype), [update], arithmetic, name=name))
            assert differing(result, merged[name]) == 0, name
            count += 1
    return count


@pytest.mark.parametrize(
    ("adapter", "program", "arithmetic"),
    [
        ("llava-v1.5-tiny-lora", "main-peft0.10.0", "peft-half"),
        ("llava-v1-tiny-lora-imstartend", "main-peft0.10.0", "peft-half"),
        ("llava-v1-tiny-lora-imstartend", "v1.0.2", "peft"),
    ],
)
def test_same_bits_as_llava(adapter: str, program: str, arithmetic: Arithmetic, fixtures: Path) -> None:
    folder = fixtures / "B-lora"
    output = folder / f"merged-of-{adapter}-by-{program}"
    binary = output / "pytorch_model.bin"
    merged = torch.load(binary, weights_only=True) if binary.exists() else load_file(output / "model.safetensors")
    assert check_reference(folder / "base-vicuna-tiny", folder / adapter, merged, arithmetic) == 14


@pytest.mark.parametrize("base", ["base-fp32", "base-fp16"])
@pytest.mark.parametrize(("case", "count"), [("plain", 14), ("rslora", 14), ("dora", 14), ("patterns", 14), ("embedding-lora", 4)])
def test_same_bits_as_recorded(case: str, count: int, base: str, fixtures: Path) -> None:
    folder = fixtures / "F-peft"
    merged = load_file(folder / case / f"merged-{base}.safetensors")
    assert check_reference(folder / base, folder / case / "adapter", merged, "peft") == count


# --- Rows, windows, workers ---

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]] = {  # tensor, a, b, fan_in_fan_out
    "linear": ((387, 70), (5, 70), (387, 5), False),
    "linear stored (in, out)": ((387, 150), (5, 387), (150, 5), True),
    "embedding": ((387, 150), (5, 387), (150, 5), False),
    "conv": ((260, 4, 3), (5, 4, 3), (260, 5, 1), False),
    "parameter": ((3, 260, 40), (15, 40), (260, 15), False),
    "bias": ((387,), (), (387,), False),
}


def example(folder: Path, label: str, dtype: str = "F16", *, seed: int = 0, dora: bool = False) -> tuple[LazyTensor, LowRank]:
    """A base and an update of it, from `<label>.safetensors`, which is made where there is none."""
    shape, a, b, transposed = SHAPES[label]
    path = folder / f"{label}.safetensors"
    if not path.exists():
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(size, generator=generator) * 0.03 for key, size in {"w": shape, "a": a, "b": b}.items() if size}
        saved(path, {"m": torch.rand(b[0], generator=generator), **tensors, "w": tensors["w"].to(DTYPES[dtype])})
    lazy = index_safetensors(path)[0]
    kind: Any = label.split()[0]
    magnitude = lazy["m"] if dora else None
    return lazy["w"], LowRank(kind=kind, a=lazy.get("a"), b=lazy["b"], scale=1.3, magnitude=magnitude, fan_in_fan_out=transposed)


# PEFT has no DoRA of parameters and biases.
@pytest.mark.parametrize(("label", "dora"), [*((label, False) for label in SHAPES), *((label, True) for label in list(SHAPES)[:4])])
def test_bits_and_counts_do_not_depend_on_the_rows_asked_for(label: str, dora: bool, tmp_path: Path) -> None:
    base, update = example(tmp_path, label, dora=dora)

    @settings(max_examples=3, database=None)
    @given(st.sets(st.integers(1, base.rows - 1), max_size=5))
    def check(cuts: set[int]) -> None:
        for arithmetic in ARITHMETICS:
            merged = add_low_rank(base, [update], arithmetic, name="q_proj.weight")
            whole, cut = Workspace(), Workspace()
            assert differing(made(merged, work=whole), made(merged, *sorted(cuts), work=cut)) == 0
            assert whole.tallies == cut.tallies
            assert base.numel * 0.999 < whole.tallies["updated"] <= base.numel

    check()


def test_a_single_row_has_the_bits_that_it_has_among_others(tmp_path: Path) -> None:
    base, update = example(tmp_path, "linear", "F32")
    merged = add_low_rank(base, [update], name="w")
    assert differing(made(merged, *range(1, merged.rows)), made(merged)) == 0
    factors = load_file(tmp_path / "linear.safetensors")
    alone = torch.cat([factors["w"][i : i + 1] + factors["b"][i : i + 1] @ factors["a"] * 1.3 for i in range(387)])
    assert differing(made(merged), factors["w"] + factors["b"] @ factors["a"] * 1.3) == 0
    assert torch.allclose(made(merged), alone, atol=1e-6)  # though not always equal


@pytest.mark.parametrize("label", ["linear", "embedding", "bias"])
def test_windows_are_cut_on_the_grid(label: str, tmp_path: Path) -> None:
    base, update = example(tmp_path, label)
    starts = [start for start, _ in row_ranges(add_low_rank(base, [update], name="w"), 150 * base.row_nbytes)]
    assert starts[:3] == [0, 128, 256]


def test_factors_are_read_once_and_let_go(tmp_path: Path) -> None:
    base, update = example(tmp_path, "linear")
    merged, other = (add_low_rank(base, [replace(update, scale=scale)], name="w") for scale in (1.0, 2.0))
    work, out = Workspace(), memoryview(bytearray(base.nbytes))
    reads: list[int] = []
    read = work.read
    work.read = lambda file, offset, data: (reads.append(offset), read(file, offset, data))[1]  # type: ignore[method-assign]
    for tensor in (merged, merged, other):
        tensor.rows_into(out, 0, base.rows, work)
    factor = update.b.offset  # type: ignore[attr-defined]
    assert (len(reads), reads.count(factor)) == (3 + 2 * 2, 2)
    work.close()
    assert not work._latest


def test_pickles_hashes_and_knows_its_files(tmp_path: Path) -> None:
    base, update = example(tmp_path, "linear", dora=True)
    merged = add_low_rank(base, [update], "exact", name="layers.0.q_proj.weight")
    assert pickle.loads(pickle.dumps(merged)) == merged
    assert hash(merged) != hash(add_low_rank(base, [update], "peft", name="layers.0.q_proj.weight"))
    assert set(merged.leaves()) == {base, update.a, update.b, update.magnitude}


# --- Several adapters ---


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("label", SHAPES)
def test_two_halves_make_a_whole(label: str, arithmetic: Arithmetic, tmp_path: Path) -> None:
    base, update = example(tmp_path, label, "BF16")
    half = replace(update, weight=0.5)
    whole = made(add_low_rank(base, [update], arithmetic, name="w"))
    assert differing(made(add_low_rank(base, [half, half], arithmetic, name="w")), whole) == 0
    nothing = add_low_rank(base, [update, replace(update, weight=-1.0)], arithmetic, name="w")
    assert differing(made(nothing), made(base)) == 0


def test_several_adapters_are_rounded_once(tmp_path: Path) -> None:
    base, first = example(tmp_path, "linear")
    folder = tmp_path / "second"
    folder.mkdir()
    second = replace(example(folder, "linear", seed=1)[1], weight=0.25)
    t, u = load_file(tmp_path / "linear.safetensors"), load_file(folder / "linear.safetensors")
    d = (t["b"] @ t["a"]) * 1.3 + (u["b"] @ u["a"]) * (1.3 * 0.25)
    merged = made(add_low_rank(base, [first, second], name="w"))
    assert differing(merged, (t["w"].float() + d).half()) == 0
    assert differing(merged, (t["w"] + (t["b"] @ t["a"] * 1.3).half()) + (u["b"] @ u["a"] * (1.3 * 0.25)).half())


def test_the_weight_of_a_dora_scales_the_whole_change(tmp_path: Path) -> None:
    base, update = example(tmp_path, "linear", "F32", dora=True)
    whole, half, none = (made(add_low_rank(base, [replace(update, weight=w)], name="w")) for w in (1.0, 0.5, 0.0))
    assert torch.allclose(half, (whole + made(base)) / 2, atol=1e-7)
    assert torch.equal(none, made(base))
    assert not torch.allclose(whole, made(base), atol=1e-2)


# --- The portable arithmetic ---

NUMBERS = (
    st.floats(-4096, 4096, width=32) | st.floats(-(2.0**-13), 2.0**-13, width=32) | st.sampled_from([0.0, 1.0, -1.0, 2.0**-24, 4096.0])
)


def ulp(value: float, dtype: torch.dtype) -> Fraction:
    info = torch.finfo(dtype)
    exponent = math.frexp(max(abs(value), info.smallest_normal))[1]
    return Fraction(2) ** (exponent - 1) * Fraction(info.eps)


@settings(max_examples=40, database=None, phases=[Phase.explicit, Phase.generate])
@given(st.lists(NUMBERS, min_size=20, max_size=20), st.sampled_from(sorted(DTYPES)))
def test_exact_is_the_number_nearest_to_the_truth(tmp_path_factory: Any, numbers: list[float], dtype: str) -> None:
    b, a, w = torch.tensor(numbers[:8]).view(2, 4), torch.tensor(numbers[8:16]).view(4, 2), torch.tensor(numbers[16:]).view(2, 2)
    w = w.to(DTYPES[dtype])
    lazy = saved(tmp_path_factory.getbasetemp() / f"exact-{os.getpid()}.safetensors", {"w": w, "a": a, "b": b})
    scale = 2.0**-14 / 3
    merged = made(add_low_rank(lazy["w"], [LowRank(kind="linear", a=lazy["a"], b=lazy["b"], scale=scale)], "exact", name="w"))
    for i, j in product(range(2), range(2)):
        terms = [Fraction(b[i, k].item()) * Fraction(a[k, j].item()) * Fraction(scale) for k in range(4)]
        truth = Fraction(w[i, j].item()) + sum(terms)
        noise = Fraction(2) ** -50 * (abs(Fraction(w[i, j].item())) + sum(map(abs, terms)))  # of float64
        assert abs(Fraction(merged[i, j].item()) - truth) <= ulp(float(truth), DTYPES[dtype]) / 2 + noise


@settings(max_examples=25, database=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 600), st.sampled_from([1.0, 1e3, 1e6]))
def test_slices_multiply_exactly_in_any_order(seed: int, rank: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    left, right = (
        torch.from_numpy((random.standard_normal(n) * spread ** random.standard_normal(n)).astype("f4").astype("f8"))
        for n in ((1, 3, rank), (1, rank, 4))
    )
    slices = exact_slices(left.clone(), 2), exact_slices(right.clone(), 1)
    assert torch.equal(sum(slices[0]), left)  # type: ignore[arg-type]
    assert torch.equal(sum(slices[1]), right)  # type: ignore[arg-type]
    for x, y in product(*slices):
        forward = sum(x[0, :, k, None] * y[0, k] for k in range(rank))
        assert torch.equal(x[0] @ y[0], forward)  # type: ignore[arg-type]
        assert torch.equal(x[0] @ y[0], torch.from_numpy(np.array([[math.fsum(r * c) for c in y[0].numpy().T] for r in x[0].numpy()])))


def test_factors_that_are_not_finite_end_somewhere() -> None:
    assert len(exact_slices(torch.tensor([[[1.0, math.inf]]], dtype=torch.float64), 2)) == 1
    assert len(exact_slices(torch.tensor([[[1.0, math.nan]]], dtype=torch.float64), 2)) == 1


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_rounds_once(dtype: str) -> None:
    """All midpoints between neighbours, moved by less than a float32 can hold: torch's own conversion rounds some of them wrongly."""
    bits = torch.arange(0, 0x7BFF if dtype == "F16" else 0x7F7F, dtype=torch.int16)
    low, high = bits.view(DTYPES[dtype]).double(), (bits + 1).view(DTYPES[dtype]).double()
    middle, even = (low + high) / 2, torch.where(bits % 2 == 0, low, high)
    for sign in (1, -1):
        for nudge, nearest in ((1 - 2.0**-40, low), (1 + 2.0**-40, high), (1.0, even)):
            assert differing(round_once(sign * middle * nudge, DTYPES[dtype]), (sign * nearest).to(DTYPES[dtype])) == 0
    assert differing((middle * (1 + 2.0**-40)).to(DTYPES[dtype]), high.to(DTYPES[dtype]))
    special = torch.tensor([math.inf, -math.inf, 1e300, -0.0], dtype=torch.float64)
    assert round_once(special, DTYPES[dtype]).tolist() == [math.inf, -math.inf, math.inf, 0.0]
    assert math.copysign(1, round_once(special, DTYPES[dtype])[3]) == -1
    assert round_once(torch.tensor([math.nan], dtype=torch.float64), DTYPES[dtype]).isnan().all()


@given(st.integers(0, 40), st.integers(1, 40))
@settings(database=None)
def test_row_sums(rows: int, columns: int) -> None:
    values = torch.arange(rows * columns, dtype=torch.float64).view(rows, columns)
    assert row_sums(values).tolist() == values.sum(1).tolist()


DIGESTS = """
import sys
from pathlib import Path
import torch
from llava_weights.tensors.dtypes import load_torch
import tensors.test_low_rank as tests
load_torch()
torch.set_num_threads(int(sys.argv[1]))
print(torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), *tests.exact_digests(Path(sys.argv[2])))
"""


def exact_digests(folder: Path) -> list[str]:
    digests = []
    for label, dora in product(SHAPES, (False, True)):
        base, update = example(folder, label, "F32", dora=dora and label not in ("parameter", "bias"))
        digests.append(hashlib.sha256(made(add_low_rank(base, [update], "exact", name="w")).numpy().tobytes()).hexdigest())
    return digests


def test_exact_has_the_same_digests_with_other_threads_and_instructions(tmp_path: Path) -> None:
    folders = [Path(__file__).parents[1], Path(__file__).parents[2]]
    oldest = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3"}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), **oldest}
    command = [sys.executable, "-W", "ignore", "-c", DIGESTS, "2", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    threads, capability, *digests = done.stdout.split()
    assert (threads, capability) == ("2", "DEFAULT")
    assert digests == exact_digests(tmp_path)
    assert len(set(digests)) == 8  # an embedding is a linear tensor stored (in, out), and two kinds have no DoRA


# --- What arrives ---


def test_what_arrives_is_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    w, a, b = (torch.randn(300, 200) * 0.02).bfloat16(), torch.randn(6, 200), torch.randn(300, 6) * 2e-5
    b[:40] = 0  # rows that are not touched
    lazy = saved(tmp_path / "x.safetensors", {"w": w, "a": a, "b": b})
    update = LowRank(kind="linear", a=lazy["a"], b=lazy["b"], scale=1.0)
    for arithmetic in ARITHMETICS:
        work = Workspace()
        merged = made(add_low_rank(lazy["w"], [update], arithmetic, name="model.layers.3.mlp.up_proj.weight"), 128, 131, work=work)
        d = (b.to(w.dtype) if arithmetic == "peft-half" else b).double() @ (a.to(w.dtype) if arithmetic == "peft-half" else a).double()
        found = retention(work.tallies)
        assert found == retention(work.tallies, "up_proj")
        assert found is not None
        assert (found.updated, found.moved) == (260 * 200, differing(merged, w))
        lost = ((merged.double() - w.double() - d).norm() / d.norm()).item()
        assert found.kept == pytest.approx(1 - lost, rel=1e-4)
        assert 0.1 < found.kept < 0.9
    assert retention(work.tallies, "q_proj") is None


@pytest.mark.parametrize(
    ("dtype", "shares"), [("F16", (0.08, 0.61, 0.96, 1.0)), ("BF16", (0.01, 0.10, 0.68, 0.97)), ("F32", (1.0, 1.0, 1.0, 1.0))]
)
def test_small_updates_are_lost_as_measured(dtype: str, shares: tuple[float, ...], tmp_path: Path) -> None:
    """The share that is kept of updates of these sizes, on weights of standard deviation 0.02, as measured by another program."""
    generator = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(size, generator=generator) for size in ((400, 400), (64, 400), (400, 64)))
    for size, share in zip((1e-6, 1e-5, 1e-4, 1e-3), shares, strict=True):
        lazy = saved(tmp_path / "x.safetensors", {"w": (w * 0.02).to(DTYPES[dtype]), "a": a, "b": b / 8})
        work = Workspace()
        made(add_low_rank(lazy["w"], [LowRank(kind="linear", a=lazy["a"], b=lazy["b"], scale=size)], name="w"), work=work)
        found = retention(work.tallies)
        assert found is not None
        assert found.kept == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_overflow_is_counted(arithmetic: Arithmetic, tmp_path: Path) -> None:
    base, update = example(tmp_path, "linear")
    for scale in (1e9, math.inf):
        work = Workspace()
        made(add_low_rank(base, [replace(update, scale=scale)], arithmetic, name="w"), work=work)
        assert work.tallies["non_finite"]


# --- What does not fit ---


def test_an_update_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base, update = example(tmp_path, "linear")
    for label, changes in {
        "other tensor": {"b": example(tmp_path, "embedding")[1].b},
        "stored (in, out)": {"fan_in_fan_out": True},
        "no A": {"a": None},
        "other kind": {"kind": "conv"},
        "as a bias": {"kind": "bias"},
        "ranks differ": {"a": LazyTensor(dtype="F32", shape=(6, 70))},
        "empty, as from ZeRO-3": {"a": LazyTensor(dtype="F32", shape=(0,))},
        "no number": {"a": LazyTensor(dtype="U8", shape=(5, 70))},
        "magnitude of columns": {"magnitude": LazyTensor(dtype="F32", shape=(70,))},
    }.items():
        with pytest.raises(MismatchError, match=r"`layers\.0\.q_proj\.weight`") as caught:
            add_low_rank(base, [replace(update, **changes)], name="layers.0.q_proj.weight")
        assert caught.value.facts["tensor"] == "F16 [387, 70]", label
    with pytest.raises(MismatchError):
        add_low_rank(LazyTensor(dtype="U8", shape=(387, 70)), [update], name="a quantized base")
    with pytest.raises(MismatchError, match="in different ways"):
        add_low_rank(base, [update, replace(update, kind="parameter")], name="w")


def test_nothing_to_add_changes_nothing(tmp_path: Path) -> None:
    base, _ = example(tmp_path, "bias")
    assert add_low_rank(base, [], name="w") is base


def test_of_a_large_matrix_a_fixed_sample_of_blocks_is_counted(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    w, a, b = (torch.randn(size, generator=generator) for size in ((BLOCK_ROWS * 33, 16), (4, 16), (BLOCK_ROWS * 33, 4)))
    lazy = saved(tmp_path / "x.safetensors", {"w": w, "a": a, "b": b})
    merged = add_low_rank(lazy["w"], [LowRank(kind="linear", a=lazy["a"], b=lazy["b"], scale=1e-8)], name="w")
    whole, cut = Workspace(), Workspace()
    assert differing(made(merged, work=whole), made(merged, 5, 700, BLOCK_ROWS * 32 + 1, work=cut)) == 0
    assert whole.tallies == cut.tallies
    assert whole.tallies["updated"] == 9 * BLOCK_ROWS * 16  # blocks 0, 4, ... 32
