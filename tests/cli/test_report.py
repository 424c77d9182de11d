"""Findings as people read them, and a CI: JUnit and Markdown parsed back with other libraries."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from llava_weights.cli import report
from llava_weights.cli.console import Console
from llava_weights.findings import Finding

FINDINGS = (
    Finding("L0", "ok", "model", "all is as it should be"),
    Finding("L3", "failed", "lm_head.weight", "`lm_head.weight` holds 3 values | inf & <NaN>\x00", "get the file again"),
    Finding("L2", "unchecked", "model", "no checksums"),
    Finding("L1", "warning", "config.json", "odd"),
)


def test_junit_is_xml_with_a_case_a_finding() -> None:
    suite = ElementTree.fromstring(report.junit("my model", FINDINGS, 1.25))
    counts = {"tests": "4", "failures": "1", "skipped": "1", "errors": "0"}
    assert suite.attrib == {"name": "llava-weights my model", **counts, "time": "1.250"}
    cases = {case.get("classname"): [child.tag for child in case] for case in suite.iter("testcase")}
    assert cases == {"my model.L0": ["system-out"], "my model.L3": ["failure"], "my model.L2": ["skipped"], "my model.L1": ["system-out"]}
    assert suite.findtext("system-out") == "FAILED (1 failed, 1 warning, 1 unchecked, 1 ok)"
    failure = suite.find(".//failure")
    assert failure is not None
    assert "inf & <NaN>" in str(failure.get("message"))


def test_no_two_cases_of_junit_have_the_same_name() -> None:
    twice = Finding("L0", "ok", "config.json", "one", rule="structure")
    suite = ElementTree.fromstring(report.junit("m", [*FINDINGS, twice, replace(twice, text="two"), replace(twice, rule="config/other")]))
    names = [(case.get("classname"), case.get("name")) for case in suite.iter("testcase")]
    assert len(set(names)) == len(names) == 7


def test_markdown_has_a_row_a_finding_failures_first() -> None:
    lines = report.markdown("my|model", FINDINGS, 4).splitlines()
    assert lines[0] == "## my\\|model: FAILED (1 failed, 1 warning, 1 unchecked, 1 ok)"
    rows = [line for line in lines if line.startswith("| ") and "level" not in line]
    assert [row.split(" | ")[0] for row in rows] == ["| FAILED", "| warning", "| unchecked", "| ok"]
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)


@pytest.mark.parametrize(("code", "word"), [(0, "verified"), (3, "not verified"), (4, "FAILED")])
def test_the_verdict_comes_first(code: int, word: str) -> None:
    assert report.headline("model", FINDINGS, code).startswith(f"model: {word}")
    assert report.document("model", FINDINGS, code)["exit_code"] == code


AGAIN = "get the file again"
MANY = (
    Finding("L0", "ok", "a", "a is right"),
    Finding("L0", "failed", "b", "b is wrong", AGAIN),
    Finding("L1", "ok", "c", "c is right"),
    Finding("L1", "note", "d", "d is worth knowing"),
    Finding("L2", "failed", "e", "e is wrong", "repeat the command"),
    Finding("L2", "failed", "f", "f is wrong", AGAIN),
    Finding("L1", "warning", "g", "g is odd", AGAIN, "odd"),
    Finding("L3", "unchecked", "h", "h was not read", "pass `--deep`"),
)


def test_failures_come_first_a_remedy_stands_once_and_what_is_right_is_counted() -> None:
    assert [line for _, line in report.rows(MANY)] == [
        "  FAILED    L0        b is wrong",
        "  FAILED    L2        f is wrong",
        "                      -> get the file again",
        "  FAILED    L2        e is wrong",
        "                      -> repeat the command",
        "  warning   L1        g is odd [odd]",
        "  unchecked L3        h was not read",
        "                      -> pass `--deep`",
        "  note      L1        d is worth knowing",
        "  ok        2 checks: 1 of structure, 1 of values (-v lists them)",
    ]
    assert [line for label, line in report.rows(MANY, verbose=True) if label == "ok"] == [
        "  ok        L0        a is right [structure]",
        "  ok        L1        c is right [values]",
    ]
    assert report.rows(MANY[:1]) == [("ok", "  ok        L0        a is right")]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_quiet_check_says_the_verdict_and_what_is_not_right_on_stderr(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, err = io.StringIO(), io.StringIO()
    console = Console(quiet=True, out=out, err=err, color="always" if terminal else "auto")
    console.verdict(report.headline("model", MANY, 4), report.rows(MANY), {}, 4)
    assert out.getvalue() == ""
    shown = err.getvalue()
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines()
    assert plain[0].startswith("model: FAILED (3 failed, 1 warning")
    assert plain[1:] == [line for label, line in report.rows(MANY) if label in ("FAILED", "warning")]
    assert ("\x1b[1;31mmodel: FAILED" in shown, "  \x1b[33mwarning\x1b[0m   L1" in shown) == (terminal, terminal)


@pytest.mark.parametrize(("code", "colour"), [(0, "1;32"), (3, "1;33"), (4, "1;31")])
def test_a_verdict_has_its_colour_and_what_a_file_says_has_none(code: int, colour: str) -> None:
    out = io.StringIO()
    rows = [("FAILED", "  FAILED    L0        FAILED \x1b[32mok"), ("ok", "  ok        fine"), ("unchecked", "  unchecked x")]
    Console(out=out, err=io.StringIO(), color="always").verdict("m\x1b: v", rows, {}, code)
    assert out.getvalue().splitlines() == [
        f"\x1b[{colour}mm\\x1b: v\x1b[0m",
        "  \x1b[1;31mFAILED\x1b[0m    L0        FAILED \\x1b[32mok",
        "  \x1b[32mok\x1b[0m        fine",
        "  unchecked x",
    ]


@pytest.fixture
def model(cli: Any, fixtures: Path, tmp_path: Path) -> Path:
    source, tower = fixtures / "C-v1.5/original-with-vision-safetensors", fixtures / "common/clip-tiny-42px"
    assert cli("convert", source, "--vision-tower", tower, "-o", "model", "-q").code == 0
    return tmp_path / "model"


def test_the_commands(cli: Any, model: Path, fixtures: Path, tmp_path: Path) -> None:
    done = cli("verify", "model", "--deep", "--junit", "report.xml", "--summary", "summary.md", "--json")
    document = json.loads(done.stdout.splitlines()[-1])
    assert (done.code, document["exit_code"], document["tensors"]) == (0, 0, 64)
    assert {finding["verdict"] for finding in document["findings"]} == {"ok"}
    assert ElementTree.parse(tmp_path / "report.xml").getroot().get("failures") == "0"
    whole = "structure and samples, files and values of 64 tensors (by its manifest) verified (18 ok)"
    assert (tmp_path / "summary.md").read_text().startswith(f"## model: {whole}\n")
    assert f"model: {whole}" in cli("verify", "model", "--deep").stdout
    assert whole in (tmp_path / "report.xml").read_text()
    assert document["verdict"] == whole
    unread = "structure and samples, small files (by its manifest) verified; values of 64 tensors not read (--deep reads them)"
    assert cli("verify", "model").stdout.startswith(f"model: {unread}")

    source = fixtures / "C-v1.5/original-no-vision-bin"
    assert cli("verify", source).code == 3
    done = cli("verify", model, "--against", source)
    assert (done.code, "not verified: 39 tensors without counterpart in `original-no-vision-bin`" in done.stdout) == (3, True)
    assert "will be read: " in done.stderr
    shutil.copytree(source, tmp_path / "source")
    assert cli("checksum", "source").stdout.count("Wrote") == 2
    assert cli("verify", "source", "--deep").code == 0
    assert cli("verify", "source", env={"GITHUB_STEP_SUMMARY": str(tmp_path / "page.md")}).code == 0
    assert "verified" in (tmp_path / "page.md").read_text()

    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"image_seq_length": 576}))
    done = cli("verify", "model")
    assert done.code == 4
    assert "`config.json` changed" in done.stdout
    assert "`image_seq_length` is 576" in done.stdout


def test_diff(cli: Any, model: Path, fixtures: Path, tmp_path: Path) -> None:
    done = cli("diff", model, fixtures / "C-v1.5/original-with-vision-safetensors", "--plot", "change.svg")
    assert done.code == 4  # the new rows
    assert "304 common rows equal, 16 more in A" in done.stdout
    ElementTree.parse(tmp_path / "change.svg")
    assert cli("diff", model, model).code == 0
    assert cli("diff", model, model, "--plot", "change.gif").code == 2


@pytest.mark.parametrize(
    ("subject", "text", "line"),
    [
        ("processor_config.json", "right: as preprocessor_config.json", "processor_config.json: right: as preprocessor_config.json"),
        ("tokenizer", "right: tokenizer.json as tokenizer.model", "tokenizer: right: tokenizer.json as tokenizer.model"),
        ("config.json", "`config.json` says nothing", "`config.json` says nothing"),
        ("lm_head.weight", "the rows of lm_head.weight.", "the rows of lm_head.weight."),
    ],
)
def test_a_line_names_what_it_is_about(subject: str, text: str, line: str) -> None:
    (found,) = report.rows([Finding("L0", "ok", subject, text)])
    assert found == ("ok", f"  ok        L0        {line}")
