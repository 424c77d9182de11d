"""Rules on small files, beyond the single changes of wrong_checkpoints.py: right files that look odd, other layouts, true sizes."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from wrong_checkpoints import MANIFEST, SUMS, both, config, edited, weights

import llava_weights as lw
from llava_weights.checks.health import health
from llava_weights.cli.toy import make_toys
from llava_weights.findings import Finding

Copy = Callable[..., Path]


@pytest.fixture(scope="module")
def made(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Converted checkpoints of both layouts, without records. Not to be changed."""
    out = tmp_path_factory.mktemp("made")
    tower = lw.open_checkpoint(fixtures / "common/clip-tiny-42px")
    given = lw.open_checkpoint(fixtures / "C-v1.5/original-with-vision-safetensors")
    small = lw.open_checkpoint(fixtures / "common/clip-tiny-28px")
    linear = lw.open_checkpoint(fixtures / "A-delta-v0/expected-307-by-main")
    made = {
        "hf": lw.convert(given, "llava-hf", tower=tower),
        "original": lw.convert(given, "llava", tower=tower),
        **{form: lw.convert(linear, "llava-hf", tower=small, projector_form=form) for form in ("identity", "relu", "gelu")},
    }
    for name, checkpoint in made.items():
        lw.execute(lw.make_plan(checkpoint), out / name)
        for record in (MANIFEST, SUMS):
            (out / name / record).unlink()
    return {name: out / name for name in made}


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Copy:
    def copied(name: str, *changes: Callable[[Path], Any]) -> Path:
        folder = Path(shutil.copytree(made[name], tmp_path / name))
        both(*changes)(folder)
        return folder

    return copied


def found(folder: Path) -> list[Finding]:
    return list(health(lw.open_checkpoint(folder), folder))


def sentences(folder: Path, *verdicts: str) -> list[str]:
    return [f"{each.subject}: {each.text}" for each in found(folder) if each.verdict in (verdicts or ("failed", "warning", "note"))]


@pytest.mark.parametrize("name", ["hf", "original", "identity", "relu", "gelu"])
def test_what_the_converter_writes_is_right(name: str, made: dict[str, Path]) -> None:
    assert sentences(made[name]) == []


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_the_merge_that_transformers_of_2023_left_out_is_a_note(fixtures: Path) -> None:
    """LLaVA's delta of May 2023 has such a tokenizer.json; its own code reads tokenizer.model."""
    notes = [each for each in found(fixtures / "A-delta-v0/expected-308-by-may4") if each.verdict == "note"]
    assert [(each.subject, "the merge" in each.text) for each in notes] == [("tokenizer.json", True)]
    assert any(each.verdict == "ok" and each.subject == "tokenizer.json" for each in found(fixtures / "A-delta-v0/expected-308-by-may4"))


def test_other_blanks_are_a_note_in_the_original_layout(copy: Copy, made: dict[str, Path]) -> None:
    folder = copy("original")
    core = json.loads((made["hf"] / "tokenizer.json").read_bytes())
    inside = {name: i for name, i in core["model"]["vocab"].items() if i < 304}
    core |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace"}, "added_tokens": core["added_tokens"][:3]}
    (folder / "tokenizer.json").write_text(json.dumps({**core, "model": {**core["model"], "vocab": inside}}))
    assert [text for text in sentences(folder) if "Metaspace" not in text] == []
    assert len(sentences(folder, "note")) == 1


def _byte_level(folder: Path) -> None:
    """A byte-level tokenizer in all its files in place of the SentencePiece one."""
    (folder / "tokenizer.model").unlink()
    vocabulary = {chr(33 + i): i for i in range(90)} | {"ab": 90, "bc": 91}
    core = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "ByteLevel"},
        "post_processor": None, "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": 92 + i, "content": name, "special": True} for i, name in enumerate(("<|endoftext|>", "<image>"))],
        "model": {"type": "BPE", "byte_fallback": False, "vocab": vocabulary, "merges": ["a b", ["b", "c"]]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(core))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nb c\n")
    (folder / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": 92, "<image>": 93}))


def test_vocab_and_merges_of_a_byte_level_tokenizer_are_compared(copy: Copy) -> None:
    folder = copy("hf", _byte_level)
    assert [text for text in sentences(folder) if "vocab.json" in text or "merges.txt" in text] == []
    (folder / "merges.txt").write_text("#version: 0.2\nb c\na b\n")
    assert any("its merges are not those of `merges.txt`" in text for text in sentences(folder, "failed"))
    edited("vocab.json", lambda value: value.update(ab=91, bc=90))(folder)
    assert any("2 tokens of `vocab.json` have another id" in text and "91 there, 90 here" in text for text in sentences(folder, "failed"))


def test_a_vocab_json_of_true_size_is_read(copy: Copy) -> None:
    """Qwen2's has 2.8 million bytes."""
    folder = copy("hf", _byte_level)
    (folder / "vocab.json").write_text(json.dumps({f"token number {i}": i for i in range(80_000)}))
    assert (folder / "vocab.json").stat().st_size > 2 << 20
    assert [text for text in sentences(folder, "failed") if "at most" in text] == []


def test_pieces_too_long_to_cut_cost_nothing(copy: Copy, tmp_path: Path) -> None:
    """Every way to cut a piece would be looked up: 300 pieces of 1,000 characters are left out, and nothing is claimed of them."""
    folder = copy("hf")
    pieces = [f"{number:03}{'x' * 997}".encode() for number in range(300)]
    data = (folder / "tokenizer.model").read_bytes()
    for piece in pieces:
        inner = b"\x0a" + _varint(len(piece)) + piece + b"\x15" + struct.pack("<f", -9.0)
        data += b"\x0a" + _varint(len(inner)) + inner
    (folder / "tokenizer.model").write_bytes(data)
    edited("tokenizer.json", lambda v: v["model"]["vocab"].update({x.decode(): 304 + i for i, x in enumerate(pieces)}))(folder)
    edited("tokenizer.json", lambda v: v["model"].update(merges=[]))(folder)
    assert [text for text in sentences(folder) if "merges" in text] == []


def _varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80, value >> 7]) if value > 0x7F else bytes([value])


