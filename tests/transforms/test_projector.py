"""The linear projector as two: the same map in torch's own arithmetic, and back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_weights.errors import InputError, UsageError
from llava_weights.families.projectors import PROJECTOR_FORMS, PROJECTOR_NAMES
from llava_weights.formats.safetensors import index_safetensors
from llava_weights.storage.reading import Workspace
from llava_weights.tensors.lazy import LazyTensor
from llava_weights.transforms.projector import paired, single

ACTIVATIONS = {"identity": torch.nn.Identity(), "relu": torch.nn.ReLU(), "gelu": torch.nn.GELU()}


def values(tensor: LazyTensor) -> torch.Tensor:
    raw = bytearray(tensor.nbytes)
    tensor.rows_into(memoryview(raw), 0, tensor.rows, Workspace())
    kind = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[tensor.dtype]
    return torch.frombuffer(raw, dtype=kind).view(tensor.shape)


def linear(folder: Path, dtype: torch.dtype, wide: int = 12, narrow: int = 5) -> tuple[LazyTensor, LazyTensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = {"w": torch.randn(wide, narrow, generator=generator).to(dtype), "b": torch.randn(wide, generator=generator).to(dtype)}
    save_file(tensors, folder / "p.safetensors")
    found = index_safetensors(folder / "p.safetensors")[0]
    return found["w"], found["b"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", PROJECTOR_FORMS)
def test_the_same_map_and_back(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    weight, bias = linear(tmp_path, dtype)
    parts = paired(weight, bias, form)
    inner_weight, inner_bias, outer_weight, outer_bias = (values(parts[name]) for name in PROJECTOR_NAMES)
    features = torch.randn(64, 5, generator=torch.Generator().manual_seed(4)) * 3
    inner = ACTIVATIONS[form](torch.nn.functional.linear(features, inner_weight.float(), inner_bias.float()))
    result = torch.nn.functional.linear(inner, outer_weight.float(), outer_bias.float())
    expected = torch.nn.functional.linear(features, values(weight).float(), values(bias).float())
    torch.testing.assert_close(result, expected, rtol=0, atol=0 if form == "identity" else 2e-5)
    back = single(parts, PROJECTOR_FORMS[form])
    assert back is not None
    assert torch.equal(values(back[0]), values(weight))
    assert torch.equal(values(back[1]), values(bias))


def test_a_real_pair_stays_a_pair(tmp_path: Path) -> None:
    weight, bias = linear(tmp_path, torch.float16)
    parts = paired(weight, bias, "gelu")
    other = {**parts, PROJECTOR_NAMES[2]: paired(weight, bias, "identity")[PROJECTOR_NAMES[2]]}
    assert single(other, "gelu") is None
    with pytest.raises(InputError, match="two layers with `relu`"):
        single(other, "relu")
    with pytest.raises(InputError, match="two layers with `linear`"):
        single(parts, "linear")


def test_refusals(tmp_path: Path) -> None:
    weight, bias = linear(tmp_path, torch.float16, wide=8, narrow=5)
    with pytest.raises(InputError, match="at least twice as wide"):
        paired(weight, bias, "relu")
    with pytest.raises(UsageError, match="no projector form `silu`"):
        paired(weight, bias, "silu")
