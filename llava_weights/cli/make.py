"""The commands that write a checkpoint or an adapter: apply-delta, make-delta, merge-lora, convert-lora, convert."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import UsageError, one_of
from .options import (
    ADAPTER_LAYOUTS,
    CODECS,
    CONVERSION,
    INPUT,
    LAYOUTS,
    OUTPUT,
    SRC,
    AcceptBase,
    AdapterName,
    AlsoLora,
    Base,
    Conversion,
    Dtype,
    Lora,
    Merging,
    NonLora,
    Output,
    Run,
    Show,
    To,
    grouped,
    option,
    revision_of,
)
from .session import carry_out, check_given, check_options, converted, merge, note, session


@grouped
def apply_delta(
    *,
    base: Base,
    delta: Annotated[str, option(INPUT, "--delta", "--delta-path", metavar="SRC", help=f"The delta: {SRC}.")],
    output: Output,
    accept_base: AcceptBase = False,
    check_inputs: Annotated[
        bool, option(INPUT, "--check-inputs", help="Hash the inputs first, and look them up among the published checksums.")
    ] = False,
    lora: AlsoLora = None,
    merging: Merging,
    to: To = None,
    conversion: Conversion,
    dtype: Dtype = None,
    revision: Annotated[str | None, revision_of("a delta")] = None,
    run: Run,
    show: Show,
    low_cpu_mem: Annotated[bool, typer.Option("--low-cpu-mem", hidden=True)] = False,
) -> None:
    """Add a delta to the original LLaMA weights: base + delta, every bit as the original script."""
    with session(show, writes=True) as console:
        from ..checkpoint.checkpoint import open_checkpoint
        from ..transforms.delta import apply_delta as transform

        check_options(run, output, to=to, conversion=conversion, dtype=dtype, lora=lora, merging=merging)
        if low_cpu_mem:
            note(console, "`--low-cpu-mem` changes nothing: memory is always bounded")
        llama, difference = open_checkpoint(base, progress=show.bars), open_checkpoint(delta, revision=revision, progress=show.bars)
        if check_inputs:
            check_given(console, (("base", llama), ("delta", difference)))
        merged = transform(llama, difference, accept_base=accept_base)
        merged = merge(merged, lora or [], merging, dtype=None if to else dtype, to=to, conversion=conversion, progress=show.bars)
        made = converted(merged, to, conversion, dtype=dtype, progress=show.bars)
        carry_out(console, made, output, run)


@grouped
def make_delta(
    *,
    base: Base,
    tuned: Annotated[str, option(INPUT, "--tuned", metavar="SRC", help=f"The fine-tuned model: {SRC}.")],
    output: Annotated[
        str, option(OUTPUT, "-o", "--output", "--delta", "--delta-path", metavar="OUT", help="Folder to write the delta to.")
    ],
    codec: Annotated[
        str, option(CONVERSION, "--codec", choices=CODECS, help="fp16 difference as published in 2023, or lossless and smaller.")
    ] = "arithmetic",
    run: Run,
    show: Show,
) -> None:
    """Subtract the base from a fine-tuned model: the inverse of apply-delta, for publishers."""
    with session(show, writes=True) as console:
        from ..checkpoint.checkpoint import open_checkpoint
        from ..transforms.delta import make_delta as transform

        one_of("codec", codec, CODECS)
        check_options(run, output)
        difference = transform(open_checkpoint(base, progress=show.bars), open_checkpoint(tuned, progress=show.bars), codec=codec)
        carry_out(console, difference, output, run)


@grouped
def merge_lora(
    *,
    base: Annotated[str, option(INPUT, "--base", "--model-base", metavar="SRC", help=f"The model to merge into: {SRC}.")],
    lora: Lora,
    output: Annotated[
        str,
        option(OUTPUT, "-o", "--output", "--save-model-path", metavar="OUT", help="Folder to write. It appears only when it is complete."),
    ],
    merging: Merging,
    dtype: Dtype = None,
    to: To = None,
    conversion: Conversion,
    revision: Annotated[str | None, revision_of("a base")] = None,
    run: Run,
    show: Show,
) -> None:
    """Merge LoRA adapters (PEFT's or LLaVA's) into a model, every bit as PEFT would."""
    with session(show, writes=True) as console:
        from ..checkpoint.checkpoint import open_checkpoint

        check_options(run, output, to=to, conversion=conversion, dtype=dtype, lora=lora, merging=merging)
        model = open_checkpoint(base, revision=revision, progress=show.bars)
        merged = merge(model, lora, merging, dtype=dtype, to=to, conversion=conversion, progress=show.bars)
        made = converted(merged, to, conversion, progress=show.bars)
        carry_out(console, made, output, run)


@grouped
def convert_lora(
    *,
    lora: Annotated[str, typer.Argument(metavar="LORA", help=f"Adapter to convert: {SRC}.", rich_help_panel=INPUT)],
    output: Output,
    to: Annotated[str, option(CONVERSION, "--to", choices=ADAPTER_LAYOUTS, help="Layout whose names it gets.")] = "llava-hf",
    base: Annotated[
        str | None,
        option(
            INPUT,
            "--base",
            "--model-base",
            metavar="SRC",
            help="Model that it belongs to, in either layout: it tells what the names alone do not.",
        ),
    ] = None,
    non_lora: NonLora = None,
    adapter: AdapterName = None,
    revision: Annotated[str | None, revision_of("an adapter")] = None,
    run: Run,
    show: Show,
) -> None:
    """Give a LoRA adapter the names of the other layout, unmerged, as PEFT, vLLM and SGLang load it."""
    with session(show, writes=True) as console:
        from ..checkpoint.checkpoint import open_checkpoint
        from ..transforms.adapter import open_adapter
        from ..transforms.convert_lora import convert_lora as transform

        check_options(run, output)
        one_of("layout", to, ADAPTER_LAYOUTS)
        opened = open_adapter(lora, revision=revision, non_lora=non_lora, adapter=adapter, progress=show.bars)
        model = open_checkpoint(base, progress=show.bars) if base else None
        carry_out(console, transform(opened, to, base=model), output, run)


@grouped
def convert(
    *,
    source: Annotated[
        str, typer.Argument(metavar="SRC", help=f"LLaVA to convert, or LLaMA with --delta or --lora: {SRC}.", rich_help_panel=INPUT)
    ],
    output: Output,
    to: Annotated[str, option(CONVERSION, "--to", choices=LAYOUTS, help="Layout to write.")] = "llava-hf",
    delta: Annotated[str | None, option(INPUT, "--delta", metavar="SRC", help="Add this delta to SRC first, in the same pass.")] = None,
    accept_base: AcceptBase = False,
    lora: AlsoLora = None,
    merging: Merging,
    conversion: Conversion,
    dtype: Dtype = None,
    revision: Annotated[str | None, revision_of("SRC")] = None,
    run: Run,
    show: Show,
) -> None:
    """Convert LLaVA's original layout to llava-hf and back, or to llama.cpp's GGUF; with a delta and adapters in the same pass."""
    with session(show, writes=True) as console:
        from ..checkpoint.checkpoint import open_checkpoint

        check_options(run, output, to=to, conversion=conversion, dtype=dtype, lora=lora, merging=merging)
        if accept_base and not delta:
            raise UsageError("`--accept-base` belongs to a delta", hint="add `--delta DELTA`, or leave it out")
        model = open_checkpoint(source, revision=revision, progress=show.bars)
        if delta:
            from ..transforms.delta import apply_delta as add

            model = add(model, open_checkpoint(delta, progress=show.bars), accept_base=accept_base)
        model = merge(model, lora or [], merging, to=to, conversion=conversion, progress=show.bars)
        made = converted(model, to, conversion, dtype=dtype, progress=show.bars)
        carry_out(console, made, output, run)
