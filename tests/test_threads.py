"""Whoever starts threads is left by none, whatever comes: signals, one after another, or no more threads to be had. And the process is
as it was before: its signals, torch's threads, its descriptors."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import llava_weights as lw
from llava_weights.errors import InputError, Interrupted, LlavaWeightsError, OutputError, shortage
from llava_weights.storage.threads import Shield, in_threads

ROOT = Path(__file__).resolve().parent.parent

# A tensor whose rows take their time, and a thread that sends SIGINT again and again.
SLOW = """
import os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
import llava_weights as lw
from llava_weights.checkpoint.checkpoint import Checkpoint
from llava_weights.formats.integer_delta import ToInteger
from llava_weights.tensors.lazy import LazyTensor

begun = threading.Event()

@dataclass(frozen=True, kw_only=True)
class Slow(LazyTensor):
    def rows_into(self, out, start, stop, work):
        begun.set()
        time.sleep(0.4)
        out[:] = bytes([0xAA]) * len(out)

def nag():
    begun.wait()
    for _ in range(60):  # all while the first rows are made
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.002)

opened = lw.open_checkpoint("source")
slow = replace(opened, tensors={f"layer.{n}.weight": Slow(dtype="F16", shape=(100, 100)) for n in range(4)})
pairs = {name: ToInteger(dtype="F16", shape=tensor.shape, tuned=tensor, base=None) for name, tensor in slow.tensors.items()}
packed = replace(slow, tensors=pairs)
before = threading.active_count()
nagging = threading.Thread(target=nag)
nagging.start()
try:
    CALL
except KeyboardInterrupt as error:
    said = getattr(error, "kept", "")
alive = threading.active_count() - before - nagging.is_alive()
files = [open(f"stranger{n}", "wb") for n in range(20)]
nagging.join()
time.sleep(0.6)
sizes = {os.path.getsize(f"stranger{n}") for n in range(20)}
print(alive, sizes, signal.getsignal(signal.SIGINT) is signal.default_int_handler, said)
"""
CALLS = {
    "execute": "lw.execute(lw.make_plan(slow), 'out')",
    "portion": "from llava_weights.write.portions import Portion, execute_portion; execute_portion(lw.make_plan(slow), 'out', Portion(1, 1))",  # noqa: E501
    "pool": "pool = ThreadPoolExecutor(2); before += 2; lw.execute(lw.make_plan(slow, max_shard_size='20kB'), 'out', pool=pool)",
    "diff": "lw.diff(slow, slow)",
    "integer": "lw.execute(lw.make_plan(packed), 'out')",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(4)
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({f"layer.{n}.weight": torch.randn(20, 30).half() for n in range(4)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def script(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_again_and_again(source: Path, call: str) -> None:
    """No thread is alive when the call has ended, and none ever writes into what is opened then."""
    done = script(SLOW.replace("CALL", CALLS[call]), source.parent)
    assert done.returncode == 0, done.stderr
    kept = "" if call == "diff" else r"\d of \d shards are kept in `out\.partial`; `out` was not touched"
    assert re.fullmatch(rf"0 \{{0\}} True {kept}\n", done.stdout), (done.stdout, done.stderr)
    assert not (source.parent / "out").exists()


NO_THREADS = """
import resource, threading
import llava_weights as lw

plan = lw.make_plan(lw.open_checkpoint("source"), jobs=6)
lw.execute(plan, "first")
before = threading.active_count()
threading.stack_size(256 << 20)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20), resource.RLIM_INFINITY))
try:
    lw.execute(plan, "out")
except lw.OutputError as error:
    print(threading.active_count() - before, error.exit_code, error.what, "|", error.kept)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
def test_no_more_threads(source: Path) -> None:
    done = script(NO_THREADS, source.parent)
    assert done.stdout.startswith("0 5 there can be no more threads | 0 of 1 shards are kept"), (done.stdout, done.stderr)


def test_an_interruption_is_no_error(source: Path, tmp_path: Path) -> None:
    """`except Exception` and `except LlavaWeightsError` let it through, and it says what lies on disk."""

    def stop(event: object) -> None:
        raise KeyboardInterrupt

    def run() -> None:
        try:
            lw.execute(lw.make_plan(lw.open_checkpoint(source)), tmp_path / "out", on_event=stop)
        except (Exception, LlavaWeightsError):
            pytest.fail("it was taken for an error")

    with pytest.raises(KeyboardInterrupt) as caught:
        run()
    assert isinstance(caught.value, Interrupted)
    assert (caught.value.exit_code, caught.value.kept) == (130, "0 of 1 shards are kept in `out.partial`; `out` was not touched")


