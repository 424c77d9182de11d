"""Every way in which a run can fail, each with its exit code.

An error says what happened, to which files or tensors, the facts behind it, and one thing to do. Only `cli/console.py` prints it.
"""

from __future__ import annotations

import errno
import math
import os
import signal
from collections.abc import Iterable, Mapping

from .text import redact

MOST_JOBS = 64  # more threads only wait for each other
NO_MEMORY = ("cannot allocate memory", "can't allocate memory", "failed to map segment")  # glibc's and torch's words


class LlavaWeightsError(Exception):
    """What every error of the library is: a problem that the user can act on. `what` says what happened, `facts` are what led there, by
    label, and `hint` is one thing to do. `kept` says what lies on the disk, where work had begun. `exit_code` is that of the command.

    No text in it holds a token, a password or a signature. It can be pickled.
    """

    exit_code = 1

    def __init__(self, what: str, *, facts: Mapping[str, object] | None = None, hint: str | None = None) -> None:
        self.what = redact(what)
        super().__init__(self.what)
        self.facts = {label: redact(str(value)) for label, value in (facts or {}).items()}
        self.hint: str | None = redact(hint) if hint else hint
        self.kept: str | None = None

    def __str__(self) -> str:
        """All of it, as an uncaught error shows it in its traceback."""
        facts = [f"  {label}: {text}" for label, text in self.facts.items()]
        after = [self.kept] if self.kept else []
        return "\n".join([self.what, *facts, *after, *([f"hint: {self.hint}"] if self.hint else [])])


class UsageError(LlavaWeightsError):
    """An argument, an option or a combination of them that can't be. `exit_code` 2."""

    exit_code = 2


def one_of(what: str, value: object, choices: Iterable[str]) -> str:
    """`value`, which must be one of `choices`. Raises UsageError naming them."""
    found = next((choice for choice in choices if isinstance(value, str) and choice == value), None)
    if found is None:
        raise UsageError(f"there is no {what} `{value}`", hint=f"choose one of {', '.join(choices)}")
    return found


def whole_number(name: str, value: object, *, least: int = 1, most: int | None = None) -> int:
    """`value`, which must be a whole number within bounds. Raises UsageError where it is not."""
    if type(value) is not int or value < least or (most is not None and value > most):
        upper = f" to {most:,}" if most is not None else " on"
        raise UsageError(f"`{name}` is {value!r}, it must be a whole number from {least:,}{upper}", hint="give a number in that range")
    return value


def finite(name: str, value: object) -> float:
    """`value`, which must be a finite number. Raises UsageError where it is not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"`{name}` is {value!r}, it must be a number", hint="give a finite number")
    return value


class InputError(LlavaWeightsError):
    """An input is missing, damaged, hostile or of an unknown kind. `exit_code` 3."""

    exit_code = 3


class MismatchError(InputError):
    """Each input is sound, but they do not belong together. `exit_code` 3."""


class VerificationError(LlavaWeightsError):
    """A check against checksums, another checkpoint or recorded logits failed. `exit_code` 4."""

    exit_code = 4


class OutputError(LlavaWeightsError):
    """The output exists, has no space, can't be written or is in use by another run. `exit_code` 5."""

    exit_code = 5


def shortage(error: BaseException) -> LlavaWeightsError | None:
    """The error to show for one that means that this process lacks memory, threads, open files or torch; None for any other.

    A library that lacks memory while it is loaded raises an ImportError, or an OSError without a number. `verify`, `inspect`, `diff`,
    `checksum` and renamings run without torch, and people install the package so for a job that only verifies (docs/ci.md).
    """
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return UsageError("this needs the package `torch`, which is not installed", hint="pip install torch")
    number = error.errno if isinstance(error, OSError) else None
    words = str(error).lower()
    if number in (errno.EMFILE, errno.ENFILE):
        hint = "allow more with `ulimit -n`, or pass fewer `--jobs`"
        return OutputError("there can be no more open files", facts={"reason": os.strerror(number)}, hint=hint)
    if isinstance(error, RuntimeError) and words == "can't start new thread":
        hint = "allow more processes (`ulimit -u`) or memory (`ulimit -v`), or pass fewer `--jobs`"
        return OutputError("there can be no more threads", hint=hint)
    if number == errno.ENOMEM or isinstance(error, MemoryError) or any(text in words for text in NO_MEMORY):
        hint = "pass `--max-memory` less than what this process may have, or fewer `--jobs`"
        return OutputError("there is not enough memory", facts={"reason": words} if words else None, hint=hint)
    return None


class HubError(LlavaWeightsError):
    """The Hub, or another server, said no or did not answer. `exit_code` 6."""

    exit_code = 6


class Terminated(KeyboardInterrupt):
    """SIGTERM, or SIGHUP: `exit_code` is 128 and the signal's number, as a shell says it. Only the command line installs a handler that
    raises it; a library's user meets it nowhere else.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.exit_code = 128 + number


class Interrupted(KeyboardInterrupt):
    """Ctrl-C (`exit_code` 130), SIGTERM (143) or SIGHUP (129) while something was made. The same call continues the work, and `kept` says
    what lies on the disk.

    A KeyboardInterrupt, so that nothing that catches errors catches it. Its attributes are those of LlavaWeightsError.
    """

    def __init__(self, what: str = "stopped", *, exit_code: int = 130) -> None:
        super().__init__(what)
        self.what, self.exit_code = what, exit_code
        self.facts: dict[str, str] = {}
        self.hint: str | None = None
        self.kept: str | None = None

    @classmethod
    def of(cls, error: KeyboardInterrupt, kept: str | None = None) -> Interrupted:
        """`error` as an Interrupted, with what is `kept`."""
        found = error if isinstance(error, Interrupted) else cls(exit_code=error.exit_code if isinstance(error, Terminated) else 130)
        found.kept = kept or found.kept
        return found
