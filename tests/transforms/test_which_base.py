"""The base that a delta was made for is named, by its values or by a fingerprint of them; where none is, or two are, that is said."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer
from safetensors.numpy import load_file, save_file

import llava_weights as lw
from llava_weights.checkpoint.fingerprint import COLUMNS, ROWS, places, read_fingerprint, take_fingerprint
from llava_weights.cli.toy import make_toys
from llava_weights.errors import InputError, UsageError
from llava_weights.families.decoders import DECODER_BY_TYPE
from llava_weights.families.fingerprints import FINGERPRINTS
from llava_weights.tensors.lazy import LazyTensor


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA in Meta's layout, its delta, a Vicuna, other bases and fingerprints. Not to be changed."""
    folder = tmp_path_factory.mktemp("toys")
    make_toys(folder)
    llama = lw.open_checkpoint(folder / "llama")
    lw.execute(lw.make_plan(lw.make_delta(folder / "llama", folder / "vicuna", codec="integer")), folder / "integer")
    for name in ("llama", "vicuna"):
        (folder / f"{name}.json").write_bytes(take_fingerprint(lw.open_checkpoint(folder / name)).document())
    values = {name: np.frombuffer(bytes_of(tensor), np.float16).reshape(tensor.shape) for name, tensor in llama.parameters().items()}
    for name, change in (("as llama", lambda v: v), ("shifted", lambda v: np.roll(v, 1, 0)), ("bfloat16", as_bf16)):
        (folder / name).mkdir()
        shutil.copy(folder / "vicuna/config.json", folder / name)
        changed = {key: np.ascontiguousarray(change(value)) if value.ndim > 1 else value for key, value in values.items()}
        save_file(changed, folder / name / "model.safetensors", {"format": "pt"})
    return folder


def bytes_of(tensor: LazyTensor) -> bytes:
    from contextlib import closing

    from llava_weights.storage.reading import Workspace

    out = bytearray(tensor.nbytes)
    with closing(Workspace()) as work:
        tensor.rows_into(memoryview(out), 0, tensor.rows, work)
    return bytes(out)


def as_bf16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) & 0xFFFF0000).view(np.float32).astype(np.float16)


def test_the_base_is_named(toys: Path) -> None:
    found = lw.which_base(toys / "delta", [toys / "vicuna", toys / "llama", toys / "shifted", toys / "bfloat16", toys / "clip"])
    assert found.right == (str(toys / "llama"),)
    assert [each.verdict for each in found.candidates] == ["wrong", "right", "wrong", "wrong", "unfit"]
    assert found.candidates[1].failing / found.candidates[1].sampled < 1e-3
    assert "bfloat16" in found.candidates[3].reason
    assert (found.exit_code, found.builtin) == (0, 0)
    assert "no fingerprints of published bases are built in" in found.lines()[-1]


def test_a_fingerprint_is_as_good(toys: Path) -> None:
    found = lw.which_base(toys / "delta", [toys / "vicuna.json", toys / "llama.json"])
    assert [each.verdict for each in found.candidates] == ["wrong", "right"]
    assert "fingerprint of `llama`" in found.candidates[1].reason
    taken = read_fingerprint(toys / "llama.json")
    sampled = sum(np.prod([len(axis) for axis in places(tensor)]) for tensor in taken.checkpoint.tensors.values() if len(tensor.shape) == 2)
    assert 0.9 * sampled < found.candidates[1].sampled <= sampled


