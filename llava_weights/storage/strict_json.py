"""JSON from strangers, read strictly and with a limit to every cost.

Python's `json` takes the last of two equal keys, `NaN`, and 1e400 as infinity; another program may read the same file
differently. All of that is refused here.
"""

from __future__ import annotations

import json
import math
from itertools import chain
from typing import Any

from ..errors import InputError
from ..text import shown
from .places import Place, open_place
from .reading import DOWNLOAD_AGAIN, Source, read_bytes, refuse_disguise

JsonObject = dict[str, Any]

MAX_INDEX = 10 << 20  # bytes; huggingface_hub's limit too
MAX_DEPTH = 64  # the deepest honest file, a tokenizer.json, has about 8
# Bytes of memory that parsed JSON may take, as estimated before parsing: each item of a list about 64, each object with an entry 320.
# The tokenizer.json of Llama 3, the largest of these families, comes to 65 MB; 10 MiB of `[],` would take 220.
MAX_COST = 96 << 20


def load_object(path: Place, *, limit: int = 1 << 20) -> dict[str, Any]:
    """The JSON object in a regular file of at most `limit` bytes. Raises InputError, naming file and reason, for everything else."""
    with open_place(path) as source:
        if source.identity.size > limit:
            what = f"{shown(path.name)} has {source.identity.size:,} bytes, at most {limit:,} are read"
            raise InputError(what, facts={"path": path}, hint=DOWNLOAD_AGAIN)
        data = read_exactly(source, source.identity.size)
    refuse_disguise(path, data[:64])
    return parse_object(data, name=path.name, path=path)


def parse_object(data: bytes, *, name: str, path: Place | None = None) -> dict[str, Any]:
    """The JSON object in `data`, as `parse_json`."""
    value = parse_json(data, name=name, path=path)
    if not isinstance(value, dict):
        raise _refusal(name, "it does not hold an object `{...}`", path)
    return value


def parse_json(data: bytes, *, name: str, path: Place | None = None) -> Any:
    """The JSON value in `data`, which is called `name` in messages and came from `path`.

    Raises InputError unless it is UTF-8 without a byte order mark, free of lone surrogates, duplicate keys, NaN, Infinity
    and numbers that no float64 holds, and at most 64 levels deep.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise _refusal(name, "it starts with a byte order mark", path)
    try:
        if 64 * (data.count(b",") + data.count(b"[")) + 320 * data.count(b"{") > MAX_COST:
            raise ValueError("it holds far more values than such a file needs")
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
        _check_depth_and_text(value)
    except UnicodeDecodeError as error:
        raise _refusal(name, f"byte {error.start:,} is not UTF-8", path) from error
    except UnicodeEncodeError as error:
        raise _refusal(name, "a text holds half a surrogate pair", path) from error
    except json.JSONDecodeError as error:
        raise _refusal(name, f"{error.msg} at line {error.lineno}, column {error.colno}", path) from error
    except RecursionError as error:
        raise _refusal(name, f"it is nested more than {MAX_DEPTH} levels deep", path) from error
    except ValueError as error:  # raised by the hooks, or by Python for integers of more than 4,300 digits
        raise _refusal(name, str(error).partition("; use sys.")[0], path) from error
    return value


def read_exactly(source: Source, size: int) -> bytes:
    """The first `size` bytes of an open file. Raises InputError if they are not there."""
    if size > source.identity.size:
        what = f"{shown(source.identity.name)} is truncated, expected at least {size:,} bytes, found {source.identity.size:,}"
        raise InputError(what, facts={"path": source.identity.path}, hint=DOWNLOAD_AGAIN)
    return read_bytes(source, 0, size)


def _refusal(name: str, reason: str, path: Place | None) -> InputError:
    facts = {"path": path} if path else None
    return InputError(f"{shown(name)} is not JSON that can be trusted: {reason}", facts=facts, hint=DOWNLOAD_AGAIN)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key {shown(key)} stands twice in one object")
        value[key] = item
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text[:40])} is too large")
    return value


def _check_depth_and_text(value: Any) -> None:
    """Raises RecursionError for more than MAX_DEPTH levels, UnicodeEncodeError for text that no UTF-8 file can hold."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        for node in level:
            if isinstance(node, str):
                node.encode("utf-8")
        inner = [chain(node.keys(), node.values()) if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)]
        if not inner:
            return
        level = list(chain.from_iterable(inner))
    raise RecursionError


def json_bytes(value: Any, *, sort_keys: bool = False) -> bytes:
    """JSON as transformers writes it: indented by two spaces, with a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n").encode()
