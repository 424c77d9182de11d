"""The tokenizer files of a llava-hf folder, and the way back: tokenizer.json made from pieces, scores and added tokens.

One form gives LLaVA's own ids in every transformers from 4.37 to 5.23, fast and slow: a normalizer that puts a blank before each
piece of text, no pre-tokenizer, `legacy: true`. It differs from LLaVA's main program in one way: it puts that blank also after a
special token inside a text, such as `</s>` or `<im_end>`, where a slow tokenizer with `legacy: false` puts it only at the start of a
text and after `<image>`. One turn with a plain `<image>` has the same ids, and so have whole dialogues of v0, which hold no `</s>`.
transformers 5 needs the config.json of a LLaVA beside it to read this form: else it leaves out one of two blanks after a token.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, MismatchError, UsageError
from ..storage.strict_json import JsonObject, json_bytes
from ..text import listed, shown
from . import tokenizer_json
from .sentencepiece import BPE, CONTROL, UNKNOWN, USER_DEFINED, Vocabulary, read_sentencepiece
from .small_files import SmallFiles, small_bytes, small_object
from .tokenizer import (
    ADDED,
    FAST,
    FAST_LIMIT,
    MODEL,
    MODEL_LIMIT,
    NO_LIMIT,
    RIGHT_TOKENIZER,
    SIDES,
    SPECIAL,
    TOKENIZER_CONFIG,
    TOKENIZER_SETTINGS,
    is_token_id,
    list_at,
    repair_tokenizer,
    token_text,
    with_listed,
)

VOCABULARY, MERGES = "vocab.json", "merges.txt"
IM_PATCH, IMAGE, PAD, END_OF_TEXT = "<im_patch>", "<image>", "<pad>", "<|endoftext|>"
LLAVA_TOKENS = (IM_PATCH, "<im_start>", "<im_end>")
STRIPPED, ROLES = {"lstrip": True, "rstrip": True}, ("bos", "eos", "pad", "unk")
ROW_1 = {"legacy": True, "tokenizer_class": "LlamaTokenizer", "clean_up_tokenization_spaces": False}
# Where the settings of the original stand that llava-hf has other values for, and what they are called there.
BACK = {"original_legacy": "legacy", "original_padding_side": "padding_side"}

Entries = dict[int, JsonObject]  # added tokens by id


@dataclass(frozen=True)
class HfTokenizer:
    """The tokenizer of a llava-hf folder and the ids that its configs need.

    `files` are all files that were given, the tokenizer's own replaced or added. The embedding table needs at least `used` rows; `grew`
    says that tokens were added. `specials` has the text of every added token, `notes` a sentence for each change.
    """

    files: SmallFiles
    image_token: str
    image_id: int
    bos: int
    eos: int
    pad: int
    used: int
    grew: bool
    specials: frozenset[str]
    notes: tuple[str, ...]
    others: Mapping[str, int] = field(default_factory=dict)  # the ids of the other tokens that were asked for, by their texts


@dataclass(frozen=True)
class _Tokenizer:
    """A tokenizer of either kind: `core` is tokenizer.json without its added tokens, `entries` are these by id, `settings` are those of
    tokenizer_config.json, `roles` the token of each role, `ids` the id of every token. `llama`: it is a LLaMA's, not byte-level;
    `verbatim`: its tokenizer.model changes nothing of a text but blanks; `slow`: `core` gives the ids of the slow class."""

    files: SmallFiles
    core: JsonObject
    settings: JsonObject
    roles: dict[str, str]
    entries: Entries
    llama: bool
    notes: tuple[str, ...] = ()
    verbatim: bool = True
    slow: bool = False
    ids: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        added = {entry["content"]: i for i, entry in self.entries.items()}
        object.__setattr__(self, "ids", {**self.core["model"]["vocab"], **added})

    @property
    def base(self) -> int:
        """How many tokens the vocabulary has, without added ones."""
        return len(self.core["model"]["vocab"])


def hf_tokenizer(
    files: SmallFiles,
    *,
    rows: int,
    image_token: str | None = None,
    processor_class: str,
    model_max_length: object = None,
    before: Sequence[str] = (),
    behind: Sequence[str] = (),
) -> HfTokenizer:
    """The tokenizer for a llava-hf folder, from any checkpoint's small files and an embedding table of `rows` rows.

    The image token is `image_token`, else `<im_patch>` where the tokenizer has it, else `<image>`: by its own id, or behind all
    tokens, with `<pad>` behind it where no other token pads. New tokens `before` and `behind` come before and behind the image token.

    Raises InputError as `repair_tokenizer`, and for a tokenizer that is neither a BPE of SentencePiece nor byte-level,
    MismatchError for one with more tokens than the table has rows.
    """
    tokenizer = _read(files, rows, model_max_length)
    name = image_token if image_token is not None else IM_PATCH if IM_PATCH in tokenizer.ids else IMAGE
    if not name.strip():
        raise UsageError("the image token is empty", hint="leave `--image-token` out for `<image>`")
    count = len(tokenizer.ids)
    tokenizer = _with_image(tokenizer, name, rows, (*before, name, *behind))
    own = {"padding_side": "left", "processor_class": processor_class, **(ROW_1 if tokenizer.llama else {})}
    replaced = {key: old for key, name in BACK.items() if (old := tokenizer.settings.get(name)) not in (None, own.get(name, old))}
    settings = {**tokenizer.settings, **own, **replaced}
    written, notes = _written(replace(tokenizer, settings=settings), files, fast=True)
    end = END_OF_TEXT if END_OF_TEXT in tokenizer.ids else tokenizer.roles["eos"]
    bos, eos, pad = (tokenizer.ids[tokenizer.roles.get(role, end)] for role in ("bos", "eos", "pad"))
    specials = frozenset(entry["content"] for entry in tokenizer.entries.values())
    used, others = max(tokenizer.ids.values()) + 1, {token: tokenizer.ids[token] for token in (*before, *behind)}
    return HfTokenizer(written, name, tokenizer.ids[name], bos, eos, pad, used, len(tokenizer.ids) > count, specials, notes, others)


def original_tokenizer(
    files: SmallFiles, *, rows: int, image_id: int, others: Collection[str] = ()
) -> tuple[dict[str, Path | bytes], int, tuple[str, ...]]:
    """The way back: files for the original layout, how many rows of the table belong to them, and a sentence for each change.

    The token `image_id` goes, unless it is `<im_patch>`, with it the added tokens `others`, and a `<pad>` right behind them or behind the
    pieces; then unk pads again. All stay where other tokens follow. A byte-level tokenizer keeps all `rows`. Raises as `hf_tokenizer`.
    """
    tokenizer = _read(files, rows, None)
    names = {i: entry["content"] for i, entry in tokenizer.entries.items() if i >= tokenizer.base}
    doomed = {image_id} if names.get(image_id, IM_PATCH) != IM_PATCH else set()
    doomed |= {i for i, name in names.items() if doomed and name in others}
    doomed |= {i for i in (max(doomed, default=image_id) + 1, tokenizer.base) if doomed and names.get(i) == PAD}
    kept = sorted(set(names) - doomed)
    notes = list(tokenizer.notes)
    if kept != list(range(tokenizer.base, tokenizer.base + len(kept))):
        notes.append(f"tokenizer: {listed(names[i] for i in sorted(doomed))} kept, other tokens follow")
        doomed, kept = set(), sorted(names)
    gone = {names[i] for i in doomed}
    notes += [f"tokenizer: {shown(names[i])} (id {i}) dropped, it came with the llava-hf layout" for i in sorted(doomed)]

    roles = {role: name for role, name in tokenizer.roles.items() if name not in gone}
    roles.setdefault("pad", roles["unk"] if tokenizer.llama else END_OF_TEXT if END_OF_TEXT in tokenizer.ids else roles["eos"])
    settings = {key: value for key, value in tokenizer.settings.items() if key != "processor_class" and key not in BACK}
    settings |= {name: tokenizer.settings[key] for key, name in BACK.items() if key in tokenizer.settings}
    if isinstance(extra := settings.get("additional_special_tokens"), list):
        settings["additional_special_tokens"] = [token for token in extra if token_text(token) not in gone]
    entries = {i: entry for i, entry in tokenizer.entries.items() if i not in doomed}
    tokenizer = replace(tokenizer, settings=settings, roles=roles, entries=entries, notes=tuple(notes))
    result, changes = _written(_as_slow(tokenizer) if tokenizer.llama else tokenizer, files, fast=tokenizer.verbatim)
    return result, tokenizer.base + len(kept) if tokenizer.llama else rows, changes


def with_fast(files: SmallFiles, *, rows: int) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    """The repaired files of the original layout with a tokenizer.json, for readers that ask for no slow tokenizer, and what changed.

    One that gives the same ids as tokenizer.model is kept. There is none where tokenizer.model is no BPE or changes texts. The flags that
    tokenizer_config.json has for added tokens become those of tokenizer.json, in whose place readers take them.
    """
    if MODEL not in files:
        return dict(files), ()
    kept: dict[str, Path | bytes] = {name: content for name, content in files.items() if name != FAST}
    try:
        tokenizer = _as_slow(_read(kept, rows, None))
    except tokenizer_json.NoMerges as error:
        return kept, (f"{FAST}: {'dropped' if FAST in files else 'not written'}, {error}",)
    if not tokenizer.verbatim:
        return kept, (f"{FAST}: {'dropped' if FAST in files else 'not written'}, {MODEL} normalizes texts",)
    settings = small_object(files, TOKENIZER_CONFIG)
    decoder = [entry for entry in settings.get("added_tokens_decoder", {}).values() if entry.get("special")]
    special = {*map(token_text, (*decoder, *list_at(settings, "additional_special_tokens")))}  # of LLaVA's, those of which a file says so
    entries = {i: {**e, "special": e["special"] and e["content"] not in {*LLAVA_TOKENS} - special} for i, e in tokenizer.entries.items()}
    written, notes = _written(replace(tokenizer, entries=entries, notes=()), files, fast=True)
    new = {key: value for key, value in settings.items() if key != "add_prefix_space" or value is False}
    if "added_tokens_decoder" in settings:
        new["added_tokens_decoder"] = small_object(written, TOKENIZER_CONFIG)["added_tokens_decoder"]
    if new != settings:
        kept[TOKENIZER_CONFIG] = json_bytes(new)
    return {**kept, FAST: written[FAST]}, tuple(note for note in notes if note.startswith(FAST))


def _with_image(tokenizer: _Tokenizer, name: str, rows: int, tokens: Sequence[str]) -> _Tokenizer:
    """The tokenizer with these tokens, of which `name` is that of an image, special and found in the middle of a text."""
    wanted = (
        list(tokens) if name in tokenizer.ids or tokenizer.roles.get("pad") not in (None, tokenizer.roles.get("unk")) else [*tokens, PAD]
    )
    entries, roles, notes = dict(tokenizer.entries), dict(tokenizer.roles), list(tokenizer.notes)
    for token in wanted:
        known = tokenizer.ids.get(token)
        i = max(max(tokenizer.ids.values()), max(entries, default=0)) + 1 if known is None else known
        entries[i] = {**entries.get(i, tokenizer_json.added_token(token)), "special": True}
        if known is None:
            notes.append(f"tokenizer: {shown(token)} added as id {i}, " + ("a row of the table's padding" if i < rows else "a new row"))
        if token == PAD:
            roles["pad"] = PAD
    return replace(tokenizer, entries=dict(sorted(entries.items())), roles=roles, notes=tuple(notes))


# --- reading --------------------------------------------------------------------------------------------------------


def _read(files: SmallFiles, rows: int, model_max_length: object) -> _Tokenizer:
    if MODEL in files:
        return _from_pieces(files, rows, model_max_length)
    if FAST in files:
        core = small_object(files, FAST, limit=FAST_LIMIT)
    elif VOCABULARY in files and MERGES in files:
        if not str(small_object(files, TOKENIZER_CONFIG).get("tokenizer_class", "")).startswith("Qwen2Tokenizer"):
            raise InputError(f"without `{FAST}` only Qwen2's byte-level tokenizer is known", hint=f"put the model's `{FAST}` beside it")
        core = tokenizer_json.qwen2_json(
            small_object(files, VOCABULARY, limit=FAST_LIMIT), small_bytes(MERGES, files[MERGES], FAST_LIMIT).decode(errors="replace")
        )
    else:
        raise InputError(f"the tokenizer is missing: neither `{MODEL}` nor `{FAST}` is there", hint=tokenizer_json.PUT_MODEL)
    return _from_fast(files, core, rows, model_max_length)


def _from_pieces(files: SmallFiles, rows: int, model_max_length: object) -> _Tokenizer:
    """A SentencePiece tokenizer, repaired."""
    given = {name: content for name, content in with_listed(files).items() if name != FAST}
    source = small_object(given, TOKENIZER_CONFIG)
    repaired, ids, notes = repair_tokenizer(given, rows=rows, model_max_length=model_max_length)
    vocabulary = read_sentencepiece(small_bytes(MODEL, files[MODEL], MODEL_LIMIT))
    if vocabulary.model_type != BPE:
        raise tokenizer_json.NoMerges(f"`{MODEL}` is not a BPE model, so it has no merges", hint=RIGHT_TOKENIZER)
    if not vocabulary.verbatim:
        notes += (f"{MODEL}: normalizes texts, which {FAST} does not",)
    settings = small_object(repaired, TOKENIZER_CONFIG)
    roles = {role: text for role in ROLES if (text := token_text(settings.pop(f"{role}_token", None)))}
    decoder = {int(i): entry for i, entry in settings.pop("added_tokens_decoder", {}).items()}
    entries = _entries(vocabulary, ids.added, decoder, {*roles.values(), *map(token_text, list_at(settings, "additional_special_tokens"))})
    if "added_tokens_decoder" not in source:
        typed = {token_text(value) for value in small_object(files, SPECIAL).values() if isinstance(value, dict)}
        entries |= {i: {**entries[i], **STRIPPED} for name, i in ids.added.items() if name not in typed}
    settings.pop("add_prefix_space", None)  # it makes transformers 4.45 ignore tokenizer.json and make its own
    if not vocabulary.prefix:
        settings["add_prefix_space"] = False
    blank: tokenizer_json.Blank = "every" if vocabulary.prefix else "none"
    core = _llama(vocabulary.ids, tokenizer_json.bpe_merges(vocabulary), roles, ids.added, settings, blank=blank)
    return _Tokenizer(repaired, core, settings, roles, entries, llama=True, notes=notes, verbatim=vocabulary.verbatim)


def _entries(vocabulary: Vocabulary, added: Mapping[str, int], decoder: Entries, special: set[str | None]) -> Entries:
    """Every token that is found in a text as a whole: control and unknown pieces, user-defined ones, and those behind the pieces."""
    unwritten = {name for name, kind in vocabulary.kinds.items() if kind in (CONTROL, UNKNOWN)}
    marked = {name for name, kind in vocabulary.kinds.items() if kind == USER_DEFINED or vocabulary.ids[name] in decoder} | unwritten
    entries = {}
    for i, name in sorted((i, name) for name, i in {**{name: vocabulary.ids[name] for name in marked}, **added}.items()):
        stored = decoder.get(i, {})
        entries[i] = {**tokenizer_json.added_token(name, stored), "normalized": False}
        entries[i]["special"] |= name in special | unwritten or name in LLAVA_TOKENS
        if name in LLAVA_TOKENS and not stored.get("special", True) and stored.get("normalized"):
            entries[i] |= STRIPPED
    return entries


def _from_fast(files: SmallFiles, core: JsonObject, rows: int, model_max_length: object) -> _Tokenizer:
    """A tokenizer.json: a LLaMA's, which is written anew in the form above, or a byte-level one, whose normalizer and the like stay."""
    vocabulary, merges = tokenizer_json.bpe_model(core)
    if len(vocabulary) > rows:
        what = f"the tokenizer has {len(vocabulary):,} tokens, but the embedding table only {rows:,} rows"
        raise MismatchError(what, hint=RIGHT_TOKENIZER)
    llama, config = tokenizer_json.is_llama(core), small_object(files, TOKENIZER_CONFIG)
    entries, notes = _every_entry(files, core, vocabulary, rows)
    ids = {**vocabulary, **{entry["content"]: i for i, entry in entries.items()}}
    settings = {key: config[key] for key, kind in TOKENIZER_SETTINGS.items() if type(config.get(key)) is kind}
    settings |= {key: config[key] for key in SIDES if config.get(key) in ("left", "right")}
    if not 0 < settings.get("model_max_length", 0) < NO_LIMIT and is_token_id(model_max_length):
        settings["model_max_length"] = model_max_length
    if llama:
        unk = token_text(core["model"].get("unk_token")) or "<unk>"
        roles = _roles(files, ids, {"bos": "<s>", "eos": "</s>", "pad": unk, "unk": unk})
        settings.pop("add_prefix_space", None)
        settings = {"add_bos_token": tokenizer_json.starts_with_bos(core), "add_eos_token": False, **settings}
        core = _llama(vocabulary, merges, roles, ids, settings, blank="every" if tokenizer_json.has_prefix(core) else "none")
        entries = {ids[name]: tokenizer_json.added_token(name) for name in roles.values()} | entries
        entries = {i: {**e, "normalized": False, "special": e["special"] or e["content"] in roles.values()} for i, e in entries.items()}
    else:
        roles = _roles(files, ids, {"eos": END_OF_TEXT, "pad": END_OF_TEXT})
        core = {**core, "model": {**core["model"], "merges": merges}}
        if settings.get("tokenizer_class") in (None, "TokenizersBackend"):  # transformers 4 does not know the latter
            settings["tokenizer_class"] = "Qwen2Tokenizer" if tokenizer_json.splits_as_qwen2(core) else "PreTrainedTokenizerFast"
    return _Tokenizer(files, core, settings, roles, dict(sorted(entries.items())), llama=llama, notes=notes)


