"""Many jobs in one run: what a table may say, what is planned, run, skipped and refused, and how a run ends."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from benchmarks.synthetic import write_pair
from llava_weights import execute, make_plan, open_checkpoint
from llava_weights.batch import differences
from llava_weights.cli import app
from llava_weights.commands.batch import COMMANDS, Command
from llava_weights.conversion import convert
from llava_weights.report import explain

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = "llava-weights.manifest.json"
PYTHON = sys.executable

# Stands in for `python -m llava_weights`: what it is told to do lies in the name of the output. $3 is the command, $4 perhaps --dry-run.
STAND_IN = r"""#!/bin/sh
say() { echo "{\"type\":\"error\",\"code\":$1,\"what\":\"$2\",\"facts\":{\"why\":\"told to\"},\"hint\":null,\"written\":\"1 of 2 are kept\"}" >&2; exit $1; }
echo "$3 $4 $5" >> calls
case "$4 $*" in
  --dry-run*refused*) say 3 "it does not fit" ;;
  --dry-run*) echo '{"type":"plan","nbytes":7,"shards":[1,2],"memory":70000000,"steps":[{"warnings":["mind the step"]}],"files":{},"changed":0}'; exit 0 ;;
  *broken*) say 5 "the disk is full" ;;
  *killed*) echo "Fatal: no memory" >&2; kill -9 $$ ;;
  *wrong*) echo '{"type":"summary","name":"m","exit_code":4,"verdict":"FAILED (1 failed)","findings":[{"subject":"s","text":"t","verdict":"failed"}]}'; exit 4 ;;
  *long*) trap 'say 130 stopped' INT; trap 'say 143 stopped' TERM; touch started; while :; do sleep 0.05; done ;;
esac
echo '{"type":"started","shards":2,"nbytes":7}'
echo '{"type":"summary","shards":2,"resumed":1,"nbytes":7,"root":"0123456789abcdef0123","seconds":1}'
"""  # noqa: E501


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.fixture
def stand_in(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Write a table of converting jobs from their names; commands are played by STAND_IN."""
    script = place / "python"
    script.write_text(STAND_IN)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return lambda names: table(place, "".join(f'[[job]]\ncommand = "convert"\nsource = "x"\noutput = "{name}"\n' for name in names.split()))


def table(folder: Path, text: str) -> Path:
    path = folder / "jobs.toml"
    path.write_text(text)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def states(result: Result) -> dict[str, tuple[str, int]]:
    last = lines(result)[-1]
    assert last["type"] == "summary"
    assert last["exit_code"] == result.exit_code
    return {job["name"]: (job["state"], job["code"]) for job in last["jobs"]}


def rows(text: str, count: int) -> list[list[str]]:
    """The last lines of the summary as cells, without the times."""
    found = [re.split(r"  +", line.strip()) for line in text.splitlines()[-count:]]
    return [[cell for number, cell in enumerate(row) if number != 3] for row in found]


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_a_table_runs_once(place: Path, fixtures: Path) -> None:
    """The second job reads what the first makes; both folders are those of the commands by themselves, and are not made twice."""
    source = fixtures / "C-v1.5/hf-by-tf4.47.1"
    path = table(
        place,
        f"""
        [defaults]
        max-shard-size = "100kB"
        vision-tower = "openai/clip-vit-large-patch14-336"
        [[job]]
        command = "convert"
        source = "{source}"
        to = "llava"
        output = "out/original"
        [[job]]
        name = "there and back"
        command = "convert"
        source = "out/original"
        vision-tower = "{fixtures / "common/clip-tiny-42px"}"
        output = "out/back"
        """,
    )
    both = run(path, "--json")
    assert states(both) == {"original": ("done", 0), "there and back": ("done", 0)}, both.output
    assert [line["type"] for line in lines(both)] == ["plan", "job", "job", "summary"]
    assert {job["name"]: job["state"] for job in lines(both)[0]["jobs"]} == {"original": "ready", "there and back": "waits"}
    root = json.loads((place / "out/back" / MANIFEST).read_text())["root"]["tensors"]
    assert lines(both)[2]["root"] == root
    tower = "openai/clip-vit-large-patch14-336"
    execute(make_plan(convert(open_checkpoint(str(source)), "llava", tower_name=tower), max_shard_size="100kB"), "expected")
    before = content(place / "out")
    assert content(place / "out/original") == content(place / "expected")
    again = run(path, "-q", "--only", "there and back")
    assert (again.exit_code, again.stdout, again.stderr) == (0, "out/back\n", "")
    assert content(place / "out") == before


