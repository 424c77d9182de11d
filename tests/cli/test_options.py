"""Every option of every command: giving it changes what can be observed, or is refused. A new option without a case fails here."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from llava_weights.checkpoint import checkpoint
from llava_weights.cli.main import app
from llava_weights.errors import InputError

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
BASE, DELTA = FIXTURES / "A-delta-v0/base-hf-bin", FIXTURES / "A-delta-v0/delta-307-apr17"
WRONG_BASE = FIXTURES / "A-delta-v0/base-hf-from-meta13B-by-tf4.37.2-BF16"
LLAVA, TUNED = FIXTURES / "A-delta-v0/expected-307-by-main", FIXTURES / "A-delta-v0/target-307/llava-tiny-v0"
CLIP, CLIP_42 = FIXTURES / "common/clip-tiny-28px", FIXTURES / "common/clip-tiny-42px"
TWO_LAYERS, TILED, HUB = FIXTURES / "C-v1.5/original-no-vision-bin", FIXTURES / "D-v1.6/original-vicuna", FIXTURES / "C-v1.5/hf-by-tf4.47.1"
VICUNA, LORA = FIXTURES / "B-lora/base-vicuna-tiny", FIXTURES / "B-lora/llava-v1.5-tiny-lora"
IMAGE = next((FIXTURES / "common/images").glob("*.png"))

CONTEXTS = {
    "apply": f"apply-delta --base {BASE} --delta {DELTA} -o out",
    "apply on another base": f"apply-delta --base {WRONG_BASE} --delta {DELTA} -o out -n",
    "apply from the Hub": f"apply-delta --base {BASE} --delta owner/name -o out -n",
    "apply, plan": f"apply-delta --base {BASE} --delta {DELTA} -o out -n --json",
    "apply a LoRA": f"apply-delta --base {BASE} --delta {DELTA} --lora {LORA} -o out -n --json",
    "apply to llava-hf": f"apply-delta --base {BASE} --delta {DELTA} -o out -n --json --to llava-hf --vision-tower {CLIP}",
    "make": f"make-delta --base {BASE} --tuned {TUNED} -o out",
    "make, plan": f"make-delta --base {BASE} --tuned {TUNED} -o out -n --json",
    "merge": f"merge-lora --base {VICUNA} --lora {LORA} -o out",
    "merge, plan": f"merge-lora --base {VICUNA} --lora {LORA} -o out -n --json",
    "merge from the Hub": f"merge-lora --base owner/name --lora {LORA} -o out -n",
    "merge to llava-hf": f"merge-lora --base {VICUNA} --lora {LORA} -o out -n --json --to llava-hf --vision-tower {CLIP}",
    "rename": f"convert-lora {LORA} -o out",
    "rename, plan": f"convert-lora {LORA} -o out -n --json",
    "convert": f"convert {LLAVA} --vision-tower {CLIP} -o out",
    "convert, plan": f"convert {LLAVA} --vision-tower {CLIP} -o out -n --json",
    "convert a base": f"convert {BASE} --vision-tower {CLIP} -o out -n --json",
    "convert another base": f"convert {WRONG_BASE} --delta {DELTA} --vision-tower {CLIP} -o out -n --json",
    "convert a LoRA": f"convert {VICUNA} --lora {LORA} --vision-tower {CLIP} -o out -n --json",
    "convert two layers": f"convert {TWO_LAYERS} --vision-tower {CLIP_42} -o out -n --json",
    "convert tiles": f"convert {TILED} -o out -n --json",
    "convert llava-hf": f"convert {HUB} -o out -n --json",
    "convert to llava": f"convert {HUB} --to llava -o out -n --json",
    "convert a blind one": f"convert {TWO_LAYERS} -o out -n --json",
    "convert from the Hub": "convert owner/name -o out -n",
    "inspect": f"inspect {LLAVA}",
    "inspect nothing": "inspect ./nowhere",
    "inspect the Hub": "inspect owner/name",
    "inspect a delta": f"inspect {DELTA}",
    "inspect a delta, among": f"inspect {DELTA} --among {BASE}",
    "inspect a base": f"inspect {BASE}",
    "inspect a base, recorded": f"inspect {BASE} --fingerprint there.svg",
    "verify": f"verify {LLAVA}",
    "verify nothing": "verify ./nowhere",
    "verify a delta": f"verify {LLAVA} --base {BASE} --delta {DELTA}",
    "verify a delta, more": f"verify {LLAVA} --base {BASE}",
    "verify a merge": f"verify {LLAVA} --base {VICUNA}",
    "verify llava-hf": f"verify {HUB} --base {TWO_LAYERS}",
    "checksum": "checksum model",
    "checksum, again": "checksum changed",
    "checksum nothing": "checksum ./nowhere",
    "repair": "repair changed --from model",
    "repair nothing": "repair ./nowhere --from model",
    "diff": f"diff {BASE} {TUNED}",
    "diff the Hub": f"diff {BASE} owner/name",
    "diff with a plot": f"diff {BASE} {TUNED} --plot there.svg",
    "diff itself": f"diff {BASE} {BASE}",
    "smoke": f"smoke {HUB}",
    "smoke the Hub": "smoke owner/name",
    "smoke nothing": "smoke ./nowhere",
    "smoke, original": f"smoke {HUB} --original {TWO_LAYERS}",
    "smoke, record": f"smoke {HUB} --record new.safetensors",
    "smoke, record again": f"smoke {HUB} --record there.svg",
    "smoke, reference": f"smoke {HUB} --reference new.safetensors",
    "smoke, prompt": f"smoke {HUB} --prompt a",
    "smoke, blind": f"smoke {TWO_LAYERS} --prompt a --image {IMAGE}",
    "demo": "demo full",
    "env": "env",
}


@dataclass(frozen=True)
class Changes:
    """Giving the option in this context leads to something else than leaving it out."""

    context: str
    words: str


@dataclass(frozen=True)
class Refused:
    """It has no effect, or no such value: exit 2, and nothing is written."""

    context: str
    words: str


@dataclass(frozen=True)
class Elsewhere:
    """What it does can't be seen from outside, or takes long: the test that shows it."""

    file: str
    test: str


