"""The vocabulary of a merge. Trained rows go to the rows of the same tokens; the tokenizer that goes out is the one that explains every row
that was trained; rows of named tokens are never cut off.

The original's vocabulary (`<im_patch>`, `<im_start>`, `<im_end>`) and llava-hf's (`<image>`, `<pad>`) have the same ids for other tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..checkpoint.added_tokens import every_token, listed_tokens, ordinary_tokens
from ..checkpoint.checkpoint import Checkpoint, layout_of
from ..errors import MismatchError
from ..families.files import TOKENIZER_FILES
from ..families.layouts import VOCABULARY_TABLES, canonical, placed
from ..tensors.lazy import LazyTensor, cast
from ..tensors.resize import overlaid
from ..text import listed, shown
from .adapter import Adapter

# The tokens that LLaVA adds, in its order, with the config key that asks for them (llava/model/builder.py at c121f04).
IMAGE_TOKENS = (("mm_use_im_patch_token", ("<im_patch>",)), ("mm_use_im_start_end", ("<im_start>", "<im_end>")))
CORES = ("tokenizer.model", "tokenizer.json", "vocab.json")  # files that hold a whole vocabulary
ORDER = (
    "merge it into the model in the original layout that it was trained on, and convert the result: "
    "`llava-weights merge-lora --base ORIGINAL --lora ADAPTER --to llava-hf`"
)


def trains_vocabulary(adapter: Adapter) -> bool:
    """Whether an adapter changes rows of the embedding table or of the head."""
    names = [*adapter.replacements, *adapter.rows, *(f"{module.name}.weight" for module in adapter.modules)]
    return any(canonical(name) in VOCABULARY_TABLES for name in names)


def asked_tokens(config: Mapping[str, object]) -> list[str]:
    """The tokens for images that LLaVA's config.json says were added, in their order."""
    return [token for key, tokens in IMAGE_TOKENS for token in tokens if config.get(key)]


def in_base_vocabulary(base: Checkpoint, adapter: Adapter, tensors: Mapping[str, LazyTensor]) -> tuple[Adapter, tuple[str, ...]]:
    """`adapter` with its trained rows where `base` has those tokens, and a sentence where they moved.

    Whole tables and single rows are placed by the text of their tokens where an id stands for another one. A shorter table leaves the
    base's rows behind it, unless all tables of the base become shorter. Raises MismatchError where a trained token is not in the base's
    vocabulary, or nothing tells which tokens the rows are, naming the order of steps that works."""
    there = {canonical(name): tensor for name, tensor in tensors.items() if canonical(name) in VOCABULARY_TABLES}
    tables = {name: there[placed(name)] for name in adapter.replacements if placed(name) in there}
    if not (tables or adapter.rows) or not base.files:
        return adapter, ()
    known, ordinary = every_token(base.files), ordinary_tokens(base.files)
    count = 1 + max(ordinary.values(), default=-1)
    adapter = _with_counted_rows(adapter, known)
    rows = max([adapter.replacements[name].rows for name in tables] + [1 + max(indices) for indices, _ in adapter.rows.values()])
    own = _own_tokens(base, adapter, ordinary, rows, hub=layout_of(tensors) == "llava-hf")
    if own is None and any(i >= adapter.replacements[name].rows for name in tables for i in known.values()):
        return adapter, ()  # refused by `check_rows`
    if own is None or rows <= count:
        return _with_rows_behind(adapter, tables, there), ()
    if own == {}:
        what = f"`{adapter.origin.name}` holds {rows:,} rows of vocabulary in the original's names, and no file says of which tokens"
        facts = {"ordinary tokens": count, "tokens of the base beyond": listed(name for name, i in known.items() if i >= count)}
        raise MismatchError(what, facts=facts, hint=ORDER)
    names = {i: name for name, i in known.items()}
    trained = {name: i for name, i in own.items() if i < rows}
    if all(names.get(i, name) == name and known.get(name, i) == i for name, i in trained.items()):
        return _with_rows_behind(adapter, tables, there), ()
    beyond = {name: i for name, i in trained.items() if i >= count}
    missing = [name for name in beyond if name not in known]
    if missing or any(ordinary.get(name) != i for name, i in trained.items() if i < count):
        lost = listed(f"{name} {beyond[name]}" for name in missing) or "ordinary ones: it is another vocabulary"
        facts = {"adapter": adapter.origin.name, "tokens that the base lacks": lost}
        raise MismatchError("the adapter trained rows for other tokens than the base has", facts=facts, hint=ORDER)
    return _by_text(adapter, tables, beyond, known, count)


def _by_text(
    adapter: Adapter, tables: Mapping[str, LazyTensor], beyond: Mapping[str, int], known: Mapping[str, int], count: int
) -> tuple[Adapter, tuple[str, ...]]:
    moved = {i: known[name] for name, i in beyond.items()}
    runs = ((0, 0, count), *((moved[i], i, 1) for i in sorted(moved)))
    replaced = {name: overlaid(table, cast(adapter.replacements[name], table.dtype), runs) for name, table in tables.items()}
    rows = {name: (tuple(moved.get(i, i) for i in indices), values) for name, (indices, values) in adapter.rows.items()}
    files = {name: path for name, path in adapter.files.items() if name not in TOKENIZER_FILES}
    note = f"rows of the adapter placed by their tokens: {listed(f'{name} {i} at {known[name]}' for name, i in beyond.items())}"
    return replace(adapter, replacements={**adapter.replacements, **replaced}, rows=rows, files=files), (note,)


