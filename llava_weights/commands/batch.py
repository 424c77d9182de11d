"""The command that runs many jobs, and how their table is read: every key is an option of the command, checked before anything runs."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from ..errors import UsageError
from . import check, make
from .common import session
from .options import DryRun, Show, grouped

if TYPE_CHECKING:
    from ..batch import Job

COMMANDS: dict[str, Callable[..., None]] = {
    "apply-delta": make.apply_delta,
    "make-delta": make.make_delta,
    "merge-lora": make.merge_lora,
    "convert": make.convert,
    "verify": check.verify,
    "checksum": check.checksum,
    "smoke": check.smoke,
}
OURS = ("json", "quiet", "verbose", "dry_run")  # `run` decides on these for all of its jobs
# Parameters that name a checkpoint or a file: what another job of the table may make.
READS = ("source", "path", "base", "delta", "tuned", "lora", "non_lora", "vision_tower", "against", "reference", "original")
LARGEST_TABLE = 1 << 20  # bytes; a thousand jobs take 200 kB


@grouped
def run(
    *,
    table: Annotated[Path, typer.Argument(metavar="JOBS.toml", help="Table of jobs, each with the options of its command.")],
    only: Annotated[list[str] | None, typer.Option("--only", metavar="NAME", help="Run this job of the table only. Repeats.")] = None,
    keep_going: Annotated[bool, typer.Option("-k", "--keep-going", help="Run the other jobs although one is refused or fails.")] = False,
    dry_run: DryRun = False,
    show: Show,
) -> None:
    """Run many jobs from a table: all plans first, then one job after the other; the same command continues."""
    with session(show) as console:
        from ..batch import run_jobs

        raise typer.Exit(run_jobs(read_jobs(table, only or []), console, dry_run=dry_run, keep_going=keep_going))


@dataclass(frozen=True)
class Parameter:
    """An option or argument of a command: its flags (none for an argument), and the type of its value without None."""

    name: str
    flag: str | None
    opposite: str | None
    kind: Any

    def words(self, key: str, value: object, label: str) -> Iterator[str]:
        """The words of a command line that say `value`. Raises UsageError where it has another type."""
        types, meant = KINDS.get(self.kind, KINDS[str])
        for item in value if isinstance(value, list) and self.kind == list[str] else [value]:
            if not isinstance(item, types) or (isinstance(item, bool) and self.kind is not bool) or "\0" in str(item):
                raise UsageError(
                    f"{label}: `{key}` must be {meant}",
                    facts={"given": repr(value)},
                    hint="see `llava-weights run --help` for the form of the table",
                )
            if item is True:
                yield str(self.flag)
            elif item is False:
                yield from [self.opposite] if self.opposite else []
            else:
                yield f"{self.flag}={item}" if self.flag else str(item)


KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    list[str]: ((str,), "a text or a list of texts"),
}


class Command:
    """What one command understands, by the keys of a table: long options without dashes, arguments by name."""

    def __init__(self, name: str, function: Callable[..., None]) -> None:
        self.name = name
        app = typer.Typer()
        app.command(name)(function)
        self.parser = typer.main.get_command(app)
        kinds = {parameter: _kind(hint) for parameter, hint in get_type_hints(function).items()}
        self.parameters: dict[str, Parameter] = {}
        for found in self.parser.params:
            long = [flag for flag in found.opts if flag.startswith("--")]
            made = Parameter(str(found.name), next(iter(long), None), next(iter(found.secondary_opts), None), kinds.get(found.name))
            if made.kind and made.name not in OURS:
                self.parameters |= {flag.removeprefix("--"): made for flag in long or [made.name]}

    def values(self, table: Mapping[str, Any], label: str) -> dict[str, tuple[str, Any]]:
        """Key and value by parameter. Raises UsageError for a key that is no option, or for two that are the same one."""
        values: dict[str, tuple[str, Any]] = {}
        for key, value in table.items():
            if key.replace("-", "_") in OURS:
                raise UsageError(f"{label}: `{key}` is an option of `run`, for all jobs", hint=f"pass `--{key}` to `llava-weights run`")
            if key not in self.parameters:
                hint = f"`llava-weights {self.name} --help` lists them; write them without dashes in front"
                raise UsageError(f"{label}: `{self.name}` has no option `{key}`", hint=hint)
            name = self.parameters[key].name
            if name in values:
                raise UsageError(f"{label}: `{values[name][0]}` and `{key}` are the same option", hint="keep one of them")
            values[name] = key, value
        return values

    def arguments(self, values: Mapping[str, tuple[str, Any]], label: str) -> tuple[str, ...]:
        """The words behind the command's name. Raises UsageError where a value has a wrong type or a required one is missing."""
        options: list[str] = []
        places: list[str] = []
        for key, value in values.values():
            parameter = self.parameters[key]
            (options if parameter.flag else places).extend(parameter.words(key, value, label))
        words = [*options, "--json", "--", *places]
        try:
            self.parser.make_context(self.name, list(words))
        except typer.BadParameter as error:  # of which a missing option is one
            raise UsageError(f"{label}: {error.format_message().removesuffix('.')}", hint="see `llava-weights COMMAND --help`") from None
        return tuple(words)


