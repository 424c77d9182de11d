"""Meta's layout against base-hf-bin, which the original converter made, and against transformers' rule written out with torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_weights.errors import InputError
from llava_weights.formats.meta import index_meta
from llava_weights.storage.reading import Workspace, crc_errors
from llava_weights.tensors.lazy import LazyTensor

LLAMA = Path(__file__).resolve().parents[2] / "fixtures/A-delta-v0"
META = LLAMA / "base-meta/13B"
DIM, HEADS, LAYERS, INTERMEDIATE, VOCABULARY = 64, 8, 2, 96, 40  # eight heads, so that eight files hold one each


def values(tensor: LazyTensor, work: Workspace, step: int | None = None) -> bytes:
    """All bytes, made `step` rows at a time."""
    raw = bytearray(tensor.nbytes)
    step = step or max(tensor.rows, 1)
    for start in range(0, tensor.rows, step):
        stop = min(start + step, tensor.rows)
        tensor.rows_into(memoryview(raw)[start * tensor.row_nbytes : stop * tensor.row_nbytes], start, stop, work)
    return bytes(raw)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def hugging_face() -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = {}
    for path in sorted((LLAMA / "base-hf-bin").glob("*.bin")):
        loaded |= torch.load(path, weights_only=True)
    return {name: tensor for name, tensor in loaded.items() if not name.endswith("inv_freq")}


def random_model(kv_heads: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Whole tensors in Meta's names; no two values of a tensor are alike as far as the dtype can tell them apart."""
    kv = DIM // HEADS * kv_heads
    shapes = {"tok_embeddings.weight": (VOCABULARY, DIM), "norm.weight": (DIM,), "output.weight": (VOCABULARY, DIM)}
    for layer in range(LAYERS):
        within = {"attention.wq": (DIM, DIM), "attention.wk": (kv, DIM), "attention.wv": (kv, DIM), "attention.wo": (DIM, DIM)}
        within |= {"feed_forward.w1": (INTERMEDIATE, DIM), "feed_forward.w2": (DIM, INTERMEDIATE), "feed_forward.w3": (INTERMEDIATE, DIM)}
        within |= {"attention_norm": (DIM,), "ffn_norm": (DIM,)}
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in within.items()}
    generator = torch.Generator().manual_seed(kv_heads)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()} | {
        "rope.freqs": torch.ones(4, dtype=dtype)
    }


def piece(name: str, tensor: torch.Tensor, number: int, count: int) -> torch.Tensor:
    """What Meta's file `number` of `count` holds of a tensor."""
    if tensor.ndim == 1:
        return tensor
    columns = any(part in name for part in ("tok_embeddings", "attention.wo", "feed_forward.w2"))
    return tensor.chunk(count, dim=1 if columns else 0)[number].clone()


def save(folder: Path, model: dict[str, torch.Tensor], count: int, **params: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        split = {name: piece(name, tensor, number, count) for name, tensor in model.items()}
        torch.save(split, folder / f"consolidated.{number:02}.pth")
    known = {"dim": DIM, "multiple_of": 32, "n_heads": HEADS, "n_layers": LAYERS, "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(known | params))
    return folder


def converted(model: dict[str, torch.Tensor], kv_heads: int) -> dict[str, torch.Tensor]:
    """transformers 4.31's rule, on whole tensors, in the order of LlamaForCausalLM's state dict."""

    def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
        rows, columns = weight.shape
        return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)

    tensors = {"model.embed_tokens.weight": model["tok_embeddings.weight"]}
    for layer in range(LAYERS):
        old, new = f"layers.{layer}.", f"model.layers.{layer}."
        tensors |= {
            f"{new}self_attn.q_proj.weight": permute(model[f"{old}attention.wq.weight"], HEADS),
            f"{new}self_attn.k_proj.weight": permute(model[f"{old}attention.wk.weight"], kv_heads),
            f"{new}self_attn.v_proj.weight": model[f"{old}attention.wv.weight"],
            f"{new}self_attn.o_proj.weight": model[f"{old}attention.wo.weight"],
            f"{new}mlp.gate_proj.weight": model[f"{old}feed_forward.w1.weight"],
            f"{new}mlp.up_proj.weight": model[f"{old}feed_forward.w3.weight"],
            f"{new}mlp.down_proj.weight": model[f"{old}feed_forward.w2.weight"],
            f"{new}input_layernorm.weight": model[f"{old}attention_norm.weight"],
            f"{new}post_attention_layernorm.weight": model[f"{old}ffn_norm.weight"],
        }
    return tensors | {"model.norm.weight": model["norm.weight"], "lm_head.weight": model["output.weight"]}


def check(tensors: dict[str, LazyTensor], expected: dict[str, torch.Tensor], step: int | None = None) -> None:
    work = Workspace()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.shape == tuple(expected[name].shape)
        assert values(tensor, work, step) == raw_bytes(expected[name]), name
    assert not list(crc_errors([work]))
    work.close()


def test_reference_files_are_what_the_converter_made_of_them() -> None:
    tensors, config = index_meta(META)
    check(tensors, hugging_face())
    written = json.loads((LLAMA / "base-hf-bin/config.json").read_text())
    del written["transformers_version"]
    assert config == written | {"num_key_value_heads": 4, "rope_theta": 10000.0}


@pytest.mark.slow
def test_the_config_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    _, config = index_meta(META)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in index_meta(META)[0].items()
    }
    assert list(model.state_dict()) == list(index_meta(META)[0])


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize(("kv_heads", "dtype"), [(8, torch.float16), (8, torch.float32)])
def test_any_number_of_files(tmp_path: Path, count: int, kv_heads: int, dtype: torch.dtype) -> None:
    model = random_model(kv_heads, dtype)
    tensors, config = index_meta(save(tmp_path, model, count))
    check(tensors, converted(model, kv_heads))
    assert list(tensors) == list(converted(model, kv_heads))
    assert (config["num_key_value_heads"], config["intermediate_size"], config["vocab_size"]) == (8, INTERMEDIATE, VOCABULARY)
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("count", [1, 4])
def test_grouped_key_and_value_heads(tmp_path: Path, count: int) -> None:
    model = random_model(4, torch.bfloat16)
    tensors, config = index_meta(save(tmp_path, model, count, n_kv_heads=4, rope_theta=5e5, vocab_size=VOCABULARY))
    check(tensors, converted(model, 4))
    assert (config["num_key_value_heads"], config["rope_theta"], config["torch_dtype"]) == (4, 5e5, "bfloat16")


