"""Toys for the tests of GGUF: one for each decoder, tokenizer, kind of rope and projector that can be written."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_weights.checkpoint.tokenizer_json import BYTE_LETTERS, qwen2_json
from llava_weights.cli.toy import make_llava
from llava_weights.families.llama_cpp import LLAMA3_SPLIT
from llava_weights.families.originals import ORIGINALS

LLAMA_3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>")


@dataclass(frozen=True)
class Case:
    """A toy of the family `title` on `decoder`. `config` replaces keys of config.json; `llama3`: with a tokenizer as Llama 3's."""

    name: str
    title: str
    decoder: str
    config: dict[str, Any] = field(default_factory=dict)
    linear: bool = False
    llama3: bool = False
    pre: str = ""

    def __str__(self) -> str:
        return self.name


V15, V16 = "LLaVA v1.5 and v1.6", "LLaVA v1.5 and v1.6, images in tiles"
LLAMA_31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES = (
    Case("v1.5", V15, "llama"),
    Case("v1.6", V16, "llama", {"image_crop_resolution": 28, "image_split_resolution": 28}),
    Case("v1.6-mistral", "LLaVA on Mistral, images in tiles", "mistral"),
    Case("34b", "LLaVA v1.6 34B, images in tiles", "llama"),
    Case("linear", "LLaVA v1", "llama", linear=True),
    Case("rope-linear", V15, "llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    Case("rope-llama3", V15, "llama", {"rope_scaling": LLAMA_31}),
    Case("qwen2", "LLaVA on Qwen", "qwen2", pre="qwen2"),
    Case("qwen2-tied", "LLaVA on Qwen", "qwen2", {"tie_word_embeddings": True}, pre="qwen2"),
    Case("rope-yarn", "LLaVA on Qwen", "qwen2", {"rope_scaling": YARN, "max_position_embeddings": 64}, pre="qwen2"),
    Case("qwen3", "LLaVA on Qwen", "qwen3", pre="qwen2"),
    Case("phi3", "LLaVA++ on Phi-3", "phi3"),
    Case("gemma", "LLaVA on Gemma", "gemma"),
    Case("llama3", "LLaVA on Llama 3, images in tiles", "llama", llama3=True, pre="llama-bpe"),
)


def make_case(case: Case, folder: Path) -> None:
    """`llava`, in the original layout, in `folder`."""
    row = next(row for row in ORIGINALS if row.name == case.title and case.decoder in row.decoders and "clip" in row.towers)
    make_llava(folder, row, decoder=case.decoder, tower="clip")
    place = folder / "llava"
    if (place / "merges.txt").exists():
        _give_merges(place)
    config = json.loads((place / "config.json").read_text())
    if case.llama3:
        config |= _llama_3(place, config["vocab_size"])
    (place / "config.json").write_text(json.dumps(config | case.config))
    if case.config.get("tie_word_embeddings"):
        _untie(place)


def _give_merges(folder: Path) -> None:
    """Two, since llama.cpp loads no byte-level tokenizer without; their tokens take the places of two bytes that no text has."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    for byte, token in ((0xFE, "th"), (0xFF, "the")):
        vocabulary[token] = vocabulary.pop(BYTE_LETTERS[byte])
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")


def _untie(folder: Path) -> None:
    """Drop the head, which is the embedding then."""
    import torch
    from safetensors.torch import save_file

    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del tensors["lm_head.weight"]
    save_file({name: values.contiguous() for name, values in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "pytorch_model.bin").unlink()


def _llama_3(folder: Path, rows: int) -> dict[str, Any]:
    """A byte-level tokenizer.json with Llama 3's pre-tokenizer, tokens and template for a table of `rows` rows; keys of config.json."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    words = [*letters, "ab", "\u0120a"][: rows - len(LLAMA_3_TOKENS)]
    core = qwen2_json({word: number for number, word in enumerate(words)}, "a b\n\u0120 a\n")
    core["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": LLAMA3_SPLIT}
    core["model"]["ignore_merges"] = True
    ids = {token: len(words) + number for number, token in enumerate(LLAMA_3_TOKENS)}
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) | {"special": True}
    core["added_tokens"] = [{"id": number, "content": token, **flags} for token, number in ids.items()]
    first, bos = LLAMA_3_TOKENS[0], {"SpecialToken": {"id": LLAMA_3_TOKENS[0], "type_id": 0}}
    texts = [{"Sequence": {"id": letter, "type_id": number}} for number, letter in enumerate("AB")]
    template = {
        "type": "TemplateProcessing", "single": [bos, texts[0]], "pair": [bos, texts[0], bos, texts[1]],
        "special_tokens": {first: {"id": first, "ids": [ids[first]], "tokens": [first]}},
    }  # fmt: skip
    core["normalizer"] = None
    core["post_processor"] = {"type": "Sequence", "processors": [core["post_processor"], template]}
    for name in ("tokenizer.model", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(core))
    settings = {"bos_token": first, "eos_token": LLAMA_3_TOKENS[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {"bos_token_id": ids[first], "eos_token_id": ids[LLAMA_3_TOKENS[1]]}
