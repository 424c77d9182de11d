"""A LLaVA as llama.cpp's two files: what lies in them, what is refused, and that they are written as every output is.

That they are those of llama.cpp's own converters, byte for byte, is shown by tests/peers/test_llama_cpp.py.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Finished
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from gguf_models import CASES, Case, make_case
from safetensors.torch import load_file, save_file

import llava_weights as lw
from llava_weights.cli.toy import make_llava
from llava_weights.events import Progress
from llava_weights.families.llama_cpp import GGUF_DECODERS, QWEN2_SPLIT
from llava_weights.families.originals import ORIGINALS
from llava_weights.formats.gguf import GgufKey, index_gguf, make_gguf_header
from llava_weights.storage.reading import Workspace
from llava_weights.tensors.lazy import FromRows, LazyTensor
from llava_weights.transforms.gguf import Quantised, UnpermuteRope
from llava_weights.write.plan import Settings

BY_NAME = {case.name: case for case in CASES}


def written(model: lw.Checkpoint, out: Path, **options: Any) -> Path:
    lw.execute(lw.make_plan(model, name="toy", **options), out)
    return out


def toy(name: str, folder: Path) -> Path:
    make_case(BY_NAME[name], folder)
    return folder / "llava"


def edited(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.gguf")}


def keys_of(path: Path) -> Mapping[str, GgufKey]:
    return index_gguf(path)[1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kind_of_model(case: Case, tmp_path: Path) -> None:
    """llama.cpp's reader takes both files, each tensor has the values of llava-hf, and `verify` and `diff` agree with the source."""
    source = toy(case.name, tmp_path)
    out = written(lw.convert(source, "gguf"), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        "toy-F16.gguf", "mmproj-toy-F16.gguf", "README.md", "SHA256SUMS", "llava-weights.manifest.json",
    }  # fmt: skip
    readers = [GGUFReader(out / name) for name in ("toy-F16.gguf", "mmproj-toy-F16.gguf")]
    hub = written(lw.convert(source, "llava-hf", projector_form="gelu" if case.linear else None), tmp_path / "hf")
    values = load_file(hub / "model.safetensors")
    found = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    embedding = next(values[name] for name in values if name.endswith("embed_tokens.weight"))
    assert np.array_equal(found["token_embd.weight"].data, embedding.numpy())
    assert ("output.weight" in found) == (not case.config.get("tie_word_embeddings") and case.decoder != "gemma")
    compared = lw.diff(out, hub)
    other = {tensor.name or tensor.other for tensor in compared.tensors if tensor.status != "equal"}
    if case.name == "gemma":  # whose norms llama.cpp's converter rounds to float16 with one added
        assert {name for name in other if not name.endswith("norm.weight")} == set()
        assert max(tensor.max_abs for tensor in compared.tensors) < 2**-10
    else:
        assert other == ({"rope_freqs.weight"} if case.name == "rope-llama3" else set())
    checked = lw.verify(out, deep=True, strict=True)
    assert [finding for finding in checked.findings if finding.verdict == "failed"] == []
    assert checked.exit_code == 0
    assert lw.inspect(out).layout == "gguf"


def test_what_llama_cpp_needs_of_images(tmp_path: Path) -> None:
    """Pinpoints as (width, height), `feature_layer` in every file, no last norm, and no layer that nothing reads."""
    for name in ("v1.5", "v1.6"):
        out = written(lw.convert(toy(name, tmp_path / name), "gguf"), tmp_path / f"{name} out")
        tensors, keys = index_gguf(out / "mmproj-toy-F16.gguf")
        assert keys["clip.vision.feature_layer"].value == (2,)
        assert keys["clip.vision.block_count"].value == 2
        assert {tensor.split(".")[2] for tensor in tensors if tensor.startswith("v.blk.")} == {"0", "1"}
        assert not [tensor for tensor in tensors if "post_ln" in tensor]
        assert (tensors["v.patch_embd.weight"].dtype, tensors["v.class_embd"].dtype) == ("F16", "F32")
    assert keys["clip.vision.image_grid_pinpoints"].value == (28, 56, 56, 28, 56, 56)  # as the original's config has them
    assert "model.image_newline" in tensors


