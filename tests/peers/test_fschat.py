"""FastChat's own weight scripts, which made and applied the Vicuna deltas, give the same bits as ours. Run by `make peer`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PEER = Path(__file__).resolve().parent.parent.parent / ".peers" / "fschat"
TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
Tensors = dict[str, torch.Tensor]

pytestmark = pytest.mark.peer


@dataclass(frozen=True)
class Vicuna:
    """A tiny base, the tuned model and their difference, as folders and as tensors."""

    folder: Path
    base: Tensors
    tuned: Tensors
    delta: Tensors


def run_fastchat(module: str, *arguments: str | Path) -> None:
    """Run `python -m fastchat.model.MODULE` in its own environment; its output is the test's failure message."""
    python = PEER / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{PEER} is missing: run `make peer`, which sets it up")
    command = [str(python), "-m", f"fastchat.model.{module}", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def llama_names(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes as transformers itself gives them to a LLaMA of this config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {key: config[key] for key in config if key.endswith("_size") or key.startswith("num_")}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def save_bin(tensors: Tensors, folder: Path, sidecars: Path) -> None:
    """A checkpoint as transformers 4.28 wrote it: two .bin shards, an index, config and tokenizer."""
    folder.mkdir()
    for name in ("config.json", *TOKENIZER):
        shutil.copy(sidecars / name, folder)
    names = list(tensors)
    halves = {"pytorch_model-00001-of-00002.bin": names[: len(names) // 2], "pytorch_model-00002-of-00002.bin": names[len(names) // 2 :]}
    for file, members in halves.items():
        torch.save({name: tensors[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in halves.items() for name in members}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))


def load(folder: Path) -> Tensors:
    """Every tensor of a folder but the rotary buffers, which later versions neither save nor read."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))] + [torch.load(path) for path in sorted(folder.glob("*.bin"))]
    return {name: tensor for file in files for name, tensor in file.items() if not name.endswith("inv_freq")}


def assert_same_bits(ours: Tensors, theirs: Tensors) -> None:
    assert len(ours) > 20
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (torch.float16, theirs[name].shape), name
        assert torch.equal(tensor.view(torch.int16), theirs[name].view(torch.int16)), name


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory, fixtures: Path) -> Vicuna:
    folder = tmp_path_factory.mktemp("vicuna")
    sidecars = fixtures / "A-delta-v0" / "base-hf-bin"
    config = json.loads((sidecars / "config.json").read_text())
    random = torch.Generator().manual_seed(20230403)
    base, tuned = {}, {}
    for name, shape in llama_names(config).items():
        values = torch.randn(shape, generator=random) * 0.05 + (1.0 if "norm" in name else 0.0)
        base[name] = values.half()
        tuned[name] = (values + torch.randn(shape, generator=random) * 0.003).half()
    for layer in range(config["num_hidden_layers"]):
        frequencies = 1 / 10000 ** (torch.arange(0, 12, 2) / 12)
        base[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.half()
        tuned[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.half()
    delta = {name: tuned[name] - base[name] for name in base}
    for kind, tensors in (("base", base), ("tuned", tuned), ("delta", delta)):
        save_bin(tensors, folder / kind, sidecars)
    return Vicuna(folder, base, tuned, delta)


@pytest.mark.parametrize("low_memory", [False, True], ids=["whole", "low-cpu-mem"])
def test_apply_delta(vicuna: Vicuna, cli: Callable[..., tuple[int, str, str]], tmp_path: Path, low_memory: bool) -> None:
    base, delta = vicuna.folder / "base", vicuna.folder / "delta"
    flags = ["--low-cpu-mem"] if low_memory else []
    run_fastchat("apply_delta", "--base-model-path", base, "--delta-path", delta, "--target-model-path", tmp_path / "theirs", *flags)
    theirs = load(tmp_path / "theirs")
    assert_same_bits({name: vicuna.base[name] + vicuna.delta[name] for name in theirs}, theirs)

    code, _, stderr = cli("apply-delta", "--base", base, "--delta", delta, "-o", tmp_path / "ours")
    assert code == 0, stderr
    assert_same_bits(load(tmp_path / "ours"), theirs)
    assert (tmp_path / "ours" / "tokenizer.model").read_bytes() == (tmp_path / "theirs" / "tokenizer.model").read_bytes()


def test_make_delta(vicuna: Vicuna, cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    base, tuned = vicuna.folder / "base", vicuna.folder / "tuned"
    run_fastchat("make_delta", "--base-model-path", base, "--target-model-path", tuned, "--delta-path", tmp_path / "theirs")
    theirs = load(tmp_path / "theirs")
    assert_same_bits({name: vicuna.delta[name] for name in theirs}, theirs)

    code, _, stderr = cli("make-delta", "--base", base, "--tuned", tuned, "-o", tmp_path / "ours")
    assert code == 0, stderr
    assert_same_bits(load(tmp_path / "ours"), theirs)
