"""action.yml as GitHub would run it, and the recipes of docs/ci.md: their lines are taken from the files and run by a shell."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
GOOD, DELTA = FIXTURES / "H-manifest/schema-1", FIXTURES / "A-delta-v0/delta-307-apr17"
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
CI = (ROOT / "docs/ci.md").read_text(encoding="utf-8")
PYTHON = """#!/bin/bash
# Stands for the Python of setup-python: makes an "environment" whose pip writes down what it is asked for.
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
elif [ "$1 $2" = "-m pip" ]; then printf '%s\\n' "${@:3}" > "$RUNNER_TEMP/pip"
else exec {python} "$@"; fi
"""


@dataclass(frozen=True)
class Ran:
    """What a run of the action left: exit code of the last step, log, outputs of the action, summary page."""

    code: int
    log: str
    outputs: dict[str, str]
    page: str


@pytest.fixture
def action(tmp_path: Path) -> Any:
    """Run every shell step of action.yml in order, with GitHub's files and variables; `uses:` steps are stood for by their outputs."""
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("{python}", shlex.quote(sys.executable)))
    python.chmod(0o755)

    def run(**given: str) -> Ran:
        inputs = {name: str(declared.get("default", "")) for name, declared in ACTION["inputs"].items()} | given
        assert inputs.keys() == ACTION["inputs"].keys()
        steps = {"python": {"python-path": str(python)}}
        context = {"inputs": inputs, "github": {"action_path": str(ROOT), "action_ref": "v1"}}
        page, work = tmp_path / "page.md", tmp_path / "work"
        work.mkdir(exist_ok=True)
        common = {**os.environ, "GITHUB_STEP_SUMMARY": str(page), "RUNNER_TEMP": str(tmp_path / "temp"), "PYTHONPATH": str(ROOT)}
        (tmp_path / "temp").mkdir(exist_ok=True)
        for number, step in enumerate(ACTION["runs"]["steps"]):
            if "run" not in step:
                continue
            assert step["shell"] == "bash"
            assert "${{" not in step["run"], "an expression in a script lets an input run commands"
            out = tmp_path / f"output-{number}"
            out.write_text("")
            env = {name: evaluated(text, context, steps) for name, text in step.get("env", {}).items()}
            command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]]
            done = subprocess.run(command, cwd=work, env={**common, **env, "GITHUB_OUTPUT": str(out)}, capture_output=True, text=True)
            if step.get("id"):
                steps[step["id"]] = outputs(out.read_text())
            if done.returncode:
                break
        given_out = {name: evaluated(declared["value"], context, steps) for name, declared in ACTION["outputs"].items()}
        return Ran(done.returncode, done.stdout + done.stderr, given_out, page.read_text() if page.exists() else "")

    return run


def evaluated(text: str, context: dict[str, Any], steps: dict[str, dict[str, str]]) -> str:
    """`${{ inputs.path }}`, `${{ github.action_path }}`, `${{ steps.id.outputs.name }}`."""

    def value(match: re.Match[str]) -> str:
        match match[1].split("."):
            case ["steps", step, "outputs", name]:
                return steps.get(step, {}).get(name, "")
            case [place, name]:
                return str(context[place][name])
        raise AssertionError(match[0])

    return re.sub(r"\$\{\{ ([\w.-]+) \}\}", value, text)


def outputs(text: str) -> dict[str, str]:
    """What GitHub reads from $GITHUB_OUTPUT: `name=value`, or `name<<END`, lines, `END`."""
    found, lines = {}, iter(text.splitlines())
    for line in lines:
        name, long, end = line.partition("<<")
        if long:
            found[name] = "\n".join(iter(lines.__next__, end))
        else:
            found.update([line.split("=", 1)])
    return found


def test_what_is_right(action: Any, tmp_path: Path) -> None:
    ran = action(path=str(GOOD), arguments="--deep -j 1")
    assert ran.code == 0, ran.log
    assert (ran.outputs["exit-code"], ran.outputs["report"]) == ("0", "llava-weights.xml")
    assert "files and values of 4 tensors" in ran.outputs["verdict"]
    assert re.fullmatch(r"(\w+:)?[0-9a-f]{64}", ran.outputs["root"])
    assert "::error" not in ran.log
    assert ran.page.startswith("## schema-1: ")
    assert ElementTree.parse(tmp_path / "work/llava-weights.xml").getroot().get("failures") == "0"


def test_what_is_wrong(action: Any, tmp_path: Path) -> None:
    ran = action(path=str(DELTA), junit="delta report.xml")
    assert ran.code == 4
    assert (ran.outputs["exit-code"], ran.outputs["report"]) == ("4", "delta report.xml")
    assert ran.outputs["verdict"].startswith("FAILED (1 failed")
    commands = [line for line in ran.log.splitlines() if line.startswith("::")]
    assert commands[0].startswith("::error title=L1 ")
    assert {line[2:].split(" ")[0] for line in commands} == {"error", "warning", "notice"}
    assert (tmp_path / "work/delta report.xml").exists()


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ({"path": "nowhere"}, 3, "the path `nowhere` does not exist"),
        ({"path": "x", "arguments": "--against 'open"}, 2, "can't be split"),
        ({"path": "x", "arguments": "--no-such-option"}, 2, "--no-such-option"),
        ({"path": str(GOOD), "command": "diff", "arguments": f"'{GOOD}'"}, 0, "equal"),
        ({"path": str(GOOD), "command": "diff", "arguments": f'"{DELTA}"'}, 4, "differs"),
    ],
)
def test_other_ends(action: Any, given: dict[str, str], code: int, words: str) -> None:
    ran = action(**given)
    assert (ran.code, ran.outputs["exit-code"], ran.outputs["report"]) == (code, str(code), "")
    assert words in ran.log
    assert ran.outputs["verdict"]


