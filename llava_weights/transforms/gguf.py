"""A LLaVA as the two files of llama.cpp: its text model, and tower with projector (mmproj).

It is made from the llava-hf form of the checkpoint, so that the text file is byte for byte what llama.cpp's convert_hf_to_gguf.py makes of
that folder (of one shard), and the other what its script for image encoders makes of the same tower and projector.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import pi
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.checkpoint import Checkpoint, main_dtype
from ..checkpoint.licence import licence
from ..checkpoint.small_files import small_object
from ..errors import InputError, UsageError
from ..families.files import CARD_TAGS, IMAGE_TASK, LICENSE_PREFIXES
from ..families.layouts import canonical, spelled
from ..families.llama_cpp import (
    FILE_TYPES,
    GGUF_DECODERS,
    GGUF_TARGETS,
    GGUF_TOWERS,
    HEAD_KEYS,
    HEAD_WIDTHS,
    PERMUTED,
    PROJECTOR_TENSORS,
    QUANTISATION_VERSION,
    ROPE_FACTORS,
    ROPE_KEYS,
    SAMPLING_KEYS,
    TABLES,
    TABLES_OF_Q4,
    TEXT_KEYS,
    TEXT_NAMES,
    TOWER_ACTIVATIONS,
    TOWER_KEYS,
    TOWER_LAYER,
    TOWER_TENSORS,
    GgufDecoder,
)
from ..families.projectors import PROJECTOR_ACTIVATION
from ..families.targets import TARGET_BY_TYPE
from ..formats.gguf import GgufFile, GgufKey, index_gguf
from ..formats.safetensors import SORT_ORDER
from ..storage.reading import Workspace
from ..tensors.dtypes import BLOCKS, as_rows, load_torch, to_float32
from ..tensors.lazy import Cast, FromRows, LazyTensor, PermuteRope, UnpermuteRope, cast
from ..text import listed, shown
from .gguf_tokenizer import tokenizer_keys

EXTRA = "`pip install 'llava-weights[gguf]'`"
USE_HUB = "convert it to llava-hf, which transformers runs"
AT_ONCE = 1 << 19  # values that are quantised at once
COPIES = 24  # bytes for each of them: float32 copies, and numpy's own between steps
TOWER_NUMBER = re.compile(r"tower\.encoder\.layers\.(\d{1,6})\.")
Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Quantised(FromRows):
    """`source` in blocks of 32 values with one scale, each row by itself, as `gguf.quants` does it: some rows at once, since that takes
    several times the memory of the values."""

    @property
    def _step(self) -> int:
        """Rows at once."""
        unit = self.source.row_unit
        return max(AT_ONCE // self.source.shape[-1] // unit * unit, unit)

    def scratch(self, rows: int) -> int:
        rows = min(rows, self._step)
        return rows * self.source.row_nbytes + self.source.scratch(rows) + COPIES * rows * self.source.shape[-1]

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        made = as_rows(out, stop - start)
        for first in range(start, stop, self._step):
            last = min(first + self._step, stop)
            with work.scratch((last - first) * self.source.row_nbytes) as raw:
                self.source.rows_into(raw, first, last, work)
                values = to_float32(raw, self.source.dtype).reshape(last - first, self.source.shape[-1])
                made[first - start : last - start] = quantize(values, GGMLQuantizationType[self.dtype])


@dataclass(frozen=True, kw_only=True)
class Shifted(FromRows):
    """`source` plus `by`, in the dtype of its own."""

    by: float

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        with work.scratch((stop - start) * self.source.row_nbytes) as raw:
            self.source.rows_into(raw, start, stop, work)
            values = to_float32(raw, self.source.dtype) + np.float32(self.by)
            out[:] = values.astype("<f2" if self.dtype == "F16" else "<f4").tobytes()


@dataclass(frozen=True, kw_only=True)
class RopeFactors(LazyTensor):
    """By what Llama 3.1's rope divides each frequency: 1 for short waves, `factor` for those longer than the `context` over `low`, and
    between them a mixture. float32, as torch computes it."""

    base: float
    factor: float
    low: float
    high: float
    context: int

    @property
    def uses_torch(self) -> bool:
        return True

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        torch = load_torch()
        width = 2 * self.rows
        frequencies = 1.0 / (self.base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
        made = []
        for frequency in frequencies:
            wave = 2 * pi / frequency
            smooth = (self.context / wave - self.low) / (self.high - self.low)
            between = 1 / ((1 - smooth) / self.factor + smooth)
            made.append(1.0 if wave < self.context / self.high else self.factor if wave > self.context / self.low else float(between))
        out[:] = np.array(made[start:stop], "<f4").tobytes()


def gguf_checkpoint(hub: Checkpoint, *, dtype: str | None, quantize: str | None) -> Checkpoint:
    """`hub`, a checkpoint in the layout llava-hf that is to be written, as GGUF. `dtype` is that of the matrices, by default the one that
    most of them have, and `quantize` that of those of the text model. The mmproj file is F16, or F32 with that `dtype`.

    Raises InputError for what llama.cpp can't run or would compute wrong, by its name; UsageError where `gguf` is needed and missing.
    """
    if quantize and find_spec("gguf") is None:
        raise UsageError("`--quantize` needs the package `gguf`, which is not installed", hint=f"install it: {EXTRA}")
    row = _check_kind(hub.config)
    chosen = dtype or main_dtype(hub.tensors)
    if chosen not in FILE_TYPES:
        raise InputError(f"most tensors are {chosen}, which no GGUF of llama.cpp has", hint="pass `--dtype F32`, F16 or BF16")
    text, notes = _text_tensors(hub, row, chosen, quantize)
    vision = dict(_vision_tensors(hub, chosen))
    label = quantize or chosen
    files = (
        GgufFile("", label, tuple(_text_keys(hub, row, text, label)), tuple(text)),
        GgufFile("mmproj-", "F32" if chosen == "F32" else "F16", tuple(_vision_keys(hub, chosen)), tuple(vision)),
    )
    return replace(
        hub,
        tensors={**text, **vision},
        config={},
        files={name: data for name, data in hub.files.items() if name.startswith(LICENSE_PREFIXES)},
        history=(*hub.history[:-1], _step(hub, notes, quantize)),
        gguf=files,
    )


def _check_kind(config: Config) -> GgufDecoder:
    kind, text, vision = (str(part.get("model_type")) for part in (config, config["text_config"], config["vision_config"]))
    if kind not in GGUF_TARGETS:
        what = f"llama.cpp's graph of LLaVA does not make images as {TARGET_BY_TYPE[kind].architecture} does"
        raise InputError(what, facts={"it can": ", ".join(GGUF_TARGETS)}, hint=USE_HUB)
    if text not in GGUF_DECODERS:
        what = f"a text model of the type {shown(text)} can't be written as GGUF yet"
        raise InputError(
            what, facts={"known": ", ".join(GGUF_DECODERS)}, hint="convert it to llava-hf, and that with llama.cpp's own script"
        )
    if vision not in GGUF_TOWERS:
        what = f"a tower of the type {shown(vision)} in llama.cpp's graph of LLaVA is not proved, so it is not written"
        raise InputError(what, facts={"known": ", ".join(GGUF_TOWERS)}, hint=USE_HUB)
    activation, strategy = config.get("projector_hidden_act"), config.get("vision_feature_select_strategy")
    if activation != PROJECTOR_ACTIVATION:
        what = f"llama.cpp puts a gelu between the layers of every projector, and this one has {shown(str(activation))}"
        raise InputError(what, hint=USE_HUB)
    if strategy != "default":
        what = f"llama.cpp never gives the class token to the projector, and `vision_feature_select_strategy` is {shown(str(strategy))}"
        raise InputError(what, hint=USE_HUB)
    act = config["vision_config"].get("hidden_act")
    if act not in TOWER_ACTIVATIONS:
        what = f"llama.cpp has no tower of this kind with the activation {shown(str(act))}"
        raise InputError(what, facts={"known": ", ".join(TOWER_ACTIVATIONS)}, hint=USE_HUB)
    _check_decoder(GGUF_DECODERS[text], config["text_config"])
    return GGUF_DECODERS[text]


def _check_decoder(row: GgufDecoder, text: Config) -> None:
    """Raises InputError for a config that llama.cpp would compute as another, since no key of its file has that word."""
    for word, values in row.fixed.items():
        if text.get(word) not in values:
            what = f"llama.cpp computes a text model of the type {shown(row.model_type)} only with `{word}` {listed([*map(str, values)])}"
            raise InputError(what, facts={"config.json": f"`{word}` is {shown(str(text.get(word)))}"}, hint=USE_HUB)
    if (scaling := _rope(text)[0]) not in row.scalings:
        what = f"the rope scaling {shown(scaling)} of a text model of the type {shown(row.model_type)} can't be written as GGUF yet"
        raise InputError(what, facts={"known": ", ".join(row.scalings)}, hint=USE_HUB)


# --- back, to be compared ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Dequantised(FromRows):
    """`source`, of any type that `gguf.quants` knows, as float32."""

    def scratch(self, rows: int) -> int:
        return rows * self.source.row_nbytes + self.source.scratch(rows) + COPIES * rows * self.shape[-1]

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        with work.scratch((stop - start) * self.source.row_nbytes) as raw:
            self.source.rows_into(raw, start, stop, work)
            out[:] = dequantize(as_rows(raw, stop - start), GGMLQuantizationType[self.source.dtype]).astype("<f4").tobytes()


def as_llava_hf(checkpoint: Checkpoint) -> Checkpoint:
    """The tensors of GGUF files under the names and in the order of rows that llava-hf has them, quantised ones as float32; itself where it
    is no GGUF. Raises InputError for a damaged file, UsageError where a package is missing that quantised values need."""
    if checkpoint.origin.container != "gguf":
        return checkpoint
    if find_spec("gguf") is None and any(tensor.dtype in BLOCKS for tensor in checkpoint.tensors.values()):
        raise UsageError("quantised values need the package `gguf`, which is not installed", hint=f"install it: {EXTRA}")
    back = {called: name for name, called in (PROJECTOR_TENSORS | {f"tower.{k}": v for k, v in TOWER_TENSORS.items()}).items()}
    tensors: dict[str, LazyTensor] = {}
    for file in checkpoint.origin.files:
        found, keys = index_gguf(Path(file.path))
        arch = keys["general.architecture"].value if "general.architecture" in keys else ""
        row = next((row for row in GGUF_DECODERS.values() if row.arch == arch), None)
        for name, tensor in found.items():
            known = back.get(name) or _layer_back(name, row)
            part = name.rpartition(".")[0].rpartition(".")[2]
            heads = keys.get(f"{arch}.{dict(HEAD_KEYS).get(part, '')}")
            made: LazyTensor = tensor
            if tensor.dtype in BLOCKS:
                made = Dequantised(dtype="F32", shape=tensor.shape, source=tensor)
            if row and row.permuted and heads and type(heads.value) is int and heads.value and tensor.rows % (2 * heads.value) == 0:
                made = PermuteRope(dtype=made.dtype, shape=made.shape, source=made, heads=heads.value)
            if row and row.plus_one and part.endswith("norm"):
                made = Shifted(dtype="F32", shape=made.shape, source=made, by=-1.0)
            tensors[spelled(known, "llava-hf") if known else name] = made
    return replace(checkpoint, tensors=tensors)


def _layer_back(name: str, row: GgufDecoder | None) -> str:
    """The canonical name of a tensor of the text model or of a layer of the tower; empty for one that has none."""
    stem, _, kind = name.rpartition(".")
    if found := re.fullmatch(r"v\.blk\.(\d+)\.(.+)", stem):
        module = next((module for module, called in TOWER_LAYER.items() if called == found[2]), "")
        return f"tower.encoder.layers.{found[1]}.{module}.{kind}" if module else ""
    if found := re.fullmatch(r"blk\.(\d+)\.(.+)", stem):
        module = next((module for module, called in (row.layer if row else {}).items() if called == found[2]), "")
        return f"text.layers.{found[1]}.{module}.{kind}" if module else ""
    module = next((module for module, called in TEXT_NAMES.items() if called == stem), "")
    return f"{module}.{kind}" if module else ""


def left_out_of_gguf(hub: Checkpoint, gguf: Checkpoint) -> set[str]:
    """Names of tensors of `hub` that a GGUF of it does not have: of the tower's layers that nothing reads, and its last norm."""
    there = {int(found[1]) for name in gguf.tensors if (found := TOWER_NUMBER.match(canonical(name)))}
    if not there:
        return set()
    names = {name: canonical(name) for name in hub.tensors}
    numbers = {name: int(found[1]) for name, known in names.items() if (found := TOWER_NUMBER.match(known))}
    return {name for name, number in numbers.items() if number > max(there)} | {
        name for name, known in names.items() if known.startswith("tower.post_layernorm.")
    }


