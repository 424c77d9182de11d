"""The other copy that a repair takes bytes from: a folder, a file, an address, or a revision of the Hub.

Nothing that it holds is believed: `repair.py` compares each byte that it takes with a digest that the damaged checkpoint or the Hub states.
What is read here beside those bytes are headers, a manifest, and what the Hub says of its files.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from ..checkpoint.checkpoint import Checkpoint, CheckpointSource, open_checkpoint, place_of
from ..checkpoint.manifest import MANIFEST, MAX_MANIFEST, Manifest, Sum, TensorEntry, read_manifest
from ..errors import InputError, UsageError
from ..families.files import GGUF_SUFFIX, WEIGHT_SUFFIXES
from ..families.layouts import canonical
from ..formats.folder import optional
from ..formats.gguf import index_gguf
from ..formats.safetensors import MAX_HEADER, read_header
from ..formats.torch_zip import index_torch_zip
from ..storage.hub import HubSource, parse_source, source_text
from ..storage.ranges import stat
from ..storage.reading import SourceFile, open_source, read_bytes
from ..storage.remote import is_remote
from ..tensors.lazy import LazyTensor, Stored
from ..text import redact, scheme_of, shown
from .checksums import hub_files

Layout = Mapping[str, Stored]  # the tensors of one file, by the names that it gives them


@dataclass
class OtherCopy:
    """Where bytes are taken from. `look` gives the file of a name there, None where there is none. `sums` is what the Hub states."""

    label: str
    source: str | Path  # what `open_checkpoint` takes
    look: Callable[[str], SourceFile | None]
    sums: Mapping[str, Sum] = field(default_factory=dict)
    _found: dict[str, SourceFile | None] = field(default_factory=dict)

    def find(self, name: str) -> SourceFile | None:
        """The file of this name there. Raises HubError where the network fails."""
        if name not in self._found:
            self._found[name] = self.look(name)
        return self._found[name]

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The tensors there, None where they are no checkpoint that can be opened. Reads headers."""
        with suppress(InputError):
            return open_checkpoint(self.source)
        return None

    @cached_property
    def manifest(self) -> Manifest | None:
        """The manifest there, None where there is none that agrees with itself."""
        file = self.find(MANIFEST)
        if file is None or file.size > MAX_MANIFEST:
            return None
        with tempfile.TemporaryDirectory() as folder, suppress(InputError):
            path = Path(folder) / MANIFEST
            path.write_bytes(read_range(file, 0, file.size))
            return read_manifest(path)
        return None

    def stated(self, name: str, algorithm: str) -> str:
        """The digest that the Hub states for a file there; "" where it states none."""
        entry = self.sums.get(name)
        return entry.digest if entry and entry.algorithm == algorithm else ""

    def layout(self, name: str) -> tuple[bytes | None, Layout | None]:
        """Where the tensors of a file lie there, None where that can't be told; and its header, where that stands in one piece before
        them. Reads headers."""
        file = self.find(name)
        if file is None:
            return None, None
        if name.endswith(".safetensors"):
            head = head_of(file)
            return head, layout_of(head, file)
        tensors = self.checkpoint.tensors if self.checkpoint else {}
        inside = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, Stored) and tensor.file.path == file.path}
        return None, inside or None

    def tensor(self, entry: TensorEntry) -> LazyTensor | None:
        """The tensor of the same name, dtype and shape there, in whatever file, container or layout."""
        if self.checkpoint is None:
            return None
        found = self.checkpoint.tensors.get(entry.name) or self._by_canonical_name.get(canonical(entry.name))
        return found if found is not None and (found.dtype, found.shape) == (entry.dtype, entry.shape) else None

    @cached_property
    def _by_canonical_name(self) -> Mapping[str, LazyTensor]:
        with suppress(InputError):
            return self.checkpoint.by_canonical_name() if self.checkpoint else {}
        return {}


