"""Which base was a delta made for? Each candidate is asked as apply-delta would, by its shapes and by the round trip on samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.checkpoint import Checkpoint, CheckpointSource, opened, to_place
from ..checkpoint.diagnose import state
from ..checkpoint.fingerprint import Fingerprint, read_fingerprint
from ..errors import InputError, MismatchError, UsageError
from ..families.fingerprints import FINGERPRINTS
from ..formats.integer_delta import is_integer_delta
from ..storage.hub import HubSource, parse_source, source_text
from ..storage.remote import is_remote
from ..text import listed, shown, two_columns
from .base_check import examine_apply, refuse_shapes
from .delta import apply_delta

# "right": the delta can have been made for it, and for others hardly. "wrong": not for it. "unclear": its values can't tell, as with too
# few of them. "unfit": it is no base, or can't be read.
BaseVerdict = Literal["right", "wrong", "unclear", "unfit"]


@dataclass(frozen=True)
class Candidate:
    """A base that was asked about. `verdict` is "right", "wrong", "unclear" or "unfit", `reason` a sentence; `failing` of `sampled`
    differences can't come from it.
    """

    name: str
    verdict: BaseVerdict
    reason: str
    sampled: int = 0
    failing: int = 0


@dataclass(frozen=True)
class WhichBase:
    """What `which_base` found about the delta `name`. `builtin` is how many fingerprints that ship with the package were asked too."""

    name: str
    candidates: tuple[Candidate, ...]
    builtin: int = 0

    @property
    def right(self) -> tuple[str, ...]:
        """The candidates that fit: several where they hold the same values where it counts."""
        return tuple(each.name for each in self.candidates if each.verdict == "right")

    @property
    def exit_code(self) -> int:
        """0 where a candidate fits, 3 where none does."""
        return 0 if self.right else 3

    def lines(self) -> list[str]:
        """The report, line by line."""
        count = len(self.candidates)
        if not self.right:
            told = f"made for none of {count} candidates" if count > 1 else "not shown to be made for this candidate"
        elif len(self.right) == 1:
            told = f"made for {shown(self.right[0])}"
        else:
            told = f"{len(self.right)} candidates fit, which samples can't tell apart: {listed(self.right)}"
        rows = [(each.verdict, f"{shown(each.name)}: {each.reason}") for each in self.candidates]
        note = f"{self.builtin} built-in fingerprints were asked too" if self.builtin else "no fingerprints of published bases are built in"
        return [f"{self.name}: {told}", *two_columns([*rows, ("note", note)])]

    def document(self) -> dict[str, Any]:
        """The same as plain data, for `--json`."""
        return {**asdict(self), "right": list(self.right), "exit_code": self.exit_code}


def which_base(
    delta: CheckpointSource, among: Iterable[CheckpointSource], *, builtin: Iterable[tuple[Path, str]] = FINGERPRINTS
) -> WhichBase:
    """Which of the bases `among` the delta was made for. Nothing is written, and only samples are read.

    A candidate is a checkpoint, or a fingerprint that `record_fingerprint` made of one, as the path of its `.json`. A repository of the Hub
    is read over the network and not downloaded. `builtin` are files of fingerprints that are asked too, each with its origin: by default
    those that ship with the package, of which there are none yet.

    Raises UsageError where there is no candidate, InputError where `delta` is not an unapplied delta, or is missing, HubError where the
    Hub can't be asked; what is wrong with a candidate is its reason.
    """
    if isinstance(among, str) or not isinstance(among, Iterable):
        raise UsageError("`among` is no list of bases", hint='give it as `among=["llama-13b", "vicuna-13b"]`')
    given = opened(delta, "delta")
    packed = is_integer_delta(given.metadata)
    if not packed and (given.layout not in ("llama", "llava") or state(given.parameters()).verdict == "weights"):
        what = f"{shown(given.origin.name)} is not an unapplied delta"
        raise InputError(what, hint="`llava-weights inspect` says what it is")
    found = [_asked(given, source) for source in among]
    known = [_by_fingerprint(given, read_fingerprint(path)) for path, _ in builtin]
    if not found and not known:
        raise UsageError("there is no candidate", hint="give bases, or fingerprints of them")
    return WhichBase(given.origin.name, (*found, *known), len(known))


def _asked(delta: Checkpoint, source: CheckpointSource) -> Candidate:
    name = source.origin.name if isinstance(source, Checkpoint) else str(to_place(source, "candidate"))
    try:
        if not isinstance(source, Checkpoint) and name.endswith(".json"):
            return _by_fingerprint(delta, read_fingerprint(Path(name).expanduser()), name)
        return _by_values(delta, opened(_unfetched(source), "candidate"), name)
    except InputError as error:
        return Candidate(name, "unfit", error.what)


def _unfetched(source: CheckpointSource) -> CheckpointSource:
    """`source`, but of a repository on the Hub its address, of which only samples are read."""
    if isinstance(source, Checkpoint) or is_remote(source_text(source)):
        return source
    parsed = parse_source(source_text(source))
    if not isinstance(parsed, HubSource):
        return source
    return f"hf://{parsed.repo_id}{f'@{parsed.revision}' if parsed.revision else ''}/{parsed.folder}".rstrip("/")


def _by_values(delta: Checkpoint, base: Checkpoint, name: str) -> Candidate:
    try:
        if is_integer_delta(delta.metadata):
            apply_delta(base, delta)
            return Candidate(name, "right", "its small tensors come out as the delta's maker recorded them")
        trip = examine_apply(base, delta).checks["round_trip"]
    except InputError as error:
        return Candidate(name, "wrong" if isinstance(error, MismatchError) else "unfit", _because(error))
    return _told(name, trip["verdict"], trip["failing"], trip["sampled"])


def _by_fingerprint(delta: Checkpoint, taken: Fingerprint, name: str = "") -> Candidate:
    """`name` is the path of its file, where one was given."""
    whose = f" (fingerprint of {shown(taken.name)})" if name else ""
    name = name or taken.name
    if is_integer_delta(delta.metadata):
        return Candidate(name, "unclear", f"a lossless delta is tried on whole tensors, which a fingerprint does not hold{whose}")
    try:
        refuse_shapes(taken.checkpoint, delta)
    except InputError as error:
        return Candidate(name, "wrong", f"{error.what}{whose}")
    trip = taken.round_trip(delta.parameters())
    return _told(name, trip.verdict, trip.failing, trip.sampled, whose)


def _told(name: str, verdict: str, failing: int, sampled: int, whose: str = "") -> Candidate:
    share = f"{failing:,} of {sampled:,} sampled differences can't come from it{whose}"
    if verdict in ("right", "wrong"):
        return Candidate(name, "right" if verdict == "right" else "wrong", share, sampled, failing)
    return Candidate(name, "unclear", f"{share}: {'too few to tell' if verdict == 'too few' else 'no clear answer'}", sampled, failing)


def _because(error: InputError) -> str:
    trip = error.facts.get("round trip")
    return f"{error.what}: {trip}" if trip else error.what
