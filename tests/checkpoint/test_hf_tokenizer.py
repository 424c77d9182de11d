"""Tokenizer files of a llava-hf folder: the ids that LLaVA's own programs recorded, sentencepiece's, and what transformers writes."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from llava_weights.checkpoint.hf_tokenizer import HfTokenizer, hf_tokenizer, original_tokenizer, with_fast
from llava_weights.checkpoint.sentencepiece import read_sentencepiece
from llava_weights.checkpoint.tokenizer import repair_tokenizer
from llava_weights.checkpoint.tokenizer_json import bpe_merges
from llava_weights.errors import InputError, MismatchError, UsageError

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures"
TINY = FIXTURES / "common/tokenizer/tokenizer.model"  # 304 pieces
TEXT = sentencepiece.SentencePieceProcessor(model_file=str(TINY))
BLANK, IM_END = 277, 306

IMSTARTEND = "B-lora/merged-of-llava-v1-tiny-lora-imstartend-by-main-peft0.10.0"
# folder of a checkpoint, rows of its table, prompts and ids that the original program recorded
RECORDED = [
    ("A-delta-v0/delta-307-apr17", 307, "A-delta-v0/v307"),
    ("A-delta-v0/expected-307-by-main", 307, "A-delta-v0/v307"),
    ("A-delta-v0/delta-308-may4", 308, "A-delta-v0/v308"),
    ("A-delta-v0/expected-308-by-may4", 308, "A-delta-v0/v308"),
    (IMSTARTEND, 307, "B-lora-imstartend/"),
    ("B-lora/merged-of-llava-v1.5-tiny-lora-by-main-peft0.10.0", 304, "B-lora-v1.5/"),
    ("C-v1.5/hf-by-tf4.47.1", 320, "C-v1.5/"),
    ("B-lora/base-vicuna-tiny", 304, "C-v1.5/"),
]


def files_of(folder: Path | str) -> dict[str, Path | bytes]:
    return {path.name: path for path in sorted((FIXTURES / folder).iterdir()) if "token" in path.name}


def converted(folder: Path | str, rows: int, **options: Any) -> HfTokenizer:
    return hf_tokenizer(files_of(folder), rows=rows, processor_class="LlavaProcessor", **options)


def content(files: Mapping[str, Path | bytes], name: str) -> bytes:
    source = files[name]
    return source if isinstance(source, bytes) else source.read_bytes()


def parsed(files: Mapping[str, Path | bytes], name: str) -> Any:
    return json.loads(content(files, name))


def saved(files: Mapping[str, Path | bytes], folder: Path, *, beside: str = '{"model_type": "llava"}') -> Path:
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(content(files, name))
    if beside:
        (folder / "config.json").write_text(beside)
    return folder


def fast(files: Mapping[str, Path | bytes]) -> Tokenizer:
    return Tokenizer.from_str(content(files, "tokenizer.json").decode())


def cases(recorded: str, hf: HfTokenizer) -> Iterator[tuple[str, list[int]]]:
    """Prompts with the image token of `hf`, and the ids that the original program recorded for them."""
    folder, start = recorded.split("/")
    listing = json.loads((FIXTURES / "E-logits" / folder / "cases.json").read_text())
    if start:
        yield from ((case["prompt"], case["input_ids"]) for name, case in listing.items() if name.startswith(start))
        return
    arrays = load_file(FIXTURES / "E-logits" / folder / "inputs.safetensors")
    for name, case in listing["cases"].items():
        ids = [hf.image_id if i == -200 else int(i) for i in arrays[f"{name}.input_ids"].ravel()]
        yield case["prompt"].replace("<image>", hf.image_token), with_blanks(ids) if folder == "B-lora-imstartend" else ids


def with_blanks(ids: list[int]) -> list[int]:
    """LLaVA's main program (`legacy: false`) puts no blank after `<im_end>`, the one form for all versions does."""
    return [j for i in ids for j in ([i, BLANK] if i == IM_END else [i])]


