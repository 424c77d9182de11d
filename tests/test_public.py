"""The library as a user imports it: every argument is checked at once, paths serve as checkpoints, types are real, errors say all."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
import subprocess
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llava_weights as lw

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
BASE, DELTA, TUNED = (FIXTURES / "A-delta-v0" / name for name in ("base-hf-bin", "delta-307-apr17", "target-307/llava-tiny-v0"))
VICUNA, LORA = FIXTURES / "B-lora/base-vicuna-tiny", FIXTURES / "B-lora/llava-v1.5-tiny-lora"
ORIGINAL, HUB, CLIP = FIXTURES / "C-v1.5/original-no-vision-bin", FIXTURES / "C-v1.5/hf-by-tf4.47.1", FIXTURES / "common/clip-tiny-42px"
NOWHERE = Path("/no/where")  # what is wrong is told before anything is opened
lib: Any = lw  # wrong calls on purpose

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
    "convert to another layout": (lambda: lib.convert(NOWHERE, "gguf"), "llava-hf, llava"),
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
    "smoke_test within nothing": (lambda: lib.smoke_test(NOWHERE, original=NOWHERE, atol=-1), "`atol` is -1"),
    "smoke_test with a tower for nobody": (lambda: lib.smoke_test(HUB, reference=NOWHERE, tower=CLIP), "holds its own vision tower"),
    "open_checkpoint of nothing": (lambda: lib.open_checkpoint(None), "the source is of the type `NoneType`"),
    "open_checkpoint at a number": (lambda: lib.open_checkpoint(BASE, revision=3), "the revision is of the type `int`"),
    "open_adapter of nothing": (lambda: lib.open_adapter(None), "the adapter is of the type `NoneType`"),
    "open_adapter beside a number": (lambda: lib.open_adapter(LORA, non_lora=3), "the file of `non_lora` is of the type `int`"),
    "record to no path": (lambda: lib.record(HUB, None), "None is no path of a file"),
    "record on another device": (lambda: lib.record(NOWHERE, "new", device="tpu"), "cpu, cuda or cuda:N"),
    "record with a tower for nobody": (lambda: lib.record(HUB, "new", tower=CLIP), "holds its own vision tower"),
    "a portion of no plan": (lambda: lib.execute_portion(BASE, "out", lw.to_portion("1/2")), "what `make_plan`"),
    "a portion of a number": (lambda: lib.to_portion(3), "is not a portion"),
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
    assert root(lw.make_plan(str(BASE)), "h") == root(lw.make_plan(opened(BASE)), "i")


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


def test_everything_that_public_functions_take_return_and_raise_is_exported() -> None:
    def classes(hint: Any) -> Iterator[type]:
        if isinstance(hint, type) and hint.__module__.startswith("llava_weights"):
            yield hint
        for part in typing.get_args(hint):
            yield from classes(part) if not isinstance(part, list) else ()

    functions = [getattr(lw, name) for name in lw.__all__ if inspect.isfunction(getattr(lw, name))]
    used = {found for function in functions for hint in typing.get_type_hints(function).values() for found in classes(hint)}
    assert {found.__name__ for found in used} - {"Job"} <= set(lw.__all__)
    raised = {name for function in functions for name in re.findall(r"\b[A-Z]\w+Error\b", function.__doc__ or "")}
    assert raised <= set(lw.__all__)
    assert {error.__name__ for error in lw.LlavaWeightsError.__subclasses__()} <= set(lw.__all__)


SCRIPT = """
import llava_weights as lw

merged = lw.apply_delta("llama-13b", lw.open_checkpoint("delta"))
reveal_type(merged)
reveal_type(lw.merge_lora(merged, ["lora@0.5", ("other", 0.5)]))
reveal_type(lw.convert(merged, "llava-hf", tower="clip"))
reveal_type(lw.make_plan(merged))
reveal_type(lw.execute(lw.make_plan(merged), "out"))
reveal_type(lw.verify("out").findings)
reveal_type(lw.diff("a", "b").equal)
reveal_type(lw.smoke_test("a", original="b"))
reveal_type(merged.tensors["a"].shape)
try:
    lw.checksum("out")
except lw.UsageError as error:
    reveal_type(error.hint)
lw.apply_delta(3, "delta")
lw.no_such_name
"""
SEEN = (
    "llava_weights.checkpoint.checkpoint.Checkpoint",
    "llava_weights.checkpoint.checkpoint.Checkpoint",
    "llava_weights.checkpoint.checkpoint.Checkpoint",
    "llava_weights.write.plan.Plan",
    "llava_weights.write.execute.Report",
    "tuple[llava_weights.findings.Finding, ...]",
    "bool",
    "llava_weights.smoke.logits.Smoke",
    "tuple[int, ...]",
    "str | None",
)


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
