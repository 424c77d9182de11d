"""An adapter under the names of another layout, as PEFT loads it: low-rank updates, and what was trained whole beside them.

What is merged from it into a base in the one layout is, bit for bit, the conversion of what is merged into that base in the other. Most of
it is a renaming. Three things are more: a single Linear of a projector is two in llava-hf; llava-hf has rows of tokens that the original
lacks, which hold the mean of the others, and so of those that were trained; and PEFT goes by the names of modules in memory, of which
`q_proj` means those of the vision tower too. So `target_modules` lists whole names.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ..checkpoint.checkpoint import Checkpoint, CheckpointSource, Step, opened, to_place
from ..checkpoint.kinds import quantised_kind, refuse_kind
from ..errors import InputError, LlavaWeightsError, MismatchError, one_of
from ..families.decoders import BEFORE_LAYERS, DECODERS, HEAD
from ..families.files import ADAPTER_CONFIG
from ..families.layouts import HF_TOWER, PEFT_PREFIX, VOCABULARY, VOCABULARY_TABLES, canonical, spelled
from ..families.loaders import BESIDE, DORA, KEPT, LOADERS, PEFT_KEPT, PEFT_SETTINGS, SCALES, TRAINED
from ..families.projectors import LINEAR_NAMES, NORM, PROJECTOR_FORMS, PROJECTOR_NAMES
from ..families.towers import TOWERS
from ..storage.reading import Workspace
from ..storage.strict_json import json_bytes
from ..tensors.lazy import LazyTensor, cast, concat
from ..tensors.low_rank import LowRank, fits
from ..tensors.resize import resized, tail
from ..tensors.windows import row_ranges
from ..text import few, listed, shown
from .adapter import Adapter, Module, Rows, open_adapter
from .adapter_config import short_base
from .adapter_tokens import explaining_files
from .convert import ADAPTER_LAYOUTS, convert
from .lora import AdapterSource, facts_of, merge_lora, oriented
from .projector import Columns, Diagonals, paired, single

HF_NAME = r"(model\.)?(language_model|multi_modal_projector|vision_tower\.(?!vision_tower\.)).*|image_newline"
GIVE_BASE = "give the base that the adapter belongs to with `--base`, in either layout"
TABLES = {table.removesuffix(".weight"): table for table in VOCABULARY_TABLES}  # canonical names: of the module, of its tensor
LINEAR = LINEAR_NAMES[0].removesuffix(".weight")  # the module of a projector that is one Linear
FIRST, SECOND = (name.removesuffix(".weight") for name in (PROJECTOR_NAMES[0], PROJECTOR_NAMES[2]))
FORM_OF = {activation: form for form, activation in PROJECTOR_FORMS.items()}
ADDED = ("projector.", "tower.")  # what a decoder without them gets from an adapter
COMPARED_BYTES = 1 << 20
Value = TypeVar("Value")


def starred(name: str) -> str:
    """A name with `*` for each of its numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


# The tensors of every decoder, tower and projector that a row describes, by canonical name, with `*` for a number.
KNOWN = frozenset((
    *(canonical(row.name) for row in (*BEFORE_LAYERS, *HEAD)),
    *(canonical(row.name) for decoder in DECODERS for row in decoder.after),
    *(f"text.layers.*.{row.name}" for decoder in DECODERS for row in decoder.layer),
    *(f"tower.{row.name}" for tower in TOWERS for row in (*tower.before, *tower.after)),
    *(f"tower.encoder.layers.*.{row.name}" for tower in TOWERS for row in tower.layer),
    *map(starred, (*LINEAR_NAMES, *PROJECTOR_NAMES, *NORM)),
    "newline",
))  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """What an adapter holds, by canonical names: low-rank updates by module, whole tensors and rows of tables by tensor."""

    modules: Mapping[str, Module]
    tensors: Mapping[str, LazyTensor] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)  # of tensors as the adapter itself has them, for messages

    @property
    def tables(self) -> list[str]:
        """The vocabulary's tables of which anything was trained."""
        return [table for module, table in TABLES.items() if module in self.modules or table in self.tensors or table in self.rows]


