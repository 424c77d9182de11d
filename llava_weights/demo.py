"""The first thing to try: toy weights in the published layouts, and the real commands run on them, each shown before its output.

The toys are random, seeded and the same on every run. They are written here byte by byte with numpy alone: Meta's LLaMA cut in
two, its tokenizer, a LLaVA v0 delta with the faults that the published ones have, and a Vicuna, the wrong base that fits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import numpy as np

from .console import Console
from .errors import Interrupted, LlavaWeightsError, OutputError, Terminated
from .formats.meta import AFTER, BEFORE, LAYER, Rule
from .formats.strict_json import json_bytes
from .job import partial_folder
from .stream import output_error

MARKER = ".llava-weights-demo"
MARK = b"Made by `llava-weights demo`, which deletes and makes again the folders beside this file that it made.\n"
MADE = ("llama", "delta", "vicuna", "llava", "wrong", "small", "again")

SIZE, PIECES = "13B", 2  # Meta's name and number of model-parallel files; only the layout is that of 13B
LAYERS, HEADS, IMAGE = 4, 4, 1024  # IMAGE: width of CLIP ViT-L/14
LENGTHS = {"vocabulary": 320, "dim": 64, "kv_dim": 64, "intermediate": 256}
ADDED = ("<im_patch>", "<im_start>", "<im_end>", "[PAD]")  # the last has no row, as in LLaVA-13b-delta-v0
WEIGHT, NORM, MOVED = 0.02, (0.5, 0.1), 3e-4  # orders of magnitude of LLaMA's values, and of what a fine-tune changes

# The first merges of LLaMA's own vocabulary, then single characters, as there. "_" is a blank.
MERGES = "__ _t er in _a en on _th es _s _d at or an _c is re it _the ar le _w _p ou al _f _m ed _o _b _in ing"
CHARACTERS = "_etaoinshrdlcumwfgypbvkxqjz.,"
ORDINARY, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # sentencepiece_model.proto, ModelProto.SentencePiece.Type

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Scene:
    """One command: why it is run, its arguments, the exit code it should end with. Run inside `inside` if that is given."""

    title: str
    command: tuple[str, ...]
    code: int = 0
    inside: Path | None = None

    @property
    def line(self) -> str:
        """What a user would type."""
        typed = shlex.join(self.command)
        return f"$ {typed}" if self.inside is None else f"$ (cd {shlex.quote(str(self.inside))} && {typed})"


def run(folder: Path, console: Console) -> int:
    """Make the toys in `folder`, play every scene, and return 0 or the exit code of the first command that did not end as it should.

    Raises OutputError for a folder that holds anything but an earlier demo, or can't be written.
    """
    _clear(folder)
    try:
        return _perform(folder, console)
    except LlavaWeightsError as error:
        error.kept = f"What was made is in `{folder}`"
        raise


def _perform(folder: Path, console: Console) -> int:
    try:
        make_toys(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        _tell(console, f"Made a toy LLaMA and a LLaVA delta in {folder}: {size / 1e6:.1f} MB of random values, in the published layouts.")
        for scene in _scenes(folder):
            if code := _play(scene, console):
                return code
    except OSError as error:
        raise output_error(error, folder) from error
    except KeyboardInterrupt as error:
        raise Interrupted("stopped", exit_code=143 if isinstance(error, Terminated) else 130) from error
    _tell(console, "\n" + "\n".join(_closing(folder)))
    console.summary((), {}, str(folder))
    return 0


def _scenes(folder: Path) -> Iterator[Scene]:
    llama, delta, vicuna, llava, wrong, small, again = (str(folder / name) for name in MADE)
    inspect, apply, make = (("llava-weights", verb) for verb in ("inspect", "apply-delta", "make-delta"))
    yield Scene("What is this? LLaMA, as Meta ships it.", (*inspect, llama))
    yield Scene("And this? It looks like a model, but is only a difference.", (*inspect, delta))
    added = "Add the two. What was wrong in the small files is repaired and listed."
    yield Scene(added, (*apply, "--base", llama, "--delta", delta, "-o", llava))
    if shutil.which("sha256sum"):
        yield Scene("Is on disk what was computed? Any machine can check it.", ("sha256sum", "-c", "SHA256SUMS"), inside=Path(llava))
    yield Scene("What is it now?", (*inspect, llava))
    mistaken = "A mistake often made: Vicuna as the base. Its names and shapes fit, its values do not. Nothing is written."
    yield Scene(mistaken, (*apply, "--base", vicuna, "--delta", delta, "-o", wrong), code=3)
    published = "For publishers: a delta that loses nothing, and is smaller."
    yield Scene(published, (*make, "--base", llama, "--tuned", llava, "--codec", "integer", "-o", small))
    yield Scene("Back to the model, quietly this time.", (*apply, "--base", llama, "--delta", small, "-o", again, "-q"))
    if shutil.which("cmp"):
        yield Scene(
            "Is it the same? Then `cmp` says nothing.", ("cmp", *(os.path.join(made, "model.safetensors") for made in (llava, again)))
        )


def _closing(folder: Path) -> tuple[str, ...]:
    return (
        "Done: LLaMA + delta = LLaVA, checked to the last byte, and a wrong base was refused before a byte was written.",
        f"The model is in {folder / 'llava'}: its README.md and llava-weights.manifest.json say how it was made.",
        "With real weights: llava-weights apply-delta --base LLAMA-13B --delta liuhaotian/LLaVA-13b-delta-v0 -o LLaVA-13B-v0",
    )


def _play(scene: Scene, console: Console) -> int:
    """Show and run one command, its two streams as one so that they stay in order. Returns 0 where it ended as it should."""
    _tell(console, f"\n{scene.title}\n{scene.line}")
    sink = subprocess.PIPE if console.quiet else None if sys.stdout else subprocess.DEVNULL
    program, *arguments = scene.command
    command = [sys.executable, "-m", __package__, *arguments] if program == "llava-weights" else [program, *arguments]
    done = subprocess.run(command, cwd=scene.inside, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
    if done.returncode == scene.code:
        return 0
    if done.stdout:
        console.document(f"{scene.line}\n{done.stdout.decode(errors='replace')}", {})
    console.document(f"\nThe demo ends here: exit code {done.returncode}, expected {scene.code}", {})
    return 128 - done.returncode if done.returncode < 0 else done.returncode or 1  # below 0: killed by that signal


def _tell(console: Console, text: str) -> None:
    if not console.quiet:
        console.document(text, {})


def _clear(folder: Path) -> None:
    """An empty folder but for the marker. Deletes what an earlier demo made, and nothing else. Raises OutputError where there is more."""
    marker = folder / MARKER
    earlier = marker.is_file() and marker.read_bytes() == MARK and not any(path.is_symlink() for path in _made(folder))
    if os.path.lexists(folder) and not earlier and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(
            f"`{folder.name}` exists and is not an earlier demo",
            facts={"folder": folder.absolute()},
            hint="give a folder that does not exist yet: `llava-weights demo DIR`",
        )
    try:
        for path in _made(folder):
            if path.exists():
                shutil.rmtree(path)
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_bytes(MARK)
    except OSError as error:
        raise output_error(error, folder) from error


def _made(folder: Path) -> list[Path]:
    """What a demo may have left, finished or not."""
    return [path for name in MADE for path in (folder / name, partial_folder(folder / name))]


# --- the toys -------------------------------------------------------------------------------------------------------


def make_toys(folder: Path) -> None:
    """`llama` (Meta's layout), `delta` (LLaVA v0) and `vicuna` (transformers' layout) in `folder`: the same bytes every time."""
    rng = np.random.default_rng(13)
    llama = {rule.hugging_face: _values(rng, rule) for rule in _rules()}
    vicuna = {name: _moved(rng, values) for name, values in llama.items()}
    llava = {name: _moved(rng, values) for name, values in vicuna.items()}
    _write_llama(folder / "llama", llama)
    _write_delta(folder / "delta", {name: _grown(rng, name, llava[name] - values) for name, values in llama.items()}, rng)
    _write_files(folder / "vicuna", {"config.json": json_bytes(_config()), "tokenizer.model": tokenizer_model()})
    write_torch_zip(folder / "vicuna" / "pytorch_model.bin", vicuna)


def _rules() -> Iterator[Rule]:
    """Every tensor with its name in both layouts."""
    yield from BEFORE
    for number in range(LAYERS):
        for rule in LAYER:
            yield replace(rule, meta=f"layers.{number}.{rule.meta}", hugging_face=f"model.layers.{number}.{rule.hugging_face}")
    yield from AFTER


def _values(rng: np.random.Generator, rule: Rule) -> np.ndarray:
    draw = rng.standard_normal([LENGTHS[length] for length in rule.shape])
    return (WEIGHT * draw if len(rule.shape) > 1 else NORM[0] + NORM[1] * draw).astype(np.float16)


def _moved(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    return (values + MOVED * rng.standard_normal(values.shape)).astype(np.float16)


def _grown(rng: np.random.Generator, name: str, difference: np.ndarray) -> np.ndarray:
    """With the rows of the added tokens, which a delta holds whole; LLaVA-13b-delta-v0 has none for `[PAD]`."""
    if name not in ("model.embed_tokens.weight", "lm_head.weight"):
        return difference
    rows = WEIGHT * rng.standard_normal((len(ADDED) - 1, difference.shape[1]))
    return np.concatenate([difference, rows.astype(np.float16)])


def _write_llama(folder: Path, tensors: Arrays) -> None:
    """Meta's layout: pieces cut along each tensor's axis, q and k rows as rotary pairs, and the md5 lists that Meta ships."""
    pieces: list[Arrays] = [{} for _ in range(PIECES)]
    for rule in _rules():
        values = tensors[rule.hugging_face]
        if rule.heads:  # from halves of each head to pairs, the inverse of transformers' converter
            rows, columns = values.shape
            values = values.reshape(HEADS, 2, rows // HEADS // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        cut = np.split(values, PIECES, rule.cut) if rule.cut is not None else [values] * PIECES
        for piece, part in zip(pieces, cut, strict=True):
            piece[rule.meta] = np.ascontiguousarray(part)
    size = folder / SIZE
    params = {"dim": LENGTHS["dim"], "multiple_of": 256, "n_heads": HEADS, "n_layers": LAYERS, "norm_eps": 1e-06, "vocab_size": -1}
    _write_files(size, {"params.json": json.dumps(params).encode()})
    head = LENGTHS["dim"] // HEADS
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
    head = LENGTHS["dim"] // HEADS
    tensors |= {f"model.layers.{number}.self_attn.rotary_emb.inv_freq": np.zeros(head // 2, np.float32) for number in range(LAYERS)}
    tensors["model.mm_projector.weight"] = (WEIGHT * rng.standard_normal((LENGTHS["dim"], IMAGE))).astype(np.float16)
    tensors["model.mm_projector.bias"] = (WEIGHT * rng.standard_normal(LENGTHS["dim"])).astype(np.float16)
    first = {f"model.layers.{number}." for number in range(LAYERS // 2)} | {"model.embed_tokens."}
    placed = {name: f"pytorch_model-0000{1 if name.startswith(tuple(first)) else 2}-of-00002.bin" for name in tensors}
    index = {"metadata": {"total_size": sum(values.nbytes for values in tensors.values())}, "weight_map": placed}
    _write_files(folder, {"pytorch_model.bin.index.json": json_bytes(index), "tokenizer.model": tokenizer_model(), **_era_files()})
    for shard in sorted(set(placed.values())):
        write_torch_zip(folder / shard, {name: values for name, values in tensors.items() if placed[name] == shard})


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": LENGTHS["dim"],
        "initializer_range": 0.02, "intermediate_size": LENGTHS["intermediate"], "max_position_embeddings": 2048, "model_type": "llama",
        "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.28.1", "use_cache": True, "vocab_size": LENGTHS["vocabulary"],
    }  # fmt: skip


def _era_files() -> dict[str, bytes]:
    """The small files of LLaVA-13b-delta-v0: wrong ids, empty token names, a `[PAD]` without a row (facts: llava-original 1.5, 1.6)."""
    rows = LENGTHS["vocabulary"] + len(ADDED) - 1
    config = _config() | {
        "_name_or_path": "./checkpoints/LLaVA-13B-v0", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1,
        "max_sequence_length": 2048, "mm_hidden_size": IMAGE, "mm_use_im_start_end": True, "mm_vision_select_layer": -2,
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
        "added_tokens.json": {token: LENGTHS["vocabulary"] + number for number, token in enumerate(ADDED)},
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
    ordinary = [text.replace("_", "\u2581") for text in [*MERGES.split(), *CHARACTERS]]
    pieces = [_field(1, text.encode()) + _field(2, 0.0) + _field(3, kind) for text, kind in special]
    pieces += [_field(1, text.encode()) + _field(2, float(-rank)) + _field(3, ORDINARY) for rank, text in enumerate(ordinary)]
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
