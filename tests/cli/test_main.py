"""The command line as a user meets it: exit codes, texts, and, in a process of its own, signals and broken streams."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from benchmarks.synthetic import write_pair
from llava_weights.families.prompts import CONVERSATIONS

ROOT = Path(__file__).resolve().parents[2]
Cli = Callable[..., Any]


@pytest.fixture
def inputs(fixtures: Path) -> list[str]:
    folder = fixtures / "A-delta-v0"
    return ["--base", str(folder / "base-hf-bin"), "--delta", str(folder / "delta-307-apr17")]


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_apply_delta_end_to_end(process: Cli, inputs: list[str], fixtures: Path, tmp_path: Path) -> None:
    before = content(fixtures / "A-delta-v0")
    code, out, err = process("apply-delta", *inputs, "-o", "llava")
    assert (code, out) == (0, "")
    assert "add     21 tensors; embed_tokens and lm_head grow from 304 to 307 rows" in err
    assert "Wrote llava: 1 shard" in err
    expected = load_file(fixtures / "A-delta-v0/expected-307-by-main/model.safetensors")
    assert all(bool((tensor == expected[name]).all()) for name, tensor in load_file(tmp_path / "llava/model.safetensors").items())
    assert subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=tmp_path / "llava", capture_output=True).returncode == 0
    assert content(fixtures / "A-delta-v0") == before
    assert os.listdir(tmp_path) == ["llava"]


def test_output_loads_in_transformers(cli: Cli, inputs: list[str], tmp_path: Path) -> None:
    """As a plain LLaMA, since the original LLaVA classes are not part of transformers: every decoder tensor finds its place."""
    from transformers import LlamaConfig, LlamaForCausalLM

    assert cli("apply-delta", *inputs, "-o", "llava", "-q").stdout == "llava\n"
    config = json.loads((tmp_path / "llava/config.json").read_text())
    keep = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "vocab_size")
    model = LlamaForCausalLM(LlamaConfig(**{key: config[key] for key in keep}))
    weights = load_file(tmp_path / "llava/model.safetensors")
    missing, unexpected = model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    assert missing == []
    assert unexpected == ["model.mm_projector.bias", "model.mm_projector.weight"]


@pytest.mark.parametrize(
    "names",
    [
        ["--base-model-path", "--delta-path", "--target-model-path"],  # llava.model.apply_delta, fastchat.model.apply_delta
        ["--base", "--delta", "--target"],  # the short forms of LLaVA's README
        ["--base", "--delta", "--output"],
    ],
)
def test_flags_of_the_original_scripts(cli: Cli, inputs: list[str], names: list[str]) -> None:
    values = (inputs[1], inputs[3], "out")
    code, _, err = cli("apply-delta", *(word for pair in zip(names, values, strict=True) for word in pair), "--low-cpu-mem", "--dry-run")
    assert code == 0
    assert "memory is always bounded" in err


def test_dry_run_writes_nothing(cli: Cli, inputs: list[str], tmp_path: Path) -> None:
    code, out, err = cli("apply-delta", *inputs, "-o", "out", "-n", "--json")
    assert (code, err, os.listdir(tmp_path)) == (0, "", [])
    plan, summary = map(json.loads, out.splitlines())
    assert (plan["type"], summary["type"], summary["dry_run"]) == ("plan", "summary", True)
    assert plan["shards"] == [{"name": "model.safetensors", "nbytes": 172416, "tensors": 23}]


def test_several_repairs_are_counted_and_verbose_lists_them(cli: Cli, inputs: list[str]) -> None:
    folded, every = (cli("apply-delta", *inputs, "-o", "out", "-n", *more).stderr for more in ([], ["-v"]))
    (line,) = re.findall(r"^  fix .*", folded, re.MULTILINE)
    assert "8 repairs: config (4), generation_config, tokenizer_config.json (2), tokenizer.json (-v lists them)" in line
    assert len(re.findall(r"^  fix .*", every, re.MULTILINE)) == 8
    assert "dropped `_name_or_path`" in every


def test_a_dry_run_says_what_lies_there_of_an_earlier_run(cli: Cli, inputs: list[str], tmp_path: Path) -> None:
    words = ["apply-delta", *inputs, "-o", "out", "--max-shard-size", "60kB"]
    assert cli(*words, "--shards", "1/2").code == 0
    before = content(tmp_path)
    done = cli(*words, "-n")
    assert (done.code, done.stderr.splitlines()[-1]) == (0, "Nothing was written (dry run)")
    assert "`out.partial` holds 2 of 4 shards (88.8 kB), which the run would check and continue" in done.stderr
    begun = json.loads(cli(*words, "-n", "--json").stdout.splitlines()[-1])["begun"]
    assert begun == {"folder": "out.partial", "done": 2, "shards": 4, "nbytes": 88776}
    assert "(2 shards, 88.8 kB), which `--restart` would delete" in cli(*words, "-n", "--restart").stderr
    other = cli("apply-delta", *inputs, "-o", "out", "-n")  # as the run itself would end
    assert (other.code, "belongs to another command" in other.stderr) == (5, True)
    assert content(tmp_path) == before
    done = cli(*words)
    assert done.code == 0
    assert done.stderr.splitlines().index("Checking 2 shards, 88.8 kB") < done.stderr.index("Writing 4 shards")
    assert cli(*words, "-n", "--force").stderr.count("holds") == 0


@pytest.mark.parametrize("name", ["with a blank", "it's", "-begins-so"])
def test_lines_to_type_are_quoted(cli: Cli, inputs: list[str], tmp_path: Path, name: str) -> None:
    done = cli("apply-delta", *inputs, "-o", name)
    (check,) = re.findall(r"^Check: (.*)", done.stderr, re.MULTILINE)
    assert subprocess.run(["sh", "-c", check], cwd=tmp_path, capture_output=True).returncode == 0
    (load,) = re.findall(r"^Load:  (.*)", done.stderr, re.MULTILINE)
    assert load == f'llava.model.builder.load_pretrained_model("{name}", None, "llava")'


def test_the_line_that_loads_an_output(
    cli: Cli, inputs: list[str], fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of transformers and PEFT are run; those of other programs parse."""
    import peft
    import transformers

    def loads(*words: str | Path) -> str:
        done = cli(*words, "--json")
        assert done.code == 0, done.stderr
        summary = json.loads(done.stdout.splitlines()[-1])
        assert isinstance(summary["load"], str)
        return str(summary["load"])

    monkeypatch.chdir(tmp_path)
    tower, lora = fixtures / "common/clip-tiny-28px", fixtures / "B-lora/llava-v1.5-tiny-lora"
    original = fixtures / "A-delta-v0/expected-307-by-main"
    line = loads("convert", original, "--vision-tower", tower, "-o", "hf")
    assert isinstance(eval(line, {"transformers": transformers}), transformers.LlavaForConditionalGeneration)
    delta = loads("make-delta", "--base", inputs[1], "--tuned", original, "-o", "my delta")
    assert shlex.split(delta) == ["llava-weights", "apply-delta", "--base", "BASE", "--delta", "my delta", "-o", "OUT"]
    gguf = shlex.split(loads("convert", original, "--vision-tower", tower, "--to", "gguf", "-o", "g g"))
    assert gguf[0] == "llama-mtmd-cli"
    assert all((tmp_path / gguf[gguf.index(flag) + 1]).is_file() for flag in ("-m", "--mmproj"))
    line = loads("convert-lora", lora, "-o", "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(inputs[1])
    with pytest.raises(ValueError, match=r"(?s)Target modules.*not found"):  # of a LLaVA: it is read, and belongs to another model
        eval(line, {"peft": peft, "BASE": base})


def test_json_lines(cli: Cli, inputs: list[str], tmp_path: Path) -> None:
    code, out, err = cli("apply-delta", *inputs, "-o", "out", "--json", "--max-shard-size", "60kB")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [line["type"] for line in lines if line["type"] != "progress"] == ["plan", "started", *["shard"] * 4, "reading_back", "summary"]
    manifest = json.loads((tmp_path / "out/llava-weights.manifest.json").read_text())
    assert lines[-1]["root"] == manifest["root"]["tensors"]


CASES = {
    "usage": (["apply-delta", "--base", "x"], 2, "Missing option"),
    "no such option": (["apply-delta", "--bse", "x"], 2, "No such option"),
    "no such codec": (["make-delta", "--base", "{base}", "--tuned", "{base}", "-o", "o", "--codec", "xor"], 2, "no codec `xor`"),
    "size": (["apply-delta", "--base", "{base}", "--delta", "{delta}", "-o", "o", "--max-shard-size", "big"], 2, "is not a size"),
    "memory": (["apply-delta", "--base", "{base}", "--delta", "{delta}", "-o", "o", "--max-memory", "1MB"], 2, "is too small"),
    "no input": (["apply-delta", "--base", "./nowhere", "--delta", "{delta}", "-o", "o"], 3, "does not exist"),
    "swapped": (["apply-delta", "--base", "{delta}", "--delta", "{base}", "-o", "o"], 3, "base and delta are swapped"),
    "a file that is no checkpoint": (["inspect", "{base}/config.json"], 3, "is not a weight file"),
    "an empty folder": (["inspect", "{empty}"], 3, "there are no weights"),
    "output exists": (["apply-delta", "--base", "{base}", "--delta", "{delta}", "-o", "{full}"], 5, "exists and is not empty"),
    "output exists, dry": (["apply-delta", "--base", "{base}", "--delta", "{delta}", "-o", "{full}", "-n"], 5, "exists and is not empty"),
    "output in the input": (["apply-delta", "--base", "{base}", "--delta", "{delta}", "-o", "{base}/out"], 5, "lies inside an input"),
    "hub, offline": (["inspect", "some-owner/some-name"], 6, "`HF_HUB_OFFLINE` is set"),
}


@pytest.mark.parametrize("case", CASES)
def test_exit_codes_and_words(cli: Cli, fixtures: Path, tmp_path: Path, case: str) -> None:
    arguments, expected, words = CASES[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    places = {name: fixtures / "A-delta-v0" / folder for name, folder in (("base", "base-hf-bin"), ("delta", "delta-307-apr17"))}
    code, out, err = cli(*(word.format(**places, empty=tmp_path / "empty", full=tmp_path / "full") for word in arguments))
    assert (code, out) == (expected, "")
    assert words in err
    assert "Traceback" not in err
    assert content(tmp_path) == {"full/mine.txt": hashlib.sha256(b"mine").hexdigest()}
    if code in (3, 5, 6):
        assert "error: " in err
        assert "\n\nhint: " in err
        if arguments[0] == "apply-delta":
            assert err.endswith("Nothing was written\n")


def test_errors_as_json(process: Cli, fixtures: Path) -> None:
    folder = fixtures / "A-delta-v0"
    code, out, err = process("apply-delta", "--base", folder / "delta-307-apr17", "--delta", folder / "base-hf-bin", "-o", "o", "--json")
    assert code == 3
    told = json.loads(err)
    assert {"type": "error", "code": 3, "what": "base and delta are swapped"}.items() <= told.items()
    (summary,) = map(json.loads, out.splitlines())
    assert summary == {"type": "summary", "schema": 1, "exit_code": 3, "error": {key: told[key] for key in list(told)[2:]}}


def test_a_command_line_that_can_not_be_is_told_as_json_too(cli: Cli) -> None:
    for words in (
        ["apply-delta", "--bse", "x"],
        ["verify"],
        ["diff", "a", "b", "--jobs", "0"],
        ["nothing"],
        ["verify", "x", "--color", "red"],
    ):
        code, out, err = cli(*words, "--json")
        assert (code, json.loads(err)["code"]) == (2, 2)
        (summary,) = map(json.loads, out.splitlines())
        assert (summary["type"], summary["exit_code"], summary["error"]["code"]) == ("summary", 2, 2)
        assert "hint: `llava-weights" in cli(*words).stderr


def test_a_bug_before_a_command_begins_is_told_as_json_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("no")

    monkeypatch.setattr("llava_weights.cli.main.TyperGroup.main", broken)
    code, out, err = cli("env", "--json")
    assert (code, json.loads(out)["exit_code"], json.loads(err)["what"]) == (1, 1, "unexpected ZeroDivisionError: no")


def test_help_is_quick_and_imports_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['llava-weights', '--help']\n"
        "from llava_weights.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy', 'tqdm', 'zstandard', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("apply-delta", "make-delta", "inspect", "demo", "env"):
        assert command in done.stdout


def test_inspect(cli: Cli, fixtures: Path) -> None:
    folder = fixtures / "A-delta-v0"
    for name, words in {
        "delta-307-apr17": "unapplied delta of a LLaVA",
        "expected-307-by-main": "LLaVA in the original layout, 2 layers of 48",
        "base-hf-bin": "LLaMA, 2 layers of 48",
        "base-meta": "LLaMA in Meta's layout, 2 layers of 48",
        "base-hf-from-meta13B-by-tf4.37.2-BF16": "values of bfloat16 precision",
        "hf-linear-projector-307": "LLaVA in the llava-hf layout",
    }.items():
        code, out, err = cli("inspect", folder / name)
        assert (code, err) == (0, ""), name
        assert words in out, name
    code, out, _ = cli("inspect", folder / "delta-308-may4", "--json", "--tensors")
    document = json.loads(out)
    assert document["tensors"]["lm_head.weight"] == {"dtype": "F16", "shape": [308, 48]}
    assert document["layout"] == "llava"


def test_demo_and_env_and_version(process: Cli) -> None:
    assert process("--version").stdout == "llava-weights 0.2.0.dev0\n"
    assert "torch" in process("env").stdout


def test_merge_lora(cli: Cli, fixtures: Path, tmp_path: Path) -> None:
    folder = fixtures / "B-lora"
    base, lora = folder / "base-vicuna-tiny", folder / "llava-v1.5-tiny-lora"
    original = ["--model-base", base, "--model-path", lora, "--save-model-path", "out"]  # llava's merge_lora_weights.py
    code, _, err = cli("merge-lora", *original, "--arithmetic", "peft-half")
    assert code == 0, err
    assert "merge    14 modules" in err
    assert "of the update survived rounding" in err
    expected = load_file(folder / "merged-of-llava-v1.5-tiny-lora-by-main-peft0.10.0/model.safetensors")
    assert all(bool((tensor == expected[name]).all()) for name, tensor in load_file(tmp_path / "out/model.safetensors").items())
    for arguments, expected_code, words in (
        (["--base", base, "--lora", lora, "--arithmetic", "fast"], 2, "no arithmetic `fast`"),
        (["--base", base, "--lora", fixtures / "F-peft/not-lora-loha/adapter"], 3, "LoHa"),
        (["--base", base, "--lora", base], 3, "there is no adapter in"),
        (["--base", base, "--lora", fixtures / "F-peft/plain/adapter"], 3, "does not fit"),
        (["--base", lora, "--lora", lora], 3, "not in the base"),
    ):
        code, _, err = cli("merge-lora", *arguments, "-o", "refused")
        assert (code, words in err, (tmp_path / "refused").exists()) == (expected_code, True, False), err


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llava_weights", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair that takes a moment to write: 16 MB of random values in LLaMA's shapes."""
    from llava_weights.families.decoders import Size

    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder, Size("small", 384, 4, 8, 1024), vocabulary=1000, seed=6)
    return folder


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGHUP, 129)]
)
def test_a_signal_stops_cleanly(pair: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    arguments = ["apply-delta", "--base", str(pair / "base"), "--delta", str(pair / "delta"), "--max-shard-size", "3MB", "-o", "out"]
    with start(arguments, tmp_path) as process:
        assert process.stderr
        seen = next(line for line in process.stderr if ": 1 of " in line)
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == code, seen + rest
    assert "Stopped" in rest
    assert "Run the same command to continue" in rest
    assert "Traceback" not in rest
    assert not (tmp_path / "out").exists()
    left = {path.suffix for path in (tmp_path / "out.partial/out").glob(".*")}
    assert left <= {".part", ".windows"}  # of the shard in hand, which goes on there
    with start(arguments, tmp_path) as again:
        _, err = again.communicate()
    assert again.returncode == 0
    assert "are finished from an earlier run" in err
    assert not list((tmp_path / "out").glob(".*"))


def test_a_signal_ends_json_with_a_summary(pair: Path, tmp_path: Path) -> None:
    arguments = [
        "apply-delta",
        "--base",
        str(pair / "base"),
        "--delta",
        str(pair / "delta"),
        "--max-shard-size",
        "3MB",
        "-o",
        "out",
        "--json",
    ]
    with start(arguments, tmp_path) as process:
        assert process.stdout
        next(line for line in process.stdout if '"shard"' in line)
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 143
    summary = json.loads(rest.splitlines()[-1])
    assert (summary["type"], summary["exit_code"], summary["error"]["what"]) == ("summary", 143, "stopped")


def test_under_nohup_a_terminal_that_closes_changes_nothing(pair: Path, tmp_path: Path) -> None:
    """nohup starts its program with SIGHUP ignored, which stays so."""
    arguments = ["apply-delta", "--base", str(pair / "base"), "--delta", str(pair / "delta"), "--max-shard-size", "3MB", "-o", "out"]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(arguments, tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        assert process.stderr
        next(line for line in process.stderr if ": 1 of " in line)
        process.send_signal(signal.SIGHUP)
        process.stderr.read()
    assert process.returncode == 0
    assert (tmp_path / "out/SHA256SUMS").exists()


def test_memory_stays_below_the_plans_promise(process: Cli, pair: Path) -> None:
    code, out, _ = process("apply-delta", "--base", pair / "base", "--delta", pair / "delta", "-o", "out", "--json", "-j", "2")
    plan, summary = (json.loads(out.splitlines()[line]) for line in (0, -1))
    assert code == 0
    assert 100 << 20 < summary["peak_memory"] <= plan["memory"] <= 400 << 20


def test_a_limit_on_file_size_is_an_output_error(pair: Path, tmp_path: Path) -> None:
    arguments = ["apply-delta", "--base", str(pair / "base"), "--delta", str(pair / "delta"), "-o", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "llava_weights", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 5
    assert "can't write `model.safetensors`: File too large" in done.stderr
    assert "0 of 1 shards are kept in `out.partial`; `out` was not touched" in done.stderr


def test_stdout_closed_early_does_not_fail_the_job(inputs: list[str], tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "llava_weights", "apply-delta", *inputs, "-o", "out", "--json"]
    with subprocess.Popen(arguments, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.close()
    assert process.returncode == 0
    assert (tmp_path / "out/SHA256SUMS").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_choices(shell: str) -> None:
    """By the variables with which a shell asks, typer's own protocol."""
    for flag, begun, words in (("--conv-mode", "bun", {"bunny", "bunny_llama"}), ("--to", "ll", {"llava-hf", "llava"})):
        typed = f"llava-weights convert llava {flag} {begun}"
        asked = {
            "_LLAVA_WEIGHTS_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": typed,
            "COMP_CWORD": "4",
            "_TYPER_COMPLETE_ARGS": typed,
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
        code = "import sys; from llava_weights.cli.main import main; sys.argv = ['llava-weights']; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **asked}, capture_output=True, text=True, check=True
        )
        assert set(re.findall(rf"\b{begun}[\w-]*", done.stdout)) == words
        assert "vicuna_v1" not in done.stdout


def test_help_lists_conversations(cli: Cli) -> None:
    for command in ("convert", "merge-lora", "apply-delta"):
        assert re.search(rf"{next(iter(CONVERSATIONS))},\s", shown := cli(command, "--help").stdout)
        assert all(re.search(rf"\b{name}\b", shown) for name in CONVERSATIONS)
