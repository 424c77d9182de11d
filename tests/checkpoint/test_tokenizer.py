"""Repair of tokenizer files: the published files of 2023, rebuilt byte for byte where their md5 is known, and hostile ones."""

from __future__ import annotations

import hashlib
import io
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llava_weights.checkpoint import tokenizer
from llava_weights.checkpoint.sentencepiece import read_sentencepiece
from llava_weights.checkpoint.tokenizer import SpecialIds, read_special_ids, repair_tokenizer
from llava_weights.errors import InputError

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
TINY = (FIXTURES / "A-delta-v0/delta-307-apr17/tokenizer.model").read_bytes()  # 304 pieces
NO_LIMIT = 1000000000000000019884624838656
IMAGE = ("<im_patch>", "<im_start>", "<im_end>")


def dump(value: Any) -> bytes:
    """JSON as transformers 4.28 wrote it."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def numbered(*tokens: str, base: int) -> bytes:
    return dump({token: base + place for place, token in enumerate(tokens)})


def token(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def era(name: str, base: int = 304) -> dict[str, bytes]:
    """The JSON files of a published repository, for `base` pieces instead of LLaMA's 32000."""
    empty = {"bos_token": "", "eos_token": "", "unk_token": "", "model_max_length": NO_LIMIT, "tokenizer_class": "LLaMATokenizer"}
    typed = {"bos_token": token("<s>"), "eos_token": token("</s>"), "unk_token": token("<unk>"), "tokenizer_class": "LlamaTokenizer"}
    swapped = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    plain = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings, special, added = {
        "13b-v0": ({**empty, "special_tokens_map_file": "x.json"}, {**swapped, "pad_token": "[PAD]"}, (*IMAGE, "[PAD]")),
        "7b-v0": ({**typed, "pad_token": None, "model_max_length": NO_LIMIT}, {**swapped, "pad_token": "[PAD]"}, ("[PAD]", *IMAGE)),
        "v1-1": ({**typed, "pad_token": None, "model_max_length": 2048}, plain, IMAGE),
        "decapoda": (empty, {}, ()),
    }[name]
    files = {"tokenizer_config.json": dump(settings), "special_tokens_map.json": dump(special)}
    return files | ({"added_tokens.json": numbered(*added, base=base)} if added else {})


# Of the published deltas: repository, rows beyond the pieces, and, counted from the pieces on, pad and the ids of the image tokens
ERA = [("13b-v0", 3, 0, (304, 305, 306)), ("7b-v0", 4, 304, (305, 306, 307)), ("v1-1", 3, 0, (304, 305, 306)), ("decapoda", 0, 0, ())]


def repaired(files: dict[str, Any], rows: int, **options: Any) -> tuple[dict[str, Any], SpecialIds, tuple[str, ...]]:
    return repair_tokenizer({"tokenizer.model": TINY, **files}, rows=rows, **options)


def parsed(files: dict[str, Any], name: str) -> Any:
    return json.loads(files[name] if isinstance(files[name], bytes) else files[name].read_bytes())


@cache
def fast_model() -> dict[str, Any]:
    """The BPE of the tiny tokenizer.model for the tokenizers library: pieces from sentencepiece, merges in order of their ids."""
    library = sentencepiece.SentencePieceProcessor(model_proto=TINY)
    vocab = {library.id_to_piece(i): i for i in range(library.get_piece_size())}
    merges = [[p[:cut], p[cut:]] for p in vocab for cut in range(1, len(p)) if p[:cut] in vocab and p[cut:] in vocab]
    return {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}


def loaded(files: dict[str, Any], folder: Path) -> Any:
    """These files as transformers' LlamaTokenizer. Without protobuf it can't read tokenizer.model: then pieces and merges come from
    a tokenizer.json with nothing else, and the caller passes add_bos_token, which transformers does not read from the files then."""
    from transformers import LlamaTokenizer

    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    if find_spec("google") and find_spec("google.protobuf"):
        return LlamaTokenizer.from_pretrained(folder)
    fast = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None, "post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps({**fast, "model": fast_model()}))
    flags = {key: value for key, value in parsed(files, "tokenizer_config.json").items() if key in ("add_bos_token", "add_eos_token")}
    return LlamaTokenizer.from_pretrained(folder, **flags)


