"""Readers of weight files: a path in, an ordered `dict` of tensors out, from headers only.

This file holds what every reader does first: open a regular file without being trapped by a pipe, and name what a file
is when it is not what its name says.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, LlavaWeightsError, shortage

DOWNLOAD_AGAIN = "download the file again, for example with `hf download`"

LONGEST_SHOWN = 300  # characters

# What the first bytes of a file say it is, and what to do about it.
DISGUISES = (
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded", "run `git lfs pull` in its repository"),
    (b"<", "an HTML or XML page, not the file that its name promises", DOWNLOAD_AGAIN),
    (b"GGUF", "a GGUF file, whose weights are quantised", "give the unquantised checkpoint that it was made from"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes it", "name it `.bin`, or `.pth`, if it holds a torch checkpoint"),
    (b"\x80\x02", "a bare pickle, as torch.save wrote it before version 1.6", "download the file in safetensors format"),
)


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """A read-only descriptor of a regular file and its status. A pipe, folder or device is an InputError, and so is any
    OSError on the way: opening a pipe does not wait for its writer."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise irregular(path, status)
        yield fd, status
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        os.close(fd)


def unreadable(path: Path, error: OSError) -> LlavaWeightsError:
    """The refusal for a file that the operating system does not let us read."""
    if known := shortage(error):
        return known
    if error.errno == errno.ENOENT:
        return InputError(f"{shown(path.name)} does not exist", facts={"path": path}, hint="check the path, or download what is missing")
    hint = "check its permissions, its folders' and the disk, then run the same command again"
    return InputError(f"{shown(path.name)} can't be read: {error.strerror}", facts={"path": path}, hint=hint)


def irregular(path: Path, status: os.stat_result) -> InputError:
    """The refusal for what is there under the name of a file, and is none."""
    kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
    return InputError(f"{shown(path.name)} is {kind}, not a file", facts={"path": path}, hint=DOWNLOAD_AGAIN)


def present(path: Path) -> bool:
    """Whether something has this name, if only a link. A disk that fails is an InputError: `os.path.lexists` would call it absence."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no file can have such a name
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise unreadable(path, error) from error
    return True


def refuse_disguise(path: Path, head: bytes) -> None:
    """Raise InputError naming what the file is, where its first bytes give it away as something else."""
    if not head:
        raise InputError(f"{shown(path.name)} is empty", facts={"path": path}, hint=DOWNLOAD_AGAIN)
    for magic, kind, hint in DISGUISES:
        if head.lstrip().startswith(magic):
            raise InputError(f"{shown(path.name)} is {kind}", facts={"path": path}, hint=hint)


def shown(name: str) -> str:
    """A name or path out of an input, safe to print: in backticks, no control characters or lone surrogates, not without end."""
    clean = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name[:LONGEST_SHOWN])
    return f"`{clean}`" if len(name) <= LONGEST_SHOWN else f"`{clean}...`"


def legible(name: str) -> str:
    """The name of a file as text that UTF-8 can hold: bytes of it that are no text are replaced."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", name)  # Python's stand-ins for such bytes


def is_text(name: str) -> bool:
    """Whether UTF-8 can hold the name of a file; Linux takes any bytes."""
    return legible(name) == name


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first five, and how many more."""
    every = list(names)
    more = f" and {len(every) - 5:,} more" if len(every) > 5 else ""
    return ", ".join(map(shown, every[:5])) + more
