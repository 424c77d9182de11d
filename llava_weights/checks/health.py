"""Is a checkpoint sound, judged by itself alone? Its files against each other (L0), and a few MB of its values (L1).

No reference is needed, and nothing is executed. A sum with a wrong base can hardly be recognised without the base, so that is never
more than a warning.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.diagnose import LONGEST_NORM, MODELS, bf16_damaged, is_llama1, role_of, state
from ..checkpoint.kinds import kind_of
from ..checkpoint.small_files import small_text
from ..errors import InputError
from ..families.decoders import ACTIVATIONS
from ..families.files import STANDARD
from ..families.layouts import VOCABULARY_TABLES, canonical, spelled
from ..families.quantised import PACKED_NAME
from ..findings import Finding
from ..formats.folder import member
from ..storage.reading import Workspace, present
from ..storage.strict_json import MAX_INDEX, load_object
from ..tensors.holes import Watch, hole_sentences
from ..tensors.lazy import FLOATS, LazyTensor
from ..tensors.sampling import LARGEST_ROW, even, read_some
from ..text import few, fold_names, listed, size
from . import rules_llava_hf, rules_original
from .rules import CONFIG, JINJA, Rule, SmallFiles, added_ids, as_json, check, read_small_files, refused
from .template_check import asks_for

RULES_OF_LAYOUT: Mapping[str, tuple[Rule, ...]] = {
    "llama": rules_original.LLAMA_RULES,
    "llava": rules_original.LLAVA_RULES,
    "llava-hf": rules_llava_hf.LLAVA_HF_RULES,
}
SHAPES = ("config/structure", "config/tower", "config/projector")  # which compare shapes
MORE_TEMPLATES = "additional_chat_templates"  # as transformers names the folder
TEMPLATES_FROM = "take the template from the authors of the model"
CODE_KEYS = ("auto_map", "trust_remote_code", "_attn_implementation_internal")  # the last: CVE-2026-4372
PICKLES, PROGRAMS = (".bin", ".pth", ".pt", ".pkl", ".pickle", ".ckpt"), (".py", ".so", ".sh")
SAFETENSORS = "convert it: every command that writes a model writes safetensors"
MAKE_AGAIN = "make or download it again, and run `llava-weights verify --deep`"
APPLY = "`llava-weights apply-delta --base LLAMA --delta PATH -o OUT`"
APPLY_AGAIN = "apply the delta to the original LLaMA again; the round-trip test tells the base"
APPLIED = "see that the delta or the adapter was applied to every tensor, once"
UNUSUAL = 16  # the layers of a LLaMA differ by up to 5; a delta is 3 to 200 times smaller than its base
WIDE = 0.1  # standard deviation of matrices from 1,024 columns on: LLaMA's have 1e-2 to 3e-2
SAMPLED_ROWS, SAMPLED_TABLE_ROWS, LISTED_ROWS = 3, 64, 256


@dataclass(frozen=True)
class Sample:
    """What some rows of a tensor show: `constant` is the value that all have, if it is one; `digest` is of the values, `size` their root
    mean square, `nbytes` what was read."""

    finite: bool
    constant: float | None
    digest: bytes
    size: float
    nbytes: int


def health(checkpoint: Checkpoint, folder: Path | None) -> tuple[Finding, ...]:
    """Every finding, those on files (L0) before those on values (L1). `folder` is where the checkpoint lies, None for a lone file.

    Reads headers, small files and samples of the values, some MB. Raises nothing for what is damaged: that is a finding.
    """
    small_files, findings = read_small_files(checkpoint)
    findings += check(_rules(checkpoint), small_files)
    findings += _or_ok("L0", "weight files", "weight-files", _containers(checkpoint), _container_text(checkpoint))
    findings += _ruled("other-weights", _other_weights(checkpoint, folder))
    findings += _or_ok("L0", "code", "code", _code(checkpoint, small_files, folder), "no file that a program would execute")
    try:
        findings += _values(checkpoint, small_files)
    except InputError as error:
        findings.append(Finding("L1", "failed", checkpoint.origin.name, refused(error, "").text, MAKE_AGAIN))
    return tuple(findings)


def _rules(checkpoint: Checkpoint) -> Iterable[Rule]:
    """The rules that fit: of a quantised checkpoint those that compare no shape, of an unsupported family those on tokens alone."""
    rules, kind = RULES_OF_LAYOUT.get(checkpoint.layout, ()), kind_of(checkpoint)
    if kind is None:
        return rules
    return [rule for rule in rules if (rule.name not in SHAPES if kind.quantised else rule in rules_original.SHARED_RULES)]


def _ruled(rule: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """The findings of one rule, by the name that `--allow` takes."""
    return (replace(finding, rule=rule) for finding in findings)


def _or_ok(level: str, subject: str, rule: str, findings: Iterable[Finding], text: str) -> list[Finding]:
    return list(_ruled(rule, findings)) or [Finding(level, "ok", subject, text)]


def _warning(level: str, subject: str, text: str, remedy: str) -> Finding:
    return Finding(level, "warning", subject, text, remedy)


# --- L0: files ------------------------------------------------------------------------------------------------------


def _containers(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Pickles, the metadata that transformers needs, and the size in the index; of a checkpoint that was opened, not made."""
    origin, names = checkpoint.origin, [*checkpoint.origin.by_name]
    if checkpoint.history:
        return
    if origin.container == "gguf":
        return
    if origin.container != "safetensors":
        text = f"{listed(names)}: pickles, which other programs may execute; this tool does not, and found nothing but tensors in them"
        yield _warning("L0", names[0], text, SAFETENSORS)
    elif bare := [name for name in names if checkpoint.metadata.get(name, {}).get("format") != "pt"]:
        text = f"{listed(bare)}: the metadata `format: pt` is missing, without which transformers 4.37 and 4.45 stop"
        yield _warning(
            "L0", bare[0], text, "convert it, or write it again with `safetensors.torch.save_file(..., metadata={'format': 'pt'})`"
        )
    if origin.place.is_dir():
        yield from _index(checkpoint)


