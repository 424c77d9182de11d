"""Many jobs in one run: every plan first, as one table; then the jobs, each a process of its own; then one summary."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from .child import call, silent
from .console import Console
from .errors import InputError, Interrupted, LlavaWeightsError, OutputError, UsageError
from .events import Note
from .formats.strict_json import load_object
from .job import partial_folder
from .manifest import MANIFEST, root_of_tensors
from .records import MAX_MANIFEST, read_manifest
from .wording import duration, shards, size, visible

SHORT = 16  # hexadecimal digits of a root in the table; `--json` and the manifest have all

State = Literal["ready", "waits", "done", "finished", "failed", "not run"]


@dataclass(frozen=True)
class Job:
    """One command. `output` is the folder that it writes, None for a check; `reads` are the checkpoints that its options name, and
    `after` the jobs that make one of them."""

    name: str
    command: str
    arguments: tuple[str, ...]
    output: Path | None = None
    reads: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass
class Turn:
    """A job and how far it is; `state` is "finished" where an earlier run did it all."""

    job: Job
    state: State = "not run"
    plan: Mapping[str, Any] = field(default_factory=dict)
    error: LlavaWeightsError | Interrupted | None = None
    nbytes: int | None = None
    seconds: float | None = None
    root: str | None = None
    verdict: str | None = None

    @property
    def code(self) -> int:
        return self.error.exit_code if self.error else 0

    def document(self) -> dict[str, Any]:
        """For `--json`. Bytes and seconds; null where there is nothing to tell."""
        job = {"name": self.job.name, "command": self.job.command, "output": self.job.output}
        told = {"state": self.state, "code": self.code, "error": self.error.what if self.error else None}
        return job | told | {key: getattr(self, key) for key in ("nbytes", "seconds", "root", "verdict")}


def linked(jobs: Sequence[Job]) -> list[Job]:
    """`jobs` with what each comes after. Raises UsageError where two outputs are one place or lie in each other, or where a job reads
    what itself or a later one makes."""
    outputs = {job.name: Path(os.path.realpath(job.output)) for job in jobs if job.output}
    for (one, first), (other, second) in combinations(outputs.items(), 2):
        if first.is_relative_to(second) or second.is_relative_to(first):
            what = f"jobs `{one}` and `{other}` have the same `output`, or one inside the other"
            raise UsageError(what, facts={one: first, other: second}, hint="give each its own")
    done: list[Job] = []
    for job in jobs:
        places = [Path(os.path.realpath(text)) for read in job.reads for text in {read, read.rpartition("@")[0] or read}]  # A@0.5 weighs A
        after = [name for name, output in outputs.items() if any(place.is_relative_to(output) for place in places)]
        for name in after:
            if all(name != earlier.name for earlier in done):
                what = f"job `{job.name}` reads the output of `{name}`, which does not come before it"
                raise UsageError(what, facts={"output": outputs[name]}, hint="change their order")
        done.append(replace(job, after=tuple(after)))
    return done


def run_jobs(jobs: Sequence[Job], console: Console, *, dry_run: bool = False, keep_going: bool = False) -> int:
    """Plan every job, show the plans, run the jobs in their order, and return 0 or the exit code of the first that failed.

    A plan that is refused stops all before anything is written, and a job that fails stops those behind it; with `keep_going` only
    those that read its output. Raises Interrupted where a signal comes while the plans are made.
    """
    turns = {job.name: Turn(job) for job in jobs}
    for number, turn in enumerate(turns.values(), 1):
        if turn.job.output:
            _tell(console, f"Planning {turn.job.name} ({number} of {len(turns)})")
        _plan(turn, turns)
    console.plan(*_plans(turns.values()))
    for turn in turns.values():
        _warn(turn, console)
        if turn.error:
            _explain(turn, console)
    for place, needed, free in _short(turns.values()):
        console.on_event(Note(f"together they need {size(needed)} on `{place}`, where {size(free)} are free", warning=True))
    code = _first_code(turns.values())
    if dry_run or (code and not keep_going):
        words = ["Nothing was written (dry run)" if dry_run else "Nothing was written"]
    else:
        code = _run_all(turns, console, keep_going) or _first_code(turns.values())
        words = ["", *_aligned([("job", "state", "size", "time", "result"), *map(_row, turns.values())])]
    console.summary(words, {"dry_run": dry_run, "exit_code": code, "jobs": [turn.document() for turn in turns.values()]})
    return code


def _first_code(turns: Iterable[Turn]) -> int:
    return next((turn.code for turn in turns if turn.error), 0)


# --- plans -----------------------------------------------------------------------------------------------------------


def _plan(turn: Turn, turns: Mapping[str, Turn]) -> None:
    """Make the plan of a job that writes; one that reads what is not yet made has to wait."""
    job = turn.job
    if any(turns[name].state != "finished" for name in job.after):
        turn.state = "waits"
        return
    turn.state = "ready"
    if job.output is None:
        return
    ended = call((job.command, "--dry-run", *job.arguments))
    if ended.stopped:
        error = Interrupted("stopped", exit_code=128 + ended.stopped)
        error.kept = "Nothing was written"
        raise error
    turn.plan, turn.error = ended.documents.get("plan", {}), ended.error
    turn.nbytes = turn.plan.get("nbytes")
    if turn.plan and (job.output / MANIFEST).is_file() and not partial_folder(job.output).exists():
        _compare(turn, job.output)
    turn.state = "failed" if turn.error else turn.state


def _compare(turn: Turn, output: Path) -> None:
    """Whether the output that is there is the one that the plan would make: then the job is finished. Else the refusal says why not."""
    try:
        differing = differences(turn.plan, output)
    except (InputError, OSError) as error:
        differing = [f"{MANIFEST} can't be read: {error.what if isinstance(error, InputError) else error}"]
    if not differing:
        turn.state, turn.error = "finished", None
        made = read_manifest(output / MANIFEST)
        turn.root = root_of_tensors(made.tensors.values())
        turn.nbytes = sum(made.files[name].size for name in {entry.shard for entry in made.tensors.values()})
    elif turn.code == OutputError.exit_code:
        turn.error = OutputError(
            f"`{output.name}` exists and was made by another command, or an input changed since",
            facts={"output": output, "differing": ", ".join(differing)},
            hint="choose another `output`, or set `force = true` to replace it after the new one is complete",
        )


def differences(plan: Mapping[str, Any], output: Path) -> list[str]:
    """In what the folder `output` is not what `plan`, the document of a dry run, would make; nothing where it is that, and whole.

    Compared are version, steps with their inputs, options, small files by digest and all files by size; and no input may be newer than
    the manifest, which was written last, since the header of a safetensors file does not tell its values. Raises InputError for a
    manifest that is not right, OSError where the folder can't be read.
    """
    made, files = load_object(output / MANIFEST, limit=MAX_MANIFEST), read_manifest(output / MANIFEST).files
    tool = made.get("tool")
    then = {"version": tool.get("version") if isinstance(tool, dict) else None, "steps": made.get("recipe"), "options": made.get("options")}
    found = [part for part, value in then.items() if value != plan.get(part)]
    found += [name for name, digest in plan["files"].items() if name not in files or files[name].sha256 != digest]
    for name, entry in files.items():
        path = output / name
        if not path.is_file() or path.stat().st_size != entry.size:
            found.append(f"{name} (not whole)")
    if plan["changed"] is None or plan["changed"] > (output / MANIFEST).stat().st_mtime_ns:
        found.append("an input that is newer, or can't be dated")
    return found


def _short(turns: Iterable[Turn]) -> list[tuple[Path, int, int]]:
    """Where the outputs do not fit together: a folder, the bytes still to be written and those that are free there."""
    needed: dict[int, tuple[Path, int]] = {}
    for turn in turns:
        if turn.state == "ready" and turn.job.output and turn.nbytes:
            partial = partial_folder(turn.job.output.absolute())
            there = sum(file.stat().st_size for file in (partial / "out").glob("*.safetensors"))
            place = next(folder for folder in partial.parents if folder.exists())
            first, total = needed.get(place.stat().st_dev, (place, 0))
            needed[place.stat().st_dev] = first, total + max(0, turn.nbytes - there)
    return [(place, total, free) for place, total in needed.values() if total > (free := shutil.disk_usage(place).free)]


def _plans(turns: Iterable[Turn]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """The table of the plans: its lines cut into label and rest for the console, and the same as data."""
    rows = [("job", "command", "output", "size", "shards", "memory", "state")]
    for turn in turns:
        plan = turn.plan
        told = (size(plan["nbytes"]), str(len(plan["shards"])), size(plan["memory"])) if plan else ("-", "-", "-")
        rows.append((turn.job.name, turn.job.command, str(turn.job.output or "-"), *told, _state(turn)))
    rest = _aligned([row[1:] for row in rows])
    document = {"jobs": [turn.document() | {"after": turn.job.after, "plan": turn.plan or None} for turn in turns]}
    return [(row[0], line) for row, line in zip(rows, rest, strict=True)], document


# --- jobs ------------------------------------------------------------------------------------------------------------


def _run_all(turns: Mapping[str, Turn], console: Console, keep_going: bool) -> int:
    """Run what is ready, in order. Returns the exit code of a signal that ended it, or 0."""
    stopped = 0
    for number, turn in enumerate(turns.values(), 1):
        if turn.state in ("ready", "waits"):
            if any(turns[name].state in ("failed", "not run") for name in turn.job.after):
                turn.state = "not run"
                continue
            _tell(console, "", f"{turn.job.name} ({number} of {len(turns)}): {turn.job.command}")
            stopped = _run(turn, console)
        if turn.state == "finished":
            _tell(console, "", f"{turn.job.name} ({number} of {len(turns)}): `{turn.job.output}` is finished from an earlier run")
        if console.json:
            console.document("", {"type": "job", **turn.document()})
        elif turn.job.output and turn.state in ("done", "finished") and console.quiet:
            console.summary((), {}, str(turn.job.output))
        if stopped or (turn.state == "failed" and not keep_going):
            break
    for turn in turns.values():
        turn.state = "not run" if turn.state in ("ready", "waits") else turn.state
    return 128 + stopped if stopped else 0


def _run(turn: Turn, console: Console) -> int:
    """Run one job to its end and tell what came of it. Returns the signal that ended it, or 0."""
    job, begun = turn.job, monotonic()
    ended = call((job.command, *job.arguments), silent if console.json else console.on_event)
    summary = ended.documents.get("summary", {})
    if not turn.plan and (plan := ended.documents.get("plan")):
        turn.plan = plan
        _warn(turn, console)
    turn.seconds, turn.error = round(monotonic() - begun, 3), ended.error
    turn.state = "failed" if ended.error else "done"
    if job.output:
        turn.nbytes, turn.root = summary.get("nbytes", turn.nbytes), summary.get("root")
    else:
        turn.verdict = summary.get("verdict")
    if ended.error:
        _explain(turn, console)
    elif job.output:
        resumed = f", {summary['resumed']} of them from an earlier run" if summary["resumed"] else ""
        wrote = f"{shards(summary['shards'])}{resumed}, {size(summary['nbytes'])} in {duration(turn.seconds)}"
        _tell(console, f"Wrote {job.output}: {wrote}")
    else:
        turn.verdict = turn.verdict or _written(summary)
        _tell(console, turn.verdict)
    return ended.stopped


def _written(summary: Mapping[str, Any]) -> str:
    """What a check wrote that has no verdict: checksums, a recording."""
    files = [summary["written"]] if isinstance(summary.get("written"), str) else summary.get("written", ())
    return f"wrote {', '.join(Path(file).name for file in files)}" if files else "everything was recorded already"


# --- words -----------------------------------------------------------------------------------------------------------


def _tell(console: Console, *lines: str) -> None:
    """Narrate; beside JSON only the jobs' own lines are of use."""
    for line in () if console.json else lines:
        console.on_event(Note(line))


