"""One run of a command: seconds, memory and bytes of its whole process tree, from a cold or a warm page cache. Linux only."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

INTERVAL = 0.02  # seconds between two looks at the process tree
KIB = 1024


class Failed(Exception):
    """A command did not end well; the text is what it said last."""


@dataclass(frozen=True)
class Run:
    """Figures of one run, or of several commands one after another: seconds, and bytes.

    `settle` is the time that a `sync` takes afterwards: what the command left in the page cache, not yet on the disk. `anonymous` and
    `file` are peaks of their own, so they may add up to more than `peak`, the sum of VmHWM over the processes alive at one time.
    `disk_read` and `disk_written` are what reached the block layer (a page written is counted when it becomes dirty),
    `asked_read` and `asked_written` what was passed to read and write calls (memory maps do not appear there).
    """

    wall: float
    settle: float
    cpu: float
    peak: int
    anonymous: int
    file: int
    disk_read: int
    disk_written: int
    asked_read: int
    asked_written: int


PEAKS = {"peak", "anonymous", "file"}
IO = {"disk_read": "read_bytes", "disk_written": "write_bytes", "asked_read": "rchar", "asked_written": "wchar"}
MEMORY = {"peak": "VmHWM", "anonymous": "RssAnon", "file": "RssFile"}


def measure(commands: Sequence[Sequence[str]], inputs: Iterable[Path], out: Path, *, warm: bool = False) -> Run:
    """Run the commands one after another, with `out` new and empty: times and bytes are summed, peaks are the highest.

    The inputs are read once before (warm) or dropped from the page cache (cold), before each command too: what one step wrote is read
    by the next as it was left. Raises Failed.
    """
    shutil.rmtree(out, ignore_errors=True)
    (out / "temporary").mkdir(parents=True)
    files = [path for folder in inputs for path in sorted(folder.rglob("*")) if path.is_file()]
    os.sync()
    for path in files:
        (read if warm else forget)(path)
    runs = [run_one(command, out / "temporary") for command in commands]
    begun = time.perf_counter()
    os.sync()
    settle = time.perf_counter() - begun
    joined = {f.name: (max if f.name in PEAKS else sum)(getattr(run, f.name) for run in runs) for f in fields(Run)}
    return Run(**{**joined, "settle": settle})


def run_one(command: Sequence[str], temporary: Path) -> Run:
    """One fresh process and whatever it starts, watched until its end. Raises Failed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TMPDIR": str(temporary)}
    with tempfile.TemporaryFile() as errors:
        begun = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
        peaks = dict.fromkeys(MEMORY, 0)
        watcher = threading.Thread(target=watch, args=(process.pid, peaks, ended := threading.Event()))
        watcher.start()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        wall = time.perf_counter() - begun
        ended.set()
        watcher.join()
        counts = table(f"/proc/{process.pid}/io")  # of a process that has ended and those that it waited for
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise Failed(last_words(errors.read().decode(errors="replace")) or f"exit {process.returncode}")
    io = {name: counts.get(key, 0) for name, key in IO.items()}
    return Run(wall=wall, settle=0.0, cpu=usage.ru_utime + usage.ru_stime, **peaks, **io)


def watch(pid: int, peaks: dict[str, int], ended: threading.Event) -> None:
    """Raise `peaks` to what the tree under `pid` holds, every INTERVAL. VmHWM never falls, so the last look before the end counts."""
    while not ended.wait(INTERVAL):
        statuses = [table(f"/proc/{number}/status") for number in tree(pid)]
        for name, key in MEMORY.items():
            peaks[name] = max(peaks[name], KIB * sum(status.get(key, 0) for status in statuses))


def tree(pid: int) -> list[int]:
    """`pid` and its descendants that are alive."""
    found = [pid]
    for number in found:  # grows while it is walked
        for path in Path(f"/proc/{number}/task").glob("*/children"):
            try:
                found += map(int, path.read_text().split())
            except OSError:
                continue
    return found


def table(path: str) -> dict[str, int]:
    """The numbers of a /proc file of lines `name: number [unit]`; empty where the process is gone."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def read(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(8 << 20):
            pass


def forget(path: Path) -> None:
    """Drop a file, which is on the disk, from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def last_words(text: str) -> str:
    """The last line that is not a hint or empty: the error itself in a traceback, and `error: ...` of llava-weights."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("error:")), lines[-1] if lines else "")[:200]
