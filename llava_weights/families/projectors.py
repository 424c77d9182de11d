"""Projectors: what the original calls them, and the forms in which llava-hf, which always has two layers, holds a single layer."""

from __future__ import annotations

from collections.abc import Iterable

# The canonical names of a projector's tensors: of a single Linear, and of two with an activation between them.
LINEAR_NAMES = ("projector.weight", "projector.bias")
PROJECTOR_NAMES = ("projector.0.weight", "projector.0.bias", "projector.2.weight", "projector.2.bias")
# `mlp1x_gelu` is a stack of one layer: what the single Linear computes, under the names of a stack's first place.
STACK_OF_ONE, STACK_OF_ONE_TYPE = PROJECTOR_NAMES[:2], "mlp1x_gelu"
NORM = ("projector.norm.weight", "projector.norm.bias")  # of a LayerNorm before two layers
PROJECTOR_FORMS = {"identity": "linear", "relu": "relu", "gelu": "gelu"}  # form -> projector_hidden_act
FORM_READERS = {
    "identity": "exact in transformers; vLLM refuses it, llama.cpp and mlx-vlm compute something else",
    "relu": "for vLLM; exact but for the order of sums",
    "gelu": "for llama.cpp (GGUF) and mlx-vlm, and right in vLLM and transformers; exact but for rounding",
}
PROJECTOR_ACTIVATION = "gelu"  # between the layers of every published LLaVA's
MAX_PROJECTOR_LAYERS = 5


def projector_weights(names: Iterable[str]) -> tuple[str, ...]:
    """The matrices of a projector, first to last, among canonical names: that of one Linear, or those at the even places of a stack.

    Empty where there is none, and for a projector of another kind."""
    found = sorted(name for name in names if name.startswith("projector.") and name.endswith("weight") and name not in NORM)
    stack = tuple(f"projector.{2 * place}.weight" for place in range(len(found)))
    return tuple(found) if found == [LINEAR_NAMES[0]] or (tuple(found) == stack and len(stack) <= MAX_PROJECTOR_LAYERS) else ()


def projector_type(names: Iterable[str]) -> str:
    """`mm_projector_type` for these canonical names: "linear", "mlp2x_gelu" and so on, empty where `projector_weights` is."""
    weights = projector_weights(names)
    return "" if not weights else "linear" if weights == (LINEAR_NAMES[0],) else f"mlp{len(weights)}x_{PROJECTOR_ACTIVATION}"
