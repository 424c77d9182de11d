"""Findings for people, for programs, for a CI's test report and for its summary page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from .findings import Finding, Verdict, exit_code
from .wording import markdown_text, redact, visible

NOTHING = "there is nothing to verify against"
MARKS = {"ok": "ok", "warning": "warning", "failed": "FAILED", "unproved": "unproved", "unchecked": "unchecked", "note": "note"}
ORDER: tuple[Verdict, ...] = ("failed", "warning", "unproved", "unchecked", "note", "ok")


def lines(name: str, findings: Sequence[Finding], code: int, *, verbose: bool = False) -> list[str]:
    """The verdict, then a line a finding with what to do below it. A warning names its rule; `verbose`: every finding does."""
    told = [f"{name}: {verdict(findings, code)}"]
    for finding in findings:
        rule = f" [{finding.rule}]" if verbose or finding.verdict == "warning" else ""
        told.append(f"  {MARKS[finding.verdict]:9} {finding.level:9} {_text(finding)}{rule}")
        if finding.remedy and finding.verdict not in ("ok", "note"):
            told.append(f"  {'':9} {'':9} -> {finding.remedy}")
    return told


def verdict(findings: Iterable[Finding], code: int) -> str:
    """What was proved and by what, what was not read, and the counts: "structure and samples verified; values of 291 tensors not read
    (--deep reads them) (17 ok, 1 unchecked)", or "FAILED (1 failed, 5 ok); structure verified".

    A part counts as proved only where nothing failed on the same level.
    """
    every = list(findings)
    counts = Counter(finding.verdict for finding in every)
    tally = f"({', '.join(f'{counts[kind]} {kind}' for kind in ORDER if counts[kind])})"
    broken = {finding.level for finding in every if finding.verdict == "failed"}
    sound = _proved(finding.part for finding in every if finding.verdict == "ok" and finding.level not in broken)
    unread = _unread(finding.part for kind in ("unproved", "unchecked", "warning") for finding in every if finding.verdict == kind)
    if code == 0:
        done = "verified" if counts["ok"] else "nothing to verify"
        return "; ".join([f"{sound} verified" if sound else done, *unread]) + f" {tally}"
    if code == 3:
        only = [f"only {sound} sound"] if sound else []
        return "; ".join([f"not verified: {unread[0] if unread else NOTHING}", *unread[1:], *only]) + f" {tally}"
    return "; ".join([f"FAILED {tally}", *([f"only {sound} verified"] if sound else []), *unread])


def _proved(parts: Iterable[str]) -> str:
    """Those that the same thing proves together: "structure and samples, files and values of 291 tensors (by its manifest)"."""
    groups: dict[str, list[str]] = {}
    for part in dict.fromkeys(filter(None, parts)):
        what, by, whom = part.partition(" (by ")
        groups.setdefault(by + whom, []).append(what)
    return ", ".join(f"{_and(every)}{by}" for by, every in groups.items())


def _unread(parts: Iterable[str]) -> list[str]:
    """What the headline says was not proved, those that begin with one word together: "unchecked: 16 rows of `lm_head`, 23 tensors"."""
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


def junit(name: str, findings: Sequence[Finding]) -> bytes:
    """A JUnit XML report: a test case a finding; what failed is a failure, what was not checked is skipped."""
    counts = Counter(finding.verdict for finding in findings)
    skipped = counts["unchecked"] + counts["unproved"]
    sizes = {"tests": str(len(findings)), "failures": str(counts["failed"]), "skipped": str(skipped), "errors": "0"}
    suite = ElementTree.Element("testsuite", {"name": f"llava-weights {_clean(name)}", **sizes})
    for finding in findings:
        case = ElementTree.SubElement(suite, "testcase", {"classname": f"{_clean(name)}.{finding.level}", "name": _clean(finding.subject)})
        message = {"message": _clean(_text(finding))}
        if finding.verdict == "failed":
            ElementTree.SubElement(case, "failure", message).text = _clean(finding.remedy)
        elif finding.verdict in ("unproved", "unchecked"):
            ElementTree.SubElement(case, "skipped", message)
        else:
            ElementTree.SubElement(case, "system-out").text = message["message"]
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
    return ORDER.index(finding.verdict)


def _text(finding: Finding) -> str:
    named = re.search(rf"(?<![\w./-]){re.escape(finding.subject)}(?![\w/-]|\.\w)", finding.text)  # and not a piece of another name
    return finding.text if named else f"{finding.subject}: {finding.text}"


def _clean(text: str) -> str:
    """Without secrets, and without characters that XML has no form for."""
    return visible(redact(text))
