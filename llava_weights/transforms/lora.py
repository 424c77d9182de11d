"""Merge adapters into a base. Every tensor of an adapter must have a place in the base, or nothing starts.

The arithmetic is in `tensors/low_rank.py`, the reader of adapters in `adapter.py`. Several adapters are summed in one accumulation and
rounded once: W + sum of weight_i * scale_i * B_i A_i, the true weighted sum. (PEFT's "linear" combination mixes the factors
instead, and its cross terms make another update.)
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args
from typing import cast as cast_type

from ..checkpoint.added_tokens import without_stale_list
from ..checkpoint.checkpoint import Checkpoint, CheckpointSource, Step, layout_of, main_dtype, need_files, opened, to_place
from ..checkpoint.config import QUANTIZATION, quantization_notes, repair_config, repair_generation_config
from ..checkpoint.hf_tokenizer import with_fast
from ..checkpoint.images import reads_newline
from ..checkpoint.kinds import kind_of, refuse_kind
from ..checkpoint.small_files import small_object
from ..checkpoint.tokenizer import read_special_ids, repair_tokenizer
from ..checkpoint.tower import holds_tower, named_tower, tower_hint
from ..errors import HubError, InputError, MismatchError, UsageError, finite, one_of
from ..families.layouts import MULTIMODAL, VOCABULARY, VOCABULARY_TABLES, BaseNames, canonical, placed, spelled
from ..families.targets import TOWER_KEYS
from ..families.xtuner import ADAPTERS, TOWER
from ..storage.hub import may_be_revised
from ..storage.strict_json import json_bytes
from ..tensors.dtypes import TORCH_DTYPE, to_dtype
from ..tensors.lazy import LazyTensor, ReplaceRows, cast
from ..tensors.low_rank import Arithmetic, LowRank, add_low_rank, fits
from ..text import few
from .adapter import Adapter, Module, open_adapter
from .adapter_config import short_base
from .adapter_tokens import asked_tokens, check_rows, explaining_files, in_base_vocabulary
from .adapter_tower import with_tower
from .quantised_training import Training, recorded_training, round_base, settled, to_rounding

UNTOLD = "nothing says in which way"
NO_TOWER = "no config names the vision tower: set `mm_vision_tower` in the output's config.json"

AdapterSource = Adapter | str | Path  # what a public function takes as an adapter: one that is open, or where it is
Adapters = AdapterSource | Sequence[AdapterSource | tuple[AdapterSource, float]]  # one or several, each with its weight or without


@dataclass
class Placed:
    """What happens to one tensor of the base: a whole new value first, then rows, then updates."""

    replacement: LazyTensor | None = None
    rows: tuple[tuple[int, ...], LazyTensor] | None = None
    updates: list[LowRank] = field(default_factory=list)


def merge_lora(
    base: CheckpointSource,
    adapters: Adapters,
    *,
    arithmetic: Arithmetic = "peft",
    scale: float = 1.0,
    dtype: str | None = None,
    base_quantized: str | None = None,
    tower: CheckpointSource | None = None,
    accept_tower: bool = False,
) -> Checkpoint:
    """`base` with `adapters` merged in: a checkpoint in the layout of the base, in its own dtype or in `dtype` ("F16", "BF16", "F32").
    Nothing is written.

    `adapters` is one adapter or a list: each open, or a path, a name on the Hub or an address; (adapter, 0.5) weighs one, and so does
    "PATH@0.5". `scale` multiplies all of them. Names are matched across layouts. `arithmetic` says how the sum of a weight and its update
    is rounded: "peft" as PEFT's `merge_and_unload()` (0.21.2), "peft-safe" as with `safe_merge=True`, "peft-half" as PEFT 0.7 to 0.11 and
    so LLaVA's own merges of 2024, "exact" computes in float64 and rounds once, with the same bits on every machine.

    `base_quantized` ("nf4", "nf4-double", "fp4", "fp4-double", "int8") first gives the decoder's matrices the values that bitsandbytes made
    of them while a QLoRA was trained; by default the update goes into the weights as they are stored. Rounded is what `dtype` made of them.

    `tower` is the vision tower, where adapters change one that the base does not hold; the result then holds it. With `accept_tower` it
    may be another published one than the config names.

    Raises UsageError for a value that an option can't have, InputError where an input is damaged or the base is quantised or of a family
    that nothing here reads, InputError or MismatchError, naming the tensors, where an adapter's tensor has no place in the base or does
    not fit it, HubError where the Hub can't serve one.
    """
    dtype = check_merge(arithmetic=arithmetic, scale=scale, dtype=dtype, base_quantized=base_quantized)
    base, weighted = with_own_adapters(opened(base, "base", unmerged=True))[0], _weighted(adapters)
    refuse_kind(kind_of(base), base, "base")
    tensors = {name: cast(tensor, dtype) if dtype else tensor for name, tensor in base.parameters().items()}
    clip = opened(tower, "tower") if tower is not None else None
    joined = with_tower(base, tensors, [adapter for adapter, _ in weighted], clip, accept=accept_tower)
    tensors |= joined
    untied = _untie(base, tensors, weighted)
    places: defaultdict[str, Placed] = defaultdict(Placed)
    tokens = read_special_ids(base.files, base.vocabulary).added if base.vocabulary else {}
    moved = [in_base_vocabulary(base, adapter, tensors) for adapter, _ in weighted]
    weighted = [
        (replace(adapter, notes=(*adapter.notes, *told)), weight) for (adapter, told), (_, weight) in zip(moved, weighted, strict=True)
    ]
    check_rows(base, [adapter for adapter, _ in weighted], tensors)
    for adapter, weight in weighted:
        _place(adapter, weight * scale, tensors, tokens, places)
    _drop_old_projector(tensors, places)
    recorded = recorded_training(base, [adapter for adapter, _ in weighted])
    training = settled(base_quantized, recorded) if base_quantized else None
    rounded = round_base(tensors, training) if training else {}
    merged = {
        name: cast(_merged(name, rounded.get(name, tensor), places.pop(name, Placed()), arithmetic), tensor.dtype)
        for name, tensor in tensors.items()
    }
    for name, place in places.items():  # what the base lacks: a projector, an image_newline, a tuned tower
        assert place.replacement is not None
        merged[name] = cast(place.replacement, dtype or main_dtype(tensors))
    made = _finish(base, weighted, merged, untied, arithmetic, scale)
    if joined and clip:
        step = made.history[-1]
        told = {**step.summary, "tower": f"{len(joined)} tensors from `{clip.origin.name}`, which the adapter changes"}
        made = replace(made, history=(*made.history[:-1], replace(step, inputs=(*step.inputs, ("tower", clip.origin)), summary=told)))
    if recorded is None and (named := next((str(adapter.peft["quantised"]) for adapter, _ in weighted if "quantised" in adapter.peft), "")):
        recorded = Training("", UNTOLD, named)
    return _told_of_rounding(made, recorded, training, len(rounded))


def with_own_adapters(checkpoint: Checkpoint, tower: Checkpoint | None = None) -> tuple[Checkpoint, Checkpoint | None]:
    """`checkpoint` with the adapters that its folders hold merged in, and `tower`, where it holds none of its own, with that of a tower.

    Raises InputError where a part is missing, by its name, and as `merge_lora`."""
    folders = checkpoint.folders
    if folders is None:
        return checkpoint, tower
    folders.refuse(checkpoint.origin.name)
    if not folders.adapters:
        return checkpoint, tower
    need_files(checkpoint, "a merge of its own adapters")
    given = {name: open_adapter(path) for name, path in folders.adapters.items()}
    checkpoint = replace(checkpoint, folders=replace(folders, adapters={}))
    inside = holds_tower(checkpoint)
    own = [
        _of_tower(adapter) if ADAPTERS[name] == TOWER else adapter for name, adapter in given.items() if inside or ADAPTERS[name] != TOWER
    ]
    if own:
        merged = merge_lora(checkpoint, own)
        *before, step = merged.history
        step = replace(
            step, warnings=tuple(text for text in step.warnings if text != NO_TOWER)
        )  # what comes next takes a tower, or says it
        checkpoint = replace(merged, config={**checkpoint.config, **merged.config}, history=(*before, step))
    trained = [adapter for name, adapter in given.items() if ADAPTERS[name] == TOWER]
    if inside or not trained:
        return checkpoint, tower
    if tower is None:
        what, facts = "the checkpoint holds no vision tower, but an adapter of one", {"checkpoint": checkpoint.origin.name}
        raise InputError(what, facts=facts, hint=tower_hint(checkpoint.config))
    merged = merge_lora(tower, trained)
    (step,) = merged.history[len(tower.history) :]
    source = () if checkpoint.history else (("source", checkpoint.origin),)
    step = replace(step, inputs=(*source, *(("tower" if role == "base" else role, origin) for role, origin in step.inputs)))
    return replace(checkpoint, history=(*checkpoint.history, step)), replace(merged, history=tower.history)


def _of_tower(adapter: Adapter) -> Adapter:
    """An adapter of a tower by itself, by the names that the tower has inside an original LLaVA."""

    def inside(name: str) -> str:
        return spelled(f"tower.{name.removeprefix('vision_model.')}", "llava")

    modules = tuple(replace(module, name=inside(module.name)) for module in adapter.modules)
    replacements = {inside(name): tensor for name, tensor in adapter.replacements.items()}
    rows = {inside(name): found for name, found in adapter.rows.items()}
    return replace(adapter, modules=modules, replacements=replacements, rows=rows)


def _told_of_rounding(made: Checkpoint, recorded: Training | None, applied: Training | None, count: int) -> Checkpoint:
    """With what its last step says of a base that was quantised in training, and whether it was here."""
    if not (recorded or applied):
        return made
    step = made.history[-1]
    if applied:
        summary = {**step.summary, "round": f"{count} matrices of the base first, as {applied.title} did in training"}
        step = replace(step, options={**step.options, "base_quantized": applied.rounding}, summary=summary)
    elif recorded:
        way = f": `--base-quantized {recorded.rounding}` rounds the base first" if recorded.rounding else ""
        way = ": `--base-quantized` rounds the base first, if bitsandbytes had" if recorded.title == UNTOLD else way
        note = (
            f"trained on a base that was quantised ({recorded.title}, by {recorded.evidence}); the update was fitted to rounded weights "
            f"and is merged into those that are stored, so the result is close to what was trained, not equal{way}"
        )
        step = replace(step, notes=(*step.notes, note))
    return replace(made, history=(*made.history[:-1], step))


def check_merge(*, arithmetic: str, scale: float, dtype: str | None, base_quantized: str | None = None) -> str | None:
    """`dtype` as safetensors spells it. Raises UsageError where `merge_lora` could not take these options."""
    to_arithmetic(arithmetic)
    finite("scale", scale)
    to_rounding(base_quantized)
    return to_dtype(dtype)


def _weighted(adapters: Adapters) -> list[tuple[Adapter, float]]:
    """Each adapter, opened, with its weight. Raises UsageError for what is no adapter."""
    given = adapters if isinstance(adapters, Iterable) and not isinstance(adapters, str | bytes | os.PathLike) else [adapters]
    given = list(given)
    if not given:
        raise UsageError("no adapter was given to merge", hint="give one or more")
    found = []
    for one in given:
        source, weight = one if isinstance(one, tuple) and len(one) == 2 else (one, None)
        if not isinstance(source, Adapter):
            place = to_place(source, "adapter")
            source, written = open_weighted(place) if isinstance(place, str) else (open_adapter(place), 1.0)
            weight = written if weight is None else finite("weight", weight) * written
        found.append((source, 1.0 if weight is None else finite("weight", weight)))
    return found


def open_weighted(
    text: str, *, non_lora: Path | None = None, adapter: str | None = None, progress: bool | None = None
) -> tuple[Adapter, float]:
    """An adapter and its weight: `PATH@0.5` weighs it 0.5, unless a path of that very name exists.

    The first `@` behind a repository's name is always its revision: `owner/name@main@0.5`.
    """
    source, _, number = text.rpartition("@")
    weighed = source and re.fullmatch(r"-?\d+(\.\d+)?", number) and not os.path.lexists(os.path.expanduser(text))
    if weighed and (os.path.exists(os.path.expanduser(source)) or not may_be_revised(source)):
        return open_adapter(source, non_lora=non_lora, adapter=adapter, progress=progress), float(number)
    try:
        return open_adapter(text, non_lora=non_lora, adapter=adapter, progress=progress), 1.0
    except HubError as error:
        if weighed:
            error.hint = f"write `{source}@main@{number}` to weigh it: the first `@` behind a repository's name is its revision"
        raise


def to_arithmetic(text: str) -> Arithmetic:
    """The rule called `text`. Raises UsageError for others."""
    return cast_type(Arithmetic, one_of("arithmetic", text, get_args(Arithmetic)))


def _untie(base: Checkpoint, tensors: dict[str, LazyTensor], adapters: Iterable[tuple[Adapter, float]]) -> bool:
    """Give a tied base a head of its own where an adapter changes only the head; transformers would tie it to the embedding."""
    tied = base.config.get("tie_word_embeddings", _text(base.config).get("tie_word_embeddings")) is True
    names = {canonical(name): name for name in tensors}
    changed = {canonical(name) for adapter, _ in adapters for name in (*adapter.replacements, *map(_target, adapter.modules))}
    if not tied or "head.weight" in names or "head.weight" not in changed or "text.embed_tokens.weight" not in names:
        return False
    embedding = names["text.embed_tokens.weight"]
    head = "lm_head.weight" if embedding.startswith("model.") else "language_model.lm_head.weight"
    tensors[head] = tensors[embedding]
    return True


def _place(
    adapter: Adapter, weight: float, tensors: Mapping[str, LazyTensor], tokens: Mapping[str, int], places: dict[str, Placed]
) -> None:
    """Enter everything that `adapter` holds into `places`. Raises InputError naming what has no place in the base."""
    wanted = {_target(module): module for module in adapter.modules}
    biases = {f"{module.name}.bias": module for module in adapter.modules if module.bias is not None}
    found, lost = BaseNames(tensors).match((*wanted, *biases, *adapter.replacements, *adapter.rows))
    new = {name: named for name in lost if name in adapter.replacements and (named := _new_name(name, tensors))}
    found |= new
    if lost := [name for name in lost if name not in new]:
        raise InputError(
            f"{len(lost)} of the adapter's targets are not in the base: {few(lost)}",
            facts={"adapter": adapter.origin.name, "base has": few(_neighbours(lost, tensors))},
            hint="give the base that the adapter was trained on, or its conversion to another layout",
        )
    for name, tensor in adapter.replacements.items():
        place = places[found[name]]
        if place.replacement is not None:
            raise MismatchError(f"two adapters replace `{found[name]}`", hint="merge them one after the other")
        place.replacement = tensor
    for name, rows in adapter.rows.items():
        if min(rows[0]) < 0 and not {"<im_start>", "<im_end>"} <= tokens.keys():
            what = f"`{adapter.origin.name}` replaces the last rows of `{name}`, those of `<im_start>` and `<im_end>`"
            raise MismatchError(what, hint="the base has no such tokens: give the one that the projector was trained with")
        places[found[name]].rows = rows
    for name, module in wanted.items():
        places[found[name]].updates.append(_update(module, weight))
    for name, module in biases.items():
        assert module.bias is not None
        places[found[name]].updates.append(LowRank(kind="bias", b=module.bias, scale=module.scale, weight=weight))


def _drop_old_projector(tensors: dict[str, LazyTensor], places: Mapping[str, Placed]) -> None:
    """A projector of another type (mlp2x_gelu for a linear one) replaces the base's whole, as in LLaVA's own code."""
    if any(name not in tensors and canonical(name).startswith("projector.") for name in places):
        for name in [name for name in tensors if canonical(name).startswith("projector.") and name not in places]:
            del tensors[name]


def _target(module: Module) -> str:
    return f"{module.name}.{module.parameter or 'weight'}"


def _new_name(name: str, tensors: Mapping[str, LazyTensor]) -> str:
    """The original's name of one of LLaVA's own parts, which may be new to a plain LLaMA, as training added them; empty for others."""
    if "model.embed_tokens.weight" not in tensors:
        return ""
    with suppress(KeyError):
        name = spelled(placed(name), "llava")
    return name if re.fullmatch(MULTIMODAL, name) else ""


def _neighbours(names: Iterable[str], tensors: Mapping[str, LazyTensor]) -> list[str]:
    ends = {name.rsplit(".", 2)[-2] for name in names if name.count(".")}
    return [name for name in tensors if name.count(".") and name.rsplit(".", 2)[-2] in ends] or list(tensors)[:5]


def _update(module: Module, weight: float) -> LowRank:
    return LowRank(
        kind=module.kind,
        a=module.a,
        b=module.b,
        scale=module.scale,
        weight=weight,
        magnitude=module.magnitude,
        fan_in_fan_out=module.fan_in_fan_out,
        mlx=module.mlx,
    )


def _merged(name: str, tensor: LazyTensor, place: Placed, arithmetic: Arithmetic) -> LazyTensor:
    if place.replacement is not None:
        replaced = cast(place.replacement, tensor.dtype)
        grows = canonical(name) in VOCABULARY_TABLES and replaced.shape[1:] == tensor.shape[1:]
        if replaced.shape != tensor.shape and not grows:
            what = f"`{name}` has shape {list(tensor.shape)} in the base and {list(replaced.shape)} in the adapter"
            raise MismatchError(what, hint="give the base that the adapter was trained on")
        tensor = replaced
    if place.rows is not None:
        indices, values = place.rows
        if values.rows != len(indices) or not all(-tensor.rows <= index < tensor.rows for index in indices):
            facts = {"rows": list(indices), "table": list(tensor.shape)}
            what = f"the adapter replaces rows that `{name}` does not have"
            raise MismatchError(what, facts=facts, hint="give the base that the adapter was trained on, with its tokens")
        tensor = ReplaceRows(dtype=tensor.dtype, shape=tensor.shape, source=tensor, indices=indices, values=cast(values, tensor.dtype))
    return add_low_rank(tensor, [oriented(update, tensor) for update in place.updates], arithmetic, name=name)


def oriented(update: LowRank, tensor: LazyTensor) -> LowRank:
    """`update` turned the way that `tensor` is stored: (out, in) or (in, out). PEFT knows it by the module's class; here the shapes tell,
    and for a square linear one `fan_in_fan_out`. Raises MismatchError for square experts, where nothing tells."""
    turned = replace(update, fan_in_fan_out=not update.fan_in_fan_out)
    fitting = [each for each in (update, turned) if fits(each, tensor.shape)]
    if update.kind == "parameter" and len(fitting) == 2:
        what = "the adapter changes experts whose matrices are square: nothing tells whether they are stored (out, in) or (in, out)"
        raise MismatchError(what, facts={"shape": list(tensor.shape)}, hint="merge this adapter with PEFT, which knows the model's class")
    return fitting[0] if fitting else update


def _finish(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    tensors: Mapping[str, LazyTensor],
    untied: bool,
    arithmetic: Arithmetic,
    scale: float,
) -> Checkpoint:
    """Config and small files: LLaVA's from its adapter, repaired; otherwise the base's, with what the merge changed."""
    llava = next((adapter for adapter, _ in adapters if any(key in adapter.config for key in TOWER_KEYS)), None)
    dtype = main_dtype(tensors)
    if layout_of(tensors) == "llava":
        config, files, repairs = _llava_files(base, llava, tensors, dtype)
    else:
        config, files, repairs = _plain_files(base, adapters, tensors, untied, dtype)
    notes = (*(note for adapter, _ in adapters for note in adapter.notes), *_other_names(base, adapters))
    step = Step(
        "merge-lora",
        (*((("base", base.origin),) if not base.history else ()), *((_role(weight), adapter.origin) for adapter, weight in adapters)),
        {"arithmetic": arithmetic, "scale": scale, "weights": [weight for _, weight in adapters]},
        _summary(adapters, tensors, base),
        repairs=repairs,
        notes=(*(() if base.history else base.notes), *notes),
        warnings=(NO_TOWER,) if layout_of(tensors) == "llava" and not named_tower(config) else (),
        checks={"adapters": [facts_of(adapter) for adapter, _ in adapters]},
    )
    return Checkpoint(tensors, config, base.origin, files, (*base.history, step), folders=base.folders)


def facts_of(adapter: Adapter) -> dict[str, Any]:
    """What adapter_config.json says, without paths of its author's machine."""
    recorded = adapter.peft.get("base_model_name_or_path")
    return {**adapter.peft, "base_model_name_or_path": short_base(str(recorded))} if recorded else dict(adapter.peft)


