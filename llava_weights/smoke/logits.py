"""Does a checkpoint compute what it should? Its forward pass against recorded logits, or against the unconverted checkpoint.

Computed in float32 from the weights as they are stored, in eager attention, on stored ids and pixels. A
reference by another program, such as LLaVA's own code, shows that the checkpoint is right; one by this tool, that nothing has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import findings
from ..checkpoint.checkpoint import Checkpoint, CheckpointSource, main_dtype, opened, to_place
from ..checkpoint.processor import read_image_settings, stored_settings
from ..checkpoint.small_files import small_object
from ..checkpoint.tower import Doubts, tower_hint
from ..errors import InputError, UsageError, VerificationError, finite
from ..events import Listener, Note, check_listener
from ..findings import Finding
from ..text import brief, shown
from .forward import Outcome, Passes, Places, Runner
from .probes import built_in_probes, check_given, find_sight, in_layout
from .quantised import Bits, to_bits
from .recording import Recorded, Recording, check_forward, draw_seed, load_runner, make_recording, read_recording, sketch

Where = Literal["text", "image"]
SmokeVerdict = Literal["same", "plausible", "suspicious", "different"]
FROM_GOOD_TO_BAD: tuple[SmokeVerdict, ...] = ("same", "plausible", "suspicious", "different")  # from good to bad
PRECISION = ("F32", "F16", "BF16")  # from fine to coarse


@dataclass(frozen=True)
class Limits:
    """How much may differ before a checkpoint is judged wrong: `nmse` the mean square error of the logits over the mean square of the
    reference's, `largest` the greatest |d| in standard deviations of the reference's logits, `top1` the least share of places with the same
    first choice, `kl` the mean Kullback-Leibler divergence in nats; `hidden` the normalised mean square error of a hidden state at one
    place, from which on a layer is called wrong. Taken from measurements: ten times the noise of a small trained model.
    """

    nmse: float
    largest: float
    top1: float
    kl: float
    hidden: float


# About ten times the noise of a trained model of 1.3 M parameters. float32 leaves 5 orders of magnitude to any
# structural fault; half precision hides a layernorm of the wrong layer, so that it can only be "plausible".
LIMITS = {
    "F32": Limits(1e-9, 1e-4, 1.0, 1e-8, 1e-10),
    "F16": Limits(2e-4, 0.15, 0.98, 1e-3, 2e-4),
    "BF16": Limits(2e-3, 0.4, 0.95, 1e-2, 2e-3),
}
# In float32, a LoRA merged and rounded against the same LoRA beside its base: what rounding to this dtype costs.
MERGED = {"F32": LIMITS["F32"], "F16": Limits(1e-7, 5e-3, 0.99, 1e-6, 1e-7), "BF16": Limits(2e-6, 1e-2, 0.99, 5e-6, 2e-6)}
# After quantising. A trained text model of 0.9 M parameters: 8 bits NMSE 9e-5, KL 6e-4, 4 bits 3e-3 and 4e-2; random ones up to 4e-3 in 8
# bits, in 4 3e-2 where they are small and 0.14 with 0.85 B parameters in 14 layers. In the trained one a layer without feed-forward or
# values, or rotary rows in Meta's order: from 6e-2 and 0.3 on. A norm of ones gives 5e-3 and 3e-2 in 8 bits; 4 bits hide it.
QUANTISED: dict[Bits, Limits] = {"8bit": Limits(5e-3, 1.0, 0.95, 1e-2, 3e-2), "4bit": Limits(4e-2, 3.0, 0.8, 0.3, 0.5)}
# What to do where the same weights are further off than that.
COARSE: dict[Bits, str] = {
    "8bit": "run it in half precision; `verify --deep` tells whether values are damaged",
    "4bit": "quantise it to `8bit`, or run it in half precision",
}
SUSPICIOUS = 1e-7  # NMSE up to which float32 may be another order of summation in a very deep model, and is no structural fault
COLOUR = 2e-3  # what means and deviations of pixels, from 0 to 1, may differ in
MARGIN = 3  # another first choice counts where the reference preferred its own by this many times the difference that is allowed

BEFORE_DECODER = ("vision", "embeddings")  # hidden states that have the rounding of a tower and a projector alone

ABOUT = {
    "vision": "compare the vision tower and the projector, their config (layer, activation) and the pixels",
    "embeddings": "compare the rows of the embedding table, and where the features of images go (tokens, `image_grid_pinpoints`)",
    "layer": "compare this layer's weights, and rms_norm_eps, rope_theta and heads in the config: `llava-weights diff` names tensors",
    "head": "compare the last norm and `lm_head`",
    "": "`llava-weights diff` with the checkpoint that it was made of names the tensors",
}


@dataclass(frozen=True)
class Row:
    """How the logits of one `probe` differ, at its places of text or of images (`where`); `places` counts them.

    `nmse` is normalised mean square error, `max_abs` and `mean_abs` are of |d|, `max_std` is max_abs in standard deviations of the
    reference's logits, `mean_kl` and `max_kl` are in nats, `min_cosine` is over the places, `top1` and `top5` are shares of equal choices.
    `flips` counts other first choices where the reference preferred its own clearly, `non_finite` logits that are inf or NaN.
    """

    probe: str
    where: Where
    places: int
    nmse: float
    max_abs: float
    max_std: float  # max_abs in standard deviations of the reference's logits
    mean_abs: float
    mean_kl: float
    max_kl: float
    min_cosine: float
    top1: float
    top5: float
    flips: int
    non_finite: int

    def __repr__(self) -> str:
        return f"Row({brief(self.probe)}, {self.where!r}, {self.places} tokens, NMSE {self.nmse:.1e}, top-1 {self.top1:.3f})"

    def beyond(self, limits: Limits) -> list[str]:
        """Each of `limits` that is passed, in words."""
        flipped = 1 - self.flips / self.places
        checks = (("NMSE", self.nmse, limits.nmse), ("max |d| / std", self.max_std, limits.largest), ("mean KL", self.mean_kl, limits.kl))
        # Where images are, nothing was trained to follow: there the first choice is shown, not judged.
        top = [f"top-1 {flipped:.3f} (limit {limits.top1})"] if self.where == "text" and flipped < limits.top1 else []
        return [f"{name} {value:.1e} (limit {limit:.0e})" for name, value, limit in checks if not value <= limit] + top


@dataclass(frozen=True)
class Smoke:
    """What a smoke test found. `name` is the checkpoint's, `against` the reference's. `verdict` is the worst of all probes: "same",
    "plausible" (half precision, which hides small faults), "suspicious" or "different"; None where nothing could be compared. `rows` are
    the measurements, held against `limits`. `first_wrong` is the first place in the model that differs: "vision", "embeddings", "layer.N"
    or "head", "" where all is well or the reference has no hidden states.
    """

    name: str
    against: str
    findings: tuple[Finding, ...]
    rows: tuple[Row, ...]
    limits: Limits
    verdict: SmokeVerdict | None
    first_wrong: str = ""

    def __repr__(self) -> str:
        wrong = f", first wrong: {self.first_wrong}" if self.first_wrong else ""
        return f"Smoke({brief(self.name)}, against {brief(self.against)}, {self.verdict!r}, {len(self.rows)} rows{wrong})"

    @property
    def exit_code(self) -> int:
        """0 where the verdict is same or plausible, 4 where it is suspicious or different, 3 where nothing could be compared."""
        return findings.exit_code(self.findings)


def compare(
    checkpoint: Checkpoint,
    reference: Path | Recording,
    *,
    tower: Checkpoint | None = None,
    device: str = "cpu",
    dtype: str = "F32",
    resident: bool = False,
    atol: float | None = None,
    accept_tower: bool = False,
    quantize: Bits | None = None,
    on_event: Listener = lambda event: None,
) -> Smoke:
    """Run the reference's own ids and pixels and compare, on the rows of the vocabulary that both have; with `quantize` after bitsandbytes
    quantised the checkpoint.

    `atol` is the largest difference of a logit that may be; it then decides alone. Raises as `load_forward`, `read_recording` and
    `check_given`; a probe that the checkpoint can't run is a failure of the checkpoint, since the reference could.
    """
    doubts = check_given(checkpoint, tower, accept=accept_tower)
    recording = reference if isinstance(reference, Recording) else read_recording(reference)
    runner = load_runner(checkpoint, tower=tower, device=device, dtype=dtype, resident=resident, quantize=quantize)
    coarse = max(dtype, recording.dtype, key=PRECISION.index)
    limits, hides = LIMITS[coarse], "half precision hides small faults" if coarse != "F32" else ""
    if quantize:
        limits, hides = QUANTISED[quantize], f"{quantize.removesuffix('bit')} bits hide small faults"
    elif not hides and recording.metadata.get("adapter") == "unmerged":
        limits = MERGED.get(main_dtype(checkpoint.parameters()), LIMITS["F32"])
    blind = checkpoint.layout == "llava" and find_sight(checkpoint, tower) is None
    found, rows, wrong, verdicts = _doubtful(checkpoint, doubts, on_event), list[Row](), list[str](), list[SmokeVerdict]()
    run = [one for one in recording.probes if not (blind and one.probe.sees)]
    passes = Passes(runner, len(run), len(run), on_event)
    for one in recording.probes:
        passes.begin(one.probe.name)
        if blind and one.probe.sees:
            text = f"{shown(one.probe.name)} was not run: the checkpoint has no vision tower"
            found.append(Finding("L5", "unchecked", one.probe.name, text, tower_hint(checkpoint.config)))
            continue
        finding, new, layer, verdict = _compare_one(checkpoint, runner, recording, one, limits, hides, atol)
        found.append(finding)
        rows += new
        verdicts.append(verdict)
        wrong += [layer] * bool(layer)
    worst = max(verdicts, key=FROM_GOOD_TO_BAD.index, default=None)
    first = min(wrong, key=_depth, default="")
    against = recording.metadata.get("model", recording.metadata.get("producer", "the reference"))
    return Smoke(checkpoint.origin.name, against, tuple(found), tuple(rows), limits, worst, first)


def _doubtful(checkpoint: Checkpoint, doubts: Doubts, on_event: Listener) -> list[Finding]:
    """A warning for each doubt about the tower that was given."""
    for text in doubts.notes:
        on_event(Note(text))
    return [Finding("L5", "warning", checkpoint.origin.name, text, tower_hint(checkpoint.config)) for text in doubts.warnings]


def _compare_one(
    checkpoint: Checkpoint, runner: Runner, recording: Recording, one: Recorded, limits: Limits, hides: str, atol: float | None
) -> tuple[Finding, list[Row], str, SmokeVerdict]:
    name = shown(one.probe.name)

    def failed(text: str, layer: str = "") -> Finding:
        return Finding("L5", "failed", one.probe.name, text, ABOUT[layer.partition(".")[0]])

    probe = one.probe if recording.layout == checkpoint.layout else in_layout(one.probe, one.image, checkpoint)
    places = Places(lambda length: _inside(one.positions, length), lambda key, length: _inside(_sketched(one, key), length))
    try:
        outcome = runner(probe, places)
    except InputError as error:
        return failed(f"{name} can't be run: {error.what}", "embeddings"), [], "", "different"
    if outcome.length != len(one.image):
        text = f"{name} became {outcome.length:,} tokens, in the reference {len(one.image):,}: images have other numbers of features"
        return failed(text, "embeddings"), [], "embeddings", "different"
    rows = measure(one, outcome, limits)
    verdict = judge(rows, limits, bool(hides), atol)
    layer = _first_wrong(one, outcome, limits)
    if verdict == "same" and atol is None and layer in BEFORE_DECODER:  # a small fault there may not reach the logits of a small model
        verdict = "suspicious"
    largest = max(row.max_abs for row in rows)
    figures = f"NMSE {max(row.nmse for row in rows):.1e}, max |d| {largest:.1e}, top-1 {min(row.top1 for row in rows):.3f}"
    if atol is not None:
        figures += f" (atol {atol:.0e})"
    if verdict in ("same", "plausible"):
        why = f"{hides}; " if hides else "up to the rounding of the merge; " if verdict == "plausible" else ""
        text, part = f"{name} {verdict}: {why}{figures}", "logits the same" if verdict == "same" else "logits plausible"
        return Finding("L5", "ok", one.probe.name, text, part=part), rows, "", verdict
    layer = layer or ("head" if _has_layers(one) and max(row.nmse for row in rows) > limits.nmse else "")
    beyond = list(dict.fromkeys(text for row in rows for text in row.beyond(limits))) if atol is None else []
    bad = sum(row.non_finite for row in rows)
    reasons = [f"{bad:,} logits are infinite or no numbers"] * bool(bad) + [figures, *beyond] + [f"first wrong: {layer}"] * bool(layer)
    return failed(f"{name} {verdict}: {'; '.join(reasons)}", layer), rows, layer, verdict


def measure(one: Recorded, outcome: Outcome, limits: Limits) -> list[Row]:
    """One row for the places of text and one for those of images, as far as there are any; `outcome` has the places of `one`."""
    width = min(one.logits.shape[1], outcome.logits.shape[1])
    expected = one.logits[:, :width].astype(np.float64)
    found = outcome.logits[:, :width].astype(np.float64)
    spread = float(expected.std()) or 1.0
    inside = one.image[one.positions]
    kinds: tuple[tuple[Where, np.ndarray], ...] = (("text", ~inside), ("image", inside))
    return [_row(one.probe.name, where, found[chosen], expected[chosen], spread, limits) for where, chosen in kinds if chosen.any()]


def _row(name: str, where: Where, found: np.ndarray, expected: np.ndarray, spread: float, limits: Limits) -> Row:
    """Figures over float64 [places, vocabulary]. What is not finite makes them infinite, so that no limit holds."""
    bad = int((~np.isfinite(found)).sum())
    if bad:
        worst = float("inf")
        return Row(name, where, len(found), worst, worst, worst, worst, worst, worst, -1.0, 0.0, 0.0, len(found), bad)
    difference = np.abs(found - expected)
    found_log, expected_log = _log_softmax(found), _log_softmax(expected)
    divergence = np.maximum((np.exp(expected_log) * (expected_log - found_log)).sum(axis=1), 0)
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = np.divide((found * expected).sum(axis=1), lengths, out=np.zeros(len(found)), where=lengths > 0)
    best, other = expected.argmax(axis=1), found.argmax(axis=1)
    lead = expected.max(axis=1) - np.take_along_axis(expected, other[:, None], axis=1)[:, 0]
    few = min(5, expected.shape[1])
    tops = (np.argpartition(values, -few, axis=1)[:, -few:] for values in (found, expected))
    shared = [len(set(a) & set(b)) / few for a, b in zip(*(top.tolist() for top in tops), strict=True)]
    return Row(
        probe=name,
        where=where,
        places=len(found),
        nmse=float((difference**2).sum() / max((expected**2).sum(), np.finfo(float).tiny)),
        max_abs=float(difference.max()),
        max_std=float(difference.max() / spread),
        mean_abs=float(difference.mean()),
        mean_kl=float(divergence.mean()),
        max_kl=float(divergence.max()),
        min_cosine=float(cosine.min()),
        top1=float((best == other).mean()),
        top5=float(np.mean(shared)),
        flips=int((lead > MARGIN * limits.largest * spread).sum()),
        non_finite=0,
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = logits - logits.max(axis=1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def judge(rows: Sequence[Row], limits: Limits, hides: bool, atol: float | None) -> SmokeVerdict:
    """Half precision, a quantised model and a merge that rounds are at best "plausible": see `LIMITS` for what they hide."""
    good: SmokeVerdict = "plausible" if hides or limits not in LIMITS.values() else "same"
    if any(row.non_finite for row in rows):
        return "different"
    if atol is not None:
        return good if all(row.max_abs <= atol for row in rows) else "different"
    if not any(row.beyond(limits) for row in rows):
        return good
    return "suspicious" if good == "same" and all(row.nmse <= SUSPICIOUS for row in rows) else "different"


def _first_wrong(one: Recorded, outcome: Outcome, limits: Limits) -> str:
    """The first hidden state that differs at one of its recorded places, nothing where none does."""
    for key, expected in sorted(one.hidden.items(), key=lambda item: _depth(item[0])):
        value = outcome.hidden.get(key)
        if value is None:
            continue
        if len(value) != len(expected):
            return key
        found = sketch(value, _sketched(one, key))[:, 2:].astype(np.float64)
        scale = np.maximum((expected[:, 2:].astype(np.float64) ** 2).sum(axis=1), np.finfo(float).tiny)
        if not (((found - expected[:, 2:]) ** 2).sum(axis=1) / scale <= limits.hidden).all():
            return key
    return ""


def _sketched(one: Recorded, key: str) -> np.ndarray:
    """The places of a hidden state that were recorded."""
    return one.hidden[key][:, 0].astype(int) if key in one.hidden else np.zeros(0, int)


def _inside(places: np.ndarray, length: int) -> np.ndarray:
    return places[places < length]


def _has_layers(one: Recorded) -> bool:
    return any(key.startswith("layer.") for key in one.hidden)


def _depth(key: str) -> int:
    """Where in the model a hidden state is, from front to back."""
    places = {"vision": -2, "embeddings": -1, "head": 1 << 30}
    return places[key] if key in places else int(key.partition(".")[2])


def compare_original(
    checkpoint: Checkpoint,
    original: Checkpoint,
    *,
    tower: Checkpoint | None = None,
    device: str = "cpu",
    dtype: str = "F32",
    resident: bool = False,
    atol: float | None = None,
    accept_tower: bool = False,
    quantize: Bits | None = None,
    seed: int | None = None,
    on_event: Listener = lambda event: None,
) -> Smoke:
    """Compare with the unconverted checkpoint, which runs in float32 on a path of its own (`load_original`), on built-in probes.

    `tower` is the CLIP of an original that holds none; without it only text is compared, and a finding says so. `seed` as in `record`.
    Raises as `compare`.
    """
    if original.layout != "llava":
        raise InputError(
            f"{shown(original.origin.name)} is no LLaVA in the original layout", hint="record it, and compare with the recording"
        )
    warnings = _doubtful(original, check_given(original, tower, accept=accept_tower), on_event)
    own = tower if checkpoint.layout == "llava" else None
    if quantize:  # fails before the work
        load_runner(checkpoint, tower=own, device=device, dtype=dtype, resident=False, quantize=quantize)
    seed = draw_seed() if seed is None else seed
    probes = built_in_probes(original, tower=tower, seed=seed)
    on_event(Note(f"rows of the vocabulary table drawn with seed {seed}"))
    reference = make_recording(original, probes, tower=tower, device=device, resident=resident, on_event=on_event)
    how: Any = {"device": device, "dtype": dtype, "resident": resident, "atol": atol, "accept_tower": accept_tower, "quantize": quantize}
    smoke = compare(checkpoint, reference, tower=own, **how, on_event=on_event)
    if not any(probe.sees for probe in probes):
        text = "no image was compared: the original holds no vision tower"
        warnings.append(Finding("L5", "unchecked", original.origin.name, text, tower_hint(original.config)))
    images = [*_other_pixels(checkpoint, original, tower), *_other_places(checkpoint, original, tower)]
    if images:
        smoke = replace(smoke, verdict="different")
    return replace(smoke, findings=tuple(dict.fromkeys((*warnings, *images, *smoke.findings))))


def compare_quantised(
    checkpoint: Checkpoint,
    quantize: Bits,
    *,
    tower: Checkpoint | None = None,
    device: str = "cpu",
    dtype: str = "F32",
    resident: bool = False,
    atol: float | None = None,
    accept_tower: bool = False,
    seed: int | None = None,
    on_event: Listener = lambda event: None,
) -> Smoke:
    """Compare a checkpoint after bitsandbytes quantised it with itself in float32, on built-in probes. `seed` as in `record`. Raises as
    `compare`, InputError too where bitsandbytes is missing, and where the logits in float32 are not finite."""
    check_given(checkpoint, tower, accept=accept_tower)
    how: Any = {"tower": tower, "device": device, "resident": resident, "on_event": on_event}
    load_runner(checkpoint, tower=tower, device=device, dtype=dtype, resident=False, quantize=quantize)  # fails before the work
    seed = draw_seed() if seed is None else seed
    reference = make_recording(checkpoint, built_in_probes(checkpoint, tower=tower, seed=seed), **how)
    on_event(Note(f"rows of the vocabulary table drawn with seed {seed}"))
    smoke = compare(checkpoint, reference, dtype=dtype, atol=atol, accept_tower=accept_tower, quantize=quantize, **how)
    lossy = (replace(finding, remedy=COARSE[quantize]) if finding.verdict == "failed" else finding for finding in smoke.findings)
    return replace(smoke, findings=tuple(lossy))


def _other_pixels(checkpoint: Checkpoint, original: Checkpoint, tower: Checkpoint | None) -> list[Finding]:
    """A failure where a llava-hf checkpoint makes other pixels of an image than the original's tower takes: probes are pixels already."""
    sight, file = find_sight(original, tower), "preprocessor_config.json"
    own = stored_settings(small_object(checkpoint.files, file), small_object(checkpoint.files, "processor_config.json"))
    if checkpoint.layout != "llava-hf" or sight is None or not own:
        return []
    of_tower: Any = {"tower": sight.tower.row, "size": sight.tower.image_size, "patch": sight.tower.patch_size}
    try:
        found, wanted = read_image_settings(own, **of_tower), read_image_settings(sight.tower.preprocessor, **of_tower)
    except InputError as error:
        return [Finding("L5", "failed", "pixels", f"{file}: {error.what}", error.hint or "")]
    acts = ("", sight.tower.config.get("hidden_act"))
    usual = [each for each in sight.tower.row.pixels if not sight.tower.preprocessor and each.activation in acts]
    right = [(wanted.mean, wanted.std)] + [(each.mean, each.std) for each in usual]
    text = f"{file} makes other pixels of an image than the tower of the original takes"
    if not any(np.allclose((found.mean, found.std), pair, atol=COLOUR) for pair in right):
        text += f": mean {list(found.mean)} and deviation {list(found.std)}, not {list(wanted.mean)} and {list(wanted.std)}"
    elif not np.isclose(found.rescale, wanted.rescale, rtol=COLOUR):
        text += f": a scale of {found.rescale:g}, not {wanted.rescale:g}"
    elif found.resample != wanted.resample:
        text += f": resized by PIL's filter {found.resample}, not {wanted.resample}"
    else:
        return []
    return [Finding("L5", "failed", "pixels", text, ABOUT["vision"])]


