"""The lossless delta: every bit comes back, a decoder written from the definition agrees, and hostile files are refused."""

from __future__ import annotations

import json
import pickle
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from blake3 import blake3
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from xxhash import xxh3_128

from llava_weights.errors import InputError, MismatchError, VerificationError
from llava_weights.formats import integer_delta
from llava_weights.formats.folder import index_folder
from llava_weights.formats.integer_delta import (
    IntegerDifference,
    IntegerShard,
    ToInteger,
    index_integer_delta,
    is_integer_delta,
    write_integer_shard,
)
from llava_weights.formats.safetensors import index_safetensors
from llava_weights.storage.reading import Workspace
from llava_weights.tensors.lazy import LazyTensor
from llava_weights.write.plan import Settings, Shard
from llava_weights.write.shard import write_shard

FLOATS = {"F16": (torch.float16, torch.int16), "BF16": (torch.bfloat16, torch.int16), "F32": (torch.float32, torch.int32)}
Tensors = dict[str, torch.Tensor]


def pair(tuned: LazyTensor, base: LazyTensor | None) -> ToInteger:
    return ToInteger(dtype=tuned.dtype, shape=tuned.shape, tuned=tuned, base=base)


def bits(dtype: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random bits: NaNs with payloads, infinities, subnormals and both zeros among them."""
    integer = FLOATS[dtype][1]
    limits = torch.iinfo(integer)
    values = torch.randint(limits.min, limits.max + 1, shape, dtype=torch.int64, generator=torch.Generator().manual_seed(seed))
    return values.to(integer).view(FLOATS[dtype][0])


def saved(path: Path, tensors: Tensors) -> dict[str, LazyTensor]:
    save_file(tensors, path)
    return dict(index_safetensors(path)[0])


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def read(tensor: LazyTensor, start: int = 0, stop: int | None = None, work: Workspace | None = None) -> bytes:
    stop = tensor.rows if stop is None else stop
    out = bytearray((stop - start) * tensor.row_nbytes)
    mine = work or Workspace()
    try:
        tensor.rows_into(memoryview(out), start, stop, mine)
    finally:
        mine.close()
    return bytes(out)


def index(path: Path) -> dict[str, IntegerDifference]:
    tensors, metadata = index_safetensors(path)
    return index_integer_delta(tensors, {path.name: metadata})


class Made:
    """A delta of real tensors on disk, with the lazy tensors it was made of."""

    def __init__(self, folder: Path, tuned: Tensors, base: Tensors, *, jobs: int = 2) -> None:
        self.path = folder / "model.safetensors"
        self.tuned = saved(folder / "tuned.safetensors", tuned)
        self.base = saved(folder / "base.safetensors", base)
        self.result = self.write(jobs=jobs)

    def write(self, path: Path | None = None, **options: Any) -> IntegerShard:
        return write_integer_shard(
            path or self.path, [(name, pair(tuned, self.base.get(name))) for name, tuned in self.tuned.items()], **options
        )

    def restored(self) -> dict[str, LazyTensor]:
        return {name: difference.onto(self.base.get(name)) for name, difference in index(self.path).items()}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_delta, "BLOCK_BYTES", 100)
    monkeypatch.setattr(integer_delta, "CHUNK_VALUES", 8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_bit_comes_back(tmp_path: Path, dtype: str) -> None:
    patterns = (
        torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(FLOATS[dtype][0])
        if dtype != "F32"
        else bits(dtype, 65536)
    )
    others = bits(dtype, 65536, seed=1)
    tuned = {"all onto random": patterns, "random onto all": others, "onto itself": patterns, "onto its negative": patterns}
    negative = (patterns.view(FLOATS[dtype][1]) ^ torch.iinfo(FLOATS[dtype][1]).min).view(FLOATS[dtype][0])
    base = {"all onto random": others, "random onto all": patterns, "onto itself": patterns, "onto its negative": negative}
    tuned, base = {k: v.clone() for k, v in tuned.items()}, {k: v.clone() for k, v in base.items()}
    made = Made(tmp_path, tuned, base)
    for name, tensor in made.restored().items():
        assert (tensor.dtype, tensor.shape) == (dtype, (65536,))
        assert read(tensor) == raw(tuned[name])
    assert index(made.path)["onto itself"].stored.nbytes < 100


@st.composite
def pairs(draw: st.DrawFn) -> tuple[str, tuple[int, ...], int | None]:
    """dtype and shape of a tuned tensor, and the rows of its base, None for no base."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    rows = draw(st.none() | st.integers(0, 12)) if shape else draw(st.sampled_from([None, 1]))
    return draw(st.sampled_from(sorted(FLOATS))), shape, rows


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(pairs(), max_size=4), st.integers(1, 3), st.data())
@example([("F16", (), 1), ("F32", (0, 3), 2), ("BF16", (3, 0), 3), ("F16", (9, 7), 5)], 2, None)
def test_any_rows_of_any_shape(
    small_blocks: None, tmp_path_factory: pytest.TempPathFactory, cases: list[tuple[str, tuple[int, ...], int | None]], jobs: int, data: Any
) -> None:
    """Blocks of up to 100 bytes: added rows that begin inside one, no base, more base rows than tuned, scalars, empty tensors."""
    tuned = {f"é.{i}": bits(dtype, *shape, seed=i) for i, (dtype, shape, _) in enumerate(cases)}
    known = {f"é.{i}": (dtype, shape, rows) for i, (dtype, shape, rows) in enumerate(cases) if rows is not None}
    base = {name: bits(dtype, *((rows, *shape[1:]) if shape else ()), seed=99) for name, (dtype, shape, rows) in known.items()}
    made = Made(tmp_path_factory.mktemp("x"), tuned, base, jobs=jobs)
    for name, tensor in made.restored().items():
        assert tensor.shape == tuple(tuned[name].shape)
        whole = raw(tuned[name])
        assert read(tensor) == whole
        start = data.draw(st.integers(0, tensor.rows)) if data else tensor.rows // 2
        stop = data.draw(st.integers(start, tensor.rows)) if data else tensor.rows
        assert read(tensor, start, stop) == whole[start * tensor.row_nbytes : stop * tensor.row_nbytes]


