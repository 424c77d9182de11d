"""System calls that fail on purpose: the n-th call of a kind, on a file below one folder, answers with an error or does half of its work.

The calls of this process are replaced where Python code finds them (`os`, `fcntl`, `io.open`, and the two that `stream` takes from libc).
A call that fails has not happened, as with the system's own. `fsync` is only counted: no test here needs a disk.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import io
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llava_weights.write import shard

# Every call by the name that a fault gives it: where it is found, under which names.
CALLS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "preadv": (os, ("preadv",)),
    "pwrite": (os, ("pwrite",)),
    "fsync": (os, ("fsync",)),
    "open": (os, ("open",)),
    "fstat": (os, ("fstat",)),
    "stat": (os, ("stat", "lstat")),
    "listdir": (os, ("listdir", "scandir")),
    "rename": (os, ("rename", "replace")),
    "mkdir": (os, ("mkdir",)),
    "unlink": (os, ("unlink",)),
    "rmdir": (os, ("rmdir",)),
    "ftruncate": (os, ("ftruncate", "truncate")),
    "fadvise": (os, ("posix_fadvise",)),
    "statvfs": (os, ("statvfs",)),
    "flock": (fcntl, ("flock",)),
    "fallocate": (shard, ("_fallocate",)),
    "sync_file_range": (shard, ("_sync_file_range",)),
}
FROM_LIBC = ("fallocate", "sync_file_range")
INSIDE_FILES = ("read", "write")  # of the raw files under `open(...)`
BY_NAME = ("open", "stat", "listdir", "rename", "mkdir", "unlink", "rmdir")  # their errors carry the path, those of descriptors do not
ALL, NONE = 0, -1


class Fault(NamedTuple):
    """One kind of call, and how it fails: an errno by name, or `short` for half of the bytes."""

    call: str
    how: str

    def __str__(self) -> str:
        return f"{self.call} {self.how}"

    @property
    def reason(self) -> str:
        """The system's words."""
        return os.strerror(getattr(errno, self.how))


def faults(table: dict[str, str]) -> list[Fault]:
    return [Fault(call, how) for call, hows in table.items() for how in hows.split()]


# What a run does where its output can't be written (exit code 5).
OUTPUT = faults(
    {
        "open": "ENOSPC EDQUOT EROFS EACCES EIO",
        "write": "ENOSPC EDQUOT EIO",
        "pwrite": "ENOSPC EDQUOT EIO EFBIG",
        "fsync": "EIO ENOSPC EDQUOT",
        "fsync folder": "EIO",
        "rename": "EIO EROFS ENOSPC",
        "mkdir": "ENOSPC EROFS EACCES",
        "fallocate": "ENOSPC EDQUOT EFBIG",
        "sync_file_range": "EIO ENOSPC EDQUOT",
        "read": "EIO",  # when it is read back
        "preadv": "EIO",
        "flock": "EIO",
    }
)

# ... where an input can't be read (exit code 3).
INPUT = faults({"open": "EIO EACCES ESTALE", "preadv": "EIO ESTALE", "fstat": "ESTALE", "listdir": "EIO"})

# ... where the answer depends on which of these calls it is: some only ask whether a file is there, or clean up.
EITHER_OUTPUT = faults(
    {"stat": "EIO EACCES", "fstat": "EIO", "listdir": "EIO", "unlink": "EIO EROFS", "rmdir": "ENOTEMPTY EBUSY", "statvfs": "EIO"}
)
EITHER_INPUT = faults({"stat": "EIO EACCES"})

# ... and what makes no difference: work done by halves, and what a file system may lack. Every call of the run answers so.
HARMLESS_OUTPUT = faults(
    {
        "pwrite": "short",
        "write": "short",
        "preadv": "short",
        "read": "short",
        "fallocate": "EOPNOTSUPP ENOSYS EINTR",
        "sync_file_range": "ENOSYS EINVAL EOPNOTSUPP",
        "fadvise": "ENOSYS EINVAL",
        "flock": "ENOLCK ENOSYS EOPNOTSUPP",
        "fsync folder": "EINVAL ENOSYS EOPNOTSUPP",
        "rmdir": "ENOTEMPTY",  # NFS keeps a deleted file's name while the file is open
    }
)
# No "fadvise": inputs as small as these are in the page cache before the run, and stay there (tests/storage/test_residency.py).
HARMLESS_INPUT = faults({"preadv": "short"})