def _kind(hint: Any) -> Any:
    """The type without None."""
    return get_args(hint)[0] if isinstance(hint, UnionType) else hint


def read_jobs(path: Path, only: list[str]) -> list[Job]:
    """The jobs of a table, those named by `only` if it names any. Raises UsageError with the job and the key that is wrong."""
    from ..batch import linked

    document = _document(path)
    commands = {name: Command(name, function) for name, function in COMMANDS.items()}
    defaults, tables = document.get("defaults", {}), document.get("job", [])
    unknown = [f"`{key}`" for key in document if key not in ("defaults", "job")]
    well_formed = isinstance(defaults, dict) and isinstance(tables, list) and all(isinstance(table, dict) for table in tables)
    if unknown or not well_formed or not tables:
        what = f"{', '.join(unknown)} is no part of a table of jobs" if unknown else "there are no jobs in the table"
        raise UsageError(what, facts={"table": path}, hint="write `[defaults]` once and `[[job]]` in front of each job")
    for key in defaults:
        if not any(key in command.parameters for command in commands.values()):
            raise UsageError(
                f"`[defaults]`: no command has an option `{key}`",
                facts={"table": path},
                hint="see `llava-weights COMMAND --help` for their names",
            )
    jobs = [_job(table, defaults, commands, f"job {number}") for number, table in enumerate(tables, 1)]
    if twice := [name for name, count in Counter(job.name for job in jobs).items() if count > 1]:
        raise UsageError(f"two jobs have the name `{twice[0]}`", hint="give each its own `name`")
    if absent := [name for name in only if name not in {job.name for job in jobs}]:
        raise UsageError(
            f"there is no job `{absent[0]}`", facts={"jobs": ", ".join(job.name for job in jobs)}, hint="name jobs as the table does"
        )
    return linked([job for job in jobs if job.name in only or not only])


def _document(path: Path) -> dict[str, Any]:
    """The TOML file as plain data. Raises InputError where it can't be read, UsageError where it is not TOML."""
    from ..checkpoint import small_bytes

    try:
        return tomllib.loads(small_bytes(path.name, path, LARGEST_TABLE).decode())
    except (ValueError, RecursionError) as error:  # of which both a wrong encoding and a wrong syntax are one
        raise UsageError(f"`{path.name}` is not TOML: {error}", facts={"table": path}, hint="correct the table at that place") from None


def _job(table: Mapping[str, Any], defaults: Mapping[str, Any], commands: Mapping[str, Command], label: str) -> Job:
    from ..batch import Job
    from ..destination import is_address

    for key in ("name", "command"):
        if not isinstance(table.get(key, ""), str) or table.get(key) == "":
            raise UsageError(f"{label}: `{key}` must be a text", facts={"given": repr(table[key])}, hint="put it in quotes")
    label = f"job `{table['name']}`" if "name" in table else label
    if (command := commands.get(table.get("command", ""))) is None:
        what = f"there is no command `{table['command']}`" if "command" in table else "`command` is missing"
        raise UsageError(f"{label}: {what}", hint=f"choose one of {', '.join(commands)}")
    given = {key: value for key, value in defaults.items() if key in command.parameters}
    own = {key: value for key, value in table.items() if key not in ("name", "command")}
    values = command.values(given, "`[defaults]`") | command.values(own, label)
    arguments = command.arguments(values, label)
    named = {name: value for name, (_, value) in values.items()}
    if is_address(named.get("output", "")):
        raise UsageError(f"{label}: a job's `output` is a folder", hint='add `push = "owner/name"` to publish it')
    output = Path(named["output"]) if "output" in named else None
    read = [named[name] for name in READS if name in named]
    reads = tuple(text for value in read for text in (value if isinstance(value, list) else [value]))
    name = table.get("name") or (output.name if output else f"{command.name} {Path(named['path']).name}")
    return Job(name, command.name, arguments, output, reads)
