"""The names of an adapter's tensors: what each says about the module that it changes, and how.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
    '---- PEFT ----'----------- module ------------' part   adapter

PEFT leaves the adapter's name out when it saves; raw dumps of a training state keep it. Source: `get_peft_model_state_dict`
and the modules' own `state_dict` in PEFT 0.4-0.21.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import InputError
from ..families.layouts import BASE_LAYER, PEFT_PREFIX, WRAPPERS
from ..tensors.lazy import LazyTensor
from ..text import listed, shown

LORA = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?P<end>\.weight|\.bias|)"
)
SLOTS = {
    "lora_A.weight": "A", "lora_B.weight": "B", "lora_B.bias": "bias", "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
TRAINED_ROWS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?")
SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save(?:\.(?P<adapter>[^.]+)(?=\.))?\.(?P<rest>.+)")
ORIGINAL_MODULE = re.compile(r"(?P<module>.+?)\.original_module\.(?P<rest>.+)")
# What PEFT wrote and no rule above takes: tensors of other methods, or of LoRA with something unknown in the name.
FOREIGN = re.compile(
    r"(?:^|.*\.)(?:(?:lora|hada|lokr|vera|ia3|oft|boft|hra|fourierft|trainable_tokens)_|ranknum|modules_to_save|token_adapter).*"
)
# The order in which transformers' expert modules register these, which decides how PEFT nests them: the first lies innermost.
REGISTERED = ("w1", "v1", "w2", "gate_up_proj", "down_proj")
PREFERENCE = ("plain", "modules_to_save", "base_layer")  # of several spellings of one tensor the first is the one that PEFT loads


@dataclass
class Contents:
    """The tensors of one file, sorted.

    `modules`: by name, with its `.base_layer` levels, then by slot: "A", "B", "embedding_A", "embedding_B",
    "magnitude", "bias". `rows`: by module. `replacements`: by the name of the tensor that is replaced.
    """

    modules: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    rows: dict[str, LazyTensor] = field(default_factory=dict)
    replacements: dict[str, LazyTensor] = field(default_factory=dict)
    unplaced: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def adapter_names(tensors: Iterable[str]) -> list[str]:
    """The adapters that names of tensors mention; PEFT leaves the name out when it saves one."""
    return sorted({found for name in tensors if (found := _place(_key(name))[2])})


def of_adapter(tensors: Mapping[str, LazyTensor], chosen: str | None, file: str) -> Mapping[str, LazyTensor]:
    """Without the tensors of adapters other than the `chosen` one.

    Raises InputError where several are there and none is chosen, and where the chosen one is not there, naming those that are."""
    there = adapter_names(tensors)
    if chosen is None and len(there) > 1:
        what = f"{shown(file)} holds several adapters: {listed(there)}"
        raise InputError(what, hint=f"choose one, for example with `--adapter {there[0]}`")
    if chosen is not None and chosen not in there:
        facts = {"adapters in it": listed(there) or "one, without a name"}
        raise InputError(f"{shown(file)} holds no adapter {shown(chosen)}", facts=facts, hint="leave `--adapter` out, or give one of those")
    if len(there) < 2:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if _place(_key(name))[2] in (None, chosen)}


def sort_names(tensors: Mapping[str, LazyTensor], file: str) -> Contents:
    """Sort the tensors of a file, which holds one adapter, by what they change; those that no rule takes are in `unplaced`.

    Raises InputError where two claim one place.
    """
    contents = Contents()
    whole: dict[str, dict[str, str]] = {}  # by base name, then by spelling: the name in the file
    taken: dict[tuple[str, str], str] = {}
    for name, tensor in tensors.items():
        place, slot, _ = _place(_key(name))
        if slot and (other := taken.setdefault((place, slot), name)) != name:
            raise InputError(
                f"{shown(file)} holds {shown(other)} and {shown(name)}, which are the same thing", hint="remove one of the two"
            )
        if not slot:
            contents.unplaced.append(name)
        elif slot == "rows":
            contents.rows[place] = tensor
        elif slot in (*PREFERENCE, "original"):
            whole.setdefault(place, {})[slot] = name
        else:
            contents.modules.setdefault(place, {})[slot] = tensor
    copies = [copy for place, spellings in whole.items() for copy in _choose(contents, place, spellings, tensors)]
    contents.notes = (f"not used, copies of what {shown(file)} also holds or of the base: {listed(copies)}",) if copies else ()
    return contents


def _key(name: str) -> str:
    """A name without what wrappers put before it, in any order and number."""
    while (short := WRAPPERS.sub("", name).removeprefix(PEFT_PREFIX)) != name:
        name = short
    return name


def _place(key: str) -> tuple[str, str, str | None]:
    """The module or tensor that a name is about, its slot there ("" for none), and the adapter's name if there is one."""
    if found := LORA.fullmatch(key):
        return found["module"], SLOTS.get(found["part"] + found["end"], ""), found["adapter"]
    if found := TRAINED_ROWS.fullmatch(key):
        return found["module"], "rows", found["adapter"]
    if found := SAVED.fullmatch(key):
        return f"{found['module']}.{found['rest']}", "modules_to_save", found["adapter"]
    if found := ORIGINAL_MODULE.fullmatch(key):
        return f"{found['module']}.{found['rest']}", "original", None
    if FOREIGN.fullmatch(name := BASE_LAYER.sub("", key)):
        return key, "", None
    return name, "plain" if name == key else "base_layer", None


def _choose(contents: Contents, place: str, spellings: dict[str, str], tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Put one of the spellings of a tensor in its place, and return the others, which are copies of it."""
    names = [spellings[spelling] for spelling in PREFERENCE if spelling in spellings]
    if not names:  # the base's own weights, kept beside a copy that is not there
        contents.unplaced += spellings.values()
        return []
    chosen = tensors[names[0]]
    for other in names[1:]:
        if (tensors[other].shape, tensors[other].dtype) != (chosen.shape, chosen.dtype):
            contents.unplaced.append(other)
    contents.replacements[place] = chosen
    return [name for name in spellings.values() if name != names[0]]


def parameter_names(keys: Iterable[str], targets: Sequence[str]) -> dict[str, str]:
    """The parameter that each of these modules adapts, by `target_parameters`; modules that are adapted as a whole are left out.

    PEFT nests a `.base_layer` for each further parameter of a module. Raises InputError where it is not clear which is which.
    """
    levels: dict[str, list[str]] = {}
    for key in sorted(keys, key=len, reverse=True):  # the innermost has the longest name
        levels.setdefault(bare(key), []).append(key)
    names: dict[str, str] = {}
    for module, nested in levels.items():
        paths = {target: f"{module}.{target.rpartition('.')[2]}" for target in targets}
        found = {path.rpartition(".")[2] for target, path in paths.items() if f".{path}".endswith(f".{target}")}
        known = len(found) < 2 or found <= {*REGISTERED}
        if len(nested) != max(len(found), 1) or not known:
            facts = {"modules": listed(nested), "target_parameters": listed(targets) or "none"}
            raise InputError(
                f"it is not clear which parameters of {shown(module)} were adapted",
                facts=facts,
                hint="save the adapter again with a PEFT that names its `target_parameters`, or merge it with that PEFT",
            )
        names |= zip(nested, sorted(found, key=lambda name: REGISTERED.index(name) if name in REGISTERED else 0), strict=False)
    return names


def bare(module: str) -> str:
    """A module's name without the levels of PEFT's wrappers."""
    return re.sub(r"(\.base_layer)+$", "", module)