def _container_text(checkpoint: Checkpoint) -> str:
    return "GGUF" if checkpoint.origin.container == "gguf" else "one container of safetensors, whole by its index"


def _other_weights(checkpoint: Checkpoint, folder: Path | None) -> Iterator[Finding]:
    """Files that make transformers load other weights than those that are verified."""
    names: list[str] = []
    with suppress(OSError):
        names = os.listdir(folder) if folder and folder.is_dir() and checkpoint.layout in MODELS else []
    single = f"{STANDARD['safetensors'][0]}.safetensors"
    if single in names and single not in {file.name for file in checkpoint.origin.files}:
        text = f"transformers loads {single} in place of the files that the index lists, which are those that were verified"
        yield Finding("L0", "failed", single, text, "keep the one of the two that is meant")
    if "adapter_config.json" in names:
        text = "transformers takes the folder for an adapter, and loads the base that this file names in place of these weights"
        yield Finding("L0", "failed", "adapter_config.json", text, "move the adapter into a folder of its own")


def _index(checkpoint: Checkpoint) -> Iterator[Finding]:
    stem, suffix = STANDARD["safetensors" if checkpoint.origin.container == "safetensors" else "torch"]
    name, home = f"{stem}{suffix}.index.json", Path(checkpoint.origin.files[0].path).parent
    if not present(home / name):
        return
    try:
        metadata = load_object(member(home, name), limit=MAX_INDEX).get("metadata")
    except InputError as error:
        yield refused(error, name)
        return
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and total != checkpoint.nbytes:
        text = f"`total_size` is {as_json(total)}, but the tensors have {checkpoint.nbytes:,} bytes"
        yield _warning("L0", name, text, "index and shards may be of two downloads: compare with `llava-weights verify --against`")


