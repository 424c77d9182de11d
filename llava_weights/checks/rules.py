"""What a rule on small files is, what it is given, and how its sentences become findings.

A rule yields one sentence for each thing that is wrong in its file. `check` makes findings of them; where nothing is wrong, it says what
was checked. Nothing here raises for a damaged file: that is a finding too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..checkpoint.chat_template import Choice
from ..checkpoint.checkpoint import LARGEST_OBJECT, Checkpoint
from ..checkpoint.hf_config import flat_config
from ..checkpoint.prompt import likely_prompt
from ..checkpoint.sentencepiece import Vocabulary, read_sentencepiece
from ..checkpoint.small_files import small_bytes, small_object
from ..checkpoint.tokenizer import ADDED, FAST, FAST_LIMIT, MODEL, MODEL_LIMIT, SPECIAL, TOKENIZER_CONFIG, read_special_ids, token_text
from ..checkpoint.tokenizer_json import added_tokens
from ..checkpoint.tower import VisionTower, own_tower
from ..errors import InputError
from ..families.layouts import canonical
from ..families.targets import TARGET_BY_TYPE as TARGETS
from ..families.targets import TARGET_DEFAULTS, Target
from ..findings import Finding, Verdict
from ..storage.strict_json import JsonObject
from ..tensors.lazy import LazyTensor
from ..text import unquoted

CONFIG, GENERATION_CONFIG, VOCAB = "config.json", "generation_config.json", "vocab.json"
PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
CHAT_TEMPLATE, JINJA = "chat_template.json", "chat_template.jinja"
FILE_LIMITS = {FAST: FAST_LIMIT, VOCAB: FAST_LIMIT}  # bytes
CORRECT = "correct it by hand, or take the file from the authors of the model"


@dataclass(frozen=True)
class SmallFiles:
    """A checkpoint with its small files read: `objects` are JSON by file name, `tensors` are by canonical name.

    `ids` are the true special ids by role, empty where no tokenizer tells them; `tower` is None where there is none that is whole.
    """

    checkpoint: Checkpoint
    objects: Mapping[str, JsonObject]
    tensors: Mapping[str, LazyTensor]
    ids: Mapping[str, int]
    base_vocabulary: int
    tower: VisionTower | None

    def of(self, file: str) -> JsonObject:
        return self.objects.get(file, {})

    def has(self, file: str) -> bool:
        return file in self.checkpoint.files

    @property
    def rows(self) -> int:
        return table.rows if (table := self.tensors.get("text.embed_tokens.weight")) else 0

    @property
    def text(self) -> JsonObject:
        """The text model's part of a llava-hf config; `model_type` is always a text."""
        text = flat_config(self.of(CONFIG))
        return {**text, "model_type": str(text["model_type"])}

    @property
    def target(self) -> Target | None:
        """The row of the class of transformers that a llava-hf config names, None for a class that no row describes."""
        return TARGETS.get(str(self.of(CONFIG).get("model_type")))

    def told(self, key: str) -> Any:
        """What a llava-hf config says for `key`, else what its class assumes."""
        defaults = self.target.defaults if self.target else TARGET_DEFAULTS
        older = f"{key}s"  # `vision_feature_layers` is ViP-LLaVA's name for it before transformers 5
        return self.of(CONFIG).get(key, self.of(CONFIG).get(older, defaults.get(key)))

    @property
    def tiles(self) -> bool:
        """Whether that class takes images in tiles."""
        return self.target is not None and self.target.tiles

    @property
    def image_token(self) -> str:
        """The text that stands for an image in a prompt of llava-hf: the tokenizer's own, where it has one, counts (transformers 4.46)."""
        extra = self.of(TOKENIZER_CONFIG).get("extra_special_tokens")
        tokens = (extra.get("image_token") if isinstance(extra, dict) else None, self.of(TOKENIZER_CONFIG).get("image_token"))
        named = (token_text(token) for token in (*tokens, self.of(PROCESSOR).get("image_token")))
        return next((text for text in named if text is not None), "<image>")

    @property
    def tokens(self) -> dict[str, int]:
        """Ids by text: those of tokenizer.json, and the added tokens of every file."""
        return {**_vocab(self.objects), **added_ids(self.objects)}

    @property
    def specials(self) -> frozenset[str]:
        """The texts of the added tokens, and of the pieces of tokenizer.model that are found in a text as a whole."""
        return (self.pieces.whole if self.pieces else frozenset()).union(added_ids(self.objects))

    @property
    def prompt(self) -> Choice | None:
        """How it is prompted, by config and tokens; None where they do not tell. Raises InputError for an unknown `conv_mode`."""
        return likely_prompt(self.checkpoint.layout, self.of(CONFIG), self.checkpoint.parameters(), self.specials)

    @property
    def is_llama(self) -> bool:
        """Whether the tokenizer is SentencePiece's or falls back on bytes as that does, not a byte-level one."""
        model = self.of(FAST).get("model")
        return self.has(MODEL) or (isinstance(model, dict) and model.get("byte_fallback") is True)

    @cached_property
    def pieces(self) -> Vocabulary | None:
        """What tokenizer.model holds, None where there is none or it can't be read, which is a finding of `read_small_files`."""
        try:
            return read_sentencepiece(small_bytes(MODEL, self.checkpoint.files[MODEL], MODEL_LIMIT)) if self.has(MODEL) else None
        except InputError:
            return None

    @cached_property
    def fast_ids(self) -> Mapping[str, int]:
        """Ids by text of the model in tokenizer.json; added tokens may be among them."""
        return _vocab(self.objects)

    @cached_property
    def fast_added(self) -> Mapping[str, int]:
        """Ids by text of the added tokens in tokenizer.json."""
        return {entry["content"]: i for i, entry in added_tokens(self.of(FAST)).items()}