MEMORY = Elsewhere("write/test_execute.py", "test_same_bytes_whatever_the_settings")
GPU = Elsewhere("smoke/test_gpu.py", "test_float32_is_the_same_as_on_the_processor")
RAY = Elsewhere("write/test_executors.py", "test_the_contract_of_an_executor_on_ray")
STRICT = Elsewhere("test_verdicts.py", "test_strict_and_allow")
ZEROS = Elsewhere("tensors/test_holes.py", "test_every_input_of_every_command")
ACCEPTED = Elsewhere("checkpoint/test_tower.py", "test_a_published_tower_that_is_not_the_named_one_is_refused")
LOSSY = Elsewhere("transforms/test_video_llava.py", "test_nothing_is_lost_without_a_word")
QUANTIZE = Elsewhere("transforms/test_gguf.py", "test_the_command")
THREADS = Elsewhere("checks/test_diff.py", "test_jobs_change_no_number_and_windows_stay_small")
Case = Changes | Refused | Elsewhere


def writing(context: str) -> dict[str, list[Case]]:
    """Those that every writing command has."""
    plan = f"{context}, plan"
    sizes = SIZES if context == "apply" else SIZES[:1]
    return {
        "--max-shard-size": [Changes(plan, "--max-shard-size 60kB"), *(Refused(plan, f"--max-shard-size {size}") for size in sizes)],
        "--max-memory": [MEMORY, *(Refused(plan, f"--max-memory {size}") for size in ("1MB", *sizes))],
        "--jobs": [Changes(plan, "--jobs 3"), Refused(plan, "--jobs 0")],
        "--dry-run": [Changes(context, "--dry-run")],
        "--force": [Changes(f"{plan} full", "--force")],
        "--restart": [Changes(context + " begun", "--restart"), Refused(context, "--restart --shards 1/2")],
        "--reread": [
            Changes(context, "--no-reread"),
            Refused(context, "--no-reread --shards 1/2"),
            Refused(context, "--no-reread --finish"),
        ],
        "--push": [Changes(context, "--push owner/name"), Refused(context, "--push owner/name --shards 1/2")],
        "--executor": [Refused(plan, "--executor slurm"), RAY],
        "--ray-address": [Refused(plan, "--ray-address auto"), RAY],
        "--shards": [Changes(context, "--shards 1/2"), Refused(plan, "--shards 3/2")],
        "--finish": [Changes(context, "--finish"), Refused(plan, "--finish --shards 1/2")],
        "--accept-values": [ZEROS],
        "--json": [Changes(context, "--json")],
        "--quiet": [Changes(context, "--quiet")],
        "--verbose": [Changes(context, "--verbose")],
    }


