"""Single files that a command writes beside its output: refused before the work where they can't be, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llava_weights.cli.main import app
from llava_weights.errors import OutputError, UsageError
from llava_weights.storage import output_file
from llava_weights.storage.output_file import check_file, write_report

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
MODEL, BASE = FIXTURES / "C-v1.5/hf-by-tf4.47.1", FIXTURES / "A-delta-v0/base-hf-bin"
COMMANDS = {
    "junit": f"verify {MODEL} --junit",
    "junit of smoke": f"smoke {MODEL} --junit",
    "record": f"smoke {MODEL} --record",
    "plot": f"diff {BASE} {BASE} --plot",
    "summary": f"verify {MODEL} --summary",
}
PLACES: dict[str, Callable[[Path], Any]] = {
    "in a folder that is missing": lambda at: None,
    "a folder": lambda at: at.mkdir(parents=True),
    "a pipe": lambda at: (at.parent.mkdir(), os.mkfifo(at)),
    "in a file": lambda at: at.parent.write_text("mine"),
    "a link": lambda at: (at.parent.mkdir(), at.symlink_to("nowhere/at/all.svg")),
    "exists": lambda at: (at.parent.mkdir(), at.write_text("mine")),
}


def run(folder: Path, words: str) -> tuple[int, str, str]:
    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, words.split())
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", PLACES)
def test_a_file_that_can_not_be_written_is_refused_before_the_work(tmp_path: Path, command: str, kind: str) -> None:
    if (command, kind) == ("summary", "exists"):
        pytest.skip("it is appended to")
    PLACES[kind](tmp_path / "at/file.svg")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    code, out, err = run(tmp_path, f"{COMMANDS[command]} at/file.svg")
    assert (code, out) == (5, ""), err
    assert "hint: " in err
    assert "`file.svg`" in err
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    if kind == "exists":
        assert (tmp_path / "at/file.svg").read_text() == "mine"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "summary"])
def test_force_replaces_a_file_and_no_file_of_an_input(tmp_path: Path, command: str) -> None:
    shutil.copytree(BASE if command == "plot" else MODEL, tmp_path / "model")
    (tmp_path / "model/mine.svg").write_text("mine")
    (tmp_path / "old.svg").write_text("old")
    words = COMMANDS[command].replace(str(MODEL), "model").replace(str(BASE), "model")
    code, out, err = run(tmp_path, f"{words} model/mine.svg --force")
    assert (code, out) == (5, ""), err
    assert "is a file of an input" in err
    code, _, err = run(tmp_path, f"{words} old.svg --force")
    assert code in (0, 3, 4), err
    assert (tmp_path / "old.svg").read_bytes()[:3] != b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "old.svg"]
    assert (tmp_path / "model/mine.svg").read_text() == "mine"


def test_a_summary_is_added_to_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once by its option, and once as GitHub Actions names the page of a job, also where a run has no findings."""
    (tmp_path / "page.md").write_text("before\n")
    code, _, _ = run(tmp_path, f"verify {MODEL} --summary page.md")
    first = (tmp_path / "page.md").read_text()
    assert first.startswith("before\n## ")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "page.md"))
    assert run(tmp_path, f"verify {MODEL}")[0] == code
    assert (tmp_path / "page.md").read_text() == first + first.removeprefix("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "")
    assert run(tmp_path, f"verify {MODEL}")[0] == code


def test_a_disk_that_fails_at_the_end_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(output_file, "write_file", full)
    for command in ("junit", "record", "plot"):
        code, _, err = run(tmp_path, f"{COMMANDS[command]} new.svg")
        assert code == 5, command
        assert "can't write `new.svg`: No space left" in err


def test_permissions_are_asked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system answers a user who is not root."""
    shutil.copytree(BASE, tmp_path / "model")
    (tmp_path / "page.md").write_text("")
    answer = os.access
    refused = {str(path) for name in ("model", "page.md") for path in (tmp_path / name, Path(name))}
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and str(path) in refused) and answer(path, mode))
    for words in (f"verify {MODEL} --junit model/new.xml", f"verify {MODEL} --summary page.md", "checksum model"):
        code, out, err = run(tmp_path, words)
        assert (code, out) == (5, ""), err
        assert "permission denied" in err


def test_checksums_that_can_not_be_written_are_refused_before_the_reading(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "model")
    (tmp_path / "model/SHA256SUMS").mkdir()
    for more in ("", " --force"):
        code, _, err = run(tmp_path, f"checksum model{more}")
        assert code == 5
        assert "`SHA256SUMS` exists and is a folder" in err
        assert not (tmp_path / "model/llava-weights.manifest.json").exists()


def test_what_is_no_path_is_a_usage_error(tmp_path: Path) -> None:
    for wrong in ("", 7, None, b"bytes\xff", "a\0b"):
        with pytest.raises(UsageError):
            check_file(wrong)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="its folder does not exist"):
        write_report(tmp_path / "no/where.txt", b"")
    write_report(tmp_path / "new.txt", b"one")
    write_report(tmp_path / "new.txt", b"two", append=True)
    assert (tmp_path / "new.txt").read_bytes() == b"onetwo"
