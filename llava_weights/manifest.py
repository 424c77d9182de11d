"""What proves a folder: `SHA256SUMS` for standard tools, and a manifest with one digest a tensor and two roots.

A digest is over the raw little-endian, row-major values only, so it does not depend on shards, container or file names.
Schema: facts, verify 1.3.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import __version__
from .plan import Plan, describe

MANIFEST = "llava-weights.manifest.json"
SUMS = "SHA256SUMS"
SCHEMA = 1


@dataclass(frozen=True)
class FileEntry:
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """`shard` says where the tensor lies and is outside the roots."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    sha256: str
    shard: str


def root_of_tensors(tensors: Iterable[TensorEntry]) -> str:
    """sha256 of one line a tensor, sorted by name: `name TAB dtype TAB dim,dim TAB sha256 LF`. Reproducible with `sha256sum`."""
    lines = (f"{t.name}\t{_content(t)}" for t in sorted(tensors, key=lambda t: t.name.encode()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def root_of_content(tensors: Iterable[TensorEntry]) -> str:
    """The same without names, lines sorted: equal before and after a pure renaming."""
    return hashlib.sha256("".join(sorted(map(_content, tensors))).encode()).hexdigest()


def _content(tensor: TensorEntry) -> str:
    return f"{tensor.dtype}\t{','.join(map(str, tensor.shape))}\t{tensor.sha256}\n"


ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}  # as coreutils writes a name, in a line that then begins with a backslash


def make_sums(files: Sequence[FileEntry]) -> bytes:
    """Lines that `sha256sum -c` reads, sorted by path."""
    return "".join(map(_line, sorted(files, key=lambda file: file.path))).encode()


def _line(file: FileEntry) -> str:
    name = "".join(ESCAPES.get(character, character) for character in file.path)
    mark = "\\" if name != file.path else ""
    return f"{mark}{file.sha256}  {name}\n"


def make_manifest(plan: Plan, files: Sequence[FileEntry], tensors: Sequence[TensorEntry], tallies: Mapping[str, int]) -> dict[str, Any]:
    """The manifest as plain data. No timestamp: the same work gives the same bytes."""
    return {
        "schema": SCHEMA,
        "tool": {"name": "llava-weights", "version": __version__},
        "root": {
            "tensors": root_of_tensors(tensors),
            "content": root_of_content(tensors),
            "files": hashlib.sha256(make_sums(files)).hexdigest(),
        },
        "recipe": [describe(step) for step in plan.history],
        "options": dict(plan.options),
        "tallies": dict(tallies),
        "environment": environment(),
        "files": [file.__dict__ for file in sorted(files, key=lambda file: file.path)],
        "tensors": [{**tensor.__dict__, "shape": list(tensor.shape)} for tensor in sorted(tensors, key=lambda t: t.name.encode())],
    }


def environment() -> dict[str, str]:
    """Versions that arithmetic and bytes may depend on, without importing any of them."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("torch", "numpy", "zstandard", "huggingface_hub"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
