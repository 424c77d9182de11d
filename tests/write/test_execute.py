"""The run around the shards: preflight, resume, lock, publish. Same work, same bytes, whatever happens in between."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from llava_weights.checkpoint.checkpoint import Checkpoint, Step, open_checkpoint
from llava_weights.errors import InputError, Interrupted, OutputError
from llava_weights.events import Event, Note, Progress, ReadingBack, ShardDone, Started
from llava_weights.transforms.delta import apply_delta, make_delta
from llava_weights.write.execute import execute
from llava_weights.write.plan import Plan, make_plan
from llava_weights.write.portions import Portion, execute_portion
from llava_weights.write.read_back import disk_sum
from llava_weights.write.work_folder import Job, open_job, partial_folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(4)
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({f"layer.{i}.weight": torch.randn(20, 30).half() for i in range(12)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def plan_of(source: Path, **options: Any) -> Plan:
    opened = open_checkpoint(source)
    step = Step("copy", (("source", opened.origin),))
    checkpoint = Checkpoint(opened.tensors, opened.config, opened.origin, opened.files, (step,))
    return make_plan(checkpoint, **{"max_shard_size": 3000, **options})


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


class Cut(Exception):
    """What a test raises to end a run as if the process had died."""


def cut_after(shards: int) -> Any:
    def listen(event: Event) -> None:
        if isinstance(event, ShardDone) and event.index == shards:
            raise Cut

    return listen


def test_output_is_complete_and_checkable(source: Path, tmp_path: Path) -> None:
    report = execute(plan_of(source), tmp_path / "out")
    assert subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=tmp_path / "out", capture_output=True).returncode == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    sums = {line.split("  ")[1] for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()}
    assert names - sums == {"SHA256SUMS", "llava-weights.manifest.json"}
    assert report.shards == 6
    weights = {k: v for path in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(path).items()}
    assert weights.keys() == load_file(source / "model.safetensors").keys()
    assert not partial_folder(tmp_path / "out").exists()


def test_manifest_roots_can_be_recomputed_with_standard_tools(source: Path, tmp_path: Path) -> None:
    execute(plan_of(source), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "llava-weights.manifest.json").read_text())
    lines = []
    for name, tensor in sorted(load_file(source / "model.safetensors").items()):
        lines.append(f"{name}\tF16\t20,30\t{blake3(tensor.numpy().tobytes()).hexdigest()}\n")
    assert manifest["digests"] == {"files": "sha256", "tensors": "blake3"}
    assert [entry["blake3"] for entry in manifest["tensors"]] == [line.split("\t")[-1].strip() for line in lines]
    assert manifest["root"]["tensors"] == "blake3:" + blake3("".join(lines).encode()).hexdigest()
    content = sorted(line.split("\t", 1)[1] for line in lines)
    assert manifest["root"]["content"] == "blake3:" + blake3("".join(content).encode()).hexdigest()
    assert manifest["root"]["files"] == "sha256:" + hashlib.sha256((tmp_path / "out" / "SHA256SUMS").read_bytes()).hexdigest()


@pytest.mark.parametrize("options", [{"jobs": 1}, {"jobs": 4}, {"max_memory": "100MB"}])
def test_same_bytes_whatever_the_settings(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    execute(plan_of(source), tmp_path / "a")
    execute(plan_of(source, **options), tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_root_does_not_depend_on_the_shards(source: Path, tmp_path: Path) -> None:
    roots = {execute(plan_of(source, max_shard_size=size), tmp_path / str(size)).root for size in (2000, 5000, "5GB")}
    assert len(roots) == 1


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_any_pool(source: Path, tmp_path: Path, kind: str) -> None:
    execute(plan_of(source), tmp_path / "a")
    with ThreadPoolExecutor(2) if kind == "threads" else ProcessPoolExecutor(2, get_context("spawn")) as pool:
        execute(plan_of(source), tmp_path / "b", pool=pool)
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize("shards", [1, 3, 6])
def test_resume_keeps_finished_shards(source: Path, tmp_path: Path, shards: int) -> None:
    execute(plan_of(source), tmp_path / "undisturbed")
    with pytest.raises(Cut):
        execute(plan_of(source), tmp_path / "out", on_event=cut_after(shards))
    finished = partial_folder(tmp_path / "out") / "out"
    before = {path.name: path.stat().st_mtime_ns for path in finished.glob("*.safetensors")}
    assert len(before) == shards
    assert not (tmp_path / "out").exists()
    events: list[Event] = []
    assert execute(plan_of(source), tmp_path / "out", on_event=events.append).resumed == shards
    checking, writing = (event for event in events if isinstance(event, Started))
    assert (checking.what, checking.shards, checking.nbytes) == ("Checking", shards, writing.done_nbytes)
    if shards < 6:
        assert checking.nbytes + checking.to_follow == writing.nbytes + writing.to_read_back, "one scale for both"
    read = [event.nbytes for event in events[: events.index(writing)] if isinstance(event, Progress)]
    assert read == sorted(read)
    assert read[-1] == checking.nbytes
    assert (writing.what, writing.done_shards) == ("Writing", shards)
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == changed for name, changed in before.items())
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_a_damaged_finished_shard_is_redone(source: Path, tmp_path: Path) -> None:
    execute(plan_of(source), tmp_path / "undisturbed")
    with pytest.raises(Cut):
        execute(plan_of(source), tmp_path / "out", on_event=cut_after(3))
    victim = partial_folder(tmp_path / "out") / "out" / "model-00002-of-00006.safetensors"
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    assert execute(plan_of(source), tmp_path / "out").resumed == 2
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_other_work_in_the_same_place_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        execute(plan_of(source), tmp_path / "out", on_event=cut_after(2))
    before = content(partial_folder(tmp_path / "out") / "out")
    with pytest.raises(OutputError, match="belongs to another command") as caught:
        execute(plan_of(source, max_shard_size=5000), tmp_path / "out")
    assert caught.value.facts["options, then"] == '{"max_shard_size": 3000}'
    assert caught.value.facts["options, now"] == '{"max_shard_size": 5000}'
    os.utime(source / "model.safetensors", (1, 1))
    with pytest.raises(OutputError) as caught:
        execute(plan_of(source), tmp_path / "out")
    assert "changed 1000000000" in caught.value.facts["inputs, now"]
    assert content(partial_folder(tmp_path / "out") / "out") == before
    assert execute(plan_of(source, max_shard_size=5000), tmp_path / "out", restart=True).resumed == 0


def test_a_second_run_stops_at_once(source: Path, tmp_path: Path) -> None:
    with open_job(tmp_path / "out"):
        before = content_of_tree(tmp_path)
        with pytest.raises(OutputError, match="in use by another run") as caught:
            execute(plan_of(source), tmp_path / "out")
        assert caught.value.facts["process"] == str(os.getpid())
        assert content_of_tree(tmp_path) == before
    execute(plan_of(source), tmp_path / "out")


def content_of_tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_lock_of_a_dead_process_is_no_lock(source: Path, tmp_path: Path) -> None:
    partial = partial_folder(tmp_path / "out")
    partial.mkdir()
    (partial / "lock").write_text("999999\n")
    execute(plan_of(source), tmp_path / "out")
    assert (tmp_path / "out" / "SHA256SUMS").exists()


def test_an_existing_output_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("three years of work")
    for restart in (False, True):
        with pytest.raises(OutputError, match="exists and is not empty"):
            execute(plan_of(source), out, restart=restart)
    assert content_of_tree(out) == {str(out / "thesis.txt"): b"three years of work"}
    assert not partial_folder(out).exists()


def test_force_replaces_only_when_the_new_one_is_complete(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with pytest.raises(Cut):
        execute(plan_of(source), out, force=True, on_event=cut_after(6))
    assert content_of_tree(out) == {str(out / "old.txt"): b"old"}
    execute(plan_of(source), out, force=True)
    assert not (out / "old.txt").exists()
    assert (out / "SHA256SUMS").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_empty_folder_may_be_the_output(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    execute(plan_of(source), tmp_path / "out")


@pytest.mark.parametrize("place", ["source", "source/inside", "."])
def test_output_and_input_stay_apart(source: Path, tmp_path: Path, place: str) -> None:
    before = content_of_tree(tmp_path)
    with pytest.raises(OutputError):
        execute(plan_of(source), tmp_path / place, force=True)
    assert content_of_tree(tmp_path) == before


def test_output_that_is_a_file_or_a_link(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="not a folder"):
            execute(plan_of(source), tmp_path / name, force=True)


def test_disk_space_is_checked_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match="not enough space"):
        execute(plan_of(source), tmp_path / "out")
    assert not partial_folder(tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place(source: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="can't write"):
        execute(plan_of(source), tmp_path / "closed" / "out")


def dying_at(number: int, original: Any) -> Any:
    calls = itertools.count(1)

    def dying(*arguments: Any, **options: Any) -> Any:
        if next(calls) >= number:
            raise Cut
        return original(*arguments, **options)

    return dying


@pytest.mark.parametrize("function", ["rename", "unlink", "fsync", "mkdir", "rmdir"])
def test_a_crash_at_any_call_is_recovered(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """The n-th call of a system function fails as if the process died there; the next run always ends with the right bytes."""
    plan = plan_of(source, max_shard_size="10kB")
    execute(plan, tmp_path / "undisturbed")
    expected = content(tmp_path / "undisturbed")
    original = getattr(os, function)
    for number in range(1, 200):
        out = tmp_path / f"out{number}"
        with monkeypatch.context() as patch:
            patch.setattr(os, function, dying_at(number, original))
            try:
                execute(plan, out)
            except Cut:
                assert not out.exists() or content(out) == expected
            else:
                break
        if not out.exists() or (partial_folder(out) / "plan.json").exists():
            execute(plan, out)
            assert not partial_folder(out).exists()
        assert content(out) == expected, number
    assert 1 < number < 199


def test_inputs_that_change_during_the_run(source: Path, tmp_path: Path) -> None:
    def touch(event: Event) -> None:
        if isinstance(event, ShardDone) and event.index == 2:
            os.utime(source / "model.safetensors", (5, 5))

    with pytest.raises(InputError, match="changed while") as caught:
        execute(plan_of(source), tmp_path / "out", on_event=touch)
    assert caught.value.kept == "2 of 6 shards are kept in `out.partial`; `out` was not touched"


# --- a source that changes and looks the same ------------------------------------------------------------------------


def other_bytes(path: Path) -> bytes:
    """The file with the values of its tensors turned round; size and header stay."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return data[:start] + data[start:][::-1]