def _code(checkpoint: Checkpoint, small_files: SmallFiles, folder: Path | None) -> Iterator[Finding]:
    """Files that would execute code in other programs."""
    objects, names = dict(small_files.objects), list[str]()
    with suppress(OSError):
        names = sorted(os.listdir(folder)) if folder and folder.is_dir() else []
    if folder and "adapter_config.json" in names:
        try:
            objects["adapter_config.json"] = load_object(member(folder, "adapter_config.json"))
        except InputError as error:
            yield refused(error, "adapter_config.json")
    for name, value in objects.items():
        for key in _keys(value):
            if key in CODE_KEYS:
                yield _warning(
                    "L0", name, f"`{key}` makes other programs run code; llava-weights never runs it", "remove the key; convert does so"
                )
    templates = [(name, template) for name, value in objects.items() for template in _texts(value.get("chat_template"))]
    for name, template in chain(templates, _jinja(checkpoint, folder)):
        if isinstance(template, InputError):
            if name != JINJA:  # whose rules say it
                yield refused(template, name)
        elif asked := asks_for(template):
            more = f" and {len(asked) - 5:,} more" if len(asked) > 5 else ""
            what = f"its chat template asks for {', '.join(asked[:5])}{more}, which no chat template needs"
            yield _warning("L0", name, f"{what}: it may be a way to run code; llava-weights never renders it", TEMPLATES_FROM)
    own = {file.name for file in checkpoint.origin.files}
    if programs := [name for name in names if name.endswith(PROGRAMS)]:
        yield _warning("L0", programs[0], f"{listed(programs)}: programs, which llava-weights never runs", "remove what you do not know")
    if others := [name for name in names if name.endswith(PICKLES) and name not in own]:
        text = f"{listed(others)}: pickles by their names, which other programs may execute; this tool does not read them here"
        yield _warning("L0", others[0], text, "remove what no program needs; never load it with `torch.load` from a stranger")


def _jinja(checkpoint: Checkpoint, folder: Path | None) -> Iterator[tuple[str, str | InputError]]:
    """The text of every template that is a file of its own, by its name; or why it can't be read."""
    files = {name: source for name, source in checkpoint.files.items() if name.endswith(".jinja")}
    names = list(files)
    for prefix in ("", f"{MORE_TEMPLATES}/"):
        with suppress(OSError):
            names += sorted(prefix + name for name in os.listdir(folder / prefix) if name.endswith(".jinja")) if folder else ()
    for name in dict.fromkeys(names):
        try:
            source = files[name] if name in files or folder is None else member((folder / name).parent, Path(name).name)
            yield name, small_text({name: source}, name) or ""
        except InputError as error:
            yield name, error


def _texts(value: Any) -> Iterator[str]:
    """The templates in a `chat_template`: one, a list of them, or a dict by name."""
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
        template = each.get("template") if isinstance(each, dict) else each
        if isinstance(template, str):
            yield template


def _keys(value: Any) -> Iterator[str]:
    """Every key in a JSON value, at any depth."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield from node
        waiting += chain(node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())


# --- L1: values -----------------------------------------------------------------------------------------------------


def _values(checkpoint: Checkpoint, small_files: SmallFiles) -> list[Finding]:
    kind_known = kind_of(checkpoint) is None
    samples = _samples({name: tensor for name, tensor in checkpoint.parameters().items() if not PACKED_NAME.fullmatch(name)})
    read = f"{len(samples):,} tensors, {size(sum(sample.nbytes for sample in samples.values()))} of them read"
    findings = [*_non_finite(samples), *_holes(checkpoint)]
    model = checkpoint.layout in MODELS and kind_known
    kind = list(_ruled("state", _state(checkpoint))) if model else []
    if any(finding.verdict == "failed" for finding in kind):  # in a delta zeros and equal rows are usual
        return findings + kind
    findings += chain(
        _ruled("constant", _constant(samples)), _ruled("equal-layers", _equal_layers(samples)), _ruled("layer-sizes", _layer_sizes(samples))
    )
    findings = findings or [Finding("L1", "ok", "values", f"{read}: finite, none constant, no two layers equal, no holes", part="samples")]
    if model:
        findings += kind
        findings += _or_ok(
            "L1", "precision", "bfloat16", _bfloat16(checkpoint), "no matrix of the text model went through bfloat16 into another dtype"
        )
        findings += _or_ok(
            "L1",
            "vocabulary",
            "vocabulary-rows",
            _vocabulary_rows(small_files),
            "sampled rows, and all of added tokens: none zero or equal",
        )
        findings += chain(_ruled("tied-head", _tied_head(small_files)), _ruled("projector-activation", _projector_activation(small_files)))
    return findings


@np.errstate(all="ignore")
def _samples(tensors: Mapping[str, LazyTensor]) -> dict[str, Sample]:
    """The first, middle and last row of each matrix of floats, vectors whole."""
    samples = {}
    with closing(Workspace(drop_cache=False)) as work:
        for name, tensor in tensors.items():
            if tensor.dtype not in FLOATS or tensor.numel < 2 or tensor.row_nbytes > LARGEST_ROW:
                continue
            vector = len(tensor.shape) == 1
            values = read_some(tensor, range(min(tensor.rows, LONGEST_NORM)) if vector else even(tensor.rows, SAMPLED_ROWS), work)
            first = float(values.flat[0])
            constant = first if bool(np.all(values == values.flat[0])) else None
            digest = hashlib.sha256(values.tobytes()).digest()
            rms = float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
            samples[name] = Sample(bool(np.isfinite(values).all()), constant, digest, rms, values.size * tensor.nbytes // tensor.numel)
    return samples


def _non_finite(samples: Mapping[str, Sample]) -> Iterator[Finding]:
    if bad := [name for name, sample in samples.items() if not sample.finite]:
        yield Finding("L1", "failed", bad[0], f"inf or NaN in {few(bad)}", MAKE_AGAIN)


def _holes(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Ranges of zeros, as far as samples show them, and damaged zip records of small files."""
    watch = watch_over(checkpoint)
    try:
        watch.survey()
    except InputError as error:
        yield Finding("L1", "failed", checkpoint.origin.name, refused(error, "").text, MAKE_AGAIN)
    for text in hole_sentences(hole.text for hole in sorted(watch.found)):
        yield Finding("L1", "failed", checkpoint.origin.name, text, MAKE_AGAIN)


