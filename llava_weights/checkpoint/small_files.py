"""The small files of a checkpoint, read with a limit: JSON objects, texts, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..storage.reading import DOWNLOAD_AGAIN, open_regular
from ..storage.strict_json import load_object, parse_object, read_exactly
from .checkpoint import LARGEST_OBJECT


def small_object(files: Mapping[str, Path | bytes], name: str, *, limit: int = LARGEST_OBJECT) -> dict[str, Any]:
    """The JSON object in one of a checkpoint's small files, empty where there is no such file. Raises InputError for anything else, and
    where it has more than `limit` bytes."""
    if (source := files.get(name)) is None:
        return {}
    return load_object(source, limit=limit) if isinstance(source, Path) else parse_object(small_bytes(name, source, limit), name=name)


def small_text(files: Mapping[str, Path | bytes], name: str, *, limit: int = 1 << 20) -> str | None:
    """The text in one of a checkpoint's small files, None where there is no such file. Raises InputError unless it is short and UTF-8."""
    if (source := files.get(name)) is None:
        return None
    try:
        return small_bytes(name, source, limit).decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"`{name}` is not UTF-8", facts={"byte": error.start}, hint="save it as UTF-8, or take it from the authors of the model"
        ) from error


def small_bytes(name: str, source: Path | bytes, limit: int) -> bytes:
    """The bytes of a small file. Raises InputError where there are more than `limit`."""
    if isinstance(source, Path):
        with open_regular(source) as (descriptor, status):
            size = status.st_size
            data = read_exactly(source, descriptor, size) if size <= limit else b""
    else:
        data, size = source, len(source)
    if size > limit:
        raise InputError(f"`{name}` has {size:,} bytes, at most {limit:,} are read", hint=DOWNLOAD_AGAIN)
    return data