@pytest.mark.parametrize(("layer", "wanted"), [(-1, 3), (-2, 2), (-3, 1)])
def test_the_layer_that_is_read(layer: int, wanted: int, tmp_path: Path) -> None:
    """Counted from the input of the first layer, in every file: without the key llama.cpp takes one too few (#25817)."""
    out = written(lw.convert(edited(toy("v1.5", tmp_path), mm_vision_select_layer=layer), "gguf"), tmp_path / "out")
    tensors, keys = index_gguf(out / "mmproj-toy-F16.gguf")
    assert (keys["clip.vision.feature_layer"].value, keys["clip.vision.block_count"].value) == ((wanted,), wanted)
    assert len({tensor.split(".")[2] for tensor in tensors if tensor.startswith("v.blk.")}) == wanted


def rewritten(path: Path, *, without: str = "", tensor: str = "") -> Path:
    """A GGUF without the key `without`, and with a `tensor` more, of zeros."""
    tensors, keys = index_gguf(path)
    entries: list[tuple[str, LazyTensor]] = list(tensors.items())
    entries += [(tensor, LazyTensor(dtype="F32", shape=(32,)))] if tensor else []
    header, places = make_gguf_header([key for key in keys.values() if key.name != without], entries)
    data = path.read_bytes()
    start = min(entry.offset for entry in tensors.values())
    rest = data[start:].ljust(sum(entry.nbytes for _, entry, _ in places), b"\0")
    path.write_bytes(header + rest)
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"without": "clip.vision.feature_layer"}, "one layer too few"),
        ({"tensor": "v.post_ln.weight"}, "which llama.cpp would apply"),
        ({"without": "clip.vision.patch_size"}, "lacks keys"),
        ({}, ""),
    ],
)
def test_verify_knows_what_llama_cpp_would_get_wrong(change: dict[str, str], says: str, tmp_path: Path) -> None:
    out = written(lw.convert(toy("v1.6", tmp_path), "gguf"), tmp_path / "out")
    lone = tmp_path / "lone"
    lone.mkdir()
    for path in out.glob("*.gguf"):
        (lone / path.name).write_bytes(path.read_bytes())
    rewritten(lone / "mmproj-toy-F16.gguf", **change)
    found = lw.verify(lone)
    failed = [finding.text for finding in found.findings if finding.verdict == "failed"]
    assert any(says in text for text in failed) if says else failed == []
    assert found.exit_code == (4 if says else 3)  # 3: nothing is there to compare it with


def test_a_single_linear_gets_the_form_that_llama_cpp_computes(tmp_path: Path) -> None:
    """From any form in which llava-hf holds it; `identity` and `relu` are refused."""
    source = toy("linear", tmp_path)
    wanted = bytes_of(written(lw.convert(source, "gguf"), tmp_path / "out"))
    for form in ("identity", "relu", "gelu"):
        hub = written(lw.convert(source, "llava-hf", projector_form=form), tmp_path / form)
        assert bytes_of(written(lw.convert(hub, "gguf"), tmp_path / f"{form} out"))["mmproj-toy-F16.gguf"] == wanted["mmproj-toy-F16.gguf"]
        told = lw.convert(hub, "llava-hf").history[-1].cautions
        assert any("put a gelu into every projector" in text for text in told) == (form == "identity")  # relu(x) - relu(-x) = x = gelu's
        assert ("warning: `projector_hidden_act` is" in (hub / "README.md").read_text()) == (form == "identity")
        assert "recorded" not in {finding.rule for finding in lw.verify(hub).findings if finding.verdict != "ok"}
    for form in ("identity", "relu"):
        with pytest.raises(lw.UsageError, match=f"not the form `{form}`"):
            lw.convert(source, "gguf", projector_form=form)


def test_the_same_bytes_whatever_the_way(tmp_path: Path) -> None:
    """From the original, from llava-hf, with other jobs and memory; and the manifest's roots too."""
    source = toy("v1.6", tmp_path)
    wanted = bytes_of(written(lw.convert(source, "gguf"), tmp_path / "out"))
    hub = written(lw.convert(source, "llava-hf"), tmp_path / "hf", max_shard_size="30kB")
    assert bytes_of(written(lw.convert(hub, "gguf"), tmp_path / "two steps")) == wanted
    assert bytes_of(written(lw.convert(source, "gguf"), tmp_path / "slow", jobs=1, max_memory="350MB")) == wanted


