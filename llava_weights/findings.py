"""What a check found: a sentence with its level, its subject and its remedy; and the exit code of many."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# failed: wrong. warning: may be wrong. unproved: asked for, but could not be checked. unchecked: not asked for, or explained, and there
# was nothing to check it against. note: worth knowing. ok: checked and right.
Verdict = Literal["failed", "warning", "unproved", "unchecked", "note", "ok"]

# The rule of a finding that names none, by its level.
LEVELS = {
    "L0": "structure", "L1": "values", "L2": "files", "L3": "tensors", "L4": "sources", "L5": "smoke", "against": "against",
    "published": "published", "recorded": "recorded",
}  # fmt: skip
# The rules that are no row of a table in checks/rules_original.py or checks/rules_llava_hf.py, by the names that `--allow` takes.
OTHER_RULES = {
    "structure": "names, shapes, sizes and index of the weight files",
    "unlisted-file": "a file that the manifest or SHA256SUMS does not list",
    "weight-files": "pickles, the metadata `format: pt`, the size in the index",
    "other-weights": "files that make other programs load other weights",
    "code": "what other programs would execute",
    "values": "inf and NaN, all zeros",
    "constant": "tensors of one value",
    "equal-layers": "the same values in two layers",
    "layer-sizes": "a matrix whose values are of another order than in the other layers",
    "tied-head": "the head beside `tie_word_embeddings`",
    "projector-activation": "the activation beside the projector's second layer",
    "state": "an unapplied delta, or a sum with a wrong base",
    "bfloat16": "values that went through bfloat16",
    "vocabulary-rows": "rows of tokens that no training touched",
    "files": "sha256 of the files, as recorded beside them",
    "tensors": "digests of the tensors, as recorded beside them",
    "recorded": "warnings that the manifest's recipe records",
    "sources": "every tensor made again from the sources",
    "small-files": "config, tokenizer and processor beside those of the reference or the sources",
    "against": "files and tensors beside those of the reference",
    "stale-manifest": "a manifest beside the reference that is not of its values",
    "vision-tower": "the vision tower beside the one that was given",
    "published": "the authors' own checksums",
    "smoke": "logits",
}
STATE_RULES = ("state", "bfloat16")  # on what kind of checkpoint it is: no fault where the reference is of the same kind


@dataclass(frozen=True)
class Finding:
    """One thing that a check found. `verdict` is "failed" (it is wrong), "warning" (it may be wrong), "unproved" (it was asked for and
    can't be told), "unchecked" (nothing was there to check it against), "note" (worth knowing) or "ok" (checked and right).

    `subject` is the file, the tensor (equal layers folded into one name) or the config key that it is about, `text` a sentence, `remedy`
    what to do. `level` is L0 for structure, L1 for samples of the values, L2 for files, L3 for tensors, L4 for what the sources give, L5
    for logits, "against" for what was compared with, "published" for the authors' own checksums, "recorded" for what its own manifest
    tells. `rule` is the short name that `verify(allow=...)` takes, `part` says in a few words what was proved.
    """

    level: str
    verdict: Verdict
    subject: str  # the file, tensor (folded over layers) or config key that it is about
    text: str
    remedy: str = ""
    rule: str = ""  # a short name that stays, that of its level where none is given
    part: str = ""  # what the headline says was proved, or was not: a few words

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", self.rule or LEVELS.get(self.level, self.level))


def exit_code(findings: Iterable[Finding]) -> int:
    """4 where something failed, 3 where something that was asked for is unproved or nothing was checked, else 0.

    So "not checked" never looks like "fine", and a failure is never hidden behind it.
    """
    verdicts = {finding.verdict for finding in findings}
    return 4 if "failed" in verdicts else 3 if "unproved" in verdicts or "ok" not in verdicts else 0
