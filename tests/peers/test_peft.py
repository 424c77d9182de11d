"""PEFT on a converted base with a converted adapter gives what it gave on the original. Run by `make peer`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transforms.test_convert_lora import CASES, KINDS, Model, Random, adapter, raw, shapes_of, small, toys, write

import llava_weights as lw

assert callable(small)
assert callable(toys)  # fixtures of that module

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent.parent / ".peers"
MAIN = "main"
MODULES_OF_4_52 = ("4.57.6", MAIN)  # whose modules have the names that an adapter is given
TOLERANCE = 5e-5

pytestmark = [pytest.mark.peer, pytest.mark.timeout(300)]


def run(version: str, jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What `run_peft.py` prints for these jobs in the environment of that version."""
    python = Path(sys.executable) if version == MAIN else PEERS / f"transformers-{version}" / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} is missing: run `make peer`, which sets it up")
    path = folder / f"peft-{version}.json"
    path.write_text(json.dumps(jobs))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [str(python), str(HERE / "run_peft.py"), str(path)]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("version", MODULES_OF_4_52)
def test_the_same_logits_as_pefts_own_on_the_original(fixtures: Path, small: Callable[[str], Model], tmp_path: Path, version: str) -> None:
    """Those that PEFT 0.21.2 computed with the adapter beside the unconverted base, not merged."""
    model, recorded = small("base-fp32"), load_file(fixtures / "F-peft/logits.safetensors")
    jobs = []
    for case in CASES:
        made = write(lw.convert_lora(fixtures / "F-peft" / case / "adapter", "llava-hf", base=model.hub), tmp_path / case)
        jobs.append({"folder": str(model.hub), "adapter": str(made), "ids": recorded["input_ids"].tolist()})
    for case, found in zip(CASES, run(version, jobs, tmp_path), strict=True):
        assert (found["missing"], found["unexpected"]) == ([], []), case
        expected = recorded[f"{case}.base-fp32.unmerged"]
        logits = torch.tensor(found["logits"])[..., : expected.shape[-1]]
        assert torch.allclose(logits, expected, rtol=0, atol=TOLERANCE), case


@pytest.mark.parametrize("version", MODULES_OF_4_52)
def test_updates_of_the_tower_load_before_and_after_5_6(toys: Callable[[str], Model], tmp_path: Path, version: str) -> None:
    """Of which 5.6 renamed the modules."""
    model = toys("llava")
    shapes = shapes_of(model)
    stems = [name.removesuffix(".weight") for name in shapes if name.endswith(("fc1.weight", "q_proj.weight"))]
    made = write(lw.convert_lora(adapter(tmp_path / "adapter", Random().low_rank(stems, shapes)), "llava-hf"), tmp_path / "made")
    (found,) = run(version, [{"folder": str(model.hub), "adapter": str(made), "ids": [[5, 9, 7]]}], tmp_path)
    assert (found["missing"], found["unexpected"]) == ([], [])


def test_classes_with_other_modules_refuse_it(fixtures: Path, small: Callable[[str], Model], tmp_path: Path) -> None:
    """Those before 4.52: nothing is passed over in silence."""
    model = small("base-fp32")
    made = write(lw.convert_lora(fixtures / "F-peft/plain/adapter", "llava-hf"), tmp_path / "made")
    (found,) = run("4.47.1", [{"folder": str(model.hub), "adapter": str(made), "ids": [[5, 9, 7]]}], tmp_path)
    assert "not found" in found["refused"]


class Original(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """The modules of LLaVA's own class, by its names: a stand-in, which computes the text only."""

    def __init__(self, config: Any, tower: Any) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.model.mm_projector = nn.Sequential(nn.Linear(tower.config.hidden_size, width), nn.GELU(), nn.Linear(width, width))
        self.model.vision_tower = nn.Module()
        self.model.vision_tower.vision_tower = nn.Module()
        self.model.vision_tower.vision_tower.vision_model = tower


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_loads_on_llavas_modules(toys: Callable[[str], Model], tmp_path: Path, kind: str) -> None:
    import peft
    from peft.utils.save_and_load import load_peft_weights

    model, (make, settings) = toys("llava"), KINDS[kind]
    source = adapter(tmp_path / "adapter", make(Random(), shapes_of(model)), **settings)
    there = write(lw.convert_lora(source, "llava-hf", base=model.hub), tmp_path / "there")
    back = write(lw.convert_lora(there, "llava", base=model.hub), tmp_path / "back")
    assert raw(lw.open_checkpoint(back)) == raw(lw.open_checkpoint(source))
    hub = transformers.AutoConfig.from_pretrained(model.hub)
    sizes = {**hub.text_config.to_dict(), "vocab_size": model.opened.tensors["lm_head.weight"].rows, "pad_token_id": 0}
    config = transformers.LlamaConfig(**sizes)
    original = Original(config, transformers.CLIPVisionModel(hub.vision_config))
    loaded = peft.PeftModel.from_pretrained(original, back)
    told = peft.set_peft_model_state_dict(loaded, load_peft_weights(str(back)))
    assert told.unexpected_keys == []
    assert [key for key in told.missing_keys if ".lora_" in key or ".modules_to_save." in key or "trainable_tokens_delta" in key] == []
