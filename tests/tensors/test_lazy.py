"""Lazy operations against torch's and numpy's own, for every window of rows."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_weights.storage.reading import SourceFile, Workspace, crc32_combine
from llava_weights.tensors.lazy import Add, ConcatColumns, ConcatRows, LazyTensor, PermuteRope, Stored, Subtract, cast, concat, read_rows

CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}


def stored(folder: Path, tensor: torch.Tensor, name: str = "x") -> Stored:
    """`tensor` as raw bytes in a file, a few bytes from its start."""
    path = folder / f"{name}.raw"
    path.write_bytes(b"\xff" * 6 + raw(tensor))
    return Stored(dtype=CODES[tensor.dtype], shape=tuple(tensor.shape), file=SourceFile.at(path), offset=6)


def whole(tensor: LazyTensor, step: int | None = None) -> bytes:
    """All rows, `step` at a time."""
    work, out = Workspace(), bytearray()
    for start in range(0, tensor.rows, step or max(tensor.rows, 1)):
        stop = min(start + (step or tensor.rows), tensor.rows)
        piece = bytearray((stop - start) * tensor.row_nbytes)
        tensor.rows_into(memoryview(piece), start, stop, work)
        out += piece
    work.close()
    return bytes(out)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("step", [1, 3, 4, 12, None])
def test_operations_equal_torch_whatever_the_window(tmp_path: Path, step: int | None) -> None:
    torch.manual_seed(1)
    a, b = torch.randn(12, 5).half(), torch.randn(9, 5).half()
    left, right = stored(tmp_path, a, "a"), stored(tmp_path, b, "b")
    total = a.clone()
    total[:9] += b
    less = a.clone()
    less[:9] -= b
    permuted = a.view(3, 2, 2, 5).transpose(1, 2).reshape(12, 5)
    cases = {
        raw(total): Add(dtype="F16", shape=(12, 5), base=right, delta=left),
        raw(less): Subtract(dtype="F16", shape=(12, 5), tuned=left, base=right),
        raw(torch.cat([a, b])): ConcatRows(dtype="F16", shape=(21, 5), parts=(left, right)),
        raw(torch.cat([a, a], dim=1)): concat((left, left), 1),
        raw(a.to(torch.bfloat16)): cast(left, "BF16"),
        raw(permuted): PermuteRope(dtype="F16", shape=(12, 5), source=left, heads=3),
    }
    for expected, lazy in cases.items():
        assert whole(lazy, step) == expected, lazy


@settings(max_examples=60)
@given(st.data())
def test_add_rounds_once_for_any_bits(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    bits = st.lists(st.integers(-32768, 32767), min_size=8, max_size=8)
    a, b = (torch.tensor(data.draw(bits), dtype=torch.int16).view(torch.float16) for _ in "ab")
    folder = tmp_path_factory.mktemp("bits")
    lazy = Add(dtype="F16", shape=(8,), base=stored(folder, b, "b"), delta=stored(folder, a, "a"))
    exact = (a.double() + b.double()).half()
    got = torch.frombuffer(bytearray(whole(lazy)), dtype=torch.float16)
    assert torch.equal(got.nan_to_num(7), exact.nan_to_num(7))


def test_cast_rounds_to_nearest_even_before_the_sum(tmp_path: Path) -> None:
    base = torch.tensor([1.0 + 2**-11, 1.0 + 3 * 2**-11, 70000.0])
    assert torch.frombuffer(bytearray(whole(cast(stored(tmp_path, base), "F16"))), dtype=torch.float16).tolist() == [
        1.0,
        1.0 + 2**-9,
        float("inf"),
    ]


def test_non_finite_results_are_counted(tmp_path: Path) -> None:
    big = stored(tmp_path, torch.tensor([60000.0, 1.0]).half(), "big")
    for dtype, value in (("F16", big), ("F32", cast(big, "F32"))):
        work = Workspace()
        lazy = Add(dtype=dtype, shape=(2,), base=value, delta=value)
        lazy.rows_into(memoryview(bytearray(lazy.nbytes)), 0, 2, work)
        assert work.tallies["non_finite"] == (dtype == "F16")


def test_subtract_counts_what_the_way_back_loses(tmp_path: Path) -> None:
    torch.manual_seed(2)
    base = (torch.randn(400, 50) * 0.02).half()
    tuned = (base + torch.randn(400, 50) * 3e-3).half()
    lazy, work = Subtract(dtype="F16", shape=(400, 50), tuned=stored(tmp_path, tuned, "t"), base=stored(tmp_path, base, "b")), Workspace()
    for start in range(0, 400, 100):
        lazy.rows_into(memoryview(bytearray(100 * 100)), start, start + 100, work)
    expected = int(((tuned - base) + base != tuned).sum())
    assert (work.tallies["lost"], work.tallies["elements"]) == (expected, 20000)
    assert expected > 100


def test_scalars_empties_and_other_dtypes(tmp_path: Path) -> None:
    for number, tensor in enumerate((torch.tensor(3.5), torch.zeros(0, 4), torch.zeros(4, 0), torch.arange(6).view(2, 3))):
        lazy = stored(tmp_path, tensor, str(number))
        assert whole(lazy) == raw(tensor)
        assert lazy.nbytes == tensor.numel() * tensor.element_size()


def test_samples_decode_every_float(tmp_path: Path) -> None:
    values = torch.tensor([[1.5, -2.0], [0.0, 3.0]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert read_rows(stored(tmp_path, values.to(dtype), str(dtype)), 1, 2, Workspace()).tolist() == [[0.0, 3.0]]


def test_concat_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fit together"):
        concat((stored(tmp_path, torch.zeros(2, 3), "a"), stored(tmp_path, torch.zeros(2, 4), "b")), 0)


def test_lazy_tensors_are_plain_data(tmp_path: Path) -> None:
    lazy = ConcatColumns(dtype="F16", shape=(2, 6), parts=(stored(tmp_path, torch.zeros(2, 3).half()),) * 2)
    assert pickle.loads(pickle.dumps(lazy)) == lazy
    assert hash(lazy) == hash(pickle.loads(pickle.dumps(lazy)))
    assert len(lazy.leaves()) == 2


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_crc_of_a_concatenation(first: bytes, second: bytes) -> None:
    import zlib

    assert crc32_combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)
