"""Where the processor time of a command goes, as JSON in the last line: `python benchmarks/phases.py OUTPUT ARGUMENTS-OF-llava-weights`.

The command runs in this process; each thread's own time is taken around what it calls, the kernel's share included. It measures the
llava_weights that is imported, so another checkout too (PYTHONPATH).
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# Phase, module, what is called. Of calls within calls each counts its own time alone.
CALLS = (
    ("importing torch", "tensors.dtypes", "load_torch"),  # first, since others take it from there; in a thread that has values to make
    ("reading inputs", "storage.reading", "Workspace.read"),
    ("looking for zeros", "tensors.holes", "Watch.look"),
    ("arithmetic", "write.shard", "make"),
    ("arithmetic", "write.windows_kept", "make"),
    ("checksums of kept windows", "write.windows_kept", "KeptWindows.add"),
    ("writing", "write.shard", "FileSink.write"),
    ("writing", "write.shard", "Sink.write"),  # of earlier versions
    ("sha256 of files, XXH3", "write.shard", "Pipeline._digest_file"),
    ("digests of tensors", "write.shard", "Pipeline._digest_tensors"),
    ("reading back", "write.read_back", "_read"),
    ("reading back", "write.read_back", "_read_open"),
    ("reading back", "write.execute", "digest_file"),
    ("reading back", "write.execute", "trusted"),
)
STARTING, REST = "starting, planning", "the rest"
BEGUN = time.perf_counter()
SPENT: Counter[str] = Counter()
HERE = threading.local()


def timed(phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, with the processor time of its thread added to `phase`, but what other timed calls within it take."""

    @functools.wraps(call)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        around, HERE.inner = getattr(HERE, "inner", 0.0), 0.0
        begun = time.thread_time()
        try:
            return call(*arguments, **named)
        finally:
            took = time.thread_time() - begun
            SPENT[phase] += took - HERE.inner
            HERE.inner = around + took

    return wrapped


def wrap(phase: str, module: str, name: str) -> None:
    """Time a call; nothing happens where this version has none of the name."""
    with suppress(AttributeError, ImportError):
        place: Any = __import__(f"llava_weights.{module}", fromlist=["_"])
        *outer, last = name.split(".")
        for part in outer:
            place = getattr(place, part)
        setattr(place, last, timed(phase, getattr(place, last)))


def main() -> None:
    out, arguments = Path(sys.argv[1]), sys.argv[2:]
    for phase, module, name in CALLS:
        wrap(phase, module, name)
    from llava_weights.cli import main as cli
    from llava_weights.write import execute

    inner = execute.write_shards

    def write_shards(*given: Any, **named: Any) -> Any:
        SPENT[STARTING] += time.process_time()
        HERE.started = time.perf_counter()
        return inner(*given, **named)

    execute.write_shards = write_shards
    sys.argv = ["llava-weights", *arguments, "-o", str(out), "-q"]
    os._exit = sys.exit  # type: ignore[assignment]
    try:
        cli.main()
    except SystemExit as error:
        if error.code:
            raise
    SPENT[REST] = time.process_time() - sum(SPENT.values())
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(json.dumps({"bytes": size, "wall": time.perf_counter() - BEGUN, "start": HERE.started - BEGUN, "phases": dict(SPENT)}))


if __name__ == "__main__":
    main()
