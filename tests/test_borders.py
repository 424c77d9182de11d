"""Hostile values in every field, through every medium: a terminal, a CI's log, Markdown, JUnit, YAML, JSON, SVG."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from typer.testing import CliRunner

from llava_weights.checkpoint.checkpoint import Origin, Step, open_checkpoint
from llava_weights.cli import report
from llava_weights.cli.console import Console, clean
from llava_weights.cli.main import app
from llava_weights.errors import InputError
from llava_weights.events import Note
from llava_weights.findings import Finding
from llava_weights.text import markdown_text, two_columns
from llava_weights.write.card import make_card
from llava_weights.write.plan import make_plan

HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!-- hidden", "</td></table><h1>verified</h1>",
    "[click](https://evil.example)", "![](https://evil.example/pixel.png)", "<https://evil.example>", "see https://evil.example/a now",
    "HTTPS://EVIL.example", "www.evil.example", "WWW.evil.example", "me@evil.example", "[a]: https://evil.example", "[^1]", "a | b | c",
    "a \\| b", "\\", "x\\", "`code", "`a` and `b|c` and `d", "``x``", "`a``b`", "``` sh", "**bold** _it_ __x__ ~~no~~ *a*", "# title",
    "&lt;b&gt; &#60;i&#62; &copy;", "a\n\n# verified\n\n<b>", "a\r\n::error::x", "\n::error file=a::owned", "::set-output name=x::y",
    "  ::add-mask::x", "##[error]owned", "x ##[add-mask]y", "##vso[task.setvariable variable=a]b",
    "##teamcity[buildStatus status='SUCCESS']", "\x1b[2J\x1b[31mred", "\x9b31m", "\u202egnp.exe", "zero\u200bwidth\u2060", "\x00\x07\x08",
    "\ud800 lone", "\ufffe\uffff", "]]><x/>", "'\"><svg onload=x>", "---\nlicense: mit\n---", "- a: b", "{{7*7}} {% raw %}", "$x^2$",
    "`<b>`", "\u2028::error::x", "\t| x", "", "<a href='javascript:x'>`", "`\\`", "`x`@`y`", "a@b`c`", "*", "_", "1. x", "> quote", "+ x",
    "===", "    indented",
)  # fmt: skip
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
CI = re.compile(r"^\s*::|##(\w*)\[", re.MULTILINE)
UNSAFE = re.compile("[^\\S \n]|[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufffe\uffff\ud800-\udfff]")
# What GitHub makes a link of without any brackets: an address, or `www.`, or a mail address; none of it within code.
AUTOLINK = re.compile(r"(?i)\w+://|www\.|[\w.+-]@\w")


def inline(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from inline(token.children or [])


def shown_by(markdown: str, kinds: frozenset[str] = frozenset()) -> str:
    """The text that a reader of `markdown` sees, after a check that nothing in it is of a kind that no value may make."""
    tokens = list(inline(MARKDOWN.parse(markdown)))
    forbidden = {"html_inline", "html_block", "link_open", "image", "strong_open", "em_open", "s_open", "blockquote_open", "hr", *kinds}
    assert not forbidden & {token.type for token in tokens}, markdown
    return "".join(token.content for token in tokens if token.type in ("text", "code_inline", "fence") and not token.children)


def no_autolink(markdown: str) -> bool:
    return AUTOLINK.search(re.sub(r"(?<![\\`])`[^`\n]+`(?!`)", "``", markdown)) is None


@pytest.mark.parametrize("text", HOSTILE)
def test_a_value_in_markdown_is_its_text(text: str) -> None:
    """As a paragraph's end, a table's cell and a heading: nothing but text and code, and all of it can be read."""
    escaped = markdown_text(text)
    assert "\n" not in escaped
    assert no_autolink(escaped)
    wanted = re.sub(r"[`\s]+", "", clean(text).replace("\\x3a", ":").replace("#\\x23", "##"))
    for form in (f"- note: {escaped}\n", f"| a | b |\n|---|---|\n| x {escaped} | end |\n", f"# x {escaped}\n"):
        shown = shown_by(form, frozenset(() if form[0] == "#" else ("heading_open",)))
        assert wanted in re.sub(r"[`\s]+", "", shown)
    table = MARKDOWN.parse(f"| a | b |\n|---|---|\n| {escaped} | end |\n")
    assert sum(token.type == "td_open" for token in table) == 2
    assert [token.content for token in table if token.type == "inline"][-1] == "end"


def test_code_stays_code_in_markdown() -> None:
    assert (
        markdown_text("`a_b*` has 3 rows, not `<pad>`; model.layers.0.self_attn")
        == "`a_b*` has 3 rows, not `<pad>`; model.layers.0.self_attn"
    )


FINDINGS = [
    Finding("L0", verdict, text, f"found {text}", f"do {text}", part=f"unchecked: {text}")
    for text in HOSTILE
    for verdict in ("failed", "ok", "unchecked", "warning")
]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_summary_holds_findings_and_nothing_of_theirs(name: str) -> None:
    findings = [finding for finding in FINDINGS if finding.subject == name]
    written = report.markdown(name, findings, 4)
    shown_by(written)
    assert no_autolink(written)
    assert not UNSAFE.search(written)
    tokens = MARKDOWN.parse(written)
    assert [token.type for token in tokens].count("heading_open") == 1
    assert [token.type for token in tokens].count("td_open") == 4 * len(findings)


@pytest.mark.parametrize("name", HOSTILE)
def test_junit_stays_xml(name: str) -> None:
    findings = [finding for finding in FINDINGS if finding.subject == name]
    suite = ElementTree.fromstring(report.junit(name, findings))
    assert len(suite.findall("testcase")) == len(findings)
    assert {child.tag for case in suite for child in case} == {"failure", "skipped", "system-out"}
    assert not any(UNSAFE.search(str(text)) for each in suite.iter() for text in (each.text or "", *each.attrib.values()))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_line_of_a_terminal_stays_one_and_commands_nothing(text: str) -> None:
    """Data, narration, facts of an error and notes."""
    out, err = io.StringIO(), io.StringIO()
    console = Console(out=out, err=err)
    console.document([text, *two_columns([("label", text), (text, "value")])], {})
    console.document(text, {})
    console.plan([("label", text), (text, "value")], {})
    console.on_event(Note(text))
    console.on_event(Note(text, warning=True))
    console.error(InputError(text, facts={text: text}, hint=text))
    console.summary([text], {}, text)
    shown = out.getvalue() + err.getvalue()
    assert not CI.search(shown)
    assert not UNSAFE.search(shown)
    assert len(out.getvalue().splitlines()) == 3 + text.count("\n") + 1 - text.endswith("\n")


@pytest.mark.parametrize("text", HOSTILE)
def test_json_stays_json_and_says_the_same(text: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(json=True, out=out, err=err)
    console.document("", {"a": [{text: text}]})
    console.on_event(Note(text))
    console.end(console.error(InputError(text, facts={text: text}, hint=text)))
    written = out.getvalue() + err.getvalue()
    assert not CI.search(written)
    assert written.isascii()
    assert json.loads(out.getvalue())["a"] == [{text: text}]
    assert [json.loads(line)["type"] for line in err.getvalue().splitlines()] == ["note", "error"]


@pytest.fixture(scope="module")
def plan(fixtures: Path) -> Any:
    return make_plan(open_checkpoint(fixtures / "A-delta-v0/base-hf-bin"))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_holds_values_as_text(plan: Any, text: str) -> None:
    origin = Origin(text, Path("/nowhere"), "safetensors", (), text)
    checks = {"prompt_text": f"USER: {text}\n```\n<b>", "stop": text}
    step = Step(
        text,
        ((text, origin), ("base", replace(origin, name="owner/name", revision="0" * 40))),
        {text: text},
        {text: text},
        (text,),
        (text,),
        (text,),
        checks,
    )
    card = make_card(replace(plan, history=(step,), config={"architectures": [text]}), (), {})
    _, front, body = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter == {"tags": ["llava-weights"], "base_model": ["owner/name"]}
    assert not UNSAFE.search(card)
    shown_by(body)
    kinds = [token.type for token in MARKDOWN.parse(body)]
    assert (kinds.count("heading_open"), kinds.count("td_open"), kinds.count("fence")) == (4, 8, 3)
    prose = re.sub(r"^(`{3,}).*?^\1$", "", body, flags=re.MULTILINE | re.DOTALL)
    assert no_autolink(prose)


@pytest.fixture
def model(fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose folder, config, tokens, templates and tensors all have hostile names or values."""
    source = fixtures / "A-delta-v0/target-307/llava-tiny-v0"
    folder = tmp_path / "a\n::error::<b>x ##[error]\u202e [l](https:evil.example)"
    shutil.copytree(source, folder)
    nasty = "clip\n::error::<img src=x>\x1b[31m ##[error] [l](https://evil.example)|\u202e"
    config = json.loads((folder / "config.json").read_text())
    config |= {"mm_vision_tower": nasty, "_name_or_path": nasty, "mm_use_im_start_end": nasty, "auto_map": {nasty: nasty}, nasty: nasty}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages.__class__ }}\n::error::<img src=x>")
    (folder / "\n::error::x<img src=x>.py").write_text("")
    names = [f"model.layers.0.{text}.weight" for text in (nasty, "<b>::error::", "a|b`c`", "[l](https://evil.example)")]
    header = {name: {"dtype": "F32", "shape": [4], "data_offsets": [16 * i, 16 * i + 16]} for i, name in enumerate(names)}
    data = json.dumps(header).encode()
    (tmp_path / "weights\n::error::.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(16 * len(names)))
    monkeypatch.chdir(tmp_path)
    return folder


COMMANDS = (
    "inspect MODEL --tensors", "verify MODEL --deep --junit j.xml --summary s.md", "checksum MODEL", "diff MODEL BASE --plot p.svg",
    "convert MODEL -o out", "apply-delta --base BASE --delta MODEL -o out", "inspect MODEL/none",
    "make-delta --base BASE --tuned MODEL -o out", "inspect WEIGHTS --tensors", "verify WEIGHTS --deep --junit j.xml --summary s.md",
    "diff WEIGHTS BASE --plot p.svg", "smoke MODEL", "merge-lora --base BASE --lora MODEL -o out", "convert-lora MODEL -o out",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("form", ["", "--json"])
def test_commands_on_a_hostile_checkpoint(model: Path, fixtures: Path, command: str, form: str) -> None:
    words = {"MODEL": model, "BASE": fixtures / "A-delta-v0/base-hf-bin", "WEIGHTS": next(model.parent.glob("*.safetensors"))}
    arguments = [str(words.get(word, word)).replace("MODEL/", f"{model}/") for word in f"{command} {form}".split()]
    done = CliRunner().invoke(app, arguments)
    shown = done.stdout + done.stderr
    assert done.exit_code in (0, 3, 4), shown
    assert not CI.search(shown)
    assert not UNSAFE.search(shown)
    for line in done.stdout.splitlines() if form else ():
        json.loads(line)
    for file in (*model.parent.glob("s.md"), *model.parent.glob("out/README.md")):
        shown_by(re.sub(r"\A---\n.*?^---\n", "", file.read_text(), flags=re.MULTILINE | re.DOTALL))
        assert not UNSAFE.search(file.read_text())
    for file in (*model.parent.glob("j.xml"), *model.parent.glob("p.svg")):
        tree = ElementTree.parse(file)
        assert not {"img", "script", "b"} & {each.tag for each in tree.iter()}