def _with_counted_rows(adapter: Adapter, known: Mapping[str, int]) -> Adapter:
    """With the rows that count from the end, which are those of `<im_start>` and `<im_end>`, at the ids of these tokens."""
    wanted = tuple(known[name] for name in IMAGE_TOKENS[1][1] if name in known)
    rows = {
        name: (wanted if indices == (-2, -1) and len(wanted) == 2 else indices, values) for name, (indices, values) in adapter.rows.items()
    }
    return replace(adapter, rows=rows)


def _with_rows_behind(adapter: Adapter, tables: Mapping[str, LazyTensor], there: Mapping[str, LazyTensor]) -> Adapter:
    """With the base's rows behind shorter tables, unless all of the base's tables are replaced by as short ones."""
    sizes = {adapter.replacements[name].rows for name in tables}
    if len(sizes) == 1 and len(tables) == len(there):
        return adapter
    replaced = dict(adapter.replacements)
    for name, table in tables.items():
        own = replaced[name]
        if own.rows < table.rows and own.shape[1:] == table.shape[1:]:
            replaced[name] = overlaid(table, cast(own, table.dtype), ((0, 0, own.rows),))
    return replace(adapter, replacements=replaced)


def _own_tokens(base: Checkpoint, adapter: Adapter, ordinary: Mapping[str, int], rows: int, *, hub: bool) -> dict[str, int] | None:
    """Ids by text of the vocabulary that an adapter was trained with: by its tokenizer, or LLaVA's config, which adds tokens in one order.

    None where nothing tells it and nothing has to; empty where the base is llava-hf and the adapter's tables have the original's names."""
    if any(name in adapter.files for name in CORES):
        return every_token(adapter.files)
    if listed_own := listed_tokens(adapter.files):
        return {**ordinary, **listed_own}
    if not hub:
        return None
    asked, count = asked_tokens(adapter.config), 1 + max(ordinary.values(), default=-1)
    if asked and count + len(asked) == rows:
        return {**ordinary, **{name: count + number for number, name in enumerate(asked)}}
    named = [*adapter.replacements, *adapter.rows]
    original = any(name.startswith(("model.embed_tokens", "lm_head")) for name in named) and "mm_vision_tower" in adapter.config
    return {} if original and rows > count else None


def explaining_files(base: Checkpoint, adapters: Iterable[Adapter], rows: int) -> tuple[dict[str, object], tuple[str, ...]]:
    """The tokenizer files of an adapter that trained rows which the base's files have no token for, and a sentence on it; none where the
    base's explain every row.

    Raises MismatchError where one id stands for two tokens, or one token for two ids: rows were trained for one of them."""
    found: dict[str, object] = {}
    notes: list[str] = []
    known = every_token(base.files)
    for adapter in adapters:
        if not trains_vocabulary(adapter) or not any(name in adapter.files for name in TOKENIZER_FILES):
            continue
        own = every_token({**base.files, **adapter.files})
        _refuse_clash(base, adapter, known, own, rows)
        new = {name: i for name, i in own.items() if i < rows and name not in known}
        if new:
            found |= {name: path for name, path in adapter.files.items() if name in TOKENIZER_FILES}
            known |= new
            names = listed(f"{name} {i}" for name, i in sorted(new.items(), key=lambda pair: pair[1]))
            notes.append(f"tokenizer: taken from {shown(adapter.origin.name)}, which has rows for {names}")
    return found, tuple(notes)


def check_rows(base: Checkpoint, adapters: Iterable[Adapter], tensors: Mapping[str, LazyTensor]) -> None:
    """Raise MismatchError where an adapter's whole table has fewer rows than the base has tokens: the rest of them would be lost."""
    tables = {canonical(name): tensor for name, tensor in tensors.items() if canonical(name) in VOCABULARY_TABLES}
    for adapter in adapters:
        for name, table in adapter.replacements.items():
            there = tables.get(canonical(name))
            if there is None or table.rows >= there.rows:
                continue
            lost = {token: i for token, i in every_token(base.files).items() if table.rows <= i < there.rows}
            if lost or not base.files:
                tokens = (
                    listed(f"{token} {i}" for token, i in sorted(lost.items(), key=lambda pair: pair[1]))
                    or "nobody knows, no tokenizer is there"
                )
                what = f"`{name}` has {table.rows:,} rows in the adapter and {there.rows:,} in the base"
                hint = "give the base that the adapter was trained on: the vocabularies of the two layouts are not the same"
                raise MismatchError(what, facts={"adapter": adapter.origin.name, "tokens of the rows beyond": tokens}, hint=hint)


def _refuse_clash(base: Checkpoint, adapter: Adapter, known: Mapping[str, int], own: Mapping[str, int], rows: int) -> None:
    names = {i: name for name, i in known.items()}
    clash = next((n for n, i in own.items() if i < rows and (names.get(i, n) != n or known.get(n, i) != i)), None)
    if clash is None:
        return
    i = own[clash]
    facts = {
        shown(adapter.origin.name): f"{clash} {i}",
        shown(base.origin.name): f"{names[i]} {i}" if i in names and names[i] != clash else f"{clash} {known[clash]}",
    }
    hint = "give the base that the adapter was trained on, in the layout that it was trained in"
    raise MismatchError("the adapter trained rows for other tokens than those that the base has there", facts=facts, hint=hint)