def other_option(plan: dict[str, Any], out: Path) -> None:
    plan["options"] = {"max_shard_size": 1}


def other_version(plan: dict[str, Any], out: Path) -> None:
    plan["version"] = "0.0.1"


def other_input(plan: dict[str, Any], out: Path) -> None:
    plan["steps"][0]["inputs"]["source"]["files"][0]["header_sha256"] = "0" * 64


def other_tokenizer(plan: dict[str, Any], out: Path) -> None:
    plan["files"]["tokenizer.model"] = "0" * 64


def input_changed_since(plan: dict[str, Any], out: Path) -> None:
    plan["changed"] = time.time_ns() + 10**9


def input_without_a_date(plan: dict[str, Any], out: Path) -> None:
    plan["changed"] = None


def shard_cut_short(plan: dict[str, Any], out: Path) -> None:
    os.truncate(out / "model.safetensors", 1000)


def config_gone(plan: dict[str, Any], out: Path) -> None:
    (out / "config.json").unlink()


def recipe_of_another(plan: dict[str, Any], out: Path) -> None:
    made = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(made | {"recipe": []}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, fixtures: Path) -> tuple[Path, str]:
    """A finished output and the document of its plan, as `--dry-run --json` prints it."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(fixtures / "C-v1.5/hf-by-tf4.47.1", folder / "source")
    plan = make_plan(convert(open_checkpoint(str(folder / "source")), "llava"))
    execute(plan, folder / "out")
    return folder / "out", json.dumps(explain(plan, folder / "out")[1])


def test_the_same_work_is_recognised_and_nothing_else(made: tuple[Path, str], tmp_path: Path) -> None:
    assert differences(json.loads(made[1]), made[0]) == []
    for number, change in enumerate(
        (other_option, other_version, other_input, other_tokenizer, input_changed_since, input_without_a_date, shard_cut_short, config_gone,
         recipe_of_another)
    ):  # fmt: skip
        out, plan = tmp_path / str(number), json.loads(made[1])
        shutil.copytree(made[0], out)
        change(plan, out)
        assert len(differences(plan, out)) == 1, change.__name__


def test_an_input_with_other_values_of_the_same_shapes_is_newer(made: tuple[Path, str], tmp_path: Path) -> None:
    """The header does not tell them apart, and a copy keeps the old time of change: what the system notes at a move still tells."""
    source = tmp_path / "source"
    shutil.copytree(made[0].parent / "source", source)
    weights = bytearray((source / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (source / "other").write_bytes(weights)
    os.utime(source / "other", ns=(0, 0))
    os.rename(source / "other", source / "model.safetensors")
    plan = explain(make_plan(convert(open_checkpoint(str(source)), "llava")), tmp_path / "out")[1]
    assert differences(json.loads(json.dumps(plan)), made[0]) == ["an input that is newer, or can't be dated"]


def test_an_output_of_another_command_is_kept(place: Path, made: tuple[Path, str]) -> None:
    shutil.copytree(made[0], "out")
    job = f'[[job]]\ncommand = "convert"\nsource = "{made[0].parent / "source"}"\nto = "llava"\nmax-shard-size = "50kB"\noutput = "out"\n'
    before = content(place / "out")
    result = run(table(place, job))
    assert result.exit_code == 5
    assert "error: out: `out` exists and was made by another command, or an input changed since" in result.stderr
    assert "differing  options" in result.stderr
    assert content(place / "out") == before


def test_a_refused_plan_stops_all_before_anything_is_written(stand_in: Callable[[str], Path], place: Path) -> None:
    path = stand_in("one refused two")
    result = run(path, "--json")
    assert result.exit_code == 3
    assert [line["type"] for line in lines(result)] == ["plan", "summary"]
    assert {job["name"]: job["state"] for job in lines(result)[0]["jobs"]} == {"one": "ready", "refused": "failed", "two": "ready"}
    assert (place / "calls").read_text().splitlines() == ["convert --dry-run --output=" + name for name in ("one", "refused", "two")]
    shown = run(path).stderr
    assert "failed (3): it does not fit" in shown
    assert "error: refused: it does not fit\n  why  told to\n" in shown
    assert "warning: one: mind the step" in shown
    assert shown.endswith("Nothing was written\n")
    assert states(run(path, "--json", "--keep-going")) == {"one": ("done", 0), "refused": ("failed", 3), "two": ("done", 0)}


def test_a_failed_job_and_those_behind_it(stand_in: Callable[[str], Path], place: Path) -> None:
    path = stand_in("one broken killed two")
    assert states(run(path, "--json")) == {"one": ("done", 0), "broken": ("failed", 5), "killed": ("not run", 0), "two": ("not run", 0)}
    path.write_text(path.read_text() + '[[job]]\ncommand = "verify"\npath = "broken"\n[[job]]\ncommand = "verify"\npath = "wrong"\n')
    result = run(path, "-k")
    assert result.exit_code == 5
    text = result.stderr
    assert "Wrote one: 2 shards, 1 of them from an earlier run, 7 bytes in" in text
    assert "last words  Fatal: no memory" in text
    assert rows(text, 6) == [
        ["one", "done", "7 bytes", "root 0123456789abcdef"],
        ["broken", "failed (5)", "7 bytes", "the disk is full"],
        ["killed", "failed (137)", "7 bytes", "killed by SIGKILL"],
        ["two", "done", "7 bytes", "root 0123456789abcdef"],
        ["verify broken", "not run", "-", "-"],
        ["verify wrong", "failed (4)", "-", "m: FAILED (1 failed)"],
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_running_job_and_the_run(stand_in: Callable[[str], Path], place: Path, number: signal.Signals, code: int) -> None:
    script = f"import sys; sys.executable = {sys.executable!r}; from llava_weights.cli import main; main()"
    command = [PYTHON, "-c", script, "run", str(stand_in("one long two"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (place / "started").exists():
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate()
    assert (process.returncode, out) == (code, ""), err
    assert "Stopped. 1 of 2 are kept\n" in err
    assert [row[:2] for row in rows(err, 3)] == [["one", "done"], ["long", f"failed ({code})"], ["two", "not run"]]
    assert "Traceback" not in err


ONE = '[[job]]\ncommand = "convert"\nsource = "x"\noutput = "out"\n'
WRONG = {
    "syntax": ("[[job]", "is not TOML"),
    "encoding": ("\udcff", "is not TOML"),
    "empty": ("", "there are no jobs in the table"),
    "one table": ('[job]\ncommand = "convert"', "there are no jobs in the table"),
    "another key": ("[[jobs]]\n", "`jobs` is no part of a table of jobs"),
    "a name of no command's": ('[defaults]\nmax-shards = "5GB"\n' + ONE, "`[defaults]`: no command has an option `max-shards`"),
    "command": ('[[job]]\ncommand = "inspect"', "job 1: there is no command `inspect`"),
    "no command": ('[[job]]\nname = "a"', "job `a`: `command` is missing"),
    "option": (ONE + 'Max-Memory = "1GB"', "job 1: `convert` has no option `Max-Memory`"),
    "option of run": (ONE + "json = true", "job 1: `json` is an option of `run`"),
    "dry run": (ONE + "dry-run = true", "job 1: `dry-run` is an option of `run`"),
    "twice by an alias": (ONE + 'target = "b"', "job 1: `output` and `target` are the same option"),
    "text": (ONE + "delta = 13", "job 1: `delta` must be a text"),
    "flag": (ONE + 'force = "yes"', "job 1: `force` must be true or false"),
    "number": (ONE + 'jobs = "2"', "job 1: `jobs` must be a whole number"),
    "truth for a number": (ONE + "jobs = true", "job 1: `jobs` must be a whole number"),
    "list of numbers": (ONE + "lora = [1]", "job 1: `lora` must be a text or a list of texts"),
    "list for one": (ONE + 'delta = ["a"]', "job 1: `delta` must be a text"),
    "no character for a command line": (ONE + 'delta = "a\\u0000b"', "job 1: `delta` must be a text"),
    "range": (ONE + "jobs = 99", "job 1: Invalid value for '-j' / '--jobs'"),
    "missing": ('[[job]]\nname = "a"\ncommand = "convert"\noutput = "out"', "job `a`: Missing argument 'SRC'"),
    "no output": ('[[job]]\nname = "a"\ncommand = "convert"\nsource = "x"', "job `a`: Missing option '-o'"),
    "name": (ONE + "name = 1", "job 1: `name` must be a text"),
    "two names": (ONE + ONE, "two jobs have the name `out`"),
    "same output": (ONE + 'name = "a"\n' + ONE.replace('"out"', '"./out/../out"'), "jobs `a` and `out` have the same `output`"),
    "output in an output": (ONE + ONE.replace('"out"', '"out/b"'), "jobs `out` and `b` have the same `output`"),
    "order": (ONE.replace('"x"', '"later"') + ONE.replace('"out"', '"later"'), "job `out` reads the output of `later`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_refused_before_any_process(place: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    text, words = WRONG[case]
    path = place / "jobs.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    monkeypatch.setattr(subprocess, "Popen", None)
    result = run(path)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert f"error: {words}" in result.stderr or (case in ("syntax", "encoding") and words in result.stderr)
    assert os.listdir(place) == ["jobs.toml"]


def test_a_name_that_is_not_in_the_table(place: Path) -> None:
    result = run(table(place, ONE), "--only", "other")
    assert result.exit_code == 2
    assert "there is no job `other`" in result.stderr
    assert run("nowhere.toml").exit_code == 3


TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)


@settings(max_examples=25)
@given(source=TEXTS, base=TEXTS, lora=st.lists(TEXTS), scale=st.floats(allow_nan=False), force=st.booleans(), reread=st.booleans())
def test_a_key_says_what_the_option_says(source: str, base: str, lora: list[str], scale: float, force: bool, reread: bool) -> None:
    """Whatever the text, dashes in front included: the command's own parser reads back what the table holds."""
    command = CONVERT
    given = {"source": source, "delta": base, "lora": lora, "scale": scale, "force": force, "reread": reread, "target": "out"}
    words = command.arguments(command.values(given, "job"), "job")
    read = command.parser.make_context("convert", list(words)).params
    assert (read["source"], read["delta"], list(read["lora"] or []), read["scale"]) == (source, base, lora, scale)
    assert (read["force"], read["reread"], read["output"], read["json"]) == (force, reread, "out", True)