@dataclass
class Injector:
    """Lets the `number`-th matching call below `root` fail, or ALL of them. `seen` counts, `struck` has the paths that were hit."""

    fault: Fault
    root: Path
    number: int = ALL
    seen: int = 0
    struck: list[str] = field(default_factory=list)
    out: Path | None = None
    late: bool = False  # it struck after `out` had got its name
    turn: Any = field(default_factory=threading.Lock)

    def hits(self, call: str, place: object, folder: int | None = None) -> bool:
        path = path_of(place, folder)
        if call == "fsync" and os.path.isdir(path):
            call = "fsync folder"
        if call != self.fault.call or not f"{path}/".startswith(f"{self.root}/"):
            return False
        with self.turn:
            self.seen += 1
            hit = self.number in (ALL, self.seen)
            if hit:
                self.struck.append(path)
                self.late |= self.out is not None and self.exists()
        return hit

    def exists(self) -> bool:
        """Whether `out` is there, asked by a call that is never replaced."""
        return os.access(self.out or "", os.F_OK)

    def error(self, *paths: object) -> OSError:
        code = getattr(errno, self.fault.how)
        return OSError(code, os.strerror(code), *paths)

    def wrapped(self, call: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*arguments: Any, **options: Any) -> Any:
            if not self.hits(call, arguments[0] if arguments else ".", options.get("dir_fd")):
                return None if call in ("fsync", "sync_file_range") else original(*arguments, **options)
            if self.fault.how == "short":
                return half(call, original, arguments)
            if call not in FROM_LIBC:
                raise self.error(*([os.fspath(arguments[0])] if call in BY_NAME and isinstance(arguments[0], str | Path) else []))
            ctypes.set_errno(getattr(errno, self.fault.how))
            return -1

        return answer

    def opened(self, file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None) -> Any:
        """What `open` makes, over a raw file whose reads and writes ask this injector."""
        if self.hits("open", file):
            raise self.error(os.fspath(file))
        raw = RawFile(file, mode.replace("b", "").replace("t", ""), self)
        if buffering == 0:
            return raw
        kind = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
        return kind(raw) if "b" in mode else io.TextIOWrapper(kind(raw), encoding, errors, newline)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for call, (module, names) in CALLS.items():
            for name in names:
                patch.setattr(module, name, self.wrapped(call, getattr(module, name)))
        plain = builtins.open

        def opened(file: Any, *arguments: Any, **options: Any) -> Any:
            ours = not isinstance(file, int) and path_of(file).startswith(str(self.root)) and not {"opener", "closefd"} & options.keys()
            return self.opened(file, *arguments, **options) if ours else plain(file, *arguments, **options)

        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)


class RawFile(io.FileIO):
    """A file under `open`, which may fail or be slow of hand."""

    def __init__(self, file: Any, mode: str, injector: Injector) -> None:
        super().__init__(file, mode)
        self.injector = injector

    def write(self, data: Any) -> int:
        if not self.injector.hits("write", self.fileno()):
            return super().write(data)
        if self.injector.fault.how != "short":
            raise self.injector.error()
        return super().write(memoryview(data)[: max(1, len(data) // 2)])

    def readinto(self, buffer: Any) -> int:
        if not self.injector.hits("read", self.fileno()):
            return super().readinto(buffer)
        if self.injector.fault.how != "short":
            raise self.injector.error()
        return super().readinto(memoryview(buffer)[: max(1, len(buffer) // 2)])

    def readall(self) -> bytes:
        if self.injector.hits("read", self.fileno()) and self.injector.fault.how != "short":
            raise self.injector.error()
        return super().readall()


def half(call: str, original: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    descriptor, what, offset = arguments
    data = what[0] if call == "preadv" else what
    part = data[: max(1, len(data) // 2)]
    return original(descriptor, [part] if call == "preadv" else part, offset)


READLINK, ABSOLUTE = os.readlink, os.path.abspath


def path_of(place: object, folder: int | None = None) -> str:
    """The path behind a path, a file object or a descriptor."""
    if hasattr(place, "fileno"):
        place = place.fileno()
    if isinstance(place, int):
        return READLINK(f"/proc/self/fd/{place}").removesuffix(" (deleted)")
    path = os.fsdecode(place)  # type: ignore[call-overload]
    return ABSOLUTE(path) if folder is None else os.path.join(READLINK(f"/proc/self/fd/{folder}"), path)