def _every_entry(files: SmallFiles, core: JsonObject, vocabulary: Mapping[str, int], rows: int) -> tuple[Entries, tuple[str, ...]]:
    """The added tokens of all files, tokenizer.json first. Raises InputError where they disagree or leave a gap between ids."""
    entries, ids = Entries(), dict(vocabulary)
    named: list[tuple[Any, JsonObject]] = [(i, {"content": name}) for name, i in small_object(files, ADDED).items()]
    decoder = found if isinstance(found := small_object(files, TOKENIZER_CONFIG).get("added_tokens_decoder"), dict) else {}
    decoded = {int(i): entry for i, entry in decoder.items() if i.isdecimal() and len(i) < 10 and isinstance(entry, dict)}
    for i, stored in (*tokenizer_json.added_tokens(core).items(), *decoded.items(), *named):
        name = token_text(stored)
        free = is_token_id(i) and (i >= len(vocabulary) or name in vocabulary) and (i not in entries or entries[i]["content"] == name)
        if name is None or not free or ids.setdefault(name, i) != i:
            raise InputError(
                f"the tokenizer's files contradict each other about {shown(str(name))}", facts={"id": shown(repr(i))}, hint=RIGHT_TOKENIZER
            )
        entries.setdefault(i, tokenizer_json.added_token(name, stored))
    gone = sorted(i for i in entries if i >= rows)
    notes = tuple(f"tokenizer: {shown(entries.pop(i)['content'])} (id {i}) dropped, the table has {rows:,} rows" for i in gone)
    behind = sorted(i for i in entries if i >= len(vocabulary))
    if behind != list(range(len(vocabulary), len(vocabulary) + len(behind))):
        raise InputError(f"the added tokens do not follow the {len(vocabulary):,} of the vocabulary without a gap", hint=RIGHT_TOKENIZER)
    return entries, notes


