"""A table of rules: do the tokenizer's files agree? tokenizer.json against tokenizer.model, added tokens, tokens around a text.

Programs that read the same folder take different files: LLaVA's own code tokenizer.model, transformers and vLLM tokenizer.json. Where
these give other ids, one program feeds the model ids that it was not trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..checkpoint.sentencepiece import BPE, NORMAL, Vocabulary
from ..checkpoint.small_files import small_text
from ..checkpoint.tokenizer import FAST, MODEL, RIGHT_TOKENIZER, TOKENIZER_CONFIG, token_text
from ..checkpoint.tokenizer_json import FIRST, bpe_model, has_prefix
from ..storage.strict_json import JsonObject
from ..text import shown
from .rules import Rule, SmallFiles, as_json, listings

MAKE_FAST = f"take `{FAST}` from the authors, or remove it: `llava-weights convert PATH --to llava-hf -o OUT` makes it from `{MODEL}`"
BYTE = 6  # sentencepiece_model.proto, ModelProto.SentencePiece.Type
# Characters squared over all pieces, which is what the ways to cut them cost. LLaMA's pieces have 1.6 million, Gemma's 256,000 17 million.
LARGEST_PIECES = 1 << 26


def _pieces(s: SmallFiles) -> Iterator[str]:
    """Every piece of tokenizer.model, by its id in tokenizer.json."""
    fast, pieces = s.fast_ids, s.pieces
    if not fast or not pieces:
        return
    own = fast.keys() - s.fast_added.keys() | (fast.keys() & pieces.ids.keys())
    if len(own) != len(pieces.ids):
        yield f"`{FAST}` has {len(own):,} tokens, `{MODEL}` {len(pieces.ids):,} pieces: they are of two tokenizers"
    elif wrong := [name for name, i in pieces.ids.items() if fast.get(name) != i]:
        first = wrong[0]
        yield (
            f"{len(wrong):,} of the {len(pieces.ids):,} pieces of `{MODEL}` have another id in `{FAST}`: {shown(first)} is "
            f"{pieces.ids[first]} there, {as_json(fast.get(first))} here"
        )


def _unk_and_bytes(s: SmallFiles) -> Iterator[str]:
    """What tokenizer.json says of the unknown token and of bytes, against tokenizer.model."""
    model = _object(s.of(FAST).get("model"))
    if not s.pieces or not model:
        return
    if s.pieces.model_type == BPE and (named := model.get("type", "BPE")) != "BPE":
        yield f"its model is {as_json(named)}, but `{MODEL}` is a BPE"
    if model.get("unk_token") not in (None, s.pieces.unk):
        yield f"its `unk_token` is {as_json(model['unk_token'])}, but {shown(s.pieces.unk)} in `{MODEL}`"
    if BYTE in s.pieces.kinds.values() and model.get("byte_fallback") is not True:
        yield f"its `byte_fallback` is {as_json(model.get('byte_fallback'))}, but `{MODEL}` has a piece for each byte"


def _merges(s: SmallFiles) -> Iterator[str]:
    """The merges, as far as the pieces and their scores tell them: all there, and better pieces first."""
    if not s.pieces or s.pieces.model_type != BPE or not s.has(FAST) or any(_pieces(s)) or any(_unk_and_bytes(s)):
        return
    if sum(len(name) ** 2 for name in s.pieces.ids) > LARGEST_PIECES:
        return
    yield from _wrong_merges(_found_merges(s), s.pieces)


def _found_merges(s: SmallFiles) -> list[str]:
    """The merges of tokenizer.json, each as one text. Raises InputError where one is no pair of texts."""
    _, found = bpe_model({"model": {**_object(s.of(FAST).get("model")), "vocab": {}}})
    return [" ".join(pair) if isinstance(pair, list) else pair for pair in found]


def _wrong_merges(found: Sequence[str], pieces: Vocabulary) -> Iterator[str]:
    """As `bpe_merges` makes them, without pieces that are no ordinary text; merges that make one piece may be in any order."""
    scores = {name: pieces.scores[name] for name, kind in pieces.kinds.items() if kind == NORMAL}
    known, missing = set(found), list[str]()
    for name, score in scores.items():
        if score:  # transformers before 4.34 left out the merges of the one piece whose score is 0: `_first_merge`
            cuts = ((name[:cut], name[cut:]) for cut in range(1, len(name)))
            missing += [merge for left, right in cuts if left in scores and right in scores and (merge := f"{left} {right}") not in known]
    if missing:
        yield f"{len(missing):,} of the merges that `{MODEL}` gives are missing, such as {shown(missing[0])}"
        return
    before, best = "", float("inf")
    for merge in found:
        left, _, right = merge.partition(" ")
        if left not in scores or right not in scores or left + right not in scores:
            continue
        if (score := scores[left + right]) > best:
            yield f"the merge {shown(merge)} stands behind {shown(before)}, but its piece has the better score in `{MODEL}`"
            return
        before, best = merge, score


def _first_merge(s: SmallFiles) -> Iterator[str]:
    """The merges of the one piece whose score is 0, which transformers before 4.34 left out, as in the file of LLaVA's own delta."""
    if s.pieces and s.pieces.model_type == BPE and s.has(FAST) and not any(_pieces(s)) and not any(_unk_and_bytes(s)):
        found = set(_found_merges(s))
        names = [name for name, score in s.pieces.scores.items() if score == 0 and s.pieces.kinds[name] == NORMAL]
        lacking = [f"{name[:1]} {name[1:]}" for name in names if len(name) == 2 and {*name} <= s.pieces.ids.keys()]
        yield from (f"the merge {shown(merge)} is missing, as in files by transformers of 2023" for merge in lacking if merge not in found)