@dataclass(frozen=True)
class Rule:
    """`find` yields a sentence for each thing wrong in `file`; `about` names what it looks at, for the list of what was checked."""

    file: str
    about: str
    find: Callable[[SmallFiles], Iterable[str]]
    verdict: Verdict = "failed"
    remedy: str = CORRECT

    @property
    def name(self) -> str:
        """What `--allow` takes: the names of the file and of the function, which therefore must not change."""
        return f"{self.file.removesuffix('.json')}/{self.find.__name__.strip('_').replace('_', '-')}"


def read_small_files(checkpoint: Checkpoint) -> tuple[SmallFiles, list[Finding]]:
    """The small files, and a failed finding for each that can't be read: rules on it are left out."""
    objects: dict[str, JsonObject] = {CONFIG: dict(checkpoint.config)} if checkpoint.config else {}
    findings = []
    for name in checkpoint.files:
        if name.endswith(".json"):
            try:
                objects[name] = small_object(checkpoint.files, name, limit=FILE_LIMITS.get(name, LARGEST_OBJECT))
            except InputError as error:
                findings.append(refused(error, name))
    tensors = {canonical(name): tensor for name, tensor in checkpoint.parameters().items()}
    rows = tensors["text.embed_tokens.weight"].rows if "text.embed_tokens.weight" in tensors else 0
    ids, base = dict[str, int](), 0
    try:
        ids, base = _special_ids(checkpoint, objects, rows)
    except InputError as error:
        if not findings:  # else it only says again what could not be read
            findings.append(refused(error, "tokenizer"))
    try:
        tower = own_tower(checkpoint.tensors, vision_config=vision(objects), model=None) if checkpoint.layout == "llava-hf" else None
    except InputError:
        tower = None  # the rule `_tower` says why
    return SmallFiles(checkpoint, objects, tensors, ids, base, tower), findings


