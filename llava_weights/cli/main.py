"""The command line: every command by its name. A command parses its options, calls the library and hands the result to the console."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

import typer

from .. import __version__
from . import check, look, make
from .console import Console

COMMANDS: dict[str, Callable[..., None]] = {
    "apply-delta": make.apply_delta,
    "make-delta": make.make_delta,
    "merge-lora": make.merge_lora,
    "convert-lora": make.convert_lora,
    "convert": make.convert,
    "inspect": look.inspect,
    "verify": check.verify,
    "checksum": check.checksum,
    "repair": check.repair,
    "diff": check.diff,
    "smoke": check.smoke,
    "demo": look.demo,
    "env": look.env,
}

app = typer.Typer(
    name="llava-weights",
    help="Apply LLaVA deltas, merge LoRAs, convert and verify checkpoints: row by row, in little memory.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in COMMANDS.items():
    app.command(name)(command)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Apply LLaVA deltas, merge LoRAs, convert and verify checkpoints: row by row, in little memory."""
    if version:
        Console().document(f"llava-weights {__version__}", {})
        raise typer.Exit


def main() -> None:
    """Entry point of `llava-weights`. Ends the process at once: torch's own clean-up takes half a second."""
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
