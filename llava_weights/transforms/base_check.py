"""Do these inputs belong together? Names, config and a few MB of values answer it before a byte is written.

Shapes alone do not tell: Vicuna and Llama 2 have LLaMA's, and a base that went through bfloat16 differs in its last bits only.
`checkpoint/diagnose.py` measures; this module says what the figures mean for a base or a delta, and what the user can do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.diagnose import Bf16, RoundTrip, bf16_damaged, extra_rows, llama2_hints, non_finite, pair, round_trip, state
from ..checkpoint.tokenizer import read_special_ids
from ..errors import InputError, MismatchError
from ..families.deltas import known_delta
from ..families.layouts import PROJECTOR, VOCABULARY
from ..families.targets import TOWER_KEYS
from ..storage.digests import digest_of
from ..storage.reading import Workspace
from ..tensors.lazy import LazyTensor, wrong_digest

USE_ORIGINAL = "use the original LLaMA weights (fp16, as Meta published them) as `--base`"
SMALL_TENSOR = 1 << 18  # bytes: the norm vectors and biases of any LLaMA
ARITHMETIC = "cast both to fp16, add over the common rows, round once"
ACCEPT = "pass `--accept-base` only if you know that the base is right"


@dataclass(frozen=True)
class Examination:
    """What was found: the kind of delta, sentences to warn with, and the measurements for the manifest."""

    kind: str = ""
    rule: str = ""
    warnings: tuple[str, ...] = ()
    checks: Mapping[str, Any] = field(default_factory=dict)


def examine_apply(base: Checkpoint, delta: Checkpoint, *, accept_base: bool = False) -> Examination:
    """See that `base` is what `delta` was made against. Raises InputError or MismatchError; see `delta.apply_delta`."""
    _require_decoders(("base", base), ("delta", delta))
    _refuse_swapped(base, delta)
    _refuse_states(base, delta)
    refuse_shapes(base, delta)
    _refuse_projector(delta)
    doubts, checks = _doubts(base, delta)
    if doubts and not accept_base:
        raise doubts[0]
    known = known_delta(base.size, delta.vocabulary, _image_patch(delta), str(delta.config.get("model_type", "")))
    multimodal = any(name.startswith("model.mm_projector.") for name in delta.tensors)
    kind = f"same shapes and tokens as {known.repo}" if known else ("LLaVA delta" if multimodal else "delta of a text model")
    if known:
        checks["prompt"] = known.prompt
    warnings = [f"accepted all the same: {doubt.what}" for doubt in doubts] + _odd_rows(base, delta)
    if checks["round_trip"]["verdict"] == "unclear":
        warnings.append("the round-trip test is not clear about the base: compare the result with the authors' checksums")
    if not doubts and (hints := llama2_hints(base.config)):
        warnings.append(f"the base's config speaks of Llama 2 ({', '.join(hints)}), its values do not")
    return Examination(kind, ARITHMETIC, tuple(warnings), checks)


def examine_make(base: Checkpoint, tuned: Checkpoint) -> Examination:
    """See that both are models and not the same one."""
    _require_decoders(("base", base), ("tuned model", tuned))
    for role, checkpoint in (("base", base), ("tuned model", tuned)):
        if state(checkpoint.parameters()).verdict == "delta":
            raise InputError(f"the {role} looks like a delta that was never applied", hint="give two whole models")
    refuse_shapes(base, tuned, role="tuned model")
    found = pair(base.parameters(), tuned.parameters(), difference=False)
    warnings = ("base and tuned model hold the same values: the delta will be zero",) if found.verdict == "identical" else ()
    return Examination(warnings=warnings)


def examine_integer(tensors: Mapping[str, LazyTensor]) -> Examination:
    """See that the small tensors of an integer delta come out as its maker recorded; the writer checks the others.

    Raises MismatchError naming the first that does not.
    """
    small = {name: tensor for name, tensor in tensors.items() if tensor.nbytes <= SMALL_TENSOR}
    with closing(Workspace(drop_cache=False)) as work:
        for name, tensor in small.items():
            values = bytearray(tensor.nbytes)
            tensor.rows_into(memoryview(values), 0, tensor.rows, work)
            expected = tensor.expected_digest
            if expected is None or digest_of(values, expected[0]) != expected[1]:
                raise wrong_digest(name)
    return Examination("integer-difference delta (lossless)", "integer difference of the bits, exact", checks={"small_tensors": len(small)})


def _require_decoders(*roles: tuple[str, Checkpoint]) -> None:
    """Both must be LLaMA-style text models in 16 or 32 bits, with or without LLaVA's additions."""
    for role, checkpoint in roles:
        layout, name = checkpoint.layout, checkpoint.origin.name
        if layout not in ("llama", "llava"):
            title, hint = _WRONG_LAYOUT.get(layout, (f"a checkpoint in the {layout} layout", USE_ORIGINAL))
            raise InputError(f"the {role} `{name}` is {title}", facts={"for example": next(iter(checkpoint.tensors), "-")}, hint=hint)
        if "quantization_config" in checkpoint.config or any(t.dtype in ("I8", "U8") for t in checkpoint.tensors.values()):
            raise InputError(f"the {role} `{name}` is quantised", hint="use the 16-bit weights: a sum with quantised ones is meaningless")