def _role(weight: float) -> str:
    return "lora" if weight == 1 else f"lora x {weight:g}"


def _llava_files(
    base: Checkpoint, adapter: Adapter | None, tensors: Mapping[str, LazyTensor], dtype: str
) -> tuple[Mapping[str, Any], dict[str, Any], tuple[str, ...]]:
    config = {**base.config, **(adapter.config if adapter else {})}
    repairs = _follow_tensors(config, tensors, base)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    rows = shapes[VOCABULARY[0]][0]
    given, stale = without_stale_list({**base.files, **(adapter.files if adapter else {})})
    files, ids, fixed = repair_tokenizer(given, rows=rows)
    if missing := _missing_tokens(config, ids.added, ids.base_vocabulary, rows):
        files["added_tokens.json"] = json_bytes({**ids.added, **missing})
        files, ids, more = repair_tokenizer(files, rows=rows)
        fixed = (*fixed, f"added_tokens.json: {', '.join(f'{token} {number}' for token, number in missing.items())} added", *more)
    files, fast = with_fast(files, rows=rows)
    wanted = config.get("vocab_size")
    if isinstance(wanted, int) and wanted > rows:
        raise MismatchError(
            f"the adapter was trained with {wanted} rows of vocabulary, but neither it nor the base holds more than {rows}",
            facts={"adapter": adapter.origin.name if adapter else "-", "base": base.origin.name},
            hint="give the base, or the `non_lora_trainables.bin`, with the added rows: the original merges random ones here",
        )
    repaired, changes = repair_config({**config, "vocab_size": rows}, shapes=shapes, special_ids=ids, dtype=dtype)
    generation, more = repair_generation_config(small_object(given, "generation_config.json"), ids, config=repaired)
    files["generation_config.json"] = json_bytes(generation)
    return repaired, files, (*stale, *repairs, *changes, *more, *fixed, *fast)


