"""What the commands share: their options, the console of one run and its exit codes, and carrying out a plan."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import Console
from ..errors import Interrupted, LlavaWeightsError, MismatchError, Terminated, UsageError
from ..events import Note

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..published import Role

Output = Annotated[
    Path, typer.Option("-o", "--output", "--target", "--target-model-path", help="Folder to write; it appears when it is complete.")
]
Base = Annotated[str, typer.Option("--base", "--base-model-path", help="Original LLaMA: folder (HF or Meta's), file, or owner/name[@rev].")]
AcceptBase = Annotated[bool, typer.Option("--accept-base", help="Go on although the base's values look wrong.")]
DryRun = Annotated[bool, typer.Option("-n", "--dry-run", help="Print the plan, write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output after the new one is complete.")]
Restart = Annotated[bool, typer.Option("--restart", help="Ignore the partial work of an earlier run; the default continues it.")]
Reread = Annotated[bool, typer.Option("--reread/--no-reread", help="Read back from the disk what was written, before it gets its name.")]
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
To = Annotated[str | None, typer.Option("--to", metavar="llava-hf|llava", help="Convert the result to this layout, in the same pass.")]
VisionTower = Annotated[
    str | None, typer.Option("--vision-tower", help="CLIP for a checkpoint that holds none: folder, file or owner/name[@rev].")
]
ProjectorForm = Annotated[
    str | None,
    typer.Option(
        "--projector-form", metavar="identity|relu|gelu", help="A linear projector in llava-hf: relu for vLLM, gelu for GGUF and MLX."
    ),
]
ImageToken = Annotated[str | None, typer.Option("--image-token", help="Text of the image token in llava-hf.")]
VocabSize = Annotated[int | None, typer.Option("--vocab-size", min=1, help="Rows of the vocabulary tables in llava-hf.")]
ConvMode = Annotated[str | None, typer.Option("--conv-mode", help="Prompt family of the chat template, by LLaVA's name, as llava_v1.")]
ImageAspect = Annotated[
    str | None,
    typer.Option("--image-aspect", metavar="square|pad", help="pad: as LLaVA-1.5 did it, for transformers 4.49 and later."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON lines on stdout, the last one a summary.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors, and the output's path.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="More, and tracebacks.")]


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


def carry_out(
    console: Console,
    checkpoint: Checkpoint,
    output: Path,
    *,
    max_shard_size: str,
    max_memory: str | None,
    jobs: int,
    dry_run: bool,
    force: bool,
    restart: bool,
    reread: bool,
) -> None:
    """Plan, show the plan, then do it. A dry run ends with the exit code that the real one would start with."""
    from time import monotonic

    from ..plan import make_plan
    from ..report import explain, outcome
    from ..write import execute, preflight

    plan = make_plan(checkpoint, max_shard_size=max_shard_size, max_memory=max_memory, jobs=jobs)
    console.plan(*explain(plan, output))
    if dry_run:
        preflight(plan, Path(os.path.abspath(output)), force=force)
        console.summary(["Nothing was written (dry run)"], {"dry_run": True})
        return
    begun = monotonic()
    report = execute(plan, output, force=force, restart=restart, reread=reread, on_event=console.on_event)
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
    checkpoint: Checkpoint,
    to: str | None,
    *,
    vision_tower: str | None,
    dtype: str | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Checkpoint:
    """`checkpoint` in the layout that `--to` names; itself where it names none, and then no option of conversion may be given."""
    given = {key: value for key, value in {"vision_tower": vision_tower, **options}.items() if value is not None}
    if to is None:
        if given:
            names = ", ".join(f"`--{key.replace('_', '-')}`" for key in given)
            raise UsageError(f"{names} is an option of conversion", hint="add `--to llava-hf` or `--to llava`")
        return checkpoint
    from ..buffers import to_dtype
    from ..checkpoint import open_checkpoint
    from ..conversion import convert

    if (
        to == "llava" and vision_tower and not Path(vision_tower).exists()
    ):  # the original's config names its tower; no weights are asked for
        options, vision_tower = {**options, "tower_name": vision_tower}, None
    tower = open_checkpoint(vision_tower, progress=progress) if vision_tower else None
    return convert(checkpoint, to, tower=tower, dtype=to_dtype(dtype), **options)


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