_WRONG_LAYOUT = {
    "adapter": ("a LoRA adapter", "merge it with `llava-weights merge-lora`"),
    "llava-hf": ("in the llava-hf layout", "deltas go onto the original layout"),
    "projector": ("a projector only", "give the folder with all weights"),
    "unknown": ("no LLaMA-style model", "run `llava-weights inspect` on it to see what it holds"),
}


def _refuse_swapped(base: Checkpoint, delta: Checkpoint) -> None:
    if base.layout == "llava" and delta.layout == "llama" and state(base.parameters()).verdict != "weights":
        raise _swapped(base, delta)
    if base.layout == "llava":
        what = f"the base `{base.origin.name}` is a LLaVA model already (it has an mm_projector)"
        raise MismatchError(what, facts={"base": f"{base.size}, {base.vocabulary} rows"}, hint=USE_ORIGINAL)


def _swapped(base: Checkpoint, delta: Checkpoint) -> MismatchError:
    facts = {"--base": f"{base.origin.name} holds differences", "--delta": f"{delta.origin.name} holds a whole model"}
    return MismatchError("base and delta are swapped", facts=facts, hint="exchange `--base` and `--delta`")


def _refuse_states(base: Checkpoint, delta: Checkpoint) -> None:
    base_state, delta_state = state(base.parameters()), state(delta.parameters())
    if base_state.verdict == "delta" and delta_state.verdict == "weights":
        raise _swapped(base, delta)
    if base_state.verdict == "delta":
        what = f"the base `{base.origin.name}` is itself a delta that was never applied"
        raise InputError(what, facts={"evidence": "; ".join(base_state.evidence)}, hint=USE_ORIGINAL)
    if delta_state.verdict == "weights":
        what, facts = f"the delta `{delta.origin.name}` is a whole model, not a delta", {"evidence": "; ".join(delta_state.evidence)}
        raise InputError(what, facts=facts, hint="there is nothing to apply: use it as it is, or look at it with `llava-weights inspect`")


def refuse_shapes(base: Checkpoint, other: Checkpoint, *, role: str = "delta") -> None:
    """Raise InputError or MismatchError where a delta of these shapes can't go onto a base of those."""
    for name, checkpoint in (("base", base), (role, other)):
        if len(found := checkpoint.tensors[VOCABULARY[0]].shape if VOCABULARY[0] in checkpoint.tensors else ()) != 2:
            what = f"the {name} `{checkpoint.origin.name}` has no table `{VOCABULARY[0]}`"
            raise InputError(what, facts={"shape": list(found)} if found else None, hint="check that all of its shards are there")
    if base.size != other.size:
        facts = {"base": base.origin.name, role: other.origin.name}
        raise MismatchError(f"the base is {base.size}, the {role} {other.size}", facts=facts, hint="give the base of the same size")
    wanted = _base_rows(other) or other.vocabulary
    if base.vocabulary > wanted or (base.vocabulary < wanted != other.vocabulary):
        guess = "  looks like Vicuna v0 or Alpaca (already merged)" if base.vocabulary == wanted + 1 else ""
        facts = {
            "base": f"{base.origin.name} {list(base.tensors[VOCABULARY[0]].shape)}{guess}",
            role: f"{other.origin.name} {list(other.tensors[VOCABULARY[0]].shape)}",
        }
        what = f"the base has {base.vocabulary} rows in `{VOCABULARY[0]}`, this {role} was made for {wanted}"
        raise MismatchError(what, facts=facts, hint=f"{USE_ORIGINAL}, not Vicuna")