def _roles(files: SmallFiles, ids: Mapping[str, int], usual: Mapping[str, str]) -> dict[str, str]:
    """The token of each role by the files, else the usual one. Raises InputError where there is none for eos, or for another usual role
    but pad."""
    sources, roles = (small_object(files, SPECIAL), small_object(files, TOKENIZER_CONFIG)), dict[str, str]()
    for role in ROLES:
        names = (*(token_text(source.get(f"{role}_token")) for source in sources), usual.get(role))
        if (name := next((name for name in names if name in ids), None)) is not None:
            roles[role] = name
    if missing := sorted({*usual, "eos"} - {"pad"} - set(roles)):
        raise InputError(f"the tokenizer has no token as its {missing[0]}", facts={"usual": shown(usual[missing[0]])}, hint=RIGHT_TOKENIZER)
    return roles


# --- writing --------------------------------------------------------------------------------------------------------


def _written(tokenizer: _Tokenizer, given: SmallFiles, *, fast: bool) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    """The files with the tokenizer's JSON written anew, but as given where it says the same already; and all notes."""
    tokens = {f"{role}_token": name for role, name in tokenizer.roles.items()}
    settings = {**tokenizer.settings, **tokens, "added_tokens_decoder": {str(i): entry for i, entry in tokenizer.entries.items()}}
    extra = {key: value for key, value in settings.items() if key == "additional_special_tokens"}
    contents: dict[str, JsonObject] = {
        TOKENIZER_CONFIG: dict(sorted(settings.items())),
        SPECIAL: {**extra, **tokens},
        ADDED: {entry["content"]: i for i, entry in tokenizer.entries.items() if i >= tokenizer.base},
    }
    if fast:
        contents[FAST] = {**tokenizer.core, "added_tokens": [{"id": i, **entry} for i, entry in tokenizer.entries.items()]}
    result = {name: source for name, source in tokenizer.files.items() if name not in (ADDED, FAST)}
    notes = list(tokenizer.notes)
    for name, content in contents.items():
        before = json.dumps(small_object(given, name, limit=FAST_LIMIT), sort_keys=True)
        same = name in given and before == json.dumps(content, sort_keys=True)
        same = same or (
            tokenizer.slow and name == FAST and name in given and _same_ids(small_object(given, name, limit=FAST_LIMIT), content)
        )
        if content:
            result[name] = given[name] if same else json_bytes(content)
    if fast and result[FAST] is not given.get(FAST):
        notes.append(f"{FAST}: written" + " anew" * (FAST in given) + f" from {MODEL}" * (MODEL in given))
    if changes := list(_changes(small_object(tokenizer.files, TOKENIZER_CONFIG), contents[TOKENIZER_CONFIG])):
        notes.append(f"{TOKENIZER_CONFIG}: {', '.join(changes)}")
    notes += [f"{FAST}: dropped, {MODEL} normalizes texts"] * (FAST in given and not fast)
    return result, tuple(notes)


