"""The lossless delta: differences of the floats' ranks, in byte planes, compressed with zstandard, inside safetensors files.

A float's bits, sign-magnitude, become its rank among all floats, two's complement: -0.0 is -1, +0.0 is 0, NaNs lie at both
ends. Stored is `rank(tuned) - rank(base)`; rows and tensors that the base lacks keep their bits. Where tuning changed little, the
high bytes hardly vary: measured on fp16 weights of deviation 0.02 changed by 1e-4, 0.43 of the size, where the compressed plain
difference takes 0.56.

A tensor is stored under its own name as U8 data: one zstandard frame after another, each with `block_rows` rows. The file's
`__metadata__` holds `format`, `version`, and in `tensors` JSON that says by name what the bytes stand for (`FIELDS`, and the digest of the
tuned tensor under the name of its algorithm: BLAKE3 in version 2, which is written, sha256 in version 1, which is still read).
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np

from ..errors import InputError, MismatchError, VerificationError
from ..storage.digests import FILES, READ_BACK, TENSORS, is_digest, new_digest
from ..storage.reading import DOWNLOAD_AGAIN, Watcher, Workspace, check_crcs
from ..storage.strict_json import parse_json
from ..storage.threads import Shield
from ..tensors.dtypes import ITEMSIZE, MAX_AXES
from ..tensors.lazy import LazyTensor, Stored
from ..text import listed, shown
from .safetensors import MAX_AXIS, MAX_HEADER, are_counts, make_header

LEVEL = 3  # of zstandard; zlib 6 comes within three points of its size and is far slower
CHUNK_VALUES = 1 << 16  # converted at once: with their two temporaries they stay in the processor's cache


def pack(raw: memoryview, base: memoryview, width: int, planes: memoryview) -> bytes:
    """`raw`, little-endian values of `width` bytes, as one zstandard frame with its content's size and checksum.

    The first values, as many as `base` has, are stored as differences `rank(raw) - rank(base)` modulo 2^(8 width), folded:
    0, -1, 1, -2, ... become 0, 1, 2, 3, ... The others keep their bits. All lowest bytes come first, then all next ones, and so
    on. `planes`, as long as `raw`, is overwritten.
    """
    _split(raw, base, width, planes)
    packed: bytes = _zstandard().ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True).compress(planes)
    return packed


def unpack(packed: memoryview, size: int, base: memoryview, width: int, out: memoryview, *, skip: int = 0, name: str) -> None:
    """The inverse of `pack`: fills `out` with the values from number `skip` on; `base` starts at the same value.

    Raises InputError, naming the tensor `name`, unless `packed` is one frame that holds `size` bytes and has their checksum.
    """
    zstandard = _zstandard()
    try:
        frame = zstandard.get_frame_parameters(packed)
        if (frame.content_size, frame.has_checksum) != (size, True):  # before any memory is taken
            raise zstandard.ZstdError(f"it does not hold {size:,} bytes with a checksum")
        planes = zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise InputError(f"a block of {shown(name)} is damaged", facts={"reason": error}, hint=DOWNLOAD_AGAIN) from error
    _join(memoryview(planes), width, skip, base, out)


def _split(raw: memoryview, base: memoryview, width: int, planes: memoryview) -> None:
    values, known, lanes = _values(raw, width), _values(base, width), _lanes(planes, width)
    difference, spare = np.empty(CHUNK_VALUES, values.dtype), np.empty(CHUNK_VALUES, values.dtype)
    for part, common in _chunks(len(values), len(known)):
        stored, temporary = difference[: part.stop - part.start], spare[: part.stop - part.start]
        if common:
            _rank(values[part], stored)
            _rank(known[part], temporary)
            stored -= temporary
            np.right_shift(stored, 8 * width - 1, out=temporary)  # -1 where it is negative, else 0
            stored <<= 1
            stored ^= temporary
        else:
            stored[:] = values[part]
        unsigned = stored.view(f"<u{width}")
        for lane in lanes:  # shifts and casts are twice as fast as strided copies
            np.copyto(lane[part], unsigned, casting="unsafe")
            unsigned >>= 8


def _join(planes: memoryview, width: int, skip: int, base: memoryview, out: memoryview) -> None:
    values, known, lanes = _values(out, width), _values(base, width), _lanes(planes, width)[:, skip:]
    difference, spare = np.empty(CHUNK_VALUES, values.dtype), np.empty(CHUNK_VALUES, values.dtype)
    for part, common in _chunks(len(values), len(known)):
        stored, temporary = difference[: part.stop - part.start], spare[: part.stop - part.start]
        unsigned = stored.view(f"<u{width}")
        unsigned[:] = lanes[-1][part]
        for lane in lanes[-2::-1]:
            unsigned <<= 8
            unsigned |= lane[part]
        if common:
            np.bitwise_and(stored, 1, out=temporary)
            np.negative(temporary, out=temporary)
            unsigned >>= 1
            stored ^= temporary
            _rank(known[part], temporary)
            stored += temporary
            _rank(stored, values[part])
        else:
            values[part] = stored


def _rank(bits: np.ndarray, out: np.ndarray) -> None:
    """The rank of each float among all floats, from its bits; its own inverse. `bits` and `out` must not overlap."""
    np.right_shift(bits, 8 * bits.itemsize - 1, out=out)
    out &= np.iinfo(bits.dtype).max
    out ^= bits


def _values(raw: memoryview, width: int) -> np.ndarray:
    return np.frombuffer(raw, f"<i{width}")


def _lanes(planes: memoryview, width: int) -> np.ndarray:
    return np.frombuffer(planes, np.uint8).reshape(width, len(planes) // width)


def _chunks(count: int, common: int) -> Iterator[tuple[slice, bool]]:
    """Ranges of at most CHUNK_VALUES values, and whether the base has them."""
    for first, last, both in ((0, common, True), (common, count, False)):
        for start in range(first, last, CHUNK_VALUES):
            yield slice(start, min(start + CHUNK_VALUES, last)), both


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError as error:
        raise InputError("integer deltas need the package `zstandard`", hint="pip install zstandard") from error
    return zstandard


FORMAT, VERSION = "llava-weights.integer-delta", "2"
DIGEST_OF_VERSION = {"1": "sha256", VERSION: TENSORS}
INTEGER_DTYPES = ("F16", "BF16", "F32")
FIELDS = {"dtype", "shape", "base_rows", "block_rows", "blocks"}
BLOCK_BYTES = 4 << 20  # raw bytes of a block at most, unless one row has more
LARGEST_BLOCK = 64 << 20  # bytes that a reader holds at once, against files made to exhaust memory
AHEAD = 2  # finished blocks that may wait to be written


@dataclass(frozen=True, kw_only=True)
class IntegerDifference:
    """One tensor of an integer delta: `dtype` and `shape` of the tuned tensor, and where its compressed blocks lie.

    The first `base_rows` rows are differences. `blocks` are the compressed sizes, in bytes, of the blocks of `block_rows` rows
    that lie end to end in `stored`; `digest`, by `algorithm`, is that of the tuned tensor's values, which shows that the base is the right
    one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    base_rows: int
    block_rows: int
    blocks: tuple[int, ...]
    algorithm: str
    digest: str
    stored: Stored

    def onto(self, base: LazyTensor | None) -> LazyTensor:
        """The tuned tensor. Raises MismatchError unless `base` has the dtype, columns and rows that the maker's base had."""
        used = base if self.base_rows else None
        if (_common_rows(self.name, self, used) if used else 0) != self.base_rows:
            facts = {"rows of the base": base.rows if base else "none", "when the delta was made": self.base_rows}
            raise MismatchError(f"the delta was made against another {shown(self.name)}", facts=facts, hint="give that base")
        return AddInteger(dtype=self.dtype, shape=self.shape, difference=self, base=used)


