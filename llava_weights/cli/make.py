"""The commands that write a checkpoint or an adapter: apply-delta, make-delta, merge-lora, convert-lora, convert."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import UsageError, one_of
from .options import (
    AcceptBase,
    AdapterName,
    ArithmeticRule,
    Base,
    BaseQuantized,
    Conversion,
    Dtype,
    Lora,
    NonLora,
    Output,
    Run,
    Scale,
    Show,
    To,
    grouped,
)
from .session import carry_out, check_given, check_options, converted, merge, note, session


@grouped
def apply_delta(
    *,
    base: Base,
    delta: Annotated[str, typer.Option("--delta", "--delta-path", help="The delta: folder, file, or owner/name[@rev].")],
    output: Output,
    accept_base: AcceptBase = False,
    check_inputs: Annotated[bool, typer.Option("--check-inputs", help="Hash the inputs first and look them up.")] = False,
    lora: Annotated[list[str] | None, typer.Option("--lora", help="Merge an adapter into the result, in the same pass. Repeats.")] = None,
    arithmetic: ArithmeticRule = None,
    to: To = None,
    conversion: Conversion,
    dtype: Dtype = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a delta on the Hub.")] = None,
    run: Run,
    show: Show,
    low_cpu_mem: Annotated[bool, typer.Option("--low-cpu-mem", hidden=True)] = False,
) -> None:
    """Add a delta to the original LLaMA weights: base + delta, every bit as the original script."""
    with session(show, writes=True) as console:
        from ..checkpoint.checkpoint import open_checkpoint
        from ..transforms.delta import apply_delta as transform

        check_options(run, output, to=to, conversion=conversion, dtype=dtype, lora=lora, arithmetic=arithmetic)
        if low_cpu_mem:
            note(console, "`--low-cpu-mem` changes nothing: memory is always bounded")
        llama, difference = open_checkpoint(base, progress=show.bars), open_checkpoint(delta, revision=revision, progress=show.bars)
        if check_inputs:
            check_given(console, (("base", llama), ("delta", difference)))
        merged = transform(llama, difference, accept_base=accept_base)
        merged = merge(merged, lora or [], arithmetic, dtype=None if to else dtype, to=to, conversion=conversion, progress=show.bars)
        made = converted(merged, to, conversion, dtype=dtype, progress=show.bars)
        carry_out(console, made, output, run)


@grouped
def make_delta(
    *,
    base: Base,
    tuned: Annotated[str, typer.Option("--tuned", help="The fine-tuned model: folder, file, or owner/name[@rev].")],
    output: Annotated[str, typer.Option("-o", "--output", "--delta", "--delta-path", help="Folder to write the delta to.")],
    codec: Annotated[
        str, typer.Option("--codec", metavar="arithmetic|integer", help="fp16 difference as published in 2023, or lossless and smaller.")
    ] = "arithmetic",
    run: Run,
    show: Show,
) -> None:
    """Subtract the base from a fine-tuned model: the inverse of apply-delta, for publishers."""
    with session(show, writes=True) as console:
        from ..checkpoint.checkpoint import open_checkpoint
        from ..transforms.delta import CODECS
        from ..transforms.delta import make_delta as transform

        one_of("codec", codec, CODECS)
        check_options(run, output)
        difference = transform(open_checkpoint(base, progress=show.bars), open_checkpoint(tuned, progress=show.bars), codec=codec)
        carry_out(console, difference, output, run)


@grouped
def merge_lora(
    *,
    base: Annotated[str, typer.Option("--base", "--model-base", help="The model to merge into: folder, file, or owner/name[@rev].")],
    lora: Lora,
    output: Annotated[str, typer.Option("-o", "--output", "--save-model-path", help="Folder to write; it appears when it is complete.")],
    scale: Scale = None,
    arithmetic: ArithmeticRule = None,
    base_quantized: BaseQuantized = None,
    dtype: Dtype = None,
    to: To = None,
    conversion: Conversion,
    non_lora: NonLora = None,
    adapter: AdapterName = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a base on the Hub.")] = None,
    run: Run,
    show: Show,
) -> None:
    """Merge LoRA adapters (PEFT's or LLaVA's) into a model, every bit as PEFT would."""
    with session(show, writes=True) as console:
        from ..checkpoint.checkpoint import open_checkpoint

        merging: dict[str, Any] = {
            "arithmetic": arithmetic,
            "scale": scale,
            "base_quantized": base_quantized,
            "non_lora": non_lora,
            "adapter": adapter,
        }
        check_options(run, output, to=to, conversion=conversion, dtype=dtype, lora=lora, **merging)
        model = open_checkpoint(base, revision=revision, progress=show.bars)
        merged = merge(model, lora, dtype=dtype, to=to, conversion=conversion, progress=show.bars, **merging)
        made = converted(merged, to, conversion, progress=show.bars)
        carry_out(console, made, output, run)


@grouped
def convert_lora(
    *,
    lora: Annotated[str, typer.Argument(metavar="LORA", help="Adapter to convert: folder, file, or owner/name[@rev].")],
    output: Output,
    to: Annotated[str, typer.Option("--to", metavar="llava-hf|llava", help="Layout whose names it gets.")] = "llava-hf",
    base: Annotated[
        str | None, typer.Option("--base", "--model-base", help="Model that it belongs to, in either layout: what the names do not tell.")
    ] = None,
    non_lora: NonLora = None,
    adapter: AdapterName = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of an adapter on the Hub.")] = None,
    run: Run,
    show: Show,
) -> None:
    """Give a LoRA adapter the names of the other layout, unmerged, as PEFT, vLLM and SGLang load it."""
    with session(show, writes=True) as console:
        from ..checkpoint.checkpoint import open_checkpoint
        from ..transforms.adapter import open_adapter
        from ..transforms.convert import ADAPTER_LAYOUTS
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
        str, typer.Argument(metavar="SRC", help="LLaVA to convert, or LLaMA with --delta or --lora: folder, file, owner/name[@rev].")
    ],
    output: Output,
    to: Annotated[str, typer.Option("--to", metavar="llava-hf|llava|gguf", help="Conversion to write.")] = "llava-hf",
    delta: Annotated[str | None, typer.Option("--delta", help="Apply this delta onto SRC first, in the same pass.")] = None,
    accept_base: AcceptBase = False,
    lora: Annotated[list[str] | None, typer.Option("--lora", help="Merge this adapter first, in the same pass. Repeats.")] = None,
    arithmetic: ArithmeticRule = None,
    scale: Scale = None,
    base_quantized: BaseQuantized = None,
    non_lora: NonLora = None,
    adapter: AdapterName = None,
    conversion: Conversion,
    dtype: Dtype = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of SRC on the Hub.")] = None,
    run: Run,
    show: Show,
) -> None:
    """Convert LLaVA's original layout to llava-hf and back, or to llama.cpp's GGUF; with a delta and adapters in the same pass."""
    with session(show, writes=True) as console:
        from ..checkpoint.checkpoint import open_checkpoint

        merging: dict[str, Any] = {
            "arithmetic": arithmetic,
            "scale": scale,
            "base_quantized": base_quantized,
            "non_lora": non_lora,
            "adapter": adapter,
        }
        check_options(run, output, to=to, conversion=conversion, dtype=dtype, lora=lora, **merging)
        if accept_base and not delta:
            raise UsageError("`--accept-base` belongs to a delta", hint="add `--delta DELTA`, or leave it out")
        model = open_checkpoint(source, revision=revision, progress=show.bars)
        if delta:
            from ..transforms.delta import apply_delta as add

            model = add(model, open_checkpoint(delta, progress=show.bars), accept_base=accept_base)
        model = merge(model, lora or [], to=to, conversion=conversion, progress=show.bars, **merging)
        made = converted(model, to, conversion, dtype=dtype, progress=show.bars)
        carry_out(console, made, output, run)
