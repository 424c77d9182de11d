"""The demo: its toys against torch and sentencepiece, its one full run as a user starts it, and what it refuses."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.cli.console import Console
from llava_weights.cli.demo import DEMO_MARK, DEMO_MARKER, Scene, run
from llava_weights.cli.toy import make_toys, tokenizer_model, write_torch_zip
from llava_weights.errors import Interrupted, OutputError, Terminated
from llava_weights.transforms.convert import convert
from llava_weights.transforms.delta import apply_delta
from llava_weights.write.execute import execute
from llava_weights.write.plan import make_plan

HIDDEN, HEADS, LAYERS, ROWS = 64, 4, 4, 320
NAMES = {
    "attention.wq": ("self_attn.q_proj", 0), "attention.wk": ("self_attn.k_proj", 0), "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1), "feed_forward.w1": ("mlp.gate_proj", 0), "feed_forward.w3": ("mlp.up_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1), "attention_norm": ("input_layernorm", None), "ffn_norm": ("post_attention_layernorm", None),
}  # fmt: skip


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    make_toys(folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def load(*paths: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(path, weights_only=True) for path in paths]


def original_llama(folder: Path) -> dict[str, torch.Tensor]:
    """Meta's files joined in transformers' names, as its converter of 4.31 does it."""
    pieces = load(*sorted((folder / "13B").glob("consolidated.*.pth")))

    def whole(name: str, axis: int | None) -> torch.Tensor:
        return pieces[0][name] if axis is None else torch.cat([piece[name] for piece in pieces], axis)

    found = {
        "model.embed_tokens.weight": whole("tok_embeddings.weight", 1),
        "model.norm.weight": whole("norm.weight", None),
        "lm_head.weight": whole("output.weight", 0),
    }
    for layer in range(LAYERS):
        for meta, (name, axis) in NAMES.items():
            values = whole(f"layers.{layer}.{meta}.weight", axis)
            if meta in ("attention.wq", "attention.wk"):
                values = values.view(HEADS, HIDDEN // HEADS // 2, 2, HIDDEN).transpose(1, 2).reshape(HIDDEN, HIDDEN)
            found[f"model.layers.{layer}.{name}.weight"] = values
    return found


def published_delta(folder: Path) -> dict[str, torch.Tensor]:
    first, second = load(*sorted(folder.glob("pytorch_model-*.bin")))
    assert not first.keys() & second.keys()
    return first | second


def test_a_user_sees_the_whole_way(process: Callable[..., Any], toys: Path, tmp_path: Path) -> None:
    """Over an earlier demo, of which only what it made is deleted, and in a folder whose name needs quotes."""
    folder = tmp_path / "my demo"
    (folder / "llava").mkdir(parents=True)
    (folder / "llava/stale.txt").write_text("of an earlier run")
    (folder / "again.partial").mkdir()
    (folder / "notes.txt").write_text("the user's own")
    (folder / DEMO_MARKER).write_bytes(DEMO_MARK)

    code, out, err = process("demo", "my demo")

    assert (code, err) == (0, ""), out
    assert {line for line in out.splitlines() if "warning" in line} == {line for line in out.splitlines() if "gelu" in line}  # no other
    assert [line for line in out.splitlines() if line.startswith("$ ")] == [
        "$ llava-weights inspect 'my demo/llama'",
        "$ llava-weights inspect 'my demo/delta'",
        "$ llava-weights apply-delta --base 'my demo/llama' --delta 'my demo/delta' -o 'my demo/llava'",
        "$ (cd 'my demo/llava' && sha256sum -c SHA256SUMS)",
        "$ llava-weights inspect 'my demo/llava'",
        "$ llava-weights apply-delta --base 'my demo/vicuna' --delta 'my demo/delta' -o 'my demo/wrong'",
        "$ llava-weights merge-lora --base 'my demo/llava' --lora 'my demo/lora' -o 'my demo/tuned'",
        "$ llava-weights make-delta --base 'my demo/llama' --tuned 'my demo/llava' --codec integer -o 'my demo/small'",
        "$ llava-weights apply-delta --base 'my demo/llama' --delta 'my demo/small' -o 'my demo/again' -q",
        "$ cmp 'my demo/llava/model.safetensors' 'my demo/again/model.safetensors'",
        "$ llava-weights convert 'my demo/llama' --delta 'my demo/delta' --lora 'my demo/lora' --vision-tower 'my demo/clip' "
        "-o 'my demo/llava-hf'",
    ]
    shown = """in Meta's layout | unapplied delta of a LLaVA | bos/eos/pad ids 0/1/-1 -> 1/2/0 | `[PAD]` (id 323) dropped |
        Wrote my demo/llava | model.safetensors: OK | LLaVA in the original layout | error: the base is not the one |
        Nothing was written | of the update survived rounding | Wrote my demo/small | With real weights:"""
    places = {text.strip(): out.find(text.strip()) for text in shown.split("|")}
    assert -1 not in places.values(), places
    assert [*places.values()] == sorted(places.values()), places
    assert "\x1b" not in out
    assert "Traceback" not in out
    assert {path.name for path in folder.iterdir()} == {
        DEMO_MARKER,
        "notes.txt",
        "llama",
        "delta",
        "vicuna",
        "lora",
        "clip",
        "llava",
        "llava-hf",
        "small",
        "again",
        "tuned",
    }
    for name in ("llama", "delta", "vicuna", "lora", "clip"):
        assert content(folder / name) == content(toys / name), "the toys are the same bytes every time, and never changed"
    check_result(folder)
    assert (folder / "again/model.safetensors").read_bytes() == (folder / "llava/model.safetensors").read_bytes()
    assert (folder / "small/model.safetensors").stat().st_size < sum(path.stat().st_size for path in (folder / "delta").glob("*.bin"))


def test_the_last_folder_loads_and_answers(toys: Path, tmp_path: Path) -> None:
    """What the demo ends with, in the five lines that its card and the README show."""
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    merged = apply_delta(open_checkpoint(toys / "llama"), open_checkpoint(toys / "delta"))
    execute(make_plan(convert(merged, "llava-hf", tower=open_checkpoint(toys / "clip"))), tmp_path / "out")
    model, keys = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not keys["missing_keys"]
    assert not keys["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(tmp_path / "out", padding_side="left", backend="pil")
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert prompt.endswith("###Human: <im_start><im_patch><im_end>\nWhat is this?###Assistant:")
    image = Image.new("RGB", (70, 40), (200, 10, 90))
    inputs = processor(images=[image], text=[prompt], padding=True, return_tensors="pt").to(model.dtype)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3


def check_result(folder: Path) -> None:
    result = folder / "llava"
    listed = dict(reversed(line.split("  ")) for line in (result / "SHA256SUMS").read_text().splitlines())
    assert listed.keys() == {path.name for path in result.iterdir()} - {"SHA256SUMS", "llava-weights.manifest.json"}
    assert all(hashlib.sha256((result / name).read_bytes()).hexdigest() == digest for name, digest in listed.items())
    base, delta, merged = original_llama(folder / "llama"), published_delta(folder / "delta"), load_file(result / "model.safetensors")
    assert merged.keys() == {name for name in delta if "inv_freq" not in name}
    for name, values in merged.items():
        expected = delta[name].clone()
        if name in base:
            expected[: len(base[name])] += base[name]
        assert values.dtype == torch.float16, name
        assert torch.equal(values, expected), name
    assert base.keys() == {name for name in merged if "mm_projector" not in name}


def test_llama_is_as_meta_ships_it(toys: Path) -> None:
    folder = toys / "llama"
    assert sorted(content(folder)) == [
        "13B/checklist.chk", "13B/consolidated.00.pth", "13B/consolidated.01.pth", "13B/params.json",
        "tokenizer.model", "tokenizer_checklist.chk",
    ]  # fmt: skip
    # The real file has this form without a newline at its end: md5 0171286599e0f8858893e49fb74b71f8 with 13B's lengths.
    assert (folder / "13B/params.json").read_text() == (
        '{"dim": 64, "multiple_of": 256, "n_heads": 4, "n_layers": 4, "norm_eps": 1e-06, "vocab_size": -1}'
    )
    for checklist in (folder / "13B/checklist.chk", folder / "tokenizer_checklist.chk"):
        for digest, name in (line.split("  ") for line in checklist.read_text().splitlines()):
            assert hashlib.md5((checklist.parent / name).read_bytes()).hexdigest() == digest
    assert len((folder / "13B/checklist.chk").read_text().splitlines()) == 3
    for piece in load(folder / "13B/consolidated.00.pth", folder / "13B/consolidated.01.pth"):
        assert {values.dtype for values in piece.values()} == {torch.float16}
        assert len(piece) == 9 * LAYERS + 4
        assert piece["rope.freqs"].shape == (HIDDEN // HEADS // 2,)


def test_delta_has_the_faults_of_the_published_one(toys: Path) -> None:
    folder, delta = toys / "delta", published_delta(toys / "delta")
    config, special = (json.loads((folder / name).read_text()) for name in ("config.json", "special_tokens_map.json"))
    assert [config[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [0, 1, -1]
    assert config["max_sequence_length"] == 2048
    assert "max_position_embeddings" not in config
    assert special["bos_token"] == "</s>"
    added = json.loads((folder / "added_tokens.json").read_text())
    assert added["[PAD]"] == len(delta["model.embed_tokens.weight"]) == len(delta["lm_head.weight"]) == config["vocab_size"] == ROWS + 3
    buffers = {name: values for name, values in delta.items() if name.endswith("inv_freq")}
    assert len(buffers) == LAYERS
    assert all(values.dtype == torch.float32 and not values.any() for values in buffers.values())
    placed = json.loads((folder / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert placed.keys() == delta.keys()
    assert all(name in torch.load(folder / shard, weights_only=True) for name, shard in list(placed.items())[::9])


def test_tokenizer_is_one_for_sentencepiece() -> None:
    library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model())
    assert (len(library), library.unk_id(), library.bos_id(), library.eos_id(), library.pad_id()) == (ROWS, 0, 1, 2, -1)
    assert library.is_byte(3)
    assert library.id_to_piece(258) == "<0xFF>"
    assert library.id_to_piece(260) == "\u2581t"
    assert library.encode("the cat", out_type=str) == ["\u2581the", "\u2581c", "at"]
    text = "what is in  the picture? Ünïcödé \N{SNOWMAN}"
    assert library.decode(library.encode(text)) == text
    assert 0 not in library.encode(text)


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    arrays = {
        "a.weight": np.arange(12, dtype=np.float16).reshape(3, 4),
        "b": np.array([1.5, -2.0, np.inf], np.float32),
        "c": np.arange(70_000, dtype=np.float16).reshape(2, 5, 7000) / 7,
    }
    write_torch_zip(tmp_path / "some.bin", arrays)
    (found,) = load(tmp_path / "some.bin")
    assert [*found] == [*arrays]
    for name, values in arrays.items():
        assert found[name].numpy().dtype == values.dtype
        assert np.array_equal(found[name].numpy(), values)


@pytest.mark.parametrize("kind", ["a folder with a file", "a file", "a mark of another", "a link among the toys", "a link to nothing"])
def test_whatever_is_no_earlier_demo_stays_as_it_is(kind: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    folder, outside = tmp_path / "demo", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("weights")
    if kind == "a file":
        folder.write_text("mine")
    elif kind == "a link to nothing":
        folder.symlink_to(tmp_path / "nothing")
    else:
        folder.mkdir()
        (folder / (DEMO_MARKER if kind == "a mark of another" else "weights.bin")).write_text("mine")
    if kind == "a link among the toys":
        (folder / DEMO_MARKER).write_bytes(DEMO_MARK)
        (folder / "llama").symlink_to(outside)
    before = content(tmp_path)
    if kind == "a folder with a file":
        code, out, err = cli("demo")
        assert (code, out) == (5, "")
        assert err.startswith("error: `demo` exists and is not an earlier demo\n")
        assert err.endswith("Nothing was written\n")
    else:
        with pytest.raises(OutputError, match="is not an earlier demo"):
            run(folder, Console())
    assert content(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["demo", "outside"]


def test_the_first_failure_ends_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fails = Scene("Fails.", ("llava-weights", "inspect", str(tmp_path / "no")))
    scenes = Scene("Works.", ("true",)), fails, Scene("Never.", ("true",))
    assert run(tmp_path / "demo", Console(), lambda folder: scenes) == 3
    out, err = capfd.readouterr()
    assert "does not exist" in out
    assert "exit code 3, expected 0" in out
    assert err == ""
    assert "Works." in out
    assert "Never." not in out
    assert "Done" not in out


def test_a_refusal_that_does_not_come_is_a_failure(tmp_path: Path) -> None:
    refused = Scene("Should be refused.", ("true",), code=3)
    assert run(tmp_path / "demo", Console(out=io.StringIO()), lambda folder: [refused]) == 1


def test_quiet_says_the_path_alone_and_a_failure_in_full(tmp_path: Path) -> None:
    out, talks, fails = io.StringIO(), Scene("Talks.", ("echo", "hello")), Scene("Talks.", ("sh", "-c", "echo oops >&2; exit 7"))
    assert run(tmp_path / "demo", Console(quiet=True, out=out), lambda folder: [talks]) == 0
    assert out.getvalue() == f"{tmp_path / 'demo'}\n"
    assert run(tmp_path / "demo", Console(quiet=True, out=out), lambda folder: [fails]) == 7
    assert "oops" in out.getvalue()


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_interrupted_it_says_what_is_left(raised: type[BaseException], code: int, tmp_path: Path) -> None:
    def interrupt(folder: Path) -> Iterator[Scene]:
        raise raised

    with pytest.raises(Interrupted) as caught:
        run(tmp_path / "demo", Console(out=io.StringIO()), interrupt)
    assert caught.value.exit_code == code
    assert caught.value.kept == f"What was made is in `{tmp_path / 'demo'}`"
    works = Scene("Works.", ("true",))
    assert run(tmp_path / "demo", Console(out=io.StringIO()), lambda folder: [works]) == 0, "what is left is an earlier demo"


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full, pytest.raises(OutputError, match="No space left") as caught:
        run(tmp_path / "demo", Console(out=full))
    assert caught.value.kept == f"What was made is in `{tmp_path / 'demo'}`"


def test_a_folder_that_can_not_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="can't write"):
        run(tmp_path / "file" / "demo", Console(out=io.StringIO()))
