"""Many of everything: tensors, shards, adapters, long names; sizes that no machine here holds; and memory and disks that just suffice."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from benchmarks.synthetic import llama_config, shapes, write_base, write_delta, write_llava, write_lora
from llava_weights.checkpoint.checkpoint import Checkpoint, Step, open_checkpoint
from llava_weights.checkpoint.manifest import MANIFEST
from llava_weights.checks.diff import diff
from llava_weights.checks.verify import checksum, verify
from llava_weights.errors import OutputError
from llava_weights.events import Event, ShardDone
from llava_weights.families.decoders import LLAMA_SIZES, Size
from llava_weights.tensors.windows import MiB
from llava_weights.transforms.convert import convert
from llava_weights.transforms.delta import apply_delta, make_delta
from llava_weights.transforms.lora import merge_lora, open_weighted
from llava_weights.write.execute import execute
from llava_weights.write.plan import Plan, make_plan
from llava_weights.write.work_folder import partial_folder

ROOT = Path(__file__).resolve().parent.parent

VOCABULARY = 64
Arrays = dict[str, np.ndarray]


def deep(layers: int) -> Size:
    """Of tiny width. With the rotary buffers that were stored in 2023, 1,020 layers (1,024 are read) have 10,203 tensors."""
    return Size("deep", 16, layers, 2, 32)


def write_model(folder: Path, size: Size, tensors: Arrays) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(llama_config(size, VOCABULARY)))
    return folder


def draw(size: Size, seed: int = 0) -> Arrays:
    """Values of a LLaMA's orders of magnitude."""
    rng = np.random.default_rng(seed)
    found = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes(size, VOCABULARY)}
    return {name: (0.5 + 0.1 * values if "norm" in name else 0.02 * values).astype(np.float16) for name, values in found.items()}


