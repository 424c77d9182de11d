"""The disk as an enemy: any call may fail, at any time. The run ends with the right code and one clear error, nothing half-made, and the
same command without the fault makes the bytes of an undisturbed run."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import ALL, EITHER_INPUT, EITHER_OUTPUT, HARMLESS_INPUT, HARMLESS_OUTPUT, INPUT, NONE, OUTPUT, Fault, Injector
from safetensors.torch import save_file

from llava_weights.checkpoint.checkpoint import Checkpoint, Step, open_checkpoint
from llava_weights.cli.console import Console
from llava_weights.errors import LlavaWeightsError
from llava_weights.events import Event, Progress, ShardDone, Started
from llava_weights.tensors.lazy import Add
from llava_weights.write.execute import execute
from llava_weights.write.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {  # words with a slash are folders of the fixtures
    "apply-delta": ["--base", "A-delta-v0/base-hf-bin", "--delta", "A-delta-v0/delta-307-apr17", "--max-shard-size", "100kB"],
    "merge-lora": ["--base", "B-lora/base-vicuna-tiny", "--lora", "B-lora/llava-v1.5-tiny-lora", "--max-shard-size", "100kB"],
    "convert": ["C-v1.5/original-with-vision-safetensors", "--vision-tower", "common/clip-tiny-42px", "--max-shard-size", "200kB"],
}
Run = Callable[[Path, Path], tuple[int, str]]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its bytes and the time of its last change."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_small(inputs: Path, out: Path) -> tuple[int, str]:
    """The library on three tensors, base plus delta, one a shard: exit code and words."""
    try:
        base, delta = open_checkpoint(inputs / "base"), open_checkpoint(inputs / "delta")
        tensors = {n: Add(dtype="F16", shape=t.shape, base=t, delta=delta.tensors[n]) for n, t in base.tensors.items()}
        step = Step("add", (("base", base.origin), ("delta", delta.origin)))
        made = Checkpoint(tensors, base.config, base.origin, base.files, (step,))
        execute(make_plan(made, max_shard_size=500), out)
    except LlavaWeightsError as error:
        return error.exit_code, f"error: {error.what} {error.facts} {error.hint} {error.kept or 'Nothing was written'}"
    return 0, ""


def command(*words: object) -> tuple[int, str]:
    """The command line in this process: exit code and what it said on stderr."""
    from llava_weights.cli.main import app

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        app([str(word) for word in words])
    return int(end.value.code or 0), said.getvalue()


def words_of(name: str, inputs: Path, out: Path) -> list[str]:
    return [name, *(str(inputs / word) if "/" in word else word for word in COMMANDS[name]), "-o", str(out)]


class Bench:
    """One command on its inputs, what it makes undisturbed, and a place where it is disturbed."""

    def __init__(self, folder: Path, run_on: Run) -> None:
        self.inputs, self.place, self.run_on = folder / "inputs", folder / "place", run_on
        self.out = self.place / "out"
        self.before = snapshot(self.inputs)
        self.clear()
        assert self.run()[0] == 0
        self.expected = content(self.out)

    def run(self) -> tuple[int, str]:
        return self.run_on(self.inputs, self.out)

    def clear(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()

    def strike(self, fault: Fault, root: Path, number: int) -> tuple[int, str, Injector]:
        """A run with the fault in it. Whatever comes of it, the inputs are as they were and OUT is whole or absent."""
        self.clear()
        injector = Injector(fault, root, number, out=self.out)
        with pytest.MonkeyPatch.context() as patch:
            injector.install(patch)
            code, said = self.run()
        where = (str(fault), number, injector.struck, said)
        assert snapshot(self.inputs) == self.before, where
        assert not self.out.exists() or content(self.out) == self.expected, where
        assert said.count("error: ") == (code != 0), where
        assert "Traceback" not in said
        return code, said, injector

    def recover(self) -> None:
        """The same command, undisturbed: the same bytes, and nothing left behind."""
        with pytest.MonkeyPatch.context() as patch:
            Injector(Fault("none", ""), self.place).install(patch)  # for its quick fsync
            if not self.out.exists() or (self.place / "out.partial/plan.json").exists():
                code, said = self.run()
                assert code == 0, said
                assert os.listdir(self.place) == ["out"]
        assert content(self.out) == self.expected

    def count(self, fault: Fault, root: Path) -> int:
        """How many such calls an undisturbed run makes."""
        return self.strike(fault, root, NONE)[2].seen

    def fails(self, fault: Fault, root: Path, code: int, numbers: Sequence[int]) -> None:
        """Each of these calls ends the run with this code, the reason and the file. Only the cleaning after the end may go without."""
        for number in numbers:
            ended, said, injector = self.strike(fault, root, number)
            assert injector.struck, (str(fault), number)
            where = (str(fault), number, injector.struck, said)
            assert ended == code or (ended == 0 and injector.late), where
            if ended:
                assert fault.reason in said, where
                name = re.sub(r"(\.[0-9a-f]{8})?\.part$", "", os.path.basename(injector.struck[0])).lstrip(".")
                assert f"`{name}`" in said or f"/{name}" in said, where
                assert ("`out` is complete" in said) == self.out.exists(), where
            self.recover()

    def may_fail(self, fault: Fault, root: Path, code: int, numbers: Sequence[int]) -> None:
        """Each of these calls ends the run with this code, or makes no difference."""
        for number in numbers:
            ended, said, injector = self.strike(fault, root, number)
            assert injector.struck, (str(fault), number)
            assert ended in (0, code), (str(fault), number, injector.struck, said)
            self.recover()

    def survives(self, fault: Fault, root: Path) -> None:
        """Every call fails, or does half of its work, and nobody is any the wiser."""
        code, said, injector = self.strike(fault, root, ALL)
        assert injector.struck, str(fault)
        assert (code, content(self.out)) == (0, self.expected), (str(fault), said)


def some(total: int) -> list[int]:
    """Two of 1 to `total`, where all of them would take too long: one in the middle and the last."""
    return sorted({(total + 1) // 2, total})


def one_of_each(table: Sequence[Fault]) -> list[Fault]:
    """One fault for each kind of call."""
    return list({fault.call: fault for fault in reversed(table)}.values())[::-1]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(5)
    values = {f"layer.{number}.weight": torch.randn(8, 30).half() for number in range(2)}
    values["lm_head.weight"] = torch.randn(256, 130).half()  # 66 kB: from 64 KiB on, the page cache is given back
    for name in ("base", "delta"):
        (folder / "inputs" / name).mkdir(parents=True)
        (folder / "inputs" / name / "config.json").write_text('{"model_type": "llama"}')
    (folder / "inputs/base/LICENSE").write_text("as you like")
    torch.save(values, folder / "inputs/base/pytorch_model.bin")
    save_file(values, folder / "inputs/delta/model.safetensors")
    return Bench(folder, run_small)


@pytest.fixture(scope="module")
def benches(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    made: dict[str, Bench] = {}

    def bench(name: str) -> Bench:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            copy_inputs(fixtures, name, folder / "inputs")
            made[name] = Bench(folder, lambda inputs, out: command(*words_of(name, inputs, out)))
        return made[name]

    return bench


def copy_inputs(fixtures: Path, name: str, to: Path) -> None:
    for word in COMMANDS[name]:
        if "/" in word:
            shutil.copytree(fixtures / word, to / word)


@pytest.mark.parametrize("fault", one_of_each(OUTPUT), ids=str)
def test_a_write_that_fails(small: Bench, fault: Fault) -> None:
    small.fails(fault, small.place, 5, some(small.count(fault, small.place)))


@pytest.mark.parametrize("fault", one_of_each(INPUT), ids=str)
def test_a_read_that_fails(small: Bench, fault: Fault) -> None:
    small.fails(fault, small.inputs, 3, some(small.count(fault, small.inputs)))


@pytest.mark.parametrize("fault", one_of_each(EITHER_OUTPUT), ids=str)
def test_a_question_or_a_deletion_that_fails(small: Bench, fault: Fault) -> None:
    small.may_fail(fault, small.place, 5, some(small.count(fault, small.place)))


@pytest.mark.parametrize("fault", HARMLESS_OUTPUT, ids=str)
def test_what_the_output_may_lack(small: Bench, fault: Fault) -> None:
    small.survives(fault, small.place)


@pytest.mark.parametrize("fault", HARMLESS_INPUT, ids=str)
def test_what_the_inputs_may_lack(small: Bench, fault: Fault) -> None:
    small.survives(fault, small.inputs)


def test_without_locks_there_is_a_warning(benches: Callable[[str], Bench]) -> None:
    bench = benches("convert")
    code, said, _ = bench.strike(Fault("flock", "ENOLCK"), bench.place, ALL)
    assert code == 0
    assert "warning: there are no locks where `out.partial` lies: start no second run with this output" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands(benches: Callable[[str], Bench], name: str) -> None:
    """One write and one read of each command fail; the other ways are those of the small run, or marked `faults`."""
    bench = benches(name)
    write, read = {"apply-delta": (0, 0), "merge-lora": (2, 1), "convert": (1, 2)}[name]
    outputs = (Fault("pwrite", "ENOSPC"), Fault("write", "EDQUOT"), Fault("fsync", "EIO"))
    inputs = (Fault("preadv", "EIO"), Fault("preadv", "ESTALE"), Fault("open", "EACCES"))
    bench.fails(outputs[write], bench.place, 5, [2])
    bench.fails(inputs[read], bench.inputs, 3, [9])


EVERY = [(name, "output", fault) for name in ("small", *COMMANDS) for fault in (*OUTPUT, *EITHER_OUTPUT)]
EVERY += [(name, "inputs", fault) for name in ("small", *COMMANDS) for fault in (*INPUT, *EITHER_INPUT)]


@pytest.mark.faults
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("name", "side", "fault"), EVERY, ids=str)
def test_every_call(small: Bench, benches: Callable[[str], Bench], name: str, side: str, fault: Fault) -> None:
    """One run for each call of this kind, which fails."""
    bench = small if name == "small" else benches(name)
    code, root, sure = (5, bench.place, OUTPUT) if side == "output" else (3, bench.inputs, INPUT)
    total = bench.count(fault, root)
    (bench.fails if fault in sure else bench.may_fail)(fault, root, code, range(1, total + 1))


# --- a source that changes while it is read --------------------------------------------------------------------------


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def edited(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"not what it was")
    os.utime(path, (1, 1))


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def replaced(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes()[::-1])
    copy.replace(path)


MISCHIEF = {function.__name__: function for function in (truncated, edited, grown, replaced, Path.unlink)}
READERS = {  # command, the exit code for a source that changed; "{}" is a folder or FILE of it
    "verify --deep": (["verify", "{}", "--deep"], 4),
    "checksum": (["checksum", "{}"], 3),
    "diff": (["diff", "{}", "{}"], 3),
}
SOURCES = {
    "torch zip": ("A-delta-v0/base-hf-bin", "pytorch_model-00001-of-00002.bin"),
    "safetensors": ("C-v1.5/original-with-vision-safetensors", "model-00001-of-00002.safetensors"),
}


def a_few(*axes: Iterable[str]) -> list[Any]:
    """Every combination; in the default suite so many that each value is among them, the others are marked `faults`."""
    lists = [list(axis) for axis in axes]
    quick = {tuple(axis[number % len(axis)] for axis in lists) for number in range(max(map(len, lists)))}
    return [choice if choice in quick else pytest.param(*choice, marks=pytest.mark.faults) for choice in itertools.product(*lists)]


def disturbed(words: Sequence[object], when: type, act: Callable[[], None]) -> tuple[int, str]:
    """The command, stopped at its first event of this kind while `act` is done. No process ever maps an input: a mapped file that is
    truncated kills it."""
    acted: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        shown = Console.on_event

        def on_event(self: Console, event: Event) -> None:
            if isinstance(event, when) and not acted:
                acted.append(True)
                act()
            maps = Path("/proc/self/maps").read_text()
            assert not any(suffix in maps for suffix in (".bin\n", ".safetensors\n", ".model\n", ".json\n"))
            shown(self, event)

        patch.setattr(Console, "on_event", on_event)
        found = command(*words)
    assert acted
    return found


@pytest.mark.parametrize(("reader", "source", "mischief"), a_few(READERS, SOURCES, MISCHIEF))
def test_a_source_changes_under_a_reader(fixtures: Path, tmp_path: Path, reader: str, source: str, mischief: str) -> None:
    folder, file = SOURCES[source]
    shutil.copytree(fixtures / folder, tmp_path / "model")
    words, expected = READERS[reader]
    place = tmp_path / "model"
    code, said = disturbed([word.format(place) for word in words], Started, lambda: MISCHIEF[mischief](place / file))
    assert code == expected, said
    assert "Traceback" not in said
    assert file in said or code == 4
    assert not (place / "SHA256SUMS").exists()


def turned(folder: Path) -> None:
    """All values the other way round, in the same files, of the same size, and the time set back: only the change time tells."""
    for path in folder.glob("*.safetensors"):
        status, data = path.stat(), path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:start] + np.frombuffer(data[start:], np.uint16)[::-1].tobytes())
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("touch", [turned, lambda folder: [path.chmod(0o600) for path in folder.glob("*.safetensors")]])
def test_a_source_changes_unseen_under_a_reader(fixtures: Path, tmp_path: Path, reader: str, touch: Callable[[Path], None]) -> None:
    """Other bytes after some were read, though size and time are the same; or other rights, which are no matter."""
    words, expected = READERS[reader]
    place = tmp_path / "model"
    shutil.copytree(fixtures / "C-v1.5/original-with-vision-safetensors", place)
    places = iter((place, fixtures / "C-v1.5/original-with-vision-safetensors"))
    code, said = disturbed([next(places) if word == "{}" else word for word in words], Progress, lambda: touch(place))
    if touch is turned:
        assert code == expected, said
        assert "changed while it was being read" in said or code == 4  # the words of `verify` are on stdout
        assert not (place / "SHA256SUMS").exists()
    else:
        assert code in (0, 3), said  # 3: nothing is there to verify it against
        assert "changed while" not in said


@pytest.mark.parametrize(("name", "mischief"), a_few(COMMANDS, MISCHIEF))
def test_a_source_changes_during_the_run(fixtures: Path, tmp_path: Path, benches: Callable[[str], Bench], name: str, mischief: str) -> None:
    """Changed back, the same command goes on: the shards that were made of what was there are kept."""
    bench, inputs, out = benches(name), tmp_path / "inputs", tmp_path / "out"
    copy_inputs(fixtures, name, inputs)
    victim = next(path for path in sorted(inputs.rglob("*-00002-of-00002.*")))
    whole, times = victim.read_bytes(), victim.stat()
    code, said = disturbed(words_of(name, inputs, out), ShardDone, lambda: MISCHIEF[mischief](victim))
    assert code == 3, said
    assert f"error: `{victim.name}` " in said
    assert "1 of 2 shards are kept in `out.partial`; `out` was not touched" in said
    assert not out.exists()
    victim.write_bytes(whole)
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    code, said = command(*words_of(name, inputs, out))
    assert code == 0, said
    assert "1 (" in said
    assert "are finished from an earlier run" in said
    weights = {name: data for name, data in content(out).items() if name.endswith(".safetensors")}
    assert weights.items() <= bench.expected.items()
    assert weights


def test_small_files_are_those_of_the_beginning(fixtures: Path, tmp_path: Path, benches: Callable[[str], Bench]) -> None:
    bench, inputs, out = benches("merge-lora"), tmp_path / "inputs", tmp_path / "out"
    copy_inputs(fixtures, "merge-lora", inputs)
    tokenizer = inputs / "B-lora/base-vicuna-tiny/tokenizer.model"
    assert disturbed(words_of("merge-lora", inputs, out), ShardDone, lambda: tokenizer.write_bytes(b"another"))[0] == 0
    assert content(out) == bench.expected


# --- the real command line: its streams, and a kernel that refuses ----------------------------------------------------


STREAMS = ["<&- >&- 2>/dev/full", ">/dev/full --json", "2>&-", "<&- >&- 2>&-", "--json >&-", "-q >/dev/full", "--json | true"]


def shell(line: str, folder: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`line` for bash, in which "$@" is the command line of this project with `words`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = ["bash", "-c", line, "bash", sys.executable, "-m", "llava_weights", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False, **options)


@pytest.mark.parametrize("streams", [STREAMS[0], *(pytest.param(text, marks=pytest.mark.faults) for text in STREAMS[1:])])
def test_streams_that_are_closed_or_full(benches: Callable[[str], Bench], tmp_path: Path, streams: str) -> None:
    """Nobody listens: the run ends well all the same, and no word of it strays into the output."""
    bench = benches("convert")
    done = shell(f'set -o pipefail; "$@" {streams}', tmp_path, *words_of("convert", bench.inputs, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == bench.expected
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.faults
@pytest.mark.parametrize(("streams", "code"), [(">/dev/full", 5), (">&-", 0), ("2>/dev/full", 0), ("| true", 0), ("<&- 2>&-", 0)])
def test_a_reader_whose_streams_are_closed_or_full(fixtures: Path, tmp_path: Path, streams: str, code: int) -> None:
    """An answer that could not be given is an error; one that nobody waits for is not."""
    done = shell(f'set -o pipefail; "$@" {streams}', tmp_path, "inspect", str(fixtures / "A-delta-v0/base-hf-bin"))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr == "" or "error: standard output can't be written: No space left on device" in done.stderr


@pytest.fixture
def strace() -> str:
    found = shutil.which("strace")
    if not found or subprocess.run([found, "-qq", "-o", "/dev/null", "true"], check=False).returncode:
        pytest.skip("strace is not here, or may not trace")
    return found


ON_WEIGHTS = ("pwrite64", "preadv2", "fallocate", "sync_file_range")  # calls that nothing else makes: their files need no filter

# System calls on files of the output or of the inputs: how they fail, the exit code, and which of them.
TRACED = [
    ("place", "pwrite64", "error=ENOSPC", 5, (1, 2, 3)),
    ("place", "pwrite64", "error=EIO", 5, (3,)),
    ("place", "write", "error=EDQUOT", 5, (1, 2, 5)),
    ("place", "fsync", "error=EIO", 5, (1, 3, 8, 12)),
    ("place", "rename", "error=EROFS", 5, (1, 2, 3)),
    ("place", "openat", "error=ENOSPC", 5, (1, 3, 5)),
    ("place", "fallocate", "error=ENOSPC", 5, (1, 2)),
    ("place", "sync_file_range", "error=EIO", 5, (1, 2)),
    ("inputs", "preadv2", "error=EIO", 3, (1, 5)),
    ("inputs", "openat", "error=EACCES", 3, (2, 6)),
    ("place", "fallocate", "error=EOPNOTSUPP", 0, (ALL,)),
    ("place", "sync_file_range", "error=ENOSYS", 0, (ALL,)),
    ("place", "fadvise64", "error=ENOSYS", 0, (ALL,)),
    ("place", "flock", "error=ENOLCK", 0, (ALL,)),
    ("place", "pwrite64", "error=EINTR", 0, (1, 2, 3)),
    ("place", "write", "error=EINTR", 0, (1, 4)),
    ("place", "fsync", "error=EINTR", 0, (1, 5)),
    ("inputs", "preadv2", "error=EINTR", 0, (1, 4)),
    ("inputs", "openat", "error=EINTR", 0, (1, 3)),
]


TOKEN = "0" * 8  # in place of the random part of a shard's temporary name
PINNED = (
    f'"$1" -c "import secrets; secrets.token_hex = lambda n: \\"{TOKEN}\\"; from llava_weights.cli.main import main; main()" "${{@:4}}"'
)


def work_files(bench: Bench) -> list[str]:
    """The paths that a run writes before OUT gets its name, for a filter that knows no patterns."""
    partial = bench.place / "out.partial"
    files = [partial, *(partial / name for name in ("lock", "out", "journal", "plan.json"))]
    files += [partial / "out" / name for name in bench.expected]
    temporary = (".part", f".{TOKEN}.part")
    return [str(path) for file in files for path in (file, *(file.with_name(f".{file.name}{end}") for end in temporary))]


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", TRACED, ids=lambda fault: " ".join(map(str, fault[:3])))
def test_a_kernel_that_refuses(strace: str, benches: Callable[[str], Bench], fault: tuple[str, str, str, int, tuple[int, ...]]) -> None:
    """The same through the real system calls, which also shows that the calls above are the ones that are made."""
    side, call, how, code, numbers = fault
    bench = benches("apply-delta")
    bench.clear()
    paths = work_files(bench) if side == "place" else [name for name in bench.before if name.endswith(".bin")]
    words = words_of("apply-delta", bench.inputs, bench.out)
    for number in numbers:
        log = bench.place.with_name("strace.log")
        when = f":when={number}" if number else ""
        options = ["-f", "--seccomp-bpf", "-qq", "-o", str(log), f"--trace={call}", f"--inject={call}:{how}{when}"]
        options += [f"-P{path}" for path in paths if call not in ON_WEIGHTS]
        done = shell(" ".join([strace, *map(repr, options), PINNED]), bench.place, *words)
        where = (fault, number, done.stderr)
        assert "(INJECTED)" in log.read_text(), where
        assert done.returncode == code, where
        assert done.stderr.count("error: ") == (code != 0), where
        assert "Traceback" not in done.stderr
        if code:
            assert os.strerror(getattr(errno, how.removeprefix("error="))) in done.stderr, where
            assert not bench.out.exists() or "`out` is complete" in done.stderr, where
            assert bench.run()[0] == 0
        assert content(bench.out) == bench.expected, where
        assert snapshot(bench.inputs) == bench.before
        bench.clear()


@pytest.fixture
def mounts() -> None:
    if os.geteuid() or not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("only root may mount, in a name space of its own")


FILL = """
import sys
from contextlib import suppress
from llava_weights.cli.main import main
from llava_weights.cli.console import Console
from llava_weights.events import ShardDone

