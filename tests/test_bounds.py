"""What a small hostile file may cost: memory and work are bounded by the file's honest size, not by what it says."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from test_links import LLAVA, LORA, copied, run

from llava_weights.checkpoint.sentencepiece import MAX_PIECES, Vocabulary, read_sentencepiece
from llava_weights.checkpoint.tokenizer_json import bpe_merges
from llava_weights.errors import InputError
from llava_weights.formats.folder import index_file, index_folder
from llava_weights.storage import hub
from llava_weights.transforms.adapter_config import read_rules

SPARSE = 2 << 30  # bytes of a file that takes no space


@contextlib.contextmanager
def cheap(limit: int = 200 << 20) -> Iterator[None]:
    """At most `limit` bytes of memory at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["SHA256SUMS", "llava-weights.manifest.json"])
def test_a_sparse_record(tmp_path: Path, name: str) -> None:
    it = copied(LLAVA, tmp_path / "it")
    (it / name).touch()
    os.truncate(it / name, SPARSE)
    with cheap():
        assert run("checksum {it}", it, tmp_path / "out").code == 5  # something else is recorded there
        assert run("verify {it}", it, tmp_path / "out").code == 4
    if name == "SHA256SUMS":
        with cheap():
            assert run("verify {it} --against {it}/SHA256SUMS", it, tmp_path / "out").code == 3


@pytest.mark.parametrize("names", [("LICENSE",), tuple(f"LICENSE{number}" for number in range(20)), ("tokenizer.json",)])
def test_sparse_small_files(tmp_path: Path, names: tuple[str, ...]) -> None:
    it = copied(LLAVA, tmp_path / "it")
    for name in names:
        (it / name).touch()
        os.truncate(it / name, SPARSE if len(names) == 1 else 10 << 20)
    with cheap():
        ended = run("convert {it} --to llava -o {out} --vision-tower {clip}", it, tmp_path / "out")
    assert (ended.code, (tmp_path / "out").exists()) == (3, False), ended
    assert "hint: " in ended.told


def test_a_huge_index_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, the index in the cache tells which shards belong to a copy; one without end is left to its reader, who refuses it."""
    snapshot = tmp_path / "models--owner--name/snapshots" / ("a" * 40)
    shutil.copytree(LLAVA, snapshot)
    (tmp_path / "models--owner--name/refs").mkdir()
    (tmp_path / "models--owner--name/refs/main").write_text("a" * 40)
    index = snapshot / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {' + ", ".join(f'"{number}": "x"' for number in range(1_000_000)) + "}}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with cheap(), pytest.raises(InputError, match="at most"):
        index_folder(hub.fetch(hub.HubSource("owner/name")).folder)


def field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(data)) + data


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def piece(text: bytes, kind: int = 1) -> bytes:
    return field(1, field(1, text) + b"\x15" + struct.pack("<f", 0.0) + b"\x18" + bytes([kind]))


def test_a_tokenizer_of_too_many_pieces() -> None:
    pieces = b"".join(field(1, field(1, b"%x" % number)) for number in range(MAX_PIECES + 1))
    with pytest.raises(InputError, match=f"more than {MAX_PIECES:,} pieces"):
        read_sentencepiece(pieces)


def test_a_tokenizer_of_many_unknown_fields() -> None:
    """Fields that nobody reads are not kept."""
    fields = b"".join(varint(number << 3) + b"\1" for number in range(100, 150_000))
    sound = piece(b"<unk>", 2) + piece(b"<s>", 3) + piece(b"</s>", 3)
    with cheap(5 << 20):
        assert len(read_sentencepiece(sound + field(2, fields) + field(3, fields)).ids) == 3


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(lambda: [chr(0x400 + number) * 1024 for number in range(1000)], id="long"),
        pytest.param(lambda: ["a" * i + "b" * j + "c" * k + "d" * m for i, j, k, m in product(*[range(22)] * 4)][1:], id="nested"),
    ],
)
def test_pieces_that_can_be_merged_without_end(names: Callable[[], list[str]]) -> None:
    vocabulary = dict.fromkeys(names(), 0.0)
    with pytest.raises(InputError, match=r"pieces of `tokenizer\.model`"):
        bpe_merges(Vocabulary({}, "", "", "", scores=vocabulary, kinds=dict.fromkeys(vocabulary, 1)))


@pytest.mark.parametrize("shift", [0, 1])
def test_many_tensors_of_the_same_bytes(tmp_path: Path, shift: int) -> None:
    """16 MB of values, of which 5,000 names each are nearly all: equal views or each a place further."""
    values = torch.zeros(8 << 20, dtype=torch.float16)
    torch.save({f"x{number}": values[number * shift : len(values) - 5000 + number * shift] for number in range(5000)}, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").stat().st_size < 20 << 20
    with pytest.raises(InputError, match="by sharing them"):
        index_file(tmp_path / "a.bin")


def test_a_tied_head_may_share(tmp_path: Path) -> None:
    table = torch.zeros(64, 8)
    torch.save(OrderedDict({"model.embed_tokens.weight": table, "lm_head.weight": table, "half": table[:32]}), tmp_path / "a.bin")
    assert len(index_file(tmp_path / "a.bin").tensors) == 3


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_modules", "modules_to_save", "target_parameters"])
def test_an_adapter_config_of_endless_lists(tmp_path: Path, key: str) -> None:
    config = json.loads((LORA / "adapter_config.json").read_text())
    names = [f"a{number}" for number in range(20_000)]
    config[key] = dict.fromkeys(names, 8) if "pattern" in key else names
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="20,000 entries"):
        read_rules(tmp_path / "adapter_config.json")
