"""The commands that prove: verify, checksum, diff, smoke."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .common import session
from .options import Jobs, Show, VisionTower, grouped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..console import Console
    from ..findings import Finding

PROMPT = "the meaning of life is"  # of LLaVA-13b-delta-v0's model card, which shows the babble of an unapplied delta as its answer

Checked = Annotated[str, typer.Argument(metavar="PATH", help="Folder, file, owner/name[@rev] or hf://owner/name.")]
Junit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write the findings as a JUnit XML report.")]
Summary = Annotated[
    Path | None,
    typer.Option("--summary", metavar="FILE", envvar="GITHUB_STEP_SUMMARY", help="Append the findings to this file as Markdown."),
]


@grouped
def verify(
    *,
    path: Checked,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Manifest, checkpoint, checksum list (SHA256SUMS, md5, checklist.chk), or owner/name[@rev]."),
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte: file and tensor digests, NaN and inf, CRCs.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Compare with the checksums that the authors published.")] = False,
    base: Annotated[str | None, typer.Option("--base", help="What PATH was made from: make every tensor again and compare.")] = None,
    delta: Annotated[
        str | None, typer.Option("--delta", help="The delta that was applied; with --published, it tells the author's files.")
    ] = None,
    lora: Annotated[list[str] | None, typer.Option("--lora", help="An adapter that was merged. Repeats.")] = None,
    vision_tower: VisionTower = None,
    strict: Annotated[bool, typer.Option("--strict", help="A warning is a failure: exit 4.")] = False,
    allow: Annotated[
        list[str] | None, typer.Option("--allow", metavar="RULE", help="Takes a rule, as its warnings name it, out of --strict. Repeats.")
    ] = None,
    jobs: Jobs = 2,
    junit: Junit = None,
    summary: Summary = None,
    show: Show,
) -> None:
    """Prove that a checkpoint is whole and right: structure, health, digests, and what it is compared with. Exit 4 if it is not."""
    with session(show) as console:
        from ..verification import verify as check

        if published and against:
            raise UsageError("`--against` and `--published` name two things to compare with", hint="run `verify` once for each")
        sources: Any = {"base": base, "delta": delta, "lora": lora or [], "vision_tower": vision_tower}
        other = "published" if published else against
        result = check(path, against=other, deep=deep, strict=strict, allow=allow or [], jobs=jobs, on_event=console.on_event, **sources)
        _prove(console, result.name, result.findings, result.exit_code, result.facts, junit, summary)


@grouped
def checksum(
    *,
    path: Checked,
    force: Annotated[bool, typer.Option("--force", help="Replace checksums that say something else.")] = False,
    jobs: Jobs = 2,
    show: Show,
) -> None:
    """Write SHA256SUMS and the manifest for any checkpoint."""
    with session(show, writes=True) as console:
        from ..verification import checksum as write

        written = [str(file) for file in write(path, force=force, jobs=jobs, on_event=console.on_event)]
        console.document("\n".join(f"Wrote {file}" for file in written) or "Everything is recorded already", {"written": written})


@grouped
def diff(
    *,
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint: folder, file, owner/name[@rev].")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another, in any layout and container.")],
    tolerance: Annotated[float, typer.Option("--tolerance", min=0.0, help="Largest difference of two values that count as equal.")] = 0.0,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Heat map of the relative change, as .svg or .png.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Lines of differing tensors to show.")] = 20,
    jobs: Jobs = 2,
    show: Show,
) -> None:
    """Compare two checkpoints tensor by tensor, across layouts and containers. Exit 0 equal, 4 different."""
    with session(show) as console:
        from ..checkpoint import open_checkpoint
        from ..comparison import diff as compare
        from ..comparison import document, table
        from ..plot import check_plot, write_plot

        if plot:
            check_plot(plot)
        found = compare(open_checkpoint(a), open_checkpoint(b), tolerance=tolerance, jobs=jobs, on_event=console.on_event)
        if plot:
            write_plot(found, plot)
        console.document("\n".join(table(found, limit=limit)), document(found))
        raise typer.Exit(0 if found.equal else 4)


@grouped
def smoke(
    *,
    path: Checked,
    reference: Annotated[Path | None, typer.Option("--reference", metavar="FILE", help="Compare with logits recorded by --record.")] = None,
    original: Annotated[str | None, typer.Option("--original", metavar="DIR", help="Compare with this unconverted checkpoint.")] = None,
    record: Annotated[
        Path | None, typer.Option("--record", metavar="FILE", help="Run the built-in probes and keep what comes of them.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Continue this text, and rate the model's English.")
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", metavar="FILE", help="With --prompt: an image for it.")] = None,
    vision_tower: VisionTower = None,
    device: Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Where to compute.")] = "cpu",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="F32|BF16|F16", help="Dtype of the arithmetic; only F32 can tell `same`.")
    ] = "F32",
    resident: Annotated[
        bool, typer.Option("--resident", help="Keep the whole model on the device; else it streams, layer by layer.")
    ] = False,
    atol: Annotated[
        float | None, typer.Option("--atol", min=0.0, help="Largest difference of two logits, in place of the usual limits.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="With --record: replace FILE.")] = False,
    junit: Junit = None,
    summary: Summary = None,
    show: Show,
) -> None:
    """Run the model: against recorded logits, against the unconverted checkpoint, or on a prompt. Exit 4 if it computes something else."""
    with session(show) as console:
        from ..buffers import to_dtype
        from ..checkpoint import open_checkpoint

        if sum(choice is not None for choice in (reference, original, record)) > 1:
            raise UsageError("`--reference`, `--original` and `--record` are three different runs", hint="pass one of them")
        if image and prompt is None:
            raise UsageError("`--image` belongs to a prompt", hint='pass `--prompt "<image> What is this?"` too')
        model = open_checkpoint(path, whole=True)
        how: Any = {"tower": open_checkpoint(vision_tower) if vision_tower else None, "device": device, "dtype": to_dtype(dtype)}
        how["resident"] = resident
        if record:
            from ..reference_file import record as keep

            kept = keep(model, record, force=force, on_event=console.on_event, **how)
            console.document(f"Wrote {record}: {len(kept.probes)} probes", {"written": str(record)})
        elif reference or original:
            from ..smoke import compare, compare_original, table

            more: Any = {"atol": atol, "on_event": console.on_event, **how}
            theirs = open_checkpoint(original, whole=True) if original else None
            done = compare_original(model, theirs, **more) if theirs else compare(model, reference or Path(), **more)
            facts = {
                "against": done.against,
                "result": done.verdict,
                "first_wrong": done.first_wrong,
                "rows": [asdict(r) for r in done.rows],
            }
            _prove(console, done.name, done.findings, done.exit_code, facts, junit, summary, table(done))
        else:
            from ..findings import exit_code
            from ..sample import sample

            text = sample(model, prompt or PROMPT, image=image, **how)
            facts = asdict(text)
            _prove(console, model.origin.name, [text.finding], exit_code([text.finding]), facts, junit, summary, [text.prompt + text.text])


def _prove(
    console: Console,
    name: str,
    findings: Sequence[Finding],
    code: int,
    facts: Mapping[str, Any],
    junit: Path | None,
    summary: Path | None,
    before: Sequence[str] = (),
) -> None:
    """Show the findings, write the reports that were asked for, and end with the exit code."""
    from .. import proof

    shown = proof.lines(name, findings, code, verbose=console.verbose)
    console.document("\n".join([*before, *shown]), proof.document(name, findings, code, facts))
    if junit:
        junit.write_bytes(proof.junit(name, findings))
    if summary:
        with summary.open("a", encoding="utf-8") as file:
            file.write(proof.markdown(name, findings, code))
    raise typer.Exit(code)