# --- ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "rows", "recorded"), RECORDED)
def test_ids_are_those_that_the_original_program_recorded(folder: str, rows: int, recorded: str, tmp_path: Path) -> None:
    """In a folder as it is used, and by the class, which transformers 5 builds anew: it then drops one of two blanks."""
    from transformers import AutoTokenizer, LlamaTokenizer

    hf = converted(folder, rows)
    assert content(hf.files, "tokenizer.model") == TINY.read_bytes()
    beside = AutoTokenizer.from_pretrained(saved(hf.files, tmp_path / "model"))
    alone = LlamaTokenizer.from_pretrained(saved(hf.files, tmp_path / "alone", beside=""))
    expected = list(cases(recorded, hf))
    assert len(expected) >= 3
    for prompt, ids in expected:
        assert fast(hf.files).encode(prompt).ids == ids
        assert beside(prompt).input_ids == ids
        if "> " not in prompt.replace("USER: <", ""):
            assert alone(prompt).input_ids == ids
    for tokenizer in (beside, alone):
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (hf.bos, hf.eos, hf.pad) == (1, 2, hf.pad)
        assert (len(tokenizer), tokenizer.convert_tokens_to_ids(hf.image_token)) == (hf.used, hf.image_id)
        assert tokenizer.padding_side == "left"


def test_no_blank_after_a_special_token_is_the_known_difference() -> None:
    """The recorded ids of a v1 prompt with `<im_end>` differ in the one blank that `with_blanks` adds, and in nothing else."""
    hf = converted(IMSTARTEND, 307)
    recorded = load_file(FIXTURES / "E-logits/B-lora-imstartend/inputs.safetensors")["img.input_ids"].ravel().tolist()
    prompt = next(prompt for prompt, _ in cases("B-lora-imstartend/", hf))
    found = fast(hf.files).encode(prompt).ids
    place = found.index(IM_END) + 1
    assert found[place] == BLANK
    assert found[:place] + found[place + 1 :] == [hf.image_id if i == -200 else i for i in recorded]


def test_tokens_of_2023_take_the_blanks_around_them_along() -> None:
    """transformers 4.28 did so for tokens that only added_tokens.json names, and LLaVA v0 was trained on it; 4.34 writes flags."""
    for folder, strips in (("A-delta-v0/delta-307-apr17", True), ("A-delta-v0/expected-307-by-main", True), (IMSTARTEND, False)):
        decoder = parsed(converted(folder, 307).files, "tokenizer_config.json")["added_tokens_decoder"]
        assert {decoder[i]["lstrip"] for i in ("304", "305", "306")} == {strips} == {decoder[i]["rstrip"] for i in ("304", "305", "306")}
        assert not any(decoder[i]["lstrip"] for i in ("0", "1", "2"))
        assert all(entry["special"] and not entry["normalized"] for entry in decoder.values())


@settings(max_examples=200)
@given(text=st.text(st.sampled_from("the man \n\u2581<s>x0Ae\u00e9\U0001f600") | st.characters(exclude_categories=("Cs",)), max_size=30))
@example(text="  two  blanks ")
@example(text="<0x41>")
@example(text="")
def test_any_text_has_the_ids_of_sentencepiece(text: str) -> None:
    if any(token in text for token in ("<unk>", "<s>", "</s>", "<image>", "<pad>", "\0")):  # NUL ends a text for SentencePiece's normalizer
        return
    assert plain().encode(text, add_special_tokens=False).ids == TEXT.encode(text)


@cache
def plain() -> Tokenizer:
    return fast(converted("B-lora/base-vicuna-tiny", 304).files)


@pytest.mark.parametrize(("rows", "start"), [(304, 304), (320, 304)])
@pytest.mark.parametrize("token", [None, "<image>", "<extra>"])
def test_the_image_token_is_one_id_in_the_middle_of_a_text(rows: int, start: int, token: str | None) -> None:
    hf = converted("B-lora/base-vicuna-tiny", rows, image_token=token)
    assert (hf.image_token, hf.image_id, hf.pad, hf.used) == (token or "<image>", start, start + 1, start + 2)
    assert hf.specials == {"<unk>", "<s>", "</s>", "<pad>", hf.image_token}
    assert parsed(hf.files, "added_tokens.json") == {hf.image_token: start, "<pad>": start + 1}
    ids = fast(hf.files).encode(f"a{hf.image_token}\nb", add_special_tokens=False).ids
    assert ids == [*TEXT.encode("a"), start, *TEXT.encode("\nb")]
    words = "a row of the table's padding" if rows > 304 else "a new row"
    assert f"tokenizer: `{hf.image_token}` added as id {start}, {words}" in hf.notes


