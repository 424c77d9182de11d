"""The commands that only look: inspect and env; and the demo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..text import two_columns
from .console import versions
from .options import CHECK, INPUT, OUTPUT, JsonLines, Quiet, Show, Verbose, grouped, option, revision_of
from .session import session


@grouped
def inspect(
    *,
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder, file, owner/name[@rev] or hf://owner/name.", rich_help_panel=INPUT)],
    tensors: Annotated[bool, option(OUTPUT, "--tensors", help="List every tensor.")] = False,
    revision: Annotated[str | None, revision_of("a repository")] = None,
    among: Annotated[
        list[str] | None,
        option(CHECK, "--among", metavar="BASE", help="SRC is a delta: which of these bases, or fingerprints of bases, was it made for?"),
    ] = None,
    others: Annotated[
        list[str] | None, typer.Argument(metavar="[BASE]...", help="More bases behind `--among BASE`.", rich_help_panel=INPUT)
    ] = None,
    fingerprint: Annotated[
        Path | None,
        option(OUTPUT, "--fingerprint", metavar="FILE", help="SRC is a base: record a few of its values, for `--among`."),
    ] = None,
    force: Annotated[bool, option(OUTPUT, "--force", help="With --fingerprint: replace FILE.")] = False,
    show: Show,
) -> None:
    """Say what a checkpoint is, what shows it, and what to do with it."""
    with session(show) as console:
        from ..checkpoint.checkpoint import open_checkpoint
        from ..checkpoint.inspect import inspect as look

        _check_ways(tensors=tensors, among=among, others=others, fingerprint=fingerprint, force=force)
        if among:
            from ..transforms.which_base import which_base

            asked = which_base(open_checkpoint(source, revision=revision, progress=show.bars), [*among, *(others or [])])
            console.document(asked.lines(), asked.document())
            raise typer.Exit(asked.exit_code)
        if fingerprint:
            from ..checkpoint.fingerprint import record_fingerprint

            base = source if revision is None else open_checkpoint(source, revision=revision, progress=show.bars)
            nbytes = record_fingerprint(base, fingerprint, force=force).stat().st_size
            console.document(f"Wrote {fingerprint}: {nbytes:,} bytes", {"written": str(fingerprint), "nbytes": nbytes})
            return
        found = look(open_checkpoint(source, revision=revision, progress=show.bars), given=source)
        console.document(found.lines(tensors=tensors), found.document(tensors=tensors))


def _check_ways(*, tensors: bool, among: list[str] | None, others: list[str] | None, fingerprint: Path | None, force: bool) -> None:
    """Raise UsageError where the options ask for two things, or for nothing."""
    given = [name for name, value in {"--tensors": tensors, "--among": among, "--fingerprint": fingerprint}.items() if value]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(f'`{name}`' for name in given)} ask for different things", hint="pass one of them")
    if others and not among:
        raise UsageError(f"`{others[0]}` is one checkpoint too many", hint="give one, or bases behind `--among`")
    if force and not fingerprint:
        raise UsageError("`--force` belongs to `--fingerprint`", hint="pass both")


def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to put the toy models.", rich_help_panel=OUTPUT)] = Path("demo"),
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a toy LLaMA and its delta, then run the real commands on them and show each."""
    with session(Show(quiet=quiet, verbose=verbose), writes=True) as console:
        from ..write.destinations import is_address
        from .demo import run

        if is_address(str(folder)):
            raise UsageError(f"`{folder}` is no folder of this machine", hint="give a path")
        raise typer.Exit(run(folder, console))


def env(json: JsonLines = False) -> None:
    """Versions and settings for a bug report."""
    with session(Show(json=json)) as console:
        found = versions()
        settings = {name: value for name in ("HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE") if (value := os.environ.get(name))}
        console.document(two_columns([*found.items(), *settings.items()]), {**found, **settings})