# --- the text model -----------------------------------------------------------------------------------------------------


def _text_tensors(hub: Checkpoint, row: GgufDecoder, dtype: str, quantize: str | None) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """The tensors in the order that the folder's file has, and sentences on those that could not be quantised."""
    text = hub.config["text_config"]
    made: dict[str, LazyTensor] = {}
    if factors := _rope_factors(text):
        made[ROPE_FACTORS] = factors
    left: list[str] = []
    for name, tensor in sorted(hub.tensors.items(), key=lambda item: (-SORT_ORDER.index(item[1].dtype), item[0])):
        known = canonical(name)
        if not known.startswith(("text.", "head.") if row.head else "text."):
            continue
        called, kind = text_name(known, row)
        part = called.split(".")[-2]
        if row.permuted and part in PERMUTED:
            tensor = UnpermuteRope(dtype=tensor.dtype, shape=tensor.shape, source=tensor, heads=text[PERMUTED[part]])
        if row.plus_one and part.endswith("norm"):
            # llama.cpp's converter adds in float16 where the model has that, which rounds, and else in float32
            tensor = Shifted(dtype="F16" if tensor.dtype == "F16" else "F32", shape=tensor.shape, source=tensor, by=1.0)
        wanted = "F32" if len(tensor.shape) < 2 or part.endswith("_norm") or kind != "weight" else quantize or dtype
        if wanted == "Q4_0" and called in TABLES:
            wanted = TABLES_OF_Q4
        if wanted in BLOCKS and tensor.shape[-1] % BLOCKS[wanted][0]:
            left.append(called)
            wanted = "F16"
        made[called] = _as(tensor, wanted)
    notes = [f"{listed(left)}: F16, since rows are no whole blocks of {BLOCKS['Q8_0'][0]} values"] if left else []
    if any(isinstance(tensor, Cast) and isinstance(tensor.source, Shifted) for tensor in made.values()):
        notes.append("norms hold one more than the model's, rounded to float16 as llama.cpp's converter does it")
    return made, tuple(notes)


