"""Every kind of damage is found and named; digests are those of sha256sum, md5sum, torch and the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from hub_server import HubServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import llava_weights as lw
from llava_weights.checkpoint.manifest import MANIFEST, SUMS, read_manifest, root_of_tensors
from llava_weights.checkpoint.rehash import NOT_FINITE, Rehash, inf_and_nan, rehash
from llava_weights.checks.verify import Verification, checksum, verify
from llava_weights.errors import HubError, InputError, OutputError
from llava_weights.events import Progress, Started
from llava_weights.families.published import PUBLISHED
from llava_weights.formats.safetensors import index_safetensors

ROOT = Path(__file__).resolve().parents[2]
HASHES = {"sha256": hashlib.sha256, "blake3": blake3}
NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


@pytest.fixture(scope="module")
def made(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output of several shards, made by the real pipeline. Not to be changed."""
    folder = fixtures / "A-delta-v0"
    merged = lw.apply_delta(lw.open_checkpoint(folder / "base-hf-bin"), lw.open_checkpoint(folder / "delta-307-apr17"))
    out = tmp_path_factory.mktemp("made") / "model"
    lw.execute(lw.make_plan(merged, max_shard_size=60_000), out)
    return out


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture
def containers(fixtures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixtures / "A-delta-v0" / "torch-2.0-containers", tmp_path / "containers"))


def failures(found: Verification, *, level: str = "") -> list[str]:
    return [each.text for each in found.findings if each.verdict == "failed" and level in ("", each.level)]


def verdicts(found: Verification, level: str) -> set[str]:
    return {each.verdict for each in found.findings if each.level == level}


def text(found: Verification) -> str:
    return "\n".join(f"{each.level} {each.verdict} {each.text}" for each in found.findings)


def flip(path: Path, position: int, mask: int = 1) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ mask]))


def largest(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def record_again(folder: Path, shard: Path) -> None:
    """Make manifest and SHA256SUMS agree with the bytes of `shard`, as somebody would who knows the schema."""
    manifest = json.loads((folder / MANIFEST).read_text())
    data, kind = shard.read_bytes(), manifest["digests"]["tensors"]
    for entry in manifest["files"]:
        if entry["path"] == shard.name:
            entry["sha256"] = hashlib.sha256(data).hexdigest()
    for entry in manifest["tensors"]:
        if entry["shard"] == shard.name:
            place = index_safetensors(shard)[0][entry["name"]]
            entry[kind] = HASHES[kind](data[place.offset : place.offset + place.nbytes]).hexdigest()
    rows = (f"{t['name']}\t{t['dtype']}\t{','.join(map(str, t['shape']))}\t{t[kind]}\n" for t in manifest["tensors"])
    sums = "".join(f"{entry['sha256']}  {entry['path']}\n" for entry in manifest["files"])
    root = f"{kind}:{HASHES[kind](''.join(rows).encode()).hexdigest()}"
    manifest["root"] |= {"tensors": root, "files": f"sha256:{hashlib.sha256(sums.encode()).hexdigest()}"}
    (folder / SUMS).write_text(sums)
    (folder / MANIFEST).write_text(json.dumps(manifest))


# --- a sound checkpoint ---------------------------------------------------------------------------------------------


def test_finished_output_passes_every_level(made: Path) -> None:
    events: list[Any] = []
    found = verify(made, deep=True, on_event=events.append)
    assert (found.exit_code, verdicts(found, "L0"), verdicts(found, "L2"), verdicts(found, "L3")) == (0, {"ok"}, {"ok"}, {"ok"})
    manifest = json.loads((made / MANIFEST).read_text())
    assert (found.facts["root"], found.facts["content"]) == (manifest["root"]["tensors"], manifest["root"]["content"])
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Progress)
    assert events[-1].nbytes == events[0].nbytes == found.facts["read"] == sum(entry["size"] for entry in manifest["files"])


def test_without_deep_no_weights_are_read_and_that_is_said(made: Path) -> None:
    found = verify(made)
    assert (found.exit_code, verdicts(found, "L3")) == (0, {"unchecked"})
    assert found.facts["read"] == sum(path.stat().st_size for path in made.iterdir() if path.suffix != ".safetensors") - sum(
        (made / name).stat().st_size for name in (MANIFEST, SUMS)
    )


