"""What the commands share: the console of one run and its exit codes, and carrying out a plan."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import InputError, Interrupted, LlavaWeightsError, MismatchError, Terminated, UsageError, shortage
from ..events import Note, listening
from .console import Console
from .options import Conversion, Merging, Run, Show

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint
    from ..families.published import Role

STOPPING = (signal.SIGTERM, signal.SIGHUP)  # a terminal that closes, or ssh that is cut, sends the second
RAY_JOBS = 2  # processors that a task asks a cluster for by default: its nodes are not this machine


@contextmanager
def session(show: Show, *, writes: bool = False) -> Iterator[Console]:
    """A console for one command; every way of ending becomes its text and its exit code, and in JSON a last line that has it."""
    console = Console(json=show.json, quiet=show.quiet, verbose=show.verbose, color=show.color, progress=not show.no_progress)
    console.writes = writes
    console.install_status_signal()
    previous = {number: signal.signal(number, _stop) for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        code = 0
        try:
            from ..tensors.dtypes import one_thread

            with one_thread(), listening(console.on_event):
                yield console
        except typer.Exit as ended:
            code = ended.exit_code
        except BaseException as error:
            code = _failed(console, error)
        code = console.end(code)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        console.close()
    if code:
        raise typer.Exit(code)


def _failed(console: Console, error: BaseException) -> int:
    """Say what happened; returns the exit code. Raises `error` again where it is none of a command."""
    match error:
        case LlavaWeightsError():
            return console.error(error)
        case KeyboardInterrupt():
            return console.error(Interrupted.of(error))
        case OSError() if error.filename is not None:  # of an input: what is written has its own errors
            from ..storage.reading import unreadable

            return console.error(unreadable(Path(str(error.filename)), error))
        case Exception():
            known = shortage(error)
            return console.error(known) if known else console.unexpected(error)
    raise error


def _stop(number: int, frame: Any) -> None:
    raise Terminated(number)


def carry_out(console: Console, checkpoint: Checkpoint, output: str, run: Run) -> None:
    """Plan, show the plan, then do it. A dry run ends with the exit code that the real one would start with."""
    from time import monotonic

    from ..write.destinations import is_address
    from ..write.execute import begun_earlier, preflight, run_plan
    from ..write.executors import open_executor
    from ..write.plan import SHARD_SIZE, make_plan
    from ..write.portions import execute_portion, to_portion
    from ..write.upload import job_at
    from .report import explain, outcome, portion_outcome

    portion = to_portion(run.shards) if run.shards else None
    target, make_job = job_at(output, reread=run.reread, on_event=console.on_event)
    sizes: Any = {"max_shard_size": run.max_shard_size or SHARD_SIZE, "max_memory": run.max_memory, "name": target.name or None}
    jobs = run.jobs or (RAY_JOBS if run.executor else None)
    plan = make_plan(checkpoint, jobs=jobs, upload=is_address(output), accept_values=run.accept_values, **sizes)
    rows, document = explain(plan, output, verbose=console.verbose)
    console.plan(rows, document)
    made = run.push is not None and _may_push(run.push, target, document, force=run.force)
    if run.dry_run:
        if not made:
            preflight(plan, target, force=run.force, make_job=make_job)
        there = None if made else begun_earlier(plan, target, restart=run.restart, make_job=make_job)
        lines = [there.sentence(restart=run.restart)] if there else []
        console.summary([*lines, "Nothing was written (dry run)"], {"dry_run": True, "begun": there and asdict(there)})
        return
    begun = monotonic()
    how: Any = {"force": run.force, "on_event": console.on_event}
    if portion:
        part = execute_portion(plan, target, portion, **how)
        console.summary(*portion_outcome(part, monotonic() - begun))
        return
    lines, ended = [f"{output} is complete"], {"output": output}
    if not made:
        how |= {"restart": run.restart, "reread": run.reread, "complete": run.finish, "make_job": make_job}
        with open_executor(run.executor, run.ray_address, cpus=jobs or 1) as pool:
            report = run_plan(plan, target, pool=pool, **how)
        lines, ended = outcome(report, plan, output, monotonic() - begun, reread=run.reread)
    if run.push is not None:
        _push(run.push, target, lines, ended, force=run.force)
    console.summary(lines, ended, output)


def _may_push(repository: str, target: Path, plan: dict[str, Any], *, force: bool) -> bool:
    """Whether the output is there already and only has to be pushed. Raises now what would make the push fail after hours of work."""
    from ..write.upload import differences, repository_of

    hub = repository_of(repository)
    with suppress(InputError, OSError):
        if not differences(plan, target):
            hub.check()
            return True
    hub.refuse_occupied() if not force else hub.check()
    return False


def _push(repository: str, target: Path, lines: list[str], document: dict[str, Any], *, force: bool) -> None:
    """Publish the output, and tell where."""
    from ..write.upload import push, repository_of

    hub = repository_of(repository)
    document["pushed"] = push(target, hub, force=force)
    lines.append(f"Published on {document['pushed']}{hub.made and f' ({hub.made})'}")


def _one_way(run: Run, output: str) -> None:
    """Raise UsageError where the options name two ways of running, or one that does not exist."""
    from ..write.destinations import is_address
    from ..write.portions import to_portion

    given = {"--executor": run.executor, "--shards": run.shards, "--finish": run.finish}
    named = [f"`{name}`" for name, value in given.items() if value]
    if len(named) > 1 or (named and run.restart and not run.executor):
        raise UsageError(f"{' and '.join(named + ['`--restart`'] * run.restart)} are different ways of running", hint="pass one of them")
    if run.executor not in (None, "ray"):
        raise UsageError(f"there is no executor `{run.executor}`", hint="choose `ray`, or leave it out")
    if not run.reread and (run.shards or run.finish):
        raise UsageError("`--no-reread` changes nothing of portions: the finish always reads them", hint="leave it out")
    if run.shards:
        to_portion(run.shards)
    if run.ray_address and not run.executor:
        raise UsageError("`--ray-address` belongs to `--executor ray`", hint="pass both")
    if (run.push and run.shards) or (is_address(output) and (run.push or run.shards or run.finish)):
        raise UsageError(
            "portions and an output at an address can't be pushed, nor portions be written to an address", hint="give `-o` a folder"
        )


def check_options(
    run: Run,
    output: str,
    *,
    to: str | None = None,
    conversion: Conversion | None = None,
    dtype: str | None = None,
    lora: Sequence[str] | None = None,
    merging: Merging | None = None,
) -> None:
    """Raise UsageError, before anything is opened, for a value that an option can't have and for an option without effect."""
    from ..transforms.convert import check_conversion
    from ..write.plan import parse_size

    if not output:
        raise UsageError("`-o` is empty", hint="give the folder to write")
    given = conversion.given if conversion else {}
    if merging:
        _check_merging(merging, lora, dtype)
    tower_only = bool(lora) and given.keys() <= {"vision_tower", "accept_tower"}
    if to is None and ((given and not tower_only) or (dtype and not lora)):
        names = ", ".join(f"`--{key.replace('_', '-')}`" for key in given or ("dtype",))
        raise UsageError(f"{names} is an option of conversion", hint="add `--to llava-hf`, `--to llava` or `--to gguf`")
    if given.pop("accept_tower", False) and "vision_tower" not in given:
        raise UsageError("`--accept-tower` belongs to `--vision-tower`", hint="pass both")
    given.pop("vision_tower", None)
    if to is not None:
        check_conversion(to, dtype=dtype, **given)
    if run.max_shard_size is not None:
        parse_size(run.max_shard_size, "max-shard-size")
        if to == "gguf":
            raise UsageError("`--max-shard-size` changes nothing of GGUF: the text model is one file", hint="leave it out")
    if run.max_memory is not None:
        parse_size(run.max_memory, "max-memory")
    _one_way(run, output)


