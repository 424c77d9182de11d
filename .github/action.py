"""The last step of action.yml: run one command, and tell GitHub what it found.

What failed and what is doubtful becomes an annotation of the run; exit code, verdict, root and report become outputs of the step. The
summary page is written by the command itself, which reads $GITHUB_STEP_SUMMARY.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import uuid
from typing import Any

NO_REPORT = ("--junit", "--record", "--prompt")  # smoke takes no --junit beside the last two
ANNOTATIONS = {"failed": "error", "warning": "warning", "unproved": "warning", "unchecked": "notice"}
ORDER = ("failed", "warning", "unproved", "unchecked", "note", "ok")  # GitHub shows the first ten of a kind
SILENT = ("started", "progress", "shard", "summary")


def main() -> int:
    command, checkpoint, report = (os.environ[name] for name in ("COMMAND", "CHECKPOINT", "JUNIT"))
    try:
        arguments = shlex.split(os.environ["ARGUMENTS"])
    except ValueError as error:
        annotate("error", "arguments", f"`arguments` can't be split as a shell does it: {error}")
        return finish(2, "command line", "", "")
    flags = {argument.partition("=")[0] for argument in arguments}
    if command not in ("verify", "smoke") or flags.intersection(NO_REPORT):
        report = ""
    junit = ["--junit", report, *([] if "--force" in flags else ["--force"])] if report else []
    program = [sys.executable, "-m", "llava_weights", command, checkpoint, *arguments, *junit, "--json"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as running:
        documents = [document for line in running.stdout or () if (document := read(line))]
    summary = next((document for document in reversed(documents) if document.get("type") == "summary"), {})
    for finding in sorted(summary.get("findings", ()), key=lambda finding: ORDER.index(finding["verdict"])):
        show(finding)
    code = running.returncode if running.returncode >= 0 else 128 - running.returncode  # below 0: ended by that signal
    verdict = str(summary.get("verdict") or ("equal" if summary.get("equal") else "different" if "equal" in summary else "error"))
    say(f"{checkpoint}: {verdict}")
    if command == "diff" and code == 4:
        annotate("error", "diff", f"{checkpoint} differs: {json.dumps(summary.get('counts', {}))}")
    return finish(code, verdict, str(summary.get("root") or ""), report if report and os.path.exists(report) else "")


def read(line: str) -> dict[str, Any] | None:
    """A JSON line of the command. An error is an annotation; anything else that it says goes into the log."""
    try:
        document = json.loads(line)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        say(line.rstrip("\n"))
        return None
    if document.get("type") == "error":
        facts = [f"{label}: {value}" for label, value in (document.get("facts") or {}).items()]
        annotate("error", "llava-weights", "\n".join([str(document.get("what")), *facts, f"hint: {document.get('hint')}"]))
    elif document.get("type") not in SILENT and (text := document.get("text")):
        say(str(text))
    return document


def show(finding: dict[str, Any]) -> None:
    kind, text = str(finding["verdict"]), f"{finding['subject']}: {finding['text']}"
    if kind in ANNOTATIONS:
        annotate(ANNOTATIONS[kind], f"{finding['level']} {finding.get('rule', '')}", "\n".join(filter(None, [text, finding["remedy"]])))
    else:
        say(f"{kind:9} {finding['level']:9} {text}")


def annotate(kind: str, title: str, text: str) -> None:
    """GitHub's form: percent signs and line ends are escaped, in a property commas and colons too."""
    title = escaped(title).replace(":", "%3A").replace(",", "%2C")
    write(f"::{kind} title={title}::{escaped(text)}")


def escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def say(text: str) -> None:
    """Text for the log. It begins with blanks, since a line that begins with `::` is a command to GitHub."""
    write(f"  {' '.join(text.splitlines())}")


def write(line: str) -> None:
    sys.stdout.write(line.replace("##[", "## [") + "\n")  # GitHub obeys `##[...]` anywhere in a line
    sys.stdout.flush()


def finish(code: int, verdict: str, root: str, report: str) -> int:
    with open(os.environ["GITHUB_OUTPUT"], "a", encoding="utf-8") as out:
        for name, value in {"exit-code": str(code), "verdict": verdict, "root": root, "report": report}.items():
            end = f"end-{uuid.uuid4()}"  # no text from a checkpoint can close the value early
            out.write(f"{name}<<{end}\n{value}\n{end}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
