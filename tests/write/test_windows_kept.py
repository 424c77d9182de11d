"""A run that is cut off inside a shard loses some windows of it, whatever cuts it off; and nothing that is left is believed unread."""

from __future__ import annotations

import os
import random
import signal
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_weights.checkpoint.checkpoint import Checkpoint, Step, open_checkpoint
from llava_weights.errors import InputError, Interrupted
from llava_weights.events import Event, Progress
from llava_weights.storage.reading import Record, SourceFile, Workspace
from llava_weights.tensors.lazy import LazyTensor, Stored
from llava_weights.write.execute import execute
from llava_weights.write.plan import Plan, Settings, make_plan
from llava_weights.write.portions import execute_portion, to_portion
from llava_weights.write.work_folder import partial_folder

WINDOW = 400  # bytes: ten rows
MADE: list[int] = []  # windows that were made and not read


@dataclass(frozen=True, kw_only=True)
class Counted(LazyTensor):
    """A tensor that says when rows of it are made, and counts zeros as deltas count what they lose."""

    source: LazyTensor

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.source,)

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        MADE.append(start)
        self.source.rows_into(out, start, stop, work)
        work.tallies["rows"] += stop - start


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    folder = tmp_path / "source"
    folder.mkdir()
    torch.manual_seed(4)
    save_file({"layer.0.weight": torch.randn(400, 20).half()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    opened = open_checkpoint(folder)
    counted = {name: Counted(dtype=tensor.dtype, shape=tensor.shape, source=tensor) for name, tensor in opened.tensors.items()}
    MADE.clear()
    return replace(opened, tensors=counted, history=(Step("copy", (("source", opened.origin),)),))


def plan_of(source: Checkpoint, window: int = WINDOW) -> Plan:
    return replace(make_plan(source, jobs=2), settings=Settings(jobs=2, window=window))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cut_off(plan: Plan, out: Path, *, after: int = 20) -> None:
    """Ctrl-C once so many windows are written."""
    seen: list[Event] = []

    def interrupt(event: Event) -> None:
        seen.append(event)
        if isinstance(event, Progress) and sum(isinstance(each, Progress) for each in seen) == after:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        execute(plan, out, on_event=interrupt)
    MADE.clear()


@pytest.fixture
def expected(source: Checkpoint, tmp_path: Path) -> dict[str, bytes]:
    execute(plan_of(source), tmp_path / "undisturbed")
    MADE.clear()
    return content(tmp_path / "undisturbed")


def part(out: Path) -> Path:
    return partial_folder(out) / "out" / ".model.safetensors.part"


def listed(out: Path) -> Path:
    return partial_folder(out) / "out" / ".model.safetensors.windows"


def test_an_interruption_loses_some_windows(source: Checkpoint, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    cut_off(plan_of(source), out)
    execute(plan_of(source), out)
    assert 0 < len(MADE) <= 20 + 6
    assert content(out) == expected, "tallies in the manifest too"


@pytest.mark.parametrize("window", [200, 800])
def test_another_window_makes_them_anew(source: Checkpoint, tmp_path: Path, expected: dict[str, bytes], window: int) -> None:
    """`--jobs` and `--max-memory` may be others: windows that are cut in another way are no windows of this run."""
    cut_off(plan_of(source), tmp_path / "out")
    execute(plan_of(source, window), tmp_path / "out")
    assert content(tmp_path / "out") == expected


def flip(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a window is damaged": lambda out: flip(part(out), 0.1),
    "the part is empty": lambda out: part(out).write_bytes(b""),
    "the part is shorter": lambda out: os.truncate(part(out), part(out).stat().st_size // 8),
    "the part is longer": lambda out: os.truncate(part(out), 3 * part(out).stat().st_size),
    "the part is zeros": lambda out: part(out).write_bytes(bytes(part(out).stat().st_size)),
    "the part is gone": lambda out: part(out).unlink(),
    "the part is a link": lambda out: (part(out).unlink(), part(out).symlink_to("/dev/null"))[0],  # type: ignore[func-returns-value]
    "the list is damaged": lambda out: flip(listed(out), 0.5),
    "the list is torn": lambda out: os.truncate(listed(out), listed(out).stat().st_size - 20),
    "the list is gone": lambda out: listed(out).unlink(),
    "the list is not text": lambda out: listed(out).write_bytes(os.urandom(500)) and None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_windows_are_made_again(source: Checkpoint, tmp_path: Path, expected: dict[str, bytes], damage: str) -> None:
    out = tmp_path / "out"
    cut_off(plan_of(source), out)
    DAMAGE[damage](out)
    execute(plan_of(source), out)
    assert content(out) == expected


def test_cut_off_again_and_again(source: Checkpoint, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """Each time a little further: the end is reached, and most windows are made once."""
    chance, made = random.Random(1), 0
    for share in (0.2, 0.5, 0.8):
        MADE.clear()
        cut = int(40 * share) + chance.randrange(2)
        seen: list[int] = []

        def interrupt(event: Event, cut: int = cut, seen: list[int] = seen) -> None:
            if isinstance(event, Progress):
                seen.append(1)
                if len(seen) == cut:
                    os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Interrupted):
            execute(plan_of(source), tmp_path / "out", on_event=interrupt)
        made += len(MADE)
    MADE.clear()
    execute(plan_of(source), tmp_path / "out")
    assert made + len(MADE) <= 40 + 3 * 6
    assert content(tmp_path / "out") == expected


def test_restart_begins_the_shard_again(source: Checkpoint, tmp_path: Path, expected: dict[str, bytes]) -> None:
    cut_off(plan_of(source), tmp_path / "out")
    execute(plan_of(source), tmp_path / "out", restart=True)
    assert len(MADE) == 40
    assert content(tmp_path / "out") == expected


def test_a_portion_continues_inside_its_shard(source: Checkpoint, tmp_path: Path, expected: dict[str, bytes]) -> None:
    plan, out = plan_of(source), tmp_path / "out"
    cut_off(plan, out)
    execute_portion(plan, out, to_portion("1/1"))
    assert 0 < len(MADE) <= 20 + 6
    execute(plan, out, complete=True)
    assert content(out) == expected


def test_an_input_that_changed_unseen_meanwhile_is_found(source: Checkpoint, tmp_path: Path) -> None:
    """The windows that are kept are of other bytes: the note on the inputs of the first run still tells."""
    cut_off(plan_of(source), tmp_path / "out")
    path = tmp_path / "source/model.safetensors"
    status = path.stat()
    flip(path, 0.9)
    flip(path, 0.2)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(InputError, match="changed while it was being read"):
        execute(plan_of(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_input_leaves_no_windows(source: Checkpoint, tmp_path: Path) -> None:
    def spoil(event: Event) -> None:
        if isinstance(event, Progress):
            os.truncate(tmp_path / "source/model.safetensors", 3000)

    with pytest.raises(InputError):
        execute(plan_of(source), tmp_path / "out", on_event=spoil)
    assert os.listdir(partial_folder(tmp_path / "out") / "out") == []


@pytest.mark.parametrize("damaged", [False, True])
def test_checksums_of_a_zip_are_judged_over_both_runs(tmp_path: Path, source: Checkpoint, damaged: bool) -> None:
    """A record of a `.bin` of which the first run read a part: its CRC-32 is still that of the whole."""
    path, data = tmp_path / "weights.raw", random.Random(2).randbytes(16_000)
    path.write_bytes(data)
    stored = Stored(dtype="I16", shape=(400, 20), file=SourceFile.at(path), offset=0, record=Record(0, len(data), zlib.crc32(data)))
    plan = plan_of(replace(source, tensors={"w": stored}))
    stored = replace(stored, record=Record(0, len(data), zlib.crc32(data) ^ damaged))  # a small one is read whole before the first byte
    counted = Counted(dtype="I16", shape=(400, 20), source=stored)
    plan = replace(plan, shards=(replace(plan.shards[0], tensors=(("w", counted),), _watch=None),))
    cut_off(plan, tmp_path / "out")
    if damaged:
        with pytest.raises(InputError, match="CRC-32"):
            execute(plan, tmp_path / "out")
    else:
        execute(plan, tmp_path / "out")
        assert (tmp_path / "out/model.safetensors").read_bytes().endswith(data)
    assert 0 < len(MADE) <= 20 + 6