def _follow_tensors(config: dict[str, Any], tensors: Mapping[str, LazyTensor], base: Checkpoint) -> list[str]:
    """Set the flag of a tuned tower in `config`, and say so. Raises MismatchError where the config reads a newline that is in no file."""
    if reads_newline(config) and "model.image_newline" not in tensors:
        what = "`image_newline` is neither in the adapter nor in the base, and config.json says that images are joined with it"
        hint = "give the LLaVA as base that the adapter was trained from: training with LoRA does not save this tensor"
        raise MismatchError(what, facts={"base": base.origin.name}, hint=hint)
    tower = {name: tensor for name, tensor in tensors.items() if canonical(name).startswith("tower.")}
    tuned = any(name not in base.tensors or [*tensor.leaves()] != [*base.tensors[name].leaves()] for name, tensor in tower.items())
    if not tuned or config.get("unfreeze_mm_vision_tower") is True:
        return []
    before = json.dumps(config.get("unfreeze_mm_vision_tower"))
    config["unfreeze_mm_vision_tower"] = True
    return [f"config: `unfreeze_mm_vision_tower` {before} -> true, the vision tower was tuned and its tensors are in the checkpoint"]


def _missing_tokens(config: Mapping[str, Any], added: Mapping[str, int], pieces: int, rows: int) -> dict[str, int]:
    """Ids of image tokens that have a row and are named in no file: LLaVA's own code numbers them when it loads."""
    new = [token for token in asked_tokens(config) if token not in added]
    first = max([pieces - 1, *added.values()]) + 1
    return {token: first + number for number, token in enumerate(new)} if first + len(new) == rows else {}


