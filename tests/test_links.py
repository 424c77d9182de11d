"""Links in an input or a checked folder lead nowhere else: of what lies outside neither content nor digest is shown."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main

from llava_weights.cli.main import app

COMMAND = typer.main.get_command(app)
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
BASE = FIXTURES / "A-delta-v0/base-hf-bin"
DELTA = FIXTURES / "A-delta-v0/delta-307-apr17"
META = FIXTURES / "A-delta-v0/base-meta"
HUB = FIXTURES / "C-v1.5/hf-by-tf4.47.1"
LLAVA = FIXTURES / "C-v1.5/original-no-vision-bin"
CLIP = FIXTURES / "common/clip-tiny-42px"
VICUNA = FIXTURES / "B-lora/base-vicuna-tiny"
LORA = FIXTURES / "B-lora/llava-v1.5-tiny-lora"
# How each kind is used: as itself, and in a role of its own.
USES = {
    BASE: ["inspect {it}", "verify {it}", "verify {it} --deep", "checksum {it}", "apply-delta --base {it} --delta {delta} -o {out}"],
    META: ["inspect {it}", "verify {it} --deep", "checksum {it}", "apply-delta --base {it} --delta {delta} -o {out}"],
    HUB: ["inspect {it}", "verify {it} --deep", "convert {it} --to llava -o {out}", "smoke {it}"],
    LORA: ["merge-lora --base {vicuna} --lora {it} -o {out}"],
    CLIP: ["convert {llava} --vision-tower {it} -o {out}"],
}


class Ended(NamedTuple):
    code: int
    told: str


def run(line: str, it: Path, out: Path) -> Ended:
    """A command of the real command line, in this process; `told` is all that it said and wrote."""
    text = io.StringIO()
    places = {"it": it, "out": out, "vicuna": VICUNA, "llava": LLAVA, "clip": CLIP, "delta": DELTA}
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = COMMAND.main([word.format(**places) for word in line.split()], standalone_mode=False)
    written = [path.read_bytes().decode(errors="replace") for path in out.rglob("*") if path.is_file()] if out.exists() else []
    return Ended(code or 0, "\n".join([text.getvalue(), *written]))


def copied(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    return folder


def moved_out(path: Path, outside: Path) -> list[str]:
    """Put a link in the place of a file or folder; returns the beginnings of the digests of what is outside now."""
    outside.mkdir()
    target = outside / path.name
    path.rename(target)
    path.symlink_to(target)
    files = [target] if target.is_file() else sorted(target.rglob("*"))
    return [hashlib.new(kind, file.read_bytes()).hexdigest()[:10] for file in files if file.is_file() for kind in ("sha256", "md5")]


LINKED = [(kind, file.relative_to(kind).as_posix()) for kind in USES for file in sorted(kind.rglob("*")) if file.is_file()]
LINKED += [(META, "13B")]


@pytest.mark.parametrize(("kind", "name"), LINKED, ids=lambda value: value if isinstance(value, str) else value.name)
def test_no_file_of_an_input_is_read_through_a_link_out(tmp_path: Path, kind: Path, name: str) -> None:
    it = copied(kind, tmp_path / "it")
    digests = moved_out(it / name, tmp_path / "outside")
    for line in USES[kind]:
        ended = run(line, it, tmp_path / "out")
        assert ended.code == (4 if line.startswith("verify") else 3), f"{line}: {ended}"
        assert f"`{Path(name).name}` is a link that leads out of its folder" in ended.told, f"{line}: {ended}"
        assert not [digest for digest in digests if digest in ended.told], f"{line}: {ended}"
        assert not (tmp_path / "out").exists()


def test_meta_tokenizer_above_a_size_folder(tmp_path: Path) -> None:
    it = copied(META, tmp_path / "it")
    digests = moved_out(it / "tokenizer.model", tmp_path / "outside")
    ended = run("apply-delta --base {it} --delta {delta} -o {out}", it / "13B", tmp_path / "out")
    assert (ended.code, (tmp_path / "out").exists()) == (3, False)
    assert "`tokenizer.model` is a link that leads out of its folder" in ended.told
    assert not [digest for digest in digests if digest in ended.told]


@pytest.mark.parametrize("record", ["SHA256SUMS", "llava-weights.manifest.json"])
@pytest.mark.parametrize("command", ["verify {it}", "verify {it} --deep", "verify {it} --against {it}"])
def test_records_that_are_links(tmp_path: Path, record: str, command: str) -> None:
    it = copied(BASE, tmp_path / "it")
    assert run("checksum {it}", it, tmp_path / "out").code == 0
    if record == "SHA256SUMS":
        (it / "llava-weights.manifest.json").unlink()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("a-password-of-yours\n")
    (it / record).unlink()
    (it / record).symlink_to(tmp_path / "outside/secret")
    ended = run(command, it, tmp_path / "out")
    assert ended.code in (3, 4)
    assert f"`{record}` is a link that leads out of its folder" in ended.told
    assert "a-password-of-yours" not in ended.told


@pytest.mark.parametrize("record", ["SHA256SUMS", "llava-weights.manifest.json"])
@pytest.mark.parametrize("way", ["sub", "sub/inner", "a/../sub"])
def test_recorded_paths_through_a_linked_subfolder(tmp_path: Path, record: str, way: str) -> None:
    """`sub` is a link out, and the list names a file behind it: `verify` must not become a way to learn its digest."""
    it = copied(BASE, tmp_path / "it")
    (tmp_path / "outside/inner").mkdir(parents=True)
    for place in ("outside/secret", "outside/inner/secret"):
        (tmp_path / place).write_text("a password of yours")
    (it / "sub").symlink_to(tmp_path / "outside")
    digest = hashlib.sha256(b"a password of yours").hexdigest()
    name = f"{way}/secret"
    if record == "SHA256SUMS":
        (it / record).write_text(f"{'0' * 64}  {name}\n")
    else:
        files = [{"path": name, "size": 19, "sha256": "0" * 64}]
        empty = hashlib.sha256(b"").hexdigest()
        root = {"tensors": empty, "files": hashlib.sha256(f"{'0' * 64}  {name}\n".encode()).hexdigest()}
        (it / record).write_text(json.dumps({"schema": 1, "files": files, "tensors": [], "root": root}))
    for command in ("verify {it}", "verify {it} --deep"):
        ended = run(command, it, tmp_path / "out")
        assert ended.code == 4
        assert digest[:10] not in ended.told
        if ".." not in way:  # which no list may hold at all
            assert "`sub` is a link that leads out of its folder" in ended.told


def test_links_inside_a_folder_and_the_users_own_are_followed(tmp_path: Path) -> None:
    it = copied(BASE, tmp_path / "it")
    (it / "config.json").rename(it / "kept.json")
    (it / "config.json").symlink_to("kept.json")
    (tmp_path / "mine").symlink_to(it)
    assert run("verify {it} --deep", tmp_path / "mine", tmp_path / "out").code == 3  # sound, and nothing recorded to compare with
    assert run("checksum {it}", tmp_path / "mine", tmp_path / "out").code == 0
    assert run("verify {it} --deep", tmp_path / "mine", tmp_path / "out").code == 0
    file = next(HUB.glob("*.safetensors"))
    (tmp_path / "one.safetensors").symlink_to(file)
    assert run("inspect {it}", tmp_path / "one.safetensors", tmp_path / "out").code == 0


@pytest.mark.parametrize("name", ["LICENSES", "NOTICE.d", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_left_out_where_it_is_optional(tmp_path: Path, name: str, kind: str) -> None:
    it = copied(LLAVA, tmp_path / "it")
    (it / name).unlink(missing_ok=True)
    (it / name).mkdir() if kind == "folder" else os.mkfifo(it / name)
    assert f"not read, since no regular files: `{name}`" in run("inspect {it}", it, tmp_path / "out").told
    ended = run("convert {it} --vision-tower {clip} -o {out}", it, tmp_path / "out")
    assert ended.code == 0, ended
    assert (tmp_path / "out" / name).is_file() == name.endswith(".json")  # those are written anew


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"])
def test_what_is_no_file_is_named_where_it_is_needed(tmp_path: Path, name: str) -> None:
    it = copied(BASE, tmp_path / "it")
    (it / name).unlink()
    (it / name).mkdir()
    ended = run("apply-delta --base {it} --delta {delta} -o {out}", it, tmp_path / "out")
    assert ended.code == 3
    assert f"`{name}` is a folder, not a file" in ended.told
    assert "hint: " in ended.told