def test_blanks_in_arguments_and_quotes_that_are_no_commands(action: Any, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/my list").write_bytes((GOOD / "SHA256SUMS").read_bytes())
    ran = action(path=str(GOOD), arguments='--against "my list" --allow "$(touch hacked)"')
    assert ran.code == 2, ran.log  # there is no such rule
    assert not (tmp_path / "work/hacked").exists()
    assert action(path=str(GOOD), arguments='--against "my list"').code == 0


def test_a_checkpoint_gives_github_no_commands(action: Any, tmp_path: Path) -> None:
    """A name that ends a line and begins a command, in the older form too, which GitHub obeys anywhere in a line."""
    folder = tmp_path / "work" / "it"
    folder.mkdir(parents=True)
    for file in GOOD.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "a\n::stop-commands::x ##[error]y.bin").write_bytes(b"x")
    ran = action(path="it")
    assert [line for line in ran.log.splitlines() if line.startswith("::") and not re.match("::(error|warning|notice) title=", line)] == []
    assert "##[" not in ran.log
    assert set(ran.outputs) == set(ACTION["outputs"])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, str(ROOT)),
        ({"command": "smoke"}, f"{ROOT}[smoke]"),
        ({"version": "0.1.0"}, "llava-weights==0.1.0"),
        ({"version": "0.1.0", "command": "smoke"}, "llava-weights[smoke]==0.1.0"),
        ({"version": "git+https://example.org/x"}, "git+https://example.org/x"),
    ],
)
def test_what_is_installed(action: Any, tmp_path: Path, given: dict[str, str], wanted: str) -> None:
    action(path="nowhere", **given)
    asked = (tmp_path / "temp/pip").read_text().splitlines()
    assert asked[-1] == wanted
    assert asked[-3:-1] == ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]


def test_the_jobs_python_stays() -> None:
    (step,) = (step for step in ACTION["runs"]["steps"] if "setup-python" in step.get("uses", ""))
    assert step["with"]["update-environment"] is False


def test_the_page_tells_inputs_and_outputs() -> None:
    section = CI.split("## GitHub")[1].split("## Anywhere else")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", section, re.M)) == {*ACTION["inputs"], *ACTION["outputs"]}
    workflow = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", section, re.S)[0])
    for step in workflow["jobs"]["verify"]["steps"]:
        if "llava-weights" in step.get("uses", ""):
            assert step["with"].keys() <= ACTION["inputs"].keys()


# --- recipes without GitHub -------------------------------------------------------------------------------------------------


def recipe(heading: str, language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", CI.split(f"### {heading}\n")[1].split("\n### ")[0].split("\n## ")[0], re.S)
    return str(block)


def shell(script: str, folder: Path, model: str) -> subprocess.CompletedProcess[str]:
    (folder / "bin").mkdir(exist_ok=True)
    for name, line in {"llava-weights": f'"{sys.executable}" -m llava_weights "$@"', "pip": "true"}.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\nexec {line}\n")
        (folder / "bin" / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "MODEL": model, "LLAVA_WEIGHTS": "x"}
    return subprocess.run(["bash", "-e", "-c", script], cwd=folder, env=env, capture_output=True, text=True)


UNPROVED = FIXTURES / "C-v1.5/hf-by-tf4.47.1"


@pytest.mark.parametrize(("model", "code", "said"), [(GOOD, 0, "verified"), (UNPROVED, 0, "not proved"), (DELTA, 4, "FAILED")])
def test_the_shell_recipe(tmp_path: Path, model: Path, code: int, said: str) -> None:
    done = shell(recipe("Shell", "bash"), tmp_path, str(model))
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert (tmp_path / "llava-weights.xml").exists()


@pytest.mark.parametrize(("model", "code"), [(GOOD, 0), (UNPROVED, 3), (DELTA, 4)])
def test_the_gitlab_recipe(tmp_path: Path, model: Path, code: int) -> None:
    job = yaml.safe_load(recipe("GitLab", "yaml"))["verify"]
    assert job["allow_failure"] == {"exit_codes": [3]}
    done = shell("\n".join(job["script"]), tmp_path, str(model))
    assert done.returncode == code
    assert (tmp_path / job["artifacts"]["reports"]["junit"]).exists()


@pytest.mark.parametrize(("model", "code"), [(GOOD, 0), (DELTA, 4)])
def test_the_jenkins_recipe(tmp_path: Path, model: Path, code: int) -> None:
    """Its shell line; Jenkins itself is not run."""
    (line,) = re.findall(r"script: '(.*?)'\)", recipe("Jenkins", "groovy"))
    assert shell(line, tmp_path, str(model)).returncode == code
    assert (tmp_path / "llava-weights.xml").exists()
