"""The bar of scripts and notebooks, without a terminal and in a made-up notebook."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import llava_weights as lw

ROOT = Path(__file__).resolve().parent.parent.parent
BASE, TUNED = (ROOT / "fixtures/A-delta-v0" / name for name in ("base-hf-bin", "target-307/llava-tiny-v0"))

CALLS: dict[str, Callable[[Path, lw.Listener], Any]] = {
    "Writing": lambda out, bar: lw.execute(lw.make_plan(BASE, max_shard_size=60_000), out, on_event=bar),
    "Reading": lambda out, bar: lw.verify(BASE, deep=True, on_event=bar),
    "Comparing": lambda out, bar: lw.diff(BASE, TUNED, on_event=bar),
}


@pytest.mark.parametrize("word", CALLS)
def test_without_a_terminal_the_last_line_is_full(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lw.ProgressBar() as bar:
        CALLS[word](tmp_path / "out", bar)
    out, err = capsys.readouterr()
    assert out == ""
    bars = [line for line in re.split(r"[\r\n]+", err) if line.startswith(f"{word}:")]
    assert "100%" in bars[-1]
    assert re.search(r"\d+k/\d+k \[", bars[-1])


def test_a_pool_reports_shards_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lw.ProgressBar() as bar, ThreadPoolExecutor(2) as pool:
        lw.execute(lw.make_plan(BASE, max_shard_size=60_000), tmp_path / "out", pool=pool, on_event=bar)
    assert "Writing: 100%" in capsys.readouterr().err


def told(*events: lw.Event, disable: bool | None = False) -> lw.ProgressBar:
    bar = lw.ProgressBar(disable=disable)
    for event in events:
        bar(event)
    return bar


def test_it_goes_on_from_an_earlier_run_and_never_back(capsys: pytest.CaptureFixture[str]) -> None:
    bar = told(lw.Started(4, 1000, done_shards=1, done_nbytes=250), lw.Progress(750, "b"), lw.Progress(500, "a"), lw.Progress(9000, "c"))
    text = capsys.readouterr().err
    assert [int(found) for found in re.findall(r"(\d+)%", text)] == [25, 100]
    bar(lw.Progress(1000, "late"))  # of a worker that has not yet heard of the end
    bar(lw.ShardDone("d", 4, 4, 250, "0" * 64))
    bar.close()
    assert capsys.readouterr().err == ""


def test_it_counts_what_is_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    started = lw.Started(2, 1000, done_shards=1, done_nbytes=500, to_read_back=500)
    told(started, lw.Progress(1000, "b", 0), lw.ReadingBack(500), lw.Progress(1000, "b", 250), lw.Progress(1000, "b", 600)).close()
    text = capsys.readouterr().err
    assert next(int(found) for found in re.findall(r"(\d+)%", text)) == 33
    assert "Reading back 500 bytes\n" in text
    assert "1.50k/1.50k" in text.splitlines()[-1]


def test_an_error_ends_the_bar_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        with lw.ProgressBar() as bar:
            bar(lw.Started(2, 1000))
            bar(lw.Progress(400, "a"))
            raise lw.OutputError("the disk is full")

    with pytest.raises(lw.OutputError):
        run()
    err = capsys.readouterr().err
    assert err.endswith("\n")
    assert "40%" in err.splitlines()[-1]


def test_notes_are_lines_that_move_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    bar = told(lw.Started(2, 1000), lw.Note("a fact"), lw.Note("look \x1b[2J at hf_" + "aB3" * 12, warning=True), lw.ReadingBack(1000))
    bar.close()
    err = capsys.readouterr().err
    assert "a fact\n" in err
    assert "warning: look \\x1b[2J at hf_***\n" in err
    assert "Reading back 1.0 kB\n" in err


def test_no_bar_where_none_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    for disable in (True, None):  # None: standard error is no terminal here
        told(lw.Started(2, 1000), lw.Progress(400, "a"), lw.Note("a fact"), lw.Progress(1000, "a"), disable=disable).close()
        assert capsys.readouterr().err == "a fact\n"


def test_any_thread_may_tell(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with lw.ProgressBar() as bar, ThreadPoolExecutor(8) as pool:
        bar(lw.Started(1, 1000))
        list(pool.map(lambda number: bar(lw.Progress(number + 1, "a")), range(1000)))
    assert "100%" in capsys.readouterr().err
    assert threading.active_count() == before


NOTEBOOK = """
import sys
from types import ModuleType, SimpleNamespace

shown = []

class Shell:
    config = {"IPKernelApp": {}}

class Widget:
    def __init__(self, **given):
        self.value, self.children, self.max, self.bar_style = 0, given.get("children"), given.get("max"), ""
        self.layout, self.style = SimpleNamespace(), SimpleNamespace()

def module(name, **members):
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(members)

module("IPython", get_ipython=Shell)
module("IPython.display", display=shown.append)
module("ipykernel.zmqshell")
module("ipywidgets", HBox=type("HBox", (Widget,), {}), HTML=Widget, FloatProgress=Widget)

import llava_weights as lw

assert "tqdm" not in sys.modules
bar = lw.ProgressBar()
assert "tqdm" not in sys.modules
with bar:
    lw.diff(sys.argv[1], sys.argv[1], on_event=bar)
assert len(shown) == 1, shown
(left, middle, right) = shown[0].children
print(left.value, middle.value == middle.max, middle.bar_style, right.value)
"""


def test_in_a_notebook_it_is_a_widget() -> None:
    done = subprocess.run([sys.executable, "-c", NOTEBOOK, str(BASE)], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert re.match(r"Comparing:\s100% True success\s+\d+k/\d+k\s\[", done.stdout), done.stdout
    assert done.stderr == ""
