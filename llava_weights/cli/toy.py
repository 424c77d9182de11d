"""Toy weights in the published layouts, for the demo: random, seeded, the same bytes on every run.

Written byte by byte with numpy alone: Meta's LLaMA cut in two, its tokenizer, a LLaVA v0 delta with the faults that the
published ones have, a Vicuna (the wrong base whose shapes fit), a LoRA, a CLIP; and a LLaVA of any family, from its row alone.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

import numpy as np

from ..checkpoint.hf_tokenizer import END_OF_TEXT
from ..checkpoint.sentencepiece import CONTROL, NORMAL, UNKNOWN
from ..checkpoint.tokenizer_json import BYTE_LETTERS
from ..checkpoint.tower import tower_shapes
from ..checks.rules_tokenizer import BYTE
from ..families.decoders import DECODER_BY_TYPE as DECODERS
from ..families.layouts import meta_names, spelled
from ..families.originals import Original
from ..families.projectors import LINEAR_NAMES, PROJECTOR_NAMES
from ..families.projectors import NORM as LAYERNORM
from ..families.targets import TARGET_BY_TYPE as TARGETS
from ..families.targets import Target
from ..families.towers import TOWER_BY_KIND as TOWERS
from ..storage.strict_json import json_bytes

SIZE, FILES = "13B", 2  # Meta's name and number of model-parallel files; only the layout is that of 13B
LAYERS, HEADS = 4, 4
TOWER_WIDTH, PIXELS, PATCH = 32, 56, 14  # width of the toy CLIP; 16 patches an image
SIZES = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
    "head_dim": 64 // HEADS, "vocab_size": 320,
}  # fmt: skip
TEXT_WIDTH, ROWS = SIZES["hidden_size"], SIZES["vocab_size"]
LLAMA = DECODERS["llama"]
ADDED_TOKENS = ("<im_patch>", "<im_start>", "<im_end>", "[PAD]")  # the last has no row, as in LLaVA-13b-delta-v0
RANK = 8
WEIGHT, NORM_VALUES, MOVED = 0.02, (0.5, 0.1), 3e-4  # orders of magnitude of LLaMA's values, and of what a fine-tune changes

# The first merges of LLaMA's own vocabulary, then single characters, as there. "_" is a blank.
TOY_MERGES = "__ _t er in _a en on _th es _s _d at or an _c is re it _the ar le _w _p ou al _f _m ed _o _b _in ing"
CHARACTERS = "_etaoinshrdlcumwfgypbvkxqjz.,"

Arrays = dict[str, np.ndarray]


def make_toys(folder: Path) -> None:
    """`llama` (Meta's layout), `delta` (LLaVA v0), `vicuna` (transformers'), `lora` and `clip` in `folder`: the same bytes every time."""
    rng = np.random.default_rng(13)
    llama = {name: _values(rng, shape) for name, shape in LLAMA.shapes(SIZES).items()}
    vicuna = {name: _moved(rng, values) for name, values in llama.items()}
    llava = {name: _moved(rng, values) for name, values in vicuna.items()}
    _write_llama(folder / "llama", llama)
    _write_delta(folder / "delta", {name: _grown(rng, name, llava[name] - values) for name, values in llama.items()}, rng)
    _write_files(folder / "vicuna", {"config.json": json_bytes(_config()), "tokenizer.model": tokenizer_model()})
    write_torch_zip(folder / "vicuna" / "pytorch_model.bin", vicuna)
    _write_lora(folder / "lora", rng)
    _write_clip(folder / "clip", rng)


def _values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    draw = rng.standard_normal(shape)
    return (WEIGHT * draw if len(shape) > 1 else NORM_VALUES[0] + NORM_VALUES[1] * draw).astype(np.float16)


def _moved(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    return (values + MOVED * rng.standard_normal(values.shape)).astype(np.float16)


def _grown(rng: np.random.Generator, name: str, difference: np.ndarray) -> np.ndarray:
    """With the rows of the added tokens, which a delta holds whole; LLaVA-13b-delta-v0 has none for `[PAD]`."""
    if name not in ("model.embed_tokens.weight", "lm_head.weight"):
        return difference
    rows = WEIGHT * rng.standard_normal((len(ADDED_TOKENS) - 1, difference.shape[1]))
    return np.concatenate([difference, rows.astype(np.float16)])


def _write_llama(folder: Path, tensors: Arrays) -> None:
    """Meta's layout: pieces cut along each tensor's axis, q and k rows as rotary pairs, and the md5 lists that Meta ships."""
    pieces: list[Arrays] = [{} for _ in range(FILES)]
    for rule in meta_names(LAYERS):
        values = tensors[rule.name]
        if rule.heads:  # from halves of each head to pairs, the inverse of transformers' converter
            rows, columns = values.shape
            values = values.reshape(HEADS, 2, rows // HEADS // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        cut = np.split(values, FILES, rule.cut) if rule.cut is not None else [values] * FILES
        for piece, part in zip(pieces, cut, strict=True):
            piece[rule.meta] = np.ascontiguousarray(part)
    size = folder / SIZE
    params = {"dim": TEXT_WIDTH, "multiple_of": 256, "n_heads": HEADS, "n_layers": LAYERS, "norm_eps": 1e-06, "vocab_size": -1}
    _write_files(size, {"params.json": json.dumps(params).encode()})
    head = TEXT_WIDTH // HEADS
    for number, piece in enumerate(pieces):
        piece["rope.freqs"] = (10000.0 ** (-np.arange(0, head, 2) / head)).astype(np.float16)
        write_torch_zip(size / f"consolidated.{number:02}.pth", piece)
    _write_files(folder, {"tokenizer.model": tokenizer_model()})
    (folder / "tokenizer_checklist.chk").write_text(_md5_list([folder / "tokenizer.model"]))
    (size / "checklist.chk").write_text(_md5_list([*sorted(size.glob("*.pth")), size / "params.json"]))


def _md5_list(paths: Iterable[Path]) -> str:
    return "".join(f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.name}\n" for path in paths)


def _write_delta(folder: Path, tensors: Arrays, rng: np.random.Generator) -> None:
    """Two shards with their index, a linear projector, rotary buffers of zeros, and the small files of April 2023 with their faults."""
    head = TEXT_WIDTH // HEADS
    tensors |= {f"model.layers.{number}.self_attn.rotary_emb.inv_freq": np.zeros(head // 2, np.float32) for number in range(LAYERS)}
    tensors["model.mm_projector.weight"] = (WEIGHT * rng.standard_normal((TEXT_WIDTH, TOWER_WIDTH))).astype(np.float16)
    tensors["model.mm_projector.bias"] = (WEIGHT * rng.standard_normal(TEXT_WIDTH)).astype(np.float16)
    first = {f"model.layers.{number}." for number in range(LAYERS // 2)} | {"model.embed_tokens."}
    placed = {name: f"pytorch_model-0000{1 if name.startswith(tuple(first)) else 2}-of-00002.bin" for name in tensors}
    index = {"metadata": {"total_size": sum(values.nbytes for values in tensors.values())}, "weight_map": placed}
    _write_files(folder, {"pytorch_model.bin.index.json": json_bytes(index), "tokenizer.model": tokenizer_model(), **_era_files()})
    for shard in sorted(set(placed.values())):
        write_torch_zip(folder / shard, {name: values for name, values in tensors.items() if placed[name] == shard})


def _write_lora(folder: Path, rng: np.random.Generator) -> None:
    """A PEFT adapter of rank RANK on every query and value projection."""
    factors: Arrays = {}
    for name, shape in LLAMA.shapes(SIZES).items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            module = "base_model.model." + name.removesuffix(".weight")
            width, columns = shape
            factors[f"{module}.lora_A.weight"] = (WEIGHT * rng.standard_normal((RANK, columns))).astype(np.float16)
            factors[f"{module}.lora_B.weight"] = (WEIGHT * rng.standard_normal((width, RANK))).astype(np.float16)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj", "v_proj"]}
    _write_files(folder, {"adapter_config.json": json_bytes({**config, "base_model_name_or_path": "llava"})})
    write_torch_zip(folder / "adapter_model.bin", factors)


def _write_clip(folder: Path, rng: np.random.Generator) -> None:
    """The vision half of a CLIP repository, float32, and how it wants its images."""
    vision = {
        "hidden_size": TOWER_WIDTH, "image_size": PIXELS, "intermediate_size": 4 * TOWER_WIDTH, "model_type": "clip_vision_model",
        "num_attention_heads": HEADS, "num_hidden_layers": 3, "patch_size": PATCH, "projection_dim": TOWER_WIDTH,
    }  # fmt: skip
    shapes = tower_shapes(vision)
    tensors = {f"vision_model.{name}": (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    settings = {"crop_size": PIXELS, "do_center_crop": True, "do_normalize": True, "do_resize": True, "size": PIXELS}
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": TOWER_WIDTH, "vision_config": vision}
    _write_files(folder, {"config.json": json_bytes(config), "preprocessor_config.json": json_bytes(settings)})
    write_torch_zip(folder / "pytorch_model.bin", tensors)


# --- a LLaVA of any family ------------------------------------------------------------------------------------------


TEXT_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TOWER_SIZES = {
    "hidden_size": 32,
    "image_size": 28,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "patch_size": 14,
}
GRIDS = [[28, 56], [56, 28], [56, 56]]  # of tiles, (width, height) in pixels


def make_llava(folder: Path, family: Original, *, decoder: str = "", tower: str = "") -> None:
    """`llava` in the original layout, its vision tower inside, and `tower`, that tower's own repository, in `folder`: the same bytes every
    time, with all that the row `family` asks for. `decoder` and `tower` are the first that it names unless given."""
    rng = np.random.default_rng(13)
    text, eye = DECODERS[decoder or family.decoders[0]], TOWERS[tower or family.towers[0]]
    files, rows = _sentencepiece(family.token) if text.tokenizer == "sentencepiece" else _byte_level(family.token)
    target = TARGETS[family.target]
    depth = max(TOWER_SIZES["num_hidden_layers"], *map(abs, target.layers or (0,)))
    vision, tiles = {**eye.defaults, **TOWER_SIZES, "model_type": eye.model_type, "num_hidden_layers": depth}, target.tiles
    inside = {**vision, "num_hidden_layers": depth - bool(eye.select)}  # as LLaVA-NeXT's code stores a SigLIP
    width = TOWER_SIZES["hidden_size"] * max(1, len(target.layers))
    heads = {"head_dim": TEXT_SIZES["hidden_size"] // TEXT_SIZES["num_attention_heads"]}
    config = {
        **{key: value for key, value in text.defaults.items() if value is not None or key == "rope_scaling"}, **TEXT_SIZES,
        **{key: size for key, size in heads.items() if key in text.defaults},
        **{key: 0 for key in ("eos_token_id", "pad_token_id") if (text.defaults[key] or 0) >= rows},
        "architectures": [text.original_architectures[0]], "model_type": text.original_types[0], "torch_dtype": "float16",
        "vocab_size": rows, "freeze_mm_mlp_adapter": False, "mm_hidden_size": width, "mm_projector_type": family.projector,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
        target.tower_key: "tower", "tune_mm_mlp_adapter": False, "unfreeze_mm_vision_tower": True, "use_mm_proj": True,
        **({"image_grid_pinpoints": GRIDS} if tiles else {}), **dict.fromkeys(family.has, 2048),
        **{key: values[0] for key, values in family.says.items()},
    }  # fmt: skip
    shapes = {**text.shapes({**config, **heads}), **_projector_shapes(family.projector, width, target)}
    shapes |= {spelled("newline", "llava"): (TEXT_SIZES["hidden_size"],)} if tiles else {}
    towers = {name: 5 * _values(rng, shape) for name, shape in tower_shapes(vision).items()}
    kept = tower_shapes(inside)
    tensors = {name: _values(rng, shape) for name, shape in shapes.items()}
    tensors |= {spelled(f"tower.{name}", target.spelling): values for name, values in towers.items() if name in kept}
    tensors |= _for_videos(rng, vision) if target.two_towers else {}
    _write_files(folder / "llava", {"config.json": json_bytes(dict(sorted(config.items()))), **files})
    write_torch_zip(folder / "llava" / "pytorch_model.bin", tensors)
    kind = eye.repository_types[0]
    pixels = {"image_mean": list(eye.pixels[0].mean), "image_std": list(eye.pixels[0].std), "size": TOWER_SIZES["image_size"]}
    settings = {"config.json": json_bytes({"model_type": kind, "vision_config": vision}), "preprocessor_config.json": json_bytes(pixels)}
    _write_files(folder / "tower", settings)
    write_torch_zip(folder / "tower" / "pytorch_model.bin", {f"vision_model.{name}": values for name, values in towers.items()})


def _for_videos(rng: np.random.Generator, vision: Mapping[str, Any]) -> Arrays:
    """A tower for videos, whose layers have attention over frames too, as LanguageBind's have."""
    width, found = vision["hidden_size"], {f"video_tower.{name}": shape for name, shape in tower_shapes(vision).items()}
    for number in range(vision["num_hidden_layers"]):
        layer = f"video_tower.encoder.layers.{number}.temporal_"
        found[f"{layer}embedding"] = (1, 8, width)
        found |= {f"{layer}layer_norm1.{part}": (width,) for part in ("weight", "bias")}
        found |= {f"{layer}attn.{name}.weight": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        found |= {f"{layer}attn.{name}.bias": (width,) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    return {spelled(name, "two-towers"): 5 * _values(rng, shape) for name, shape in found.items()}


def _projector_shapes(kind: str, narrow: int, target: Target) -> dict[str, tuple[int, ...]]:
    wide = TEXT_SIZES["hidden_size"]
    found = [(wide, narrow), (wide,)] if kind == "linear" else [(wide, narrow), (wide,), (wide, wide), (wide,)]
    names = LINEAR_NAMES if kind == "linear" else PROJECTOR_NAMES
    norm: dict[str, tuple[int, ...]] = dict.fromkeys(LAYERNORM, (narrow,)) if target.layernorm else {}
    return {spelled(name, target.spelling): shape for name, shape in {**norm, **dict(zip(names, found, strict=True))}.items()}


def _sentencepiece(token: str) -> tuple[dict[str, bytes], int]:
    """A tokenizer with `token` behind its pieces, and its number of rows."""
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "pad_token": "<unk>"}
    files = {"tokenizer.model": tokenizer_model(), "tokenizer_config.json": json_bytes(settings)}
    return files | ({"added_tokens.json": json_bytes({token: ROWS})} if token else {}), ROWS + bool(token)


def _byte_level(token: str) -> tuple[dict[str, bytes], int]:
    """Qwen2's tokenizer of single bytes without merges, with `token` among its added tokens, and its number of rows."""
    added = {str(256 + number): {"content": text, "special": True} for number, text in enumerate((END_OF_TEXT, *filter(None, (token,))))}
    settings = {
        "added_tokens_decoder": added, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "tokenizer_class": "Qwen2Tokenizer",
    }  # fmt: skip
    vocabulary = {BYTE_LETTERS[byte]: byte for byte in range(256)}
    files = {"vocab.json": json_bytes(vocabulary), "merges.txt": b"#version: 0.2\n", "tokenizer_config.json": json_bytes(settings)}
    return files, 256 + len(added)


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": TEXT_WIDTH,
        "initializer_range": 0.02, "intermediate_size": SIZES["intermediate_size"], "max_position_embeddings": 2048, "model_type": "llama",
        "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.28.1", "use_cache": True, "vocab_size": ROWS,
    }  # fmt: skip


