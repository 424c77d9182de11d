"""Killed, cut off and run twice: OUT is absent or complete, whatever happened, and the same command ends in the same bytes."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from crash_children import command, fork_server, run_command, run_plan
from crash_simulator import FOLDER, Recorder, Tree, below, crash_states, materialise, read_tree, sample
from safetensors.torch import save_file

from llava_weights import __version__
from llava_weights.checkpoint.checkpoint import Checkpoint, Step, open_checkpoint
from llava_weights.checks.diff import diff
from llava_weights.checks.verify import checksum
from llava_weights.cli.plot import write_plot
from llava_weights.cli.toy import make_toys
from llava_weights.errors import OutputError
from llava_weights.events import Event, ShardDone
from llava_weights.smoke.recording import Recording, write_recording
from llava_weights.write.execute import execute
from llava_weights.write.plan import Plan, Settings, make_plan
from llava_weights.write.work_folder import partial_folder

SHARDS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs") / "source"
    folder.mkdir()
    torch.manual_seed(4)
    save_file({f"layer.{i}.weight": torch.randn(20, 30).half() for i in range(6)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def plan_of(source: Path, **options: Any) -> Plan:
    opened = open_checkpoint(source)
    step = Step("copy", (("source", opened.origin),))
    checkpoint = Checkpoint(opened.tensors, opened.config, opened.origin, opened.files, (step,))
    plan = make_plan(checkpoint, **{"max_shard_size": 2500, "jobs": 1, **options})
    return replace(plan, settings=Settings(jobs=1, window=700))


@pytest.fixture(scope="module")
def plan(source: Path) -> Plan:
    return plan_of(source)


@pytest.fixture(scope="module")
def expected(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert execute(plan, out).shards == SHARDS
    return read_tree(out)


# --- power cuts, simulated ---------------------------------------------------------------------------------------------

OLD: Tree = {"model.safetensors": b"old" * 400, "notes": FOLDER, "notes/thesis.txt": b"three years of work"}


@dataclass
class Campaign:
    """Crashes of one run, judged on paper and, for some of them, by running the command again."""

    plan: Plan
    expected: Tree
    root: Path
    force: bool = False
    numbers: int = 0

    def record(self, before: Tree, *, restart: bool = False) -> Recorder:
        """Run to the end from `before`, every step noted."""
        self.numbers += 1
        root = self.root / str(self.numbers)
        materialise(before, root)
        recorder = Recorder(root)
        with pytest.MonkeyPatch.context() as patch:
            recorder.watch(patch)
            self.run(root, restart=restart)
        assert below(read_tree(root), "out") == self.expected
        shutil.rmtree(root)
        return recorder

    def run(self, root: Path, *, restart: bool = False) -> None:
        try:
            execute(self.plan, root / "out", force=self.force, restart=restart)
        except OutputError as error:
            if self.force or "exists and is not empty" not in error.what:  # complete: that is checked by the caller
                raise

    def holds(self, tree: Tree) -> bool:
        """OUT is complete, or it is what it was before: absent, or the old one, at hand for the next run."""
        out = below(tree, "out")
        if not self.force:
            return out is None or out == self.expected
        return (below(tree, "out.partial/replaced") if out is None else out) in (OLD, self.expected)


def test_the_recorder_misses_nothing(plan: Plan, expected: Tree, tmp_path: Path) -> None:
    """Played to the end, the steps give the folder that the run left; and each file was synced before it got its last name."""
    recorder = Campaign(plan, expected, tmp_path).record({})
    *_, (_, kind, tree) = crash_states(recorder, seed=0, rounds=0)
    assert (kind, below(tree, "out"), [path for path in tree if "/" not in path]) == ("killed", expected, ["out"])


STARTS: dict[str, Callable[[Campaign], Tree]] = {
    "nothing there": lambda campaign: {},
    "half done": lambda campaign: half_done(campaign),
    "an old output": lambda campaign: old_output(),
    "begun again over an old output": lambda campaign: {**half_done(campaign), **old_output()},
}


def old_output() -> Tree:
    return {"out": FOLDER, **{f"out/{path}": data for path, data in OLD.items()}}


def half_done(campaign: Campaign) -> Tree:
    """What a run leaves that was killed in the second shard."""
    states = [tree for _, kind, tree in crash_states(campaign.record({}), seed=0, rounds=0) if kind == "killed"]
    return next(tree for tree in states if any("00002" in path and tree[path] for path in tree))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("rounds", "samples"), [(2, 8), pytest.param(12, 400, marks=pytest.mark.faults)])
def test_power_cuts(plan: Plan, expected: Tree, tmp_path: Path, start: str, rounds: int, samples: int) -> None:
    """After every step, with everything kept, and with unsynced bytes and names lost, torn or reordered; some of them run again,
    and of those some are cut off a second time."""
    campaign = Campaign(plan, expected, tmp_path, force="old" in start)
    recorder = campaign.record(STARTS[start](campaign), restart="again" in start)
    states = list(crash_states(recorder, seed=1, rounds=rounds))
    assert [(number, kind) for number, kind, tree in states if not campaign.holds(tree)] == []
    finished = [tree for number, _, tree in states if number == len(recorder.steps)]
    assert all(below(tree, "out") == expected for tree in finished)
    for index, (_, _, tree) in sample(states, samples, seed=2):
        again = campaign.record(tree)
        second = [tree for _, _, tree in crash_states(again, seed=index, rounds=1)]
        assert all(map(campaign.holds, second))
        if index % 4 == 0 and second:
            campaign.record(random.Random(index).choice(second))


@pytest.mark.parametrize(("without", "kinds"), [("files", {"ordered", "reordered"}), ("folders", {"reordered"}), ("both", {"reordered"})])
def test_without_its_fsyncs_the_writer_would_be_caught(plan: Plan, expected: Tree, tmp_path: Path, without: str, kinds: set[str]) -> None:
    """The simulator can fail: it finds half outputs where data or names were not synced."""
    campaign = Campaign(plan, expected, tmp_path)
    states = list(crash_states(campaign.record({}), seed=1, rounds=6, without=without))
    broken = [kind for _, kind, tree in states if not campaign.holds(tree)]
    assert kinds <= set(broken)
    assert "killed" not in broken
    finished = [below(tree, "out") == expected for number, _, tree in states if number == states[-1][0]]
    assert not all(finished)


# --- one file --------------------------------------------------------------------------------------------------------


def write_sums(folder: Path, source: Path) -> None:
    checksum(folder, force=True)


def write_logits(folder: Path, source: Path) -> None:
    write_recording(Recording((), {"dtype": "F32", "note": "new" * 1000}), folder / "written", force=True)


def write_svg(folder: Path, source: Path) -> None:
    write_plot(diff(open_checkpoint(source), open_checkpoint(source)), folder / "written.svg")


@pytest.mark.parametrize("write", [write_sums, write_logits, write_svg])
def test_single_files_are_old_or_new(source: Path, tmp_path: Path, write: Callable[[Path, Path], None]) -> None:
    """What `checksum`, `smoke --record` and `diff --plot` write: the earlier file or the whole new one, and the new one at the end."""
    folder = tmp_path / "folder"
    shutil.copytree(source, folder)
    for name in ("SHA256SUMS", "llava-weights.manifest.json", "written"):
        (folder / name).write_text("earlier " * 100)
    recorder, before = Recorder(folder), read_tree(folder)
    with pytest.MonkeyPatch.context() as patch:
        recorder.watch(patch)
        write(folder, source)
    after = read_tree(folder)
    assert before != after
    for number, _, tree in crash_states(recorder, seed=3, rounds=6):
        left = {path: data for path, data in tree.items() if not path.startswith(".")}
        assert all(data in (before.get(path), after[path]) for path, data in left.items()), number
        assert before.keys() <= left.keys()
    assert tree == after


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def children() -> Any:
    return fork_server()


def test_sigkill_at_every_event(plan: Plan, expected: Tree, tmp_path: Path, children: Any) -> None:
    """A process dies at each event of a run; one more finishes what it left, and rewrites no finished shard."""
    events: list[Event] = []
    execute(plan, tmp_path / "undisturbed", on_event=events.append)
    assert len(events) > 4 * SHARDS
    for number in range(1, len(events) + 1):
        out = tmp_path / str(number)
        process = children.Process(target=run_plan, args=(plan, out, number))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not out.exists()
        finished = [event.name for event in events[: number - 1] if isinstance(event, ShardDone)]
        before = {name: identity(partial_folder(out) / "out" / name) for name in finished}
        assert execute(plan, out).resumed >= len(finished)
        assert read_tree(out) == expected
        assert {name: identity(out / name) for name in finished} == before
        assert not partial_folder(out).exists()


@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=pytest.mark.faults)])
def test_sigkill_with_shards_in_flight(plan: Plan, expected: Tree, tmp_path: Path, children: Any, kills: int) -> None:
    """Killed again and again, in the middle of two shards at a time; what is there at the end has the same bytes."""
    several = replace(plan, settings=Settings(jobs=4, window=300, in_flight=2))
    events: list[Event] = []
    execute(several, tmp_path / "undisturbed", on_event=events.append)
    assert read_tree(tmp_path / "undisturbed") == expected
    chance = random.Random(5)
    for number in range(kills):
        out = tmp_path / str(number)
        for _ in range(2):
            process = children.Process(target=run_plan, args=(several, out, chance.randrange(2, len(events))))
            process.start()
            process.join()
            assert process.exitcode == -signal.SIGKILL or out.exists()
        if not out.exists():
            execute(several if number % 2 else plan, out)  # any number of jobs continues
        assert read_tree(out) == expected


def identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory, children: Any) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    make_toys(folder)
    for words in ("apply-delta --base llama --delta delta -o llava", "convert llava --vision-tower clip -o hub"):
        assert run_command(children, words.split(), folder) == 0
    return folder


COMMANDS = {
    "apply-delta": "apply-delta --base {toys}/llama --delta {toys}/delta",
    "make-delta, arithmetic": "make-delta --base {toys}/llama --tuned {toys}/llava",
    "make-delta, integer": "make-delta --base {toys}/llama --tuned {toys}/llava --codec integer",
    "merge-lora": "merge-lora --base {toys}/llava --lora {toys}/lora",
    "convert to llava-hf": "convert {toys}/llava --to llava-hf --vision-tower {toys}/clip",
    "convert to llava": "convert {toys}/hub --to llava",
    "all in one pass": "convert {toys}/llama --delta {toys}/delta --lora {toys}/lora --vision-tower {toys}/clip",
    "checksum": "checksum {folder}/plain",
}
SUMMED = ("plain/SHA256SUMS", "plain/llava-weights.manifest.json")


@dataclass
class Victim:
    """One command that is stopped again and again in one place."""

    children: Any
    name: str
    toys: Path
    folder: Path

    def __post_init__(self) -> None:
        shutil.copytree(self.toys / "vicuna", self.folder / "plain")
        words = COMMANDS[self.name].format(toys=self.toys, folder=self.folder)
        self.arguments = words.split() + ([] if self.name == "checksum" else ["--max-shard-size", "100kB", "-o", "out"])
        begun = time.monotonic()
        assert self.run() == 0
        self.seconds = time.monotonic() - begun
        self.events = int((self.folder / "events").read_text())
        self.expected = self.made()
        self.reset()

    def run(self, event: int = 0, number: int = 0, *, after: float | None = None) -> int:
        (self.folder / "events").unlink(missing_ok=True)
        return run_command(self.children, self.arguments, self.folder, event, number, after=after)

    def made(self) -> Tree:
        tree = read_tree(self.folder)
        return {path: data for path, data in tree.items() if path in SUMMED or path.startswith("out/")}

    def reset(self) -> None:
        for path in SUMMED:
            (self.folder / path).unlink(missing_ok=True)
        for name in ("out", "out.partial"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def check(self) -> bool:
        """Whether it is all there; what is there is whole, and OUT is there at once."""
        made = self.made()
        assert all(self.expected[path] == data for path, data in made.items())
        assert self.name == "checksum" or not made or made == self.expected
        return made == self.expected

    def strike(self, kills: int, chance: random.Random) -> None:
        """So many deaths by SIGKILL, at random events and at random times; each run goes on where the last one ended."""
        died = 0
        for number in itertools.count():
            if died == kills:
                return
            if number % 2:
                died += self.run(after=self.seconds * chance.random()) == -signal.SIGKILL
            else:
                died += self.run(chance.randint(1, self.events), signal.SIGKILL) == -signal.SIGKILL
            if self.check():
                self.reset()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kills", [2, pytest.param(26, marks=pytest.mark.faults)])
def test_every_command_survives(toys: Path, tmp_path: Path, children: Any, name: str, kills: int) -> None:
    """SIGKILL again and again, then SIGTERM and Ctrl-C in the middle: 143, 130, and the same command ends in the same bytes."""
    inputs = read_tree(toys)
    victim = Victim(children, name, toys, tmp_path)
    victim.strike(kills, random.Random(kills))
    victim.reset()
    half = victim.events // 2 + 1
    assert victim.run(half, signal.SIGTERM) == 143
    assert not victim.made()
    assert victim.run(min(half, 3), signal.SIGINT) == 130
    assert not victim.made()
    assert victim.run() == 0
    assert victim.check()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "out") == ["events", "plain"]
    assert read_tree(toys) == inputs


# --- what an earlier run left, and others did to it ------------------------------------------------------------------


def stop_after(plan: Plan, out: Path, children: Any, event: int) -> Path:
    """A run that was killed at an event; its `OUT.partial`."""
    process = children.Process(target=run_plan, args=(plan, out, event))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return partial_folder(out)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    """The right bytes, but elsewhere: OUT would hold a link."""
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "cut": lambda path: os.truncate(path, 100),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link": link,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_made_again_and_no_other(plan: Plan, expected: Tree, tmp_path: Path, damage: str, half: Path) -> None:
    shutil.copytree(half, tmp_path / "out.partial")
    first, second = (tmp_path / "out.partial/out" / shard.name for shard in plan.shards[:2])
    DAMAGES[damage](first)
    kept = identity(second)
    assert execute(plan, tmp_path / "out").resumed == 1
    assert read_tree(tmp_path / "out") == expected
    assert identity(tmp_path / "out" / second.name) == kept
    assert not (tmp_path / "out" / first.name).is_symlink()


@pytest.fixture(scope="module")
def half(plan: Plan, tmp_path_factory: pytest.TempPathFactory, children: Any) -> Path:
    """`OUT.partial` of a run that was killed in its third shard."""
    events: list[Event] = []
    folder = tmp_path_factory.mktemp("half")
    execute(plan, folder / "whole", on_event=events.append)
    second = [number for number, event in enumerate(events, start=1) if isinstance(event, ShardDone)][1]
    return stop_after(plan, folder / "out", children, second + 2)


def scribble(partial: Path) -> None:
    (partial / "lock").write_bytes(bytes(range(256)) * 100)


def add_garbage(partial: Path) -> None:
    journal = partial / "journal"
    journal.write_bytes(journal.read_bytes() + b'0123456789abcdef {"name": 1}\n\xff')


def forged(**values: object) -> Callable[[Path], None]:
    """Lines with the right check, of another version of this program or of a stranger; None takes a key out."""

    def change(partial: Path) -> None:
        lines = []
        for line in (partial / "journal").read_bytes().splitlines():
            entry = json.loads(line.partition(b" ")[2]) | values
            text = json.dumps({key: value for key, value in entry.items() if value is not None}).encode()
            lines.append(hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text)
        (partial / "journal").write_bytes(b"\n".join(lines) + b"\n")

    return change


def plant_links(partial: Path) -> None:
    """Where the run writes under a name known before: nothing is written through a link."""
    for name in (".journal.part", ".plan.json.part", f"out/.model-00003-of-0000{SHARDS}.safetensors.part", "out/config.json", "out/stray"):
        (partial / name).unlink(missing_ok=True)
        (partial / name).symlink_to(partial.parent / "thesis.txt")


def move_out(partial: Path) -> None:
    (partial / "out").rename(partial.parent / "elsewhere")
    (partial / "out").symlink_to(partial.parent / "elsewhere")


STRANGE: dict[str, tuple[Callable[[Path], object], int]] = {  # what somebody did, and how many shards are still trusted
    "a lock of garbage": (scribble, 2),
    "a lock of a process that is another now": (lambda partial: (partial / "lock").write_text(f"{os.getppid()}\n"), 2),
    "a journal of garbage": (lambda partial: (partial / "journal").write_bytes(random.Random(0).randbytes(5000)), 0),
    "a journal with garbage behind": (add_garbage, 2),
    "a journal cut in its last line": (lambda partial: os.truncate(partial / "journal", (partial / "journal").stat().st_size - 9), 1),
    "a journal without digests": (forged(sha256=None), 0),
    "a journal of more than is known": (forged(more=1), 0),
    "a journal of other tensors": (forged(tensors={"x": "0" * 64}), 0),
    "a journal of tensors without names": (forged(tensors=[]), 0),
    "a journal of words where numbers belong": (forged(nbytes="many"), 0),
    "a journal of tallies that are none": (forged(tallies={"overflow": []}), 0),
    "no journal": (lambda partial: (partial / "journal").unlink(), 0),
    "a torn plan": (lambda partial: os.truncate(partial / "plan.json", 50), 0),
    "a plan of another kind": (lambda partial: (partial / "plan.json").write_text("[1, 2]"), 0),
    "a plan without end": (lambda partial: (partial / "plan.json").write_text("[" * 100_000), 0),
    "no plan": (lambda partial: (partial / "plan.json").unlink(), 0),
    "no out": (lambda partial: shutil.rmtree(partial / "out"), 0),
    "out elsewhere": (move_out, 0),
    "out is a file": (lambda partial: (shutil.rmtree(partial / "out"), (partial / "out").write_text("")), 0),
    "planted links": (plant_links, 2),
}


@pytest.mark.parametrize("case", STRANGE)
@pytest.mark.parametrize("force", [False, True])
def test_strange_work_folders(plan: Plan, expected: Tree, tmp_path: Path, half: Path, case: str, force: bool) -> None:
    """Whatever lies in OUT.partial: the right output, and nothing outside is touched. With an old OUT too, which is never taken for it."""
    change, trusted = STRANGE[case]
    shutil.copytree(half, tmp_path / "out.partial")
    (tmp_path / "thesis.txt").write_text("three years of work")
    if force:
        materialise(OLD, tmp_path / "out")
    change(tmp_path / "out.partial")
    elsewhere = read_tree(tmp_path / "elsewhere")
    assert execute(plan, tmp_path / "out", force=force).resumed == trusted
    assert read_tree(tmp_path / "out") == expected
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"
    assert read_tree(tmp_path / "elsewhere") == elsewhere
    assert not (tmp_path / "out.partial").exists()


def test_a_lock_that_is_a_link(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "thesis.txt").write_text("three years of work")
    (tmp_path / "out.partial/lock").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(OutputError):
        execute(plan, tmp_path / "out")
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"


def test_a_folder_of_others_is_no_work_folder(plan: Plan, tmp_path: Path) -> None:
    materialise({"out": FOLDER, "out/film.part": b"half of it"}, tmp_path / "out.partial")
    for restart in (False, True):
        with pytest.raises(OutputError, match="is not the work of an earlier run"):
            execute(plan, tmp_path / "out", restart=restart)
    assert read_tree(tmp_path) == {"out.partial": FOLDER, "out.partial/out": FOLDER, "out.partial/out/film.part": b"half of it"}


def test_an_old_output_is_not_taken_for_the_new_one(plan: Plan, expected: Tree, tmp_path: Path, half: Path) -> None:
    """`out/` was deleted by hand: as after a publication that was cut short, but the bytes of OUT are not those of the journal."""
    shutil.copytree(half, tmp_path / "out.partial")
    shutil.rmtree(tmp_path / "out.partial/out")
    materialise(OLD, tmp_path / "out")
    with pytest.raises(OutputError, match="exists and is not empty"):
        execute(plan, tmp_path / "out")
    assert read_tree(tmp_path / "out") == OLD
    execute(plan, tmp_path / "out", force=True)
    assert read_tree(tmp_path / "out") == expected


def test_what_appears_during_the_run_is_not_replaced(plan: Plan, expected: Tree, tmp_path: Path) -> None:
    def copy_here(event: Event) -> None:
        if isinstance(event, ShardDone) and event.index == 1:
            materialise(OLD, tmp_path / "out")

    with pytest.raises(OutputError) as caught:
        execute(plan, tmp_path / "out", on_event=copy_here)
    assert read_tree(tmp_path / "out") == OLD
    assert caught.value.kept == f"{SHARDS} of {SHARDS} shards are kept in `out.partial`; `out` was not touched"
    (tmp_path / "out").rename(tmp_path / "mine")
    assert execute(plan, tmp_path / "out").resumed == SHARDS
    assert read_tree(tmp_path / "out") == expected


def test_the_old_output_comes_back(plan: Plan, source: Path, expected: Tree, tmp_path: Path) -> None:
    """Killed between its two renames: any next run, even one that is refused, brings the old output back before it does anything."""
    campaign = Campaign(plan, expected, tmp_path / "campaign", force=True)
    states = crash_states(campaign.record(old_output()), seed=0, rounds=0)
    between = next(tree for _, _, tree in states if "out" not in tree)
    for folder, force, words in (("a", False, "exists and is not empty"), ("b", True, "belongs to another command")):
        materialise(between, tmp_path / folder)
        with pytest.raises(OutputError, match=words):
            execute(plan if folder == "a" else plan_of(source, max_shard_size=4000), tmp_path / folder / "out", force=force)
        assert read_tree(tmp_path / folder / "out") == OLD
        assert execute(plan, tmp_path / folder / "out", force=True).resumed == SHARDS
        assert read_tree(tmp_path / folder / "out") == expected


def change_config(source: Path) -> None:
    (source / "config.json").write_text('{"model_type": "llama", "rope_theta": 1e6}')


def change_weights(source: Path) -> None:
    torch.manual_seed(5)
    save_file({f"layer.{i}.weight": torch.randn(20, 30).half() for i in range(6)}, source / "model.safetensors", metadata={"format": "pt"})


CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "weights": (change_weights, {}, "inputs, now"),
    "time": (lambda source: os.utime(source / "model.safetensors", (1, 1)), {}, "inputs, now"),
    "config": (change_config, {}, "small files, now"),
    "option": (lambda source: None, {"max_shard_size": 4000}, "options, now"),
    "further option": (lambda source: None, {"options": {"codec": "integer"}}, "options, now"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_work_is_refused_with_what_changed(source: Path, tmp_path: Path, children: Any, change: str) -> None:
    shutil.copytree(source, tmp_path / "source")
    partial = stop_after(plan_of(tmp_path / "source"), tmp_path / "out", children, 9)
    act, options, part = CHANGES[change]
    act(tmp_path / "source")
    before = read_tree(partial / "out")
    with pytest.raises(OutputError, match="belongs to another command, or an input changed since") as caught:
        execute(plan_of(tmp_path / "source", **options), tmp_path / "out")
    assert part in caught.value.facts
    assert caught.value.exit_code == 5
    assert read_tree(partial / "out") == before
    assert not (tmp_path / "out").exists()


def test_another_version_is_refused(plan: Plan, tmp_path: Path, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(half, tmp_path / "out.partial")
    monkeypatch.setattr("llava_weights.write.plan.__version__", "99.0")
    with pytest.raises(OutputError) as caught:
        execute(plan, tmp_path / "out")
    assert (caught.value.facts["version, then"], caught.value.facts["version, now"]) == (__version__, "99.0")


def test_a_second_run_stops_and_touches_nothing(toys: Path, tmp_path: Path, children: Any) -> None:
    """The first one is stopped in the middle by SIGSTOP; then it goes on, as if nothing had been."""
    arguments = [*COMMANDS["apply-delta"].format(toys=toys).split(), "--max-shard-size", "100kB", "-o", str(tmp_path / "out")]
    (first_place := tmp_path / "first").mkdir()
    (second_place := tmp_path / "second").mkdir()
    first = children.Process(target=command, args=(arguments, first_place, 4, signal.SIGSTOP))
    first.start()
    try:
        process = psutil.Process(first.pid)
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        before = {path: identity(path) for path in sorted((tmp_path / "out.partial").rglob("*"))}
        for more in ([], ["--force"], ["--restart"]):
            assert run_command(children, [*arguments, *more], second_place) == 5
            assert {path: identity(path) for path in sorted((tmp_path / "out.partial").rglob("*"))} == before
            assert not (tmp_path / "out").exists()
        process.send_signal(signal.SIGCONT)
        first.join()
    finally:
        first.kill()
    assert first.exitcode == 0
    assert (tmp_path / "out/SHA256SUMS").exists()
