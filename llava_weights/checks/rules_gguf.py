"""Whether GGUF files are what llama.cpp takes for a LLaVA: names and shapes by their own keys, tokens by the table, image keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tower import tower_shapes
from ..families.decoders import DECODERS
from ..families.layouts import canonical
from ..families.llama_cpp import (
    GGUF_DECODERS,
    PROJECTOR_TENSORS,
    ROPE_FACTORS,
    SIZES,
    TABLES,
    TEXT_KEYS,
    TOWER_KEYS,
    TOWER_LAYER,
    TOWER_TENSORS,
)
from ..findings import Finding
from ..formats.gguf import GgufKey, index_gguf
from ..tensors.lazy import LazyTensor
from ..text import few, shown
from ..transforms.gguf import text_name

AGAIN = "make it again with `llava-weights convert SOURCE --to gguf -o OUT`"
Shapes = dict[str, tuple[int, ...]]


def check_gguf(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A finding for each fault of each file; one that says so for a file of an architecture that no row describes."""
    widths: dict[str, int] = {}
    for file in checkpoint.origin.files:
        tensors, keys = index_gguf(Path(file.path))
        arch = _value(keys, "general.architecture")
        if arch == "clip":
            faults, widths["its projector"] = list(_vision(tensors, keys)), _rows(tensors, "mm.2.weight")
        elif arch in {row.arch for row in GGUF_DECODERS.values()}:
            faults, widths["its text model"] = list(_text(str(arch), tensors, keys)), int(_value(keys, f"{arch}.embedding_length") or 0)
        else:
            text = f"the architecture {shown(str(arch))} is not known here: names and shapes were not compared with its keys"
            yield Finding("L0", "unchecked", file.name, text)
            continue
        yield from (Finding("L0", "failed", file.name, f"{shown(file.name)}: {fault}", AGAIN) for fault in faults)
    if len(set(widths.values())) > 1:
        text = " and ".join(f"{part} is {width:,} wide" for part, width in widths.items())
        yield Finding(
            "L0", "failed", checkpoint.origin.name, f"the files do not belong together: {text}", "give the two files of one model"
        )


def _value(keys: Mapping[str, GgufKey], name: str) -> Any:
    return keys[name].value if name in keys else None


def _rows(tensors: Mapping[str, LazyTensor], name: str) -> int:
    return tensors[name].rows if name in tensors else 0


def _numbers(keys: Mapping[str, GgufKey], names: Mapping[str, str]) -> dict[str, int]:
    """The values of these keys by the word of the config, those that are whole numbers of a size that a model can have."""
    found = {word: _value(keys, name) for name, word in names.items()}
    return {word: value for word, value in found.items() if type(value) is int and 0 < value < 1 << 24}