SIZES = ("5", "5B", "0", "9999999999TB", "1e400", "-1", "five", "9" * 400)
LAYOUT = {
    "--vision-tower": f"--vision-tower {CLIP}",
    "--projector-form": "--projector-form relu",
    "--image-token": "--image-token <picture>",
    "--vocab-size": "--vocab-size 400",
    "--conv-mode": "--conv-mode llava_v1",
    "--image-aspect": "--image-aspect pad",
}


def layout(context: str, converting: str) -> dict[str, list[Case]]:
    """The options of conversion, which need `--to`."""
    cases: dict[str, list[Case]] = {
        flag: [Refused(context, words)] + ([Changes(converting, words)] if flag != "--vision-tower" else [])
        for flag, words in LAYOUT.items()
    }
    cases["--vision-tower"] += [Changes(converting, f"--vision-tower {CLIP_42}")]
    cases["--projector-form"] = cases["--projector-form"][:1]
    cases["--accept-tower"] = [Refused(context, "--accept-tower"), ACCEPTED]
    cases["--quantize"] = [Refused(context, "--quantize Q8_0"), Refused(converting, "--quantize Q8_0"), QUANTIZE]
    cases["--lossy"] = [Refused(context, "--lossy"), LOSSY]
    return cases


MERGING = {
    "--arithmetic": "--arithmetic exact",
    "--scale": "--scale 0.5",
    "--base-quantized": "--base-quantized nf4",
    "--non-lora": "--non-lora nowhere.bin",
    "--adapter": "--adapter other",
}
CASES: dict[str, dict[str, list[Case]]] = {
    "apply-delta": {
        **writing("apply"),
        **layout("apply, plan", "apply to llava-hf"),
        "--accept-base": [Changes("apply on another base", "--accept-base")],
        "--check-inputs": [Changes("apply", "--check-inputs")],
        "--lora": [Changes("apply, plan", f"--lora {LORA}")],
        **{flag: [Refused("apply, plan", words), Changes("apply a LoRA", words)] for flag, words in MERGING.items()},
        "--to": [Changes("apply, plan", f"--to llava-hf --vision-tower {CLIP}"), Refused("apply, plan", "--to onnx")],
        "--dtype": [
            Refused("apply, plan", "--dtype F32"),
            Refused("apply, plan", "--dtype nonsense"),
            Refused("apply to llava-hf", "--dtype nonsense"),
            Changes("apply to llava-hf", "--dtype F32"),
        ],
        "--revision": [Changes("apply, plan", "--revision main"), Changes("apply from the Hub", "--revision main")],
        "--low-cpu-mem": [Changes("apply", "--low-cpu-mem")],
    },
    "make-delta": {**writing("make"), "--codec": [Changes("make, plan", "--codec integer"), Refused("make, plan", "--codec intger")]},
    "merge-lora": {
        **writing("merge"),
        **layout("merge, plan", "merge to llava-hf"),
        **{flag: [Changes("merge, plan", words)] for flag, words in MERGING.items()},
        "--dtype": [Changes("merge, plan", "--dtype F32"), Refused("merge, plan", "--dtype nonsense")],
        "--to": [Changes("merge, plan", f"--to llava-hf --vision-tower {CLIP}"), Refused("merge, plan", "--to onnx")],
        "--revision": [Changes("merge, plan", "--revision main"), Changes("merge from the Hub", "--revision main")],
    },
    "convert-lora": {
        **writing("rename"),
        "--to": [Changes("rename, plan", "--to llava"), Refused("rename, plan", "--to gguf")],
        "--base": [Changes("rename, plan", f"--base {VICUNA}")],
        "--non-lora": [Changes("rename, plan", MERGING["--non-lora"])],
        "--adapter": [Changes("rename, plan", MERGING["--adapter"])],
        "--revision": [Changes("rename, plan", "--revision main")],
    },
    "convert": {
        **writing("convert"),
        **{flag: [Changes("convert, plan", words)] for flag, words in LAYOUT.items()},
        **{flag: [Refused("convert, plan", words), Changes("convert a LoRA", words)] for flag, words in MERGING.items()},
        "--vision-tower": [
            Changes("convert a blind one", f"--vision-tower {CLIP_42}"),
            Changes("convert llava-hf", f"--vision-tower {CLIP_42}"),
            Changes("convert to llava", "--vision-tower some/name"),
            Changes("convert to llava", f"--vision-tower {CLIP_42}"),
        ],
        "--projector-form": [
            Changes("convert, plan", "--projector-form relu"),
            Refused("convert two layers", "--projector-form relu"),
            Refused("convert, plan", "--projector-form tanh"),
            Refused("convert to llava", "--projector-form relu"),
        ],
        "--image-token": [Changes("convert, plan", "--image-token <picture>"), Refused("convert to llava", "--image-token <picture>")],
        "--vocab-size": [Changes("convert, plan", "--vocab-size 400"), Refused("convert to llava", "--vocab-size 400")],
        "--conv-mode": [Changes("convert llava-hf", "--conv-mode llava_v0"), Changes("convert to llava", "--conv-mode llava_v1")],
        "--image-aspect": [
            Changes("convert, plan", "--image-aspect pad"),
            Refused("convert tiles", "--image-aspect pad"),
            Refused("convert, plan", "--image-aspect wide"),
        ],
        "--accept-tower": [Refused("convert llava-hf", "--accept-tower"), ACCEPTED],
        "--quantize": [Refused("convert, plan", "--quantize Q8_0"), Refused("convert to llava", "--quantize Q8_0"), QUANTIZE],
        "--lossy": [Refused("convert llava-hf", "--lossy"), Refused("convert to llava", "--lossy"), LOSSY],
        "--to": [Changes("convert, plan", "--to llava"), Refused("convert, plan", "--to onnx")],
        "--delta": [Changes("convert a base", f"--delta {DELTA}")],
        "--accept-base": [Changes("convert another base", "--accept-base"), Refused("convert, plan", "--accept-base")],
        "--lora": [Changes("convert, plan", f"--lora {LORA}")],
        "--dtype": [Changes("convert, plan", "--dtype F32"), Refused("convert, plan", "--dtype nonsense")],
        "--revision": [Changes("convert, plan", "--revision main"), Changes("convert from the Hub", "--revision main")],
    },
    "inspect": {
        "--tensors": [Changes("inspect", "--tensors")],
        "--revision": [Changes("inspect", "--revision main"), Changes("inspect the Hub", "--revision main")],
        "--among": [Changes("inspect a delta", f"--among {BASE}"), Refused("inspect a delta", f"--among {BASE} --tensors")],
        "others": [Changes("inspect a delta, among", f"{TUNED}"), Refused("inspect a delta", f"{BASE}")],
        "--fingerprint": [
            Changes("inspect a base", "--fingerprint new.json"),
            Refused("inspect a base", "--tensors --fingerprint new.json"),
        ],
        "--force": [Changes("inspect a base, recorded", "--force"), Refused("inspect", "--force")],
        "--json": [Changes("inspect", "--json")],
        "--quiet": [Changes("inspect the Hub", "--quiet")],
        "--verbose": [Changes("inspect nothing", "--verbose")],
    },
    "verify": {
        "--against": [Changes("verify", f"--against {BASE}"), Refused("verify", f"--against {BASE} --published")],
        "--deep": [Changes("verify", "--deep")],
        "--part": [Changes("verify", "--deep --part 1/2"), Refused("verify", "--part 1/2"), Refused("verify", "--deep --part 3/2")],
        "--published": [Changes("verify", "--published")],
        "--base": [Changes("verify", f"--base {TUNED}")],
        "--delta": [Changes("verify a delta, more", f"--delta {DELTA}"), Refused("verify", f"--delta {DELTA}")],
        "--lora": [
            Changes("verify a merge", f"--lora {LORA}"),
            Refused("verify", f"--lora {LORA}"),
            Refused("verify", f"--published --delta {DELTA} --lora {LORA}"),
        ],
        "--vision-tower": [
            Changes("verify llava-hf", f"--vision-tower {CLIP_42}"),
            Refused("verify", f"--vision-tower {CLIP}"),
            Refused("verify a delta", f"--vision-tower {CLIP}"),
            Refused("verify", f"--published --delta {DELTA} --vision-tower {CLIP}"),
        ],
        "--accept-tower": [
            Refused("verify", "--accept-tower"),
            Refused("verify", f"--against {BASE} --vision-tower {CLIP} --accept-tower"),
            ACCEPTED,
        ],
        "--strict": [STRICT],
        "--allow": [STRICT, Refused("verify", "--allow weight-files"), Refused("verify", "--strict --allow no-such-rule")],
        "--jobs": [Refused("verify", "--jobs 0"), THREADS],
        "--junit": [Changes("verify", "--junit new.xml"), Refused("verify", "--junit new.xml --summary new.xml")],
        "--summary": [Changes("verify", "--summary new.md")],
        "--force": [Refused("verify", "--force"), Changes("verify, report there", "--force")],
        "--json": [Changes("verify", "--json")],
        "--quiet": [Elsewhere("cli/test_console.py", "test_quiet_prints_the_path_alone")],
        "--verbose": [Changes("verify nothing", "--verbose")],
    },
    "checksum": {
        "--force": [Changes("checksum, again", "--force")],
        "--jobs": [Refused("checksum", "--jobs 0"), THREADS],
        "--json": [Changes("checksum", "--json")],
        "--quiet": [Elsewhere("cli/test_console.py", "test_quiet_prints_the_path_alone")],
        "--verbose": [Changes("checksum nothing", "--verbose")],
    },
    "repair": {
        "--dry-run": [Changes("repair", "--dry-run")],
        "--jobs": [Refused("repair", "--jobs 0"), THREADS],
        "--json": [Changes("repair", "--json")],
        "--quiet": [Changes("repair", "--quiet")],
        "--verbose": [Changes("repair nothing", "--verbose")],
    },
    "diff": {
        "--tolerance": [Changes("diff", "--tolerance 100"), Refused("diff", "--tolerance nan")],
        "--plot": [Changes("diff", "--plot new.svg")],
        "--force": [Changes("diff with a plot", "--force"), Refused("diff", "--force")],
        "--limit": [Changes("diff", "--limit 1"), Refused("diff", "--limit 1 --json")],
        "--jobs": [Refused("diff", "--jobs 0"), THREADS],
        "--json": [Changes("diff itself", "--json")],
        "--quiet": [Changes("diff the Hub", "--quiet")],
        "--verbose": [Changes("diff the Hub", "--verbose")],
    },
    "smoke": {
        "--reference": [
            Changes("smoke", "--reference new.safetensors"),
            Refused("smoke, prompt", "--reference new.safetensors"),
            Refused("smoke, record", "--reference new.safetensors"),
        ],
        "--original": [Changes("smoke", f"--original {TWO_LAYERS}"), Refused("smoke, prompt", f"--original {TWO_LAYERS}")],
        "--record": [Changes("smoke", "--record new.safetensors"), Refused("smoke, prompt", "--record new.safetensors")],
        "--prompt": [Changes("smoke", "--prompt a"), Refused("smoke, original", "--prompt a")],
        "--chat": [Changes("smoke, prompt", "--chat"), Refused("smoke", "--chat")],
        "--image": [Changes("smoke, prompt", f"--image {IMAGE}"), Refused("smoke", f"--image {IMAGE}")],
        "--vision-tower": [
            Changes("smoke, blind", f"--vision-tower {CLIP_42}"),
            Changes("smoke, original", f"--vision-tower {CLIP_42}"),
            Refused("smoke", f"--vision-tower {CLIP_42}"),
            Refused("smoke, prompt", f"--vision-tower {CLIP_42}"),
            Refused("smoke, record", f"--vision-tower {CLIP_42}"),
        ],
        "--device": [Refused("smoke", "--device tpu"), Refused("smoke", "--device cuda:99"), GPU],
        "--dtype": [Changes("smoke", "--dtype BF16"), Refused("smoke", "--dtype F8")],
        "--resident": [Elsewhere("smoke/test_forward.py", "test_resident_reads_once_and_gives_the_same_bits")],
        "--atol": [Changes("smoke, original", "--atol 0.5"), Refused("smoke", "--atol 1"), Refused("smoke, record", "--atol 1")],
        "--quantize": [
            Changes("smoke", "--quantize 8bit"),
            Changes("smoke, original", "--quantize 8bit"),
            Refused("smoke, prompt", "--quantize 8bit"),
            Refused("smoke", "--quantize 3bit"),
        ],
        "--accept-tower": [Refused("smoke", "--accept-tower"), ACCEPTED],
        "--force": [Changes("smoke, record again", "--force"), Refused("smoke", "--force")],
        "--junit": [Changes("smoke", "--junit new.xml"), Refused("smoke, record", "--junit new.xml")],
        "--summary": [Changes("smoke", "--summary new.md"), Refused("smoke, record", "--summary new.md")],
        "--json": [Changes("smoke", "--json")],
        "--quiet": [Changes("smoke the Hub", "--quiet")],
        "--verbose": [Changes("smoke nothing", "--verbose")],
    },
    "demo": {
        "folder": [Elsewhere("cli/test_demo.py", "test_a_user_sees_the_whole_way")],
        "--quiet": [Elsewhere("cli/test_demo.py", "test_quiet_says_the_path_alone_and_a_failure_in_full")],
        "--verbose": [Changes("demo", "--verbose")],
    },
    "env": {"--json": [Changes("env", "--json")]},
}
COLORS = Elsewhere("cli/test_console.py", "test_colour_and_bar")
PROGRESS = Elsewhere("cli/test_console.py", "test_no_progress")
for options in CASES.values():
    if "--json" in options and "--verbose" in options:
        options |= {"--color": [COLORS], "--no-progress": [PROGRESS]}
