"""Which files of a folder are read: real layouts as their own programs read them; mistakes and traps are refused with a hint."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_weights.errors import InputError
from llava_weights.formats.folder import WeightFiles, index_file, index_folder, member
from llava_weights.storage.reading import Workspace
from llava_weights.tensors.lazy import LazyTensor

PATIENT = settings(max_examples=60)
Layout = dict[str, list[str]]  # file name -> its tensors
NUMBERS = {name: float(number) for number, name in enumerate("abcdefgh")}


def write(folder: Path, layout: Layout) -> Path:
    """Weight files whose tensors `a`, `b`, ... each hold one number, so that a value tells where it came from."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in layout.items():
        tensors = {name: torch.tensor([NUMBERS[name]]) for name in names}
        if file.endswith(".safetensors"):
            safetensors.torch.save_file(tensors, folder / file, {"format": "pt"})
        else:
            torch.save(tensors, folder / file)
    return folder


def write_index(folder: Path, name: str, weight_map: object) -> Path:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 8.0}, "weight_map": weight_map}))
    return folder


def values(found: WeightFiles) -> dict[str, float]:
    work = Workspace()
    raw = bytearray(4)
    result = {}
    for name, tensor in found.tensors.items():
        tensor.rows_into(memoryview(raw), 0, 1, work)
        result[name] = float(torch.frombuffer(raw, dtype=torch.float32)[0])
    work.close()
    return result


def refused(call: Callable[[Path], object], path: Path, pattern: str) -> InputError:
    with pytest.raises(InputError, match=pattern) as caught:
        call(path)
    assert type(caught.value) is InputError
    assert caught.value.what.isprintable()
    return caught.value