def _byte_level(s: SmallFiles) -> Iterator[str]:
    """vocab.json and merges.txt of a byte-level tokenizer, which its slow class reads, against tokenizer.json."""
    vocabulary = s.of("vocab.json")
    if s.has(MODEL) or not s.has(FAST) or not vocabulary:
        return
    own = {name: i for name, i in s.fast_ids.items() if name in vocabulary or name not in s.fast_added}
    if own != vocabulary:
        wrong = [name for name in {**own, **vocabulary} if own.get(name) != vocabulary.get(name)]
        ids = f"{shown(wrong[0])} is {as_json(vocabulary.get(wrong[0]))} there, {as_json(own.get(wrong[0]))} here"
        yield f"{len(wrong):,} tokens of `vocab.json` have another id in `{FAST}`: {ids}"
        return
    if (text := small_text(s.checkpoint.files, "merges.txt", limit=16 << 20)) is None:
        return
    lines = [line.rstrip("\r") for line in text.split("\n")]
    pairs = [line for line in lines[lines[0].startswith("#version") :] if line.strip()]
    if (found := _found_merges(s)) != pairs:
        yield f"its merges are not those of `merges.txt` ({len(found):,} and {len(pairs):,})"


def _own_ids(s: SmallFiles) -> Iterator[str]:
    """tokenizer.json against itself: added tokens, and the tokens put around a text."""
    for name, i in s.fast_added.items():
        if (inside := s.fast_ids.get(name, i)) != i:
            yield f"{shown(name)} has the id {inside} in its vocabulary, but {i} among its added tokens"
    known = {**s.fast_ids, **s.fast_added}
    for name, ids in _around(s.of(FAST))[2].items():
        if name in known and ids != [known[name]]:
            yield f"its `post_processor` puts {as_json(ids)} for {shown(name)}, which is {known[name]}"


def _bos_and_eos(s: SmallFiles) -> Iterator[str]:
    """bos and eos around a text: some readers go by tokenizer.json, others by the flags in tokenizer_config.json."""
    if not s.is_llama or not s.has(FAST) or not s.of(FAST):
        return
    before, after, _ = _around(s.of(FAST))
    for key, role, names in (("add_bos_token", "bos", before), ("add_eos_token", "eos", after)):
        flag, token = s.of(TOKENIZER_CONFIG).get(key), token_text(s.of(TOKENIZER_CONFIG).get(f"{role}_token"))
        if type(flag) is bool and token and flag != (token in names):
            puts = f"puts {', '.join(map(shown, names))}" if names else "puts nothing"
            place = "before" if role == "bos" else "behind"
            yield f"`{key}` is {as_json(flag)} and {role} {shown(token)}, but `{FAST}` {puts} {place} a text"


def _one_token_an_id(s: SmallFiles) -> Iterator[str]:
    """Two tokens of one id."""
    names = {i: (MODEL if s.pieces else FAST, name) for name, i in (s.pieces.ids if s.pieces else s.fast_ids).items()}
    for file, name, i in listings(s.objects):
        first, known = names.setdefault(i, (file, name))
        if known != name:
            yield f"id {i} is {shown(known)} in `{first}`, but {shown(name)} in `{file}`"


