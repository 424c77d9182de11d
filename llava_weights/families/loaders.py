"""What adapter_config.json holds, and which programs load an adapter beside its base: what each refuses, what it passes over.

Sources: `LoraConfig` and `save_pretrained` of PEFT 0.21.2; vLLM's `lora/peft_helper.py`, `lora_model.py` and `utils.py` of 0.11 to 0.30;
SGLang's `lora/lora_config.py`, `lora_manager.py` and `utils.py` of 2026.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Every key that PEFT 0.21.2 writes, with the value of a LoRA that says nothing else.
PEFT_VERSION = "0.21.2"
PEFT_SETTINGS: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None, "base_model_name_or_path": None,
    "bias": "none", "corda_config": None, "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "kasa_config": None, "layer_replication": None,
    "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None,
    "peft_type": "LORA", "peft_version": PEFT_VERSION, "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "revision": None,
    "target_modules": None, "target_parameters": None, "task_type": None, "trainable_token_indices": None, "use_bdlora": None,
    "use_dora": False, "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip
# Settings of the training that mean the same under any names.
PEFT_KEPT = ("bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_dropout", "r", "task_type", "use_rslora")

# What an adapter may hold beside plain low-rank updates of one scale.
DORA, TRAINED, BESIDE = "magnitudes of DoRA", "modules that were trained whole", "tensors beside any module"
SCALES, KEPT = "updates of several scales, by pattern", "tables of the base beside their update"
ONE_SCALE = "it takes the scale of `lora_alpha` and `r` for every module, so some updates count more or less than they should"


@dataclass(frozen=True)
class Loader:
    """A program that loads adapters. `refuses` are the parts of an adapter with which it stops; `passes_over` are those that it does not
    read, without a word, with what it does in their place."""

    name: str
    refuses: tuple[str, ...]
    passes_over: Mapping[str, str] = field(default_factory=dict)


LOADERS = (
    Loader(
        name="vLLM",
        refuses=(DORA, TRAINED, BESIDE),
        passes_over={SCALES: ONE_SCALE, KEPT: "it takes the tables of the vocabulary from the base, not those in the adapter"},
    ),
    Loader(
        name="SGLang",
        refuses=(DORA,),
        passes_over={SCALES: ONE_SCALE, TRAINED: "it places low-rank updates only", KEPT: "it places low-rank updates only"},
    ),
)
