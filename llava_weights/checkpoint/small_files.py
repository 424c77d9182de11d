"""The small files of a checkpoint, read with a limit: JSON objects, texts, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError
from ..storage.places import open_place
from ..storage.reading import DOWNLOAD_AGAIN
from ..storage.strict_json import JsonObject, load_object, parse_object, read_exactly
from .checkpoint import LARGEST_OBJECT

SmallFiles = Mapping[str, Path | bytes]  # by name
RIGHT_CONFIG = "give the config.json that belongs to these weights"


def small_object(files: SmallFiles, name: str, *, limit: int = LARGEST_OBJECT) -> JsonObject:
    """The JSON object in a small file, empty where there is no such file. Raises InputError for anything else, and for more than
    `limit` bytes."""
    if (source := files.get(name)) is None:
        return {}
    return load_object(source, limit=limit) if isinstance(source, Path) else parse_object(small_bytes(name, source, limit), name=name)


def small_text(files: SmallFiles, name: str, *, limit: int = LARGEST_OBJECT) -> str | None:
    """The text in a small file, None where there is no such file. Raises InputError for more than `limit` bytes, or other than UTF-8."""
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
        with open_place(source) as file:
            size = file.identity.size
            data = read_exactly(file, size) if size <= limit else b""
    else:
        data, size = source, len(source)
    if size > limit:
        raise InputError(f"`{name}` has {size:,} bytes, at most {limit:,} are read", hint=DOWNLOAD_AGAIN)
    return data
