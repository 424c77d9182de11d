"""Names of files that few expect, not UTF-8 or with the end of a line in them: refused before work begins, or written as coreutils do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_links import CLIP, LLAVA, copied, run

from llava_weights.checkpoint.manifest import FileEntry, make_sums, read_manifest, read_sums

ODD = [
    "a\nb.txt",
    "a\\b.txt",
    "\\",
    "a\\nb",
    "a\rb",
    "tail ",
    " head",
    "a\u2028b",
    "a\x0bb",
    "a\x85b",
    "*star",
    "\n",
    "ü",
    "SHA256 (x) = y",
]


@pytest.mark.parametrize("name", ODD)
def test_odd_neighbours_are_recorded_as_coreutils_do(tmp_path: Path, name: str) -> None:
    it = copied(LLAVA, tmp_path / "it")
    (it / name).write_text("neighbour")
    assert run("checksum {it}", it, tmp_path / "out").code == 0
    listed = {entry.path for entry in read_sums(it / "SHA256SUMS")}
    assert listed == {path.name for path in it.iterdir()} - {"SHA256SUMS", "llava-weights.manifest.json"}
    assert read_manifest(it / "llava-weights.manifest.json").files.keys() == listed
    checked = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=it, capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
    theirs = subprocess.run(["sha256sum", *sorted(os.listdir(it))], cwd=it, capture_output=True, check=True).stdout
    assert {line for line in (it / "SHA256SUMS").read_bytes().split(b"\n")} <= set(theirs.split(b"\n"))
    assert run("verify {it} --deep", it, tmp_path / "out").code == 0
    (it / name).write_text("another")
    ended = run("verify {it}", it, tmp_path / "out")
    assert ended.code == 4
    (it / name).unlink()
    assert run("verify {it}", it, tmp_path / "out").code == 4


@pytest.mark.parametrize("tool", ["sha256sum", "md5sum", "sha256sum --tag", "sha512sum --binary"])
def test_lists_of_coreutils_are_read(tmp_path: Path, tool: str) -> None:
    names = [*ODD, "plain", "with blanks in it"]
    for name in names:
        (tmp_path / name).write_text(name)
    written = subprocess.run([*tool.split(), "--", *names], cwd=tmp_path, capture_output=True, check=True).stdout
    (tmp_path / "LIST").write_bytes(written)
    assert {entry.path for entry in read_sums(tmp_path / "LIST")} == set(names)


def test_lines_end_as_on_windows(tmp_path: Path) -> None:
    (tmp_path / "LIST").write_bytes(b"".join(b"%064d  file%d\r\n" % (number, number) for number in range(3)))
    assert [entry.path for entry in read_sums(tmp_path / "LIST")] == ["file0", "file1", "file2"]


def test_make_sums_escapes() -> None:
    entry = FileEntry("a\\b\n", 1, "0" * 64)
    assert make_sums([entry]) == b"\\" + b"0" * 64 + rb"  a\\b\n" + b"\n"


def test_checksum_refuses_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    it = copied(LLAVA, tmp_path / "it")
    (it / os.fsdecode(b"a\xff")).write_text("neighbour")
    before = set(os.listdir(it))
    ended = run("checksum {it}", it, tmp_path / "out")
    assert ended.code == 3
    assert "is not UTF-8" in ended.told
    assert "hint: " in ended.told
    assert set(os.listdir(it)) == before
    assert run("verify {it}", it, tmp_path / "out").code == 3
    assert run("verify {it} --json", it, tmp_path / "out").code == 3


def test_a_small_file_whose_name_is_not_utf8_stops_before_the_first_byte(tmp_path: Path) -> None:
    it = copied(LLAVA, tmp_path / "it")
    (it / os.fsdecode(b"LICENSE\xff")).write_text("terms")
    for more in ("", " --dry-run"):
        ended = run("convert {it} --vision-tower {clip} -o {out}" + more, it, tmp_path / "out")
        assert ended.code == 3, ended
        assert "`LICENSE\N{REPLACEMENT CHARACTER}` is not UTF-8" in ended.told
        assert "hint: " in ended.told
        assert sorted(os.listdir(tmp_path)) == ["it"]


@pytest.mark.parametrize("more", ["", " --json", " --dry-run"])
def test_folders_whose_names_are_not_utf8(tmp_path: Path, more: str) -> None:
    """Folders are named in the manifest and the card for people only: what is no text there is replaced."""
    it = copied(LLAVA, tmp_path / os.fsdecode(b"i\xfft"))
    tower = copied(CLIP, tmp_path / os.fsdecode(b"to\xffwer"))
    shutil.move(tower / "model.safetensors", tower / os.fsdecode(b"mod\xffel.safetensors"))
    out = tmp_path / os.fsdecode(b"o\xfft")
    ended = run(f"convert {{it}} --vision-tower {tower} -o {{out}}{more}", it, out)
    assert ended.code == 0, ended
    if "dry" not in more:
        recipe = json.loads((out / "llava-weights.manifest.json").read_text())["recipe"]
        assert "i\N{REPLACEMENT CHARACTER}t" in json.dumps(recipe, ensure_ascii=False)
        assert run("verify {it} --deep", out, tmp_path / "none").code == 0


def test_an_adapter_in_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    from test_links import LORA, VICUNA

    it = copied(LORA, tmp_path / os.fsdecode(b"i\xfft"))
    base = copied(VICUNA, tmp_path / os.fsdecode(b"b\xffe"))
    assert run(f"merge-lora --base {base} --lora {{it}} -o {{out}}", it, tmp_path / "out").code == 0
    assert run("verify {it} --deep", tmp_path / "out", tmp_path / "none").code == 0
