"""apply-delta and make-delta against what the original programs wrote, and the wrong inputs that users give by mistake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_weights.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llava_weights.errors import InputError, LlavaWeightsError, MismatchError
from llava_weights.transforms.delta import apply_delta, make_delta
from llava_weights.write.execute import execute
from llava_weights.write.plan import make_plan

DELTAS = {"delta-307-apr17": "expected-307-by-main", "delta-308-may4": "expected-308-by-may4"}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder as another reader sees it, rotary buffers left out."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            found |= load_file(path)
        elif path.suffix == ".bin":
            found |= torch.load(path, weights_only=True)
    return {name: tensor for name, tensor in found.items() if "inv_freq" not in name}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and raw(a[name]) == raw(b[name]) for name in a
    )


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def reference(fixtures: Path) -> Path:
    return fixtures / "A-delta-v0"


def base_as(form: str, reference: Path, folder: Path) -> Path:
    """The reference base in another container; the same bits."""
    if form in ("base-hf-bin", "base-meta", "base-meta/13B"):
        return reference / form
    target, tensors = folder / form, tensors_of(reference / "base-hf-bin")
    target.mkdir()
    shutil.copy(reference / "base-hf-bin" / "config.json", target)
    if form == "safetensors":
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    elif form == "one .bin":
        torch.save(tensors, target / "pytorch_model.bin")
    elif form == "fp32":
        save_file({name: tensor.float() for name, tensor in tensors.items()}, target / "model.safetensors", metadata={"format": "pt"})
    elif form == "meta, one file":
        one_meta_file(reference, target)
    return target


def one_meta_file(reference: Path, target: Path) -> None:
    """Meta's two model-parallel pieces joined by the rule of transformers' converter, written by torch."""
    pieces = [torch.load(reference / "base-meta/13B" / f"consolidated.0{i}.pth", weights_only=True) for i in (0, 1)]
    joined = {}
    for name, first in pieces[0].items():
        columns = any(part in name for part in ("wo.", "w2.", "tok_embeddings"))
        split = first.dim() == 2
        joined[name] = torch.cat([piece[name] for piece in pieces], dim=int(columns)) if split else first
    torch.save(joined, target / "consolidated.00.pth")
    shutil.copy(reference / "base-meta/13B/params.json", target)
    (target / "config.json").unlink()


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("form", ["base-hf-bin", "base-meta", "base-meta/13B", "meta, one file", "safetensors", "one .bin", "fp32"])
def test_every_bit_of_the_original(reference: Path, tmp_path: Path, delta: str, form: str) -> None:
    base = open_checkpoint(base_as(form, reference, tmp_path))
    execute(make_plan(apply_delta(base, open_checkpoint(reference / delta)), max_shard_size="60kB"), tmp_path / "out")
    assert same_bits(tensors_of(tmp_path / "out"), tensors_of(reference / DELTAS[delta]))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_base_that_went_through_bfloat16_is_refused(reference: Path, tmp_path: Path, half: torch.dtype) -> None:
    damaged = {name: tensor.bfloat16().to(half) for name, tensor in tensors_of(reference / "base-hf-bin").items()}
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(damaged, folder / "model.safetensors")
    base, delta = open_checkpoint(folder), open_checkpoint(reference / "delta-307-apr17")
    with pytest.raises(MismatchError, match="went through bfloat16"):
        apply_delta(base, delta)
    merged = apply_delta(base, delta, accept_base=True)
    assert any("went through bfloat16" in warning for warning in merged.history[-1].warnings)
    execute(make_plan(merged), tmp_path / "out")
    difference = tensors_of(reference / "delta-307-apr17")
    expected = {name: tensor.clone() for name, tensor in difference.items()}
    for name, tensor in damaged.items():
        expected[name][: len(tensor)] += tensor.half()
    assert same_bits(tensors_of(tmp_path / "out"), expected)


def test_the_converters_own_damaged_output_is_refused(reference: Path) -> None:
    with pytest.raises(MismatchError, match="went through bfloat16"):
        apply_delta(open_checkpoint(reference / "base-hf-from-meta13B-by-tf4.37.2-BF16"), open_checkpoint(reference / "delta-307-apr17"))


def test_make_delta_is_the_published_form_and_counts_its_loss(reference: Path, tmp_path: Path) -> None:
    base, tuned = open_checkpoint(reference / "base-hf-bin"), open_checkpoint(reference / "target-307/llava-tiny-v0")
    report = execute(make_plan(make_delta(base, tuned)), tmp_path / "delta")
    assert same_bits(tensors_of(tmp_path / "delta"), tensors_of(reference / "delta-307-apr17"))
    assert report.tallies["lost"] == 1695  # the reference README, fact A 6, counts them with the original's tools


def test_integer_delta_gives_back_every_bit(reference: Path, tmp_path: Path) -> None:
    base = open_checkpoint(reference / "base-hf-bin")
    execute(make_plan(make_delta(base, open_checkpoint(reference / "target-307/llava-tiny-v0"), codec="integer")), tmp_path / "delta")
    merged = apply_delta(open_checkpoint(reference / "base-meta"), open_checkpoint(tmp_path / "delta"))
    execute(make_plan(merged), tmp_path / "out")
    assert same_bits(tensors_of(tmp_path / "out"), tensors_of(reference / "target-307/llava-tiny-v0"))
    sizes = [sum(path.stat().st_size for path in folder.glob("*.[sb]*[st]*")) for folder in (tmp_path / "delta", tmp_path / "out")]
    assert sizes[0] < sizes[1]


def test_integer_delta_on_another_base_is_refused(reference: Path, tmp_path: Path) -> None:
    base = open_checkpoint(reference / "base-hf-bin")
    tuned = open_checkpoint(reference / "target-307/llava-tiny-v0")
    execute(make_plan(make_delta(base, tuned, codec="integer")), tmp_path / "delta")
    other = changed(reference / "base-hf-bin", tmp_path / "other", lambda name, tensor: tensor + 0.5 if "norm" in name else tensor)
    with pytest.raises(MismatchError, match="does not come out as the delta's maker recorded"):
        apply_delta(open_checkpoint(other), open_checkpoint(tmp_path / "delta"))
    last = changed(reference / "base-hf-bin", tmp_path / "last", lambda name, tensor: tensor * 2 if name == "lm_head.weight" else tensor)
    hidden = apply_delta_unexamined(open_checkpoint(last), open_checkpoint(tmp_path / "delta"))
    with pytest.raises(MismatchError, match=r"`lm_head\.weight` does not come out"):
        execute(make_plan(hidden), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def apply_delta_unexamined(base: Checkpoint, delta: Checkpoint) -> Checkpoint:
    """With the check of small tensors passed over, as for a model whose tensors are all large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava_weights.transforms.base_check.SMALL_TENSOR", 0)
        return apply_delta(base, delta)