CONVERT = Command("convert", COMMANDS["convert"])


@pytest.mark.slow
def test_an_interrupted_run_continues(place: Path) -> None:
    """SIGTERM while a delta is applied: the same command ends in the same bytes, and does not repeat what was finished."""
    from llava_weights.families import Size

    write_pair(place / "pair", Size("small", 384, 4, 8, 1024), vocabulary=1000, seed=6)
    job = '[[job]]\ncommand = "apply-delta"\nbase = "pair/base"\ndelta = "pair/delta"\noutput = "{}"\n'
    check = '[[job]]\ncommand = "verify"\npath = "b"\ndeep = true\n'
    path = table(place, '[defaults]\nmax-shard-size = "1MB"\n' + job.format("a") + job.format("b") + check)
    command = [PYTHON, "-m", "llava_weights", "run", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        next(line for line in process.stderr if line.startswith("b (2 of 3)"))
        next(line for line in process.stderr if ": 2 of " in line)
        process.terminate()
        rest = process.stderr.read()
    assert process.returncode == 143, rest
    assert "Stopped" in rest
    assert "Run the same command to continue" in rest
    assert [row[:2] for row in rows(rest, 3)] == [["a", "done"], ["b", "failed (143)"], ["verify b", "not run"]]
    assert content(place).keys() >= {"a/SHA256SUMS", "b.partial/journal"}
    again = run(path)
    assert again.exit_code == 0, again.output
    assert [row[:2] for row in rows(again.stderr, 3)] == [["a", "finished earlier"], ["b", "done"], ["verify b", "done"]]
    assert "of them from an earlier run" in again.stderr
    assert content(place / "a") == content(place / "b")
    forced = run(table(place, '[defaults]\nmax-shard-size = "2MB"\n' + job.format("b") + "force = true\n"), "-q")
    assert (forced.exit_code, forced.stdout) == (0, "b\n")
    assert content(place / "a") != content(place / "b")


@pytest.mark.slow
def test_a_check_that_fails_is_the_runs_exit_code(place: Path, made: tuple[Path, str]) -> None:
    shutil.copytree(made[0], "model")
    path = table(place, '[[job]]\ncommand = "checksum"\npath = "model"\n[[job]]\ncommand = "verify"\npath = "model"\ndeep = true\n')
    whole = run(path, "--json")
    assert states(whole) == {"checksum model": ("done", 0), "verify model": ("done", 0)}, whole.output
    weights = place / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert states(run(path, "--json", "--only", "verify model")) == {"verify model": ("failed", 4)}