def _check_merging(merging: Merging, lora: Sequence[str] | None, dtype: str | None) -> None:
    from ..transforms.lora import check_merge

    if not lora and (idle := [f"`--{key.replace('_', '-')}`" for key in merging.given]):
        raise UsageError(f"{', '.join(idle)} belongs to a merge", hint="add `--lora ADAPTER`, or leave it out")
    check_merge(arithmetic=merging.rule, scale=merging.factor, dtype=dtype, base_quantized=merging.base_quantized)


def merge(
    model: Checkpoint,
    loras: Sequence[str],
    merging: Merging,
    *,
    dtype: str | None = None,
    to: str | None = None,
    conversion: Conversion,
    progress: bool | None = None,
) -> Checkpoint:
    """`model` with the adapters of the command line merged in, and the vision tower that they change; itself where there are none.

    Raises UsageError where a tower was given that nothing uses."""
    if not loras:
        return model
    from ..checkpoint.checkpoint import open_checkpoint
    from ..transforms.adapter_tower import tower_changes
    from ..transforms.lora import merge_lora, open_weighted, to_arithmetic

    adapters = [open_weighted(text, non_lora=merging.non_lora, adapter=merging.adapter, progress=progress) for text in loras]
    named = conversion.vision_tower
    needed = bool(tower_changes(model.tensors, [one for one, _ in adapters]))
    if named and to is None and not needed:
        what = "`--vision-tower` changes nothing: the adapter leaves the vision tower alone, and nothing is converted"
        raise UsageError(what, hint="add `--to llava-hf`, or leave it out")
    how: dict[str, Any] = {"arithmetic": to_arithmetic(merging.rule), "scale": merging.factor, "base_quantized": merging.base_quantized}
    how |= {"accept_tower": conversion.accept_tower} if needed else {}
    how |= {"tower": open_checkpoint(named, progress=progress)} if needed and named else {}
    return merge_lora(model, adapters, dtype=dtype, **how)


def converted(
    checkpoint: Checkpoint, to: str | None, conversion: Conversion, *, dtype: str | None = None, progress: bool | None = None
) -> Checkpoint:
    """`checkpoint` in the layout that `--to` names; itself where it names none."""
    if to is None:
        return checkpoint
    from ..checkpoint.checkpoint import open_checkpoint
    from ..checkpoint.tower import holds_tower
    from ..transforms.convert import convert

    given = conversion.given
    named = given.pop("vision_tower", None)
    if to == "llava" and named and not Path(named).exists() and holds_tower(checkpoint):  # the original's config only names its tower
        given["tower_name"], named = named, None
    tower = open_checkpoint(named, progress=progress) if named else None
    return convert(checkpoint, to, tower=tower, dtype=dtype, **given)


def note(console: Console, text: str, *, warning: bool = False) -> None:
    console.on_event(Note(text, warning))


def check_given(console: Console, roles: Sequence[tuple[Role, Checkpoint]]) -> None:
    """Hash every input file and say which published file it is. Raises MismatchError where one is known not to fit its role."""
    from ..checkpoint.checkpoint import need_files
    from ..checks.published import check_inputs

    for role, checkpoint in roles:
        need_files(checkpoint, "`--check-inputs`")
        for finding in check_inputs([Path(file.path) for file in checkpoint.origin.files], role, on_event=console.on_event):
            if finding.verdict == "wrong":
                raise MismatchError(
                    finding.text, facts={"file": finding.file, "sha256": finding.sha256}, hint="give the file that belongs in this role"
                )
            note(console, finding.text)
