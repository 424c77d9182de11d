"""Plans, outcomes and findings: rows and sentences for people, documents for programs, JUnit and Markdown for a CI."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .. import __version__
from ..checkpoint.checkpoint import describe, layout_of
from ..checkpoint.manifest import MANIFEST, SUMS
from ..checkpoint.small_files import small_bytes
from ..families.loading import DELTA_LOADING, GGUF_LOADING, LOADING, ORIGINAL_LOADING
from ..findings import LEVELS, Finding, Verdict, exit_code
from ..storage.reading import reading
from ..tensors.low_rank import retention
from ..text import duration, markdown_text, redact, shards, size, visible
from ..write.destinations import is_address
from ..write.execute import Report
from ..write.plan import LARGEST_SMALL_FILE, Plan
from ..write.portions import PortionReport

NOTHING = "there is nothing to verify against"
MARKS = {"ok": "ok", "warning": "warning", "failed": "FAILED", "unproved": "unproved", "unchecked": "unchecked", "note": "note"}
MEASURED = ("L5",)  # levels whose findings hold figures, also where all is right
FROM_BAD_TO_GOOD: tuple[Verdict, ...] = ("failed", "warning", "unproved", "unchecked", "note", "ok")


def headline(name: str, findings: Sequence[Finding], code: int) -> str:
    """The verdict on what is called `name`."""
    return f"{name}: {verdict(findings, code)}"


def rows(findings: Sequence[Finding], *, verbose: bool = False) -> list[tuple[str, str]]:
    """A line for each finding behind the mark of its verdict, the worst first. What to do stands once, below all findings that it remedies.
    Of several that are right only the counts are told, unless `verbose`. A warning names its rule; with `verbose` every finding does.
    """
    found: list[tuple[str, str]] = []
    told = set[str]()
    for kind in FROM_BAD_TO_GOOD:
        mark, every = MARKS[kind], [finding for finding in findings if finding.verdict == kind]
        counted = [finding for finding in every if kind == "ok" and finding.level not in MEASURED and not verbose]
        if len(counted) > 1:
            counts = Counter(LEVELS.get(finding.level, finding.level) for finding in counted)
            listed = ", ".join(f"{count} of {what}" for what, count in counts.items())
            found.append((mark, f"  {mark:9} {len(counted)} checks: {listed} (-v lists them)"))
            every = [finding for finding in every if finding not in counted]
        groups: dict[str, list[Finding]] = {}
        for finding in every:
            groups.setdefault(finding.remedy if kind not in ("ok", "note") else "", []).append(finding)
        for remedy, group in groups.items():
            for finding in group:
                rule = f" [{finding.rule}]" if verbose or kind == "warning" else ""
                found.append((mark, f"  {mark:9} {finding.level:9} {_text(finding)}{rule}"))
            if remedy and remedy not in told:
                found.append((mark, f"  {'':9} {'':9} -> {remedy}"))
            told.add(remedy)
    return found


def verdict(findings: Iterable[Finding], code: int) -> str:
    """What was proved and by what, what was not read, and the counts: "structure and samples verified; values of 291 tensors not read
    (--deep reads them) (17 ok, 1 unchecked)", or "FAILED (1 failed, 5 ok); structure verified".

    A part counts as proved only where nothing failed on the same level.
    """
    every = list(findings)
    counts = Counter(finding.verdict for finding in every)
    tally = f"({', '.join(f'{counts[kind]} {kind}' for kind in FROM_BAD_TO_GOOD if counts[kind])})"
    broken = {finding.level for finding in every if finding.verdict == "failed"}
    right = [finding for finding in every if finding.verdict == "ok" and finding.level not in broken]
    sound = _by_source(finding.part for finding in right if finding.level not in MEASURED)
    measured = list(dict.fromkeys(finding.part for finding in right if finding.level in MEASURED and finding.part))
    unread = _unread(finding.part for kind in ("unproved", "unchecked", "warning") for finding in every if finding.verdict == kind)
    if code == 0:
        done = [f"{sound} verified"] * bool(sound) + measured or ["verified" if counts["ok"] else "nothing to verify"]
        return "; ".join([*done, *unread]) + f" {tally}"
    if code == 3:
        only = [f"only {sound} sound"] if sound else []
        return "; ".join([f"not verified: {unread[0] if unread else NOTHING}", *unread[1:], *only]) + f" {tally}"
    return "; ".join([f"FAILED {tally}", *([f"only {sound} verified"] if sound else []), *unread])


def _by_source(parts: Iterable[str]) -> str:
    """Parts joined by what proves them: "structure and samples, files and values of 291 tensors (by its manifest)"."""
    groups: dict[str, list[str]] = {}
    for part in dict.fromkeys(filter(None, parts)):
        what, by, whom = part.partition(" (by ")
        groups.setdefault(by + whom, []).append(what)
    return ", ".join(f"{_and(every)}{by}" for by, every in groups.items())


def _unread(parts: Iterable[str]) -> list[str]:
    """The parts that were not proved, those with the same first word joined: "unchecked: 16 rows of `lm_head`, 23 tensors"."""
    groups: dict[str, list[str]] = {}
    for part in dict.fromkeys(filter(None, parts)):
        head, colon, what = part.partition(": ")
        groups.setdefault(head + colon, []).append(what)
    return [head + ", ".join(every) for head, every in groups.items()]


def _and(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def document(name: str, findings: Sequence[Finding], code: int, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Plain data, for `--json`."""
    return {"name": name, "exit_code": code, "verdict": verdict(findings, code), **(facts or {}), "findings": [asdict(f) for f in findings]}