def _llama(
    vocabulary: Mapping[str, int],
    merges: list[Any],
    roles: Mapping[str, str],
    added: Mapping[str, int],
    settings: JsonObject,
    *,
    blank: tokenizer_json.Blank,
) -> JsonObject:
    ids = {**vocabulary, **added}
    start, end = ({roles[role]: ids[roles[role]]} if settings.get(f"add_{role}_token") else {} for role in ("bos", "eos"))
    return tokenizer_json.llama_json(vocabulary, merges, roles["unk"], start=start, end=end, blank=blank)


def _as_slow(tokenizer: _Tokenizer) -> _Tokenizer:
    """The tokenizer, a LLaMA's, with the tokenizer.json of the original layout: the ids are those of the slow LlamaTokenizer, which LLaVA's
    own code uses, for the `legacy` of its settings. With `legacy` false a blank stands before the first piece of text alone."""
    model = tokenizer.core["model"]
    blank: tokenizer_json.Blank = "every" if tokenizer_json.has_prefix(tokenizer.core) else "none"
    if not tokenizer.settings.get("legacy", True):
        blank = "none" if tokenizer.settings.get("add_prefix_space") is False else "first"
    core = _llama(model["vocab"], model["merges"], tokenizer.roles, tokenizer.ids, tokenizer.settings, blank=blank)
    return replace(tokenizer, core=tokenizer_json.taken_as_it_is(core), slow=True)


