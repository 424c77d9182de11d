"""`smoke --quantize`: the bits of transformers with bitsandbytes, the verdict, and what it can't do."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from smoke.test_logits import altered, configured

import llava_weights as lw
from llava_weights.cli import toy
from llava_weights.errors import InputError, UsageError, VerificationError
from llava_weights.families.originals import ORIGINALS
from llava_weights.smoke import quantised
from llava_weights.smoke.forward import load_forward, load_original
from llava_weights.smoke.logits import QUANTISED, compare, compare_quantised
from llava_weights.smoke.probes import built_in_probes
from llava_weights.smoke.recording import make_recording

TEXT = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
TOWER = {"hidden_size": 64, "image_size": 28, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3, "patch_size": 14}
SETTINGS: dict[str, dict[str, Any]] = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llava` and `hf` of a LLaVA v1.5 whose matrices bitsandbytes can take, and `small`, whose matrices it can't."""
    made = tmp_path_factory.mktemp("quantised")
    family = next(row for row in ORIGINALS if row.name == "LLaVA v1.5 and v1.6")
    with patch.multiple(toy, TEXT_SIZES=TEXT, TOWER_SIZES=TOWER):
        toy.make_llava(made, family)
    lw.execute(lw.make_plan(lw.convert(made / "llava", "llava-hf")), made / "hf")
    toy.make_llava(made / "small", family)
    lw.execute(lw.make_plan(lw.convert(made / "small/llava", "llava-hf")), made / "small/hf")
    return made


@pytest.mark.parametrize(("bits", "resident"), [("8bit", False), ("4bit", True)])
def test_the_logits_are_those_of_transformers_with_bitsandbytes(folder: Path, bits: quantised.Bits, resident: bool) -> None:
    checkpoint = lw.open_checkpoint(folder / "hf")
    runner = load_forward(checkpoint, quantize=bits, resident=resident)
    config = transformers.BitsAndBytesConfig(**SETTINGS[bits])
    options: Any = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "hf", quantization_config=config, **options).eval()
    plain = load_forward(checkpoint)
    for probe in built_in_probes(checkpoint):
        pixels = {} if probe.pixel_values is None else {"pixel_values": torch.tensor(probe.pixel_values)}
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor(probe.ids)[None], **pixels).logits[0].numpy()
        found = runner(probe).logits
        assert np.array_equal(found, expected), probe.name
        assert np.abs(found - plain(probe).logits).max() > 1e-4


@pytest.mark.parametrize("bits", quantised.BITS)
def test_the_original_layout_quantises_all_but_the_tower(folder: Path, bits: quantised.Bits) -> None:
    checkpoint = lw.open_checkpoint(folder / "llava")
    probes = built_in_probes(checkpoint)
    probe = next(probe for probe in probes if probe.sees)
    text = next(probe for probe in probes if not probe.sees)
    same = load_forward(lw.open_checkpoint(folder / "hf"), quantize=bits)(text).logits
    runner = load_original(checkpoint, quantize=bits)
    found = runner(text).logits
    assert np.array_equal(found, same[:, : found.shape[1]])
    vision, whole = runner(probe).hidden["vision"], load_original(checkpoint)(probe).hidden["vision"]
    assert 0 < np.abs(vision - whole).max() < np.abs(whole).max()  # the projector is


@pytest.mark.parametrize("bits", quantised.BITS)
def test_a_sound_model_is_plausible_and_never_the_same(folder: Path, bits: quantised.Bits, cli: Callable[..., Any]) -> None:
    code, out, _ = cli("smoke", folder / "hf", "--quantize", bits)
    assert code == 0, out
    assert "plausible" in out
    assert " same" not in out
    assert f"{bits[0]} bits hide small faults" in out
    done = compare_quantised(lw.open_checkpoint(folder / "llava"), bits)
    assert (done.verdict, done.exit_code, done.limits) == ("plausible", 0, QUANTISED[bits])


@pytest.mark.parametrize("bits", quantised.BITS)
def test_a_wrong_model_is_told_in_spite_of_the_rounding(folder: Path, bits: quantised.Bits) -> None:
    """Against the float32 logits of the right one: rows of the vocabulary shifted by one, and a projector without its activation."""
    checkpoint = lw.open_checkpoint(folder / "hf")
    reference = make_recording(checkpoint, built_in_probes(checkpoint, seed=1))
    shifted = altered(checkpoint, "embed_tokens", lambda rows: rows.roll(1, 0))
    done = compare(shifted, reference, quantize=bits)
    assert (done.verdict, done.exit_code, done.first_wrong) == ("different", 4, "embeddings")
    blind = compare(configured(checkpoint, projector_hidden_act="linear"), reference, quantize=bits)
    assert [finding.subject for finding in blind.findings if finding.verdict == "failed"] == ["image"]
    with pytest.raises(VerificationError):
        lw.smoke_test(shifted, reference=reference, quantize=bits)


