"""Zeros where an input should have values are refused, wherever they lie and however they came there; intended zeros are not."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import llava_weights as lw
from llava_weights.cli.toy import make_toys, write_torch_zip
from llava_weights.write.portions import execute_portion, to_portion

Arrays = dict[str, np.ndarray]
Cli = Callable[..., Any]
RNG = np.random.default_rng(7)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's inputs, its LLaMA also as `base` (safetensors) and `bin`, and the LLaVA that it makes as `llava` and `hf`."""
    folder = tmp_path_factory.mktemp("toys")
    make_toys(folder)
    lw.execute(lw.make_plan(lw.open_checkpoint(folder / "llama")), folder / "base")
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(folder / "vicuna" / name, folder / "base")
    shutil.copytree(folder / "vicuna", folder / "bin")
    write_torch_zip(folder / "bin" / "pytorch_model.bin", load_file(folder / "base" / "model.safetensors"))
    merged = lw.apply_delta(lw.open_checkpoint(folder / "llama"), lw.open_checkpoint(folder / "delta"))
    lw.execute(lw.make_plan(merged), folder / "llava")
    lw.execute(lw.make_plan(lw.convert(merged, "llava-hf", tower=lw.open_checkpoint(folder / "clip"))), folder / "hf")
    return folder


@pytest.fixture
def own(toys: Path, tmp_path: Path) -> Path:
    """A copy of the toys to damage."""
    shutil.copytree(toys, tmp_path / "own")
    return tmp_path / "own"


