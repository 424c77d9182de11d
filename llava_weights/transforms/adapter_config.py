"""adapter_config.json, as PEFT writes it beside an adapter: how strongly each low-rank update counts, and what it adapts.

The file comes from strangers: numbers and the cost of patterns are bounded, and a setting with which PEFT would compute something that
this program does not is refused by its name. Source: `LoraConfig`, `get_pattern_key` and `update_layer`, PEFT 0.4-0.21.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NoReturn

from ..errors import InputError
from ..storage.places import Place
from ..storage.strict_json import load_object
from ..text import listed, shown

MAX_RANK = 65536
MAX_ALPHA = 1e12
MAX_PATTERN = 200  # characters; a module's full name has about 60
MAX_REPEATS = 2  # `*`, `+` and `{}` of one pattern
MAX_WAYS = 4096
MAX_WORK = 200_000_000  # steps of all matching together, some ten seconds; honest patterns need about a million
MAX_TOKENS = 1 << 20
MAX_LISTED = 5000  # names in a list, or patterns; each is compared with every module

# Settings of training, saving or naming: the merged weights are the same whatever they say.
HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_dtype", "lora_ga_config",
    "lorap_emb_lr", "lorap_lr_ratio", "megatron_core", "merge_weights", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type", "unsloth_fixed",
})  # fmt: skip
READ = frozenset({
    "alpha_pattern", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r",
    "rank_pattern", "target_modules", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
})  # fmt: skip
# Settings that, when set, change what the adapter computes.
VARIANTS = {
    "alora_invocation_string": "aLoRA", "alora_invocation_tokens": "aLoRA", "arrow_config": "Arrow", "kasa_config": "KaSA",
    "layer_replication": "layer replication", "megatron_config": "Megatron", "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA", "use_qalora": "QA-LoRA", "velora_config": "VeLoRA",
}  # fmt: skip
OTHER_METHODS = {
    "ADALORA": "AdaLoRA", "IA3": "IA3", "LOHA": "LoHa", "LOKR": "LoKr", "RANDLORA": "RandLoRA", "TRAINABLE_TOKENS": "trainable tokens",
    "VBLORA": "VB-LoRA", "VERA": "VeRA", "XLORA": "X-LoRA",
}  # fmt: skip
KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
CHANGES_BASE = r"pissa.*|olora|corda|lora_ga|loftq"

PLAIN_LORA = "only LoRA adapters can be merged; merge this one with the library that trained it"
RIGHT_ADAPTER_CONFIG = "give the adapter_config.json that was saved with these weights"
QUANTISED_NAME = r"(?i)(?:.*[-_./])?(?:4-?bit|8-?bit|bnb|nf4|int4|int8|gptq|awq)(?:[-_./].*)?"
TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\(\?|\{\d*(?:,\d*)?\}|.", re.DOTALL)


@dataclass(frozen=True)
class Pattern:
    """One entry of `rank_pattern` or `alpha_pattern`, and the ways and repeats by which its expression can branch."""

    expression: re.Pattern[str]
    value: float
    ways: int
    repeats: int

    def work(self, name: str) -> int:
        """Steps that matching `name` can take: places for the repeats and for PEFT's own leading `.*`."""
        return self.ways * math.comb(len(name) + self.repeats + 1, self.repeats + 1)


