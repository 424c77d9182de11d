"""What `--json` prints: every line of every command is as docs/json.schema.json says, and the last one is a summary."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from jsonschema import Draft202012Validator

from llava_weights.cli.console import Console
from llava_weights.cli.main import app
from llava_weights.errors import InputError, Interrupted
from llava_weights.events import Note, Progress, ReadingBack, ShardDone, Started

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures"
SCHEMA = json.loads((ROOT / "docs/json.schema.json").read_text())
BASE, DELTA, LLAVA = (FIXTURES / "A-delta-v0" / name for name in ("base-hf-bin", "delta-307-apr17", "expected-307-by-main"))
CLIP, CLIP_42 = FIXTURES / "common/clip-tiny-28px", FIXTURES / "common/clip-tiny-42px"
HUB, TWO = FIXTURES / "C-v1.5/hf-by-tf4.47.1", FIXTURES / "C-v1.5/original-no-vision-bin"
VICUNA, LORA = FIXTURES / "B-lora/base-vicuna-tiny", FIXTURES / "B-lora/llava-v1.5-tiny-lora"
OPEN = ("summary", "error", "problem")  # whose fields are told in several places of the schema

# A command, the commands before it, its exit code, and a field that its summary has beside that.
CASES: dict[str, tuple[list[str], int, str]] = {
    f"apply-delta --base {BASE} --delta {DELTA} -o out --max-shard-size 60kB": ([], 0, "root"),
    f"apply-delta --base {BASE} --delta {DELTA} -o out -n": ([], 0, "dry_run"),
    f"apply-delta --base {BASE} --delta {DELTA} -o out --max-shard-size 60kB --shards 1/2": ([], 0, "portion"),
    f"apply-delta --base {BASE} --delta {DELTA} -o again --max-shard-size 60kB": (
        [f"apply-delta --base {BASE} --delta {DELTA} -o again --max-shard-size 60kB --shards 1/2"],
        0,
        "resumed",
    ),
    f"make-delta --base {BASE} --tuned {LLAVA} -o out": ([], 0, "load"),
    f"merge-lora --base {VICUNA} --lora {LORA} -o out": ([], 0, "tallies"),
    f"convert-lora {LORA} -o out": ([], 0, "output"),
    f"convert {LLAVA} --vision-tower {CLIP} -o out": ([], 0, "root"),
    f"convert {LLAVA} -o out": ([], 3, "error"),
    f"inspect {DELTA} --tensors": ([], 0, "tensors"),
    f"inspect {LORA}": ([], 0, "adapter"),
    f"verify {LLAVA}": ([], 3, "findings"),
    f"verify {HUB} --base {TWO} --deep --vision-tower {CLIP_42}": ([], 4, "content"),
    "verify model --deep": ([f"convert {LLAVA} --vision-tower {CLIP} -o model"], 0, "root"),
    f"verify {DELTA} --against {BASE}": ([], 4, "verdict"),
    "verify ./nowhere": ([], 3, "error"),
    f"verify {HUB} --junit nowhere/report.xml": ([], 5, "error"),
    "checksum out": ([f"apply-delta --base {BASE} --delta {DELTA} -o out"], 0, "written"),
    "verify out --deep --part 2/3": ([f"apply-delta --base {BASE} --delta {DELTA} -o out"], 0, "part"),
    f"repair out --from {LLAVA} -n": ([f"apply-delta --base {BASE} --delta {DELTA} -o out"], 0, "fetched"),
    f"repair {BASE} --from {LLAVA}": ([], 3, "error"),
    f"inspect {DELTA} --among {BASE} {VICUNA}": ([], 0, "candidates"),
    f"inspect {BASE} --fingerprint base.json": ([], 0, "nbytes"),
    f"diff {BASE} {LLAVA}": ([], 4, "tensors"),
    f"diff {BASE} {BASE}": ([], 0, "equal"),
    f"smoke {HUB}": ([], 0, "perplexity"),
    f"smoke {HUB} --record new.safetensors": ([], 0, "written"),
    f"smoke {HUB} --reference new.safetensors": ([f"smoke {HUB} --record new.safetensors"], 0, "rows"),
    f"smoke {BASE} --reference new.safetensors": ([f"smoke {VICUNA} --record new.safetensors"], 4, "rows"),
    "env": ([], 0, "platform"),
    "inspect owner/name": ([], 6, "error"),
    "convert": ([], 2, "error"),
    f"apply-delta --base {BASE} --delta {DELTA} -o out --dtype F32": ([], 2, "error"),
}


def strict(schema: Any) -> Any:
    """The schema without room for fields that it does not name."""
    found = copy.deepcopy(schema)

    def close(part: Any) -> None:
        for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            close(value)
        if isinstance(part, dict) and isinstance(part.get("properties"), dict) and "title" not in part:
            part.setdefault("additionalProperties", False)

    close(found)
    for name in OPEN:
        found["$defs"][name].pop("additionalProperties")
    return found


CHECK = Draft202012Validator(strict(SCHEMA))


def checked(text: str) -> list[dict[str, Any]]:
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    for line in lines:
        CHECK.validate(line)
    return lines


def test_the_schema_is_one_and_refuses_what_it_does_not_know() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    good = {"type": "summary", "schema": 1, "exit_code": 0, "written": []}
    assert CHECK.is_valid(good)
    for wrong in ({"more": 1}, {"exit_code": "0"}, {"schema": 2}, {"type": "end"}, {"written": 1}):
        assert not CHECK.is_valid(good | wrong)


@pytest.mark.parametrize("command", CASES, ids=lambda command: re.sub(r"/\S*/", "", command))
def test_every_line_is_as_the_schema_says(cli: Any, command: str) -> None:
    before, code, field = CASES[command]
    for words in before:
        assert cli(*words.split()).code == 0
    done = cli(*command.split(), "--json")
    out, err = checked(done.stdout), checked(done.stderr)
    assert done.code == code, done
    assert [line["type"] for line in out].count("summary") == 1
    summary = out[-1]
    assert (summary["type"], summary["exit_code"]) == ("summary", code)
    assert field in summary
    assert ("error" in summary) == (field == "error")
    told = [line for line in err if line["type"] == "error"]
    assert [{key: line[key] for key in ("code", "what", "facts", "hint", "written")} for line in told] == (
        [summary["error"]] if field == "error" else []
    )


def test_every_command_that_has_json_is_tried() -> None:
    group: Any = typer.main.get_command(app)
    having = {name for name, command in group.commands.items() if any("--json" in one.opts for one in command.params)}
    assert having == {command.split()[0] for command in CASES}


def test_quiet_leaves_the_summary(cli: Any) -> None:
    for command in (f"verify {LLAVA}", f"apply-delta --base {BASE} --delta {DELTA} -o out", "inspect ./nowhere"):
        (line,) = checked(cli(*command.split(), "--json", "-q").stdout)
        assert line["type"] == "summary"


def told(work: Callable[[Console], None]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    import io

    out, err = io.StringIO(), io.StringIO()
    seconds = iter(range(100_000))
    work(Console(json=True, out=out, err=err, clock=lambda: next(seconds)))
    return checked(out.getvalue()), checked(err.getvalue())


def test_events_are_as_the_schema_says() -> None:
    def work(console: Console) -> None:
        console.on_event(Note("a fact"))
        console.on_event(Note("careful", warning=True))
        console.on_event(Started(2, 100, what="Checking", to_follow=50))
        console.on_event(Progress(50, "a"))
        console.on_event(Started(2, 100, 1, 50, to_read_back=50))
        for nbytes in range(50, 100, 10):
            console.on_event(Progress(nbytes, "b", nbytes // 2))
        console.on_event(ShardDone("b", 2, 2, 50, "0" * 64))
        console.on_event(ReadingBack(10))
        console.end(console.error(Interrupted("stopped", exit_code=129)))

    out, err = told(work)
    assert {line["type"] for line in out} == {"started", "progress", "shard", "reading_back", "summary"}
    assert [line["type"] for line in err] == ["note", "note", "error"]
    assert (out[-1]["exit_code"], out[-1]["error"]["code"]) == (129, 129)
    assert out[-2]["type"] == "reading_back"


def test_a_fault_is_as_the_schema_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def work(console: Console) -> None:
        try:
            raise ZeroDivisionError("no")
        except ZeroDivisionError as error:
            console.end(console.unexpected(error))

    out, _ = told(work)
    assert [line["exit_code"] for line in out] == [1]


def test_an_error_behind_the_data_keeps_both() -> None:
    def work(console: Console) -> None:
        console.document("x", {"written": ["a"]})
        console.end(console.error(InputError("gone", hint="look")))

    out, _ = told(work)
    assert [(line["written"], line["exit_code"], line["error"]["what"]) for line in out] == [(["a"], 3, "gone")]


def test_the_document_names_every_field_of_a_summary() -> None:
    text = (ROOT / "docs/json.md").read_text()
    kinds = ("written", "portion", "dry_run", "verification", "difference", "repair", "which_base")
    fields = {name for kind in kinds for name in SCHEMA["$defs"][kind]["properties"]} - {"type", "schema"}
    assert [name for name in sorted(fields) if f"`{name}`" not in text] == []
    assert [kind for kind in SCHEMA["properties"]["type"]["enum"] if f"| `{kind}` |" not in text] == []
