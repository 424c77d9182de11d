"""One file that a command writes beside its output: a report, a picture, a recording. Checked before the work, written at once."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ..errors import OutputError, UsageError
from ..text import shown
from .atomic import naming, output_error, write_file


def check_file(
    path: str | os.PathLike[str], *, force: bool = False, append: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()
) -> Path:
    """The path of a file that is to be written, checked before hours of work. An existing file is refused unless `force` or `append`,
    and always where it is one of `inputs` or lies inside one.

    Raises UsageError for what is no path, OutputError for a folder that is missing or can't be written, for a file that exists, and
    for what is no regular file.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(path):
        raise UsageError(f"{path!r} is no path of a file", hint="give the file's own name")
    path = Path(os.path.expanduser(path))
    name, facts = shown(path.name or str(path)), {"file": path.absolute()}
    try:
        there = path.stat() if append and path.exists() else os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        there = None
    except OSError as error:
        raise output_error(error, path) from error
    if there is None and not path.parent.is_dir():
        raise OutputError(f"can't write {name}: its folder does not exist", facts=facts, hint="make the folder first")
    if there is not None and not stat.S_ISREG(there.st_mode):
        what = "a folder" if stat.S_ISDIR(there.st_mode) else "no regular file"
        raise OutputError(f"{name} exists and is {what}", facts=facts, hint="give another name")
    if there is not None and not (force or append):
        raise OutputError(f"{name} exists already", facts=facts, hint="give another name, or pass `--force` to replace it")
    for source in map(Path, inputs):
        if there is not None and source.exists() and path.resolve().is_relative_to(source.resolve()):
            raise OutputError(f"{name} is a file of an input", facts={**facts, "input": source}, hint="give another name")
    place, needed = (path, os.W_OK) if there is not None and append else (path.parent, os.W_OK | os.X_OK)
    if not os.access(place, needed):
        raise OutputError(f"can't write {name}: permission denied", facts=facts, hint="give another name, or change the permissions")
    return path


def write_report(path: str | os.PathLike[str], data: bytes, *, force: bool = False, append: bool = False) -> None:
    """Write a file at once or not at all; with `append`, behind what is there. Raises as `check_file`, and OutputError where the system
    refuses."""
    place = check_file(path, force=force, append=append)
    try:
        if not append:
            write_file(place, data)
            return
        with naming(place), open(place, "ab", buffering=0) as file:
            file.write(data)
    except OSError as error:
        raise output_error(error, place) from error
