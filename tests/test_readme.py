"""Every command and every line of Python in the README runs, on small checkpoints under the names that the README uses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = ROOT / "fixtures" / "A-delta-v0"
COMMANDS = [
    line[2:] for block in re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines() if line.startswith("$ ")
]
NAMES = {"llama-13b": "base-hf-bin", "LLaMA/13B": "base-meta/13B", "LLaVA-13b-delta-v0": "delta-307-apr17"}


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder with the README's checkpoints, and `llava-weights` on the path."""
    for name, source in NAMES.items():
        shutil.copytree(REFERENCE / source, tmp_path / name)
    shutil.copy(REFERENCE / "base-meta/tokenizer.model", tmp_path / "LLaMA")
    shutil.copytree(REFERENCE / "base-hf-from-meta13B-by-tf4.37.2-BF16", tmp_path / "vicuna-13b")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "llava-weights").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llava_weights "$@"\n')
    (binaries / "llava-weights").chmod(0o755)
    return tmp_path


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(["sh", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_every_command_runs(shelf: Path) -> None:
    ours = [command for command in COMMANDS if "llava-weights" in command or "sha256sum" in command]
    assert len(ours) > 8
    done: set[str] = set()
    for command in ours:
        if command in done:  # the opening example stands again further down
            continue
        done.add(command)
        if "--dry-run" in command:  # shown before the real run, which the opening example has already done
            shutil.rmtree(shelf / "LLaVA-13B-v0")
            done.discard(command.removesuffix(" --dry-run"))
        result = run(command, shelf)
        expected = 3 if "LLaVA-wrong" in command else 0
        assert result.returncode == expected, f"{command}\n{result.stdout}{result.stderr}"
    assert not (shelf / "LLaVA-wrong").exists()


def test_the_other_commands_are_those_that_ci_runs() -> None:
    """`make demo` and `make test` are CI itself; `pip install .` is what test_package builds."""
    others = {command for command in COMMANDS if "llava-weights" not in command and "sha256sum" not in command}
    assert others == {"make demo", "make test", "pip install ."}
    script = (ROOT / ".ci" / "run").read_text()
    assert "make demo" in script
    assert "make test" in script


def test_the_python_runs(shelf: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", block], cwd=shelf, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert re.fullmatch("[0-9a-f]{64}", result.stdout.strip())


def test_links_lead_somewhere() -> None:
    for text in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (text.parent / link).exists(), f"{text.name}: {link}"


def test_the_reference_page_is_the_help(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "typer", "llava_weights.cli", "utils", "docs", "--name", "llava-weights", "--output", "cli.md"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert (tmp_path / "cli.md").read_text() == (ROOT / "docs/cli.md").read_text(), "run `make docs`"
