"""`--help` and the man page, from one source: typer's commands, in the sections of `options.py`, with an example each.

typer's own plain pages have one long list, cut the descriptions of commands, and are at least 50 columns wide.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand

from .. import __version__
from .options import CONSOLE, SECTIONS

DOCS = "https://pypi.org/project/llava-weights/"
WIDEST, TWO_COLUMNS = 100, 64  # columns of a page, and from how many on text stands beside the options
LEFT = 24  # columns of the options beside it

# What a user would type first, of real names. A test parses each.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "": ("demo", "inspect liuhaotian/llava-v1.5-7b"),
    "apply-delta": ("--base llama-13b --delta liuhaotian/LLaVA-13b-delta-v0 -o LLaVA-13B-v0",),
    "make-delta": ("--base llama-13b --tuned my-llava-13b -o my-delta --codec integer",),
    "merge-lora": ("--base lmsys/vicuna-7b-v1.5 --lora liuhaotian/llava-v1.5-7b-lora -o llava-v1.5-7b-merged",),
    "convert-lora": ("liuhaotian/llava-v1.5-7b-lora --to llava-hf -o lora-hf",),
    "convert": (
        "liuhaotian/llava-v1.5-7b --vision-tower openai/clip-vit-large-patch14-336 -o llava-v1.5-7b-hf",
        "llama-13b --delta liuhaotian/LLaVA-13b-delta-v0 --vision-tower openai/clip-vit-large-patch14 --to gguf -o LLaVA-13B-v0-gguf",
    ),
    "inspect": ("liuhaotian/LLaVA-13b-delta-v0", "liuhaotian/LLaVA-13b-delta-v0 --among llama-13b vicuna-13b"),
    "verify": ("LLaVA-13B-v0 --deep", "llava-v1.5-7b-hf --base liuhaotian/llava-v1.5-7b"),
    "checksum": ("LLaVA-13B-v0",),
    "repair": ("llava-1.5-7b-hf --from llava-hf/llava-1.5-7b-hf", "LLaVA-13B-v0 --from backup/LLaVA-13B-v0"),
    "diff": ("llava-v1.5-7b-hf liuhaotian/llava-v1.5-7b",),
    "smoke": ("llava-v1.5-7b-hf --original llava-v1.5-7b --vision-tower openai/clip-vit-large-patch14-336",),
    "demo": ("",),
    "env": ("",),
}


class Command(TyperCommand):
    """A command that shows its options in sections."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write("\n".join(page(self, ctx)))

    def get_short_help_str(self, limit: int = 0) -> str:
        """For docs/cli.md and the shell: not cut."""
        return _paragraphs(self)[0]


def page(command: Any, ctx: Any) -> Iterator[str]:
    """The lines of `--help`, as wide as the terminal."""
    width = max(min(shutil.get_terminal_size().columns, WIDEST) - 2, 20)
    yield from _wrapped(f"Usage: {ctx.command_path} {usage(command, ctx)}", width, "", "    ")
    yield ""
    for paragraph in _paragraphs(command):
        yield from _wrapped(paragraph, width, "  ")
        yield ""
    for title, rows in sections(command, ctx):
        yield f"{title}:"
        left = max(len(name) for name, _ in rows) if title == "Commands" else LEFT
        for name, text in rows:
            yield from _row(name, text, width, left)
        yield ""
    lines = examples(command)
    yield "Examples:" if len(lines) > 1 else "Example:"
    for line in lines:
        yield from _continued(line, width)
    yield ""
    yield from _wrapped(f"More: {DOCS}", width, "")
    yield ""


def _paragraphs(command: Any) -> list[str]:
    return [" ".join(text.split()) for text in (command.help or "").split("\n\n")]


def usage(command: Any, ctx: Any) -> str:
    """What has to be given, and what may be."""
    words = []
    for parameter in command.get_params(ctx):
        if parameter.param_type_name == "argument":
            words.append(parameter.metavar)
        elif parameter.required:
            words += [parameter.opts[0], parameter.metavar]
    return " ".join([*words, "[OPTIONS]", *(["COMMAND ..."] if hasattr(command, "commands") else [])])


