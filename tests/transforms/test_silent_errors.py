"""Inputs that once came out wrong without a word: each is right now, or refused with what is the matter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_weights as lw
from llava_weights.checkpoint.added_tokens import without_stale_list
from llava_weights.checkpoint.images import read_pinpoints
from llava_weights.errors import InputError, MismatchError

Tensors = dict[str, torch.Tensor]
HUB, NEXT, ORIGINAL = "C-v1.5/hf-by-tf4.47.1", "D-v1.6/hf-by-tf4.47.1-vicuna", "C-v1.5/original-with-vision-safetensors"
ORIGINAL_NEXT = "D-v1.6/original-vicuna"
TOWER = "common/clip-tiny-42px"


def copied(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def tensors_of(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    for path in sorted(folder.glob("pytorch_model*.bin")):
        found |= torch.load(path)
    return found


def with_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The folder with its weights in one file, changed."""
    tensors = change(tensors_of(folder))
    for path in [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*"), *folder.glob("*.index.json")]:
        path.unlink()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def configured(folder: Path, file: str = "config.json", **keys: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **keys}))
    return folder


def written(checkpoint: lw.Checkpoint, out: Path) -> Tensors:
    lw.execute(lw.make_plan(checkpoint), out)
    return tensors_of(out)


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def failed(folder: Path) -> dict[str, str]:
    return {each.rule: each.text for each in lw.verify(folder).findings if each.verdict == "failed"}


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.base_model.model."])
def test_a_wrapper_s_prefix_is_taken_off_the_whole_checkpoint(fixtures: Path, tmp_path: Path, prefix: str) -> None:
    expected = written(lw.convert(fixtures / ORIGINAL, "llava-hf", tower=fixtures / TOWER), tmp_path / "expected")
    wrapped = with_tensors(copied(fixtures / ORIGINAL, tmp_path / "in"), lambda t: {prefix + name: x for name, x in t.items()})
    found = lw.open_checkpoint(wrapped)
    assert found.layout == "llava"
    assert prefix.split(".")[0] in found.wrapped
    made = lw.convert(found, "llava-hf", tower=fixtures / TOWER)
    assert same(written(made, tmp_path / "out"), expected)
    assert "no program finds a tensor" in failed(wrapped)["structure"]


