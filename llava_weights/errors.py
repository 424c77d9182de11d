"""Every way in which a run can end badly, each with its exit code.

An error says what happened with the names in it, the facts that led there, and one thing to do. Only `console.py` prints it.
"""

from __future__ import annotations

from collections.abc import Mapping

from .wording import redact


class LlavaWeightsError(Exception):
    """A problem that the user can act on: `what` happened, the `facts`, one `hint`.

    `kept` is set by the writer once work has begun and says what lies on disk; until then nothing was written. Pickles as it is: each
    class takes `what` alone too, and the rest travels as attributes. No text in it holds a token, a password or a signature.
    """

    exit_code = 1

    def __init__(self, what: str, *, facts: Mapping[str, object] | None = None, hint: str | None = None) -> None:
        self.what = redact(what)
        super().__init__(self.what)
        self.facts = {label: redact(str(value)) for label, value in (facts or {}).items()}
        self.hint = hint and redact(hint)
        self.kept: str | None = None


class UsageError(LlavaWeightsError):
    """The command line asks for something that does not exist."""

    exit_code = 2


class InputError(LlavaWeightsError):
    """An input is missing, damaged, hostile or of an unknown kind."""

    exit_code = 3


class MismatchError(InputError):
    """Each input is sound, but they do not belong together."""


class VerificationError(LlavaWeightsError):
    """A check against digests, another checkpoint or reference logits failed."""

    exit_code = 4


class OutputError(LlavaWeightsError):
    """The output exists, has no space, can't be written or is in use by another run."""

    exit_code = 5


class HubError(LlavaWeightsError):
    """The Hub answered no, or did not answer."""

    exit_code = 6


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised in the main thread by the handler that the command line installs."""


class Interrupted(LlavaWeightsError):
    """Ctrl-C (130) or SIGTERM (143): the same command continues."""

    def __init__(self, what: str, *, exit_code: int = 130) -> None:
        super().__init__(what)
        self.exit_code = exit_code
