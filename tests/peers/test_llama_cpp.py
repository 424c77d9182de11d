"""Our GGUF files are, byte for byte, those that llama.cpp's converters make of the llava-hf form of the same model. Run by `make peer`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import CASES, Case, make_case
from peers.environments import PEERS, Json, run

import llava_weights as lw
from llava_weights.checkpoint.tokenizer_json import qwen2_json
from llava_weights.families.llama_cpp import CONTROL, NORMAL
from llava_weights.formats.gguf import index_gguf

TYPES = ("F16", "BF16", "F32")
LICENSED = "v1.5"  # the case whose card names a licence
pytestmark = [pytest.mark.peer, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """By case the folder with `llava` and, as llama.cpp's converters need it, `Model`: one shard, with the card that they read."""
    made = {}
    for case in CASES:
        folder = made[case.name] = tmp_path_factory.mktemp("case")
        make_case(case, folder)
        if case.name == LICENSED:
            (folder / "llava" / "README.md").write_text("---\nlicense: llama2\n---\n")
        lw.execute(lw.make_plan(lw.convert(folder / "llava", "llava-hf", projector_form="gelu" if case.linear else None)), folder / "Model")
    return made


def llama_cpp(task: str, jobs: list[Json], folder: Path) -> None:
    run("llama-cpp", task, {"jobs": jobs}, folder, script="run_llama_cpp.py")


@pytest.fixture(scope="module")
def theirs(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """What llama.cpp made of a case and a type: `text` or `mmproj`."""
    work = tmp_path_factory.mktemp("llama.cpp")
    for task, types in (("text", TYPES), ("mmproj", ("F16", "F32"))):
        llama_cpp(task, [job(case, kind, folders, work, task) for case in CASES for kind in types], work)
    return lambda task, name: work / f"{task}-{name}.gguf"


def job(case: Case, kind: str, folders: Mapping[str, Path], work: Path, task: str) -> dict[str, Any]:
    name = f"{case.name}-{kind}"
    return {
        "folder": str(folders[case.name] / "Model"),
        "type": kind,
        "out": str(work / f"{task}-{name}.gguf"),
        "work": str(work / f"{task}-{name}"),
        "pre": case.pre,
    }


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bytes(case: Case, kind: str, folders: Mapping[str, Path], theirs: Callable[[str, str], Path], tmp_path: Path) -> None:
    out = tmp_path / "Model"
    lw.execute(lw.make_plan(lw.convert(folders[case.name] / "llava", "gguf", dtype=kind), name="Model"), out)
    assert (out / f"Model-{kind}.gguf").read_bytes() == theirs("text", f"{case.name}-{kind}").read_bytes()
    half = "F32" if kind == "F32" else "F16"
    if kind != "BF16":
        assert (out / f"mmproj-Model-{half}.gguf").read_bytes() == theirs("mmproj", f"{case.name}-{half}").read_bytes()


def test_sharded_input(folders: Mapping[str, Path], theirs: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Of a model in several shards llama.cpp has the same keys and the same tensors, in another order."""
    from gguf import GGUFReader

    source = folders["v1.5"] / "llava"
    lw.execute(lw.make_plan(lw.convert(source, "llava-hf"), max_shard_size="20kB"), tmp_path / "Model")
    assert len(list((tmp_path / "Model").glob("*.safetensors"))) > 2
    out = tmp_path / "theirs.gguf"
    llama_cpp("text", [{"folder": str(tmp_path / "Model"), "type": "F16", "out": str(out), "pre": ""}], tmp_path)
    found = [{tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors} for path in (out, theirs("text", "v1.5-F16"))]
    assert found[0] == found[1]
    assert list(found[0]) != list(found[1])


@pytest.mark.parametrize(
    ("vocabulary", "bos", "pre"), [("qwen2", "", "qwen2"), ("llama-bpe", "<|begin_of_text|>", "llama-bpe"), ("llama-bpe", "", "smaug-bpe")]
)
def test_published_tokenizers(vocabulary: str, bos: str, pre: str, tmp_path: Path) -> None:
    """Qwen2's and Llama 3's whole vocabularies, which llama.cpp's source has for its own tests: named by their hash, and the same bytes.
    Llama 3's without a template that puts `bos` before a text has a name of its own."""
    case = next(case for case in CASES if case.name == ("qwen2" if vocabulary == "qwen2" else "llama3"))
    make_case(case, tmp_path)
    give_vocabulary(tmp_path / "llava", next((PEERS / "llama-cpp").glob(f"*/vendor/llama.cpp/models/ggml-vocab-{vocabulary}.gguf")), bos)
    lw.execute(lw.make_plan(lw.convert(tmp_path / "llava", "llava-hf")), tmp_path / "Model")
    llama_cpp("text", [{"folder": str(tmp_path / "Model"), "type": "F16", "out": str(tmp_path / "theirs.gguf"), "pre": ""}], tmp_path)
    lw.execute(lw.make_plan(lw.convert(tmp_path / "llava", "gguf"), name="Model"), tmp_path / "ours")
    assert index_gguf(tmp_path / "ours" / "Model-F16.gguf")[1]["tokenizer.ggml.pre"].value == pre
    assert (tmp_path / "ours" / "Model-F16.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def give_vocabulary(folder: Path, source: Path, bos: str) -> None:
    """The tokens and merges of a GGUF as the tokenizer of a toy with a byte-level one, whose tables get as many rows."""
    keys = {name.removeprefix("tokenizer.ggml."): key.value for name, key in index_gguf(source)[1].items()}
    tokens, types = keys["tokens"], keys["token_type"]
    assert isinstance(tokens, tuple)
    assert isinstance(types, tuple)
    core = json.loads((folder / "tokenizer.json").read_text()) if (folder / "tokenizer.json").exists() else qwen2_json({}, "")
    core["model"] |= {"vocab": {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}, "merges": list(keys["merges"])}  # type: ignore[arg-type]
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) | {"special": True}
    core["added_tokens"] = [{"id": i, "content": token, **flags} for i, token in enumerate(tokens) if types[i] == CONTROL]
    for step in core["post_processor"].get("processors", []):
        if step["type"] == "TemplateProcessing":
            step |= {"special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}}} if bos else {"type": ""}
    if not bos and "processors" in core["post_processor"]:
        core["post_processor"] = core["post_processor"]["processors"][0]
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(core))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name].new_zeros(len(tokens) - len(tensors[name]), tensors[name].shape[1])])
    torch.save(tensors, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": len(tokens), "bos_token_id": keys["bos_token_id"]}
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": keys["eos_token_id"]}))