def test_signals_wait_for_the_shield(tmp_path: Path) -> None:
    """Whatever a handler raises, and however often: once, at the end. Handlers that raise nothing are none of its business."""

    class Alarm(Exception):
        pass

    heard: list[int] = []

    def handler(number: int, frame: object) -> None:
        heard.append(number)
        if number != signal.SIGUSR2:
            raise Alarm(str(len(heard)))

    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        reached = []

        def shielded() -> None:
            with Shield() as outer, Shield() as inner:
                for number in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM):
                    os.kill(os.getpid(), number)
                    reached.append(inner.caught is outer.caught)

        with pytest.raises(Alarm, match="2"):
            shielded()
        assert (heard, reached) == ([signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM], [True] * 3)
        assert all(signal.getsignal(number) is handler for number in numbers)
        with pytest.raises(Alarm):
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def test_threads_give_results_in_order_and_the_first_failure() -> None:
    told: list[int] = []
    assert in_threads(lambda n: n * n, range(50), 4, then=told.append) == told == [n * n for n in range(50)]
    stopped = threading.Event()
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda n: 1 // (n - 3), range(1000), 2, stop=stopped.set)
    assert stopped.is_set()


PUBLIC: dict[str, Callable[[Path, Path], Any]] = {
    "make_delta": lambda a, out: lw.execute(lw.make_plan(lw.make_delta(lw.open_checkpoint(a), lw.open_checkpoint(a))), out),
    "apply_delta": lambda a, out: lw.apply_delta(lw.open_checkpoint(a), lw.open_checkpoint(a.with_name("delta-307-apr17"))),
    "diff": lambda a, out: lw.diff(lw.open_checkpoint(a), lw.open_checkpoint(a)),
    "verify": lambda a, out: lw.verify(a),
    "repair": lambda a, out: (lw.checksum(shutil.copytree(a, out)), os.truncate(out / "config.json", 3), lw.repair(out, a)),
    "which_base": lambda a, out: lw.which_base(a.with_name("delta-307-apr17"), [a]),
    "an error": lambda a, out: lw.execute(lw.make_plan(lw.make_delta(lw.open_checkpoint(a), lw.open_checkpoint(a))), a),
}


@pytest.mark.parametrize("function", PUBLIC)
def test_torch_has_as_many_threads_as_before(fixtures: Path, tmp_path: Path, function: str) -> None:
    source = fixtures / "A-delta-v0/base-hf-bin"
    before, own = torch.get_num_threads(), 3
    torch.set_num_threads(own)
    try:
        if function == "an error":
            with pytest.raises(LlavaWeightsError):
                PUBLIC[function](source, tmp_path / "out")
        else:
            PUBLIC[function](source, tmp_path / "out")
        assert torch.get_num_threads() == own
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("function", PUBLIC)
def test_no_descriptor_and_no_handler_stays(fixtures: Path, tmp_path: Path, function: str) -> None:
    source = fixtures / "A-delta-v0/base-hf-bin"
    handlers, alive = {number: signal.getsignal(number) for number in signal.valid_signals()}, threading.active_count()
    for number in range(2):  # the first call imports, and libraries may keep what they opened
        before = sorted(os.listdir("/proc/self/fd"))
        with suppress(LlavaWeightsError):
            PUBLIC[function](source, source if function == "an error" else tmp_path / str(number))
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    assert threading.active_count() == alive


@pytest.mark.parametrize(
    ("limit", "what"),
    [("-n 6", "there can be no more open files"), ("-v 300000", "there is not enough memory|there can be no more threads")],
)
def test_limits_of_the_process(fixtures: Path, tmp_path: Path, limit: str, what: str) -> None:
    """Few descriptors, little memory: said as that, with a hint, and not as a bug or a file that can't be written."""
    words = ["apply-delta", "--base", fixtures / "A-delta-v0/base-hf-bin", "--delta", fixtures / "A-delta-v0/delta-307-apr17", "-o", "out"]
    line = f'ulimit {limit}; exec "$@" 2>said'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    command = ["bash", "-c", line, "bash", sys.executable, "-m", "llava_weights", *map(str, words)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, timeout=100, check=False)
    said = (tmp_path / "said").read_text()
    assert done.returncode == 5, said
    assert any(f"error: {words}" in said for words in what.split("|")), said
    assert "\nhint: " in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_what_is_a_shortage() -> None:
    assert shortage(OSError(23, "Too many open files in system")) is not None
    assert shortage(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")) is not None
    assert shortage(OSError("libtorch.so: cannot allocate memory")) is not None
    assert shortage(OSError(28, "No space left on device")) is None
    assert shortage(RuntimeError("shapes do not fit")) is None
    assert not isinstance(shortage(MemoryError()), InputError)
    assert isinstance(shortage(MemoryError()), OutputError)