def decode(blocks: bytes, entry: dict[str, Any], base: bytes) -> bytes:
    """The definition, one value at a time in Python's integers."""
    width = {"F16": 2, "BF16": 2, "F32": 4}[entry["dtype"]]
    row = width * int(np.prod(entry["shape"][1:]))
    top, modulus = 1 << (8 * width - 1), 1 << (8 * width)
    out = b""
    for size in entry["blocks"]:
        block, blocks = blocks[:size], blocks[size:]
        planes = zstandard.ZstdDecompressor().decompress(block)
        count = len(planes) // width
        for number in range(count):
            stored = sum(planes[plane * count + number] << (8 * plane) for plane in range(width))
            if len(out) < entry["base_rows"] * row:
                known = int.from_bytes(base[len(out) : len(out) + width], "little")
                rank = known if known < top else -1 - (known - top)
                rank += -(stored + 1) // 2 if stored % 2 else stored // 2
                rank = (rank + top) % modulus - top
                stored = rank if rank >= 0 else top + (-1 - rank)
            out += stored.to_bytes(width, "little")
    assert not blocks
    return out


def test_a_decoder_written_from_the_definition(small_blocks: None, tmp_path: Path) -> None:
    tuned = {dtype: bits(dtype, 40, 6) for dtype in FLOATS} | {"projector": bits("F16", 9)}
    base = {dtype: bits(dtype, 33, 6, seed=1) for dtype in FLOATS}
    made = Made(tmp_path, tuned, base)
    with safe_open(made.path, "pt") as file:
        assert set(file.keys()) == set(tuned)
        metadata = file.metadata()
        stored = {name: file.get_tensor(name) for name in tuned}
    assert (metadata["format"], metadata["version"]) == ("llava-weights.integer-delta", "2")
    entries = json.loads(metadata["tensors"])
    for name, entry in entries.items():
        assert stored[name].dtype == torch.uint8
        assert decode(raw(stored[name]), entry, raw(base.get(name, torch.empty(0)))) == raw(tuned[name])
        assert entry["blake3"] == blake3(raw(tuned[name])).hexdigest() == index(made.path)[name].digest
        assert made.result.tensors[name] == blake3(raw(stored[name])).hexdigest()
    assert entries["projector"]["base_rows"] == 0
    assert len(entries["F32"]["blocks"]) == 10


