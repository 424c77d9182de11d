"""The options that several commands have, one by one and in groups.

A group is a frozen dataclass whose fields are options. `grouped` replaces a command's parameter of such a type by its fields, for typer,
and hands the group to the command.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..families.prompts import PROMPTS

Output = Annotated[
    str,
    typer.Option(
        "-o", "--output", "--target", "--target-model-path", help="Folder to write, or s3://, gs://, hf:// address; there when complete."
    ),
]
Base = Annotated[str, typer.Option("--base", "--base-model-path", help="Original LLaMA: folder (HF or Meta's), file, or owner/name[@rev].")]
AcceptBase = Annotated[bool, typer.Option("--accept-base", help="Go on although the base's values look wrong.")]
AcceptValues = Annotated[bool, typer.Option("--accept-values", help="Go on although zeros stand where an input should have values.")]
DryRun = Annotated[bool, typer.Option("-n", "--dry-run", help="Print the plan, write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output after the new one is complete.")]
Restart = Annotated[bool, typer.Option("--restart", help="Ignore the partial work of an earlier run; the default continues it.")]
Reread = Annotated[bool, typer.Option("--reread/--no-reread", help="Read back from the disk what was written, before it gets its name.")]
Push = Annotated[
    str | None, typer.Option("--push", metavar="OWNER/NAME[@BRANCH]", help="Publish the output on the Hub; a new repository is private.")
]
ShardSize = Annotated[
    str | None, typer.Option("--max-shard-size", metavar="SIZE", show_default="5GB", help="Largest output file, as 5GB or 512MiB.")
]
Memory = Annotated[
    str | None, typer.Option("--max-memory", metavar="SIZE", envvar="LLAVA_WEIGHTS_MAX_MEMORY", help="Keep the whole process below this.")
]
Jobs = Annotated[int, typer.Option("-j", "--jobs", min=1, max=64, envvar="LLAVA_WEIGHTS_JOBS", help="Worker threads.")]
WritingJobs = Annotated[
    int | None,
    typer.Option(
        "-j",
        "--jobs",
        min=1,
        max=64,
        envvar="LLAVA_WEIGHTS_JOBS",
        help="Worker threads in all; by default one for each usable processor, within 500 MiB of memory.",
    ),
]
Dtype = Annotated[str | None, typer.Option("--dtype", metavar="F16|BF16|F32", help="Dtype of the output; the base's own by default.")]
Lora = Annotated[
    list[str],
    typer.Option(
        "--lora", "--lora-path", "--model-path", help="Adapter: folder, file or Hub id; A@0.5 or owner/name@REV@0.5 weighs it. Repeats."
    ),
]
NonLora = Annotated[Path | None, typer.Option("--non-lora", help="The non_lora_trainables.bin that a checkpoint-N folder lacks.")]
AdapterName = Annotated[str | None, typer.Option("--adapter", metavar="NAME", help="Which of several adapters in one file or folder.")]
Scale = Annotated[float | None, typer.Option("--scale", show_default="1.0", help="Multiplies every adapter.")]
ArithmeticRule = Annotated[
    str | None,
    typer.Option(
        "--arithmetic",
        metavar="peft|peft-safe|peft-half|exact",
        show_default="peft",
        help="Which bits a merge gives: those of a PEFT version, or exact, the same on every machine.",
    ),
]
BaseQuantized = Annotated[
    str | None,
    typer.Option(
        "--base-quantized",
        metavar="nf4|fp4|int8",
        help="Round the base first as bitsandbytes did while a QLoRA was trained; nf4-double: with double quantisation.",
    ),
]
To = Annotated[str | None, typer.Option("--to", metavar="llava-hf|llava|gguf", help="Convert the result to this layout, in the same pass.")]
VisionTowerOption = Annotated[
    str | None, typer.Option("--vision-tower", help="CLIP for a checkpoint that holds none: folder, file or owner/name[@rev].")
]
AcceptTower = Annotated[
    bool, typer.Option("--accept-tower", help="Go on although the vision tower given is another published one than the config names.")
]
Lossy = Annotated[
    bool, typer.Option("--lossy", help="Leave out tensors that the class of llava-hf has no place for; without it they are refused.")
]
ProjectorForm = Annotated[
    str | None,
    typer.Option(
        "--projector-form", metavar="identity|relu|gelu", help="A linear projector in llava-hf: relu for vLLM, gelu for MLX; GGUF has gelu."
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", metavar="Q8_0|Q4_0", help="Dtype of the text model's matrices in GGUF; needs `llava-weights[gguf]`."),
]
ImageToken = Annotated[str | None, typer.Option("--image-token", help="Text of the image token in llava-hf.")]
VocabSize = Annotated[int | None, typer.Option("--vocab-size", min=1, help="Rows of the vocabulary tables in llava-hf.")]


def complete_conv_mode(incomplete: str) -> list[tuple[str, str]]:
    """The names that begin so, for the shell, each with its family."""
    return [(row.name, row.title) for row in PROMPTS if row.name.startswith(incomplete)]


ConvMode = Annotated[
    str | None,
    typer.Option(
        "--conv-mode",
        metavar="NAME",
        autocompletion=complete_conv_mode,
        help=f"The prompt it was trained with, recorded in config.json: {', '.join(row.name for row in PROMPTS)}.",
    ),
]
ImageAspect = Annotated[
    str | None,
    typer.Option(
        "--image-aspect",
        metavar="square|pad",
        help="How an image becomes a square, by default as the original does it. pad needs transformers 4.49.",
    ),
]
Pool = Annotated[str | None, typer.Option("--executor", metavar="ray", help="Send the shards to a cluster; by default threads write them.")]
Address = Annotated[
    str | None,
    typer.Option("--ray-address", metavar="auto|HOST:PORT", help="Which Ray cluster; by default a running one, or this machine."),
]
Part = Annotated[
    str | None, typer.Option("--shards", metavar="I/N", help="Write only the I-th of N portions of the shards, and publish nothing.")
]
Finish = Annotated[bool, typer.Option("--finish", help="Check the shards that portions wrote, and publish.")]
JsonLines = Annotated[bool, typer.Option("--json", help="JSON lines on stdout, the last one a summary.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors, and the output's path.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="More, and tracebacks.")]


@dataclass(frozen=True, kw_only=True)
class Show:
    """How a command speaks."""

    json: JsonLines = False
    quiet: Quiet = False
    verbose: Verbose = False

    @property
    def bars(self) -> bool | None:
        """`progress` of a download: no bars beside JSON or when quiet, else only on a terminal."""
        return False if self.json or self.quiet else None


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The options of conversion beside `--to` and `--dtype`."""

    vision_tower: VisionTowerOption = None
    projector_form: ProjectorForm = None
    image_token: ImageToken = None
    vocab_size: VocabSize = None
    conv_mode: ConvMode = None
    image_aspect: ImageAspect = None
    accept_tower: AcceptTower = False
    lossy: Lossy = False
    quantize: Quantize = None

    @property
    def given(self) -> dict[str, Any]:
        """What was given of them, by name."""
        return {key: value for key, value in asdict(self).items() if value is not None and value is not False}


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a checkpoint is written."""

    accept_values: AcceptValues = False
    max_shard_size: ShardSize = None
    max_memory: Memory = None
    jobs: WritingJobs = None
    dry_run: DryRun = False
    force: Force = False
    restart: Restart = False
    reread: Reread = True
    push: Push = None
    executor: Pool = None
    ray_address: Address = None
    shards: Part = None
    finish: Finish = False


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """`command` in the form that typer needs: each parameter that is a group becomes the options that are the group's fields."""
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if not (isinstance(group, type) and is_dataclass(group)):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group
        hints = get_type_hints(group, include_extras=True)
        for field in fields(group):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            option = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name])
            parameters.append(option)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        collected = {name: group(**{field.name: given.pop(field.name) for field in fields(group)}) for name, group in groups.items()}
        command(**given, **collected)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
