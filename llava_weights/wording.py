"""Sizes, times, names and progress as a person reads them. Knows no stream: `console.py` prints."""

from __future__ import annotations

import base64
import os
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Any
from urllib.parse import quote

from .events import Progress, ShardDone, Started

UNITS = ((10**15, "PB"), (10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))  # decimal, as the Hub counts
# What no word of ours may hold: values of these variables, tokens, passwords in addresses, and what follows an address's path: queries and
# fragments are where signed addresses (Amazon's, Google's, Azure's; the Hub redirects to such) and logins keep their secrets.
SECRET_VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_CONNECTION_STRING", "AZURE_CLIENT_SECRET", "GITHUB_TOKEN", "GH_TOKEN", "ACTIONS_RUNTIME_TOKEN",
    "ACTIONS_ID_TOKEN_REQUEST_TOKEN", "FSSPEC_S3_SECRET", "FSSPEC_S3_TOKEN",
)  # fmt: skip
# Names of parameters that hold one, at the end of a longer name too: `X-Amz-Signature`, `access_token`.
SECRET_NAME = (
    r"(?:[\w.-]{0,64}[-_.])?(?:token|secret|signature|sig|key|credentials?|password|passwd|pwd|auth|authorization|jwt|assertion|code)"
    r"|(?:x-amz|x-goog)-[\w-]{1,64}|key-pair-id|accountkey|awsaccesskeyid|apikey|accesstoken|sharedaccess(?:key|signature)"
)
# Each is linear in the text's length: what may repeat is bounded, or can't hold the place where another try would begin.
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
CUT = 16  # characters of a secret that are one still
WORD = re.compile(r"[^\s\"`<>]+")  # an address ends where one of these comes
HOST_AND_PORT = re.compile(r"(?:localhost|[^:@.]*\.[^:@]*|\[[^\]@]*\]):\d{1,5}")
CLOSING = "'),.;]}"  # what follows an address in a sentence
# Where a CI reads commands out of what a program prints: GitHub at the start of a line, it and others between `##` and `[` anywhere.
CI_COMMAND = re.compile(r"^(\s*):(?=:)|##(?=\w{0,16}\[)")
CODE = re.compile(r"(?<!`)`([^`|]+)`(?!`)")
MARKUP = re.compile(r"[\\`*\[\]<>|~&$#@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?i:(?<=www)\.)")
EMAIL = re.compile(r"(?<=[A-Za-z0-9._+-])@(?=[A-Za-z0-9_-])")  # which GitHub links even where it is escaped
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30})://")
WINDOW = 30.0  # seconds that the rate looks back: an average since the start would hide a slow disk until too late


@dataclass
class Meter:
    """How far a run is, and how fast over the last WINDOW seconds; bytes of earlier runs count as done but not as speed."""

    started: Started
    begun: float
    nbytes: int
    done_shards: int
    done_nbytes: int
    shard: str = ""
    samples: deque[tuple[float, int]] = field(default_factory=deque)

    @classmethod
    def start(cls, started: Started, now: float) -> Meter:
        done = started.done_nbytes
        return cls(started, now, done, started.done_shards, done, samples=deque([(now, done)]))

    def update(self, event: Progress, now: float) -> None:
        self.nbytes = min(max(self.nbytes, event.nbytes), self.started.nbytes)  # workers may report out of order
        self.shard = event.shard
        if now - self.samples[-1][0] >= 1:
            self.samples.append((now, self.nbytes))

    def finish(self, event: ShardDone, now: float) -> None:
        """A pool reports no bytes on the way, only finished shards."""
        self.done_shards += 1
        self.done_nbytes += event.nbytes
        self.update(Progress(self.done_nbytes, event.name), now)

    def rate(self, now: float) -> float | None:
        """Bytes per second, or None before there is anything to tell."""
        while len(self.samples) > 1 and self.samples[1][0] <= now - WINDOW:
            self.samples.popleft()
        since, before = self.samples[0]
        return (self.nbytes - before) / (now - since) if now > since else None

    def remaining(self, now: float) -> float | None:
        """Seconds left at the present rate."""
        rate = self.rate(now)
        return (self.started.nbytes - self.nbytes) / rate if rate else None

    @property
    def finished(self) -> str:
        return f"{self.done_shards} of {shards(self.started.shards)} ({size(self.done_nbytes)})"

    @property
    def percent(self) -> int:
        return 100 * self.nbytes // self.started.nbytes if self.started.nbytes else 100

    @property
    def amount(self) -> str:
        scale, unit = _unit(self.started.nbytes)
        return f"{_number(self.nbytes, scale)}/{_number(self.started.nbytes, scale)} {unit}"

    def line(self, now: float) -> str:
        """`[0:30] 9.4/26.0 GB 36% 313 MB/s, about 0:53 left`"""
        rate, remaining = self.rate(now), self.remaining(now)
        text = f"[{clock_face(now - self.begun)}] {self.amount} {self.percent}%"
        text += "" if rate is None else f" {size(round(rate))}/s"
        return text if remaining is None else f"{text}, about {clock_face(remaining)} left"

    def document(self, now: float) -> dict[str, object]:
        """`nbytes` of `total` are written, at `rate` bytes per second, `remaining` seconds left; null where unknown."""
        known = {"nbytes": self.nbytes, "total": self.started.nbytes, "shard": self.shard}
        return known | {"rate": self.rate(now), "remaining": self.remaining(now)}

    def bar(self, now: float, columns: int, ascii_only: bool) -> str:
        """One line of at most `columns` cells; the shard's name is last, since it may be cut without loss."""
        from tqdm.std import tqdm

        rate, remaining = self.rate(now), self.remaining(now)
        speed = "" if rate is None else f"  {size(round(rate))}/s"
        left = "" if remaining is None else f"  {clock_face(remaining)} left"
        line: str = tqdm.format_meter(
            self.nbytes,
            self.started.nbytes,
            now - self.begun,
            ncols=columns,
            ascii=ascii_only,
            bar_format=f"{self.started.what} {self.percent:3d}% |{{bar:{20 if columns > 70 else 10}}}| {{report}}",
            report=f"{self.amount}{speed}{left}  {visible(self.shard)}",
        )
        return line


