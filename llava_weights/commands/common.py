"""What the commands share: the console of one run and its exit codes, and carrying out a plan."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..console import Console
from ..errors import Interrupted, LlavaWeightsError, MismatchError, Terminated, UsageError
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
    except Exception as error:
        raise typer.Exit(console.unexpected(error)) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
        console.close()


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


def carry_out(console: Console, checkpoint: Checkpoint, output: Path, run: Run) -> None:
    """Plan, show the plan, then do it. A dry run ends with the exit code that the real one would start with."""
    from time import monotonic

    from ..plan import make_plan
    from ..report import explain, outcome
    from ..write import execute, preflight

    plan = make_plan(checkpoint, max_shard_size=run.max_shard_size, max_memory=run.max_memory, jobs=run.jobs)
    console.plan(*explain(plan, output))
    if run.dry_run:
        preflight(plan, Path(os.path.abspath(output)), force=run.force)
        console.summary(["Nothing was written (dry run)"], {"dry_run": True})
        return
    begun = monotonic()
    report = execute(plan, output, force=run.force, restart=run.restart, reread=run.reread, on_event=console.on_event)
    lines, document = outcome(report, output, monotonic() - begun)
    console.summary(lines, document, str(output))


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
    from ..published import check_inputs

    for role, checkpoint in roles:
        for finding in check_inputs([Path(file.path) for file in checkpoint.origin.files], role):
            if finding.verdict == "wrong":
                raise MismatchError(finding.text, facts={"file": finding.file, "sha256": finding.sha256})
            note(console, finding.text)