def _era_files() -> dict[str, bytes]:
    """The small files of LLaVA-13b-delta-v0: wrong ids, empty token names, a `[PAD]` without a row."""
    rows = ROWS + len(ADDED_TOKENS) - 1
    config = _config() | {
        "_name_or_path": "./checkpoints/LLaVA-13B-v0", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1,
        "max_sequence_length": 2048, "mm_hidden_size": TOWER_WIDTH, "mm_use_im_start_end": True, "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14", "transformers_version": "4.28.0.dev0", "tune_mm_mlp_adapter": False,
        "use_mm_proj": True, "vocab_size": rows,
    }  # fmt: skip
    del config["max_position_embeddings"]
    ids = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "transformers_version": "4.28.0.dev0"}
    tokenizer = {"bos_token": "", "eos_token": "", "model_max_length": 2048, "tokenizer_class": "LLaMATokenizer", "unk_token": ""}
    files: dict[str, Mapping[str, object]] = {
        "config.json": config,
        "generation_config.json": ids,
        "tokenizer_config.json": tokenizer,
        "special_tokens_map.json": {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "<unk>"},
        "added_tokens.json": {token: ROWS + number for number, token in enumerate(ADDED_TOKENS)},
    }
    return {name: json_bytes(dict(sorted(content.items()))) for name, content in files.items()}


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


