"""Several shards at a time: the same bytes and the same memory promise, and one that fails or is interrupted stops the others."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_weights.checkpoint.checkpoint import Checkpoint, Step, open_checkpoint
from llava_weights.errors import InputError, Interrupted, LlavaWeightsError, UsageError
from llava_weights.events import Event, Progress, ShardDone
from llava_weights.storage.reading import Workspace
from llava_weights.storage.threads import Brake, usable_cores
from llava_weights.tensors.dtypes import load_torch, one_thread
from llava_weights.tensors.lazy import LazyTensor
from llava_weights.tensors.windows import MiB
from llava_weights.write.execute import execute
from llava_weights.write.plan import Plan, make_plan
from llava_weights.write.work_folder import partial_folder


@dataclass(frozen=True, kw_only=True)
class Wide(LazyTensor):
    """Zeros that are nowhere stored."""

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        out[:] = bytes(len(out))


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    torch.manual_seed(4)
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({f"layer.{i}.weight": torch.randn(20, 30).half() for i in range(12)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    opened = open_checkpoint(folder)
    return replace(opened, history=(Step("copy", (("source", opened.origin),)),))


def plan_of(source: Checkpoint, jobs: int | None, *, window: int = 400) -> Plan:
    plan = make_plan(source, max_shard_size=3000, jobs=jobs)
    return replace(plan, settings=replace(plan.settings, window=window))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("jobs", "shards"), [(1, 1), (3, 1), (4, 2), (9, 4), (64, 6)])
def test_the_same_bytes(source: Checkpoint, tmp_path: Path, jobs: int, shards: int) -> None:
    plan = plan_of(source, jobs)
    assert plan.settings.in_flight == shards
    execute(plan_of(source, 2), tmp_path / "alone")
    report = execute(plan, tmp_path / "together")
    assert (report.shards, report.resumed) == (6, 0)
    assert content(tmp_path / "together") == content(tmp_path / "alone")


def test_shards_are_written_at_the_same_time(source: Checkpoint, tmp_path: Path) -> None:
    """Two shards wait for each other in the middle: one after another, they would wait for ever."""
    both, met = threading.Barrier(2, timeout=60), set[str]()

    def meet(event: Event) -> None:
        if isinstance(event, Progress):
            met.add(event.shard)

    made = {name: Meeting(dtype=tensor.dtype, shape=tensor.shape, number=n) for n, (name, tensor) in enumerate(source.tensors.items())}
    MEET[:] = [both]
    plan = make_plan(replace(source, tensors=made), max_shard_size=8_000, jobs=4, accept_values=True)
    assert len(plan.shards) == 2
    execute(plan, tmp_path / "out", on_event=meet)
    assert len(met) == 2


MEET: list[threading.Barrier] = []


@dataclass(frozen=True, kw_only=True)
class Meeting(LazyTensor):
    """Rows of which the first of each shard wait for each other."""

    number: int

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        if start == 0 and self.number in (0, 6):
            MEET[0].wait()
        out[:] = bytes([self.number]) * len(out)


def test_a_failure_stops_the_others(source: Checkpoint, tmp_path: Path) -> None:
    """The shards that are at work end too, no other begins, and what was finished is kept."""
    (file,) = {leaf.file for tensor in source.tensors.values() for leaf in tensor.leaves()}
    before = threading.active_count()

    def spoil(event: Event) -> None:
        if isinstance(event, ShardDone):
            os.truncate(file.path, 2000)

    with pytest.raises(InputError, match="changed while it was being read") as caught:
        execute(plan_of(source, 4), tmp_path / "out", on_event=spoil)
    assert "shards are kept" in str(caught.value.kept)
    assert not [name for name in os.listdir(partial_folder(tmp_path / "out") / "out") if name.endswith(".part")]
    assert threading.active_count() == before


def test_ctrl_c_stops_all_and_a_later_run_continues(source: Checkpoint, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, ShardDone):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        execute(plan_of(source, 4), tmp_path / "out", on_event=interrupt)
    assert 0 < execute(plan_of(source, 4), tmp_path / "out").resumed < 6
    execute(plan_of(source, 2), tmp_path / "alone")
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def test_a_brake_stops_what_began_and_what_begins() -> None:
    brake, stopped = Brake(), list[tuple[str, BaseException]]()
    error = LlavaWeightsError("stop")
    with brake.held(lambda e: stopped.append(("ended", e))):
        pass
    with brake.held(lambda e: stopped.append(("first", e))):
        brake.pull(error)
        with brake.held(lambda e: stopped.append(("second", e))):
            pass
    assert stopped == [("first", error), ("second", error)]


def test_torch_has_one_thread_in_every_shard() -> None:
    """Side by side and one after the other, inside one command."""
    before, seen = torch.get_num_threads(), list[int]()

    def look() -> None:
        with one_thread():
            thread = threading.Thread(target=lambda: seen.append(load_torch().get_num_threads()))
            thread.start()
            thread.join()

    torch.set_num_threads(3)
    try:
        with one_thread():
            look()
            look()
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        assert seen == [1, 1]
    finally:
        torch.set_num_threads(before)


# --- how many ----------------------------------------------------------------------------------------------------------


def large(source: Checkpoint, shards: int) -> Checkpoint:
    tensors = {f"layer.{n}.weight": Wide(dtype="F16", shape=(10_000, 5120)) for n in range(shards)}
    return replace(source, tensors=tensors)


@pytest.mark.parametrize("jobs", [1, 4, 16, 64])
def test_each_shard_in_flight_is_in_the_promise(source: Checkpoint, jobs: int) -> None:
    plan = make_plan(large(source, 40), max_shard_size="110MB", jobs=jobs)
    assert (plan.settings.jobs, plan.settings.in_flight) == (jobs, max(1, jobs // 2))
    largest = 819 * 10_240  # rows in 8 MiB
    assert plan.memory == (70 + 2 * jobs + 4 * plan.settings.in_flight) * MiB + (jobs + 4 * plan.settings.in_flight) * largest


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux tells which processors a process may use")
@pytest.mark.parametrize(("cores", "most"), [(1, 2), (2, 2), (200, 64)])
def test_the_default_is_the_usable_cores_within_500_mib(source: Checkpoint, monkeypatch: pytest.MonkeyPatch, cores: int, most: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    plan = make_plan(large(source, 40), max_shard_size="110MB")
    assert plan.memory <= 500 * MiB
    assert 2 <= plan.settings.jobs <= most
    more = make_plan(large(source, 40), max_shard_size="110MB", jobs=plan.settings.jobs + 1)
    assert plan.settings.jobs == usable_cores() or cores == 1 or more.memory > 500 * MiB


def test_less_memory_means_fewer_shards(source: Checkpoint) -> None:
    plan = make_plan(large(source, 40), max_shard_size="110MB", jobs=16, max_memory="100MB")
    assert plan.memory <= 100_000_000
    with pytest.raises(UsageError, match="too small"):
        make_plan(large(source, 40), max_shard_size="110MB", jobs=16, max_memory="70MB")


def system(folder: Path, groups: str, **files: str) -> Path:
    """A /proc and /sys with these cgroups."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux has cgroups")
def test_usable_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    v2, v1 = "0::/job/inner\n", "5:cpu,cpuacct:/job\n3:memory:/job\n"
    cases = {
        "nothing said": (system(tmp_path / "1", v2), 16),
        "none at all": (tmp_path / "absent", 16),
        "no limit": (system(tmp_path / "2", v2, **{"job/inner/cpu.max": "max 100000"}), 16),
        "above": (system(tmp_path / "3", v2, **{"job/inner/cpu.max": "800000 100000", "job/cpu.max": "250000 100000"}), 3),
        "a container's root": (system(tmp_path / "4", "0::/\n", **{"cpu.max": "150000 100000"}), 2),
        "v1": (system(tmp_path / "5", v1, **{"cpu/job/cpu.cfs_quota_us": "400000", "cpu/job/cpu.cfs_period_us": "100000"}), 4),
        "v1, no limit": (system(tmp_path / "6", v1, **{"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}), 16),
        "a part of one": (system(tmp_path / "7", v2, **{"job/cpu.max": "20000 100000"}), 1),
    }
    assert {name: usable_cores(root) for name, (root, _) in cases.items()} == {name: cores for name, (_, cores) in cases.items()}
