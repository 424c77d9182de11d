"""A plan and its outcome as rows for people and documents for programs."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import __version__
from .checkpoint import small_bytes
from .destination import is_address
from .manifest import MANIFEST, SUMS
from .plan import LARGEST_SMALL_FILE, Plan, describe
from .portions import PortionReport
from .retention import retention
from .wording import duration, shards, size
from .workspace import reading
from .write import Report

LITTLE = 0.5  # of an update: below, say so. An update of 1e-5 on weights of 0.02 keeps 0.61 in fp16, 0.10 in bf16 (facts: peers 7.4)


def explain(plan: Plan, output: str | Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """What will be read, changed, repaired and written, and what it takes."""
    rows: list[tuple[str, str]] = []
    for step in plan.history:
        for role, origin in step.inputs:
            read = sum(file.size for file in origin.files)
            count = "1 file" if len(origin.files) == 1 else f"{len(origin.files)} files"
            rows.append(
                (role, f"{origin.name}{'@' + origin.revision[:7] if origin.revision else ''}  {count} ({origin.container}), {size(read)}")
            )
        rows += [("kind", str(step.checks["kind"]))] if step.checks.get("kind") else []
        rows += list(step.summary.items())
        rows += [("fix", repair) for repair in step.repairs]
        rows += [("note", note) for note in step.notes]
        rows += [("warning", warning) for warning in step.warnings]
    rows.append(("output", f"{output}  {shards(len(plan.shards))}, {size(plan.nbytes)}{_free(output)}"))
    rows.append(("memory", f"at most {size(plan.memory)} in all, {plan.settings.jobs} jobs"))
    return rows, _document(plan, output)


def _free(output: str | Path) -> str:
    """How much space there is; nothing where the system does not say, which `preflight` then tells."""
    try:
        here = Path(output).absolute()  # of an address exists the current folder, where the work folder will be
        place = next(folder for folder in (here, *here.parents) if folder.exists())
        return f" ({size(shutil.disk_usage(place).free)} free)"
    except OSError:
        return ""


def _document(plan: Plan, output: str | Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "fingerprint": plan.fingerprint,
        "nbytes": plan.nbytes,
        "read": sum({file: file.size for step in plan.history for _, origin in step.inputs for file in origin.files}.values()),
        "memory": plan.memory,
        "jobs": plan.settings.jobs,
        "shards": [{"name": shard.name, "nbytes": shard.nbytes, "tensors": len(shard.tensors)} for shard in plan.shards],
        "steps": [describe(step) for step in plan.history],
        "options": dict(plan.options),
        "version": __version__,
        "files": {name: hashlib.sha256(small_bytes(name, data, LARGEST_SMALL_FILE)).hexdigest() for name, data in plan.files.items()},
        "changed": _changed(plan),
    }


def _changed(plan: Plan) -> int | None:
    """When an input last changed, in ns since 1970, its moves and copies counted (ctime); None where an input elsewhere can't tell.

    A revision on the Hub never changes.
    """
    files = [file for step in plan.history for _, origin in step.inputs if origin.revision is None for file in origin.files]
    if any(file.remote for file in files):
        return None
    newest = 0
    for file in files:
        with reading(file):
            newest = max(newest, file.mtime_ns, os.stat(file.path).st_ctime_ns)
    return newest


def outcome(report: Report, output: str, seconds: float) -> tuple[list[str], dict[str, Any]]:
    """The sentences and the document of a finished run."""
    peak = peak_memory()
    resumed = f", {report.resumed} of them from an earlier run" if report.resumed else ""
    speed = f"{size(round(report.nbytes / seconds))}/s, " if seconds and not report.resumed else ""
    lines = [
        f"Wrote {output}: {shards(report.shards)}{resumed}, {size(report.nbytes)} in {duration(seconds)} ({speed}peak memory {size(peak)})",
        f"  checksums in {output.rstrip('/')}/{SUMS}, recipe in {MANIFEST}, model card in README.md",
        *_loss(report.tallies),
        *_retained(report.tallies),
        f"Check: {'download it, then ' if is_address(output) else f'cd {output} && '}sha256sum -c {SUMS}",
    ]
    document = {
        "output": output,
        "shards": report.shards,
        "resumed": report.resumed,
        "nbytes": report.nbytes,
        "root": report.root,
        "tallies": dict(report.tallies),
        "seconds": round(seconds, 3),
        "peak_memory": peak,
    }
    return lines, document


def portion_outcome(report: PortionReport, seconds: float) -> tuple[list[str], dict[str, Any]]:
    """What a portion did."""
    kept = f", {report.resumed} of them from an earlier run" if report.resumed else ""
    lines = [
        f"Portion {report.portion} is finished: {shards(report.shards)}{kept}, {size(report.nbytes)} in {duration(seconds)}",
        "  when all are, the same command with `--finish` instead of `--shards` publishes the output",
    ]
    document = {"portion": str(report.portion), "shards": report.shards, "resumed": report.resumed, "nbytes": report.nbytes}
    return lines, document


def _retained(tallies: Mapping[str, int]) -> list[str]:
    """How much of the adapters' updates survived the rounding to the output's dtype, in all and by kind of module."""
    if (total := retention(tallies)) is None:
        return []
    kinds = sorted(key.removesuffix(".update_sq") for key in tallies if key.endswith(".update_sq"))
    parts = {kind: found for kind in kinds if (found := retention(tallies, kind))}
    listed = ", ".join(f"{kind} {found.kept:.1%}" for kind, found in parts.items())
    moved = f"{total.moved / total.updated:.1%} of the values moved"
    lines = [f"  {total.kept:.1%} of the update survived rounding, {moved} ({listed})"]
    if total.kept < LITTLE or total.moved < total.updated * LITTLE:
        lines.append("  warning: merged, the model will be more like its base than it should; `--dtype F32` (or F16 for BF16) keeps more")
    return lines


def peak_memory() -> int:
    """Peak resident bytes of this process. Not `ru_maxrss` where there is better: a child inherits it from who started it."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes


def _loss(tallies: Mapping[str, int]) -> list[str]:
    if not (elements := tallies.get("elements")):
        return []
    lost = tallies.get("lost", 0)
    return [
        f"  adding the base again gives back all but {lost:,} of {elements:,} values ({lost / elements:.4%}), which are one rounding off"
    ]