def watch_over(checkpoint: Checkpoint) -> Watch:
    """The collector of holes for a checkpoint that is only read, in the role that its names and values tell."""
    leaves = ((name, leaf) for name, tensor in checkpoint.parameters().items() for leaf in tensor.leaves())
    return Watch(leaves, dict.fromkeys((file.path for file in checkpoint.origin.files), role_of(checkpoint)), accept=True)


def _constant(samples: Mapping[str, Sample]) -> Iterator[Finding]:
    """Zeros and constants, but in biases, where they are usual: LayerNorm's of an untrained tower, those of an identity projector."""
    constant = {name: x.constant for name, x in samples.items() if x.constant is not None and not name.endswith("bias")}
    if second := [name for name, value in constant.items() if value == 0 and re.fullmatch(r".*\.lora_(embedding_)?B\b.*", name)]:
        yield _warning(
            "L1", second[0], f"every sampled value is 0 in {few(second)}: this adapter changes nothing there", "train it further"
        )
    if zero := [name for name, value in constant.items() if value == 0 and name not in second]:
        yield Finding("L1", "failed", zero[0], f"every sampled value is 0 in {few(zero)}", MAKE_AGAIN)
    if same := [name for name, value in constant.items() if value != 0]:
        text = (
            f"every sampled value is {constant[same[0]]:.4g} in {few(same[:1])}, and one value only in {len(same):,} tensors: {few(same)}"
        )
        yield _warning("L1", same[0], text, "such tensors were never trained: see that the right files were merged")


def _equal_layers(samples: Mapping[str, Sample]) -> Iterator[Finding]:
    """The same values under one name in several layers."""
    groups = defaultdict(list)
    for name, sample in samples.items():
        if sample.constant is None:
            groups[re.sub(r"\.\d+(?=\.)", ".#", name), sample.digest].append(name)
    for names in groups.values():
        if len(names) > 1:
            yield _warning("L1", names[0], f"the same values stand in {fold_names(names)[0]}", "see that no layer was copied over another")


def _layer_sizes(samples: Mapping[str, Sample]) -> Iterator[Finding]:
    """A matrix of the text model whose values are of another order than those of the same name in the other layers."""
    groups = defaultdict(list)
    for name, sample in samples.items():
        if re.fullmatch(r"text\.layers\.\d+\..*_proj\.weight", canonical(name)) and np.isfinite(sample.size) and sample.size:
            groups[re.sub(r"\.\d+(?=\.)", ".#", name, count=1)].append(name)
    for names in groups.values():
        usual = median(samples[name].size for name in names)
        for name in names:
            times = samples[name].size / usual
            if len(names) > 2 and not 1 / UNUSUAL < times < UNUSUAL:
                how = f"{times:.0f} times as large as" if times > 1 else f"{1 / times:.0f} times smaller than"
                yield _warning("L1", name, f"its sampled values are {how} in the other layers, as those of a delta are", APPLIED)


