"""Every row of the tables, and a made-up one: a toy of each family, made from its row alone, is converted, verified and run."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from jinja2.sandbox import ImmutableSandboxedEnvironment

import llava_weights as lw
from llava_weights.checkpoint.chat_template import QUESTION, choose, example
from llava_weights.checkpoint.config import decoder_of, known_decoder
from llava_weights.cli.toy import make_llava
from llava_weights.families import originals
from llava_weights.families.decoders import DECODERS, size_name
from llava_weights.families.originals import ORIGINALS, Original, fitting, of_tokens
from llava_weights.families.prompts import CONVERSATIONS
from llava_weights.families.shapes import length
from llava_weights.families.targets import TARGET_BY_TYPE as TARGETS
from llava_weights.families.targets import TARGET_DEFAULTS
from llava_weights.families.towers import TOWER_BY_KIND, TOWERS

ROWS = [(row, decoder, tower) for row in ORIGINALS for decoder, tower in product(row.decoders, row.towers)]
KNOWN = {row.model_type: row for row in DECODERS}
CONTRIBUTING = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


def write(checkpoint: lw.Checkpoint, folder: Path) -> Path:
    lw.execute(lw.make_plan(checkpoint), folder)
    return folder


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def through_the_house(folder: Path, row: Original, decoder: str, tower: str) -> None:
    """There and back, the rules clean, the forward pass equal, the prompt rendered."""
    make_llava(folder, row, decoder=decoder, tower=tower)
    target = TARGETS[row.target]
    loss = target.video.loss if target.video else ""
    there = write(lw.convert(folder / "llava", "llava-hf", lossy=bool(loss)), folder / "hf")
    config = read(there, "config.json")
    assert (config["model_type"], config["architectures"]) == (target.model_type, [target.architecture])
    assert (config["text_config"]["model_type"], config["vision_config"]["model_type"]) == (decoder, TOWER_BY_KIND[tower].model_type)
    assert read(there, "processor_config.json")["processor_class"] == target.processor
    checked = lw.verify(there)
    again = lw.convert(there, "llava-hf")
    assert dict(again.config) == config
    assert set(again.tensors) == set(lw.open_checkpoint(there).tensors)
    said = [finding for finding in checked.findings if finding.verdict in ("failed", "warning")]
    unsure = [finding for finding in said if "prompt not certain" in finding.text]
    assert len(unsure) == bool(row.rivals)
    said = [finding for finding in said if finding not in unsure]
    assert [finding for finding in said if finding.rule != "recorded"] == []
    warned = row.warning or loss
    assert [warned in finding.text for finding in said] == [True] * bool(warned)
    if row.rivals:  # what the config can't tell, the user can
        settled = write(lw.convert(folder / "llava", "llava-hf", conv_mode=row.prompt), folder / "settled")
        assert read(settled, "config.json")["conv_mode"] == lw.convert(settled, "llava").config["conv_mode"] == row.prompt
        assert not [finding for finding in lw.verify(settled).findings if "prompt not certain" in finding.text]
    assert config.get("conv_mode", row.prompt) == row.prompt
    if KNOWN[decoder].runs:
        assert lw.smoke_test(there, original=folder / "llava").exit_code == 0
    loads_and_computes(there)
    template = ImmutableSandboxedEnvironment().from_string((there / "chat_template.jinja").read_text(encoding="utf-8"))
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    assert template.render(messages=asked, add_generation_prompt=True) == example(CONVERSATIONS[row.prompt], image_text(folder, there))
    if loss:  # nothing can make again what is lost
        with pytest.raises(lw.InputError, match="can't go back to the original layout"):
            lw.convert(there, "llava")
        return
    back = lw.convert(there, "llava")
    assert lw.diff(folder / "llava", write(back, folder / "back")).equal
    kept = ("model_type", "architectures", "mm_projector_type", "mm_vision_select_layer")
    source = read(folder / "llava", "config.json")
    assert [back.config[key] for key in kept] == [source[key] for key in kept]


def loads_and_computes(folder: Path) -> None:
    """transformers finds every tensor in a place, and none too many."""
    config = read(folder, "config.json")
    built, told = getattr(transformers, config["architectures"][0]).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert built(input_ids=torch.tensor([[5, 9, 7]])).logits.isfinite().all()


def image_text(folder: Path, there: Path) -> str:
    token = str(read(there, "processor_config.json")["image_token"])
    marked = read(folder / "llava", "config.json").get("mm_use_im_start_end")
    return f"<im_start>{token}<im_end>" if marked else token


@pytest.mark.parametrize("row", ORIGINALS, ids=lambda row: row.name)
def test_a_toy_of_each_family_goes_there_and_back(tmp_path: Path, row: Original) -> None:
    through_the_house(tmp_path, row, row.decoders[0], row.towers[0])


@pytest.mark.parametrize("decoder", KNOWN)
def test_a_toy_on_each_decoder_goes_there_and_back(tmp_path: Path, decoder: str) -> None:
    row = next(row for row in ORIGINALS if decoder in row.decoders)
    through_the_house(tmp_path, row, decoder, row.towers[0])


@pytest.mark.parametrize(("row", "decoder", "tower"), ROWS, ids=lambda part: getattr(part, "name", part))
def test_each_row_is_reached(tmp_path: Path, row: Original, decoder: str, tower: str) -> None:
    """No earlier row fits what a row describes, on any of its decoders and towers."""
    make_llava(tmp_path, row, decoder=decoder, tower=tower)
    config = read(tmp_path / "llava", "config.json")
    assert decoder_of(config).model_type == decoder
    target = TARGETS[row.target]
    rows = tuple(fitting(config, decoder=decoder, tower=tower, newline=target.tiles, norm=target.layernorm, videos=target.two_towers))
    assert of_tokens(rows, {row.token}) == row
    assert {each.target for each in rows} == {row.target}
    choice = choose(config, {row.token}, rows)
    assert (choice.conversation.name, set(choice.rivals)) == (row.prompt, set(row.rivals) - {row.prompt})


def test_what_a_class_does_not_read_is_no_difference(tmp_path: Path) -> None:
    """The pooling head of a SigLIP, and the newline of a model that takes whole images, lie in published checkpoints."""
    row = next(row for row in ORIGINALS if row.name == "LLaVA on Qwen, SigLIP")
    make_llava(tmp_path, row)
    weights = torch.load(tmp_path / "llava" / "pytorch_model.bin", weights_only=True)
    weights |= {
        "model.image_newline": weights["model.norm.weight"],
        "model.vision_tower.vision_tower.vision_model.head.probe": torch.ones(1),
    }
    torch.save(weights, tmp_path / "llava" / "pytorch_model.bin")
    made = write(lw.convert(tmp_path / "llava", "llava-hf"), tmp_path / "made")
    found = lw.verify(made, against=tmp_path / "llava", deep=True)
    assert not [each.text for each in found.findings if each.verdict == "failed"]
    assert "2 tensors of `llava` that the class of a conversion does not read" in "\n".join(each.text for each in found.findings)
    torch.save({**weights, "model.image_newline.extra": torch.ones(1)}, tmp_path / "llava" / "pytorch_model.bin")
    assert lw.verify(made, against=tmp_path / "llava", deep=True).exit_code == 4


def test_a_new_family_takes_one_row_and_contributing_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of a made-up family that "Add a family" shows, and no other change."""
    text = CONTRIBUTING.read_text(encoding="utf-8")
    (row,) = re.findall(r"```python\n(.*?)```", text.partition("## Add a family")[2].partition("\n## ")[0], re.DOTALL)
    family = eval(textwrap.dedent(row), {"Original": Original})
    monkeypatch.setattr(originals, "ORIGINALS", (family, *ORIGINALS))
    through_the_house(tmp_path, family, family.decoders[0], family.towers[0])