def test_a_model_that_does_not_bear_the_rounding(folder: Path, cli: Callable[..., Any]) -> None:
    code, out, _ = cli("smoke", folder / "hf", "--quantize", "4bit", "--atol", "1e-6")
    assert code == 4
    assert "quantise it to `8bit`" in out


def test_against_a_recording_and_an_original(folder: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    lw.record(folder / "hf", tmp_path / "reference.safetensors")
    code, out, _ = cli("smoke", folder / "hf", "--reference", tmp_path / "reference.safetensors", "--quantize", "8bit", "--json")
    assert (code, '"plausible"' in out) == (0, True), out
    code, out, _ = cli("smoke", folder / "hf", "--original", folder / "llava", "--quantize", "8bit")
    assert (code, "plausible" in out) == (0, True), out
    assert lw.smoke_test(folder / "hf", original=folder / "llava", quantize="8bit").verdict == "plausible"
    assert lw.smoke_test(folder / "hf", quantize="8bit").verdict == "plausible"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--quantize", "3bit"], "8bit, 4bit"), (["--quantize", "8bit", "--prompt", "a"], "`--quantize`"),
     (["--quantize", "8bit", "--record", "x"], "`--quantize`"), (["--quantize", "8bit", "--chat"], "`--chat`")],
)  # fmt: skip
def test_what_does_not_go_together(folder: Path, cli: Callable[..., Any], arguments: list[str], named: str) -> None:
    code, out, err = cli("smoke", folder / "hf", *arguments)
    assert (code, out) == (2, "")
    assert named in err


def test_a_shape_that_bitsandbytes_computes_wrongly_is_refused(folder: Path, cli: Callable[..., Any]) -> None:
    code, out, err = cli("smoke", folder / "small/hf", "--quantize", "4bit")
    assert (code, out) == (2, "")
    assert "8bit" in err
    assert "a multiple of 64 values" in err
    assert "ran" not in err.split()  # before the work
    assert cli("smoke", folder / "small/hf", "--quantize", "8bit").code == 0


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_the_code_for_avx512_bf16_does_not_take(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    quantiser = quantised.Quantiser("4bit", torch.float32)
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: packed)
    for shape in ((64, 64), (96, 128)):
        quantiser.check(shape, "cpu")
    quantiser.check((48, 48), "cuda")
    quantised.Quantiser("8bit", torch.float32).check((48, 48), "cpu")
    if not packed:
        quantiser.check((48, 64), "cpu")
        return
    with pytest.raises(UsageError) as caught:
        quantiser.check((48, 64), "cpu")
    assert caught.value.facts["matrix"] == "48 x 64"


def test_without_bitsandbytes(folder: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, out, err = cli("smoke", folder / "hf", "--quantize", "8bit")
    assert (code, out) == (3, "")
    assert "pip install 'bitsandbytes>=0.46'" in err


def test_an_old_bitsandbytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "version", lambda name: "0.45.5")
    with pytest.raises(InputError, match=r"bitsandbytes 0\.45\.5 is too old"):
        lw.smoke_test(folder / "hf", quantize="4bit")


def test_no_code_is_fetched(folder: Path, tmp_path: Path, process: Callable[..., Any]) -> None:
    """bitsandbytes asks the package `kernels`, where it is installed, for compiled code from the Hub."""
    code = f"__version__ = '9'\ndef get_kernel(*args, **options): open({str(tmp_path / 'asked')!r}, 'w')\n"
    (tmp_path / "kernels.py").write_text(code)
    root = Path(lw.__file__).parents[1]
    code, out, err = process("smoke", folder / "hf", "--quantize", "4bit", env={"PYTHONPATH": f"{root}:{tmp_path}"})
    assert code == 0, out + err
    assert not (tmp_path / "asked").exists()
    assert "kernels" not in err


def test_the_process_is_left_as_it_was(folder: Path) -> None:
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    compare_quantised(lw.open_checkpoint(folder / "hf"), "8bit")
    assert logger.level == level
    assert "kernels" not in sys.modules
