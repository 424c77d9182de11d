"""Which files of a folder hold its weights, and all their tensors.

An index file and file names come from strangers: a shard is a bare name in the same folder, never a path, and a link may
lead nowhere but into the same repository of the Hub cache. What the index says and what the shards hold must agree, tensor
by tensor; transformers would load a tensor that the index does not mention.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..families.files import GGUF_SUFFIX, META_FILE, SIDE_FILES, STANDARD, WEIGHT_SUFFIXES, Container
from ..storage.places import AnyPlace, Place, identity_of, names_in
from ..storage.reading import SourceFile, Workspace, irregular, present, unreadable
from ..storage.strict_json import MAX_INDEX, load_object
from ..tensors.lazy import LazyTensor
from ..tensors.sampling import even
from ..text import listed, shown
from .gguf import index_gguf
from .meta import index_meta
from .safetensors import index_safetensors
from .torch_zip import index_torch_zip

SHARD_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}"
META_SIZE = r"\d+[Bb]"
WEIGHTS = rf".*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?|{META_FILE}|{'|'.join(map(re.escape, SIDE_FILES))}"
QUANTISED = r".*\.(gguf|ggml)|ggml.*\.bin|.*\.ggmlv\d.*"
SAMPLED_ROWS = 8  # of each tensor, where two files must be told apart
DOWNLOAD_MISSING = "download what is missing: `hf download` continues where it stopped"
DISAGREE = "index and shards are not of one download; download them again together"
UNQUANTISED = "quantised weights can't be added to or converted; give the float16 checkpoint that they were made from"
ACCEPTED = "*.safetensors, pytorch_model*.bin, consolidated.*.pth, adapter_model.*, mm_projector.bin, non_lora_trainables.bin"


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a folder or file: shard after shard by name, each in its own order. `config` is set for Meta's layout."""

    tensors: Mapping[str, LazyTensor]
    container: Container
    files: tuple[SourceFile, ...]
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # of each safetensors file, by file name
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None


def index_folder(folder: Place) -> WeightFiles:
    """The weights of a folder, from headers only; the first of these that it has:

    safetensors (index, `model.safetensors`, numbered shards, any single file), the same as `pytorch_model*.bin`, Meta's
    `consolidated.*.pth` (or one subfolder such as `13B` with them), an adapter, a projector, `non_lora_trainables.bin`.
    Raises InputError where there are none, a file is missing or damaged, or index and shards disagree.
    """
    names = _names(folder)
    searches: tuple[Callable[[Place, list[str]], WeightFiles | None], ...] = (_safetensors, _torch, _meta, _side)
    found = next((weights for search in searches if (weights := search(folder, names))), None)
    if not found:
        raise _nothing_in(folder, names)
    read = {file.name for file in found.files}
    unread = [name for name in names if re.fullmatch(WEIGHTS, name) and not name.endswith(".json") and name not in (*read, *SIDE_FILES)]
    note = f"the weights are those of {listed(sorted(read))}; not read: {listed(unread)}"
    return replace(found, notes=(*found.notes, note)) if unread else found


def index_ggufs(place: Place) -> WeightFiles | None:
    """The tensors of a GGUF file, or of all that lie in a folder without other weights; None for anything else. `metadata` has the keys of
    each file as texts, an array as its length. Raises InputError for a damaged file, and where two hold tensors of the same names."""
    names = _names(place) if place.is_dir() else [place.name]
    ggufs = [name for name in names if name.endswith(GGUF_SUFFIX)]
    if not ggufs or not present(place) or any(re.fullmatch(WEIGHTS, name) for name in names):
        return None
    tensors: dict[str, LazyTensor] = {}
    files, metadata = [], {}
    for name in ggufs:
        path = member(place, name) if place.is_dir() else place
        found, keys = index_gguf(path)
        if twice := [tensor for tensor in found if tensor in tensors]:
            what = f"{listed(ggufs)} hold tensors of the same names, such as {shown(twice[0])}"
            raise InputError(what, facts={"path": place}, hint="give one of the files")
        tensors |= found
        metadata[name] = {
            key.name: f"{len(key.value):,} items" if isinstance(key.value, tuple) else str(key.value) for key in keys.values()
        }
        files.append(next((leaf.file for tensor in found.values() for leaf in tensor.leaves()), identity_of(path)))
    return WeightFiles(tensors, "gguf", tuple(files), metadata)