def size(nbytes: int) -> str:
    """Decimal and short: `26.0 GB`, `949 MB`, `12.3 kB`, `17 bytes`."""
    scale, unit = _unit(nbytes)
    return "1 byte" if nbytes == 1 else f"{_number(nbytes, scale)} {unit}"


def duration(seconds: float) -> str:
    """For a sentence: `0.8 s`, `24 s`, `1m 24s`, `2h 03m`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}m {whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h {whole // 60 % 60:02d}m"


def clock_face(seconds: float) -> str:
    """For a line that changes: `0:53`, `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}" if minutes >= 60 else f"{minutes}:{second:02d}"


def visible(text: str) -> str:
    """`text` on one line with control, format (bidi overrides, zero width) and undecodable characters written as escapes."""
    return text if text.isprintable() else "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def command_free(line: str) -> str:
    """`line` so that no CI takes it for a command: GitHub's `::error ...` and `##[...]`, and those that others know."""
    return CI_COMMAND.sub(lambda found: "#\\x23" if found[1] is None else f"{found[1]}\\x3a", line)


def markdown_text(text: str) -> str:
    """`text` as a piece of one line of Markdown, a table's cell too: no secrets, and nothing in it is markup, a link or HTML, except that
    what stands between two backticks is code. CommonMark and GitHub's Markdown read it alike."""
    pieces = CODE.split(visible(redact(text)))
    return "".join(f"`{piece}`" if number % 2 else _escaped(piece) for number, piece in enumerate(pieces))


def _escaped(text: str) -> str:
    return "`@`".join(MARKUP.sub(r"\\\g<0>", piece) for piece in EMAIL.split(text))


def redact(text: str) -> str:
    """`text` without tokens, passwords in addresses, queries and signatures. For all that may be shown or saved.

    Takes time in proportion to the length. A token of the Hub has 34 letters and digits, or is a piece of one, which mixes cases as no
    name does; other words that begin with `hf_` are names.
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
    """`text` with *** for `secret`, as it is or as an address, a JSON file or a header spells it, and for what is left where it is cut."""
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
    """Whether what follows `hf_` can be a token, or one whose end is cut off."""
    if len(letters) >= HUB_TOKEN_LENGTH:
        return len(letters) == HUB_TOKEN_LENGTH or not (letters.islower() or letters.isupper())
    cases = [letter.isupper() for letter in letters if letter.isalpha()]
    return sum(one != other for one, other in pairwise(cases)) > 0.35 * len(cases)  # a half in tokens, a quarter in MixedCaseNames


def _address(word: str) -> str:
    """A word that holds an address, with *** for its user and password, its query, and a fragment that has values."""
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
    """The scheme of an address in lower case, as `hf` of `HF://owner/name`; nothing where `text` is no address."""
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
    """The parts that there are, one after the other, with a full stop between two and none at the end."""
    given = [part for part in parts if part]
    return " ".join([*(part if part[-1] in ".!?" else f"{part}." for part in given[:-1]), *given[-1:]])


def shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"


def _unit(nbytes: int) -> tuple[int, str]:
    return next(((scale, unit) for scale, unit in UNITS if nbytes >= 0.9995 * scale), (1, "bytes"))  # 999.95 MB reads 1.0 GB


def _number(nbytes: int, scale: int) -> str:
    value = nbytes / scale
    return f"{value:.1f}" if scale > 1 and value < 99.95 else f"{value:.0f}"