def edited(path: Path, data: bytes) -> None:
    """Other bytes in the same file, and the time set back."""
    status = path.stat()
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path, data: bytes) -> None:
    """Another file under the name, of the same size and time."""
    status = path.stat()
    path.with_name("copy").write_bytes(data)
    os.utime(path.with_name("copy"), ns=(status.st_atime_ns, status.st_mtime_ns))
    path.with_name("copy").rename(path)


def at_shard(number: int, act: Any) -> Any:
    """A listener that does something once, when so many shards are finished."""
    acted: list[bool] = []

    def listen(event: Event) -> None:
        if isinstance(event, ShardDone) and event.index >= number and not acted:
            acted.append(True)
            act()

    return listen


class InTurn(ThreadPoolExecutor):
    """One worker, that does nothing while somebody else holds `turn`: a file that is just being changed has another time for a moment."""

    def __init__(self) -> None:
        super().__init__(1)
        self.turn = threading.Lock()

    def submit(self, task: Any, /, *arguments: Any, **named: Any) -> Any:
        def in_turn() -> Any:
            with self.turn:
                return task(*arguments, **named)

        return super().submit(in_turn)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("change", [edited, replaced])
def test_a_source_that_changes_unseen(source: Path, tmp_path: Path, change: Any, pooled: bool) -> None:
    """Two shards of the old bytes, four of the new: named, the old ones are not kept, and the next run is right."""
    plan, victim = plan_of(source), source / "model.safetensors"

    def act() -> None:
        with pool.turn:
            change(victim, other_bytes(victim))

    with InTurn() as pool, pytest.raises(InputError, match=r"`model\.safetensors` changed while it was being read") as caught:
        execute(plan, tmp_path / "out", pool=pool if pooled else None, on_event=at_shard(2, act))
    assert "model-00001-of-00006.safetensors" in caught.value.facts["shards that other bytes went into"]
    kept = 6 - len(caught.value.facts["shards that other bytes went into"].split(", "))
    assert caught.value.kept == f"{kept} of 6 shards are kept in `out.partial`; `out` was not touched"
    assert execute(plan_of(source), tmp_path / "out").resumed == kept
    execute(plan_of(source), tmp_path / "undisturbed")
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