def test_rebuilt_files_are_the_published_ones() -> None:
    """md5 of the author's merged LLaVA-13B-v0 (haotian-liu/LLaVA #48)."""
    files = era("13b-v0", base=32000)
    assert hashlib.md5(files["added_tokens.json"]).hexdigest() == "95e1b235bf9921a5f1e1f387d87aa46e"
    assert hashlib.md5(files["special_tokens_map.json"]).hexdigest() == "dc67bae5a78e59bafe37782e40763e7f"


@pytest.mark.parametrize(("name", "more", "pad", "image"), ERA)
def test_transformers_reads_the_true_ids_after_repair(name: str, more: int, pad: int, image: tuple[int, ...], tmp_path: Path) -> None:
    files, ids, notes = repaired(era(name), 304 + more, model_max_length=2048)
    assert (ids.bos, ids.eos, ids.unk, ids.pad, ids.base_vocabulary) == (1, 2, 0, pad, 304)
    assert tuple(ids.added[token] for token in IMAGE if image) == image
    assert notes

    loads = loaded(files, tmp_path / "repaired")
    assert (loads.bos_token_id, loads.eos_token_id, loads.unk_token_id, loads.pad_token_id) == (1, 2, 0, pad)
    assert len(loads) == 304 + more
    assert loads.model_max_length == 2048
    prompt = "".join(f"{token} " for token in IMAGE if image)
    assert [i for i in loads(prompt + "b</s>b").input_ids if i != 277] == [1, *image, 264, 2, 264]  # 277 "▁", 264 "▁b"


def test_the_published_files_are_wrong_without_repair(tmp_path: Path) -> None:
    wrong = loaded({"tokenizer.model": TINY, **era("13b-v0")}, tmp_path / "wrong")
    assert (wrong.bos_token_id, wrong.pad_token_id, len(wrong)) == (2, 307, 308)  # and the table has 307 rows
    assert wrong("b").input_ids == [264]  # no <s>


@pytest.mark.parametrize(("name", "more", "pad", "image"), ERA)
def test_repairing_twice_changes_and_reports_nothing(name: str, more: int, pad: int, image: tuple[int, ...], tmp_path: Path) -> None:
    once, ids, _ = repaired(era(name), 304 + more)
    twice, same, notes = repair_tokenizer(once, rows=304 + more)
    assert (twice, same, notes) == (once, ids, ())
    folder = {}
    for file, content in once.items():
        folder[file] = tmp_path / file
        folder[file].write_bytes(content)
    assert repair_tokenizer(folder, rows=304 + more) == (folder, ids, ())


def test_every_repair_of_the_13b_delta_is_one_sentence() -> None:
    _, _, notes = repaired(era("13b-v0"), 307, model_max_length=2048)
    assert notes == (
        "tokenizer: `[PAD]` (id 307) dropped, the table has 307 rows",
        "special_tokens_map.json: bos `</s>` -> `<s>`, pad `[PAD]` -> `<unk>`",
        "tokenizer_config.json: bos empty -> `<s>`, eos empty -> `</s>`, pad missing -> `<unk>`, unk empty -> `<unk>`, "
        "class `LLaMATokenizer` -> `LlamaTokenizer`, model_max_length -> 2048, "
        "made explicit `legacy` true, `add_bos_token` true, `add_eos_token` false",
        "tokenizer_config.json: dropped `special_tokens_map_file`",
    )


