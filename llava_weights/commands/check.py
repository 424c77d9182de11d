"""The commands that prove: verify, checksum, diff, smoke."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .common import Jobs, Json, Quiet, Verbose, session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..console import Console
    from ..findings import Finding

Checked = Annotated[str, typer.Argument(metavar="PATH", help="Folder, file, owner/name[@rev] or hf://owner/name.")]
Junit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write the findings as a JUnit XML report.")]
Summary = Annotated[
    Path | None,
    typer.Option("--summary", metavar="FILE", envvar="GITHUB_STEP_SUMMARY", help="Append the findings to this file as Markdown."),
]


def verify(
    path: Checked,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Manifest, checkpoint, checksum list (SHA256SUMS, md5, checklist.chk), or owner/name[@rev]."),
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte: file and tensor digests, NaN and inf, CRCs.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Compare with the checksums that the authors published.")] = False,
    delta: Annotated[
        str | None, typer.Option("--delta", help="With --published: the delta, whose files the author's merge follows.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="With --published: the base that the delta was applied to.")] = None,
    jobs: Jobs = 2,
    junit: Junit = None,
    summary: Summary = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Prove that a checkpoint is whole and right: structure, health, digests, and what it is compared with. Exit 4 if it is not."""
    with session(json, quiet, verbose) as console:
        from ..checkpoint import open_checkpoint
        from ..verify import verify as check

        if (delta or base) and not (published and delta):
            raise UsageError("`--delta` and `--base` are for `--published`", hint="pass `--published --delta DELTA [--base BASE]`")
        if published and against:
            raise UsageError("`--against` and `--published` name two things to compare with", hint="run `verify` once for each")
        other = "published" if published and not delta else against
        result = check(path, against=other, deep=deep, jobs=jobs, on_event=console.on_event)
        findings = result.findings
        if delta:
            from ..predict import check_published

            given = open_checkpoint(base) if base else None
            findings += check_published(open_checkpoint(path), open_checkpoint(delta), given, on_event=console.on_event)
        _prove(console, result.name, findings, max(result.exit_code, _code(findings)), result.facts, junit, summary)


def checksum(
    path: Checked,
    force: Annotated[bool, typer.Option("--force", help="Replace checksums that say something else.")] = False,
    jobs: Jobs = 2,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write SHA256SUMS and the manifest for any checkpoint."""
    with session(json, quiet, verbose, writes=True) as console:
        from ..verify import checksum as write

        written = [str(file) for file in write(path, force=force, jobs=jobs, on_event=console.on_event)]
        console.document("\n".join(f"Wrote {file}" for file in written) or "Everything is recorded already", {"written": written})


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint: folder, file, owner/name[@rev].")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another, in any layout and container.")],
    tolerance: Annotated[float, typer.Option("--tolerance", min=0.0, help="Largest difference of two values that count as equal.")] = 0.0,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Heat map of the relative change, as .svg or .png.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Lines of differing tensors to show.")] = 20,
    jobs: Jobs = 2,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare two checkpoints tensor by tensor, across layouts and containers. Exit 0 equal, 4 different."""
    with session(json, quiet, verbose) as console:
        from ..checkpoint import open_checkpoint
        from ..diff import diff as compare
        from ..diff import document, table
        from ..plot import check_plot, write_plot

        if plot:
            check_plot(plot)
        found = compare(open_checkpoint(a), open_checkpoint(b), tolerance=tolerance, jobs=jobs, on_event=console.on_event)
        if plot:
            write_plot(found, plot)
        console.document("\n".join(table(found, limit=limit)), document(found))
        raise typer.Exit(0 if found.equal else 4)


def _code(findings: Sequence[Finding]) -> int:
    return 4 if any(finding.verdict == "failed" for finding in findings) else 0


def _prove(
    console: Console,
    name: str,
    findings: Sequence[Finding],
    code: int,
    facts: Mapping[str, Any],
    junit: Path | None,
    summary: Path | None,
) -> None:
    """Show the findings, write the reports that were asked for, and end with the exit code."""
    from .. import proof

    console.document("\n".join(proof.lines(name, findings, code)), proof.document(name, findings, code, facts))
    if junit:
        junit.write_bytes(proof.junit(name, findings))
    if summary:
        with summary.open("a", encoding="utf-8") as file:
            file.write(proof.markdown(name, findings, code))
    raise typer.Exit(code)
