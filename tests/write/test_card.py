"""The model card: front matter as the Hub reads it, and lines to use the output that run as they stand, for each layout."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from llava_weights import make_plan, open_checkpoint
from llava_weights.checkpoint.checkpoint import Step
from llava_weights.write.card import make_card

A, B, C = (f"{{fixtures}}/{name}" for name in ("A-delta-v0", "B-lora", "C-v1.5"))
TOWER_42 = "--vision-tower {fixtures}/common/clip-tiny-42px"
MADE = {  # what is made: the command, and what its card's front matter says
    "llava-hf": (f"convert {C}/original-no-vision-bin {TOWER_42}", {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}),
    "llava-hf-merged": (
        f"merge-lora --base llava-hf --lora {B}/llava-v1.5-tiny-lora",
        {"library_name": "transformers", "pipeline_tag": "image-text-to-text"},
    ),
    "llava": (f"merge-lora --base {B}/base-vicuna-tiny --lora {B}/llava-v1.5-tiny-lora", {"pipeline_tag": "image-text-to-text"}),
    "text": (
        f"merge-lora --base {B}/base-vicuna-tiny --lora text-lora",
        {"library_name": "transformers", "pipeline_tag": "text-generation"},
    ),
    "gguf": (f"convert {C}/original-no-vision-bin --to gguf {TOWER_42}", {"pipeline_tag": "image-text-to-text"}),
    "adapter": (f"convert-lora {B}/llava-v1.5-tiny-lora --to llava-hf", {"library_name": "peft"}),
    "adapter-back": ("convert-lora adapter --to llava --base llava", {"library_name": "peft"}),
    "delta": (f"make-delta --base {A}/base-hf-bin --tuned {A}/target-307/llava-tiny-v0", {}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, fixtures: Path) -> Path:
    """A folder with an output of every layout, under its name in `MADE`."""
    from typer.testing import CliRunner

    from llava_weights.cli.main import app

    folder = tmp_path_factory.mktemp("made")
    (folder / "text-lora").mkdir()  # without a projector
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(fixtures / "B-lora/llava-v1.5-tiny-lora" / file, folder / "text-lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, (command, _) in MADE.items():
            done = CliRunner().invoke(app, [*shlex.split(command.replace("{fixtures}", str(fixtures))), "-o", name])
            assert done.exit_code == 0, done.output
    return folder


def card(made: Path, name: str) -> str:
    return (made / name / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The blocks of code in the section on use."""
    section = text.split("## Use it")[1].split("\n## ")[0]
    return [token.content for token in MarkdownIt().parse(section) if token.type == "fence" and token.info == language]


@pytest.mark.parametrize("name", MADE)
def test_the_front_matter_is_what_is_known(made: Path, name: str) -> None:
    data = ModelCard(card(made, name)).data.to_dict()
    llava = [] if name in ("text",) else ["llava"]
    assert data == {"tags": [*llava, "llava-weights"], **MADE[name][1]}


def test_the_python_of_the_cards_runs(made: Path, fixtures: Path) -> None:
    """As it stands, in the output's folder, in one process: `BASE` alone is replaced, and photo.jpg is there."""
    script = ["import os"]
    for name in ("llava-hf", "llava-hf-merged", "text", "adapter"):
        (block,) = blocks(card(made, name), "python")
        assert "PATH" not in block
        ast.parse(block)
        shutil.copy(fixtures / "common/images/wide_90x36.png", made / name / "photo.jpg")
        script += [f"os.chdir({str(made / name)!r})", block.replace('"BASE"', repr(str(made / "llava-hf"))), f"print('{name} is done')"]
    script.append("assert any('lora_A' in each for each, _ in model.named_parameters())")
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "What is shown in this image?" in done.stdout
    assert done.stdout.count(" is done\n") == 4


@pytest.mark.parametrize("name", ["llava", "delta", "adapter", "adapter-back"])
def test_the_commands_of_the_cards_run(made: Path, fixtures: Path, cli: Any, name: str) -> None:
    bases = {
        "BASE": made / "llava-hf" if name == "adapter" else fixtures / "B-lora/base-vicuna-tiny",
        "base-hf-bin": fixtures / "A-delta-v0/base-hf-bin",
    }
    lines = [line for block in blocks(card(made, name), "") for line in block.splitlines() if line.startswith("llava-weights ")]
    assert lines
    shutil.copy(fixtures / "common/images/wide_90x36.png", made / name / "photo.jpg")
    for line in lines:
        words = [str(bases.get(word, fixtures / word if word.startswith("common/") else word)) for word in shlex.split(line)[1:]]
        words = [word.replace("../", f"../of-{name}-") for word in words]
        done = cli(*words, cwd=made / name)
        assert done.code == 0, (line, done)


def test_ids_and_licences_stand_there_only_where_they_are_known(fixtures: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(fixtures / "B-lora/base-vicuna-tiny", tmp_path / name)
    one, two = (open_checkpoint(tmp_path / name).origin for name in ("one", "two"))
    plan = make_plan(open_checkpoint(tmp_path / "one"))

    def data(*inputs: tuple[str, Any]) -> dict[str, Any]:
        made = make_card(replace(plan, history=(Step("convert", inputs),)), (), {})
        found: dict[str, Any] = ModelCard(made).data.to_dict()
        return found

    on_hub = replace(one, name="owner/name", revision="0" * 40)
    assert data(("source", on_hub), ("tower", on_hub))["base_model"] == ["owner/name"]
    assert "base_model" not in data(("source", one))
    assert "license" not in data(("source", one))

    write(tmp_path / "one", "license: apache-2.0")
    assert data(("source", one))["license"] == "apache-2.0"
    assert "license" not in data(("source", one), ("tower", two)), "nobody knows that of the second"
    write(tmp_path / "two", "license: 'apache-2.0'")
    assert data(("source", one), ("tower", two))["license"] == "apache-2.0"
    write(tmp_path / "two", "license: mit")
    assert "license" not in data(("source", one), ("tower", two))


@pytest.mark.parametrize(
    "line", ["license: other", "license: [mit]", "license: mit\nbase_model: x\u2028y", "license: a: b", "#license: mit", "license: MIT <b>"]
)
def test_a_licence_that_is_no_identifier_is_not_taken(fixtures: Path, tmp_path: Path, line: str) -> None:
    shutil.copytree(fixtures / "B-lora/base-vicuna-tiny", tmp_path / "one")
    source = open_checkpoint(tmp_path / "one")
    write(tmp_path / "one", line)
    made = make_card(replace(make_plan(source), history=(Step("convert", (("source", source.origin),)),)), (), {})
    assert ModelCard(made).data.to_dict().get("license") == ("mit" if "\n" in line else None)


def write(folder: Path, line: str) -> None:
    (folder / "README.md").write_text(f"---\nlanguage: en\n{line}\n---\n# A model\nlicense: gpl-3.0\n", encoding="utf-8")
