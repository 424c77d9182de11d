"""What every test stands on: no network, no home of the user, the fixtures and the command line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import typer
from hypothesis import settings
from typer.testing import CliRunner

from llava_weights.cli.main import app

if TYPE_CHECKING:
    from hub_server import HubServer

ROOT = Path(__file__).resolve().parent.parent
LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")
DEAD_PROXY = "http://127.0.0.1:9"  # the discard port: a subprocess that looks for the network gets a refusal at once


class Finished(NamedTuple):
    """What a command left behind; unpacks as `code, stdout, stderr`."""

    code: int
    stdout: str
    stderr: str


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    """Before any test module is imported: huggingface_hub and transformers read these once, on import."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background by a shell: tests of Ctrl-C need it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # For tensors of some kilobytes a second thread of torch only waits, at full speed, and the workers of pytest share the cores.
    # Tests of threads set their number themselves.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "passive"
    settings.register_profile("patient", settings(), deadline=None)  # a busy machine is no failure
    settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def _no_home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.setenv("HF_HOME", str(home / "huggingface"))
        yield


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that reaches beyond this machine. `pytest.fail` raises a BaseException, so no fallback can swallow it."""

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX and not str(address[0]).startswith(LOOPBACK):
                pytest.fail(f"a test tried to reach {address}")
            return original(self, address)

        return connect

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        if host and not str(host).startswith(LOOPBACK):
            pytest.fail(f"a test tried to look up {host}")
        return lookup(host, *arguments, **options)

    lookup = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of reference data made by the original programs."""
    return ROOT / "fixtures"


@pytest.fixture(scope="session", autouse=True)
def _commands_are_built_once() -> Iterator[None]:
    """`CliRunner` would build all of them anew for each that it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.testing._get_command", cache(typer.main.get_command), raising=False)
        yield


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Finished]:
    """Run `llava-weights ARGUMENTS` in this process, where torch is imported once: no terminal, stdin closed.

    `cwd` defaults to the test's folder; `env` adds variables. Those that are read once, on import, need `process`.
    """

    def run(*arguments: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> Finished:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd or tmp_path)
            patch.delenv("GITHUB_STEP_SUMMARY", raising=False)
            done = CliRunner().invoke(app, [*map(str, arguments)], env=env)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Finished(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Finished]:
    """Run `python -m llava_weights ARGUMENTS` as a user would: its own process, a clean environment, no terminal, stdin closed.

    For what only a process shows: exit codes and streams as a shell sees them, variables that are read on import, signals, memory.
    Takes a second, most of it for `import torch`; `cli` doesn't.
    """
    clean = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / ".huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HTTPS_PROXY": DEAD_PROXY,
        "HTTP_PROXY": DEAD_PROXY,
        "NO_PROXY": "127.0.0.1,localhost",
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }

    def run(*arguments: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 100) -> Finished:
        command = [sys.executable, "-m", "llava_weights", *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=cwd or tmp_path,
            env={**clean, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine that the library in this process asks, and nobody logged in."""
    from hub_server import HubServer
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
