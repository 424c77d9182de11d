"""Make a checkpoint again from its sources and compare, the strongest check (L4): every tensor is computed anew, nothing is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.manifest import TensorEntry, find_manifest
from ..checkpoint.rehash import digests
from ..errors import InputError, UsageError
from ..events import Listener
from ..families.projectors import PROJECTOR_FORMS
from ..families.prompts import CONVERSATIONS
from ..findings import Finding
from ..smoke.probes import table_rows
from ..storage.digests import TENSORS
from ..tensors.lazy import FLOATS
from ..tensors.low_rank import Arithmetic
from ..text import shown
from ..transforms.convert import TO_LAYOUTS, convert
from ..transforms.delta import apply_delta
from ..transforms.lora import Adapters, merge_lora
from ..transforms.quantised_training import ROUNDINGS
from .checksums import failed, folded

USUAL_OPTIONS = {"arithmetic": "peft", "scale": 1.0, "base_quantized": None, "projector_form": "identity"}
KINDS: dict[str, Any] = {"scale": (int, float), "lossy": bool}  # of the recorded values that are no texts
RIGHT_SOURCES = "give the sources and options that it was made with: README.md and the manifest name them"


@dataclass(frozen=True)
class RecordedOptions:
    """How a checkpoint was made, by the recipe beside it. Holds only values that a command could have recorded."""

    to: str = ""
    dtype: str | None = None
    arithmetic: Arithmetic = "peft"
    scale: float = 1.0
    base_quantized: str | None = None
    projector_form: str | None = None
    conv_mode: str | None = None
    image_token: str | None = None
    image_aspect: str | None = None
    lossy: bool = False
    tower_name: str | None = None


def remake(
    made: Checkpoint,
    base: Checkpoint,
    *,
    delta: Checkpoint | None = None,
    lora: Adapters = (),
    tower: Checkpoint | None = None,
    accept_tower: bool = False,
) -> Checkpoint:
    """What `made` should be, as lazy tensors: `base` with the delta and the adapters, in the layout of `made`.

    The options (arithmetic, scale, rounding of the base, dtype, projector form) are those of its manifest, the defaults where it has none.
    Raises InputError where the manifest records options that no command takes, or the sources do not fit.
    """
    options = _options(made)
    result = apply_delta(base, delta, accept_base=True) if delta else base
    dtype = None if options.dtype == "F64" else options.dtype  # which no command makes
    if lora:
        merged_dtype = None if made.layout == "llava-hf" else dtype
        how_merged: Any = {"arithmetic": options.arithmetic, "scale": options.scale, "base_quantized": options.base_quantized}
        result = merge_lora(result, lora, dtype=merged_dtype, tower=tower, accept_tower=accept_tower, **how_merged)
    mode = options.conv_mode if "conv_mode" in made.config else None  # else it was chosen, not given
    if made.layout == "llava-hf":
        how: Any = {"projector_form": options.projector_form, "conv_mode": mode, "image_token": options.image_token}
        how |= {"tower": tower, "dtype": dtype, "accept_tower": accept_tower, "lossy": options.lossy}
        result = convert(result, "llava-hf", vocab_size=table_rows(made) or None, image_aspect=options.image_aspect, **how)
    elif options.to == "llava":
        result = convert(
            result, "llava", tower=tower, dtype=dtype, tower_name=options.tower_name, conv_mode=mode, accept_tower=accept_tower
        )
    elif tower and not any(role == "tower" for step in result.history for role, _ in step.inputs):
        raise UsageError(f"`{made.origin.name}` was not converted, so no vision tower went into it", hint="leave `--vision-tower` out")
    return result


def compare_remade(
    made: Checkpoint,
    remade: Checkpoint,
    *,
    entries: Mapping[str, TensorEntry] | None = None,
    jobs: int = 2,
    on_event: Listener = lambda event: None,
) -> list[Finding]:
    """One finding for each tensor of `made` that its sources do not give, or one `ok` for all. Reads the sources whole.

    `entries` are digests that were just taken of `made`'s values; without them the values are read here. Digests in its manifest are
    not used.
    """
    parameters = made.parameters()
    algorithm = next((entry.algorithm for entry in (entries or {}).values()), TENSORS)
    if entries is None:
        wanted = digests(parameters, algorithm=algorithm, jobs=jobs, on_event=on_event)
    else:
        wanted = {name: (entry.dtype, entry.shape, entry.digest) for name, entry in entries.items() if name in parameters}
    found = digests(remade.parameters(), algorithm=algorithm, jobs=jobs, on_event=on_event)
    wrong = [
        failed("L4", name, f"`{name}` is not what the sources give", RIGHT_SOURCES) for name in wanted if wanted[name] != found.get(name)
    ]
    wrong += [failed("L4", name, f"`{name}` comes from the sources, and is missing", RIGHT_SOURCES) for name in found if name not in wanted]
    options = _unusual(remade)
    text = f"{len(found):,} tensors made again from the sources{options}, every bit equal"
    return folded("L4", made.origin.name, wrong, text, part=f"values of {len(found):,} tensors (by the sources{options})")


def _unusual(remade: Checkpoint) -> str:
    """The options that change values and are not the defaults of the commands: only the manifest tells these."""
    steps = [(key, value) for step in remade.history for key, value in step.options.items()]
    unusual = [f"{key} {value}" for key, value in steps if key in USUAL_OPTIONS and value != USUAL_OPTIONS[key]]
    return f" with {', '.join(unusual)}, as its manifest records" if unusual else ""


def _options(made: Checkpoint) -> RecordedOptions:
    """The options of every step of the recipe, later ones over earlier ones. A manifest that can't be read at all records none."""
    try:
        manifest = find_manifest(made.origin.path)
    except InputError:  # which is a finding of its own
        return RecordedOptions()
    if manifest is None:
        return RecordedOptions()
    if manifest.doubt:
        raise InputError(manifest.doubt, hint="run `llava-weights verify` without sources")
    recorded = {key: value for step in manifest.recipe for key, value in step.get("options", {}).items() if value is not None}
    known: dict[str, Callable[[Any], bool]] = {
        "to": lambda value: value in TO_LAYOUTS,
        "dtype": lambda value: value in FLOATS,
        "arithmetic": lambda value: value in get_args(Arithmetic),
        "scale": lambda value: type(value) in (int, float) and math.isfinite(value),
        "base_quantized": lambda value: value in ROUNDINGS,
        "projector_form": lambda value: value in PROJECTOR_FORMS,
        "conv_mode": lambda value: value in CONVERSATIONS,
        "image_token": lambda value: 0 < len(value) < 256,
        "image_aspect": lambda value: value in ("square", "pad"),
        "lossy": lambda value: value is True,
        "tower_name": lambda value: len(value) < 4096,
    }
    options = {key: recorded[key] for key in known if key in recorded}
    for key, value in options.items():
        if not isinstance(value, KINDS.get(key, str)) or not known[key](value):
            what = f"the recipe in {shown(manifest.path.name)} records the {key} {shown(str(value))}, which no command takes"
            raise InputError(
                what, facts={"path": manifest.path}, hint="get the manifest again, or run `llava-weights verify` without sources"
            )
    return RecordedOptions(**options)
