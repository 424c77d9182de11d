"""`--help`, the man page and what the shell completes, all from typer's commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from llava_weights.cli import help, options
from llava_weights.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PROGRAM: Any = typer.main.get_command(app)
NAMES = ["", *PROGRAM.commands]


def shown(name: str, columns: int = 80) -> str:
    return CliRunner().invoke(app, [*([name] if name else []), "--help"], env={"COLUMNS": str(columns)}).stdout


def parameters(name: str) -> list[Any]:
    return [one for one in PROGRAM.commands[name].params if not one.hidden]


@pytest.mark.parametrize("columns", [30, 40, 80, 200])
@pytest.mark.parametrize("name", NAMES)
def test_no_line_is_wider_than_the_terminal(name: str, columns: int) -> None:
    for line in shown(name, columns).splitlines():
        assert len(line) < min(columns, help.WIDEST + 1) or " " not in line.strip().removesuffix(" \\"), line  # one word that is too long


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_option_stands_in_a_section_with_its_whole_text(name: str) -> None:
    for columns in (40, 80):
        words = re.sub(r"\s+", " ", shown(name, columns))
        for parameter in parameters(name):
            assert parameter.help, parameter.name
            assert re.sub(r"\s+", " ", parameter.help) in words
            assert parameter.rich_help_panel in options.SECTIONS or parameter.name == "help"
            assert all(re.search(rf"(?<![\w-]){flag}(?![\w-])", words) for flag in parameter.opts if flag.startswith("-"))


def test_the_program_tells_each_command_in_full() -> None:
    words = re.sub(r"\s+", " ", shown(""))
    for command in PROGRAM.commands.values():
        assert re.sub(r"\s+", " ", command.help.split("\n\n")[0]) in words
    assert "..." not in words.replace("COMMAND ...", "")


def test_sections_come_in_the_same_order_everywhere() -> None:
    for name in NAMES[1:]:
        titles = re.findall(r"^(\w+):$", shown(name), re.MULTILINE)
        assert titles[-1] in ("Example", "Examples")
        assert [title for title in options.SECTIONS if title in titles] == titles[:-1]
    assert re.findall(r"^(\w+):$", shown("convert"), re.MULTILINE)[:-1] == ["Input", "Conversion", "Output", "Speed", "Cluster", "Console"]


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_parse(name: str) -> None:
    for columns in (40, 100):
        page = shown(name, columns)
        typed = page[page.index("\nExample") :].split(":\n", 1)[1].split("\nMore:")[0].replace("\\\n", " ")
        lines = [shlex.split(line) for line in typed.splitlines() if line.strip()]
        assert lines
        for words in lines:
            assert words[0] == "llava-weights"
            command = PROGRAM.commands[words[1]]
            assert name in ("", words[1])
            command.make_context(words[1], words[2:])  # raises what typer refuses
        assert page.rstrip().endswith(help.DOCS)


def test_the_choices_are_those_of_the_library() -> None:
    from typing import get_args

    from llava_weights.tensors.low_rank import Arithmetic
    from llava_weights.transforms import convert, delta, quantised_training

    assert options.LAYOUTS == convert.TO_LAYOUTS
    assert options.ADAPTER_LAYOUTS == convert.ADAPTER_LAYOUTS
    assert convert.CHOICES["image_aspect"] == options.ASPECTS
    assert options.CODECS == delta.CODECS
    assert options.ROUNDINGS == quantised_training.ROUNDINGS
    assert get_args(Arithmetic) == options.ARITHMETICS


def test_the_shell_completes_every_closed_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    for name, command in PROGRAM.commands.items():
        for parameter in parameters(name):
            flag = next((one for one in parameter.opts if one.startswith("--")), None)
            if flag is None or "|" not in (parameter.metavar or "") or flag == "--ray-address":
                continue
            choices = parameter.metavar.split("|")
            context = command.make_context(name, [], resilient_parsing=True)
            found = [item.value for item in parameter.shell_complete(context, choices[0][:1])]
            assert choices[0] in found, (name, flag)
            assert set(found) <= set(choices), (name, flag)
            asked += 1
    assert asked > 20


def test_the_shell_completes_rules() -> None:
    from llava_weights.findings import OTHER_RULES

    command = PROGRAM.commands["verify"]
    (allow,) = (one for one in command.params if "--allow" in one.opts)
    found = [item.value for item in allow.shell_complete(command.make_context("verify", [], resilient_parsing=True), "wei")]
    assert found == ["weight-files"]
    assert set(OTHER_RULES) <= {item.value for item in allow.shell_complete(command.make_context("verify", [], resilient_parsing=True), "")}


def test_version_has_a_short_flag() -> None:
    assert CliRunner().invoke(app, ["-V"]).stdout == CliRunner().invoke(app, ["--version"]).stdout


def test_without_arguments_help_goes_to_stderr() -> None:
    done = CliRunner().invoke(app, [])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "apply-delta" in done.stderr


def test_the_man_page_is_the_one_that_is_shipped_and_has_everything() -> None:
    text = help.man_page(typer.main.get_command(app))  # one that no test has parsed with: its contexts keep what they saw first
    assert (ROOT / "docs/llava-weights.1").read_text() == text, "run `make docs`"
    plain = text.replace("\\-", "-").replace("\\e", "\\")
    for name in PROGRAM.commands:
        assert f".SS llava-weights {name}" in plain
        for parameter in parameters(name):
            assert parameter.help in plain
    assert all(
        line.startswith((".TH", ".SH", ".SS", ".PP", ".TP", ".B ", ".I ", ".EX", ".EE", ".SS"))
        for line in text.splitlines()
        if line[:1] == "."
    )
