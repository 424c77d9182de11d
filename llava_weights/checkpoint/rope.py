"""The rope of a text model, in every spelling that configs have.

transformers 4 has `rope_theta` and `rope_scaling`, whose kind is `type` up to 4.42 and `rope_type` later; 5 saves one `rope_parameters`,
for some models one for each kind of layer, and reads the older words too. So the older words are what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..families.decoders import Decoder
from ..text import shown

PARAMETERS, SCALING, THETA, PARTIAL = "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"
LENGTH = "original_max_position_embeddings"
MOST_KINDS = 16


def plain_rope(config: Mapping[str, Any], decoder: Decoder | None = None) -> dict[str, Any]:
    """`config` with its rope in the words that every version of transformers reads; those that already stand there, and are no null, win.

    What differs from layer to layer stays as it is, since there are no older words for it: `check_rope` refuses it.
    """
    new = dict(config)
    place = _place(new)
    given = _common(new.get(place))
    if given is None:
        return new
    del new[place]
    scaling = {key: value for key, value in given.items() if key not in (THETA, PARTIAL, "type", "rope_type")}
    kind = given.get("rope_type", given.get("type", "default"))
    default = decoder.defaults[THETA] if decoder else 10000.0
    if new.get(THETA) is None:
        new[THETA] = given.get(THETA, default)
    if PARTIAL in given and (given[PARTIAL] != 1 or (decoder and PARTIAL in decoder.defaults)):
        new.setdefault(PARTIAL, given[PARTIAL])
    if new.get(SCALING) is None:
        new[SCALING] = None if kind == "default" else {**scaling, "rope_type": kind}
        if decoder and kind in decoder.plain_rope:  # versions that know `type` alone take these keys and no other
            if LENGTH in decoder.defaults and LENGTH in scaling:
                new.setdefault(LENGTH, scaling.pop(LENGTH))
            new[SCALING] = {**{key: value for key, value in scaling.items() if value is not None}, "type": kind}
    return new


def _place(config: Mapping[str, Any]) -> str:
    """The key of the newer words: `rope_scaling` where the base of the rope stands in it, as some versions wrote it."""
    scaling = config.get(SCALING)
    inside = isinstance(scaling, Mapping) and (THETA in scaling or any(isinstance(value, Mapping) for value in scaling.values()))
    return SCALING if inside and PARAMETERS not in config else PARAMETERS


def check_rope(config: Mapping[str, Any]) -> None:
    """Raise InputError where a text config has more than one rope: for kinds of layers, or in its two spellings."""
    place = _place(config)
    given = config.get(place)
    hint = "give the config.json that its authors published"
    if not isinstance(given, Mapping):
        return
    if (common := _common(given)) is None:
        kinds = ", ".join(shown(str(kind)) for kind in list(given)[:MOST_KINDS])
        raise InputError(f"`{place}` differs from layer to layer, which no known decoder does", facts={"kinds": kinds}, hint=hint)
    kind, scaling = common.get("rope_type", common.get("type", "default")), config.get(SCALING) if place != SCALING else None
    two = {THETA: (config.get(THETA), common.get(THETA))}
    if isinstance(scaling, Mapping):
        two[SCALING] = (scaling.get("rope_type", scaling.get("type", "default")), kind)
        two[f"{SCALING}.factor"] = (scaling.get("factor"), common.get("factor"))
    for key, (old, new) in two.items():
        if old is not None and new is not None and old != new:
            facts = {"transformers 4 reads": shown(str(old)), "transformers 5 reads": shown(str(new))}
            raise InputError(f"`{key}` and `{place}` contradict each other in the config", facts=facts, hint=hint)


def _common(given: Any) -> Mapping[str, Any] | None:
    """The one rope of `rope_parameters`, which may be there for each kind of layer; None where there is none, or several."""
    if not isinstance(given, Mapping):
        return None
    kinds = [value for value in given.values() if isinstance(value, Mapping)]
    if not kinds:
        return given
    return kinds[0] if all(kind == kinds[0] for kind in kinds) and len(kinds) == len(given) else None