SHARDS: Layout = {"model-00002-of-00002.safetensors": ["a"], "model-00001-of-00002.safetensors": ["c", "b"]}
INDEX = {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors", "c": "model-00001-of-00002.safetensors"}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_index(write(tmp_path / "model", SHARDS), "model.safetensors.index.json", INDEX)


# What is read when it is alone in a folder; each row also wins over every row below it.
LAYOUTS: dict[str, tuple[Layout, str | None]] = {
    "safetensors index": (SHARDS, "model.safetensors.index.json"),
    "safetensors": ({"model.safetensors": ["d"]}, None),
    "one other safetensors": ({"anything.safetensors": ["e"]}, None),
    "torch": ({"pytorch_model.bin": ["f"]}, None),
    "adapter": ({"adapter_model.safetensors": ["g"]}, None),
    "adapter in torch": ({"adapter_model.bin": ["h"]}, None),
    "projector": ({"mm_projector.bin": ["a"]}, None),
    "rest of a LoRA": ({"non_lora_trainables.bin": ["b"]}, None),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_each_layout_alone(tmp_path: Path, kind: str) -> None:
    layout, index = LAYOUTS[kind]
    write(tmp_path, layout)
    if index:
        write_index(tmp_path, index, INDEX)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"not for us")
    found = index_folder(tmp_path)
    expected = {name: NUMBERS[name] for names in layout.values() for name in names}
    assert values(found) == expected
    assert found.container == ("safetensors" if next(iter(layout)).endswith(".safetensors") else "torch")
    assert {file.path for file in found.files} == {str(tmp_path / file) for file in layout}
    assert found.metadata == ({file: {"format": "pt"} for file in layout} if found.container == "safetensors" else {})
    assert (found.notes, found.config) == ((), None)
    for file in layout:
        assert index_file(tmp_path / file).tensors.items() <= found.tensors.items()


TWO_SAVES = ("safetensors index", "safetensors")  # of one name: tests below


@pytest.mark.parametrize(
    ("better", "worse"), [(a, b) for i, a in enumerate(LAYOUTS) for b in list(LAYOUTS)[i + 1 :] if (a, b) != TWO_SAVES]
)
def test_the_better_one_wins_and_the_other_is_noted(tmp_path: Path, better: str, worse: str) -> None:
    for kind in (worse, better):
        layout, index = LAYOUTS[kind]
        write(tmp_path, layout)
        if index:
            write_index(tmp_path, index, INDEX)
    found = index_folder(tmp_path)
    assert {file.name for file in found.files} == LAYOUTS[better][0].keys()
    weights_beside = [name for name in LAYOUTS[worse][0] if not re.match("adapter|mm_|non_lora", name)]
    assert [f"not read: `{name}`" in found.notes[-1] for name in weights_beside] == [True] * len(weights_beside)
    assert len(found.notes) == len(weights_beside)


@pytest.mark.parametrize(
    ("single", "shard"), [("model.safetensors", "model-{}.safetensors"), ("pytorch_model.bin", "pytorch_model-{}.bin")]
)
@pytest.mark.parametrize("left", [(), ("00002-of-00002",)], ids=["no shard is left", "one shard is left"])
def test_an_index_without_its_shards_gives_way_to_the_one_file(tmp_path: Path, single: str, shard: str, left: tuple[str, ...]) -> None:
    shards = {shard.format(number): names for number, names in (("00001-of-00002", ["a"]), ("00002-of-00002", ["b"]))}
    write(tmp_path, {single: ["a", "b"], **{shard.format(number): ["b"] for number in left}})
    write_index(tmp_path, f"{single}.index.json", {name: file for file, names in shards.items() for name in names})
    found = index_folder(tmp_path)
    assert [file.name for file in found.files] == [single]
    assert f"{single}.index.json" in found.notes[0]
    assert shard.format("00001-of-00002") in found.notes[0]


def test_two_saves_in_one_folder_are_refused_by_both_names_unless_they_are_the_same(tmp_path: Path) -> None:
    index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write(tmp_path, {"model.safetensors": ["a", "b"], **{file: [name] for name, file in index.items()}})
    write_index(tmp_path, "model.safetensors.index.json", index)
    same = index_folder(tmp_path)
    assert [file.name for file in same.files] == ["model.safetensors"]
    assert "hold the same" in same.notes[0]
    safetensors.torch.save_file({"a": torch.tensor([NUMBERS["a"] + 1])}, tmp_path / index["a"])
    with pytest.raises(InputError) as refused:
        index_folder(tmp_path)
    told = str(refused.value)
    assert all(name in told for name in ("`model.safetensors`", "`model.safetensors.index.json`", "`a`", *index.values()))


def test_an_index_that_lists_the_one_file_is_believed(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": ["a"]})
    write_index(tmp_path, "model.safetensors.index.json", {"a": "model.safetensors", "b": "model.safetensors"})
    with pytest.raises(InputError, match="lacks 1 of the tensors"):
        index_folder(tmp_path)


def test_order_is_shard_by_shard_then_as_in_the_file(sharded: Path) -> None:
    found = index_folder(sharded)
    assert [file.name for file in found.files] == sorted(SHARDS)
    assert list(found.tensors) == ["b", "c", "a"]  # the library sorts inside a file


def test_torch_shards_keep_their_order(fixtures: Path) -> None:
    folder = fixtures / "A-delta-v0/base-hf-bin"
    found = index_folder(folder)
    expected: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.bin")):
        expected |= torch.load(file, weights_only=True)
    assert [(name, tensor.shape) for name, tensor in found.tensors.items()] == [(n, tuple(t.shape)) for n, t in expected.items()]
    assert found.container == "torch"
    assert len(found.files) == 2


def test_shards_without_index(sharded: Path) -> None:
    indexed = index_folder(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    found = index_folder(sharded)
    assert found.tensors == indexed.tensors
    assert list(found.tensors) == list(indexed.tensors)
    assert "no index" in found.notes[0]
    (sharded / "model-00001-of-00002.safetensors").rename(sharded / "model-00003-of-00002.safetensors")
    assert refused(index_folder, sharded, "1 of 2 shards are missing: `model-00001-of-00002.safetensors`").hint


def test_incomplete_shards_name_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path, {"pytorch_model-00003-of-00009.bin": ["a"], "mm_projector.bin": ["b"]})
    error = refused(index_folder, tmp_path, "8 of 9 shards are missing: `pytorch_model-00001-of-00009.bin`, .* and 3 more")
    assert "download" in str(error.hint)
    write(tmp_path, {"pytorch_model-00001-of-00002.bin": ["a"]})
    refused(index_folder, tmp_path, "several checkpoints")


def test_absurd_shard_numbers(tmp_path: Path) -> None:
    write(tmp_path, {"model-00001-of-00000.safetensors": ["a"]})
    assert index_folder(tmp_path).notes == ()  # no shard of anything, just a file with an odd name
    write(tmp_path, {"model-00001-of-99999.safetensors": ["b"]})
    refused(index_folder, tmp_path, "99,998 of 99,999 shards are missing")


def test_one_shard_given_as_a_file(sharded: Path) -> None:
    found = index_file(sharded / "model-00002-of-00002.safetensors")
    assert list(found.tensors) == ["a"]
    assert "one of 2 shards" in found.notes[0]


def test_meta(fixtures: Path, tmp_path: Path) -> None:
    root = fixtures / "A-delta-v0/base-meta"
    inside, above, piece = index_folder(root / "13B"), index_folder(root), index_file(root / "13B/consolidated.01.pth")
    assert inside.container == "meta"
    assert inside.config
    assert [file.name for file in inside.files] == ["consolidated.00.pth", "consolidated.01.pth"]
    assert above.tensors == inside.tensors == piece.tensors
    assert inside.notes == ()
    assert "`13B`" in above.notes[0]

    shutil.copytree(root / "13B", tmp_path / "13B")
    (tmp_path / "7B").mkdir()  # as after a download of the tokenizer only
    assert list(index_folder(tmp_path).tensors) == list(inside.tensors)
    shutil.copytree(root / "13B", tmp_path / "7B", dirs_exist_ok=True)
    error = refused(index_folder, tmp_path, "several models")
    assert error.facts["models"] == "`13B`, `7B`"
    assert str(tmp_path / "13B") in str(error.hint)


# Indexes: what they say and what is there


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors", "..\\outside.safetensors", "/etc/outside.safetensors", "C:outside.safetensors", "C:\\outside.safetensors",
        "\\\\host\\share\\outside.safetensors", "//host/outside.safetensors", "./model.safetensors", "sub/model.safetensors",
        ".hidden.safetensors", "~/x.safetensors", "model.bin", "model.SAFETENSORS", "model.safetensors\n", "model.safetensors\0",
        "model.safetensors ", "", ".", "..", "x" * 300 + ".safetensors", "é.safetensors", "-rf.safetensors", "https://host/x.safetensors",
        "\ud800.safetensors",
    ],
)  # fmt: skip
def test_shard_names_are_bare_file_names(sharded: Path, shard: str) -> None:
    write(sharded.parent, {"outside.safetensors": ["a"]})
    write_index(sharded, "model.safetensors.index.json", INDEX | {"a": shard})
    refused(index_folder, sharded, "`model.safetensors.index.json`")


