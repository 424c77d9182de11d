"""Apply LLaVA deltas, merge LoRAs, convert layouts and prove the result, one pass over the bytes, in little memory.

    import llava_weights as lw

    model = lw.apply_delta(lw.open_checkpoint("llama-13b"), lw.open_checkpoint("LLaVA-13b-delta-v0"))
    lw.execute(lw.make_plan(model), "LLaVA-13B-v0")

Names are imported on first use (PEP 562), so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Checkpoint": "checkpoint",
    "open_checkpoint": "checkpoint",
    "apply_delta": "delta",
    "make_delta": "delta",
    "open_adapter": "adapter",
    "merge_lora": "lora",
    "convert": "conversion",
    "Plan": "plan",
    "make_plan": "plan",
    "Report": "write",
    "execute": "write",
    "verify": "verification",
    "checksum": "verification",
    "diff": "comparison",
    "smoke_test": "smoke",
    "LlavaWeightsError": "errors",
    "InputError": "errors",
    "MismatchError": "errors",
    "VerificationError": "errors",
    "OutputError": "errors",
    "HubError": "errors",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
