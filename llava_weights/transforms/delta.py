"""base + delta, and the inverse: what LLaVA's and FastChat's apply_delta and make_delta compute, as lazy tensors.

The rules are those of haotian-liu/LLaVA 8959d5c: both sides are cast to fp16 first, added once over the rows that both have;
rows beyond the base's (added tokens) and the projector are the delta's own; rotary buffers are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..checkpoint.checkpoint import Checkpoint, CheckpointSource, Step, main_dtype, opened
from ..checkpoint.config import repair_config, repair_generation_config
from ..checkpoint.hf_tokenizer import with_fast
from ..checkpoint.kinds import kind_of, refuse_kind
from ..checkpoint.small_files import small_object
from ..checkpoint.tokenizer import repair_tokenizer
from ..errors import InputError, MismatchError, one_of
from ..families.layouts import MULTIMODAL, PROJECTOR, VOCABULARY
from ..formats.integer_delta import AddInteger, ToInteger, index_integer_delta, is_integer_delta
from ..storage.strict_json import json_bytes
from ..tensors.lazy import FLOATS, Add, LazyTensor, Subtract, cast
from ..text import few
from .base_check import Examination, examine_apply, examine_integer, examine_make

CODECS = ("arithmetic", "integer")


def apply_delta(base: CheckpointSource, delta: CheckpointSource, *, accept_base: bool = False) -> Checkpoint:
    """`base` + `delta`: a checkpoint in the layout of the delta, in F16 (of a lossless delta: in the dtypes of the tuned model), with
    repaired config and tokenizer. Nothing is written.

    `base` is an original LLaMA (in the Hub's layout or Meta's), `delta` what LLaVA's or Vicuna's authors published, or what `make_delta`
    made. The sum has the bits of LLaVA's own `apply_delta.py`: float16 of each value, added and rounded once; rows and tensors that the
    base lacks are the delta's. A few MB of both are read to see that they belong together. With `accept_base`, doubts about the values of
    the base (not about its shapes) become warnings of the last step.

    Raises UsageError for what is no path or name, InputError where an input is damaged or is not what its role needs, MismatchError where
    the two do not fit, HubError where the Hub can't serve one.
    """
    base, delta = opened(base, "base"), opened(delta, "delta")
    for role, checkpoint in (("base", base), ("delta", delta)):
        refuse_kind(kind_of(checkpoint), checkpoint, role)
    if is_integer_delta(delta.metadata):
        tensors, examination = _apply_integer(base, delta)
    else:
        examination = examine_apply(base, delta, accept_base=accept_base)
        tensors = _apply_arithmetic(base, delta)
    return _finish(base, delta, tensors, examination)


def _apply_arithmetic(base: Checkpoint, delta: Checkpoint) -> dict[str, LazyTensor]:
    base_tensors, delta_tensors = _untied(base), delta.parameters()
    _check_names(base_tensors, delta_tensors)
    return {name: _sum(name, base_tensors.get(name), tensor) for name, tensor in delta_tensors.items()}


def _untied(base: Checkpoint) -> dict[str, LazyTensor]:
    """The base's tensors, with the head that a tied model does not store: it is the embedding, as transformers loads it."""
    tensors = base.parameters()
    if base.config.get("tie_word_embeddings") is True and VOCABULARY[0] in tensors:
        tensors.setdefault(VOCABULARY[1], tensors[VOCABULARY[0]])
    return tensors


def _sum(name: str, base: LazyTensor | None, delta: LazyTensor) -> LazyTensor:
    if delta.dtype not in FLOATS or (base and base.dtype not in FLOATS):
        dtypes = {"delta": delta.dtype, "base": base.dtype if base else "none"}
        raise InputError(f"`{name}` does not hold floats", facts=dtypes, hint="use the unquantised 16-bit weights")
    if base is None:
        return cast(delta, "F16")
    _check_shape(name, base, delta)
    return Add(dtype="F16", shape=delta.shape, base=cast(base, "F16"), delta=cast(delta, "F16"))


