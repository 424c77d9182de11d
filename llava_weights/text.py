"""Sizes, times, names and lists as a person reads them, with control characters and secrets taken out. Nothing here prints."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, takewhile
from typing import Any
from urllib.parse import quote

UNITS = ((10**15, "PB"), (10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))  # decimal, as the Hub counts
# No text that is shown or saved may hold the values of these variables, tokens, passwords in addresses, or what follows the path of an
# address: signed addresses (Amazon's, Google's, Azure's; the Hub redirects to them) and logins keep secrets in queries and fragments.
SECRET_VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_CONNECTION_STRING", "AZURE_CLIENT_SECRET", "GITHUB_TOKEN", "GH_TOKEN", "ACTIONS_RUNTIME_TOKEN",
    "ACTIONS_ID_TOKEN_REQUEST_TOKEN", "FSSPEC_S3_SECRET", "FSSPEC_S3_TOKEN",
)  # fmt: skip
# Names of parameters that hold a secret, at the end of a longer name too: `X-Amz-Signature`, `access_token`.
SECRET_NAME = (
    r"(?:[\w.-]{0,64}[-_.])?(?:token|secret|signature|sig|key|credentials?|password|passwd|pwd|auth|authorization|jwt|assertion|code)"
    r"|(?:x-amz|x-goog)-[\w-]{1,64}|key-pair-id|accountkey|awsaccesskeyid|apikey|accesstoken|sharedaccess(?:key|signature)"
)
# Each takes time linear in the text's length: a repetition is bounded, or can't match where another match would begin.
SECRETS = (
    (re.compile(r"hf_(?:oauth|jwt)_[\w.-]{16,}"), "hf_***"),
    (re.compile(r"(gh[pousr]|github_pat)_\w{20,}"), r"\1_***"),
    (re.compile(r"(?i)\b(authorization['\"]?\s?[:=]\s{0,5}['\"]?(?:(?:basic|bearer|digest|token) )?)[^'\"`\n]+"), r"\1***"),
    (re.compile(r"(?i)\b(bearer)\s+[\w.~+/=-]{16,}"), r"\1 ***"),
    (re.compile(rf"(?i)([?&#;](?:{SECRET_NAME})=)[^\s&;`'\"<>]+"), r"\1***"),
    (re.compile(r"(?i)\b(x-(?:amz|goog)-(?:signature|credential|security-token)|signature|key-pair-id|sig)=[^\s&`'\"]+"), r"\1=***"),
    (re.compile(rf"\b((?:{'|'.join(SECRET_VARIABLES)})['\"]?\s{{0,5}}[=:]\s{{0,5}}['\"]?)[^\s`'\",]+"), r"\1***"),
    (re.compile(r"(?i)\b(password|access_?token|client_?secret|accountkey|sharedaccess(?:key|signature))=[^\s&;`'\"]+"), r"\1=***"),
    # An address that went through a `Path`, which makes one slash of two.
    (re.compile(r"([A-Za-z0-9]:/)(?!/)[^\s/@:`'\"]{0,100}:[^\s@`'\"]{1,200}@"), r"\1***@"),
)
HUB_TOKEN = re.compile(r"(hf|api_org)_([A-Za-z0-9]{16,})")
HUB_TOKEN_LENGTH = 34
CUT = 16  # characters: a piece of a secret that is as long is still a secret
WORD = re.compile(r"[^\s\"`<>]+")  # an address ends at one of these characters
HOST_AND_PORT = re.compile(r"(?:localhost|[^:@.]*\.[^:@]*|\[[^\]@]*\]):\d{1,5}")
CLOSING = "'),.;]}"  # what follows an address in a sentence
# What a CI takes for a command in a program's output: GitHub `::` at the start of a line, GitHub and others `##[` anywhere.
CI_COMMAND = re.compile(r"^(\s*):(?=:)|##(?=\w{0,16}\[)")
CODE_SPAN = re.compile(r"(?<!`)`([^`|]+)`(?!`)")
MARKUP = re.compile(r"[\\`*\[\]<>|~&$#@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?i:(?<=www)\.)")
EMAIL = re.compile(r"(?<=[A-Za-z0-9._+-])@(?=[A-Za-z0-9_-])")  # GitHub makes a link of it even where it is escaped
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30})://")


def size(nbytes: int) -> str:
    """Decimal and short: `26.0 GB`, `949 MB`, `12.3 kB`, `17 bytes`."""
    scale, unit = _unit(nbytes)
    return "1 byte" if nbytes == 1 else f"{_number(nbytes, scale)} {unit}"


def duration(seconds: float) -> str:
    """A time in a sentence: `0.8 s`, `24 s`, `1m 24s`, `2h 03m`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}m {whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h {whole // 60 % 60:02d}m"


def clock_face(seconds: float) -> str:
    """A time in a progress line: `0:53`, `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}" if minutes >= 60 else f"{minutes}:{second:02d}"


def visible(text: str) -> str:
    """`text` on one line with control, format (bidi overrides, zero width) and undecodable characters written as escapes."""
    return text if text.isprintable() else "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def command_free(line: str) -> str:
    """`line` with escapes where a CI would take it for a command, as `::error ...` and `##[...]`."""
    return CI_COMMAND.sub(lambda found: "#\\x23" if found[1] is None else f"{found[1]}\\x3a", line)


def markdown_text(text: str) -> str:
    """`text` for one line of Markdown or a table's cell: without secrets, markup, links and HTML, but text between two backticks stays
    code. CommonMark and GitHub's Markdown read it alike."""
    pieces = CODE_SPAN.split(visible(redact(text)))
    return "".join(f"`{piece}`" if number % 2 else _escaped(piece) for number, piece in enumerate(pieces))


def _escaped(text: str) -> str:
    return "`@`".join(MARKUP.sub(r"\\\g<0>", piece) for piece in EMAIL.split(text))


def redact(text: str) -> str:
    """`text` without tokens, passwords in addresses, queries and signatures: for everything that may be shown or saved.

    Takes time linear in the length. A token of the Hub, or a piece of one, has 34 letters and digits and mixes cases as no name does;
    other words that begin with `hf_` are names.
    """
    for variable in SECRET_VARIABLES:
        secret = os.environ.get(variable, "").strip()
        if len(secret) >= 8:
            text = _without(text, secret)
    text = HUB_TOKEN.sub(lambda found: f"{found[1]}_***" if _may_be_token(found[2]) else found[0], text)
    if "://" in text:
        text = WORD.sub(lambda found: _address(found[0]) if "://" in found[0] else found[0], text)
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _without(text: str, secret: str) -> str:
    """`text` with *** for `secret`, as it is or as spelled in an address, a JSON file or a header, and for one that is cut short."""
    encoded = base64.b64encode(secret.encode(errors="surrogateescape")).decode()
    for form in dict.fromkeys((secret, quote(secret, safe=""), quote(secret), secret.replace("/", "\\/"), encoded)):
        text = text.replace(form, "***")
        begin = form[:CUT]
        if len(form) > CUT and begin in text:
            first, *others = text.split(begin)
            text = first + "".join("***" + other[_shared(form[CUT:], other) :] for other in others)
    return text


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _may_be_token(letters: str) -> bool:
    """Whether these letters after `hf_` can be a token, whole or cut short."""
    if len(letters) >= HUB_TOKEN_LENGTH:
        return len(letters) == HUB_TOKEN_LENGTH or not (letters.islower() or letters.isupper())
    cases = [letter.isupper() for letter in letters if letter.isalpha()]
    return sum(one != other for one, other in pairwise(cases)) > 0.35 * len(cases)  # a half in tokens, a quarter in MixedCaseNames


def _address(word: str) -> str:
    """A word that contains an address, with *** for its user and password, its query, and a fragment that has values."""
    last, place, kept, pieces = word.rfind("@"), word.find("://"), 0, list[str]()
    while place >= 0:
        start = place + 3
        slash = word.find("/", start)
        authority = word[start : slash if slash >= 0 else len(word)]
        user = authority.rpartition("@")[0]
        end = start + len(user) if user else -1
        if ":" in (user or authority) and start < last and not HOST_AND_PORT.fullmatch(authority):
            end = last  # a password may hold any of `/`, `@`, `?` and `#`
        if end >= 0:
            pieces += word[kept:start], "***"
            kept = end
        place = word.find("://", max(start, kept))
    shown = "".join([*pieces, word[kept:]])
    first = shown.find("://") + 3
    query, fragment = shown.find("?", first), shown.find("#", first)
    if fragment >= 0 and (query < 0 or fragment < query) and "=" in shown[fragment:]:
        query = fragment
    tail = shown[query + 1 :]
    bare = tail.rstrip(CLOSING)
    return f"{shown[: query + 1]}***{tail[len(bare) :]}" if query >= 0 and bare else shown


def scheme_of(text: str) -> str:
    """The scheme of an address in lower case, as `hf` of `HF://owner/name`; empty where `text` is no address."""
    found = SCHEME.match(text)
    return found[1].lower() if found else ""


def redacted(value: Any) -> Any:
    """Plain data with every text in it redacted."""
    if isinstance(value, Mapping):
        return {redact(str(key)): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def two_columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Indented lines `  label  value`, the values one below the other."""
    width = max((len(visible(label)) for label, _ in rows), default=0)
    return [f"  {visible(label):<{width}}  {value}".rstrip() for label, value in rows]


def sentences(*parts: str | None) -> str:
    """The parts that are not empty, joined by full stops, with none at the end."""
    given = [part for part in parts if part]
    return " ".join([*(part if part[-1] in ".!?" else f"{part}." for part in given[:-1]), *given[-1:]])


def shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"


def _unit(nbytes: int) -> tuple[int, str]:
    return next(((scale, unit) for scale, unit in UNITS if nbytes >= 0.9995 * scale), (1, "bytes"))  # 999.95 MB reads 1.0 GB


def _number(nbytes: int, scale: int) -> str:
    value = nbytes / scale
    return f"{value:.1f}" if scale > 1 and value < 99.95 else f"{value:.0f}"


LONGEST_SHOWN = 300  # characters


def shown(name: str) -> str:
    """A name or path from an input, safe to print: in backticks, without control characters and lone surrogates, cut where it is long."""
    clean = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name[:LONGEST_SHOWN])
    return f"`{clean}`" if len(name) <= LONGEST_SHOWN else f"`{clean}...`"


def legible(name: str) -> str:
    """The name of a file as text that UTF-8 can hold: bytes that are no text are replaced."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", name)  # lone surrogates, by which Python represents such bytes


def is_text(name: str) -> bool:
    """Whether UTF-8 can hold the name of a file; Linux takes any bytes."""
    return legible(name) == name


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first five, and how many more."""
    every = list(names)
    more = f" and {len(every) - 5:,} more" if len(every) > 5 else ""
    return ", ".join(map(shown, every[:5])) + more


def fold_names(names: Iterable[str]) -> list[str]:
    """Names for a message, those that differ only in their first number as one: `model.layers.{0..39}.mlp.up_proj.weight (40)`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = re.search(r"(?<=\.)(0|[1-9][0-9]{0,8})(?=\.|$)", name)
        head, tail = (name[: found.start()], name[found.end() :]) if found else (name, "")
        groups.setdefault((head, tail), []).extend([int(found[1])] if found else [])
    return [_folded(head, sorted(set(numbers)), tail) for (head, tail), numbers in groups.items()]


def _folded(head: str, numbers: list[int], tail: str) -> str:
    if len(numbers) < 2:
        return unquoted("".join([head, *map(str, numbers), tail]))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    ranges = ",".join(f"{first}..{last}" if last > first + 1 else ",".join(map(str, sorted({first, last}))) for first, last in runs)
    return f"{unquoted(head)}{{{ranges}}}{unquoted(tail)} ({len(numbers)})"


def brief(value: object, most: int = 48) -> str:
    """`repr(value)` in at most `most` characters, for a line that must stay short."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 4]}...{text[-1]}"


def few(names: Iterable[str]) -> str:
    """Names for a message, folded: the first five groups, and how many more."""
    folded = fold_names(names)
    return ", ".join(folded[:5]) + (f" and {len(folded) - 5} more" if len(folded) > 5 else "")


def unquoted(text: str) -> str:
    """As `shown`, without the backticks."""
    return shown(text)[1:-1]