def test_a_v0_model_gets_a_token_of_its_own_when_asked() -> None:
    hf = converted("A-delta-v0/delta-308-may4", 308, image_token="<image>")
    assert (hf.image_id, hf.pad, hf.used) == (308, 304, 309)  # [PAD] pads already
    hf = converted("A-delta-v0/delta-307-apr17", 307, image_token="<image>")
    assert (hf.image_id, hf.pad, hf.used) == (307, 308, 309)


def test_a_token_without_a_row_is_none() -> None:
    hf = converted("A-delta-v0/delta-308-may4", 305)
    assert (hf.image_token, hf.image_id, hf.pad) == ("<image>", 305, 304)


def test_settings_are_the_one_form_and_nothing_else_changes(tmp_path: Path) -> None:
    given = {**files_of("C-v1.5/hf-by-tf4.47.1"), "LICENSE": b"text"}
    settings = parsed(given, "tokenizer_config.json")
    given["tokenizer_config.json"] = json.dumps({**settings, "add_prefix_space": None}).encode()
    hf = hf_tokenizer(given, rows=320, processor_class="LlavaProcessor", model_max_length=77)
    written = parsed(hf.files, "tokenizer_config.json")
    forced = {"legacy": True, "tokenizer_class": "LlamaTokenizer", "padding_side": "left", "processor_class": "LlavaProcessor"}
    kept = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "model_max_length": 4096}
    assert {key: written[key] for key in forced | kept} == forced | kept
    assert "add_prefix_space" not in written
    assert hf.files["LICENSE"] == b"text"
    assert hf.files["tokenizer.model"] is given["tokenizer.model"]
    again = hf_tokenizer(hf.files, rows=320, processor_class="LlavaProcessor")
    assert (again.files, again.notes) == (hf.files, ())


# --- tokenizer.json against what other programs wrote ----------------------------------------------------------------


@pytest.mark.parametrize("folder", ["A-delta-v0/expected-307-by-main", "C-v1.5/hf-by-tf4.47.1"])
def test_the_model_is_what_transformers_made(folder: str) -> None:
    """4.37.2 wrote the first, 4.47.1 the second, with merges as lists and `ignore_merges`, which tokenizers takes as false."""
    expected = parsed(files_of(folder), "tokenizer.json")
    found = parsed(converted(folder, 320).files, "tokenizer.json")
    model = {key: value for key, value in expected["model"].items() if key != "ignore_merges"}
    model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    assert found["model"] == model
    assert (found["decoder"], found["post_processor"]) == (expected["decoder"], expected["post_processor"])


def trained(size: int, **options: Any) -> bytes:
    model = io.BytesIO()
    words = [f"{a}{b}{c}" for a in ("ba", "na", "ab", "aba", "") for b in ("na", "nab", "an", "banana") for c in ("a", "ab", "ana", "nana")]
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 4, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[i:] + words[:i]) for i in range(len(words))]),
        model_writer=model, model_type=options.pop("model_type", "bpe"), vocab_size=size, byte_fallback=True, **options,
    )  # fmt: skip
    return model.getvalue()


def test_merges_are_in_the_order_of_transformers() -> None:
    from transformers.convert_slow_tokenizer import generate_merges

    vocabulary = read_sentencepiece(trained(330))
    library = sentencepiece.SentencePieceProcessor(model_proto=trained(330))
    scores = {library.id_to_piece(i): library.get_score(i) for i in range(library.get_piece_size())}
    assert vocabulary.scores == pytest.approx(scores)
    expected = generate_merges({piece: i for i, piece in enumerate(scores)}, scores)
    assert bpe_merges(vocabulary) == [f"{left} {right}" for left, right in expected]
    assert len(expected) > 40


def test_a_model_of_50000_pieces_does_not_take_hours() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [a + b + c + d for a in "abc" for b in letters for c in letters for d in letters] + [a + b for a in letters for b in letters]
    ids = {piece: i for i, piece in enumerate(pieces)}
    vocabulary = read_sentencepiece(TINY.read_bytes())
    large = replace(vocabulary, ids=ids, scores={p: -float(i) for p, i in ids.items()}, kinds=dict.fromkeys(ids, 1))
    assert len(bpe_merges(large)) == 3 * 26**3