@PATIENT
@given(st.text(max_size=12))
def test_any_shard_name_is_refused_or_missing(tmp_path_factory: pytest.TempPathFactory, shard: str) -> None:
    folder = tmp_path_factory.mktemp("x")
    write_index(folder, "model.safetensors.index.json", {"a": shard})
    refused(index_folder, folder, "points to|is missing|are missing|JSON")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", {"a": 1}, {"a": None}, {"a": ["model-00001-of-00002.safetensors"]}])
def test_weight_map_maps_names_to_names(sharded: Path, weight_map: object) -> None:
    write_index(sharded, "model.safetensors.index.json", weight_map)
    refused(index_folder, sharded, "`model.safetensors.index.json`")


@pytest.mark.parametrize(
    ("weight_map", "pattern", "named"),
    [
        (INDEX | {"d": INDEX["a"]}, "lacks 1 of the tensors", "`d`"),
        (INDEX | {"a": INDEX["b"]}, "lacks 1 of the tensors", "`a`"),
        ({"b": INDEX["b"], "a": INDEX["a"]}, "does not list 1 of the tensors", "`c`"),
        (INDEX | {f"x{i}": INDEX["a"] for i in range(9)}, "lacks 9", "`x4` and 4 more"),
    ],
)
def test_index_and_shards_must_agree(sharded: Path, weight_map: dict[str, str], pattern: str, named: str) -> None:
    write_index(sharded, "model.safetensors.index.json", weight_map)
    assert named in refused(index_folder, sharded, pattern).facts["tensors"]


@pytest.mark.parametrize("indexed", [True, False])
def test_tensor_in_two_shards(sharded: Path, indexed: bool) -> None:
    write(sharded, {"model-00001-of-00002.safetensors": ["a", "b", "c"]})
    if not indexed:
        (sharded / "model.safetensors.index.json").unlink()
    assert refused(index_folder, sharded, "repeats 1 tensors of another shard").facts["tensors"] == "`a`"


