"""The commands that write a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .common import (
    AcceptBase,
    Base,
    ConvMode,
    DryRun,
    Dtype,
    Force,
    ImageAspect,
    ImageToken,
    Jobs,
    Json,
    Lora,
    Memory,
    NonLora,
    Output,
    ProjectorForm,
    Quiet,
    Reread,
    Restart,
    Rule,
    Scale,
    ShardSize,
    To,
    Verbose,
    VisionTower,
    VocabSize,
    carry_out,
    check_given,
    converted,
    merge,
    note,
    session,
)


def apply_delta(
    base: Base,
    delta: Annotated[str, typer.Option("--delta", "--delta-path", help="The delta: folder, file, or owner/name[@rev].")],
    output: Output,
    accept_base: AcceptBase = False,
    check_inputs: Annotated[bool, typer.Option("--check-inputs", help="Hash the inputs first and look them up.")] = False,
    lora: Annotated[list[str] | None, typer.Option("--lora", help="Merge an adapter into the result, in the same pass. Repeats.")] = None,
    arithmetic: Rule = "peft",
    to: To = None,
    vision_tower: VisionTower = None,
    projector_form: ProjectorForm = None,
    image_token: ImageToken = None,
    vocab_size: VocabSize = None,
    conv_mode: ConvMode = None,
    image_aspect: ImageAspect = None,
    dtype: Dtype = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a delta on the Hub.")] = None,
    max_shard_size: ShardSize = "5GB",
    max_memory: Memory = None,
    jobs: Jobs = 2,
    dry_run: DryRun = False,
    force: Force = False,
    restart: Restart = False,
    reread: Reread = True,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    low_cpu_mem: Annotated[bool, typer.Option("--low-cpu-mem", hidden=True)] = False,
) -> None:
    """Add a delta to the original LLaMA weights: base + delta, every bit as the original script."""
    with session(json, quiet, verbose, writes=True) as console:
        from ..checkpoint import open_checkpoint
        from ..delta import apply_delta as transform

        if low_cpu_mem:
            note(console, "`--low-cpu-mem` changes nothing: memory is always bounded")
        bars = False if json or quiet else None
        ours, theirs = open_checkpoint(base, progress=bars), open_checkpoint(delta, revision=revision, progress=bars)
        if check_inputs:
            check_given(console, (("base", ours), ("delta", theirs)))
        merged = transform(ours, theirs, accept_base=accept_base)
        merged = merge(merged, lora or [], arithmetic, progress=bars)
        made = converted(
            merged,
            to,
            vision_tower=vision_tower,
            projector_form=projector_form,
            image_token=image_token,
            vocab_size=vocab_size,
            conv_mode=conv_mode,
            image_aspect=image_aspect,
            dtype=dtype,
            progress=bars,
        )
        carry_out(
            console,
            made,
            output,
            max_shard_size=max_shard_size,
            max_memory=max_memory,
            jobs=jobs,
            dry_run=dry_run,
            force=force,
            restart=restart,
            reread=reread,
        )


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
    reread: Reread = True,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Subtract the base from a fine-tuned model: the inverse of apply-delta, for publishers."""
    with session(json, quiet, verbose, writes=True) as console:
        from ..checkpoint import open_checkpoint
        from ..delta import make_delta as transform

        if codec not in ("arithmetic", "integer"):
            raise UsageError(f"there is no codec `{codec}`", hint="choose `arithmetic` or `integer`")
        bars = False if json or quiet else None
        difference = transform(open_checkpoint(base, progress=bars), open_checkpoint(tuned, progress=bars), codec=codec)
        carry_out(
            console,
            difference,
            output,
            max_shard_size=max_shard_size,
            max_memory=max_memory,
            jobs=jobs,
            dry_run=dry_run,
            force=force,
            restart=restart,
            reread=reread,
        )