def convert_lora(adapter: AdapterSource, to: str, *, base: CheckpointSource | None = None) -> Checkpoint:
    """`adapter` in PEFT's format under the names of the layout `to`: "llava-hf", as transformers has them in memory, or "llava", as
    haotian-liu's code and SGLang do. Nothing is written, and nothing is merged.

    `base` is the model that the adapter belongs to, in either layout. It is needed where the adapter holds what is not the same in both:
    trained rows of the vocabulary, an `image_newline`, or anything of a projector that may be one Linear. Where it is given, every target
    of the adapter is looked up in it, and what was trained whole is left out where the base holds the very same values.

    Raises UsageError for a layout that there is not, InputError for an adapter that is damaged, no LoRA, or can't be converted without
    `base`, InputError or MismatchError, naming the tensors, for what the other layout or PEFT has no place for and what does not fit
    `base`, HubError where the Hub can't serve an input.
    """
    one_of("layout", to, ADAPTER_LAYOUTS)
    source = adapter if isinstance(adapter, Adapter) else open_adapter(to_place(adapter, "adapter"))
    _check_kind(source)
    given = _base(base)
    parts, own = _parts(source), _layout(source)
    _check_targets(parts, given, source)
    parts, grown = _with_rows(parts, own, to, given, source)
    parts = _with_projector(parts, own, to, given)
    _check_newline(parts, own, to, given)
    parts, held = _without_held(parts, given)
    parts = _completed(parts, given)
    norm = {LINEAR, FIRST, SECOND} & parts.modules.keys() or any(name.startswith("projector.") for name in parts.tensors)
    vip = to == "llava" and norm and (NORM[0] in parts.tensors or (given is not None and NORM[0] in given.by_canonical_name()))
    names = "vip-llava" if vip else to
    tensors = dict(_tensors(parts, names))
    config = _config(parts, names, source, _recorded(source, own, to, given))
    step = Step(
        "convert-lora",
        (("lora", source.origin), *((("base", given.origin),) if given else ())),
        {"to": to},
        _summary(parts, names, source, grown),
        notes=(*source.notes, *_notes(parts, source, config, held, own, to), *_loaders(parts, config)),
        checks={"adapters": [facts_of(source)]},
    )
    kept = dict(source.config) if own == to == "llava" and any(name.startswith("projector.") for name in parts.tensors) else {}
    files = {ADAPTER_CONFIG: json_bytes(dict(sorted(config.items())))}
    return Checkpoint(tensors, kept, source.origin, files, (step,))


# --- what is given ----------------------------------------------------------------------------------------------------


def _check_kind(adapter: Adapter) -> None:
    """Raise InputError for what has no low-rank update, and for updates of a parameter, which goes by its name in memory alone."""
    if not adapter.modules:
        what = f"`{adapter.origin.name}` holds no low-rank update, only {few([*adapter.replacements, *adapter.rows])}"
        raise InputError(what, hint="merge it: `llava-weights merge-lora --base BASE --lora PROJECTOR -o OUT`")
    if experts := [f"{module.name}.{module.parameter}" for module in adapter.modules if module.kind == "parameter"]:
        what = f"the adapter changes parameters by `target_parameters`, which the original layout has no names for: {few(experts)}"
        raise InputError(what, facts={"adapter": adapter.origin.name}, hint="merge it with PEFT, which knows the model's class")


def _base(base: CheckpointSource | None) -> Checkpoint | None:
    """The base, opened. Raises InputError for what is no model that an adapter of a LLaVA can belong to."""
    if base is None:
        return None
    given = opened(base, "base")
    refuse_kind(quantised_kind(given), given, "base")
    if given.layout not in ("llava", "llava-hf", "llama"):
        what = f"the base `{given.origin.name}` is not a LLaVA, and not the decoder of one, but of the layout `{given.layout}`"
        raise InputError(what, hint="give the model that the adapter was trained on, or its conversion")
    return given


def _layout(adapter: Adapter) -> str:
    """The layout whose names an adapter has. Of the names in both, which are those of the head alone, the original's."""
    names = [*(module.name for module in adapter.modules), *adapter.replacements, *adapter.rows]
    return "llava-hf" if any(re.fullmatch(HF_NAME, name) for name in names) else "llava"


def _parts(adapter: Adapter) -> Parts:
    """Everything by canonical name. Raises InputError where two names mean one thing."""
    modules = _unique(((canonical(f"{module.name}.weight").removesuffix(".weight"), module) for module in adapter.modules), adapter)
    tensors = _unique(((canonical(name), tensor) for name, tensor in adapter.replacements.items()), adapter)
    rows = _unique(((canonical(name), found) for name, found in adapter.rows.items()), adapter)
    if any(table.removesuffix(".weight") in modules for table in rows):
        what = f"{listed(adapter.rows)} of the adapter has both a low-rank update and trained rows"
        raise InputError(what, facts={"adapter": adapter.origin.name}, hint="merge it: `llava-weights merge-lora`")
    names = [*(f"{module.name}.weight" for module in adapter.modules), *adapter.replacements, *adapter.rows]
    return Parts(modules, tensors, rows, {canonical(name): name for name in names})


