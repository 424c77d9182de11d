"""A command of this program as a process of its own, `python -m llava_weights COMMAND ... --json`: its memory, its crashes and its exit
code are its own, and what it tells is told on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import IO, Any

from .errors import Interrupted, LlavaWeightsError, Terminated
from .events import Event, Note, Progress, ReadingBack, ShardDone, Started

EVENTS: dict[str, Any] = {"started": Started, "progress": Progress, "shard": ShardDone, "reading_back": ReadingBack, "note": Note}
LAST_WORDS = 5  # lines kept of what is not JSON: the end of a crash
CONTINUE = "Run the same command to continue"

Documents = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Ended:
    """What a command left behind: its last document of each type, why it failed, and the signal that was passed on to it, or 0."""

    documents: Documents
    error: LlavaWeightsError | Interrupted | None = None
    stopped: int = 0


def silent(event: Event) -> None:
    """Nobody listens."""


def call(arguments: Sequence[str], on_event: Callable[[Event], None] = silent) -> Ended:
    """Run `llava-weights ARGUMENTS`, with `--json` among them, to its end, however it ends; `on_event` is called from other threads.

    SIGINT and SIGTERM are passed on, a second one as SIGKILL. The process has a group of its own: Ctrl-C reaches it once.
    """
    documents: dict[str, Mapping[str, Any]] = {}
    words: deque[str] = deque(maxlen=LAST_WORDS)

    def listen(stream: IO[str]) -> None:
        for line in stream:
            document = _parsed(line)
            kind = str(document.get("type"))
            if kind in EVENTS:
                on_event(EVENTS[kind](**{part.name: document[part.name] for part in fields(EVENTS[kind]) if part.name in document}))
            elif document:
                documents[kind] = document
            elif line.strip():
                words.append(line.strip())

    how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "process_group": 0}
    command = [sys.executable, "-m", str(__package__), *arguments]
    with subprocess.Popen(command, encoding="utf-8", errors="backslashreplace", **how) as process:
        listeners = [threading.Thread(target=listen, args=(stream,), daemon=True) for stream in (process.stdout, process.stderr)]
        stopped = _wait(process, listeners)
    return Ended(documents, _error(process.returncode, documents, list(words), stopped), stopped)


def _wait(process: subprocess.Popen[str], listeners: Sequence[threading.Thread]) -> int:
    """Until the process has ended and said its last. Returns the signal that was passed on, or 0."""
    stopped, ended = 0, False
    while not ended:
        try:
            for listener in listeners:
                if listener.ident is None:
                    listener.start()
            process.wait()
            for listener in listeners:
                listener.join()
            ended = True
        except KeyboardInterrupt as error:
            number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
            process.send_signal(signal.SIGKILL if stopped else number)
            stopped = stopped or number
    return stopped


def _parsed(line: str) -> dict[str, Any]:
    """A line of `--json`; nothing where it is something else."""
    try:
        document = json.loads(line)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _error(returncode: int, documents: Documents, words: Sequence[str], stopped: int) -> LlavaWeightsError | Interrupted | None:
    """What a command died of, in its own words where it left any."""
    if returncode == 0:
        return None
    code = 128 - returncode if returncode < 0 else returncode  # below 0: killed by that signal
    told, summary = documents.get("error"), documents.get("summary", {})
    if told:
        error: LlavaWeightsError | Interrupted = LlavaWeightsError(str(told["what"]), facts=told["facts"], hint=told["hint"])
        error.kept = told["written"]
    elif "verdict" in summary:
        facts = {finding["subject"]: finding["text"] for finding in summary["findings"] if finding["verdict"] != "ok"}
        hint = "the same command by itself says what to do about each"
        error = LlavaWeightsError(f"{summary['name']}: {summary['verdict']}", facts=facts, hint=hint)
    elif stopped:
        error = Interrupted("stopped")
        error.kept = CONTINUE
    else:
        how = f"killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with exit code {code}"
        error = LlavaWeightsError(how, facts={"last words": " / ".join(words) or "none"}, hint="run the same command by itself")
    if told and code in (130, 143):
        kept, error = error.kept, Interrupted(error.what)
        error.kept = kept
    error.exit_code = code
    return error
