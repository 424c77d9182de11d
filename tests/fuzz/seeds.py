"""Writes the sound files that fuzzing starts from to fixtures/fuzz: `python tests/fuzz/seeds.py`. Findings there stay as they are.

Small as they are, each of them reaches another part of its reader; tests/test_fuzz.py sees that every target accepts some.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from targets import FIXTURES, SEEDS

from llava_weights.checkpoint.fingerprint import Fingerprint, described
from llava_weights.checkpoint.manifest import FileEntry, TensorEntry, root_of_files, root_of_tensors, tensor_row
from llava_weights.families.decoders import DECODER_BY_TYPE
from llava_weights.families.layouts import canonical
from llava_weights.families.llama_cpp import GGUF_DECODERS, TEXT_KEYS, TOWER_KEYS
from llava_weights.families.llama_cpp import SIZES as GGUF_SIZES
from llava_weights.formats.gguf import KIND, GgufKey, make_gguf_header
from llava_weights.formats.integer_delta import ToInteger, write_integer_shard
from llava_weights.smoke.forward import Probe
from llava_weights.smoke.recording import SKETCH_SIZE, Recorded, Recording, write_recording
from llava_weights.storage.reading import SourceFile
from llava_weights.tensors.dtypes import BLOCKS
from llava_weights.tensors.lazy import LazyTensor, Stored
from llava_weights.transforms.gguf import text_name
from llava_weights.write.work_folder import Job

A = FIXTURES / "A-delta-v0"
FAST = A / "expected-307-by-main"
PEFT = FIXTURES / "F-peft"
DIGEST = hashlib.sha256(b"").hexdigest()


def torch_files() -> dict[str, Any]:
    values, parameters = torch.arange(4.0), torch.nn.Linear(3, 1).state_dict()
    parameters["weight"], parameters["bias"] = values[:3].reshape(1, 3), values[3:]
    shared = {"a": values, "b": values[2:].reshape(1, 2)}
    return {"plain": OrderedDict(a=values), "shared": shared, "metadata": parameters, "parameter": {"p": torch.nn.Parameter(values)}}


def zips() -> dict[str, bytes]:
    found = {}
    for name, content in torch_files().items():
        file = io.BytesIO()
        torch.save(content, file)
        found[name] = file.getvalue()
    return found


def pickles() -> dict[str, bytes]:
    return {name: zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl") for name, data in zips().items()}


def safetensors_files() -> dict[str, bytes]:
    values = torch.arange(6.0)
    return {
        "two": save({"a": values.half(), "b": values.reshape(2, 3)}, {"format": "pt"}),
        "kinds": save({"scalar": values[0], "empty": values[:0], "bytes": values.to(torch.uint8), "brain": values.bfloat16()}),
    }


def gguf_files() -> dict[str, bytes]:
    """A text model and a tower, each of one layer and as small as can be, and a file of every kind of value and block."""
    sizes = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    shapes = DECODER_BY_TYPE["llama"].shapes({**sizes, "head_dim": 2, "vocab_size": 3})
    row = GGUF_DECODERS["llama"]
    text = {text_name(canonical(name), row)[0]: ("F32", shape) for name, shape in shapes.items()}
    words = {"max_position_embeddings": 9, **sizes}
    keys = [GgufKey("general.architecture", "text", "llama")]
    keys += [GgufKey(f"llama.{name}", "u32", words[TEXT_KEYS[name][1]]) for name in GGUF_SIZES]
    keys += [GgufKey("tokenizer.ggml.tokens", "text", ("a", "b", "c")), GgufKey("tokenizer.ggml.bos_token_id", "u32", 1)]
    vision = {"hidden_size": 2, "image_size": 2, "intermediate_size": 2, "num_attention_heads": 1, "patch_size": 1, "projection_dim": 2}
    tower = [GgufKey("general.architecture", "text", "clip"), GgufKey("clip.vision.block_count", "u32", 1)]
    tower += [GgufKey(f"clip.vision.{name}", "u32", vision[word]) for name, kind, word in TOWER_KEYS if kind == "u32"]
    tower += [GgufKey("clip.vision.feature_layer", "i32", (1,))]
    matrices = {"mm.0.weight": ("F16", (2, 2)), "mm.2.weight": ("F16", (2, 2)), "v.post_ln.weight": ("F32", (2,))}
    kinds = [GgufKey(f"k.{kind}", kind, True if kind == "bool" else 1) for kind in KIND if kind != "text"]
    kinds += [GgufKey("k.many", "f32", (0.5, -1.0)), GgufKey("k.empty", "text", ()), GgufKey("general.alignment", "u32", 32)]
    blocks = {f"b.{dtype}": (dtype, (1, BLOCKS[dtype][0])) for dtype in ("Q8_0", "Q4_0", "Q6_K")} | {"b.brain": ("BF16", (3,))}
    return {"text": gguf_file(keys, text), "tower": gguf_file(tower, matrices), "kinds": gguf_file(kinds, blocks)}


def gguf_file(keys: list[GgufKey], tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    head, places = make_gguf_header(keys, [(name, LazyTensor(dtype=dtype, shape=shape)) for name, (dtype, shape) in tensors.items()])
    return head + bytes(sum(tensor.nbytes for _, tensor, _ in places))


def headers(files: dict[str, bytes]) -> dict[str, bytes]:
    """As `targets.with_length` takes them."""
    found = {}
    for name, data in files.items():
        size = int.from_bytes(data[:8], "little")
        found[name] = data[8 : 8 + size] + b"\n" + data[8 + size :]
    return found


def references(folder: Path) -> dict[str, bytes]:
    logits = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    sketch = np.ones((1, SKETCH_SIZE + 2), np.float32)
    pixels, sizes = np.zeros((1, 2, 3, 2, 2), np.float32), np.array([[2, 4]])
    probes = (
        Recorded(Probe("text", np.array([1, 5])), np.zeros(2, bool), np.arange(2), logits, {"layer.0": sketch, "embeddings": sketch}),
        Recorded(Probe("tiles", np.array([1, -200]), pixels, sizes), np.array([False, True, True]), np.array([0, 2]), logits),
    )
    for probe in probes:
        write_recording(Recording((probe,), {"dtype": "F32", "layout": "llava"}), folder / probe.probe.name)
    return headers({probe.probe.name: (folder / probe.probe.name).read_bytes() for probe in probes})


def integer_deltas(folder: Path) -> dict[str, bytes]:
    values = np.arange(12, dtype=np.float16)
    (folder / "base").write_bytes(values.tobytes())
    (folder / "tuned").write_bytes((values + 1).tobytes())
    base, tuned = (Stored(dtype="F16", shape=(4, 3), file=SourceFile.at(folder / name), offset=0) for name in ("base", "tuned"))
    rows = Stored(dtype="F16", shape=(2, 3), file=base.file, offset=0)
    items = {  # those of version 1, without the 2, were written by earlier versions
        "one-2": [("w", ToInteger(dtype="F16", shape=(4, 3), tuned=tuned, base=base))],
        "more-rows-2": [
            ("w", ToInteger(dtype="F16", shape=(4, 3), tuned=tuned, base=rows)),
            ("new", ToInteger(dtype="F16", shape=(4, 3), tuned=tuned, base=None)),
        ],
    }
    for name, differences in items.items():
        write_integer_shard(folder / name, differences, jobs=1)
    return headers({name: (folder / name).read_bytes() for name in items})


def manifests() -> dict[str, bytes]:
    files = [FileEntry("model.safetensors", 80, DIGEST), FileEntry("config.json", 2, DIGEST)]
    tensors = [
        TensorEntry("a", "F16", (2, 3), 12, DIGEST, "model.safetensors"),
        TensorEntry("b", "F32", (), 4, DIGEST, "model.safetensors"),
    ]
    found = {}
    for name, some, others in (("two", files, tensors), ("files", files[:1], []), ("empty", [], [])):
        for schema, algorithm in ((1, "sha256"), (2, "blake3")):
            ours = [replace(tensor, algorithm=algorithm) for tensor in others]
            root = {"tensors": root_of_tensors(ours, algorithm), "files": root_of_files(some)}
            if schema == 1:
                root = {key: text.removeprefix("sha256:") for key, text in root.items()}
            digests = {"digests": {"files": "sha256", "tensors": algorithm}} if schema == 2 else {}
            lists = {"files": [file.__dict__ for file in some], "tensors": [tensor_row(tensor) for tensor in ours]}
            found[name if schema == 1 else f"{name}-{schema}"] = json.dumps({"schema": schema, **digests, "root": root, **lists}).encode()
    return found


def fingerprints() -> dict[str, bytes]:
    tensors = {"norm.weight": LazyTensor(dtype="F16", shape=(3,)), "w": LazyTensor(dtype="BF16", shape=(2, 3))}
    many = {name: LazyTensor(dtype="F32", shape=(9, 2)) for name in "ab"}
    return {
        "two": Fingerprint("base", described("base", tensors), {"w": bytes(range(12))}).document(),
        "many": Fingerprint("base", described("base", many), {"a": bytes(64)}).document(),
    }


def journals(folder: Path) -> dict[str, bytes]:
    entry = {"nbytes": 80, "sha256": DIGEST, "read_back": DIGEST[:32], "tensors": {"a": DIGEST}, "tallies": {}, "holes": []}
    job = Job(folder / "out")
    job.partial.mkdir()
    job.record({name: {"name": name, **entry} for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")})
    whole = job.journal.read_bytes()
    return {"two": whole, "torn": whole[: len(whole) * 3 // 4], "empty": b""}


def tokenizer_jsons() -> dict[str, bytes]:
    whole = json.loads((FAST / "tokenizer.json").read_bytes())
    few = {
        piece: number
        for number, piece in enumerate(["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a", *(f"<0x{b:02X}>" for b in range(8))])
    }
    small = {**whole, "model": {**whole["model"], "vocab": few, "merges": ["\u2581 a"]}, "added_tokens": whole["added_tokens"][:3]}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bytes_as_letters = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    letters = {"version": "1.0", "added_tokens": [], "pre_tokenizer": byte_level, "decoder": byte_level}
    letters["model"] = {"type": "BPE", "vocab": bytes_as_letters, "merges": [["a", "b"]]}
    return {"llama": compact(small), "letters": compact(letters)}


def tokenizer_models() -> dict[str, bytes]:
    """The fixtures' own, and one without its tokens for bytes."""
    whole = (FIXTURES / "common/tokenizer/tokenizer.model").read_bytes()
    position, kept = 0, b""
    while position < len(whole):
        size = 2 + whole[position + 1] if whole[position + 1] < 128 else 3 + (whole[position + 1] & 127) + (whole[position + 2] << 7)
        kept += b"" if b"<0x" in (field := whole[position : position + size]) else field
        position += size
    return {"small": kept}


