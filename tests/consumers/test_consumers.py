"""Our outputs in the programs that people use, each held against transformers in float32. Run by `make consumers`, which writes the page.

A row says what is expected of a program and a model: that it works, within a limit; that it runs, and how far off; that it refuses; or that
it computes something else, and whose fault that is. A row that comes out otherwise fails, also where a program got better.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from consumers.models import made, make_models
from peers.environments import MAIN, Json, folder_of, run

import llava_weights as lw

pytestmark = [pytest.mark.consumer, pytest.mark.timeout(3600)]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "consumers.md"
LLAVA = "LLAVA"  # variable with the folder of LLaVA's own program, a clone at this commit:
COMMIT = "c121f04"
QUESTION = "What is in the picture"
USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
)
HUMAN = USER.replace("user", "human")  # v1's words
TOKENS = 12
Outcome = Literal["works", "runs", "refused", "wrong"]


@dataclass(frozen=True)
class Consumer:
    """A program in the environment `place`; `task` of `script` runs it. `tokens`: how many it is asked for."""

    title: str
    place: str
    script: str
    task: str = "run"
    tokens: int = TOKENS


@dataclass(frozen=True)
class Row:
    """`model` is one of `JOBS`; `limit` is of the difference of logits or log-probabilities, `rms` in place of it of the relative error of
    the logits. `note` is what has to be done first, what is wrong and whose fault it is; `says` is in the message of a refusal."""

    consumer: str
    model: str
    expected: Outcome = "works"
    limit: float = 5e-4
    rms: float | None = None
    note: str = ""
    says: str = ""

    def __str__(self) -> str:
        return f"{self.consumer}-{self.model}".replace(" ", "_")


# Folder of models.py, its picture, and the prompt's turns.
JOBS = {
    "v1.5": ("v1.5-hf", "picture.png", USER),
    "v1.6": ("v1.6-hf", "wide.png", USER),
    "v1.6, square picture": ("v1.6-hf", "picture.png", USER),
    "v1 identity": ("v1-identity-hf", "picture.png", HUMAN),
    "v1 relu": ("v1-relu-hf", "picture.png", HUMAN),
    "v1 gelu": ("v1-gelu-hf", "picture.png", HUMAN),
    "v1.5 text": ("v1.5-hf", "", USER),
    "v1.6 text": ("v1.6-hf", "", USER),
    "v1 text": ("v1-gelu-hf", "", HUMAN),
}
CONSUMERS = {
    "pipeline": Consumer('transformers `pipeline("image-text-to-text")`', MAIN, "run_transformers.py", "pipeline"),
    "serve": Consumer("`transformers serve`", "serve", "run_serve.py"),
    "vllm": Consumer("vLLM on the CPU", "vllm", "run_vllm.py"),
    "mlx-vlm": Consumer("mlx-vlm on Linux", "mlx-vlm", "run_mlx_vlm.py", tokens=2),
    "openvino": Consumer("optimum-intel with OpenVINO", "openvino", "run_openvino.py"),
    "8bit": Consumer("bitsandbytes 8 bits on the CPU", MAIN, "run_transformers.py", "8bit"),
    "4bit": Consumer("bitsandbytes NF4 on the CPU", MAIN, "run_transformers.py", "4bit"),
    "peft": Consumer("PEFT: a LoRA trained, then `merge-lora`", MAIN, "run_transformers.py", "train"),
    "llava": Consumer(f"LLaVA's own program, {COMMIT}, on `--to llava`", "4.37.2", "run_llava.py"),
    "llama.cpp": Consumer("llama.cpp on `--to gguf`", "llama-cpp-python", "run_llama_cpp.py"),
}
RESIZED = "torchvision, which this environment has, resizes a picture a little otherwise than PIL; no difference where nothing is resized"
NO_LINEAR = "vLLM knows no projector without activation: convert with `--projector-form relu`"
GELU = "mlx-vlm applies GELU whatever `projector_hidden_act` says: convert with `--projector-form gelu`"
SWAPPED = "optimum-intel takes height and width of the grid of tiles the wrong way round (modeling_visual_language.py, line 1627)"
TILES = "mlx-vlm neither joins nor unpads the tiles, and has one `image_newline` for each feature behind them (llava_next.py)"
ROUNDING = "random weights make the most of a rounding: in a trained text model of 0.9 M parameters it moves the logits by "
TOWER = "once `mm_vision_tower` in config.json names a folder with the CLIP, whose settings for pictures it reads"
ROWS = (
    *(Row("pipeline", model) for model in ("v1.5", "v1.6", "v1 identity", "v1 relu", "v1 gelu")),
    *(Row("serve", model) for model in ("v1.5", "v1.6", "v1 identity", "v1 relu", "v1 gelu")),
    Row("vllm", "v1.5"),
    Row("vllm", "v1.6", limit=0.1, note=RESIZED),
    Row("vllm", "v1.6, square picture"),
    Row("vllm", "v1 identity", "refused", note=NO_LINEAR, says="'linear' is not supported"),
    Row("vllm", "v1 relu"),
    Row("vllm", "v1 gelu"),
    Row("mlx-vlm", "v1.5", limit=2e-3),
    Row("mlx-vlm", "v1.6", "wrong", note=TILES),
    Row("mlx-vlm", "v1 identity", "wrong", note=GELU),
    Row("mlx-vlm", "v1 relu", limit=2e-3),
    Row("mlx-vlm", "v1 gelu", limit=2e-3),
    Row("openvino", "v1.5", limit=2e-3),
    Row("openvino", "v1.6", "refused", note=SWAPPED, says="Number of elements of source"),
    Row("openvino", "v1.6, square picture", "wrong", note=SWAPPED),
    *(Row("openvino", model, limit=2e-3) for model in ("v1 identity", "v1 relu", "v1 gelu")),
    *(Row("8bit", model, "runs", rms=0.2, note=f"{ROUNDING}1%") for model in ("v1.5", "v1.6", "v1 identity", "v1 relu")),
    *(Row("4bit", model, "runs", rms=0.8, note=f"{ROUNDING}6%") for model in ("v1.5", "v1.6", "v1 identity", "v1 relu")),
    Row("peft", "v1.5"),
    Row("peft", "v1.6"),
    Row("llava", "v1.5", note=TOWER),
    Row("llava", "v1.6", note=TOWER),
    *(Row("llama.cpp", model) for model in ("v1.5 text", "v1.6 text", "v1 text")),
)
REPORT: dict[Row, str] = {}  # lines of the page
VERSIONS: dict[str, Json] = {}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("consumers")
    make_models(folder)
    yield folder
    if len(REPORT) == len(ROWS):
        PAGE.write_text(page())


Answers = Callable[[str], Json]


@pytest.fixture(scope="module")
def answers(work: Path) -> Answers:
    """What a consumer found, by model: all its models are run at once, the first time that one of them is asked for."""
    return cache(lambda name: asked(name, work))


@pytest.fixture(scope="module")
def reference(work: Path) -> Json:
    """What transformers computes in float32, by model."""
    jobs = {model: job(work, model) for model in JOBS}
    found: Json = run(MAIN, "reference", {"jobs": jobs, "tokens": TOKENS}, work, "../consumers/run_transformers.py")["found"]
    return found


def job(work: Path, model: str) -> Json:
    folder, picture, turns = JOBS[model]
    prompt = turns + ("<image>\n" if picture else "") + f"{QUESTION} ASSISTANT:"
    return {"folder": str(work / folder), "picture": str(work / picture) if picture else "", "question": QUESTION, "prompt": prompt}


def asked(name: str, work: Path) -> Json:
    consumer = CONSUMERS[name]
    if consumer.place != MAIN and not (folder_of(consumer.place) / ".stamp").exists():
        pytest.fail(f"{folder_of(consumer.place)} is not set up: run `make consumers`, which does it")
    jobs = {row.model: {**job(work, row.model), **prepared(name, row.model, work)} for row in ROWS if row.consumer == name}
    answer = run(consumer.place, consumer.task, {"jobs": jobs, "tokens": consumer.tokens}, work, f"../consumers/{consumer.script}")
    VERSIONS[name] = answer["versions"]
    found: Json = answer["found"]
    for model, one in jobs.items() if name == "peft" else ():
        made(lw.merge_lora(one["folder"], one["adapter"]), work / f"merged-{model}")
        again = {model: {**one, "folder": str(work / f"merged-{model}")}}
        merged = run(MAIN, "reference", {"jobs": again, "tokens": TOKENS}, work, "../consumers/run_transformers.py")["found"][model]
        found[model] = {**merged, "expected": found[model]}
    return found


def prepared(name: str, model: str, work: Path) -> Json:
    """What a program is given in place of the llava-hf folder, or beside it."""
    if name == "peft":
        return {"adapter": str(work / f"adapter-{model}")}
    if name == "llama.cpp":
        return {"folder": str(next((work / f"{model.partition(' ')[0]}-gguf").glob("v*.gguf")))}
    if name == "llava":
        if not (program := os.environ.get(LLAVA)):
            pytest.fail(f"set {LLAVA} to a clone of github.com/haotian-liu/LLaVA at {COMMIT}")
        folder = work / f"llava-{model}"
        shutil.copytree(work / f"{model}-back", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(work / model / "tower")}))
        return {"folder": str(folder), "program": program}
    return {}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_consumer(row: Row, answers: Answers, reference: Json) -> None:
    found = answers(row.consumer)[row.model]
    outcome, figures = judged(row, found, found.get("expected", reference[row.model]))
    REPORT[row] = f"| {row.model} | {outcome} | {figures} | {row.note} |"
    assert outcome == row.expected, (figures, found.get("error"))
    assert row.says in found.get("error", "")


def judged(row: Row, found: Json, expected: Json) -> tuple[Outcome, str]:
    """Whether a program works, and by what: its refusal, its text, or its ids, tokens and numbers."""
    if "error" in found:
        return "refused", f"`{found['error'].strip().splitlines()[-1][:120]}`"
    if "tokens" not in found:
        return ("works" if found["text"] == expected["text"] else "wrong"), f"the same text of {TOKENS} tokens"
    tokens = found["tokens"]
    same = next((place for place, (a, b) in enumerate(zip(tokens, expected["tokens"], strict=False)) if a != b), len(tokens))
    told = [f"{same} of {len(tokens)} tokens"]
    ids = "ids" not in found or [token for token in found["ids"] if token >= 0] == text_ids(found["ids"], expected["ids"])
    told += [] if ids else ["other ids of the prompt"]
    width = min(len(found["logits"]), len(expected["logits"])) if "logits" in found else 0
    differ = 0.0
    if width:
        a, b = np.array(found["logits"][:width]), np.array(expected["logits"][:width])
        differ = float(np.abs(a - b).max())
        relative = float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))
        told += [f"rms error {relative:.1%}" if row.rms else f"logits within {differ:.1e}"]
        if row.rms:
            return ("runs" if ids and relative <= row.rms else "wrong"), ", ".join(told)
    elif "logprobs" in found:
        differ = float(np.abs(np.array(found["logprobs"]) - np.array(expected["logprobs"][: len(tokens)]))[:same].max(initial=0))
        told += [f"log-probabilities within {differ:.1e}"]
    return ("works" if ids and same == len(tokens) and differ <= row.limit else "wrong"), ", ".join(told)


def text_ids(ids: list[int], expected: list[int]) -> list[int]:
    """`expected`, with one id for an image, as in the ids of a program that has a number below 0 for it; as they are for others."""
    if min(ids) >= 0:
        return expected
    image = max(set(expected), key=expected.count)
    return [token for token in expected if token != image]


def page() -> str:
    """docs/consumers.md."""
    lines = [HEAD]
    for name, consumer in CONSUMERS.items():
        versions = ", ".join(f"{package} {number}" for package, number in VERSIONS[name].items())
        lines += [f"\n## {consumer.title}\n", f"{versions}\n", *TABLE]
        lines += [line for row, line in REPORT.items() if row.consumer == name]
    return "\n".join([*lines, TAIL, ""])


TABLE = ("| model | outcome | compared with transformers | step before, or whose fault |", "| --- | --- | --- | --- |")
HEAD = """# Our outputs in other programs

This page is written by `make consumers`, which sets up each program in an environment of its own and runs it on small random LLaVAs (256
wide, CLIP of 336 pixels, float32) that llava-weights converted. Each is held against transformers in float32 on the same model: the ids of
the prompt, the tokens that follow, the likeliest each time, and the logits behind the prompt or the log-probabilities of those tokens. The
logits' standard deviation is about 1.4. v1 has a single matrix as its projector, so there are three forms of it (`--projector-form`). No
published model was run."""
TAIL = """
## Not run

SGLang needs a GPU. By reading (0.5.23), its class for LLaVA takes the original layout (`--to llava`) with two matrices in the projector;
it does not serve llava-hf."""
