"""Power cuts on paper: what a disk may hold after each step of a run, by the steps that the run really took.

`Recorder` watches one folder while the writer works: at every system call that changes names, and at every `fsync`, it looks at the
whole tree. What differs from the last look are the steps: a name made, moved or removed, bytes changed. So no call that the
writer makes can be missed, whatever it is; only `fsync` has to be seen, since it leaves no trace in a tree.

`crash_states` then plays the steps to a machine that loses power after each of them. Synced bytes are there. Of other bytes each
block is old, new or zero, and the end may be missing. Of names that no fsync of their folder made durable, a part is lost: the
latest ones (`ordered`, as a journal keeps them), or any (reordered, as POSIX allows). A rename is one step, durable with either folder.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

BLOCK = 512  # what a disk writes whole
ROOT = 0
HOOKS = ("rename", "replace", "mkdir", "rmdir", "unlink", "remove", "link", "symlink", "truncate", "ftruncate", "pwrite", "write")
FOLDER = None  # what a folder has in place of bytes

Tree = dict[str, bytes | None]  # path inside the watched folder -> bytes, or FOLDER


class Entry(NamedTuple):
    """Names change: `node` leaves the place `source` and comes to the place `target`, each a (folder, name)."""

    node: int
    source: tuple[int, str] | None
    target: tuple[int, str] | None


class Data(NamedTuple):
    """Bytes change."""

    node: int
    data: bytes


class Sync(NamedTuple):
    """An fsync of a file or a folder."""

    node: int
    folder: bool


Step = Entry | Data | Sync


@dataclass
class Recorder:
    """The steps of what happens below `root`, in order. What is there at the beginning counts as durable."""

    root: Path
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.nodes: dict[int, int] = {}  # inode -> node
        self.places: dict[int, tuple[int, str]] = {}
        self.contents: dict[int, bytes | None] = {}
        self.count = 0
        self.look()
        self.start, self.steps = list(self.steps), []

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Look after each call that may change something. `fsync` is seen and not done: no disk is needed here."""
        for name in HOOKS:
            patch.setattr(os, name, self._seen(getattr(os, name)))
        patch.setattr(os, "fsync", self._fsync)

    def _seen(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self.lock:
                self.look()
                result = original(*arguments, **options)
                self.look()
                return result

        return call

    def _fsync(self, fd: int) -> None:
        with self.lock:
            self.look()
            inode = os.fstat(fd).st_ino
            node = ROOT if inode == self.root.stat().st_ino else self.nodes[inode]
            self.steps.append(Sync(node, node == ROOT or self.contents[node] is FOLDER))

    def look(self) -> None:
        """Compare the tree with the last look, and note what changed."""
        seen = dict(self._walk(self.root, ROOT))
        taken = {place for place, _ in seen.values()}
        for node in [node for node in self.places if node not in seen]:
            if (place := self.places.pop(node)) not in taken:  # else a rename replaced it, in the one step that follows
                self.steps.append(Entry(node, place, None))
            del self.contents[node]
        self.nodes = {inode: node for inode, node in self.nodes.items() if node in seen}
        for node, (place, data) in seen.items():
            if self.places.get(node) != place:
                self.steps.append(Entry(node, self.places.get(node), place))
            if data is not FOLDER and self.contents.get(node, b"") != data:
                self.steps.append(Data(node, data))
            self.places[node], self.contents[node] = place, data

    def _walk(self, folder: Path, parent: int) -> Iterator[tuple[int, tuple[tuple[int, str], bytes | None]]]:
        for item in sorted(os.scandir(folder), key=lambda item: item.name):
            inode, is_folder = item.inode(), item.is_dir(follow_symlinks=False)
            node = self.nodes.get(inode)
            if node is None or (self.contents.get(node, FOLDER if is_folder else b"") is FOLDER) != is_folder:
                self.count += 1
                node = self.nodes[inode] = self.count
            yield node, ((parent, item.name), FOLDER if is_folder else Path(item).read_bytes())
            if is_folder:
                yield from self._walk(Path(item), node)


@dataclass
class Disk:
    """What a machine holds in memory, and what of it would survive."""

    places: dict[tuple[int, str], int] = field(default_factory=dict)  # as far as durable
    pending: list[Entry] = field(default_factory=list)
    synced: dict[int, bytes] = field(default_factory=dict)
    now: dict[int, bytes] = field(default_factory=dict)
    folders: set[int] = field(default_factory=lambda: {ROOT})

    def take(self, step: Step) -> None:
        if isinstance(step, Data):
            self.now[step.node] = step.data
        elif isinstance(step, Entry):
            self.pending.append(step)
        elif not step.folder:
            self.synced[step.node] = self.now.get(step.node, b"")
        else:
            touched = [entry for entry in self.pending if step.node in {place[0] for place in (entry.source, entry.target) if place}]
            for entry in touched:
                put(self.places, entry)
                self.pending.remove(entry)

    def everything(self) -> Tree:
        """Nothing is lost: what the next process sees when this one is killed."""
        places = dict(self.places)
        for entry in self.pending:
            put(places, entry)
        return self._tree(places, lambda node: self.now.get(node, b""))

    def after_power_cut(self, chance: random.Random, *, ordered: bool) -> Tree:
        """One of the trees that the next boot may find."""
        places = dict(self.places)
        kept = chance.randint(0, len(self.pending)) if ordered else None
        share = chance.random()
        for number, entry in enumerate(self.pending):
            if number < kept if kept is not None else chance.random() < share:
                put(places, entry)
        return self._tree(places, lambda node: torn(self.synced.get(node, b""), self.now.get(node, b""), chance))

    def _tree(self, places: Mapping[tuple[int, str], int], read: Callable[[int], bytes]) -> Tree:
        inside: dict[int, list[tuple[str, int]]] = {}
        for (folder, name), node in places.items():
            inside.setdefault(folder, []).append((name, node))
        tree: Tree = {}

        def fill(folder: int, prefix: str) -> None:
            for name, node in inside.get(folder, ()):
                tree[prefix + name] = FOLDER if node in self.folders else read(node)
                fill(node, f"{prefix}{name}/")

        fill(ROOT, "")
        return tree


def put(places: dict[tuple[int, str], int], entry: Entry) -> None:
    if entry.source and places.get(entry.source) == entry.node:
        del places[entry.source]
    if entry.target:
        places[entry.target] = entry.node


def torn(old: bytes, new: bytes, chance: random.Random) -> bytes:
    """Bytes of a file that was not synced since it held `old`: any mixture of blocks, at any length on the way."""
    if old == new:
        return new
    length = chance.choice([len(old), len(new), chance.randint(0, len(new))])
    versions = [data.ljust(length, b"\0") for data in (old, new, b"")]
    weights = chance.choice([(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 5, 1)])
    return b"".join(chance.choices(versions, weights)[0][at : at + BLOCK] for at in range(0, length, BLOCK))[:length]


def crash_states(recorder: Recorder, *, seed: int, rounds: int, without: str = "") -> Iterator[tuple[int, str, Tree]]:
    """After each step: the tree of a killed process, then `rounds` of power cuts, ordered and not. `without` forgets the fsyncs of
    "files", "folders" or "both", to show what they are for. Yields (steps taken, kind, tree)."""
    disk, chance = Disk(), random.Random(seed)
    disk.folders |= {node for node in recorder.contents if recorder.contents[node] is FOLDER}
    disk.folders |= {step.node for step in recorder.steps if isinstance(step, Sync) and step.folder}
    disk.folders |= {step.target[0] for step in (*recorder.start, *recorder.steps) if isinstance(step, Entry) and step.target}
    for step in recorder.start:
        disk.take(step)
    for entry in disk.pending:
        put(disk.places, entry)
    disk.pending, disk.synced = [], dict(disk.now)
    for number, step in enumerate(recorder.steps, start=1):
        if not (isinstance(step, Sync) and without in ("both", "folders" if step.folder else "files")):
            disk.take(step)
        yield number, "killed", disk.everything()
        for _ in range(rounds):
            yield number, "ordered", disk.after_power_cut(chance, ordered=True)
            yield number, "reordered", disk.after_power_cut(chance, ordered=False)


def materialise(tree: Tree, root: Path) -> None:
    """Make a crash state real."""
    root.mkdir(parents=True)
    for path, data in tree.items():
        if data is FOLDER:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def below(tree: Mapping[str, bytes | None], folder: str) -> Tree | None:
    """The part of a tree that lies in `folder`, None where there is no such folder."""
    if folder not in tree:
        return None
    return {path.removeprefix(f"{folder}/"): data for path, data in tree.items() if path.startswith(f"{folder}/")}


def read_tree(root: Path) -> Tree:
    paths: Iterable[Path] = sorted(root.rglob("*"))
    return {path.relative_to(root).as_posix(): FOLDER if path.is_dir() else path.read_bytes() for path in paths}


def sample(states: Sequence[Any], count: int, seed: int) -> list[Any]:
    """`count` of them spread over the whole run."""
    chance = random.Random(seed)
    return sorted(chance.sample(list(enumerate(states)), min(count, len(states))))