@pytest.mark.parametrize(("folder", "rows"), [("delta-307-apr17", 307), ("delta-308-may4", 308)])
def test_reference_deltas_give_the_recorded_ids(folder: str, rows: int, tmp_path: Path) -> None:
    source = FIXTURES / "A-delta-v0" / folder
    given_files = {path.name: path for path in source.iterdir() if "token" in path.name}
    files, ids, _ = repair_tokenizer(given_files, rows=rows)
    assert files["tokenizer.model"] is given_files["tokenizer.model"]
    assert files["added_tokens.json"] is given_files["added_tokens.json"]
    assert ids.pad == {307: 0, 308: 304}[rows]
    files.pop("tokenizer.json", None)
    case = json.loads((FIXTURES / "E-logits/A-delta-v0/cases.json").read_bytes())[f"v{rows}.text"]
    assert loaded(files, tmp_path / "x")(case["prompt"]).input_ids == case["input_ids"]


def test_a_token_that_only_tokenizer_json_lists_has_its_row() -> None:
    """transformers 5 writes no other list of them."""
    fast = {"model": {"vocab": {"<unk>": 0}}, "added_tokens": [{"id": 304, "content": "<image>", "special": True}]}
    files = {**era("7b-v0"), "tokenizer.json": dump(fast)}
    files.pop("added_tokens.json", None)
    result, ids, _ = repaired(files, 305)
    assert ids.added == {"<image>": 304} == json.loads(result["added_tokens.json"])
    assert result["tokenizer.json"] is files["tokenizer.json"]


def test_settings_with_paths_and_code_are_dropped_and_choices_kept() -> None:
    settings = {
        "auto_map": {"AutoTokenizer": "evil.py"}, "name_or_path": "/home/x", "_private": 1, "add_prefix_space": None,
        "sp_model_kwargs": {"model_file": "/etc/passwd"}, "padding_side": "up", "truncation_side": "left",
        "legacy": False, "add_bos_token": 1, "chat_template": "{{ x }}",
    }  # fmt: skip
    result, _, notes = repaired({"tokenizer_config.json": dump(settings)}, 304)
    written = parsed(result, "tokenizer_config.json")
    assert not {"auto_map", "name_or_path", "_private", "sp_model_kwargs", "add_prefix_space", "padding_side"} & set(written)
    assert written["legacy"] is False
    assert written["add_bos_token"] is True
    assert (written["truncation_side"], written["chat_template"]) == ("left", "{{ x }}")
    assert any("dropped" in note and "`auto_map`" in note for note in notes)


@pytest.mark.parametrize("limit", ["2048", True, -1, 10**30, None])
def test_a_limit_that_is_none_is_not_written(limit: Any) -> None:
    result, _, _ = repaired(era("13b-v0"), 307, model_max_length=limit)
    assert parsed(result, "tokenizer_config.json")["model_max_length"] == NO_LIMIT


def test_missing_model_comes_from_the_base_and_other_files_pass() -> None:
    base = {"tokenizer.model": TINY, "tokenizer_config.json": b"not looked at"}
    files, ids, notes = repair_tokenizer({**era("v1-1"), "LICENSE": b"text"}, rows=307, fallback=base)
    assert files["tokenizer.model"] is TINY
    assert files["LICENSE"] == b"text"
    assert ids.added["<im_patch>"] == 304
    assert "tokenizer.model: taken from the base" in notes


def test_without_any_model_nothing_is_touched() -> None:
    files, ids, notes = repair_tokenizer(era("v1-1"), rows=307, fallback={})
    assert files == era("v1-1")
    assert (ids.bos, ids.eos, ids.pad, ids.base_vocabulary, ids.added["<im_end>"]) == (None, None, None, 304, 306)
    assert len(notes) == 1


def test_missing_json_files_are_written() -> None:
    files, ids, notes = repaired({}, 304)
    assert parsed(files, "special_tokens_map.json") == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
    }
    assert ids == SpecialIds(bos=1, eos=2, pad=0, unk=0, added={}, base_vocabulary=304) == read_special_ids(files, 304)
    assert notes == ("special_tokens_map.json: written, it was missing", "tokenizer_config.json: written, it was missing")


