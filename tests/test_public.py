"""The library as a user imports it: every argument is checked at once, paths serve as checkpoints, types are real, errors say all."""

from __future__ import annotations

import ast
import inspect
import logging
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import llava_weights as lw
from llava_weights.families import decoders, originals, targets, towers

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
BASE, DELTA, TUNED = (FIXTURES / "A-delta-v0" / name for name in ("base-hf-bin", "delta-307-apr17", "target-307/llava-tiny-v0"))
VICUNA, LORA = FIXTURES / "B-lora/base-vicuna-tiny", FIXTURES / "B-lora/llava-v1.5-tiny-lora"
ORIGINAL, HUB, CLIP = FIXTURES / "C-v1.5/original-no-vision-bin", FIXTURES / "C-v1.5/hf-by-tf4.47.1", FIXTURES / "common/clip-tiny-42px"
NOWHERE = Path("/no/where")  # what is wrong is told before anything is opened
lib: Any = lw  # wrong calls on purpose

FUNCTIONS = sorted(name for name in lw.__all__ if inspect.isfunction(getattr(lw, name)))
CLASSES = sorted(name for name in lw.__all__ if isinstance(getattr(lw, name), type))

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "apply_delta without a base": (lambda: lib.apply_delta(None, DELTA), "the base is of the type `NoneType`"),
    "apply_delta of a number": (lambda: lib.apply_delta(BASE, 7), "the delta is of the type `int`"),
    "apply_delta of bytes": (lambda: lib.apply_delta(b"base", DELTA), "the base is of the type `bytes`"),
    "apply_delta of nothing": (lambda: lib.apply_delta("", DELTA), "the base is an empty text"),
    "make_delta by another codec": (lambda: lib.make_delta(NOWHERE, NOWHERE, codec="intger"), "arithmetic, integer"),
    "make_delta by no codec": (lambda: lib.make_delta(NOWHERE, NOWHERE, codec=None), "arithmetic, integer"),
    "merge_lora by another rule": (lambda: lib.merge_lora(NOWHERE, [NOWHERE], arithmetic="nope"), "peft, peft-safe, peft-half, exact"),
    "merge_lora in another dtype": (lambda: lib.merge_lora(NOWHERE, [NOWHERE], dtype="int8"), "F16, BF16 or F32"),
    "merge_lora by a text": (lambda: lib.merge_lora(NOWHERE, [NOWHERE], scale="2"), "`scale` is '2'"),
    "merge_lora by NaN": (lambda: lib.merge_lora(NOWHERE, [NOWHERE], scale=float("nan")), "`scale` is nan"),
    "merge_lora of nothing": (lambda: lib.merge_lora(VICUNA, []), "no adapter was given"),
    "merge_lora of a number": (lambda: lib.merge_lora(VICUNA, [3]), "the adapter is of the type `int`"),
    "merge_lora with a weight": (lambda: lib.merge_lora(VICUNA, [(LORA, "half")]), "`weight` is 'half'"),
    "convert to another layout": (lambda: lib.convert(NOWHERE, "onnx"), "llava-hf, llava, gguf"),
    "convert to a number": (lambda: lib.convert(NOWHERE, 3), "llava-hf, llava"),
    "convert in another dtype": (lambda: lib.convert(NOWHERE, "llava-hf", dtype="float8"), "F16, BF16 or F32"),
    "convert by another form": (lambda: lib.convert(NOWHERE, "llava-hf", projector_form="tanh"), "identity, relu, gelu"),
    "convert by another mode": (lambda: lib.convert(NOWHERE, "llava-hf", conv_mode="llava_v9"), "llava_v1"),
    "convert by another aspect": (lambda: lib.convert(NOWHERE, "llava-hf", image_aspect="wide"), "square, pad"),
    "convert to no rows": (lambda: lib.convert(NOWHERE, "llava-hf", vocab_size=0), "`vocab_size` is 0"),
    "convert with an empty token": (lambda: lib.convert(NOWHERE, "llava-hf", image_token=""), "`image_token` must be a text"),
    "convert back with a form": (lambda: lib.convert(NOWHERE, "llava", projector_form="relu"), "takes no `--projector-form`"),
    "convert with a name": (lambda: lib.convert(NOWHERE, "llava-hf", tower_name="a/b"), "takes no `--tower-name`"),
    "convert with a tower of no type": (lambda: lib.convert(ORIGINAL, "llava-hf", tower=3), "the tower is of the type `int`"),
    "convert with a token of no text": (lambda: lib.convert(NOWHERE, "llava-hf", image_token="\udcff"), "`image_token` must be a text"),
    "convert_lora of nothing": (lambda: lib.convert_lora(None, "llava-hf"), "the adapter is of the type `NoneType`"),
    "convert_lora to another layout": (lambda: lib.convert_lora(NOWHERE, "gguf"), "there is no layout `gguf`"),
    "convert_lora for a number": (lambda: lib.convert_lora(LORA, "llava-hf", base=3), "the base is of the type `int`"),
    "merge_lora of no list": (lambda: lib.merge_lora(VICUNA, 3), "the adapter is of the type `int`"),
    "verify with a rule of no list": (lambda: lib.verify(CLIP, strict=True, allow=3), "`allow` is 3, no list of rules"),
    "verify with one rule": (lambda: lib.verify(CLIP, strict=True, allow="values"), "no list of rules"),
    "verify with a rule of no text": (lambda: lib.verify(CLIP, strict=True, allow=[None]), "there is no rule `None`"),
    "read_recording of a number": (lambda: lib.read_recording(7), "the recording is of the type `int`"),
    "make_plan of nothing": (lambda: lib.make_plan(None), "the checkpoint is of the type `NoneType`"),
    "make_plan without jobs": (lambda: lib.make_plan(NOWHERE, jobs=0), "`jobs` is 0"),
    "make_plan of true jobs": (lambda: lib.make_plan(NOWHERE, jobs=True), "`jobs` is True"),
    "make_plan of too many jobs": (lambda: lib.make_plan(NOWHERE, jobs=1000), "from 1 to 64"),
    "make_plan of a huge shard": (lambda: lib.make_plan(NOWHERE, max_shard_size=1 << 60), "max_shard_size"),
    "make_plan of a tiny shard": (lambda: lib.make_plan(NOWHERE, max_shard_size="5"), "is 5 bytes, too little"),
    "make_plan of no shard": (lambda: lib.make_plan(NOWHERE, max_shard_size=0), "max_shard_size"),
    "make_plan of no memory": (lambda: lib.make_plan(NOWHERE, max_memory="much"), "is not a size"),
    "make_plan of half a byte": (lambda: lib.make_plan(NOWHERE, max_shard_size=0.5), "too little"),
    "execute of a checkpoint": (lambda: lib.execute(lw.open_checkpoint(BASE), "out"), "what `make_plan` returns"),
    "execute to nowhere": (lambda: lib.execute(lw.make_plan(BASE), None), "the output is of the type `NoneType`"),
    "execute to an empty name": (lambda: lib.execute(lw.make_plan(BASE), ""), "the output is an empty text"),
    "execute to a NUL": (lambda: lib.execute(lw.make_plan(BASE), "a\0b"), "the output has a NUL"),
    "open_checkpoint of a NUL": (lambda: lib.open_checkpoint("a\0b"), "the source has a NUL"),
    "execute to an address": (lambda: lib.execute(lw.make_plan(BASE), "s3://bucket/out"), "the output is an address"),
    "a portion to an address": (
        lambda: lib.execute_portion(lw.make_plan(BASE), Path("HF://a/b"), lw.to_portion("1/2")),
        "the output is an address",
    ),
    "execute on a pool of no kind": (lambda: lib.execute(lw.make_plan(BASE), "out", pool=4), "concurrent.futures.Executor"),
    "verify of nothing": (lambda: lib.verify(None), "the checkpoint is of the type `NoneType`"),
    "verify against nothing": (lambda: lib.verify(BASE, against=""), "the reference is an empty text"),
    "verify without jobs": (lambda: lib.verify(BASE, jobs=0), "`jobs` is 0"),
    "verify of what is not written": (lambda: lib.verify(lw.apply_delta(BASE, DELTA)), "was not written yet"),
    "checksum of nothing": (lambda: lib.checksum(3), "the checkpoint is of the type `int`"),
    "checksum without jobs": (lambda: lib.checksum(BASE, jobs=-1), "`jobs` is -1"),
    "diff of nothing": (lambda: lib.diff(BASE, None), "the second checkpoint is of the type `NoneType`"),
    "diff within a text": (lambda: lib.diff(BASE, BASE, tolerance="1"), "`tolerance` is '1'"),
    "diff within less than nothing": (lambda: lib.diff(BASE, BASE, tolerance=-1), "tolerance"),
    "diff without jobs": (lambda: lib.diff(BASE, BASE, jobs=0), "`jobs` is 0"),
    "smoke_test of one": (lambda: lib.smoke_test(HUB), "either a reference or an original"),
    "smoke_test of both": (lambda: lib.smoke_test(HUB, reference="a", original="b"), "either a reference or an original"),
    "smoke_test on another device": (lambda: lib.smoke_test(NOWHERE, original=NOWHERE, device="tpu"), "cpu, cuda or cuda:N"),
    "smoke_test in another dtype": (lambda: lib.smoke_test(NOWHERE, original=NOWHERE, dtype="F8"), "F16, BF16 or F32"),
    "smoke_test in no dtype": (lambda: lib.smoke_test(NOWHERE, original=NOWHERE, dtype=None), "F32, BF16 or F16"),
    "smoke_test in three bits": (lambda: lib.smoke_test(NOWHERE, quantize="3bit"), "8bit, 4bit"),
    "smoke_test in bits of both": (
        lambda: lib.smoke_test(HUB, reference="a", original="b", quantize="8bit"),
        "either a reference or an original",
    ),
    "smoke_test within nothing": (lambda: lib.smoke_test(NOWHERE, original=NOWHERE, atol=-1), "`atol` is -1"),
    "smoke_test with a tower for nobody": (lambda: lib.smoke_test(HUB, reference=NOWHERE, tower=CLIP), "holds its own vision tower"),
    "open_checkpoint of nothing": (lambda: lib.open_checkpoint(None), "the source is of the type `NoneType`"),
    "open_checkpoint at a number": (lambda: lib.open_checkpoint(BASE, revision=3), "the revision is of the type `int`"),
    "open_adapter of nothing": (lambda: lib.open_adapter(None), "the adapter is of the type `NoneType`"),
    "open_adapter beside a number": (lambda: lib.open_adapter(LORA, non_lora=3), "the file of `non_lora` is of the type `int`"),
    "record to no path": (lambda: lib.record(HUB, None), "None is no path of a file"),
    "record on another device": (lambda: lib.record(NOWHERE, "new", device="tpu"), "cpu, cuda or cuda:N"),
    "record with a tower for nobody": (lambda: lib.record(HUB, "new", tower=CLIP), "holds its own vision tower"),
    "inspect of nothing": (lambda: lib.inspect(None), "the checkpoint is of the type `NoneType`"),
    "inspect of an empty name": (lambda: lib.inspect(""), "the checkpoint is an empty text"),
    "inspect of a number": (lambda: lib.inspect(BASE, given=3), "`given` is of the type `int`"),
    "a bar that is wide": (lambda: lib.ProgressBar(disable="no"), "`disable` is 'no'"),
    "verify by a number": (lambda: lib.verify(BASE, base=BASE, lora=3), "the adapter is of the type `int`"),
    "execute for no listener": (lambda: lib.execute(lw.make_plan(BASE), "out", on_event=3), "`on_event` is of the type `int`"),
    "execute_portion for no listener": (
        lambda: lib.execute_portion(lw.make_plan(BASE), "out", lw.to_portion("1/2"), on_event=None),
        "`on_event` is of the type `NoneType`",
    ),
    "verify for no listener": (lambda: lib.verify(NOWHERE, on_event="print"), "`on_event` is of the type `str`"),
    "checksum for no listener": (lambda: lib.checksum(NOWHERE, on_event=3), "`on_event` is of the type `int`"),
    "diff for no listener": (lambda: lib.diff(NOWHERE, NOWHERE, on_event=3), "`on_event` is of the type `int`"),
    "smoke_test for no listener": (lambda: lib.smoke_test(NOWHERE, original=NOWHERE, on_event=3), "`on_event` is of the type `int`"),
    "record for no listener": (lambda: lib.record(NOWHERE, "new", on_event=3), "`on_event` is of the type `int`"),
    "record by a seed of no number": (lambda: lib.record(NOWHERE, "new", seed="x"), "`seed` is 'x'"),
    "record of no probes": (lambda: lib.record(NOWHERE, "new", probes=[]), "`probes` is no list of probes"),
    "record of texts": (lambda: lib.record(NOWHERE, "new", probes=["text"]), "`probes` is no list of probes"),
    "make_plan with options of no names": (lambda: lib.make_plan(NOWHERE, options=3), "`options` is of the type `int`"),
    "a portion of no plan": (lambda: lib.execute_portion(BASE, "out", lw.to_portion("1/2")), "what `make_plan`"),
    "a portion of a number": (lambda: lib.to_portion(3), "is not a portion"),
    "verify of a part of no text": (lambda: lib.verify(NOWHERE, deep=True, part=3), "is no part"),
    "verify of a part of samples": (lambda: lib.verify(NOWHERE, part="1/2"), "what `--deep` reads"),
    "repair of nothing": (lambda: lib.repair(None, BASE), "the checkpoint is of the type `NoneType`"),
    "repair from nothing": (lambda: lib.repair(BASE, 3), "the other copy is of the type `int`"),
    "repair from itself": (lambda: lib.repair(BASE, BASE), "the checkpoint that is to be repaired"),
    "repair without jobs": (lambda: lib.repair(NOWHERE, BASE, jobs=0), "`jobs` is 0"),
    "repair for no listener": (lambda: lib.repair(NOWHERE, BASE, on_event=3), "`on_event` is of the type `int`"),
    "which_base of a number": (lambda: lib.which_base(3, [BASE]), "the delta is of the type `int`"),
    "which_base among a text": (lambda: lib.which_base(DELTA, "a"), "no list of bases"),
    "which_base among none": (lambda: lib.which_base(DELTA, []), "there is no candidate"),
    "which_base among numbers": (lambda: lib.which_base(DELTA, [3]), "the candidate is of the type `int`"),
    "record_fingerprint of a number": (lambda: lib.record_fingerprint(3, "new"), "the base is of the type `int`"),
    "record_fingerprint to no path": (lambda: lib.record_fingerprint(BASE, None), "None is no path of a file"),
    "a portion of a text": (lambda: lib.to_portion("3/2"), "is not a portion"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_a_usage_error_at_once(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, words = WRONG[case]
    with pytest.raises(lw.UsageError, match=re.escape(words)):
        call()
    assert list(tmp_path.iterdir()) == []


def test_a_path_is_as_good_as_a_checkpoint(tmp_path: Path) -> None:
    def root(plan: lw.Plan, name: str) -> str:
        return lw.execute(plan, tmp_path / name).root

    opened = lw.open_checkpoint
    assert root(lw.make_plan(lw.apply_delta(str(BASE), DELTA)), "a") == root(lw.make_plan(lw.apply_delta(opened(BASE), opened(DELTA))), "b")
    assert root(lw.make_plan(lw.make_delta(BASE, str(TUNED))), "c") == root(lw.make_plan(lw.make_delta(opened(BASE), opened(TUNED))), "d")
    halves = [lw.merge_lora(VICUNA, f"{LORA}@0.5"), lw.merge_lora(VICUNA, [(LORA, 0.5)]), lw.merge_lora(VICUNA, LORA, scale=0.5)]
    expected = root(lw.make_plan(lw.merge_lora(opened(VICUNA), [(lw.open_adapter(LORA), 0.5)])), "e")
    assert {root(lw.make_plan(half), f"half {number}") for number, half in enumerate(halves)} == {expected}
    converted = root(lw.make_plan(lw.convert(ORIGINAL, "llava-hf", tower=str(CLIP), dtype="float16")), "f")
    assert converted == root(lw.make_plan(lw.convert(opened(ORIGINAL), "llava-hf", tower=opened(CLIP), dtype="F16")), "g")
    assert lw.diff(BASE, opened(BASE)).equal
    assert lw.verify(opened(tmp_path / "a"), against=opened(tmp_path / "b")).exit_code == 0
    assert lw.checksum(opened(tmp_path / "a")) == []
    assert lw.smoke_test(opened(HUB), original=ORIGINAL, tower=opened(CLIP)).verdict == "same"
    for lora in (f"{LORA}@0.5", [f"{LORA}@0.5"], [(LORA, 0.5)], [(lw.open_adapter(LORA), 0.5)]):
        checked = lw.verify(tmp_path / "e", base=VICUNA, lora=lora)
        assert checked.exit_code == 0
    assert lw.verify(tmp_path / "e", base=VICUNA, lora=LORA).exit_code == 4
    assert lw.inspect(opened(BASE), given=str(BASE)).document() == lw.inspect(str(BASE)).document()
    assert root(lw.make_plan(str(BASE)), "h") == root(lw.make_plan(opened(BASE)), "i")


RIGHT: dict[str, Callable[[Path, lw.Listener], Any]] = {
    "apply_delta": lambda out, bar: lw.apply_delta(BASE, DELTA),
    "checksum": lambda out, bar: lw.checksum(shutil.copytree(BASE, out), on_event=bar),
    "convert": lambda out, bar: lw.convert(ORIGINAL, "llava-hf", tower=CLIP),
    "convert_lora": lambda out, bar: lw.convert_lora(LORA, "llava-hf", base=VICUNA),
    "diff": lambda out, bar: lw.diff(BASE, TUNED, on_event=bar),
    "execute": lambda out, bar: lw.execute(lw.make_plan(BASE), out, on_event=bar),
    "execute_portion": lambda out, bar: lw.execute_portion(lw.make_plan(BASE), out, lw.to_portion("1/1"), on_event=bar),
    "inspect": lambda out, bar: lw.inspect(DELTA),
    "make_delta": lambda out, bar: lw.make_delta(BASE, TUNED),
    "make_plan": lambda out, bar: lw.make_plan(lw.apply_delta(BASE, DELTA)),
    "merge_lora": lambda out, bar: lw.merge_lora(VICUNA, LORA),
    "open_adapter": lambda out, bar: lw.open_adapter(LORA),
    "open_checkpoint": lambda out, bar: lw.open_checkpoint(BASE),
    "read_recording": lambda out, bar: (lw.record(HUB, out), lw.read_recording(out)),
    "record": lambda out, bar: lw.record(HUB, out, on_event=bar),
    "record_fingerprint": lambda out, bar: lw.record_fingerprint(BASE, out),
    "repair": lambda out, bar: (
        lw.checksum(shutil.copytree(BASE, out)),
        os.truncate(out / "config.json", 3),
        lw.repair(out, BASE, on_event=bar),
    ),
    "smoke_test": lambda out, bar: lw.smoke_test(HUB, original=ORIGINAL, tower=CLIP, on_event=bar),
    "to_portion": lambda out, bar: lw.to_portion("3/16"),
    "verify": lambda out, bar: lw.verify(BASE, deep=True, on_event=bar),
    "which_base": lambda out, bar: lw.which_base(DELTA, [BASE, TUNED]),
}


def test_every_public_function_is_called_rightly_and_wrongly() -> None:
    tree = ast.parse(Path(__file__).read_text())
    wrong = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "lib"}
    assert sorted(RIGHT) == FUNCTIONS
    assert wrong >= set(FUNCTIONS)


def process() -> dict[str, Any]:
    """What a library must not change for its user."""
    return {
        "threads of torch": torch.get_num_threads(),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "warnings": list(warnings.filters),
        "working directory": os.getcwd(),
        "environment": dict(os.environ),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "random numbers": (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()),  # type: ignore[index]
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "logging": logging.root.level,
    }


@pytest.mark.parametrize("function", RIGHT)
def test_a_public_function_leaves_the_process_as_it_found_it(function: str, tmp_path: Path) -> None:
    RIGHT[function](tmp_path / "first", lambda event: None)  # which imports what it needs; other packages set things then
    own, threads = torch.get_num_threads(), 3
    torch.set_num_threads(threads)
    try:
        before = process()
        with lw.ProgressBar() as bar:
            RIGHT[function](tmp_path / "second", bar)
        assert process() == before
    finally:
        torch.set_num_threads(own)


def shown_by_ipython(value: Any) -> str:
    """As IPython's printer chooses: class by class, the first with a `_repr_pretty_` or a `__repr__` of its own."""
    for found in type(value).__mro__:
        if "_repr_pretty_" in vars(found):
            said: list[str] = []
            found._repr_pretty_(value, SimpleNamespace(text=said.append), False)
            return "".join(said)
        if "__repr__" in vars(found):
            return repr(value)
    raise AssertionError


def test_what_a_prompt_shows_is_one_short_line(tmp_path: Path) -> None:
    long = tmp_path / ("a name that is long " * 10) / "b"
    shutil.copytree(BASE, long)
    merged = lw.apply_delta(long, DELTA)
    tied = lw.merge_lora(VICUNA, LORA)
    converted, back = lw.convert(ORIGINAL, "llava-hf", tower=CLIP), lw.convert(HUB, "llava")
    plan, adapter = lw.make_plan(merged), lw.open_adapter(LORA)
    recording = lw.record(HUB, tmp_path / "recording")
    smoke = lw.smoke_test(HUB, original=ORIGINAL, tower=CLIP)
    difference = lw.diff(BASE, TUNED)
    every: list[Any] = [
        merged, tied, converted, back, merged.origin, *merged.history, *merged.tensors.values(), *tied.tensors.values(),
        *converted.tensors.values(), *back.tensors.values(), plan, *plan.shards, adapter, *adapter.modules, lw.verify(BASE), difference,
        *difference.tensors, smoke, *smoke.rows, recording, *recording.probes, *(one.probe for one in recording.probes), lw.inspect(DELTA),
        lw.to_portion("1/2"), *decoders.DECODERS, *towers.TOWERS, *originals.ORIGINALS, *targets.TARGETS,
    ]  # fmt: skip
    for value in every:
        line = shown_by_ipython(value)
        assert len(line) < 200, line
        assert line.isprintable(), line
        assert line.startswith(f"{type(value).__name__}("), line
        assert isinstance(value, lw.LazyTensor | lw.Shard) or repr(value) == line
        assert not isinstance(value, lw.LazyTensor | lw.Shard) or str(value) == line
    assert shown_by_ipython(merged.tensors["lm_head.weight"]) == "Add(F16 [307, 48] of 'lm_head.weight' and 1 more)"
    assert repr(merged) == f"Checkpoint('delta-307-apr17', 'llava', {len(merged.tensors)} tensors, 172 kB, by 'apply-delta')"


def test_an_output_must_be_able_to_get_its_name(cli: Callable[..., Any]) -> None:
    for output in ("/", "//", "/usr/.."):
        code, _, err = cli("apply-delta", "--base", BASE, "--delta", DELTA, "-o", output, "--force")
        assert code == 5, err
        assert "can't be an output" in err
    assert cli("apply-delta", "--base", BASE, "--delta", DELTA, "-o", "", "--force").code == 2
    with pytest.raises(lw.OutputError, match="can't be an output"):
        lw.execute(lw.make_plan(BASE), "/", force=True)


def test_an_uncaught_error_shows_facts_and_hint() -> None:
    with pytest.raises(lw.InputError) as caught:
        lw.apply_delta(DELTA, BASE)
    error, said = caught.value, "".join(traceback.format_exception(caught.value))
    assert error.facts
    assert all(f"{label}: {text}" in said for label, text in error.facts.items())
    assert f"hint: {error.hint}" in said
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.what, again.facts, again.hint) == (str(error), error.what, error.facts, error.hint)