def _tied_head(s: SmallFiles) -> Iterator[Finding]:
    """A stored `lm_head` that readers replace by the embedding, because a flag says that the two are tied."""
    config, tables = s.of(CONFIG), [s.tensors.get(part) for part in VOCABULARY_TABLES]
    embed, head = tables
    if embed is None or head is None or embed.shape != head.shape:
        return
    tied = True in (config.get("tie_word_embeddings"), s.text.get("tie_word_embeddings") if s.checkpoint.layout == "llava-hf" else None)
    with closing(Workspace(drop_cache=False)) as work:
        one, other = (read_some(table, even(table.rows, SAMPLED_TABLE_ROWS), work) for table in (embed, head))
    same = np.array_equal(one, other, equal_nan=True)
    if tied and not same:
        text = "`tie_word_embeddings` is true, but the head has values of its own: transformers takes the embedding in its place"
        yield Finding("L1", "failed", CONFIG, text, "set it to false")
    elif same and not tied:
        text = "the head holds the values of the embedding, though `tie_word_embeddings` is not true"
        yield _warning("L1", spelled(VOCABULARY_TABLES[1], _layout(s)), text, "see that the head is the one that was trained")


def _projector_activation(s: SmallFiles) -> Iterator[Finding]:
    """The activation between the projector's two layers. Every LLaVA has gelu, but where one Linear is written as two
    (transforms/projector.py)."""
    first, second = s.tensors.get("projector.0.weight"), s.tensors.get("projector.2.weight")
    if s.checkpoint.layout != "llava-hf" or first is None or second is None or len(first.shape) != 2 or len(second.shape) != 2:
        return
    act = s.of(CONFIG).get("projector_hidden_act", "gelu")
    with closing(Workspace(drop_cache=False)) as work:
        pairs, identity = (_is_signs(read_some(each, even(each.rows, LISTED_ROWS), work)) for each in (first, second))
    if identity and act != "linear":
        text = f"`projector_hidden_act` is {as_json(act)}, but the second layer is the identity, which belongs to `linear`"
        yield Finding("L1", "failed", CONFIG, text, rules_original.REPAIR)
    elif act != "gelu" and act in ACTIVATIONS and not identity and not pairs:
        text = f"`projector_hidden_act` is {as_json(act)}, every published LLaVA with a projector of two layers has gelu"
        yield _warning("L1", CONFIG, text, "see that the file is the one that these weights were made with")


def _is_signs(rows: np.ndarray) -> bool:
    """Whether each row holds at most one value, 1 or -1, and zeros; not all of them zeros."""
    return bool(rows.any()) and bool(np.all(np.count_nonzero(rows, axis=1) <= 1)) and set(np.unique(rows).tolist()) <= {-1.0, 0.0, 1.0}


def _layout(s: SmallFiles) -> str:
    return "llava-hf" if s.checkpoint.layout == "llava-hf" else "llava"


