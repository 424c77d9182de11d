"""One function a reader of files from strangers: any bytes and a scratch folder in; a return or an error of ours out.

What else may come out is a finding: another exception, a text that is not safe to print, or a wrong statement about what was read.
Readers behind a checksum or a length get their bytes wrapped, so that a mutation is not stopped before it is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import numpy as np

from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.checkpoint.config import check_structure, expected_shapes, repair_config, repair_generation_config
from llava_weights.checkpoint.fingerprint import read_fingerprint
from llava_weights.checkpoint.hf_tokenizer import hf_tokenizer, original_tokenizer
from llava_weights.checkpoint.manifest import is_inside, read_manifest, read_sums
from llava_weights.checkpoint.sentencepiece import read_sentencepiece
from llava_weights.checkpoint.tokenizer import SpecialIds, repair_tokenizer
from llava_weights.checkpoint.tokenizer_json import bpe_merges
from llava_weights.checks.rules_gguf import check_gguf
from llava_weights.cli.toy import write_torch_zip
from llava_weights.errors import LlavaWeightsError
from llava_weights.families.decoders import DECODER_BY_TYPE
from llava_weights.families.layouts import meta_names
from llava_weights.formats.folder import index_folder
from llava_weights.formats.gguf import index_gguf, make_gguf_header
from llava_weights.formats.integer_delta import index_integer_delta
from llava_weights.formats.meta import index_meta
from llava_weights.formats.safetensors import index_safetensors, make_header
from llava_weights.formats.torch_zip import index_torch_zip
from llava_weights.smoke.recording import read_recording, write_recording
from llava_weights.storage.reading import SourceFile, Workspace
from llava_weights.storage.strict_json import json_bytes, parse_json
from llava_weights.tensors.lazy import LazyTensor, Stored
from llava_weights.transforms.adapter_config import quantised_base, read_rules
from llava_weights.transforms.gguf import as_llava_hf
from llava_weights.write.work_folder import Job

Target = Callable[[bytes, Path], None]

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
SEEDS = FIXTURES / "fuzz"
IDS = SpecialIds(bos=1, eos=2, pad=0, unk=0, added={"<im_patch>": 304}, base_vocabulary=304)
SIZES = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 307}
MODULES = ("model.layers.1.mlp.down_proj", "model.layers.10.self_attn.q_proj", "lm_head")
SMALL = 1 << 16  # bytes of a tensor whose rows a target makes
LONGEST_TEXT = 6000  # characters of an error's sentence or fact; five names of 300 are usual


def attempt(target: Target, data: bytes, folder: Path) -> bool:
    """Whether `target` accepts `data`; False for a refusal that is safe to print. Raises whatever else comes out of it."""
    try:
        target(data, folder)
    except LlavaWeightsError as error:
        refusal = error
    else:
        return True
    assert (refusal.what + (refusal.hint or "")).isprintable(), f"not safe to print: {refusal.what!r} {refusal.hint!r}"
    assert all(len(text) < LONGEST_TEXT for text in (refusal.what, *refusal.facts.values())), "a text without end"
    return False


def torch_zip(data: bytes, folder: Path) -> None:
    path = written(folder / "model.bin", data)
    check_places(index_torch_zip(path).values(), len(data))


def pickle(data: bytes, folder: Path) -> None:
    """The bytes are `data.pkl` of a sound zip with 16 bytes of values."""
    whole = BytesIO()
    with ZipFile(whole, "w") as file:
        for name, content in (("data.pkl", data), ("data/0", bytes(16))):
            file.writestr(ZipInfo(f"model/{name}"), content)
    torch_zip(whole.getvalue(), folder)


def safetensors(data: bytes, folder: Path) -> None:
    path = written(folder / "model.safetensors", data)
    tensors, metadata = index_safetensors(path)
    check_places(tensors.values(), len(data))
    make_header(list(tensors.items()), metadata)


def safetensors_header(data: bytes, folder: Path) -> None:
    safetensors(with_length(data), folder)


def gguf(data: bytes, folder: Path) -> None:
    """The bytes are a file of llama.cpp: its header, what `verify` says of it, and its tensors under the names of llava-hf."""
    path = written(folder / "model.gguf", data)
    tensors, keys = index_gguf(path)
    check_places(tensors.values(), len(data))
    make_gguf_header(list(keys.values()), list(tensors.items()))
    checkpoint = open_checkpoint(path)
    for finding in check_gguf(checkpoint):
        assert finding.text.isprintable(), f"not safe to print: {finding.text!r}"
        assert len(finding.text) < LONGEST_TEXT, "a text without end"
    for tensor in as_llava_hf(checkpoint).tensors.values():
        if tensor.nbytes <= SMALL and tensor.rows:
            with closing(Workspace(drop_cache=False)) as work:
                tensor.rows_into(memoryview(bytearray(tensor.nbytes)), 0, tensor.rows, work)


def index_json(data: bytes, folder: Path) -> None:
    """The bytes are the index of two sound shards."""
    for name in ("a", "b"):
        head, _ = make_header([(name, LazyTensor(dtype="F16", shape=(2,)))], {})
        written(folder / f"model-{name}.safetensors", head + bytes(4))
    written(folder / "model.safetensors.index.json", data)
    assert index_folder(folder).tensors.keys() == json.loads(data)["weight_map"].keys()


def meta_params(data: bytes, folder: Path) -> None:
    """The bytes are `params.json` beside a LLaMA of one layer."""
    if not (piece := folder / "consolidated.00.pth").exists():
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 1}
        shapes = DECODER_BY_TYPE["llama"].shapes({"vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, **heads})
        write_torch_zip(piece, {row.meta: np.zeros(shapes[row.name], np.float16) for row in meta_names(1)})
    written(folder / "params.json", data)
    tensors, config = index_meta(folder)
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected_shapes(config)


def strict_json(data: bytes, folder: Path) -> None:
    value = parse_json(data, name="any.json")
    assert value == json.loads(data)
    assert parse_json(json_bytes(value), name="again.json") == value


def tokenizer_model(data: bytes, folder: Path) -> None:
    vocabulary = read_sentencepiece(data)
    assert sorted(vocabulary.ids.values()) == list(range(len(vocabulary.ids)))
    bpe_merges(vocabulary)
    hf_tokenizer({"tokenizer.model": data}, rows=len(vocabulary.ids) + 2, processor_class="LlavaProcessor")


def tokenizer_json(data: bytes, folder: Path) -> None:
    check_tokenizer({"tokenizer.json": data})


def tokenizer_files(data: bytes, folder: Path) -> None:
    """The bytes are a JSON object of the files beside a `tokenizer.model`, or of Qwen's `vocab.json` and what belongs to it, by name."""
    named = parse_json(data, name="files")
    if isinstance(named, dict):
        files = {name: content.encode() if isinstance(content, str) else json_bytes(content) for name, content in named.items()}
        if "vocab.json" not in files:
            files["tokenizer.model"] = (FIXTURES / "common/tokenizer/tokenizer.model").read_bytes()
        repaired, ids, _ = repair_tokenizer(files, rows=307)
        assert repair_tokenizer(repaired, rows=307)[1] == ids
        check_tokenizer(files)