def test_names_of_the_rows_lead_to_rows() -> None:
    for row in ORIGINALS:
        assert row.target in TARGETS
        assert {row.prompt, *row.rivals} <= CONVERSATIONS.keys()
        assert set(row.towers) <= TOWER_BY_KIND.keys()
        assert set(row.decoders) <= {decoder.model_type for decoder in DECODERS}


UNKNOWN: tuple[dict[str, Any], ...] = (
    {}, {"model_type": ["?"]}, {"model_type": "cohere"}, {"model_type": "llava_cohere"}, {"architectures": ["LISAForCausalLM"]},
    {"model_type": "llava", "architectures": ["LlavaPhiForCausalLM"]},
)  # fmt: skip


@pytest.mark.parametrize("config", UNKNOWN)
def test_what_no_row_describes_is_refused_by_its_name(config: dict[str, Any]) -> None:
    with pytest.raises(lw.InputError) as refused:
        decoder_of(config)
    names = [name for name in (config.get("model_type"), *config.get("architectures", [])) if isinstance(name, str)]
    assert any(name in str(refused.value) for name in names or ["`model_type` is missing"])
    assert known_decoder(config) is None


@pytest.mark.parametrize("row", DECODERS, ids=lambda row: row.model_type)
def test_defaults_of_decoders_are_those_of_their_classes(row: Any) -> None:
    library = getattr(transformers, row.config_class)()
    assert library.model_type == row.model_type
    assert hasattr(transformers, row.architecture)
    values = {**library.to_dict(), **(getattr(library, "rope_parameters", None) or {})}
    defaults = {key: value for key, value in row.defaults.items() if key in values and key not in ("use_cache", "rope_scaling")}
    assert len(defaults) > 12
    for key, value in defaults.items():
        computed = None if key not in row.computed else length(row.computed[key], {**row.defaults, "head_dim": 1})
        assert values[key] in (value, computed), key


def as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_defaults_of_towers_and_targets_are_those_of_their_classes() -> None:
    for tower in TOWERS:
        library = getattr(transformers, tower.config_class)().to_dict()
        assert library["model_type"] == tower.model_type
        assert {
            key: library[key] for key in tower.defaults if key in library and key != "vision_use_head"
        }.items() <= tower.defaults.items()
        assert hasattr(transformers, tower.model_class)
    for target in TARGETS.values():
        found = getattr(transformers, target.config_class)()
        assert found.model_type == target.model_type
        same = ("projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy", "multimodal_projector_bias")
        here = [key for key in same if key not in target.lacks]
        assert {key: as_list(getattr(found, key)) for key in here} == {key: target.defaults[key] for key in here}
        own = [key for key in target.defaults if key not in TARGET_DEFAULTS or target.defaults[key] != TARGET_DEFAULTS[key]]
        assert {key: as_list(getattr(found, key)) for key in own} == {key: target.defaults[key] for key in own}
        assert all(not hasattr(found, key) for key in target.lacks)
        assert getattr(found, "image_grid_pinpoints", []) == [list(pair) for pair in target.pinpoints]
        assert hasattr(transformers, target.architecture)


def test_a_size_is_that_of_a_llama_alone() -> None:
    assert size_name(8192, 80, 22016) == "65B"
    assert size_name(8192, 80, 28672) == "80 layers of 8192"  # Qwen1.5-72B and Llama 2 70B


def test_a_row_that_asks_for_more_stands_first() -> None:
    bare = replace(ORIGINALS[0], token="", says={}, has=())
    assert of_tokens((bare, *ORIGINALS), ()) == bare