def test_pieces_of_the_user_and_control_pieces_are_found_in_a_text() -> None:
    """As Yi-34B's, whose model puts no blank before a text."""
    data = trained(330, user_defined_symbols=["<|im_start|>", "<|im_end|>"], control_symbols=["<|c|>"], add_dummy_prefix=False)
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    hf = hf_tokenizer({"tokenizer.model": data}, rows=330, processor_class="LlavaProcessor")
    start, end, control = (library.piece_to_id(piece) for piece in ("<|im_start|>", "<|im_end|>", "<|c|>"))
    assert {"<|im_start|>", "<|im_end|>", "<|c|>", "<image>"} <= hf.specials
    text = "<|im_start|>banana\nan<|im_end|>ana"
    ids = fast(hf.files).encode(text, add_special_tokens=False).ids
    assert ids == library.encode(text)
    assert ids[0] == start
    assert end in ids
    assert fast(hf.files).encode("a<|c|>", add_special_tokens=False).ids[-1] == control
    assert parsed(hf.files, "tokenizer_config.json")["add_prefix_space"] is False


def test_a_unigram_model_is_refused() -> None:
    with pytest.raises(InputError, match="not a BPE model"):
        hf_tokenizer({"tokenizer.model": trained(300, model_type="unigram")}, rows=300, processor_class="LlavaProcessor")


