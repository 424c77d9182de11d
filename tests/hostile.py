"""Malicious inputs, numbered as in the list that this project was given: 1-72 are required, 73 and on are what else came to mind.

Each case builds a folder of files and says which commands get it, how each must end, and what must be in its words.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from formats.test_folder import INDEX, SHARDS, write, write_index
from formats.test_safetensors import HOSTILE as HEADERS
from formats.test_safetensors import build as header_file
from formats.test_safetensors import entry
from formats.test_torch_zip import DATA, FILES, PICKLES, SOUND, build, dict_of, patched, tensor
from safetensors.numpy import load_file, save_file

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
PLACES = {
    "base": FIXTURES / "A-delta-v0/base-hf-bin",
    "delta": FIXTURES / "A-delta-v0/delta-307-apr17",
    "vicuna": FIXTURES / "B-lora/base-vicuna-tiny",
    "llava": FIXTURES / "C-v1.5/original-no-vision-bin",
    "clip": FIXTURES / "common/clip-tiny-42px",
}
LORA = FIXTURES / "B-lora/llava-v1.5-tiny-lora"
HUB = FIXTURES / "C-v1.5/hf-by-tf4.47.1"
WITH_TOWER = FIXTURES / "C-v1.5/original-with-vision-safetensors"

# {it} is the folder that a case builds, {other} a second one: an adapter with the same weight file, or a delta.
COMMANDS = {
    "inspect": "inspect {it}",
    "convert": "convert {it} -o {out} --vision-tower {clip}",
    "hub": "convert {it} -o {out} --to llava",
    "base": "apply-delta --base {it} --delta {delta} -o {out}",
    "delta": "apply-delta --base {base} --delta {it} -o {out}",
    "lora": "merge-lora --base {vicuna} --lora {other} -o {out}",
    "tower": "convert {llava} -o {out} --vision-tower {it}",
    "verify": "verify {it}",  # makes a finding of what the others refuse: exit code 4
    "deep": "verify {it} --deep",
    "sum": "apply-delta --base {it} --delta {other} -o {out}",
    "made": "verify {out} --deep",  # of what the command before has made
}
ENDS: Mapping[str, int] = {"inspect": 3, "convert": 3, "base": 3, "delta": 3, "lora": 3, "tower": 3, "verify": 4}
INDEXED: Mapping[str, int] = {"inspect": 3, "convert": 3, "base": 3, "delta": 3, "tower": 3, "verify": 4}
SHORT: Mapping[str, int] = {"inspect": 3, "base": 3, "verify": 4}
SMALL: Mapping[str, int] = {"convert": 3, "verify": 4}
SIZE = 4 << 30  # of a sparse file that claims to be large

Build = Callable[[Path], Path]
Change = Callable[[dict[str, object]], object]


@dataclass(frozen=True)
class Case:
    """`build` fills a folder and returns the hostile file, whose name the refusal gives; `says` is in its words.

    `ends` maps commands to exit codes. An output is made only where a code is 0, and then holds none of the words in `absent`.
    A refusal names the hostile file, or `named`. `partial`: the values are read only while they are written, so that unfinished
    work stays.
    """

    number: int
    name: str
    build: Build
    says: str
    ends: Mapping[str, int] = field(default_factory=lambda: ENDS)
    absent: tuple[str, ...] = ()
    partial: bool = False
    named: str = ""

    @property
    def title(self) -> str:
        return f"{self.number}: {self.name}"


# --- building -------------------------------------------------------------------------------------------------------


def copied(source: Path, folder: Path) -> Path:
    """A copy that can be written to."""
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    return folder


def weights(make: Build, suffix: str = ".bin") -> Build:
    """A checkpoint and an adapter, both with the file that `make` puts into a folder."""

    def place(folder: Path) -> Path:
        model, adapter = folder / "it", folder / "other"
        model.mkdir()
        adapter.mkdir()
        made = model / ("pytorch_model.bin" if suffix == ".bin" else "model.safetensors")
        make(folder).rename(made)
        os.link(made, adapter / f"adapter_model{suffix}")
        shutil.copyfile(PLACES["base"] / "config.json", model / "config.json")
        shutil.copyfile(LORA / "adapter_config.json", adapter / "adapter_config.json")
        return made

    return place


def pickled(content: bytes) -> Build:
    return weights(lambda folder: build(folder, content))


def raw(content: bytes, suffix: str) -> Build:
    def make(folder: Path) -> Path:
        (folder / "raw").write_bytes(content)
        return folder / "raw"

    return weights(make, suffix)


def sparse(start: bytes, size: int) -> Build:
    """A file of `size` bytes that takes no space."""

    def make(folder: Path) -> Path:
        (folder / "raw").write_bytes(start)
        os.truncate(folder / "raw", size)
        return folder / "raw"

    return weights(make, ".safetensors")


def sharded(change: Callable[[Path], None], shard: object = None, name: str = "model.safetensors.index.json") -> Build:
    """Two sound shards with an index that maps the tensor `a` to `shard`, after `change`."""

    def place(folder: Path) -> Path:
        model = write_index(write(folder / "it", SHARDS), "model.safetensors.index.json", INDEX | ({"a": shard} if shard else {}))
        write(folder, {"outside.safetensors": ["a"]})
        shutil.copyfile(PLACES["base"] / "config.json", model / "config.json")
        change(model)
        return model / name

    return place


def unchanged(model: Path) -> None:
    pass


def edited(source: Path, name: str, change: Change) -> Build:
    """A copy of a sound checkpoint whose JSON file `name` was changed in place, or is what `change` returns, as text or bytes."""

    def place(folder: Path) -> Path:
        file = copied(source, folder / "it") / name
        value = json.loads(file.read_bytes()) if file.suffix == ".json" and file.exists() else {}
        new = change(value)
        file.write_bytes(new if isinstance(new, bytes) else json.dumps(value if new is None else new).encode())
        return file

    return place


def setting(source: Path, name: str = "config.json", **values: object) -> Build:
    return edited(source, name, lambda config: config.update(values))


def adapter(change: Change) -> Build:
    def place(folder: Path) -> Path:
        made = edited(LORA, "adapter_config.json", change)(folder)
        return made.parent.rename(folder / "other") / made.name

    return place


def valued(source: Path, file: str, values: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> Build:
    """A copy of a checkpoint in one safetensors file, some of its tensors changed."""

    def place(folder: Path) -> Path:
        import torch

        model = copied(source, folder / "it")
        tensors: dict[str, np.ndarray] = {}
        for path in sorted([*model.glob("*.bin"), *model.glob("*.safetensors")]):
            loaded = load_file(path) if path.suffix == ".safetensors" else {k: v.numpy() for k, v in torch.load(path).items()}
            tensors |= loaded
            path.unlink()
        for index in model.glob("*.index.json"):
            index.unlink()
        save_file({name: values.get(name, np.asarray)(array.copy()) for name, array in tensors.items()}, model / file, {"format": "pt"})
        return model / file

    return place


def respelled(data: bytes, name: str, how: str) -> bytes:
    """A safetensors file whose header says something else of one tensor, and is as valid as before: another name, shape or dtype."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    told = header[name]
    begin, end = told["data_offsets"]
    if how == "renamed":
        header["x" + name[1:]] = header.pop(name)
    elif how in ("flat", "one axis more"):
        told["shape"] = [math.prod(told["shape"])] if how == "flat" else [1, *told["shape"]]
    elif how == "bytes":
        told |= {"dtype": "U8", "shape": [end - begin]}
    else:  # "empty" or "scalar"
        kept = 0 if how == "empty" else (end - begin) // math.prod(told["shape"])
        body = body[: begin + kept] + body[end:]
        for other in header.values():
            if other is not told and (offsets := other.get("data_offsets", [0]))[0] >= end:
                other["data_offsets"] = [offset - (end - begin - kept) for offset in offsets]
        told |= {"shape": [0] if how == "empty" else [], "data_offsets": [begin, begin + kept]}
    return header_file(header, body)


