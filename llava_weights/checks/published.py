"""Recognise published files by checksum; and predict the md5 that the author's own merged `.bin` files would have.

In 2023 LLaVA's author posted the md5 of his merged shards, the only published proof of an applied delta. No later torch writes the
same container, so files that are saved today never match. But his delta's shards came out of the same `torch.save`, and differ from the
merged ones only in the payloads and in what is computed from them. So the delta's bytes are streamed, each payload replaced by the merged
one:

    header | payload | descriptor with CRC-32 | header | payload | descriptor | ... | central directory with every CRC-32

A match is proof. A mismatch is none, since he may have merged under another torch.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from ..checkpoint.checkpoint import Checkpoint, need_files
from ..checkpoint.rehash import rehash
from ..checkpoint.small_files import small_object
from ..errors import InputError, MismatchError
from ..events import Listener, Progress
from ..families import published
from ..families.deltas import known_delta
from ..families.published import UNFIT, Role
from ..findings import Finding
from ..formats.torch_zip import LOCAL, Member, zip_records
from ..storage.reading import CHECK_DISK, Record, SourceFile, Workspace, check_crcs
from ..storage.threads import Shield
from ..tensors.lazy import FLOATS, Add, LazyTensor, Stored, cast
from ..tensors.windows import WINDOW_BYTES, cut, make
from ..text import listed, shown

HEADER_CRC, DESCRIPTOR_CRC, ENTRY_CRC = 14, 4, 16  # where the CRC-32 stands in each (PKWARE APPNOTE 4.3.7, 4.3.9, 4.3.12)
DESCRIPTOR = b"PK\x07\x08"
FREQUENCIES = ".rotary_emb.inv_freq"
SERIALIZATION_ID = "/.data/serialization_id"  # torch 2.1 and later
PUBLISHED_FILES = "give the delta as its authors published it, in `.bin` files: the prediction follows their layout"

# Deltas whose merged files someone posted digests of, and how `published.PUBLISHED` begins to name those files.
POSTED = {"liuhaotian/LLaVA-13b-delta-v0": "the author's merged LLaVA-13B-v0, "}

PredictionVerdict = Literal["confirmed", "not confirmed", "no published checksum"]


@dataclass(frozen=True)
class Prediction:
    """What the author's merged file `shard` would be: hex digests and bytes. `published` is the md5 that was posted, or ""."""

    shard: str
    md5: str
    sha256: str
    size: int
    published: str
    verdict: PredictionVerdict


@dataclass(frozen=True, kw_only=True)
class InverseFrequencies(LazyTensor):
    """1 / 10000^(2i / head_dim) for i < head_dim / 2: the buffer of the rotary embedding in every LLaMA 1."""

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        out[:] = (1 / 10000 ** (np.arange(start, stop) / self.rows)).astype("<f4").tobytes()


def predict(
    delta: Checkpoint, merged: Mapping[str, LazyTensor], base: Checkpoint | None = None, *, on_event: Listener = lambda event: None
) -> Iterator[Prediction]:
    """Predict the author's merged shards, one after another, from his delta's `.bin` files and the merged tensors.

    `merged` is `apply_delta(base, delta).tensors`, or those of a folder that `apply-delta` wrote. Rotary buffers are not among
    them: the original adds the base's, rounded to fp16, in float32; without a base they are calculated. Checks everything but
    values at once, then streams; `Progress` counts the bytes of all shards. Raises InputError where the delta is not in `.bin` files
    of one tensor per storage, or an input is damaged, MismatchError where `merged` does not fit.
    """
    if delta.origin.container != "torch":
        raise InputError(f"the delta {shown(delta.origin.name)} is not in `.bin` files", hint=PUBLISHED_FILES)
    need_files(delta, "`--published`")
    shards = [_plan(file, delta, merged, base) for file in delta.origin.files]
    return _predictions(shards, delta, on_event)