# --- other inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_folder_saved_by_transformers_5_gets_the_form_back(with_model: bool, legacy: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    before = converted("C-v1.5/hf-by-tf4.47.1", 320)
    source = dict(before.files) if legacy else files_of("C-v1.5/hf-by-tf4.47.1")
    AutoTokenizer.from_pretrained(saved(source, tmp_path / "in")).save_pretrained(tmp_path / "out")
    found: dict[str, Path | bytes] = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert parsed(found, "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    assert "added_tokens.json" not in found
    if with_model:
        found["tokenizer.model"] = TINY
    hf = hf_tokenizer(found, rows=320, processor_class="LlavaProcessor")
    assert (hf.image_id, hf.pad, hf.bos, hf.eos, hf.used) == (304, 305, 1, 2, 306)
    assert parsed(hf.files, "tokenizer.json") == parsed(before.files, "tokenizer.json")
    assert parsed(hf.files, "tokenizer_config.json")["tokenizer_class"] == "LlamaTokenizer"
    assert parsed(hf.files, "tokenizer_config.json")["legacy"] is True
    back, rows, _ = original_tokenizer(found, rows=320, image_id=304)
    assert rows == 304
    assert fast(back).encode("the<image>").ids == [1, *TEXT.encode("the<image>")]


@cache
def byte_level() -> dict[str, bytes]:
    """vocab.json, merges.txt and settings like Qwen2's, on a tiny vocabulary trained by the tokenizers library."""
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["the tall man and the photo"] * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    entries = {str(len(model["vocab"]) + i): {"content": token, "special": True, "normalized": False} for i, token in enumerate(tokens)}
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
    merges = "".join(" ".join(merge) + "\n" for merge in model["merges"])
    return {
        "vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": b"#version: 0.2\n" + merges.encode(),
        "tokenizer_config.json": json.dumps({**config, "added_tokens_decoder": entries, "add_prefix_space": False}).encode(),
    }  # fmt: skip


def test_a_byte_level_tokenizer_keeps_its_class_and_gets_the_image_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Qwen2Tokenizer

    expected = Qwen2Tokenizer.from_pretrained(saved(byte_level(), tmp_path / "in", beside=""))
    expected.save_pretrained(tmp_path / "theirs")
    base = len(parsed(byte_level(), "vocab.json"))
    for source in (byte_level(), {**byte_level(), "tokenizer.json": tmp_path / "theirs/tokenizer.json"}):
        hf = hf_tokenizer(source, rows=320, processor_class="LlavaProcessor")
        assert (hf.image_id, hf.pad, hf.bos, hf.eos, hf.used) == (base + 3, base, base, base + 2, base + 4)
        assert {name: hf.files[name] for name in ("vocab.json", "merges.txt")} == {n: source[n] for n in ("vocab.json", "merges.txt")}
        assert parsed(hf.files, "added_tokens.json")["<image>"] == base + 3
        assert parsed(hf.files, "tokenizer_config.json")["added_tokens_decoder"][str(base + 3)]["content"] == "<image>"
        found, made = parsed(hf.files, "tokenizer.json"), json.loads(expected.backend_tokenizer.to_str())
        assert {key: found[key] for key in ("normalizer", "pre_tokenizer", "decoder")} == {
            key: made[key] for key in ("normalizer", "pre_tokenizer", "decoder")
        }
        folder = saved(hf.files, tmp_path / f"out{'tokenizer.json' in source}")
        for loaded in (AutoTokenizer.from_pretrained(folder), Qwen2Tokenizer.from_pretrained(folder)):
            for text in ("<|im_start|>user\nthe  man's 1234 \u00e9\U0001f600 e\u0301<|im_end|>", "  b\n\n "):
                assert loaded(text).input_ids == expected(text).input_ids
            assert loaded("the<image>\nman").input_ids == [*expected("the").input_ids, base + 3, *expected("\nman").input_ids]
        back, rows, _ = original_tokenizer(hf.files, rows=320, image_id=hf.image_id)
        assert rows == 320
        assert "<image>" not in content(back, "tokenizer.json").decode() + content(back, "added_tokens.json").decode()


# --- the way back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "<image>"])
@pytest.mark.parametrize(("folder", "rows"), [(folder, rows) for folder, rows, _ in RECORDED if rows != 320])
def test_the_way_back_gives_the_original_rows_and_ids(folder: str, rows: int, token: str | None) -> None:
    hf = converted(folder, rows, image_token=token)
    files, left, notes = original_tokenizer(hf.files, rows=hf.used + 20, image_id=hf.image_id)
    assert left == rows
    assert fast(files).get_vocab_size() == rows
    listing = files_of(folder).get("added_tokens.json")
    own = {name: i for name, i in json.loads(listing.read_bytes()).items() if i < rows} if isinstance(listing, Path) else {}
    assert (parsed(files, "added_tokens.json") if "added_tokens.json" in files else {}) == own
    config = parsed(files, "tokenizer_config.json")
    assert config["pad_token"] == ("[PAD]" if "[PAD]" in own else "<unk>")
    assert "processor_class" not in config
    assert any("<image>" in note for note in notes) == (hf.image_token == "<image>")


# --- the original layout --------------------------------------------------------------------------------------------

SLOW = json.loads((FIXTURES / "common/tokenizer/slow-ids.json").read_text())  # LLaVA's own code asks for the slow class
KINDS = {"plain": ("C-v1.5/original-no-vision-bin", 304), "marked": (IMSTARTEND, 307)}


def as_original(kind: str, legacy: bool, **others: bytes) -> dict[str, Path | bytes]:
    """Files as `apply-delta` and `merge-lora` write them."""
    folder, rows = KINDS[kind]
    given = {**files_of(folder), **{name.replace("_json", ".json"): data for name, data in others.items()}}
    given["tokenizer_config.json"] = json.dumps({**parsed(given, "tokenizer_config.json"), "legacy": legacy}).encode()
    return with_fast(repair_tokenizer(given, rows=rows)[0], rows=rows)[0]


@pytest.mark.parametrize("beside", ['{"model_type": "llava"}', '{"model_type": "llava_mistral"}', ""])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_the_original_layout_are_those_of_the_slow_tokenizer(kind: str, legacy: bool, beside: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    files = as_original(kind, legacy)
    loaded = AutoTokenizer.from_pretrained(saved(files, tmp_path / "model", beside=beside))
    expected = SLOW["ids"][f"{kind}, legacy {str(legacy).lower()}"]
    assert [loaded(text).input_ids for text in SLOW["texts"]] == expected
    assert [fast(files).encode(text).ids for text in SLOW["texts"]] == expected


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_way_there_and_back_keeps_the_ids_and_the_settings(kind: str, legacy: bool, tmp_path: Path) -> None:
    files, rows = as_original(kind, legacy), KINDS[kind][1]
    hf = hf_tokenizer(files, rows=rows, processor_class="LlavaProcessor")
    again = hf_tokenizer(hf.files, rows=rows + 20, processor_class="LlavaProcessor")
    for made in (hf, again):
        assert parsed(made.files, "tokenizer_config.json")["legacy"] is True
        back, left, _ = original_tokenizer(made.files, rows=rows + 20, image_id=made.image_id)
        assert left == rows
        assert [fast(back).encode(text).ids for text in SLOW["texts"]] == SLOW["ids"][f"{kind}, legacy {str(legacy).lower()}"]
        settings, expected = (parsed(each, "tokenizer_config.json") for each in (back, files))
        assert [settings[key] for key in ("legacy", "padding_side")] == [legacy, expected["padding_side"]] == [legacy, "right"]
        assert not any(key.startswith("original") for key in settings)


def other(**changes: Any) -> bytes:
    made = parsed(as_original("plain", True), "tokenizer.json")
    return json.dumps({**made, **changes}).encode()


def test_a_tokenizer_json_that_agrees_is_kept() -> None:
    made = parsed(as_original("plain", True), "tokenizer.json")
    pairs = [merge.split(" ") for merge in made["model"]["merges"]]  # as transformers writes them today
    given = other(
        padding=None, decoder=None, model={**made["model"], "merges": pairs}, post_processor=made["post_processor"]["processors"][0]
    )
    assert as_original("plain", True, tokenizer_json=given)["tokenizer.json"] is given


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "BPE", "vocab": {"<unk>": 0}}},
        {"model": None},
        {"added_tokens": []},
        {"added_tokens": [3]},
        {"added_tokens": [{"id": 0, "content": "<unk>", "normalized": True, "special": True}]},
        {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}},
        {"normalizer": {"type": "Sequence", "normalizers": 5}},
        {"post_processor": None},
        {"truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}},
    ],
)
def test_a_tokenizer_json_that_differs_is_written_anew(changes: dict[str, Any]) -> None:
    files = as_original("plain", True, tokenizer_json=other(**changes))
    assert content(files, "tokenizer.json") == content(as_original("plain", True), "tokenizer.json")