def _unique(pairs: Iterable[tuple[str, Value]], adapter: Adapter) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for name, value in pairs:
        if name in found:
            what, facts = f"{shown(name)} is in the adapter twice, under the names of two layouts", {"adapter": adapter.origin.name}
            raise InputError(what, facts=facts, hint="remove one of the two")
        found[name] = value
    return found


def _check_targets(parts: Parts, base: Checkpoint | None, adapter: Adapter) -> None:
    """Raise InputError for names that no row describes and the base does not have, MismatchError for shapes that are not the base's.

    The vocabulary and the projector, which the two layouts may hold in other shapes, have checks of their own."""
    there, own = base.by_canonical_name() if base else {}, parts.names
    wanted = {f"{name}.weight": module for name, module in parts.modules.items()}
    names = [*wanted, *parts.tensors, *parts.rows]
    if lost := [name for name in names if starred(name) not in KNOWN and name not in there]:
        facts = {"adapter": adapter.origin.name, "decoders that are known": ", ".join(row.model_type for row in DECODERS)}
        hint = "give the adapter of a LLaVA on one of these; `--base` tells which names another one has"
        what = f"{len(lost)} of the adapter's targets are of no part of a LLaVA that is known: {few(own[name] for name in lost)}"
        raise InputError(what, facts=facts, hint=hint)
    if base is None:
        return
    free = (*VOCABULARY_TABLES, "newline")
    checked = {name: module for name, module in wanted.items() if name not in free and not name.startswith("projector.")}
    if lost := [name for name in (*checked, *parts.tensors) if name not in (*there, *free) and not name.startswith(ADDED)]:
        facts = {"adapter": adapter.origin.name, "base": base.origin.name}
        what = f"{len(lost)} of the adapter's targets are not in the base: {few(own[name] for name in lost)}"
        raise InputError(what, facts=facts, hint="give the base that the adapter was trained on, or its conversion")
    odd = [name for name, module in checked.items() if not _fits(module, there[name])]
    others = {name: tensor for name, tensor in parts.tensors.items() if name in there and name not in free}
    odd += [name for name, tensor in others.items() if not name.startswith("projector.") and tensor.shape != there[name].shape]
    if odd:
        facts = {"adapter": adapter.origin.name, "base": f"{base.origin.name}, where the first has {list(there[odd[0]].shape)}"}
        what = f"{len(odd)} of the adapter's targets have other shapes in the base: {few(own[name] for name in odd)}"
        raise MismatchError(what, facts=facts, hint="give the base that the adapter was trained on, or its conversion")


def _fits(module: Module, tensor: LazyTensor) -> bool:
    update = LowRank(kind=module.kind, a=module.a, b=module.b, scale=module.scale, fan_in_fan_out=module.fan_in_fan_out)
    return fits(oriented(update, tensor), tensor.shape)


# --- rows of the vocabulary -------------------------------------------------------------------------------------------


def _with_rows(parts: Parts, own: str, to: str, base: Checkpoint | None, adapter: Adapter) -> tuple[Parts, str]:
    """The parts with the number of rows that the vocabulary's tables have in the other layout, and a sentence on it.

    Raises InputError without a base that tells the number, MismatchError where it is not the base of these rows and their tokens."""
    tables = parts.tables
    placed = all(index >= 0 for indices, _ in parts.rows.values() for index in indices)
    if not tables or (own == to and placed):
        return parts, ""
    if base is None:
        facts = {
            "trained": listed(parts.names[table] for table in tables),
            "why": "llava-hf has rows of tokens that the original lacks, and is padded",
        }
        what = "the adapter changes the vocabulary, whose rows are not the same in the two layouts"
        raise InputError(what, facts=facts, hint=GIVE_BASE)
    here, there = (base if _side(base) == layout else _other(base, layout) for layout in (own, to))
    before, after = (_table(checkpoint, VOCABULARY_TABLES[0]).rows for checkpoint in (here, there))
    counts = {table: count for table in tables if (count := _count(parts, table)) not in (None, before)}
    if counts:
        table, count = next(iter(counts.items()))
        what = f"`{parts.names[table]}` has {count:,} rows in the adapter, and the base has {before:,} in the layout of the adapter"
        hint = "give the base that has exactly the tokens which the adapter was trained with, in either layout"
        raise MismatchError(what, facts={"base": base.origin.name}, hint=hint)
    explaining_files(here, [adapter], before)  # which refuses other tokens than the base has
    for table in tables:
        parts = _resized(parts, table, before, after, there)
    return parts, "" if before == after else f"{before:,} to {after:,} rows, as the conversion of the base has them"


