"""Files written at once or not at all: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import LlavaWeightsError, OutputError, shortage

# What file systems answer to a call that they do not support: on some network ones, locks and the fsync of a folder.
NOT_SUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


def write_file(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data`."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        put_file(temporary, data)
        os.rename(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def put_file(path: Path, data: bytes) -> None:
    """Write `data` to a new file that nobody reads yet, and fsync it; its name is durable only after `sync_folder`."""
    path.unlink(missing_ok=True)  # left by a run that was killed, or a link to some other file
    with naming(path), open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, with durable names."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: until then, a crash may undo a rename. Does nothing where the file system can't."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(folder):
            os.fsync(fd)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    finally:
        os.close(fd)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path into an OSError of a call that has only a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def remove(path: Path) -> None:
    """Delete a file or a folder with all in it; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def output_error(error: OSError, path: Path) -> LlavaWeightsError:
    """The OutputError for what the system refused, with the reason and the file that `error` names, else `path`."""
    if known := shortage(error):
        return known
    named = error.filename2 or error.filename
    path = Path(os.fsdecode(named)) if isinstance(named, str | bytes | os.PathLike) else path
    hints = {
        errno.ENOSPC: "free some space, then run the same command to continue",
        errno.EDQUOT: "the disk quota is used up: free some space, then run the same command to continue",
        errno.ENAMETOOLONG: "give a shorter name",
    }
    hint = hints.get(error.errno or 0, "check its folder's permissions and the disk, then run the same command again")
    name = re.sub(r"(\.[0-9a-f]{8})?\.part$", "", path.name).lstrip(".")
    return OutputError(f"can't write `{name}`: {error.strerror or error}", facts={"file": path}, hint=hint)
