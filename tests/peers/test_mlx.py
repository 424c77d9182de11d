"""An adapter of MLX is merged as mlx-lm's `fuse` merges it. Run by `make peer`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_weights as lw

HERE = Path(__file__).resolve().parent
PYTHON = HERE.parent.parent / ".peers/mlx/bin/python"
SCALE, RANK = 3.0, 4
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
Tensors = dict[str, torch.Tensor]

pytestmark = [pytest.mark.peer, pytest.mark.timeout(300)]


def eighths(*shape: int) -> torch.Tensor:
    """Small multiples of 1/8: no sum of their products is rounded, in whatever order it is made."""
    return torch.randint(-3, 4, shape).float() / 8


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, Tensors]:
    """What mlx-lm is given, and what it makes of it."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: run `make peer`, which sets it up")
    folder, given = tmp_path_factory.mktemp("mlx"), {}
    torch.manual_seed(2)
    for name, dtype in DTYPES.items():
        for kind, (out, inside) in {"linear": (96, 64), "wide": (40, 200), "dora": (96, 64), "embedding": (70, 48)}.items():
            case = f"{kind}-{name}"
            given[f"{case}.weight"] = (torch.randn(out, inside) * 0.02).to(dtype)
            given[f"{case}.lora_a"] = eighths(out if kind == "embedding" else inside, RANK) / 64
            given[f"{case}.lora_b"] = eighths(RANK, inside if kind == "embedding" else out)
            if kind == "dora":
                given[f"{case}.m"] = given[f"{case}.weight"].float().norm(dim=1) * 1.1
    save_file(given, folder / "in.safetensors")
    command = [str(PYTHON), str(HERE / "run_mlx.py"), str(folder / "in.safetensors"), str(folder / "out.safetensors")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return given, load_file(folder / "out.safetensors")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["linear", "wide", "dora", "embedding"])
def test_the_merge_is_mlx_lm_s(fused: tuple[Tensors, Tensors], tmp_path: Path, kind: str, dtype: str) -> None:
    """Bit for bit; a DoRA within the rounding of its norms, which MLX takes in the dtype of the weight."""
    given, expected = fused
    case, module = f"{kind}-{dtype}", "model.embed_tokens" if kind == "embedding" else "model.layers.0.self_attn.q_proj"
    (tmp_path / "base").mkdir()
    (tmp_path / "lora").mkdir()
    save_file({f"{module}.weight": given[f"{case}.weight"]}, tmp_path / "base/model.safetensors")
    parts = {name.rpartition(".")[2]: tensor for name, tensor in given.items() if name.startswith(f"{case}.") and "weight" not in name}
    save_file({f"{module}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "lora/adapters.safetensors")
    settings = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    config = {"fine_tune_type": "dora" if kind == "dora" else "lora", "num_layers": 1, "lora_parameters": settings}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    lw.execute(lw.make_plan(lw.merge_lora(tmp_path / "base", tmp_path / "lora")), tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")[f"{module}.weight"]
    if kind != "dora":
        assert torch.equal(found, expected[case])
        return
    one = {"F16": 2.0**-10, "BF16": 2.0**-7, "F32": 2.0**-22}[dtype]
    assert torch.allclose(found.float(), expected[case].float(), rtol=2 * one, atol=1e-7)
