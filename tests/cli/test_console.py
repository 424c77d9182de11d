"""What the user sees, word for word, in every mode; and that a terminal or pipe that fails never changes the outcome of a run."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llava_weights.cli.console import Console
from llava_weights.errors import HubError, InputError, Interrupted, LlavaWeightsError, OutputError, UsageError, VerificationError
from llava_weights.events import Note, Progress, ReadingBack, ShardDone, Started
from llava_weights.text import duration, size, visible

GB = 10**9
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Clock:
    """Time that passes when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal; `lines` is what one would see on it, current line included."""

    encoding: str = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        return rendered(self.getvalue())


def rendered(text: str) -> list[str]:
    """What a terminal shows after `text`: carriage returns overwrite, `CSI K` clears to the end, colours show nothing."""
    lines, column = [""], 0
    for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.|\n", text, re.DOTALL):
        if token == "\n":
            lines.append("")
            column = 0
        elif token == "\r":
            column = 0
        elif token == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif not token.startswith("\x1b"):
            lines[-1] = lines[-1][:column] + token + lines[-1][column + 1 :]
            column += 1
    return lines


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "LLAVA_WEIGHTS_DEBUG", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(clock: Clock) -> Callable[..., tuple[Any, io.StringIO, io.StringIO]]:
    """A console on two streams in memory: `console, out, err = make(json=True)`; `terminal=True` makes stderr one."""

    def build(*, terminal: bool = False, **modes: bool) -> tuple[Console, io.StringIO, io.StringIO]:
        out, err = io.StringIO(), Terminal() if terminal else io.StringIO()
        return Console(out=out, err=err, clock=clock, **modes), out, err

    return build


def write_three_shards(console: Console, clock: Clock, *, step: float = 5.0) -> None:
    """26 GB in three shards at 200 MB/s, an event every `step` seconds, as `execute` sends them."""
    console.plan([("base", "llama-13b"), ("", "LLaMA 13B, 26.0 GB"), ("output", "out")], {"command": "apply-delta", "nbytes": 26 * GB})
    console.on_event(Started(3, 26 * GB))
    done = 0
    for index, (name, nbytes) in enumerate(zip(SHARDS, (10 * GB, 10 * GB, 6 * GB), strict=True), 1):
        end = done + nbytes
        while done < end:
            clock.now += step
            done = min(end, done + int(step * 200e6))
            console.on_event(Progress(done, name))
        console.on_event(ShardDone(name, index, 3, nbytes, f"{index}" * 64))
    console.summary(["Wrote out: 3 shards, 26.0 GB", "  checksums in out/SHA256SUMS", "Next: ..."], {"out": "out", "shards": 3}, path="out")
    assert console.end(0) == 0
    console.close()


# Modes


def test_off_a_terminal_a_run_is_a_log(make: Any, clock: Clock) -> None:
    console, out, err = make()
    write_three_shards(console, clock)
    assert out.getvalue() == ""
    assert err.getvalue() == (
        "Plan\n"
        "  base    llama-13b\n"
        "          LLaMA 13B, 26.0 GB\n"
        "  output  out\n"
        "Writing 3 shards, 26.0 GB\n"
        "[0:30] 6.0/26.0 GB 23% 200 MB/s, about 1:40 left\n"
        "[0:50] model-00001-of-00003.safetensors: 1 of 3 shards, 10.0 GB\n"
        "[1:00] 12.0/26.0 GB 46% 200 MB/s, about 1:10 left\n"
        "[1:30] 18.0/26.0 GB 69% 200 MB/s, about 0:40 left\n"
        "[1:40] model-00002-of-00003.safetensors: 2 of 3 shards, 10.0 GB\n"
        "[2:00] 24.0/26.0 GB 92% 200 MB/s, about 0:10 left\n"
        "[2:10] model-00003-of-00003.safetensors: 3 of 3 shards, 6.0 GB\n"
        "Wrote out: 3 shards, 26.0 GB\n"
        "  checksums in out/SHA256SUMS\n"
        "Next: ...\n"
    )


def test_verbose_shows_digests(make: Any, clock: Clock) -> None:
    console, _, err = make(verbose=True)
    write_three_shards(console, clock)
    assert f"[0:50] {SHARDS[0]}: 1 of 3 shards, 10.0 GB, sha256 {'1' * 64}\n" in err.getvalue()


def test_quiet_prints_the_path_alone(make: Any, clock: Clock) -> None:
    console, out, err = make(quiet=True, terminal=True)
    console.on_event(Note("a fact"))
    write_three_shards(console, clock)
    assert (out.getvalue(), err.getvalue()) == ("out\n", "")


def test_quiet_keeps_warnings(make: Any) -> None:
    console, out, err = make(quiet=True)
    console.plan([("base", "b"), ("warning", "the base is odd"), ("note", "n")], {})
    console.on_event(Note("careful", warning=True))
    assert (out.getvalue(), err.getvalue()) == ("", "warning: the base is odd\nwarning: careful\n")


@pytest.mark.parametrize("json_too", [False, True])
def test_no_progress(make: Any, clock: Clock, json_too: bool) -> None:
    for terminal in (False, True):
        console, out, err = make(terminal=terminal, progress=False, json=json_too)
        write_three_shards(console, clock)
        assert ESCAPE.sub("", err.getvalue()).splitlines() == ([] if json_too else EXPECTED_WITHOUT_PROGRESS)
        assert "progress" not in {json.loads(line)["type"] for line in out.getvalue().splitlines()}


EXPECTED_WITHOUT_PROGRESS = [
    "Plan",
    "  base    llama-13b",
    "          LLaMA 13B, 26.0 GB",
    "  output  out",
    "Writing 3 shards, 26.0 GB",
    "Wrote out: 3 shards, 26.0 GB",
    "  checksums in out/SHA256SUMS",
    "Next: ...",
]


def test_json_lines_end_in_a_summary_and_come_at_most_once_a_second(make: Any, clock: Clock) -> None:
    console, out, err = make(json=True, terminal=True)
    write_three_shards(console, clock, step=0.25)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert err.getvalue() == ""
    assert all(list(line)[:2] == ["type", "schema"] and line["schema"] == 1 for line in lines)
    assert lines[0] == {"type": "plan", "schema": 1, "command": "apply-delta", "nbytes": 26 * GB}
    started = {"shards": 3, "nbytes": 26 * GB, "done_shards": 0, "done_nbytes": 0, "what": "Writing", "to_read_back": 0, "to_follow": 0}
    assert lines[1] == {"type": "started", "schema": 1, **started}
    assert lines[-1] == {"type": "summary", "schema": 1, "exit_code": 0, "out": "out", "shards": 3}
    shards = [line for line in lines if line["type"] == "shard"]
    assert shards[1] == {"type": "shard", "schema": 1} | {"name": SHARDS[1], "index": 2, "shards": 3, "nbytes": 10 * GB, "sha256": "2" * 64}
    progress = [line for line in lines if line["type"] == "progress"]
    assert len(progress) == 130
    nine = {"type": "progress", "schema": 1, "nbytes": 9 * GB, "total": 26 * GB, "shard": SHARDS[0], "rate": 2e8, "remaining": 85.0}
    assert progress[44] == nine | {"read_back": 0, "to_read_back": 0}


def test_share_and_time_left_count_what_is_read_back(make: Any, clock: Clock) -> None:
    """Two shards of 10 GB, written at 200 MB/s; the first is read back at 100 MB/s meanwhile, the second at 250 after it is written."""
    console, _, err = make()
    console.on_event(Started(2, 20 * GB, to_read_back=20 * GB))
    for done, read_back in ((6, 0), (10, 0), (16, 3), (20, 5)):
        clock.now += 30
        console.on_event(Progress(done * GB, SHARDS[done > 10], read_back * GB))
    console.on_event(ReadingBack(15 * GB))
    for read_back in (10, 20):
        clock.now += 30
        console.on_event(Progress(0, SHARDS[1], read_back * GB))  # from another thread: nothing goes back
    assert err.getvalue().splitlines() == [
        "Writing 2 shards, 20.0 GB",
        "[0:30] 6.0/20.0 GB 15% 200 MB/s, about 2:50 left",
        "[1:00] 10.0/20.0 GB 25% 133 MB/s, about 3:45 left",
        "[1:30] 16.0/20.0 GB 47% 300 MB/s, about 1:10 left",
        "[2:00] 20.0/20.0 GB 62% 200 MB/s, about 1:15 left",
        "Reading back 15.0 GB",
        "[2:30] read back 10.0/20.0 GB 75% 167 MB/s, about 1:00 left",
        "[3:00] read back 20.0/20.0 GB 100% 333 MB/s, about 0:00 left",
    ]


def test_json_and_quiet_leave_the_summary(make: Any, clock: Clock) -> None:
    console, out, _ = make(json=True, quiet=True)
    write_three_shards(console, clock)
    assert [json.loads(line)["type"] for line in out.getvalue().splitlines()] == ["summary"]


@pytest.mark.parametrize("modes", [{}, {"quiet": True}, {"verbose": True}])
def test_document_is_data(make: Any, modes: dict[str, bool]) -> None:
    console, out, err = make(terminal=True, **modes)
    console.document("family  LLaVA 1.5\nrows    32000", {"family": "llava-v1.5"})
    assert (out.getvalue(), err.getvalue()) == ("family  LLaVA 1.5\nrows    32000\n", "")


def test_json_document_is_one_line_that_any_parser_takes(make: Any) -> None:
    console, out, _ = make(json=True)
    console.document("", {"path": Path("a/b"), "worst": float("nan"), "list": (1, 2.5, None, True), "name": "\u202eé\n\udcff"})
    console.end(4)
    assert out.getvalue().isascii()
    (line,) = out.getvalue().splitlines()
    expected = {"path": "a/b", "worst": "nan", "list": [1, 2.5, None, True], "name": "\u202eé\n\udcff"}
    assert json.loads(line, parse_constant=pytest.fail) == {"type": "summary", "schema": 1, "exit_code": 4} | expected


def test_notes(make: Any) -> None:
    console, _, err = make()
    console.on_event(Note("`config.json` names no tower"))
    console.on_event(Note("the base is bf16", warning=True))
    assert err.getvalue() == "`config.json` names no tower\nwarning: the base is bf16\n"
    console, out, err = make(json=True)
    console.on_event(Note("the base is bf16", warning=True))
    assert out.getvalue() == ""
    assert json.loads(err.getvalue()) == {"type": "note", "schema": 1, "text": "the base is bf16", "warning": True}


# Terminal


def test_bar_shows_where_it_is_and_leaves_nothing_behind(make: Any, clock: Clock) -> None:
    console, _, err = make(terminal=True)
    console.on_event(Started(3, 26 * GB))
    assert err.lines == [f"Writing   0% |{' ' * 77}| 0.0/26.0 GB  1/3  [0:00]"]
    clock.now += 34.25
    console.on_event(Progress(10_660_000_000, SHARDS[1]))
    bar = "Writing  41% |████████▌            | 10.7/26.0 GB  1/3  311 MB/s  [0:34]  0:49 left  model-00002-of-00003.safetensors"
    assert err.lines == [bar]
    clock.now += 0.05  # too soon for another drawing
    drawn = len(err.getvalue())
    console.on_event(Progress(11 * GB, SHARDS[1]))
    assert len(err.getvalue()) == drawn
    console.on_event(Note("a fact"))
    assert err.lines == ["a fact", ""]
    clock.now += 1
    console.on_event(Progress(12 * GB, SHARDS[2]))
    console.summary(["Wrote out"], {})
    assert err.lines == ["a fact", "Wrote out", ""]
    console.on_event(Progress(13 * GB, SHARDS[2]))  # of a worker that is late
    console.close()
    assert err.lines == ["a fact", "Wrote out", ""]


BARS = {  # what there is no room for is left out whole
    20: "Writing  34% |▎|",
    40: "Writing  34% |██▍    | 1/3  0:19 left",
    60: "Writing  34% |████▊         | 9.0/26.0 GB  1/3  0:19 left",
    80: "Writing  34% |█████▌          | 9.0/26.0 GB  1/3  900 MB/s  [0:10]  0:19 left",
    200: f"Writing  34% |{'█' * 35}▎{' ' * 66}| 9.0/26.0 GB  1/3  900 MB/s  [0:10]  0:19 left  {SHARDS[1]}",
}


@pytest.mark.parametrize("columns", BARS)
def test_bar_uses_the_width_of_the_terminal(make: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    console, _, err = make(terminal=True)
    console.on_event(Started(3, 26 * GB))
    clock.now += 10
    console.on_event(Progress(9 * GB, SHARDS[1]))
    assert err.lines == [BARS[columns]]
    assert len(err.lines[0]) == columns - 3 or columns == 20


def test_no_time_left_in_the_first_seconds_nor_before_work_of_another_speed(make: Any, clock: Clock) -> None:
    console, _, err = make(terminal=True)
    console.on_event(Started(1, 10 * GB, what="Checking", to_follow=30 * GB))
    for seconds, nbytes in ((4, 4), (4, 8)):
        clock.now += seconds
        console.on_event(Progress(nbytes * GB, SHARDS[0]))
        assert " left" not in err.lines[-1]
    assert err.lines[-1].startswith("Checking  20% |")
    console.on_event(Started(3, 30 * GB, 1, 10 * GB, to_read_back=10 * GB))
    assert err.lines[-1].startswith("Writing  25% |")
    clock.now += 4
    console.on_event(Progress(11 * GB, SHARDS[1]))
    assert " left" not in err.lines[-1]
    clock.now += 4
    console.on_event(Progress(12 * GB, SHARDS[1]))
    assert err.lines[-1].endswith(f"12.0/30.0 GB  2/3  250 MB/s  [0:16]  1:52 left  {SHARDS[1]}")  # since the run began


def test_reading_back_goes_on_in_the_same_bar(make: Any, clock: Clock) -> None:
    console, _, err = make(terminal=True)
    console.on_event(Started(2, 20 * GB, to_read_back=20 * GB))
    clock.now += 30
    console.on_event(Progress(20 * GB, SHARDS[1], 5 * GB))
    console.on_event(ReadingBack(15 * GB))
    clock.now += 30
    console.on_event(Progress(20 * GB, SHARDS[1], 10 * GB))
    assert len(err.lines) == 1
    assert err.lines[0].startswith("Reading back  75% |")
    assert "10.0/20.0 GB" in err.lines[0]


def test_bar_is_ascii_where_the_encoding_is(make: Any, clock: Clock) -> None:
    console, _, err = make(terminal=True)
    err.encoding = "ascii"
    console.on_event(Started(1, 100))
    clock.now += 1
    console.on_event(Progress(50, "\u00e4.safetensors"))
    (line,) = err.lines
    assert line.startswith("Writing  50% |####")
    assert line.endswith("    | 50/100 bytes  50 bytes/s  [0:01]  \\xe4.safetensors")
    assert err.getvalue().isascii()


def test_bar_is_closed_before_an_error(make: Any, clock: Clock) -> None:
    console, _, err = make(terminal=True)
    console.on_event(Started(3, 26 * GB))
    console.error(InputError("no"))
    assert err.lines == ["error: no", ""]
    clock.now += 1
    console.on_event(Progress(GB, SHARDS[0]))  # of a worker that has not heard of it
    console.on_event(ShardDone(SHARDS[0], 1, 3, GB, "0"))
    assert err.lines == ["error: no", ""]


def test_an_empty_output_has_a_bar_too(make: Any) -> None:
    console, _, err = make(terminal=True)
    console.on_event(Started(0, 0))
    assert err.lines == [f"Writing 100% |{' ' * 84}| 0/0 bytes  [0:00]"]


def test_resumed_work_is_named_and_does_not_count_as_speed(make: Any, clock: Clock) -> None:
    console, _, err = make(terminal=True)
    console.on_event(Started(3, 26 * GB, 1, 10 * GB))
    assert err.lines[0] == "Writing 3 shards, 26.0 GB; 1 (10.0 GB) are finished from an earlier run"
    clock.now += 10
    console.on_event(Progress(11 * GB, SHARDS[1]))
    assert "11.0/26.0 GB  2/3  100 MB/s  [0:10]  2:30 left" in err.lines[1]


def read_to_the_end(master: int) -> bytes:
    data = b""
    try:
        while piece := os.read(master, 65536):
            data += piece
    except OSError:  # EIO: how Linux says that the other side is closed
        pass
    os.close(master)
    return data


def test_real_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a pseudo-terminal: its width is asked for, the bar is there, and an error finds a clean line."""
    import fcntl
    import struct
    import termios

    monkeypatch.delenv("COLUMNS")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    with open(slave, "w", encoding="utf-8") as err:
        console = Console(err=err, out=io.StringIO())
        console.on_event(Started(3, 26 * GB))
        console.error(InputError("no", hint="yes"))
    shown = read_to_the_end(master).decode()
    assert f"Writing   0% |{' ' * 17}| 0.0/26.0 GB  1/3  [0:00]" in shown
    assert rendered(shown.replace("\r\n", "\n")) == ["error: no", "", "hint: yes", ""]
    assert "\x1b[1;31merror\x1b[0m: no" in shown