def check_published(
    merged: Checkpoint, delta: Checkpoint, base: Checkpoint | None = None, *, on_event: Listener = lambda event: None
) -> tuple[Finding, ...]:
    """Is `merged` what the author has? One finding per shard: "ok" is proof, "unproved" all else. Raises as `predict`."""
    return tuple(_finding(prediction) for prediction in predict(delta, merged.tensors, base, on_event=on_event))


def _finding(prediction: Prediction) -> Finding:
    found = published.recognise(md5=prediction.md5, sha256=prediction.sha256)
    expected = f"in the author's container these tensors have md5 {prediction.md5}"
    if prediction.verdict == "confirmed" and found:
        text = f"bit-identical to {found.what}: md5 {prediction.md5}, {found.source}"
        return Finding("published", "ok", prediction.shard, text, part=f"{shown(prediction.shard)} (by its author's md5)")
    if prediction.verdict == "not confirmed":
        text = f"not confirmed: {expected}, posted was {prediction.published}; its author may have merged under another torch"
        remedy = "see whether base and delta are the published files: `llava-weights verify PATH --published` on each"
        return Finding("published", "unproved", prediction.shard, text, remedy, part=f"not confirmed: {shown(prediction.shard)}")
    text = f"nobody posted a checksum of this merged file; {expected}"
    return Finding("published", "unproved", prediction.shard, text, part=f"no md5 was posted of {shown(prediction.shard)}")


@dataclass(frozen=True)
class _Shard:
    """A file of the delta, and the tensor that takes the place of each storage, with its name, by member name."""

    file: SourceFile
    members: tuple[Member, ...]
    payloads: Mapping[str, tuple[str, LazyTensor]]


def _plan(file: SourceFile, delta: Checkpoint, merged: Mapping[str, LazyTensor], base: Checkpoint | None) -> _Shard:
    owners: dict[Record, list[tuple[str, Stored]]] = defaultdict(list)
    for name, tensor in delta.tensors.items():
        if isinstance(tensor, Stored) and tensor.file == file and tensor.record:
            owners[tensor.record].append((name, tensor))
    members, payloads = tuple(zip_records(Path(file.path))), {}
    for member in members:
        if "/data/" not in member.name:
            continue
        found = owners.get(member.record, [])
        if len(found) != 1 or (found[0][1].offset, found[0][1].nbytes) != (member.offset, member.size):
            facts = {"file": file.path, "storage": shown(member.name), "tensors": listed(name for name, _ in found) or "none"}
            what = f"{shown(file.name)} holds a storage that is not exactly one tensor, so what the author saved there is unknown"
            raise InputError(what, facts=facts, hint=PUBLISHED_FILES)
        name, tensor = found[0]
        payloads[member.name] = name, _merged(name, tensor, merged, base)
    return _Shard(file, members, payloads)