def zero(path: Path, start: int, size: int) -> None:
    """Zero some bytes of a file, which then looks as old as before."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(bytes(min(size, status.st_size - start)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def data_start(path: Path) -> int:
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def applied(folder: Path, base: str = "base") -> lw.Checkpoint:
    return lw.apply_delta(lw.open_checkpoint(folder / base), lw.open_checkpoint(folder / "delta"), accept_base=True)


def is_hole(error: BaseException) -> bool:
    return isinstance(error, lw.InputError) and error.exit_code == 3 and "zeros where values should be" in str(error)


# --- holes -------------------------------------------------------------------------------------------------------------


def stopped_at(folder: Path, out: Path) -> str:
    """When a run is refused: before the first byte, while streaming, or not."""
    try:
        plan = lw.make_plan(applied(folder))
    except lw.InputError:
        return "before"
    try:
        lw.execute(plan, out, reread=False)
    except lw.InputError:
        return "streaming"
    return "published"


@pytest.mark.parametrize("trials", [25, pytest.param(100, marks=pytest.mark.faults)])
@pytest.mark.parametrize("border", [1, 4096])
def test_a_hole_of_one_percent_is_never_published(own: Path, tmp_path: Path, trials: int, border: int) -> None:
    """A contiguous range at a random place of the base: any bytes, or blocks of 4 KiB."""
    path, rng = own / "base" / "model.safetensors", random.Random(trials)
    good, first = path.read_bytes(), data_start(path)
    seen = []
    for _ in range(trials):
        start = rng.randrange(first, len(good) - len(good) // 100) // border * border
        start, size = max(start, -(-first // border) * border), -(-len(good) // 100 // border) * border
        zero(path, start, size)
        seen.append(stopped_at(own, tmp_path / "out"))
        path.write_bytes(good)
    assert seen.count("published") == 0
    assert seen.count("before") >= 0.9 * trials
    assert not (tmp_path / "out").exists()


def test_a_preallocated_half_download_is_refused_before_anything_is_written(own: Path, tmp_path: Path, cli: Cli) -> None:
    path = own / "base" / "model.safetensors"
    zero(path, path.stat().st_size // 2, path.stat().st_size)
    arguments = ["apply-delta", "--base", own / "base", "--delta", own / "delta", "-o", tmp_path / "out"]
    for done in (cli(*arguments, "--dry-run"), cli(*arguments)):
        assert done.code == 3
        for fact in ("model.safetensors", "rows", "bytes", "download", "--accept-values", "Nothing was written"):
            assert fact in done.err if hasattr(done, "err") else fact in done.stderr
    assert not any((tmp_path / name).exists() for name in ("out", "out.partial"))


def test_accepted_values_are_a_warning_that_the_manifest_keeps(own: Path, tmp_path: Path, cli: Cli) -> None:
    path = own / "base" / "model.safetensors"
    zero(path, path.stat().st_size // 2, path.stat().st_size)
    arguments = ["apply-delta", "--base", own / "base", "--delta", own / "delta", "-o", tmp_path / "out"]
    done = cli(*arguments, "--accept-values", "--json")
    assert done.code == 0, done.stderr
    recipe = json.loads((tmp_path / "out" / "llava-weights.manifest.json").read_text())["recipe"]
    (warning,) = recipe[-1]["warnings"]
    assert "accepted" in warning
    assert "model.safetensors" in warning
    assert warning in json.loads(done.stdout.splitlines()[0])["steps"][-1]["warnings"]


def test_verify_fails_what_was_made_of_them(own: Path, tmp_path: Path) -> None:
    zero(own / "hf" / "model.safetensors", 300_001, 100_000)
    lw.execute(lw.make_plan(lw.convert(opened(own, "hf"), "llava"), accept_values=True), tmp_path / "out")
    assert lw.verify(tmp_path / "out").exit_code == 4


def test_a_run_that_a_hole_stopped_goes_on_once_it_is_accepted(own: Path, tmp_path: Path) -> None:
    plans = [lw.make_plan(applied(own), max_shard_size="100KB", accept_values=accept) for accept in (False, True)]
    zero(own / "base" / "model.safetensors", 500_001, 20_000)
    with pytest.raises(lw.InputError):
        lw.execute(plans[0], tmp_path / "out")
    assert lw.execute(plans[1], tmp_path / "out").resumed > 0


Make = Callable[[Path], lw.Checkpoint]
COMMANDS: Mapping[str, tuple[str, Make]] = {
    "apply-delta, base": ("base/model.safetensors", applied),
    "apply-delta, base in .bin": ("bin/pytorch_model.bin", lambda at: applied(at, "bin")),
    "apply-delta, Meta's base": ("llama/13B/consolidated.01.pth", lambda at: applied(at, "llama")),
    "apply-delta, delta": ("delta/pytorch_model-00002-of-00002.bin", applied),
    "make-delta, base": ("base/model.safetensors", lambda at: difference(at, "arithmetic")),
    "make-delta, tuned": ("llava/model.safetensors", lambda at: difference(at, "arithmetic")),
    "make-delta, integer": ("llava/model.safetensors", lambda at: difference(at, "integer")),
    "merge-lora, base": ("llava/model.safetensors", lambda at: merged(at)),
    "merge-lora, adapter": ("lora/adapter_model.bin", lambda at: merged(at)),
    "convert": ("llava/model.safetensors", lambda at: lw.convert(opened(at, "llava"), "llava-hf", tower=opened(at, "clip"))),
    "convert, tower": ("clip/pytorch_model.bin", lambda at: lw.convert(opened(at, "llava"), "llava-hf", tower=opened(at, "clip"))),
    "convert, a renaming": ("hf/model.safetensors", lambda at: lw.convert(opened(at, "hf"), "llava")),
}  # fmt: skip


def opened(at: Path, name: str) -> lw.Checkpoint:
    return lw.open_checkpoint(at / name)


def difference(at: Path, codec: str) -> lw.Checkpoint:
    return lw.make_delta(opened(at, "base"), opened(at, "llava"), codec=codec)


def merged(at: Path) -> lw.Checkpoint:
    return lw.merge_lora(opened(at, "llava"), [lw.open_adapter(at / "lora")])


@pytest.mark.parametrize("planned", [False, True], ids=["before", "while streaming"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_input_of_every_command(own: Path, tmp_path: Path, command: str, planned: bool) -> None:
    """A third of a file is zeroed before the plan is made, or after: then only the streaming can see it."""
    file, make = COMMANDS[command]
    path = own / file
    size = path.stat().st_size
    plan = lw.make_plan(make(own)) if planned else None
    zero(path, size // 2 + 101, size // 3)
    with pytest.raises(lw.InputError) as raised:
        lw.execute(plan or lw.make_plan(make(own)), tmp_path / "out")
    assert is_hole(raised.value) or "CRC-32" in str(raised.value) or file.endswith((".bin", ".pth"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["pool", "portion"])
def test_worker_processes_see_them_too(own: Path, tmp_path: Path, how: str) -> None:
    plan = lw.make_plan(applied(own))
    zero(own / "base" / "model.safetensors", 300_001, 20_000)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        runs = {
            "portion": partial(execute_portion, plan, tmp_path / "out", to_portion("1/1")),
            "pool": partial(lw.execute, plan, tmp_path / "out", pool=pool),
        }
        with pytest.raises(lw.InputError) as raised:
            runs[how]()
    assert is_hole(raised.value)


def test_what_streaming_accepts_is_recorded(own: Path, tmp_path: Path) -> None:
    plan = lw.make_plan(applied(own), accept_values=True)
    assert not plan.history[-1].warnings
    zero(own / "base" / "model.safetensors", 300_001, 20_000)
    lw.execute(plan, tmp_path / "out")
    recipe = json.loads((tmp_path / "out" / "llava-weights.manifest.json").read_text())["recipe"]
    assert "300,001 to 320,001" in recipe[-1]["warnings"][0]


def test_a_matrix_that_is_zero_as_a_whole(own: Path) -> None:
    change(own / "base", {"model.layers.2.mlp.up_proj.weight": np.zeros_like})
    with pytest.raises(lw.InputError, match="up_proj") as raised:
        lw.make_plan(applied(own))
    assert "3 of the same name" in raised.value.facts["evidence"]


def start_of(path: Path, name: str) -> int:
    entry = json.loads(path.read_bytes()[8 : data_start(path)])[name]
    return data_start(path) + int(entry["data_offsets"][0])


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param("model.layers.1.mlp.down_proj.weight", (12.63, 14.66), id="one whole row between two broken ones"),
        pytest.param("model.embed_tokens.weight", (100.969, 120.0), id="two values of a row"),
        pytest.param("model.layers.1.self_attn.q_proj.weight", (0, 64 + 10), id="a matrix, and rows of the next"),
    ],
)
def test_short_and_even_ones(own: Path, name: str, rows: tuple[float, float]) -> None:
    path = own / "base" / "model.safetensors"
    width = 512 if "down_proj" in name else 128
    start, stop = (int(start_of(path, name) + row * width) for row in rows)
    zero(path, start, stop - start)
    with pytest.raises(lw.InputError) as raised:
        lw.make_plan(applied(own))
    assert is_hole(raised.value)


def test_a_model_of_zeros(own: Path) -> None:
    change(own / "base", {"": np.zeros_like})
    with pytest.raises(lw.InputError) as raised:
        lw.make_plan(lw.convert(lw.open_checkpoint(own / "hf"), "llava")) and lw.make_plan(applied(own))
    assert is_hole(raised.value)
    assert lw.make_plan(applied(own), accept_values=True).history[-1].warnings


# --- files that are not read whole beforehand -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 32 MB with rows of 10 kB, as a 13B has them."""
    folder = tmp_path_factory.mktemp("wide")
    names = [f"model.layers.{number}.self_attn.{part}_proj.weight" for number in range(3) for part in "qk"]
    save({name: RNG.standard_normal((512, 5120)).astype(np.float16) for name in names}, folder)
    return folder


