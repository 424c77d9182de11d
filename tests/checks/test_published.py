"""Predicted digests against files that torch really wrote: torch 2.0.1's in the fixtures, the installed torch's, other zip writers'."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_weights.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llava_weights.checks import published as checks_published
from llava_weights.checks.published import POSTED, InverseFrequencies, Prediction, check_published
from llava_weights.errors import InputError, MismatchError
from llava_weights.events import Event, Progress
from llava_weights.families import deltas, published
from llava_weights.families.deltas import KNOWN_DELTAS, KnownDelta
from llava_weights.families.published import PUBLISHED, Published
from llava_weights.findings import exit_code
from llava_weights.storage.reading import Workspace
from llava_weights.transforms.delta import apply_delta
from llava_weights.write.execute import execute
from llava_weights.write.plan import make_plan

SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
State = dict[str, torch.Tensor]
Writer = Callable[[State, Path], object]


@pytest.fixture
def reference(fixtures: Path) -> Path:
    return fixtures / "A-delta-v0"


@pytest.fixture
def base(reference: Path) -> Checkpoint:
    return open_checkpoint(reference / "base-hf-bin")


@pytest.fixture
def delta(reference: Path) -> Checkpoint:
    return open_checkpoint(reference / "torch-2.0-containers" / "delta-308")


@pytest.fixture
def md5sums(reference: Path) -> dict[str, str]:
    """The md5 of the merged shards as torch 2.0.1 saved them."""
    lines = [line.split() for line in (reference / "torch-2.0-containers" / "MD5SUMS").read_text().splitlines()]
    return {Path(name).name: md5 for md5, name in lines if name.startswith("merged-308/")}


def md5_of(predictions: Iterable[Prediction]) -> dict[str, str]:
    return {prediction.shard: prediction.md5 for prediction in predictions}


def digests(path: Path) -> tuple[str, str, int]:
    data = path.read_bytes()
    return hashlib.md5(data).hexdigest(), hashlib.sha256(data).hexdigest(), len(data)


def predicted(delta: Path, merged: Path) -> tuple[str, str, int]:
    (found,) = checks_published.predict(open_checkpoint(delta), open_checkpoint(merged).tensors)
    return found.md5, found.sha256, found.size


def test_base_and_delta_give_the_bytes_that_torch_2_0_wrote(
    reference: Path, base: Checkpoint, delta: Checkpoint, md5sums: dict[str, str]
) -> None:
    found = list(checks_published.predict(delta, apply_delta(base, delta).tensors, base))
    assert md5_of(found) == md5sums
    for prediction in found:
        written = reference / "torch-2.0-containers" / "merged-308" / prediction.shard
        assert (prediction.md5, prediction.sha256, prediction.size) == digests(written)
        assert (prediction.published, prediction.verdict) == ("", "no published checksum")


def test_the_folder_that_apply_delta_wrote_gives_the_same(
    base: Checkpoint, delta: Checkpoint, md5sums: dict[str, str], tmp_path: Path
) -> None:
    execute(make_plan(apply_delta(base, delta), max_shard_size="60kB"), tmp_path / "out")
    merged = open_checkpoint(tmp_path / "out")
    assert merged.origin.container == "safetensors"
    assert not any("inv_freq" in name for name in merged.tensors)
    assert md5_of(checks_published.predict(delta, merged.tensors)) == md5sums


def test_rotary_buffers_of_any_base_are_rounded_to_half(
    reference: Path, base: Checkpoint, delta: Checkpoint, md5sums: dict[str, str], tmp_path: Path
) -> None:
    """The original loads the base as fp16: float32 ones, or none that fit, give the same file; other values do not."""
    state = load_state(reference / "base-hf-bin")
    rotary = {name: tensor for name, tensor in state.items() if "inv_freq" in name}
    assert {tensor.dtype for tensor in rotary.values()} == {torch.float16}
    full = {name: 1.0 / (10000 ** (torch.arange(0, 12, 2).float() / 12)) for name in rotary}
    assert any(not torch.equal(full[name], tensor.float()) for name, tensor in rotary.items())
    doubled, short, whole = (
        {name: change(tensor) for name, tensor in full.items()} for change in (lambda x: x * 2, lambda x: x[:3], lambda x: x.long())
    )
    for changes, same in ((full, True), (doubled, False), (short, True), (whole, True)):
        save_file({**state, **changes}, tmp_path / "model.safetensors")
        other = open_checkpoint(tmp_path / "model.safetensors")
        found = md5_of(checks_published.predict(delta, apply_delta(base, delta).tensors, other))
        assert (found == md5sums) is same
    without = replace(base, tensors=base.parameters())
    assert md5_of(checks_published.predict(delta, apply_delta(base, delta).tensors, without)) == md5sums


def test_rotary_buffers_that_differ_in_the_delta_are_added(reference: Path, base: Checkpoint, tmp_path: Path) -> None:
    """`param.data += base.state_dict()[name]` goes over buffers too, both loaded as fp16; the deltas that `make_delta` wrote hold zeros."""
    states = [load_state(reference / name) for name in ("delta-308-may4", "expected-308-by-may4")]
    for name in (name for name in states[0] if "inv_freq" in name):
        states[0][name] += 1 / 3
        states[1][name] = load_state(reference / "base-hf-bin")[name].half().float() + states[0][name].half().float()
    for folder, state in zip(("delta", "merged"), states, strict=True):
        (tmp_path / folder).mkdir()
        torch.save(state, tmp_path / folder / "pytorch_model.bin")
    delta, merged = (open_checkpoint(tmp_path / folder / "pytorch_model.bin") for folder in ("delta", "merged"))
    (found,) = checks_published.predict(delta, merged.parameters(), base)
    assert (found.md5, found.sha256, found.size) == digests(tmp_path / "merged" / "pytorch_model.bin")


@pytest.mark.parametrize("head_dim", [2, 12, 64, 80, 128, 256])
def test_calculated_frequencies_are_those_of_transformers(head_dim: int) -> None:
    """By its formula, in torch; they may differ in the last bit of float32, which rounding to half takes away."""
    expected = 1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim))
    out = bytearray(4 * len(expected))
    InverseFrequencies(dtype="F32", shape=tuple(expected.shape)).rows_into(memoryview(out), 0, len(expected), Workspace())
    found = torch.frombuffer(out, dtype=torch.float32)
    assert torch.equal(found.half(), expected.half())
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)


def load_state(folder: Path) -> State:
    state: State = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".bin":
            state |= torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            state |= load_file(path)
    return state


def zip_again(state: State, path: Path, *, seekable: bool) -> None:
    """The members that torch writes, by Python's zip writer: CRC-32s in the headers where it can go back, else in descriptors."""
    saved = io.BytesIO()
    torch.save(state, saved)

    class OneWay(io.FileIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise io.UnsupportedOperation

    with (
        zipfile.ZipFile(saved) as source,
        open(path, "wb") if seekable else OneWay(path, "w") as raw,
        zipfile.ZipFile(raw, "w") as target,
    ):
        for info in source.infolist():
            if not info.filename.endswith("serialization_id"):
                with target.open(zipfile.ZipInfo(info.filename), "w", force_zip64=info.file_size > zipfile.ZIP64_LIMIT) as member:
                    member.write(source.read(info))


def save_with_both(state: State, path: Path) -> None:
    """As torch does, with each CRC-32 in the member's header too."""
    torch.save(state, path)
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as written:
        for info in written.infolist():
            whole[info.header_offset + 14 : info.header_offset + 18] = info.CRC.to_bytes(4, "little")
    path.write_bytes(whole)


WRITERS: Mapping[str, Writer] = {
    "the installed torch": torch.save,
    "CRC-32 in the headers": lambda state, path: zip_again(state, path, seekable=True),
    "CRC-32 in descriptors": lambda state, path: zip_again(state, path, seekable=False),
    "CRC-32 in both": save_with_both,
}


def write_pair(reference: Path, folder: Path, write: Writer) -> tuple[Path, Path]:
    """The reference's delta and merged model, each written as one file of the same name."""
    paths = []
    for source in ("delta-308-may4", "expected-308-by-may4"):
        (folder / source).mkdir(parents=True)
        paths.append(folder / source / "pytorch_model.bin")
        write(load_state(reference / source), paths[-1])
    return paths[0], paths[1]


@pytest.mark.parametrize("writer", WRITERS)
def test_what_other_writers_write(writer: str, reference: Path, tmp_path: Path) -> None:
    """The installed torch also writes a serialization id, which depends on every CRC-32."""
    delta, merged = write_pair(reference, tmp_path, WRITERS[writer])
    assert predicted(delta, merged) == digests(merged) != digests(delta)
    assert predicted(merged, merged) == digests(merged)
    with zipfile.ZipFile(delta) as written:
        assert any(info.flag_bits & 8 for info in written.infolist()) == (writer != "CRC-32 in the headers")


@pytest.mark.parametrize("writer", list(WRITERS)[1:3])
def test_zip64(writer: str, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's writer made to think that 1,000 bytes are too large for 32 bits: sizes and offsets move to the extra fields."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    delta, merged = write_pair(reference, tmp_path, WRITERS[writer])
    monkeypatch.undo()
    assert b"PK\x06\x06" in delta.read_bytes()
    assert predicted(delta, merged) == digests(merged)


@pytest.mark.parametrize("window", [64, 1000])
def test_windows_of_any_size(window: int, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that rows of a tensor, gaps between storages and CRC-32s are cut."""
    monkeypatch.setattr(checks_published, "WINDOW_BYTES", window)
    delta, merged = write_pair(reference, tmp_path, torch.save)
    assert predicted(delta, merged) == digests(merged)


def test_progress_counts_every_byte(base: Checkpoint, delta: Checkpoint) -> None:
    heard: list[Event] = []
    found = list(checks_published.predict(delta, apply_delta(base, delta).tensors, base, on_event=heard.append))
    counts = [event.nbytes for event in heard if isinstance(event, Progress)]
    assert counts == sorted(counts)
    assert counts[-1] == sum(prediction.size for prediction in found)


@pytest.fixture
def posted(md5sums: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A world in which the reference's delta is a published one, and someone posted the md5 of what it becomes."""
    known = KnownDelta("someone/tiny-delta", "tiny LLaMA", "2 layers of 48", 308, -1, "llava", "v0")
    records = [Published(f"someone's merged tiny, {shard}", "merged", "posted in a thread", md5=md5) for shard, md5 in md5sums.items()]
    monkeypatch.setattr(deltas, "KNOWN_DELTAS", (known,))
    monkeypatch.setattr(checks_published, "POSTED", {"someone/tiny-delta": "someone's merged tiny, "})
    monkeypatch.setattr(published, "PUBLISHED", (*PUBLISHED, *records))


@pytest.mark.usefixtures("posted")
def test_a_match_is_proof(base: Checkpoint, delta: Checkpoint, md5sums: dict[str, str]) -> None:
    merged = apply_delta(base, delta)
    for prediction in checks_published.predict(delta, merged.tensors, base):
        assert (prediction.verdict, prediction.published) == ("confirmed", md5sums[prediction.shard])
    findings = check_published(merged, delta, base)
    assert [(finding.level, finding.verdict, finding.subject) for finding in findings] == [("published", "ok", shard) for shard in SHARDS]
    for finding in findings:
        assert "bit-identical to someone's merged tiny" in finding.text
        assert md5sums[finding.subject] in finding.text
        assert "posted in a thread" in finding.text
    assert exit_code(findings) == 0


@pytest.mark.usefixtures("posted")
def test_another_base_is_not_confirmed_and_not_called_wrong(
    reference: Path, delta: Checkpoint, md5sums: dict[str, str], tmp_path: Path
) -> None:
    """One bit of one value in the second shard: the first is still proven."""
    state = load_state(reference / "base-hf-bin")
    state["model.norm.weight"].view(torch.int16)[7] ^= 1
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(reference / "base-hf-bin" / "config.json", tmp_path)
    base = open_checkpoint(tmp_path)
    first, second = check_published(apply_delta(base, delta, accept_base=True), delta, base)
    assert first.verdict == "ok"
    assert (second.verdict, second.subject) == ("unproved", SHARDS[1])
    assert second.text.startswith("not confirmed")
    assert md5sums[SHARDS[1]] in second.text
    assert second.remedy
    assert exit_code([second]) == 3


@pytest.mark.usefixtures("posted")
def test_what_nobody_posted_is_said_to_be_so(base: Checkpoint, delta: Checkpoint) -> None:
    """Another delta of the same shapes and shard names, as LLaVA's v1.1 is to v0, is not measured by the first one's checksums."""
    other = replace(delta, config={**delta.config, "model_type": "llama"})
    changed = {
        name: replace(tensor, base=tensor.delta) if hasattr(tensor, "base") else tensor
        for name, tensor in apply_delta(base, delta).tensors.items()
    }
    assert {p.verdict for p in checks_published.predict(delta, changed, base)} == {"not confirmed"}
    assert {(p.verdict, p.published) for p in checks_published.predict(other, changed, base)} == {("no published checksum", "")}
    findings = check_published(replace(base, tensors=changed), other, base)
    assert all(finding.text.startswith("nobody posted") for finding in findings)
    assert exit_code(findings) == 3


def test_only_a_merged_file_confirms(base: Checkpoint, delta: Checkpoint, md5sums: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    records = [Published(f"a delta, {shard}", "delta", "a page", md5=md5) for shard, md5 in md5sums.items()]
    monkeypatch.setattr(published, "PUBLISHED", (*PUBLISHED, *records))
    assert {p.verdict for p in checks_published.predict(delta, apply_delta(base, delta).tensors, base)} == {"no published checksum"}


def test_the_published_delta_finds_its_checksums() -> None:
    """The tables agree: each delta in POSTED is known, and its merged shards are in PUBLISHED with an md5."""
    assert POSTED.keys() <= {known.repo for known in KNOWN_DELTAS}
    for prefix in POSTED.values():
        records = [record for record in PUBLISHED if record.what.startswith(prefix) and record.kind == "merged"]
        assert [record.what.removeprefix(prefix) for record in records] == [f"pytorch_model-0000{n}-of-00003.bin" for n in (1, 2, 3)]
        assert all(record.md5 for record in records)


def test_tensors_that_do_not_fit_are_refused_before_anything_is_read(reference: Path, base: Checkpoint, delta: Checkpoint) -> None:
    tensors = dict(apply_delta(base, delta).tensors)
    norm = tensors["model.norm.weight"]
    for unfit, merged_as in ((replace(norm, dtype="BF16"), "BF16 [48]"), (replace(norm, shape=(47,)), "F16 [47]"), (None, "missing")):
        changed = {**tensors, "model.norm.weight": unfit} if unfit else {n: t for n, t in tensors.items() if n != "model.norm.weight"}
        with pytest.raises(MismatchError, match=r"`model.norm.weight` of the merged model does not fit") as error:
            checks_published.predict(delta, changed, base)
        assert error.value.facts == {"delta": "F16 [48]", "merged": merged_as}
        assert error.value.hint
    with pytest.raises(MismatchError, match="does not fit"):
        check_published(open_checkpoint(reference / "hf-linear-projector-308"), delta)


def test_a_delta_in_another_container_is_refused(reference: Path, base: Checkpoint, tmp_path: Path) -> None:
    save_file(load_state(reference / "delta-308-may4"), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"not in `\.bin` files"):
        checks_published.predict(open_checkpoint(tmp_path / "model.safetensors"), base.tensors)


@pytest.mark.parametrize("state", ["tied", "part"])
def test_storages_that_are_not_one_tensor_are_refused(state: str, tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    torch.save({"a": whole, "b": whole} if state == "tied" else {"a": whole[1:]}, tmp_path / "x.bin")
    checkpoint = open_checkpoint(tmp_path / "x.bin")
    with pytest.raises(InputError, match="a storage that is not exactly one tensor") as error:
        checks_published.predict(checkpoint, checkpoint.tensors)
    assert error.value.facts["tensors"] == ("`a`, `b`" if state == "tied" else "`a`")


def test_descriptors_without_signature_and_unknown_ids_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(6.0)}, tmp_path / "x.bin")
    whole = (tmp_path / "x.bin").read_bytes()
    payload = torch.arange(6.0).numpy().tobytes()
    id_at = whole.index(b"serialization_id")
    digit = whole.index(b"PK\x07\x08", id_at) - 1
    behind = whole.index(payload) + len(payload)
    for at, why in ((behind, "descriptor without signature"), (digit, "serialization id of an unknown kind")):
        (tmp_path / "x.bin").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        checkpoint = open_checkpoint(tmp_path / "x.bin")
        with pytest.raises(InputError, match=why):
            list(checks_published.predict(checkpoint, checkpoint.tensors))


def test_damage_in_either_input_is_no_prediction(reference: Path, base: Checkpoint, tmp_path: Path) -> None:
    """A bit that flipped in the delta's payload is seen by its CRC-32, and files that changed since they were opened are refused."""
    shutil.copytree(reference / "torch-2.0-containers" / "delta-308", tmp_path / "delta")
    delta = open_checkpoint(tmp_path / "delta")
    tensors, path = apply_delta(base, delta).tensors, tmp_path / "delta" / SHARDS[0]
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError):
        list(checks_published.predict(delta, tensors, base))
    place = delta.tensors["model.layers.0.mlp.up_proj.weight"].leaves()[0]
    at = place.offset + 2 * 4321
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    damaged = open_checkpoint(tmp_path / "delta")
    with pytest.raises(InputError, match="do not match their CRC-32"):
        list(checks_published.predict(damaged, apply_delta(base, damaged, accept_base=True).tensors, base))


def test_an_input_that_changes_meanwhile_is_no_prediction(base: Checkpoint, reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference / "torch-2.0-containers" / "delta-308", tmp_path / "delta")
    delta = open_checkpoint(tmp_path / "delta")
    predictions = checks_published.predict(
        delta, apply_delta(base, delta).tensors, base, on_event=lambda _: os.utime(tmp_path / "delta" / SHARDS[0], (1, 1))
    )
    with pytest.raises(InputError, match="changed while it was being read"):
        next(predictions)