def test_base_layers_without_an_adapter_are_the_base_s(fixtures: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {name.replace("q_proj.weight", "q_proj.base_layer.weight"): tensor for name, tensor in tensors.items()}

    wrapped = with_tensors(copied(fixtures / ORIGINAL, tmp_path / "in"), change)
    assert lw.open_checkpoint(wrapped).tensors.keys() == lw.open_checkpoint(fixtures / ORIGINAL).tensors.keys()


def test_a_name_with_and_without_its_prefix_is_refused(fixtures: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    twice = with_tensors(copied(fixtures / ORIGINAL, tmp_path / "in"), lambda t: {**t, f"_orig_mod.{name}": t[name] * 2})
    with pytest.raises(InputError, match="with the prefix of a wrapper and without"):
        lw.open_checkpoint(twice)


# --- heads ---------------------------------------------------------------------------------------------------------


def tied(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    return with_tensors(configured(folder, tie_word_embeddings=True), change)


def test_a_tied_pair_may_be_stored_under_either_name(fixtures: Path, tmp_path: Path) -> None:
    embed, head = "model.embed_tokens.weight", "lm_head.weight"

    def stored(*names: str) -> Path:
        def change(tensors: Tensors) -> Tensors:
            return {name: x for name, x in tensors.items() if name not in (embed, head)} | dict.fromkeys(names, tensors[embed])

        return tied(copied(fixtures / ORIGINAL, tmp_path / "-".join(names)), change)

    one, other, both = stored(embed), stored(head), stored(embed, head)
    clip = fixtures / TOWER
    expected = written(lw.convert(one, "llava-hf", tower=clip), tmp_path / "one")
    assert same(written(lw.convert(other, "llava-hf", tower=clip), tmp_path / "other"), expected)
    assert not any(rule.startswith("config/") for rule in failed(other))
    assert "structure" not in failed(both)
    assert "tied-head" not in failed(both)
    assert not lw.convert(both, "llava-hf", tower=clip).history[-1].warnings


def test_a_tied_head_of_its_own_values_is_warned_of(fixtures: Path, tmp_path: Path) -> None:
    made = lw.convert(tied(copied(fixtures / ORIGINAL, tmp_path / "in"), lambda t: t), "llava-hf", tower=fixtures / TOWER)
    assert any("the stored head has values of its own" in text for text in made.history[-1].warnings)


def test_a_missing_head_names_the_flag(fixtures: Path, tmp_path: Path) -> None:
    without = with_tensors(copied(fixtures / ORIGINAL, tmp_path / "in"), lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"})
    with pytest.raises(InputError) as refused:
        lw.convert(configured(without, tie_word_embeddings=False), "llava-hf", tower=fixtures / TOWER)
    assert "`tie_word_embeddings`" in (refused.value.hint or "")


# --- images --------------------------------------------------------------------------------------------------------


def test_a_newline_that_is_in_no_file_is_refused_and_a_fault(fixtures: Path, tmp_path: Path) -> None:
    for source, name in ((NEXT, "image_newline"), (ORIGINAL_NEXT, "model.image_newline")):
        folder = copied(fixtures / source, tmp_path / name)
        with_tensors(folder, lambda tensors, name=name: {n: x for n, x in tensors.items() if n != name})  # type: ignore[misc]
        with pytest.raises(InputError, match="`image_newline` is in no file"):
            lw.convert(folder, "llava-hf")
        assert "image_newline" in failed(folder)["config/newline"]


def test_a_newline_of_another_class_is_refused_and_a_fault(fixtures: Path, tmp_path: Path) -> None:
    folder = configured(copied(fixtures / NEXT, tmp_path / "there"), model_type="llava", architectures=["LlavaForConditionalGeneration"])
    with pytest.raises(InputError, match=r"is not the llava that its config\.json says: `image_newline` is a tensor of llava_next"):
        lw.convert(folder, "llava-hf")
    assert "`image_newline` is a tensor of llava_next" in failed(folder)["config/contradictions"]


def test_a_merge_that_leaves_the_newline_out_is_refused(fixtures: Path, tmp_path: Path) -> None:
    lora = copied(fixtures / "B-lora/llava-v1.5-tiny-lora", tmp_path / "lora")
    configured(lora, image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad", image_grid_pinpoints="[(28, 56)]")
    with pytest.raises(MismatchError, match="`image_newline`"):
        lw.merge_lora(fixtures / "B-lora/base-vicuna-tiny", lora)


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("[[28, 56], [56, 28]]", [[28, 56], [56, 28]]),
        ("[(28, 56), (56, 28)]", [[28, 56], [56, 28]]),
        ("((28, 56),)", [[28, 56]]),
        ("(1x1),...,(2x2)", [[28, 28], [28, 56], [56, 28], [56, 56]]),
        ("__import__('os').system('x')", None),
        ("[28] * 99", None),
        ("[" * 5000, None),
        ("28", None),
        ("[[1, 2]]" + " " * 70000, None),
    ],
)
def test_pinpoints_in_a_text_are_a_list_and_never_evaluated(text: str, pairs: list[list[int]] | None) -> None:
    assert read_pinpoints(text, 28) == pairs


def test_pinpoints_in_a_text_convert_as_the_list_does(fixtures: Path, tmp_path: Path) -> None:
    expected = lw.convert(fixtures / ORIGINAL_NEXT, "llava-hf", tower=fixtures / TOWER).config
    folder = copied(fixtures / ORIGINAL_NEXT, tmp_path / "in")
    given = json.loads((folder / "config.json").read_text())["image_grid_pinpoints"]
    text = str([tuple(pair) for pair in given])
    assert lw.convert(configured(folder, image_grid_pinpoints=text), "llava-hf", tower=fixtures / TOWER).config == expected


def test_an_image_token_of_another_id_than_the_config_s_is_said(fixtures: Path, tmp_path: Path) -> None:
    folder = copied(fixtures / HUB, tmp_path / "in")
    right = lw.convert(folder, "llava-hf")
    assert not any("image_token_index" in text for text in right.history[-1].repairs)
    made = lw.convert(configured(folder, image_token_index=7), "llava-hf")
    assert made.config["image_token_index"] == right.config["image_token_index"]
    assert any("`image_token_index` 7 -> " in text for text in made.history[-1].repairs)


# --- the projector -------------------------------------------------------------------------------------------------


def test_a_projector_without_biases_stays_so_and_gets_zeros_on_the_way_back(fixtures: Path, tmp_path: Path) -> None:
    folder = configured(copied(fixtures / HUB, tmp_path / "in"), multimodal_projector_bias=False)
    with_tensors(folder, lambda t: {name: x for name, x in t.items() if not name.endswith(("linear_1.bias", "linear_2.bias"))})
    kept = written(lw.convert(folder, "llava-hf"), tmp_path / "hub")
    assert kept.keys() == tensors_of(folder).keys()
    assert json.loads((tmp_path / "hub/config.json").read_text())["multimodal_projector_bias"] is False
    back = lw.convert(folder, "llava")
    assert any("zeros are written" in text for text in back.history[-1].notes)
    tensors = written(back, tmp_path / "back")
    assert not tensors["model.mm_projector.0.bias"].any()
    assert not tensors["model.mm_projector.2.bias"].any()
    assert "config/projector" not in failed(folder)
    with pytest.raises(InputError) as refused:
        lw.convert(configured(folder, multimodal_projector_bias=True), "llava-hf")
    assert "`multimodal_projector_bias`" in (refused.value.hint or "")


# --- adapters ------------------------------------------------------------------------------------------------------


def test_a_tuned_tower_sets_its_flag(fixtures: Path, tmp_path: Path) -> None:
    lora = configured(copied(fixtures / "B-lora/llava-v1.5-tiny-lora", tmp_path / "lora"), unfreeze_mm_vision_tower=False)
    beside = torch.load(lora / "non_lora_trainables.bin")
    tower = tensors_of(fixtures / "common/clip-tiny-28px")
    inside = {f"base_model.model.model.vision_tower.vision_tower.{n}": x for n, x in tower.items() if n.startswith("vision_model.")}
    plain = lw.merge_lora(fixtures / "B-lora/base-vicuna-tiny", lora)
    assert plain.config["unfreeze_mm_vision_tower"] is False
    torch.save({**beside, **inside}, lora / "non_lora_trainables.bin")
    merged = lw.merge_lora(fixtures / "B-lora/base-vicuna-tiny", lora)
    assert merged.config["unfreeze_mm_vision_tower"] is True
    assert any("the vision tower was tuned" in text for text in merged.history[-1].repairs)


def vocabulary_adapter(folder: Path, table: torch.Tensor, tokens: dict[str, int] | None, name: str) -> Path:
    """An adapter that replaces the embedding table."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    module = name.removesuffix("embed_tokens.weight") + "layers.0.self_attn.q_proj"
    width = table.shape[1]
    factors = {
        f"base_model.model.{module}.lora_A.weight": torch.rand(1, width),
        f"base_model.model.{module}.lora_B.weight": torch.rand(width, 1),
    }
    save_file({**factors, f"base_model.model.{name}": table}, folder / "adapter_model.safetensors")
    if tokens is not None:
        (folder / "added_tokens.json").write_text(json.dumps(tokens))
    return folder


def test_the_tokenizer_that_explains_the_trained_rows_goes_out(fixtures: Path, tmp_path: Path) -> None:
    base = fixtures / HUB
    name = "language_model.model.embed_tokens.weight"
    table = tensors_of(base)[name]
    rows = table.shape[0]
    known = json.loads((base / "added_tokens.json").read_text())
    new = max(known.values()) + 1
    assert new < rows
    adapter = vocabulary_adapter(tmp_path / "new", table, {**known, "<new>": new}, name)
    merged = lw.merge_lora(base, adapter)
    assert merged.files["added_tokens.json"] == adapter / "added_tokens.json"
    assert any(f"<new> {new}" in text for text in merged.history[-1].repairs)
    same_tokens = lw.merge_lora(base, vocabulary_adapter(tmp_path / "same", table, known, name))
    assert same_tokens.files["added_tokens.json"] == base / "added_tokens.json"
    first = next(iter(known))
    clash = vocabulary_adapter(tmp_path / "clash", table, {"<other>": known[first]}, name)
    with pytest.raises(MismatchError, match="other tokens") as refused:
        lw.merge_lora(base, clash)
    assert "<other>" in str(refused.value)


def test_rows_of_tokens_are_never_cut_off(fixtures: Path, tmp_path: Path) -> None:
    base = fixtures / HUB
    name = "language_model.model.embed_tokens.weight"
    table = tensors_of(base)[name]
    last = max(json.loads((base / "added_tokens.json").read_text()).values())
    with pytest.raises(MismatchError, match="rows in the adapter") as refused:
        lw.merge_lora(base, vocabulary_adapter(tmp_path / "short", table[:last].clone(), None, name))
    assert str(last) in str(refused.value)


# --- tokenizers ----------------------------------------------------------------------------------------------------


def fast(*tokens: str) -> bytes:
    entries = [{"id": 10 + place, "content": token} for place, token in enumerate(tokens)]
    return json.dumps({"model": {"vocab": {f"t{i}": i for i in range(10)}}, "added_tokens": entries}).encode()


@pytest.mark.parametrize(
    ("listed", "stale"),
    [({"<a>": 10}, False), ({"<a>": 10, "<new>": 12}, False), ({"<a>": 11}, True), ({"<other>": 10}, True), ({"t3": 11}, True)],
)
def test_a_stale_list_of_added_tokens_gives_way_to_tokenizer_json(listed: dict[str, int], stale: bool) -> None:
    files = {"tokenizer.json": fast("<a>", "<b>"), "added_tokens.json": json.dumps(listed).encode()}
    kept, notes = without_stale_list(files)
    assert ("added_tokens.json" not in kept) is stale
    assert bool(notes) is stale
    assert "added_tokens.json" in without_stale_list({**files, "tokenizer.model": b""})[0]  # the slow tokenizer's own list


# --- two vocabularies ------------------------------------------------------------------------------------------------

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IM_START_END = "B-lora/llava-v1-tiny-lora-imstartend"


def hub_of_v1(fixtures: Path, folder: Path, tokens: dict[str, int]) -> Path:
    """A llava-hf checkpoint with these added tokens, in rows that it had as padding."""
    copied(fixtures / HUB, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    (folder / "added_tokens.json").write_text(json.dumps(tokens))
    return folder


def trained_tables(fixtures: Path, folder: Path) -> tuple[Path, Tensors]:
    """LLaVA's adapter that trained `<im_patch>` 304, `<im_start>` 305 and `<im_end>` 306, without its LoRA's own layers."""
    copied(fixtures / IM_START_END, folder)
    tensors = torch.load(folder / "non_lora_trainables.bin")
    kept = {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name}
    kept |= {f"base_model.model.model.mm_projector.{name}": torch.ones(shape) for name, shape in PROJECTOR_SHAPES.items()}
    torch.save(kept, folder / "non_lora_trainables.bin")
    return folder, {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


PROJECTOR_SHAPES = {"0.weight": (48, 24), "0.bias": (48,), "2.weight": (48, 48), "2.bias": (48,)}


def test_rows_go_to_their_tokens_in_another_vocabulary(fixtures: Path, tmp_path: Path) -> None:
    """<image> stands where <im_patch> was trained: every trained token is placed by its text, all other rows stay."""
    base = hub_of_v1(fixtures, tmp_path / "base", {"<image>": 304, "<pad>": 305, "<im_end>": 306, "<im_patch>": 307, "<im_start>": 308})
    lora, trained = trained_tables(fixtures, tmp_path / "lora")
    before = tensors_of(base)
    checkpoint = lw.merge_lora(base, lora)
    assert any("<im_patch> 304 at 307" in note for note in checkpoint.history[-1].notes)
    after = written(checkpoint, tmp_path / "out")
    for name, own in (("language_model.model.embed_tokens.weight", EMBED), ("language_model.lm_head.weight", HEAD)):
        expected = before[name].clone()
        expected[:304] = trained[own][:304]
        expected[307], expected[308], expected[306] = trained[own][304], trained[own][305], trained[own][306]
        assert torch.equal(after[name], expected)
    assert json.loads((tmp_path / "out/added_tokens.json").read_text())["<image>"] == 304


def test_a_token_that_the_base_lacks_is_refused_with_the_order_that_works(fixtures: Path, tmp_path: Path) -> None:
    lora, _ = trained_tables(fixtures, tmp_path / "lora")
    with pytest.raises(MismatchError, match="other tokens") as refused:
        lw.merge_lora(fixtures / HUB, lora)
    assert "<im_patch> 304" in str(refused.value)
    assert "merge-lora --base ORIGINAL --lora ADAPTER --to llava-hf" in (refused.value.hint or "")
    assert refused.value.exit_code == 3


def test_rows_that_no_file_names_are_refused(fixtures: Path, tmp_path: Path) -> None:
    lora, _ = trained_tables(fixtures, tmp_path / "lora")
    configured(lora, mm_use_im_patch_token=False)
    with pytest.raises(MismatchError, match="no file says of which tokens"):
        lw.merge_lora(fixtures / HUB, lora)


def test_the_two_last_rows_of_a_projector_s_file_are_those_of_their_tokens(fixtures: Path, tmp_path: Path) -> None:
    """Not of the padding that stands last in a table of llava-hf."""
    base = hub_of_v1(fixtures, tmp_path / "base", {"<im_patch>": 304, "<im_start>": 305, "<im_end>": 306})
    (tmp_path / "projector").mkdir()
    rows = torch.rand(2, 48).half()
    tensors = {f"model.mm_projector.{name}": torch.ones(shape).half() for name, shape in PROJECTOR_SHAPES.items()}
    torch.save({**tensors, "model.embed_tokens.weight": rows}, tmp_path / "projector/mm_projector.bin")
    before, after = tensors_of(base), written(lw.merge_lora(base, tmp_path / "projector"), tmp_path / "out")
    name = "language_model.model.embed_tokens.weight"
    assert torch.equal(after[name][305:307], rows)
    assert torch.equal(after[name][307:], before[name][307:])


def test_one_shorter_table_keeps_the_base_s_rows_behind_it(fixtures: Path, tmp_path: Path) -> None:
    base, name = fixtures / HUB, "language_model.model.embed_tokens.weight"
    table = tensors_of(base)[name]
    adapter = vocabulary_adapter(tmp_path / "lora", table[:306] * 2, None, name)
    after = written(lw.merge_lora(base, adapter), tmp_path / "out")
    assert torch.equal(after[name], torch.cat([table[:306] * 2, table[306:]]))
    assert after["language_model.lm_head.weight"].shape == table.shape


def test_trained_rows_are_placed_by_their_tokens(fixtures: Path, tmp_path: Path) -> None:
    """`trainable_token_indices` of PEFT, with the adapter's own tokenizer beside it."""
    base = hub_of_v1(fixtures, tmp_path / "base", {"<image>": 304, "<pad>": 305, "<im_start>": 306})
    lora = tmp_path / "lora"
    lora.mkdir()
    values = torch.rand(2, 48)
    save_file({"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": values}, lora / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "trainable_token_indices": {"embed_tokens": [304, 7]}}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    (lora / "added_tokens.json").write_text(json.dumps({"<im_start>": 304}))
    name = "language_model.model.embed_tokens.weight"
    before, after = tensors_of(base), written(lw.merge_lora(base, lora), tmp_path / "out")
    changed = (before[name] != after[name]).any(1).nonzero().flatten().tolist()
    assert changed == [7, 306]
    assert torch.equal(after[name][306], values[0].half())
