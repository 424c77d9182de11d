"""A recording: what a model computed for a few probes, and the file format, to compare with later or on another machine.

One safetensors file. For each probe NAME:

    ids.NAME            I64 [T]           what was run; -200 for an image in LLaVA's own form, one image token for each feature in llava-hf
    pixel_values.NAME   F32               [images, 3, S, S] or [images, tiles, 3, S, S]; only with an image
    image_sizes.NAME    I64 [images, 2]   height and width; only with tiles
    frames.NAME         F32               [videos, frames, 3, S, S]; only with a video
    image.NAME          U8 [T']           1 where a place of the sequence that was computed is a feature of an image
    positions.NAME      I64 [P]           places that the logits are of, rising
    logits.NAME         F32 [P, V]        logits[p] predicts what follows positions[p]
    top.NAME            I64 [P, 5]        the most likely ids, best first: for people, not read back
    hidden.NAME.KEY     F32 [n, 66]       of KEY = vision, embeddings, layer.0, ...: place, root mean square, 64 projections

A projection is a sum with signs by `signs`. `hidden` may be missing, as in a reference by another program. `__metadata__` holds
texts: `schema`, `layout` ("llava", "llava-hf", "llama": whose form the ids are in), `dtype` of the computation ("F32"), and for people
`model`, `root.tensors`, `producer`, `device`, `attention`, `tf32`, `date`, versions, and `seed`, with which the ids of the built-in
probes were drawn. `root.tensors` is that of the model's manifest and names its algorithm, "blake3:..." or "sha256:..."; 64 digits alone are
a sha256, as version 0.1 wrote it. `adapter` = "unmerged" says that a LoRA was applied beside the weights, so that a merge may differ by its
rounding.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.checkpoint import Checkpoint, CheckpointSource, main_dtype, opened, to_place
from ..checkpoint.manifest import environment, find_manifest
from ..errors import InputError, UsageError, whole_number
from ..events import Listener, Note, check_listener
from ..formats.safetensors import index_safetensors, make_header
from ..storage.output_file import check_file, write_report
from ..storage.reading import Workspace
from ..tensors.dtypes import to_dtype
from ..tensors.lazy import LazyTensor, Stored
from ..text import brief, shown
from .forward import Passes, Places, Probe, Runner, load_forward, load_original
from .probes import built_in_probes, check_given, image_places
from .quantised import Bits

RECORDING_SCHEMA = "llava-weights smoke 1"
KEYS = r"vision|embeddings|layer\.\d{1,4}"
ARRAY_NAME = re.compile(rf"(?:(ids|pixel_values|image_sizes|frames|image|positions|logits|top)\.(.+)|hidden\.(.+)\.({KEYS}))")
ARRAY_DTYPES = {"F32": "<f4", "I64": "<i8", "U8": "u1"}
EXPECTED_DTYPES = {
    "ids": "I64",
    "pixel_values": "F32",
    "image_sizes": "I64",
    "frames": "F32",
    "image": "U8",
    "positions": "I64",
    "logits": "F32",
    "top": "I64",
}
LARGEST_FILE = 1 << 30  # bytes of a file that are read; one of a 13B has some 10 MB
MOST_LOGITS = 1 << 19  # values of a probe: 2 MB, 16 places of 32,000
LEAST_POSITIONS = 16
SKETCH_SIZE, SKETCHED_PLACES = 64, 4


@dataclass(frozen=True)
class Recorded:
    """One probe and what came of it. `image` is bool [T'], true where a place of the sequence that was computed is a feature of an image.
    `positions` are int64 [P], the places that `logits`, float32 [P, V], are of: those at p predict what follows position p. `hidden` holds
    float32 [n, 66] for "vision", "embeddings", "layer.0" and so on: place, root mean square and 64 projections of the hidden state there.
    """

    probe: Probe
    image: np.ndarray  # bool [T']
    positions: np.ndarray  # int64 [P]
    logits: np.ndarray  # float32 [P, V]
    hidden: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Recorded({brief(self.probe.name)}, logits {list(self.logits.shape)}, {len(self.hidden)} hidden states)"


@dataclass(frozen=True)
class Recording:
    """What a model gave for a few probes, to compare others with. `metadata` holds texts: `schema`, `layout` (whose form the ids are in),
    `dtype` of the computation, and for people `model`, `root.tensors`, `producer`, `device`, `date`, versions and the `seed` of the
    built-in probes.
    """

    probes: tuple[Recorded, ...]
    metadata: Mapping[str, str]

    def __repr__(self) -> str:
        about = ", ".join(brief(self.metadata[key], 30) for key in ("layout", "dtype") if key in self.metadata)
        return f"Recording({len(self.probes)} probes, {about})"

    @property
    def dtype(self) -> str:
        """The dtype of the computation: "F32", "BF16" or "F16"."""
        return self.metadata["dtype"]

    @property
    def layout(self) -> str:
        """Whose form the ids are in: "llava", "llava-hf" or "llama"."""
        return self.metadata["layout"]


def record(
    checkpoint: CheckpointSource,
    path: str | Path,
    *,
    probes: Sequence[Probe] | None = None,
    tower: CheckpointSource | None = None,
    device: str = "cpu",
    dtype: str = "F32",
    resident: bool = False,
    accept_tower: bool = False,
    force: bool = False,
    seed: int | None = None,
    on_event: Listener = lambda event: None,
) -> Recording:
    """Run `checkpoint` on a few probes, and keep what comes of them in the safetensors file `path`, for `smoke_test(reference=...)`.

    `probes` are what it is run on, by default built-in ones: text and, where there is a vision tower, images. `seed` draws the ids of the
    built-in ones, a whole number; by default another one each time, so that several recordings read more rows of the vocabulary table.
    `tower` is the vision tower of an original LLaVA that holds none; with `accept_tower` it may be another published one than the config
    names. `device` is "cpu", "cuda" or "cuda:N"; `dtype` is that of the computation, "F32", "BF16" or "F16". Layers are read one by one;
    `resident` keeps them on the device. `force` replaces a file that is there. `on_event` is called with each Event, such as a ProgressBar.

    Raises UsageError for a value that an option can't have and for a `tower` that nothing has a use for, OutputError where the file exists
    or can't be written, InputError where the checkpoint is damaged, is of no kind that can be run, or gives logits that are not finite,
    MismatchError where `tower` is not the one that the config names, HubError where the Hub can't serve one.
    """
    check_listener(on_event)
    place = check_file(path, force=force)
    device, dtype = check_forward(device, dtype)
    if seed is not None:
        whole_number("seed", seed, least=0)
    if probes is not None and not (isinstance(probes, Sequence) and probes and all(isinstance(probe, Probe) for probe in probes)):
        raise UsageError("`probes` is no list of probes", hint="give one or more of the type Probe, or leave it out")
    model, clip = opened(checkpoint, "checkpoint", whole=True), opened(tower, "tower") if tower is not None else None
    check_file(place, force=force, inputs=[] if model.origin.remote else [model.origin.path])
    for text in check_given(model, clip, accept=accept_tower).warnings:
        on_event(Note(text, warning=True))
    seed = draw_seed() if seed is None else seed
    chosen = built_in_probes(model, tower=clip, seed=seed) if probes is None else probes
    made = make_recording(model, chosen, tower=clip, device=device, dtype=dtype, resident=resident, on_event=on_event)
    made = made if probes is not None else Recording(made.probes, {**made.metadata, "seed": str(seed)})
    write_recording(made, place, force=force)
    return made


def draw_seed() -> int:
    """A seed for `built_in_probes` that no earlier run had."""
    return secrets.randbelow(1 << 32)


def make_recording(
    checkpoint: Checkpoint,
    probes: Sequence[Probe],
    *,
    tower: Checkpoint | None = None,
    device: str = "cpu",
    dtype: str = "F32",
    resident: bool = False,
    values: int = MOST_LOGITS,
    on_event: Listener = lambda event: None,
) -> Recording:
    """As `record`, in memory; of a long probe the logits of some places are kept, as many as have `values`. Raises InputError too
    where logits are not finite: such a model is no reference."""
    runner = load_runner(checkpoint, tower=tower, device=device, dtype=dtype, resident=resident)
    made, passes = [], Passes(runner, len(probes), len(probes), on_event)
    for probe in probes:
        passes.begin(probe.name)
        one = _record(runner, probe, partial(image_places, checkpoint, probe, tower=tower), values)
        if wrong := int((~np.isfinite(one.logits)).sum()):
            what = f"{wrong:,} logits of {shown(checkpoint.origin.name)} are infinite or no numbers"
            raise InputError(what, facts={"probe": probe.name}, hint="`llava-weights verify --deep` names the tensors that are damaged")
        made.append(one)
    manifest = None if checkpoint.origin.remote else find_manifest(checkpoint.origin.path)
    root = {"root.tensors": manifest.root} if manifest else {}
    metadata = {
        "model": checkpoint.origin.name,
        "layout": checkpoint.layout,
        "producer": "LLaVA's splice, transformers' decoder" if checkpoint.layout == "llava" else "transformers' model, streamed",
        "dtype": dtype,
        "weights": main_dtype(checkpoint.parameters()),
        "device": device,
        "machine": platform.machine(),
        "attention": "eager",
        "tf32": "off",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **{f"version.{name}": text for name, text in {**environment(), "transformers": version("transformers")}.items()},
    }
    return Recording(tuple(made), {**metadata, **root})


def check_forward(device: str, dtype: str) -> tuple[str, str]:
    """Device, and dtype as safetensors spells it. Raises UsageError where no forward pass could take them."""
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"there is no device `{device}`", hint="choose cpu, cuda or cuda:N")
    if (chosen := to_dtype(dtype)) is None:
        raise UsageError("a forward pass needs a dtype", hint="choose F32, BF16 or F16")
    return device, chosen


def load_runner(
    checkpoint: Checkpoint, *, tower: Checkpoint | None, device: str, dtype: str, resident: bool, quantize: Bits | None = None
) -> Runner:
    """The forward pass for the checkpoint's layout."""
    how: Any = {"dtype": dtype, "device": device, "resident": resident, "quantize": quantize}
    return load_original(checkpoint, tower=tower, **how) if checkpoint.layout == "llava" else load_forward(checkpoint, **how)


def _record(runner: Runner, probe: Probe, image: Callable[[int], np.ndarray], values: int) -> Recorded:
    """What is kept of a probe: all places, or some of the text and some of the images, `image` of so many in all: as many as have
    `values` logits together, and at least LEAST_POSITIONS."""

    def positions(length: int) -> np.ndarray:
        return _chosen(image(length), max(LEAST_POSITIONS, values // runner.vocabulary))

    def few(name: str, length: int) -> np.ndarray:
        sketched[name] = np.unique(np.linspace(0, length - 1, SKETCHED_PLACES).round().astype(int))
        return sketched[name]

    sketched: dict[str, np.ndarray] = {}
    outcome = runner(probe, Places(positions, few))
    hidden = {key: sketch(value, sketched[key]) for key, value in outcome.hidden.items()}
    return Recorded(probe, image(outcome.length), positions(outcome.length), outcome.logits, hidden)


def _chosen(image: np.ndarray, most: int) -> np.ndarray:
    if len(image) <= most:
        return np.arange(len(image))
    kinds = [places for places in (np.flatnonzero(~image), np.flatnonzero(image)) if len(places)]
    share = most // len(kinds)
    return np.unique(np.concatenate([places[np.linspace(0, len(places) - 1, share).round().astype(int)] for places in kinds]))


def sketch(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """float32 [n, 66] of the `rows` [n, H] of a hidden state at `places`: place, root mean square, projections. Distances between rows
    survive projection."""
    rows = rows.astype(np.float64)
    size = np.sqrt(np.mean(rows**2, axis=1))
    return np.column_stack((places, size, rows @ signs(rows.shape[1]))).astype(np.float32)


@cache
def signs(width: int) -> np.ndarray:
    """[width, 64] of +1 and -1, by the top bit of a mixed-up number (the finalizer of splitmix64): no seed, the same on every machine."""
    number = np.arange(1, width * SKETCH_SIZE + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.where(number >> np.uint64(63), 1.0, -1.0).reshape(width, SKETCH_SIZE)


def write_recording(recording: Recording, path: Path, *, force: bool = False) -> None:
    """Write the file at once or not at all. Raises OutputError where `path` exists, unless `force`, or can't be written."""
    check_file(path, force=force)
    arrays = {name: array for one in recording.probes for name, array in _arrays(one).items()}
    codes = {np.dtype(kind): code for code, kind in ARRAY_DTYPES.items()}
    described = [(name, LazyTensor(dtype=codes[array.dtype], shape=array.shape)) for name, array in arrays.items()]
    head, places = make_header(described, {**recording.metadata, "schema": RECORDING_SCHEMA})
    write_report(path, head + b"".join(arrays[name].tobytes() for name, _, _ in places), force=force)


def _arrays(one: Recorded) -> dict[str, np.ndarray]:
    name, probe = one.probe.name, one.probe
    top = np.argsort(-one.logits, axis=1, kind="stable")[:, :5]
    found = {
        f"ids.{name}": (probe.ids, "<i8"),
        f"pixel_values.{name}": (probe.pixel_values, "<f4"),
        f"image_sizes.{name}": (probe.image_sizes, "<i8"),
        f"frames.{name}": (probe.frames, "<f4"),
        f"image.{name}": (one.image, "u1"),
        f"positions.{name}": (one.positions, "<i8"),
        f"logits.{name}": (one.logits, "<f4"),
        f"top.{name}": (top, "<i8"),
        **{f"hidden.{name}.{key}": (value, "<f4") for key, value in one.hidden.items()},
    }
    return {key: np.ascontiguousarray(value, kind) for key, (value, kind) in found.items() if value is not None}


def read_recording(path: str | os.PathLike[str]) -> Recording:
    """The recording in the file `path`. Raises UsageError for what is no path, InputError unless it is a recording, whole, whose parts fit
    each other.
    """
    path = Path(to_place(path, "recording"))
    tensors, metadata = index_safetensors(path)
    if metadata.get("schema") != RECORDING_SCHEMA:
        facts = {"schema": shown(metadata.get("schema", "none")), "expected": RECORDING_SCHEMA}
        raise InputError(
            f"{shown(path.name)} is no reference of a smoke test", facts=facts, hint="make one with `smoke MODEL --record FILE`"
        )
    if metadata.get("dtype") not in ("F32", "F16", "BF16") or "layout" not in metadata:
        raise _refusal(path, "its metadata names no dtype or layout")
    if sum(tensor.nbytes for tensor in tensors.values()) > LARGEST_FILE:
        raise _refusal(path, f"it has more than {LARGEST_FILE:,} bytes")
    arrays: dict[str, dict[str, np.ndarray]] = {}
    hidden: dict[str, dict[str, np.ndarray]] = {}
    with closing(Workspace()) as work:
        for name, tensor in tensors.items():
            if not (found := ARRAY_NAME.fullmatch(name)) or tensor.dtype != EXPECTED_DTYPES.get(found[1], "F32"):
                raise _refusal(path, f"{shown(name)} ({tensor.dtype}) is no part of one")
            kind, probe = (arrays, found[2]) if found[1] else (hidden, found[3])
            kind.setdefault(probe, {})[found[1] or found[4]] = _values(tensor, work)
    if not arrays or hidden.keys() - arrays.keys():
        raise _refusal(path, "it holds no probe, or hidden states of none")
    return Recording(tuple(_checked(path, name, part, hidden.get(name, {})) for name, part in sorted(arrays.items())), metadata)


def _values(tensor: Stored, work: Workspace) -> np.ndarray:
    raw = bytearray(tensor.nbytes)
    if raw:
        tensor.rows_into(memoryview(raw), 0, tensor.rows, work)
    return np.frombuffer(raw, ARRAY_DTYPES[tensor.dtype]).reshape(tensor.shape)


def _checked(path: Path, name: str, part: Mapping[str, np.ndarray], hidden: Mapping[str, np.ndarray]) -> Recorded:
    """A probe, once its arrays are known to belong together."""
    if missing := [key for key in ("ids", "image", "positions", "logits") if key not in part]:
        raise _refusal(path, f"probe {shown(name)} lacks {missing[0]}")
    ids, image, positions, logits = (part[key] for key in ("ids", "image", "positions", "logits"))
    flat = ids.ndim == image.ndim == positions.ndim == 1 and ids.size and image.max(initial=0) <= 1
    inside = flat and positions.size and positions[0] >= 0 and (np.diff(positions) > 0).all() and positions[-1] < len(image)
    if not inside or logits.ndim != 2 or len(logits) != len(positions) or logits.shape[1] < 2:
        raise _refusal(path, f"the parts of probe {shown(name)} do not fit each other")
    pixels, sizes = part.get("pixel_values"), part.get("image_sizes")
    if pixels is not None and (pixels.ndim not in (4, 5) or pixels.shape[-3] != 3 or not np.isfinite(pixels).all()):
        raise _refusal(path, f"the pixels of probe {shown(name)} are no images")
    if sizes is not None and (pixels is None or sizes.shape != (len(pixels), 2) or sizes.min(initial=1) < 1):
        raise _refusal(path, f"the image sizes of probe {shown(name)} are none")
    frames = part.get("frames")
    if frames is not None and (pixels is not None or frames.ndim != 5 or frames.shape[2] != 3 or not np.isfinite(frames).all()):
        raise _refusal(path, f"the frames of probe {shown(name)} are no videos")
    sketches = (
        value.ndim == 2 and value.shape[1] == SKETCH_SIZE + 2 and len(value) and value[:, 0].min() >= 0 for value in hidden.values()
    )
    if not all(sketches) or not all(np.isfinite(value).all() for value in (logits, *hidden.values())):
        raise _refusal(path, f"values of probe {shown(name)} are infinite or no numbers, or its hidden states have another form")
    probe = Probe(name, ids, pixels, sizes, frames)
    return Recorded(probe, image.astype(bool), positions, logits, dict(sorted(hidden.items(), key=lambda item: _order(item[0]))))


def _order(key: str) -> int:
    return {"vision": -2, "embeddings": -1}.get(key) or int(key.partition(".")[2])


def _refusal(path: Path, reason: str) -> InputError:
    what = f"{shown(path.name)} is not a sound reference: {reason}"
    return InputError(what, facts={"file": path}, hint="make it again with `smoke MODEL --record FILE`")