def test_a_post_processor_in_a_sequence_is_read(copy: Copy) -> None:
    def nested(value: Any) -> None:
        value["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, value["post_processor"]]}

    folder = copy("hf", edited("tokenizer.json", nested))
    assert sentences(folder) == []
    config("add_bos_token", to=False, file="tokenizer_config.json")(folder)
    assert any("puts `<s>` before a text" in text for text in sentences(folder, "failed"))


# --- images -----------------------------------------------------------------------------------------------------------

PRE = "preprocessor_config.json"
HALF = [0.5, 0.5, 0.5]
COLOURS = both(config("image_mean", to=HALF, file=PRE), config("image_std", to=HALF, file=PRE))


def test_laions_towers_may_have_either_mean(copy: Copy) -> None:
    assert sentences(copy("hf", config("vision_config", "hidden_act", to="gelu"), COLOURS), "failed", "warning") == []


def test_mean_and_deviation_in_the_scale_of_the_pixels_are_the_same_numbers(copy: Copy) -> None:
    """Pixels from 0 to 255 that are not scaled, with a mean from 0 to 255."""

    def scaled(value: Any) -> None:
        value |= {"rescale_factor": 1.0, "image_mean": [255 * x for x in value["image_mean"]]}
        value |= {"image_std": [255 * x for x in value["image_std"]]}

    assert sentences(copy("hf", edited(PRE, scaled)), "failed", "warning") == []


def test_images_of_an_original_are_compared_with_its_tower(copy: Copy, made: dict[str, Path]) -> None:
    folder = copy("original", lambda folder: shutil.copy(made["hf"] / PRE, folder / PRE))
    assert sentences(folder) == []
    COLOURS(folder)
    assert next(text for text in sentences(folder, "failed") if "the tower is a CLIP" in text).startswith(PRE)


def test_images_of_an_original_without_a_tower_are_compared_with_the_one_it_names(
    fixtures: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(fixtures / "C-v1.5/original-no-vision-bin", tmp_path / "model"))
    shutil.copy(made["hf"] / PRE, folder / PRE)
    assert not [text for text in sentences(folder) if PRE in text]
    config("mm_vision_tower", to="google/siglip-so400m-patch14-384")(folder)
    assert any("the tower is a SigLIP" in text for text in sentences(folder, "failed"))


def test_a_processor_that_counts_no_features_is_a_warning_and_one_that_counts_others_fails(copy: Copy) -> None:
    """transformers' converters up to 4.47 wrote the former; the versions after them can't read it."""
    proc = "processor_config.json"
    silent = both(config("patch_size", file=proc), config("vision_feature_select_strategy", file=proc))
    folder = copy("hf", silent, config("num_additional_image_tokens", to=0, file=proc))
    assert sentences(folder, "failed") == []
    assert ["4.48" in text for text in sentences(folder, "warning")] == [True]
    config("patch_size", to=7, file=proc)(folder)
    assert len(sentences(folder, "failed")) == 3
    config("patch_size", file=proc)(folder)
    config("processor_class", to="LlavaNextProcessor", file=proc)(folder)
    assert ["`processor_class`" in text for text in sentences(folder, "failed")] == [True]


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "verdict"),
    [({"quant_method": "awq"}, "failed"), ({"load_in_8bit": True}, "failed"), ({"quant_method": "torchao"}, "warning")],
)
@pytest.mark.parametrize("place", [(), ("text_config",)])
def test_quantisation_of_plain_weights(copy: Copy, method: dict[str, Any], verdict: str, place: tuple[str, ...]) -> None:
    folder = copy("hf", config(*place, "quantization_config", to=method))
    assert [each.verdict for each in found(folder) if "quantization_config" in each.text] == [verdict]