def test_the_file_does_not_depend_on_jobs(small_blocks: None, tmp_path: Path) -> None:
    tuned = {str(i): bits("F16", 50, 8, seed=i) for i in range(6)}
    made = Made(tmp_path, tuned, {str(i): bits("F16", 45, 8) for i in range(3)}, jobs=1)
    sizes: list[int] = []
    results = [made.write(tmp_path / f"{jobs}", jobs=jobs, on_bytes=sizes.append) for jobs in (1, 2, 5)]
    whole = made.path.read_bytes()
    assert {(tmp_path / f"{jobs}").read_bytes() for jobs in (1, 2, 5)} == {whole}
    assert set(map(repr, results)) == {repr(made.result)}
    assert sum(sizes) == 3 * made.result.raw_nbytes == 3 * 6 * 50 * 8 * 2
    assert made.result.sha256 == sha256(whole).hexdigest()
    assert made.result.read_back == xxh3_128(whole).hexdigest()
    assert made.result.nbytes == len(whole)
    assert made.result.packed_nbytes == sum(difference.stored.nbytes for difference in index(made.path).values())


def test_reference_model_through_torch_files(fixtures: Path, tmp_path: Path) -> None:
    """A fine-tuned LLaVA and its base as their own programs saved them: grown vocabulary, projector, two `.bin` shards each."""
    base = dict(index_folder(fixtures / "A-delta-v0/base-hf-bin").tensors)
    tuned = dict(index_folder(fixtures / "A-delta-v0/target-307/llava-tiny-v0").tensors)
    names = sorted(tuned)
    files = {}
    for number, part in enumerate((names[::2], names[1::2])):
        path = tmp_path / f"model-0000{number + 1}-of-00002.safetensors"
        write_integer_shard(path, [(name, pair(tuned[name], base.get(name))) for name in part])
        files[path.name] = index_safetensors(path)
    metadata = {name: texts for name, (_, texts) in files.items()}
    assert is_integer_delta(metadata)
    assert not is_integer_delta({"model.safetensors": {"format": "pt"}})
    differences = index_integer_delta({name: t for tensors, _ in files.values() for name, t in tensors.items()}, metadata)
    assert differences.keys() == tuned.keys()
    known: Tensors = {}
    for path in sorted((fixtures / "A-delta-v0/target-307/llava-tiny-v0").glob("*.bin")):
        known |= torch.load(path, weights_only=True)
    for name, difference in differences.items():
        assert read(difference.onto(base.get(name))) == raw(known[name])
    assert (
        differences["model.embed_tokens.weight"].base_rows
        == base["model.embed_tokens.weight"].rows
        < known["model.embed_tokens.weight"].shape[0]
    )


@pytest.mark.parametrize(
    ("dtype", "change", "share"),
    [("F16", 1e-5, 0.25), ("F16", 1e-4, 0.43), ("F16", 1e-3, 0.67), ("BF16", 1e-5, 0.095), ("BF16", 1e-4, 0.27), ("BF16", 1e-3, 0.46)],
)
def test_size(tmp_path: Path, dtype: str, change: float, share: float) -> None:
    """The sizes that other tools gave for weights of standard deviation 0.02."""
    random = torch.Generator().manual_seed(7)
    base = (torch.randn(1 << 19, generator=random) * 0.02).to(FLOATS[dtype][0])
    tuned = (base.float() + torch.randn(1 << 19, generator=random) * change).to(FLOATS[dtype][0])
    made = Made(tmp_path, {"a": tuned}, {"a": base})
    assert made.result.packed_nbytes / made.result.raw_nbytes == pytest.approx(share, abs=0.012)


def test_blocks_are_about_four_megabytes(tmp_path: Path) -> None:
    shapes = {"wide": (600, 5120), "flat": (3 << 20,), "row of 5 MB": (2, 2_500_000)}
    made = Made(tmp_path, {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}, {})
    found = {name: (difference.block_rows, len(difference.blocks)) for name, difference in index(made.path).items()}
    assert found == {"wide": (256, 3), "flat": (1 << 21, 2), "row of 5 MB": (1, 2)}
    assert made.restored()["wide"].row_unit == 256