def _side(base: Checkpoint) -> str:
    return "llava-hf" if base.layout == "llava-hf" else "llava"


def _other(base: Checkpoint, layout: str) -> Checkpoint:
    """The base in the other layout. Raises the conversion's error, with what can be done about it here."""
    try:
        return convert(base, layout)
    except LlavaWeightsError as error:
        error.hint = f"give the conversion of the base to `{layout}` as `--base`" + (f"; or {error.hint}" if error.hint else "")
        raise


def _table(checkpoint: Checkpoint, table: str) -> LazyTensor:
    """A table of the vocabulary. Raises MismatchError where it is not stored, since it is tied to the other."""
    found = checkpoint.by_canonical_name().get(table)
    if found is None:
        what = f"`{table}` is not stored in the base, where it is tied to the other table: an update of its own can't be carried over"
        raise MismatchError(what, facts={"base": checkpoint.origin.name}, hint="merge the adapter, then convert: `merge-lora --to`")
    return found


def _count(parts: Parts, table: str) -> int | None:
    """The rows that a table has in the adapter, None where only single rows were trained."""
    module, whole = parts.modules.get(table.removesuffix(".weight")), parts.tensors.get(table)
    if module is not None:
        return module.a.shape[1] if module.kind == "embedding" else module.b.rows
    return whole.rows if whole is not None else None


def _resized(parts: Parts, table: str, before: int, after: int, there: Checkpoint) -> Parts:
    """The parts with `after` rows of one table. New ones get what the conversion of the merged model has there."""
    name = table.removesuffix(".weight")
    module, whole, rows = parts.modules.get(name), parts.tensors.get(table), parts.rows.get(table)
    if rows is not None:
        rows = (tuple(index % before if index < 0 else index for index in rows[0]), rows[1])
        rows = _kept_rows(table, rows, before, after, there)
    if before != after and module is not None and module.magnitude is not None:
        what = f"`{name}` has a DoRA, whose magnitudes are of {before:,} rows, and the table has {after:,} in the other layout"
        raise MismatchError(what, hint="merge the adapter, then convert: `merge-lora --to`")
    if after < before:
        whole = whole and resized(whole, after)
    elif after > before:
        old = resized(_table(there, table), before)
        new = tail(resized(_trained(table, old, module, whole, rows, there), after), before)
        if module is not None or whole is not None:  # what PEFT keeps of a table beside its low-rank update, too
            whole = _below(whole or old, new)
        elif rows is not None:
            rows = ((*rows[0], *range(before, after)), _below(rows[1], new))
    modules = {**parts.modules, **({name: _cut_or_padded(module, after)} if module is not None else {})}
    tensors = {**parts.tensors, **({table: whole} if whole is not None else {})}
    return replace(parts, modules=modules, tensors=tensors, rows={**parts.rows, **({table: rows} if rows is not None else {})})


def _kept_rows(
    table: str, rows: tuple[tuple[int, ...], LazyTensor], before: int, after: int, there: Checkpoint
) -> tuple[tuple[int, ...], LazyTensor]:
    """The trained rows that a table of `after` rows has. Raises MismatchError where others were trained, which it has no tokens for; the
    mean of the rest, which the conversion from the other layout put there, was not."""
    indices, values = rows
    lost = [index for index in indices if index >= after]
    if not lost:
        return rows
    kept = (indices[: -len(lost)], resized(values, len(indices) - len(lost)))
    if kept[0] and max(kept[0]) < after:
        means = tail(resized(_trained(table, _table(there, table), None, None, kept, there), before), after)
        if _same(tail(values, len(kept[0])), resized(means, len(lost))):
            return kept
    what = f"rows {listed(map(str, lost))} of `{table}` were trained, and the other layout has no such tokens"
    raise MismatchError(what, facts={"rows there": f"{after:,}"}, hint="keep this adapter in the layout that it was trained in")


