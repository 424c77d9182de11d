"""The only module that prints: sentences for people, JSON lines for programs (`--json`), or next to nothing (`--quiet`).

Narration, progress and errors go to stderr, data to stdout. Files may hold any text, so control characters, access tokens and what a
CI would take for a command are removed from every line. A failure to print never ends a run: a closed pipe is no reason to stop writing
26 GB.
"""

from __future__ import annotations

import json as jsonlib
import math
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, TextIO

from .. import __version__
from ..errors import Interrupted, LlavaWeightsError, OutputError
from ..events import Event, Note, Progress, ReadingBack, ShardDone, Started
from ..text import clock_face, command_free, redact, sentences, shards, size, two_columns, visible
from .progress import Meter

UNITS_OF = {"Writing": "shard", "Checking": "shard", "Running": "probe"}  # what a phase counts, where people know it
JSON_SCHEMA = 1  # of every JSON line; fields may be added under the same number
BAR_INTERVAL, JSON_INTERVAL, LINE_INTERVAL = 0.1, 1.0, 30.0  # seconds between two signs of progress
WRITING_FAILED = (1, 3, 5, 6)  # exit codes after which the user should learn what lies on disk
COLOURS = {"error": "1;31", "FAILED": "1;31", "warning": "33", "unproved": "33", "ok": "32", "hint": "36"}
HEADLINE_COLOURS = {0: "1;32", 3: "1;33", 4: "1;31"}  # of a check's verdict, by its exit code
SAID_WHEN_QUIET = ("FAILED", "warning", "unproved")  # the headline tells what is unchecked