def holds_weights(folder: Place) -> bool:
    """Whether a folder directly holds files that are named as weights are; False for what is no folder."""
    return _holds(folder, WEIGHTS)


def index_shards(folder: Place, index: str) -> WeightFiles:
    """The shards that the index file of this name lists. Raises InputError where one is missing or they disagree."""
    container = next((kind for kind, (_, suffix) in STANDARD.items() if index.endswith(f"{suffix}.index.json")), None)
    if container is None:
        raise InputError(f"{shown(index)} is no index of weights by its name", facts={"folder": folder}, hint="give the folder")
    return _read_indexed(folder, _names(folder), index, container)


def index_file(path: Place) -> WeightFiles:
    """The weights of one file, by its suffix; of one of Meta's, with the files beside it. Raises InputError as `index_folder`."""
    if not present(path):
        raise _missing(path)
    if re.fullmatch(META_FILE, path.name) and (whole := _meta(path.parent, _names(path.parent))):
        return whole
    container = WEIGHT_SUFFIXES.get(path.suffix)
    if re.fullmatch(QUANTISED, path.name):
        raise InputError(f"{shown(path.name)} holds quantised weights", facts={"path": path}, hint=UNQUANTISED)
    if not container:
        facts = {"path": path, "accepted": ", ".join(WEIGHT_SUFFIXES)}
        raise InputError(f"{shown(path.name)} is not a weight file by its name", facts=facts, hint="give the folder that it is in")
    count = shard_count(path.name)
    note = f"{shown(path.name)} is one of {count} shards, the others were not read" if count > 1 else ""
    return _read(path.parent, container, [path.name], path=path, notes=(note,) if note else ())


def shard_count(name: str) -> int:
    """Of how many shards a file of this name is one; 0 where the name is not that of a shard."""
    shard = re.fullmatch(r".*-\d{5}-of-(\d{5})", Path(name).stem)
    return int(shard[1]) if shard else 0


def inside(folder: AnyPlace, name: str) -> AnyPlace:
    """The path of `name` in or below an input folder; `folder` itself may be a link of the user's.

    Raises InputError where any part of it leads out of the folder, or is a link to nothing. Allowed are the links of the Hub cache,
    from `models--.../snapshots/REVISION` to `blobs` of the same repository.
    """
    path = folder / name
    if not isinstance(folder, Path) or not isinstance(path, Path):  # a listing holds no links
        return path
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    repositories = [above.parent for above in home.parents if above.name == "snapshots" and above.parent.name.startswith("models--")]
    if not (target.is_relative_to(home) or target.parent in [repository / "blobs" for repository in repositories]):
        parts = Path(name).parts
        links = (os.path.join(*parts[: count + 1]) for count in range(len(parts)))
        link = next((part for part in links if (folder / part).is_symlink()), name)
        what = "is a link that leads" if (folder / link).is_symlink() else "leads"
        facts = {"link": folder / link, "leads to": target}
        raise InputError(f"{shown(link)} {what} out of its folder", facts=facts, hint="put the file itself there, or give its folder")
    if path.is_symlink() and not target.exists():
        raise InputError(
            f"{shown(name)} is a link to a file that is missing", facts={"link": path, "leads to": target}, hint=DOWNLOAD_MISSING
        )
    return path


def same_header(file: SourceFile) -> bool:
    """Whether the tensors of a file still lie where they did when it was indexed."""
    if not file.header_sha256:
        return True
    with suppress(InputError):  # it has become another thing
        path = Path(file.path)
        return any((it.path, it.header_sha256) == (file.path, file.header_sha256) for it in (index_ggufs(path) or index_file(path)).files)
    return False


def member(folder: AnyPlace, name: str) -> AnyPlace:
    """The path of a file in an input folder. Raises InputError as `inside`, and for a folder, pipe or device of this name."""
    path = inside(folder, name)
    if isinstance(path, Path) and (status := _status(path)) and not stat.S_ISREG(status.st_mode):
        raise irregular(path, status)
    return path