@dataclass(frozen=True, kw_only=True)
class AddInteger(LazyTensor):
    """The tuned tensor from its base and an integer difference, bit for bit. Damaged blocks raise InputError."""

    difference: IntegerDifference
    base: LazyTensor | None

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.difference.stored, self.base) if self.base else (self.difference.stored,)

    @property
    def expected_digest(self) -> tuple[str, str] | None:
        return self.difference.algorithm, self.difference.digest

    @property
    def row_unit(self) -> int:
        return math.lcm(self.difference.block_rows, self.base.row_unit if self.base else 1)

    def scratch(self, rows: int) -> int:
        block = self.difference.block_rows * self.row_nbytes + max(self.difference.blocks, default=0)
        return rows * self.row_nbytes + max(self.base.scratch(rows), block) if self.base else block

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        if not len(out):
            return
        known = max(0, min(stop, self.difference.base_rows) - start) if self.base else 0
        with work.scratch(known * self.row_nbytes) as base:
            if self.base and known:
                self.base.rows_into(base, start, start + known, work)
            step = self.difference.block_rows
            for first in range(start - start % step, stop, step):
                low, high = max(first, start), min(first + step, stop)
                part = slice((low - start) * self.row_nbytes, (high - start) * self.row_nbytes)
                self._block_into(out[part], base[part], first, low, work)

    def _block_into(self, out: memoryview, base: memoryview, first: int, low: int, work: Workspace) -> None:
        """Fill `out` with the rows from `low` on of the block that starts at row `first`."""
        difference, width = self.difference, ITEMSIZE[self.dtype]
        number, rows = first // difference.block_rows, min(difference.block_rows, self.rows - first)
        with work.scratch(difference.blocks[number]) as packed:
            work.read(difference.stored.file, difference.stored.offset + sum(difference.blocks[:number]), packed)
            unpack(packed, rows * self.row_nbytes, base, width, out, skip=(low - first) * self.row_nbytes // width, name=difference.name)


@dataclass(frozen=True, kw_only=True)
class ToInteger(LazyTensor):
    """A tensor that is to be stored as its integer difference from `base`. Input of `write_integer_shard`; it makes no rows itself."""

    tuned: LazyTensor
    base: LazyTensor | None

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.tuned, self.base) if self.base else (self.tuned,)

    def scratch(self, rows: int) -> int:
        """What one worker holds: raw values, base, planes, the unpacked values, and the packed block."""
        return 5 * max(BLOCK_BYTES, self.row_nbytes) + super().scratch(rows)