def adapter_config(data: bytes, folder: Path) -> None:
    rules = read_rules(written(folder / "adapter_config.json", data))
    rules.check_effort(MODULES)
    for module in MODULES:
        assert rules.rank_of(module) >= 1
        rules.scale_of(module)
        rules.indices_of(module)
    quantised_base(str(rules.facts.get("base_model_name_or_path", "")), {})


def manifest(data: bytes, folder: Path) -> None:
    found = read_manifest(written(folder / "llava-weights.manifest.json", data))
    assert all(map(is_inside, found.files))


def fingerprint(data: bytes, folder: Path) -> None:
    """Where it is one, it comes out again as it was."""
    found = read_fingerprint(written(folder / "base.json", data))
    again = read_fingerprint(written(folder / "again.json", found.document()))
    assert (again.samples, again.checkpoint.tensors) == (found.samples, found.checkpoint.tensors)
    tensors = {name: LazyTensor(dtype="F16", shape=tensor.shape) for name, tensor in found.checkpoint.tensors.items()}
    assert all(tensors[name].numel for name in found.samples)


def sums(data: bytes, folder: Path) -> None:
    for entry in read_sums(written(folder / "SHA256SUMS", data)):
        assert is_inside(entry.path)
        bytes.fromhex(entry.digest)