def side_files() -> dict[str, bytes]:
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    found = {}
    for era, folder in (("first", A / "delta-307-apr17"), ("later", FAST)):
        found[era] = compact({name: json.loads((folder / name).read_bytes()) for name in names})
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    added = {"3": {"content": "<|endoftext|>", "special": True}, "4": {"content": "<|im_end|>", "special": True}}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "added_tokens_decoder": added}
    qwen = {"vocab.json": vocabulary, "merges.txt": "#version: 0.2\na b\n", "tokenizer_config.json": settings}
    return {**found, "qwen": compact(qwen), "none": b"{}"}


def indexes() -> dict[str, bytes]:
    named = {"a": "model-a.safetensors", "b": "model-b.safetensors"}
    return {
        "both": compact({"metadata": {"total_size": 8}, "weight_map": named}),
        "outside": compact({"weight_map": {**named, "c": "../c.safetensors"}}),
    }


def lists() -> dict[str, bytes]:
    gnu = f"{DIGEST}  model.safetensors\n{DIGEST} *config.json\n"
    return {
        "gnu": gnu.encode(),
        "bsd": f"# a remark\nSHA256 (model.safetensors) = {DIGEST}\nMD5 (./config.json) = {DIGEST[:32]}\n".encode(),
        "meta": f"{DIGEST[:32]}  consolidated.00.pth\n\n{DIGEST[:32]}  params.json".encode(),
    }


