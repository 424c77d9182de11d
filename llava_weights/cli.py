"""The command line: parse, call, hand to the console. No logic lives here."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .console import Console, versions
from .errors import Interrupted, LlavaWeightsError, MismatchError, Terminated, UsageError
from .events import Note
from .wording import two_columns

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .plan import Plan
    from .published import Role

app = typer.Typer(
    name="llava-weights",
    help="Apply LLaVA deltas onto LLaMA weights, shard by shard, in little memory, with proof.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Output = Annotated[
    Path, typer.Option("-o", "--output", "--target", "--target-model-path", help="Folder to write; it appears when it is complete.")
]
Base = Annotated[str, typer.Option("--base", "--base-model-path", help="Original LLaMA: folder (HF or Meta's), file, or owner/name[@rev].")]
DryRun = Annotated[bool, typer.Option("-n", "--dry-run", help="Print the plan, write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output after the new one is complete.")]
Restart = Annotated[bool, typer.Option("--restart", help="Ignore the partial work of an earlier run; the default continues it.")]
ShardSize = Annotated[str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest output file, as 5GB or 512MiB.")]
Memory = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", envvar="LLAVA_WEIGHTS_MAX_MEMORY", help="Keep the whole process below this."),
]
Jobs = Annotated[int, typer.Option("-j", "--jobs", min=1, max=64, envvar="LLAVA_WEIGHTS_JOBS", help="Worker threads.")]
Dtype = Annotated[str | None, typer.Option("--dtype", metavar="F16|BF16|F32", help="Dtype of the output; the base's own by default.")]
Lora = Annotated[
    list[str],
    typer.Option("--lora", "--lora-path", "--model-path", help="Adapter: folder, file or Hub id; A@0.5 weighs it. Repeats."),
]
NonLora = Annotated[Path | None, typer.Option("--non-lora", help="The non_lora_trainables.bin that a checkpoint-N folder lacks.")]
Scale = Annotated[float, typer.Option("--scale", help="Multiplies every adapter.")]
Rule = Annotated[
    str,
    typer.Option("--arithmetic", metavar="peft|peft-safe|peft-half|exact", help="Whose bits to make; exact is the same everywhere."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON lines on stdout, the last one a summary.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors, and the output's path.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="More, and tracebacks.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Apply LLaVA deltas onto LLaMA weights, shard by shard, in little memory, with proof."""
    if version:
        Console().document(f"llava-weights {__version__}", {})
        raise typer.Exit


@app.command("apply-delta")
def apply_delta(
    base: Base,
    delta: Annotated[str, typer.Option("--delta", "--delta-path", help="The delta: folder, file, or owner/name[@rev].")],
    output: Output,
    accept_base: Annotated[bool, typer.Option("--accept-base", help="Go on although the base's values look wrong.")] = False,
    check_inputs: Annotated[bool, typer.Option("--check-inputs", help="Hash the inputs first and look them up.")] = False,
    lora: Annotated[list[str] | None, typer.Option("--lora", help="Merge an adapter into the result, in the same pass. Repeats.")] = None,
    arithmetic: Rule = "peft",
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a delta on the Hub.")] = None,
    max_shard_size: ShardSize = "5GB",
    max_memory: Memory = None,
    jobs: Jobs = 2,
    dry_run: DryRun = False,
    force: Force = False,
    restart: Restart = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    low_cpu_mem: Annotated[bool, typer.Option("--low-cpu-mem", hidden=True)] = False,
) -> None:
    """Add a delta to the original LLaMA weights: base + delta, every bit as the original script."""
    with session(json, quiet, verbose, writes=True) as console:
        from .checkpoint import open_checkpoint
        from .delta import apply_delta as transform
        from .plan import make_plan

        if low_cpu_mem:
            _note(console, "`--low-cpu-mem` changes nothing: memory is always bounded")
        bars = False if json or quiet else None
        ours, theirs = open_checkpoint(base, progress=bars), open_checkpoint(delta, revision=revision, progress=bars)
        if check_inputs:
            _check_inputs(console, (("base", ours), ("delta", theirs)))
        merged = transform(ours, theirs, accept_base=accept_base)
        if lora:
            merged = _merge(merged, lora, arithmetic, progress=bars)
        plan = make_plan(merged, max_shard_size=max_shard_size, max_memory=max_memory, jobs=jobs)
        _carry_out(console, plan, output, dry_run=dry_run, force=force, restart=restart)