class Console:
    """Where every word to the user goes. Safe to call from any thread; `writes` is set by commands that make an output."""

    def __init__(
        self,
        *,
        json: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        color: str = "auto",
        progress: bool = True,
        out: TextIO | None = None,
        err: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.json, self.quiet, self.verbose, self.writes = json, quiet, verbose, False
        self._out = sys.stdout if out is None else out
        self._err = sys.stderr if err is None else err
        self._clock, self._made_at = clock, clock()
        self._lock = threading.Lock()  # not reentrant, so that the status signal notices where it interrupts a line
        self._meter: Meter | None = None
        self._begun: float | None = None  # when the work did, of all its phases
        self._live = self._bar_shown = self._status_wanted = False
        self._shown_at = -math.inf
        self._signals: dict[int, Any] = {}
        self._summary: dict[str, Any] = {}  # of `--json`, printed at the end
        self._asked = False  # its data is what the command was for
        self._color, self._progress_wanted = color, progress
        self._animated = _is_terminal(self._err) and progress and not (json or quiet)
        self._traces = verbose or _set("LLAVA_WEIGHTS_DEBUG")

    @property
    def seconds(self) -> float:
        """How long the command has run."""
        return self._clock() - self._made_at

    def plan(self, rows: Sequence[tuple[str, str]], document: Mapping[str, Any]) -> None:
        """What will be done: narration in two columns, or the JSON line `plan`; of a quiet one the warnings."""
        with self._turn():
            self._say("plan", document, "Plan", *two_columns(rows))
            if self.quiet and not self.json:
                for text in (text for label, text in rows if label == "warning"):
                    self._narrate(text, label="warning")

    def on_event(self, event: Event) -> None:
        """Show an event of the library."""
        with self._turn():
            match event:
                case ReadingBack():
                    self._read_back(event)
                case Started():
                    self._start(event)
                case Progress():
                    self._progress(event)
                case ShardDone():
                    self._shard_done(event)
                case Note():
                    self._note(event)

    def document(self, text: str | Sequence[str], document: Mapping[str, Any]) -> None:
        """The data of a read-only command, on stdout; `--quiet` keeps it, since it is what was asked for. `text` has lines of its own,
        or is a list of lines, each printed as one whatever it holds.

        In JSON it is the summary, which `end` prints. Raises OutputError where stdout can't take it; a reader that closed the pipe is no
        error.
        """
        self._data(_clean_lines(text), document)

    def verdict(
        self, headline: str, rows: Sequence[tuple[str, str]], document: Mapping[str, Any], code: int, before: Sequence[str] = ()
    ) -> None:
        """What a check found, as `document` has it: some lines, the headline, then rows, each with the verdict that it belongs to.
        `--quiet` leaves those lines, and on stderr the headline and what is not right."""
        if self.quiet:
            self._data(_clean_lines(before), document)
            if not self.json:
                with self._turn():
                    self._narrate(headline, paint=HEADLINE_COLOURS.get(code, ""))
                    for label, line in rows:
                        if label in SAID_WHEN_QUIET:
                            self._narrate(line, word=label)
            return
        painted = [self._painted(clean(headline), "", HEADLINE_COLOURS.get(code, ""), self._out)]
        painted += [self._painted(clean(line), label, COLOURS.get(label, ""), self._out) for label, line in rows]
        self._data(_clean_lines(before) + "".join(f"{line}\n" for line in painted), document)

    def _data(self, text: str, document: Mapping[str, Any]) -> None:
        with self._turn():
            self._erase()
            self._summary, self._asked = {**document}, True
            failure = None if self.json or not text else _write(self._out, text)
        if failure is not None and (error := _not_taken(failure)) is not None:
            raise error from failure

    def summary(self, lines: Sequence[str], document: Mapping[str, Any], path: str | None = None) -> None:
        """The end of a command that wrote: human lines, or the path alone (`--quiet`); in JSON the summary, which `end` prints."""
        with self._turn():
            self._meter = None
            self._erase()
            self._summary = {**document}
            if self.json:
                return
            if not self.quiet:
                self._narrate(*lines)
            elif path is not None:
                _write(self._out, f"{clean(path) if _is_terminal(self._out) else path}\n")  # exact for a script

    def end(self, code: int) -> int:
        """The last JSON line, always a summary with the exit code; nothing for people. Returns the exit code, which is another where stdout
        can't take the data of a read-only command."""
        if not self.json:
            return code
        with self._turn():
            self._end()
            self._meter = None
            failure = self._emit(self._out, "summary", {"exit_code": code} | self._summary | {"exit_code": code})
        if self._asked and failure is not None and (error := _not_taken(failure)) is not None:
            return self._report(error, error)
        return code

    def error(self, error: LlavaWeightsError | Interrupted) -> int:
        """What happened, the facts, a hint, what was written; returns the exit code."""
        return self._report(error, error)

    def unexpected(self, error: BaseException) -> int:
        """A bug in this program: say so, and save the traceback for a report; returns 1."""
        first = (str(error).strip() or "no message").splitlines()[0]
        found = ", ".join(f"{name} {version}" for name, version in versions().items())
        problem = LlavaWeightsError(
            f"unexpected {type(error).__name__}: {first}",
            facts={"traceback": _save_traceback(found, error), "versions": found},
            hint="this is a bug in llava-weights; please report it with the traceback",
        )
        return self._report(problem, error)

    def close(self) -> None:
        """Leave the terminal and the signals as they were found."""
        with self._turn():
            self._end()
        if threading.current_thread() is threading.main_thread():
            while self._signals:
                signal.signal(*self._signals.popitem())

    def install_status_signal(self) -> None:
        """SIGUSR1 (SIGINFO, which is Ctrl-T, on BSD and macOS) prints one status line, in every mode."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in ("SIGUSR1", "SIGINFO"):
            if (number := getattr(signal, name, None)) is not None and number not in self._signals:
                self._signals[number] = signal.signal(number, self._on_signal) or signal.SIG_DFL

    def _on_signal(self, *_: object) -> None:
        self._status_wanted = True
        if not self._lock.locked():  # else whoever is printing, perhaps this very thread, ends its turn with the status
            with self._turn():
                pass

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._lock:
            yield
            if self._status_wanted:
                self._status_wanted = False
                self._print_meter(self._meter)

    def _print_meter(self, meter: Meter | None) -> None:
        if meter is None:
            self._narrate("Nothing is being written yet")
        elif self.json:
            self._emit(self._out, "progress", meter.document(self._clock()))
        else:
            self._narrate(meter.line(self._clock()))

    def _start(self, event: Started) -> None:
        self._shown_at = self._clock()
        self._begun = self._shown_at if self._begun is None else self._begun
        self._meter, self._live = Meter.start(event, self._shown_at, self._begun), True
        kept = f"; {event.done_shards} ({size(event.done_nbytes)}) are finished from an earlier run" if event.done_shards else ""
        unit = UNITS_OF.get(event.what)
        counted = f"{event.shards} {unit}{'' if event.shards == 1 else 's'}, " if unit else ""
        line = f"{event.what} {counted}{size(event.nbytes)}{kept}"
        self._say("started", asdict(event), *([line] if kept or not self._animated else ()))
        if self._animated:
            self._draw(self._meter)

    def _progress(self, event: Progress) -> None:
        if self._meter is None or not self._live:  # a worker that has not yet heard of the end
            return
        now = self._clock()
        self._meter.update(event, now)
        interval = JSON_INTERVAL if self.json else BAR_INTERVAL if self._animated else LINE_INTERVAL
        if self.quiet or not self._progress_wanted or now - self._shown_at < interval:
            return
        self._shown_at = now
        (self._draw if self._animated else self._print_meter)(self._meter)

    def _shard_done(self, event: ShardDone) -> None:
        if self._meter is None or not self._live:
            return
        now = self._clock()
        self._meter.finish(event, now)
        line = f"[{clock_face(now - self._meter.begun)}] {event.name}: {event.index} of {shards(event.shards)}, {size(event.nbytes)}"
        line += f", sha256 {event.sha256}" if self.verbose else ""
        wanted = self.verbose or (not self._animated and self._progress_wanted)
        self._say("shard", asdict(event), *([line] if wanted else ()))

    def _read_back(self, event: ReadingBack) -> None:
        if self._meter is not None:
            self._meter.reading_back = True
        self._say("reading_back", asdict(event), *(() if self._animated else [f"Reading back {size(event.nbytes)}"]))

    def _note(self, event: Note) -> None:
        if self.json and not self.quiet:
            self._emit(self._err, "note", asdict(event))  # beside the data, as errors are
        elif event.warning or not self.quiet:
            self._narrate(event.text, label="warning" if event.warning else "")

    def _report(self, error: LlavaWeightsError | Interrupted, raised: BaseException) -> int:
        trace = _trace(raised) if self._traces else None
        with self._turn():
            self._end()
            written = self._written(error)
            if self.json:
                document = {"code": error.exit_code, "what": error.what, "facts": error.facts, "hint": error.hint, "written": written}
                self._emit(self._err, "error", document | ({"traceback": trace} if trace else {}))
                self._summary["error"] = document
            else:
                self._narrate(*(trace or "").splitlines())
                self._explain(error, written)
        return error.exit_code

    def _explain(self, error: LlavaWeightsError | Interrupted, written: str | None) -> None:
        if isinstance(error, Interrupted):
            self._narrate(sentences(error.what[:1].upper() + error.what[1:], error.hint, written))
            return
        self._narrate(error.what, label="error")
        self._narrate(*two_columns(list(error.facts.items())))
        if last := sentences(error.hint, written):
            self._narrate("")
            self._narrate(last, label="hint" if error.hint else "")

    def _written(self, error: LlavaWeightsError | Interrupted) -> str | None:
        """What lies on disk now: as the writer says, else by the events. None where the command writes nothing."""
        interrupted = isinstance(error, Interrupted)
        if not self.writes or not (interrupted or error.exit_code in WRITING_FAILED):
            return error.kept
        writing = self._meter if self._meter is not None and self._meter.started.what == "Writing" else None
        seen = f"{writing.finished} are finished and kept" if writing else "Nothing was written"
        return sentences(error.kept or seen, "Run the same command to continue" if interrupted else None)

    def _end(self) -> None:
        self._live = False
        self._erase()

    def _draw(self, meter: Meter) -> None:
        room = _columns(self._err) - len("^C ")  # what a terminal echoes would wrap, and the bar stay; so would a full last column
        line = meter.bar(self._clock(), room, ascii_only=not _blocks(self._err))
        self._bar_shown = True  # before the write, which Ctrl-C may cut
        _write(self._err, f"\r{line}\x1b[K")

    def _erase(self) -> None:
        if self._bar_shown:
            self._bar_shown = False
            _write(self._err, "\r\x1b[K")

    def _say(self, kind: str, document: Mapping[str, Any], *lines: str) -> None:
        if self.json and not self.quiet:
            self._emit(self._out, kind, document)
        elif lines and not self.quiet:
            self._narrate(*lines)

    def _narrate(self, *lines: str, label: str = "", word: str = "", paint: str = "") -> None:
        """Lines for people, a label in its colour before each, or `word` in them in its, or all in the colour `paint`."""
        self._erase()
        start = f"{self._painted(label, '', COLOURS[label], self._err)}: " if label else ""
        paint = paint or COLOURS.get(word, "")
        _write(self._err, "".join(f"{start}{self._painted(clean(line), word, paint, self._err)}\n" for line in lines))

    def _painted(self, line: str, word: str, paint: str, stream: TextIO | None) -> str:
        """`line` with its first `word` in a colour, or the whole line where there is none."""
        if not (paint and self._coloured(stream)):
            return line
        indent = line[: len(line) - len(line.lstrip())]
        first, found, rest = (indent, word, line[len(indent) + len(word) :]) if word else ("", line, "")
        return f"{first}\x1b[{paint}m{found}\x1b[0m{rest}" if line.startswith(first + found) else line

    def _coloured(self, stream: TextIO | None) -> bool:
        if self._color != "auto":
            return self._color == "always"
        return not os.environ.get("NO_COLOR") and (_is_terminal(stream) or _set("FORCE_COLOR"))

    def _emit(self, stream: TextIO | None, kind: str, document: Mapping[str, Any]) -> Exception | None:
        head = {"type": kind, "schema": JSON_SCHEMA}
        line = jsonlib.dumps(_plain(head | dict(document) | head), allow_nan=False)
        return _write(stream, line.replace("##", "#\\u0023") + "\n")  # the same text, and no command to a CI


def _not_taken(failure: Exception) -> OutputError | None:
    """The error for data that stdout can't take; a reader that closed the pipe is none."""
    if not isinstance(failure, OSError) or isinstance(failure, BrokenPipeError):
        return None
    return OutputError(f"standard output can't be written: {failure.strerror}", hint="check the disk or the program that it goes to")


def clean(text: str) -> str:
    """`text` as it may be shown: no access tokens, nothing that moves the cursor, reorders the line or commands a CI."""
    return command_free(visible(redact(text)))


def _clean_lines(text: str | Sequence[str]) -> str:
    lines = text.removesuffix("\n").split("\n") if isinstance(text, str) else text
    return "".join(clean(line) + "\n" for line in lines)


def _plain(value: object) -> object:
    """What JSON can hold: no NaN (a word instead), no paths, no tokens."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case Mapping():
            return {redact(str(key)): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return redact(str(value))


def versions() -> dict[str, str]:
    """What a bug report should name; imports none of the heavy packages."""
    found = {"llava-weights": __version__, "platform": sys.platform}
    with suppress(ImportError):  # a half-installed dependency may be the very reason for the report
        from ..checkpoint.manifest import environment

        found |= environment()
    return found


def _save_traceback(found: str, error: BaseException) -> str:
    """The path of a file that can go into a bug report, or why there is none."""
    about = [f"command: {shlex.join(sys.argv)}", f"versions: {found}", ""]
    try:
        descriptor, path = tempfile.mkstemp(prefix="llava-weights-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(_clean_lines("\n".join([*about, _trace(error)])))
    except OSError as error:
        return f"could not be saved: {error.strerror}; `-v` shows it"
    return path


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _write(stream: TextIO | None, text: str) -> Exception | None:
    """Write what the stream's encoding can hold, escapes for the rest. A stream that fails is silenced and the reason returned."""
    if stream is None:  # the descriptor was closed before the program began
        return None
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError) as error:  # ValueError: the file object is closed
        with suppress(OSError, ValueError):  # or the interpreter would fail at exit on what is still buffered, with code 120
            descriptor, null = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
        return error
    return None


def _set(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def _is_terminal(stream: TextIO | None) -> bool:
    with suppress(ValueError):  # a closed file
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    return False


def _columns(stream: TextIO | None) -> int:
    with suppress(OSError, ValueError):
        return int(os.environ.get("COLUMNS", 0)) or (stream and os.get_terminal_size(stream.fileno()).columns) or 80
    return 80


def _blocks(stream: TextIO | None) -> bool:
    """Whether the encoding has the characters that tqdm draws a smooth bar with."""
    with suppress(UnicodeEncodeError):
        return bool("\u2588\u258f".encode(getattr(stream, "encoding", None) or "utf-8"))
    return False