def junit(name: str, findings: Sequence[Finding], seconds: float | None = None) -> bytes:
    """A JUnit XML report: a test case for each finding; what failed is a failure, what was not checked is skipped; each has its own name.

    `seconds` is how long the run took; the checks share their reads, so a single one has no time of its own.
    """
    counts, taken = Counter(finding.verdict for finding in findings), Counter[tuple[str, str]]()
    skipped = counts["unchecked"] + counts["unproved"]
    sizes = {"tests": str(len(findings)), "failures": str(counts["failed"]), "skipped": str(skipped), "errors": "0"}
    time = {} if seconds is None else {"time": f"{seconds:.3f}"}
    suite = ElementTree.Element("testsuite", {"name": f"llava-weights {_clean(name)}", **sizes, **time})
    for finding in findings:
        case = f"{finding.subject}: {finding.rule}" if finding.rule else finding.subject
        taken[finding.level, case] += 1
        case += f" ({taken[finding.level, case]})" if taken[finding.level, case] > 1 else ""
        names = {"classname": f"{_clean(name)}.{finding.level}", "name": _clean(case), **(time and {"time": "0"})}
        element = ElementTree.SubElement(suite, "testcase", names)
        message = {"message": _clean(_text(finding))}
        if finding.verdict == "failed":
            ElementTree.SubElement(element, "failure", message).text = _clean(finding.remedy)
        elif finding.verdict in ("unproved", "unchecked"):
            ElementTree.SubElement(element, "skipped", message)
        else:
            ElementTree.SubElement(element, "system-out").text = message["message"]
    ElementTree.SubElement(suite, "system-out").text = _clean(verdict(findings, exit_code(findings)))
    text: str = ElementTree.tostring(suite, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'.encode()


def markdown(name: str, findings: Sequence[Finding], code: int) -> str:
    """A section for a CI's summary page, such as `$GITHUB_STEP_SUMMARY`."""
    rows = [
        f"| {MARKS[f.verdict]} | {f.level} | {markdown_text(_text(f))} | {markdown_text(f.remedy)} |" for f in sorted(findings, key=_rank)
    ]
    head = [
        f"## {markdown_text(name)}: {markdown_text(verdict(findings, code))}",
        "",
        "| | level | finding | remedy |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows, ""]) + "\n"


def _rank(finding: Finding) -> int:
    return FROM_BAD_TO_GOOD.index(finding.verdict)


def _text(finding: Finding) -> str:
    named = re.search(rf"(?<![\w./-]){re.escape(finding.subject)}(?![\w/-]|\.\w)", finding.text)  # and not a piece of another name
    return finding.text if named else f"{finding.subject}: {finding.text}"


def _clean(text: str) -> str:
    """Without secrets, and without characters that XML has no form for."""
    return visible(redact(text))


LITTLE = 0.5  # of an update: below, say so. An update of 1e-5 on weights of 0.02 keeps 0.61 in fp16, 0.10 in bf16


def explain(plan: Plan, output: str | Path, *, verbose: bool = False) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """What will be read, changed, repaired and written, and what it takes. Several repairs are counted, with `verbose` they are listed."""
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
        rows += [("fix", repair) for repair in (step.repairs if verbose else _counted(step.repairs))]
        rows += [("note", note) for note in step.notes]
        rows += [("warning", warning) for warning in (*step.warnings, *step.cautions)]
    rows.append(("output", f"{output}  {shards(len(plan.shards))}, {size(plan.nbytes)}{_free(output)}"))
    rows.append(("memory", f"at most {size(plan.memory)} in all, {plan.settings.jobs} jobs"))
    return rows, _document(plan, output)


def _counted(repairs: Sequence[str]) -> Sequence[str]:
    """Several repairs as one line: how many, and of which files, whose names are before the colons."""
    if len(repairs) < 2:
        return repairs
    files = Counter(repair.partition(":")[0] for repair in repairs)
    listed = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in files.items())
    return [f"{len(repairs)} repairs: {listed} (-v lists them)"]


def _free(output: str | Path) -> str:
    """How much space there is; nothing where the system does not say: `preflight` reports that."""
    try:
        here = Path(output).absolute()  # for an address the current folder counts, where the work folder will be
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
    """When an input last changed, in ns since 1970, its moves and copies counted (ctime); None where an input on the network can't tell.

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


def loading(plan: Plan, output: str) -> str | None:
    """The line of Python or of a shell that loads the output; None where it is at an address, or no program is known to load it."""
    if is_address(output):
        return None
    typed = shlex.quote(output if not output.startswith("-") else f"./{output}")
    if plan.history and plan.history[-1].operation == "make-delta":
        return DELTA_LOADING.format(path=typed)
    layout = layout_of([name for shard in plan.shards for name, _ in shard.tensors])
    if layout == "gguf":
        text, vision = (shlex.quote(os.path.join(output, shard.name)) for shard in plan.shards)
        return GGUF_LOADING.format(text=text, vision=vision)
    named = plan.config.get("architectures")
    model = str(named[0]) if isinstance(named, list) and named else ""
    form = ORIGINAL_LOADING.get(model) if layout == "llava" else LOADING.get(layout)
    if form is None or ("{model}" in form and not model.isidentifier()):
        return None
    return form.format(path=json.dumps(output, ensure_ascii=False), model=model)


def outcome(report: Report, plan: Plan, output: str, seconds: float, *, reread: bool = True) -> tuple[list[str], dict[str, Any]]:
    """The sentences and the document of a finished run."""
    peak = peak_memory()
    resumed = f", {report.resumed} of them from an earlier run" if report.resumed else ""
    speed = f"{size(round(report.nbytes / seconds))}/s, " if seconds and not report.resumed else ""
    loads, folder = loading(plan, output), output if not output.startswith("-") else f"./{output}"
    lines = [
        f"Wrote {output}: {shards(report.shards)}{resumed}, {size(report.nbytes)} in {duration(seconds)} ({speed}peak memory {size(peak)})",
        f"  checksums in {output.rstrip('/')}/{SUMS}, recipe in {MANIFEST}, model card in README.md",
        *_loss(report.tallies),
        *_retained(report.tallies),
        *([] if reread else ["  not read back: whether the disk has it as it was written is not known"]),
        f"Check: {'download it, then ' if is_address(output) else f'cd {shlex.quote(folder)} && '}sha256sum -c {SUMS}",
        *([f"Load:  {loads}"] if loads else []),
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
        "read_back": reread,
        "load": loads,
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
    """Peak resident bytes of this process. `ru_maxrss` is the second choice: a child inherits it from its parent."""
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