def _trained(
    table: str,
    old: LazyTensor,
    module: Module | None,
    whole: LazyTensor | None,
    rows: tuple[tuple[int, ...], LazyTensor] | None,
    there: Checkpoint,
) -> LazyTensor:
    """The table that a merge makes of these parts of the adapter and `old`."""
    name = VOCABULARY[VOCABULARY_TABLES.index(table)]
    part = Adapter(
        there.origin,
        (replace(module, name=name.removesuffix(".weight")),) if module is not None else (),
        {name: whole} if whole is not None else {},
        {name: rows} if rows is not None else {},
    )
    return merge_lora(Checkpoint({name: old}, {}, there.origin), part).tensors[name]


def _below(above: LazyTensor, below: LazyTensor) -> LazyTensor:
    """Two pieces of one table, in a dtype that holds the values of both."""
    dtype = above.dtype if above.dtype == below.dtype or above.dtype in ("F32", "F64") else "F32"
    return concat((cast(above, dtype), cast(below, dtype)), 0)


def _cut_or_padded(module: Module, rows: int) -> Module:
    """An update of a table with that many rows; it changes nothing in new ones."""
    if module.kind == "embedding":
        a, more = module.a, rows - module.a.shape[1]
        if more > 0:
            a = concat((a, _zeros(a.dtype, (a.rows, more))), 1)
        elif more < 0:
            a = Columns(dtype=a.dtype, shape=(a.rows, rows), source=a)
        return replace(module, a=a)
    return replace(module, b=_rows_of(module.b, rows), bias=module.bias and _rows_of(module.bias, rows))


def _rows_of(tensor: LazyTensor, rows: int) -> LazyTensor:
    more = rows - tensor.rows
    return concat((tensor, _zeros(tensor.dtype, (more, *tensor.shape[1:]))), 0) if more > 0 else resized(tensor, rows)


def _zeros(dtype: str, shape: tuple[int, ...]) -> LazyTensor:
    return Diagonals(dtype=dtype, shape=shape, width=1, signs=())


# --- the projector ----------------------------------------------------------------------------------------------------


def _with_projector(parts: Parts, own: str, to: str, base: Checkpoint | None) -> Parts:
    """The parts with the projector as the other layout has it: a single Linear is two in llava-hf, in the form that the base has.

    Raises InputError without a base that tells, MismatchError for what the other form has no place for."""
    modules = {name for name in parts.modules if name == LINEAR or name.startswith("projector.")}
    whole = {name: tensor for name, tensor in parts.tensors.items() if name.startswith("projector.")}
    if own == to or not (modules or whole):
        return parts
    one = LINEAR in modules or not whole.keys().isdisjoint(LINEAR_NAMES)
    bare = base is not None and not any(name.startswith("projector.") for name in base.by_canonical_name())  # as before LLaVA's training
    if base is None or (bare and to == "llava"):
        if to == "llava-hf" and not one:
            return parts
        why = "llava-hf has two layers in one of three forms" if one else "it may be one Linear there, and have other names"
        what = "the adapter changes the projector, which is not the same in the two layouts"
        raise InputError(what, facts={"trained": few([*modules, *whole]), "why": why}, hint=f"{GIVE_BASE}, with its projector")
    form = "identity" * one if bare else _form(base)
    if to == "llava-hf" and one != bool(form):
        kinds = ("two layers", "one Linear")
        what = f"the projector in the adapter is {kinds[one]}, and that of the base is {kinds[bool(form)]}"
        raise MismatchError(what, facts={"base": base.origin.name}, hint="give the base that the adapter was trained on")
    if not form:
        return parts
    if modules and (form != "identity" or modules != {LINEAR if to == "llava-hf" else FIRST}):
        what = f"the low-rank update of {listed(sorted(modules))} has no counterpart in the other layout, where the projector is {form}"
        raise MismatchError(what, facts={"base": base.origin.name}, hint="merge the adapter, then convert: `merge-lora --to`")
    renamed = {LINEAR: FIRST} if to == "llava-hf" else {FIRST: LINEAR}
    kept = {name: tensor for name, tensor in parts.tensors.items() if name not in whole}
    made = _two(whole, base, form) if to == "llava-hf" else _one(whole, base, form)
    return replace(parts, modules={renamed.get(name, name): module for name, module in parts.modules.items()}, tensors=kept | made)