@dataclass(frozen=True)
class LoraRules:
    """What adapter_config.json says about the arithmetic. `facts` are for people and for the manifest."""

    rank: int
    alpha: float
    rank_patterns: tuple[Pattern, ...] = ()
    alpha_patterns: tuple[Pattern, ...] = ()
    rslora: bool = False
    dora: bool = False
    bias: bool = False  # `lora_B` has a bias of its own
    fan_in_fan_out: bool = False
    target_modules: tuple[str, ...] = ()  # empty where it is an expression
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # by module, "" where only a list was given
    facts: Mapping[str, Any] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank of a module: that of the first pattern `(.*\\.)?(key)$` that matches its name, else `r`."""
        return int(_first(self.rank_patterns, module, self.rank))

    def scale_of(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA, in doubles as PEFT computes it."""
        alpha, rank = _first(self.alpha_patterns, module, self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def indices_of(self, module: str) -> tuple[int, ...] | None:
        """The rows of an embedding that were trained. A tied head is not in the config: it shares those of the only entry."""
        found = [value for key, value in self.token_indices.items() if module == key or module.endswith(f".{key}")]
        return next(iter(found or (list(self.token_indices.values()) if len(self.token_indices) == 1 else ())), None)

    def check_effort(self, modules: Iterable[str]) -> None:
        """Raise InputError where matching the patterns against these modules could take minutes."""
        patterns = self.rank_patterns + self.alpha_patterns
        work = accumulate(pattern.work(name) for name in modules for pattern in patterns)
        if any(done > MAX_WORK for done in work):  # counting ends there too
            raise InputError("the patterns in `adapter_config.json` are too costly to match against its modules", hint=RIGHT_ADAPTER_CONFIG)


def read_rules(path: Place) -> LoraRules:
    """Read adapter_config.json.

    Raises InputError for a method other than LoRA and for a variant that can't be merged, naming it, and for values that no
    program wrote.
    """
    config = load_object(path)
    _refuse_methods(config)
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    facts = {"type": "LORA", "r": rank, "alpha": alpha} | {
        key: config[key] for key in ("base_model_name_or_path", "peft_version") if isinstance(config.get(key), str)
    }
    targets = config.get("target_modules")
    return LoraRules(
        rank=_rank(rank, "r"),
        alpha=_alpha(alpha, "lora_alpha"),
        rank_patterns=tuple(_pattern(key, _rank(value, "rank_pattern"), "rank_pattern") for key, value in _map(config, "rank_pattern")),
        alpha_patterns=tuple(
            _pattern(key, _alpha(value, "alpha_pattern"), "alpha_pattern") for key, value in _map(config, "alpha_pattern")
        ),
        rslora=_flag(config, "use_rslora"),
        dora=_flag(config, "use_dora"),
        bias=_flag(config, "lora_bias"),
        fan_in_fan_out=_flag(config, "fan_in_fan_out"),
        target_modules=() if isinstance(targets, str) else _texts(config, "target_modules"),
        target_parameters=_texts(config, "target_parameters"),
        modules_to_save=_texts(config, "modules_to_save"),
        token_indices=_token_indices(config.get("trainable_token_indices")),
        facts=facts,
    )


def short_base(name: str) -> str:
    """A recorded base as it may be shown: `owner/name` of the Hub whole, the last part of a path on its author's machine."""
    if re.fullmatch(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?", name):
        return name
    return re.split(r"[/\\]+", name.rstrip("/\\"))[-1]


def quantised_base(base: str, config: Mapping[str, Any]) -> str:
    """What tells that the adapter was trained on a quantised base: the recorded name or LLaVA's config. Empty for nothing."""
    quantisation = config.get("quantization_config")
    if isinstance(quantisation, dict):
        bits = next((bits for bits in (4, 8) if quantisation.get(f"load_in_{bits}bit") is True), None)
        return f"`quantization_config` in config.json{f' ({bits} bits)' if bits else ''}"
    return f"the name of its base, {shown(short_base(base))}" if re.fullmatch(QUANTISED_NAME, base) else ""


def _refuse_methods(config: Mapping[str, Any]) -> None:
    """Raise InputError for everything that is not LoRA on the base as it is, naming it."""
    method = config.get("peft_type")
    if method != "LORA":
        name = OTHER_METHODS.get(str(method), shown(str(method)))
        facts = {"adapter_config.json": f"peft_type {shown(str(method))}"}
        raise InputError(f"the adapter is not a LoRA but of the kind {name}", facts=facts, hint=PLAIN_LORA)
    for key, title in VARIANTS.items():
        if _is_set(config.get(key)):
            raise InputError(f"the adapter uses {title}, by `{key}` in adapter_config.json", hint=PLAIN_LORA)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and re.fullmatch(CHANGES_BASE, start.lower()):
        hint = "save it again with PEFT's `path_initial_model_for_weight_conversion`, which makes an ordinary LoRA of it"
        raise InputError(f"the adapter began as {shown(start)}, which changed the base that it belongs to", hint=hint)
    if not (start is None or isinstance(start, bool) or start in KEEPS_BASE):
        raise InputError(f"`init_lora_weights` is {shown(str(start))}, and what that does to the base is unknown", hint=PLAIN_LORA)
    unknown = [key for key in config if key not in HARMLESS | READ | VARIANTS.keys() and _is_set(config[key])]
    if unknown:
        hint = "these may change what the adapter computes; remove those that do not from adapter_config.json"
        raise InputError(f"unknown settings in adapter_config.json: {listed(unknown)}", hint=hint)


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {})


def _refuse(key: str, value: Any, wanted: str) -> NoReturn:
    raise InputError(f"`{key}` is {shown(str(value))} in adapter_config.json, not {wanted}", hint=RIGHT_ADAPTER_CONFIG)


def _rank(value: Any, key: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        _refuse(key, value, f"a rank from 1 to {MAX_RANK}")
    return value


def _alpha(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        _refuse(key, value, "a sensible number")
    return float(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if not (value is None or isinstance(value, bool)):
        _refuse(key, value, "true or false")
    return bool(value)


def _texts(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = config.get(key)
    if not (value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))):
        _refuse(key, value, "a list of names")
    _check_count(key, value)
    return tuple(value or ())


def _map(config: Mapping[str, Any], key: str) -> Iterable[tuple[str, Any]]:
    value = config.get(key)
    if not (value is None or isinstance(value, dict)):
        _refuse(key, value, "an object")
    _check_count(key, value)
    return (value or {}).items()


def _check_count(key: str, value: Collection[Any] | None) -> None:
    if value is not None and len(value) > MAX_LISTED:
        raise InputError(
            f"`{key}` has {len(value):,} entries in adapter_config.json, at most {MAX_LISTED:,} are read", hint=RIGHT_ADAPTER_CONFIG
        )


def _token_indices(value: Any) -> dict[str, tuple[int, ...]]:
    """Rows by module. Order counts: row i of the stored tensor belongs at the i-th index."""
    given = value if isinstance(value, dict) else {"": value} if value is not None else {}
    for rows in given.values():
        sound = isinstance(rows, list) and rows and all(type(row) is int and 0 <= row < MAX_TOKENS for row in rows)
        if not sound or len(set(rows)) != len(rows):
            _refuse("trainable_token_indices", rows, "a list of different token ids")
    return {key: tuple(rows) for key, rows in given.items()}


# --- patterns: regular expressions from an untrusted file -----------------------------------------------------------


def _first(patterns: tuple[Pattern, ...], module: str, default: float) -> float:
    return next((pattern.value for pattern in patterns if pattern.expression.match(module)), default)


def _pattern(key: str, value: float, setting: str) -> Pattern:
    """Compile a key. Raises InputError for one that is no expression, or one of a kind that could take forever to match."""
    try:
        ways, repeats = _branches(key)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # `[[` and the like
            re.compile(key)  # by itself: `a)|(b` would be an expression only inside the brackets below
            return Pattern(re.compile(rf"(.*\.)?({key})$"), value, ways, repeats)
    except (ValueError, re.error, Warning, OverflowError, RecursionError) as error:
        hint = "write the full names of the modules instead"
        raise InputError(f"`{setting}` has the key {shown(key)} in adapter_config.json: {error}", hint=hint) from error


def _branches(key: str) -> tuple[int, int]:
    """In how many ways an expression can branch, and how many repeats it has.

    Raises ValueError for what makes matching exponential or can't be counted: a repeated group, look-around, a back
    reference, too many branches.
    """
    if len(key) > MAX_PATTERN:
        raise ValueError(f"longer than {MAX_PATTERN} characters")
    ways, repeats, before, choices = 1, 0, "", [1]
    for token in TOKEN.findall(key):
        repeated = before == "*"
        if token == "(?" or re.fullmatch(r"\\[1-9]", token):
            raise ValueError("look-around, flags, names and back references are not accepted")
        if token in ("(", "(?:"):
            choices.append(1)
        elif token == "|":
            choices[-1] += 1
        elif token == ")" and len(choices) > 1:
            ways *= choices.pop()
        elif token == "?":
            ways *= 1 if repeated else 2  # after a repeat it only makes it lazy
        elif token in ("*", "+") or token[0] == "{":
            if before == ")":
                raise ValueError("a repeated group is not accepted")
            repeats += not repeated
            token = "*"
        before = token
    ways *= choices[0]
    if ways > MAX_WAYS or repeats > MAX_REPEATS:
        raise ValueError("more repeats or alternatives than are accepted")
    return ways, repeats
