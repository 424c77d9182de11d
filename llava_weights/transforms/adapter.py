"""Read an adapter of PEFT or LLaVA: its low-rank updates and the tensors that it replaces, each under the name of what it changes.

Nothing is merged here, and no base is known yet. Every tensor of the files gets exactly one place, or is refused by name: PEFT itself
drops what it can't place, without a word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.checkpoint import Origin, to_place
from ..errors import InputError
from ..families.files import (
    ADAPTER_FILES,
    MLX_FILES,
    MLX_STEPS,
    NEW_ROWS,
    PROJECTOR_FILES,
    STATES,
    TOKENIZER_FILES,
    TRAINED_BESIDE,
    TRAINED_FILES,
    TRAINER_STATE,
    WEIGHT_SUFFIXES,
)
from ..families.layouts import DROPPED, VOCABULARY, placed
from ..families.targets import TOWER_KEYS
from ..formats.folder import WeightFiles, first_difference, index_file, index_shards, member, optional, shard_count
from ..formats.safetensors import index_safetensors
from ..formats.torch_zip import index_torch_zip
from ..storage.hub import HubSource, fetch, parse_source, source_text
from ..storage.places import Place, identity_of, names_in, whole
from ..storage.reading import SourceFile, present, unreadable
from ..storage.remote import is_remote, open_remote
from ..storage.strict_json import load_object
from ..tensors.lazy import FLOATS, LazyTensor
from ..text import brief, few, legible, listed, shown
from .adapter_config import RIGHT_ADAPTER_CONFIG, LoraRules, quantised_base, read_rules, short_base
from .adapter_names import Contents, adapter_names, bare, of_adapter, parameter_names, sort_names
from .mlx_adapter import FUSE, MlxRules, is_mlx, read_mlx_rules, sort_mlx

Rows = dict[str, tuple[tuple[int, ...], LazyTensor]]
ModuleKind = Literal["linear", "embedding", "conv", "parameter"]

PROJECTOR_NAME = r"model\.mm_projector\.(\d\.)?(weight|bias)"
# The slots that a module must fill, and those that it may fill.
COMPLETE_SLOTS = (
    ({"A", "B"}, {"A", "B", "magnitude", "bias"}),
    ({"embedding_A", "embedding_B"}, {"embedding_A", "embedding_B", "magnitude"}),
)

ZERO_3 = "gather the full weights with DeepSpeed's `zero_to_fp32.py` from the `global_stepN` folder, then merge those"
UNPLACED = "an adapter with such a tensor can't be merged as a whole; check that the file is the one its training wrote"


@dataclass(frozen=True)
class Module:
    """One adapted module, by its name without PEFT's prefix, such as `model.layers.0.self_attn.q_proj`. `kind` is "linear", "embedding",
    "conv" or "parameter". The update is `scale` * b @ a; `rank` is its rank.

    Shapes of a linear module: `a` [rank, in], `b` [out, rank]. Of an embedding: [rank, vocabulary] and [width, rank]. Of a convolution: the
    same with the kernel's axes behind. Of the experts in one `parameter`: [rank * experts, in] and [out, rank * experts]. `magnitude` [out]
    is that of a DoRA, `bias` [out] that of a module with `lora_bias`. With `fan_in_fan_out` the weight is stored as [in, out].
    `mlx` says that MLX trained it: its factors, which are stored the other way round, are turned here, and merged by MLX's rules.
    """

    name: str
    kind: ModuleKind
    a: LazyTensor
    b: LazyTensor
    scale: float
    rank: int
    magnitude: LazyTensor | None = None
    bias: LazyTensor | None = None
    fan_in_fan_out: bool = False
    parameter: str = ""
    mlx: bool = False

    def __repr__(self) -> str:
        return f"Module({brief(self.name, 80)}, {self.kind!r}, rank {self.rank}, scale {self.scale:g})"


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to a base, under the names that its training used. Nothing is merged yet.

    `modules` are the low-rank updates. `replacements` are whole tensors, such as a tuned projector. `rows` replace single rows of a table:
    their indices and the tensor that holds them in that order; negative indices count from the end of the grown table. `config` is LLaVA's
    config.json, empty where there is none, `peft` are the settings of adapter_config.json that a merge needs, `settings` is all of
    that file, `files` are the tokenizer's files, `notes` are sentences on what was found when it was opened.
    """

    origin: Origin
    modules: tuple[Module, ...] = ()
    replacements: Mapping[str, LazyTensor] = field(default_factory=dict)
    rows: Mapping[str, tuple[tuple[int, ...], LazyTensor]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    peft: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        rows = f", rows of {len(self.rows)} tensors" if self.rows else ""
        return f"Adapter({brief(self.origin.name)}, {len(self.modules)} modules, {len(self.replacements)} replaced tensors{rows})"


def open_adapter(
    source: str | Path,
    *,
    revision: str | None = None,
    non_lora: str | Path | None = None,
    adapter: str | None = None,
    progress: bool | None = None,
) -> Adapter:
    """Open an adapter, PEFT's, LLaVA's or MLX's. Reads headers and small JSON files only.

    `source` is a folder, one of its files, a projector (`mm_projector.bin`), `owner/name[@revision]` on the Hub, or an address as
    `open_checkpoint` takes it. `revision` is a branch, tag or commit of a repository. `non_lora` is the path of the
    `non_lora_trainables.bin` that a `checkpoint-N` folder lacks. `adapter` is the name of one of several in a file, or of the folder in the
    folder where PEFT saves all but the first. `progress` shows the bars of a download: None only on a terminal, False never.

    Raises UsageError for what is no path, InputError for what is missing, damaged, hostile, no LoRA or without a place, HubError where the
    Hub can't serve it.
    """
    source, non_lora = to_place(source, "adapter"), Path(to_place(non_lora, "file of `non_lora`")) if non_lora is not None else None
    text = source_text(source)
    if is_remote(text):
        found = open_remote(text, revision)
        return _open(found.place, found.name, found.revision, non_lora, adapter)
    parsed = parse_source(text)
    if isinstance(parsed, HubSource):
        repo = fetch(parsed, revision=revision, progress=progress)
        opened = _open(repo.folder, repo.repo_id, repo.revision, non_lora, adapter)
        return replace(opened, notes=(*opened.notes, f"{repo.repo_id} comes from the cache")) if repo.from_cache else opened
    if revision is not None:
        raise InputError(f"`{source}` is a local path, so it has no revision `{revision}`", hint="leave out `--revision`")
    return _open(parsed.path, parsed.path.resolve().name, None, non_lora, adapter)


def _open(path: Place, name: str, revision: str | None, non_lora: Path | None, chosen: str | None) -> Adapter:
    if chosen and Path(chosen).name == chosen and path.is_dir() and any(present(path / chosen / file) for file in ADAPTER_FILES):
        path, chosen = path / chosen, None
    folder = path if path.is_dir() else path.parent
    file = _weights_in(path) if path.is_dir() else path
    found = _indexed(file)
    found = replace(found, tensors=_without_buffers(found.tensors))
    _check_sound(found.tensors, file.name)
    there = {entry: place for entry in TOKENIZER_FILES if (place := optional(folder, entry))}
    files = {entry: place if isinstance(place, Path) else whole(place) for entry, place in there.items()}
    origin = Origin(legible(name), path.absolute(), found.container, found.files, revision)
    adapter = Adapter(origin, config=_config_in(folder), files=files, notes=_beside(folder, found, non_lora, chosen=not path.is_dir()))
    if any("mm_projector." in key for key in found.tensors) and not any("lora_" in key for key in found.tensors):
        return _projector(adapter, file, found.tensors, non_lora)
    if not present(folder / "adapter_config.json"):
        facts = {"folder": folder, "tensors": few(found.tensors)}
        hint = "its rank and alpha are there, without which the weights mean nothing; download the whole adapter"
        raise InputError(f"there is no `adapter_config.json` beside {shown(file.name)}", facts=facts, hint=hint)
    if is_mlx(found.tensors):
        if chosen:
            raise InputError(f"{shown(file.name)} is an adapter of MLX, which has no name", hint="leave `--adapter` out")
        return _of_mlx(adapter, found.tensors, read_mlx_rules(member(folder, "adapter_config.json")), file.name)
    rules = read_rules(member(folder, "adapter_config.json"))
    adapter = replace(adapter, settings=load_object(member(folder, "adapter_config.json")))
    contents = sort_names(of_adapter(found.tensors, chosen, file.name), file.name)
    modules, rows = _modules(contents, rules, file.name), _rows(contents, rules)
    _refuse_unplaced(contents.unplaced, file.name)
    adapter = replace(adapter, modules=modules, rows=rows, replacements=contents.replacements)
    adapter = replace(adapter, notes=(*adapter.notes, *found.notes, *contents.notes))
    return _with_facts(_with_non_lora(adapter, folder, contents, non_lora, chosen), rules)


def _of_mlx(adapter: Adapter, tensors: Mapping[str, LazyTensor], rules: MlxRules, file: str) -> Adapter:
    """An adapter of MLX, with its factors turned. Whole tensors beside them, such as a tuned projector, replace the base's."""
    found, contents = sort_mlx(tensors, rules, file)
    _refuse_unplaced(contents.unplaced, file)
    modules = tuple(
        Module(
            name=module.name,
            kind="embedding" if module.embedding else "linear",
            a=module.a,
            b=module.b,
            scale=rules.scale,
            rank=rules.rank,
            magnitude=module.magnitude,
            mlx=True,
        )
        for module in found
    )
    base = str(rules.facts.get("base_model_name_or_path", ""))
    quantised = quantised_base(base, {})
    notes = [f"trained on {shown(short_base(base))}, by adapter_config.json of MLX"] if base else []
    notes += [f"trained on a quantised base, by {quantised}"] if quantised else []
    return replace(adapter, modules=modules, replacements=contents.replacements, peft=rules.facts, notes=(*adapter.notes, *notes))


def _weights_in(folder: Place) -> Place:
    """The file to read in a folder: an adapter's, a projector, or what `zero_to_fp32.py` made of a training state, an index first.

    Raises InputError saying what is there instead, and where an adapter is near, and where two adapter files differ."""
    names = _names(folder)
    whole = any(re.fullmatch(r"(pytorch_)?model\b.*\.(bin|safetensors)", name) for name in names)
    states = STATES if "adapter_config.json" in names else ()
    wanted = ADAPTER_FILES if whole or "adapter_config.json" in names else (*ADAPTER_FILES, *PROJECTOR_FILES)
    found = [name for name in wanted if name in names]
    if len(found) > 1 and (differ := first_difference(*(index_file(member(folder, name)).tensors for name in found[:2]))):
        facts = {"folder": folder, "they differ in": differ}
        hint = "give the file that is meant, in place of the folder"
        raise InputError(f"{listed(found[:2])} lie in one folder, and are not the same", facts=facts, hint=hint)
    if found or (found := [name for name in states if name in names]):
        return member(folder, found[0])
    if MLX_FILES[0] in names:
        return member(folder, MLX_FILES[0])
    if MLX_FILES[1] in names:
        facts = {"folder": folder, "found": listed(names)}
        what = f"{shown(MLX_FILES[1])} is an adapter of MLX in numpy's format, which MLX wrote until 2024"
        raise InputError(what, facts=facts, hint=FUSE)
    near = [name for name in names if any(present(folder / name / file) for file in ADAPTER_FILES)]
    hint = f"there is one in {listed(near)}" if near else "give the folder that its training wrote, with `adapter_config.json` in it"
    facts = {"folder": folder, "found": listed(names) or "nothing", "accepted": listed(wanted)}
    raise InputError(f"there is no adapter in {shown(folder.resolve().name)}", facts=facts, hint=hint)


def _names(folder: Place) -> list[str]:
    try:
        return names_in(folder)
    except OSError as error:
        raise unreadable(folder, error) from error


def _indexed(file: Place) -> WeightFiles:
    """The tensors of one file, or of the shards that an index lists. Raises InputError for one shard of several."""
    if file.name.endswith(".index.json"):
        return index_shards(file.parent, file.name)
    if (count := shard_count(file.name)) > 1:
        facts = {"path": file}
        raise InputError(f"{shown(file.name)} is one of {count} shards", facts=facts, hint="give their index file, or their folder")
    return index_file(file)


def _beside(folder: Place, read: WeightFiles, non_lora: Path | None, *, chosen: bool) -> tuple[str, ...]:
    """Raise InputError naming the weight files of the folder that would be lost: neither read nor read later.

    Where a file was chosen, other ways to store an adapter or a model are no part of it: a note names them."""
    mine = folder.absolute()
    given = [path for path in (_parts_of(non_lora) if non_lora else ()) if path.parent.absolute() == mine]
    used = {file.name for file in read.files} | {path.name for path in given}
    suffixes = tuple(WEIGHT_SUFFIXES)
    others = [name for name in _names(folder) if name.endswith(suffixes) and not re.fullmatch(TRAINER_STATE, name)]
    others = [name for name in others if not (re.fullmatch(MLX_STEPS, name) and used & {*MLX_FILES})]
    others = [name for name in others if name not in (*used, *ADAPTER_FILES, *TRAINED_FILES, *PROJECTOR_FILES)]
    if rows := [name for name in others if name in NEW_ROWS]:
        what = f"{shown(rows[0])} beside the adapter holds rows of tokens that were added to the base's tables"
        hint = (
            "save the adapter with its embedding tables (`modules_to_save`), which hold those rows; to lose them, move the file elsewhere"
        )
        raise InputError(what, facts={"folder": folder}, hint=hint)
    if not others or chosen:
        return (f"not read, beside the file that was given: {listed(others)}",) if others else ()
    state = next((name for name in STATES if name in _names(folder)), None)
    more = f"give `--non-lora {folder / state}` to take what it holds besides the LoRA, or " if state and not non_lora else ""
    hint = f"{more}give the file of the adapter in place of the folder, to leave the others out"
    facts = {"folder": folder, "read": listed(file.name for file in read.files)}
    raise InputError(f"weights beside the adapter are of no known use: {listed(others)}", facts=facts, hint=hint)


def _config_in(folder: Place) -> Mapping[str, Any]:
    return load_object(member(folder, "config.json")) if present(folder / "config.json") else {}


def _without_buffers(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Without the buffers that a training state holds besides, which no program reads."""
    return {name: tensor for name, tensor in tensors.items() if not re.fullmatch(DROPPED, name)}


def _check_sound(tensors: Mapping[str, LazyTensor], file: str) -> None:
    """Raise InputError naming the tensors that hold nothing, as DeepSpeed leaves them, or that hold no floats."""
    if empty := [name for name, tensor in tensors.items() if 0 in tensor.shape]:
        facts = {"tensors": few(empty), "shape": list(tensors[empty[0]].shape)}
        raise InputError(f"{len(empty):,} tensors of {shown(file)} are empty: ZeRO-3 kept their values elsewhere", facts=facts, hint=ZERO_3)
    if other := [name for name, tensor in tensors.items() if tensor.dtype not in FLOATS]:
        facts = {"tensors": few(other), "dtype": tensors[other[0]].dtype}
        raise InputError(f"{len(other):,} tensors of {shown(file)} do not hold floats", facts=facts, hint="give the unquantised adapter")


def _refuse_unplaced(names: Sequence[str], file: str) -> None:
    if names:
        raise InputError(f"{len(names):,} tensors of {shown(file)} have no place: {few(names)}", hint=UNPLACED)


def _modules(contents: Contents, rules: LoraRules, file: str) -> tuple[Module, ...]:
    """The adapted modules in the order of the file. Raises InputError for half ones, and for those that are not as `rules` say."""
    half = [key for key, slots in contents.modules.items() if not any(need <= slots.keys() <= most for need, most in COMPLETE_SLOTS)]
    if half:
        held = sorted({slot for key in half for slot in contents.modules[key]})
        facts = {"modules": few(half), "parts that are there": listed(held)}
        raise InputError(f"{shown(file)} does not hold both factors of {len(half):,} modules", facts=facts, hint=UNPLACED)
    names = parameter_names(contents.modules, rules.target_parameters)
    rules.check_effort(f"{key}.{names.get(key, '')}" for key in contents.modules)
    modules = {key: _module(key, slots, rules, names.get(key, "")) for key, slots in contents.modules.items()}
    problems = {key: problem for key, module in modules.items() if (problem := _problem(module, rules))}
    if problems:
        first = next(iter(problems))
        facts = {"modules": few(problems), "of these": f"{shown(first)} {problems[first]}"}
        raise InputError(
            f"{len(problems):,} modules of {shown(file)} are not as `adapter_config.json` says", facts=facts, hint=RIGHT_ADAPTER_CONFIG
        )
    return tuple(modules.values())


def _module(key: str, slots: Mapping[str, LazyTensor], rules: LoraRules, parameter: str) -> Module:
    name = bare(key)
    embedding = "embedding_A" in slots
    a, b = (slots["embedding_A"], slots["embedding_B"]) if embedding else (slots["A"], slots["B"])
    kind: ModuleKind = "parameter" if parameter else "embedding" if embedding else "conv" if len(a.shape) > 2 else "linear"
    matched = f"{name}.{parameter}" if parameter else name  # what PEFT matches its patterns against
    return Module(
        name=name,
        kind=kind,
        a=a,
        b=b,
        scale=rules.scale_of(matched),
        rank=rules.rank_of(matched),
        magnitude=slots.get("magnitude"),
        bias=slots.get("bias"),
        fan_in_fan_out=rules.fan_in_fan_out and kind == "linear",
        parameter=parameter,
    )


def _problem(module: Module, rules: LoraRules) -> str:
    """How a module contradicts its rank or the variants that adapter_config.json announces; empty if it does not."""
    a, b, rank = module.a.shape, module.b.shape, module.rank
    stacked = module.kind == "parameter" and a[0] % rank == 0  # experts, one below the other
    ones = (1,) * (len(b) - 2)
    if len(a) != len(b) or len(a) < 2 or a[0] != b[1] or b[2:] != ones or not (stacked or a[0] == rank):
        return f"has factors of the shapes {list(a)} and {list(b)}, which is not rank {rank}"
    if module.magnitude and module.magnitude.shape not in ((b[0],), (1, b[0], *ones)):
        return f"has a magnitude of the shape {list(module.magnitude.shape)} for {b[0]} outputs"
    if module.bias and module.bias.shape != (b[0],):
        return f"has a bias of the shape {list(module.bias.shape)} for {b[0]} outputs"
    if rules.dora != (module.magnitude is not None):
        return "lacks the magnitude of DoRA" if rules.dora else "has the magnitude of DoRA, but `use_dora` is not set"
    if rules.bias != (module.bias is not None) and module.kind != "embedding":
        return "lacks the bias of `lora_B`" if rules.bias else "has a bias of `lora_B`, but `lora_bias` is not set"
    return ""


def _rows(contents: Contents, rules: LoraRules) -> Rows:
    """The trained rows of embeddings, by the table's name. Raises InputError where the config does not say which rows they are."""
    rows = {}
    for module, tensor in contents.rows.items():
        indices = rules.indices_of(module)
        if indices is None or tensor.shape[:1] != (len(indices),):
            facts = {"rows": list(tensor.shape)[:1], "trainable_token_indices": len(indices or ())}
            what = f"the trained rows of {shown(module)} are not those that `adapter_config.json` lists"
            raise InputError(what, facts=facts, hint=RIGHT_ADAPTER_CONFIG)
        rows[f"{module}.weight"] = (indices, tensor)
    return rows


def _with_non_lora(adapter: Adapter, folder: Place, contents: Contents, given: Path | None, chosen: str | None) -> Adapter:
    """With what the files beside the adapter replace, `non_lora_trainables.bin` above all, and the config that was written with it."""
    paths = [_resolved(given)] if given else _find_non_lora(folder, adapter, contents)
    if not paths and present(folder / "trainer_state.json") and not _has_projector(adapter.replacements):
        note = (
            f"this is a checkpoint of the Trainer; if LLaVA's, the projector of that step is not in it: give `--non-lora {TRAINED_BESIDE}`"
        )
        return replace(adapter, notes=(*adapter.notes, note))
    for path in paths:
        adapter = _with_file(adapter, path, contents, chosen)
    config = adapter.config
    if paths and not config:
        found = (c for c in map(_config_in, (paths[0].parent, folder.absolute().parent)) if _is_llava(c))
        if config := next(found, {}):
            note = "config.json is the one of the finished training, the adapter has none"
            adapter = replace(adapter, config=config, notes=(*adapter.notes, note))
    if given and paths:
        _refuse_missing_projector(adapter, paths[0])
    return adapter


def _refuse_missing_projector(adapter: Adapter, given: Place) -> None:
    """Raise InputError where LLaVA's config says that the projector was trained, but the file that was given for it holds none.

    LLaVA trains the projector with every LoRA unless `freeze_mm_mlp_adapter` is set (train.py at c121f04)."""
    if not _is_llava(adapter.config) or adapter.config.get("freeze_mm_mlp_adapter") is True or _has_projector(adapter.replacements):
        return
    facts = {"file": given, "config.json": "`mm_vision_tower`, and no `freeze_mm_mlp_adapter`: the projector was trained"}
    hint = "give the file that holds `mm_projector` tensors: the non_lora_trainables.bin of the run, or a whole training state"
    raise InputError(f"{shown(given.name)} lacks the projector that was trained with this adapter", facts=facts, hint=hint)


def _is_projector(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether a file under any name is a projector with the two rows of `<im_start>` and `<im_end>` that LLaVA saves beside it."""
    tables = [tensor for name, tensor in tensors.items() if f".{name}".endswith(".embed_tokens.weight")]
    return any("mm_projector." in name for name in tensors) and [table.rows for table in tables] == [2]


def _with_file(adapter: Adapter, path: Place, contents: Contents, chosen: str | None) -> Adapter:
    """With what one file beside the adapter replaces. Raises InputError where two files hold different values for one tensor."""
    tensors, files = _index(path)
    tensors = _without_buffers(tensors)
    _check_sound(tensors, path.name)
    rows = dict(adapter.rows)
    if path.name in PROJECTOR_FILES or _is_projector(tensors):
        found, more = Contents(), _projector_names(tensors, path.name)
        found.replacements, rows = more[0], rows | more[1]
    else:
        found = sort_names(of_adapter(_strip(tensors), chosen if chosen in adapter_names(tensors) else None, path.name), path.name)
    again = [f"{key}.{slot}" for key, parts in found.modules.items() for slot in parts]
    strange = [f"{key}.{slot}" for key, parts in found.modules.items() for slot in parts if slot not in contents.modules.get(key, {})]
    _refuse_unplaced([*found.unplaced, *found.rows, *strange], path.name)
    both = [name for name in found.replacements if name in adapter.replacements]
    _refuse_unplaced([name for name in both if found.replacements[name].shape != adapter.replacements[name].shape], path.name)
    differ = first_difference(*({name: where[name] for name in both} for where in (found.replacements, adapter.replacements)))
    if differ and (path.name in PROJECTOR_FILES or _is_projector(tensors)):
        facts = {"files": listed([*(file.name for file in adapter.origin.files), path.name]), "they differ in": differ}
        hint = "see which of them belongs to the adapter, and move the other elsewhere"
        raise InputError(f"{shown(path.name)} holds another projector than the files beside it", facts=facts, hint=hint)
    notes = [*adapter.notes, *found.notes]
    notes += [] if tensors else [f"{shown(path.name)} is empty: training changed nothing but the LoRA"]
    notes += [f"in both files, taken from the adapter: {few([*both, *again])}"] if both or again else []
    origin = replace(adapter.origin, files=(*adapter.origin.files, *files))
    replacements = {**found.replacements, **adapter.replacements}
    return replace(adapter, origin=origin, replacements=replacements, rows=rows, notes=tuple(notes))


def _find_non_lora(folder: Place, adapter: Adapter, contents: Contents) -> list[Place]:
    """The files beside the adapter, none for an adapter that is not LLaVA's. Raises InputError where LLaVA's lacks them.

    train.py writes one, and config.json, once at the end: not into the Trainer's `checkpoint-N` (LLaVA #742, #1200, #1245),
    which is known by its trainer_state.json and the config.json above it.
    """
    read = {file.path for file in adapter.origin.files}
    paths = [member(folder, name) for name in (*TRAINED_FILES, *PROJECTOR_FILES) if present(folder / name)]
    if paths := [path for path in paths if str(path.absolute()) not in read]:
        return paths
    above, config = folder.absolute().parent, adapter.config
    checkpoint = not config and present(folder / "trainer_state.json") and _is_llava(_config_in(above))
    if not (_is_llava(config) or checkpoint) or _has_projector(contents.replacements):
        return []
    facts = {"folder": folder, "what it holds": "the projector, and what else was trained besides the LoRA"}
    hint = "training writes it when it ends; before that, get it from the `global_stepN` folder with DeepSpeed's `zero_to_fp32.py`"
    if present(above / TRAINED_BESIDE):
        facts["there is one above"] = f"{above / TRAINED_BESIDE}, of the end of the training"
        hint = f"if that one will do, give `--non-lora {above / TRAINED_BESIDE}`"
    raise InputError(f"this adapter of LLaVA lacks its `{TRAINED_BESIDE}`", facts=facts, hint=hint)


def _has_projector(names: Iterable[str]) -> bool:
    return any(placed(name).startswith("projector.") for name in names)


def _is_llava(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of LLaVA's own, which name the tower; llava-hf's nest a `vision_config` instead."""
    return any(key in config for key in TOWER_KEYS)


def _resolved(path: Path) -> Path:
    """The file to read for `--non-lora`, which may be a folder: LLaVA's own name first, then a whole training state."""
    if not path.is_dir():
        return path
    names = _names(path)
    wanted = (*TRAINED_FILES, *STATES, *PROJECTOR_FILES)
    if found := next((name for name in wanted if name in names), None):
        return member(path, found)
    facts = {"folder": path, "found": listed(names) or "nothing", "accepted": listed(wanted)}
    raise InputError(f"there is no `{TRAINED_BESIDE}` in {shown(path.name)}", facts=facts, hint="give the file itself")


def _parts_of(path: Path) -> tuple[Path, ...]:
    """The files that `--non-lora` stands for, by the path that was given."""
    path = _resolved(path)
    shards = index_shards(path.parent, path.name).files if path.name.endswith(".index.json") else ()
    return (path, *(Path(file.path) for file in shards))


def _index(path: Place) -> tuple[Mapping[str, LazyTensor], tuple[SourceFile, ...]]:
    """The tensors of a file that may be empty, or of the shards of an index, and the files."""
    if path.name.endswith(".index.json") or shard_count(path.name) > 1:
        found = _indexed(path)
        return found.tensors, found.files
    tensors = index_safetensors(path)[0] if path.suffix == ".safetensors" else index_torch_zip(path)
    return tensors, (next((tensor.file for tensor in tensors.values()), None) or identity_of(path),)


def _strip(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """LLaVA's own rule for the names in this file (`builder.py`, c121f04): drop `base_model.`, and then one `model.` of all if
    any begins with two."""
    names = {name: name.removeprefix("base_model.") for name in tensors}
    if any(name.startswith("model.model.") for name in names.values()):
        names = {name: short.removeprefix("model.") for name, short in names.items()}
    counts = Counter(names.values())
    twice = [name for name, short in names.items() if counts[short] > 1]
    _refuse_unplaced(twice, TRAINED_BESIDE)
    return {names[name]: tensor for name, tensor in tensors.items()}


def _projector(adapter: Adapter, file: Place, tensors: Mapping[str, LazyTensor], non_lora: Path | None) -> Adapter:
    """An adapter that is only a projector. FSDP and ZeRO-3 put prefixes before its names, so LLaVA looks for `mm_projector.` in them."""
    beside = [name for name in ADAPTER_FILES if present(file.parent / name)]
    if non_lora or beside:
        hint = f"give the folder, to merge {listed(beside)} with it" if beside else "leave out `--non-lora`"
        raise InputError(f"{shown(file.name)} is only a part of an adapter", facts={"folder": file.parent}, hint=hint)
    replacements, rows = _projector_names(tensors, file.name)
    return replace(adapter, replacements=replacements, rows=rows)


def _projector_names(tensors: Mapping[str, LazyTensor], file: str) -> tuple[dict[str, LazyTensor], Rows]:
    """What a projector's file replaces: whole tensors, and rows of the table."""
    replacements: dict[str, LazyTensor] = {}
    unplaced = []
    for name, tensor in tensors.items():
        short = f"model.mm_projector.{name.partition('mm_projector.')[2]}"
        short = VOCABULARY[0] if f".{name}".endswith(".embed_tokens.weight") else short
        if short in replacements or not re.fullmatch(rf"{PROJECTOR_NAME}|{re.escape(VOCABULARY[0])}", short):
            unplaced.append(name)
        replacements[short] = tensor
    _refuse_unplaced(unplaced, file)
    table = replacements.get(VOCABULARY[0])
    if table is None or table.rows != 2:
        return replacements, {}
    del replacements[VOCABULARY[0]]  # trimmed to <im_start> and <im_end>, which stand last (LLaVA 74f8877)
    return replacements, {VOCABULARY[0]: ((-2, -1), table)}


def _with_facts(adapter: Adapter, rules: LoraRules) -> Adapter:
    """With the facts and notes on which base it was trained, and on what its config announces but the files do not hold."""
    base = str(rules.facts.get("base_model_name_or_path", ""))
    quantised = quantised_base(base, adapter.config)
    notes = [f"trained on {shown(short_base(base))}, by adapter_config.json"] if base else []
    if quantised:
        notes.append(f"trained on a quantised base, by {quantised}")
    held = [f".{module.name}" for module in adapter.modules]
    missing = [key for key in rules.target_modules if key != "all-linear" and not any(name.endswith(f".{key}") for name in held)]
    held = [f".{name}." for name in adapter.replacements]
    missing += [key for key in rules.modules_to_save if not any(f".{key}." in name for name in held)]
    notes += [f"adapter_config.json lists {listed(missing)}, for which there are no tensors"] if missing else []
    facts = {**rules.facts, "quantised": quantised} if quantised else rules.facts
    return replace(adapter, peft=facts, notes=(*adapter.notes, *notes))