def _other_places(checkpoint: Checkpoint, original: Checkpoint, tower: Checkpoint | None) -> list[Finding]:
    """A failure where an image of some size takes another number of places in the text than in the original: of those that would take
    thousands no probe is run."""
    sight, found = find_sight(original, tower), find_sight(checkpoint)
    if checkpoint.layout != "llava-hf" or sight is None or found is None:
        return []
    for size in sight.many_sizes():
        if (places := found.features(size)) != (wanted := sight.features(size)):
            text = f"an image of {size[0]} x {size[1]} pixels takes {places:,} tokens in the text, {wanted:,} in the original"
            return [Finding("L5", "failed", "places", text, "compare `image_grid_pinpoints` and `vision_aspect_ratio`, and the strategy")]
    return []


def smoke_test(
    path: CheckpointSource,
    *,
    reference: str | Path | Recording | None = None,
    original: CheckpointSource | None = None,
    tower: CheckpointSource | None = None,
    device: str = "cpu",
    dtype: str = "F32",
    resident: bool = False,
    atol: float | None = None,
    accept_tower: bool = False,
    quantize: str | None = None,
    on_event: Listener = lambda event: None,
) -> Smoke:
    """Does the checkpoint compute what it should? One line in a user's own tests: returns what was measured, and raises where it is not as
    it should be.

    `path` is the checkpoint, open or a path. Give one of two: `reference`, a recording or the path of one, or `original`, the checkpoint in
    the original layout that it was converted from. With `quantize` ("8bit" or "4bit") the checkpoint runs as bitsandbytes quantises it, by
    default compared with itself in float32. `tower` is the vision tower of an original LLaVA that holds none; without it only text
    is compared; with `accept_tower` it may be another published one than the config names.

    `device` is "cpu", "cuda" or "cuda:N"; `dtype` is that of the computation, "F32", "BF16" or "F16", whatever the weights are stored in.
    Layers are read one by one; `resident` keeps them on the device. `atol` is the greatest difference of a logit: it then decides alone.
    `on_event` is called with each Event, such as a ProgressBar.

    Raises UsageError for a value that an option can't have and for a `tower` that nothing has a use for, VerificationError where the logits
    differ, MismatchError where `tower` is not the one that the config names, InputError where an input is damaged, nothing could be
    compared or bitsandbytes is missing, HubError where the Hub can't serve one.
    """
    check_listener(on_event)
    bits = to_bits(quantize)
    if (reference is not None) + (original is not None) != 1 and (bits is None or None not in (reference, original)):
        raise UsageError("a smoke test compares with either a reference or an original", hint="pass one of `--reference` and `--original`")
    how: Any = {**check_numbers(device, dtype, atol), "resident": resident, "accept_tower": accept_tower, "on_event": on_event}
    checkpoint = opened(path, "checkpoint", whole=True)
    how["tower"] = opened(tower, "tower") if tower is not None else None
    if original is not None:
        smoke = compare_original(checkpoint, opened(original, "original", whole=True), quantize=bits, **how)
    elif bits and reference is None:
        smoke = compare_quantised(checkpoint, bits, **how)
    else:
        kept = reference if isinstance(reference, Recording) else Path(to_place(reference, "reference"))
        smoke = compare(checkpoint, kept, quantize=bits, **how)
    if smoke.exit_code == 4:
        bad = [finding for finding in smoke.findings if finding.verdict == "failed"]
        facts = {f"probe {number}": finding.text for number, finding in enumerate(bad, 1)}
        raise VerificationError(f"{shown(smoke.name)} is {smoke.verdict} from {shown(smoke.against)}", facts=facts, hint=bad[0].remedy)
    if smoke.exit_code:
        raise InputError(
            "nothing could be compared",
            facts={f.subject: f.text for f in smoke.findings},
            hint=next((f.remedy for f in smoke.findings if f.remedy), None),
        )
    return smoke


def check_numbers(device: str, dtype: str, atol: float | None = None) -> dict[str, Any]:
    """Options of a comparison as its functions take them. Raises UsageError for a value that one of them can't have."""
    if atol is not None and finite("atol", atol) < 0:
        raise UsageError(f"`atol` is {atol!r}, it must be a number from 0 on", hint="leave it out for the usual limits")
    device, dtype = check_forward(device, dtype)
    return {"device": device, "dtype": dtype, "atol": atol}


def table(smoke: Smoke) -> list[str]:
    """The measurements for people: one line for each probe and kind of place."""
    head = ("probe", "tokens", "NMSE", "max |d|", "max |d|/std", "mean |d|", "mean KL", "top-1", "top-5")
    rows = [head] + [
        (f"{row.probe} {row.where}", f"{row.places}", f"{row.nmse:.1e}", f"{row.max_abs:.1e}", f"{row.max_std:.1e}", f"{row.mean_abs:.1e}",
         f"{row.mean_kl:.1e}", f"{row.top1:.3f}", f"{row.top5:.3f}")
        for row in smoke.rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
