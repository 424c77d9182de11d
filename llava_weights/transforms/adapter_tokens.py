"""Which tokenizer goes out of a merge: the one that explains every row that was trained. Rows of named tokens are never cut off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..checkpoint.added_tokens import every_token
from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError
from ..families.files import TOKENIZER_FILES
from ..families.layouts import VOCABULARY_TABLES, canonical
from ..tensors.lazy import LazyTensor
from ..text import listed, shown
from .adapter import Adapter


def trains_vocabulary(adapter: Adapter) -> bool:
    """Whether an adapter changes rows of the embedding table or of the head."""
    names = [*adapter.replacements, *adapter.rows, *(f"{module.name}.weight" for module in adapter.modules)]
    return any(canonical(name) in VOCABULARY_TABLES for name in names)


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
