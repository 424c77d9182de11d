"""The forward pass on a GPU: float32 there is float32 here, and half precision stays plausible. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.smoke.logits import compare, compare_original
from llava_weights.smoke.recording import record
from llava_weights.transforms.convert import convert
from llava_weights.write.execute import execute
from llava_weights.write.plan import make_plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")]


@pytest.fixture(scope="module")
def model(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "model"
    tower = open_checkpoint(fixtures / "common/clip-tiny-42px")
    execute(make_plan(convert(open_checkpoint(fixtures / "D-v1.6/original-vicuna"), "llava-hf", tower=tower)), out)
    return out


@pytest.mark.parametrize("resident", [False, True])
def test_float32_is_the_same_as_on_the_processor(model: Path, tmp_path: Path, resident: bool) -> None:
    record(open_checkpoint(model), tmp_path / "reference.safetensors")
    done = compare(open_checkpoint(model), tmp_path / "reference.safetensors", device="cuda", resident=resident)
    assert (done.verdict, done.exit_code) == ("same", 0), done.findings


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_precision_is_plausible(model: Path, fixtures: Path, dtype: str) -> None:
    tower = open_checkpoint(fixtures / "common/clip-tiny-42px")
    original = open_checkpoint(fixtures / "D-v1.6/original-vicuna")
    done = compare_original(open_checkpoint(model), original, tower=tower, device="cuda", dtype=dtype)
    assert done.exit_code == 0, done.findings
