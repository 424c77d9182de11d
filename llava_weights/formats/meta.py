"""Meta's own release of LLaMA (`consolidated.NN.pth` and `params.json`) as the tensors of a Hugging Face checkpoint, lazily.

Each tensor was cut into as many pieces as there are files (1, 2, 4 or 8: model parallelism). Names, the axis of each cut and
the reordering of q and k are those of transformers 4.31's convert_llama_weights_to_hf.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..families.decoders import DECODER_BY_TYPE
from ..families.layouts import MetaName, meta_names
from ..families.shapes import MAX_LAYERS
from ..storage.places import Place, names_in
from ..storage.strict_json import load_object
from ..tensors.dtypes import TORCH_DTYPE
from ..tensors.lazy import LazyTensor, PermuteRope, Stored, concat
from ..text import listed, shown
from .torch_zip import index_torch_zip

PIECES = (1, 2, 4, 8)
LENGTHS = ("dim", "n_layers", "n_heads", "n_kv_heads")
MAX_LENGTH = 1 << 20
ROTARY_FREQUENCIES = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")  # transformers computes them itself
META_DTYPES = ("F16", "BF16", "F32")
GIVE_ALL = "give the folder of one model size with params.json and every consolidated.NN.pth of the same download"


@dataclass(frozen=True)
class Params:
    """params.json, and the two sizes that only the tensors have."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    norm_eps: float
    rope_theta: float
    vocabulary: int
    intermediate: int

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by the keys of a config.json."""
        return {
            "hidden_size": self.dim, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.dim // self.heads, "vocab_size": self.vocabulary,
            "intermediate_size": self.intermediate,
        }  # fmt: skip


def index_meta(folder: Place) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """The model of a folder in transformers' names and order, and the config.json that transformers 4.31 would write for it.

    The rotary frequencies are left out. Raises InputError unless params.json, number of files, names, dtypes and shapes fit together.
    """
    paths = _paths(folder)
    pieces = [index_torch_zip(path) for path in paths]
    params = _params(folder / "params.json", pieces[0], len(pieces))
    rules, shapes = meta_names(params.layers), DECODER_BY_TYPE["llama"].shapes(params.sizes)
    for path, piece in zip(paths, pieces, strict=True):
        _check_names(path, piece, {rule.meta for rule in rules})
        _check_shapes(path, piece, rules, shapes, len(pieces))
    dtypes = {piece[rule.meta].dtype for piece in pieces for rule in rules}
    if len(dtypes) > 1 or not dtypes <= {*META_DTYPES}:
        raise InputError(
            f"the weights have the dtypes {listed(sorted(dtypes))}, not one float dtype", facts={"folder": folder}, hint=GIVE_ALL
        )
    tensors = {rule.name: _joined(rule, [piece[rule.meta] for piece in pieces], params) for rule in rules}
    return tensors, _config(params, dtypes.pop())


def _paths(folder: Place) -> list[Place]:
    """The model-parallel files in order, none missing."""
    found = [name for name in names_in(folder) if re.fullmatch(r"consolidated\..*\.pth", name)]
    expected = [f"consolidated.{number:02}.pth" for number in range(len(found))]
    if not found:
        raise InputError(f"there is no `consolidated.00.pth` in {shown(folder.name)}", facts={"folder": folder}, hint=GIVE_ALL)
    if found != expected:
        missing = [name for name in expected if name not in found]
        raise InputError(
            f"the numbering has a gap: {listed(missing)} is missing", facts={"folder": folder, "found": listed(found)}, hint=GIVE_ALL
        )
    if len(found) not in PIECES:
        what = f"there are {len(found)} consolidated files, Meta cut its models into 1, 2, 4 or 8"
        raise InputError(what, facts={"folder": folder, "found": listed(found)}, hint=GIVE_ALL)
    return [folder / name for name in found]


def _params(path: Place, first: Mapping[str, Stored], count: int) -> Params:
    """params.json, completed from the tensors of the first file. Raises InputError where the two do not fit."""
    values = _read_params(path)
    dim = values["dim"]
    vocabulary, columns = _matrix(path, first, "tok_embeddings.weight")
    if columns * count != dim:
        what = f"the model was cut into {dim / columns:.3g} files, found {count}"
        facts = {"folder": path.parent, "`tok_embeddings.weight`": f"{columns} columns a file, {shown(path.name)} says {dim} in all"}
        raise InputError(what, facts=facts, hint=GIVE_ALL)
    if values.get("vocab_size", -1) not in (-1, vocabulary):
        what = f"{shown(path.name)} says {shown(str(values['vocab_size']))} tokens, `tok_embeddings.weight` has {vocabulary} rows"
        raise InputError(what, facts={"path": path}, hint=GIVE_ALL)
    intermediate = _matrix(path, first, "layers.0.feed_forward.w1.weight")[0] * count
    layers, heads, kv_heads = values["n_layers"], values["n_heads"], values["n_kv_heads"]
    return Params(dim, layers, heads, kv_heads, values["norm_eps"], values["rope_theta"], vocabulary, intermediate)


def _read_params(path: Place) -> dict[str, Any]:
    """params.json with the defaults of later releases filled in. Raises InputError where the values can't be a model's."""
    values = load_object(path)
    values = {"rope_theta": 10000.0, "n_kv_heads": values.get("n_heads")} | {
        key: value for key, value in values.items() if value is not None
    }
    bad = [name for name in LENGTHS if type(values.get(name)) is not int or not 0 < values[name] <= MAX_LENGTH]
    bad += [name for name in ("norm_eps", "rope_theta") if type(values.get(name)) not in (int, float) or values[name] <= 0]
    if bad:
        raise InputError(f"{shown(path.name)} has no usable {listed(bad)}", facts={"path": path}, hint=GIVE_ALL)
    dim, layers, heads, kv_heads = (values[name] for name in LENGTHS)
    if dim % (2 * heads) or heads % kv_heads or layers > MAX_LAYERS:
        what = f"{shown(path.name)} describes no model: dim {dim}, {heads} heads, {kv_heads} key-value heads, {layers} layers"
        raise InputError(what, facts={"path": path}, hint=GIVE_ALL)
    return values


def _matrix(path: Place, first: Mapping[str, Stored], name: str) -> tuple[int, int]:
    """The shape of a matrix from which lengths are taken."""
    shape = first[name].shape if name in first else ()
    if len(shape) != 2 or 0 in shape:
        what = f"`consolidated.00.pth` has no matrix `{name}`"
        raise InputError(what, facts={"folder": path.parent, "tensors": listed(first)}, hint=GIVE_ALL)
    return shape


def _check_names(path: Place, piece: Mapping[str, Stored], expected: set[str]) -> None:
    if missing := [name for name in sorted(expected) if name not in piece]:
        what = f"{shown(path.name)} lacks {len(missing):,} tensors that params.json asks for: {listed(missing)}"
        raise InputError(what, facts={"path": path}, hint=GIVE_ALL)
    if unknown := [name for name in piece if name not in expected and not ROTARY_FREQUENCIES.fullmatch(name)]:
        what = f"{shown(path.name)} holds {len(unknown):,} tensors that LLaMA does not have: {listed(unknown)}"
        raise InputError(what, facts={"path": path}, hint=GIVE_ALL)


def _check_shapes(
    path: Place, piece: Mapping[str, Stored], rules: Iterable[MetaName], shapes: Mapping[str, tuple[int, ...]], count: int
) -> None:
    for rule in rules:
        shape = list(shapes[rule.name])
        if rule.cut is not None:
            shape[rule.cut] //= count
        if list(piece[rule.meta].shape) != shape:
            what = f"{shown(rule.meta)} in {shown(path.name)} has the shape {list(piece[rule.meta].shape)}, expected {shape}"
            raise InputError(what, facts={"path": path, "files": count}, hint=GIVE_ALL)


def _joined(rule: MetaName, pieces: list[Stored], params: Params) -> LazyTensor:
    whole = pieces[0] if rule.cut is None else concat(tuple(pieces), rule.cut)
    if not rule.heads:
        return whole
    return PermuteRope(dtype=whole.dtype, shape=whole.shape, source=whole, heads=params.sizes[rule.heads])


def _config(params: Params, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": params.dim,
        "initializer_range": 0.02,
        "intermediate_size": params.intermediate,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": params.heads,
        "num_hidden_layers": params.layers,
        "num_key_value_heads": params.kv_heads,
        "pad_token_id": 0,
        "rms_norm_eps": params.norm_eps,
        "rope_theta": params.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": TORCH_DTYPE[dtype],
        "use_cache": True,
        "vocab_size": params.vocabulary,
    }