def _as(tensor: LazyTensor, dtype: str) -> LazyTensor:
    return Quantised(dtype=dtype, shape=tensor.shape, source=tensor) if dtype in BLOCKS else cast(tensor, dtype)


def text_name(name: str, row: GgufDecoder) -> tuple[str, str]:
    """What llama.cpp calls a tensor of the decoder, and the last part of that name. Raises InputError for one that it has no name for."""
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"text\.layers\.(\d+)\.(.+)", stem)
    called = row.layer.get(layer[2]) if layer else TEXT_NAMES.get(stem)
    if called is None:
        raise InputError(f"llama.cpp has no name for {shown(name)}", facts={"decoder": row.model_type}, hint=USE_HUB)
    return f"blk.{layer[1]}.{called}.{kind}" if layer else f"{called}.{kind}", kind


def _rope(text: Config) -> tuple[str, Config]:
    """The kind of rope scaling and its values."""
    found = text.get("rope_scaling") or {}
    return str(found.get("rope_type", found.get("type", "default"))), found


def _rope_factors(text: Config) -> RopeFactors | None:
    kind, found = _rope(text)
    if kind != "llama3":
        return None
    usual = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factor, low, high, context = ({**usual, **found}[key] for key in usual)
    base = float(text.get("rope_theta", 10000.0))
    return RopeFactors(dtype="F32", shape=(_head_width(text) // 2,), base=base, factor=factor, low=low, high=high, context=context)


def _head_width(text: Config) -> int:
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def _text_keys(hub: Checkpoint, row: GgufDecoder, tensors: Mapping[str, LazyTensor], label: str) -> Iterator[GgufKey]:
    text, arch = hub.config["text_config"], row.arch
    yield GgufKey("general.architecture", "text", arch)
    yield GgufKey("general.type", "text", "model")
    sampling = small_object(hub.files, "generation_config.json")
    for name, kind, word in SAMPLING_KEYS:
        if isinstance(value := sampling.get(word), int | float) and not isinstance(value, bool):
            yield GgufKey(name, kind, int(value) if kind == "i32" else float(value))
    yield GgufKey("general.name", "text", "")
    yield GgufKey("general.size_label", "text", size_label(sum(tensor.numel for tensor in tensors.values())))
    if named := licence(hub.history):  # this and the tags as the converter reads them in the card of an output
        yield GgufKey("general.license", "text", named)
    yield GgufKey("general.tags", "text", (*CARD_TAGS, IMAGE_TASK))
    widths = {"head width": _head_width(text), "rotary width": _rotary_width(text)}
    for name in row.keys:
        if name == "rope.scaling":
            yield from _rope_keys(text, arch)
        elif name == "file_type":
            yield GgufKey("general.file_type", "u32", FILE_TYPES[label])
        elif name not in HEAD_WIDTHS or row.key_length or text.get("head_dim") is not None:
            kind, word = TEXT_KEYS[name]
            value = widths.get(word) or text.get(word) or 0
            yield GgufKey(f"{arch}.{name}", kind, float(value) if kind == "f32" else value)
    yield GgufKey("general.quantization_version", "u32", QUANTISATION_VERSION)
    yield from tokenizer_keys(hub.files, hub.config, text["vocab_size"], row)


def _rotary_width(text: Config) -> int:
    """How much of a head the rope turns."""
    return int(float(text.get("partial_rotary_factor") or 1.0) * _head_width(text))


def _rope_keys(text: Config, arch: str) -> Iterator[GgufKey]:
    scaling, found = _rope(text)
    for number, (name, kind, words) in enumerate(ROPE_KEYS[scaling] or ()):
        if not number:
            yield GgufKey(f"{arch}.rope.scaling.type", "text", scaling)
        value = next((found[word] for word in words if found.get(word) is not None), None)
        if value is None and number == 0:
            raise InputError(
                f"the rope scaling {shown(scaling)} has no `{words[0]}`", hint="give the config.json that belongs to the model"
            )
        if value is None and name == "original_context_length":
            value = text["max_position_embeddings"]
        if value is not None:
            yield GgufKey(f"{arch}.rope.scaling.{name}", kind, value)


def size_label(parameters: int) -> str:
    """The number of parameters as llama.cpp shortens it: two digits at least, "6.7B" or "86K"."""
    scale, letter = next(((10**power, name) for power, name in ((12, "T"), (9, "B"), (6, "M")) if parameters > 10**power), (10**3, "K"))
    scaled = parameters / scale
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{digits}f}{letter}"


# --- tower and projector ------------------------------------------------------------------------------------------------


def _feature_layers(config: Config) -> list[int]:
    """The hidden states that go to the projector, counted from the input of the first layer."""
    count, layers = config["vision_config"]["num_hidden_layers"], config["vision_feature_layer"]
    return [layer if layer >= 0 else count + layer + 1 for layer in (layers if isinstance(layers, list) else [layers])]


def _vision_tensors(hub: Checkpoint, dtype: str) -> Iterator[tuple[str, LazyTensor]]:
    """Projector, then tower up to the last layer that is read. Convolution and projector are always F16, vectors F32."""
    tensors = {canonical(name): tensor for name, tensor in hub.tensors.items()}
    for name, called in PROJECTOR_TENSORS.items():
        if name in tensors:
            yield called, cast(tensors[name], "F16" if len(tensors[name].shape) == 2 else "F32")
    matrices = "F32" if dtype == "F32" else "F16"
    for name, called in TOWER_TENSORS.items():
        tensor = tensors[f"tower.{name}"]
        half = "F16" if len(tensor.shape) == 4 else matrices if len(tensor.shape) == 2 else "F32"
        yield called, cast(tensor, half)
    for number in range(max(_feature_layers(hub.config))):
        for name, called in TOWER_LAYER.items():
            for kind in ("weight", "bias"):
                tensor = tensors[f"tower.encoder.layers.{number}.{name}.{kind}"]
                yield f"v.blk.{number}.{called}.{kind}", cast(tensor, matrices if len(tensor.shape) == 2 else "F32")


def _vision_keys(hub: Checkpoint, dtype: str) -> Iterator[GgufKey]:
    config, vision = hub.config, hub.config["vision_config"]
    yield GgufKey("general.architecture", "text", "clip")
    for part, there in (("text_encoder", False), ("vision_encoder", True), ("llava_projector", True)):
        yield GgufKey(f"clip.has_{part}", "bool", there)
    yield GgufKey("general.file_type", "u32", FILE_TYPES["F32" if dtype == "F32" else "F16"])
    yield GgufKey("general.name", "text", "")
    yield GgufKey("general.description", "text", "image encoder for LLaVA")
    yield GgufKey("clip.projector_type", "text", "mlp")
    for name, kind, word in TOWER_KEYS:
        yield GgufKey(f"clip.vision.{name}", kind, vision[word])
    layers = _feature_layers(config)
    yield GgufKey("clip.vision.block_count", "u32", max(layers))
    if TARGET_BY_TYPE[config["model_type"]].tiles:
        widths_first = tuple(length for height, width in config["image_grid_pinpoints"] for length in (width, height))
        yield GgufKey("clip.vision.image_grid_pinpoints", "i32", widths_first)
        texts = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "mlp2x_gelu"}
        for name in ("image_crop_resolution", "image_aspect_ratio", "image_split_resolution", "mm_patch_merge_type", "mm_projector_type"):
            if name in texts:
                yield GgufKey(f"clip.vision.{name}", "text", texts[name])
            elif type(config.get(name)) is int:
                yield GgufKey(f"clip.vision.{name}", "u32", config[name])
    yield GgufKey("clip.vision.feature_layer", "i32", tuple(layers))
    pixels = small_object(hub.files, "preprocessor_config.json")
    for name in ("image_mean", "image_std"):
        yield GgufKey(f"clip.vision.{name}", "f32", tuple(map(float, pixels[name])))
    yield GgufKey("clip.use_gelu", "bool", TOWER_ACTIVATIONS[vision["hidden_act"]])