@settings(max_examples=20)
@given(st.integers(1, 310))
def test_windows_of_any_size_give_the_same_bytes(step: int) -> None:
    check(index_meta(META)[0], hugging_face(), step)


def test_nothing_is_read_but_headers(tmp_path: Path) -> None:
    """A damaged weight is found when it is read, by the CRC."""
    folder = save(tmp_path, random_model(8, torch.float16), 2)
    expected, _ = index_meta(folder)
    leaf = expected["lm_head.weight"].leaves()[1]
    with Path(leaf.file.path).open("r+b") as file:
        file.seek(leaf.offset)
        file.write(b"\xff\xff")
    work = Workspace()
    values(index_meta(folder)[0]["lm_head.weight"], work)
    assert [record for _, record in crc_errors([work])] == [leaf.record]


# --- what does not fit --------------------------------------------------------------------------------------------------------


def edit(count: int = 2, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: save(folder, random_model(8, torch.float16), count, **changes) and None


def change(number: int, alter: Callable[[dict[str, torch.Tensor]], object], count: int = 2) -> Callable[[Path], None]:
    """Save a sound model, then alter one of its files."""

    def make(folder: Path) -> None:
        save(folder, random_model(8, torch.float16), count)
        path = folder / f"consolidated.{number:02}.pth"
        tensors = torch.load(path, weights_only=True)
        alter(tensors)
        torch.save(tensors, path)

    return make


def without(count: int, *gone: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        save(folder, random_model(8, torch.float16), count)
        for name in gone:
            (folder / name).unlink()

    return make


def extra(folder: Path) -> None:
    save(folder, random_model(8, torch.float16), 2)
    for number in (2, 3):
        shutil.copy(folder / "consolidated.01.pth", folder / f"consolidated.{number:02}.pth")


W2 = "layers.1.feed_forward.w2.weight"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no files": (without(1, "consolidated.00.pth"), "no `consolidated.00.pth`"),
    "no params.json": (without(1, "params.json"), "`params.json` does not exist"),
    "gap": (without(4, "consolidated.02.pth"), "`consolidated.02.pth` is missing"),
    "first missing": (without(2, "consolidated.00.pth"), "`consolidated.00.pth` is missing"),
    "last of four missing": (without(4, "consolidated.03.pth"), "3 consolidated files, Meta cut its models into 1, 2, 4 or 8"),
    "half missing": (without(2, "consolidated.01.pth"), "the model was cut into 2 files, found 1"),
    "two too many": (extra, "the model was cut into 2 files, found 4"),
    "tensor missing": (
        change(1, lambda tensors: tensors.pop(W2)),
        f"`consolidated.01.pth` lacks 1 tensors that params.json asks for: `{W2}`",
    ),
    "embedding missing": (change(0, lambda tensors: tensors.pop("tok_embeddings.weight")), "no matrix `tok_embeddings.weight`"),
    "unknown tensor": (change(0, lambda tensors: tensors.update({"lora.A": torch.ones(2)})), "LLaMA does not have: `lora.A`"),
    "a layer more": (edit(n_layers=1), "LLaMA does not have: `layers.1.attention.wq.weight`"),
    "a layer less": (edit(n_layers=3), "lacks 9 tensors"),
    "unequal pieces": (
        change(1, lambda tensors: tensors.update({W2: torch.ones(DIM, 8).half()})),
        f"`{W2}` in `consolidated.01.pth` has the shape",
    ),
    "a vector as embedding": (change(0, lambda t: t.update({"tok_embeddings.weight": torch.ones(4).half()})), "no matrix"),
    "another dtype": (change(1, lambda t: t.update({"norm.weight": torch.ones(DIM)})), "dtypes `F16`, `F32`"),
    "integers": (lambda folder: save(folder, random_model(8, torch.int16), 1) and None, "dtypes `I16`"),
    "other dim": (edit(dim=128), "the model was cut into 4 files, found 2"),
    "fewer key heads": (
        edit(n_kv_heads=4),
        "`layers.0.attention.wk.weight` in `consolidated.00.pth` has the shape [32, 64], expected [16, 64]",
    ),
    "other vocabulary": (edit(vocab_size=32000), "says `32000` tokens"),
    "heads that do not divide": (edit(n_heads=7), "describes no model"),
    "no heads": (edit(n_heads=0), "no usable `n_heads`"),
    "a billion layers": (edit(n_layers=10**9), "no usable `n_layers`"),
    "a million layers": (edit(n_layers=10**6), "describes no model"),
    "true layers": (edit(n_layers=True), "no usable `n_layers`"),
    "text as dim": (edit(dim="64"), "no usable `dim`"),
    "negative eps": (edit(norm_eps=-1), "no usable `norm_eps`"),
    "NaN eps": (edit(norm_eps=float("nan")), "`params.json`"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(tmp_path: Path, case: str) -> None:
    make, expected = BAD[case]
    make(tmp_path)
    with pytest.raises(InputError) as caught:
        index_meta(tmp_path)
    assert expected in caught.value.what