def test_without_records_the_structure_is_checked_and_the_rest_said_to_be_unchecked(containers: Path) -> None:
    found = verify(containers / "merged-308")
    assert (found.exit_code, verdicts(found, "L0"), verdicts(found, "L2")) == (3, {"ok", "warning"}, {"unproved"})
    assert "llava-weights checksum" in "".join(each.remedy for each in found.findings)
    config = json.loads((containers / "merged-308" / "config.json").read_text())
    (containers / "merged-308" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "model.layers.2." in "".join(failures(verify(containers / "merged-308"), level="L0"))


def test_start_up_and_reading_need_no_torch(made: Path) -> None:
    code = f"import sys; from llava_weights.checks.verify import verify; verify({str(made)!r}, deep=True); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("name", ["no-such-folder", "empty", "file.txt"])
def test_nothing_to_verify_is_an_input_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(InputError):
        verify(tmp_path / name)


# --- damage ---------------------------------------------------------------------------------------------------------


def test_one_bit_in_each_tensor_and_anywhere_in_the_header(model: Path) -> None:
    draw = random.Random(7)
    for shard in sorted(model.glob("*.safetensors")):
        tensors, _ = index_safetensors(shard)
        header = min(tensor.offset for tensor in tensors.values())
        places = [(name, draw.randrange(t.offset, t.offset + t.nbytes)) for name, t in tensors.items()]
        for name, position in [*places, *((None, draw.randrange(header)) for _ in range(4))]:
            mask = 1 << draw.randrange(8)
            flip(shard, position, mask)
            found = verify(model, deep=True)
            flip(shard, position, mask)
            assert found.exit_code == 4
            assert any(shard.name in each for each in failures(found, level="L2")), (position, text(found))
            if name:
                texts = failures(found, level="L3")
                assert texts
                assert all(f"`{name}` in `{shard.name}`" in each for each in texts)
    assert verify(model, deep=True).exit_code == 0


def test_exchanged_tensors_are_both_named(model: Path) -> None:
    one, other = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    places = {name: t for shard in model.glob("*.safetensors") for name, t in index_safetensors(shard)[0].items() if name in (one, other)}
    values = {}
    for name, place in places.items():
        with open(place.file.path, "rb") as file:
            values[name] = file.seek(place.offset) and file.read(place.nbytes)
    for name, source in ((one, other), (other, one)):
        with open(places[name].file.path, "r+b") as file:
            file.seek(places[name].offset)
            file.write(values[source])
    [text] = failures(verify(model, deep=True), level="L3")
    assert f"`{one}`" in text
    assert f"`{other}`" in text
    assert "exchanged" in text


def test_truncated_shard(model: Path) -> None:
    shard = largest(model)
    os.truncate(shard, shard.stat().st_size - 5)
    found = verify(model)
    assert any(shard.name in each and "truncated" in each for each in failures(found, level="L0"))
    assert found.exit_code == 4


def test_renamed_tensor(model: Path) -> None:
    shard = next(path for path in model.glob("*.safetensors") if "model.norm.weight" in index_safetensors(path)[0])
    for path in (shard, model / "model.safetensors.index.json"):
        path.write_bytes(path.read_bytes().replace(b"model.norm.weight", b"model.norn.weight"))
    texts = "\n".join(failures(verify(model), level="L0"))
    assert "`model.norm.weight` is in the manifest" in texts
    assert "`model.norn.weight` is in a weight file" in texts


def test_reinterpreted_dtype(model: Path) -> None:
    shard = largest(model)
    shard.write_bytes(shard.read_bytes().replace(b'"dtype":"F16"', b'"dtype":"I16"', 1))
    assert any("is I16" in each and "says F16" in each for each in failures(verify(model), level="L0"))


def test_changed_config_value_is_found_without_deep(model: Path) -> None:
    config = (model / "config.json").read_text()
    assert '"rms_norm_eps": 1e-06' in config
    (model / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    found = verify(model)
    assert found.exit_code == 4
    [text] = failures(found, level="L2")
    assert "`config.json` changed" in text


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model-00002-of-00004.safetensors"])
def test_deleted_file(model: Path, name: str) -> None:
    (model / name).unlink()
    found = verify(model)
    assert any(name in each and "missing" in each for each in failures(found, level="L0"))
    assert found.exit_code == 4


def test_extra_file_is_a_warning(model: Path) -> None:
    (model / "modeling_llava.py").write_text("import os")
    found = verify(model, deep=True)
    assert {each.subject for each in found.findings if each.verdict == "warning"} == {"modeling_llava.py"}
    assert found.exit_code == 0


@pytest.mark.parametrize(("bits", "value"), [(0x7E01, "NaN"), (0xFC00, "-inf")])
def test_non_finite_value_with_recomputed_digests(model: Path, bits: int, value: str) -> None:
    shard = largest(model)
    name, place = next(iter(index_safetensors(shard)[0].items()))
    with open(shard, "r+b") as file:
        file.seek(place.offset + 2 * 5)
        file.write(bits.to_bytes(2, "little") * 3)
    record_again(model, shard)
    found = verify(model, deep=True)
    assert failures(found, level="L3") == [f"`{name}` in `{shard.name}` holds 3 values inf or NaN"], value


def test_index_lists_a_tensor_that_no_shard_has(model: Path) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.ghost.weight"] = "model-00001-of-00004.safetensors"
    path.write_text(json.dumps(index))
    assert any("model.layers.9.ghost.weight" in each for each in failures(verify(model), level="L0"))


def test_link_out_of_the_folder(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_text((model / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(tmp_path / "elsewhere.json")
    assert any("config.json" in each and "leads out" in each for each in failures(verify(model), level="L0"))


@pytest.mark.parametrize("change", ["twice", "escape", "root", "schema", "shape"])
def test_manifest_that_can_not_be_trusted(model: Path, change: str) -> None:
    manifest = json.loads((model / MANIFEST).read_text())
    if change == "twice":
        manifest["tensors"].append(manifest["tensors"][0])
    elif change == "escape":
        manifest["files"][0]["path"] = "../../etc/passwd"
    elif change == "root":
        manifest["root"]["tensors"] = "0" * 64
    elif change == "schema":
        manifest["schema"] = 99
    else:
        manifest["tensors"][0]["shape"] = [1, 2]
    (model / MANIFEST).write_text(json.dumps(manifest))
    found = verify(model)
    assert any(MANIFEST in each for each in failures(found, level="L0")), text(found)
    with pytest.raises(InputError, match="manifest"):
        verify(model, against=model / MANIFEST)


@pytest.mark.parametrize(
    ("digests", "told"),
    [({"files": "sha256", "tensors": "md4"}, "tensors by `md4`"), ({"files": "crc32", "tensors": "blake3"}, "files by `crc32`"), ([], "")],
)
def test_manifest_with_digests_that_are_not_known(model: Path, digests: Any, told: str) -> None:
    manifest = json.loads((model / MANIFEST).read_text()) | {"digests": digests}
    (model / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError) as caught:
        verify(model, against=model / MANIFEST)
    assert told in caught.value.what
    assert any(MANIFEST in each for each in failures(verify(model), level="L0"))


@pytest.mark.parametrize("schema", [1, 2])
def test_manifest_with_the_rows_of_another_schema(model: Path, schema: int) -> None:
    manifest = json.loads((model / MANIFEST).read_text())
    if schema == 1:
        manifest["schema"] = 1
    else:
        manifest["tensors"] = [{("sha256" if key == "blake3" else key): row[key] for key in row} for row in manifest["tensors"]]
    (model / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not sound"):
        verify(model, against=model / MANIFEST)


# --- schema 1 -------------------------------------------------------------------------------------------------------


@pytest.fixture
def old(model: Path, tmp_path: Path) -> Path:
    """`model` with its manifest as version 0.1 wrote it: sha256 for everything, roots that do not name it."""
    folder = Path(shutil.copytree(model, tmp_path / "old"))
    manifest = json.loads((folder / MANIFEST).read_text()) | {"schema": 1}
    del manifest["digests"]
    raw = {name: value.numpy().tobytes() for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    for entry in manifest["tensors"]:
        del entry["blake3"]
        entry["sha256"] = hashlib.sha256(raw[entry["name"]]).hexdigest()
    rows = [f"{t['name']}\t{t['dtype']}\t{','.join(map(str, t['shape']))}\t{t['sha256']}\n" for t in manifest["tensors"]]
    content = sorted(row.partition("\t")[2] for row in rows)
    manifest["root"] = {
        "tensors": hashlib.sha256("".join(rows).encode()).hexdigest(),
        "content": hashlib.sha256("".join(content).encode()).hexdigest(),
        "files": hashlib.sha256((folder / SUMS).read_bytes()).hexdigest(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_what_an_earlier_version_wrote_is_verified(fixtures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fixtures / "H-manifest" / "schema-1", tmp_path / "model"))
    found = verify(folder, deep=True)
    root = json.loads((folder / MANIFEST).read_text())["root"]
    assert (found.exit_code, verdicts(found, "L2"), verdicts(found, "L3")) == (0, {"ok"}, {"ok"})
    assert (found.facts["root"], found.facts["content"]) == (f"sha256:{root['tensors']}", f"sha256:{root['content']}")
    assert checksum(folder) == []
    place = index_safetensors(folder / "model.safetensors")[0]["model.norm.weight"]
    flip(folder / "model.safetensors", place.offset)
    assert any("`model.norm.weight`" in each for each in failures(verify(folder, deep=True), level="L3"))


def test_an_old_manifest_is_compared_by_its_own_digests(old: Path) -> None:
    root = json.loads((old / MANIFEST).read_text())["root"]
    found = verify(old, deep=True)
    assert (found.exit_code, verdicts(found, "L3")) == (0, {"ok"})
    assert (found.facts["root"], found.facts["content"]) == (f"sha256:{root['tensors']}", f"sha256:{root['content']}")
    shard = largest(old)
    name, place = next(iter(index_safetensors(shard)[0].items()))
    flip(shard, place.offset)
    assert any(f"`{name}`" in each for each in failures(verify(old, deep=True), level="L3"))


@pytest.mark.parametrize("what", ["manifest", "folder"])
def test_across_schemas_values_are_compared_and_never_records(old: Path, model: Path, what: str) -> None:
    """In both directions. One flipped bit is named, equal values are equal, though no two recorded digests are."""
    for subject, other in ((old, model), (model, old)):
        against = other / MANIFEST if what == "manifest" else other
        found = verify(subject, against=against)
        assert (found.exit_code, verdicts(found, "against") - {"note", "unchecked"}) == (0, {"ok"}), text(found)
    shard = largest(model)
    name, place = next(iter(index_safetensors(shard)[0].items()))
    flip(shard, place.offset)
    record_again(model, shard)
    for subject, other in ((old, model), (model, old)):
        against = other / MANIFEST if what == "manifest" else other
        found = verify(subject, against=against)
        assert found.exit_code == 4
        (wrong,) = (each for each in failures(found, level="against") if "safetensors" in each and "does not have the values" in each)
        assert f"`{name}`" in wrong


def test_digests_of_two_algorithms_are_never_compared(old: Path, model: Path) -> None:
    one, other = (read_manifest(folder / MANIFEST) for folder in (old, model))
    name = next(iter(one.tensors))
    assert one.tensors[name].same_values(one.tensors[name])
    with pytest.raises(ValueError, match="sha256 can't be compared with a blake3"):
        one.tensors[name].same_values(other.tensors[name])
    with pytest.raises(ValueError, match="no part of a root by blake3"):
        root_of_tensors(one.tensors.values())
    assert (one.root.partition(":")[0], other.root.partition(":")[0]) == ("sha256", "blake3")


@pytest.mark.parametrize("stale", [False, True])
def test_an_old_manifest_beside_the_reference(old: Path, model: Path, stale: bool) -> None:
    if stale:
        for folder in (old, model):  # the same change in both: the values agree, the old record does not
            flip(largest(folder), largest(folder).stat().st_size - 1)
    found = verify(model, against=old)
    assert [each.rule for each in found.findings if each.level == "against" and each.verdict == "warning"] == ["stale-manifest"] * stale
    assert not failures(found, level="against")


def test_checksum_beside_an_old_manifest(old: Path) -> None:
    before = (old / MANIFEST).read_bytes()
    assert checksum(old) == []
    shard = largest(old)
    flip(shard, shard.stat().st_size - 1)
    with pytest.raises(OutputError, match="records something else"):
        checksum(old)
    assert (old / MANIFEST).read_bytes() == before
    checksum(old, force=True)
    assert json.loads((old / MANIFEST).read_text())["schema"] == 2
    assert verify(old, deep=True).exit_code == 0


def test_sources_of_what_an_earlier_version_made(old: Path, fixtures: Path) -> None:
    sources = fixtures / "A-delta-v0"
    given: Any = {"base": sources / "base-hf-bin", "delta": sources / "delta-307-apr17"}
    assert "ok" in verdicts(verify(old, **given), "L4")
    shard = largest(old)
    flip(shard, shard.stat().st_size - 1)
    assert failures(verify(old, **given), level="L4")


def test_the_root_of_the_documents_is_what_a_shell_gives(tmp_path: Path) -> None:
    """The lines of docs/formats.md, run by bash, and the same two tensors by `checksum`."""
    section = (ROOT / "docs" / "formats.md").read_text().partition("### The root by hand")[2]
    script, said = re.findall(r"```(?:sh)?\n(.*?)```", section, re.DOTALL)[:2]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    paths = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": paths})
    assert run.stdout == said, run.stderr
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1, 2, 3], dtype=torch.uint8)}, model / "model.safetensors")
    checksum(model)
    assert json.loads((model / MANIFEST).read_text())["root"]["tensors"] == f"blake3:{said.strip()}"


def test_many_failures_are_folded(model: Path) -> None:
    for shard in model.glob("*.safetensors"):
        for place in index_safetensors(shard)[0].values():
            flip(shard, place.offset)
    texts = failures(verify(model, deep=True), level="L3")
    assert len(texts) == 21
    assert texts[-1].startswith("and 3 more")


def test_crc_of_a_bin(containers: Path) -> None:
    folder = containers / "merged-308"
    checkpoint = lw.open_checkpoint(folder)
    place: Any = checkpoint.tensors["model.norm.weight"]
    flip(Path(place.file.path), place.offset + 1)
    found = verify(folder, deep=True)
    assert any("`model.norm.weight`" in each and "CRC-32" in each for each in failures(found, level="L3"))


def test_crc_of_a_piece_of_metas(fixtures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fixtures / "A-delta-v0" / "base-meta", tmp_path / "meta"))
    leaf = lw.open_checkpoint(folder).tensors["model.layers.1.self_attn.q_proj.weight"].leaves()[1]
    flip(Path(leaf.file.path), leaf.offset)
    assert any("q_proj" in each and "consolidated.01.pth" in each for each in failures(verify(folder, deep=True), level="L3"))


# --- checksum -------------------------------------------------------------------------------------------------------


def test_checksum_of_a_bin_folder_is_sha256sums(containers: Path) -> None:
    folder = containers / "merged-308"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(path.name for path in checksum(folder)) == [SUMS, MANIFEST]
    assert subprocess.run(["sha256sum", "-c", "--strict", SUMS], cwd=folder, capture_output=True).returncode == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name in before} == before
    assert verify(folder, deep=True).exit_code == 0
    assert checksum(folder) == []
    tensors = {entry["name"]: entry["blake3"] for entry in json.loads((folder / MANIFEST).read_text())["tensors"]}
    weights = {k: v for path in folder.glob("*.bin") for k, v in torch.load(path, weights_only=True).items()}
    assert tensors == {name: blake3(value.numpy().tobytes()).hexdigest() for name, value in weights.items()}


def test_checksum_keeps_what_says_something_else(containers: Path) -> None:
    folder = containers / "merged-308"
    checksum(folder)
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    kept = {name: (folder / name).read_bytes() for name in (SUMS, MANIFEST)}
    with pytest.raises(OutputError):
        checksum(folder)
    assert kept == {name: (folder / name).read_bytes() for name in kept}
    assert len(checksum(folder, force=True)) == 2
    assert verify(folder, deep=True).exit_code == 0


@pytest.mark.parametrize("force", [False, True])
def test_checksum_leaves_the_recipe_of_our_own_output(model: Path, force: bool) -> None:
    before = (model / MANIFEST).read_bytes()
    assert checksum(model, force=force) == []
    assert (model / MANIFEST).read_bytes() == before


def test_checksum_of_one_file(model: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(largest(model), tmp_path / "one.safetensors"))
    assert {path.name for path in checksum(file)} == {"one.safetensors.sha256", "one.safetensors.manifest.json"}
    assert subprocess.run(["sha256sum", "-c", "--strict", "one.safetensors.sha256"], cwd=tmp_path, capture_output=True).returncode == 0
    assert verify(file, deep=True).exit_code == 0
    flip(file, file.stat().st_size - 1)
    assert any("one.safetensors" in each for each in failures(verify(file, deep=True), level="L3"))


def test_checksum_refuses_what_is_damaged(containers: Path) -> None:
    folder = containers / "merged-308"
    place: Any = lw.open_checkpoint(folder).tensors["model.norm.weight"]
    flip(Path(place.file.path), place.offset)
    with pytest.raises(InputError, match="CRC-32"):
        checksum(folder)
    (folder / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="leads out"):
        checksum(folder)
    assert not (folder / SUMS).exists()


def test_weights_in_a_hidden_file_are_read_too(fixtures: Path, tmp_path: Path) -> None:
    shutil.copy(fixtures / "A-delta-v0" / "expected-307-by-main" / "model.safetensors", tmp_path / ".x.safetensors")
    assert "23 tensors read" in text(verify(tmp_path, deep=True))


def test_a_shard_alone_is_checked_by_the_manifest_of_its_folder(model: Path) -> None:
    shard = largest(model)
    assert verdicts(verify(shard, deep=True), "L3") == {"ok"}
    flip(shard, shard.stat().st_size - 1)
    assert verify(shard, deep=True).exit_code == 4


# --- against --------------------------------------------------------------------------------------------------------


def test_root_does_not_depend_on_the_container(fixtures: Path, tmp_path: Path) -> None:
    path = fixtures / "A-delta-v0" / "expected-308-by-may4" / "pytorch_model.bin"
    save_file({name: value.contiguous() for name, value in torch.load(path, weights_only=True).items()}, tmp_path / "same.safetensors")
    one, other = verify(path, deep=True), verify(tmp_path / "same.safetensors", deep=True)
    assert one.facts["root"] == other.facts["root"] != ""


def test_against_a_checkpoint_in_another_container_or_layout(made: Path, fixtures: Path) -> None:
    folder = fixtures / "A-delta-v0"
    for other in (made, made / MANIFEST, folder / "expected-307-by-main"):
        found = verify(folder / "expected-307-by-main", against=other)
        assert (found.exit_code, verdicts(found, "against") - {"unchecked"}) == (0, {"ok"})  # of some files only one side has any
    found = verify(folder / "base-meta", against=folder / "base-hf-bin")
    assert "21 tensors equal to `base-hf-bin`" in text(found)
    assert found.exit_code == 0


def test_against_lists_what_differs(made: Path, fixtures: Path, tmp_path: Path) -> None:
    weights = load_file(fixtures / "A-delta-v0" / "expected-307-by-main" / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    weights["model.extra"] = weights.pop("lm_head.weight")
    other = tmp_path / "other.safetensors"
    save_file(weights, other)
    found = verify(made, against=other)
    texts = failures(found, level="against")
    assert [("norm" in each, "extra" in each) for each in texts] == [(False, True), (True, False)]
    assert ["lm_head" in each.text for each in found.findings if each.verdict == "unproved"] == [
        True
    ]  # only in the checkpoint: neither wrong nor proved
    assert found.exit_code == 4


def test_against_renamed_layout(fixtures: Path, tmp_path: Path) -> None:
    weights = load_file(fixtures / "A-delta-v0" / "expected-307-by-main" / "model.safetensors")
    text_model = {name: value for name, value in weights.items() if "mm_projector" not in name}
    save_file(text_model, tmp_path / "original.safetensors")
    save_file({f"language_model.{name}": value for name, value in text_model.items()}, tmp_path / "hub.safetensors")
    found = verify(tmp_path / "original.safetensors", against=tmp_path / "hub.safetensors")
    assert (found.exit_code, failures(found)) == (0, [])


def test_against_md5_list_of_the_authors(containers: Path) -> None:
    folder = containers / "merged-308"
    found = verify(folder, against=containers / "MD5SUMS")
    assert "2 files as listed in `MD5SUMS`" in text(found)
    assert found.exit_code == 0
    flip(folder / "pytorch_model-00002-of-00002.bin", 40_000)
    found = verify(folder, against=containers / "MD5SUMS")
    assert [each for each in failures(found, level="against") if "pytorch_model-00002" in each]
    assert found.exit_code == 4


def test_against_metas_checklist(fixtures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fixtures / "A-delta-v0" / "base-meta" / "13B", tmp_path / "13B"))
    names = ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    done = subprocess.run(["md5sum", *names], cwd=folder, capture_output=True, text=True, check=True)
    (folder / "checklist.chk").write_text(done.stdout)
    found = verify(folder, against=folder / "checklist.chk")
    assert "3 files as listed in `checklist.chk`" in text(found)
    assert verify(tmp_path, against=folder / "checklist.chk").exit_code == 0  # from above, by the list's own folder
    (folder / "notes.txt").write_text("mine")
    (folder / "checklist.chk").write_text(done.stdout + "0" * 32 + "  consolidated.02.pth\n")
    found = verify(folder, against=folder / "checklist.chk")
    assert failures(found) == ["`consolidated.02.pth` is listed in `checklist.chk` and is not here"]
    assert "not listed in `checklist.chk`: `notes.txt`" in text(found)


@pytest.mark.parametrize("program", [["sha1sum"], ["sha512sum"], ["sha256sum", "--tag"], ["md5sum", "--binary"]])
def test_lists_of_other_programs(made: Path, tmp_path: Path, program: list[str]) -> None:
    done = subprocess.run([*program, "config.json"], cwd=made, capture_output=True, text=True, check=True)
    (tmp_path / "LIST").write_text(done.stdout)
    assert "1 file as listed in `LIST`" in text(verify(made, against=tmp_path / "LIST"))


@pytest.mark.parametrize("content", ["", "hello\n", f"{'0' * 64}  ../../etc/passwd\n", f"{'0' * 40 + '1' * 7}  a\n"])
def test_a_bad_list_is_an_input_error(made: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "LIST").write_text(content)
    with pytest.raises(InputError, match="LIST"):
        verify(made, against=tmp_path / "LIST")


def test_a_list_of_nothing_here_is_not_success(made: Path, tmp_path: Path) -> None:
    (tmp_path / "LIST").write_text(f"{'0' * 64}  other/model.bin\n")
    assert verify(made, against=tmp_path / "LIST").exit_code == 3


def test_against_a_revision_on_the_hub(model: Path, made: Path, hub: HubServer) -> None:
    hub.add("owner/model", made, ref="v1")
    found = verify(model, against="hf://owner/model@v1")
    assert verdicts(found, "against") == {"ok", "unchecked"}  # the Hub also has the manifest and SHA256SUMS, which no manifest lists
    assert hub.downloads == []
    shard = largest(model)
    flip(shard, shard.stat().st_size - 1)
    flip(model / "tokenizer.model", 100)
    texts = "\n".join(failures(verify(model, against="owner/model@v1"), level="against"))
    assert f"`{shard.name}` has the sha256" in texts
    assert "`tokenizer.model` has the git-sha1" in texts
    with pytest.raises(HubError, match="no revision"):
        verify(model, against="owner/model@v2")


def test_against_published(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(model, against="published").exit_code == 3
    digest = hashlib.sha256((model / "tokenizer.model").read_bytes()).hexdigest()
    entry = PUBLISHED[0].__class__("a tokenizer", "tokenizer", "its page", sha256=digest)
    monkeypatch.setattr("llava_weights.families.published.PUBLISHED", (*PUBLISHED, entry))
    found = verify(model, against="published")
    assert "`tokenizer.model` is a tokenizer (its page)" in text(found)
    assert found.exit_code == 3  # the weights are not among them
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model.glob("*.safetensors")}
    weights = [PUBLISHED[0].__class__(name, "merged", "its page", sha256=digest) for name, digest in digests.items()]
    monkeypatch.setattr("llava_weights.families.published.PUBLISHED", (*PUBLISHED, entry, *weights))
    assert verify(model, against="published").exit_code == 0


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [64, 1000, 4097])
@pytest.mark.parametrize("jobs", [1, 3])
def test_windows_change_no_digest(made: Path, window: int, jobs: int) -> None:
    shards = {path.name: path for path in sorted(made.glob("*.safetensors"))[-1:]}
    tensors = {name: t for path in shards.values() for name, t in index_safetensors(path)[0].items()}
    found = Rehash(("sha256",), jobs, window=window, tensor_algorithms=("blake3", "sha256")).read(shards, tensors)
    raw = {name: value.numpy().tobytes() for path in shards.values() for name, value in load_file(path).items()}
    for kind, new in HASHES.items():
        assert {name: entry.digest for name, entry in found.by(kind).tensors.items()} == {name: new(raw[name]).hexdigest() for name in raw}
        assert {entry.algorithm for entry in found.by(kind).tensors.values()} == {kind}
    assert found.files == {name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for name, path in shards.items()}


def test_a_file_that_shrinks_while_it_is_read_is_named(model: Path) -> None:
    shard = largest(model)
    tensors, _ = index_safetensors(shard)
    os.truncate(shard, 1000)
    found = rehash({"shard": shard}, tensors)
    assert "changed while it was being read" in found.damaged["shard"]
    assert (found.files, found.tensors) == ({}, {})


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=8, max_size=400), dtype=st.sampled_from(sorted(NUMPY)), shift=st.integers(0, 7), window=st.integers(1, 40))
def test_inf_and_nan_are_counted_as_numpy_does(tmp_path: Path, data: bytes, dtype: str, shift: int, window: int) -> None:
    """Wherever values lie in the file, and wherever a window cuts them."""
    size = np.dtype(NUMPY[dtype]).itemsize
    values = np.frombuffer(data[: len(data) // size * size], NUMPY[dtype]).copy()
    values[::3] = np.nan
    raw = values.tobytes()
    header: dict[str, Any] = {"a": {"dtype": "U8", "shape": [shift], "data_offsets": [0, shift]}}
    header["b"] = {"dtype": dtype, "shape": [len(values)], "data_offsets": [shift, shift + len(raw)]}
    packed = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(packed).to_bytes(8, "little") + packed + bytes(shift) + raw)
    tensors, _ = index_safetensors(tmp_path / "x.safetensors")
    found = Rehash(("sha256",), 1, window=window).read({"x": tmp_path / "x.safetensors"}, tensors)
    assert found.non_finite == {"b": int((~np.isfinite(values)).sum())}
    assert found.tensors["b"].digest == blake3(raw).hexdigest()


def test_every_16_and_8_bit_pattern_is_judged_as_torch_does() -> None:
    wide, narrow = np.arange(1 << 16, dtype=np.uint16).tobytes(), bytes(range(256))
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    for name, kind in kinds.items():
        raw = wide if name in ("F16", "BF16") else narrow
        values = torch.frombuffer(bytearray(raw), dtype=kind).float()
        assert inf_and_nan(raw, name) == int((~torch.isfinite(values)).sum())
    assert kinds.keys() | NUMPY.keys() == NOT_FINITE.keys()
    assert inf_and_nan(wide, "I16") == 0