def _form(base: Checkpoint) -> str:
    """In which form the base holds a projector of one Linear, "identity" for one that will be converted; "" for two layers of its own."""
    there = base.by_canonical_name()
    if base.layout != "llava-hf":
        return "" if PROJECTOR_NAMES[2] in there else "identity"
    activation = str(base.config.get("projector_hidden_act", "gelu"))
    if any(name not in there for name in PROJECTOR_NAMES) or activation not in FORM_OF or single(there, activation) is None:
        return ""
    return FORM_OF[activation]


def _two(whole: Mapping[str, LazyTensor], base: Checkpoint, form: str) -> dict[str, LazyTensor]:
    """One Linear as those of two that depend on its values; the other is the same in every model of that form."""
    if not whole:
        return {}
    if missing := [name for name in LINEAR_NAMES if name not in whole]:
        what = f"{listed(missing)} of the projector is not in the adapter, beside {listed(whole)}"
        raise MismatchError(what, facts={"base": base.origin.name}, hint="merge the adapter, then convert: `merge-lora --to`")
    weight, bias = (whole[name] for name in LINEAR_NAMES)
    return {name: tensor for name, tensor in paired(weight, bias, form).items() if not isinstance(tensor, Diagonals)}


def _one(whole: Mapping[str, LazyTensor], base: Checkpoint, form: str) -> dict[str, LazyTensor]:
    """Two layers as the one Linear that they stand for. Raises MismatchError where training made more of them.

    What is not in the adapter was not trained: it is what the base has."""
    if not whole:
        return {}
    dtype, there = next(iter(whole.values())).dtype, base.by_canonical_name()
    if base.layout != "llava-hf" and LINEAR_NAMES[0] in there:
        there = paired(there[LINEAR_NAMES[0]], there[LINEAR_NAMES[1]], form)
    parts = {name: whole[name] if name in whole else cast(there[name], dtype) for name in PROJECTOR_NAMES if name in {**there, **whole}}
    try:
        found = single(parts, PROJECTOR_FORMS[form]) if len(parts) == len(PROJECTOR_NAMES) else None
    except InputError:
        found = None
    if found is None:
        what = f"the projector of the base is one Linear in the form `{form}`, and the adapter's is not: training made two layers of it"
        raise MismatchError(what, facts={"base": base.origin.name}, hint="keep this adapter in the layout that it was trained in")
    return dict(zip(LINEAR_NAMES, found, strict=True))


def _check_newline(parts: Parts, own: str, to: str, base: Checkpoint | None) -> None:
    """Raise InputError for an `image_newline` of which nobody knows whether the other layout has it."""
    if "newline" not in parts.tensors or own == to or (base is not None and "newline" in base.by_canonical_name()):
        return
    what = "the adapter holds an `image_newline`, which a model has only where its images are cut into tiles"
    raise InputError(what, hint=GIVE_BASE if base is None else "give the base that has this tensor, which the adapter was trained on")


# --- what goes out ----------------------------------------------------------------------------------------------------


def _without_held(parts: Parts, base: Checkpoint | None) -> tuple[Parts, tuple[str, ...]]:
    """The parts without modules that were trained whole and of which the base holds the very same values, and their names.

    "The same" is what a merge into it would give. Of a module without any low-rank update; all tensors of it or none."""
    if base is None:
        return parts, ()
    there = base.by_canonical_name()
    groups: dict[str, list[str]] = {}
    for name in parts.tensors:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    held = tuple(
        name
        for module, names in groups.items()
        if module not in parts.modules and not any(name in parts.rows for name in names)
        if all(name in there and _same(parts.tensors[name], there[name]) for name in names)
        for name in names
    )
    return replace(parts, tensors={name: tensor for name, tensor in parts.tensors.items() if name not in held}), held


def _same(trained: LazyTensor, stored: LazyTensor) -> bool:
    if trained.shape != stored.shape:
        return False
    trained, work = cast(trained, stored.dtype), Workspace(drop_cache=False)
    try:
        for start, stop in row_ranges(stored, COMPARED_BYTES):
            made = [bytearray((stop - start) * stored.row_nbytes) for _ in range(2)]
            for tensor, raw in zip((trained, stored), made, strict=True):
                tensor.rows_into(memoryview(raw), start, stop, work)
            if made[0] != made[1]:
                return False
    finally:
        work.close()
    return True


def _completed(parts: Parts, base: Checkpoint | None) -> Parts:
    """With the bias of each module that was trained whole but for it: PEFT loads a module with everything in it."""
    there = base.by_canonical_name() if base else {}
    stems = [name.removesuffix(".weight") for name in parts.tensors if name.endswith(".weight")]
    more = {name: there[name] for stem in stems if stem not in parts.modules and (name := f"{stem}.bias") in there}
    return replace(parts, tensors={**more, **parts.tensors})