def test_added_tokens_come_from_the_decoder_too() -> None:
    decoder = {str(304 + place): {"content": token, "normalized": False} for place, token in enumerate(IMAGE)}
    files, ids, _ = repaired({"tokenizer_config.json": dump({"added_tokens_decoder": decoder})}, 307)
    assert parsed(files, "added_tokens.json") == dict(zip(IMAGE, (304, 305, 306), strict=True)) == ids.added
    assert parsed(files, "tokenizer_config.json")["added_tokens_decoder"] == decoder


@pytest.mark.parametrize("entries", [{"0": token("<unk>")}, {"307": token("[PAD]")}, {"304": {"content": "<im_patch>", "special": 1}}])
def test_a_decoder_that_would_lose_tokens_is_dropped(entries: dict[str, Any]) -> None:
    settings = dump({"added_tokens_decoder": entries})
    files, _, notes = repaired({**era("v1-1"), "tokenizer_config.json": settings}, 307)
    assert "added_tokens_decoder" not in parsed(files, "tokenizer_config.json")
    assert "tokenizer_config.json: dropped `added_tokens_decoder`" in notes


def test_pieces_repeated_as_added_tokens_are_dropped() -> None:
    files, ids, notes = repaired({"added_tokens.json": dump({"<s>": 1, "</s>": 2, "[PAD]": 304})}, 305)
    assert parsed(files, "added_tokens.json") == {"[PAD]": 304} == ids.added
    assert "added_tokens.json: dropped `</s>`, `<s>`, already pieces of tokenizer.model" in notes


def test_rows_padded_in_front_of_added_tokens_keep_the_ids(tmp_path: Path) -> None:
    """A table padded to a multiple of 64 before tokens were added: by themselves the fast tokenizers would number these from 304."""
    files, ids, notes = repaired({"added_tokens.json": dump({"<a>": 320, "<b>": 321})}, 322)
    assert sorted(ids.added.values()) == [*range(304, 322)]
    assert ids.added["<b>"] == 321
    assert "added_tokens.json: <unused_304> to 319 added, rows of padding in front of the added tokens" in notes
    assert repaired(files, 322)[2] == ()
    assert loaded(files, tmp_path / "folder")("<b>", add_special_tokens=False).input_ids == [321]


@pytest.mark.parametrize(
    ("added", "rows", "words"),
    [
        ({"<a>": 304, "<b>": 306}, 310, "gap"),
        ({"<a>": 311}, 312, "gap"),
        ({"<a>": 640}, 641, "gap"),
        ({"<a>": 320, "<unused_304>": 321}, 322, "gap"),
        ({"<a>": 304, "<b>": 304}, 310, "contradicts"),
        ({"<s>": 304}, 310, "contradicts"),
        ({"<a>": 7}, 310, "contradicts"),
        ({"<a>": "304"}, 310, "not a whole number"),
        ({"<a>": True}, 310, "not a whole number"),
        ({}, 303, "304 pieces"),
    ],
)
def test_contradictions_are_refused(added: dict[str, Any], rows: int, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        repaired({"added_tokens.json": dump(added)}, rows)
    assert caught.value.exit_code == 3


def test_the_known_tokenizer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("LLaMA's own" in note for note in repaired({}, 304)[2])
    monkeypatch.setattr(tokenizer, "LLAMA_TOKENIZER", hashlib.sha256(TINY).hexdigest())
    assert any("LLaMA's own" in note for note in repaired({}, 304)[2])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 400) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
TOKEN = st.sampled_from(["", "<s>", "</s>", "<unk>", "[PAD]", "<im_patch>", "▁b"]) | st.builds(token, st.text(max_size=4)) | JSON
KEYS = [
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "additional_special_tokens",
    "added_tokens_decoder",
    "legacy",
    "tokenizer_class",
]
NAMES = st.sampled_from(["[PAD]", "<im_patch>", "<s>", "<a>"])
LISTING = st.lists(NAMES.filter(lambda name: name != "<s>"), unique=True).map(lambda names: {n: 304 + i for i, n in enumerate(names)})
DECODER = st.dictionaries(st.integers(0, 310).map(str) | st.text(max_size=3), TOKEN, max_size=3)