def test_missing_shards_are_all_named(sharded: Path) -> None:
    for name in SHARDS:
        (sharded / name).unlink()
    error = refused(index_folder, sharded, "2 of 2 shards are missing: `model-00001-of-00002.safetensors`, `model-00002")
    assert "download" in str(error.hint)


def test_index_of_11_mib(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_bytes(path.read_bytes().ljust(11 << 20))
    refused(index_folder, sharded, "at most 10,485,760")
    path.write_bytes(path.read_bytes()[: 10 << 20])
    assert len(index_folder(sharded).tensors) == 3


def test_index_key_twice(sharded: Path) -> None:
    text = json.dumps({"weight_map": INDEX}).replace('"a":', '"a": "model-00001-of-00002.safetensors", "a":')
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(index_folder, sharded, "`a` stands twice")


def test_several_indexes(sharded: Path) -> None:
    shutil.copy(sharded / "model.safetensors.index.json", sharded / "model.fp16.safetensors.index.json")
    assert len(index_folder(sharded).tensors) == 3
    (sharded / "model.safetensors.index.json").rename(sharded / "other.safetensors.index.json")
    refused(index_folder, sharded, "several index files: `model.fp16.safetensors.index.json`, `other")


# Traps in place of files


@pytest.mark.parametrize("trap", ["fifo", "folder", "device", "dangling link", "link out", "absolute link out", "link loop"])
@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_traps(sharded: Path, trap: str, name: str) -> None:
    path, outside = sharded / name, sharded.parent / name
    path.rename(outside)
    if trap == "fifo":
        os.mkfifo(path)
    elif trap == "folder":
        path.mkdir()
    else:
        target = {
            "dangling link": "nothing",
            "link out": f"../{name}",
            "absolute link out": outside,
            "link loop": name,
            "device": "/dev/zero",
        }
        path.symlink_to(target[trap])
    refused(index_folder, sharded, f"`{name}`")


def test_meta_piece_may_not_lead_out(fixtures: Path, tmp_path: Path) -> None:
    shutil.copytree(fixtures / "A-delta-v0/base-meta/13B", tmp_path / "13B")
    (tmp_path / "13B/consolidated.01.pth").rename(tmp_path / "elsewhere.pth")
    (tmp_path / "13B/consolidated.01.pth").symlink_to("../elsewhere.pth")
    refused(index_folder, tmp_path / "13B", "`consolidated.01.pth` is a link that leads out")


def test_link_inside_the_folder(sharded: Path) -> None:
    (sharded / "model-00001-of-00002.safetensors").rename(sharded / "data")
    (sharded / "model-00001-of-00002.safetensors").symlink_to("data")
    assert len(index_folder(sharded).tensors) == 3


def hub_cache(folder: Path) -> Path:
    """The weights of `folder` in the layout of the Hub cache; returns the snapshot."""
    repository = folder.parent / "hub/models--owner--name"
    snapshot = repository / "snapshots/0123456789abcdef"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, repository / f"blobs/{number:040}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040}")
    return snapshot


def test_hub_cache(sharded: Path) -> None:
    snapshot = hub_cache(sharded)
    found = index_folder(snapshot)
    assert values(found) == values(index_folder(sharded))
    assert {file.path for file in found.files} == {str(snapshot / name) for name in SHARDS}
    (sharded.parent / "shortcut").symlink_to(snapshot)  # a link that the user gives is the user's own
    assert len(index_folder(sharded.parent / "shortcut").tensors) == 3
    near = refused(index_folder, snapshot.parent.parent, "no weights")
    assert str(snapshot) in str(near.hint)


@pytest.mark.parametrize("target", ["../../../models--other--name/blobs/1", "../../refs/1", "../../../../secret/blobs/1"])
def test_links_of_the_hub_cache_stay_in_their_repository(sharded: Path, target: str) -> None:
    snapshot = hub_cache(sharded)
    name = "model-00001-of-00002.safetensors"
    aim = Path(os.path.normpath(snapshot / target))
    aim.parent.mkdir(parents=True)
    shutil.copy(sharded / name, aim)
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(target)
    refused(index_folder, snapshot, "leads out")