def _apply_integer(base: Checkpoint, delta: Checkpoint) -> tuple[dict[str, LazyTensor], Examination]:
    differences = index_integer_delta(delta.tensors, delta.metadata)
    base_tensors = _untied(base)
    tensors = {name: difference.onto(base_tensors.get(name)) for name, difference in differences.items()}
    return tensors, examine_integer(tensors)


def make_delta(base: CheckpointSource, tuned: CheckpointSource, *, codec: str = "arithmetic") -> Checkpoint:
    """`tuned` - `base`: the delta to publish, with config and tokenizer of `tuned` as they are. Nothing is written.

    `codec` is "arithmetic", the published form: float16 differences, from which a value may come back off by one unit in the last place
    (how many do is counted while writing); or "integer", which gives every bit back and is smaller where little changed.

    Raises UsageError for another codec and for what is no path or name, InputError where an input is damaged, MismatchError where names or
    shapes do not fit, HubError where the Hub can't serve one.
    """
    one_of("codec", codec, CODECS)
    base, tuned = opened(base, "base"), opened(tuned, "tuned model")
    for role, checkpoint in (("base", base), ("tuned model", tuned)):
        refuse_kind(kind_of(checkpoint), checkpoint, role)
    examination = examine_make(base, tuned)
    base_tensors, tuned_tensors = _untied(base), tuned.parameters()
    _check_names(base_tensors, tuned_tensors, role="tuned model")
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in tuned_tensors.items():
        original = base_tensors.get(name)
        if original is not None:
            _check_shape(name, original, tensor, role="tuned model")
        tensors[name] = _difference(name, original, tensor, codec)
    common = [name for name in tuned_tensors if name in base_tensors]
    grown = sum(base_tensors[name].rows < tuned_tensors[name].rows for name in common)
    summary = {
        "subtract": f"{len(common)} tensors ({codec})" + (f"; {grown} of them have rows that the base lacks" if grown else ""),
        "keep": _keep(tuned_tensors, base_tensors),
    }
    step = Step(
        "make-delta",
        (("base", base.origin), ("tuned", tuned.origin)),
        {"codec": codec},
        {key: value for key, value in summary.items() if value},
        notes=(*base.notes, *tuned.notes),
        warnings=examination.warnings,
        checks=examination.checks,
    )
    return Checkpoint(tensors, tuned.config, tuned.origin, tuned.files, (*base.history, *tuned.history, step))


def _difference(name: str, base: LazyTensor | None, tuned: LazyTensor, codec: str) -> LazyTensor:
    if tuned.dtype not in FLOATS:
        raise InputError(f"`{name}` does not hold floats", facts={"dtype": tuned.dtype}, hint="give float weights, not quantised ones")
    if codec == "integer":
        if base is not None and base.dtype != tuned.dtype:
            what = f"`{name}` is {tuned.dtype} in the tuned model and {base.dtype} in the base"
            raise MismatchError(what, hint="the integer codec compares bits: give both in one dtype, or use `--codec arithmetic`")
        return ToInteger(dtype=tuned.dtype, shape=tuned.shape, tuned=tuned, base=base)
    if base is None:
        return cast(tuned, "F16")
    return Subtract(dtype="F16", shape=tuned.shape, tuned=cast(tuned, "F16"), base=cast(base, "F16"))


def _check_names(base: Mapping[str, LazyTensor], other: Mapping[str, LazyTensor], *, role: str = "delta") -> None:
    unknown = [name for name in other if name not in base and not re.fullmatch(MULTIMODAL, name)]
    if unknown:
        what, facts = f"{len(unknown)} tensors of the {role} have no counterpart in the base", {f"only in the {role}": few(unknown)}
        raise MismatchError(what, facts=facts, hint="give the original LLaMA weights of the same size as `--base`")
    absent = [name for name in base if name not in other]
    if absent:
        what = f"{len(absent)} tensors of the base are not in the {role}"
        raise MismatchError(what, facts={"only in the base": few(absent)}, hint=f"check that the {role} is complete (all of its shards)")