def test_one_pass_from_metas_files(fixtures: Path, tmp_path: Path) -> None:
    """Meta's `.pth`, a delta and a tower of its own: as step by step with folders in between."""
    base, delta, tower = (fixtures / name for name in ("A-delta-v0/base-meta", "A-delta-v0/delta-307-apr17", "common/clip-tiny-28px"))
    merged = lw.apply_delta(base, delta, accept_base=True)
    one = written(lw.convert(merged, "gguf", tower=tower), tmp_path / "one")
    lw.execute(lw.make_plan(merged), tmp_path / "llava")
    two = written(lw.convert(tmp_path / "llava", "gguf", tower=tower), tmp_path / "two")
    assert bytes_of(one) == bytes_of(two)


@pytest.mark.parametrize("quantize", [None, "Q8_0"])
def test_one_pass_with_a_lora(quantize: str | None, fixtures: Path, tmp_path: Path) -> None:
    """Adapter, what was trained beside it, a tower of its own: as step by step with folders in between."""
    base, lora, tower = (fixtures / name for name in ("B-lora/base-vicuna-tiny", "B-lora/llava-v1.5-tiny-lora", "common/clip-tiny-28px"))
    merged = lw.merge_lora(base, [lora])
    one = written(lw.convert(merged, "gguf", tower=tower, quantize=quantize), tmp_path / "one")
    lw.execute(lw.make_plan(merged), tmp_path / "llava")
    hub = written(lw.convert(tmp_path / "llava", "llava-hf", tower=tower), tmp_path / "hf")
    two = written(lw.convert(hub, "gguf", quantize=quantize), tmp_path / "two")
    assert bytes_of(one) == bytes_of(two)


MADE: list[str] = []  # dtypes of windows that were made


@dataclass(frozen=True, kw_only=True)
class Counted(FromRows):
    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        MADE.append(self.dtype)
        self.source.rows_into(out, start, stop, work)


@pytest.mark.parametrize("quantize", [None, "Q8_0"])
def test_an_interruption_inside_a_file_costs_some_windows(quantize: str | None, tmp_path: Path) -> None:
    """Of a model of 13B the text is one file of 26 GB: the next run goes on inside of it, permuted and quantised as it is."""
    model = lw.convert(toy("v1.5", tmp_path), "gguf", quantize=quantize)
    counted = {name: Counted(dtype=tensor.dtype, shape=tensor.shape, source=tensor) for name, tensor in model.tensors.items()}
    plan = replace(lw.make_plan(replace(model, tensors=counted), name="toy"), settings=Settings(jobs=1, window=1000))
    MADE.clear()
    lw.execute(plan, tmp_path / "undisturbed")
    whole = len(MADE)
    seen: list[Progress] = []

    def interrupt(event: lw.Event) -> None:
        if isinstance(event, Progress):
            seen.append(event)
            if len(seen) == 60:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(lw.Interrupted):
        lw.execute(plan, tmp_path / "out", on_event=interrupt)
    assert not (tmp_path / "out").exists()
    assert {path.suffix for path in (tmp_path / "out.partial" / "out").glob(".toy-*.gguf.*")} == {".part", ".windows"}
    MADE.clear()
    lw.execute(plan, tmp_path / "out")
    assert 0 < len(MADE) < whole - 40
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_quantised_by_rows_as_whole_tensors(kind: str, dtype: str, tmp_path: Path) -> None:
    source = toy("v1.5", tmp_path)
    plain = index_gguf(written(lw.convert(source, "gguf", dtype="F32"), tmp_path / "plain") / "toy-F32.gguf")[0]
    rounded = GGUFReader(tmp_path / "plain" / "toy-F32.gguf")
    out = written(lw.convert(source, "gguf", dtype=dtype, quantize=kind), tmp_path / "out")
    found = {tensor.name: tensor for tensor in GGUFReader(out / f"toy-{kind}.gguf").tensors}
    assert list(found) == list(plain)
    for tensor in rounded.tensors:
        shape = plain[tensor.name].shape
        wanted = "F32" if len(shape) < 2 else "Q8_0" if tensor.name in ("output.weight", "token_embd.weight") else kind
        assert found[tensor.name].tensor_type.name == wanted
        values = np.asarray(tensor.data, np.float32).reshape(shape)
        made = quantize(values, GGMLQuantizationType[wanted]) if wanted != "F32" else values
        assert np.array_equal(found[tensor.name].data.reshape(made.shape), made), tensor.name
    assert keys_of(out / f"toy-{kind}.gguf")["general.file_type"].value == {"Q8_0": 7, "Q4_0": 2}[kind]
    assert (out / f"mmproj-toy-{'F32' if dtype == 'F32' else 'F16'}.gguf").exists()
    assert "`llama-quantize` would take a K-quant" in (out / "README.md").read_text() or kind == "Q8_0"
    largest = max(tensor.relative for tensor in lw.diff(out, tmp_path / "plain").tensors)
    assert 1e-4 < largest < {"Q8_0": 0.02, "Q4_0": 0.2}[kind]
    assert dequantize(found["blk.0.ffn_up.weight"].data, GGMLQuantizationType[kind]).shape == (96, 64)