class Counting(Workspace):
    """Notes the most scratch memory that was alive at once."""

    alive = most = 0

    @contextmanager
    def scratch(self, nbytes: int) -> Iterator[memoryview]:
        self.alive += nbytes
        self.most = max(self.most, self.alive)
        with super().scratch(nbytes) as view:
            yield view
        self.alive -= nbytes


def test_scratch_keeps_its_promise_and_tasks_travel(small_blocks: None, tmp_path: Path) -> None:
    made = Made(tmp_path, {"a": bits("F16", 64, 9), "new": bits("F16", 64, 9)}, {"a": bits("F16", 50, 9, seed=1)})
    for tensor in made.restored().values():
        again = pickle.loads(pickle.dumps(tensor))
        assert again == tensor
        assert hash(again) == hash(tensor)
        assert {leaf.file for leaf in again.leaves()} <= {made.base["a"].leaves()[0].file, index(made.path)["a"].stored.file}
        for start, stop in ((0, 64), (3, 4), (4, 20), (45, 55)):
            work = Counting()
            read(again, start, stop, work)
            assert 0 < work.most <= tensor.scratch(stop - start)


def test_a_base_that_does_not_fit(tmp_path: Path) -> None:
    made = Made(tmp_path, {"a": bits("F16", 8, 3)}, {"a": bits("F16", 6, 3)})
    difference = index(made.path)["a"]
    for number, other in enumerate((bits("F16", 7, 3), bits("F16", 6, 4), bits("BF16", 6, 3), bits("F16", 6), None)):
        lazy = saved(tmp_path / f"{number}", {"a": other})["a"] if other is not None else None
        with pytest.raises(MismatchError, match="`a`"):
            difference.onto(lazy)
    wrong = saved(tmp_path / "wrong", {"a": bits("F16", 6, 3, seed=5)})["a"]
    assert blake3(read(difference.onto(wrong))).hexdigest() != difference.digest
    assert blake3(read(difference.onto(made.base["a"]))).hexdigest() == difference.digest


def test_what_can_not_be_stored(tmp_path: Path) -> None:
    half, brain, whole = (
        saved(tmp_path / name, {"a": t})["a"] for name, t in (("h", bits("F16", 4, 4)), ("b", bits("BF16", 4, 4)), ("i", torch.arange(3)))
    )
    path = tmp_path / "out"
    for source, error in ((pair(half, brain), MismatchError), (pair(whole, None), InputError)):
        with pytest.raises(error, match="`a`"):
            write_integer_shard(path, [("a", source)])
    wide = LazyTensor(dtype="F16", shape=(1, (32 << 20) + 1))  # of which no row can be made
    with pytest.raises(InputError, match="one row of `a` has 67,108,866 bytes"):
        write_integer_shard(path, [("a", pair(wide, None))])
    assert not path.exists()


def test_failures_leave_nothing(small_blocks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tmp_path, {"a": bits("F16", 400, 8)}, {"a": bits("F16", 400, 8, seed=1)})

    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.write(on_bytes=interrupt)
    assert not made.path.exists()
    with pytest.raises(OSError, match="No such file"):
        made.write(tmp_path / "missing/x")
    with monkeypatch.context() as patch:
        patch.setattr(
            integer_delta,
            "pack",
            lambda raw, base, width, planes, pack=integer_delta.pack: pack(raw, memoryview(bytes(len(base))), width, planes),
        )
        with pytest.raises(VerificationError, match=r"rows 0 to 4 of `a` do not come back"):
            made.write()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "zstandard", None)
        with pytest.raises(InputError) as caught:
            made.write()
        assert caught.value.hint == "pip install zstandard"
    with (tmp_path / "base.safetensors").open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(InputError, match=r"`base.safetensors` changed"):
        made.write()
    assert not made.path.exists()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]