TOUCHES = {
    "chmod": lambda path: path.chmod(0o600),
    "hard link": lambda path: os.link(path, path.with_name("link")),
    "an equal file": lambda path: replaced(path, path.read_bytes()),
    "the same bytes": lambda path: edited(path, path.read_bytes()),
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_a_source_that_is_only_touched(source: Path, tmp_path: Path, touch: str) -> None:
    execute(plan_of(source), tmp_path / "undisturbed")
    events: list[Event] = []
    act = at_shard(3, lambda: TOUCHES[touch](source / "model.safetensors"))
    execute(plan_of(source), tmp_path / "out", on_event=lambda event: (events.append(event), act(event)))
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
    assert [event.text for event in events if isinstance(event, Note)] == [
        "`model.safetensors`: touched since this work began, so what was read is read again"
    ]


def test_an_integer_delta_whose_source_is_touched(fixtures: Path, tmp_path: Path) -> None:
    """Its shards are made in another way, once more too."""
    base = tmp_path / "base"
    shutil.copytree(fixtures / "A-delta-v0/base-hf-bin", base)
    tuned = apply_delta(open_checkpoint(base), open_checkpoint(fixtures / "A-delta-v0/delta-307-apr17"))
    plan = make_plan(make_delta(open_checkpoint(base), tuned, codec="integer"), max_shard_size="100kB")
    execute(plan, tmp_path / "undisturbed")
    execute(plan, tmp_path / "out", on_event=at_shard(2, lambda: [path.chmod(0o600) for path in base.glob("*.bin")]))
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("change", [edited, replaced])
def test_a_source_that_changes_between_two_runs(source: Path, tmp_path: Path, change: Any) -> None:
    with pytest.raises(Cut):
        execute(plan_of(source), tmp_path / "out", on_event=cut_after(2))
    change(source / "model.safetensors", other_bytes(source / "model.safetensors"))
    with pytest.raises(InputError, match="changed while") as caught:
        execute(plan_of(source), tmp_path / "out")
    assert caught.value.kept == "4 of 6 shards are kept in `out.partial`; `out` was not touched"
    execute(plan_of(source), tmp_path / "out")
    execute(plan_of(source), tmp_path / "undisturbed")
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_a_source_that_changes_between_portions(source: Path, tmp_path: Path) -> None:
    execute_portion(plan_of(source), tmp_path / "out", Portion(1, 2))
    edited(source / "model.safetensors", other_bytes(source / "model.safetensors"))
    execute_portion(plan_of(source), tmp_path / "out", Portion(2, 2))
    with pytest.raises(InputError, match="changed while"):
        execute(plan_of(source), tmp_path / "out", complete=True)
    with pytest.raises(OutputError) as caught:
        execute(plan_of(source), tmp_path / "out", complete=True)
    assert caught.value.facts["portions"] == "1/2"
    execute_portion(plan_of(source), tmp_path / "out", Portion(1, 2))
    execute(plan_of(source), tmp_path / "out", complete=True)
    execute(plan_of(source), tmp_path / "undisturbed")
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_a_header_that_changes_before_the_first_byte_is_read(source: Path, tmp_path: Path) -> None:
    """Two tensors of one shape change their names: the values that are read are those that were there all the time."""
    plan, path = plan_of(source), source / "model.safetensors"
    swapped = path.read_bytes().replace(b"layer.1.weight", b"layer.X.weight", 1).replace(b"layer.2.weight", b"layer.1.weight", 1)
    replaced(path, swapped.replace(b"layer.X.weight", b"layer.2.weight", 1))
    with pytest.raises(InputError, match="changed while"):
        execute(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what the message says is kept -----------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_a_shard_whose_journal_line_fails_is_not_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A disk that is full just then. What the error says is what the next run takes up."""
    original = Job.append

    def failing(self: Job, entry: Any) -> None:
        if entry["name"].startswith("model-00003"):
            if call == "write":
                with open(self.journal, "ab") as file:
                    file.write(b"0123456789abcdef {half of a li")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "append", failing)
        with pytest.raises(OutputError) as caught:
            execute(plan_of(source), tmp_path / "out")
    assert caught.value.kept == "2 of 6 shards are kept in `out.partial`; `out` was not touched"
    assert execute(plan_of(source), tmp_path / "out").resumed == 2


def test_a_shard_that_does_not_come_back_is_not_kept(source: Path, tmp_path: Path) -> None:
    """It is read while the next one is made: the run ends within one shard, and keeps all others that it has written by then."""
    victim = partial_folder(tmp_path / "out") / "out" / "model-00002-of-00006.safetensors"

    def damage() -> None:
        data = bytearray(victim.read_bytes())
        data[-5] ^= 1
        victim.write_bytes(data)

    with pytest.raises(OutputError, match="does not come back") as caught:
        execute(plan_of(source), tmp_path / "out", on_event=at_shard(2, damage))
    assert caught.value.facts["written"] != caught.value.facts["read"]
    found = re.fullmatch(r"(\d) of 6 shards are kept in `out.partial`; `out` was not touched", caught.value.kept or "")
    assert found
    assert 1 <= int(found[1]) <= 5
    assert not (tmp_path / "out").exists()
    assert execute(plan_of(source), tmp_path / "out").resumed == int(found[1])


def test_a_shard_that_is_gone_when_it_is_read_back(source: Path, tmp_path: Path) -> None:
    victim = partial_folder(tmp_path / "out") / "out" / "model-00006-of-00006.safetensors"
    with pytest.raises(OutputError, match="does not come back") as caught:
        execute(plan_of(source), tmp_path / "out", on_event=at_shard(6, victim.unlink))
    assert "does not exist" in str(caught.value.facts["read"])
    assert caught.value.kept == "5 of 6 shards are kept in `out.partial`; `out` was not touched"
    assert execute(plan_of(source), tmp_path / "out").resumed == 5


@pytest.mark.parametrize("way", ["signal", "listener"])
def test_an_interruption_while_it_is_read_back(source: Path, tmp_path: Path, way: str) -> None:
    """By Ctrl-C, or by what a listener raises in the thread that reads: no thread stays, and every shard is kept."""
    before, folder, sums = threading.active_count(), partial_folder(tmp_path / "out") / "out", list[str]()

    def listen(event: Event) -> None:
        if isinstance(event, ShardDone):
            sums.append(disk_sum(folder / event.name))
        if isinstance(event, Progress) and event.read_back:
            if way == "listener":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        execute(plan_of(source, max_shard_size="5GB"), tmp_path / "out", on_event=listen)
    assert caught.value.kept == "1 of 1 shards are kept in `out.partial`; `out` was not touched"
    assert threading.active_count() == before
    assert not (tmp_path / "out").exists()
    assert execute(plan_of(source, max_shard_size="5GB"), tmp_path / "out").resumed == 1
    assert disk_sum(tmp_path / "out" / "model.safetensors") == sums[0]


def test_a_shard_is_read_back_while_the_next_are_made(source: Path, tmp_path: Path) -> None:
    """Writing waits here, before its third shard, until the first is read."""
    read, events = threading.Event(), []

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress) and event.read_back:
            read.set()
        if isinstance(event, ShardDone) and event.index == 2:
            assert read.wait(60)

    execute(plan_of(source), tmp_path / "out", on_event=listen)
    started = next(event for event in events if isinstance(event, Started))
    assert started.to_read_back == started.nbytes == plan_of(source).nbytes
    last = [event for event in events if isinstance(event, Progress)][-1]
    assert (last.nbytes, last.read_back) == (started.nbytes, sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")))


def test_without_reading_back(source: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    execute(plan_of(source), tmp_path / "out", on_event=events.append, reread=False)
    assert not any(isinstance(event, ReadingBack) for event in events)
    assert {event.to_read_back for event in events if isinstance(event, Started)} == {0}
    assert {event.read_back for event in events if isinstance(event, Progress)} == {0}


def test_nothing_is_read_back_twice(source: Path, tmp_path: Path) -> None:
    """All shards were there: no line that says `Reading back 0 bytes`."""
    with pytest.raises(Cut):
        execute(plan_of(source), tmp_path / "out", on_event=cut_after(6))
    events: list[Event] = []
    assert execute(plan_of(source), tmp_path / "out", on_event=events.append).resumed == 6
    assert not any(isinstance(event, ReadingBack) for event in events)


def test_the_lock_is_a_file_lock(tmp_path: Path) -> None:
    with open_job(tmp_path / "out") as job, open(job.partial / "lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
