"""Adapters of mlx-lm and mlx-vlm: their names, their adapter_config.json, and their factors turned as PEFT stores them.

    language_model.model.layers.0.self_attn.q_proj.lora_a      (in, r); of an embedding (vocabulary, r)
                                                  .lora_b      (r, out)
                                                  .m           (out,), the magnitude of a DoRA

The update is `scale * lora_b.T @ lora_a.T`, with the scale of `lora_parameters`, not alpha / r. Source: mlx-lm 0.32.2 (`tuner/lora.py`,
`tuner/dora.py`, `tuner/utils.py`), mlx-vlm 0.7.10 (`trainer/peft`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..storage.places import Place
from ..storage.strict_json import load_object
from ..tensors.lazy import LazyTensor, transposed
from ..text import few, listed, shown
from .adapter_config import MAX_ALPHA, MAX_RANK, RIGHT_ADAPTER_CONFIG
from .adapter_names import Contents

FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")
EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|tok_embeddings|word_embeddings)")
KINDS = ("lora", "dora")
FUSE = "merge it with the program that trained it (`fuse`), and convert the result"


@dataclass(frozen=True)
class MlxRules:
    """What adapter_config.json of MLX says. `facts` are for people and for the manifest."""

    rank: int
    scale: float
    dora: bool
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class MlxModule:
    """One adapted module: `a` [r, in] and `b` [out, r], of an embedding [r, vocabulary] and [width, r], turned from what is stored."""

    name: str
    embedding: bool
    a: LazyTensor
    b: LazyTensor
    magnitude: LazyTensor | None


def is_mlx(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether these names are of MLX: its factors have small letters."""
    return any(re.fullmatch(r".*\.lora_[ab]", name) for name in tensors)


def read_mlx_rules(path: Place) -> MlxRules:
    """Read MLX's adapter_config.json. Raises InputError for another kind of training, and for values that no program wrote."""
    config = load_object(path)
    kind = config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        facts = {"adapter_config.json": f"fine_tune_type {shown(str(kind))}", "merged here": listed(KINDS)}
        raise InputError("the adapter of MLX is neither a LoRA nor a DoRA", facts=facts, hint=FUSE)
    settings = config.get("lora_parameters")
    settings = settings if isinstance(settings, dict) else {}
    rank, scale = settings.get("rank"), settings.get("scale")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise _absurd("rank", rank, f"a rank from 1 to {MAX_RANK}")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= MAX_ALPHA:
        raise _absurd("scale", scale, "a sensible number; an `alpha` says something else in each version")
    model = config.get("model")
    recorded = {"base_model_name_or_path": model} if isinstance(model, str) else {}
    told = {"type": "LORA" if kind == "lora" else "DORA", "r": rank, "scale": float(scale), **recorded}
    return MlxRules(rank, float(scale), kind == "dora", told)


def _absurd(key: str, value: Any, wanted: str) -> InputError:
    what = f"`lora_parameters.{key}` is {shown(str(value))} in adapter_config.json, not {wanted}"
    return InputError(what, hint=RIGHT_ADAPTER_CONFIG)


def sort_mlx(tensors: Mapping[str, LazyTensor], rules: MlxRules, file: str) -> tuple[tuple[MlxModule, ...], Contents]:
    """The adapted modules in the order of the file, and what else it holds: whole tensors, and those without a place.

    Raises InputError for half modules and for factors that are not as `rules` say."""
    contents, parts = Contents(), dict[str, dict[str, LazyTensor]]()
    for name, tensor in tensors.items():
        if found := FACTOR.fullmatch(name):
            parts.setdefault(found["module"], {})[found["part"]] = tensor
        elif re.fullmatch(r".*\.(weight|bias)", name) and len(tensor.shape) <= 2:  # a convolution's kernel is stored in another order
            contents.replacements[name] = tensor
        else:
            contents.unplaced.append(name)
    modules = []
    for module, slots in parts.items():
        a, b, magnitude = slots.get("lora_a"), slots.get("lora_b"), slots.get("m")
        shapes = {part: list(tensor.shape) for part, tensor in slots.items()}
        if a is None or b is None or (magnitude is None) == rules.dora:
            facts = {"module": module, "parts that are there": listed(slots), "fine_tune_type": "dora" if rules.dora else "lora"}
            raise InputError(f"{shown(file)} does not hold all parts of a module", facts=facts, hint=RIGHT_ADAPTER_CONFIG)
        embedding = EMBEDDING.fullmatch(module) is not None
        outputs = a.shape[:1] if embedding else b.shape[1:]
        fits = len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0] == rules.rank
        if not fits or (magnitude is not None and magnitude.shape != outputs):
            facts = {"module": module, "shapes": str(shapes), "rank": str(rules.rank)}
            what = f"factors of {shown(file)} are no two matrices of the rank in `adapter_config.json`"
            raise InputError(what, facts=facts, hint=f"experts can't be merged here: {FUSE}" if len(a.shape) == 3 else RIGHT_ADAPTER_CONFIG)
        if embedding and magnitude is not None:
            what = f"{shown(file)} holds a DoRA of an embedding, whose magnitudes MLX takes by row and PEFT by column"
            raise InputError(what, facts={"modules": few([module])}, hint=FUSE)
        modules.append(MlxModule(module, embedding, transposed(a), transposed(b), magnitude))
    return tuple(modules), contents
