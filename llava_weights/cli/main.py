"""The command line: every command by its name. A command parses its options, calls the library and hands the result to the console."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from .. import __version__
from ..errors import UsageError
from . import check, help, look, make
from .console import Console
from .options import CONSOLE, option

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

PURPOSE = "Apply LLaVA deltas, merge LoRAs, convert and verify checkpoints: row by row, in little memory."


class Program(TyperGroup):
    """All commands. What typer refuses is told as every other error is, and ends in a summary too where JSON is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write("\n".join(help.page(self, ctx)))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        console = Console(json="--json" in words, verbose="-v" in words or "--verbose" in words)
        try:
            code = super().main(words, prog_name, complete_var, False, windows_expand_args, **extra) or 0
        except TyperException as error:
            code = console.end(console.error(_refused(error)))
        except Exception as error:
            code = console.end(console.unexpected(error))
        if not standalone_mode:
            return code
        sys.exit(code)


def _refused(error: TyperException) -> UsageError:
    """What typer found wrong with the command line."""
    ctx = getattr(error, "ctx", None)
    path = ctx.command_path if ctx else "llava-weights"
    what = error.format_message().replace("Value error, ", "")  # pydantic's words before ours
    return UsageError(what, hint=f"`{path} --help` says what can be given")


app = typer.Typer(
    name="llava-weights",
    cls=Program,
    help=PURPOSE,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=help.epilog(""),
)
for name, command in COMMANDS.items():
    app.command(name, cls=help.Command, epilog=help.epilog(name))(command)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, option(CONSOLE, "-V", "--version", help="Print the version.")] = False,
) -> None:
    if version:
        Console().document(f"llava-weights {__version__}", {})
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        Console(out=sys.stderr).document(ctx.get_help(), {})
        raise typer.Exit(2)


def write_man_page(path: str) -> None:
    """For `make docs`."""
    Path(path).write_text(help.man_page(typer.main.get_command(app)), encoding="utf-8")


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
