"""Projectors: what the original calls them, and the forms in which llava-hf, which always has two layers, holds a single one."""

from __future__ import annotations

from collections.abc import Iterable

# The names of a projector's tensors in no layout: of a single Linear, and of two with an activation between them.
LINEAR = ("projector.weight", "projector.bias")
NAMES = ("projector.0.weight", "projector.0.bias", "projector.2.weight", "projector.2.bias")
NORM = ("projector.norm.weight", "projector.norm.bias")  # of a LayerNorm before two layers
FORMS = {"identity": "linear", "relu": "relu", "gelu": "gelu"}  # form -> projector_hidden_act
CONSUMERS = {
    "identity": "exact in transformers; vLLM refuses it, llama.cpp and mlx-vlm compute something else",
    "relu": "for vLLM; exact but for the order of sums",
    "gelu": "for llama.cpp (GGUF) and mlx-vlm, and right in vLLM and transformers; exact but for rounding",
}
ACTIVATION = "gelu"  # between the layers of every published LLaVA's
MOST_LAYERS = 5


def projector_weights(names: Iterable[str]) -> tuple[str, ...]:
    """The matrices of a projector, first to last, among canonical names: that of one Linear, or those at the even places of a stack.

    Empty where there is none, and for a projector of another kind."""
    found = sorted(name for name in names if name.startswith("projector.") and name.endswith("weight") and name not in NORM)
    stack = tuple(f"projector.{2 * place}.weight" for place in range(len(found)))
    return tuple(found) if found == [LINEAR[0]] or (tuple(found) == stack and len(stack) <= MOST_LAYERS) else ()


def projector_type(names: Iterable[str]) -> str:
    """`mm_projector_type` for these canonical names: "linear", "mlp2x_gelu" and so on, empty where `projector_weights` is."""
    weights = projector_weights(names)
    return "" if not weights else "linear" if weights == (LINEAR[0],) else f"mlp{len(weights)}x_{ACTIVATION}"