def reference(data: bytes, folder: Path) -> None:
    recording = read_recording(written(folder / "reference.safetensors", with_length(data)))
    write_recording(recording, folder / "again.safetensors", force=True)
    again = read_recording(folder / "again.safetensors")
    assert [one.probe.name for one in again.probes] == [one.probe.name for one in recording.probes]


def integer_delta(data: bytes, folder: Path) -> None:
    path = written(folder / "delta.safetensors", with_length(data))
    base = written(folder / "base.raw", bytes(SMALL))
    tensors, metadata = index_safetensors(path)
    for name, difference in index_integer_delta(tensors, {path.name: metadata}).items():
        shape = (difference.base_rows, *difference.shape[1:]) if difference.shape else ()
        tensor = difference.onto(Stored(dtype=difference.dtype, shape=shape, file=SourceFile.at(base), offset=0))
        if tensor.nbytes <= SMALL:
            with closing(Workspace()) as work:
                tensor.rows_into(memoryview(bytearray(tensor.nbytes)), 0, tensor.rows, work)
            assert name == difference.name


def journal(data: bytes, folder: Path) -> None:
    job = Job(folder / "out")
    job.partial.mkdir(exist_ok=True)
    written(job.journal, data)
    finished = job.finished()
    job.record(finished)
    assert repr(job.finished()) == repr(finished)


def job_plan(data: bytes, folder: Path) -> None:
    """The bytes are `plan.json` of earlier work in the same place."""
    job = Job(folder / "out")
    job.partial.mkdir(exist_ok=True)
    job.folder.mkdir(exist_ok=True)
    written(job.partial / "plan.json", data)
    job.begin({"version": "1", "command": "copy"}, restart=False)


def config_json(data: bytes, folder: Path) -> None:
    config = parse_json(data, name="config.json")
    if not isinstance(config, dict):
        return
    repair_generation_config(config, IDS)
    shapes = expected_shapes({**SIZES, "model_type": "llama"}) | {"model.mm_projector.weight": (48, 24), "model.mm_projector.bias": (48,)}
    with suppress(LlavaWeightsError):
        check_structure(config, shapes)
    repaired, _ = repair_config(config, shapes=shapes, special_ids=IDS, dtype="F16")
    assert repair_config(repaired, shapes=shapes, special_ids=IDS, dtype="F16")[0] == repaired


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        torch_zip, pickle, safetensors, safetensors_header, gguf, index_json, meta_params, strict_json, tokenizer_model, tokenizer_json,
        tokenizer_files, adapter_config, manifest, fingerprint, sums, reference, integer_delta, journal, job_plan, config_json,
    )
}  # fmt: skip


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def with_length(data: bytes) -> bytes:
    """`header, newline, values` as a safetensors file: the writers' headers are one line."""
    header, _, values = data.partition(b"\n")
    return len(header).to_bytes(8, "little") + header + values


def check_places(tensors: Iterable[Stored], size: int) -> None:
    assert all(0 <= tensor.offset <= tensor.offset + tensor.nbytes <= size for tensor in tensors)


def check_tokenizer(files: dict[str, bytes]) -> None:
    """Into the llava-hf layout and back."""
    made = hf_tokenizer(files, rows=400, processor_class="LlavaProcessor")
    assert 0 <= made.image_id < made.used
    original_tokenizer(made.files, rows=max(400, made.used), image_id=made.image_id)