def first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array.flat[0] = value
        return array

    return change


def link(name: str, target: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / name).unlink()
        (model / name).symlink_to(target)

    return change


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / name).unlink()
        make(model / name)

    return change


def deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


# --- the table ------------------------------------------------------------------------------------------------------


def torch_case(number: int, name: str) -> Case:
    """One of the pickles or files of formats/test_torch_zip.py."""
    if name in PICKLES:
        content, says = PICKLES[name]
        return Case(number, name, pickled(content), says, ENDS if number < 73 else SHORT)
    make, says = FILES[name]
    return Case(number, name, weights(make), says, ENDS if number < 73 else SHORT)


def header_case(number: int, name: str, says: str) -> Case:
    return Case(number, name, raw(HEADERS[name], ".safetensors"), says, ENDS if number < 73 else SHORT)


def flipped_data(folder: Path) -> Path:
    return patched(build(folder, SOUND), DATA["0"], bytes([DATA["0"][0] ^ 1]) + DATA["0"][1:])


def truncated(folder: Path) -> Path:
    path = build(folder, dict_of(x=tensor(numel=1000, shape=[1000])), {"0": bytes(4000)})
    os.truncate(path, 3000)
    return path


REQUIRED_PICKLES = (
    (1, "os.system"), (2, "eval"), (3, "getattr chain"), (4, "STACK_GLOBAL of what is not a name"), (5, "call of a storage"),
    (6, "BUILD of a tensor"), (7, "SETITEM of a tensor"), (8, "nested tuple as key"), (9, "a million nested lists"),
    (10, "text of 4 GiB"), (11, "long integer"), (11, "LONG4 bomb"), (12, "memo slot missing"), (13, "no STOP"), (14, "bytes after STOP"),
    (15, "protocol 5 frames"), (17, "member twice"), (18, "numel smaller"), (18, "numel 2^62"), (18, "numel negative"),
    (18, "numel larger"), (19, "view beyond"), (19, "offset negative"), (19, "stride negative"), (20, "stride 0"), (20, "stride 0 within"),
    (21, "meta tensor"), (22, "compressed"), (23, "bytearray(2**33)"), (24, "two roots"), (24, "path upwards"), (25, "bytes after the end"),
    (26, "legacy"), (26, "tar"), (26, "empty"), (27, "other local name"), (28, "CRC of data.pkl"), (28, "encrypted"),
    (29, "zip64 size missing"), (29, "big-endian"), (30, "TorchScript"),
)  # fmt: skip
REQUIRED_HEADERS = (
    (31, "same bytes twice", "overlaps"), (31, "key twice", "`a` stands twice"), (32, "metadata key twice", "`format` stands twice"),
    (33, "unknown field", "exactly dtype"), (34, "empty name", "1 to"), (34, "NUL in a name", "can't be printed"),
    (36, "1,000 axes", "at most 8"), (38, "leading blank", "not a JSON object"), (39, "20,001 empty tensors", "more than 20,000"),
    (40, "17 MB of metadata", "its header would have"), (41, "length 0", "0 bytes"), (41, "length 2^64-1", "18,446,744,073,709,551,615"),
    (41, "length 100,000,001", "100,000,001"), (41, "length beyond the file", "truncated"), (42, "overlap", "overlaps"),
    (42, "hole", "hole of 1 bytes"), (43, "trailing byte", "too long"), (43, "short data", "truncated"),
    (44, "negative offset", "data_offsets"), (44, "float offsets", "data_offsets"), (44, "bool offsets", "data_offsets"),
    (45, "shape wraps to 0", "does not fill"), (45, "shape wraps to 4", "shape"), (45, "shape times width wraps", "shape"),
    (46, "unknown dtype", "`Q4_0`"), (47, "byte order mark", "JSON"), (47, "not UTF-8", "not UTF-8"), (47, "lone surrogate", "surrogate"),
    (48, "field twice", "`dtype` stands twice"), (48, "nested 100,000 deep", "20,000"), (48, "metadata twice", "stands twice"),
)  # fmt: skip
SHARD = "model-00001-of-00002.safetensors"
BEYOND = "points to `{}`"
INDEX_NAMES = {
    49: ("../outside.safetensors",), 50: ("..\\outside.safetensors",), 51: ("/etc/outside.safetensors",),
    52: ("C:outside.safetensors", "C:\\outside.safetensors"), 53: ("\\\\host\\share\\outside.safetensors", "//host/outside.safetensors"),
    58: ("pytorch_model.bin",),
    76: ("sub/model.safetensors", ".hidden.safetensors", "~/x.safetensors", "..", "model.safetensors ", "https://host/x.safetensors"),
}  # fmt: skip