def test_one_of_2023_that_misses_image_tokens_is_written_anew() -> None:
    """transformers 4.28 wrote it with `normalized: true`: read as it is, `<im_patch>` falls to pieces inside a text."""
    given = files_of("A-delta-v0/delta-308-may4")
    assert "<im_patch>" not in fast(given).encode("b <im_start><im_patch>").tokens
    files, notes = with_fast(repair_tokenizer(given, rows=308)[0], rows=308)
    assert fast(files).encode("b <im_start><im_patch>").ids[-2:] == [306, 305]
    assert notes == ("tokenizer.json: written anew from tokenizer.model",)


def test_flags_and_settings_that_readers_take_in_its_place_follow_it() -> None:
    given = files_of("A-delta-v0/expected-307-by-main")
    given["tokenizer_config.json"] = json.dumps({**parsed(given, "tokenizer_config.json"), "add_prefix_space": True}).encode()
    files, _ = with_fast(repair_tokenizer(given, rows=307)[0], rows=307)
    settings, listed = parsed(files, "tokenizer_config.json"), parsed(files, "tokenizer.json")["added_tokens"]
    assert [{"id": int(i), **entry} for i, entry in settings["added_tokens_decoder"].items()] == listed
    assert not any(entry["normalized"] for entry in listed)
    assert "add_prefix_space" not in settings  # with it, transformers 4 makes a tokenizer.json of its own


