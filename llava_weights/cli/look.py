"""The commands that only look: inspect and env; and the demo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..text import two_columns
from .console import versions
from .options import INPUT, OUTPUT, JsonLines, Quiet, Show, Verbose, grouped, option, revision_of
from .session import session


@grouped
def inspect(
    *,
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder, file, owner/name[@rev] or hf://owner/name.", rich_help_panel=INPUT)],
    tensors: Annotated[bool, option(OUTPUT, "--tensors", help="List every tensor.")] = False,
    revision: Annotated[str | None, revision_of("a repository")] = None,
    show: Show,
) -> None:
    """Say what a checkpoint is, what shows it, and what to do with it."""
    with session(show) as console:
        from ..checkpoint.checkpoint import open_checkpoint
        from ..checkpoint.inspect import inspect as look

        found = look(open_checkpoint(source, revision=revision, progress=show.bars), given=source)
        console.document(found.lines(tensors=tensors), found.document(tensors=tensors))


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