def repeated(model: Path) -> None:
    write(model, {SHARD: ["a", "b", "c"]})


def index_of(content: bytes = b"", size: int = 0) -> Build:
    def change(model: Path) -> None:
        (model / "model.safetensors.index.json").write_bytes(content)
        os.truncate(model / "model.safetensors.index.json", size or len(content))

    return sharded(change)


INDEX_CASES = (
    *(
        Case(number, f"weight_map to {name}", sharded(unchanged, name), BEYOND.format(name), INDEXED)
        for number, names in INDEX_NAMES.items()
        for name in names
    ),
    Case(54, "link out", sharded(link(SHARD, "../outside.safetensors"), name=SHARD), "leads out", INDEXED),
    Case(55, "dangling link", sharded(link(SHARD, "nothing"), name=SHARD), "missing", INDEXED),
    Case(55, "link loop", sharded(link(SHARD, SHARD), name=SHARD), "missing", INDEXED),
    Case(56, "FIFO", sharded(replaced(SHARD, os.mkfifo), name=SHARD), "is a pipe", INDEXED),
    Case(57, "folder", sharded(replaced(SHARD, os.mkdir), name=SHARD), "is a folder", INDEXED),
    Case(57, "device", sharded(link(SHARD, "/dev/zero"), name=SHARD), "leads out", INDEXED),
    Case(59, "tensor in two shards", sharded(repeated, name=SHARD), "repeats 1", INDEXED, named="`model-00002-of-00002.safetensors`"),
    Case(60, "index of 11 MiB", index_of(size=11 << 20), "at most 10,485,760", INDEXED),
    Case(60, "index of 4 GiB", index_of(size=SIZE), "at most 10,485,760", INDEXED),
    Case(60, "index of 3 million lists", index_of(b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"), "far more values", INDEXED),
)  # fmt: skip

LLAVA = PLACES["llava"]
TOKEN = "hf_" + "Ab1" * 11
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"


def unaligned(folder: Path) -> Path:
    """A sound base whose data begin at an odd byte."""
    file = valued(PLACES["base"], "model.safetensors", {})(folder)
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    file.write_bytes((size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :])
    return file


def named_by_a_token(folder: Path) -> Path:
    made = raw(HEADERS["key twice"], ".safetensors")(folder)
    return made.rename(made.parent / f"{TOKEN}.safetensors")


def overflow(folder: Path) -> Path:
    """A base and a delta whose sum is beyond float16 in one place."""
    for place, into in (("delta", "other"), ("base", "it")):
        made = valued(PLACES[place], "model.safetensors", {NORM: first(60000.0)})(folder)
        if into != "it":
            made.parent.rename(folder / into)
    return folder / "it/model.safetensors"


DROPPED: Mapping[str, int] = {"convert": 0, "verify": 3}  # keys that must not survive: gone from the output, a warning of `verify`

NAN = {EMBED: first(float("nan"))}
SHORTENED = {EMBED: lambda array: array[:-1].copy()}
CONFIG_CASES = (
    Case(61, "auto_map", setting(LLAVA, auto_map={"AutoModel": "evil.Model"}), "`auto_map`", DROPPED, ("auto_map", "evil")),
    Case(
        62,
        "_attn_implementation_internal",
        setting(LLAVA, _attn_implementation_internal="evil/kernels"),
        "`_attn_implementation_internal`",
        DROPPED,
        ("_attn", "evil"),
    ),
    Case(
        63,
        "nested trust_remote_code",
        setting(LLAVA, text_config={"trust_remote_code": True, "auto_map": {"AutoConfig": "evil.Config"}}),
        "`trust_remote_code`",
        DROPPED,
        ("trust_remote_code", "auto_map", "evil"),
    ),
    Case(
        63,
        "nested in a llava-hf config",
        edited(HUB, "config.json", lambda c: c["text_config"].update(trust_remote_code=True, _attn_implementation_internal="evil/kernels")),  # type: ignore[attr-defined]
        "`trust_remote_code`",
        {"hub": 0, "verify": 3},
        ("trust_remote_code", "_attn", "evil"),
    ),
    Case(64, "vocab_size 10^12", setting(PLACES["base"], vocab_size=10**12), "1000000000000", {"base": 0, "verify": 4}, ("1000000000000",)),
    Case(65, "negative layers", setting(LLAVA, num_hidden_layers=-2), "`num_hidden_layers` is -2", SMALL),
    Case(66, "NaN rope_theta", setting(LLAVA, rope_theta=float("nan")), "NaN is not a JSON number", SMALL),
    Case(66, "infinite rope_theta", edited(LLAVA, "config.json", lambda c: b'{"rope_theta": 1e999}'), "`1e999` is too large", SMALL),
    Case(67, "NaN in weights", valued(LLAVA, "model.safetensors", NAN), EMBED, {"deep": 4, "convert": 0, "made": 4}),
    Case(68, "inf after the sum", overflow, NORM, {"sum": 3}, partial=True, named=NORM),
    Case(69, "one row short", valued(LLAVA, "model.safetensors", SHORTENED), "303", SMALL, named="`tokenizer.model`"),
    Case(70, "Git LFS pointer", weights(FILES["Git LFS pointer"][0]), "Git LFS pointer"),
    Case(70, "Git LFS pointer as safetensors", raw(HEADERS["Git LFS pointer"], ".safetensors"), "Git LFS pointer"),
    Case(72, "token as file name", named_by_a_token, "`hf_***.safetensors`", {"inspect": 3, "convert": 3, "base": 3, "verify": 4}),
    Case(71, "HTML", weights(FILES["HTML"][0]), "HTML"),
    Case(71, "HTML as safetensors", raw(HEADERS["HTML"], ".safetensors"), "HTML"),
)  # fmt: skip


def changes(**values: object) -> Change:
    return lambda config: config.update(values)


def bare(content: bytes) -> Change:
    return lambda _: content


CONFIGS: Mapping[str, tuple[Change, str]] = {
    "rope_theta is negative": (changes(rope_theta=-1), "`rope_theta` is -1"),
    "rope_theta is a text": (changes(rope_theta="os.system"), "`rope_theta`"),
    "rope_theta is true": (changes(rope_theta=True), "`rope_theta`"),
    "rms_norm_eps 0": (changes(rms_norm_eps=0), "`rms_norm_eps` is 0"),
    "layers 10^9": (changes(num_hidden_layers=10**9), "`num_hidden_layers`"),
    "heads 0": (changes(num_attention_heads=0), "`num_attention_heads` is 0"),
    "heads of 4,000 digits": (changes(num_attention_heads=10**4000), "`num_attention_heads`"),
    "width of text": (changes(hidden_size="48"), "`hidden_size`"),
    "a list": (bare(b"[]"), "does not hold an object"),
    "100,000 levels": (bare(deep(100_000)), "64 levels"),
    "66 levels": (bare(deep(66)), "64 levels"),
    "2 MiB": (bare(b"{}".ljust(2 << 20)), "at most 1,048,576"),
    "integer of 10,000 digits": (bare(b'{"vocab_size": %s}' % (b"9" * 10_000)), "JSON"),
    "key twice": (bare(b'{"vocab_size": 1, "vocab_size": 2}'), "stands twice"),
    "not UTF-8": (bare(b'{"x": "\xff"}'), "not UTF-8"),
    "lone surrogate": (bare(b'{"x": "\\ud800"}'), "surrogate"),
    "NUL": (bare(b"{}\0"), "JSON"),
    "empty": (bare(b""), "is empty"),
}
# Files beside the weights: the file, what is in it, what is said, and the source whose copy it is in.
TOKENIZER, ADDED, FAST = "tokenizer.model", "added_tokens.json", "tokenizer.json"
BESIDE: Mapping[str, tuple[str, Change, str]] = {
    "empty": (TOKENIZER, bare(b""), "`tokenizer.model`"),
    "noise": (TOKENIZER, bare(b"\xff" * 4096), "`tokenizer.model`"),
    "a piece of 2^63 bytes": (TOKENIZER, bare(b"\x0a" + b"\xff" * 8 + b"\x7f"), "`tokenizer.model`"),
    "17 MiB": (TOKENIZER, bare(bytes(17 << 20)), "at most 16,777,216"),
    "id beyond": (ADDED, changes(**{"<evil>": 10**12}), "`<evil>`"),
    "id is negative": (ADDED, changes(**{"<evil>": -1}), "`<evil>`"),
    "id is a text": (ADDED, changes(**{"<evil>": "1"}), "`<evil>`"),
    "id of another": (ADDED, changes(**{"<evil>": 1}), "`<evil>`"),
    "tokens are a list": (ADDED, bare(b"[]"), "`added_tokens.json`"),
    "settings 100,000 deep": ("tokenizer_config.json", bare(deep(100_000)), "64 levels"),
    "NaN in settings": ("tokenizer_config.json", bare(b'{"model_max_length": NaN}'), "NaN"),
    "special tokens of 2 MiB": ("special_tokens_map.json", bare(b"{}".ljust(2 << 20)), "at most 1,048,576"),
}
OF_THE_HUB: Mapping[str, tuple[str, Change, str]] = {
    "tokenizer.json 100,000 deep": (FAST, bare(deep(100_000)), "64 levels"),
    "tokenizer.json of 21 MiB": (FAST, bare(b"{}".ljust(21 << 20)), "at most 20,971,520"),
    "tokenizer.json of 6 million lists": (FAST, bare(b'{"a":[' + b"[]," * 6_000_000 + b"[]]}"), "far more values"),
    "tokenizer.json of 3 million objects": (FAST, bare(b'{"a":[' + b'{"":0},' * 2_900_000 + b"{}]}"), "far more values"),
    "tokenizer.json of wide characters": (FAST, bare('{"a":["\N{GRINNING FACE}"]}'.encode().ljust(19 << 20) + b"!"), "Extra data"),
    "pinpoints": ("preprocessor_config.json", changes(image_grid_pinpoints=[[10**12, -1]]), "pinpoints"),
    "preprocessor not JSON": ("preprocessor_config.json", bare(b"{"), "`preprocessor_config.json`"),
    "processor 100,000 deep": ("processor_config.json", bare(deep(100_000)), "64 levels"),
    "image token 10^12": ("config.json", changes(image_token_index=10**12), "1000000000000"),
    "model type of 500 kB": ("config.json", changes(model_type="x" * 500_000), "xxxxxx"),
    "model type of codes": ("config.json", changes(model_type="\x1b[2J\u202e"), "`model_type`"),
    "image token of 4,000 digits": ("config.json", lambda config: config.update(image_token_index=10**4000), "1" + "0" * 100),
    "image token is true": ("config.json", changes(image_token_index=True), "image_token_index"),
}
ADAPTERS: Mapping[str, tuple[Change, str]] = {
    "rank 10^12": (changes(r=10**12), "`r` is `1000000000000`"),
    "rank true": (changes(r=True), "`r` is `True`"),
    "alpha NaN": (bare(b'{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}'), "NaN"),
    "alpha 1e300": (changes(lora_alpha=1e300), "`lora_alpha`"),
    "alpha of 4,000 digits": (bare(b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1%s}' % (b"0" * 4000)), "`lora_alpha`"),
    "a pattern without end": (changes(rank_pattern={"(a+)+$": 4}), "a repeated group"),
    "a pattern of 1 MB": (changes(alpha_pattern={"a" * 900_000: 4}), "longer than 200"),
    "code": (changes(auto_map={"AutoModel": "evil.Model"}), "`auto_map`"),
    "a method of 500 kB": (changes(peft_type="x" * 500_000), "of the kind"),
    "another method": (changes(peft_type="os.system"), "`os.system`"),
    "Megatron": (changes(megatron_config={"a": 1}), "Megatron"),
    "100,000 deep": (bare(deep(100_000)), "64 levels"),
}
TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
TEMPLATES = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
MANIFEST = "llava-weights.manifest.json"
BACK: Mapping[str, int] = {"hub": 3, "verify": 4}
PREPROCESSORS: Mapping[str, tuple[Change, str]] = {
    "size of another tower": (changes(size=10**9), "belongs to another vision tower"),
    "size is a list": (changes(size=[1] * 1000), "`size`"),
    "mean of a text": (changes(image_mean=["os.system"] * 3), "`image_mean`"),
    "std 0": (changes(image_std=[0, 0, 0]), "`image_std`"),
    "resample 10^12": (changes(resample=10**12), "`resample`"),
}
LORA_ONLY: Mapping[str, int] = {"lora": 3}
ONLY_VERIFY: Mapping[str, int] = {"verify": 4}
ONLY_WARNED: Mapping[str, int] = {"verify": 3}  # a warning of `verify`, which has no checksums to prove the rest by
OUTSIDE = [{"path": "../x", "size": 1, "sha256": "0" * 64}]
ON_VERIFY = (
    *(Case(81, f"chat template in {name}", setting(HUB, name, chat_template=TEMPLATE), "`__class__`", ONLY_WARNED) for name in TEMPLATES),
    Case(81, "chat_template.jinja", edited(HUB, "chat_template.jinja", bare(TEMPLATE.encode())), "`__class__`", ONLY_WARNED),
    Case(81, "chat template of 2 MiB", edited(HUB, TEMPLATES[1], bare(b"{}".ljust(2 << 20))), "at most 1,048,576", {"verify": 4}),
    Case(82, "manifest of 17 MiB", edited(LLAVA, MANIFEST, bare(b"{}".ljust(17 << 20))), "at most 16,777,216", ONLY_VERIFY),
    Case(82, "manifest 100,000 deep", edited(LLAVA, MANIFEST, bare(deep(100_000))), "64 levels", ONLY_VERIFY),
    Case(82, "manifest with a path", setting(LLAVA, MANIFEST, schema=1, files=OUTSIDE, tensors=[]), "../x", {"verify": 4}),
    Case(82, "SHA256SUMS with a path", edited(LLAVA, "SHA256SUMS", bare(b"0" * 64 + b"  ../../etc/passwd\n")), "passwd", ONLY_VERIFY),
)
NAMED = {name for _, name in (*REQUIRED_PICKLES, *(row[:2] for row in REQUIRED_HEADERS))} | {"Git LFS pointer", "HTML"}

CASES: tuple[Case, ...] = (
    *(torch_case(number, name) for number, name in REQUIRED_PICKLES),
    Case(16, "a flipped bit of data", weights(flipped_data), "CRC-32", {"deep": 4}),
    Case(26, "truncated", weights(truncated), "is truncated, its directory is missing, found 3,000"),
    *(header_case(*row) for row in REQUIRED_HEADERS),
    Case(
        34,
        "path as name",
        raw(header_file({"../../etc/passwd": entry()}, bytes(4)), ".safetensors"),
        "../../etc/passwd",
        {"base": 3},
        named="`it`",
    ),
    Case(
        35,
        "BOOL of other bytes",
        raw(header_file({"x": entry("BOOL")}, bytes([2, 3, 4, 255])), ".safetensors"),
        "x",
        {"base": 3},
        named="`it`",
    ),
    Case(37, "unaligned, which is harmless", unaligned, "", {"base": 0}),
    Case(40, "99 MB of metadata", sparse((99 << 20).to_bytes(8, "little") + b"{", SIZE), "103,809,024"),
    *INDEX_CASES,
    *CONFIG_CASES,
    *ON_VERIFY,
    *(torch_case(73, name) for name in (*PICKLES, *FILES) if name not in NAMED),
    *(header_case(74, name, "`model.safetensors`") for name in HEADERS if name not in NAMED),
    *(Case(75, name, edited(LLAVA, "config.json", change), says, SMALL) for name, (change, says) in CONFIGS.items()),
    Case(75, "vision layer 10^12", setting(LLAVA, mm_vision_select_layer=10**12), "`mm_vision_select_layer`", {"convert": 3}),
    *(Case(77, f"{row[0]}: {name}", edited(LLAVA, row[0], row[1]), row[2], SMALL) for name, row in BESIDE.items()),
    *(Case(78, name, edited(HUB, row[0], row[1]), row[2], BACK) for name, row in OF_THE_HUB.items()),
    *(Case(79, name, adapter(change), says, LORA_ONLY) for name, (change, says) in ADAPTERS.items()),
    *(
        Case(80, name, edited(PLACES["clip"], "preprocessor_config.json", change), says, {"tower": 3})
        for name, (change, says) in PREPROCESSORS.items()
    ),
)
