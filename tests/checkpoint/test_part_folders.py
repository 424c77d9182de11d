"""LLaVAs in the folders that xtuner writes: against the same model in the original layout, and PEFT's own merges of their adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file

import llava_weights as lw
from llava_weights.cli.toy import make_llava
from llava_weights.errors import InputError, UsageError
from llava_weights.families.decoders import DECODER_BY_TYPE
from llava_weights.families.originals import ORIGINALS
from llava_weights.families.xtuner import TELLING
from llava_weights.storage.hub import choose_files

Tensors = dict[str, torch.Tensor]
ROWS = {row.name.rpartition(" ")[2]: row for row in ORIGINALS if row.name.startswith("xtuner's folders")}
TOWER, PROJECTOR = "model.vision_tower.vision_tower.vision_model.", "model.mm_projector."
RANK, ALPHA = 4, 8


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write(path: Path, tensors: Tensors) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, {"format": "pt"})


def part(tensors: Tensors, prefix: str, name: str = "") -> Tensors:
    return {name + key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def toy(folder: Path, kind: str = "3", *, decoder: str = "", tower: str = "clip", llm: str = "llm") -> tuple[Path, Path]:
    """(The folders of a toy of this row, its text model in `llm` or, with "", beside them; the same in the original layout.)"""
    make_llava(folder, ROWS[kind], decoder=decoder, tower=tower)
    whole, out = folder / "llava", folder / "xtuner"
    tensors = {name: value for name, value in torch.load(whole / "pytorch_model.bin").items()}
    eye = torch.load(folder / "tower/pytorch_model.bin")  # whole, where the original layout leaves a SigLIP's last layer away
    config = json.loads((whole / "config.json").read_text())
    text = {key: value for key, value in config.items() if not key.startswith(("mm_", "image_", "use_mm", "tune_", "freeze", "unfreeze"))}
    row = DECODER_BY_TYPE[decoder or ROWS[kind].decoders[0]]
    text = {**text, "model_type": row.model_type, "architectures": [row.architecture]}
    text.pop("trained_with")
    write(out / llm / "model.safetensors", {k: v for k, v in tensors.items() if not k.startswith((TOWER, PROJECTOR))})
    write_json(out / llm / "config.json", text)
    for path in whole.iterdir():
        if path.suffix != ".bin" and path.name != "config.json":
            shutil.copy(path, out / llm)
    write(out / "projector/model.safetensors", part(tensors, PROJECTOR, "model."))
    shape = {"llm_hidden_size": 64, "visual_hidden_size": 32, "depth": 2, "hidden_act": "gelu", "bias": True}
    write_json(out / "projector/config.json", {"architectures": ["ProjectorModel"], "model_type": "projector", **shape})
    write(out / "visual_encoder/model.safetensors", eye)
    write_json(out / "visual_encoder/config.json", json.loads((folder / "tower/config.json").read_text())["vision_config"])
    shutil.copy(folder / "tower/preprocessor_config.json", out / "visual_encoder")
    return out, whole


def written(checkpoint: lw.Checkpoint, out: Path) -> tuple[Tensors, dict[str, Any]]:
    lw.execute(lw.make_plan(checkpoint), out)
    tensors: Tensors = {}
    for path in out.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors, json.loads((out / "config.json").read_text())


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def low_rank(folder: Path, modules: dict[str, tuple[int, int]], base: str = "") -> dict[str, torch.Tensor]:
    """Write an adapter of these modules; returns what it adds to each, in float32."""
    generator = torch.Generator().manual_seed(5)
    factors: Tensors = {}
    added = {}
    for name, (out, wide) in modules.items():
        a, b = torch.randn(RANK, wide, generator=generator) / 9, torch.randn(out, RANK, generator=generator) / 9
        factors |= {f"base_model.model.{name}.lora_A.weight": a.half(), f"base_model.model.{name}.lora_B.weight": b.half()}
        added[name] = (b.half().float() @ a.half().float()) * (ALPHA / RANK)
    write(folder / "adapter_model.safetensors", factors)
    targets = sorted({name.rpartition(".")[2] for name in modules})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "base_model_name_or_path": base}
    write_json(folder / "adapter_config.json", settings)
    return added


TEXT_MODULES = {f"model.layers.{number}.self_attn.o_proj": (64, 64) for number in range(2)}
EYE_MODULES = {f"vision_model.encoder.layers.{number}.mlp.fc1": (64, 32) for number in range(3)}


# --- the same model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("llm", ["llm", ""])
@pytest.mark.parametrize(
    ("kind", "decoder", "tower"),
    [
        ("3", "llama", "clip"),
        ("Phi-3", "phi3", "clip"),
        ("Phi-3", "phi3", "siglip"),
        ("Qwen", "qwen2", "siglip"),
        ("decoder", "mistral", "clip"),
    ],
)
def test_both_layouts_are_those_of_the_model_in_one_piece(tmp_path: Path, kind: str, decoder: str, tower: str, llm: str) -> None:
    folders, whole = toy(tmp_path, kind, decoder=decoder, tower=tower, llm=llm)
    found = lw.open_checkpoint(folders)
    assert found.layout == "llava"
    for to in ("llava-hf", "llava"):
        tensors, config = written(lw.convert(found, to), tmp_path / f"out-{to}")
        expected, reference = written(lw.convert(whole, to, tower=tmp_path / "tower"), tmp_path / f"expected-{to}")
        if tower == "siglip":  # whole in its folder, one layer short in the original layout
            assert expected.keys() < tensors.keys()
            tensors = {name: value for name, value in tensors.items() if name in expected}
        assert same(tensors, expected)
        if to == "llava-hf":
            assert config["vision_feature_layer"] == -2
            assert config["vision_feature_select_strategy"] == ("full" if tower == "siglip" else "default")
            assert config["vision_config"]["num_hidden_layers"] == 3
            assert config["text_config"] == reference["text_config"]
            assert config["text_config"]["model_type"] == decoder
        else:
            assert {key: config[key] for key in reference if key != "mm_vision_tower"} == {
                key: value for key, value in reference.items() if key != "mm_vision_tower"
            }
    assert not [each for each in lw.verify(tmp_path / "out-llava-hf", deep=True).findings if each.verdict == "failed"]


def test_it_runs_as_the_parts_do_and_comes_back(tmp_path: Path) -> None:
    folders, _ = toy(tmp_path, "Phi-3", decoder="phi3", tower="siglip")
    hub = tmp_path / "hub"
    _, config = written(lw.convert(folders, "llava-hf", dtype="F32"), hub)
    import transformers

    model = transformers.LlavaForConditionalGeneration.from_pretrained(hub, dtype=torch.float32, attn_implementation="eager")
    eye = transformers.SiglipVisionModel.from_pretrained(folders / "visual_encoder", dtype=torch.float32, attn_implementation="eager")
    llm = transformers.Phi3ForCausalLM.from_pretrained(folders / "llm", dtype=torch.float32, attn_implementation="eager")
    layers = load_file(folders / "projector/model.safetensors")
    pixels, image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1)), config["image_token_index"]
    ids = torch.tensor([[1, 20, 30, *[image] * 4, 40, 50]])
    with torch.inference_mode():
        features = eye(pixels, output_hidden_states=True).hidden_states[-2]
        inner = torch.nn.functional.gelu(
            torch.nn.functional.linear(features, layers["model.0.weight"].float(), layers["model.0.bias"].float())
        )
        embeds = llm.get_input_embeddings()(ids.clamp(max=llm.config.vocab_size - 1))
        embeds[0, 3:7] = torch.nn.functional.linear(inner, layers["model.2.weight"].float(), layers["model.2.bias"].float())
        expected = llm(inputs_embeds=embeds).logits
        found = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=0, atol=5e-5)
    again, _ = written(lw.convert(hub, "llava"), tmp_path / "again")
    assert same(again, written(lw.convert(folders, "llava", dtype="F32"), tmp_path / "straight")[0])


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_are_merged_with_the_bits_of_merge_lora(tmp_path: Path) -> None:
    folders, _ = toy(tmp_path, "3")
    plain, _ = written(lw.convert(folders, "llava"), tmp_path / "plain")
    low_rank(folders / "llm_adapter", TEXT_MODULES)
    added = low_rank(folders / "visual_encoder_adapter", EYE_MODULES)
    merged = lw.merge_lora(folders / "llm", folders / "llm_adapter")
    eye = lw.merge_lora(folders / "visual_encoder", folders / "visual_encoder_adapter")
    expected = {**plain, **written(merged, tmp_path / "text")[0], **part(written(eye, tmp_path / "eye")[0], "vision_model.", TOWER)}
    tensors, config = written(lw.convert(folders, "llava"), tmp_path / "out")
    assert same(tensors, expected)
    assert config["unfreeze_mm_vision_tower"] is True
    for name in TEXT_MODULES:
        assert not torch.equal(tensors[f"{name}.weight"], plain[f"{name}.weight"])
    for name, update in added.items():
        before = plain[TOWER + name.removeprefix("vision_model.") + ".weight"]
        assert torch.equal(tensors[TOWER + name.removeprefix("vision_model.") + ".weight"], (before.float() + update).half())
    hub, _ = written(lw.convert(folders, "llava-hf"), tmp_path / "hub")
    stepwise, _ = written(lw.convert(tmp_path / "out", "llava-hf", tower=folders / "visual_encoder"), tmp_path / "stepwise")
    assert same(hub, stepwise)
    assert "adapters to be merged" in lw.inspect(folders).what


def test_an_adapter_changes_the_tower_that_is_given(tmp_path: Path) -> None:
    folders, _ = toy(tmp_path, "3")
    low_rank(folders / "visual_encoder_adapter", EYE_MODULES, base="openai/clip-vit-large-patch14-336")
    inside, _ = written(lw.convert(folders, "llava-hf"), tmp_path / "inside")
    shutil.move(folders / "visual_encoder", tmp_path / "eye")
    with pytest.raises(InputError, match="no vision tower, but an adapter of one") as refused:
        lw.convert(folders, "llava-hf")
    assert "openai/clip-vit-large-patch14-336" in (refused.value.hint or "")
    made = lw.convert(folders, "llava-hf", tower=tmp_path / "eye")
    assert same(written(made, tmp_path / "given")[0], inside)
    assert [[role for role, _ in step.inputs] for step in made.history] == [["source", "tower", "lora"], ["tower"]]
    low_rank(folders / "llm_adapter", TEXT_MODULES, base="lmsys/vicuna-7b-v1.5")
    first, second, _ = lw.convert(folders, "llava-hf", tower=tmp_path / "eye").history
    assert [role for role, _ in first.inputs] == ["base", "lora"]
    assert [role for role, _ in second.inputs] == ["tower", "lora"]
    assert not first.warnings
    assert not any("the base given is" in text for text in first.notes)


def test_another_adapter_comes_behind_its_own(tmp_path: Path) -> None:
    folders, _ = toy(tmp_path, "3")
    low_rank(folders / "llm_adapter", TEXT_MODULES)
    low_rank(tmp_path / "mine", {"model.layers.0.mlp.up_proj": (96, 64)})
    merged = lw.convert(lw.merge_lora(folders, tmp_path / "mine"), "llava-hf")
    first = written(lw.convert(folders, "llava"), tmp_path / "first")[0]
    second = written(lw.merge_lora(tmp_path / "first", tmp_path / "mine"), tmp_path / "second")[0]
    assert not same(first, second)
    hub = written(merged, tmp_path / "hub")[0]
    assert same(hub, written(lw.convert(tmp_path / "second", "llava-hf", tower=folders / "visual_encoder"), tmp_path / "stepwise")[0])


def test_nothing_else_takes_it_before_its_adapters_are_merged(tmp_path: Path) -> None:
    folders, _ = toy(tmp_path, "3")
    low_rank(folders / "llm_adapter", TEXT_MODULES)
    checkpoint = lw.open_checkpoint(folders)
    for act in (lambda: lw.make_plan(checkpoint), lambda: lw.diff(folders, folders), lambda: lw.apply_delta(checkpoint, checkpoint)):
        with pytest.raises(InputError, match="still to be merged: `llm_adapter`"):
            act()


def test_every_check_reads_it_as_it_lies(tmp_path: Path) -> None:
    folders, _ = toy(tmp_path, "decoder", decoder="mistral")
    assert [each.text for each in lw.verify(folders).findings if each.verdict == "failed"] == []
    hub = tmp_path / "hub"
    written(lw.convert(folders, "llava-hf"), hub)
    assert lw.smoke_test(hub, original=folders).exit_code == 0
    written(lw.convert(folders, "llava", tower_name="owner/tower"), tmp_path / "out")
    assert lw.diff(folders, tmp_path / "out").equal
    assert lw.verify(hub, against=folders).exit_code == 0
    wrong = [each.text for each in lw.verify(tmp_path / "out", against=folders).findings if each.verdict == "failed"]
    assert all(text.startswith("`pad_token_id`") for text in wrong)  # which the text model's config leaves out
    lw.checksum(folders)
    assert lw.verify(folders, deep=True).exit_code == 0
    layers = load_file(folders / "projector/model.safetensors")
    write(folders / "projector/model.safetensors", {name: value + 1 for name, value in layers.items()})
    assert any("projector/model.safetensors" in each.text for each in lw.verify(folders, deep=True).findings if each.verdict == "failed")
    low_rank(folders / "llm_adapter", TEXT_MODULES)
    assert any("`llm_adapter`" in each.text for each in lw.verify(folders).findings if each.verdict != "ok")


# --- what is missing, or of no use ------------------------------------------------------------------------------------


def test_a_missing_part_is_named(tmp_path: Path, cli: Any) -> None:
    folders, _ = toy(tmp_path, "3")
    low_rank(folders / "llm_adapter", TEXT_MODULES, base="lmsys/vicuna-7b-v1.5")
    for name, told in (("llm", "without its text model"), ("projector", "without its projector")):
        shutil.move(folders / name, tmp_path / "away")
        with pytest.raises(InputError, match=told) as refused:
            lw.convert(folders, "llava-hf")
        assert f"`{name}`" in (refused.value.hint or "")
        assert ("lmsys/vicuna-7b-v1.5" in (refused.value.hint or "")) == (name == "llm")
        assert told in lw.inspect(folders).what
        done = cli("convert", folders, "-o", tmp_path / "out")
        assert done.code == 3
        assert told in done.stderr
        assert not (tmp_path / "out").exists()
        shutil.move(tmp_path / "away", folders / name)
    shutil.rmtree(folders / "visual_encoder")
    with pytest.raises(InputError, match="holds no vision tower"):
        lw.convert(folders, "llava-hf")
    assert "--vision-tower" in lw.inspect(folders).next


@pytest.mark.parametrize("place", ["projector/extra.safetensors", "visual_encoder/pytorch_model.bin", "llm/old.pt", "iter_200.pth"])
def test_weights_of_no_part_are_named(tmp_path: Path, place: str) -> None:
    folders, _ = toy(tmp_path, "3")
    torch.save({"x": torch.ones(2)}, folders / place)
    with pytest.raises(InputError, match=Path(place).name.replace(".", r"\.")):
        lw.convert(folders, "llava-hf")


@pytest.mark.parametrize("name", ["visual_encoder", "llm_adapter", "llm"])
def test_a_part_without_its_weights_is_named(tmp_path: Path, name: str) -> None:
    folders, _ = toy(tmp_path, "3")
    low_rank(folders / "llm_adapter", TEXT_MODULES)
    for path in (folders / name).glob("*.safetensors"):
        path.unlink()
    with pytest.raises(InputError, match=f"`{name}` holds a config and no weights"):
        lw.convert(folders, "llava-hf", tower=tmp_path / "tower")


def test_two_text_models_are_refused(tmp_path: Path) -> None:
    folders, _ = toy(tmp_path, "3")
    shutil.copy(folders / "llm/model.safetensors", folders)
    with pytest.raises(InputError, match="two text models"):
        lw.open_checkpoint(folders)


def test_a_llava_beside_such_a_folder_stays_one(tmp_path: Path) -> None:
    folders, whole = toy(tmp_path, "3")
    shutil.copytree(folders / "projector", whole / "projector")
    assert lw.open_checkpoint(whole).folders is None


@pytest.mark.parametrize(
    ("change", "told"),
    [({"depth": 1}, "not those that its config.json"), ({"bias": False}, "not those that its config.json"), ({"depth": "2"}, "not those")],
)
def test_a_projector_is_that_of_its_config(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    folders, _ = toy(tmp_path, "3")
    path = folders / "projector/config.json"
    write_json(path, {**json.loads(path.read_text()), **change})
    with pytest.raises(InputError, match=told):
        lw.open_checkpoint(folders)


@pytest.mark.parametrize("file", ["projector/config.json", "llm/config.json", "visual_encoder/config.json"])
def test_a_missing_config_is_named(tmp_path: Path, file: str) -> None:
    folders, _ = toy(tmp_path, "3")
    (folders / file).unlink()
    with pytest.raises(InputError, match=r"no `config\.json` in `" + file.partition("/")[0]):
        lw.open_checkpoint(folders)


def test_a_projector_of_another_text_model_is_refused(tmp_path: Path) -> None:
    folders, _ = toy(tmp_path, "3")
    layers = load_file(folders / "projector/model.safetensors")
    write(folders / "projector/model.safetensors", {name: value.repeat_interleave(2, 0) for name, value in layers.items()})
    with pytest.raises(InputError, match="does not lead into this text model"):
        lw.open_checkpoint(folders)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folders, _ = toy(tmp_path, "3")
    shutil.move(folders / "projector", tmp_path / "elsewhere")
    (folders / "projector").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leads out of its folder"):
        lw.open_checkpoint(folders)


# --- projectors of another kind ---------------------------------------------------------------------------------------


def with_projector(folders: Path, keep: tuple[str, ...], **settings: Any) -> None:
    layers = load_file(folders / "projector/model.safetensors")
    write(folders / "projector/model.safetensors", {name: value for name, value in layers.items() if name in keep})
    path = folders / "projector/config.json"
    write_json(path, {**json.loads(path.read_text()), **settings})


def test_a_single_layer_is_linear(tmp_path: Path) -> None:
    folders, _ = toy(tmp_path, "3")
    with_projector(folders, ("model.0.weight", "model.0.bias"), depth=1)
    assert written(lw.convert(folders, "llava"), tmp_path / "out")[1]["mm_projector_type"] == "linear"
    tensors, config = written(lw.convert(folders, "llava-hf"), tmp_path / "hub")
    assert config["projector_hidden_act"] == "linear"
    assert torch.equal(
        tensors["multi_modal_projector.linear_1.weight"], load_file(folders / "projector/model.safetensors")["model.0.weight"]
    )


def test_no_biases_and_another_activation_stay(tmp_path: Path) -> None:
    folders, _ = toy(tmp_path, "3")
    with_projector(folders, ("model.0.weight", "model.2.weight"), bias=False)
    tensors, config = written(lw.convert(folders, "llava-hf"), tmp_path / "hub")
    assert config["multimodal_projector_bias"] is False
    assert not any(name.endswith("linear_1.bias") for name in tensors)
    back, plain = written(lw.convert(folders, "llava"), tmp_path / "out")
    assert not back["model.mm_projector.0.bias"].any()
    assert "multimodal_projector_bias" not in plain
    with_projector(folders, ("model.0.weight", "model.2.weight"), hidden_act="silu")
    assert lw.convert(folders, "llava-hf").config["projector_hidden_act"] == "silu"
    with pytest.raises(InputError, match="with `silu` between"):
        lw.convert(folders, "llava")


# --- prompts, the Hub -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "prompt", "rival"), [("3", "llama3_chat", "llama_3"), ("Phi-3", "phi3_chat", "phi3_instruct")])
def test_the_prompt_is_xtuner_s_and_what_else_was_possible_is_said(tmp_path: Path, kind: str, prompt: str, rival: str) -> None:
    folders, _ = toy(tmp_path, kind)
    assert f"`{prompt}` is taken" in lw.inspect(folders).prompt
    step = lw.convert(folders, "llava-hf").history[-1]
    told = " ".join((*step.notes, *step.warnings))
    assert f"`{rival}`" in told
    assert "`--conv-mode` settles it" in told
    settled = lw.convert(folders, "llava-hf", conv_mode=prompt)
    assert settled.config["conv_mode"] == prompt
    with pytest.raises(UsageError):
        lw.convert(folders, "llava-hf", conv_mode="none such")


def test_a_repository_is_downloaded_with_its_folders(tmp_path: Path, hub: HubServer) -> None:
    folders, _ = toy(tmp_path, "3", llm="")
    low_rank(folders / "visual_encoder_adapter", EYE_MODULES)
    (folders / "visual_encoder/notes.txt").write_text("no part of it")
    hub.add("owner/model", folders)
    there = sorted(path.relative_to(folders).as_posix() for path in folders.rglob("*") if path.is_file())
    assert choose_files(there) == tuple(name for name in there if not name.endswith(".txt"))
    made = lw.convert("owner/model", "llava-hf")
    assert same(written(made, tmp_path / "hub")[0], written(lw.convert(folders, "llava-hf"), tmp_path / "local")[0])
    hub.refuse = (503, {})
    assert lw.open_checkpoint("owner/model").folders is not None  # from the cache
    hub.refuse = None
    with pytest.raises(InputError, match="keeps its parts in folders") as refused:
        lw.open_checkpoint("hf://owner/model")
    assert "owner/model@" in (refused.value.hint or "")
    assert {name for name in TELLING if name in refused.value.facts["folders"]} == set(TELLING) - {"llm_adapter"}