def write_pair(folder: Path, size: Size) -> tuple[Path, Path]:
    """A base and the delta of a model that moved a little from it, without a projector, as Vicuna's."""
    base, rng = draw(size), np.random.default_rng(1)
    tuned = {name: (values + 3e-4 * rng.standard_normal(values.shape, np.float32)).astype(np.float16) for name, values in base.items()}
    delta = {name: values - base[name] for name, values in tuned.items()}
    base |= {f"model.layers.{number}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for number in range(size.layers)}
    return write_model(folder / "base", size, base), write_model(folder / "delta", size, delta)


def copy_of(source: Path, **options: Any) -> Plan:
    opened = open_checkpoint(source)
    step = Step("copy", (("source", opened.origin),))
    return make_plan(Checkpoint(opened.tensors, opened.config, opened.origin, opened.files, (step,)), **options)


def calls(work: Callable[[], object]) -> int:
    """How many Python functions `work` calls in all its threads, a generator's next item counted as a call. Its cost, without a clock."""
    counts: dict[int, int] = {}

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            thread = threading.get_ident()
            counts[thread] = counts.get(thread, 0) + 1

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return sum(counts.values())


# --- tensors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [40, pytest.param(1020, marks=pytest.mark.faults)])
def test_many_tensors(tmp_path: Path, layers: int) -> None:
    """403 tensors, and 10,203: digested, verified, compared, added, taken apart again."""
    base, delta = write_pair(tmp_path, deep(layers))
    count = 9 * layers + 3
    checksum(base)
    proof = verify(base, deep=True)
    assert (proof.exit_code, len(json.loads((base / MANIFEST).read_text())["tensors"])) == (0, count + layers)
    execute(make_plan(apply_delta(open_checkpoint(base), open_checkpoint(delta))), tmp_path / "out")
    ours, one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base, delta))
    assert len(ours) == count
    assert all((values == one[name] + other[name]).all() for name, values in ours.items())
    found = diff(open_checkpoint(tmp_path / "out"), open_checkpoint(base))
    assert len(found.tensors) == count
    assert not found.equal
    execute(make_plan(make_delta(open_checkpoint(base), open_checkpoint(tmp_path / "out"))), tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert all((one[name] + values == ours[name]).all() for name, values in again.items())


def test_work_grows_with_the_tensors_and_no_faster(tmp_path: Path) -> None:
    """Four times the tensors are at most some four times the calls: nothing looks at every tensor for each of them."""
    counted = []
    for layers in (4, 16):
        folder = tmp_path / str(layers)
        folder.mkdir()
        base, delta = write_pair(folder, deep(layers))

        def work(folder: Path = folder, base: Path = base, delta: Path = delta) -> None:
            execute(make_plan(apply_delta(open_checkpoint(base), open_checkpoint(delta))), folder / "out")
            checksum(base)
            verify(base, deep=True)
            diff(open_checkpoint(base), open_checkpoint(delta))

        work() if layers == 4 else None  # what is done once, imports and patterns, is not counted
        shutil.rmtree(folder / "out", ignore_errors=True)
        counted.append(calls(work))
    assert counted[1] < 5 * counted[0]


# --- shards ------------------------------------------------------------------------------------------------------------


def write_tensors(folder: Path, count: int) -> Path:
    folder.mkdir()
    values = np.random.default_rng(2).standard_normal((count, 20, 30)).astype(np.float16)
    save_file({f"layer.{i}.weight": values[i] for i in range(count)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


class Cut(Exception):
    """What a test raises to end a run as if the process had died."""


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.faults)])
def test_many_shards(tmp_path: Path, count: int) -> None:
    """Written one by one, cut off before the last, continued, and read again as an input of as many files."""
    plan = copy_of(write_tensors(tmp_path / "source", count), max_shard_size=1200)
    journal = partial_folder(tmp_path / "out") / "journal"
    states: list[tuple[int, int]] = []

    def listen(event: Event) -> None:
        if isinstance(event, ShardDone):
            states.append((journal.stat().st_ino, journal.stat().st_size))
            if event.index == count - 1:
                raise Cut

    with pytest.raises(Cut):
        execute(plan, tmp_path / "out", on_event=listen)
    assert len(plan.shards) == count
    lines = [states[0][1], *(after - before for (_, before), (_, after) in itertools.pairwise(states))]
    assert len({inode for inode, _ in states}) == 1, "a line is added: the journal is not written anew for every shard"
    assert max(lines) < 2 * min(lines)
    with journal.open("ab") as file:
        file.write(b'0123456789abcdef {"name": "model-0')  # torn by a power cut
    assert execute(plan, tmp_path / "out").resumed == count - 1
    found = diff(open_checkpoint(tmp_path / "source"), open_checkpoint(tmp_path / "out"))
    assert (found.equal, len(found.tensors)) == (True, count)
    assert verify(tmp_path / "out", deep=True).exit_code == 0
    execute(copy_of(tmp_path / "out"), tmp_path / "joined")
    assert load_file(tmp_path / "joined/model.safetensors").keys() == load_file(tmp_path / "source/model.safetensors").keys()


def test_work_grows_with_the_shards_and_no_faster(tmp_path: Path) -> None:
    counted = []
    for count in (8, 8, 32):
        plan = copy_of(write_tensors(tmp_path / f"{count} {len(counted)}", count), max_shard_size=1200)
        counted.append(calls(lambda plan=plan: execute(plan, tmp_path / f"out{len(counted)}")))  # type: ignore[misc]
    assert counted[2] < 5 * counted[1]


# --- adapters ----------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, size: Size, rank: int, seed: int) -> Arrays:
    """An adapter on every projection; returns its updates by the name of the weight, in float64."""
    rng = np.random.default_rng(seed)
    factors: Arrays = {}
    updates: Arrays = {}
    for name, shape in shapes(size, VOCABULARY):
        if "_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            down = factors[f"{module}.lora_A.weight"] = 0.1 * rng.standard_normal((rank, shape[1]), np.float32)
            up = factors[f"{module}.lora_B.weight"] = 0.1 * rng.standard_normal((shape[0], rank), np.float32)
            updates[name] = up.astype(np.float64) @ down.astype(np.float64)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return updates


