"""Made again from its sources, is it the same? The strongest check (L4): every tensor is computed anew, and nothing is written."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

from .against import failed, folded
from .buffers import one_thread
from .checkpoint import Checkpoint
from .conversion import convert
from .delta import apply_delta
from .errors import InputError
from .events import Event, Progress, Started
from .findings import Finding
from .formats.folder import same_header
from .formats.strict_json import load_object
from .lora import merge_lora, open_weighted, to_arithmetic
from .manifest import TensorEntry
from .plan import WINDOW
from .records import MAX_MANIFEST, find_manifest, manifest_path
from .tensors import LazyTensor
from .threads import in_threads
from .windows import row_ranges
from .workspace import Workspace, check_crcs, steady

TABLES = ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight")
Digest = tuple[str, tuple[int, ...], str]  # dtype, shape, sha256
Listener = Callable[[Event], None]
OTHER = "give the sources and options that it was made with: README.md and the manifest name them"


def derive(
    made: Checkpoint, base: Checkpoint, *, delta: Checkpoint | None = None, lora: Sequence[str] = (), tower: Checkpoint | None = None
) -> Checkpoint:
    """What `made` should be, as lazy tensors: `base` with the delta and the adapters, in the layout of `made`.

    The options (arithmetic, scale, dtype, projector form) are those of its manifest, the defaults where it has none.
    """
    options = _options(made)
    result = apply_delta(base, delta, accept_base=True) if delta else base
    dtype = options.get("dtype") if options.get("dtype") in ("F16", "BF16", "F32") else None
    if lora:
        arithmetic = to_arithmetic(str(options.get("arithmetic", "peft")))
        scale = options.get("scale", 1.0)
        merged_dtype = None if made.layout == "llava-hf" else dtype
        adapters = [open_weighted(text) for text in lora]
        result = merge_lora(result, adapters, arithmetic=arithmetic, scale=float(scale), dtype=merged_dtype)
    if made.layout == "llava-hf" or options.get("to") == "llava":
        rows = next((made.tensors[name].rows for name in TABLES if name in made.tensors), None)
        hub = {"projector_form": options.get("projector_form"), "vocab_size": rows} if made.layout == "llava-hf" else {}
        result = convert(result, made.layout, tower=tower, dtype=dtype, **hub)
    return result


def compare_derived(made: Checkpoint, derived: Checkpoint, *, jobs: int = 2, on_event: Listener = lambda event: None) -> list[Finding]:
    """One finding for each tensor of `made` that its sources do not give, or one `ok` for all. Reads the sources whole.

    `made`'s own digests come from its manifest where it has one (`verify --deep` proves that), else from its values.
    """
    manifest = find_manifest(made.origin.path)
    wanted = _recorded(manifest.tensors) if manifest else digests(made.parameters(), jobs=jobs, on_event=on_event)
    found = digests(derived.parameters(), jobs=jobs, on_event=on_event)
    wrong = [failed("L4", name, f"`{name}` is not what the sources give", OTHER) for name in wanted if wanted[name] != found.get(name)]
    wrong += [failed("L4", name, f"`{name}` comes from the sources, and is missing", OTHER) for name in found if name not in wanted]
    by = ", by the digests of its manifest" if manifest else ""
    return folded("L4", made.origin.name, wrong, f"{len(found):,} tensors made again from the sources, every bit equal{by}")


def digests(tensors: Mapping[str, LazyTensor], *, jobs: int = 2, on_event: Listener = lambda event: None) -> dict[str, Digest]:
    """dtype, shape and sha256 of the values of each tensor, made `jobs` at a time in windows of rows."""
    on_event(Started(len(tensors), sum(tensor.nbytes for tensor in tensors.values()), what="Making"))
    done, turn = [0], threading.Lock()

    def digest(item: tuple[str, LazyTensor]) -> Digest:
        name, tensor = item
        found = hashlib.sha256()
        with closing(Workspace()) as work:
            for start, stop in row_ranges(tensor, WINDOW):
                with work.scratch((stop - start) * tensor.row_nbytes) as rows:
                    tensor.rows_into(rows, start, stop, work)
                    found.update(rows)
            work.recheck_sources()
            check_crcs([work])
        with turn:
            done[0] += tensor.nbytes
            on_event(Progress(done[0], name))
        return tensor.dtype, tensor.shape, found.hexdigest()

    leaves = {leaf.file for tensor in tensors.values() for leaf in tensor.leaves()}
    with one_thread():
        return steady(lambda: dict(zip(tensors, in_threads(digest, tensors.items(), jobs), strict=True)), leaves, same_header)


def _recorded(tensors: Mapping[str, TensorEntry]) -> dict[str, Digest]:
    return {name: (entry.dtype, entry.shape, entry.sha256) for name, entry in tensors.items()}


def _options(made: Checkpoint) -> dict[str, Any]:
    """The options of every step of the recipe, later ones over earlier ones."""
    path = manifest_path(made.origin.path)
    recipe = load_object(path, limit=MAX_MANIFEST).get("recipe") if path.is_file() else []
    if not isinstance(recipe, list) or not all(isinstance(step, dict) and isinstance(step.get("options", {}), dict) for step in recipe):
        raise InputError(f"`{path.name}` has no recipe that can be read", hint="run `llava-weights verify` without sources")
    return {key: value for step in recipe for key, value in step.get("options", {}).items()}