@app.command("make-delta")
def make_delta(
    base: Base,
    tuned: Annotated[str, typer.Option("--tuned", help="The fine-tuned model: folder, file, or owner/name[@rev].")],
    output: Annotated[Path, typer.Option("-o", "--output", "--delta", "--delta-path", help="Folder to write the delta to.")],
    codec: Annotated[
        str, typer.Option("--codec", metavar="arithmetic|integer", help="fp16 difference as published in 2023, or lossless and smaller.")
    ] = "arithmetic",
    max_shard_size: ShardSize = "5GB",
    max_memory: Memory = None,
    jobs: Jobs = 2,
    dry_run: DryRun = False,
    force: Force = False,
    restart: Restart = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Subtract the base from a fine-tuned model: the inverse of apply-delta, for publishers."""
    with session(json, quiet, verbose, writes=True) as console:
        from .checkpoint import open_checkpoint
        from .delta import make_delta as transform
        from .plan import make_plan

        if codec not in ("arithmetic", "integer"):
            raise UsageError(f"there is no codec `{codec}`", hint="choose `arithmetic` or `integer`")
        bars = False if json or quiet else None
        difference = transform(open_checkpoint(base, progress=bars), open_checkpoint(tuned, progress=bars), codec=codec)
        plan = make_plan(difference, max_shard_size=max_shard_size, max_memory=max_memory, jobs=jobs)
        _carry_out(console, plan, output, dry_run=dry_run, force=force, restart=restart)


@app.command("merge-lora")
def merge_lora(
    base: Annotated[str, typer.Option("--base", "--model-base", help="The model to merge into: folder, file, or owner/name[@rev].")],
    lora: Lora,
    output: Annotated[Path, typer.Option("-o", "--output", "--save-model-path", help="Folder to write; it appears when it is complete.")],
    scale: Scale = 1.0,
    arithmetic: Rule = "peft",
    dtype: Dtype = None,
    non_lora: NonLora = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a base on the Hub.")] = None,
    max_shard_size: ShardSize = "5GB",
    max_memory: Memory = None,
    jobs: Jobs = 2,
    dry_run: DryRun = False,
    force: Force = False,
    restart: Restart = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Merge LoRA adapters (PEFT's or LLaVA's) into a model, every bit as PEFT would."""
    with session(json, quiet, verbose, writes=True) as console:
        from .checkpoint import open_checkpoint
        from .plan import make_plan

        bars = False if json or quiet else None
        model = open_checkpoint(base, revision=revision, progress=bars)
        merged = _merge(model, lora, arithmetic, scale=scale, dtype=dtype, non_lora=non_lora, progress=bars)
        plan = make_plan(merged, max_shard_size=max_shard_size, max_memory=max_memory, jobs=jobs)
        _carry_out(console, plan, output, dry_run=dry_run, force=force, restart=restart)


@app.command("inspect")
def inspect(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder, file, owner/name[@rev] or hf://owner/name.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a repository on the Hub.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what a checkpoint is, why we think so, and what to do with it."""
    with session(json, quiet, verbose) as console:
        from .checkpoint import open_checkpoint
        from .inspection import inspect as look

        rows, document = look(open_checkpoint(source, revision=revision), given=source, tensors=tensors)
        console.document("\n".join([str(document["name"]), *two_columns(rows)]), document)


@app.command("demo")
def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to put the toy models.")] = Path("demo"),
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a toy LLaMA and its delta, then run the real commands on them and show each."""
    with session(False, quiet, verbose, writes=True) as console:
        from .demo import run

        raise typer.Exit(run(folder, console))


@app.command("env")
def env(json: Json = False) -> None:
    """Versions and settings for a bug report."""
    with session(json, False, False) as console:
        found = versions()
        settings = {name: value for name in ("HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE") if (value := os.environ.get(name))}
        console.document("\n".join(two_columns([*found.items(), *settings.items()])), {**found, **settings})


@contextmanager
def session(json: bool, quiet: bool, verbose: bool, *, writes: bool = False) -> Iterator[Console]:
    """A console for one command; every way of ending becomes its text and its exit code."""
    console = Console(json=json, quiet=quiet, verbose=verbose)
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


def _carry_out(console: Console, plan: Plan, output: Path, *, dry_run: bool, force: bool, restart: bool) -> None:
    """Show the plan, then do it. A dry run ends with the exit code that the real one would start with."""
    from time import monotonic

    from .report import explain, outcome
    from .write import execute, preflight

    console.plan(*explain(plan, output))
    if dry_run:
        preflight(plan, Path(os.path.abspath(output)), force=force)
        console.summary(["Nothing was written (dry run)"], {"dry_run": True})
        return
    begun = monotonic()
    report = execute(plan, output, force=force, restart=restart, on_event=console.on_event)
    lines, document = outcome(report, output, monotonic() - begun)
    console.summary(lines, document, str(output))


def _merge(
    model: Checkpoint,
    loras: Sequence[str],
    arithmetic: str,
    *,
    scale: float = 1.0,
    dtype: str | None = None,
    non_lora: Path | None = None,
    progress: bool | None = None,
) -> Checkpoint:
    from .lora import merge_lora, open_weighted, to_arithmetic, to_dtype

    adapters = [open_weighted(text, non_lora=non_lora, progress=progress) for text in loras]
    return merge_lora(model, adapters, arithmetic=to_arithmetic(arithmetic), scale=scale, dtype=to_dtype(dtype))


def _note(console: Console, text: str, *, warning: bool = False) -> None:
    console.on_event(Note(text, warning))


def _check_inputs(console: Console, roles: Sequence[tuple[Role, Checkpoint]]) -> None:
    """Hash every input file and say which published file it is. Raises MismatchError where one is known not to fit its role."""
    from .published import check_inputs

    for role, checkpoint in roles:
        for finding in check_inputs([Path(file.path) for file in checkpoint.origin.files], role):
            if finding.verdict == "wrong":
                raise MismatchError(finding.text, facts={"file": finding.file, "sha256": finding.sha256})
            _note(console, finding.text)


def main() -> None:
    """Entry point of `llava-weights`."""
    app()
