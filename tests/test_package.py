"""What is shipped: the wheel's contents, its metadata, and a command line that starts without torch."""

from __future__ import annotations

import configparser
import contextlib
import re
import socket
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

import llava_weights

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["inspect", "apply-delta", "make-delta", "merge-lora", "demo", "env"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return HeaderParser().parsestr(inside(wheel, "METADATA"))


def inside(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(f"llava_weights-{llava_weights.__version__}.dist-info/{name}").decode()


def test_wheel_holds_the_package_its_man_page_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llava_weights").rglob("*.py")}
    man = f"llava_weights-{llava_weights.__version__}.data/data/share/man/man1/llava-weights.1"
    assert shipped == sources | {"llava_weights/py.typed", man}
    assert wheel.read(man).decode() == (ROOT / "docs/llava-weights.1").read_text()


def test_wheel_holds_licence_and_command(wheel: zipfile.ZipFile) -> None:
    assert inside(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    entry_points = configparser.ConfigParser()
    entry_points.read_string(inside(wheel, "entry_points.txt"))
    assert dict(entry_points["console_scripts"]) == {"llava-weights": "llava_weights.cli.main:main"}


def test_versions_agree(metadata: Message) -> None:
    assert metadata["Version"] == llava_weights.__version__
    assert f"\nversion: {llava_weights.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_lower_bounds_are_the_oldest_set(metadata: Message) -> None:
    """Every lower bound is a version that `make oldest` installs; torch's is tested by hand (constraints-oldest.txt says so)."""
    requirements = [requirement.replace("-", "_") for requirement in metadata.get_all("Requires-Dist", [])]
    bounds = dict(re.findall(r"^(\w+)[^>;]*>=([\d.]+)", "\n".join(requirements), re.M))
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints-oldest.txt").read_text(), re.M))
    assert bounds.pop("torch") <= oldest.pop("torch")
    assert {name: bounds.get(name) for name in oldest} == oldest


def test_constraints_hold_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    names = {re.split(r"[\[<>=]", requirement)[0].replace("_", "-") for requirement in wanted}
    pinned = {line.split("==")[0].replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert names <= pinned


def test_changelog_is_kept() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## \[(.+?)\]", changelog, re.M)[0] == "Unreleased"
    assert "### Changes in output bytes" in changelog


def test_public_names_exist() -> None:
    assert all(getattr(llava_weights, name) is not None for name in llava_weights.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = llava_weights.no_such_name


def test_help_lists_every_command(process: Callable[..., tuple[int, str, str]]) -> None:
    code, stdout, stderr = process("--help")
    assert (code, stderr) == (0, "")
    assert [command for command in COMMANDS if not re.search(rf"^ +{command}\b", stdout, re.M)] == []


@pytest.mark.parametrize("arguments", [["--help"], ["apply-delta", "--help"], ["inspect", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "llava_weights", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.M))
    assert done.returncode == 0, done.stderr[-1000:]
    assert "typer" in imported
    assert imported & {"torch", "transformers", "peft", "huggingface_hub", "rich", "tqdm"} == set()


@pytest.mark.parametrize("host", ["192.0.2.1", "huggingface.co"])
def test_tests_have_no_network(host: str) -> None:
    """The guard of conftest.py holds, also where code takes every exception for a network that is down."""
    with pytest.raises(pytest.fail.Exception, match=re.escape(host)), contextlib.suppress(Exception):
        socket.create_connection((host, 443), timeout=1)
