"""Installation as the documents tell it. The default tests compare lines with pyproject.toml; the slow ones install, from the network."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LINES = dict(re.findall(r"^\| (pip|uv|pipx) \| `([^`]+)` \|$", README, re.MULTILINE))
SMALL = re.findall(r"^pip install .+$", (ROOT / "docs/ci.md").read_text(encoding="utf-8").split("### Without torch")[1], re.MULTILINE)
GOOD = ROOT / "fixtures/H-manifest/schema-1"
BASE, DELTA = ROOT / "fixtures/A-delta-v0/base-hf-bin", ROOT / "fixtures/A-delta-v0/delta-307-apr17"
NO_TORCH = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Absent())
from llava_weights.cli.main import main
main()
"""


def test_every_extra_is_told() -> None:
    told = set(re.findall(r"^\| `(\w+)` \|", README.split("| extra, as in")[1].split("\n\n")[0], re.MULTILINE))
    assert told == PROJECT["optional-dependencies"].keys() - {"test", "fuzz"}


def test_the_line_without_torch_has_all_other_dependencies() -> None:
    named = set(shlex.split(SMALL[0])[2:])
    assert named == {re.split("[<>=]", requirement)[0] for requirement in PROJECT["dependencies"]} - {"torch"}
    assert SMALL[1:] == ["pip install --no-deps ."]


def test_every_python_is_in_both_matrices() -> None:
    told = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    for workflow, job in (("ci", "test"), ("release", "try")):
        jobs = yaml.safe_load((ROOT / f".github/workflows/{workflow}.yml").read_text(encoding="utf-8"))["jobs"]
        assert jobs[job]["strategy"]["matrix"]["python"] == told
    assert f">={told[0]}" == PROJECT["requires-python"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("verify", GOOD, "--deep"), 0),
        (("verify", GOOD, "--against", GOOD), 0),
        (("verify", DELTA), 4),
        (("inspect", DELTA), 0),
        (("diff", BASE, BASE), 0),
        (("apply-delta", "--base", BASE, "--delta", DELTA, "-o", "out"), 2),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_without_torch(tmp_path: Path, arguments: tuple[str | Path, ...], code: int) -> None:
    command = [sys.executable, "-c", NO_TORCH, *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if code == 2:
        assert "`torch`, which is not installed" in done.stderr
        assert "hint: pip install torch" in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = folder.glob("*.tar.gz")
    (path,) = folder.glob("*.whl")
    assert sdist.stat().st_size > path.stat().st_size  # tests and fixtures are in it
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tool", ["pip", "uv", "pipx", "without torch"])
def test_the_lines_install_the_wheel(wheel: Path, tmp_path: Path, tool: str) -> None:
    """A clean environment, the line of the document with the wheel in place of `.`, then the first commands from an empty folder.

    Where PyTorch's own index can't be reached, its option is left out, and torch comes from where pip's configuration finds it.
    """
    tools, home, bin = tmp_path / "tools", tmp_path / "home", tmp_path / "bin"
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"HOME": str(home), "UV_TOOL_BIN_DIR": str(bin), "UV_TOOL_DIR": str(tmp_path / "uv"), "UV_PYTHON": sys.executable}
    env |= {"PIPX_HOME": str(tmp_path / "pipx"), "PIPX_BIN_DIR": str(bin), "PIPX_DEFAULT_PYTHON": sys.executable}
    env["PATH"] = f"{bin}:{tools / 'bin'}:{env['PATH']}"
    subprocess.run([sys.executable, "-m", "venv", tools], check=True)
    if tool in ("uv", "pipx"):
        subprocess.run([tools / "bin/pip", "install", "--quiet", tool], check=True, env=env)
    for line in SMALL if tool == "without torch" else [LINES[tool]]:
        words = [str(wheel) if word == "." else word for word in shlex.split(line)]
        if not reachable("download.pytorch.org"):
            words, env = offline(words, env, tmp_path)
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    work = tmp_path / "empty"
    work.mkdir()
    commands = [["llava-weights", "--version"], ["llava-weights", "verify", str(GOOD), "--deep"]]
    commands += [] if tool == "without torch" else [["llava-weights", "demo", "shown"]]
    for command in commands:
        done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(wheel) as archive:
        assert not any(name.startswith("tests") for name in archive.namelist())


def reachable(host: str) -> bool:
    """Asked in a process of its own: sockets of this one are blocked."""
    question = f"import socket; socket.create_connection(({host!r}, 443), timeout=5)"
    return subprocess.run([sys.executable, "-c", question], capture_output=True).returncode == 0


def offline(words: list[str], env: dict[str, str], folder: Path) -> tuple[list[str], dict[str, str]]:
    """The same without PyTorch's index, and with the tested torch."""
    constraint = folder / "constraints"
    constraint.write_text(next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")))
    env = {**env, "PIP_CONSTRAINT": str(constraint), "UV_CONSTRAINT": str(constraint)}
    if links := env.get("PIP_FIND_LINKS"):
        env["UV_FIND_LINKS"] = links
    kept = []
    for word in words:
        if word in ("--torch-backend", "--extra-index-url"):
            kept.append("")
        elif kept and kept[-1] == "":
            kept.pop()
        elif CPU_INDEX not in word:
            kept.append(word)
    return kept, env