@settings(max_examples=120)
@given(
    special=st.dictionaries(st.sampled_from(KEYS), TOKEN),
    config=st.dictionaries(st.sampled_from(KEYS), TOKEN | DECODER),
    added=LISTING | LISTING | st.dictionaries(NAMES, st.integers(300, 310) | JSON, max_size=4) | JSON,
    rows=st.integers(304, 312),
)
@example(special={}, config={"legacy": 1, "add_bos_token": 1}, added={}, rows=304)
def test_any_json_is_repaired_once_or_refused(special: Any, config: Any, added: Any, rows: int) -> None:
    contents = {"special_tokens_map.json": special, "tokenizer_config.json": config, "added_tokens.json": added}
    try:
        files, ids, notes = repaired({name: dump(content) for name, content in contents.items()}, rows)
    except InputError:
        return
    assert all(0 <= i < rows for i in (ids.bos, ids.eos, ids.pad, ids.unk, *ids.added.values()))
    assert all(note.isprintable() for note in notes)
    assert repair_tokenizer(files, rows=rows) == (files, ids, ())
    assert notes or files == {"tokenizer.model": TINY, **{name: dump(content) for name, content in contents.items() if name in files}}


# --- tokenizer.model ------------------------------------------------------------------------------------------------


def trained(**options: Any) -> bytes:
    model = io.BytesIO()
    sentences = iter(["a tall man and a small cat", "the cat sat on the mat", "what can be seen here"] * 5)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, model_type="bpe", vocab_size=60, minloglevel=4, **options
    )
    return model.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        None,
        {"byte_fallback": False, "pad_id": 3},
        {"bos_piece": "<|start|>", "eos_piece": "<|end|>", "unk_piece": "<|?|>", "bos_id": 2, "eos_id": 0, "unk_id": 1},
    ],
)
def test_pieces_and_ids_are_those_of_sentencepiece(options: dict[str, Any] | None) -> None:
    data = TINY if options is None else trained(**options)
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    found = read_sentencepiece(data)
    assert [*found.ids] == [library.id_to_piece(i) for i in range(library.get_piece_size())]
    assert (found.ids[found.bos], found.ids[found.eos], found.ids[found.unk]) == (library.bos_id(), library.eos_id(), library.unk_id())
    assert (-1 if found.pad is None else found.ids[found.pad]) == library.pad_id()


def test_a_model_with_its_own_pad_uses_it() -> None:
    ids = read_special_ids({"tokenizer.model": trained(pad_id=3)}, 60)
    assert ids.pad == 3


def test_a_model_without_bos_is_refused() -> None:
    with pytest.raises(InputError, match="the bos token"):
        read_sentencepiece(trained(bos_id=-1))


def read_or_refused(data: bytes) -> None:
    """Nothing but a vocabulary, or an InputError that names the file."""
    try:
        vocabulary = read_sentencepiece(data)
    except InputError as error:
        refusal = error.what
    else:
        assert {vocabulary.bos, vocabulary.eos, vocabulary.unk} <= set(vocabulary.ids)
        return
    assert "tokenizer.model" in refusal


@settings(max_examples=80)
@given(data=st.binary(max_size=60) | st.builds(lambda at: TINY[:at], st.integers(0, len(TINY))))
@example(data=b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
@example(data=b"\x0a\x80")
@example(data=b"\x0b")
@example(data=b"\x08\x01")
@example(data=b"\x0a\x03\x0a\x01\xff")
def test_hostile_bytes_are_read_or_refused(data: bytes) -> None:
    read_or_refused(data)


@settings(max_examples=80)
@given(place=st.integers(0, len(TINY) * 8 - 1))
def test_a_flipped_bit_is_read_or_refused(place: int) -> None:
    data = bytearray(TINY)
    data[place // 8] ^= 1 << place % 8
    read_or_refused(bytes(data))


def test_large_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="at most"):
        repair_tokenizer({"tokenizer.model": path}, rows=304)