def _text(arch: str, tensors: Mapping[str, LazyTensor], keys: Mapping[str, GgufKey]) -> Iterator[str]:
    names = {f"{arch}.{name}": TEXT_KEYS[name][1] for name in SIZES}
    config: dict[str, Any] = _numbers(keys, names)
    if missing := [name for name, word in names.items() if word not in config]:
        yield f"it lacks keys, or they are no sizes: {few(missing)}"
        return
    if config["num_hidden_layers"] > 1024 or config["hidden_size"] % config["num_attention_heads"]:
        yield f"{config['num_hidden_layers']:,} layers, {config['num_attention_heads']:,} heads of a width of {config['hidden_size']:,}"
        return
    tokens = _value(keys, "tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, tuple) else 0
    for name in ("tokens", "scores", "token_type"):
        items = _value(keys, f"tokenizer.ggml.{name}")
        if isinstance(items, tuple) and len(items) != _rows(tensors, TABLES[0]):
            yield f"{len(items):,} {name} for the {_rows(tensors, TABLES[0]):,} rows of `{TABLES[0]}`"
    if not count:
        yield "it has no tokens"
    for role in ("bos", "eos", "unknown", "padding"):
        number = _value(keys, f"tokenizer.ggml.{role}_token_id")
        if number is not None and not (type(number) is int and 0 <= number < count):
            yield f"the {role} token has the id {shown(str(number))}, there are {count:,} tokens"
    heads = config["num_attention_heads"]
    width = _value(keys, f"{arch}.attention.key_length") or config["hidden_size"] // heads
    sizes = {**config, "head_dim": width, "vocab_size": _rows(tensors, TABLES[0]), "attention_bias": False, "mlp_bias": False}
    row = next(row for row in GGUF_DECODERS.values() if row.arch == arch)
    decoder = next(each for each in DECODERS if each.model_type == row.model_type)
    wanted = {text_name(canonical(name), row)[0]: shape for name, shape in decoder.shapes(sizes).items()}
    optional = {TABLES[1]: wanted.pop(TABLES[1]), ROPE_FACTORS: (width // 2,)}
    biases = {name.replace(".weight", ".bias"): shape[:1] for name, shape in wanted.items() if len(shape) > 1 and name.startswith("blk.")}
    yield from _compared(tensors, wanted, {**biases, **optional})


def _vision(tensors: Mapping[str, LazyTensor], keys: Mapping[str, GgufKey]) -> Iterator[str]:
    names = {f"clip.vision.{name}": word for name, kind, word in TOWER_KEYS if kind == "u32"} | {"clip.vision.block_count": "layers"}
    config: dict[str, Any] = _numbers(keys, names)
    if missing := [name for name, word in names.items() if word not in config and word != "projection_dim"]:
        yield f"it lacks keys, or they are no sizes: {few(missing)}"
        return
    if config["layers"] > 1024 or config["patch_size"] > config["image_size"]:
        yield f"{config['layers']:,} layers, patches of {config['patch_size']:,} of {config['image_size']:,} pixels"
        return
    layers = _value(keys, "clip.vision.feature_layer")
    if not isinstance(layers, tuple) or not layers:
        yield "`clip.vision.feature_layer` is missing, and without it llama.cpp takes the output of one layer too few (#25817)"
    elif max(layers) != config["layers"]:
        yield f"`clip.vision.feature_layer` is {list(layers)[:8]}, and there are {config['layers']:,} layers"
    if any(name.startswith("v.post_ln") for name in tensors):
        yield "it has `v.post_ln`, which llama.cpp would apply and LLaVA does not"
    shapes = tower_shapes({**config, "num_hidden_layers": config["layers"], "num_channels": 3, "model_type": "clip_vision_model"})
    wanted: Shapes = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        if name in TOWER_TENSORS:
            wanted[TOWER_TENSORS[name]] = shape
        elif parts[:2] == ["encoder", "layers"]:
            wanted[f"v.blk.{parts[2]}.{TOWER_LAYER['.'.join(parts[3:-1])]}.{parts[-1]}"] = shape
    wide = _rows(tensors, "mm.2.weight")
    projector = ((wide, config["hidden_size"]), (wide,), (wide, wide), (wide,))
    wanted |= dict(zip(list(PROJECTOR_TENSORS.values())[:4], projector, strict=True))
    yield from _compared(tensors, wanted, {PROJECTOR_TENSORS["newline"]: (wide,), "v.post_ln.weight": (), "v.post_ln.bias": ()})


def _compared(tensors: Mapping[str, LazyTensor], wanted: Shapes, optional: Shapes) -> Iterator[str]:
    if missing := [name for name in wanted if name not in tensors]:
        yield f"{len(missing):,} tensors that its keys ask for are missing: {few(missing)}"
    if unknown := [name for name in tensors if name not in wanted and name not in optional]:
        yield f"{len(unknown):,} tensors that its keys don't ask for: {few(unknown)}"
    for name, tensor in tensors.items():
        shape = wanted.get(name, optional.get(name))
        if shape and tensor.shape != shape:
            yield f"{shown(name)} is {list(tensor.shape)}, by its keys {list(shape)}"
