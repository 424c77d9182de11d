"""Vocabulary tables that grow: new rows hold the float64 mean of the old ones, however they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llava_weights.formats.safetensors import index_safetensors
from llava_weights.storage.reading import Workspace
from llava_weights.tensors.lazy import LazyTensor
from llava_weights.tensors.resize import SUM_BLOCK_BYTES, encoded, resized


def stored(tensor: torch.Tensor, folder: Path) -> LazyTensor:
    save_file({"x": tensor}, folder / "x.safetensors")
    return index_safetensors(folder / "x.safetensors")[0]["x"]


def made(tensor: LazyTensor, start: int = 0, stop: int | None = None) -> bytes:
    stop = tensor.rows if stop is None else stop
    out = bytearray((stop - start) * tensor.row_nbytes)
    tensor.rows_into(memoryview(out), start, stop, Workspace())
    return bytes(out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_new_rows_are_the_mean(tmp_path: Path, dtype: torch.dtype) -> None:
    old = torch.randn(300, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    table = resized(stored(old, tmp_path), 305)
    whole = torch.frombuffer(bytearray(made(table)), dtype=dtype).view(305, 8)
    assert torch.equal(whole[:300], old)
    assert torch.equal(whole[300:], old.double().mean(0).to(dtype).expand(5, 8))
    assert not table.uses_torch


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 20), st.data())
def test_any_rows_are_those_of_the_whole(tmp_path_factory: pytest.TempPathFactory, rows: int, new: int, data: st.DataObject) -> None:
    table = resized(stored(torch.arange(rows * 3, dtype=torch.float32).view(rows, 3), tmp_path_factory.mktemp("x")), rows + new)
    start = data.draw(st.integers(0, table.rows))
    stop = data.draw(st.integers(start, table.rows))
    assert made(table, start, stop) == made(table)[start * 12 : stop * 12]


def test_fewer_rows_and_as_many(tmp_path: Path) -> None:
    source = stored(torch.arange(12.0).view(4, 3), tmp_path)
    assert resized(source, 4) is source
    assert made(resized(source, 2)) == made(source)[:24]


def test_the_mean_is_read_in_blocks(tmp_path: Path) -> None:
    old = torch.randn(100, 25_000).half()
    assert old.nbytes > 4 * SUM_BLOCK_BYTES
    table = resized(stored(old, tmp_path), 101)
    assert made(table, 100, 101) == encoded(old.double().mean(0).numpy(), "F16")  # sums of F16 are exact in float64


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_rounding_is_torchs(values: list[float]) -> None:
    given_values = np.array(values, np.float64)
    expected = torch.tensor(values, dtype=torch.float64).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    assert encoded(given_values, "BF16") == expected


def test_every_nan_stays_one_in_bfloat16() -> None:
    """Rounding a NaN whose bits are all ones would carry into the sign: -0."""
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF8000, 0x7F800001, 0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF], "<u4")
    found = np.frombuffer(encoded(bits.view("<f4"), "BF16"), "<u2")
    expected = torch.from_numpy(bits.view("<f4").copy()).to(torch.bfloat16).view(torch.int16).numpy().view("<u2")
    assert found[5:].tolist() == expected[5:].tolist()
    assert found[:5].tolist() == [0x7FC0] * 5  # the one NaN on every machine; which torch writes depends on the processor
