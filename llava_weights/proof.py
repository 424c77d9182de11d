"""Findings for people, for programs, for a CI's test report and for its summary page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from .findings import Finding, Verdict
from .wording import markdown_text, redact, visible

VERDICTS = {0: "verified", 3: "not verified: there is nothing to verify against", 4: "FAILED"}
MARKS = {"ok": "ok", "warning": "warning", "failed": "FAILED", "unchecked": "unchecked"}
ORDER: tuple[Verdict, ...] = ("failed", "warning", "unchecked", "ok")


def lines(name: str, findings: Sequence[Finding], code: int) -> list[str]:
    """The verdict, then a line a finding with what to do below it."""
    told = [f"{name}: {verdict(findings, code)}"]
    for finding in findings:
        told.append(f"  {MARKS[finding.verdict]:9} {finding.level:9} {_text(finding)}")
        if finding.remedy and finding.verdict != "ok":
            told.append(f"  {'':9} {'':9} -> {finding.remedy}")
    return told


def verdict(findings: Iterable[Finding], code: int) -> str:
    """The verdict with its counts, as "FAILED (1 failed, 5 ok)"."""
    counts = Counter(finding.verdict for finding in findings)
    return f"{VERDICTS.get(code, 'FAILED')} ({', '.join(f'{counts[kind]} {kind}' for kind in ORDER if counts[kind])})"


def document(name: str, findings: Sequence[Finding], code: int, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Plain data, for `--json`."""
    return {"name": name, "exit_code": code, "verdict": verdict(findings, code), **(facts or {}), "findings": [asdict(f) for f in findings]}


def junit(name: str, findings: Sequence[Finding]) -> bytes:
    """A JUnit XML report: a test case a finding; what failed is a failure, what was not checked is skipped."""
    counts = Counter(finding.verdict for finding in findings)
    sizes = {"tests": str(len(findings)), "failures": str(counts["failed"]), "skipped": str(counts["unchecked"]), "errors": "0"}
    suite = ElementTree.Element("testsuite", {"name": f"llava-weights {_clean(name)}", **sizes})
    for finding in findings:
        case = ElementTree.SubElement(suite, "testcase", {"classname": f"{_clean(name)}.{finding.level}", "name": _clean(finding.subject)})
        message = {"message": _clean(_text(finding))}
        if finding.verdict == "failed":
            ElementTree.SubElement(case, "failure", message).text = _clean(finding.remedy)
        elif finding.verdict == "unchecked":
            ElementTree.SubElement(case, "skipped", message)
        else:
            ElementTree.SubElement(case, "system-out").text = message["message"]
    text: str = ElementTree.tostring(suite, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'.encode()


def markdown(name: str, findings: Sequence[Finding], code: int) -> str:
    """A section for a CI's summary page, such as `$GITHUB_STEP_SUMMARY`."""
    rows = [
        f"| {MARKS[f.verdict]} | {f.level} | {markdown_text(_text(f))} | {markdown_text(f.remedy)} |" for f in sorted(findings, key=_rank)
    ]
    head = [f"## {markdown_text(name)}: {verdict(findings, code)}", "", "| | level | finding | remedy |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""]) + "\n"


def _rank(finding: Finding) -> int:
    return ORDER.index(finding.verdict)


def _text(finding: Finding) -> str:
    return finding.text if finding.subject in finding.text else f"{finding.subject}: {finding.text}"


def _clean(text: str) -> str:
    """Without secrets, and without characters that XML has no form for."""
    return visible(redact(text))
