"""A weight after bitsandbytes' round trip: the bits of bitsandbytes, whatever rows are asked for, in the memory that was planned."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest
import torch
from peers.matrices import DTYPES, matrix
from safetensors.torch import save_file

from llava_weights.formats.safetensors import index_safetensors
from llava_weights.storage.reading import Workspace
from llava_weights.tensors.lazy import LazyTensor
from llava_weights.tensors.low_rank import LowRank, add_low_rank
from llava_weights.tensors.round_trip import mean_as_torch, round_trip
from llava_weights.transforms.quantised_training import ROUNDINGS

DIGESTS = json.loads((Path(__file__).resolve().parents[2] / "fixtures/G-bitsandbytes/digests.json").read_text())
SHAPES = sorted({tuple(map(int, key.split()[0].split("x"))) for key in DIGESTS})


def stored(path: Path, weight: torch.Tensor) -> LazyTensor:
    save_file({"w": weight}, path)
    return index_safetensors(path)[0]["w"]


def values(tensor: LazyTensor, rows: int) -> bytes:
    """All values, made in windows of so many rows."""
    out = bytearray(tensor.nbytes)
    with closing(Workspace(drop_cache=False)) as work:
        for start in range(0, tensor.rows, rows):
            stop = min(start + rows, tensor.rows)
            tensor.rows_into(memoryview(out)[start * tensor.row_nbytes : stop * tensor.row_nbytes], start, stop, work)
    return bytes(out)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_are_those_of_bitsandbytes(tmp_path: Path, shape: tuple[int, int], rounding: str) -> None:
    for name, dtype in DTYPES.items():
        source = stored(tmp_path / f"{name}.safetensors", matrix(shape, dtype))
        made = round_trip(source, rounding.removesuffix("-double"), double=rounding.endswith("-double"))  # type: ignore[arg-type]
        for rows in (shape[0], max(shape[0] // 3, 1)):
            assert hashlib.sha256(values(made, rows)).hexdigest() == DIGESTS[f"{shape[0]}x{shape[1]} {name} {rounding}"], (name, rows)


def test_single_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    source = stored(tmp_path / "w.safetensors", matrix((33, 77), torch.float16))
    for rounding in ("nf4", "int8"):
        for double in (False, True):
            made = round_trip(source, rounding, double=double)  # type: ignore[arg-type]
            assert values(made, 1) == values(made, 33)


@pytest.mark.parametrize("count", [1, 5, 31, 32, 100, 1023, 20000, 100001])
def test_the_mean_is_the_one_of_torch(count: int) -> None:
    numbers = (torch.arange(count) * 7919 % 1009).float() / 1009 * 0.1
    assert mean_as_torch(numbers.numpy()) == numbers.mean().item()


def test_an_update_is_added_to_the_rounded_weight(tmp_path: Path) -> None:
    """In windows: factors and scales are both kept from one to the next."""
    weight = matrix((600, 128), torch.float16)
    save_file({"w": weight, "a": torch.rand(2, 128) / 64, "b": torch.rand(600, 2)}, tmp_path / "x.safetensors")
    found = index_safetensors(tmp_path / "x.safetensors")[0]
    base = round_trip(found["w"], "nf4", double=True)
    merged = add_low_rank(base, [LowRank(kind="linear", a=found["a"], b=found["b"], scale=0.5)], name="w")
    rounded = torch.frombuffer(bytearray(values(base, 600)), dtype=torch.float16).view(600, 128)
    a, b = (torch.frombuffer(bytearray(values(found[key], 600)), dtype=torch.float32).view(found[key].shape) for key in "ab")
    expected = (rounded.float() + (b @ a) * 0.5).half()
    assert not torch.equal(rounded, weight)
    for rows in (128, 600):
        assert torch.equal(torch.frombuffer(bytearray(values(merged, rows)), dtype=torch.float16).view(600, 128), expected)


@pytest.mark.parametrize(("rounding", "double"), [("nf4", True), ("nf4", False), ("int8", False)])
def test_memory_is_what_was_planned(tmp_path: Path, rounding: str, double: bool) -> None:
    """What Python and numpy allocate; torch's own buffers, a few pieces, are in the same plan."""
    source = stored(tmp_path / "w.safetensors", matrix((4096, 640), torch.float16))
    made = round_trip(source, rounding, double=double)  # type: ignore[arg-type]
    values(round_trip(stored(tmp_path / "v.safetensors", matrix((64, 64), torch.float16)), rounding, double=double), 64)  # type: ignore[arg-type]
    out = bytearray(256 * made.row_nbytes)
    tracemalloc.start()
    with closing(Workspace(drop_cache=False)) as work:
        made.rows_into(memoryview(out), 0, 256, work)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= made.scratch(256)
    assert made.scratch(256) < made.nbytes + (12 << 20)