def optional(folder: AnyPlace, name: str) -> AnyPlace | None:
    """As `member`, but None where there is no file of this name."""
    path = inside(folder, name)
    if not isinstance(path, Path):
        return path if path.is_file() else None
    return path if (status := _status(path)) and stat.S_ISREG(status.st_mode) else None


def _status(path: Path) -> os.stat_result | None:
    """The status of a path, None where there is nothing. Raises InputError where it can't be read."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error


def _safetensors(folder: Place, names: list[str]) -> WeightFiles | None:
    if found := _standard(folder, names, "safetensors"):
        return found
    others = [name for name in names if name.endswith(".safetensors") and name not in SIDE_FILES]
    return _read(folder, "safetensors", others) if len(others) == 1 else None


def _torch(folder: Place, names: list[str]) -> WeightFiles | None:
    return _standard(folder, names, "torch")


def _side(folder: Place, names: list[str]) -> WeightFiles | None:
    name = next((name for name in SIDE_FILES if name in names), None)
    return _read(folder, WEIGHT_SUFFIXES[Path(name).suffix], [name]) if name else None


def _standard(folder: Place, names: list[str], container: Container) -> WeightFiles | None:
    """An index with its shards, the one file of the usual name, or numbered shards without an index."""
    stem, suffix = STANDARD[container]
    single, usual = f"{stem}{suffix}", f"{stem}{suffix}.index.json"
    indexes = [name for name in names if name.endswith(f"{suffix}.index.json")]
    if usual in indexes:
        indexes = [usual]
    if single in names and indexes:
        return _single_beside_index(folder, names, single, indexes, container)
    if len(indexes) > 1:
        raise InputError(f"there are several index files: {listed(indexes)}", facts={"folder": folder}, hint="keep only one of them there")
    if indexes:
        return _read_indexed(folder, names, indexes[0], container)
    if single in names:
        return _read(folder, container, [single])
    shards = [name for name in names if re.fullmatch(rf"{stem}-\d{{5}}-of-(?!0{{5}})\d{{5}}{re.escape(suffix)}", name)]
    if not shards:
        return None
    total = shards[0].removesuffix(suffix)[-5:]
    if not all(name.endswith(f"-of-{total}{suffix}") for name in shards):
        facts = {"folder": folder, "shards": listed(shards)}
        raise InputError("the shards of several checkpoints lie in one folder", facts=facts, hint="keep only one set of them there")
    expected = [f"{stem}-{number:05}-of-{total}{suffix}" for number in range(1, int(total) + 1)]
    _all_there(folder, names, expected, "the numbers in their names")
    return _read(folder, container, expected, notes=(f"there is no index file; all {len(expected)} numbered shards are there",))


def _single_beside_index(folder: Place, names: list[str], single: str, indexes: list[str], container: Container) -> WeightFiles:
    """The one file, which transformers loads whatever an index beside it says. Raises InputError where the shards of that index are all
    there too and hold something else: one of the two is the older save, and nothing tells which."""
    notes = []
    for index in indexes:
        shards = set(_weight_map(folder, index, container).values())
        if shards == {single}:
            return _read_indexed(folder, names, index, container)
        if gone := sorted(shards.difference(names)):
            notes.append(f"{shown(index)} is left from another save: {listed(gone)} are not there")
            continue
        whole = _read_indexed(folder, names, index, container)
        found = _read(folder, container, [single])
        if (differ := first_difference(found.tensors, whole.tensors)) is not None:
            others = listed(sorted(shards))
            facts = {"folder": folder, "transformers loads": shown(single), f"{shown(index)} lists": others, "they differ in": differ}
            hint = "see which of the two was saved last, and move the other elsewhere"
            what = f"two checkpoints lie in one folder: {shown(single)}, and the shards of {shown(index)}"
            raise InputError(what, facts=facts, hint=hint)
        notes.append(f"{shown(index)} lists shards that hold the same as {shown(single)}, by samples of their values")
    return _read(folder, container, [single], notes=tuple(notes))


def first_difference(one: Mapping[str, LazyTensor], other: Mapping[str, LazyTensor]) -> str | None:
    """The first tensor in which two sets of weights differ by name, kind or sampled values, None where there is none."""
    if absent := sorted(one.keys() ^ other.keys()):
        return shown(absent[0])
    with closing(Workspace(drop_cache=False)) as work:
        for name, tensor in one.items():
            beside = other[name]
            if (tensor.dtype, tensor.shape) != (beside.dtype, beside.shape) or not _same_samples(tensor, beside, work):
                return shown(name)
    return None


def _same_samples(one: LazyTensor, other: LazyTensor, work: Workspace) -> bool:
    """Whether the bytes of some evenly spread rows are the same."""
    for row in even(one.rows, SAMPLED_ROWS) if one.numel else ():
        found = [bytearray(one.row_nbytes) for _ in range(2)]
        for tensor, raw in zip((one, other), found, strict=True):
            tensor.rows_into(memoryview(raw), row, row + 1, work)
        if found[0] != found[1]:
            return False
    return True


def _read_indexed(folder: Place, names: list[str], index: str, container: Container) -> WeightFiles:
    """The shards that an index names, which must hold the tensors that it lists there and no others."""
    weight_map = _weight_map(folder, index, container)
    targets = set(weight_map.values())
    _all_there(folder, names, sorted(targets), shown(index))
    found = _read(folder, container, sorted(targets), weight_map=weight_map)
    unlisted = [name for name in found.tensors if name not in weight_map]
    if unlisted:
        where = f"{shown(index)} does not list {len(unlisted):,} of the tensors in its shards"
        raise InputError(where, facts={"folder": folder, "tensors": listed(unlisted)}, hint=DISAGREE)
    return found


def _weight_map(folder: Place, index: str, container: Container) -> dict[str, str]:
    """The file of each tensor, by an index. Raises InputError for one that is no such map, or that leads out of the folder."""
    suffix = STANDARD[container][1]
    weight_map = load_object(member(folder, index), limit=MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{shown(index)} has no `weight_map` from tensor names to files", facts={"folder": folder}, hint=DISAGREE)
    bad = sorted({str(value) for value in weight_map.values() if not isinstance(value, str)})
    bad += sorted(target for target in set(map(str, weight_map.values())) if not re.fullmatch(SHARD_NAME + re.escape(suffix), target))
    if bad:
        facts = {"folder": folder, "accepted": f"names of {suffix} files in the same folder, not paths"}
        raise InputError(f"{shown(index)} points to {listed(bad)}", facts=facts, hint="download the checkpoint again from its authors")
    return weight_map


def _all_there(folder: Place, names: list[str], expected: list[str], authority: str) -> None:
    """Raise InputError naming the expected shards that are missing."""
    if missing := sorted(set(expected).difference(names)):
        what = f"{len(missing):,} of {len(expected):,} shards are missing: {listed(missing)}"
        raise InputError(what, facts={"folder": folder, "expected by": authority}, hint=DOWNLOAD_MISSING)


def _read(
    folder: Place,
    container: Container,
    shards: Iterable[str],
    *,
    path: Place | None = None,
    weight_map: Mapping[str, str] | None = None,
    notes: tuple[str, ...] = (),
) -> WeightFiles:
    """Index the shards in this order; `path` is a single one that the user gave, which may be a link. Raises InputError for one that is
    no safe file, lacks a tensor of the map or repeats one."""
    tensors: dict[str, LazyTensor] = {}
    files, metadata = [], {}
    listed_in: dict[str, list[str]] = {}
    for name, shard in (weight_map or {}).items():
        listed_in.setdefault(shard, []).append(name)
    for shard in shards:
        place = path or member(folder, shard)
        found, file, texts = _read_one(place, container)
        if texts:
            metadata[shard] = texts
        if absent := [name for name in listed_in.get(shard, ()) if name not in found]:
            what = f"{shown(shard)} lacks {len(absent):,} of the tensors that its index lists there"
            raise InputError(what, facts={"path": place, "tensors": listed(absent)}, hint=DISAGREE)
        if twice := [name for name in found if name in tensors]:
            what = f"{shown(shard)} repeats {len(twice):,} tensors of another shard"
            raise InputError(what, facts={"path": place, "tensors": listed(twice)}, hint=DISAGREE)
        tensors |= found
        files.append(file)
    if not tensors:
        raise InputError(
            f"there are no tensors in {listed(file.name for file in files)}",
            facts={"folder": folder},
            hint="download the checkpoint again from its authors",
        )
    return WeightFiles(tensors, container, tuple(files), metadata, notes)


def _read_one(path: Place, container: Container) -> tuple[Mapping[str, LazyTensor], SourceFile, dict[str, str]]:
    if container == "safetensors":
        tensors, metadata = index_safetensors(path)
    else:
        tensors, metadata = index_torch_zip(path), {}
    first = next(iter(tensors.values()), None)
    return tensors, first.file if first else identity_of(path), metadata


def _meta(folder: Place, names: list[str]) -> WeightFiles | None:
    """Meta's own layout, in this folder or in the one subfolder named after a size that has it."""
    pieces = [name for name in names if re.fullmatch(META_FILE, name)]
    if pieces:
        for name in (*pieces, *({"params.json"} & set(names))):
            member(folder, name)
        tensors, config = index_meta(folder)
        files = dict.fromkeys(leaf.file for tensor in tensors.values() for leaf in tensor.leaves())
        return WeightFiles(tensors, "meta", tuple(files), config=config)
    sizes = [name for name in names if re.fullmatch(META_SIZE, name) and _holds(inside(folder, name), META_FILE)]
    if len(sizes) > 1:
        facts = {"folder": folder, "models": listed(sizes)}
        raise InputError(
            "the folder holds several models", facts=facts, hint=f"give one of them, for example {shown(str(folder / sizes[0]))}"
        )
    if not sizes or not (found := _meta(folder / sizes[0], _names(folder / sizes[0]))):
        return None
    return replace(found, notes=(f"the weights are those of the subfolder {shown(sizes[0])}", *found.notes))