def _check_shape(name: str, base: LazyTensor, other: LazyTensor, *, role: str = "delta") -> None:
    grows = name in VOCABULARY and base.shape[1:] == other.shape[1:] and base.rows <= other.rows
    if base.shape != other.shape and not grows:
        what = f"`{name}` has shape {list(base.shape)} in the base and {list(other.shape)} in the {role}"
        raise MismatchError(what, hint="give the original LLaMA weights of the same size as `--base`")


def _finish(base: Checkpoint, delta: Checkpoint, tensors: Mapping[str, LazyTensor], examination: Examination) -> Checkpoint:
    """Config, generation config and tokenizer of the merged model: the delta's, repaired."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    rows = shapes[VOCABULARY[0]][0] if VOCABULARY[0] in shapes else 0
    limit = delta.config.get("max_sequence_length") or delta.config.get("max_position_embeddings")
    files, ids, fixed = repair_tokenizer(delta.files, rows=rows, fallback=base.files, model_max_length=limit)
    files, fast = with_fast(files, rows=rows)
    dtype = main_dtype(tensors)
    config, changes = repair_config(delta.config, shapes=shapes, special_ids=ids, dtype=dtype)
    if mode := _conv_mode(delta, examination):
        config = dict(sorted({**config, "conv_mode": mode}.items()))
    generation, more = repair_generation_config(small_object(delta.files, "generation_config.json"), ids, config=config)
    files["generation_config.json"] = json_bytes(generation)
    summary = {"add": _added(tensors), "keep": _keep(tensors, base.tensors), "drop": _dropped(base, delta)}
    step = Step(
        "apply-delta",
        (("base", base.origin), ("delta", delta.origin)),
        {"dtype": dtype, "rule": examination.rule},
        {key: value for key, value in summary.items() if value},
        repairs=(*changes, *more, *fixed, *fast),
        notes=(*base.notes, *delta.notes),
        warnings=examination.warnings,
        checks={"kind": examination.kind, **examination.checks},
    )
    return Checkpoint(tensors, config, delta.origin, files, (*base.history, *delta.history, step))


def _conv_mode(delta: Checkpoint, examination: Examination) -> str | None:
    """LLaVA's name of the prompts that the model was trained with, which its own code guesses from the folder's name.

    Known for published deltas; only the configs of v0 have `max_sequence_length`.
    """
    prompt = examination.checks.get("prompt") or ("v0" if "max_sequence_length" in delta.config else None)
    return f"llava_{prompt}" if prompt in ("v0", "v1") else None


def _added(tensors: Mapping[str, LazyTensor]) -> str:
    bases = {name: tensor.base for name, tensor in tensors.items() if isinstance(tensor, Add | AddInteger) and tensor.base}
    grown = [name for name, base in bases.items() if base.rows < tensors[name].rows]
    text = f"{len(bases)} tensors"
    if grown:
        before, after = bases[grown[0]].rows, tensors[grown[0]].rows
        text += f"; {' and '.join(name.split('.')[-2] for name in grown)} grow from {before} to {after} rows"
    return text


def _keep(tensors: Mapping[str, LazyTensor], base: Mapping[str, LazyTensor]) -> str:
    own = [name for name in tensors if name not in base]
    kinds = sorted({"mm_projector" if re.fullmatch(PROJECTOR, name) else name.split(".")[1] for name in own})
    return f"{len(own)} tensors that the base lacks ({', '.join(kinds)})" if own else ""


def _dropped(base: Checkpoint, delta: Checkpoint) -> str:
    names = (set(base.tensors) - set(base.parameters())) | (set(delta.tensors) - set(delta.parameters()))
    return f"{len(names)} rotary buffers that no program reads" if names else ""
