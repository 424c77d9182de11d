"""Which prompt: what config and tokens can't tell is said in the plan, by `verify` and `inspect`, until config.json records `conv_mode`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llava_weights as lw
from llava_weights.cli.toy import make_llava
from llava_weights.families.originals import ORIGINALS
from llava_weights.families.prompts import CONVERSATIONS

Toy = Callable[..., Path]


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """A toy of the first family of a name, in the original layout, its config changed."""

    def make(name: str, **config: Any) -> Path:
        make_llava(tmp_path, next(row for row in ORIGINALS if row.name == name))
        return changed(tmp_path / "llava", **config)

    return make


def changed(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def write(checkpoint: lw.Checkpoint, folder: Path) -> Path:
    lw.execute(lw.make_plan(checkpoint), folder)
    return folder


def doubts(folder: Path) -> list[str]:
    found = [each for each in lw.verify(folder).findings if each.rule == "config/prompt"]
    assert {each.verdict for each in found} <= {"warning"}
    return [each.text for each in found]


def ends(folder: Path) -> Any:
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


POSSIBLE = {
    "BakLLaVA-1": ("vicuna_v1", "mistral_instruct"),
    "LLaVA on Llama 2 chat": ("llava_llama_2", "llava_v1"),
    "xtuner on Llama 3": ("llama3_chat", "llama3", "llama_3"),
    "LLaVA++ on Llama 3": ("llama3", "llama3_chat", "llama_3"),
    "xtuner on Phi-3": ("phi3_chat", "phi3_instruct"),
}


@pytest.mark.parametrize(("name", "possible"), POSSIBLE.items(), ids=lambda part: part if isinstance(part, str) else "")
def test_what_was_possible_is_said_until_it_is_settled(toy: Toy, tmp_path: Path, name: str, possible: tuple[str, ...]) -> None:
    source = toy(name)
    made = lw.convert(source, "llava-hf")
    (note,) = [text for text in made.history[-1].notes if "prompt not certain" in text]
    assert f"`{possible[0]}` is taken, since " in note
    assert all(f"`{mode}`" in note for mode in possible)
    assert all(f"`{mode}`" in lw.inspect(source).prompt for mode in possible)
    hub = write(made, tmp_path / "hub")
    assert "conv_mode" not in made.config
    for folder in (source, hub):
        (text,) = doubts(folder)
        assert text.startswith("prompt not certain")
        assert all(f"`{mode}`" in text for mode in (possible if folder == source else possible[:1]))
    assert lw.verify(hub).exit_code == lw.verify(hub, strict=True, allow=["config/prompt"]).exit_code == 0
    assert lw.verify(hub, strict=True).exit_code == 4
    assert "prompt not certain" in (hub / "README.md").read_text()
    for mode in possible:
        settled = write(lw.convert(source, "llava-hf", conv_mode=mode), tmp_path / f"hub-{mode}")
        back = write(lw.convert(settled, "llava"), tmp_path / f"back-{mode}")
        assert [json.loads((folder / "config.json").read_text())["conv_mode"] for folder in (settled, back)] == [mode, mode]
        assert doubts(settled) == doubts(back) == []
        assert lw.inspect(back).prompt.startswith(f"{mode}, ")
        again = lw.convert(back, "llava-hf", tower=tmp_path / "tower")
        assert again.files["chat_template.jinja"] == (settled / "chat_template.jinja").read_bytes()
        assert "conv_mode" in again.config


def test_the_original_layout_records_it_too(toy: Toy, tmp_path: Path) -> None:
    there = write(lw.convert(toy("BakLLaVA-1"), "llava", conv_mode="vicuna_v1"), tmp_path / "there")
    assert (lw.open_checkpoint(there).config["conv_mode"], doubts(there)) == ("vicuna_v1", [])


@pytest.mark.parametrize(
    "name", ["LLaVA v1.5 and v1.6", "LLaVA v1.5 and v1.6, images in tiles", "LLaVA v1.6 34B, images in tiles", "LLaVA-OneVision"]
)
def test_what_is_certain_is_not_doubted_and_not_recorded(toy: Toy, tmp_path: Path, name: str) -> None:
    hub = write(lw.convert(source := toy(name), "llava-hf"), tmp_path / "hub")
    assert doubts(source) == doubts(hub) == []
    assert "conv_mode" not in lw.open_checkpoint(hub).config


@pytest.mark.parametrize("name", ["LLaVA v0", "LLaVA v1 with marked images", "Bunny on llama", "Bunny on qwen2"])
def test_what_only_the_original_tells_is_recorded(toy: Toy, tmp_path: Path, name: str) -> None:
    hub = write(lw.convert(source := toy(name), "llava-hf"), tmp_path / "hub")
    mode = next(row.prompt for row in ORIGINALS if row.name == name)
    assert doubts(source) == doubts(hub) == []
    assert lw.open_checkpoint(hub).config["conv_mode"] == lw.convert(hub, "llava").config["conv_mode"] == mode


def test_mistral_without_a_window_is_certain(toy: Toy) -> None:
    """LLaVA-Med v1.5 stands on Mistral 0.2."""
    assert doubts(toy("BakLLaVA-1", sliding_window=None)) == []


def test_a_template_of_others_is_kept_and_judged_by_its_turns(toy: Toy, tmp_path: Path) -> None:
    hub = write(lw.convert(toy("BakLLaVA-1"), "llava-hf"), tmp_path / "hub")
    for template, wrong in {
        "{{ 'USER: <image>' }}{{ 'ASSISTANT:' }}": False,
        "{{ '[INST] <image>' }}": False,
        "{{ 'Q: <image>' }}": False,
        "{{ '<|im_start|>user <image>' }}": True,
    }.items():
        (hub / "chat_template.jinja").write_text(template)
        (hub / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        assert bool(doubts(hub)) == wrong
        assert lw.convert(hub, "llava-hf").files["chat_template.jinja"] == template.encode()
        assert lw.inspect(hub).prompt == "its own chat template"
    changed(hub, conv_mode="vicuna_v1")
    assert "`conv_mode` is vicuna_v1" in doubts(hub)[0]
    (hub / "chat_template.jinja").unlink()
    (hub / "chat_template.json").unlink()
    assert doubts(hub) == []
    assert lw.convert(hub, "llava-hf").history[-1].options["conv_mode"] == "vicuna_v1"  # which config.json records


def test_a_recorded_prompt_that_the_template_does_not_write(toy: Toy, tmp_path: Path) -> None:
    hub = write(lw.convert(toy("BakLLaVA-1"), "llava-hf", conv_mode="vicuna_v1"), tmp_path / "hub")
    assert doubts(changed(hub, conv_mode="llava_v1")) == [
        "`conv_mode` is llava_v1 in config.json, but the chat template is that of `vicuna_v1`"
    ]
    assert "conv_mode" in " ".join(each.text for each in lw.verify(changed(hub, conv_mode="nobody")).findings if each.verdict == "failed")


def test_an_answer_ends_where_its_prompt_does(toy: Toy, tmp_path: Path) -> None:
    """The token that ends a turn is among the ends of generation, beside the tokenizer's own."""
    source = toy("xtuner on Phi-3")
    end = json.loads((source / "added_tokens.json").read_text())["<|end|>"]
    assert ends(write(lw.convert(source, "llava-hf"), tmp_path / "phi")) == [2, end]
    assert ends(write(lw.convert(source, "llava-hf", conv_mode="vicuna_v1"), tmp_path / "v1")) == 2
    assert CONVERSATIONS["phi3_chat"].stop == "<|end|>"
