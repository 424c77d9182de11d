"""What the commands share: the console of one run and its exit codes, and carrying out a plan."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..console import Console
from ..errors import InputError, Interrupted, LlavaWeightsError, MismatchError, OutputError, Terminated, UsageError
from ..events import Note
from .options import Layout, Run, Show

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..published import Role


@contextmanager
def session(show: Show, *, writes: bool = False) -> Iterator[Console]:
    """A console for one command; every way of ending becomes its text and its exit code."""
    console = Console(json=show.json, quiet=show.quiet, verbose=show.verbose)
    console.writes = writes
    console.install_status_signal()
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield console
    except LlavaWeightsError as error:
        raise typer.Exit(console.error(error)) from None
    except KeyboardInterrupt as error:
        raise typer.Exit(console.error(Interrupted("stopped", exit_code=143 if isinstance(error, Terminated) else 130))) from None
    except (typer.Exit, typer.Abort):
        raise
    except OSError as error:  # of an input: what is written has its own errors
        if error.filename is None:
            raise typer.Exit(console.unexpected(error)) from None
        from ..formats import unreadable

        raise typer.Exit(console.error(unreadable(Path(str(error.filename)), error))) from None
    except MemoryError:
        hint = "pass `--max-memory` less than what this process may have, or fewer `--jobs`"
        raise typer.Exit(console.error(OutputError("there is not enough memory", hint=hint))) from None
    except Exception as error:
        raise typer.Exit(console.unexpected(error)) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
        console.close()
        from ..remote import forget

        forget()  # here, since `cli.main` leaves without what is registered for the end


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


def carry_out(console: Console, checkpoint: Checkpoint, output: str, run: Run) -> None:
    """Plan, show the plan, then do it. A dry run ends with the exit code that the real one would start with."""
    from time import monotonic

    from ..executors import open_executor
    from ..plan import make_plan
    from ..portions import execute_portion, to_portion
    from ..report import explain, outcome, portion_outcome
    from ..upload import job_at
    from ..write import execute, preflight

    _one_way(run, output)
    portion = to_portion(run.shards) if run.shards else None
    target, make_job = job_at(output, reread=run.reread, on_event=console.on_event)
    sizes: Any = {"max_shard_size": run.max_shard_size, "max_memory": run.max_memory}
    plan = make_plan(checkpoint, jobs=run.jobs, upload="://" in output, accept_values=run.accept_values, **sizes)
    rows, document = explain(plan, output)
    console.plan(rows, document)
    made = run.push is not None and _may_push(run.push, target, document, force=run.force)
    if run.dry_run:
        if not made:
            preflight(plan, target, force=run.force, make_job=make_job)
        console.summary(["Nothing was written (dry run)"], {"dry_run": True})
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
        with open_executor(run.executor, run.ray_address, cpus=run.jobs) as pool:
            report = execute(plan, target, pool=pool, **how)
        lines, ended = outcome(report, output, monotonic() - begun)
    if run.push is not None:
        _push(run.push, target, lines, ended, force=run.force)
    console.summary(lines, ended, output)


def _may_push(repository: str, target: Path, plan: dict[str, Any], *, force: bool) -> bool:
    """Whether the output is there already, so that only pushing is left. Raises now what would make it fail after hours of work."""
    from ..batch import differences
    from ..upload import repository_of

    hub = repository_of(repository)
    with suppress(InputError, OSError):
        if not differences(plan, target):
            hub.check()
            return True
    hub.refuse_occupied() if not force else hub.check()
    return False


def _push(repository: str, target: Path, lines: list[str], document: dict[str, Any], *, force: bool) -> None:
    """Publish the output, and tell where."""
    from ..upload import push, repository_of

    hub = repository_of(repository)
    document["pushed"] = push(target, hub, force=force)
    lines.append(f"Published on {document['pushed']}{hub.made and f' ({hub.made})'}")


def _one_way(run: Run, output: str) -> None:
    """Raise UsageError where the options name two ways of working."""
    given = {"--executor": run.executor, "--shards": run.shards, "--finish": run.finish}
    named = [f"`{name}`" for name, value in given.items() if value]
    if len(named) > 1 or (named and run.restart and not run.executor):
        raise UsageError(f"{' and '.join(named + ['`--restart`'] * run.restart)} are different ways of working", hint="pass one of them")
    if run.ray_address and not run.executor:
        raise UsageError("`--ray-address` belongs to `--executor ray`", hint="pass both")
    if (run.push and run.shards) or ("://" in output and (run.push or run.shards or run.finish)):
        raise UsageError("portions and an output elsewhere can't be pushed, nor portions be written elsewhere", hint="give `-o` a folder")


def merge(
    model: Checkpoint,
    loras: Sequence[str],
    arithmetic: str,
    *,
    scale: float = 1.0,
    dtype: str | None = None,
    non_lora: Path | None = None,
    progress: bool | None = None,
) -> Checkpoint:
    """`model` with the adapters of the command line merged in; itself where there are none."""
    if not loras:
        return model
    from ..buffers import to_dtype
    from ..lora import merge_lora, open_weighted, to_arithmetic

    adapters = [open_weighted(text, non_lora=non_lora, progress=progress) for text in loras]
    return merge_lora(model, adapters, arithmetic=to_arithmetic(arithmetic), scale=scale, dtype=to_dtype(dtype))


def converted(
    checkpoint: Checkpoint, to: str | None, layout: Layout, *, dtype: str | None = None, progress: bool | None = None
) -> Checkpoint:
    """`checkpoint` in the layout that `--to` names; itself where it names none, and then no option of conversion may be given."""
    given = {key: value for key, value in asdict(layout).items() if value is not None}
    if to is None:
        if given:
            names = ", ".join(f"`--{key.replace('_', '-')}`" for key in given)
            raise UsageError(f"{names} is an option of conversion", hint="add `--to llava-hf` or `--to llava`")
        return checkpoint
    from ..buffers import to_dtype
    from ..checkpoint import open_checkpoint
    from ..conversion import convert

    named = given.pop("vision_tower", None)
    if to == "llava" and named and not Path(named).exists():  # the original's config names its tower; no weights are asked for
        given["tower_name"], named = named, None
    tower = open_checkpoint(named, progress=progress) if named else None
    return convert(checkpoint, to, tower=tower, dtype=to_dtype(dtype), **given)


def note(console: Console, text: str, *, warning: bool = False) -> None:
    console.on_event(Note(text, warning))


def check_given(console: Console, roles: Sequence[tuple[Role, Checkpoint]]) -> None:
    """Hash every input file and say which published file it is. Raises MismatchError where one is known not to fit its role."""
    from ..checkpoint import need_files
    from ..published import check_inputs

    for role, checkpoint in roles:
        need_files(checkpoint, "`--check-inputs`")
        for finding in check_inputs([Path(file.path) for file in checkpoint.origin.files], role):
            if finding.verdict == "wrong":
                raise MismatchError(finding.text, facts={"file": finding.file, "sha256": finding.sha256})
            note(console, finding.text)
