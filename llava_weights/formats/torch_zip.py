"""The tensors of a `torch.save` file (`.bin`, `.pt`, `.pth`): where each lies in the file, without running anything from it.

    member | member | ... | central directory | end records        a zip of stored (never compressed) members,
    NAME/data.pkl  NAME/data/0  NAME/data/1 ...  NAME/version      all under one folder, which is the file's own stem

Only the directory, each member's own header and `data.pkl` are read. Zip readers differ in how they read a file that contradicts
itself, so such a file is refused: torch takes the last of two equal names and checks no CRC. Layout: PKWARE APPNOTE 6.3.10; what
torch writes: caffe2/serialize/inline_container.cc and torch's miniz, which leaves CRC and sizes to a descriptor behind the data
(flag bit 3), pads headers so that data is aligned, and always writes zip64 end records.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256

from ..errors import InputError
from ..storage.places import Place, open_place
from ..storage.reading import DOWNLOAD_AGAIN, Record, Source, SourceFile, read_bytes, refuse_disguise
from ..tensors.dtypes import ITEMSIZE
from ..tensors.lazy import Stored
from ..text import listed, shown
from .pickle_opcodes import Refused, View, interpret

MAX_PICKLE = 16 << 20  # bytes; that of a 13B model has 40 kB
MAX_DIRECTORY = 16 << 20
MAX_MEMBERS = 100_000
MEMBER_HEAD = 30 + 512  # bytes of a member's own header, without its name: torch pads that with at most 64 bytes
MAX_SHARE = 4  # bytes of tensors for each byte of values in the file, at most; a tied head and embedding share theirs
MAX_MEMBER_NAME = 512  # bytes of UTF-8, for members and tensors

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64_LOCATOR = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQ2H2I4Q")
IN_ZIP64 = 0xFFFFFFFF  # in a 32-bit field: the value stands in the zip64 extra field
FLAGS = 1 << 3 | 1 << 11  # descriptor behind the data, name in UTF-8; all others mean encryption or compression

# The members that torch.save writes; those with a dot are the extras of torch 2.1 and later.
MEMBER = re.compile(r"data\.pkl|data/[0-9]+|version|byteorder|\.[a-z][a-z_]*(/[a-z_]+)?")
PARSE_ERRORS = (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError, struct.error)


class Damaged(Refused):
    """The zip is not whole, or contradicts itself."""

    hint = DOWNLOAD_AGAIN


@dataclass(frozen=True)
class Member:
    """One file in the zip, with the offsets of its header, its data and its directory entry from the start of the zip."""

    name: str
    header_offset: int
    offset: int
    size: int
    crc32: int
    entry_offset: int

    @property
    def record(self) -> Record:
        return Record(self.offset, self.size, self.crc32)


@dataclass(frozen=True)
class _File:
    source: Source

    @property
    def size(self) -> int:
        return self.source.identity.size

    def read(self, offset: int, count: int) -> bytes:
        if not 0 <= offset <= self.size - count:
            raise Damaged("is cut short, or points beyond its end")
        return read_bytes(self.source, offset, count)


def index_torch_zip(path: Place) -> dict[str, Stored]:
    """The tensors of a `torch.save` file in the order of its dict. Reads no weights, needs no torch, runs nothing.

    Several may share one storage. Raises InputError unless the file is a sound zip, as torch.save writes it, of one dict from
    `str` to contiguous tensors and nothing else; where it is another kind of file, the error names that kind.
    """
    with _opened(path) as file:
        members, directory = _members(file)
        inside = _inside_root(file, members)
        pickle = _checked(file, inside["data.pkl"], MAX_PICKLE)
        views = _views(interpret(pickle))
        source = replace(file.source.identity, header_sha256=sha256(pickle + directory).hexdigest())
        tensors = {name: _stored(name, view, inside, source) for name, view in views.items()}
        used = {tensor.record for tensor in tensors.values()}
        data = {name: member for name, member in inside.items() if name.startswith("data/")}
        _check_share(tensors, sum(member.size for member in data.values()))
        if unused := [name for name, member in data.items() if member.record not in used]:
            raise Refused(f"holds data of no tensor: {listed(unused)}")
        return tensors


def zip_records(path: Place) -> list[Member]:
    """The members of a `torch.save` file in the order of their bytes, after the same checks of the zip."""
    with _opened(path) as file:
        members, _ = _members(file)
        _inside_root(file, members)
        return members


@contextmanager
def _opened(path: Place) -> Iterator[_File]:
    """The open file. Errors of reading it become an InputError that names it."""
    with open_place(path) as source:
        file = _File(source)
        try:
            _check_kind(path, file)
            yield file
        except Refused as error:
            facts = {"path": path, "size": f"{file.size:,} bytes"}
            raise InputError(f"{shown(path.name)} {error}", facts=facts, hint=error.hint) from error
        except PARSE_ERRORS as error:
            what = f"{shown(path.name)} is damaged: its directory or pickle makes no sense"
            raise InputError(what, facts={"path": path, "found by": type(error).__name__}, hint=DOWNLOAD_AGAIN) from error


def _check_kind(path: Place, file: _File) -> None:
    """Raise InputError, naming what the file is, unless it starts as a zip."""
    head = file.read(0, min(file.size, 512))
    if head.startswith(b"PK\x03\x04"):
        return
    refuse_disguise(path, head)
    if head[257:262] == b"ustar":
        kind, hint = "a tar archive, as torch.save wrote it before version 0.1.10", "ask its author for a .safetensors version"
    elif head[8:9] == b"{":
        kind, hint = "a safetensors file", "give it a name that ends in `.safetensors`"
    elif not head.strip(b"\0"):
        kind, hint = "zeros at its start: the download did not finish", DOWNLOAD_AGAIN
    else:
        kind, hint = "not a zip, as torch.save writes it", DOWNLOAD_AGAIN
    raise InputError(f"{shown(path.name)} is {kind}", facts={"path": path, "size": f"{file.size:,} bytes"}, hint=hint)


def _members(file: _File) -> tuple[list[Member], bytes]:
    """Every member in the order of the file, and the bytes of the central directory."""
    start, stop, count = _directory_range(file)
    if stop - start > MAX_DIRECTORY or count > MAX_MEMBERS:
        raise Damaged(f"lists {count:,} members in {stop - start:,} bytes, at most {MAX_MEMBERS:,} in {MAX_DIRECTORY:,} are read")
    directory, position = file.read(start, stop - start), 0
    entries = []
    while position < len(directory):
        entry, position = _entry(directory, position, start)
        entries.append(entry)
    file.source.expect((entry.header, entry.header + MEMBER_HEAD + len(entry.name) + entry.small) for entry in entries)
    members = [entry.member(file) for entry in entries]
    members.sort(key=lambda member: member.header_offset)
    names = {member.name for member in members}
    if len(members) != count or len(names) != count:
        raise Damaged("lists a member twice, or not as many as it says")
    ends = [0, *(member.offset + member.size for member in members)]
    begins = [*(member.header_offset for member in members), start]
    if begins[0] != 0 or any(end > begin for end, begin in zip(ends, begins, strict=True)):
        raise Damaged("holds members that overlap")
    return members, directory


def _directory_range(file: _File) -> tuple[int, int, int]:
    """Where the central directory begins and ends, and how many members it lists."""
    stop = file.size - END.size
    signature, *disks, count, length, start, comment = END.unpack(file.read(stop, END.size))
    if signature != b"PK\x05\x06" or comment:
        raise Damaged(_why_no_end(file))
    sound = disks == [0, 0, count]
    locator = file.read(stop - END64_LOCATOR.size, END64_LOCATOR.size)
    if locator.startswith(b"PK\x06\x07"):
        narrow = ((count, 0xFFFF), (length, IN_ZIP64), (start, IN_ZIP64))
        stop -= END64_LOCATOR.size + END64.size
        signature, rest, _, _, *disks, count, length, start = END64.unpack(file.read(stop, END64.size))
        sound &= signature == b"PK\x06\x06" and rest == END64.size - 12 and disks == [0, 0, count]
        sound &= END64_LOCATOR.unpack(locator)[1:] == (0, stop, 1)
        sound &= all(short in (long, limit) for long, (short, limit) in zip((count, length, start), narrow, strict=True))
    if not sound or start + length != stop:
        raise Damaged("contradicts itself at its end: the records there do not agree where its directory is")
    return start, stop, count


def _why_no_end(file: _File) -> str:
    """What is wrong with a zip that does not end as one, with the size that it should have where that is known."""
    tail = file.read(max(0, file.size - (1 << 16)), min(file.size, 1 << 16))
    extra = len(tail) - tail.rfind(b"PK\x05\x06") - END.size
    if 0 < extra < len(tail) - END.size:
        return f"has {extra:,} bytes after its end"
    try:
        start = file.read(0, min(file.size, MAX_PICKLE))
        begin = LOCAL.size + sum(LOCAL.unpack_from(start)[-2:])
        views = _views(interpret(start[begin : start.index(b"PK\x07\x08", begin)]))
    except PARSE_ERRORS:
        views = {}
    needed = sum(storage.numel * ITEMSIZE[storage.dtype] for storage in {view.storage for view in views.values()})
    expected = f"expected more than {needed:,} bytes" if needed >= file.size else "its directory is missing"
    return f"is truncated, {expected}, found {file.size:,}"


@dataclass(frozen=True)
class _Entry:
    """What the directory says of a member."""

    name: bytes
    flags: int
    header: int
    size: int
    crc32: int
    entry_offset: int

    @property
    def small(self) -> int:
        """Bytes behind the header that are read at once: all but those of tensors."""
        return 0 if re.search(rb"/data/\d+$", self.name) else min(self.size, MAX_PICKLE)

    def member(self, file: _File) -> Member:
        """With the place of its data. Raises Damaged as `_data_offset`."""
        offset = _data_offset(file, self.header, self.name, self.flags, self.size, self.crc32)
        return Member(self.name.decode(), self.header, offset, self.size, self.crc32, self.entry_offset)


def _entry(directory: bytes, position: int, directory_start: int) -> tuple[_Entry, int]:
    """The entry at `position` of the directory, and where the next one is."""
    fields = CENTRAL.unpack_from(directory, position)
    signature, _, _, flags, method, _, _, crc32, packed, size, name_length, extra_length, comment, disk, _, _, header = fields
    name_end = position + CENTRAL.size + name_length
    name, end = directory[position + CENTRAL.size : name_end], name_end + extra_length
    if signature != b"PK\x01\x02" or end > len(directory) or comment or disk:
        raise Damaged("has a damaged directory")
    text = name.decode()
    if not text.isprintable() or not 0 < len(name) <= MAX_MEMBER_NAME:
        raise Damaged(f"lists a member with the impossible name {shown(text)}")
    if flags & ~FLAGS or method:
        raise Refused(f"holds {shown(text)} compressed or encrypted; torch.save only stores")
    wide = list(_zip64(directory[name_end:end]))
    if len(wide) != [size, packed, header].count(IN_ZIP64):
        raise Damaged(f"contradicts itself about the size or place of {shown(text)}")
    size, packed, header = (wide.pop(0) if value == IN_ZIP64 else value for value in (size, packed, header))
    if packed != size:
        raise Damaged(f"contradicts itself about the size of {shown(text)}")
    return _Entry(name, flags, header, size, crc32, directory_start + position), end


def _data_offset(file: _File, header: int, name: bytes, flags: int, size: int, crc32: int) -> int:
    """Where a member's data begins. Raises Damaged unless its own header says the same as the directory, or 0 where the descriptor
    behind the data says it."""
    fields = LOCAL.unpack(file.read(header, LOCAL.size))
    signature, _, local_flags, method, _, _, local_crc32, packed, unpacked, name_length, extra_length = fields
    rest = file.read(header + LOCAL.size, name_length + extra_length)
    wide = _zip64(rest[name_length:])  # torch puts the header's offset, or the size and a 0, there
    open_end = {0} if flags & 8 else set()
    sizes = {size} | open_end | ({IN_ZIP64} if len(wide) > 1 else set())
    agree = signature == b"PK\x03\x04" and (local_flags, method, rest[:name_length]) == (flags, 0, name)
    agree &= {packed, unpacked} <= sizes and local_crc32 in {crc32} | open_end and {*wide} <= {size, header} | open_end
    if not agree or header + LOCAL.size + len(rest) + size > file.size:
        raise Damaged(f"contradicts itself about {shown(name.decode())}: directory and header differ")
    return header + LOCAL.size + len(rest)


def _zip64(extra: bytes) -> tuple[int, ...]:
    """The 64-bit numbers of a zip64 extra field (id 1), or none."""
    position, fields = 0, []
    while position < len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4 + length
        if position > len(extra):
            raise Damaged("has a damaged extra field")
        if kind == 1:
            fields.append(struct.unpack(f"<{length // 8}Q", extra[position - length : position]))
    if len(fields) > 1:
        raise Damaged("has two zip64 fields for one member")
    return fields[0] if fields else ()


def _inside_root(file: _File, members: list[Member]) -> dict[str, Member]:
    """The members by their names inside the one root folder. Raises Refused unless they are those of a `torch.save` file."""
    roots = {member.name.partition("/")[0] for member in members}
    inside = {member.name.partition("/")[2]: member for member in members}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise Refused("is a TorchScript archive: a program, not a plain tensor file")
    unknown = [member.name for name, member in inside.items() if not MEMBER.fullmatch(name)]
    if len(roots) != 1 or roots & {"", ".", ".."} or unknown or "data.pkl" not in inside:
        raise Refused(f"is a zip, but not one that torch.save writes (it holds {listed(unknown or sorted(roots))})")
    if "byteorder" in inside and _checked(file, inside["byteorder"], 16) != b"little":
        raise Refused("was written on a big-endian machine")
    return inside


def _checked(file: _File, member: Member, limit: int) -> bytes:
    """The bytes of a small member. Raises Damaged where its CRC-32 is wrong."""
    if member.size > limit:
        raise Refused(f"has {member.size:,} bytes in {shown(member.name)}, at most {limit:,} are read")
    data = file.read(member.offset, member.size)
    if zlib.crc32(data) != member.crc32:
        raise Damaged(f"is damaged: {shown(member.name)} does not have the CRC-32 that its writer took")
    return data


def _views(content: object) -> dict[str, View]:
    """The dict that the file holds. Raises Refused unless it maps names to tensors and nothing else."""
    if not isinstance(content, dict):
        raise Refused(f"holds a value of type {shown(_kind(content))}, not a dict of tensors")
    views = {name: view for name, view in content.items() if isinstance(name, str) and isinstance(view, View)}
    others = [f"{name} ({_kind(value)})" for name, value in content.items() if name not in views]
    if others:
        raise Refused(f"holds {len(others):,} things that are not tensors: {listed(others)}")
    return views


def _check_share(tensors: dict[str, Stored], stored: int) -> None:
    """Raise Refused where so many tensors share bytes that reading or writing all would cost far more than the file."""
    if (total := sum(tensor.nbytes for tensor in tensors.values())) > MAX_SHARE * stored:
        raise Refused(f"holds {stored:,} bytes of values, of which its tensors make {total:,} by sharing them")


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, View) else type(value).__name__


def _stored(name: str, view: View, inside: Mapping[str, Member], source: SourceFile) -> Stored:
    """The tensor's place in the file. Raises Refused unless it lies within its member."""
    if not name.isprintable() or not 0 < len(name.encode()) <= MAX_MEMBER_NAME:
        raise Refused(f"holds a tensor with the impossible name {shown(name)}")
    member, itemsize = inside.get(f"data/{view.storage.key}"), ITEMSIZE[view.storage.dtype]
    if member is None:
        raise Refused(f"does not hold the values of {shown(name)}")
    if member.size != view.storage.numel * itemsize:
        raise Refused(f"contradicts itself about the size of {shown(name)}, {view.storage.numel * itemsize:,} or {member.size:,} bytes")
    if problem := view.problem():
        raise Refused(f"holds {shown(name)}, which {problem}")
    offset = member.offset + view.offset * itemsize
    return Stored(dtype=view.storage.dtype, shape=view.shape, file=source, offset=offset, record=member.record, name=name)
