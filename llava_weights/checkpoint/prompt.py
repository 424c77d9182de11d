"""How a checkpoint is prompted, as far as its own files tell: the same for every command that says it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..families.layouts import canonical
from ..families.originals import Original, fitting
from ..families.projectors import NORM, PROJECTOR_NAMES, projector_type
from ..families.targets import TARGET_BY_TYPE
from ..families.towers import TOWER_BY_TYPE
from .added_tokens import Files, listed_tokens
from .chat_template import Choice, choose
from .config import known_decoder
from .hf_config import flat_config
from .sentencepiece import read_sentencepiece
from .small_files import small_bytes, small_object, small_text
from .tokenizer import MODEL, MODEL_LIMIT
from .tower import VIDEO, named_tower, published, row_of


def likely_prompt(layout: str, config: Mapping[str, Any], names: Iterable[str], specials: Collection[str]) -> Choice | None:
    """How a LLaVA of this layout, config, tensor names and added tokens is prompted; None where none of its families tells.

    Of a llava-hf checkpoint its config and tokens are asked, not its template. Raises InputError for an unknown `conv_mode`.
    """
    families = likely_families(layout, config, names)
    known = "conv_mode" in config or any(not row.token or row.token in specials for row in families)
    return choose(config, specials, families) if known else None


def likely_families(layout: str, config: Mapping[str, Any], names: Iterable[str]) -> tuple[Original, ...]:
    """The published families that config and tensors fit, the more certain ones first; none where nothing is known of the decoder."""
    names = tuple(names)
    parts = set(map(canonical, names))
    videos = any(part.startswith(VIDEO) for part in parts)
    if layout == "llava-hf":
        target = TARGET_BY_TYPE.get(str(config.get("model_type")))
        flat = flat_config(config)
        decoder = known_decoder({"model_type": flat["model_type"]})
        if target is None or decoder is None:
            return ()
        flat = {**decoder.defaults, **flat, "mm_projector_type": projector_type(PROJECTOR_NAMES), "image_aspect_ratio": "pad"}
        if target.tiles:
            ratio = config.get("vision_aspect_ratio", target.defaults["vision_aspect_ratio"]) if target.capped else "anyres"
            flat |= {"image_aspect_ratio": ratio, "mm_patch_merge_type": "spatial_unpad"}
        flat |= {word: config.get(key, usual) for word, (key, usual) in target.words.items()}
        found = fitting(flat, decoder=decoder.model_type, tower=tower_kind(names, {}), norm=target.layernorm, videos=target.two_towers)
        return tuple(row for row in found if row.target == target.model_type)
    decoder = known_decoder(config)
    if layout != "llava" or decoder is None:
        return ()
    config = {**config, "mm_projector_type": projector_type(parts) or config.get("mm_projector_type")}
    return tuple(fitting(config, decoder=decoder.model_type, tower=tower_kind(names, config), norm=NORM[0] in parts, videos=videos))


def tower_kind(names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """The kind of tower: that among the tensors, else the published one that an original's config names."""
    if inside := {name.removeprefix("tower.") for name in map(canonical, names) if name.startswith("tower.")}:
        return row_of(inside).kind
    known = published(named_tower(config))
    return TOWER_BY_TYPE[known.model_type].kind if known else None


def special_texts(files: Files) -> frozenset[str]:
    """The texts of the added tokens of any file, and of the pieces of tokenizer.model that are found in a text as a whole."""
    whole = read_sentencepiece(small_bytes(MODEL, files[MODEL], MODEL_LIMIT)).whole if MODEL in files else frozenset()
    return whole.union(listed_tokens(files))


def own_template(files: Files) -> str:
    """The chat template of a llava-hf folder, as its processor reads it; empty where there is none."""
    found = small_text(files, "chat_template.jinja") or small_object(files, "chat_template.json").get("chat_template")
    return found if isinstance(found, str) else ""