def test_large_tensors_are_quantised_in_pieces(tmp_path: Path) -> None:
    """More values than are taken at once, rows in another order, a range that ends inside of a piece: as the whole tensor."""
    rows, columns, head = 4096, 384, 128
    values = np.random.default_rng(5).standard_normal((rows, columns)).astype(np.float16)
    save_file({"q": torch.from_numpy(values)}, tmp_path / "model.safetensors")
    source = lw.open_checkpoint(tmp_path / "model.safetensors").tensors["q"]
    turned = UnpermuteRope(dtype="F16", shape=source.shape, source=source, heads=rows // head)
    made = Quantised(dtype="Q8_0", shape=source.shape, source=turned)
    wanted = quantize(
        values.reshape(-1, 2, head // 2, columns).swapaxes(1, 2).reshape(rows, columns).astype(np.float32), GGMLQuantizationType.Q8_0
    )
    with closing(Workspace(drop_cache=False)) as work:
        for start, stop in ((0, rows), (head, rows - 2 * head)):
            out = bytearray((stop - start) * made.row_nbytes)
            made.rows_into(memoryview(out), start, stop, work)
            assert bytes(out) == wanted[start:stop].tobytes()
    assert made.scratch(rows) == made.scratch(2 * rows) < 30_000_000


def test_rows_of_no_whole_blocks_stay_f16(fixtures: Path, tmp_path: Path) -> None:
    """As llama.cpp's converter does it: this model is 48 wide, with blocks of 32 values."""
    model = lw.convert(fixtures / "C-v1.5/original-with-vision-safetensors", "gguf", quantize="Q8_0")
    tensors = index_gguf(written(model, tmp_path / "out") / "toy-Q8_0.gguf")[0]
    assert {tensors[name].dtype for name in ("token_embd.weight", "blk.0.attn_q.weight")} == {"F16"}
    assert tensors["blk.0.ffn_down.weight"].dtype == "Q8_0"
    assert "no whole blocks of 32 values" in "".join(model.history[-1].notes)


def test_what_llama_cpp_can_not_run_is_refused_by_name(tmp_path: Path) -> None:
    for title, decoder, tower, says in (
        ("ViP-LLaVA", "llama", "clip", "VipLlavaForConditionalGeneration"),
        ("LLaVA-OneVision", "qwen2", "siglip", "LlavaOnevisionForConditionalGeneration"),
        ("LLaVA v1", "llama", "siglip", "`siglip_vision_model`"),
        ("LLaVA on Gemma", "gemma2", "clip", "`gemma2`"),
    ):
        row = next(row for row in ORIGINALS if row.name == title and decoder in row.decoders and tower in row.towers)
        make_llava(tmp_path / title, row, decoder=decoder, tower=tower)
        with pytest.raises(lw.InputError, match=says) as caught:
            lw.convert(tmp_path / title / "llava", "gguf")
        assert caught.value.hint
    source = toy("v1.5", tmp_path / "rest")
    hub = written(lw.convert(source, "llava-hf"), tmp_path / "hf")
    for key, value in (("vision_feature_select_strategy", "full"), ("projector_hidden_act", "relu")):
        before = json.loads((hub / "config.json").read_text())[key]
        with pytest.raises(lw.InputError, match=value):
            lw.convert(edited(hub, **{key: value}), "gguf")
        edited(hub, **{key: before})
    text = json.loads((hub / "config.json").read_text())["text_config"]
    for key, value in (("rope_scaling", {"rope_type": "longrope", "factor": 2.0}), ("hidden_act", "gelu"), ("partial_rotary_factor", 0.5)):
        with pytest.raises(lw.InputError, match=value["rope_type"] if isinstance(value, dict) else f"`{key}`"):
            lw.convert(edited(hub, text_config=text | {key: value}), "gguf")
    assert set(GGUF_DECODERS) == {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma"}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("phi3", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("phi3", "hidden_act", "gelu"),
        ("gemma", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("gemma", "rope_theta", 500000.0),
        ("gemma", "hidden_act", "silu"),
        ("qwen2", "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
    ],
)
def test_what_a_file_has_no_key_for_is_refused(name: str, key: str, value: Any, tmp_path: Path) -> None:
    """llama.cpp would compute with the usual value of its architecture, and say nothing."""
    with pytest.raises(lw.InputError, match=rf"`{name}`.*" if key == "rope_scaling" else f"`{key}`"):
        lw.convert(edited(toy(name, tmp_path), **{key: value}), "gguf")


@pytest.mark.parametrize(("window", "told"), [(16, True), (None, False), (1 << 20, False)])
def test_a_sliding_window_is_told(window: int | None, told: bool, tmp_path: Path) -> None:
    model = lw.convert(edited(toy("v1.6-mistral", tmp_path), sliding_window=window), "gguf")
    assert any("beyond 16 tokens" in note for note in model.history[-1].notes) == told
    assert model.gguf[0].keys == lw.convert(edited(tmp_path / "llava", sliding_window=None), "gguf").gguf[0].keys


def test_tokenizers_that_llama_cpp_could_not_have(tmp_path: Path) -> None:
    source = toy("llama3", tmp_path)
    core = json.loads((source / "tokenizer.json").read_text())
    split = core["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    for pattern, whole, pre in ((r"\w+", True, ""), (QWEN2_SPLIT, True, ""), (split, True, "llama-bpe"), (split, False, "smaug-bpe")):
        core["pre_tokenizer"]["pretokenizers"][0]["pattern"], core["model"]["ignore_merges"] = {"Regex": pattern}, whole
        (source / "tokenizer.json").write_text(json.dumps(core))
        if pre:
            assert GgufKey("tokenizer.ggml.pre", "text", pre) in (lw.convert(source, "gguf").gguf[0].keys)
            continue
        with pytest.raises(lw.InputError, match="no known name for how this"):
            lw.convert(source, "gguf")


def test_a_byte_level_tokenizer_without_merges(tmp_path: Path) -> None:
    """llama.cpp would not load it ("cannot find tokenizer merges in model file")."""
    source = toy("qwen2", tmp_path)
    (source / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(lw.InputError, match="no merges"):
        lw.convert(source, "gguf")


def test_damaged_pairs_are_found(tmp_path: Path) -> None:
    """Shapes against the keys, tokens against the table, two files of different models."""
    for name in ("v1.5", "linear"):
        written(lw.convert(toy(name, tmp_path / name), "gguf"), tmp_path / f"{name} out")
    text = tmp_path / "v1.5 out" / "toy-F16.gguf"
    for name, old, new, says in (
        ("layers", b"llama.block_count\4\0\0\0\2", b"llama.block_count\4\0\0\0\3", "9 tensors that its keys ask for are missing"),
        ("width", b"llama.feed_forward_length\4\0\0\0\x60", b"llama.feed_forward_length\4\0\0\0\x40", "by its keys"),
        ("token", b"tokenizer.ggml.bos_token_id\4\0\0\0\1\0", b"tokenizer.ggml.bos_token_id\4\0\0\0\1\7", "the bos token has the id"),
    ):
        data = text.read_bytes()
        assert data.count(old) == 1
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data.replace(old, new))
        found = lw.verify(path)
        assert [says in finding.text for finding in found.findings if finding.verdict == "failed"][:1] == [True]
        assert found.exit_code == 4


def test_no_command_takes_it_as_an_input(tmp_path: Path) -> None:
    out = written(lw.convert(toy("v1.5", tmp_path), "gguf"), tmp_path / "out")
    for call in (
        lambda: lw.convert(out, "llava-hf"),
        lambda: lw.make_plan(out),
        lambda: lw.apply_delta(out / "toy-F16.gguf", out),
        lambda: lw.merge_lora(out, [out]),
    ):
        with pytest.raises(lw.InputError, match="is GGUF, which can be looked at"):
            call()


def test_no_command_line_takes_it_as_an_input(cli: Any, fixtures: Path, tmp_path: Path) -> None:
    out = written(lw.convert(toy("v1.5", tmp_path), "gguf"), tmp_path / "out")
    for words in (
        ("convert", out / "toy-F16.gguf", "--to", "llava-hf"),
        ("convert", out, "--to", "gguf"),
        ("merge-lora", "--base", out / "toy-F16.gguf", "--lora", fixtures / "F-peft/plain/adapter"),
        ("apply-delta", "--base", out / "toy-F16.gguf", "--delta", tmp_path / "llava"),
        ("apply-delta", "--base", tmp_path / "llava", "--delta", out),
        ("convert", tmp_path / "llava", "--to", "gguf", "--vision-tower", out / "mmproj-toy-F16.gguf"),
    ):
        found: Finished = cli(*map(str, words), "-o", str(tmp_path / "no"))
        assert (found.code, "is GGUF" in found.stderr) == (3, True), (words, found.stderr)
        assert not (tmp_path / "no").exists()
        assert not (tmp_path / "no.partial").exists()


def test_a_licence_of_the_input_is_told(tmp_path: Path) -> None:
    """As in the card of the output, of which llama.cpp's converter takes it."""
    source = toy("v1.6", tmp_path)
    for card, wanted in ((None, None), ("---\nlicense: llama2\n---\n", "llama2"), ("---\nlicense: other\n---\n", None), ("# x", None)):
        if card is not None:
            (source / "README.md").write_text(card)
        out = tmp_path / f"out-{len(card or '')}"
        lw.execute(lw.make_plan(lw.convert(source, "gguf")), out)
        found = keys_of(next(path for path in out.glob("*.gguf") if not path.name.startswith("mmproj")))
        assert (found["general.license"].value if wanted else "general.license" in found) == (wanted or False)
        assert (f"license: {wanted}" in (out / "README.md").read_text()) == (wanted is not None)


def test_the_command(cli: Any, tmp_path: Path) -> None:
    """The files are called after the output; a card with the commands; options that change nothing are refused."""
    source = toy("v1.6", tmp_path)
    found: Finished = cli("convert", str(source), "--to", "gguf", "--quantize", "Q4_0", "-o", str(tmp_path / "llava mine"))
    assert found.code == 0, found.stderr
    assert {path.name for path in (tmp_path / "llava mine").glob("*.gguf")} == {"llava mine-Q4_0.gguf", "mmproj-llava mine-F16.gguf"}
    card = (tmp_path / "llava mine" / "README.md").read_text()
    assert "llama-mtmd-cli -m 'llava mine-Q4_0.gguf' --mmproj 'mmproj-llava mine-F16.gguf' --jinja" in card
    assert "llama.cpp #25814" in card
    assert keys_of(tmp_path / "llava mine" / "llava mine-Q4_0.gguf")["general.name"].value == "llava mine"
    for words in (
        ["--max-shard-size", "5GB"],
        ["--lossy"],
        ["--image-aspect", "pad"],
        ["--projector-form", "relu"],
        ["--quantize", "Q4_K"],
    ):
        assert cli("convert", str(source), "--to", "gguf", "-o", str(tmp_path / "no"), *words).code == 2
    assert cli("convert", str(source), "--to", "llava-hf", "-o", str(tmp_path / "no"), "--quantize", "Q8_0").code == 2
    assert not (tmp_path / "no").exists()


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only quantised values need `gguf`."""
    monkeypatch.setattr("llava_weights.transforms.gguf.find_spec", lambda name: None)
    source = toy("v1.5", tmp_path)
    out = written(lw.convert(source, "gguf"), tmp_path / "out")
    assert lw.diff(out, out).equal
    with pytest.raises(lw.UsageError, match="needs the package `gguf`"):
        lw.convert(source, "gguf", quantize="Q8_0")
