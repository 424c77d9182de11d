"""Shards in pools, in portions and on Ray: the same bytes as in threads of one process, whatever worker is lost."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import pickle
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from llava_weights import errors
from llava_weights.checkpoint.checkpoint import Checkpoint, Step, open_checkpoint
from llava_weights.cli.main import app
from llava_weights.errors import HubError, InputError, Interrupted, LlavaWeightsError, OutputError, UsageError
from llava_weights.events import Event, Progress, ShardDone, Started
from llava_weights.write import executors
from llava_weights.write.execute import execute
from llava_weights.write.executors import completed, open_executor, unwrapped
from llava_weights.write.plan import Plan, make_plan
from llava_weights.write.portions import Portion, execute_portion, to_portion
from llava_weights.write.shard import write_shard
from llava_weights.write.work_folder import open_job

SHARDS = 16


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return sixteen_shards(tmp_path / "source")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed run writes; no path and no time is in it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    execute(sixteen_shards(folder / "source"), folder / "out")
    return content(folder / "out")


def sixteen_shards(source: Path) -> Plan:
    """Of one tensor each."""
    source.mkdir()
    generator = torch.Generator().manual_seed(8)
    tensors = {f"layer.{i:02}.weight": torch.randn(20, 30, generator=generator).half() for i in range(SHARDS)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    opened = open_checkpoint(source)
    step = Step("copy", (("source", opened.origin),))
    plan = make_plan(Checkpoint(opened.tensors, opened.config, opened.origin, opened.files, (step,)), max_shard_size=1300, jobs=1)
    assert len(plan.shards) == SHARDS
    return plan


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power cuts (test_crash.py), and hundreds of small files would wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


# --- any executor -------------------------------------------------------------------------------------------------


class Foreign(Executor):
    """What Dask's and others' adapters do: a thread a task, ends in any order, errors inside others."""

    def __init__(self, wrap: Callable[[Exception], Exception] = lambda error: error) -> None:
        self.wrap, self.random, self.most, self.running = wrap, random.Random(5), 0, 0

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.running += 1
        self.most = max(self.most, self.running)
        call = pickle.loads(pickle.dumps(partial(function, *arguments, **options)))
        threading.Thread(target=self._run, args=(future, call, self.random.random() / 50)).start()
        return future

    def _run(self, future: Future[Any], call: Callable[[], Any], seconds: float) -> None:
        time.sleep(seconds)
        if future.set_running_or_notify_cancel():
            try:
                result = call()
            except Exception as error:
                self.running -= 1
                future.set_exception(self.wrap(error))
            else:
                self.running -= 1
                future.set_result(result)


def test_results_in_any_order_give_the_same_bytes(plan: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    events: list[Event] = []
    execute(plan, tmp_path / "out", pool=Foreign(), on_event=events.append)
    assert content(tmp_path / "out") == expected
    done = [event.index for event in events if isinstance(event, ShardDone)]
    assert done != sorted(done)
    progress = [event for event in events if isinstance(event, Progress)]
    assert list(dict.fromkeys(event.nbytes for event in progress if event.nbytes)) == [1200 * (number + 1) for number in range(SHARDS)]
    read_back = [event.read_back for event in progress]
    assert read_back == sorted(read_back)
    assert progress[-1].nbytes == plan.nbytes
    assert progress[-1].read_back == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))


def test_a_pool_gets_a_bounded_number_of_tasks() -> None:
    pool = Foreign()
    assert sorted(completed(pool, [partial(abs, -number) for number in range(20)], in_flight=3)) == [*range(20)]
    assert pool.most == 3


class Wrapped(Exception):
    """As Ray's RayTaskError, which has the task's error as `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("the task failed")
        self.cause = cause


def chained(error: Exception) -> Exception:
    outer = RuntimeError("the task failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize("wrap", [lambda error: error, Wrapped, chained], ids=["bare", "cause", "chained"])
def test_a_damaged_input_is_named(plan: Plan, expected: dict[str, str], tmp_path: Path, wrap: Any) -> None:
    """Only the others' shards are kept, each that was finished, and the same command continues once the input is whole."""
    source = tmp_path / "source" / "model.safetensors"
    whole, times = source.read_bytes(), os.stat(source)
    source.write_bytes(whole[:-1200])
    with pytest.raises(InputError, match="changed while") as caught:
        execute(plan, tmp_path / "out", pool=Foreign(wrap))
    assert caught.value.kept is not None
    source.write_bytes(whole)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    execute(plan, tmp_path / "out", pool=Foreign(wrap))
    assert content(tmp_path / "out") == expected


def fail_at_three(number: int, ended: threading.Event) -> int:
    if number == 3:
        raise OutputError("`three` is too much")
    assert ended.wait(20)
    time.sleep(0.05)
    return number


def test_what_runs_beside_a_failure_is_waited_for_and_given() -> None:
    """One thread fails, the other is held until it did: its result still arrives, before the failure does; the rest never begins."""
    ended = threading.Event()

    def first(number: int) -> int:
        try:
            return fail_at_three(number, ended)
        finally:
            ended.set()

    with ThreadPoolExecutor(2) as pool:
        results = completed(pool, [partial(fail_at_three, 1, ended), *(partial(first, number) for number in (3, *range(4, 300)))])
        given = []
        with pytest.raises(OutputError, match="too much"):
            given.extend(results)
    assert 1 in given
    assert len(given) < 200


def test_nobody_writes_after_an_interruption(plan: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    running: set[int] = set()

    class Counted(ThreadPoolExecutor):
        def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
            return super().submit(self.counted, function, *arguments, **options)

        def counted(self, function: Any, *arguments: Any, **options: Any) -> Any:
            running.add(threading.get_ident())
            time.sleep(0.01)
            result = function(*arguments, **options)
            running.discard(threading.get_ident())
            return result

    def stop(event: Event) -> None:
        if isinstance(event, ShardDone):
            raise KeyboardInterrupt

    with Counted(3) as pool:
        with pytest.raises(Interrupted) as caught:
            execute(plan, tmp_path / "out", pool=pool, on_event=stop)
        assert not running
    assert caught.value.exit_code == 130
    execute(plan, tmp_path / "out")
    assert content(tmp_path / "out") == expected


def test_a_dead_worker_process_is_no_traceback(plan: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    class Dying(ProcessPoolExecutor):
        def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
            return super().submit(os._exit, 1)

    with Dying(1, get_context("spawn")) as pool, pytest.raises(OutputError, match="a worker died") as caught:
        execute(plan, tmp_path / "out", pool=pool)
    assert caught.value.kept == "0 of 16 shards are kept in `out.partial`; `out` was not touched"
    execute(plan, tmp_path / "out")
    assert content(tmp_path / "out") == expected


def test_a_worker_that_does_not_share_the_file_system(plan: Plan, tmp_path: Path) -> None:
    unseen = tmp_path / "unseen"
    unseen.mkdir()

    class Far(ThreadPoolExecutor):
        def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
            shard, _, settings = function.args
            return super().submit(write_shard, shard, unseen, settings)

    with Far(2) as pool, pytest.raises(OutputError, match="does not see it"):
        execute(plan, tmp_path / "out", pool=pool)


def test_shards_are_read_back_by_the_pool(plan: Plan, tmp_path: Path) -> None:
    """One that differs is found, whoever reads it."""

    def spoil(event: Event) -> None:
        if isinstance(event, ShardDone) and event.index == 5:
            damage(tmp_path / "out.partial" / "out" / event.name)

    with ThreadPoolExecutor(2) as pool, pytest.raises(OutputError, match="does not come back"):
        execute(plan, tmp_path / "out", pool=pool, on_event=spoil)


def test_two_attempts_of_one_shard_at_one_time(plan: Plan, tmp_path: Path) -> None:
    """What a node that was only thought to be lost does: neither disturbs the other, and nothing is left behind."""
    (shard, *_), folder, barrier = plan.shards, tmp_path / "both", threading.Barrier(2)
    folder.mkdir()
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(write_shard, shard, folder, plan.settings, on_bytes=lambda _: bool(barrier.wait(20))) for _ in range(2)]
    assert results[0].result() == results[1].result()
    assert content(folder) == {shard.name: results[0].result().sha256}


EVERY_ERROR = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, LlavaWeightsError)]


@pytest.mark.parametrize("kind", EVERY_ERROR, ids=lambda kind: kind.__name__)
def test_errors_travel_whole(kind: type[LlavaWeightsError]) -> None:
    error = kind("it broke") if kind is Interrupted else kind("it broke", facts={"file": Path("a"), "bytes": 3}, hint="mend it")
    error.kept, error.exit_code = "3 of 5", 143
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), back.__dict__) == (kind, str(error), error.__dict__)


def test_what_is_inside_an_error() -> None:
    inner = InputError("x")
    assert unwrapped(Wrapped(chained(inner))) is inner
    assert isinstance(unwrapped(BrokenExecutor("gone")), OutputError)
    other = ValueError("a defect")
    assert unwrapped(other) is other


def test_executors_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_executor(None) as pool:
        assert pool is None
    with pytest.raises(UsageError, match="does not exist"), open_executor("slurm"):
        pass
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError) as caught, open_executor("ray"):
        pass
    assert caught.value.hint == "pip install 'llava-weights[ray]'"


def test_a_node_with_another_version_is_refused() -> None:
    with pytest.raises(UsageError, match="another version"):
        executors.run_task("0.0.0", print, (), {})


# --- portions -----------------------------------------------------------------------------------------------------


def test_portions_in_any_order_make_one_run(plan: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    out, events = tmp_path / "out", list[Event]()
    for number in (3, 1, 5, 2, 4):
        report = execute_portion(plan, out, Portion(number, 5), on_event=events.append)
        assert (report.shards, report.resumed) == (len(range(number - 1, SHARDS, 5)), 0)
        assert not out.exists()
    assert [event.shards for event in events if isinstance(event, Started)] == [3, 4, 3, 3, 3]
    assert execute(plan, out, complete=True).resumed == SHARDS
    assert content(out) == expected
    assert not (tmp_path / "out.partial").exists()


def test_portions_at_one_time(plan: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    """Sixteen begin together: one of them makes plan.json, and nobody deletes what another has written."""
    out, barrier = tmp_path / "out", threading.Barrier(SHARDS)

    def run(number: int) -> int:
        barrier.wait(30)
        return execute_portion(plan, out, Portion(number, SHARDS)).shards

    with ThreadPoolExecutor(SHARDS) as pool:
        assert list(pool.map(run, range(1, SHARDS + 1))) == [1] * SHARDS
    execute(plan, out, complete=True)
    assert content(out) == expected


def test_the_finish_names_what_is_missing(plan: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="16 of 16 shards are missing"):
        execute(plan, out, complete=True)
    for number in (1, 2, 4):
        execute_portion(plan, out, Portion(number, 4))
    damage(tmp_path / "out.partial" / "out" / plan.shards[5].name)
    with pytest.raises(OutputError, match="5 of 16 shards are missing or damaged") as caught:
        execute(plan, out, complete=True)
    assert (caught.value.facts["portions"], caught.value.exit_code) == ("2/4, 3/4", 5)
    assert caught.value.kept == "11 of 16 shards are kept in `out.partial`; `out` was not touched"
    assert execute_portion(plan, out, Portion(2, 4)).resumed == 3
    execute_portion(plan, out, Portion(3, 4))
    execute(plan, out, complete=True)
    assert content(out) == expected


def test_whole_runs_and_portions_take_over_from_each_other(plan: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    execute_portion(plan, out, Portion(2, 4))

    def stop(event: Event) -> None:
        if isinstance(event, ShardDone) and event.index >= 7:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        execute(plan, out, on_event=stop)
    assert execute_portion(plan, out, Portion(1, 2)).resumed == 4  # 1, 3, 5, 7 of 1, 3, ... 15
    assert execute(plan, out).resumed == 4 + 5 + 4
    assert content(out) == expected


def test_a_portion_that_died_is_taken_up(plan: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, ShardDone) and event.index == 2:
            raise RuntimeError

    out, folder = tmp_path / "out", tmp_path / "out.partial" / "out"
    with pytest.raises(RuntimeError):
        execute_portion(plan, out, Portion(1, 4), on_event=stop)
    own, others = f".{plan.shards[4].name}.0123abcd.part", f".{plan.shards[5].name}.0123abcd.part"
    for name in (own, others, plan.shards[8].name, plan.shards[1].name):
        (folder / name).write_text("half")
    assert execute_portion(plan, out, Portion(1, 4)).resumed == 2
    assert not (folder / own).exists()
    assert (folder / others).read_text() == (folder / plan.shards[1].name).read_text() == "half"  # perhaps being written
    for number in (2, 3, 4):
        execute_portion(plan, out, Portion(number, 4))
    execute(plan, out, complete=True)
    assert content(out) == expected


def test_who_may_run_beside_whom(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def beside(event: Event) -> None:
        if isinstance(event, ShardDone) and event.index == 1:
            with pytest.raises(OutputError, match="portion 1/2 of `out` is being written by another process"):
                execute_portion(plan, out, Portion(1, 2))
            for whole in (execute, partial(execute, complete=True)):
                with pytest.raises(OutputError, match="in use by another run") as caught:
                    whole(plan, out)
                assert caught.value.facts["process"] == "portions"
            execute_portion(plan, out, Portion(2, 2))

    execute_portion(plan, out, Portion(1, 2), on_event=beside)
    with open_job(out), pytest.raises(OutputError, match="in use by another run"):
        execute_portion(plan, out, Portion(1, 2))
    assert execute(plan, out, complete=True).resumed == SHARDS


def test_portions_of_other_work_are_refused(plan: Plan, tmp_path: Path) -> None:
    execute_portion(plan, tmp_path / "out", Portion(1, 4))
    os.utime(tmp_path / "source" / "model.safetensors", (7, 7))
    opened = open_checkpoint(tmp_path / "source")
    other = make_plan(Checkpoint(opened.tensors, opened.config, opened.origin, opened.files, plan.history), max_shard_size=1300)
    before = content(tmp_path / "out.partial" / "out")
    with pytest.raises(OutputError, match="belongs to another command") as caught:
        execute_portion(other, tmp_path / "out", Portion(2, 4))
    assert caught.value.hint == "repeat the earlier inputs and options, or delete `out.partial`"
    assert content(tmp_path / "out.partial" / "out") == before


def test_more_portions_than_shards(plan: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    assert execute_portion(plan, tmp_path / "out", Portion(20, 20)).shards == 0
    with pytest.raises(OutputError) as caught:
        execute(plan, tmp_path / "out", complete=True)
    assert caught.value.facts["portions"] == ", ".join(f"{number}/20" for number in range(1, 17))


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "3/", "-1/4", "3/16/2", "٣/٤", " 3/16", "3/100000"])
def test_portions_that_are_none(text: str) -> None:
    assert to_portion("3/16") == Portion(3, 16)
    assert str(to_portion("16/16")) == "16/16"
    with pytest.raises(UsageError):
        to_portion(text)


# --- Ray ----------------------------------------------------------------------------------------------------------

RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
STORE = 80 << 20  # bytes; nothing of this package goes through Ray's object store


def on_ray(test: Callable[..., None]) -> Callable[..., None]:
    """Warnings are Ray's own: sockets and files that it leaves open."""
    return pytest.mark.timeout(600)(pytest.mark.filterwarnings("ignore")(test))


class Nodes:
    """Ray nodes on this machine, each with one processor; the head, with none, is the one that the driver sees."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers: list[Any] = []

    def grow(self, count: int) -> None:
        while len(self.workers) < count:
            self.workers.append(self.cluster.add_node(num_cpus=1, object_store_memory=STORE, wait=False))
        self.cluster.wait_for_nodes()

    def kill(self, node: str) -> None:
        victim = next(worker for worker in self.workers if worker.node_id == node)
        self.workers.remove(victim)
        self.cluster.remove_node(victim, allow_graceful=False)


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest) -> None:
    """The guard of all tests, but for Ray: its nodes talk over this machine's own address, which it finds by a UDP socket."""
    if not {"faults", "slow"} & request.node.keywords.keys():
        request.getfixturevalue("_no_network")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY.items():
            patch.setenv(name, value)
        nodes = Nodes()
        try:
            ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
            yield nodes
        finally:
            ray.shutdown()
            nodes.cluster.shutdown()


def attempt(log: Path, seconds: float, function: Any, *arguments: Any) -> Any:
    """On the node: note the attempt, then work slowly, so that it can be killed in the middle of a file."""
    import ray

    if not isinstance(function, partial) or function.func is not write_shard:  # a shard that is read back
        return function(*arguments)
    with open(log, "a") as file:
        file.write(json.dumps([function.args[0].name, ray.get_runtime_context().get_node_id(), os.getpid()]) + "\n")
    return function(on_bytes=lambda nbytes: time.sleep(seconds))


class Watched(Executor):
    """A pool whose attempts are noted in `log`."""

    def __init__(self, pool: Executor, log: Path, seconds: float) -> None:
        self.pool, self.log, self.seconds = pool, log, seconds

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        return self.pool.submit(attempt, self.log, self.seconds, function, *arguments)

    @property
    def attempts(self) -> list[tuple[str, str, int]]:
        return [tuple(json.loads(line)) for line in self.log.read_text().splitlines()]


@pytest.mark.faults
@on_ray
def test_one_two_and_four_workers(nodes: Nodes, plan: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    for count in (1, 2, 4):
        nodes.grow(count)
        with open_executor("ray", nodes.cluster.address, cpus=plan.settings.jobs) as pool:
            assert pool is not None
            wait([pool.submit(time.sleep, 1) for _ in range(count)])  # the nodes start their workers now
            watched, begun = Watched(pool, tmp_path / f"log{count}", 0.5), time.monotonic()
            execute(plan, tmp_path / f"out{count}", pool=watched)
            sys.stdout.write(f"{count} workers: {time.monotonic() - begun:.1f} s\n")
        assert content(tmp_path / f"out{count}") == expected
        assert len(watched.attempts) == SHARDS
        assert len({node for _, node, _ in watched.attempts}) == count


@pytest.mark.faults
@on_ray
@pytest.mark.parametrize("victim", ["worker", "node"])
def test_a_lost_one_costs_its_own_shard(victim: str, nodes: Nodes, plan: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    """Killed in the middle of a file. Its shard is written again on another node, every other shard once; nothing of it is left."""
    nodes.grow(3)
    killed: list[str] = []
    with open_executor("ray", nodes.cluster.address, cpus=plan.settings.jobs) as pool:
        assert pool is not None
        watched = Watched(pool, tmp_path / "log", 4)

        def kill(event: Event) -> None:
            if isinstance(event, ShardDone) and not killed:
                time.sleep(1)  # for the next attempt to begin: the workers of a killed node notice it only after a second
                name, node, process = next(line for line in reversed(watched.attempts) if line[0] != event.name)
                killed.append(name)
                os.kill(process, signal.SIGKILL) if victim == "worker" else nodes.kill(node)

        execute(plan, tmp_path / "out", pool=watched, on_event=kill)
    assert content(tmp_path / "out") == expected
    names = [name for name, _, _ in watched.attempts]
    repeated = {name for name in names if names.count(name) > 1}
    assert repeated == set(killed)
    assert len(names) == SHARDS + 1
    assert not (tmp_path / "out.partial").exists()


def refuse() -> None:
    raise InputError("`x` is damaged", facts={"file": "x"}, hint="copy it again")


@pytest.mark.faults
@on_ray
def test_the_contract_of_an_executor_on_ray(nodes: Nodes) -> None:
    nodes.grow(1)
    before = signal.getsignal(signal.SIGTERM)
    with open_executor("ray", nodes.cluster.address) as pool:
        assert pool is not None
        assert signal.getsignal(signal.SIGTERM) is before
        assert sorted(pool.map(str.upper, ["a", "b", "c"])) == ["A", "B", "C"]
        with pytest.raises(InputError) as caught:
            pool.submit(refuse).result(60)
        assert (type(caught.value), caught.value.facts, caught.value.hint) == (InputError, {"file": "x"}, "copy it again")
        sleeper = pool.submit(time.sleep, 500)
        assert sleeper.cancel()
        wait([sleeper], timeout=60)
        with pytest.raises(CancelledError):
            sleeper.result(0)
        with pytest.raises(OutputError, match="a worker died"):
            pool.submit(os._exit, 3).result(200)
        late = pool.submit(time.sleep, 500)
        with pytest.raises(UsageError, match="no node of the Ray cluster has 64 processors"):
            executors.RayExecutor(64)
    assert late.cancelled()
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(print)


@pytest.mark.slow
@on_ray
@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1", "nowhere"])
def test_no_cluster_no_traceback(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    if address == "auto":  # would find the clusters of other tests

        def init(**_: object) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            raise ConnectionError("Could not find any running Ray instance.")

        monkeypatch.setattr(ray, "init", init)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(HubError, match="no Ray cluster answers") as caught, open_executor("ray", address):
        pass
    assert caught.value.exit_code == 6
    assert signal.getsignal(signal.SIGTERM) is before


# --- The command line ---


def convert(fixtures: Path, out: Path, *options: str) -> tuple[int, str]:
    source = str(fixtures / "C-v1.5/hf-by-tf4.47.1")
    done = CliRunner().invoke(app, ["convert", source, "--to", "llava", "-o", str(out), "--max-shard-size", "60KB", *options])
    return done.exit_code, done.output


def test_portions_by_command_then_finish(fixtures: Path, tmp_path: Path) -> None:
    assert convert(fixtures, tmp_path / "whole")[0] == 0
    out = tmp_path / "out"
    for number in (3, 1):
        code, output = convert(fixtures, out, "--shards", f"{number}/3")
        assert code == 0, output
        assert f"Portion {number}/3 is finished" in output
    code, output = convert(fixtures, out, "--finish")
    assert (code, out.exists()) == (5, False), output
    assert "2/3" in output
    assert convert(fixtures, out, "--shards", "2/3")[0] == 0
    assert convert(fixtures, out, "--finish")[0] == 0
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--shards", "1/2", "--finish"], "--finish"),
        (["--shards", "1/2", "--executor", "ray"], "--executor"),
        (["--finish", "--restart"], "--restart"),
        (["--shards", "0/2"], "0/2"),
        (["--ray-address", "auto"], "--ray-address"),
        (["--executor", "slurm"], "slurm"),
    ],
)
def test_options_that_do_not_go_together(fixtures: Path, tmp_path: Path, options: list[str], named: str) -> None:
    code, output = convert(fixtures, tmp_path / "out", *options)
    assert code == 2, output
    assert named in output
    assert list(tmp_path.iterdir()) == []