def _added_elsewhere(s: SmallFiles) -> Iterator[str]:
    """Added tokens that tokenizer.json does not know, while it knows others."""
    if not s.of(FAST):
        return
    known = {**s.fast_ids, **s.fast_added}
    others: dict[str, str] = {}
    for file, name, _ in listings(s.objects):
        if name not in known:
            others.setdefault(name, file)
    for name, file in others.items():
        yield f"`{file}` lists {shown(name)}, which `{FAST}` does not know: readers give its text other ids"


def _truncation(s: SmallFiles) -> Iterator[str]:
    if cut := _object(s.of(FAST).get("truncation")):
        yield f"its `truncation` cuts every text to {as_json(cut.get('max_length'))} tokens, for readers that do not set it themselves"


def odd_form(s: SmallFiles) -> str:
    """How tokenizer.json of a LLaMA puts blanks before a text, where not as LLaVA's own tokenizer; else nothing."""
    normalizer, before = s.of(FAST).get("normalizer"), s.of(FAST).get("pre_tokenizer")
    steps = _object(normalizer).get("normalizers")
    kinds = [step.get("type") for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    bare = s.of(TOKENIZER_CONFIG).get("add_prefix_space") is False and kinds == ["Replace"]
    if before is None and (kinds == ["Prepend", "Replace"] or bare):
        return ""
    return as_json(before.get("type") if isinstance(before, dict) else kinds or normalizer)


def _blanks(s: SmallFiles) -> Iterator[str]:
    """For the original layout, whose own code reads tokenizer.model: with `legacy` false, a blank stands before the first piece alone."""
    if not s.pieces or not s.of(FAST):
        return
    form = odd_form(s)
    if s.of(TOKENIZER_CONFIG).get("legacy") is False:
        form = "" if s.of(FAST).get("pre_tokenizer") == FIRST else form or "Prepend" * has_prefix(s.of(FAST))
    if form:
        yield f"its form is {form}: it puts blanks where `{MODEL}`, which LLaVA's own code reads, does not"


def _around(core: Mapping[str, Any]) -> tuple[list[str], list[str], dict[str, list[Any]]]:
    """Tokens that tokenizer.json puts before and behind a text, and the ids that it gives them there."""
    step = _object(core.get("post_processor"))
    steps = step.get("processors") if step.get("type") == "Sequence" else [step]
    template = (
        next((x for x in steps if isinstance(x, dict) and x.get("type") == "TemplateProcessing"), {}) if isinstance(steps, list) else {}
    )
    pieces = template.get("single")
    names = [_object(piece) for piece in pieces] if isinstance(pieces, list) else []
    texts = ["" if "Sequence" in piece else str(_object(piece.get("SpecialToken")).get("id")) for piece in names]
    middle = texts.index("") if "" in texts else len(texts)
    special = {name: _object(entry).get("ids") for name, entry in _object(template.get("special_tokens")).items()}
    return texts[:middle], texts[middle + 1 :], {name: ids for name, ids in special.items() if isinstance(ids, list) and ids}


def _object(value: Any) -> JsonObject:
    return value if isinstance(value, dict) else {}


BLANKS = Rule(FAST, "form", _blanks, "note")
TOKENIZER_RULES = (
    Rule("tokenizer", f"{FAST} as {MODEL}", _pieces, remedy=MAKE_FAST),
    Rule("tokenizer", "one token for each id", _one_token_an_id, remedy=RIGHT_TOKENIZER),
    Rule("tokenizer", "added tokens", _added_elsewhere, "warning", RIGHT_TOKENIZER),
    Rule("tokenizer", "bos and eos around a text", _bos_and_eos, remedy=RIGHT_TOKENIZER),
    Rule(FAST, f"as {MODEL}", _unk_and_bytes, remedy=MAKE_FAST),
    Rule(FAST, "merges", _merges, remedy=MAKE_FAST),
    Rule(FAST, "merges", _first_merge, "note"),
    Rule(FAST, "merges", _byte_level, remedy=RIGHT_TOKENIZER),
    Rule(FAST, "ids", _own_ids, remedy=RIGHT_TOKENIZER),
    Rule(FAST, "no truncation", _truncation, "warning", "set it to null"),
)
