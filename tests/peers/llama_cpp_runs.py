"""llama.cpp computes with our files what transformers computes with the llava-hf form of the same model. Run by `make llamacpp`.

The build has one fault mended that every LLaVA has there (#25814, the class token behind the patches): without that no file gives the right
features. Caches are float32; toys are enlarged, so that attention and its rope count.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forwards import load_model
from gguf_models import CASES, Case, make_case
from peers.environments import run
from transformers import AutoTokenizer

import llava_weights as lw

COUNT = 12  # tokens that are continued
PROMPT = "the line is a word in 3 lines"
WITH_IMAGE = [case for case in CASES if "images in tiles" not in case.title]  # llama.cpp puts tiles together in a way of its own
pytestmark = [pytest.mark.peer, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """By case the folder with `hf` and `gguf`, in float32."""
    made = {}
    for case in CASES:
        folder = made[case.name] = tmp_path_factory.mktemp("case")
        make_case(case, folder)
        enlarge(folder / "llava")
        form = "gelu" if case.linear else None
        for name, to in (("hf", "llava-hf"), ("gguf", "gguf")):
            model = lw.convert(folder / "llava", to, dtype="F32", projector_form=form)
            lw.execute(lw.make_plan(model, name="toy"), folder / name)
    return made


def enlarge(folder: Path) -> None:
    """Matrices of the text model ten times as large, and all in float32, so that Gemma's norms are not rounded with one added."""
    lone = folder / "model.safetensors"
    if lone.exists():
        from safetensors.torch import load_file, save_file

        save_file({name: larger(name, values) for name, values in load_file(lone).items()}, lone, metadata={"format": "pt"})
    else:
        path = folder / "pytorch_model.bin"
        torch.save({name: larger(name, values) for name, values in torch.load(path, weights_only=True).items()}, path)


def larger(name: str, values: torch.Tensor) -> torch.Tensor:
    matrix = values.ndim == 2 and name.startswith(("model.layers.", "model.embed_tokens", "lm_head"))
    return values.float() * (10 if matrix else 1)


def ran(task: str, cases: list[Case], folders: Mapping[str, Path], work: Path, **more: Any) -> dict[str, dict[str, np.ndarray]]:
    jobs = [
        {
            "file": str(folders[case.name] / "gguf" / "toy-F32.gguf"),
            "mmproj": str(folders[case.name] / "gguf" / "mmproj-toy-F32.gguf"),
            "out": str(work / f"{task}-{case.name}.npz"),
            "count": COUNT,
            **more,
        }
        for case in cases
    ]
    run("llama-cpp-python", task, {"jobs": jobs}, work, script="run_llama_cpp_python.py")
    return {case.name: dict(np.load(str(job["out"]))) for case, job in zip(cases, jobs, strict=True)}


@pytest.fixture(scope="module")
def texts(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, np.ndarray]]:
    ids = [int(number) for number in np.random.default_rng(7).integers(3, 250, 40)]
    return ran("text", list(CASES), folders, tmp_path_factory.mktemp("texts"), ids=ids, prompt=PROMPT) | {"": {"ids": np.array(ids)}}


@pytest.fixture(scope="module")
def images(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, np.ndarray]]:
    work = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(8).integers(0, 256, (28, 28, 3), np.uint8)
    np.save(work / "pixels.npy", pixels)
    found = ran("image", WITH_IMAGE, folders, work, pixels=str(work / "pixels.npy"), prompt=f"<image>{PROMPT}")
    return found | {"": {"pixels": pixels}}


def greedy(model: Any, ids: list[int], **given: torch.Tensor) -> list[int]:
    found = list(ids)
    with torch.no_grad():
        for _ in range(COUNT):
            found.append(int(model(input_ids=torch.tensor([found]), use_cache=False, **given).logits[0, -1].argmax()))
    return found[len(ids) :]


class TableGelu(torch.nn.Module):
    """ggml's gelu: the one by tanh, from a table of float16 by float16, but 0 and itself beyond 10 (ggml/src/ggml-cpu/vec.h)."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        halves = torch.nn.functional.gelu(values.half().float(), approximate="tanh").half().float()
        return torch.where(values <= -10, 0.0, torch.where(values >= 10, values, halves))


def with_its_gelu(case: Case, model: Any) -> Any:
    for layer in model.model.language_model.layers if case.decoder == "gemma" else ():
        layer.mlp.act_fn = TableGelu()
    return model


@pytest.mark.parametrize("case", CASES, ids=str)
def test_text(case: Case, folders: Mapping[str, Path], texts: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Logits of 40 tokens within 5e-5, the same 12 tokens behind them, and, but for Gemma, the same ids of a text."""
    model = with_its_gelu(case, load_model(folders[case.name] / "hf")[0])
    ids = [int(number) for number in texts[""]["ids"]]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    found = texts[case.name]
    apart = float(np.abs(found["logits"] - wanted).max())
    sys.stderr.write(f"{apart:.1e} apart, the largest is {np.abs(wanted).max():.1f}\n")  # pytest -rP shows it
    # a value that falls on the other side of a step of that table is off by 5e-4 of itself
    assert apart < 5e-5 * (float(np.abs(wanted).max()) if case.decoder == "gemma" else 1)
    assert found["tokens"].tolist() == greedy(model, ids)
    if case.decoder != "gemma":  # whose own tokenizer puts no blank before a text, as llama.cpp takes for granted; the toy's does
        assert found["ids"].tolist() == AutoTokenizer.from_pretrained(folders[case.name] / "hf")(PROMPT).input_ids


@pytest.mark.parametrize("case", WITH_IMAGE, ids=str)
def test_image(case: Case, folders: Mapping[str, Path], images: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Features of an image of the tower's own size within 1e-3, of the largest where that is above 1, and the same 12 tokens behind."""
    folder, found = folders[case.name] / "hf", images[case.name]
    model = with_its_gelu(case, load_model(folder)[0])
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(settings[f"image_{name}"]).view(1, 3, 1, 1) for name in ("mean", "std"))
    pixels = (torch.from_numpy(images[""]["pixels"]).permute(2, 0, 1)[None] / 255 - mean) / std
    with torch.no_grad():
        wanted = model.model.get_image_features(pixel_values=pixels).pooler_output[0].numpy()
    apart = float(np.abs(found["features"] - wanted).max())
    sys.stderr.write(f"{apart:.1e} apart, the largest is {np.abs(wanted).max():.1f}\n")  # pytest -rP shows it
    assert apart < 1e-3 * max(1.0, float(np.abs(wanted).max()))
    if case.decoder == "gemma":  # all that enters its layers is multiplied, as in training, but since 5.0 transformers leaves images out
        with torch.no_grad():
            for parameter in model.model.multi_modal_projector.linear_2.parameters():
                parameter *= model.config.text_config.hidden_size**0.5
    image = model.config.image_token_id
    ids = [image if number < 0 else number for number in found["ids"].tolist()]
    assert ids.count(image) == len(wanted)
    assert found["tokens"].tolist() == greedy(model, ids, pixel_values=pixels)
