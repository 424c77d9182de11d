"""Our GGUF files are, byte for byte, those that llama.cpp's converters make of the llava-hf form of the same model. Run by `make peer`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf_models import CASES, Case, make_case, name_of_pre
from peers.environments import Json, run

import llava_weights as lw

TYPES = ("F16", "BF16", "F32")
pytestmark = [pytest.mark.peer, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """By case the folder with `llava` and, as llama.cpp's converters need it, `Model`: one shard, and no card that they would read."""
    made = {}
    for case in CASES:
        folder = made[case.name] = tmp_path_factory.mktemp("case")
        make_case(case, folder)
        lw.execute(lw.make_plan(lw.convert(folder / "llava", "llava-hf", projector_form="gelu" if case.linear else None)), folder / "Model")
        (folder / "Model" / "README.md").unlink()
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
        "pre": name_of_pre(folders[case.name] / "Model"),
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
    (tmp_path / "Model" / "README.md").unlink()
    assert len(list((tmp_path / "Model").glob("*.safetensors"))) > 2
    out = tmp_path / "theirs.gguf"
    llama_cpp("text", [{"folder": str(tmp_path / "Model"), "type": "F16", "out": str(out), "pre": ""}], tmp_path)
    found = [{tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors} for path in (out, theirs("text", "v1.5-F16"))]
    assert found[0] == found[1]
    assert list(found[0]) != list(found[1])


def test_what_a_hash_is_for(folders: Mapping[str, Path]) -> None:
    """The toys' pre-tokenizers are named by the same expressions as those of published models."""
    pres = {case.name: name_of_pre(folders[case.name] / "Model") for case in CASES}
    assert pres == {case.name: case.pre for case in CASES}
    assert json.loads((folders["qwen2"] / "Model" / "config.json").read_text())["text_config"]["model_type"] == "qwen2"