def _spelled(name: str, layout: str, kind: str) -> str:
    """The canonical name of a tensor as an adapter of `layout` has it. `kind` is "adapted" or "trained"."""
    return spelled(name, f"{layout} {kind}" if layout == "llava-hf" else layout)


def _module(name: str, layout: str, kind: str) -> str:
    return _spelled(f"{name}.weight", layout, kind).removesuffix(".weight")


def _tensors(parts: Parts, layout: str) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor by the name that PEFT saves it under."""
    for name, module in parts.modules.items():
        key = PEFT_PREFIX + _module(name, layout, "adapted")
        ends = ("lora_embedding_A", "lora_embedding_B") if module.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        yield f"{key}.{ends[0]}", module.a
        yield f"{key}.{ends[1]}", module.b
        if module.bias is not None:
            yield f"{key}.lora_B.bias", module.bias
        if module.magnitude is not None:
            yield f"{key}.lora_magnitude_vector", module.magnitude
    for name, tensor in parts.tensors.items():
        module_name, _, end = name.rpartition(".")
        if module_name in parts.modules:
            yield f"{PEFT_PREFIX}{_module(module_name, layout, 'adapted')}.base_layer.{end}", tensor
        else:
            yield PEFT_PREFIX + _spelled(name, layout, "trained"), tensor
    for name, (_, values) in parts.rows.items():
        yield f"{PEFT_PREFIX}{_module(name.removesuffix('.weight'), layout, 'adapted')}.token_adapter.trainable_tokens_delta", values


def _target(name: str, layout: str) -> str:
    """What names a module in adapter_config.json, and no other. Of a tower's the end, which classes of every version have."""
    return _module(name, layout, "adapted").removeprefix(HF_TOWER)


def _saved(parts: Parts) -> list[str]:
    """The modules that were trained whole, by canonical name; tensors that are no module's weight or bias stand beside them."""
    return [name.removesuffix(".weight") for name in parts.tensors if name.endswith(".weight") and name[:-7] not in parts.modules]


def _beside(parts: Parts) -> list[str]:
    saved = _saved(parts)
    return [name for name in parts.tensors if (stem := name.rpartition(".")[0]) not in saved and stem not in parts.modules]


