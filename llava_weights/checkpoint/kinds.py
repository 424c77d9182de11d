"""Is a checkpoint of a kind that can be read as weights of a LLaVA? What is not is told by its name, before anything is missed in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..families.layouts import canonical
from ..families.projectors import NORM
from ..families.quantised import quantisation
from ..families.targets import TARGETS, Target
from ..families.unsupported import unsupported
from ..formats.integer_delta import is_integer_delta
from ..text import shown
from .checkpoint import Checkpoint
from .config import known_decoder
from .hf_config import flat_config
from .tower import VIDEO

PLAIN_WEIGHTS = "quantised weights can't be added to or converted; give the float16 or bfloat16 checkpoint that they were made from"
ADAPTERS = ("adapter", "mlx-adapter", "loha", "projector")


@dataclass(frozen=True)
class Kind:
    """What a checkpoint is that can't be converted: `name` in a few words, `why` in a sentence, `evidence` for it, one thing to do."""

    name: str
    why: str
    evidence: str
    hint: str
    quantised: bool = False


def kind_of(checkpoint: Checkpoint) -> Kind | None:
    """What `checkpoint` is where nothing here can convert it: quantised, or a family without a class. None for all others, and for
    GGUF, which is never an input."""
    return None if checkpoint.layout == "gguf" else quantised_kind(checkpoint) or unsupported_kind(checkpoint)


def quantised_kind(checkpoint: Checkpoint) -> Kind | None:
    """How a checkpoint is quantised, by its tensors; a `quantization_config` beside plain weights does not make them quantised."""
    if is_integer_delta(checkpoint.metadata):
        return None
    found = quantisation({name: tensor.dtype for name, tensor in checkpoint.parameters().items()}, _method(checkpoint.config))
    if found is None:
        return None
    title, names = found
    config = _method(checkpoint.config)
    evidence = f"{len(names):,} tensors such as {shown(names[0])}" + (f"; `quantization_config` says {shown(config)}" if config else "")
    return Kind(
        f"quantised ({title})",
        "its matrices are stored in fewer bits than those of a 16-bit float",
        evidence,
        PLAIN_WEIGHTS,
        quantised=True,
    )


def unsupported_kind(checkpoint: Checkpoint) -> Kind | None:
    """The family of a checkpoint for which there is no class."""
    return None if checkpoint.layout in ADAPTERS else unsupported_family(checkpoint.config, checkpoint.parameters())


def unsupported_family(config: Mapping[str, Any], names: Mapping[str, Any]) -> Kind | None:
    """As `unsupported_kind`, from a config and the names of tensors."""
    nested = isinstance(config.get("text_config"), Mapping)
    decoder = known_decoder(flat_config(config) if nested else config)
    found = unsupported(config, names, known=decoder is not None)
    return Kind(found[0].name, found[0].why, found[1], found[0].hint) if found else None


def contradictions(target: Target, names: Iterable[str]) -> list[str]:
    """Sentences on the tensors of a llava-hf checkpoint, by their `names`, that are not those of the class which its config names."""
    every = list(names)
    parts = {canonical(name): name for name in every}
    classes = {row.part: " or ".join(each.model_type for each in TARGETS if each.part == row.part) for row in TARGETS}
    found = []
    for part, owners in classes.items():
        if part != target.part and (first := next((name for name in every if re.match(rf"(?:model\.)?{part}\.", name)), None)):
            found.append(f"{shown(first)} is a tensor of {owners}")
    first = next((full for part, full in parts.items() if part.startswith(VIDEO)), None)
    if bool(first) != target.two_towers:
        owners = " or ".join(row.model_type for row in TARGETS if row.two_towers)
        found.append(f"{shown(first)} is a tensor of {owners}" if first else "the tower for videos is in no file")
    if "newline" in parts and not target.tiles:
        owners = " or ".join(row.model_type for row in TARGETS if row.tiles)
        found.append(f"{shown(parts['newline'])} is a tensor of {owners}")
    if (NORM[0] in parts) != target.layernorm:
        owners = " or ".join(row.model_type for row in TARGETS if row.layernorm)
        found.append(
            f"{shown(parts[NORM[0]])} is a tensor of {owners}" if NORM[0] in parts else "the LayerNorm of its projector is in no file"
        )
    return found


def refuse_kind(kind: Kind | None, checkpoint: Checkpoint, role: str = "") -> None:
    """Raise InputError for a kind, naming it."""
    if kind:
        what = f"{f'the {role} ' if role else ''}`{checkpoint.origin.name}` is {kind.name}"
        raise InputError(what, facts={"why it can't be used": kind.why, "recognised by": kind.evidence}, hint=kind.hint)


def _method(config: Mapping[str, Any]) -> str:
    """What `quantization_config` calls itself, at the top or in the text model's part; empty without one."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        found = part.get("quantization_config")
        if isinstance(found, Mapping):
            return str(found.get("quant_method") or ("bitsandbytes" if any("load_in" in str(key) for key in found) else ""))
    return ""