shown, filler = Console.on_event, sys.argv.pop(1)

def on_event(self, event):
    if isinstance(event, ShardDone):
        with suppress(OSError), open(filler, "ab", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass
    shown(self, event)

Console.on_event = on_event
main()
"""


@pytest.mark.faults
def test_a_disk_that_fills_up(mounts: None, benches: Callable[[str], Bench], tmp_path: Path) -> None:
    """A tmpfs that another program fills after the first shard; once there is space again, the same command goes on."""
    bench, disk = benches("apply-delta"), tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "fill.py").write_text(FILL)
    line = (
        "unshare -m --propagation private bash -c 'mount -t tmpfs -o size=80m none disk || exit 9\n"
        '"$1" fill.py disk/filler "${@:4}" -o disk/out; echo "code $?"; ls -A disk; rm disk/filler\n'
        '"$@" -o disk/out; echo "code $?"; cp -r disk/out kept\' bash "$@"'
    )
    done = shell(line, tmp_path, *words_of("apply-delta", bench.inputs, disk / "out")[:-2])
    assert done.stdout.splitlines() == ["code 5", "filler", "out.partial", "code 0"], done.stderr
    assert "No space left on device" in done.stderr
    assert "1 of 2 shards are kept in `out.partial`; `out` was not touched" in done.stderr
    assert "1 (" in done.stderr
    assert content(tmp_path / "kept") == bench.expected


@pytest.mark.faults
@pytest.mark.parametrize(
    ("mount", "code", "words"),
    [
        ("mount --bind disk disk && mount -o remount,ro,bind disk", 5, "can't write"),
        ("mount -t tmpfs -o size=1m none disk", 5, "not enough space for `out`"),
        ("mount -t tmpfs -o size=80m,nr_inodes=6 none disk", 5, "No space left on device"),
        ("mount --bind {inputs} {inputs} && mount -o remount,ro,bind {inputs}", 0, "Wrote"),
    ],
)
def test_a_place_of_little_use(mounts: None, benches: Callable[[str], Bench], tmp_path: Path, mount: str, code: int, words: str) -> None:
    bench = benches("apply-delta")
    (tmp_path / "disk").mkdir()
    inside = f'{mount.format(inputs=bench.inputs)} || exit 9; "$@"; code=$?; ls -A disk; exit $code'
    line = f"unshare -m --propagation private bash -c '{inside}' bash \"$@\""
    done = shell(line, tmp_path, *words_of("apply-delta", bench.inputs, tmp_path / "disk/out"))
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == (code != 0)
    assert ("out\n" in done.stdout) == (code == 0)