@pytest.mark.parametrize("count", [8, pytest.param(100, marks=pytest.mark.faults)])
def test_many_adapters_at_once(tmp_path: Path, count: int) -> None:
    """Their sum is merged in one pass, and the manifest and the card name every one of them."""
    size = deep(2)
    tensors = draw(size)
    base = write_model(tmp_path / "base", size, tensors)
    updates = [write_adapter(tmp_path / f"lora{i}", size, 4, seed=i) for i in range(count)]
    adapters = [open_weighted(str(tmp_path / f"lora{i}")) for i in range(count)]
    execute(make_plan(merge_lora(open_checkpoint(base), adapters)), tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    for name, values in tensors.items():
        wanted = values + sum(update[name] for update in updates) if name in updates[0] else values.astype(np.float64)
        np.testing.assert_allclose(merged[name].astype(np.float64), wanted, rtol=2**-10, atol=2**-14)
    (step,) = json.loads((tmp_path / "out" / MANIFEST).read_text())["recipe"]
    assert [entry["name"] for entry in step["inputs"].values()] == ["base", *(f"lora{i}" for i in range(count))]
    assert all(f"| lora{i} |" in (tmp_path / "out/README.md").read_text() for i in range(count))


@pytest.mark.faults
def test_memory_of_a_hundred_adapters_is_what_was_promised(tmp_path: Path) -> None:
    size = Size("wide", 512, 2, 8, 1024)
    base = write_model(tmp_path / "base", size, draw(size))
    for number in range(100):
        write_adapter(tmp_path / f"lora{number}", size, 64, seed=number)
    done = limited(["merge-lora", "--base", base, *(word for i in range(100) for word in ("--lora", f"lora{i}"))], tmp_path)
    assert done.code == 0, done.err
    assert done.peak <= done.promise


# --- names and shapes --------------------------------------------------------------------------------------------------

LONG = "層" * 1300 + ".größe.\N{LLAMA}" + "x" * 183  # 4,096 bytes, the most that a name may have


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Names of 4 kB and beyond ASCII, tensors without a value, and scalars, as safetensors itself writes them."""
    folder = tmp_path / "modèle"
    folder.mkdir()
    tensors = {
        LONG: np.arange(6, dtype=np.float16).reshape(2, 3),
        LONG[:-1]: np.ones(3, np.float32),
        "größe.weight": np.ones((2, 2), np.float16),
        "scalar": np.array(2.5, np.float32),
        "number": np.array(7, np.int64),
        "empty": np.zeros(0, np.float32),
        "no rows": np.zeros((0, 5), np.float16),
        "no columns": np.zeros((5, 0), np.float16),
        "last and empty": np.zeros((3, 0, 2), np.uint8),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "model.safetensors", tmp_path / "größe der llamas.safetensors")
    return folder


def test_odd_names_and_shapes(odd: Path, tmp_path: Path) -> None:
    assert len(LONG.encode()) == 4096
    with safe_open(odd / "model.safetensors", "np") as file:
        names = set(file.keys())
    checksum(odd)
    assert {entry["name"] for entry in json.loads((odd / MANIFEST).read_text())["tensors"]} == names
    for place in (odd, odd.with_name("größe der llamas.safetensors")):
        checksum(place)
        assert verify(place, deep=True).exit_code == 0
    sums = [(odd, "SHA256SUMS"), (tmp_path, "größe der llamas.safetensors.sha256")]
    assert [subprocess.run(["sha256sum", "-c", "--strict", name], cwd=at, capture_output=True).returncode for at, name in sums] == [0, 0]
    execute(copy_of(odd, max_shard_size=30), tmp_path / "out")
    found = diff(open_checkpoint(odd), open_checkpoint(tmp_path / "out"))
    assert (found.equal, {tensor.name for tensor in found.tensors}) == (True, names)
    execute(copy_of(tmp_path / "out"), tmp_path / "joined")
    assert (tmp_path / "joined/model.safetensors").read_bytes() == (odd / "model.safetensors").read_bytes()


def test_odd_names_on_the_command_line(odd: Path, cli: Callable[..., Any], process: Callable[..., Any]) -> None:
    """All of a name in `--json`, and no line without end for people; stdout is clean UTF-8 also where the locale is C."""
    written = cli("checksum", odd, "--json")
    shown = process("inspect", odd, "--tensors", "--json", env={"LC_ALL": "C", "PYTHONUTF8": "0"})
    assert (written.code, shown.code) == (0, 0)
    assert LONG in json.loads(shown.stdout.splitlines()[-1])["tensors"]


# --- sizes that do not fit here ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def giants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A LLaMA 65B, its delta, an adapter and a LLaVA of that size: true shapes, 400 GB of holes."""
    folder = tmp_path_factory.mktemp("giants")
    size = LLAMA_SIZES[-1]
    write_base(folder / "base", size, sparse=True)
    write_delta(folder / "delta", size, sparse=True, added=0, vision=0)
    write_lora(folder / "lora", size, 64, sparse=True)
    write_llava(folder / "llava", size, sparse=True)
    yield folder
    shutil.rmtree(folder)


GIANTS: dict[str, Callable[[Path], Checkpoint]] = {
    "apply-delta": lambda at: apply_delta(open_checkpoint(at / "base"), open_checkpoint(at / "delta"), accept_base=True),
    "make-delta": lambda at: make_delta(open_checkpoint(at / "base"), open_checkpoint(at / "delta")),
    "merge-lora": lambda at: merge_lora(open_checkpoint(at / "base"), [open_weighted(str(at / "lora"))]),
    "convert": lambda at: convert(open_checkpoint(at / "llava"), "llava-hf"),
}


@pytest.mark.parametrize("command", [pytest.param("apply-delta", marks=pytest.mark.faults), "make-delta", "merge-lora", "convert"])
def test_a_65b_is_promised_the_memory_of_a_small_one(giants: Path, command: str) -> None:
    checkpoint = GIANTS[command](giants)
    plan = make_plan(checkpoint, jobs=2, accept_values=True)
    assert plan.nbytes > 130_000_000_000
    assert sum(shard.nbytes for shard in plan.shards) == plan.nbytes
    assert max(shard.nbytes for shard in plan.shards) <= 5_000_000_000
    assert plan.memory < 640 * MiB


@pytest.mark.faults
@pytest.mark.parametrize("command", ["apply-delta", "merge-lora"])
def test_a_shard_of_a_65b_keeps_the_promise(giants: Path, tmp_path: Path, command: str) -> None:
    """One of 28 shards, written by a process of its own: 5 GB of true work, in the memory of the whole plan."""
    code = (
        "from pathlib import Path\n"
        "from test_load import GIANTS\n"
        "from llava_weights.write.plan import make_plan\n"
        "from llava_weights.cli.report import peak_memory\n"
        "from llava_weights.write.shard import write_shard\n"
        f"plan = make_plan(GIANTS[{command!r}](Path({str(giants)!r})), jobs=2, accept_values=True)\n"
        f"result = write_shard(plan.shards[3], Path({str(tmp_path)!r}), plan.settings)\n"
        "print(plan.shards[3].nbytes, result.nbytes, peak_memory(), plan.memory)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planned, written, peak, promise = map(int, done.stdout.split())
    assert 4_000_000_000 < planned < written
    assert peak <= promise + PYTEST_ITSELF


PYTEST_ITSELF = 60 * MiB  # what importing this file takes beside the program: pytest, safetensors, synthetic


# --- memory and disks that just suffice --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    code: int
    promise: int
    peak: int
    err: str


def limited(arguments: list[Any], folder: Path, prepare: Callable[[], None] = lambda: None, jobs: int = 2) -> Run:
    """The command line in its own process, after `prepare` has run in it, with what it promised and what it took."""
    command = [sys.executable, "-m", "llava_weights", *map(str, arguments), "-o", "out", "--json", "-j", str(jobs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, preexec_fn=prepare, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    plan = next((line for line in lines if line["type"] == "plan"), {})
    return Run(done.returncode, plan.get("memory", 0), lines[-1].get("peak_memory", 0) if lines else 0, done.stderr)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of 60 MB, so that every buffer of a plan is in use."""
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder, Size("small", 1024, 2, 8, 2816))
    return folder


def never_resident(jobs: int) -> int:
    """Address space that is reserved and never becomes resident, measured on CPython 3.11 with torch 2.13 for CPUs, 600 MiB for one job.

    Of 620 MiB mapped by `import torch` some 210 are resident, and in the promise; each thread reserves 64 MiB for glibc's malloc and
    8 MiB for its stack, and the digest threads and the main thread are three more.
    """
    return 500 * MiB + (jobs + 3) * (64 + 8) * MiB


@pytest.mark.faults
@pytest.mark.parametrize("jobs", [1, 2, 8])
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_what_was_promised_suffices(pair: Path, tmp_path: Path, limit: str, jobs: int) -> None:
    """`ulimit -v` counts addresses, so what is never resident comes on top; `ulimit -d` counts private memory: the promise is enough,
    but for the 64 MiB and the stack that each thread reserves."""
    arguments = ["apply-delta", "--base", pair / "base", "--delta", pair / "delta"]
    promise = limited([*arguments, "--dry-run"], tmp_path, jobs=jobs).promise
    extra = never_resident(jobs) if limit == "RLIMIT_AS" else (jobs + 3) * 8 * MiB

    def prepare() -> None:
        resource.setrlimit(getattr(resource, limit), (promise + extra, promise + extra))

    done = limited(arguments, tmp_path, prepare, jobs)
    assert done.code == 0, done.err
    assert done.peak <= done.promise == promise


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A cgroup with this limit; what is put into `cgroup.procs` below it is killed when it needs more."""
    for root, name in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")):
        group = root / f"llava-weights-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / name).exists():
                (group / name).write_text(str(limit))
                yield group
                return
        finally:
            group.rmdir()
    pytest.skip("no cgroup with a memory limit can be made here")


@pytest.mark.faults
def test_a_cgroup_of_what_was_promised_suffices(pair: Path, tmp_path: Path) -> None:
    """As a container's limit: page cache counts too, but the kernel takes it back before it kills."""
    arguments = ["apply-delta", "--base", pair / "base", "--delta", pair / "delta"]
    promise = limited([*arguments, "--dry-run"], tmp_path).promise
    with memory_group(promise) as group:
        done = limited(arguments, tmp_path, lambda: join(group))
        assert done.code == 0, done.err
    with memory_group(64 * MiB) as group:
        assert limited(arguments, tmp_path.parent, lambda: join(group)).code == -9, "the limit is one"


def join(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


@contextmanager
def small_disk(at: Path, nbytes: int) -> Iterator[Path]:
    at.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", str(at)], capture_output=True).returncode:
        pytest.skip("a file system of a given size can't be mounted here")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


@pytest.mark.faults
def test_a_nearly_full_disk(pair: Path, tmp_path: Path) -> None:
    """Too little space is refused before anything is written; space that others take meanwhile ends the run, and what is done is kept."""
    plan = make_plan(apply_delta(open_checkpoint(pair / "base"), open_checkpoint(pair / "delta")), max_shard_size="8MB")
    with small_disk(tmp_path / "disk", plan.nbytes + 32 * MiB) as disk:
        with pytest.raises(OutputError, match="not enough space"):
            execute(plan, disk / "out")
        assert os.listdir(disk) == []
    with small_disk(tmp_path / "disk2", plan.nbytes * 2 + 80 * MiB) as disk:

        def fill(event: Event) -> None:
            if isinstance(event, ShardDone) and event.index == 2:
                free = shutil.disk_usage(disk).free
                with (disk / "another's").open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, free - 4 * MiB)

        with pytest.raises(OutputError, match="No space left") as caught:
            execute(plan, disk / "out", on_event=fill)
        assert caught.value.kept
        assert caught.value.kept.startswith(f"2 of {len(plan.shards)} shards are kept")
        (disk / "another's").unlink()
        assert execute(plan, disk / "out").resumed == 2
