"""The licence of what is made of checkpoints, as far as their own model cards tell it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import InputError
from ..formats.folder import optional
from .checkpoint import Origin, Step
from .small_files import small_text

LICENCE = r"license: *[\"']?([a-z0-9][a-z0-9.-]{0,49})[\"']?\s*"  # an identifier of the Hub, https://huggingface.co/docs/hub/repositories-licenses
LARGEST_README = 1 << 20


def licence(history: Sequence[Step]) -> str | None:
    """The licence that the model card of every input names, where they all name the same one, else None: which licence a mixture has is
    nothing that a program can tell."""
    found = {_licence_of(origin) for step in history for _, origin in step.inputs}
    return found.pop() if len(found) == 1 else None


def _licence_of(origin: Origin) -> str | None:
    """From the front matter of README.md beside the weights, None where there is none, or none that is to be read."""
    try:
        card = optional(origin.path, "README.md") if not origin.remote and origin.path.is_dir() else None
        text = small_text({"README.md": card}, "README.md", limit=LARGEST_README) if card else None
    except (InputError, OSError):
        return None
    front = re.match(r"---\r?\n(.*?)\n---\s", text or "", re.DOTALL)
    lines = front[1].splitlines() if front else []
    return next((match[1] for line in lines if (match := re.fullmatch(LICENCE, line)) and match[1] != "other"), None)
