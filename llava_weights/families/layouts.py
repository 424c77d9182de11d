"""How the layouts name their tensors: which layout a checkpoint has, and one canonical name for the same tensor in every layout.

By its canonical names, an adapter that was trained on one layout finds its base in another.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

# Buffers that transformers <= 4.31 stored with the weights; never parameters, dropped on output.
DROPPED = r".*\.rotary_emb\.inv_freq|.*\.embeddings\.position_ids"
# What LLaVA adds to a LLaMA. These exist in no base, so a delta holds them whole.
MULTIMODAL = r"model\.(mm_projector|vision_tower|image_tower|video_tower|vision_resampler)\..*|model\.image_newline|model\.faster_token"
PROJECTOR = r"model\.mm_projector\..*"
ATTENTION = r"model\.layers\.\d+\.self_attn\.(q|qkv)_proj\.weight"  # which every decoder of the table has
# The only tensors that may have more rows in a delta than in its base (LLaVA `apply_delta`: "dimension mismatch" otherwise).
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
# Tables, in any layout, that may have rows of zeros: tokens and positions that no training has seen.
TABLE_ROWS = (
    r"output\.weight|(?:.*\.)?(?:embed_tokens|tok_embeddings|word_embeddings|token_embedding|wte|wpe|lm_head|embed_out"
    r"|position_embeddings?|pos_embed)(?:\.weight)?"
)


@dataclass(frozen=True)
class Layout:
    """A way of naming tensors. It fits where every pattern of `needs` matches some name and none of `lacks` matches any."""

    name: str
    title: str
    needs: tuple[str, ...]
    lacks: tuple[str, ...] = ()


# Tried in order, the first that fits wins.
LAYOUTS = (
    Layout("gguf", "llama.cpp's GGUF", (r"(v\.)?blk\.\d+\..*",)),
    Layout("adapter", "LoRA adapter", (r".*\.lora_(A|B|embedding_A|embedding_B)\b.*",)),
    Layout("mlx-adapter", "LoRA adapter of MLX", (r".*\.lora_(a|b)",)),
    Layout("loha", "PEFT adapter that is not a LoRA", (r"base_model\..*\.(hada_|lokr_|vera_|ia3_|oft_|boft_).*",)),
    Layout("mpt", "LLaVA-MPT", (r"transformer\.blocks\..*",)),
    Layout("llava-hf", "LLaVA in the llava-hf layout", (r"(model\.)?language_model\..*", r"(model\.)?multi_modal_projector\..*")),
    Layout("llava", "LLaVA in the original layout", (ATTENTION, PROJECTOR)),
    Layout("llama", "LLaMA", (ATTENTION,)),
    Layout("projector", "LLaVA projector only", (r"(base_model\.model\.)?model\.mm_projector\..*",), (r".*self_attn.*",)),
    Layout("clip", "vision tower (a CLIP or a SigLIP)", (r"(vision_model\.|vision_tower\.).*",)),
)

# What programs put into the names of a model that they wrap: FSDP, activation checkpointing, torch.compile, DataParallel, PEFT.
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.|^module\.")
PEFT_PREFIX = "base_model.model."
BASE_LAYER = re.compile(r"(?:\.token_adapter)?\.base_layer(?=\.)")

# Where each layout keeps the parts of a LLaVA. First match wins; the canonical name is the part and what follows in it. Covers the
# original (haotian-liu), the Hub's style, the in-memory names of transformers 4.52 and 5.6 (PR #44431), and what 5.4 and 5.5 saved by
# mistake (#45357, mended by #45358).
CANONICAL = (
    (r"(?:model\.)?language_model\.lm_head\.(.+)", r"head.\1"),
    (r"lm_head\.(.+)", r"head.\1"),
    (r"(?:model\.)?(?:vision_tower\.){1,2}(?:vision_model\.)?(.+)", r"tower.\1"),
    (r"(?:model\.)?(?:image_tower\.){1,2}(?:vision_model\.)?(.+)", r"tower.\1"),
    (r"(?:model\.)?(?:video_tower\.){1,2}(?:vision_model\.)?(.+)", r"video_tower.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.(.+)", r"projector.0.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.(.+)", r"projector.2.\1"),
    (r"(?:model\.)?multi_modal_projector\.projector_layernorm\.(.+)", r"projector.norm.\1"),
    (r"model\.mm_projector\.clip_layernorm\.(.+)", r"projector.norm.\1"),
    (r"model\.mm_projector\.final_linear\.(.+)", r"projector.\1"),
    (r"model\.mm_projector\.(.+)", r"projector.\1"),
    (r"(?:model\.)?image_newline()", r"newline\1"),
    (r"(?:model\.)?language_model\.model\.(.+)", r"text.\1"),
    (r"model\.language_model\.(.+)", r"text.\1"),
    (r"model\.(.+)", r"text.\1"),
)
# What a part of a model calls its own tensors, where a trainer saw that part alone or wrapped once more, and the original's or the Hub's
# name for the same. Only for finding what an adapter changes: no whole LLaVA is named so.
WITHIN = (
    (r"(?:(?:model|language_model|text_model)\.)*((?:layers|embed_tokens|norm)\..+)", r"model.\1"),
    (r"(?:(?:model|language_model)\.)*(lm_head\..+)", r"\1"),
    (r"(?:(?:model|vision_tower)\.)*(vision_model\..+)", r"vision_tower.\1"),
    (r"(?:model\.)*(mm_projector\..+)", r"model.\1"),
    (r"(?:model\.)*(multi_modal_projector\..+)", r"\1"),
    (r"(?:model\.)*(image_newline)", r"model.\1"),
)
# The other way: how the two layouts that are written spell a canonical name. llava-hf has no name for the single Linear of v0 and v1
# (`projector.weight`), which convert.py makes a pair.
HF_NAMES = (
    (r"head\.(.+)", r"language_model.lm_head.\1"),
    (r"text\.(.+)", r"language_model.model.\1"),
    (r"tower\.(.+)", r"vision_tower.vision_model.\1"),
    (r"video_tower\.(.+)", r"video_tower.vision_model.\1"),
    (r"projector\.0\.(.+)", r"multi_modal_projector.linear_1.\1"),
    (r"projector\.2\.(.+)", r"multi_modal_projector.linear_2.\1"),
    (r"projector\.norm\.(.+)", r"multi_modal_projector.projector_layernorm.\1"),
    (r"newline()", r"image_newline\1"),
)
ORIGINAL_NAMES = (
    (r"head\.(.+)", r"lm_head.\1"),
    (r"text\.(.+)", r"model.\1"),
    (r"tower\.(.+)", r"model.vision_tower.vision_tower.vision_model.\1"),
    (r"video_tower\.(.+)", r"model.video_tower.video_tower.\1"),
    (r"projector\.(.+)", r"model.mm_projector.\1"),
    (r"newline()", r"model.image_newline\1"),
)
# The projector of ViP-LLaVA has names of its own.
VIP = (
    (r"projector\.norm\.(.+)", r"model.mm_projector.clip_layernorm.\1"),
    (r"projector\.(\d.+)", r"model.mm_projector.final_linear.\1"),
    *ORIGINAL_NAMES,
)
# Where there is a tower for images and another for videos.
TWO_TOWERS_HF = ((r"tower\.(.+)", r"image_tower.vision_model.\1"), *HF_NAMES)
TWO_TOWERS = ((r"tower\.(.+)", r"model.image_tower.image_tower.\1"), *ORIGINAL_NAMES)
# An adapter goes by the names of modules in memory, not by those in files: these are of llava-hf's classes since transformers 4.52. PEFT
# finds the place of a low-rank update with and without `vision_model.`, which classes have no more since 5.6 (PR #44431); not so that of
# a module that was trained whole.
HF_TOWER = "model.vision_tower.vision_model."
HF_ADAPTED = (
    (r"head\.(.+)", r"lm_head.\1"),
    (r"text\.(.+)", r"model.language_model.\1"),
    (r"tower\.(.+)", rf"{HF_TOWER}\1"),
    (r"newline()", r"model.image_newline\1"),
    *((pattern, rf"model.{name}") for pattern, name in HF_NAMES if pattern.startswith("projector")),
)
HF_TRAINED = ((r"tower\.(.+)", r"model.vision_tower.\1"), *HF_ADAPTED)
SPELLINGS = {
    "llava-hf": HF_NAMES, "llava": ORIGINAL_NAMES, "vip-llava": VIP, "two-towers-hf": TWO_TOWERS_HF, "two-towers": TWO_TOWERS,
    "llava-hf adapted": HF_ADAPTED, "llava-hf trained": HF_TRAINED,
}  # fmt: skip


@dataclass(frozen=True)
class MetaName:
    """How one tensor of Meta's own layout becomes one of transformers'.

    The files hold pieces of it along the axis `cut`; None where each holds all of it. `heads` is the config key of the number of heads
    where rows are reordered: Meta keeps the two rows of a rotation side by side, transformers half a head apart.
    """

    meta: str
    name: str
    cut: int | None
    heads: str = ""


# In the order of transformers' state dict; transformers 4.31, convert_llama_weights_to_hf.py.
META_BEFORE = (MetaName("tok_embeddings.weight", "model.embed_tokens.weight", 1),)
META_LAYER = (
    MetaName("attention.wq.weight", "self_attn.q_proj.weight", 0, "num_attention_heads"),
    MetaName("attention.wk.weight", "self_attn.k_proj.weight", 0, "num_key_value_heads"),
    MetaName("attention.wv.weight", "self_attn.v_proj.weight", 0),
    MetaName("attention.wo.weight", "self_attn.o_proj.weight", 1),
    MetaName("feed_forward.w1.weight", "mlp.gate_proj.weight", 0),
    MetaName("feed_forward.w3.weight", "mlp.up_proj.weight", 0),
    MetaName("feed_forward.w2.weight", "mlp.down_proj.weight", 1),
    MetaName("attention_norm.weight", "input_layernorm.weight", None),
    MetaName("ffn_norm.weight", "post_attention_layernorm.weight", None),
)
META_AFTER = (MetaName("norm.weight", "model.norm.weight", None), MetaName("output.weight", "lm_head.weight", 0))


def meta_names(layers: int) -> tuple[MetaName, ...]:
    """Every tensor of a model of `layers` layers, by full names."""
    within = (
        MetaName(f"layers.{number}.{row.meta}", f"model.layers.{number}.{row.name}", row.cut, row.heads)
        for number in range(layers)
        for row in META_LAYER
    )
    return (*META_BEFORE, *within, *META_AFTER)


# Names that are not those of the Hub, and who can't read them, tried with transformers 4.36 to 5.23. The first that matches counts.
STYLES = (
    (r"model\.language_model\.model\..*", "transformers 5.4 and 5.5, which alone read it: others miss the text model or the head"),
    (
        r"model\.(vision|image|video)_tower\.(?!vision_model\.).*",
        "transformers 5.6 and later: earlier ones miss the vision tower, before 4.52 nearly all",
    ),
    (r"model\.language_model\..*", "transformers 4.52 and later: earlier ones miss the whole text model"),
    (r"(vision|image|video)_tower\.(?!vision_model\.).*", "a save by transformers 5.23: 4.57 and earlier, and vLLM, miss the vision tower"),
)
WRAPPER = ".vision_resampler"  # of LLaVA-NeXT-Video around what it pools; it has no tensors of its own (transformers' converters strip it)
LLAVA_PART = r"(text|head|tower|video_tower|projector)\.|newline$"  # what the canonical name of every tensor of a LLaVA begins with


@lru_cache(maxsize=1 << 16)
def canonical(name: str) -> str:
    """The layout-free name of a tensor or module; other names stand for themselves."""
    bare = name.replace(WRAPPER, "", 1)
    for pattern, target in CANONICAL:
        if found := re.fullmatch(pattern, bare):
            return found.expand(target)
    return name


@lru_cache(maxsize=1 << 16)
def placed(name: str) -> str:
    """The canonical name of a tensor or module that a trainer named from within a part of the model, with fewer or more prefixes."""
    for pattern, target in WITHIN:
        if found := re.fullmatch(pattern, name):
            return canonical(found.expand(target))
    return canonical(name)


def spelled(name: str, layout: str) -> str:
    """The canonical `name` as `layout`, a key of `SPELLINGS`, spells it: "llava-hf", "llava", or that of a target with names of its own; in
    an adapter of a llava-hf model "llava-hf adapted" or "llava-hf trained" (whole, beside the low-rank updates).

    Raises KeyError for a name that it has no word for."""
    for pattern, target in SPELLINGS[layout]:
        if found := re.fullmatch(pattern, name):
            return found.expand(target)
    raise KeyError(name)


# The vocabulary's tables by canonical name, embedding first.
VOCABULARY_TABLES = tuple(map(canonical, VOCABULARY))


class BaseNames:
    """The names of a base, to be found by an adapter's: by the same name, by its canonical form, by the part of the model that it names, or
    with or without the prefix of the model class (`transformer.h.0` and `h.0`)."""

    def __init__(self, names: Iterable[str]) -> None:
        self.exact = {name: name for name in names}
        self.canonical = _unique((canonical(name), name) for name in self.exact)
        self.placed = _unique((placed(name), name) for name in self.exact)
        self.without_prefix = _unique((name.partition(".")[2], name) for name in self.exact)

    def match(self, wanted: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """(wanted name -> base name, names that are not found), by the one rule that finds the most."""
        every = list(wanted)
        rules = (
            {name: self.exact.get(name) for name in every},
            {name: self.canonical.get(canonical(name)) for name in every},
            {name: self.placed.get(placed(name)) for name in every},
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