def _same_ids(given: JsonObject, made: JsonObject) -> bool:
    """Whether two tokenizer.json of LLaMAs give the same ids, by all that they say of the way from a text to ids."""
    try:
        same = tokenizer_json.bpe_model(given) == tokenizer_json.bpe_model(made)
    except InputError:
        return False
    settings = ("unk_token", "fuse_unk", "byte_fallback", "dropout", "ignore_merges")
    model, other = ([core["model"].get(key) or None for key in settings] for core in (given, made))
    steps = all(given.get(key) == made.get(key) for key in ("normalizer", "pre_tokenizer", "truncation"))
    (tokens, around), more = ((tokenizer_json.added_tokens(core), tokenizer_json.template_of(core)) for core in (given, made))
    return same and model == other and steps and (tokens, around) == more


def _changes(old: JsonObject, new: JsonObject) -> Iterator[str]:
    """The differences of two tokenizer_config.json: single values as old -> new, lists and objects by name."""

    def plain(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else "null" if value is None else shown(str(value))

    for key in sorted({*old, *new}):
        before, after = (token_text(value.get(key)) if key.endswith("_token") else value.get(key) for value in (old, new))
        if key not in new:
            yield f"{shown(key)} dropped"
        elif before != after and isinstance(after, dict | list):
            yield f"`{key}` " + ("written anew" if before else "written")
        elif before != after:
            yield f"`{key}` " + (f"{plain(before)} -> {plain(after)}" if key in old else f"{plain(after)} added")