def _config(parts: Parts, layout: str, adapter: Adapter, recorded: str | None) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it."""
    kept = {key: value for key, value in adapter.settings.items() if key in PEFT_KEPT and value is not None}
    config = {**PEFT_SETTINGS, **kept}
    rslora = config["use_rslora"] is True
    alphas = {name: _alpha(module, rslora=rslora) for name, module in parts.modules.items()}
    ranks = {name: module.rank for name, module in parts.modules.items()}
    if "r" not in kept or "lora_alpha" not in kept:
        config |= {"r": _commonest(ranks.values()), "lora_alpha": _commonest(alphas.values())}
    marked = ((adapter.settings.get("trainable_token_indices"), table, rows) for table, (rows, _) in parts.rows.items())
    tokens = {table.split(".")[-2]: list(rows) for given, table, rows in marked if _is_listed(given, table)}
    saved = [_module(name, layout, "trained") for name in _saved(parts)]
    return config | {
        "rank_pattern": _patterns(ranks, config["r"], layout),
        "alpha_pattern": _patterns(alphas, config["lora_alpha"], layout),
        "base_model_name_or_path": recorded,
        "lora_bias": any(module.bias is not None for module in parts.modules.values()),
        "use_dora": any(module.magnitude is not None for module in parts.modules.values()),
        "modules_to_save": saved or None,
        "target_modules": [_target(name, layout) for name in parts.modules],
        "trainable_token_indices": tokens or None,
    }


def _is_listed(given: object, table: str) -> bool:
    """Whether adapter_config.json names this table; a tied head, whose rows are stored too, shares those of the embedding."""
    names = [str(key).rpartition(".")[2] for key in given] if isinstance(given, dict) else ["embed_tokens"]
    return table.split(".")[-2] in names


def _alpha(module: Module, *, rslora: bool) -> float:
    """The alpha that gives a module exactly its scale."""
    by = math.sqrt(module.rank) if rslora else module.rank
    guess = module.scale * by
    nearby = (float(round(guess)), guess, math.nextafter(guess, math.inf), math.nextafter(guess, -math.inf))
    found = next((alpha for alpha in nearby if alpha / by == module.scale), None)
    if found is None:
        what = f"`{module.name}` is scaled by {module.scale!r}, and no `lora_alpha` of PEFT gives that with a rank of {module.rank}"
        raise InputError(what, hint="merge the adapter: `llava-weights merge-lora`")
    return int(found) if found == int(found) else found


def _commonest(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _patterns(values: Mapping[str, float], usual: float, layout: str) -> dict[str, float]:
    """The values that are not the usual one, by the last part of a module's name where all modules of that name share it, else by whole
    names. PEFT takes a key for an expression."""
    targets = {_target(name, layout): value for name, value in values.items()}
    kinds: dict[str, set[float]] = {}
    for name, value in targets.items():
        kinds.setdefault(name.rpartition(".")[2], set()).add(value)
    found: dict[str, float] = {}
    for name, value in targets.items():
        kind = name.rpartition(".")[2]
        if value != usual:
            found[re.escape(kind if len(kinds[kind]) == 1 else name)] = value
    return found


def _recorded(adapter: Adapter, own: str, to: str, base: Checkpoint | None) -> str | None:
    """The base that adapter_config.json names: one on the Hub that has this layout, or what it named, where the layout stays."""
    if base is not None and base.origin.revision and _side(base) == to:
        return base.origin.name
    named = adapter.peft.get("base_model_name_or_path")
    return short_base(str(named)) if own == to and named else None


def _summary(parts: Parts, layout: str, adapter: Adapter, grown: str) -> dict[str, str]:
    kinds = Counter(name.rpartition(".")[2] for name in parts.modules)
    first, *_ = parts.modules
    ranks = listed(map(str, sorted({module.rank for module in parts.modules.values()})))
    rows = {
        "adapter": f"{len(parts.modules)} modules ({', '.join(f'{kind} {count}' for kind, count in kinds.items())}); rank {ranks}",
        "rename": f"{adapter.modules[0].name} -> {_module(first, layout, 'adapted')}",
    }
    if parts.tensors or parts.rows:
        rows["trained"] = few([*(_spelled(name, layout, "trained") for name in parts.tensors), *parts.rows])
    return rows | ({"vocabulary": grown} if grown else {})


def _notes(parts: Parts, adapter: Adapter, config: Mapping[str, Any], held: tuple[str, ...], own: str, to: str) -> Iterator[str]:
    yield f"`target_modules` lists {len(config['target_modules'])} whole names: short ones such as `q_proj` are the vision tower's too"
    if config["modules_to_save"]:
        yield f"trained whole, so `modules_to_save`: {few(config['modules_to_save'])}"
    if any(module.mlx for module in parts.modules.values()):
        yield "MLX trained it: PEFT rounds a merge of it in other places than MLX's `fuse`, which `merge-lora` follows on MLX's own files"
    if held:
        yield f"left out, the base holds the same values: {few(held)}"
    if to == "llava-hf" and any(name.startswith("tower.") for name in _saved(parts)):
        yield "modules of the vision tower that were trained whole have the names of transformers 5.6 and later, older ones have others"
    if to == "llava-hf" and any(".experts." in name for name in parts.modules):
        yield "experts are modules in transformers up to 4.57, and one parameter in 5, where PEFT refuses these updates of them"
    if own != to and adapter.files:
        yield f"left out, the converted base has its own: {listed(adapter.files)}"
    if own != to and adapter.config:
        yield "config.json is left out, the converted base has its own"
    if to == "llava" and config["modules_to_save"]:
        yield "load it with PEFT onto the model: LLaVA's own `--model-base` looks for `non_lora_trainables.bin`, which this is not"


def _loaders(parts: Parts, config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each program that loads adapters and would refuse this one, or read only a part of it."""
    usual = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    found = {
        DORA: config["use_dora"],
        TRAINED: bool(config["modules_to_save"] or config["trainable_token_indices"]),
        BESIDE: bool(_beside(parts) or config["lora_bias"]),
        KEPT: any(table in parts.tensors and module in parts.modules for module, table in TABLES.items()),
        SCALES: any(module.scale != usual for module in parts.modules.values()),
    }
    for loader in LOADERS:
        if refused := [what for what in loader.refuses if found[what]]:
            yield f"{loader.name} refuses this adapter: it takes no {' and no '.join(refused)}; merge it for that program"
            continue
        yield from (f"{loader.name}: {told}" for what, told in loader.passes_over.items() if found[what])
