"""What is damaged is mended from another copy, byte for byte and with few bytes fetched, or it is refused and stays as it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from crash_children import fork_server, run_repair
from hostile import CASES, Case
from hub_server import HubServer

import llava_weights as lw
from llava_weights.checkpoint.manifest import MANIFEST, SUMS, read_manifest
from llava_weights.checks.repair import SAMPLE_BYTES, SAMPLES
from llava_weights.errors import HubError, InputError, Interrupted, MismatchError, OutputError, UsageError
from llava_weights.events import Progress, Started
from llava_weights.formats.safetensors import index_safetensors
from llava_weights.formats.torch_zip import index_torch_zip, zip_records

Change = Callable[[Path], object]
INDEX = "model.safetensors.index.json"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file by name, as a reader sees it, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def originals(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole checkpoints by kind. Not to be changed."""
    home = tmp_path_factory.mktemp("originals")
    folder = fixtures / "A-delta-v0"
    merged = lw.apply_delta(folder / "base-hf-bin", folder / "delta-307-apr17")
    lw.execute(lw.make_plan(merged, max_shard_size=60_000), home / "safetensors")
    lw.execute(lw.make_plan(merged, max_shard_size=25_000), home / "more shards")
    shutil.copytree(home / "safetensors", home / "sums")
    (home / "sums" / MANIFEST).unlink()
    shutil.copytree(home / "sums", home / "plain")
    (home / "plain" / SUMS).unlink()
    shutil.copytree(folder / "delta-307-apr17", home / "torch")
    lw.checksum(home / "torch")
    shutil.copytree(folder / "delta-307-apr17", home / "torch plain")
    return {path.name: path for path in home.iterdir()}


def shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))


def shard(folder: Path, number: int) -> Path:
    """The one of this number, else the last."""
    return shards(folder)[min(number, len(shards(folder)) - 1)]


def layout(path: Path) -> dict[str, Any]:
    return index_torch_zip(path) if path.suffix == ".bin" else index_safetensors(path)[0]


def poke(path: Path, position: int, data: bytes | None = None) -> None:
    """Write `data` there, by default the byte with one bit changed."""
    whole = bytearray(path.read_bytes())
    new = data if data is not None else bytes([whole[position] ^ 4])
    whole[position : position + len(new)] = new
    path.write_bytes(whole)


def in_tensor(number: int, tensor: int, data: bytes | None = None, at: float = 0.5) -> Change:
    """A change of the values of one tensor."""

    def change(folder: Path) -> None:
        path = shard(folder, number)
        every = list(layout(path).values())
        found = every[min(tensor, len(every) - 1)]
        poke(path, found.offset + int(at * (found.nbytes - 1)), data)

    return change


def zeros(folder: Path) -> None:
    path = shard(folder, 1)
    found = max(layout(path).values(), key=lambda tensor: tensor.nbytes)
    poke(path, found.offset, bytes(found.nbytes))


def hole(folder: Path) -> None:
    """Zeros over the end of one tensor and the beginning of the next."""
    path = shard(folder, 1)
    found = sorted(layout(path).values(), key=lambda tensor: tensor.offset)[3]
    poke(path, found.offset - 100, bytes(200))


def swapped_tensors(folder: Path) -> None:
    path = shard(folder, 1)
    every = list(layout(path).values())
    one, two = next((a, b) for a in every for b in every if a is not b and a.shape == b.shape)
    data = path.read_bytes()
    for to, source in ((one, two), (two, one)):
        poke(path, to.offset, data[source.offset : source.offset + source.nbytes])


def swapped_shards(folder: Path) -> None:
    one, two = shards(folder)[1:3]
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


def cut(number: int, keep: float | int) -> Change:
    def change(folder: Path) -> None:
        path = shard(folder, number)
        data = path.read_bytes()
        path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])

    return change


def all_but_the_last_byte(folder: Path) -> None:
    path = shard(folder, 1)
    path.write_bytes(path.read_bytes()[:-1])


def appended(folder: Path) -> None:
    path = shard(folder, 1)
    path.write_bytes(path.read_bytes() + b"more")


def inserted(folder: Path) -> None:
    path = shard(folder, 1)
    data = path.read_bytes()
    path.write_bytes(data[:30_000] + b"x" + data[30_000:])


def in_header(old: bytes, new: bytes) -> Change:
    def change(folder: Path) -> None:
        path = shard(folder, 1)
        poke(path, path.read_bytes().index(old), new)

    return change