def texts() -> dict[str, bytes]:
    return {
        "all": rb'{"a": [1, -0.5e3, true, null, "\u00e9\ud83d\ude00\n"], "b": {"c": {}}}',
        "large": b"[123456789012345678901234567890, 1e-400]",
    }


def adapters() -> dict[str, bytes]:
    found = {name: (PEFT / name / "adapter/adapter_config.json").read_bytes() for name in ("patterns", "embedding-lora", "dora")}
    extra = {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "use_rslora": True, "trainable_token_indices": {"embed_tokens": [3, 1]}}
    return {name: compact(json.loads(data)) for name, data in found.items()} | {"tokens": compact(extra)}


def all_seeds(folder: Path) -> dict[str, dict[str, bytes]]:
    configs = {name: compact(json.loads(path.read_bytes())) for name, path in CONFIGS.items()}
    parameters = {"dim": 8, "multiple_of": 16, "n_heads": 2, "n_layers": 1, "norm_eps": 1e-06, "vocab_size": -1}  # of `targets.meta_params`
    return {
        "torch_zip": {name: data for name, data in zips().items() if name in ("plain", "shared")},
        "pickle": pickles(),
        "safetensors": safetensors_files(),
        "safetensors_header": headers(safetensors_files()),
        "gguf": gguf_files(),
        "index_json": indexes(),
        "meta_params": {
            "published": compact(parameters),
            "more": compact({**parameters, "n_kv_heads": 2, "vocab_size": 10, "rope_theta": 1e4}),
        },
        "strict_json": texts(),
        "tokenizer_model": tokenizer_models(),
        "tokenizer_json": tokenizer_jsons(),
        "tokenizer_files": side_files(),
        "adapter_config": adapters(),
        "manifest": manifests(),
        "fingerprint": fingerprints(),
        "sums": lists(),
        "reference": references(folder),
        "integer_delta": integer_deltas(folder),
        "journal": journals(folder),
        "job_plan": {"same": compact({"version": "1", "command": "copy"}), "other": compact({"version": "0", "inputs": "a\nb"})},
        "config_json": configs,
    }


CONFIGS = {"later": FAST / "config.json", "first": A / "delta-307-apr17/config.json"}


def compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def main() -> None:
    with TemporaryDirectory() as folder:
        for target, seeds in all_seeds(Path(folder)).items():
            (SEEDS / target).mkdir(parents=True, exist_ok=True)
            for name, data in seeds.items():
                (SEEDS / target / name).write_bytes(data)


if __name__ == "__main__":
    main()