@pytest.mark.parametrize("name", ["shifted", "bfloat16", "vicuna"])
def test_fingerprints_of_wrong_bases(toys: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "taken.json"
    path.write_bytes(take_fingerprint(lw.open_checkpoint(toys / name)).document())
    assert [each.verdict for each in lw.which_base(toys / "delta", [path]).candidates] == ["wrong"]


def test_two_that_fit_are_both_said(toys: Path) -> None:
    found = lw.which_base(toys / "delta", [toys / "llama", toys / "as llama", toys / "vicuna"])
    assert len(found.right) == 2
    assert found.exit_code == 0
    assert "2 candidates fit" in found.lines()[0]
    assert all(name in found.lines()[0] for name in ("llama", "as llama"))


def test_none_fits(toys: Path, tmp_path: Path) -> None:
    found = lw.which_base(toys / "delta", [toys / "vicuna", toys / "lora", tmp_path / "missing", toys / "shifted"])
    assert (found.right, found.exit_code) == ((), 3)
    assert "none of 4 candidates" in found.lines()[0]
    assert [each.verdict for each in found.candidates] == ["wrong", "unfit", "unfit", "wrong"]
    assert all(each.reason for each in found.candidates)


def test_a_lossless_delta(toys: Path) -> None:
    found = lw.which_base(toys / "integer", [toys / "llama", toys / "vicuna", toys / "llama.json"])
    assert [each.verdict for each in found.candidates] == ["right", "wrong", "unclear"]
    assert "whole tensors" in found.candidates[2].reason


def test_builtin_fingerprints(toys: Path) -> None:
    """The table that ships is empty; a row of it is asked beside the candidates, or alone."""
    assert FINGERPRINTS == ()
    found = lw.which_base(toys / "delta", [toys / "vicuna"], builtin=[(toys / "llama.json", "a test")])
    assert (found.right, found.builtin) == (("llama",), 1)
    assert "1 built-in" in found.lines()[-1]
    with pytest.raises(UsageError, match="no candidate"):
        lw.which_base(toys / "delta", [])


def test_a_repository_is_not_downloaded(toys: Path, hub: HubServer) -> None:
    commit = hub.add("owner/llama", toys / "as llama")
    found = lw.which_base(toys / "delta", ["owner/llama", f"owner/llama@{commit}"])
    assert [each.verdict for each in found.candidates] == ["right", "right"]
    assert all(asked for name, asked in hub.ranges if name.endswith(".safetensors"))


@pytest.mark.parametrize("name", ["llama", "clip", "lora"])
def test_what_is_no_delta(toys: Path, name: str) -> None:
    with pytest.raises(InputError, match="not an unapplied delta"):
        lw.which_base(toys / name, [toys / "llama"])


@pytest.mark.parametrize("name", ["delta", "clip", "lora"])
def test_what_is_no_base(toys: Path, name: str) -> None:
    with pytest.raises(InputError, match="no base of deltas"):
        take_fingerprint(lw.open_checkpoint(toys / name))


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_file_says_where_its_values_stand(toys: Path) -> None:
    values = load_file(toys / "as llama/model.safetensors")
    written = json.loads((toys / "llama.json").read_text())
    assert {*written["tensors"]} == {*values}
    for name, entry in written["tensors"].items():
        assert (entry["dtype"], tuple(entry["shape"])) == ("F16", values[name].shape)
        if values[name].ndim == 2:
            rows, columns = places(LazyTensor(dtype="F16", shape=values[name].shape))
            expected = values[name][np.ix_(rows, columns)]
            assert base64.b64decode(entry["values"]) == expected.tobytes()
            assert (len(rows), len(columns)) == (ROWS, COLUMNS)
        else:
            assert "values" not in entry
    assert take_fingerprint(lw.open_checkpoint(toys / "as llama")).samples == read_fingerprint(toys / "llama.json").samples


def test_that_of_a_13b_has_150_kb() -> None:
    """72 kB of values: 3 parts in a million."""
    from llava_weights.checkpoint.fingerprint import Fingerprint, described

    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    shapes = DECODER_BY_TYPE["llama"].shapes({**sizes, "num_key_value_heads": 40, "head_dim": 128, "vocab_size": 32000})
    tensors = {name: LazyTensor(dtype="F16", shape=tuple(shape)) for name, shape in shapes.items()}
    samples = {name: bytes(2 * ROWS * COLUMNS) for name, tensor in tensors.items() if len(tensor.shape) == 2}
    assert sum(map(len, samples.values())) == 72_192
    assert 130_000 < len(Fingerprint("llama-13b", described("llama-13b", tensors), samples).document()) < 170_000


def entry(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda document: change(document["tensors"]["lm_head.weight"])


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": lambda d: d.update(format="other"),
    "another schema": lambda d: d.update(schema=2),
    "other counts": lambda d: d.update(rows=4),
    "no name": lambda d: d.update(name=3),
    "no tensors": lambda d: d.update(tensors={}),
    "a list of tensors": lambda d: d.update(tensors=[1]),
    "another digest": lambda d: d.update(digest="blake3:" + "0" * 64),
    "no digest": lambda d: d.pop("digest"),
    "a name that can't be printed": lambda d: d["tensors"].update({"a\tb": d["tensors"]["lm_head.weight"]}),
    "values cut": entry(lambda e: e.update(values=e["values"][:-4])),
    "values changed": entry(lambda e: e.update(values="AAAA" + e["values"][4:])),
    "no base64": entry(lambda e: e.update(values="%" + e["values"][1:])),
    "values that are no text": entry(lambda e: e.update(values=[1])),
    "a huge shape": entry(lambda e: e.update(shape=[1 << 60, 2])),
    "rows too long": entry(lambda e: e.update(shape=[8, 1 << 40])),
    "a negative shape": entry(lambda e: e.update(shape=[-1, 64])),
    "values of a vector": entry(lambda e: e.update(shape=[20480])),
    "another dtype": entry(lambda e: e.update(dtype="F32")),
    "an unknown dtype": entry(lambda e: e.update(dtype="X")),
    "one more key": entry(lambda e: e.update(more=1)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_file_that_is_not_sound(toys: Path, tmp_path: Path, kind: str) -> None:
    document = json.loads((toys / "llama.json").read_text())
    DAMAGE[kind](document)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"bad\.json") as raised:
        read_fingerprint(path)
    assert raised.value.hint
    found = lw.which_base(toys / "delta", [path, toys / "llama"])
    assert [each.verdict for each in found.candidates] == ["unfit", "right"]


# --- the command line -----------------------------------------------------------------------------------------------


def test_on_the_command_line(toys: Path, tmp_path: Path, cli: Any) -> None:
    assert cli("inspect", toys / "llama", "--fingerprint", "taken.json")[0] == 0
    assert read_fingerprint(tmp_path / "taken.json").name == "llama"
    assert cli("inspect", toys / "llama", "--fingerprint", "taken.json")[0] == 5
    assert cli("inspect", toys / "llama", "--fingerprint", "taken.json", "--force")[0] == 0
    code, out, _ = cli("inspect", toys / "delta", "--among", toys / "vicuna", "taken.json", toys / "llama")
    assert (code, "2 candidates fit" in out) == (0, True)
    code, out, _ = cli("inspect", toys / "delta", "--among", toys / "vicuna", "--among", "taken.json", "--json")
    document = json.loads(out.splitlines()[-1])
    assert (code, document["right"], document["exit_code"]) == (0, ["taken.json"], 0)
    code, out, _ = cli("inspect", toys / "delta", "--among", toys / "vicuna")
    assert (code, "not shown" in out) == (3, True)


@pytest.mark.parametrize(
    "arguments", [["--among", "x", "--fingerprint", "y"], ["--tensors", "--among", "x"], ["another"], ["--force"]], ids=" ".join
)
def test_options_that_can_not_be(toys: Path, cli: Any, arguments: list[str]) -> None:
    code, out, err = cli("inspect", toys / "delta", *arguments)
    assert (code, out, "hint:" in err) == (2, "", True)