@pytest.fixture
def wide_file(wide: Path) -> Iterator[Path]:
    path = wide / "model.safetensors"
    good = path.read_bytes()
    yield path
    path.write_bytes(good)


def test_a_large_file_is_sampled_before(wide_file: Path) -> None:
    rng, good = random.Random(1), wide_file.read_bytes()
    for _ in range(20):
        zero(wide_file, rng.randrange(data_start(wide_file), len(good) - len(good) // 100), len(good) // 100)
        with pytest.raises(lw.InputError) as raised:
            lw.make_plan(lw.open_checkpoint(wide_file.parent))
        assert is_hole(raised.value)
        wide_file.write_bytes(good)


def test_a_range_that_was_never_written(wide_file: Path) -> None:
    """48 KiB between the samples: only the file system shows them, or streaming."""
    good = wide_file.read_bytes()
    start = 12_345 * 1024 // 4096 * 4096
    with open(wide_file, "wb") as file:
        file.write(good[:start])
        file.seek(start + 49_152)
        file.write(good[start + 49_152 :])
    with pytest.raises(lw.InputError) as raised:
        lw.execute(lw.make_plan(lw.open_checkpoint(wide_file.parent)), wide_file.parent / "out")
    assert is_hole(raised.value)
    assert f"{start:,} to {start + 49_152:,}" in raised.value.facts["bytes"]


def test_one_zero_matrix_in_a_large_file(wide_file: Path) -> None:
    change(wide_file.parent, {"model.layers.1.self_attn.k_proj.weight": np.zeros_like})
    with pytest.raises(lw.InputError, match=r"layers\.1\.self_attn\.k_proj") as raised:
        lw.make_plan(lw.open_checkpoint(wide_file.parent))
    assert is_hole(raised.value)


# --- what is no hole ----------------------------------------------------------------------------------------------------


def save(tensors: Arrays, folder: Path) -> None:
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def change(folder: Path, changes: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> None:
    """Change the tensors whose names contain a text."""
    tensors = load_file(folder / "model.safetensors")
    for part, function in changes.items():
        tensors |= {name: function(values).astype(values.dtype) for name, values in tensors.items() if part in name}
    save(tensors, folder)


def as_safetensors(delta: Path, values: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Replace a toy delta's .bin files by one safetensors file with other values."""
    tensors = {name: np.frombuffer(_bytes(leaf), np.float16).reshape(leaf.shape) for name, leaf in _leaves(delta)}
    for path in delta.glob("pytorch_model*"):
        path.unlink()
    save({name: values(name, array.copy()).astype(np.float16) for name, array in tensors.items()}, delta)


def _leaves(folder: Path) -> list[tuple[str, Any]]:
    return [(name, tensor) for name, tensor in lw.open_checkpoint(folder).tensors.items() if tensor.dtype == "F16"]


def _bytes(leaf: Any) -> bytes:
    return Path(leaf.file.path).read_bytes()[leaf.offset : leaf.offset + leaf.nbytes]


def sparse(share: float) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda name, values: values * (np.random.default_rng(3).random(values.shape) >= share)


def rows(name: str, values: np.ndarray) -> np.ndarray:
    """Runs of one to thirty rows are zero, as of tokens that were never seen."""
    if values.ndim > 1:
        for row in range(5, len(values), 40):
            values[row : row + 1 + row % 30] = 0
    return values


def seldom(name: str, values: np.ndarray) -> np.ndarray:
    """Zero rows, and between them some with one value: tokens that were seen once."""
    if values.ndim > 1 and len(values) > 100:
        few = values.copy()
        values[20:90] = 0
        values[30, 50] = values[31, 3] = values[60, 63] = few[60, 63] + 1
    return values


def blocks(name: str, values: np.ndarray) -> np.ndarray:
    """Half of the blocks of 16 x 16 values are zero."""
    kept = np.random.default_rng(5).random([-(-length // 16) for length in values.shape]) > 0.5
    return values * kept.repeat(16, 0).repeat(16, 1)[: values.shape[0], : values.shape[1]]


def matrices(function: Callable[[str, np.ndarray], np.ndarray]) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda name, values: function(name, values) if values.ndim > 1 else values


def without(*parts: str) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda name, values: values * 0 if any(part in name for part in parts) else values


DELTAS: Mapping[str, Callable[[str, np.ndarray], np.ndarray]] = {
    "half of the values": sparse(0.5),
    "99 % of the values": sparse(0.99),
    "99.9 % of the values": sparse(0.999),
    "all but the norms": without("proj.weight", "embed", "lm_head"),
    "a frozen module": without("q_proj", "mlp"),
    "frozen layers": without("layers.0.", "layers.3."),
    "one frozen matrix": without("layers.1.mlp.up_proj"),
    "frozen tables": without("embed_tokens", "lm_head"),
    "norms": without("norm"),
    "rows": matrices(rows),
    "rows of few values": matrices(seldom),
    "the upper half of each matrix": matrices(
        lambda name, values: np.concatenate([values[: len(values) // 2] * 0, values[len(values) // 2 :]])
    ),
    "blocks": matrices(blocks),
    "rows and columns": matrices(lambda name, values: rows(name, values) * (np.arange(values.shape[1]) < values.shape[1] - 20)),
}


@pytest.mark.parametrize("zeros", DELTAS)
def test_zeros_of_a_delta_are_differences(own: Path, tmp_path: Path, zeros: str) -> None:
    as_safetensors(own / "delta", DELTAS[zeros])
    lw.execute(lw.make_plan(applied(own)), tmp_path / "out")
    assert not any("zeros" in warning for warning in lw.make_plan(applied(own)).history[-1].warnings)


@pytest.mark.parametrize("zeros", ["all but the norms", "rows", "99 % of the values"])
def test_a_delta_that_is_only_cut_anew(own: Path, tmp_path: Path, zeros: str) -> None:
    """Without a history, its values tell what it is."""
    as_safetensors(own / "delta", DELTAS[zeros])
    lw.execute(lw.make_plan(opened(own, "delta"), max_shard_size="100KB"), tmp_path / "out")


def identity(values: np.ndarray) -> np.ndarray:
    return np.eye(len(values))


MODELS: Mapping[str, Mapping[str, Callable[[np.ndarray], np.ndarray]]] = {
    "padding of the vocabulary": {
        "embed_tokens": lambda v: np.concatenate([v[:250], v[250:] * 0]),
        "lm_head": lambda v: np.concatenate([v[:1] * 0, v[1:300], v[300:] * 0]),
    },
    "tokens that were never seen": {"embed_tokens": lambda v: rows("", v), "lm_head": lambda v: rows("", v)},
    "biases": {"bias": np.zeros_like},
    "norms of 0 and 1": {"layer_norm1": np.zeros_like, "layernorm.weight": np.ones_like, "model.norm": np.zeros_like},
    "projector of the identity": {"mm_projector.weight": np.zeros_like, "linear_2.weight": identity},
    "a module that is zero in all layers": {"o_proj.weight": np.zeros_like},
    "pruned rows": {"gate_proj": lambda v: np.where((np.arange(len(v)) % 11 < 3)[:, None], 0, v)},
    "pruned values": {"proj.weight": lambda v: v * (np.random.default_rng(1).random(v.shape) > 0.5)},
    "pruned blocks": {"proj.weight": lambda v: blocks("", v)},
    "pruned 2 of 4": {"proj.weight": lambda v: v * (np.arange(v.shape[-1]) % 4 < 2)},
    "padded columns": {"embed_tokens": lambda v: rows("", v) * (np.arange(v.shape[-1]) < 50)},
    "class and position embeddings": {"class_embedding": np.zeros_like, "position_embedding": lambda v: np.concatenate([v[:9], v[9:] * 0])},
}


@pytest.mark.parametrize("zeros", MODELS)
def test_zeros_that_are_meant(own: Path, tmp_path: Path, zeros: str) -> None:
    for name in ("llava", "hf"):
        change(own / name, MODELS[zeros])
    lw.execute(lw.make_plan(lw.convert(opened(own, "llava"), "llava-hf", tower=opened(own, "clip"))), tmp_path / "hf")
    lw.execute(lw.make_plan(lw.convert(opened(own, "hf"), "llava")), tmp_path / "llava")
    lw.execute(lw.make_plan(merged(own)), tmp_path / "merged")


def test_an_untrained_adapter(own: Path, tmp_path: Path) -> None:
    path = own / "lora" / "adapter_model.bin"
    tensors = {name: values.numpy() * (0 if "lora_B" in name else 1) for name, values in torch.load(path, weights_only=True).items()}
    write_torch_zip(path, tensors)
    lw.execute(lw.make_plan(merged(own)), tmp_path / "out")


def test_every_reference_input_is_copied(fixtures: Path, tmp_path: Path) -> None:
    """In the strictest role, that of whole weights."""
    folders = sorted({path.parent for path in fixtures.rglob("*") if path.suffix in (".safetensors", ".bin", ".pth")})
    copied = 0
    for number, folder in enumerate(folders):
        try:
            checkpoint = lw.open_checkpoint(folder)
        except lw.InputError:
            continue
        lw.execute(lw.make_plan(checkpoint), tmp_path / str(number), reread=False)
        copied += 1
    assert copied > 20


@settings(max_examples=60, derandomize=True)
@given(data=st.data())
def test_rows_that_are_zero_are_never_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any rows of a vocabulary table or a delta, in files with any alignment."""
    folder, out = tmp_path_factory.mktemp("rows"), tmp_path_factory.mktemp("out")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    height, width = data.draw(st.integers(2, 300)), data.draw(st.sampled_from([8, 64, 100, 2048]))
    values = rng.standard_normal((height, width)).astype(data.draw(st.sampled_from([np.float16, np.float32])))
    for start, count in data.draw(st.lists(st.tuples(st.integers(0, height), st.integers(1, height)), max_size=8)):
        values[start : start + count] = 0
    values[data.draw(st.integers(0, height - 1))] = 1
    text = "x" * data.draw(st.integers(0, 300))
    save_file({"model.embed_tokens.weight": values, "other": rng.standard_normal(7)}, folder / "model.safetensors", {"text": text})
    lw.execute(lw.make_plan(lw.open_checkpoint(folder)), out, reread=False)


# --- verify -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", ["llava", "base", "bin", "hf"])
def test_verify_finds_them(own: Path, name: str, deep: bool) -> None:
    assert not [finding for finding in lw.verify(own / name).findings if finding.level == "L1" and finding.verdict == "failed"]
    path = next(path for path in (own / name).iterdir() if path.name in ("model.safetensors", "pytorch_model.bin"))
    leaf = max(_leaves(own / name), key=lambda named: named[1].nbytes)[1]
    zero(path, leaf.offset + 1011, 20_000)
    found = [finding for finding in lw.verify(own / name, deep=deep).findings if finding.verdict == "failed" and "zeros" in finding.text]
    assert {finding.level for finding in found} == ({"L1", "L3"} if deep else {"L1"})
    assert all("rows" in finding.text and path.name in finding.text for finding in found)


def test_verify_deep_finds_what_samples_miss(wide_file: Path) -> None:
    zero(wide_file, 12_345_678, 49_152)
    levels = {finding.level for finding in lw.verify(wide_file.parent, deep=True).findings if "holds zeros" in finding.text}
    assert levels == {"L3"}