@pytest.mark.parametrize(
    "options", [{"model_type": "unigram"}, {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"}], ids=["unigram", "normalizes"]
)
def test_there_is_none_where_it_could_not_give_the_same_ids(options: dict[str, Any]) -> None:
    files = {"tokenizer.model": trained(300, **options), "tokenizer.json": other()}
    found, notes = with_fast(repair_tokenizer(files, rows=300)[0], rows=300)
    assert "tokenizer.json" not in found
    assert [note.partition(",")[0] for note in notes] == ["tokenizer.json: dropped"]


def test_tokens_before_others_stay() -> None:
    listing = json.dumps({"<image>": 304, "<pad>": 305, "<more>": 306}).encode()
    files, rows, notes = original_tokenizer({"tokenizer.model": TINY, "added_tokens.json": listing}, rows=320, image_id=304)
    assert (rows, parsed(files, "added_tokens.json")) == (307, json.loads(listing))
    assert "tokenizer: `<image>`, `<pad>` kept, other tokens follow" in notes


# --- hostile --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 400) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "vocab", "merges", "id", "content", "x"]), inner),
    max_leaves=6,
)
KEYS = st.sampled_from(["model", "added_tokens", "normalizer", "pre_tokenizer", "decoder", "post_processor"])
CONFIG_KEYS = st.sampled_from(["added_tokens_decoder", "bos_token", "eos_token", "pad_token", "model_max_length", "tokenizer_class"])


@settings(max_examples=60)
@given(
    changes=st.dictionaries(KEYS, JSON, max_size=2),
    config=st.dictionaries(CONFIG_KEYS, JSON, max_size=2),
    added=JSON,
    rows=st.integers(300, 330),
)
@example(changes={}, config={"added_tokens_decoder": {"304": "<image>", "305": {"content": 3}}}, added={}, rows=320)
@example(changes={}, config={}, added={"<image>": [304]}, rows=320)
@example(changes={}, config={}, added={"<image>": 7}, rows=320)
@example(changes={"added_tokens": [{"id": 5, "content": "x"}]}, config={}, added={}, rows=320)
def test_any_json_is_read_or_refused(changes: dict[str, Any], config: Any, added: Any, rows: int) -> None:
    core = {**json.loads(plain().to_str()), **changes}
    files = {"tokenizer.json": core, "tokenizer_config.json": config, "added_tokens.json": added}
    try:
        hf = hf_tokenizer({name: json.dumps(value).encode() for name, value in files.items()}, rows=rows, processor_class="LlavaProcessor")
    except InputError:
        return
    assert fast(hf.files).token_to_id(hf.image_token) == hf.image_id < hf.used
    assert all(note.isprintable() for note in hf.notes)


@pytest.mark.parametrize(
    ("files", "rows", "error"),
    [
        ({}, 304, InputError),
        ({"tokenizer.json": b"[]"}, 304, InputError),
        ({"tokenizer.json": b'{"model": {"type": "Unigram"}}'}, 304, InputError),
        ({"tokenizer.json": b'{"model": {"vocab": {"a": 1}, "merges": []}}'}, 304, InputError),
        ({"tokenizer.json": b'{"model": {"vocab": {"a": 0, "b": 1}, "merges": []}}'}, 1, MismatchError),
        ({"vocab.json": b"{}", "merges.txt": b""}, 304, InputError),
    ],
)
def test_what_no_tokenizer_can_be_made_of_is_refused(files: dict[str, bytes], rows: int, error: type[InputError]) -> None:
    with pytest.raises(error) as caught:
        hf_tokenizer(files, rows=rows, processor_class="LlavaProcessor")
    assert caught.value.exit_code == 3


def test_an_empty_image_token_is_refused() -> None:
    with pytest.raises(UsageError):
        converted("C-v1.5/hf-by-tf4.47.1", 320, image_token=" ")


# --- the other versions of transformers -----------------------------------------------------------------------------

READ = """
import json, sys
from transformers import AutoTokenizer
asked = json.load(sys.stdin)
for folder, prompts in asked:
    for options in ({}, {"use_fast": False}):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        print(json.dumps([tokenizer(prompt).input_ids for prompt in prompts] + [len(tokenizer), tokenizer.pad_token_id]))
"""


@pytest.mark.peer
@pytest.mark.parametrize("version", ["4.37.2", "4.45.2", "4.47.1", "4.57.6"])
def test_other_versions_give_the_same_ids_fast_and_slow(version: str, tmp_path: Path) -> None:
    python = ROOT / ".peers" / f"transformers-{version}" / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python.parent.parent} is missing: run `make peer`, which sets it up")
    asked, expected = [], []
    for number, (folder, rows, recorded) in enumerate(RECORDED):
        hf = converted(folder, rows)
        pairs = list(cases(recorded, hf))
        asked.append((str(saved(hf.files, tmp_path / str(number))), [prompt for prompt, _ in pairs]))
        expected += [[*(ids for _, ids in pairs), hf.used, hf.pad]] * 2
    done = subprocess.run([str(python), "-c", READ], input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


def test_a_tokenizer_that_the_disk_refuses_is_no_reason_to_leave_a_file_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        with_fast({"tokenizer.model": tmp_path / "tokenizer.model"}, rows=304)