# --- the two file formats that Python can't write by itself ---------------------------------------------------------


def write_torch_zip(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """What `torch.save` writes of a dict of fp16 and fp32 tensors: a zip with a pickle of protocol 2 and one member a tensor."""
    items = b"".join(_text(name) + _tensor(str(number), values) for number, (name, values) in enumerate(tensors.items()))
    members = {"data.pkl": b"\x80\x02}(" + items + b"u."}
    members |= {f"data/{number}": values.tobytes() for number, values in enumerate(tensors.values())} | {"version": b"3\n"}
    with ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(ZipInfo(f"{path.stem}/{name}"), data)  # stored; ZipInfo dates it 1980, so the bytes do not change


def _tensor(key: str, values: np.ndarray) -> bytes:
    """`_rebuild_tensor_v2((the storage), offset, shape, strides, requires_grad, hooks)` in opcodes."""
    kind = {"float16": b"HalfStorage", "float32": b"FloatStorage"}[values.dtype.name]
    storage = b"(" + _text("storage") + b"ctorch\n" + kind + b"\n" + _text(key) + _text("cpu") + _number(values.size) + b"tQ"
    strides = (stride // values.itemsize for stride in values.strides)
    layout = _number(0) + _numbers(values.shape) + _numbers(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + layout + b"\x89ccollections\nOrderedDict\n)RtR"


def _numbers(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def _number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode("ascii")


def tokenizer_model() -> bytes:
    """A SentencePiece model as LLaMA's: BPE with byte fallback, a ModelProto of pieces, trainer_spec and normalizer_spec."""
    special = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *((f"<0x{byte:02X}>", BYTE) for byte in range(256))]
    ordinary = [text.replace("_", "\u2581") for text in [*TOY_MERGES.split(), *CHARACTERS]]
    pieces = [_field(1, text.encode()) + _field(2, 0.0) + _field(3, kind) for text, kind in special]
    pieces += [_field(1, text.encode()) + _field(2, float(-rank)) + _field(3, NORMAL) for rank, text in enumerate(ordinary)]
    # model_type BPE, vocab_size, byte_fallback, ids of unk, bos, eos, pad
    trainer: dict[int, int | bytes] = {3: 2, 4: len(pieces), 35: 1, 40: 0, 41: 1, 42: 2, 43: -1}
    normalizer: dict[int, int | bytes] = {1: b"identity", 3: 1, 4: 0}  # add a blank in front, keep repeated blanks
    specs = [b"".join(_field(number, value) for number, value in spec.items()) for spec in (trainer, normalizer)]
    return b"".join(_field(1, piece) for piece in pieces) + _field(2, specs[0]) + _field(3, specs[1])


def _field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3 | 5) + struct.pack("<f", value) if isinstance(value, float) else _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers as protobuf writes them
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
