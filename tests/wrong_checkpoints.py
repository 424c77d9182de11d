"""Wrong checkpoints: a table of ways in which a good one can be spoiled, and what each way of `verify` can know of it.

Each change is one that a bug, a bad download or an attacker makes, and leaves a folder that loads. It is tried with the records
beside the weights as they were ("stale"), with records that were made anew afterwards and agree with what is wrong ("rewritten"),
and without any ("none"). What a mode must know (`expected`): a rule of plain `verify` sees it by itself, or reading every value
does, or only a comparison with something that is not beside it. `verify X --against GOOD`, folder or manifest, and `--base` know all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

import llava_weights as lw

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
MANIFEST, SUMS, INDEX = "llava-weights.manifest.json", "SHA256SUMS", "model.safetensors.index.json"

Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], Any]
Seen = Literal["rules", "warning", "values", "reference"]
Records = Literal["stale", "rewritten", "none"]
MODES = ("plain", "deep", "folder", "manifest", "base")

# Good ones: sources, and the options that name them to `verify --base`.
SOURCES = {
    "hf": ("C-v1.5/original-with-vision-safetensors", ("--vision-tower", "common/clip-tiny-42px")),
    "next": ("D-v1.6/original-vicuna", ("--vision-tower", "common/clip-tiny-42px")),
    "original": ("A-delta-v0/base-hf-bin", ("--delta", "A-delta-v0/delta-307-apr17")),
    "linear": ("A-delta-v0/base-hf-bin", ("--delta", "A-delta-v0/delta-307-apr17", "--vision-tower", "common/clip-tiny-28px")),
}


@dataclass(frozen=True)
class Wrong:
    """`change` spoils `part` of a copy of the good checkpoint `good`. `seen`: what is needed to know it, the least first: a rule of
    plain `verify`, one that is no more than a warning (4 with `--strict`), every value, or a reference elsewhere.

    `records`: which records can be there; `checksum` makes none for what it can't read. `structure`: the stale manifest differs in
    names, shapes or sizes, so that plain `verify` sees a change of weights. `blind`: modes that can't know, with the reason."""

    part: str
    good: str
    change: Change
    seen: Seen = "reference"
    structure: bool = False
    records: tuple[Records, ...] = ("stale", "rewritten", "none")
    blind: tuple[str, ...] = ()


def make_good(folder: Path) -> dict[str, Path]:
    """The good checkpoints, made by the real pipeline, in several shards."""
    made = {}
    for name, (source, given) in SOURCES.items():
        whole = lw.open_checkpoint(FIXTURES / source)
        others = {option: lw.open_checkpoint(FIXTURES / other) for option, other in zip(given[::2], given[1::2], strict=True)}
        whole = lw.apply_delta(whole, others["--delta"]) if "--delta" in others else whole
        whole = lw.convert(whole, "llava-hf", tower=others["--vision-tower"]) if "--vision-tower" in others else whole
        lw.execute(lw.make_plan(whole, max_shard_size=80_000), folder / name)
        made[name] = folder / name
    return made


def base_options(good: str) -> dict[str, Path]:
    source, given = SOURCES[good]
    others = zip(given[::2], given[1::2], strict=True)
    return {"base": FIXTURES / source, **{option.strip("-").replace("-", "_"): FIXTURES / other for option, other in others}}


def options(mode: str, good: str, folder: Path, manifest: Path) -> dict[str, Any]:
    """What `verify` is given in a mode: `folder` is the good checkpoint, `manifest` its manifest, kept elsewhere."""
    given: dict[str, dict[str, Any]] = {"deep": {"deep": True}, "folder": {"against": folder}, "manifest": {"against": manifest}}
    return base_options(good) if mode == "base" else given.get(mode, {})


def expected(wrong: Wrong, mode: str, records: Records) -> tuple[int, bool]:
    """The exit code that is right, and whether a warning names the change where that is not 4."""
    small = wrong.part != "weights"
    if (mode not in ("plain", "deep") and mode not in wrong.blind) or wrong.seen == "rules" or (mode == "deep" and wrong.seen == "values"):
        return 4, False
    if records == "stale" and (mode != "plain" or small or wrong.structure):
        return 4, False
    nothing = records == "none" and mode in ("plain", "deep")
    return (3 if nothing else 0), wrong.seen == "warning"


# --- how things are changed -----------------------------------------------------------------------------------------