def zeros_bomb(claimed: int | None) -> bytes:
    """A zstandard frame written by hand (RFC 8878): 8,192 blocks that repeat a zero 128 Ki times, 1 GiB in 32 kB."""
    header = b"\x28\xb5\x2f\xfd" + (b"\xa4" + claimed.to_bytes(4, "little") if claimed is not None else b"\x04\x58")
    block = (2 | (128 << 10) << 3).to_bytes(3, "little") + b"\0"
    last = (1 | 2 | (128 << 10) << 3).to_bytes(3, "little") + b"\0"
    return header + block * 8191 + last + bytes(4)


TUNED = bytes(np.random.default_rng(3).integers(0, 9, 64, np.uint8))
SOUND = zstandard.ZstdCompressor(write_checksum=True).compress(TUNED)
UNCHECKED = zstandard.ZstdCompressor().compress(TUNED)
OTHER_SIZE = zstandard.ZstdCompressor(write_checksum=True).compress(TUNED[:-2])
SKIPPABLE = b"\x50\x2a\x4d\x18" + bytes(4)


def forged(path: Path, payload: bytes, *, texts: dict[str, str] | None = None, tensor: torch.Tensor | None = None, **changes: Any) -> Path:
    """A file of version 1 whose tensor `a` is F16 [32] in one block, without a base, with something changed."""
    entry = {"dtype": "F16", "shape": [32], "base_rows": 0, "block_rows": 32, "blocks": [len(payload)], "sha256": "0" * 64}
    described = json.dumps({"a": {key: value for key, value in {**entry, **changes}.items() if value is not ...}})
    metadata = {"format": "llava-weights.integer-delta", "version": "1", "tensors": described, **(texts or {})}
    save_file({"a": torch.tensor(list(payload), dtype=torch.uint8) if tensor is None else tensor}, path, metadata)
    return path


def test_a_file_by_hand_is_read(tmp_path: Path) -> None:
    lazy = index(forged(tmp_path / "x", SOUND))["a"].onto(None)
    assert read(lazy) == bytes(np.frombuffer(TUNED, np.uint8).reshape(2, 32).T.reshape(-1))


@pytest.mark.parametrize(("version", "algorithm"), [("1", "sha256"), ("2", "blake3")])
@pytest.mark.parametrize("right", [True, False])
def test_what_the_maker_recorded_is_compared_when_it_is_written(tmp_path: Path, version: str, algorithm: str, right: bool) -> None:
    values = bytes(np.frombuffer(TUNED, np.uint8).reshape(2, 32).T.reshape(-1))
    digest = {"sha256": sha256, "blake3": blake3}[algorithm](values if right else values[::-1]).hexdigest()
    changes: dict[str, Any] = {"sha256": ...} | {algorithm: digest}
    difference = index(forged(tmp_path / "x", SOUND, texts={"version": version}, **changes))["a"]
    assert (difference.algorithm, difference.digest) == (algorithm, digest)
    shard = Shard("y.safetensors", (("a", difference.onto(None)),))
    if right:
        assert write_shard(shard, tmp_path, Settings()).tensors == {"a": blake3(values).hexdigest()}
    else:
        with pytest.raises(MismatchError, match="`a` does not come out as the delta's maker recorded"):
            write_shard(shard, tmp_path, Settings())
        assert not (tmp_path / "y.safetensors").exists()


HOSTILE_BLOCKS = {
    "claims 1 GiB and holds it": zeros_bomb(1 << 30),
    "claims 64 bytes and holds 1 GiB": zeros_bomb(64),
    "claims nothing and holds 1 GiB": zeros_bomb(None),
    "no checksum": UNCHECKED,
    "62 bytes": OTHER_SIZE,
    "nothing": b"",
    "no frame": bytes(40),
    "two frames": SOUND + SOUND,
    "an empty frame behind it": SOUND + zstandard.ZstdCompressor().compress(b""),
    "a skippable frame behind it": SOUND + SKIPPABLE,
    "a skippable frame before it": SKIPPABLE + SOUND,
    "a byte behind it": SOUND + b"\0",
    **{f"truncated by {cut}": SOUND[:-cut] for cut in range(1, len(SOUND))},
}