def merge_lora(
    base: Annotated[str, typer.Option("--base", "--model-base", help="The model to merge into: folder, file, or owner/name[@rev].")],
    lora: Lora,
    output: Annotated[Path, typer.Option("-o", "--output", "--save-model-path", help="Folder to write; it appears when it is complete.")],
    scale: Scale = 1.0,
    arithmetic: Rule = "peft",
    dtype: Dtype = None,
    to: To = None,
    vision_tower: VisionTower = None,
    projector_form: ProjectorForm = None,
    image_token: ImageToken = None,
    vocab_size: VocabSize = None,
    conv_mode: ConvMode = None,
    image_aspect: ImageAspect = None,
    non_lora: NonLora = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a base on the Hub.")] = None,
    max_shard_size: ShardSize = "5GB",
    max_memory: Memory = None,
    jobs: Jobs = 2,
    dry_run: DryRun = False,
    force: Force = False,
    restart: Restart = False,
    reread: Reread = True,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Merge LoRA adapters (PEFT's or LLaVA's) into a model, every bit as PEFT would."""
    with session(json, quiet, verbose, writes=True) as console:
        from ..checkpoint import open_checkpoint

        bars = False if json or quiet else None
        model = open_checkpoint(base, revision=revision, progress=bars)
        merged = merge(model, lora, arithmetic, scale=scale, dtype=dtype, non_lora=non_lora, progress=bars)
        made = converted(
            merged,
            to,
            vision_tower=vision_tower,
            projector_form=projector_form,
            image_token=image_token,
            vocab_size=vocab_size,
            conv_mode=conv_mode,
            image_aspect=image_aspect,
            progress=bars,
        )
        carry_out(
            console,
            made,
            output,
            max_shard_size=max_shard_size,
            max_memory=max_memory,
            jobs=jobs,
            dry_run=dry_run,
            force=force,
            restart=restart,
            reread=reread,
        )


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="LLaVA to convert, or LLaMA with --delta or --lora: folder, file, owner/name[@rev].")
    ],
    output: Output,
    to: Annotated[str, typer.Option("--to", metavar="llava-hf|llava", help="Layout to write.")] = "llava-hf",
    delta: Annotated[str | None, typer.Option("--delta", help="Apply this delta onto SRC first, in the same pass.")] = None,
    accept_base: AcceptBase = False,
    lora: Annotated[list[str] | None, typer.Option("--lora", help="Merge this adapter first, in the same pass. Repeats.")] = None,
    arithmetic: Rule = "peft",
    scale: Scale = 1.0,
    non_lora: NonLora = None,
    vision_tower: VisionTower = None,
    projector_form: ProjectorForm = None,
    image_token: ImageToken = None,
    vocab_size: VocabSize = None,
    conv_mode: ConvMode = None,
    image_aspect: ImageAspect = None,
    dtype: Dtype = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a SRC on the Hub.")] = None,
    max_shard_size: ShardSize = "5GB",
    max_memory: Memory = None,
    jobs: Jobs = 2,
    dry_run: DryRun = False,
    force: Force = False,
    restart: Restart = False,
    reread: Reread = True,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert LLaVA's original layout to llava-hf, and back; with a delta and adapters in the same pass."""
    with session(json, quiet, verbose, writes=True) as console:
        from ..checkpoint import open_checkpoint

        bars = False if json or quiet else None
        model = open_checkpoint(source, revision=revision, progress=bars)
        if delta:
            from ..delta import apply_delta as add

            model = add(model, open_checkpoint(delta, progress=bars), accept_base=accept_base)
        model = merge(model, lora or [], arithmetic, scale=scale, non_lora=non_lora, progress=bars)
        made = converted(
            model,
            to,
            vision_tower=vision_tower,
            projector_form=projector_form,
            image_token=image_token,
            vocab_size=vocab_size,
            conv_mode=conv_mode,
            image_aspect=image_aspect,
            dtype=dtype,
            progress=bars,
        )
        carry_out(
            console,
            made,
            output,
            max_shard_size=max_shard_size,
            max_memory=max_memory,
            jobs=jobs,
            dry_run=dry_run,
            force=force,
            restart=restart,
            reread=reread,
        )
