"""Ray on one machine, measured: 1, 2 and 4 workers and one that is killed. And larger clusters, simulated from speeds.

python -m benchmarks.cluster                                     # both, as Markdown on stdout; needs llava-weights[ray]
python -m benchmarks.cluster --only simulated --storage 40 --link 10    # GB/s
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.synthetic import cut_to, write_pair
from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.events import Event, ShardDone
from llava_weights.families.decoders import LLAMA_SIZES
from llava_weights.transforms.delta import apply_delta
from llava_weights.write.execute import execute
from llava_weights.write.executors import open_executor
from llava_weights.write.plan import Plan, make_plan

STORE = 80 << 20  # bytes of Ray's object store, which nothing of llava-weights goes through
SHARDS = 16

# --- measured -----------------------------------------------------------------------------------------------------


@contextmanager
def ray_nodes(count: int) -> Iterator[str]:
    """The address of a cluster of `count` nodes on this machine, with one processor each, and a head with none."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False})
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1, object_store_memory=STORE, wait=False)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


def noted(log: Path, function: Any, *arguments: Any) -> Any:
    """On the node: note which process writes which shard."""
    if isinstance(function, partial):
        with open(log, "a") as file:
            file.write(json.dumps([function.args[0].name, os.getpid()]) + "\n")
    return function(*arguments)


class Noted(Executor):
    def __init__(self, pool: Executor, log: Path) -> None:
        self.pool, self.log = pool, log

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        return self.pool.submit(noted, self.log, function, *arguments)

    @property
    def attempts(self) -> list[tuple[str, int]]:
        return [tuple(json.loads(line)) for line in self.log.read_text().splitlines()]


@dataclass(frozen=True)
class Measured:
    workers: int
    killed: bool
    seconds: float
    attempts: int
    digest: str


def run(plan: Plan, folder: Path, workers: int, *, kill: bool) -> Measured:
    """One job on a new cluster whose workers have started; `kill` ends the process that writes a shard once a quarter is done."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    out, log = folder / f"out-{workers}-{kill}", folder / f"log-{workers}-{kill}"
    victims: list[int] = []

    def listen(event: Event) -> None:
        if kill and not victims and isinstance(event, ShardDone) and len(pool.attempts) >= SHARDS // 4:
            victims.append(next(process for name, process in reversed(pool.attempts) if name != event.name))
            os.kill(victims[0], signal.SIGKILL)

    with ray_nodes(workers) as address, open_executor("ray", address, cpus=plan.settings.jobs) as connected:
        assert connected is not None
        pool = Noted(connected, log)
        wait([connected.submit(time.sleep, 2) for _ in range(workers)])
        begun = time.perf_counter()
        execute(plan, out, pool=pool, on_event=listen)
        seconds = time.perf_counter() - begun
    attempts, digest = len(pool.attempts), hashlib.sha256((out / "llava-weights.manifest.json").read_bytes()).hexdigest()
    for path in out.iterdir():
        path.unlink()
    return Measured(workers, kill, seconds, attempts, digest)


def measured(folder: Path, gigabytes: float, workers: Sequence[int]) -> str:
    size = cut_to(gigabytes, next(size for size in LLAMA_SIZES if size.name == "7B"))
    write_pair(folder, size)
    model = apply_delta(open_checkpoint(folder / "base"), open_checkpoint(folder / "delta"))
    total = sum(tensor.nbytes for tensor in model.tensors.values())
    plan = sixteen(model, total)
    runs = [run(plan, folder, count, kill=False) for count in workers]
    runs.append(run(plan, folder, max(workers), kill=True))
    one = runs[0].seconds
    rows = [
        (f"{run.workers}{', one killed' * run.killed}", f"{run.seconds:.1f}", f"{one / run.seconds:.2f}", str(run.attempts), run.digest[:8])
        for run in runs
    ]
    machine = f"all nodes on this machine ({os.cpu_count()} processors, one disk)"
    title = f"apply-delta of {total / 1e9:.1f} GB in {len(plan.shards)} shards, {machine}"
    return f"{title}:\n\n" + table(("workers", "wall s", "times as fast", "shards begun", "manifest"), rows)


def sixteen(model: Any, total: int) -> Plan:
    """The plan whose number of shards is nearest to SHARDS: shards end where tensors do."""
    plans = (make_plan(model, max_shard_size=int(total / SHARDS * (1 + step / 20)), jobs=1) for step in range(21))
    return min(plans, key=lambda plan: abs(len(plan.shards) - SHARDS))


# --- simulated ----------------------------------------------------------------------------------------------------

HASH = 1.5  # GB/s of SHA-256 with the processor's own instructions, one thread


@dataclass(frozen=True)
class Job:
    """`inputs` is how many bytes are read for one that is written: 2 for a delta, 1 for a conversion or a LoRA."""

    name: str
    gigabytes: float
    shards: int
    inputs: float


JOBS = (
    Job("13B delta, shards of 1 GB", 26.0, 27, 2),
    Job("65B delta, shards of 1 GB", 130.5, 132, 2),
    Job("65B delta, shards of 5 GB", 130.5, 27, 2),
)


@dataclass(frozen=True)
class Speeds:
    """Of a cluster, in GB/s: `storage` for all nodes together, `link` of one node each way, `cpu` the output that one node makes when
    nothing else holds it up. Inputs lie on the shared storage, or, where `disk` is not 0, on a copy of each node's own; the output
    goes to the shared storage. Seconds: `begin` once, `gap` a shard (scheduling, opening, fsync, journal), `finish` once."""

    storage: float = 10.0
    link: float = 1.25
    cpu: float = 0.8
    disk: float = 0.0
    begin: float = 5.0
    gap: float = 0.5
    finish: float = 3.0

    def pace(self, nodes: int, read: float, write: float, made: float) -> float:
        """Seconds of one shard while `nodes` nodes work: the slowest of storage, link, disk and processor, as they all overlap."""
        remote = 0.0 if self.disk else read
        return self.gap + max(
            (remote + write) * nodes / self.storage,
            remote / self.link,
            write / self.link,
            read / self.disk if self.disk else 0.0,
            made,
        )


def simulate(speeds: Speeds, job: Job, nodes: int, *, lost_at: float | None = None) -> tuple[float, float]:
    """Seconds of the whole job, and of the writing alone. `lost_at`: seconds of writing after which one node is gone for good."""
    shard = job.gigabytes / job.shards
    writing = work(nodes, job.shards, lambda active: speeds.pace(active, job.inputs * shard, shard, shard / speeds.cpu), lost_at)
    reading = work(nodes, job.shards, lambda active: replace(speeds, disk=0.0, gap=0.1).pace(active, shard, 0.0, shard / HASH), None)
    return speeds.begin + writing + reading + speeds.finish, writing


def work(nodes: int, shards: int, pace: Callable[[int], float], lost_at: float | None) -> float:
    """Seconds in which `nodes` nodes finish `shards` shards, one at a time each. `pace(active)` are the seconds of a shard while so
    many work. A lost node's shard begins anew on another one."""
    now, waiting, running = 0.0, shards, list[float]()  # what is left of each shard in work, 1 to 0
    while waiting or running:
        begun = min(waiting, nodes - len(running))
        running, waiting = running + [1.0] * begun, waiting - begun
        seconds = pace(len(running))
        step = min(running) * seconds
        lost = lost_at is not None and now + step > lost_at
        if lost and lost_at is not None:
            step, lost_at, nodes = lost_at - now, None, nodes - 1
        now, running = now + step, [left - step / seconds for left in running]
        if lost:
            running.remove(max(running))
            waiting += 1
        running = [left for left in running if left > 1e-9]
    return now