def _names(folder: Place) -> list[str]:
    """The names in a folder, sorted. Raises InputError where it is missing or not a folder."""
    if not present(folder):
        raise _missing(folder)
    if folder.is_file():
        raise InputError(f"{shown(folder.name)} is a file, not a folder", facts={"path": folder}, hint="give the folder that it is in")
    try:
        return names_in(folder)
    except OSError as error:
        raise unreadable(folder, error) from error


def _missing(path: Place) -> InputError:
    nearest = next((above for above in path.absolute().parents if above.is_dir()), None) if isinstance(path, Path) else path.parent
    return InputError(f"{shown(path.name)} does not exist", facts={"path": path}, hint=f"check the path; {shown(str(nearest))} is there")


def _holds(folder: Place, pattern: str) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names_in(folder))
    except OSError:
        return False


def _nothing_in(folder: Place, names: list[str]) -> InputError:
    """The error for a folder without weights: what it holds, what is accepted, and where weights are nearby."""
    facts = {"folder": folder, "found": listed(names) or "nothing", "accepted": ACCEPTED}
    if several := [name for name in names if name.endswith(".safetensors")]:
        return InputError(
            "it is not clear which files to read", facts=facts | {"candidates": listed(several)}, hint="give one of the files"
        )
    if quantised := [name for name in names if re.fullmatch(QUANTISED, name)]:
        return InputError(f"there are only quantised weights: {listed(quantised)}", facts=facts, hint=UNQUANTISED)
    below = [folder / name for name in names[:200]]
    if isinstance(folder, Path):
        below += sorted((folder / "snapshots").glob("*"))[:20]  # the Hub cache: models--owner--name/snapshots/REVISION
    near = [place for place in (*below, folder.absolute().parent) if _holds(place, WEIGHTS)]
    hint = f"there are weights in {listed(map(str, near))}" if near else "give the folder that holds the weight files and config.json"
    return InputError(f"there are no weights in {shown(folder.name or str(folder.absolute()))}", facts=facts, hint=hint)