def _step(hub: Checkpoint, notes: tuple[str, ...], quantize: str | None) -> Any:
    """The step of the conversion to llava-hf as that of the conversion to GGUF."""
    step, config = hub.history[-1], hub.config
    scaling = _rope(config["text_config"])[0]
    ignored = (f"llama.cpp has no rope scaling of the kind {shown(scaling)}: it is left out",) if ROPE_KEYS[scaling] is None else ()
    text = config["text_config"]
    window = text.get("sliding_window") if text.get("use_sliding_window") is not False else None
    if type(window) is int and window < text["max_position_embeddings"]:
        notes = (*notes, f"llama.cpp computes this text model without its sliding window: differently beyond {window:,} tokens")
    options = {**step.options, "to": "gguf", **({"quantize": quantize} if quantize else {})}
    tables = f"{' and '.join(TABLES)} are {TABLES_OF_Q4}, where `llama-quantize` would take a K-quant" if quantize == "Q4_0" else ""
    return replace(
        step,
        options=options,
        summary={**step.summary, "convert": str(step.summary["convert"]).replace("to llava-hf", "to gguf")},
        notes=(*step.notes, *notes, *filter(None, (tables,)), f"llama.cpp today: {GGUF_TARGETS[config['model_type']]}"),
        warnings=(*step.warnings, *ignored),
        checks={**step.checks, "gguf": config["model_type"]},
    )