def missing(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def missing_shards(*numbers: int) -> Change:
    return lambda folder: [shards(folder)[number].unlink() for number in sorted(numbers, reverse=True)]


def written(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def replaced_shard(data: bytes) -> Change:
    return lambda folder: shards(folder)[1].write_bytes(data)


def together(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def dangling(folder: Path) -> None:
    path = shard(folder, 1)
    path.unlink()
    path.symlink_to("gone.safetensors")


def in_pickle(folder: Path) -> None:
    path = shard(folder, 1)
    poke(path, zip_records(path)[0].offset + 40)


def in_directory(folder: Path) -> None:
    path = shard(folder, 1)
    poke(path, path.read_bytes().rindex(b"PK\1\2") + 16)


def in_manifest(folder: Path) -> None:
    path = folder / MANIFEST
    poke(path, path.read_bytes().index(b'"sha256": "') + 12, b"0000")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n"
EVERY = together(
    in_tensor(0, 2), cut(1, 0.3), missing_shards(2), missing("config.json", SUMS), written(INDEX, b"{"), written("tokenizer.model", b"")
)
DAMAGE: dict[str, tuple[str, Change]] = {
    "a bit of a value": ("safetensors", in_tensor(1, 4)),
    "the first bit of the values": ("safetensors", in_tensor(1, 0, at=0)),
    "the last bit of the values": ("safetensors", in_tensor(1, -1, at=1)),
    "bits of two tensors": ("safetensors", together(in_tensor(1, 1), in_tensor(1, 5))),
    "a bit in every shard": ("safetensors", together(*(in_tensor(number, 1) for number in range(4)))),
    "a tensor of zeros": ("safetensors", zeros),
    "a hole over two tensors": ("safetensors", hole),
    "two tensors exchanged": ("safetensors", swapped_tensors),
    "two shards exchanged": ("safetensors", swapped_shards),
    "a byte short": ("safetensors", all_but_the_last_byte),
    "half of it": ("safetensors", cut(1, 0.5)),
    "cut in the header": ("safetensors", cut(1, 100)),
    "an empty shard": ("safetensors", cut(1, 0)),
    "bytes behind it": ("safetensors", appended),
    "a byte too many inside": ("safetensors", inserted),
    "the header's metadata": ("safetensors", in_header(b'"pt"', b'"pu"')),
    "a name in the header": ("safetensors", in_header(b"self_attn", b"self_attm")),
    "a dtype in the header": ("safetensors", in_header(b"F16", b"I16")),
    "the header's length": ("safetensors", lambda folder: poke(shards(folder)[1], 0, b"\xff\xff")),
    "a header that is no JSON": ("safetensors", lambda folder: poke(shards(folder)[1], 8, b"<<")),
    "header and a value": ("safetensors", together(in_tensor(1, 4), in_header(b'"pt"', b'"pu"'))),
    "a shard missing": ("safetensors", missing_shards(1)),
    "all shards missing": ("safetensors", missing_shards(0, 1, 2, 3)),
    "a pointer of Git LFS": ("safetensors", replaced_shard(POINTER)),
    "a web page": ("safetensors", replaced_shard(b"<html>404</html>")),
    "a link to nothing": ("safetensors", dangling),
    "the index missing": ("safetensors", missing(INDEX)),
    "the index damaged": ("safetensors", written(INDEX, b'{"weight_map": {}}')),
    "config missing": ("safetensors", missing("config.json")),
    "config edited": ("safetensors", lambda folder: poke(folder / "config.json", 20)),
    "tokenizer empty": ("safetensors", written("tokenizer.model", b"")),
    "all small files missing": ("safetensors", missing("config.json", "generation_config.json", "tokenizer.model", INDEX)),
    "SHA256SUMS missing": ("safetensors", missing(SUMS)),
    "SHA256SUMS damaged": ("safetensors", written(SUMS, b"no list")),
    "SHA256SUMS of something else": ("safetensors", written(SUMS, b"0" * 64 + b"  config.json\n")),
    "nearly everything": ("safetensors", EVERY),
    "by SHA256SUMS, a bit": ("sums", in_tensor(1, 4)),
    "by SHA256SUMS, half": ("sums", cut(1, 0.5)),
    "by SHA256SUMS, files missing": ("sums", together(missing_shards(0), missing("config.json", INDEX))),
    "torch, a bit": ("torch", in_tensor(1, 4)),
    "torch, bits of two": ("torch", together(in_tensor(1, 1), in_tensor(1, 5))),
    "torch, half of it": ("torch", cut(1, 0.5)),
    "torch, its pickle": ("torch", in_pickle),
    "torch, its directory": ("torch", in_directory),
    "torch, missing": ("torch", missing_shards(0)),
}  # fmt: skip
BY_THE_HUB: dict[str, tuple[str, Change]] = {
    "a bit": ("plain", in_tensor(1, 4)),
    "half of it": ("plain", cut(1, 0.5)),
    "a shard missing": ("plain", missing_shards(2)),
    "small files": ("plain", together(missing("config.json"), written("tokenizer.model", b"x"))),
    "the manifest": ("safetensors", in_manifest),
    "all records": ("safetensors", together(missing(SUMS), written(MANIFEST, b"{}"))),
    "the manifest is gone": ("safetensors", missing(MANIFEST)),
    "torch, a bit": ("torch plain", in_tensor(1, 4)),
    "torch, bits of all": ("torch plain", together(in_tensor(0, 1), in_tensor(1, 5))),
    "torch, half of it": ("torch plain", cut(1, 0.5)),
}  # fmt: skip


# The places in a zip are found anew from its ends and the heads of its members, which in so small a file are nearly all of it.
ZIP_READ_ANEW = ("torch, half of it", "torch, its pickle", "torch, its directory")


def damaged_bytes(good: Path, bad: Path) -> int:
    """Bytes of the tensors and files that are not as they should be, and of the headers of their files."""
    total = 0
    for path in sorted(good.rglob("*")):
        there, right = bad / path.relative_to(good), path.read_bytes()
        found = there.read_bytes() if there.is_file() else b""
        if found == right or path.name == SUMS:
            continue
        if path.suffix not in (".safetensors", ".bin") or not found:
            total += len(right)
            continue
        places = {(tensor.offset, tensor.offset + tensor.nbytes) for tensor in layout(path).values()}
        total += len(right) - sum(stop - start for start, stop in places)
        total += sum(stop - start for start, stop in places if found[start:stop] != right[start:stop])
    return total


@pytest.fixture
def bad(tmp_path: Path) -> Callable[[Path, Change], Path]:
    def make(good: Path, change: Change) -> Path:
        folder = Path(shutil.copytree(good, tmp_path / "model"))
        change(folder)
        return folder

    return make


@pytest.mark.parametrize("kind", DAMAGE)
def test_mended_from_a_folder(originals: dict[str, Path], bad: Any, kind: str) -> None:
    good, change = originals[DAMAGE[kind][0]], DAMAGE[kind][1]
    folder = bad(good, change)
    before = tree(folder)
    planned = lw.repair(folder, good, dry_run=True)
    assert tree(folder) == before
    assert planned.files
    assert {file.state for file in planned.files} == {"to mend"}
    inodes = {path: path.stat().st_ino for path in folder.iterdir() if path.is_file()}
    found = lw.repair(folder, good)
    assert tree(folder) == tree(good)
    assert (found.exit_code, {file.state for file in found.files}) == (0, {"mended"})
    assert {file.name for file in found.files} == {file.name for file in planned.files}
    mended = {file.name for file in found.files}
    assert {path.name for path in inodes if path.stat().st_ino != inodes[path]} <= mended
    again = lw.repair(folder, good)
    assert (again.files, again.fetched, again.exit_code) == ((), 0, 0)
    if good.name != "sums":
        assert lw.verify(folder, deep=True).exit_code in (0, 4)  # a delta is one of LLaVA's, which verify fails as unapplied


@pytest.mark.parametrize("kind", DAMAGE)
def test_mended_from_the_hub_with_few_bytes(originals: dict[str, Path], bad: Any, hub: HubServer, kind: str) -> None:
    """No more is sent than damaged tensors, damaged small files and headers; by whole files where no digest of tensors is known."""
    good, change = originals[DAMAGE[kind][0]], DAMAGE[kind][1]
    folder = bad(good, change)
    needed = damaged_bytes(good, folder)
    hub.add("owner/model", good)
    planned = lw.repair(folder, "owner/model", dry_run=True)
    before = hub.sent
    found = lw.repair(folder, "owner/model")
    assert tree(folder) == tree(good)
    assert found.exit_code == 0
    if good.name != "sums" or "half" in kind:
        assert found.fetched <= needed
        needed += 2 * SAMPLE_BYTES if good.name == "sums" else 0  # to see that it begins and ends as there
        needed += len(shards(good)) * SAMPLES * SAMPLE_BYTES if kind == "a bit in every shard" else 0  # of which half is one tensor
        if kind not in ZIP_READ_ANEW:
            assert hub.sent - before <= needed
    if kind not in ("header and a value", "torch, half of it"):
        assert planned.fetched == found.fetched


@pytest.mark.parametrize("kind", BY_THE_HUB)
def test_what_only_the_hub_states(originals: dict[str, Path], bad: Any, hub: HubServer, kind: str) -> None:
    good, change = originals[BY_THE_HUB[kind][0]], BY_THE_HUB[kind][1]
    folder = bad(good, change)
    hub.add("owner/model", good)
    found = lw.repair(folder, "hf://owner/model")
    assert tree(folder) == tree(good)
    assert found.exit_code == 0
    assert lw.repair(folder, "hf://owner/model").files == ()


# --- what can't be mended --------------------------------------------------------------------------------------------


def directory(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def link_out(folder: Path) -> None:
    path = shards(folder)[1]
    path.rename(folder.parent / "elsewhere.safetensors")
    poke(folder.parent / "elsewhere.safetensors", -100)
    path.symlink_to(folder.parent / "elsewhere.safetensors")


def edited_on_purpose(folder: Path) -> None:
    """config.json and SHA256SUMS are of one hand, the manifest is older."""
    old = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    poke(folder / "config.json", 20)
    new = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    (folder / SUMS).write_text((folder / SUMS).read_text().replace(old, new))


REFUSED: dict[str, tuple[Change, Change, set[str]]] = {  # of the checkpoint, of the other copy; the files that are refused
    "the copy has the same damage": (in_tensor(1, 4), in_tensor(1, 4), {"model-00002-of-00004.safetensors"}),
    "the copy has other damage there": (in_tensor(1, 4), in_tensor(1, 4, b"\1\2\3"), {"model-00002-of-00004.safetensors"}),
    "the copy lacks the shard": (missing_shards(1), missing_shards(1), {"model-00002-of-00004.safetensors"}),
    "the copy is cut short": (missing_shards(1), cut(1, 0.5), {"model-00002-of-00004.safetensors"}),
    "the copy's config is another": (missing("config.json"), lambda folder: poke(folder / "config.json", 20), {"config.json"}),
    "the copy's shard is a link out": (missing_shards(1), link_out, {"model-00002-of-00004.safetensors"}),
    "a folder in the place of a file": (directory, lambda folder: None, {"config.json"}),
    "a link out of the folder": (link_out, lambda folder: None, {"model-00002-of-00004.safetensors"}),
    "the manifest": (together(in_manifest, in_tensor(2, 1)), lambda folder: None, {MANIFEST}),
    "edited on purpose": (edited_on_purpose, lambda folder: None, {"config.json"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_and_left_as_it_was(originals: dict[str, Path], bad: Any, tmp_path: Path, kind: str) -> None:
    change, other, names = REFUSED[kind]
    folder = bad(originals["safetensors"], change)
    copy = Path(shutil.copytree(originals["safetensors"], tmp_path / "copies" / "copy"))
    other(copy)
    before, there = tree(folder), tree(copy)
    found = lw.repair(folder, copy)
    assert found.exit_code == 3
    assert {file.name for file in found.files if file.state == "refused"} == names
    assert all(file.reason for file in found.files if file.state == "refused")
    assert lw.repair(folder, copy, dry_run=True).exit_code in (0, 3)
    after = tree(folder)
    assert {name: after.get(name) for name in names} == {name: before.get(name) for name in names}
    assert after.keys() <= before.keys() | tree(originals["safetensors"]).keys()
    assert tree(copy) == there
    mended = {file.name for file in found.files if file.state == "mended"}
    assert all(after[name] == originals["safetensors"].joinpath(name).read_bytes() for name in mended)


def test_one_file_that_is_refused_stops_no_other(originals: dict[str, Path], bad: Any, tmp_path: Path) -> None:
    good = originals["safetensors"]
    folder = bad(good, together(in_tensor(1, 4), in_tensor(2, 4), missing("config.json")))
    copy = Path(shutil.copytree(good, tmp_path / "copies"))
    in_tensor(1, 4, b"\7\7\7")(copy)
    found = lw.repair(folder, copy)
    assert {file.name: file.state for file in found.files} == {
        "config.json": "mended", "model-00002-of-00004.safetensors": "refused", "model-00003-of-00004.safetensors": "mended",
    }  # fmt: skip


def test_another_revision_is_refused(originals: dict[str, Path], bad: Any, hub: HubServer, tmp_path: Path) -> None:
    """By its own records where it has any, after one tensor at most; else by samples."""
    good = originals["safetensors"]
    other = Path(shutil.copytree(originals["plain"], tmp_path / "other"))
    for path in shards(other):
        start = min(tensor.offset for tensor in layout(path).values())
        poke(path, start, bytes(value ^ 5 for value in path.read_bytes()[start:]))
    hub.add("owner/model", other)
    folder = bad(good, in_tensor(1, 4))
    before = tree(folder)
    found = lw.repair(folder, "owner/model")
    assert found.exit_code == 3
    assert found.fetched <= max(tensor.nbytes for tensor in layout(shards(good)[1]).values())
    assert "another revision" in found.files[0].reason
    for name in (MANIFEST, SUMS):
        (folder / name).unlink()
    with pytest.raises(MismatchError, match="other weights than those of owner/model") as raised:
        lw.repair(folder, "owner/model")
    assert "revision" in str(raised.value.hint)
    assert tree(folder) == {name: data for name, data in before.items() if name not in (MANIFEST, SUMS)}


@pytest.mark.parametrize("kind", ["safetensors", "sums"])
def test_a_later_save_is_not_overwritten(originals: dict[str, Path], bad: Any, kind: str) -> None:
    """Somebody trained on and saved into the same folder: the records are of the weights before."""

    def trained(folder: Path) -> None:
        for path in shards(folder):
            start = min(tensor.offset for tensor in layout(path).values())
            poke(path, start, bytes(value ^ 5 for value in path.read_bytes()[start:]))

    folder = bad(originals[kind], trained)
    before = tree(folder)
    for dry_run in (True, False):
        with pytest.raises(MismatchError, match="other weights"):
            lw.repair(folder, originals[kind], dry_run=dry_run)
    assert tree(folder) == before
    for path in shards(folder):
        path.unlink()
    assert lw.repair(folder, originals[kind]).exit_code == 0


def test_one_shard_of_a_later_save(originals: dict[str, Path], bad: Any) -> None:
    """The other shards are right: nothing is touched, not even config.json, until somebody says which weights are meant."""

    def saved(folder: Path) -> None:
        path = shards(folder)[1]
        start = min(tensor.offset for tensor in layout(path).values())
        poke(path, start, bytes(value ^ 5 for value in path.read_bytes()[start:]))
        poke(folder / "config.json", 20)

    folder = bad(originals["safetensors"], saved)
    before = tree(folder)
    with pytest.raises(MismatchError, match=r"00002-of-00004\.safetensors` is not damaged"):
        lw.repair(folder, originals["safetensors"])
    assert tree(folder) == before


@pytest.mark.parametrize("kind", ["safetensors", "sums"])
def test_a_preallocated_download_is_no_later_save(originals: dict[str, Path], bad: Any, kind: str) -> None:
    """Zeros behind what came."""

    def came(folder: Path) -> None:
        for path in shards(folder):
            size = path.stat().st_size
            poke(path, size // 5, bytes(size - size // 5))

    folder = bad(originals[kind], came)
    assert lw.repair(folder, originals[kind]).exit_code == 0
    assert tree(folder) == tree(originals[kind])


def test_an_empty_folder_is_nothing_to_repair(originals: dict[str, Path], hub: HubServer, tmp_path: Path) -> None:
    hub.add("owner/model", originals["plain"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(MismatchError):
        lw.repair(tmp_path / "empty", "owner/model")
    assert list((tmp_path / "empty").iterdir()) == []


def test_the_format_that_is_not_there_is_not_fetched(originals: dict[str, Path], hub: HubServer, bad: Any, tmp_path: Path) -> None:
    both = Path(shutil.copytree(originals["plain"], tmp_path / "both"))
    for path in originals["torch plain"].iterdir():
        if path.suffix in (".bin", ".index"):
            shutil.copy(path, both)
    hub.add("owner/model", both)
    folder = bad(originals["plain"], in_tensor(1, 4))
    found = lw.repair(folder, "owner/model")
    assert [file.name for file in found.files] == ["model-00002-of-00004.safetensors"]
    assert tree(folder) == tree(originals["plain"])


# --- other places and forms of the copy ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["a bit of a value", "a shard missing", "the header's length", "header and a value", "half of it", "two shards exchanged"]
)
def test_a_copy_in_other_shards(originals: dict[str, Path], bad: Any, hub: HubServer, kind: str) -> None:
    good = originals["safetensors"]
    hub.add("owner/model", originals["more shards"])
    for source in (originals["more shards"], "owner/model"):
        folder = bad(good, DAMAGE[kind][1])
        assert lw.repair(folder, source).exit_code == 0
        assert tree(folder) == tree(good)
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["the header's length", "the header's metadata", "cut in the header"])
def test_a_header_that_no_copy_has_is_made_anew(originals: dict[str, Path], bad: Any, tmp_path: Path, kind: str) -> None:
    good = originals["safetensors"]
    folder = bad(good, DAMAGE[kind][1])
    found = lw.repair(folder, originals["more shards"])
    assert tree(folder) == tree(good)
    assert found.fetched == (0 if "cut" not in kind else sum(tensor.nbytes for tensor in layout(shards(good)[1]).values()))


def test_tensors_of_another_container(originals: dict[str, Path], bad: Any, tmp_path: Path) -> None:
    good = originals["safetensors"]
    import torch
    from safetensors.torch import load_file

    copy = tmp_path / "copy"
    copy.mkdir()
    torch.save({name: value for path in shards(good) for name, value in load_file(path).items()}, copy / "pytorch_model.bin")
    folder = bad(good, together(in_tensor(1, 4), missing_shards(2), missing("config.json")))
    found = lw.repair(folder, copy)
    assert {file.name: file.state for file in found.files} == {
        "config.json": "refused", "model-00002-of-00004.safetensors": "mended", "model-00003-of-00004.safetensors": "mended",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["a bit of a value", "a shard missing", "the index missing", "cut in the header"])
def test_from_a_web_server(originals: dict[str, Path], bad: Any, hub: HubServer, kind: str) -> None:
    good = originals["safetensors"]
    hub.static["files"] = good
    folder = bad(good, DAMAGE[kind][1])
    assert lw.repair(folder, f"{hub.url}/files").exit_code == 0
    assert tree(folder) == tree(good)


def test_layouts_of_other_programs(fixtures: Path, tmp_path: Path) -> None:
    """Meta's pieces in a folder below, by the CRC-32s of their records; llama.cpp's two files, by tensor."""
    shutil.copytree(fixtures / "A-delta-v0/base-meta", tmp_path / "meta")
    lw.checksum(tmp_path / "meta")
    tower = fixtures / "common/clip-tiny-42px"
    lw.execute(lw.make_plan(lw.convert(fixtures / "C-v1.5/original-no-vision-bin", "gguf", tower=tower), name="m"), tmp_path / "gguf")
    for name, file in (("meta", "13B/consolidated.00.pth"), ("gguf", "m-F16.gguf")):
        good = Path(shutil.copytree(tmp_path / name, tmp_path / "good" / name))
        path = tmp_path / name / file
        poke(path, path.stat().st_size // 2)
        found = lw.repair(tmp_path / name, good)
        assert tree(tmp_path / name) == tree(good)
        assert found.fetched < path.stat().st_size / 5
        shutil.rmtree(path.parent) if name == "meta" else path.unlink()
        (tmp_path / name).mkdir(exist_ok=True)
        assert lw.repair(tmp_path / name, good).exit_code == 0
        assert tree(tmp_path / name) == tree(good)


def test_a_single_file(originals: dict[str, Path], hub: HubServer, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(shards(originals["safetensors"])[1], path)
    lw.checksum(path)
    before = tree(tmp_path)
    copy = tmp_path / "copy" / "as it was.safetensors"
    copy.parent.mkdir()
    shutil.copy(path, copy)
    poke(path, -100)
    (tmp_path / "model.safetensors.sha256").unlink()
    found = lw.repair(path, copy)
    assert found.exit_code == 0
    assert found.fetched < path.stat().st_size / 2
    shutil.rmtree(copy.parent)
    assert tree(tmp_path) == before


def test_a_cache_of_the_hub(originals: dict[str, Path], hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links lead to blobs, which are replaced; the links stay."""
    commit = hub.add("owner/model", originals["plain"])
    cache = tmp_path / "models--owner--model"
    snapshot = cache / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in originals["plain"].iterdir():
        blob = cache / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    blob = (snapshot / shards(snapshot)[1].name).resolve()
    poke(blob, -100)
    assert lw.repair(snapshot, f"owner/model@{commit}").exit_code == 0
    assert tree(snapshot) == tree(originals["plain"])
    assert all(path.is_symlink() for path in snapshot.iterdir())
    assert sorted(path.name for path in (cache / "blobs").iterdir()) == sorted({path.resolve().name for path in snapshot.iterdir()})


def test_a_hard_link_keeps_its_bytes(originals: dict[str, Path], bad: Any, tmp_path: Path) -> None:
    folder = bad(originals["safetensors"], in_tensor(1, 4))
    linked = tmp_path / "linked"
    os.link(shards(folder)[1], linked)
    damaged, mode = linked.read_bytes(), 0o640
    linked.chmod(mode)
    found = lw.repair(folder, originals["safetensors"])
    assert tree(folder) == tree(originals["safetensors"])
    assert linked.read_bytes() == damaged
    assert shards(folder)[1].stat().st_mode & 0o777 == mode
    assert "hard link" in found.notes[0]


def test_a_link_inside_the_folder_stays(originals: dict[str, Path], bad: Any) -> None:
    folder = bad(originals["safetensors"], in_tensor(1, 4))
    path = shards(folder)[1]
    path.rename(folder / ".data")
    path.symlink_to(".data")
    assert lw.repair(folder, originals["safetensors"]).exit_code == 0
    assert path.is_symlink()
    assert path.read_bytes() == (originals["safetensors"] / path.name).read_bytes()


# --- hostile ones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [pytest.param(case, id=case.title) for case in CASES[::15]])
def test_a_hostile_copy(originals: dict[str, Path], bad: Any, tmp_path: Path, case: Case) -> None:
    """Nothing of it is taken, and neither side changes."""
    folder = bad(originals["safetensors"], in_tensor(1, 4))
    (tmp_path / "hostile").mkdir()
    case.build(tmp_path / "hostile")
    copy, before = tmp_path / "hostile/it", tree(folder)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "hostile").rglob("*"))
    with suppress(InputError):
        assert lw.repair(folder, copy).exit_code == 3
    assert tree(folder) == before
    assert sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "hostile").rglob("*")) == names


@pytest.mark.parametrize("case", [pytest.param(case, id=case.title) for case in CASES[3::15]])
def test_a_hostile_checkpoint_is_bytes(bad: Any, tmp_path: Path, case: Case) -> None:
    """What its files hold decides nothing: they get the bytes that are recorded, or are refused, and nothing else changes."""
    (tmp_path / "hostile").mkdir()
    case.build(tmp_path / "hostile")
    place = tmp_path / "hostile/it"
    if not place.is_dir():
        return
    files = [path for path in place.iterdir() if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 20]
    (place / SUMS).write_text("".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files))
    copy = Path(
        shutil.copytree(place, tmp_path / "copy", symlinks=True, ignore=lambda _, names: [n for n in names if (place / n).is_fifo()])
    )
    right = {path.name: path.read_bytes() for path in files}
    for path in files:
        path.write_bytes(path.read_bytes()[:-1] or b"x")
    try:
        found = lw.repair(place, copy)
    except (InputError, OutputError):
        return
    assert found.exit_code in (0, 3)
    mended = {file.name for file in found.files if file.state == "mended"}
    for name, data in right.items():
        assert (place / name).read_bytes() == (data if name in mended else data[:-1] or b"x")


# --- what is refused at once ----------------------------------------------------------------------------------------


def test_errors(originals: dict[str, Path], bad: Any, tmp_path: Path, hub: HubServer) -> None:
    good = originals["safetensors"]
    folder = bad(good, together(in_tensor(1, 4), in_manifest, written(SUMS, b"x")))
    before = tree(folder)
    with pytest.raises(InputError, match="nothing states") as raised:
        lw.repair(folder, good)
    assert "is not a manifest" in raised.value.facts["found"]
    assert "Hub" in str(raised.value.hint)
    with pytest.raises(InputError, match="nothing states"):
        lw.repair(bad(originals["plain"], lambda _: None) if not folder.exists() else originals["plain"], good)
    with pytest.raises(UsageError, match="names the checkpoint"):
        lw.repair(good, good)
    with pytest.raises(InputError, match="not on this machine"):
        lw.repair("owner/model", good)
    with pytest.raises(InputError, match="no folder and no weight file"):
        lw.repair(good / "config.json", good)
    with pytest.raises(InputError, match="does not exist"):
        lw.repair(tmp_path / "missing", good)
    with pytest.raises(InputError, match="does not exist"):
        lw.repair(folder, tmp_path / "missing")
    with pytest.raises(HubError):
        lw.repair(good, "owner/unknown")
    with pytest.raises(UsageError, match="no user, password"):
        lw.repair(good, "https://user:secret@127.0.0.1/x")
    with pytest.raises(UsageError, match="`jobs`"):
        lw.repair(good, folder, jobs=0)
    assert tree(folder) == before


def test_a_folder_that_can_not_be_written(originals: dict[str, Path], bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bad(originals["safetensors"], in_tensor(1, 4))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK | os.X_OK and access(path, mode))
    before = tree(folder)
    with pytest.raises(OutputError, match="permission denied"):
        lw.repair(folder, originals["safetensors"])
    assert lw.repair(folder, originals["safetensors"], dry_run=True).exit_code == 0
    assert tree(folder) == before


def test_a_full_disk(originals: dict[str, Path], bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from llava_weights.checks import repair as module

    def full(fd: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = bad(originals["safetensors"], in_tensor(1, 4))
    before = tree(folder)
    monkeypatch.setattr(module, "allocate", full)
    with pytest.raises(OutputError, match="No space left") as raised:
        lw.repair(folder, originals["safetensors"])
    assert "space" in str(raised.value.hint)
    assert tree(folder) == before


def test_one_at_a_time(originals: dict[str, Path], bad: Any) -> None:
    folder = bad(originals["safetensors"], in_tensor(1, 4))
    seen: list[str] = []

    def second(event: object) -> None:
        if isinstance(event, Started) and event.what == "Fetching":
            with pytest.raises(OutputError, match="another run") as raised:
                lw.repair(folder, originals["safetensors"])
            seen.append(raised.value.what)

    assert lw.repair(folder, originals["safetensors"], on_event=second).exit_code == 0
    assert len(seen) == 1


# --- cut off and continued ------------------------------------------------------------------------------------------


def test_interrupted_and_continued(originals: dict[str, Path], bad: Any, hub: HubServer) -> None:
    """What was fetched is not fetched again."""
    good = originals["safetensors"]
    folder = bad(good, together(*(in_tensor(2, number) for number in range(6))))
    whole = lw.repair(folder, good, dry_run=True).fetched
    hub.add("owner/model", good)

    def stop(event: object) -> None:
        if isinstance(event, Progress) and event.nbytes == whole:  # in the last tensor
            raise KeyboardInterrupt

    before = tree(folder)
    with pytest.raises(Interrupted) as raised:
        lw.repair(folder, "owner/model", jobs=1, on_event=stop)
    assert "continues" in str(raised.value.kept)
    between = tree(folder)
    assert {name: data for name, data in between.items() if name in before} == before
    kept = [name for name in between if name.endswith(".repair.done")]
    assert len(kept) == 1
    assert len((folder / kept[0]).read_bytes().splitlines()) == 5
    found = lw.repair(folder, "owner/model")
    assert found.fetched < whole
    assert tree(folder) == tree(good)


@pytest.mark.parametrize("what", ["part", "list", "other copy"])
def test_kept_ranges_are_not_believed(originals: dict[str, Path], bad: Any, tmp_path: Path, what: str) -> None:
    """What an earlier run left may be damaged, torn, or of another copy."""
    good = originals["sums"]
    folder = bad(good, in_tensor(1, 4))
    path = shards(folder)[1]
    wrong = Path(shutil.copytree(good, tmp_path / "wrong"))
    poke(wrong / path.name, 5000)

    def stop(event: object) -> None:
        if isinstance(event, Progress) and event.nbytes and event.shard == path.name and event.nbytes == path.stat().st_size:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        lw.repair(folder, wrong if what == "other copy" else good, on_event=stop)
    part = folder / f".{path.name}.repair"
    if part.exists() and what == "part":
        poke(part, 7000)
    listed = part.with_name(part.name + ".done")
    if listed.exists() and what == "list":
        listed.write_bytes(listed.read_bytes()[:-9] + b"\0\n\xff")
    assert lw.repair(folder, good).exit_code == 0
    assert tree(folder) == tree(good)


@pytest.mark.parametrize("kind", ["safetensors", "sums", "torch"])
def test_killed_twenty_times_and_continued(originals: dict[str, Path], bad: Any, tmp_path: Path, kind: str) -> None:
    """By SIGKILL at events all over the run, one run after the other: each file is always as it was or right, and at the end right."""
    good = originals[kind]
    change = DAMAGE["nearly everything" if kind != "torch" else "torch, bits of two"][1]
    if kind == "sums":
        change = together(in_tensor(0, 2), cut(1, 0.3), missing_shards(2), missing("config.json"), written(INDEX, b"{"))
    folder = bad(good, change)
    told: list[object] = []
    lw.repair(Path(shutil.copytree(folder, tmp_path / "undisturbed")), good, on_event=told.append)
    before, right, children = tree(folder), tree(good), fork_server()
    killed = finished = 0
    while killed < 20:
        process = children.Process(target=run_repair, args=(folder, good, 2 + 7 * killed % (len(told) - 1)))
        process.start()
        process.join()
        now = {name: data for name, data in tree(folder).items() if ".repair" not in name}
        assert all(data in (right[name], before.get(name)) for name, data in now.items())
        assert before.keys() <= now.keys()
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # so much was done before that fewer events were left: once more from the beginning
            assert tree(folder) == right
            finished += 1
            shutil.rmtree(folder)
            bad(good, change)
    assert finished < 20
    assert lw.repair(folder, good).exit_code == 0
    assert tree(folder) == right


def test_what_is_left_of_a_file_that_is_right_is_deleted(originals: dict[str, Path], bad: Any) -> None:
    folder = bad(originals["safetensors"], lambda folder: None)
    for name in (f".{shards(folder)[1].name}.repair", f".{shards(folder)[1].name}.repair.done"):
        (folder / name).write_bytes(b"left")
    (folder / ".mine.repair").write_bytes(b"somebody's")
    lw.repair(folder, originals["safetensors"])
    assert {name: data for name, data in tree(folder).items() if name != ".mine.repair"} == tree(originals["safetensors"])
    assert (folder / ".mine.repair").exists()


def test_on_the_command_line(originals: dict[str, Path], bad: Any, cli: Any) -> None:
    good = originals["safetensors"]
    folder = bad(good, together(in_tensor(1, 4), missing("config.json")))
    code, out, _ = cli("repair", folder, "--from", good, "--dry-run")
    size = (good / "config.json").stat().st_size + layout(shards(good)[1])[list(layout(shards(good)[1]))[4]].nbytes
    assert code == 0
    assert "2 files to mend" in out
    code, out, _ = cli("repair", folder, "--from", good, "--json")
    document = json.loads(out.splitlines()[-1])
    assert (code, document["exit_code"], document["fetched"]) == (0, 0, size)
    assert {file["name"] for file in document["files"]} == {"config.json", shards(good)[1].name}
    code, out, err = cli("repair", folder, "--from", folder)
    assert (code, "hint:" in err) == (2, True)
    assert read_manifest(folder / MANIFEST)
