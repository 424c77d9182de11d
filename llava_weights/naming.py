"""One name for the same tensor in every layout, so that an adapter trained under one finds its base in another."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from .families import VOCABULARY

# Where each layout keeps the parts of a LLaVA. First match wins; the canonical name is the part and what follows in it.
# Original (haotian-liu), Hub style, the in-memory names of transformers 4.52 and 5.6, and what 5.4/5.5 saved by mistake
# (facts: llava-hf 2.1, styles S0 to S5).
CANONICAL = (
    (r"(?:model\.)?language_model\.lm_head\.(.+)", r"head.\1"),
    (r"lm_head\.(.+)", r"head.\1"),
    (r"(?:model\.)?(?:vision_tower\.){1,2}(?:vision_model\.)?(.+)", r"tower.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.(.+)", r"projector.0.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.(.+)", r"projector.2.\1"),
    (r"model\.mm_projector\.(.+)", r"projector.\1"),
    (r"(?:model\.)?image_newline()", r"newline\1"),
    (r"(?:model\.)?language_model\.model\.(.+)", r"text.\1"),
    (r"model\.language_model\.(.+)", r"text.\1"),
    (r"model\.(.+)", r"text.\1"),
)


# The same tables read the other way: how the two layouts that are written spell a canonical name. llava-hf has no name for the
# single Linear of v0 and v1 (`projector.weight`), which convert.py makes a pair.
HUB = (
    (r"head\.(.+)", r"language_model.lm_head.\1"),
    (r"text\.(.+)", r"language_model.model.\1"),
    (r"tower\.(.+)", r"vision_tower.vision_model.\1"),
    (r"projector\.0\.(.+)", r"multi_modal_projector.linear_1.\1"),
    (r"projector\.2\.(.+)", r"multi_modal_projector.linear_2.\1"),
    (r"newline()", r"image_newline\1"),
)
ORIGINAL = (
    (r"head\.(.+)", r"lm_head.\1"),
    (r"text\.(.+)", r"model.\1"),
    (r"tower\.(.+)", r"model.vision_tower.vision_tower.vision_model.\1"),
    (r"projector\.(.+)", r"model.mm_projector.\1"),
    (r"newline()", r"model.image_newline\1"),
)
SPELLINGS = {"llava-hf": HUB, "llava": ORIGINAL}


def canonical(name: str) -> str:
    """The layout-free name of a tensor or module; other names stand for themselves."""
    for pattern, target in CANONICAL:
        if found := re.fullmatch(pattern, name):
            return found.expand(target)
    return name


def spelled(name: str, layout: str) -> str:
    """The canonical `name` as `layout` ("llava-hf" or "llava") spells it. Raises KeyError for a name that it has no word for."""
    for pattern, target in SPELLINGS[layout]:
        if found := re.fullmatch(pattern, name):
            return found.expand(target)
    raise KeyError(name)


# The vocabulary's tables by canonical name, embedding first.
TABLES = tuple(map(canonical, VOCABULARY))


class Names:
    """Finds the names of a base. A name is looked for as it stands, then by its canonical form, then with or without the
    model class's prefix (`transformer.h.0` and `h.0`), whichever finds all of them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.exact = {name: name for name in names}
        self.canonical = _unique((canonical(name), name) for name in self.exact)
        self.without_prefix = _unique((name.partition(".")[2], name) for name in self.exact)

    def match(self, wanted: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """(wanted name -> base name, names without a place), by the one rule that places the most."""
        every = list(wanted)
        rules = (
            {name: self.exact.get(name) for name in every},
            {name: self.canonical.get(canonical(name)) for name in every},
            {name: self.exact.get(name.partition(".")[2]) for name in every},
            {name: self.without_prefix.get(name) for name in every},
        )
        best = max(rules, key=lambda found: sum(base is not None for base in found.values()))
        return {name: base for name, base in best.items() if base is not None}, [name for name, base in best.items() if base is None]


def _unique(pairs: Iterable[tuple[str, str]]) -> Mapping[str, str]:
    """The pairs as a mapping, without keys that stand for more than one name."""
    found: dict[str, list[str]] = defaultdict(list)
    for key, name in pairs:
        found[key].append(name)
    return {key: names[0] for key, names in found.items() if len(names) == 1}