def _plain_files(
    base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], tensors: Mapping[str, LazyTensor], untied: bool, dtype: str
) -> tuple[Mapping[str, Any], dict[str, Any], tuple[str, ...]]:
    config = deepcopy(dict(base.config))
    repairs: list[str] = []
    files: dict[str, Any] = dict(base.files)
    table = next((tensor for name, tensor in tensors.items() if canonical(name) == "text.embed_tokens.weight"), None)
    changes: dict[str, Any] = {}
    rows = table.rows if table else 0
    explained, told = explaining_files(base, [adapter for adapter, _ in adapters], rows)
    repairs += told
    if table and base.config and rows != _text(config).get("vocab_size", rows):
        changes["vocab_size"] = rows
        for adapter, _ in adapters:
            files |= adapter.files
    files |= explained
    if untied:
        changes["tie_word_embeddings"] = False
    torch_dtype = TORCH_DTYPE[dtype]
    if any(config.get(key, torch_dtype) != torch_dtype for key in ("torch_dtype", "dtype")):
        changes |= {key: torch_dtype for key in ("torch_dtype", "dtype") if key in config}
    for key, value in changes.items():
        for place in (config, config.get("text_config")):
            if isinstance(place, dict) and (place is config or key in place):
                repairs.append(f"config: `{key}` {json.dumps(place.get(key))} -> {json.dumps(value)}")
                place[key] = value
    repairs += quantization_notes(config)
    for place in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(place, dict):
            place.pop(QUANTIZATION, None)
    return config, files, tuple(dict.fromkeys(repairs))


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _summary(adapters: Sequence[tuple[Adapter, float]], tensors: Mapping[str, LazyTensor], base: Checkpoint) -> dict[str, str]:
    rows = {}
    for number, (adapter, weight) in enumerate(adapters, 1):
        kinds = Counter(module.name.rsplit(".", 1)[-1] for module in adapter.modules)
        scales = sorted({f"{module.scale * weight:g}" for module in adapter.modules})
        ranks = sorted({module.rank for module in adapter.modules})
        modules = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
        if kinds:
            label = "merge" if len(adapters) == 1 else f"merge {number}"
            rows[label] = f"{len(adapter.modules)} modules ({modules}); rank {_joined(ranks)}, scale {_joined(scales)}"
        if adapter.replacements:
            rows["replace" if len(adapters) == 1 else f"replace {number}"] = few(adapter.replacements)
    if new := [name for name in tensors if name not in base.tensors]:
        rows["new"] = few(new)
    if gone := [name for name in base.parameters() if name not in tensors]:
        rows["drop"] = few(gone)
    return rows


def _joined(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:4])) + ("..." if len(values) > 4 else "")


def _other_names(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> Iterator[str]:
    """A note for each adapter that records a base of another name. No more than a note: names and shapes of tensors tell what fits.

    A base that was just made has no name yet, and a folder of parts is not named after its text model.
    """
    for adapter, _ in adapters if not base.history and base.folders is None else ():
        last = short_base(str(adapter.peft.get("base_model_name_or_path") or "")).rpartition("/")[2]
        if last and last.lower() not in (base.origin.name.lower(), base.origin.name.rpartition("/")[2].lower()):
            yield f"`{adapter.origin.name}` was trained on `{last}`, the base given is `{base.origin.name}`"