def _state(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Weights, a delta, or something between them."""
    found = state(checkpoint.parameters())
    evidence = "; ".join(found.evidence)
    if found.verdict == "delta":
        yield Finding("L1", "failed", checkpoint.origin.name, f"this is a delta that was never applied: {evidence}", APPLY)
    elif found.verdict == "unknown":
        text = f"neither a model nor a delta by its values, as a sum with a wrong base may look: {evidence}"
        yield _warning("L1", checkpoint.origin.name, text, APPLY_AGAIN)
    elif found.matrix_std > WIDE and _width(checkpoint) >= 1024:
        text = f"matrices are {found.matrix_std / 0.02:.0f} times as wide as a LLaMA's, as a sum with a wrong base may be: {evidence}"
        yield _warning("L1", checkpoint.origin.name, text, APPLY_AGAIN)
    else:
        yield Finding("L1", "ok", "state", f"whole weights, no delta: {evidence}")


def _width(checkpoint: Checkpoint) -> int:
    return max(
        (tensor.shape[-1] for name, tensor in checkpoint.tensors.items() if canonical(name) == VOCABULARY_TABLES[0] and tensor.shape),
        default=0,
    )


def _bfloat16(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Values that went through bfloat16. Stored as such they are no fault, unless in a base: the published deltas need fp16."""
    text = {name: x for name, x in checkpoint.parameters().items() if canonical(name).startswith(("text.", "head."))}
    found = bf16_damaged(text)
    if not found.damaged or (found.dtype == "BF16" and checkpoint.layout != "llama"):
        return
    how = "are stored as" if found.dtype == "BF16" else f"are {found.dtype}, but hold no more than"
    what = f"{len(found.names)} sampled matrices {how} bfloat16 ({found.share:.1%} of all sampled values fit): {few(found.names)}"
    remedy = "normal for a model trained in bfloat16. As the base of a delta use Meta's files or a conversion by transformers before 4.33"
    damaged = checkpoint.layout == "llama" and is_llama1(checkpoint.config)  # which Meta published in fp16
    what += ": a LLaMA 1 that a converter damaged" if damaged else ""
    yield Finding("L1", "failed" if damaged else "warning", found.names[0], what, remedy)


def _vocabulary_rows(small_files: SmallFiles) -> Iterator[Finding]:
    """Rows of the vocabulary tables that no training has touched.

    The rows behind the tokenizer's last id are padding, and those of image, video and pad token are never read as text: after a conversion
    they hold the mean of the table, all the same one. transformers 4.36 to 4.40 takes an all-zero row for an image's place.
    """
    added = added_ids(small_files.objects)
    last = max([*small_files.tokens.values(), small_files.base_vocabulary - 1, -1])
    if last < 0:
        yield Finding("L1", "unchecked", "vocabulary", "there is no tokenizer that tells which rows are of tokens")
        return
    others = small_files.target.tokens.values() if small_files.target else ()
    unread = {small_files.ids.get(role) for role in ("pad", "unk")}
    unread |= {added.get(token) for token in (small_files.image_token, *others, "<im_patch>", "<pad>", "[PAD]")}
    unwritten = {
        VOCABULARY_TABLES[0]: unread,
        VOCABULARY_TABLES[1]: unread | {added.get("<im_start>"), added.get("<im_end>")},
    }  # no answer holds these
    texts = {i: name for name, i in added.items()}
    with closing(Workspace(drop_cache=False)) as work:
        for part in VOCABULARY_TABLES:
            if part in small_files.tensors:
                table = small_files.tensors[part]
                name = spelled(part, _layout(small_files))
                yield from _untrained(
                    name, *_table_rows(table, last, {*added.values(), *small_files.ids.values()}, work), last, unwritten[part], texts
                )


def _table_rows(table: LazyTensor, last: int, added: Iterable[int], work: Workspace) -> tuple[list[int], list[bytes]]:
    """Rows to look at, evenly spread, those of added tokens and of the padding; and a digest of each, b"" where it is zero."""
    behind = range(min(last + 1, table.rows), table.rows)
    chosen = {
        *even(table.rows, SAMPLED_TABLE_ROWS),
        *sorted(added)[:LISTED_ROWS],
        *(behind[i] for i in even(len(behind), LISTED_ROWS) if behind),
    }
    rows = sorted(row for row in chosen if 0 <= row < table.rows)
    return rows, [_digest(read_some(table, [row], work)) for row in rows]


def _digest(values: np.ndarray) -> bytes:
    return hashlib.sha256(values.tobytes()).digest() if values.any() else b""


def _untrained(
    name: str, rows: list[int], digests: list[bytes], last: int, unread: set[int | None], texts: Mapping[int, str]
) -> Iterator[Finding]:
    def named(ids: Iterable[int]) -> str:
        return listed(f"{i} {texts[i]}" if i in texts else str(i) for i in ids)

    zero = [row for row, digest in zip(rows, digests, strict=True) if not digest and row not in unread]
    if trained := [row for row in zero if row <= last]:
        yield _warning("L1", name, f"the rows of tokens {named(trained)} are zero: never trained", MAKE_AGAIN)
    if "embed" in name and (padding := [row for row in zero if row > last]):
        yield _warning(
            "L1",
            name,
            f"the padding rows {named(padding)} are zero: transformers 4.36 to 4.40 takes them for an image",
            rules_original.REPAIR,
        )
    equal = defaultdict(list)
    for row, digest in zip(rows, digests, strict=True):
        if digest:
            equal[digest].append(row)
    for same in equal.values():
        if len(same) > 1 and (known := [row for row in same if row <= last and row not in unread]):
            others = [row for row in same if row not in known]
            text = f"the rows of tokens {named(known)} are equal" + (f", and equal to {named(others)}" if others else "")
            remedy = "see that the trained rows were merged, as from `non_lora_trainables.bin`"
            yield _warning("L1", name, f"{text}: the initial mean, never trained", remedy)