def spoiled(wrong: Wrong, good: Path, folder: Path, records: Records) -> Path:
    """A copy of `good` in `folder`, changed, with its records as told."""
    shutil.copytree(good, folder)
    if records != "stale":
        for name in (MANIFEST, SUMS):
            (folder / name).unlink()
    wrong.change(folder)
    if records == "rewritten":
        lw.checksum(folder)
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def weights(change: Callable[[Tensors], Any]) -> Change:
    """A change of the tensors, all of which the function gets by name; each stays in its shard, new ones go into the last."""

    def apply(folder: Path) -> None:
        homes = {name: path for path in shards(folder) for name in load_file(path)}
        tensors = {name: tensor for path in shards(folder) for name, tensor in load_file(path).items()}
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        tensors = change(tensors) or tensors
        for path in shards(folder):
            mine = {n: t.contiguous() for n, t in tensors.items() if homes.get(n, shards(folder)[-1]) == path}
            old = {name: before[name] for name, home in homes.items() if home == path}
            if mine.keys() != old.keys() or any(not same(mine[name], old[name]) for name in mine):
                save_file(mine, path, {"format": "pt"})
        index = {name: homes.get(name, shards(folder)[-1]).name for name in sorted(tensors)}
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if tensors.keys() != before.keys() or total != sum(t.numel() * t.element_size() for t in before.values()):
            (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))

    return apply


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, so that NaN equals itself and -0 does not equal 0."""
    return _bits(one) == _bits(other)


def _bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def each(names: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """A change of every tensor whose name holds `names`."""

    def apply(tensors: Tensors) -> None:
        chosen = [name for name in tensors if names in name]
        assert chosen, names
        for name in chosen:
            tensors[name] = change(tensors[name])

    return weights(apply)


def exchanged(one: str, other: str) -> Change:
    """Two tensors of the same shape hold each other's values."""

    def apply(tensors: Tensors) -> None:
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    return weights(apply)


def config(*keys: str, to: Any = None, file: str = "config.json") -> Change:
    """Another value of a key; without `to` the key goes."""

    def apply(folder: Path) -> None:
        value = whole = json.loads((folder / file).read_bytes())
        for key in keys[:-1]:
            value = value[key]
        assert value.get(keys[-1], ...) != to, (file, keys)
        if to is None:
            del value[keys[-1]]
        else:
            value[keys[-1]] = to
        (folder / file).write_text(json.dumps(whole, indent=2))

    return apply


def edited(file: str, change: Callable[[Any], Any]) -> Change:
    """A change of what a JSON file holds, in place or returned."""

    def apply(folder: Path) -> None:
        value = json.loads((folder / file).read_bytes())
        (folder / file).write_text(json.dumps(change(value) or value, indent=2))

    return apply