def changed(source: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None], **config: Any) -> Path:
    """A copy of a checkpoint with other tensors or config keys; a tensor that `change` makes None is left out."""
    target.mkdir()
    tensors = {name: change(name, tensor) for name, tensor in tensors_of(source).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, target / "model.safetensors")
    for path in source.glob("*token*"):
        shutil.copy(path, target)
    (target / "config.json").write_text(json.dumps({**json.loads((source / "config.json").read_text()), **config}))
    return target


def same(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def noise(scale: float) -> Callable[[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return lambda name, tensor: (tensor.float() + scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


def grown(rows: int) -> Callable[[str, torch.Tensor], torch.Tensor]:
    return lambda name, t: torch.cat([t, t[:rows]]) if name in ("model.embed_tokens.weight", "lm_head.weight") else t


WRONG = {
    "swapped": (lambda b, d, t: (d, b), "base and delta are swapped"),
    "the delta is a merged model": (lambda b, d, t: (b, b.parent / "expected-307-by-main"), "is a whole model, not a delta"),
    "the delta is its own base": (lambda b, d, t: (b, b), "is a whole model, not a delta"),
    "the base is merged": (lambda b, d, t: (b.parent / "expected-307-by-main", d), "is a LLaVA model already"),
    "the base is a delta": (lambda b, d, t: (changed(d, t / "x", lambda n, x: None if "mm_" in n else x), d), "never applied"),
    "Vicuna, by rows": (lambda b, d, t: (changed(b, t / "x", grown(1)), d), "has 305 rows in .* this delta was made for 304"),
    "Vicuna, by values": (lambda b, d, t: (changed(b, t / "x", noise(2e-3)), d), "not the one that this delta was made against"),
    "Llama 2": (
        lambda b, d, t: (changed(b, t / "x", noise(2e-2), rms_norm_eps=1e-5, max_position_embeddings=4096), d),
        "looks like Llama 2",
    ),
    "shifted by a row": (
        lambda b, d, t: (changed(b, t / "x", lambda n, x: x.roll(1, 0) if x.dim() == 2 else x), d),
        "not the one that this delta was made against",
    ),
    "quantised": (lambda b, d, t: (changed(b, t / "x", same, quantization_config={"bits": 4}), d), "is quantised"),
    "another size": (
        lambda b, d, t: (changed(b, t / "x", lambda n, x: None if "layers.1." in n else x), d),
        "the base is 1 layers of 48, the delta 2 layers of 48",
    ),
    "a tensor is missing in the base": (
        lambda b, d, t: (changed(b, t / "x", lambda n, x: None if n.endswith("0.mlp.up_proj.weight") else x), d),
        "have no counterpart in the base",
    ),
    "a tensor is missing in the delta": (
        lambda b, d, t: (b, changed(d, t / "x", lambda n, x: None if n.endswith("0.mlp.up_proj.weight") else x)),
        "are not in the delta",
    ),
    "the projector is missing": (
        lambda b, d, t: (b, changed(d, t / "x", lambda n, x: None if "mm_" in n else x)),
        "speaks of a vision tower but holds no mm_projector",
    ),
    "NaN in the projector": (
        lambda b, d, t: (b, changed(d, t / "x", lambda n, x: x * float("nan") if "mm_" in n else x)),
        "`model.mm_projector.bias` holds inf or NaN",
    ),
    "other columns": (
        lambda b, d, t: (b, changed(d, t / "x", lambda n, x: x[:, :-1] if n == "lm_head.weight" else x)),
        r"`lm_head.weight` has shape \[304, 48\] in the base and \[307, 47\] in the delta",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_before_a_byte_is_written(reference: Path, tmp_path: Path, case: str) -> None:
    arrange, message = WRONG[case]
    base, delta = arrange(reference / "base-hf-bin", reference / "delta-307-apr17", tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        apply_delta(open_checkpoint(base), open_checkpoint(delta))
    assert caught.value.exit_code == 3
    assert caught.value.hint


@pytest.mark.parametrize("case", ["Vicuna, by values", "Llama 2", "shifted by a row"])
def test_doubts_about_values_can_be_overruled(reference: Path, tmp_path: Path, case: str) -> None:
    base, delta = WRONG[case][0](reference / "base-hf-bin", reference / "delta-307-apr17", tmp_path)
    merged = apply_delta(open_checkpoint(base), open_checkpoint(delta), accept_base=True)
    assert merged.history[-1].warnings


def test_a_second_application_is_refused(reference: Path, tmp_path: Path) -> None:
    """Without projector and added rows, the result looks like any LLaMA: only the values tell."""

    def plain(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return None if "mm_" in name else tensor[:304] if tensor.shape[0] == 307 else tensor

    delta = changed(reference / "delta-307-apr17", tmp_path / "delta", plain, mm_vision_tower=None, vocab_size=304)
    (delta / "added_tokens.json").unlink()
    execute(make_plan(apply_delta(open_checkpoint(reference / "base-hf-bin"), open_checkpoint(delta))), tmp_path / "once")
    with pytest.raises(LlavaWeightsError, match="not the one that this delta was made against"):
        apply_delta(open_checkpoint(tmp_path / "once"), open_checkpoint(delta))


def test_a_tied_base_lends_its_embedding(reference: Path, tmp_path: Path) -> None:
    base = changed(reference / "base-hf-bin", tmp_path / "b", lambda n, x: None if n == "lm_head.weight" else x, tie_word_embeddings=True)
    merged = apply_delta(open_checkpoint(base), open_checkpoint(reference / "delta-307-apr17"), accept_base=True)
    execute(make_plan(merged), tmp_path / "out")
    expected = tensors_of(reference / "delta-307-apr17")["lm_head.weight"].clone()
    expected[:304] += tensors_of(base)["model.embed_tokens.weight"]
    assert torch.equal(tensors_of(tmp_path / "out")["lm_head.weight"], expected)


def test_zero_weights_are_not_judged(tmp_path: Path, reference: Path) -> None:
    """Sparse files of true shapes are all zero: nothing speaks against them."""
    base = changed(reference / "base-hf-bin", tmp_path / "base", lambda n, x: x * 0)
    delta = changed(reference / "delta-307-apr17", tmp_path / "delta", lambda n, x: x * 0)
    assert not apply_delta(open_checkpoint(base), open_checkpoint(delta)).history[-1].warnings


def test_repairs_and_summary_are_listed(reference: Path) -> None:
    merged = apply_delta(open_checkpoint(reference / "base-hf-bin"), open_checkpoint(reference / "delta-307-apr17"))
    step = merged.history[-1]
    assert step.summary["add"] == "21 tensors; embed_tokens and lm_head grow from 304 to 307 rows"
    assert step.summary["keep"] == "2 tensors that the base lacks (mm_projector)"
    assert any('"llama" -> "llava"' in repair for repair in step.repairs)
    assert step.checks["round_trip"]["failing"] == 0
    assert step.checks["round_trip"]["sampled"] > 10_000
    assert (merged.config["model_type"], merged.config["vocab_size"]) == ("llava", 307)


def test_plan_does_not_depend_on_the_container_of_the_base(reference: Path, tmp_path: Path) -> None:
    delta = open_checkpoint(reference / "delta-307-apr17")
    roots = set()
    for form in ("base-hf-bin", "base-meta", "safetensors"):
        merged = apply_delta(open_checkpoint(base_as(form, reference, tmp_path)), delta)
        roots.add(execute(make_plan(replace(merged, history=())), tmp_path / f"out {form.replace('/', ' ')}").root)
    assert len(roots) == 1
