"""JSON is read in one way only: honest files as Python's own parser reads them, everything doubtful refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_weights.errors import InputError
from llava_weights.storage.strict_json import load_object, parse_json

PATIENT = settings(max_examples=80)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)

REFUSED = {
    "byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "latin-1": b'{"a": "\xe9"}',
    "raw surrogate": b'{"a": "\xed\xa0\x80"}',
    "escaped surrogate": b'{"a": "\\ud800"}',
    "escaped surrogate in a key": b'{"\\udfff": 1}',
    "escaped surrogate in a list": b'{"a": [1, ["x\\ud83dx"]]}',
    "key twice": b'{"a": 1, "a": 1}',
    "key twice, escaped": b'{"a": 1, "\\u0061": 2}',
    "key twice, deeper": b'[{"b": {"a": 1, "c": 2, "a": 3}}]',
    "NaN": b'{"a": NaN}',
    "Infinity": b"[Infinity]",
    "-Infinity": b"-Infinity",
    "1e400": b'{"rope_theta": 1e400}',
    "-1e400": b"[-1e400]",
    "integer of 5,000 digits": b"9" * 5000,
    "65 levels": b"[" * 65 + b"]" * 65,
    "65 levels of objects": b'{"a":' * 65 + b"1" + b"}" * 65,
    "100,000 levels": b"[" * 100_000 + b"]" * 100_000,
    "100,000 open levels": b'{"a":' * 100_000,
    "two values": b"{} {}",
    "trailing comma": b'{"a": 1,}',
    "comment": b"{} // note",
    "single quotes": b"{'a': 1}",
    "control character": b'{"a": "\n"}',
    "nothing": b"",
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_refused(data: bytes) -> None:
    with pytest.raises(InputError, match=r"`odd\.json`"):
        parse_json(data, name="odd.json")


@PATIENT
@given(VALUES, st.booleans())
def test_what_is_sound_reads_as_python_reads_it(value: object, ascii_only: bool) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert parse_json(data, name="x.json") == json.loads(data)


@PATIENT
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,0\\ued8a-. N', max_size=40).map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        value = parse_json(data, name="x.json")
    except InputError:
        return
    assert value == json.loads(data)


def test_64_levels_and_a_surrogate_pair_are_fine() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64, name="x.json")
    assert parse_json(b'"\\ud83d\\ude00"', name="x.json") == "\N{GRINNING FACE}"


def test_reason_and_path_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n "a": 1,\n "a": 2}')
    with pytest.raises(InputError, match="the key `a` stands twice") as caught:
        load_object(path)
    assert caught.value.facts["path"] == str(path)
    path.write_text('{"a": \n oops}')
    with pytest.raises(InputError, match="line 2, column 2"):
        load_object(path)


def test_size_is_capped_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b" " * 100 + b"{}")
    assert load_object(path, limit=102) == {}
    with pytest.raises(InputError, match="102 bytes, at most 101"):
        load_object(path, limit=101)
    os.truncate(path, 1 << 40)  # a sparse terabyte: reading it first would not end
    with pytest.raises(InputError, match="at most 1,048,576"):
        load_object(path)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"\n\n <html>", "HTML"),
        (b"", "empty"),
        (b"PK\x03\x04", "zip"),
    ],
)
def test_disguises_are_named(tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=kind) as caught:
        load_object(path)
    assert caught.value.hint


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    for name, why in [("pipe", "pipe"), ("folder", "folder"), ("loop", "symbolic links"), ("missing", "does not exist")]:
        with pytest.raises(InputError, match=why):
            load_object(tmp_path / f"{name}.json")
    with pytest.raises(InputError, match="device"):
        load_object(Path("/dev/zero"))


def test_names_are_safe_to_print() -> None:
    with pytest.raises(InputError) as caught:
        parse_json(b'{"\\u001b[2J": 1, "\\u001b[2J": 1}', name="x\x07\udcff.json")
    assert caught.value.what.isprintable()


def test_object(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, 2.5, null, true]}')
    assert load_object(path) == {"a": [1, 2.5, None, True]}
    path.write_text("[]")
    with pytest.raises(InputError, match="object"):
        load_object(path)