@pytest.mark.parametrize("case", HOSTILE_BLOCKS)
def test_hostile_block_is_refused(tmp_path: Path, case: str) -> None:
    lazy = index(forged(tmp_path / "x", HOSTILE_BLOCKS[case]))["a"].onto(None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="a block of `a` is damaged"):
        read(lazy)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    """A few bits of a frame have no meaning (reserved, or another spelling of the same); every other flipped bit is refused."""
    tuned = bits("F16", 32)
    made = Made(tmp_path, {"a": tuned}, {"a": bits("F16", 32, seed=1)})
    stored = index(made.path)["a"].stored
    packed, base, out = read(stored), memoryview(read(made.base["a"])), memoryview(bytearray(64))
    refused = 0
    for bit in range(8 * len(packed)):
        damaged = bytearray(packed)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            integer_delta.unpack(memoryview(damaged), 64, base, 2, out, name="a")
            assert out == raw(tuned)
        except InputError:
            refused += 1
    assert refused >= 8 * len(packed) - 4


HOSTILE_DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "unknown dtype": {"dtype": "F64"},
    "dtype is a list": {"dtype": ["F16"]},
    "negative axis": {"shape": [-32]},
    "axis is true": {"shape": [True]},
    "huge axis": {"shape": [1 << 60]},
    "many axes": {"shape": [1] * 9},
    "shape is a text": {"shape": "32"},
    "more rows than blocks": {"shape": [33]},
    "more base rows than rows": {"base_rows": 33},
    "negative base rows": {"base_rows": -1},
    "base rows are a float": {"base_rows": 1.0},
    "no rows in a block": {"block_rows": 0},
    "negative rows in a block": {"block_rows": -32},
    "rows in a block not a power of two": {"block_rows": 33},
    "a block of 128 MiB": {"shape": [1 << 26], "block_rows": 1 << 26},
    "a row of 1 GiB": {"shape": [1, 1 << 29], "block_rows": 1},
    "block beyond the tensor": {"blocks": [len(SOUND) + 1]},
    "block before the end of the tensor": {"blocks": [len(SOUND) - 1]},
    "two blocks": {"blocks": [len(SOUND) - 1, 1]},
    "no blocks": {"blocks": []},
    "negative block": {"block_rows": 16, "blocks": [len(SOUND) + 1, -1]},
    "blocks are a number": {"blocks": len(SOUND)},
    "block is a text": {"blocks": ["7"]},
    "short sha256": {"sha256": "00"},
    "sha256 is a number": {"sha256": 0},
    "field missing": {"sha256": ...},
    "unknown field": {"codec": "zip"},
    "stored in two axes": {"tensor": torch.zeros(1, len(SOUND), dtype=torch.uint8)},
    "stored as I8": {"tensor": torch.zeros(len(SOUND), dtype=torch.int8)},
    "another name": {"texts": {"tensors": "{}"}},
    "entry is a list": {"texts": {"tensors": '{"a":[]}'}},
    "description is a list": {"texts": {"tensors": "[]"}},
    "description is no JSON": {"texts": {"tensors": "{"}},
    "no description": {"texts": {"tensors": ""}},
    "key twice": {"texts": {"tensors": '{"a":{},"a":{}}'}},
    "deep": {"texts": {"tensors": '{"a":' + "[" * 5000 + "]" * 5000 + "}"}},
    "version 2 with a sha256": {"texts": {"version": "2"}},
    "version 1 with a BLAKE3": {"sha256": ..., "blake3": "0" * 64},
    "both digests": {"blake3": "0" * 64},
    "version 3": {"texts": {"version": "3"}},
    "no version": {"texts": {"version": ""}},
    "another format": {"texts": {"format": "pt"}},
}


@pytest.mark.parametrize("case", HOSTILE_DESCRIPTIONS)
def test_hostile_description_is_refused(tmp_path: Path, case: str) -> None:
    path = forged(tmp_path / "x", SOUND, **HOSTILE_DESCRIPTIONS[case])
    with pytest.raises(InputError) as caught:
        index(path)
    assert caught.value.hint
    assert caught.value.what.isprintable()


def test_a_tensor_described_in_another_file_is_refused(tmp_path: Path) -> None:
    tensors, metadata = index_safetensors(forged(tmp_path / "x", SOUND))
    for described in ({"y": metadata}, {"x": metadata, "y": {"format": "pt"}}, {}):
        with pytest.raises(InputError):
            index_integer_delta(tensors, described)
