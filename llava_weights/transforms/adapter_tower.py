"""Adapters that change the vision tower, onto a base that holds none, as LLaVA's do: the tower joins the base before the merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..checkpoint.checkpoint import Checkpoint, main_dtype
from ..checkpoint.tower import check_tower, open_tower, tower_hint
from ..errors import MismatchError
from ..families.layouts import placed, spelled
from ..tensors.lazy import LazyTensor, cast
from ..text import few
from .adapter import Adapter

PATCHES = "tower.embeddings.patch_embedding.weight"  # which every complete tower has


def tower_changes(tensors: Mapping[str, LazyTensor], adapters: Sequence[Adapter]) -> list[str]:
    """What the adapters change of a tower that neither these tensors nor the adapters hold whole, by the adapters' names."""
    if any(placed(name).startswith("tower.") for name in tensors):
        return []
    whole = [name for adapter in adapters for name in adapter.replacements if placed(name).startswith("tower.")]
    low = [f"{module.name}.weight" for adapter in adapters for module in adapter.modules if placed(module.name).startswith("tower.")]
    held = {placed(name) for name in whole}
    return [] if PATCHES in held and not {placed(name) for name in low} - held else [*whole, *low]


def with_tower(
    base: Checkpoint, tensors: Mapping[str, LazyTensor], adapters: Sequence[Adapter], tower: Checkpoint | None, *, accept: bool
) -> dict[str, LazyTensor]:
    """The tensors of `tower` under the original's names, in the dtype of `tensors`, where the adapters need them; none elsewhere.

    Raises MismatchError where they need one and none is given, or another published one is given than the config names."""
    changed = tower_changes(tensors, adapters)
    if not changed:
        return {}
    config = {**base.config, **next((adapter.config for adapter in adapters if "mm_vision_tower" in adapter.config), {})}
    if tower is None:
        what = f"{len(changed):,} tensors of the adapter belong to the vision tower, which the base does not hold: {few(changed)}"
        raise MismatchError(what, facts={"base": base.origin.name}, hint=tower_hint(config))
    found = open_tower(tower)
    check_tower(replace(base, config=config), found, accept=accept)
    dtype = main_dtype(tensors)
    return {spelled(f"tower.{name}", "llava"): cast(tensor, dtype) for name, tensor in found.tensors.items()}
