"""Processes that die at a chosen moment. They import nothing that a test needs, so that one starts in milliseconds."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_weights.checks.repair import repair
from llava_weights.cli.console import Console
from llava_weights.cli.main import app
from llava_weights.events import Event
from llava_weights.write.execute import execute
from llava_weights.write.plan import Plan

PRELOADED = (
    "torch",
    *(
        f"llava_weights.{name}"
        for name in (
            "cli.main",
            "transforms.delta",
            "transforms.lora",
            "transforms.convert",
            "write.execute",
            "checks.repair",
            "checks.verify",
            "cli.report",
        )
    ),
)


def fork_server() -> Any:
    """What starts the processes: a server that has imported torch and computed nothing, and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def run_command(
    children: Any, arguments: Sequence[str], folder: Path, event: int = 0, number: int = 0, *, after: float | None = None
) -> int:
    """Exit code of the command line, struck by signal `number` at an event, or killed some seconds after its first trace on the disk."""
    process = children.Process(target=command, args=(arguments, folder, event, number))
    process.start()
    if after is not None:
        while process.is_alive() and not (folder / "out.partial").exists() and not (folder / "events").exists():
            time.sleep(0.002)
        process.join(after)
        process.kill()
    process.join()
    code: int = process.exitcode
    return code


def command(arguments: Sequence[str], folder: Path, event: int, number: int) -> None:
    """The command line in this process, with a signal at its n-th event; the file `events` says how many there were."""
    os.chdir(folder)
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the process ends with it
    told = itertools.count(1)
    original = Console.on_event

    def counting(console: Console, heard: Event) -> None:
        (folder / "events").write_text(str(next(told)))
        original(console, heard)

    listen = strike_at(event, number, counting)
    Console.on_event = lambda console, heard: listen(console, heard)  # type: ignore[method-assign]
    try:
        app(arguments)
    except SystemExit as end:
        sys.exit(end.code)


def strike_at(event: int, number: int, then: Callable[..., Any]) -> Callable[..., None]:
    """A listener that sends this process a signal at its n-th event, before that is told."""
    count = itertools.count(1)

    def listen(*heard: Any) -> None:
        if next(count) == event:
            os.kill(os.getpid(), number)
        then(*heard)

    return listen


def run_plan(plan: Plan, out: Path, event: int, number: int = signal.SIGKILL) -> None:
    execute(plan, out, on_event=strike_at(event, number, lambda heard: None))


def run_repair(path: Path, source: Path, event: int, number: int = signal.SIGKILL) -> None:
    repair(path, source, on_event=strike_at(event, number, lambda heard: None))