# Colour


def everything(console: Console, clock: Clock) -> None:
    console.on_event(Note("careful", warning=True))
    write_three_shards(console, clock)
    console.error(InputError("`a` is damaged", facts={"found": 3}, hint="get it again"))


@pytest.mark.parametrize(
    ("terminal", "environment", "coloured", "bar"),
    [
        (True, {}, True, True),
        (True, {"NO_COLOR": "1"}, False, True),
        (True, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False, True),
        (True, {"TERM": "dumb"}, False, False),
        (False, {}, False, False),
        (False, {"FORCE_COLOR": "0"}, False, False),
        (False, {"FORCE_COLOR": "1"}, True, False),
        (True, {"color": "never", "FORCE_COLOR": "1"}, False, True),
        (False, {"color": "always", "NO_COLOR": "1"}, True, False),
    ],
)
def test_colour_and_bar(make: Any, clock: Clock, monkeypatch: Any, terminal: bool, environment: Any, coloured: bool, bar: bool) -> None:
    """`color` is the option, the others are variables."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    console, _, err = make(terminal=terminal, color=environment.get("color", "auto"))
    everything(console, clock)
    found = set(ESCAPE.findall(err.getvalue()))
    assert ("\x1b[1;31m" in found, "\x1b[33m" in found, "\x1b[36m" in found) == (coloured,) * 3
    assert ("\r" in err.getvalue(), "|" in err.getvalue(), "\x1b[K" in found) == (bar,) * 3
    words = re.findall(r"\x1b\[[0-9;]+m(.*?)\x1b\[0m", err.getvalue())
    assert words == (["warning", "error", "hint"] if coloured else [])


# Errors

EXAMPLE = InputError(
    "the base has 32001 rows in `model.embed_tokens.weight`, this delta was made for 32000",
    facts={"base": "vicuna-13b-v0 [32001, 5120]", "delta size": "[32003, 5120]"},
    hint="use the original LLaMA-13B weights as `--base`, not Vicuna",
)


def test_error_grammar(make: Any) -> None:
    console, out, err = make()
    console.writes = True
    assert console.error(EXAMPLE) == 3
    assert out.getvalue() == ""
    assert err.getvalue() == (
        "error: the base has 32001 rows in `model.embed_tokens.weight`, this delta was made for 32000\n"
        "  base        vicuna-13b-v0 [32001, 5120]\n"
        "  delta size  [32003, 5120]\n"
        "\n"
        "hint: use the original LLaMA-13B weights as `--base`, not Vicuna. Nothing was written\n"
    )


def test_json_error(make: Any) -> None:
    console, out, err = make(json=True, terminal=True)
    console.writes = True
    console.error(EXAMPLE)
    expected = {"code": 3, "what": EXAMPLE.what, "facts": EXAMPLE.facts, "hint": EXAMPLE.hint, "written": "Nothing was written"}
    assert out.getvalue() == ""
    assert json.loads(err.getvalue()) == {"type": "error", "schema": 1} | expected


def test_quiet_errors_are_the_same(make: Any) -> None:
    console, _, loud = make()
    console.error(EXAMPLE)
    console, _, silent = make(quiet=True)
    console.error(EXAMPLE)
    assert loud.getvalue() == silent.getvalue()


@pytest.mark.parametrize(
    ("error", "writes", "end"),
    [
        (InputError("x", hint="y"), False, "\n\nhint: y\n"),
        (InputError("x"), False, "error: x\n"),
        (InputError("x"), True, "\n\nNothing was written\n"),
        (OutputError("x", hint="really?"), True, "\n\nhint: really? Nothing was written\n"),
        (HubError("x", hint="y"), True, "\n\nhint: y. Nothing was written\n"),
        (UsageError("x", hint="y"), True, "\n\nhint: y\n"),
        (VerificationError("x", hint="y"), True, "\n\nhint: y\n"),
        (Interrupted("stopped"), False, "Stopped\n"),
        (Interrupted("stopped"), True, "Stopped. Nothing was written. Run the same command to continue\n"),
    ],
)
def test_what_was_written(make: Any, error: LlavaWeightsError, writes: bool, end: str) -> None:
    console, _, err = make()
    console.writes = writes
    assert console.error(error) == error.exit_code
    assert err.getvalue().endswith(end)


def test_the_words_of_the_writer_win_and_the_events_know_the_rest(make: Any) -> None:
    for kept, expected in [(None, "1 of 3 shards (10.0 GB) are finished and kept"), ("1 of 3 shards are kept in `out.partial`",) * 2]:
        for error in (OutputError("disk full", hint="free some"), Interrupted("stopped", exit_code=143)):
            error.kept = kept
            console, _, err = make()
            console.writes = True
            console.on_event(Started(3, 26 * GB))
            console.on_event(ShardDone(SHARDS[0], 1, 3, 10 * GB, "0"))
            assert console.error(error) in (5, 143)
            last = err.getvalue().splitlines()[-1]
            stopped = f"Stopped. {expected}. Run the same command to continue"
            assert last == (stopped if error.exit_code == 143 else f"hint: free some. {expected}")


def test_files_that_were_only_read_are_not_called_kept(make: Any) -> None:
    """As those of `--check-inputs`."""
    console, _, err = make()
    console.writes = True
    console.on_event(Started(2, 26 * GB, what="Reading"))
    console.on_event(Progress(13 * GB, "pytorch_model.bin"))
    console.error(InputError("x", hint="y"))
    assert err.getvalue().endswith("\n\nhint: y. Nothing was written\n")


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_tracebacks_only_when_asked_for(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    console, _, err = make()
    console.error(raised(InputError("x")))
    assert "Traceback" not in err.getvalue()
    console, _, err = make(verbose=True)
    console.error(raised(InputError("x")))
    assert err.getvalue().startswith("Traceback (most recent call last)")
    assert err.getvalue().endswith("\nerror: x\n")
    monkeypatch.setenv("LLAVA_WEIGHTS_DEBUG", "1")
    console, _, err = make(json=True)
    console.error(raised(InputError("x")))
    assert json.loads(err.getvalue())["traceback"].startswith("Traceback")


def test_a_bug_is_saved_for_the_report(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["llava-weights", "inspect", "https://user:secret@host/x"])
    console, _, err = make()
    assert console.unexpected(raised(ValueError("hf_aBcDefGHijKlmnOPqrSTuvWXyzAbCdeFGhI was \x1b[2J\nsecond line"))) == 1
    (saved,) = tmp_path.iterdir()
    text = saved.read_text()
    assert "command: llava-weights inspect" in text
    assert "python 3." in text
    assert text.splitlines()[-2:] == ["ValueError: hf_*** was \\x1b[2J", "second line"]
    assert "secret" not in text
    lines = err.getvalue().splitlines()
    assert lines[0] == "error: unexpected ValueError: hf_*** was \\x1b[2J"
    assert lines[1] == f"  traceback  {saved}"
    assert lines[2].startswith("  versions   llava-weights ")
    assert lines[3:] == ["", "hint: this is a bug in llava-weights; please report it with the traceback"]
    console, _, err = make(verbose=True)
    console.unexpected(raised(ValueError("x")))
    assert "Traceback (most recent call last)" in err.getvalue()


def test_a_bug_without_a_place_to_save_is_still_reported(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    console, _, err = make(json=True)
    assert console.unexpected(raised(KeyError("x"))) == 1
    assert json.loads(err.getvalue())["facts"]["traceback"].startswith("could not be saved: No such file")


# Hostile text

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\rc\nd\u202ee\u200bf\u2028g\x9bh\x00\udcff"
SHOWN = r"a\x1b[2J\x1b]0;title\x07b\rc\nd\u202ee\u200bf\u2028g\x9bh\x00\udcff"


def test_nothing_that_a_file_says_reaches_the_terminal_raw(make: Any, clock: Clock) -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("Ünïcode 模型 🦙") == "Ünïcode 模型 🦙"
    console, out, err = make(terminal=True)
    clock.now += 1
    console.plan([(HOSTILE, HOSTILE)], {})
    console.on_event(Started(1, 100))
    clock.now += 1
    console.on_event(Progress(5, HOSTILE))
    console.on_event(ShardDone(HOSTILE, 1, 1, 5, HOSTILE))
    console.on_event(Note(HOSTILE))
    console.document(HOSTILE, {})
    console.error(InputError(HOSTILE, facts={HOSTILE: HOSTILE}, hint=HOSTILE))
    console.summary([HOSTILE], {})
    printed = re.sub(r"\x1b\[(K|0m|1;31m|36m)|[\r\n]", "", err.getvalue() + out.getvalue())
    assert printed.isprintable()
    assert f"error: {SHOWN}" in err.lines
    assert f"  {SHOWN}  {SHOWN}" in err.lines


@pytest.mark.parametrize("modes", [{}, {"json": True}])
def test_tokens_are_not_shown(make: Any, clock: Clock, modes: dict[str, bool]) -> None:
    token = "hf_" + "Abc123" * 5
    console, out, err = make(**modes)
    console.plan([("source", token)], {token: [token]})
    console.on_event(Note(token))
    console.document(token, {"a": {"b": token}})
    console.error(HubError(token, facts={"url": token}, hint=token))
    console.summary([token], {"a": token}, path=token)
    assert token not in out.getvalue() + err.getvalue()
    assert "hf_***" in out.getvalue()
    assert "hf_***" in err.getvalue()


def test_a_narrow_encoding_never_raises(make: Any) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    Console(out=stream, err=stream).document("模型 é", {})
    assert raw.getvalue() == b"\\u6a21\\u578b \\xe9\n"


# Streams that fail

JOB = """
import sys
from llava_weights.cli.console import Console
from llava_weights.events import *
console = Console(json="json" in sys.argv, quiet="quiet" in sys.argv)
sys.stdin.readline()
console.plan([("base", "b")], {})
console.on_event(Started(1, 10))
console.on_event(ShardDone("s", 1, 1, 10, "0"))
console.document("x" * 200_000, {"x": "x" * 200_000})
console.summary(["Wrote"], {}, path="out")
console.close()
open("done", "w").close()
"""


@pytest.mark.parametrize("mode", ["human", "json", "quiet"])
@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_reader_that_left_changes_nothing(tmp_path: Path, mode: str, closed: str) -> None:
    """A real pipe whose reading end is closed before the first word: exit code 0, the job done, no traceback on the other stream."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", JOB, mode], cwd=tmp_path, env=environment, text=True, **pipes)
    getattr(process, closed).close()
    setattr(process, closed, None)
    out, err = process.communicate("go\n", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "done").exists()
    assert "Traceback" not in (out or "") + (err or "")
    assert "Broken" not in (out or "") + (err or "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_data_that_could_not_be_written_is_an_error_narration_is_not() -> None:
    with open("/dev/full", "w") as full:
        Console(err=full, out=io.StringIO()).on_event(Note("unheard"))
    with open("/dev/full", "w") as full, pytest.raises(OutputError, match="standard output can't be written: No space left"):
        Console(out=full, err=io.StringIO()).document("data", {})


def test_closed_and_missing_streams(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    closed = io.StringIO()
    closed.close()
    everything(Console(out=closed, err=closed, clock=clock), clock)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    console = Console(clock=clock)
    everything(console, clock)
    assert console.error(OutputError("x")) == 5


# Status signal


@pytest.fixture
def _signals_kept() -> Any:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.usefixtures("_signals_kept")
def test_status_signal(make: Any, clock: Clock) -> None:
    console, _, err = make(quiet=True)
    console.install_status_signal()
    signal.raise_signal(signal.SIGUSR1)
    console.on_event(Started(3, 26 * GB))
    clock.now += 10
    console.on_event(Progress(2 * GB, SHARDS[0]))
    signal.raise_signal(signal.SIGUSR1)
    console.close()
    assert err.getvalue() == "Nothing is being written yet\n[0:10] 2.0/26.0 GB 7% 200 MB/s, about 2:00 left\n"


@pytest.mark.usefixtures("_signals_kept")
def test_status_signal_in_the_middle_of_a_line(clock: Clock) -> None:
    """The handler runs in the thread that is printing: it must neither wait for itself nor write into the line."""

    class Signalled(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("first"):
                signal.raise_signal(signal.SIGUSR1)
            return super().write(text)

    err = Signalled()
    console = Console(err=err, out=io.StringIO(), clock=clock)
    console.install_status_signal()
    console.on_event(Note("first"))
    console.on_event(Note("second"))
    console.close()
    assert err.getvalue() == "first\nNothing is being written yet\nsecond\n"


def test_status_signal_outside_the_main_thread_is_left_alone(make: Any) -> None:
    console, _, _ = make()
    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=console.install_status_signal)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) == before


# Arithmetic


def test_rate_follows_the_last_half_minute(make: Any, clock: Clock) -> None:
    """A minute at 100 MB/s, then 10 MB/s: half a minute later nothing of the fast time is left in the estimate."""
    console, out, _ = make(json=True)
    console.on_event(Started(1, 100 * GB))
    done = 0
    for second in range(1, 101):
        clock.now += 1
        done += 10**8 if second <= 60 else 10**7
        console.on_event(Progress(done, "s"))
    rates = [line["rate"] for line in map(json.loads, out.getvalue().splitlines()) if line["type"] == "progress"]
    assert set(rates[:60]) == {1e8}
    assert all(before > after for before, after in pairwise(rates[59:90]))
    assert set(rates[90:]) == {1e7}


def test_progress_never_goes_back_nor_beyond(make: Any, clock: Clock) -> None:
    console, out, _ = make(json=True)
    console.on_event(Started(1, 100))
    for nbytes in (50, 40, 60, 400):
        clock.now += 1
        console.on_event(Progress(nbytes, "s"))
    assert [line["nbytes"] for line in map(json.loads, out.getvalue().splitlines()) if line["type"] == "progress"] == [50, 50, 60, 100]


def test_shards_of_a_pool_count_as_progress(make: Any, clock: Clock) -> None:
    """Distributed workers send no bytes on the way."""
    console, _, err = make(terminal=True)
    console.on_event(Started(2, 100))
    clock.now += 10
    console.on_event(ShardDone("a", 1, 2, 50, "0"))
    clock.now += 1
    console.on_event(Progress(0, "b"))
    assert "| 50/100 bytes" in err.lines[-1]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        *((0, "0 bytes"), (1, "1 byte"), (17, "17 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (12_345, "12.3 kB")),
        *((99_949, "99.9 kB"), (99_950, "100 kB"), (999_499, "999 kB"), (999_500, "1.0 MB"), (949_000_000, "949 MB")),
        *((26_032_000_000, "26.0 GB"), (130 * GB, "130 GB"), (1_500 * GB, "1.5 TB"), (2_000_000 * GB, "2.0 PB")),
    ],
)
def test_size(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0.0 s"), (0.84, "0.8 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1m 00s"), (84, "1m 24s")),
        *((3599.6, "1h 00m"), (7380, "2h 03m"), (180_000, "50h 00m")),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_many_threads_leave_whole_lines(make: Any) -> None:
    """Each write is split by the stream, so that lines would mix if two threads were let in at once."""

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            for char in text:
                super().write(char)
            return len(text)

    err, out = Slow(), Slow()
    console = Console(json=True, err=err, out=out)
    console.on_event(Started(400, 400))
    start = threading.Barrier(4)

    def work(worker: int) -> None:
        start.wait()
        for number in range(100):
            console.on_event(Note(f"{worker}.{number}"))
            console.on_event(ShardDone(f"{worker}.{number}", number, 400, 1, "0"))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(interval)
    expected = {f"{worker}.{number}" for worker in range(4) for number in range(100)}
    assert {json.loads(line)["text"] for line in err.getvalue().splitlines()} == expected
    assert {json.loads(line).get("name") for line in out.getvalue().splitlines()} == expected | {None}
    console.writes = True
    console.error(OutputError("full"))
    assert json.loads(err.getvalue().splitlines()[-1])["written"] == "400 of 400 shards (400 bytes) are finished and kept"