def check(rules: Iterable[Rule], small_files: SmallFiles) -> list[Finding]:
    """What the rules find, and one `ok` for each file without a fault (a note is none), with what was checked. Skips unreadable files."""
    findings: list[Finding] = []
    groups: dict[str, list[Rule]] = {}
    for rule in rules:
        groups.setdefault(rule.file, []).append(rule)
    for file, every in groups.items():
        absent = file.endswith(".json") and file not in small_files.objects
        if absent and small_files.has(file):
            continue
        if absent and file == CONFIG:
            findings.append(Finding("L0", "unchecked", CONFIG, "there is no config.json to compare with"))
            continue
        found = [finding for rule in every for finding in _found(rule, small_files)]
        about = ", ".join(dict.fromkeys(rule.about for rule in every))
        fine = not absent and all(finding.verdict == "note" for finding in found)
        findings += [*found, *([Finding("L0", "ok", file, f"right: {about}")] if fine else [])]
    return findings


def _found(rule: Rule, small_files: SmallFiles) -> list[Finding]:
    try:
        return [Finding("L0", rule.verdict, rule.file, text, rule.remedy, rule.name) for text in rule.find(small_files)]
    except InputError as error:
        return [refused(error, rule.file)]


def refused(error: InputError, subject: str, remedy: str = CORRECT) -> Finding:
    """What a reader refuses, as a failed finding, without paths of this machine."""
    facts = "".join(f"; {label}: {text}" for label, text in error.facts.items() if label not in ("path", "folder", "link", "leads to"))
    return Finding("L0", "failed", subject, error.what + facts, error.hint or remedy)


def as_json(value: Any) -> str:
    """A JSON value for a message."""
    return "missing" if value is None else unquoted(json.dumps(value, ensure_ascii=False))


def _special_ids(checkpoint: Checkpoint, objects: Mapping[str, JsonObject], rows: int) -> tuple[dict[str, int], int]:
    """The id of each role, and how many pieces tokenizer.model has (0 without one). Raises InputError for contradicting files."""
    if MODEL in checkpoint.files:
        ids = read_special_ids({name: x for name, x in checkpoint.files.items() if name != FAST}, rows or 1 << 31)
        told = {"bos": ids.bos, "eos": ids.eos, "pad": ids.pad, "unk": ids.unk}
        return {role: i for role, i in told.items() if i is not None}, ids.base_vocabulary
    known = {**_vocab(objects), **added_ids(objects)}
    found: dict[str, int] = {}
    for role in ("bos", "eos", "pad", "unk"):
        names = (token_text(objects.get(file, {}).get(f"{role}_token")) for file in (TOKENIZER_CONFIG, SPECIAL))
        found |= next(({role: known[name]} for name in names if name in known), {})
    return found, 0


def _vocab(objects: Mapping[str, JsonObject]) -> dict[str, int]:
    model = objects.get(FAST, {}).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    return {name: i for name, i in vocabulary.items() if type(i) is int} if isinstance(vocabulary, dict) else {}


def added_ids(objects: Mapping[str, JsonObject]) -> dict[str, int]:
    """The added tokens that any of the files lists."""
    return {name: i for _, name, i in listings(objects)}


def listings(objects: Mapping[str, JsonObject]) -> Iterator[tuple[str, str, int]]:
    """(file, token, id) of every list of added tokens."""
    yield from ((FAST, entry["content"], i) for i, entry in added_tokens(objects.get(FAST, {})).items())
    decoder = objects.get(TOKENIZER_CONFIG, {}).get("added_tokens_decoder")
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        if key.isdecimal() and len(key) < 10 and (name := token_text(entry)):
            yield TOKENIZER_CONFIG, name, int(key)
    yield from ((ADDED, name, i) for name, i in objects.get(ADDED, {}).items() if type(i) is int)


def vision(objects: Mapping[str, JsonObject]) -> JsonObject:
    """The `vision_config`, empty without one."""
    value = objects.get(CONFIG, {}).get("vision_config")
    return value if isinstance(value, dict) else {}