def test_blobs_beside_an_ordinary_folder_are_outside(tmp_path: Path) -> None:
    folder = write(tmp_path / "stuff/snapshots/1", {})
    write(tmp_path / "stuff/blobs", {"x.safetensors": ["a"]})
    (folder / "model.safetensors").symlink_to("../../blobs/x.safetensors")
    refused(index_folder, folder, "leads out")
    assert list(index_file(folder / "model.safetensors").tensors) == ["a"]  # a file that the user gives may be a link
    with pytest.raises(InputError):
        member(folder, "model.safetensors")


def test_blob_that_was_not_downloaded(sharded: Path) -> None:
    snapshot = hub_cache(sharded)
    (snapshot / "model-00002-of-00002.safetensors").resolve().unlink()
    assert "download" in str(refused(index_folder, snapshot, "`model-00002-of-00002.safetensors` is a link to a file that is missing").hint)


# The wrong folder


def test_nothing_here(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    error = refused(index_folder, empty, "no weights in `empty`")
    assert error.facts["found"] == "nothing"
    assert "model" in error.facts["accepted"]
    assert error.hint


def test_the_weights_are_next_door(sharded: Path) -> None:
    (sharded / "tokenizer").mkdir()
    (sharded / "tokenizer/tokenizer.model").write_bytes(b"x")
    above, below = refused(index_folder, sharded.parent, "no weights"), refused(index_folder, sharded / "tokenizer", "no weights")
    assert f"`{sharded}`" in str(above.hint)
    assert f"`{sharded}`" in str(below.hint)
    assert below.facts["found"] == "`tokenizer.model`"


def test_quantised_only(tmp_path: Path) -> None:
    (tmp_path / "llava-v1.5-13b.Q4_K_M.gguf").write_bytes(b"GGUF")
    (tmp_path / "ggml-model-q4_0.bin").write_bytes(b"lmgg")
    error = refused(index_folder, tmp_path, "only quantised weights: `ggml-model-q4_0.bin`, `llava-v1.5-13b.Q4_K_M.gguf`")
    assert "float16" in str(error.hint)
    refused(index_file, tmp_path / "llava-v1.5-13b.Q4_K_M.gguf", "quantised")
    (tmp_path / "llava-v1.5-13b.Q4_K_M.gguf").rename(tmp_path / "model.safetensors")
    refused(index_folder, tmp_path, "GGUF")


def test_two_files_of_other_names(tmp_path: Path) -> None:
    write(tmp_path, {"one.safetensors": ["a"], "two.safetensors": ["b"]})
    assert refused(index_folder, tmp_path, "not clear").facts["candidates"] == "`one.safetensors`, `two.safetensors`"


def test_no_tensors(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": []})
    refused(index_folder, tmp_path, "no tensors in `model.safetensors`")


def test_paths_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    error = refused(index_folder, tmp_path / "no/such/folder", "`folder` does not exist")
    assert f"`{tmp_path}`" in str(error.hint)
    refused(index_folder, tmp_path / "file", "is a file, not a folder")
    refused(index_file, tmp_path / "missing.bin", "`missing.bin` does not exist")
    refused(index_file, tmp_path / "file", "not a weight file")
    refused(index_file, tmp_path, "not a weight file")
    (tmp_path / "folder.safetensors").mkdir()
    refused(index_file, tmp_path / "folder.safetensors", "is a folder")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "folder" in str(refused(index_file, tmp_path / "model.safetensors.index.json", "not a weight file").hint)


def test_torch_file_under_a_safetensors_name(tmp_path: Path) -> None:
    write(tmp_path, {"pytorch_model.bin": ["a"]}).joinpath("pytorch_model.bin").rename(tmp_path / "model.safetensors")
    refused(index_folder, tmp_path, "zip archive, as torch.save writes it")


def test_nothing_is_read_but_headers(tmp_path: Path) -> None:
    """A terabyte of zeros costs no space and, if only its header is read, no time."""
    header = json.dumps({"a": {"dtype": "F16", "shape": [1 << 20, 1 << 19], "data_offsets": [0, 1 << 40]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(tmp_path / "model.safetensors", 8 + len(header) + (1 << 40))
    found: dict[str, LazyTensor] = dict(index_folder(tmp_path).tensors)
    assert found["a"].nbytes == 1 << 40