def open_other(source: CheckpointSource, place: Path) -> OtherCopy:
    """The other copy at `source`, for a repair of `place`.

    Raises UsageError where it is `place` itself, InputError where there is nothing, HubError where the Hub or a server can't be asked.
    """
    text = source_text(place_of(source, "other copy"))
    if is_remote(text) and scheme_of(text) != "hf":
        return _at_address(text)
    parsed = parse_source(text)
    return _on_hub(parsed) if isinstance(parsed, HubSource) else _on_disk(parsed.path, place)


def _on_disk(path: Path, place: Path) -> OtherCopy:
    if os.path.samefile(path, place):
        raise UsageError("`--from` names the checkpoint that is to be repaired", hint="give another copy of it")
    folder = path if path.is_dir() else path.parent

    def look(name: str) -> SourceFile | None:
        if not path.is_dir():
            return SourceFile.at(path) if place.is_file() or name == path.name else None
        with suppress(InputError):  # a link that leads out of its folder: nothing is read there
            found = optional(folder, name)
            return SourceFile.at(found) if found else None
        return None

    return OtherCopy(shown(path.resolve().name), path, look)


def _on_hub(source: HubSource) -> OtherCopy:
    if source.folder.endswith((*WEIGHT_SUFFIXES, GGUF_SUFFIX)):
        source = replace(source, folder=source.folder.rpartition("/")[0])
    commit, found = hub_files(source)
    prefix = f"{source.folder}/" if source.folder else ""
    address = f"hf://{source.repo_id}@{commit}/{prefix}"
    files = {entry.path: SourceFile(address + entry.path, size, 0, 0, etag=entry.digest) for entry, size in found}
    return OtherCopy(f"{source.repo_id}@{commit[:12]}", address.rstrip("/"), files.get, {entry.path: entry for entry, _ in found})


def _at_address(text: str) -> OtherCopy:
    """Files at `https://`, `s3://` or `gs://`."""
    address = text.rstrip("/")
    home, _, only = address.rpartition("/") if address.endswith((*WEIGHT_SUFFIXES, GGUF_SUFFIX)) else (address, "", "")

    def look(name: str) -> SourceFile | None:
        place = f"{home}/{quote(name) if text.startswith('http') else name}"
        found = stat(place) if not only or name == only else None
        return SourceFile(place, found[0], 0, 0, etag=found[1]) if found else None

    other = OtherCopy(redact(address), text, look)
    _ = other.checkpoint  # opening it refuses what is no sound address
    return other


def read_range(file: SourceFile, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file, here or there."""
    with closing(open_source(file)) as source:
        return read_bytes(source, start, stop - start)


def head_of(file: SourceFile) -> bytes:
    """The header of a safetensors file with its length before it, as far as it is there and not longer than any."""
    head = read_range(file, 0, min(8, file.size))
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > MAX_HEADER:
        return head
    return head + read_range(file, 8, min(8 + length, file.size))


def layout_of(head: bytes, file: SourceFile) -> Layout | None:
    """Where the tensors of a safetensors file with this header lie, were it whole; None for a header that is not sound."""
    if len(head) < 8 or len(head) != 8 + int.from_bytes(head[:8], "little"):
        return None
    with suppress(InputError):
        return read_header(Path(file.path), head[8:], file)[0]
    return None


def layout_here(path: Path, size: int) -> Layout | None:
    """Where the tensors of a local weight file lie, were it whole and `size` bytes long; None where its own bytes don't tell."""
    file = SourceFile.at(path)
    if path.suffix == ".safetensors":
        found = layout_of(head_of(file), replace(file, size=size))
        return found and {name: replace(tensor, file=file) for name, tensor in found.items()}
    with suppress(InputError):
        if path.suffix == GGUF_SUFFIX:
            return index_gguf(path)[0]
        if path.suffix in WEIGHT_SUFFIXES:
            return index_torch_zip(path)
    return None