def sections(command: Any, ctx: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    """Title and rows of each section that has any: arguments and options, and the commands of the program."""
    found: dict[str, list[tuple[str, str]]] = {}
    if hasattr(command, "commands"):
        found["Commands"] = [(name, _paragraphs(one)[0]) for name, one in command.commands.items() if not one.hidden]
    found |= {title: [] for title in SECTIONS}
    for parameter in command.get_params(ctx):
        if (record := parameter.get_help_record(ctx)) is None:
            continue
        name, text = record
        if parameter.param_type_name == "argument":
            name, text = parameter.metavar, text.removesuffix("[required]")
        title = getattr(parameter, "rich_help_panel", None) or CONSOLE
        found[title].append((name, re.sub(r"\[default: \((.+?)\)", r"[default: \1", " ".join(text.split()))))
    return [(title, rows) for title, rows in found.items() if rows]


def examples(command: Any) -> list[str]:
    """What a user would type."""
    name = "" if hasattr(command, "commands") else command.name
    return [" ".join(filter(None, ("llava-weights", name, words))) for words in EXAMPLES[name]]


def epilog(name: str) -> str:
    """The examples of a command as Markdown, for docs/cli.md."""
    typed = "\n".join(f"$ {' '.join(filter(None, ('llava-weights', name, words)))}" for words in EXAMPLES[name])
    return f"**Example**:\n\n```console\n{typed}\n```"


def _row(name: str, text: str, width: int, left: int) -> Iterator[str]:
    """An option and what it does: side by side, or below one another where there is no room."""
    beside = width >= TWO_COLUMNS
    indent = " " * (left + 4 if beside else 6)
    lines = list(_wrapped(text, width, indent))
    if beside and len(name) <= left and lines:
        yield f"  {name:<{left}}  {lines.pop(0).lstrip()}"
    else:
        yield from _wrapped(name, width, "  ", "      ")
    yield from lines


def _wrapped(text: str, width: int, indent: str, later: str | None = None) -> list[str]:
    following = indent if later is None else later
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=following, break_long_words=False, break_on_hyphens=False)


def _continued(line: str, width: int) -> Iterator[str]:
    """A command as a shell takes it, over several lines where it is too long for one."""
    lines = [""]
    for piece in re.findall(r"llava-weights \S+|-\S+ [^-]\S*|\S+", line):  # an option stays with its value
        words = [piece] if len(piece) + 6 <= width else piece.split(" ")
        for word in words:
            if lines[-1] and len(lines[-1]) + len(word) + 5 > width:
                lines.append(f"  {word}")
            else:
                lines[-1] += f" {word}" if lines[-1] else word
    yield from textwrap.indent(" \\\n".join(lines), "  ").split("\n")


def man_page(program: Any) -> str:
    """The manual, for man(1): the program, then each command."""
    ctx = program.make_context("llava-weights", [], resilient_parsing=True)
    lines = [f'.TH LLAVA-WEIGHTS 1 "" "llava-weights {__version__}" "User Commands"', ".SH NAME"]
    lines += [f"llava-weights \\- {_roff(_paragraphs(program)[0])}", ".SH SYNOPSIS", ".B llava-weights", "COMMAND [OPTIONS]"]
    lines += [".SH COMMANDS"]
    for name, command in program.commands.items():
        inner = command.make_context(name, [], parent=ctx, resilient_parsing=True)
        lines += [f".SS {_roff(f'llava-weights {name} {usage(command, inner)}')}"]
        for paragraph in _paragraphs(command):
            lines += [".PP", _roff(paragraph)]
        for title, rows in sections(command, inner):
            lines += [".PP", f".I {title}"]
            for option, text in rows:
                lines += [".TP", f".B {_roff(option)}", _roff(text)]
        lines += [".PP", ".EX", *(_roff(f"$ {line}") for line in examples(command)), ".EE"]
    lines += [".SH EXIT STATUS", *_pairs(EXIT_CODES), ".SH ENVIRONMENT", *_pairs(VARIABLES), ".SH SEE ALSO", _roff(DOCS)]
    return "\n".join(lines) + "\n"


EXIT_CODES = {
    "0": "done, verified, equal",
    "1": "a fault of llava-weights: the traceback is saved",
    "2": "the command line can't be",
    "3": "an input is missing, damaged, unknown or does not fit; or there is nothing to verify against",
    "4": "the verification failed, or the checkpoints differ",
    "5": "the output can't be written, or is in use by another run",
    "6": "the Hub or another server said no, or did not answer",
    "129, 130, 143": "stopped by SIGHUP, Ctrl-C or SIGTERM: the same command continues",
}
VARIABLES = {
    "LLAVA_WEIGHTS_MAX_MEMORY, LLAVA_WEIGHTS_JOBS": "as --max-memory and --jobs, which win",
    "LLAVA_WEIGHTS_DEBUG": "1 shows tracebacks",
    "NO_COLOR, FORCE_COLOR": "no colours, or colours where there is no terminal too",
    "HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE": "as huggingface_hub takes them",
}


def _pairs(rows: dict[str, str]) -> Iterator[str]:
    for name, text in rows.items():
        yield from (".TP", f".B {_roff(name)}", _roff(text))


def _roff(text: str) -> str:
    """Text as roff takes it: no escapes, no hyphens that look like minus signs, no line that begins a request."""
    plain = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{plain}" if plain.startswith((".", "'")) else plain