@pytest.mark.parametrize("stored", ["packed", "scales"])
def test_quantised_weights_may_say_so(copy: Copy, stored: str) -> None:
    def quantised(tensors: dict[str, torch.Tensor]) -> None:
        name = "language_model.model.layers.0.mlp.gate_proj"
        if stored == "packed":
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.int8)
        else:
            tensors[f"{name}.weight_scale"] = torch.ones(3)

    folder = copy("hf", config("quantization_config", to={"quant_method": "bitsandbytes"}), weights(quantised))
    assert not [text for text in sentences(folder) if "quantization_config" in text]


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(copy: Copy) -> None:
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    folder = copy("original", config("tie_word_embeddings", to=True))
    assert lw.verify(folder).exit_code == 4
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, head: tensors[embed].clone()}, folder / "model.safetensors", {"format": "pt"})
    assert not [each for each in lw.verify(folder).findings if each.verdict == "failed"]


def test_the_projectors_activation_is_that_of_its_form(copy: Copy) -> None:
    assert any("belongs to `linear`" in text for text in sentences(copy("identity", config("projector_hidden_act", to="relu")), "failed"))
    assert sentences(copy("relu", config("projector_hidden_act", to="gelu_new"))) == []  # a pair is the same map with any gate


def test_what_only_some_programs_go_by_is_a_note(copy: Copy) -> None:
    folder = copy("hf", config("padding_side", to="right", file="tokenizer_config.json"), config("text_config", "eos_token_id", to=7))
    assert sentences(folder, "failed", "warning") == []
    assert [text.partition(":")[0] for text in sentences(folder, "note")] == ["config.json", "tokenizer_config.json"]


def test_a_towers_heads_and_activation_are_those_of_the_published_one(copy: Copy) -> None:
    """By its widths; that the tensors have others is another finding."""
    wide = both(config("vision_config", "hidden_size", to=1024), config("vision_config", "intermediate_size", to=4096))
    heads, act = (config("vision_config", key, to=value) for key, value in (("num_attention_heads", 8), ("hidden_act", "relu")))
    texts = sentences(copy("hf", wide, heads, act), "warning")
    assert ["has 16" in text or "has quick_gelu" in text for text in texts] == [True, True], texts


@pytest.mark.parametrize("value", [[], {}, 10**400, 1e308, "x", True])
def test_no_value_is_too_odd(copy: Copy, value: Any) -> None:
    wide = both(config("vision_config", "hidden_size", to=1024), config("vision_config", "intermediate_size", to=4096))
    eye = both(*(config("vision_config", key, to=value) for key in ("num_attention_heads", "hidden_act", "layer_norm_eps")))
    text = both(*(config("text_config", key, to=value) for key in ("hidden_act", "rope_scaling", "rope_theta", "rms_norm_eps")))
    image = both(config("image_mean", to=[value] * 3, file=PRE), config("image_processor_type", to=value, file=PRE))
    assert sentences(copy("hf", wide, eye, text, image, config("quantization_config", to=value)), "failed")


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "torch_dtype": "float16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told_of"),
    [
        ({}, ""),
        ({"rope_theta": 10000.0}, ""),
        ({"rope_theta": 1e6, "max_position_embeddings": 16384}, ""),  # Code Llama
        ({"rope_theta": 1e6}, "`rope_theta` is 1000000.0"),
        ({"num_attention_heads": 64}, "`num_attention_heads` is 64"),
    ],
)
def test_values_of_llamas_sizes(tmp_path: Path, change: dict[str, Any], told_of: str) -> None:
    """True sizes, as a sparse file without a value."""
    shapes = lw.checkpoint.config.expected_shapes(LLAMA)  # type: ignore[attr-defined]
    header, offset = dict[str, Any](), 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
    got = [each.text for each in found(tmp_path) if each.verdict == "warning" and each.subject == "config.json"]
    assert [told_of in text for text in got] == [True] * bool(told_of)


def test_a_matrix_of_another_order_than_in_the_other_layers(tmp_path: Path) -> None:
    """As where a delta stands in place of the sum; two layers alone could not tell which."""
    make_toys(tmp_path)
    folder = tmp_path / "vicuna"
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    name = "model.layers.2.mlp.up_proj.weight"
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert not [each for each in found(folder) if each.rule == "layer-sizes"]
    save_file({**tensors, name: tensors[name] / 50}, folder / "model.safetensors", {"format": "pt"})
    [odd] = [each for each in found(folder) if each.rule == "layer-sizes"]
    assert (odd.verdict, odd.subject, "times smaller than in the other layers" in odd.text) == ("warning", name, True)
