"""Laws that hold for every input: shards are the Hub's, resharding keeps every byte, names have one inverse, and so on."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
import torch
from blake3 import blake3
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.checkpoint.config import expected_shapes
from llava_weights.checkpoint.manifest import MANIFEST
from llava_weights.checkpoint.tower import tower_shapes
from llava_weights.families.layouts import SPELLINGS, canonical, meta_names, spelled
from llava_weights.storage import reading
from llava_weights.storage.reading import DropBehind, Record, SourceFile, Workspace, crc_errors
from llava_weights.write.execute import execute
from llava_weights.write.plan import make_plan
from llava_weights.write.work_folder import Job

LAWS = settings(max_examples=50, derandomize=True)
FEW = settings(LAWS, max_examples=15)  # where each one writes files, or goes through hundreds of names

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8])
NAMES = st.from_regex(r"[a-z]{1,3}(\.[0-9]{1,2})?(\.weight)?", fullmatch=True)


@st.composite
def models(draw: st.DrawFn, least: int = 0) -> dict[str, torch.Tensor]:
    """Random bits, NaNs among them, under a few names: matrices, vectors, scalars, and tensors without values where `least` is 0."""
    tensors = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=6, unique=True)):
        shape, dtype = draw(st.lists(st.integers(least, 9), max_size=3)), draw(DTYPES)
        raw = draw(st.randoms(use_true_random=False)).randbytes(torch.Size(shape).numel() * dtype.itemsize)
        tensors[name] = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)
    return tensors


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def saved(tensors: Mapping[str, torch.Tensor], folder: Path, container: str) -> Path:
    folder.mkdir()
    if container == "torch":
        torch.save(dict(tensors), folder / "pytorch_model.bin")
    else:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@FEW
@given(models(1), st.integers(1, 300))  # of several empty tensors their library makes one, since they share the address 0
def test_shards_are_those_of_huggingface_hub(tensors: dict[str, torch.Tensor], size: int) -> None:
    with TemporaryDirectory() as scratch:
        checkpoint = open_checkpoint(saved(tensors, Path(scratch) / "model", "safetensors"))
        plan = make_plan(checkpoint, max_shard_size=size, accept_values=True)
    ours = {name: tensors[name] for name in checkpoint.tensors}  # the order is that of the file
    theirs = split_torch_state_dict_into_shards(ours, max_shard_size=size, filename_pattern="model{suffix}.safetensors")
    assert {shard.name: [name for name, _ in shard.tensors] for shard in plan.shards} == theirs.filename_to_tensors


@FEW
@given(models(), st.sampled_from(["safetensors", "torch"]), st.integers(1, 300), st.integers(1, 3), st.integers(1, 500))
def test_resharding_keeps_every_byte(tensors: dict[str, torch.Tensor], container: str, size: int, jobs: int, window: int) -> None:
    with TemporaryDirectory() as scratch:
        source, out = saved(tensors, Path(scratch) / "model", container), Path(scratch) / "out"
        plan = make_plan(open_checkpoint(source), max_shard_size=size)
        execute(replace(plan, settings=replace(plan.settings, jobs=jobs, window=window)), out)
        written = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
        root = json.loads((out / MANIFEST).read_bytes())["root"]["tensors"]
    assert {name: bits(tensor) for name, tensor in written.items()} == {name: bits(tensor) for name, tensor in tensors.items()}
    assert root == root_by_hand(tensors)


def root_by_hand(tensors: Mapping[str, torch.Tensor]) -> str:
    """`root.tensors` from docs/, by torch and blake3 alone."""
    codes = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}
    lines = (
        f"{name}\t{codes[tensor.dtype]}\t{','.join(map(str, tensor.shape))}\t{blake3(bits(tensor)[2]).hexdigest()}\n"
        for name, tensor in sorted(tensors.items(), key=lambda item: item[0].encode())
    )
    return f"blake3:{blake3(''.join(lines).encode()).hexdigest()}"


# Every prefix under which a checkpoint of llava-hf style may keep its parts, by version of transformers (PR #44431, #45357).
PREFIXES = {
    "language_model.model.": ("language_model.model.", "model.language_model.model.", "model.language_model."),
    "language_model.lm_head.": ("language_model.lm_head.", "model.language_model.lm_head.", "lm_head."),
    "vision_tower.vision_model.": ("vision_tower.vision_model.", "model.vision_tower.vision_model.", "model.vision_tower."),
    "multi_modal_projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
    "image_newline": ("image_newline", "model.image_newline"),
}


@FEW
@given(st.integers(1, 12), st.booleans())
def test_renaming_has_one_inverse(layers: int, biased: bool) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8, "attention_bias": biased}
    text = [canonical(name) for name in expected_shapes({**sizes, "model_type": "llama", "num_hidden_layers": layers})]
    tower = [f"tower.{name}" for name in tower_shapes({**sizes, "num_hidden_layers": layers})]
    projector = [f"projector.{place}.{part}" for place in (0, 2) for part in ("weight", "bias")]
    names = [*text, *tower, *projector, "newline"]
    for layout in SPELLINGS:
        there = [spelled(name, layout) for name in names]
        assert len(set(there)) == len(names)
        assert [canonical(name) for name in there] == names
    for name in names:
        ours = spelled(name, "llava-hf")
        (prefix,) = (prefix for prefix in PREFIXES if ours.startswith(prefix))
        assert {canonical(other + ours.removeprefix(prefix)) for other in PREFIXES[prefix]} == {name}


def test_meta_names_have_one_inverse() -> None:
    rows = meta_names(1)
    assert len({row.meta for row in rows}) == len({row.name for row in rows}) == len(rows)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "vocab_size": 8,
        "num_hidden_layers": 1,
        "model_type": "llama",
    }
    assert {row.name for row in rows} == expected_shapes(sizes).keys()


FILE = SourceFile("weights", 1000, 0, 0)


@LAWS
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=30), st.integers(1, 40))
def test_the_cache_is_dropped_behind_what_was_read_and_nowhere_else(reads: list[tuple[int, int]], stretch: int) -> None:
    dropped: Counter[int] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "drop_cache", lambda fd, start, size: dropped.update(range(start, start + size)))
        behind = DropBehind()
        for start, size in reads:
            before = dropped.copy()
            behind.passed(FILE, 0, start, start + size, stretch)
            assert max((dropped - before).values(), default=1) == 1
            assert all(last - first < stretch for first, last in behind.behind[FILE])
        behind.passed(FILE, 0, 0, 0, 1)
    assert set(dropped) == {place for start, size in reads for place in range(start, start + size)}


@LAWS
@given(st.binary(min_size=1, max_size=80), st.sets(st.integers(1, 79)), st.randoms(use_true_random=False), st.integers(1, 3), st.data())
def test_a_crc_in_pieces_sees_every_flipped_bit(data: bytes, cuts: set[int], order: Random, workers: int, draw: st.DataObject) -> None:
    flipped = bytearray(data)
    flipped[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    for content, sound in ((data, True), (bytes(flipped), False)):
        record = Record(7, len(data), zlib.crc32(data))
        edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
        pieces = list(pairwise(edges))
        order.shuffle(pieces)
        works = [Workspace() for _ in range(workers)]
        for start, stop in [*pieces, pieces[0]]:  # one is read twice
            order.choice(works).take_crc(FILE, record, record.offset + start, memoryview(content[start:stop]))
        assert list(crc_errors(works)) == ([] if sound else [(FILE, record)])


ENTRIES = st.dictionaries(
    st.text(min_size=1, max_size=8), st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=5)), max_size=4
)


@FEW
@given(ENTRIES, st.binary(max_size=40), st.data())
def test_a_journal_loses_only_its_torn_end(shards: dict[str, dict[str, object]], garbage: bytes, draw: st.DataObject) -> None:
    entries = {name: {**fields, "name": name} for name, fields in shards.items()}
    with TemporaryDirectory() as scratch:
        job = Job(Path(scratch) / "out")
        job.partial.mkdir()
        job.record(entries)
        whole = job.journal.read_bytes()
        assert job.finished() == entries
        kept = draw.draw(st.integers(0, len(whole)))
        job.journal.write_bytes(whole[:kept])
        ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
        survivors = dict(list(entries.items())[: sum(end <= kept for end in ends)])
        assert job.finished() == survivors
        job.journal.write_bytes(whole[:kept] + b"\n" + garbage)
        assert job.finished() == survivors