CONTEXTS["verify, report there"] = f"verify {LLAVA} --junit there.svg"
ALL = [(command, option, case) for command, options in CASES.items() for option, cases in options.items() for case in cases]


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def flags(command: Any) -> list[str]:
    """Each option that may be left out by its first long flag, each argument by its name."""
    optional = [parameter for parameter in command.params if not parameter.required and parameter.name != "help"]
    return [next((flag for flag in one.opts if flag.startswith("--")), one.opts[0]) for one in optional]


def test_every_option_of_every_command_has_a_case() -> None:
    assert {name: sorted(flags(command)) for name, command in commands().items()} == {name: sorted(CASES[name]) for name in commands()}
    assert all(cases for options in CASES.values() for cases in options.values())


def test_every_test_that_is_named_exists() -> None:
    named = {(case.file, case.test) for _, _, case in ALL if isinstance(case, Elsewhere)}
    assert [one for one in named if f"def {one[1]}(" not in (Path(__file__).parents[1] / one[0]).read_text()] == []


def test_what_is_required_can_not_be_left_out() -> None:
    for name, command in commands().items():
        if any(parameter.required for parameter in command.params):
            assert CliRunner().invoke(app, [name]).exit_code == 2


def observed(folder: Path, context: str, more: str) -> tuple[int, str, dict[str, str]]:
    """The exit code, what was printed without times and sizes that depend on the moment, and the files that are there."""
    for name in ("model", "changed"):
        shutil.copytree(BASE, folder / name)
    (folder / "changed/SHA256SUMS").write_text(f"{'0' * 64}  config.json\n")
    for name in ("there.svg", "full/mine.txt", *(["out/mine.txt"] if context.endswith(" full") else [])):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    words = CONTEXTS[context.removesuffix(" full").removesuffix(" begun")].split()
    with contextlib.chdir(folder):
        if context.endswith(" begun"):
            assert CliRunner().invoke(app, [*words, "--shards", "1/2", "--max-shard-size", "60kB"]).exit_code == 0
        done = CliRunner().invoke(app, [*words, *more.split()])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    output = re.sub(r"\S+ free\)|in [\d.,]+ \w+ \(.*?\)|\"(seconds|peak_memory|changed)\": [\d.]+", "", done.output)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    digests = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return done.exit_code, output, digests


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[int, str, dict[str, str]]]:
    """What a context leads to without the option, once a module."""
    return cache(lambda context: observed(tmp_path_factory.mktemp("without"), context, ""))


@pytest.fixture(scope="module", autouse=True)
def _the_hub() -> Iterator[None]:
    """Says what it was asked for, and has nothing."""

    def fetch(source: Any, *, revision: str | None = None, progress: bool | None = None) -> Any:
        raise InputError(f"asked for revision {revision}, bars {progress}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "fetch", fetch)
        patch.delenv("GITHUB_STEP_SUMMARY", raising=False)
        yield


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{name} {case.words[:30]} ({case.context})") for name, _, case in ALL if not isinstance(case, Elsewhere)],
)
def test_an_option_has_its_effect_or_is_refused(case: Changes | Refused, without: Any, tmp_path: Path) -> None:
    before, found = without(case.context), observed(tmp_path, case.context, case.words)
    assert found[0] != 1, found[1]
    assert before[0] not in (1, 2), before[1]
    if isinstance(case, Changes):
        assert found[0] != 2, found[1]
        assert found != before
    else:
        assert found[0] == 2, found[1]