def simulated(speeds: Speeds, counts: Sequence[int]) -> str:
    where = f"on a disk of each node with {speeds.disk:g} GB/s" if speeds.disk else "on the shared storage"
    lines = [
        f"Simulated, not measured. Shared storage {speeds.storage:g} GB/s for all nodes together, link {speeds.link:g} GB/s a node, a node "
        f"makes {speeds.cpu:g} GB of output a second; inputs {where}. {speeds.begin:g} s to begin, {speeds.gap:g} s a shard, "
        f"{speeds.finish:g} s to finish. A node writes one shard at a time; reading, arithmetic and writing overlap, so the slowest sets "
        f"the pace; the nodes share the storage evenly. Then all shards are read back and hashed, at most {HASH:g} GB/s a node. Lost: one "
        "node, for good, half-way through the writing; less than 0 where the others then have more of the storage.",
    ]
    for job in JOBS:
        alone = simulate(speeds, job, 1)[0]
        rows = []
        for nodes in (1, *counts):
            seconds, writing = simulate(speeds, job, nodes)
            lost = f"{round(simulate(speeds, job, nodes, lost_at=writing / 2)[0] - seconds):+d}" if nodes > 1 else ""
            rows.append((str(nodes), f"{seconds:.0f}", f"{alone / seconds:.1f}", lost))
        title = f"{job.name}: {job.gigabytes:g} GB in {job.shards} shards"
        lines.append(f"{title}\n\n" + table(("nodes", "seconds", "times as fast", "one lost"), rows))
    return "\n\n".join(lines)


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("measured", "simulated"))
    parser.add_argument("--gigabytes", type=float, default=4.0, help="output of the measured job")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, help="where the measured job writes; a temporary folder by default")
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 16, 32, 64])
    for field in fields(Speeds):
        parser.add_argument(f"--{field.name}", type=float, default=field.default, help="see Speeds; default %(default)s")
    given = vars(parser.parse_args())
    if given["only"] != "simulated":
        with tempfile.TemporaryDirectory(dir=given["folder"]) as folder:
            print(measured(Path(folder), given["gigabytes"], given["workers"]), end="\n\n")
    if given["only"] != "measured":
        print(simulated(Speeds(**{field.name: given[field.name] for field in fields(Speeds)}), given["nodes"]))


if __name__ == "__main__":
    main()