def exported() -> Iterator[tuple[str, str]]:
    """Name and module of everything that `__init__` shows type checkers."""
    tree = ast.parse((ROOT / "llava_weights/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name
            yield alias.name, str(node.module)


def test_type_checkers_and_python_see_the_same_names() -> None:
    found = list(exported())
    assert sorted(name for name, _ in found) == lw.__all__ == dir(lw)
    assert all(getattr(lw, name) is getattr(__import__(f"llava_weights.{module}", fromlist=[name]), name) for name, module in found)


ENGINE = {"LazyTensor": {"rows_into", "leaves"}}  # how a tensor is made, from parts that a user doesn't meet


def classes_in(hint: Any) -> Iterator[type]:
    """The package's own classes in a type, however deep."""
    if isinstance(hint, type) and hint.__module__.startswith("llava_weights"):
        yield hint
    for part in typing.get_args(hint):
        for one in part if isinstance(part, list) else [part]:
            yield from classes_in(one)


def hints_of(found: Any) -> Iterator[Any]:
    """What a public function takes and returns; the types of a class's public attributes, and what its public methods take and return."""
    if not isinstance(found, type):
        yield from typing.get_type_hints(found).values()
        return
    yield from (hint for name, hint in typing.get_type_hints(found).items() if not name.startswith("_"))
    for name, member in vars(found).items():
        own = name == "__init__" and not is_dataclass(found)
        if own or not (name.startswith("_") or name in ENGINE.get(found.__name__, ())):
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(function):
                yield from typing.get_type_hints(function).values()


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_everything_that_the_public_takes_or_returns_is_exported(name: str) -> None:
    used = {found for hint in hints_of(getattr(lw, name)) for found in classes_in(hint)}
    assert {found.__name__ for found in used} <= set(lw.__all__)
    assert all(getattr(lw, found.__name__) is found for found in used)


def test_everything_that_is_raised_is_exported() -> None:
    raised = {name for function in FUNCTIONS for name in re.findall(r"\b[A-Z]\w+Error\b", getattr(lw, function).__doc__ or "")}
    assert raised <= set(lw.__all__)
    assert {error.__name__ for error in lw.LlavaWeightsError.__subclasses__()} <= set(lw.__all__)


def test_no_public_parameter_is_of_any_type_and_all_are_documented() -> None:
    """`**options: Any` would take every misspelt option."""
    for name in FUNCTIONS:
        parameters = inspect.signature(getattr(lw, name)).parameters
        assert all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()), name
        assert Any not in typing.get_type_hints(getattr(lw, name)).values(), name
        undocumented = [given for given in parameters if f"`{given}`" not in getattr(lw, name).__doc__]
        assert undocumented == [], name


def test_docstrings_are_for_users() -> None:
    """No notes of the authors, no modules that a user can't import from, no name without a docstring."""
    modules = {path.stem for path in (ROOT / "llava_weights").rglob("*.py")} - set(lw.__all__)
    for name in (*FUNCTIONS, *CLASSES):
        texts = [getattr(lw, name).__doc__ or ""]
        if isinstance(getattr(lw, name), type):
            public = [member for key, member in vars(getattr(lw, name)).items() if not key.startswith("_")]
            texts += [member.__doc__ or "" for member in public if isinstance(member, property | classmethod) or inspect.isfunction(member)]
        for text in texts:
            assert text, name
            assert "facts:" not in text.lower(), name
            assert not re.search(r"\w+/\w+\.py", text), name
            assert not {found for found in re.findall(r"\b(\w+)\.py\b", text)} & modules, name
            assert not re.match(rf"{name}\(", text), f"{name} has only the docstring that dataclasses make"


SCRIPT = """
from pathlib import Path

import llava_weights as lw

merged = lw.apply_delta("llama-13b", lw.open_checkpoint("delta"))
reveal_type(merged)
reveal_type(lw.merge_lora(merged, ["lora@0.5", ("other", 0.5), lw.open_adapter(Path("third"))]))
reveal_type(lw.convert(merged, "llava-hf", tower="clip"))
reveal_type(lw.convert_lora(lw.open_adapter("lora"), "llava-hf", base=merged))
reveal_type(lw.make_plan(merged))
with lw.ProgressBar() as bar:
    reveal_type(lw.execute(lw.make_plan(lw.make_delta("base", merged)), "out", on_event=bar))
    reveal_type(lw.execute_portion(lw.make_plan(merged), "out", lw.to_portion("1/2"), on_event=bar).portion)
reveal_type(lw.verify("out", lora="lora", base=Path("base")).findings)
reveal_type(lw.diff("a", "b").equal)
reveal_type(lw.smoke_test("a", original="b"))
reveal_type(lw.record("a", "file").probes[0].logits.shape[0])
reveal_type(lw.read_recording("file"))
reveal_type(lw.repair("out", "owner/name").files[0].fetched)
reveal_type(lw.which_base("delta", ["a", lw.record_fingerprint("b", "b.json")]).right)
reveal_type(lw.inspect("a").is_delta)
reveal_type(lw.inspect(merged).files[0].size)
reveal_type(merged.tensors["a"].shape)
told: list[lw.Event] = []
listener: lw.Listener = told.append
adapters: lw.Adapters = [(lw.open_adapter("a"), 0.5)]
try:
    lw.checksum("out", on_event=listener)
except lw.UsageError as error:
    reveal_type(error.hint)
lw.apply_delta(3, "delta")
lw.no_such_name
"""
SEEN = (
    "llava_weights.checkpoint.checkpoint.Checkpoint",
    "llava_weights.checkpoint.checkpoint.Checkpoint",
    "llava_weights.checkpoint.checkpoint.Checkpoint",
    "llava_weights.checkpoint.checkpoint.Checkpoint",
    "llava_weights.write.plan.Plan",
    "llava_weights.write.execute.Report",
    "llava_weights.write.portions.Portion",
    "tuple[llava_weights.findings.Finding, ...]",
    "bool",
    "llava_weights.smoke.logits.Smoke",
    "Any",
    "llava_weights.smoke.recording.Recording",
    "int",
    "tuple[str, ...]",
    "bool",
    "int",
    "tuple[int, ...]",
    "str | None",
)


def test_the_script_uses_every_public_function() -> None:
    used = {node.attr for node in ast.walk(ast.parse(SCRIPT)) if isinstance(node, ast.Attribute)}
    assert {*FUNCTIONS, "ProgressBar"} <= used


def test_a_users_type_checker_sees_real_types(tmp_path: Path) -> None:
    """Without the other packages' types, which take a minute to read."""
    (tmp_path / "script.py").write_text(SCRIPT)
    quick = ["--no-site-packages", "--ignore-missing-imports", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", "", *quick, "script.py"],
        cwd=tmp_path, env={"MYPYPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert tuple(text.replace("builtins.", "").replace("Union[str, None]", "str | None") for text in revealed) == SEEN, done.stdout
    errors = re.findall(r"error: (.*?)  \[(.*)\]", done.stdout)
    assert [code for _, code in errors] == ["arg-type", "attr-defined"], done.stdout


def test_importing_stays_light() -> None:
    script = "import sys, llava_weights; from llava_weights import UsageError; print(sorted(m for m in sys.modules if 'llava' in m))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "['llava_weights', 'llava_weights.errors', 'llava_weights.text']"


def test_a_recording_is_named_by_a_text_too() -> None:
    with pytest.raises(lw.InputError, match="does not exist"):
        lw.read_recording("/no/where")


def test_a_name_that_is_too_long_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(lw.LlavaWeightsError) as told:
        lw.verify("x" * 5000)
    assert told.value.hint
    with pytest.raises(lw.OutputError) as refused:
        lw.record(HUB, tmp_path / ("x" * 5000))
    assert refused.value.hint == "give a shorter name"