def _base_rows(delta: Checkpoint) -> int:
    """How many rows the base must have: the lowest id of the delta's added tokens. 0 where it has none."""
    added = read_special_ids(delta.files, delta.vocabulary).added
    lowest = min(added.values(), default=0)
    return lowest if lowest and lowest <= delta.vocabulary else 0


def _image_patch(delta: Checkpoint) -> int:
    return read_special_ids(delta.files, delta.vocabulary).added.get("<im_patch>", -1)


def _refuse_projector(delta: Checkpoint) -> None:
    projector, name = [tensor for tensor in delta.tensors if re.fullmatch(PROJECTOR, tensor)], delta.origin.name
    if not projector and any(delta.config.get(key) for key in TOWER_KEYS):
        what = f"the delta `{name}` speaks of a vision tower but holds no mm_projector"
        raise InputError(what, hint="check that all of its shards are there")
    if bad := non_finite(delta.tensors, projector):
        raise InputError(f"`{bad[0]}` holds inf or NaN", facts={"delta": name}, hint="download the delta again")


def _doubts(base: Checkpoint, delta: Checkpoint) -> tuple[list[MismatchError], dict[str, Any]]:
    """What speaks against the base's values, the most telling first; and the measurements."""
    base_tensors, delta_tensors = base.parameters(), delta.parameters()
    damage, trip, both = bf16_damaged(base_tensors), round_trip(base_tensors, delta_tensors), pair(base_tensors, delta_tensors)
    doubts: list[MismatchError] = []
    if damage.damaged and not all(tensor.dtype == "BF16" for tensor in delta_tensors.values()):
        doubts.append(_bf16(base, damage))
    if both.verdict in _PAIRS:
        doubts.append(MismatchError(_PAIRS[both.verdict], facts={"evidence": both.evidence}, hint=ACCEPT))
    if trip.verdict == "wrong":
        doubts.append(_wrong_base(base, trip))
    measured = {"sampled": trip.sampled, "failing": trip.failing, "verdict": trip.verdict}
    return doubts, {"round_trip": measured, "bf16_share": round(damage.share, 4)}


_PAIRS = {
    "full model": "the delta is as large as a whole model and like the base",
    "subtracted twice": "the base was subtracted twice",
    "swapped": "base and delta look swapped",
}


def _odd_rows(base: Checkpoint, delta: Checkpoint) -> list[str]:
    odd = [found for found in extra_rows(delta.parameters(), base.parameters()) if found.verdict == "odd"]
    return [f"the {found.count} added rows of `{found.name}` are {found.ratio:.2g} times the size of the base's" for found in odd]


def _bf16(base: Checkpoint, damage: Bf16) -> MismatchError:
    evidence = f"{damage.share:.1%} of {damage.sampled:,} sampled values fit into bfloat16"
    return MismatchError(
        "the base went through bfloat16 and lost 3 bits of each value",
        facts={"base": base.origin.name, "evidence": evidence},
        hint=f"give the folder of Meta's consolidated.*.pth as `--base`, since transformers 4.33 and later write bfloat16; {ACCEPT}",
    )


def _wrong_base(base: Checkpoint, trip: RoundTrip) -> MismatchError:
    hints = llama2_hints(base.config)
    what = "the base looks like Llama 2, this delta needs LLaMA 1" if hints else "the base is not the one that this delta was made against"
    share = f"{trip.failing:,} of {trip.sampled:,} sampled differences can't come from this base ({trip.share:.2%}; right: 0 %)"
    facts = {"base": base.origin.name, "round trip": share, "worst": ", ".join(f"{name} {part:.0%}" for name, part in trip.worst[:3])}
    if hints:
        facts["config"] = ", ".join(hints)
    return MismatchError(what, facts=facts, hint=f"{USE_ORIGINAL}, not Vicuna, Llama 2 or a merged model; {ACCEPT}")