@dataclass(frozen=True)
class IntegerShard:
    """A finished file; `tensors` holds the BLAKE3 of each tensor's stored, compressed bytes by name, `read_back` is the file's XXH3-128."""

    nbytes: int
    sha256: str
    read_back: str
    tensors: dict[str, str]
    raw_nbytes: int
    packed_nbytes: int


def is_integer_delta(metadata: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether one of these files, given as `__metadata__` by file name, says that it is an integer delta."""
    return any(texts.get("format") == FORMAT for texts in metadata.values())


def index_integer_delta(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, Mapping[str, str]]) -> dict[str, IntegerDifference]:
    """What the tensors of an integer delta stand for, from the `__metadata__` of each of its files, by file name.

    Raises InputError where a file is of another format or version, or where its description does not fit its bytes exactly.
    """
    described = {name: (file, entry) for file, texts in metadata.items() for name, entry in _read_description(file, texts).items()}
    digest_of = {file: DIGEST_OF_VERSION[texts["version"]] for file, texts in metadata.items()}
    if strangers := described.keys() ^ tensors.keys():
        raise _refusal(f"description and tensors differ: {listed(sorted(strangers))}")
    differences = {}
    for name, stored in tensors.items():
        file, entry = described[name]
        if not isinstance(stored, Stored) or stored.file.name != file:
            raise _refusal(f"{shown(name)} is described in {shown(file)}, but lies in another file")
        if problem := _entry_problem(entry, stored, digest_of[file]):
            raise _refusal(f"tensor {shown(name)}: {problem}")
        about = {**entry, "shape": tuple(entry["shape"]), "blocks": tuple(entry["blocks"])}
        digest = about.pop(digest_of[file])
        differences[name] = IntegerDifference(name=name, stored=stored, algorithm=digest_of[file], digest=digest, **about)
    return differences


def write_integer_shard(
    path: Path,
    items: Sequence[tuple[str, ToInteger]],
    *,
    jobs: int = 2,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    watch: Watcher | None = None,
) -> IntegerShard:
    """Write these differences to `path`, overwriting it; every block is unpacked again and compared.

    The bytes depend on the values and on zstandard's version, not on `jobs`. `on_bytes` gets the number of raw bytes of each block, in
    this thread. Raises InputError for what can't be stored or is damaged, MismatchError where dtypes or columns differ,
    VerificationError for a block that is not the same when unpacked, OSError where `path` can't be written; then `path` is deleted.
    """
    sources = dict(sorted(items, key=lambda item: item[0]))  # the order in which `make_header` lays out tensors of one dtype
    entries = {name: _entry(name, pair.tuned, pair.base) for name, pair in sources.items()}
    reserved = len(_make_header(entries))
    if reserved > MAX_HEADER:
        raise InputError("the header of this file would be too long to be read again", hint="choose a smaller `--max-shard-size`")
    blocks = [block for name, entry in entries.items() for block in _blocks(name, sources[name], entry)]
    try:
        with open(path, "w+b") as file:
            file.seek(reserved)
            with Shield() as shield:
                digests = _write_blocks(file, _pack_all(blocks, jobs, shield, watch), entries, on_bytes)
            packed = file.tell() - reserved
            file.seek(0)
            file.write(_make_header(entries, reserved))
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            whole = _digest(file, FILES, READ_BACK)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    raw = sum(pair.tuned.nbytes for pair in sources.values())
    return IntegerShard(reserved + packed, whole[FILES], whole[READ_BACK], digests, raw, packed)


def _digest(file: IO[bytes], *algorithms: str) -> dict[str, str]:
    """Digests of the rest of a file, by algorithm."""
    found = {algorithm: new_digest(algorithm) for algorithm in algorithms}
    while data := file.read(1 << 20):
        for digest in found.values():
            digest.update(data)
    return {algorithm: digest.hexdigest() for algorithm, digest in found.items()}


@dataclass(frozen=True)
class _Block:
    """Rows [start, stop) of a tensor, its block `number`; the first `known` of them are in the base too."""

    name: str
    number: int
    source: ToInteger
    start: int
    stop: int
    known: int


Packed = tuple[_Block, bytearray, bytes]  # a block, its raw values and its compressed difference


def _blocks(name: str, source: ToInteger, entry: Mapping[str, Any]) -> Iterator[_Block]:
    for number in range(len(entry["blocks"])):
        start = number * entry["block_rows"]
        stop = min(start + entry["block_rows"], source.tuned.rows)
        yield _Block(name, number, source, start, stop, max(0, min(stop, entry["base_rows"]) - start))


def _write_blocks(
    file: IO[bytes], finished: Generator[Packed], entries: Mapping[str, dict[str, Any]], on_bytes: Callable[[int], None]
) -> dict[str, str]:
    """Write the blocks end to end, enter sizes and digests into `entries`, return the digest of each tensor's stored bytes."""
    tuned, stored = {name: new_digest(TENSORS) for name in entries}, {name: new_digest(TENSORS) for name in entries}
    with closing(finished):
        for block, raw, packed in finished:
            tuned[block.name].update(raw)
            stored[block.name].update(packed)
            entries[block.name]["blocks"][block.number] = len(packed)
            file.write(packed)
            on_bytes(len(raw))
    for name, entry in entries.items():
        entry[TENSORS] = tuned[name].hexdigest()
    return {name: digest.hexdigest() for name, digest in stored.items()}


def _pack_all(blocks: Sequence[_Block], jobs: int, shield: Shield, watch: Watcher | None) -> Generator[Packed]:
    """Each block packed, in order, at most `jobs + AHEAD` of them in memory; then the inputs are checked for changes and damage."""
    workspaces = [Workspace(watch=watch) for _ in range(jobs)]
    idle = list(workspaces)  # one for each thread
    waiting: deque[Future[Packed]] = deque()
    try:
        with ThreadPoolExecutor(jobs) as pool:
            for block in blocks:
                shield.check()
                waiting.append(pool.submit(_pack, block, idle))
                if len(waiting) == jobs + AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        for workspace in workspaces:
            workspace.recheck_sources()
        check_crcs(workspaces)
    finally:
        for workspace in workspaces:
            workspace.close()


def _pack(block: _Block, idle: list[Workspace]) -> Packed:
    tuned, base = block.source.tuned, block.source.base
    raw = bytearray((block.stop - block.start) * tuned.row_nbytes)
    work = idle.pop()
    try:
        tuned.rows_into(memoryview(raw), block.start, block.stop, work)
        with work.scratch(block.known * tuned.row_nbytes) as known, work.scratch(len(raw)) as spare:
            if base and block.known:
                base.rows_into(known, block.start, block.start + block.known, work)
            packed = pack(memoryview(raw), known, ITEMSIZE[tuned.dtype], spare)
            unpack(memoryview(packed), len(raw), known, ITEMSIZE[tuned.dtype], spare, name=block.name)
            if not np.array_equal(np.frombuffer(spare, np.uint8), np.frombuffer(raw, np.uint8)):
                raise VerificationError(
                    f"rows {block.start:,} to {block.stop:,} of {shown(block.name)} do not come back",
                    hint="check memory and disk, then run the same command again",
                )
    finally:
        idle.append(work)
    return block, raw, packed


def _entry(name: str, tuned: LazyTensor, base: LazyTensor | None) -> dict[str, Any]:
    """The description of a tensor before it is written; in place of its sizes and digest, which are not known yet, the longest possible."""
    if tuned.dtype not in INTEGER_DTYPES:
        raise InputError(f"{shown(name)} is {tuned.dtype}, an integer delta holds {', '.join(INTEGER_DTYPES)}", hint="give float weights")
    rows = 1 << max(0, (BLOCK_BYTES // max(tuned.row_nbytes, 1)).bit_length() - 1)
    if rows * tuned.row_nbytes > LARGEST_BLOCK:
        raise InputError(
            f"one row of {shown(name)} has {tuned.row_nbytes:,} bytes, at most {LARGEST_BLOCK:,} can be stored",
            hint="leave `--codec integer` out for this model",
        )
    sizes = {"base_rows": _common_rows(name, tuned, base) if base else 0, "block_rows": rows}
    longest = [2 * rows * tuned.row_nbytes + 1000] * _block_count(tuned, rows)  # zstandard adds 1/256 and a few bytes at most
    return {"dtype": tuned.dtype, "shape": list(tuned.shape), **sizes, "blocks": longest, TENSORS: "0" * 64}


def _make_header(entries: Mapping[str, Mapping[str, Any]], size: int = 0) -> bytes:
    """The first bytes of the file, padded to `size` with blanks, as safetensors allows."""
    described = json.dumps(entries, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    tensors = [(name, LazyTensor(dtype="U8", shape=(sum(entry["blocks"]),))) for name, entry in entries.items()]
    text = make_header(tensors, {"format": FORMAT, "version": VERSION, "tensors": described})[0][8:].ljust(size - 8)
    return len(text).to_bytes(8, "little") + text


def _read_description(file: str, texts: Mapping[str, str]) -> dict[str, Any]:
    if texts.get("format") != FORMAT:
        raise _refusal(f"{shown(file)} is not one of its files")
    if texts.get("version") not in DIGEST_OF_VERSION:
        raise _refusal(f"{shown(file)} is of version {shown(texts.get('version', ''))}", hint="upgrade llava-weights to read it")
    entries = parse_json(texts.get("tensors", "").encode(), name=f"{file}: tensors")
    if isinstance(entries, dict):
        return entries
    raise _refusal(f"{shown(file)} does not describe its tensors")


def _entry_problem(entry: Any, stored: Stored, algorithm: str) -> str:
    """Why this description is not valid or not that of `stored`, else empty. Its digest must be by `algorithm`."""
    fields = {*FIELDS, algorithm}
    if not isinstance(entry, dict) or entry.keys() != fields:
        return f"its description needs exactly {', '.join(sorted(fields))}"
    if entry["dtype"] not in INTEGER_DTYPES:
        return f"its dtype {shown(str(entry['dtype']))} is not one of {', '.join(INTEGER_DTYPES)}"
    if not are_counts(entry["shape"]) or len(entry["shape"]) > MAX_AXES or any(axis >= MAX_AXIS for axis in entry["shape"]):
        return f"its shape is not a list of at most {MAX_AXES} sizes"
    tensor = LazyTensor(dtype=entry["dtype"], shape=tuple(entry["shape"]))
    block_rows = entry["block_rows"]
    if not are_counts([entry["base_rows"], block_rows]) or entry["base_rows"] > tensor.rows or block_rows.bit_count() != 1:
        return "its numbers of rows are not sound"  # a power of two: with a base cut by heads, windows are its least common multiple
    if block_rows * tensor.row_nbytes > LARGEST_BLOCK:
        return f"its blocks have more than {LARGEST_BLOCK:,} bytes"
    if not are_counts(entry["blocks"]) or len(entry["blocks"]) != _block_count(tensor, block_rows):
        return f"its list of blocks does not have {_block_count(tensor, block_rows):,} sizes"
    if stored.dtype != "U8" or stored.shape != (sum(entry["blocks"]),):
        return f"its blocks do not fill {stored.dtype} {list(stored.shape)}"
    return "" if is_digest(entry[algorithm]) else f"its {algorithm} is not 64 hexadecimal digits"


def _block_count(tensor: LazyTensor, block_rows: int) -> int:
    return -(-tensor.rows // block_rows) if tensor.numel else 0


def _common_rows(name: str, tuned: LazyTensor | IntegerDifference, base: LazyTensor) -> int:
    """Rows that both have. Raises MismatchError where the dtypes or the other axes differ."""
    if (base.dtype, len(base.shape), base.shape[1:]) != (tuned.dtype, len(tuned.shape), tuned.shape[1:]):
        facts = {"base": f"{base.dtype} {list(base.shape)}", "tuned model": f"{tuned.dtype} {list(tuned.shape)}"}
        hint = "an integer delta works on bits: give both in one dtype, as they were when it was made"
        raise MismatchError(f"the base of {shown(name)} does not fit", facts=facts, hint=hint)
    return min(base.shape[0], tuned.shape[0]) if base.shape else 1


def _refusal(reason: str, hint: str = DOWNLOAD_AGAIN) -> InputError:
    return InputError(f"the integer delta can't be read: {reason}", hint=hint)
