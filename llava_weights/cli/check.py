"""The commands that check: verify, checksum, repair, diff, smoke."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .options import CHECK, INPUT, OUTPUT, RUN, SRC, AcceptTower, Jobs, Show, VisionTowerOption, grouped, option
from .session import session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..findings import Finding
    from ..smoke.logits import Smoke
    from .console import Console


PROMPT = "the meaning of life is"  # of LLaVA-13b-delta-v0's model card, which shows how an unapplied delta babbles on

Checked = Annotated[str, typer.Argument(metavar="PATH", help="Folder, file, owner/name[@rev] or hf://owner/name.", rich_help_panel=INPUT)]
Junit = Annotated[Path | None, option(OUTPUT, "--junit", metavar="FILE", help="Write the findings as a JUnit XML report.")]
Summary = Annotated[
    Path | None,
    option(OUTPUT, "--summary", metavar="FILE", help="Append the findings to this file as Markdown, by default to $GITHUB_STEP_SUMMARY."),
]
Replace = Annotated[bool, option(OUTPUT, "--force", help="Replace the file of --junit.")]


def _complete_rule(incomplete: str) -> list[str]:
    from ..checks.verify import rules

    return [name for name in sorted(rules()) if name.startswith(incomplete)]


@grouped
def verify(
    *,
    path: Checked,
    against: Annotated[
        str | None,
        option(
            CHECK,
            "--against",
            metavar="OTHER",
            help="Compare with a manifest, checkpoint, checksum list (SHA256SUMS, md5, checklist.chk), or owner/name[@rev].",
        ),
    ] = None,
    deep: Annotated[bool, option(CHECK, "--deep", help="Read every byte: file and tensor digests, NaN and inf, CRCs.")] = False,
    part: Annotated[
        str | None, option(CHECK, "--part", metavar="I/N", help="With --deep: read the I-th of N equal shares of the bytes, as 3/7.")
    ] = None,
    published: Annotated[bool, option(CHECK, "--published", help="Compare with the checksums that the authors published.")] = False,
    base: Annotated[
        str | None, option(CHECK, "--base", metavar="SRC", help="What PATH was made from: make every tensor again and compare.")
    ] = None,
    delta: Annotated[
        str | None,
        option(
            CHECK, "--delta", metavar="SRC", help="The delta that was applied; with --published, the author's files are predicted from it."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None, option(CHECK, "--lora", metavar="SRC", help="An adapter that was merged. May be given several times.")
    ] = None,
    vision_tower: VisionTowerOption = None,
    accept_tower: AcceptTower = False,
    strict: Annotated[bool, option(CHECK, "--strict", help="A warning is a failure: exit 4.")] = False,
    allow: Annotated[
        list[str] | None,
        option(
            CHECK,
            "--allow",
            metavar="RULE",
            autocompletion=_complete_rule,
            help="A rule that --strict leaves a warning, by the name in brackets behind it. May be given several times.",
        ),
    ] = None,
    jobs: Jobs = 2,
    junit: Junit = None,
    summary: Summary = None,
    force: Replace = False,
    show: Show,
) -> None:
    """Prove that a checkpoint is whole and right: structure, health, digests, and what it is compared with. Exit 4 if it is not."""
    with session(show) as console:
        from ..checks.verify import verify as check

        if published and against:
            raise UsageError("`--against` and `--published` name two things to compare with", hint="run `verify` once for each")
        if published and delta and (lora or vision_tower):
            raise UsageError("an author's files are predicted from the delta alone", hint="leave `--lora` and `--vision-tower` out")
        _check_accept(accept_tower, vision_tower)
        _check_reports(junit, summary, force, [path, against, base, delta, vision_tower, *(lora or [])])
        sources: Any = {"base": base, "delta": delta, "lora": lora or [], "vision_tower": vision_tower, "accept_tower": accept_tower}
        other = "published" if published else against
        result = check(
            path, against=other, deep=deep, part=part, strict=strict, allow=allow or [], jobs=jobs, on_event=console.on_event, **sources
        )
        _report(console, result.name, result.findings, result.exit_code, result.facts, junit, summary, force=force)


@grouped
def checksum(
    *,
    path: Checked,
    force: Annotated[bool, option(OUTPUT, "--force", help="Replace checksums that say something else.")] = False,
    jobs: Jobs = 2,
    show: Show,
) -> None:
    """Write SHA256SUMS and the manifest for any checkpoint."""
    with session(show, writes=True) as console:
        from ..checks.verify import checksum as write

        written = [str(file) for file in write(path, force=force, jobs=jobs, on_event=console.on_event)]
        console.document([f"Wrote {file}" for file in written] or ["Everything is recorded already"], {"written": written})


@grouped
def repair(
    *,
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Folder or weight file of this machine, with a manifest or SHA256SUMS.", rich_help_panel=INPUT),
    ],
    source: Annotated[str, option(INPUT, "--from", metavar="OTHER", help="Another copy: folder, file, owner/name[@rev] or an address.")],
    dry_run: Annotated[
        bool, option(OUTPUT, "-n", "--dry-run", help="Say what is damaged and what would be fetched; write nothing.")
    ] = False,
    jobs: Jobs = 2,
    show: Show,
) -> None:
    """Mend a checkpoint in place: what is damaged, cut short or missing by its checksums comes from another copy, only that is fetched.

    Without checksums of its own, those that the Hub states for OTHER count. Exit 3 if something can't be mended; it stays as it was.
    """
    with session(show) as console:
        from ..checks.repair import repair as mend

        found = mend(path, source, dry_run=dry_run, jobs=jobs, on_event=console.on_event)
        console.document(found.lines(), found.document())
        raise typer.Exit(found.exit_code)


@grouped
def diff(
    *,
    a: Annotated[str, typer.Argument(metavar="A", help=f"A checkpoint: {SRC}.", rich_help_panel=INPUT)],
    b: Annotated[str, typer.Argument(metavar="B", help="Another, in any layout and container.", rich_help_panel=INPUT)],
    tolerance: Annotated[
        float, option(CHECK, "--tolerance", metavar="X", min=0.0, help="Largest difference of two values that count as equal.")
    ] = 0.0,
    plot: Annotated[Path | None, option(OUTPUT, "--plot", metavar="FILE", help="Heat map of the relative change, as .svg or .png.")] = None,
    force: Annotated[bool, option(OUTPUT, "--force", help="With --plot: replace FILE.")] = False,
    limit: Annotated[
        int | None,
        option(OUTPUT, "--limit", metavar="N", min=1, show_default="20", help="Lines of differing tensors to show; --json has all."),
    ] = None,
    jobs: Jobs = 2,
    show: Show,
) -> None:
    """Compare two checkpoints tensor by tensor, across layouts and containers. Exit 0 equal, 4 different."""
    with session(show) as console:
        from ..checkpoint.checkpoint import open_checkpoint
        from ..checks.diff import diff as compare
        from ..checks.diff import document, table
        from .plot import check_plot, write_plot

        if limit is not None and show.json:
            raise UsageError("`--limit` cuts the lines for people, `--json` has every tensor", hint="pass one of them")
        if plot:
            check_plot(plot, force=force, inputs=[a, b])
        elif force:
            raise UsageError("`--force` belongs to `--plot`", hint="pass both")
        found = compare(
            open_checkpoint(a, progress=show.bars),
            open_checkpoint(b, progress=show.bars),
            tolerance=tolerance,
            jobs=jobs,
            on_event=console.on_event,
        )
        if plot:
            write_plot(found, plot, force=force)
        console.document(table(found, limit=limit or 20), document(found))
        raise typer.Exit(0 if found.equal else 4)


@grouped
def smoke(
    *,
    path: Checked,
    reference: Annotated[
        Path | None, option(CHECK, "--reference", metavar="FILE", help="Compare with logits recorded by --record.")
    ] = None,
    original: Annotated[str | None, option(CHECK, "--original", metavar="SRC", help="Compare with this unconverted checkpoint.")] = None,
    record: Annotated[
        Path | None, option(OUTPUT, "--record", metavar="FILE", help="Run the built-in probes and save their logits.")
    ] = None,
    prompt: Annotated[
        str | None, option(RUN, "--prompt", metavar="TEXT", help="Continue this text, and print the perplexity of plain English.")
    ] = None,
    chat: Annotated[bool, option(RUN, "--chat", help="With --prompt: put the turns around it that the model was trained with.")] = False,
    image: Annotated[Path | None, option(RUN, "--image", metavar="FILE", help="With --prompt: an image for it.")] = None,
    vision_tower: VisionTowerOption = None,
    device: Annotated[str, option(RUN, "--device", choices=("cpu", "cuda"), metavar="cpu|cuda|cuda:N", help="Where to compute.")] = "cpu",
    dtype: Annotated[
        str, option(RUN, "--dtype", choices=("F32", "BF16", "F16"), help="Dtype of the arithmetic; only F32 can tell `same`.")
    ] = "F32",
    resident: Annotated[
        bool, option(RUN, "--resident", help="Keep the whole model on the device; else it streams, layer by layer.")
    ] = False,
    atol: Annotated[
        float | None, option(CHECK, "--atol", metavar="X", min=0.0, help="Largest difference of two logits, in place of the usual limits.")
    ] = None,
    quantize: Annotated[
        str | None,
        option(RUN, "--quantize", choices=("8bit", "4bit"), help="Run it as bitsandbytes quantises it; alone: against itself in float32."),
    ] = None,
    accept_tower: AcceptTower = False,
    force: Annotated[bool, option(OUTPUT, "--force", help="Replace the file of --record or --junit.")] = False,
    junit: Junit = None,
    summary: Summary = None,
    show: Show,
) -> None:
    """Run the model: against recorded logits, against the unconverted checkpoint, quantised against itself, or on a prompt.

    Exit 4 if it computes something else; on a prompt only for an unapplied delta: the rest is yours to judge.
    """
    with session(show) as console, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\b")  # for its developers
        from ..checkpoint.checkpoint import open_checkpoint
        from ..smoke.logits import check_numbers
        from ..smoke.quantised import to_bits

        bits = to_bits(quantize)
        runs = {"--reference": reference, "--original": original, "--record": record, "--prompt": prompt}
        more = {
            "--chat": chat or None,
            "--image": image,
            "--atol": atol,
            "--vision-tower": vision_tower,
            "--junit": junit,
            "--summary": summary,
            "--quantize": bits,
        }
        _check_run(runs, more)
        _check_accept(accept_tower, vision_tower)
        how: Any = check_numbers(device, dtype, atol)
        _check_reports(junit, summary, force, [path, original, vision_tower, reference], record)
        model = open_checkpoint(path, whole=True, progress=show.bars)
        tower = open_checkpoint(vision_tower, progress=show.bars) if vision_tower else None
        how |= {"tower": tower, "resident": resident, "accept_tower": accept_tower}
        limit = how.pop("atol")
        if record:
            from ..smoke.recording import record as keep

            kept = keep(model, record, force=force, on_event=console.on_event, **how)
            console.document([f"Wrote {record}: {len(kept.probes)} probes"], {"written": str(record)})
        elif reference or original or bits:
            from ..smoke.logits import compare, compare_original, compare_quantised, table

            how |= {"atol": limit, "on_event": console.on_event}
            if original:
                done = compare_original(model, open_checkpoint(original, whole=True, progress=show.bars), quantize=bits, **how)
            elif reference:
                done = compare(model, reference, quantize=bits, **how)
            elif bits:
                done = compare_quantised(model, bits, **how)
            rows = table(done) if console.verbose else []
            _report(console, done.name, done.findings, done.exit_code, _measured(done), junit, summary, rows, force=force)
        else:
            from ..smoke.generate import generate

            made = generate(model, PROMPT if prompt is None else prompt, image=image, chat=chat, on_event=console.on_event, **how)
            lines = (made.prompt + made.text).split("\n")
            _report(console, model.origin.name, made.findings, 4 if made.delta else 0, asdict(made), junit, summary, lines, force=force)


def _check_accept(accept_tower: bool, vision_tower: str | None) -> None:
    if accept_tower and not vision_tower:
        raise UsageError("`--accept-tower` belongs to `--vision-tower`", hint="pass both")


def _measured(done: Smoke) -> dict[str, Any]:
    rows = [asdict(row) for row in done.rows]
    return {"against": done.against, "result": done.verdict, "first_wrong": done.first_wrong, "rows": rows}


def _check_run(runs: Mapping[str, object], more: Mapping[str, object]) -> None:
    """Raise UsageError where flags of `runs` name two runs of the model, or one of `more` changes nothing of the one that is named."""
    given = [flag for flag, value in runs.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(f'`{flag}`' for flag in given)} are different runs", hint="pass one of them")
    mode = given[0] if given else "--quantize" if more["--quantize"] else "the usual prompt"
    compares = mode in ("--reference", "--original", "--quantize")
    idle = {
        "--quantize": not compares,
        "--chat": mode != "--prompt",
        "--image": mode != "--prompt",
        "--atol": not compares,
        "--junit": mode == "--record",
        "--summary": mode == "--record",
    }
    idle["--vision-tower"] = more["--image"] is None and not compares and mode != "--record"
    if names := [f"`{flag}`" for flag, value in more.items() if value is not None and idle[flag]]:
        raise UsageError(f"{', '.join(names)} changes nothing of a run with {mode}", hint="leave it out")


def _check_reports(
    junit: Path | None, summary: Path | None, force: bool, inputs: Sequence[str | Path | None], record: Path | None = None
) -> None:
    """Before the work: whether the reports can be written. Raises UsageError for two in one file, and as `check_file` does."""
    from ..storage.output_file import check_file

    appended = None if record else _appended(summary)
    if junit and appended and junit.absolute() == appended.absolute():
        raise UsageError("`--junit` and `--summary` are the same file", hint="give each its own")
    if force and not (junit or record):
        raise UsageError("`--force` replaces a file that is written, and none is", hint="leave it out")
    given = [source for source in inputs if source]
    for file in filter(None, (junit, record)):
        check_file(file, force=force, inputs=given)
    if appended:
        check_file(appended, append=True, inputs=given)


def _appended(summary: Path | None) -> Path | None:
    """The file of `--summary`, else the page of a job of GitHub Actions."""
    page = os.environ.get("GITHUB_STEP_SUMMARY")
    return summary or (Path(page) if page else None)


def _report(
    console: Console,
    name: str,
    findings: Sequence[Finding],
    code: int,
    facts: Mapping[str, Any],
    junit: Path | None,
    summary: Path | None,
    before: Sequence[str] = (),
    *,
    force: bool = False,
) -> None:
    """Show the findings, write the reports that were asked for, and end with the exit code."""
    from ..storage.output_file import write_report
    from . import report

    found = report.rows(findings, verbose=console.verbose)
    console.verdict(report.headline(name, findings, code), found, report.document(name, findings, code, facts), code, before)
    if junit:
        write_report(junit, report.junit(name, findings, console.seconds), force=force)
    if appended := _appended(summary):
        write_report(appended, report.markdown(name, findings, code).encode(), append=True)
    raise typer.Exit(code)