def both(*changes: Change) -> Change:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def without(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


def zeroed_half(folder: Path) -> None:
    """As a download leaves it that reserved its place and stopped: the size is right, the second half is zeros."""
    path = shards(folder)[1]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def truncated(folder: Path) -> None:
    os.truncate(shards(folder)[0], shards(folder)[0].stat().st_size - 100)


def permuted(heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rows of q or k as Meta stores them: rotary pairs side by side."""
    return lambda t: t.view(heads, 2, t.shape[0] // heads // 2, t.shape[1]).transpose(1, 2).reshape(t.shape)


def noise(tensor: torch.Tensor) -> torch.Tensor:
    """Other values of the same mean and width."""
    values = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)) * tensor.float().std() + tensor.float().mean()
    return values.to(tensor.dtype)


def flip_bit(tensor: torch.Tensor) -> torch.Tensor:
    bits = tensor.clone().view(torch.int16)
    bits[tensor.shape[0] // 3, tensor.shape[1] // 3] ^= 1
    return bits.view(tensor.dtype)


def one_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """One value in a row that no sample takes."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[tensor.shape[0] // 3, 5] = value
        return tensor

    return change


def copy_layer(tensors: Tensors) -> None:
    for name in list(tensors):
        if name.startswith(LM + "layers.1."):
            tensors[name] = tensors[name.replace("layers.1.", "layers.0.")].clone()


def from_base(names: str) -> Change:
    """The delta was never added there: the values are the base's."""
    path = FIXTURES / SOURCES["original"][0]
    found: Tensors = {}
    for file in sorted(path.glob("*.bin")):
        found |= torch.load(file, weights_only=True)
    return weights(lambda tensors: {name: found[name] if names in name else tensor for name, tensor in tensors.items()})


def unapplied(tensors: Tensors) -> Tensors:
    delta: Tensors = {}
    for file in sorted((FIXTURES / SOURCES["original"][1][1]).glob("*.bin")):
        delta |= torch.load(file, weights_only=True)
    return {name: delta[name] for name in tensors}


# --- tokenizers -----------------------------------------------------------------------------------------------------


def vocabulary(change: Callable[[list[str]], list[str]], first: int = 259) -> Change:
    """The texts of the ids from `first` on (ordinary pieces) in tokenizer.json in another order."""

    def apply(value: Any) -> None:
        names = sorted(value["model"]["vocab"], key=value["model"]["vocab"].get)
        names = names[:first] + change(names[first:])
        value["model"]["vocab"] = {name: i for i, name in enumerate(names)}

    return edited("tokenizer.json", apply)


def merges(change: Callable[[list[Any]], list[Any]]) -> Change:
    return edited("tokenizer.json", lambda value: value["model"].update(merges=change(value["model"]["merges"])))


def added(content: str, **fields: Any) -> Change:
    """Fields of an added token in tokenizer.json."""
    return edited("tokenizer.json", lambda value: next(e for e in value["added_tokens"] if e["content"] == content).update(fields))


def lacking(content: str) -> Change:
    """An added token that tokenizer.json does not list."""
    return edited("tokenizer.json", lambda v: v.update(added_tokens=[e for e in v["added_tokens"] if e["content"] != content]))


def pieces(change: Callable[[list[bytes]], list[bytes]], first: int = 259) -> Change:
    """The ordinary pieces of tokenizer.model in another order, or others: fields of a protobuf message, the pieces are field 1."""

    def apply(folder: Path) -> None:
        fields = list(_fields((folder / "tokenizer.model").read_bytes()))
        every = [raw for key, raw in fields if key == 0x0A]
        rest = b"".join(raw for key, raw in fields if key != 0x0A)
        (folder / "tokenizer.model").write_bytes(b"".join(every[:first] + change(every[first:])) + rest)

    return apply


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(key, whole field) of every field of a message whose fields are all length-delimited, of less than 16,384 bytes."""
    position = 0
    while position < len(data):
        size, body = data[position + 1], position + 2
        if size & 0x80:
            size, body = (size & 0x7F) | data[position + 2] << 7, position + 3
        yield data[position], data[position : body + size]
        position = body + size


def template(change: Callable[[str], str], *files: str) -> Change:
    """Another chat template in the files that hold it."""

    def apply(folder: Path) -> None:
        for file in files or ("chat_template.json", "chat_template.jinja"):
            text = (folder / file).read_text()
            old = json.loads(text)["chat_template"] if file.endswith(".json") else text
            assert change(old) != old
            (folder / file).write_text(json.dumps({"chat_template": change(old)}) if file.endswith(".json") else change(old))

    return apply


# --- the table ------------------------------------------------------------------------------------------------------

LM, TOWER, PROJECTOR = "language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."
Q, K, OUT = (LM + f"layers.1.self_attn.{name}_proj.weight" for name in "qko")
GATE, UP = LM + "layers.0.mlp.gate_proj.weight", LM + "layers.0.mlp.up_proj.weight"
EMBED, HEAD = LM + "embed_tokens.weight", "language_model.lm_head.weight"
PRE, PROC, TOK, GEN = "preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json"
SIGLIP, SWAP = [0.5, 0.5, 0.5], lambda pairs: [[b, a] for a, b in pairs]


def _weights() -> Iterator[tuple[str, Wrong]]:
    def wrong(name: str, change: Change, seen: Seen = "reference", good: str = "hf", **more: Any) -> tuple[str, Wrong]:
        return name, Wrong("weights", good, change, seen, **more)

    yield wrong("one bit of one value", each(Q, flip_bit))
    yield wrong("every tensor reversed", weights(lambda t: {n: x.flip(*range(x.dim())) for n, x in t.items()}), "warning")
    yield wrong("one matrix reversed", each(GATE, lambda t: t.flip(0, 1)))
    yield wrong("one matrix transposed", each(OUT, lambda t: t.T))
    yield wrong("one matrix doubled", each(GATE, lambda t: t * 2))
    yield wrong("one matrix a hundredth", each(GATE, lambda t: t / 100))
    yield wrong("one matrix zero", each(GATE, torch.zeros_like), "rules")
    yield wrong("one matrix of other random values", each(UP, noise))
    yield wrong("a matrix of two layers exchanged", exchanged(Q, Q.replace("layers.1", "layers.0")))
    yield wrong("gate and up exchanged", exchanged(GATE, UP))
    yield wrong("q and k exchanged", exchanged(Q, K))
    yield wrong("q and k in Meta's order of rows", weights(lambda t: {n: permuted(4)(x) if n in (Q, K) else x for n, x in t.items()}))
    yield wrong("columns of two heads exchanged in o", each(OUT, lambda t: torch.cat((t[:, 12:24], t[:, :12], t[:, 24:]), 1)))
    yield wrong("one layer copied over another", weights(copy_layer), "warning")
    yield wrong(
        "norms before and behind attention exchanged",
        exchanged(LM + "layers.0.input_layernorm.weight", LM + "layers.0.post_attention_layernorm.weight"),
    )
    yield wrong("a norm all ones", each(LM + "norm.weight", torch.ones_like), "warning")
    yield wrong("a NaN where no sample looks", each(UP, one_value(float("nan"))), "values")
    yield wrong("an inf where no sample looks", each(UP, one_value(float("inf"))), "values")
    yield wrong("a matrix of NaN", each(UP, lambda t: t * float("nan")), "rules")
    yield wrong("one matrix stored as float32", each(GATE, torch.Tensor.float), structure=True)
    yield wrong("every tensor stored as bfloat16", weights(lambda t: {n: x.bfloat16() for n, x in t.items()}), "warning", structure=True)
    yield wrong("every value went through bfloat16", weights(lambda t: {n: x.bfloat16().to(x.dtype) for n, x in t.items()}), "warning")
    yield wrong("embedding shifted by one row", each(EMBED, lambda t: t.roll(1, 0)))
    yield wrong("rows of two tokens exchanged", each(EMBED, lambda t: t[[*range(100), 200, *range(101, 200), 100, *range(201, len(t))]]))
    yield wrong("the row of one token zero", each(EMBED, lambda t: torch.cat((t[:100], torch.zeros_like(t[:1]), t[101:]))))
    yield wrong("head replaced by the embedding", weights(lambda t: {**t, HEAD: t[EMBED].clone()}), "warning")
    yield wrong("second half of a shard zeroed", zeroed_half, "rules")
    yield wrong("a shard truncated", truncated, "rules", records=("stale", "none"))
    yield wrong("a tensor missing", weights(lambda t: {n: x for n, x in t.items() if n != OUT}), "rules", structure=True)
    yield wrong(
        "a tensor of one more layer", weights(lambda t: {**t, OUT.replace("layers.1", "layers.2"): t[OUT].clone()}), "rules", structure=True
    )
    yield wrong(
        "the table a few padding rows shorter, its config too",
        both(
            weights(lambda t: {n: x[:310] if n in (EMBED, HEAD) else x for n, x in t.items()}),
            config("vocab_size", to=310),
            config("text_config", "vocab_size", to=310),
        ),
        structure=True,
        blind=("base",),
    )
    yield wrong(
        "vision tower of another seed", weights(lambda t: {n: noise(x) if n.startswith(TOWER) and x.dim() > 1 else x for n, x in t.items()})
    )
    yield wrong("tower's patches with red and blue exchanged", each("patch_embedding.weight", lambda t: t.flip(1)))
    yield wrong("tower's positions reversed", each("position_embedding.weight", lambda t: t.flip(0)))
    yield wrong("tower's class token of other values", each("class_embedding", noise))
    yield wrong("a bias of the tower zero", each(TOWER + "encoder.layers.0.mlp.fc1.bias", torch.zeros_like))
    yield wrong("projector's biases exchanged", exchanged(PROJECTOR + "linear_1.bias", PROJECTOR + "linear_2.bias"))
    yield wrong("projector's second layer transposed", each(PROJECTOR + "linear_2.weight", lambda t: t.T))
    yield wrong("image_newline of other values", each("image_newline", noise), good="next")
    yield wrong("image_newline zero", each("image_newline", torch.zeros_like), "rules", good="next")
    yield wrong("other weights in a file beside the shards", _stale_file, "rules", records=("stale", "none"))
    yield wrong("an adapter's config beside the weights", _adapter, "rules")
    yield wrong("a delta that was never applied", weights(unapplied), "rules", good="original", records=("rewritten", "none"))
    yield wrong("delta not applied in one matrix", from_base("layers.1.mlp.up_proj"), good="original")
    yield wrong("delta not applied in one layer", from_base("layers.1."), good="original")
    yield wrong("delta not applied in the embedding", weights(_base_rows), good="original")
    yield wrong("delta subtracted in one matrix", each("layers.0.mlp.up_proj", lambda t: -t), good="original")
    yield wrong(
        "rows of two added tokens equal",
        each("model.embed_tokens", lambda t: torch.cat((t[:305], t[304:305], t[306:]))),
        "warning",
        good="original",
    )
    yield wrong("linear projector of other values", each("mm_projector.weight", noise), good="original")


def _base_rows(tensors: Tensors) -> None:
    for file in sorted((FIXTURES / SOURCES["original"][0]).glob("*.bin")):
        if "model.embed_tokens.weight" in (found := torch.load(file, weights_only=True)):
            base = found["model.embed_tokens.weight"]
            tensors["model.embed_tokens.weight"][: len(base)] = base


def _configs() -> Iterator[tuple[str, Wrong]]:
    def wrong(name: str, change: Change, seen: Seen = "reference", good: str = "hf") -> tuple[str, Wrong]:
        return name, Wrong("config", good, change, seen)

    text, eye = "text_config", "vision_config"
    yield wrong("rope_theta", config(text, "rope_theta", to=1e6))
    yield wrong("rope_scaling", edited("config.json", lambda v: v[text].update(rope_scaling={"type": "linear", "factor": 2.0})))
    yield wrong(
        "rope_scaling of no kind", edited("config.json", lambda v: v[text].update(rope_scaling={"type": "x", "factor": 2.0})), "rules"
    )
    yield wrong(
        "rope_parameters beside another rope_theta",
        config(text, "rope_parameters", to={"rope_type": "default", "rope_theta": 5e5}),
        "rules",
    )
    yield wrong("attention heads, head_dim left", config(text, "num_attention_heads", to=8), "rules")
    yield wrong(
        "attention heads and head_dim",
        both(*(config(text, k, to=v) for k, v in (("num_attention_heads", 2), ("num_key_value_heads", 2), ("head_dim", 24)))),
    )
    yield wrong("key and value heads", config(text, "num_key_value_heads", to=2), "rules")
    yield wrong("rms_norm_eps", config(text, "rms_norm_eps", to=1e-6))
    yield wrong("rms_norm_eps of no published model", config(text, "rms_norm_eps", to=1e-3), "warning")
    yield wrong("hidden_act", config(text, "hidden_act", to="gelu"), "warning")
    yield wrong("hidden_act unknown", config(text, "hidden_act", to="swiglu"), "rules")
    yield wrong("max_position_embeddings", config(text, "max_position_embeddings", to=2048))
    yield wrong("text model_type", config(text, "model_type", to="mistral"))
    yield wrong("attention_bias", config(text, "attention_bias", to=True), "rules")
    yield wrong("tie_word_embeddings of one of the two configs", config("tie_word_embeddings", to=True), "rules")
    yield wrong("tie_word_embeddings", both(config("tie_word_embeddings", to=True), config(text, "tie_word_embeddings", to=True)), "rules")
    yield wrong("vocab_size", config("vocab_size", to=384), "rules")
    yield wrong("number of layers", config(text, "num_hidden_layers", to=1), "rules")
    yield wrong("eos_token_id of the text model", config(text, "eos_token_id", to=7))
    yield wrong("pad_token_id", config("pad_token_id", to=3), "warning")
    yield wrong("image_token_index", config("image_token_index", to=303), "rules")
    yield wrong("image_seq_length", config("image_seq_length", to=576), "rules")
    yield wrong("vision_feature_layer", config("vision_feature_layer", to=-1))
    yield wrong("vision_feature_select_strategy", config("vision_feature_select_strategy", to="full"), "rules")
    yield wrong(
        "strategy with all that follows from it",
        both(
            config("vision_feature_select_strategy", to="full"),
            config("image_seq_length", to=10),
            config("vision_feature_select_strategy", to="full", file=PROC),
        ),
    )
    yield wrong("projector_hidden_act", config("projector_hidden_act", to="relu"), "warning")
    yield wrong("projector_hidden_act beside an identity", config("projector_hidden_act", to="gelu"), "rules", "linear")
    yield wrong("multimodal_projector_bias", config("multimodal_projector_bias", to=False), "rules")
    yield wrong("model_type llava_next", config("model_type", to="llava_next"), "rules")
    yield wrong("architectures", config("architectures", to=["LlavaNextForConditionalGeneration"]), "warning")
    yield wrong("dtype", both(config("torch_dtype", to="bfloat16"), config("dtype", to="bfloat16")), "warning")
    yield wrong("quantization_config", config("quantization_config", to={"quant_method": "bitsandbytes", "load_in_4bit": True}), "rules")
    yield wrong("tower's image_size", config(eye, "image_size", to=56), "rules")
    yield wrong("tower's image_size in the same patches", config(eye, "image_size", to=48), "rules")
    yield wrong("tower's patch_size", config(eye, "patch_size", to=7), "rules")
    yield wrong("tower's heads", config(eye, "num_attention_heads", to=2))
    yield wrong("tower's hidden_act", config(eye, "hidden_act", to="gelu"))
    yield wrong("tower's layer_norm_eps", config(eye, "layer_norm_eps", to=1e-6), "warning")
    yield wrong("tower's model_type", config(eye, "model_type", to="siglip_vision_model"), "rules")
    yield wrong(
        "pinpoints in config.json alone",
        edited("config.json", lambda v: v.update(image_grid_pinpoints=SWAP(v["image_grid_pinpoints"]))),
        "rules",
        "next",
    )
    yield wrong(
        "pinpoints swapped everywhere",
        both(*(edited(f, lambda v: v.update(image_grid_pinpoints=SWAP(v["image_grid_pinpoints"]))) for f in ("config.json", PRE))),
        good="next",
    )
    yield wrong("model_type llava of a llava_next", both(config("model_type", to="llava")), "rules", "next")
    yield wrong("original: rope_theta", config("rope_theta", to=1e6), good="original")
    yield wrong(
        "original: attention heads", both(config("num_attention_heads", to=2), config("num_key_value_heads", to=2)), good="original"
    )
    yield wrong("original: rms_norm_eps", config("rms_norm_eps", to=1e-5), good="original")
    yield wrong("original: bos and eos ids of 2023", both(config("bos_token_id", to=0), config("eos_token_id", to=1)), "rules", "original")
    yield wrong("original: mm_projector_type", config("mm_projector_type", to="mlp2x_gelu"), "rules", "original")
    yield wrong("original: mm_vision_select_layer", config("mm_vision_select_layer", to=-1), good="original")
    yield wrong("original: mm_vision_select_layer missing", config("mm_vision_select_layer"), "rules", "original")
    yield wrong("original: mm_vision_select_feature of no kind", config("mm_vision_select_feature", to="cls"), "rules", "original")
    yield wrong("original: mm_vision_tower", config("mm_vision_tower", to="openai/clip-vit-large-patch14-336"), good="original")
    yield wrong("original: mm_use_im_start_end", config("mm_use_im_start_end", to=False), good="original")
    yield wrong("original: model_type", config("model_type", to="llama"), "warning", "original")
    yield wrong("original: tie_word_embeddings", config("tie_word_embeddings", to=True), "rules", "original")
    yield wrong("original: quantization_config", config("quantization_config", to={"quant_method": "gptq", "bits": 4}), "rules", "original")


def _tokenizers() -> Iterator[tuple[str, Wrong]]:
    def wrong(name: str, change: Change, seen: Seen = "reference", good: str = "hf") -> tuple[str, Wrong]:
        return name, Wrong("tokenizer", good, change, seen)

    yield wrong("tokenizer.json's vocabulary rotated", vocabulary(lambda names: [*names[1:], names[0]]), "rules")
    yield wrong("two pieces of tokenizer.json exchanged", vocabulary(lambda n: [*n[:5], n[6], n[5], *n[7:]]), "rules")
    yield wrong("tokenizer.json of another tokenizer", vocabulary(lambda names: [f"x{i}" for i in range(len(names))]), "rules")
    yield wrong("merges reversed", merges(lambda m: m[::-1]), "rules")
    yield wrong("two merges exchanged", merges(lambda m: [*m[:3], m[10], *m[4:10], m[3], *m[11:]]), "rules")
    yield wrong("half of the merges missing", merges(lambda m: m[: len(m) // 2]), "rules")
    yield wrong("byte_fallback off", config("model", "byte_fallback", to=False, file="tokenizer.json"), "rules")
    yield wrong("unknown token", config("model", "unk_token", to="</s>", file="tokenizer.json"), "rules")
    yield wrong("another token before each text", edited("tokenizer.json", _other_start), "rules")
    yield wrong("no token before a text, by tokenizer.json", edited("tokenizer.json", _no_start), "rules")
    yield wrong("add_bos_token", config("add_bos_token", to=False, file=TOK), "rules")
    yield wrong("add_eos_token", config("add_eos_token", to=True, file=TOK), "rules")
    yield wrong("ids of image and pad token exchanged", both(added("<image>", id=305), added("<pad>", id=304)), "rules")
    yield wrong("image token not in tokenizer.json", lacking("<image>"), "warning")
    yield wrong("image token not special", added("<image>", special=False), "warning")
    yield wrong(
        "an id of added_tokens.json of another token", edited("added_tokens.json", lambda v: {"<im_patch>": 304, "<pad>": 305}), "rules"
    )
    yield wrong("a token that only added_tokens.json has", edited("added_tokens.json", lambda v: v.update({"<im_start>": 306})), "warning")
    yield wrong("a token without a row", edited("added_tokens.json", lambda v: v.update({"<im_start>": 32003})), "rules")
    yield wrong("tokenizer.model rotated", pieces(lambda p: [*p[1:], p[0]]), "rules")
    yield wrong("tokenizer.model of another size", pieces(lambda p: p[:-1]), "rules")
    yield wrong(
        "eos_token of another token", both(*(config("eos_token", to="<image>", file=f) for f in (TOK, "special_tokens_map.json"))), "rules"
    )
    yield wrong("bos_token is eos", both(*(config("bos_token", to="</s>", file=f) for f in (TOK, "special_tokens_map.json"))), "rules")
    yield wrong("legacy", config("legacy", to=False, file=TOK), "warning")
    yield wrong("padding_side", config("padding_side", to="right", file=TOK))
    yield wrong("normalizer without a blank", edited("tokenizer.json", lambda v: v["normalizer"]["normalizers"].pop(0) and None), "warning")
    yield wrong(
        "another image token in tokenizer_config.json", config("extra_special_tokens", to={"image_token": "<pad>"}, file=TOK), "rules"
    )
    yield wrong("split_special_tokens", config("split_special_tokens", to=True, file=TOK), "rules")
    yield wrong(
        "truncation in tokenizer.json",
        config("truncation", to={"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}, file="tokenizer.json"),
        "warning",
    )
    yield wrong("no fallback on bytes in the decoder", edited("tokenizer.json", lambda v: v["decoder"]["decoders"].pop(1) and None))
    yield wrong("model_max_length", config("model_max_length", to=512, file=TOK))
    yield wrong("clean_up_tokenization_spaces", config("clean_up_tokenization_spaces", to=True, file=TOK))
    yield wrong("original: tokenizer.model rotated", pieces(lambda p: [*p[1:], p[0]]), "rules", good="original")
    yield wrong(
        "original: ids of added tokens exchanged",
        edited("added_tokens.json", lambda v: {**v, "<im_start>": v["<im_end>"], "<im_end>": v["<im_start>"]}),
        "rules",
        good="original",
    )
    yield wrong(
        "original: an added token missing",
        both(
            edited("added_tokens.json", lambda v: {k: i for k, i in v.items() if k != "<im_end>"}),
            edited("tokenizer.json", lambda v: v.update(added_tokens=[e for e in v["added_tokens"] if e["content"] != "<im_end>"])),
        ),
        good="original",
    )


def _other_start(value: Any) -> None:
    value["post_processor"]["special_tokens"]["<s>"]["ids"] = [2]


def _no_start(value: Any) -> None:
    value["post_processor"] = None


def _nested_siglip(value: Any) -> None:
    """As transformers 5 writes and reads it; 4 reads preprocessor_config.json, which is right."""
    value["image_processor"] = {"image_processor_type": "CLIPImageProcessor", "image_mean": SIGLIP, "image_std": SIGLIP, "size": 42}


def _adapter(folder: Path) -> None:
    value = {"peft_type": "LORA", "base_model_name_or_path": "someone/else", "r": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(value))


def _stale_file(folder: Path) -> None:
    """Weights of an earlier download, which transformers prefers to the shards of an index."""
    tensors = {name: tensor.flip(0) for path in shards(folder) for name, tensor in load_file(path).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _processors() -> Iterator[tuple[str, Wrong]]:
    def wrong(name: str, change: Change, seen: Seen = "reference", good: str = "hf", part: str = "processor") -> tuple[str, Wrong]:
        return name, Wrong(part, good, change, seen)

    yield wrong(
        "image mean and std of SigLIP", both(config("image_mean", to=SIGLIP, file=PRE), config("image_std", to=SIGLIP, file=PRE)), "rules"
    )
    yield wrong("image std of SigLIP", config("image_std", to=SIGLIP, file=PRE), "rules")
    yield wrong("image mean of ImageNet", config("image_mean", to=[0.485, 0.456, 0.406], file=PRE), "warning")
    yield wrong("image mean in 0 to 255", config("image_mean", to=[122.77, 116.74, 104.09], file=PRE), "rules")
    yield wrong("rescale_factor", config("rescale_factor", to=1 / 127.5, file=PRE), "rules")
    yield wrong("do_normalize", config("do_normalize", to=False, file=PRE), "rules")
    yield wrong("do_rescale", config("do_rescale", to=False, file=PRE), "rules")
    yield wrong("do_resize", config("do_resize", to=False, file=PRE), "rules")
    yield wrong("do_convert_rgb", config("do_convert_rgb", to=False, file=PRE), "warning")
    yield wrong("resample", config("resample", to=0, file=PRE), "warning")
    yield wrong(
        "image size",
        both(config("size", to={"shortest_edge": 28}, file=PRE), config("crop_size", to={"height": 28, "width": 28}, file=PRE)),
        "rules",
    )
    yield wrong("crop size", config("crop_size", to={"height": 28, "width": 28}, file=PRE), "rules")
    yield wrong("image processor of llava_next", config("image_processor_type", to="LlavaNextImageProcessor", file=PRE), "rules")
    yield wrong(
        "image processor of CLIP for a llava_next", config("image_processor_type", to="CLIPImageProcessor", file=PRE), "rules", "next"
    )
    yield wrong("pinpoints of the image processor", config("image_grid_pinpoints", to=[[42, 84]], file=PRE), "rules", "next")
    yield wrong("no preprocessor_config.json", without(PRE), "rules")
    yield wrong("another image processor in processor_config.json", edited(PROC, _nested_siglip), "rules")
    yield wrong("patch_size", config("patch_size", to=16, file=PROC), "rules")
    yield wrong("num_additional_image_tokens", config("num_additional_image_tokens", to=0, file=PROC), "rules")
    yield wrong("strategy of the processor", config("vision_feature_select_strategy", to="full", file=PROC), "rules")
    yield wrong("image_token", config("image_token", to="<pad>", file=PROC), "rules")
    yield wrong("processor_class", config("processor_class", to="LlavaNextProcessor", file=PROC), "rules")

    yield wrong("system text", template(lambda t: "You are a pirate. " + t), part="template")
    yield wrong("roles", template(lambda t: t.replace("ASSISTANT", "BOT")), part="template")
    yield wrong("template of one file", template(lambda t: t + " ", "chat_template.json"), "rules", part="template")
    yield wrong("image token left out", template(lambda t: t.replace("<image>", "")), "warning", part="template")
    yield wrong(
        "another template in tokenizer_config.json",
        config("chat_template", to="{{ messages }}<image>", file=TOK),
        "warning",
        part="template",
    )

    yield wrong("eos_token_id", config("eos_token_id", to=1, file=GEN), "rules", part="generation")
    yield wrong("eos_token_id missing", config("eos_token_id", file=GEN), "rules", part="generation")
    yield wrong("pad_token_id of generation", config("pad_token_id", to=0, file=GEN), "rules", part="generation")
    yield wrong("temperature", both(config("do_sample", to=True, file=GEN), config("temperature", to=5.0, file=GEN)), part="generation")
    yield wrong(
        "temperature below 0",
        both(config("do_sample", to=True, file=GEN), config("temperature", to=-1.0, file=GEN)),
        "rules",
        part="generation",
    )
    yield wrong("suppressed tokens", config("suppress_tokens", to=[2, 100], file=GEN), "warning", part="generation")
    yield wrong("one more end of text", config("eos_token_id", to=[2, 100], file=GEN), part="generation")
    yield wrong("max_new_tokens", config("max_new_tokens", to=1, file=GEN), part="generation")
    yield wrong("no_repeat_ngram_size", config("no_repeat_ngram_size", to=2, file=GEN), part="generation")
    yield wrong("max_length", config("max_length", to=30, file=GEN), part="generation")


WRONG: Mapping[str, Wrong] = dict((*_weights(), *_configs(), *_tokenizers(), *_processors()))


def _resharded(folder: Path) -> None:
    tensors = {name: tensor for path in shards(folder) for name, tensor in load_file(path).items()}
    for path in shards(folder):
        path.unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _pairs(value: Any) -> None:
    value["model"]["merges"] = [merge.split(" ") for merge in value["model"]["merges"]]


# Changes that another writer makes and that mean nothing: no mode may fail on them, once the records are made anew.
RIGHT: Mapping[str, Change] = {
    "one file in place of shards": _resharded,
    "config.json with its keys in another order": edited("config.json", lambda v: dict(reversed(v.items()))),
    "config.json without what its class assumes": edited("config.json", lambda v: v.pop("ignore_index") and None),
    "config.json of another version": config("transformers_version", to="4.45.2"),
    "merges as pairs": edited("tokenizer.json", _pairs),
    "a generation config that says its defaults": config("num_beams", to=1, file=GEN),
    "size as a height and a width": config("crop_size", to=42, file=PRE),
    "another README.md": lambda folder: (folder / "README.md").write_text("A model.\n"),
    "special tokens as objects": edited("special_tokens_map.json", lambda v: v.update(eos_token={"content": "</s>", "lstrip": False,
        "normalized": False, "rstrip": False, "single_word": False})),
}  # fmt: skip

# --- the table of docs/reliability.md ---------------------------------------------------------------------------------

DOCUMENT, START, END = (
    ROOT / "docs" / "reliability.md",
    "<!-- made by tests/wrong_checkpoints.py -->\n",
    "<!-- end -->\n",
)
COLUMNS: tuple[tuple[str, str, Records], ...] = (
    ("`verify`", "plain", "stale"),
    ("`--deep`", "deep", "stale"),
    ("`verify`, records made anew", "plain", "rewritten"),
    ("`--deep`, records made anew", "deep", "rewritten"),
    ("`--against FOLDER`", "folder", "rewritten"),
    ("`--against MANIFEST`", "manifest", "rewritten"),
    ("`--base`", "base", "rewritten"),
)


def cells(wrong: Wrong) -> tuple[str, ...]:
    """The exit code in each column, `0 w` where a warning names it, a dash where there can be no such records."""

    def cell(mode: str, records: Records) -> str:
        kept = records if records in wrong.records else "none" if mode not in ("plain", "deep") else None
        code, warned = expected(wrong, mode, kept) if kept else (None, False)
        return "-" if code is None else f"{code}{' w' * warned}"

    return tuple(cell(mode, records) for _, mode, records in COLUMNS)


def table() -> str:
    """Every change and what each mode says, changes of one part and the same outcome in one row."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, wrong in WRONG.items():
        groups.setdefault((wrong.part, cells(wrong)), []).append(name)
    lines = [f"| part | changes | {' | '.join(title for title, _, _ in COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    lines += [f"| {part} | {'; '.join(names)} | {' | '.join(found)} |" for (part, found), names in sorted(groups.items(), key=_order)]
    return "\n".join(lines) + "\n"


def _order(group: tuple[tuple[str, tuple[str, ...]], list[str]]) -> tuple[int, tuple[str, ...]]:
    (part, found), _ = group
    return list(dict.fromkeys(wrong.part for wrong in WRONG.values())).index(part), tuple(reversed(sorted(found)))


def documented() -> str:
    """The table as it stands in docs/reliability.md."""
    return DOCUMENT.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    DOCUMENT.write_text(f"{before}{START}{table()}{END}{rest.partition(END)[2]}", encoding="utf-8")
