"""The options that several commands have, one by one and in groups.

A group is a frozen dataclass whose fields are options. `grouped` replaces a command's parameter of such a type by its fields, for typer,
and hands the group to the command. Each option names the section of `--help` that it stands in.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from ..families.llama_cpp import QUANTISED
from ..families.projectors import PROJECTOR_FORMS
from ..families.prompts import PROMPTS

# The sections of `--help`, in the order in which it shows them.
SECTIONS = ("Input", "Conversion", "Check", "Run", "Output", "Speed", "Cluster", "Console")
INPUT, CONVERSION, CHECK, RUN, OUTPUT, SPEED, CLUSTER, CONSOLE = SECTIONS


def option(section: str, *flags: str, choices: Iterable[str] = (), **how: Any) -> Any:
    """An option in a section of `--help`. `choices` are the values that it takes: help lists them and the shell completes them; the library
    refuses others."""
    if names := tuple(choices):
        how = {"metavar": "|".join(names), "autocompletion": _completing(names)} | how
    return typer.Option(*flags, rich_help_panel=section, **how)


def _completing(names: Iterable[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def complete_conv_mode(incomplete: str) -> list[tuple[str, str]]:
    """The names that begin so, for the shell, each with its family."""
    return [(row.name, row.title) for row in PROMPTS if row.name.startswith(incomplete)]


def revision_of(what: str) -> Any:
    """`--revision`, of the input that it belongs to."""
    return option(INPUT, "--revision", metavar="REV", help=f"Revision of {what} on the Hub: a branch, a tag or a commit.")


def jobs(most: str = "") -> Any:
    return option(
        SPEED, "-j", "--jobs", metavar="N", min=1, max=64, envvar="LLAVA_WEIGHTS_JOBS", help=f"Worker threads{most}.", show_default=not most
    )


SRC = "folder, file or owner/name[@rev]"  # what a checkpoint may be given as
LAYOUTS, ADAPTER_LAYOUTS = ("llava-hf", "llava", "gguf"), ("llava-hf", "llava")
ARITHMETICS, ROUNDINGS = ("peft", "peft-safe", "peft-half", "exact"), ("nf4", "nf4-double", "fp4", "fp4-double", "int8")
CODECS, DTYPES, ASPECTS = ("arithmetic", "integer"), ("F16", "BF16", "F32"), ("square", "pad")

Output = Annotated[
    str,
    option(
        OUTPUT,
        "-o",
        "--output",
        "--target",
        "--target-model-path",
        metavar="OUT",
        help="Folder to write, or s3://, gs://, hf:// address. It appears only when it is complete.",
    ),
]
Base = Annotated[str, option(INPUT, "--base", "--base-model-path", metavar="SRC", help=f"Original LLaMA, Meta's or transformers': {SRC}.")]
AcceptBase = Annotated[bool, option(INPUT, "--accept-base", help="Go on although the base's values look wrong.")]
AcceptValues = Annotated[bool, option(INPUT, "--accept-values", help="Go on although zeros stand where an input should have values.")]
DryRun = Annotated[bool, option(OUTPUT, "-n", "--dry-run", help="Print the plan, write nothing.")]
Force = Annotated[bool, option(OUTPUT, "--force", help="Replace an existing output after the new one is complete.")]
Restart = Annotated[bool, option(OUTPUT, "--restart", help="Ignore the partial work of an earlier run; the default continues it.")]
Reread = Annotated[bool, option(OUTPUT, "--reread/--no-reread", help="Read back from the disk what was written, before it gets its name.")]
Push = Annotated[
    str | None,
    option(OUTPUT, "--push", metavar="OWNER/NAME[@BRANCH]", help="Publish the output on the Hub; a new repository is private."),
]
ShardSize = Annotated[
    str | None,
    option(OUTPUT, "--max-shard-size", metavar="SIZE", show_default="5GB", help="Largest output file, as 5GB or 512MiB."),
]
Memory = Annotated[
    str | None,
    option(
        SPEED,
        "--max-memory",
        metavar="SIZE",
        envvar="LLAVA_WEIGHTS_MAX_MEMORY",
        help="Keep the whole process below this, as 2GB.",
    ),
]
Jobs = Annotated[int, jobs()]
WritingJobs = Annotated[int | None, jobs(" in all; by default one for each usable processor, within 500 MiB of memory")]
Dtype = Annotated[
    str | None, option(CONVERSION, "--dtype", choices=DTYPES, help="Dtype of the output's weights; by default they keep their own.")
]
Lora = Annotated[
    list[str],
    option(
        INPUT,
        "--lora",
        "--lora-path",
        "--model-path",
        metavar="SRC[@WEIGHT]",
        help="Adapter: folder, file or Hub id; A@0.5 or owner/name@REV@0.5 weighs it. May be given several times.",
    ),
]
AlsoLora = Annotated[
    list[str] | None,
    option(
        INPUT, "--lora", metavar="SRC[@WEIGHT]", help="Merge this adapter into the result, in the same pass. May be given several times."
    ),
]
NonLora = Annotated[
    Path | None, option(INPUT, "--non-lora", metavar="FILE", help="The non_lora_trainables.bin that a checkpoint-N folder lacks.")
]
AdapterName = Annotated[str | None, option(INPUT, "--adapter", metavar="NAME", help="Which of several adapters in one file or folder.")]
Scale = Annotated[float | None, option(CONVERSION, "--scale", metavar="X", show_default="1.0", help="Multiplies every adapter.")]
ArithmeticRule = Annotated[
    str | None,
    option(
        CONVERSION,
        "--arithmetic",
        choices=ARITHMETICS,
        show_default="peft",
        help="Which bits a merge gives: those of a PEFT version, or exact, the same on every machine.",
    ),
]
BaseQuantized = Annotated[
    str | None,
    option(
        CONVERSION,
        "--base-quantized",
        choices=ROUNDINGS,
        help="Round the base first as bitsandbytes did while a QLoRA was trained; -double: with double quantisation.",
    ),
]
To = Annotated[str | None, option(CONVERSION, "--to", choices=LAYOUTS, help="Convert the result to this layout, in the same pass.")]
VisionTowerOption = Annotated[
    str | None,
    option(INPUT, "--vision-tower", metavar="SRC", help=f"Vision tower (CLIP, SigLIP) for a checkpoint that holds none: {SRC}."),
]
AcceptTower = Annotated[
    bool, option(INPUT, "--accept-tower", help="Go on although the vision tower given is another published one than the config names.")
]
Lossy = Annotated[
    bool,
    option(CONVERSION, "--lossy", help="Leave out tensors that the class of llava-hf has no place for; without it they are refused."),
]
ProjectorForm = Annotated[
    str | None,
    option(
        CONVERSION,
        "--projector-form",
        choices=PROJECTOR_FORMS,
        help="How a projector of one linear layer is written: identity is exact in transformers, relu for vLLM, gelu for MLX and GGUF.",
    ),
]
Quantize = Annotated[
    str | None,
    option(CONVERSION, "--quantize", choices=QUANTISED, help="Dtype of the text model's matrices in GGUF; needs `llava-weights[gguf]`."),
]
ImageToken = Annotated[str | None, option(CONVERSION, "--image-token", metavar="TEXT", help="Text of the image token in llava-hf.")]
VocabSize = Annotated[
    int | None, option(CONVERSION, "--vocab-size", metavar="ROWS", min=1, help="Rows of the vocabulary tables in llava-hf.")
]
ConvMode = Annotated[
    str | None,
    option(
        CONVERSION,
        "--conv-mode",
        metavar="NAME",
        autocompletion=complete_conv_mode,
        help=f"The prompt it was trained with, recorded in config.json: {', '.join(row.name for row in PROMPTS)}.",
    ),
]
ImageAspect = Annotated[
    str | None,
    option(
        CONVERSION,
        "--image-aspect",
        choices=ASPECTS,
        help="How an image becomes a square, by default as the original does it. pad needs transformers 4.49.",
    ),
]
Pool = Annotated[
    str | None, option(CLUSTER, "--executor", choices=("ray",), help="Send the shards to a cluster; by default threads write them.")
]
Address = Annotated[
    str | None,
    option(CLUSTER, "--ray-address", metavar="auto|HOST:PORT", help="Which Ray cluster; by default a running one, or this machine."),
]
Part = Annotated[
    str | None,
    option(CLUSTER, "--shards", metavar="I/N", help="Write only the I-th of N portions of the shards, and publish nothing."),
]
Finish = Annotated[bool, option(CLUSTER, "--finish", help="Check the shards that portions wrote, and publish.")]
JsonLines = Annotated[bool, option(CONSOLE, "--json", help="JSON lines on stdout, the last one a summary (docs/json.md).")]
Quiet = Annotated[
    bool, option(CONSOLE, "-q", "--quiet", help="The output's path on stdout; on stderr errors, warnings and the verdict of a check.")
]
Verbose = Annotated[bool, option(CONSOLE, "-v", "--verbose", help="Every check and repair, digests, and tracebacks.")]
Color = Annotated[
    Literal["auto", "always", "never"],
    option(
        CONSOLE,
        "--color",
        metavar="auto|always|never",
        help="When to use colours; auto: on a terminal, as the variables NO_COLOR and FORCE_COLOR say.",
    ),
]
NoProgress = Annotated[bool, option(CONSOLE, "--no-progress", help="No bars, and no lines on how far it is.")]


@dataclass(frozen=True, kw_only=True)
class Show:
    """How a command speaks."""

    json: JsonLines = False
    quiet: Quiet = False
    verbose: Verbose = False
    color: Color = "auto"
    no_progress: NoProgress = False

    @property
    def bars(self) -> bool | None:
        """`progress` of a download: no bars beside JSON, when quiet or where none are wanted, else only on a terminal."""
        return False if self.json or self.quiet or self.no_progress else None


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A group of options that may all be left out."""

    @property
    def given(self) -> dict[str, Any]:
        """What was given of them, by name."""
        return {key: value for key, value in asdict(self).items() if value is not None and value is not False}


@dataclass(frozen=True, kw_only=True)
class Merging(Choices):
    """The options of a merge beside the adapters and `--dtype`."""

    arithmetic: ArithmeticRule = None
    scale: Scale = None
    base_quantized: BaseQuantized = None
    non_lora: NonLora = None
    adapter: AdapterName = None

    @property
    def rule(self) -> str:
        return self.arithmetic or "peft"

    @property
    def factor(self) -> float:
        return 1.0 if self.scale is None else self.scale


@dataclass(frozen=True, kw_only=True)
class Conversion(Choices):
    """The options of a conversion beside `--to` and `--dtype`."""

    vision_tower: VisionTowerOption = None
    projector_form: ProjectorForm = None
    image_token: ImageToken = None
    vocab_size: VocabSize = None
    conv_mode: ConvMode = None
    image_aspect: ImageAspect = None
    accept_tower: AcceptTower = False
    lossy: Lossy = False
    quantize: Quantize = None


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