def _warn(turn: Turn, console: Console) -> None:
    for step in turn.plan.get("steps", ()):
        for warning in step.get("warnings", ()):
            console.on_event(Note(f"{turn.job.name}: {warning}", warning=True))


def _explain(turn: Turn, console: Console) -> None:
    """The error as the command would have shown it, under the job's name."""
    if error := turn.error:
        named = error if isinstance(error, Interrupted) else LlavaWeightsError(f"{turn.job.name}: {error.what}", hint=error.hint)
        named.facts, named.kept, named.exit_code = error.facts, error.kept, error.exit_code
        console.error(named)


def _state(turn: Turn) -> str:
    if turn.state == "failed":
        return f"failed ({turn.code}): {turn.error.what if turn.error else ''}"
    return {"waits": f"after {', '.join(turn.job.after)}", "finished": "finished earlier"}.get(turn.state, turn.state)


def _row(turn: Turn) -> tuple[str, ...]:
    """Name, state, size, time, result."""
    state, _, why = _state(turn).partition(": ")
    taken = "-" if turn.seconds is None else duration(turn.seconds)
    result = why or turn.verdict or (f"root {turn.root[:SHORT]}" if turn.root else "-")
    return turn.job.name, state, "-" if turn.nbytes is None or turn.state == "not run" else size(turn.nbytes), taken, result


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The rows as lines with their columns one below the other."""
    widths = [max(len(visible(cell)) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{visible(cell):<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]