def _merged(name: str, tensor: Stored, merged: Mapping[str, LazyTensor], base: Checkpoint | None) -> LazyTensor:
    """What the author's file holds as `name`, in the dtype and shape that the delta has."""
    rotary = name.endswith(FREQUENCIES) and tensor.dtype in FLOATS and len(tensor.shape) == 1
    found = merged.get(name) or (_frequencies(name, tensor, base) if rotary else None)
    if found is None or (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
        merged_as = f"{found.dtype} {list(found.shape)}" if found else "missing"
        raise MismatchError(
            f"{shown(name)} of the merged model does not fit the delta's files",
            facts={"delta": f"{tensor.dtype} {list(tensor.shape)}", "merged": merged_as},
            hint="give the delta, and the model that `llava-weights apply-delta` made with it, in the original layout and dtype",
        )
    return found


def _frequencies(name: str, delta: Stored, base: Checkpoint | None) -> LazyTensor:
    """The original loads base and delta as fp16 and sums in the delta's own dtype; `make_delta` leaves 0 there."""
    own = base.tensors.get(name) if base else None
    if own is None or own.dtype not in FLOATS or own.shape != delta.shape:
        own = InverseFrequencies(dtype="F32", shape=delta.shape)
    rounded = [cast(cast(tensor, "F16"), delta.dtype) for tensor in (own, delta)]
    return Add(dtype=delta.dtype, shape=delta.shape, base=rounded[0], delta=rounded[1])


def _predictions(shards: list[_Shard], delta: Checkpoint, on_event: Listener) -> Iterator[Prediction]:
    done = 0
    for shard in shards:
        digests = [hashlib.new(name, usedforsecurity=False) for name in ("md5", "sha256")]
        with Shield() as shield, closing(Workspace()) as work, ThreadPoolExecutor(len(digests)) as pool:
            for piece in _Container(shard, work).stream():
                shield.check()
                for task in [pool.submit(digest.update, piece) for digest in digests]:
                    task.result()
                done += len(piece)
                on_event(Progress(done, shard.file.name))
            work.recheck_sources()
            check_crcs([work])
        md5, sha256 = (digest.hexdigest() for digest in digests)
        yield _judged(delta, shard.file, md5, sha256)


def _judged(delta: Checkpoint, file: SourceFile, md5: str, sha256: str) -> Prediction:
    found = published.recognise(md5=md5, sha256=sha256)
    if found and found.kind == "merged":
        return Prediction(file.name, md5, sha256, file.size, md5, "confirmed")
    posted = _posted(delta, file.name)
    return Prediction(file.name, md5, sha256, file.size, posted, "not confirmed" if posted else "no published checksum")


def _posted(delta: Checkpoint, shard: str) -> str:
    """The md5 that was posted of the merged shard, or "". The delta is recognised by shapes, token ids and model type."""
    patch = small_object(delta.files, "added_tokens.json").get("<im_patch>", -1)
    known = known_delta(delta.size, delta.vocabulary, patch, str(delta.config.get("model_type", "")))
    wanted = f"{POSTED[known.repo]}{shard}" if known and known.repo in POSTED else ""
    return next((record.md5 for record in published.PUBLISHED if record.what == wanted), "")


@dataclass
class _Container:
    """The bytes of one merged file in order: the delta's, except for payloads and CRC-32s.

    `near` and `directory` are the CRC-32s to be set, by position in the file: until the next payload, and in the directory.
    """

    shard: _Shard
    work: Workspace
    crcs: list[int] = field(default_factory=list)  # of the members so far
    near: dict[int, int] = field(default_factory=dict)
    directory: dict[int, int] = field(default_factory=dict)

    def stream(self) -> Iterator[memoryview]:
        """Pieces of at most a window, each valid until the next is asked for. Sizes do not change, so neither does any offset."""
        position = 0
        for member in self.shard.members:
            crc = member.crc32
            if member.name in self.shard.payloads or member.name.endswith(SERIALIZATION_ID):
                before, behind = self._crc_places(member)
                if before:  # it comes before the payload, which therefore is made twice
                    self.near[member.header_offset + HEADER_CRC] = _crc32(self._payload(member))
                yield from self._copy(position, member.offset, self.near)
                crc = 0
                for piece in self._payload(member):
                    crc = zlib.crc32(piece, crc)
                    yield piece
                position = member.offset + member.size
                self.near = {position + DESCRIPTOR_CRC: crc} if behind else {}
                self.directory[member.entry_offset + ENTRY_CRC] = crc
            self.crcs.append(crc)
        yield from self._copy(position, self.shard.file.size, self.near | self.directory)

    def _crc_places(self, member: Member) -> tuple[bool, bool]:
        """Whether the CRC-32 stands in the member's header, and whether in a descriptor behind its payload: torch writes the latter."""
        _, _, flags, _, _, _, crc, *_ = LOCAL.unpack(self._bytes(member.header_offset, LOCAL.size))
        behind = bool(flags & 8)
        if behind and self._bytes(member.offset + member.size, len(DESCRIPTOR)) != DESCRIPTOR:
            what = f"{shown(self.shard.file.name)} was not written by torch.save: {shown(member.name)} has a descriptor without signature"
            raise InputError(what, facts={"file": self.shard.file.path}, hint=PUBLISHED_FILES)
        return bool(crc) or not behind, behind

    def _payload(self, member: Member) -> Iterator[memoryview]:
        if member.name.endswith(SERIALIZATION_ID):
            yield memoryview(self._serialization_id(member))
            return
        for window in cut((self.shard.payloads[member.name],), 0, WINDOW_BYTES):
            with self.work.scratch(window.nbytes) as buffer:
                make(window, buffer, self.work)
                yield buffer

    def _serialization_id(self, member: Member) -> bytes:
        """Twenty digits for the members' names, which stay, and twenty for the CRC-32s of all members before this one."""
        own = self._bytes(member.offset, min(member.size, 41))
        if own[20:] != _combined([other.crc32 for other in self.shard.members[: len(self.crcs)]]):
            what = f"{shown(self.shard.file.name)} has a serialization id of an unknown kind, so the merged file's can't be predicted"
            raise InputError(what, facts={"file": self.shard.file.path}, hint=PUBLISHED_FILES)
        return own[:20] + _combined(self.crcs)

    def _copy(self, start: int, stop: int, crcs: Mapping[int, int]) -> Iterator[memoryview]:
        """The delta's bytes from `start` to `stop`, with these CRC-32s at their positions."""
        for begin in range(start, stop, WINDOW_BYTES):
            with self.work.scratch(min(WINDOW_BYTES, stop - begin)) as buffer:
                self.work.read(self.shard.file, begin, buffer)
                for position, crc in crcs.items():
                    for at, byte in enumerate(crc.to_bytes(4, "little"), position - begin):  # a window may end inside a CRC-32
                        if 0 <= at < len(buffer):
                            buffer[at] = byte
                yield buffer

    def _bytes(self, offset: int, count: int) -> bytes:
        data = bytearray(count)
        self.work.read(self.shard.file, offset, memoryview(data))
        return bytes(data)


def _crc32(pieces: Iterator[memoryview]) -> int:
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return crc


def _combined(crcs: list[int]) -> bytes:
    """The CRC-32s one after another by c10::hash_combine (caffe2/serialize/inline_container.cc, `combined_uncomp_crc32_`)."""
    total = 0
    for crc in crcs:
        total ^= (crc + 0x9E3779B9 + (total << 6) + (total >> 2)) & 0xFFFFFFFFFFFFFFFF
    return b"%020d" % total


@dataclass(frozen=True)
class Recognised:
    """What a file's digests say. "unknown" is no fault: most good files were never published; "wrong" does not belong in this role."""

    file: Path
    verdict: Literal["known", "unknown", "wrong"]
    text: str
    sha256: str
    md5: str


def check_inputs(files: Sequence[Path], role: Role, *, jobs: int = 2, on_event: Listener = lambda event: None) -> list[Recognised]:
    """Read every file once and say what is known of it, given as the "base" of a delta, as the "delta", or as a "merged" model.

    Raises InputError where one is missing, can't be read or changes meanwhile.
    """
    named = {str(path): path for path in files}
    found = rehash(named, {}, algorithms=("sha256", "md5"), jobs=jobs, on_event=on_event)
    for name, what in found.damaged.items():
        raise InputError(what, facts={"file": name}, hint=CHECK_DISK)
    return [_recognised(path, role, found.files[name]) for name, path in named.items()]


def _recognised(path: Path, role: Role, digests: Mapping[str, str]) -> Recognised:
    known = published.recognise(**digests)
    if known is None:
        return Recognised(path, "unknown", f"`{path.name}` is not among the published files", **digests)
    unfit = UNFIT[role].get(known.kind)
    text = f"`{path.name}` is {known.what}"
    return Recognised(path, "wrong" if unfit else "known", f"{text}: {unfit}" if unfit else text, **digests)
