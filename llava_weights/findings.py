"""What a check found: one sentence with its level, what it is about, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# failed: it is wrong. warning: it may be wrong. unchecked: nothing there to check it against. ok: checked and right.
Verdict = Literal["failed", "warning", "unchecked", "ok"]


@dataclass(frozen=True)
class Finding:
    """`level` is L0 structure, L1 plausibility, L2 files, L3 tensors, L4 derivation, L5 smoke, "against" what was named, or
    "published", the authors' own checksums (facts: verify 1.4)."""

    level: str
    verdict: Verdict
    subject: str  # the file, tensor (folded over layers) or config key that it is about
    text: str
    remedy: str = ""


def exit_code(findings: Iterable[Finding]) -> int:
    """4 where something failed, 3 where nothing could be checked, else 0: so that "not checked" never looks like "fine"."""
    verdicts = {finding.verdict for finding in findings}
    return 4 if "failed" in verdicts else 0 if "ok" in verdicts else 3
