"""Every command and every line of Python in the README runs, on small checkpoints under the names that the README uses."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llava_weights.cli.main import app
from llava_weights.cli.toy import make_toys

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
NAMES = {  # what the documents call a checkpoint: the one of the reference set that plays its part
    "llama-13b": "A-delta-v0/base-hf-bin",
    "LLaMA/13B": "A-delta-v0/base-meta/13B",
    "mirror/llama-13b": "A-delta-v0/base-hf-bin",
    "LLaVA-13b-delta-v0": "A-delta-v0/delta-307-apr17",
    "mirror/LLaVA-13B-v0": "A-delta-v0/expected-307-by-main",
    "vicuna-13b": "B-lora/base-vicuna-tiny",
    "vicuna-7b": "B-lora/base-vicuna-tiny",
    "my-llava-lora": "B-lora/llava-v1.5-tiny-lora",
    "my-llava-qlora": "B-lora/llava-v1.5-tiny-lora",
    "another-lora": "another-lora",
    "my-v0-lora": "another-lora",
    "llama": "F-peft/base-fp16",
    "adapter-a": "F-peft/plain/adapter",
    "adapter-b": "F-peft/rslora/adapter",
    "llava-hf-base": "C-v1.5/hf-by-tf4.47.1",
    "llava-v1.5-7b": "C-v1.5/original-no-vision-bin",
    "llava-v1.6-vicuna-7b": "D-v1.6/original-vicuna",
    "clip-vit-large-patch14-336": "common/clip-tiny-42px",
    "clip-vit-large-patch14": "common/clip-tiny-28px",
    "damaged": "C-v1.5/original-no-vision-bin",
}
UNEQUAL = "llava-weights diff "  # exit code 4 says that two checkpoints differ


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(name: str) -> list[str]:
    """What a document tells to type: lines behind `$ ` in blocks of console, and whole commands in the last column of a table."""
    cells = re.findall(r"\| `(llava-weights [^`|]+)` \|$", read(name), re.MULTILINE)
    return cells + [command for command, _ in shown(name)]


def shown(name: str) -> list[tuple[str, list[str]]]:
    """Each command of the blocks of console, with the lines that are shown below it, but for those that stand for others."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^ *```console\n(.*?)^ *```", read(name), re.DOTALL | re.MULTILINE):
        for line in dedent(block).splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif line.strip() not in ("...", ""):
                found[-1][1].append(line)
    return found


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder with the documents' checkpoints, and `llava-weights` on the path."""
    put_mlx_adapter(tmp_path / "my-mlx-lora")
    for name, source in NAMES.items():
        if "/" in source:
            shutil.copytree(FIXTURES / source, tmp_path / name)
            continue
        (tmp_path / name).mkdir()  # LLaVA's adapter without its projector: any LoRA on this shape
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(FIXTURES / "B-lora/llava-v1.5-tiny-lora" / file, tmp_path / name)
    shutil.copy(FIXTURES / "A-delta-v0/base-meta/tokenizer.model", tmp_path / "LLaMA")
    put_command(tmp_path)
    with open(tmp_path / "damaged/pytorch_model-00001-of-00002.bin", "rb+") as file:
        file.truncate(1000)
    return tmp_path


def put_mlx_adapter(folder: Path) -> None:
    """An adapter of MLX for the reference llava-hf checkpoint."""
    module, tensors = "language_model.model.layers.0.self_attn.q_proj", {}
    for path in (FIXTURES / NAMES["llava-hf-base"]).glob("*.safetensors"):
        tensors |= load_file(path)
    out, inside = tensors[f"{module}.weight"].shape
    folder.mkdir()
    save_file({f"{module}.lora_a": torch.ones(inside, 1), f"{module}.lora_b": torch.ones(1, out)}, folder / "adapters.safetensors")
    settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 1, "scale": 0.01, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def put_command(folder: Path) -> None:
    """`llava-weights` in `bin`, for shells."""
    (folder / "bin").mkdir()
    (folder / "bin/llava-weights").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llava_weights "$@"\n')
    (folder / "bin/llava-weights").chmod(0o755)


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(["sh", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def run_here(command: str, folder: Path) -> tuple[int, str]:
    """Exit code and output. Our own commands run in this process, where torch is imported once; others in a shell."""
    if not re.match(r"llava-weights [^&|;]*$", command):
        done = run(command, folder)
        return done.returncode, done.stdout + done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(app, shlex.split(command)[1:])
    return result.exit_code, result.output


DOCUMENTS = ("README.md", "docs/cookbook.md", "docs/ci.md", "docs/verify.md", "docs/troubleshooting.md")
NEEDS_MODEL = ("docs/ci.md", "docs/verify.md")  # begin with what the README made
FAILS = {"LLaVA-wrong": 3, "refused": 3, "no-tower": 3, "inspect damaged": 3}  # in a command that is shown to fail: its exit code


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_runs(shelf: Path, document: str) -> None:
    """As it stands, in order, on small checkpoints. What is shown below a command is printed by it; numbers may be others, and `...` stands
    for anything."""
    ours = [command for command in commands(document) if re.search("llava-weights|sha256sum|^mkdir|^rm ", command)]
    assert len(ours) > 3
    if document in NEEDS_MODEL:
        prepare(shelf)
    below = dict(shown(document))
    done: set[str] = set()
    for command in ours:
        if command in done:
            continue
        done.add(command)
        if command == "llava-weights demo":  # tests/cli/test_demo.py
            continue
        code, output = run_here(command, shelf)
        expected = next((code for word, code in FAILS.items() if word in command), 4 if command.startswith(UNEQUAL) else 0)
        assert code == expected, f"{command}\n{output}"
        printed = [re.sub(r"\d[\d.,]*", "0", line) for line in output.splitlines()]
        for line in below.get(command, ()):
            pattern = re.escape(re.sub(r"\d[\d.,]*", "0", line)).replace(r"\.\.\.", ".*")
            assert any(re.fullmatch(pattern, each) for each in printed), f"{line}\n{output}"
    assert not (shelf / "LLaVA-wrong").exists()


def prepare(shelf: Path) -> None:
    """What the pages on checking speak of: a converted model, a merged delta, a merged adapter."""
    convert_one(shelf)
    for command in (
        "apply-delta --base llama-13b --delta LLaVA-13b-delta-v0 -o LLaVA-13B-v0",
        "merge-lora --base vicuna-7b --lora my-llava-lora -o my-llava",
    ):
        assert run_here(f"llava-weights {command} -q", shelf)[0] == 0


def test_the_makefile_converts_many_models_and_resumes(tmp_path: Path) -> None:
    """On the demo's models. One output is half done, and one delta lacks its weights at first: the other models are made all the same."""
    make_toys(tmp_path)
    put_command(tmp_path)
    first, second = "LLaVA-13b-delta-v0", "LLaVA-13b-delta-v1-1"
    for name, toy in (("llama-13b", "llama"), (first, "delta"), ("clip-vit-large-patch14", "clip")):
        (tmp_path / toy).rename(tmp_path / name)
    (tmp_path / second).mkdir()
    shutil.copy(tmp_path / first / "config.json", tmp_path / second)
    (makefile,) = re.findall(r"```make\n(.*?)```", read("docs/cookbook.md"), re.DOTALL)
    (tmp_path / "Makefile").write_text(makefile)
    options = "--max-shard-size 100kB"
    begun = f"llava-weights apply-delta --base llama-13b --delta {first} {options} -o zoo/{first} --shards 1/2"
    assert run_here(begun, tmp_path)[0] == 0
    make = f"env -u MAKEFLAGS -u MAKELEVEL make -k OPTIONS='{options}'"  # these tests may be run by make themselves

    done = run(make, tmp_path)
    assert done.returncode == 2
    assert "of them from an earlier run" in done.stderr
    assert second in done.stderr
    assert sorted(os.listdir(tmp_path / "zoo")) == [first, f"{first}-hf"]

    shutil.copytree(tmp_path / first, tmp_path / second, dirs_exist_ok=True, copy_function=shutil.copyfile)
    before = times(tmp_path / "zoo" / first) | times(tmp_path / "zoo" / f"{first}-hf")
    done = run(make, tmp_path)
    assert done.returncode == 0, done.stderr
    assert before.items() <= times(tmp_path / "zoo").items(), "what was finished is left alone"
    made = [(tmp_path / "zoo" / name / "SHA256SUMS").read_text().splitlines() for name in (first, second)]
    assert [line for line in made[0] if "safetensors" in line] == [line for line in made[1] if "safetensors" in line]
    assert run(f"{make} -q", tmp_path).returncode == 0


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def convert_one(shelf: Path) -> None:
    code, output = run_here("llava-weights convert llava-v1.5-7b --vision-tower clip-vit-large-patch14-336 -o llava-v1.5-7b-hf -q", shelf)
    assert code == 0, output


def test_the_pytest_example_runs(shelf: Path) -> None:
    convert_one(shelf)
    (block,) = re.findall(r"```python\n(.*?)```", read("docs/ci.md"), re.DOTALL)
    (shelf / "test_model.py").write_text(block)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_model.py"]
    done = subprocess.run(command, cwd=shelf, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout


def test_no_command_is_left_out() -> None:
    """What the pages tell to type is run here, but for installations (test_install.py) and what CI itself runs."""
    others = {command for name in DOCUMENTS for command in commands(name) if not re.search("llava-weights|sha256sum|^mkdir|^rm ", command)}
    assert others == {"make -n", "make -k"}  # of the cookbook's Makefile, below
    assert all(command in read(".ci/run") for command in ("make demo", "make test"))


def test_the_python_runs(shelf: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", read("docs/python.md"), re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", block], cwd=shelf, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert re.fullmatch("blake3:[0-9a-f]{64}", result.stdout.strip())


def test_the_converted_model_answers(shelf: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
    shutil.copy(FIXTURES / "common/images/wide_90x36.png", shelf / "photo.png")
    convert_one(shelf)
    result = subprocess.run([sys.executable, "-c", block], cwd=shelf, env={**os.environ}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "What is shown in this image? ASSISTANT:" in result.stdout


PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Files are there, and so are the headings that an anchor names. Nothing is asked of the network."""
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = (ROOT / page).parent / place if place else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_site() -> None:
    """mkdocs.yml names each page once; the build itself, and the links on it, are `make site`."""
    text = re.sub(r"!!python/\S+", "", read("mkdocs.yml"))  # a tag that a safe reader refuses
    places = [page for entry in yaml.safe_load(text)["nav"] for page in leaves(entry)]
    others = ("CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md", "index.md")
    assert sorted(places) == sorted([*others, *(path.name for path in (ROOT / "docs").glob("*.md"))])


def leaves(entry: dict[str, Any]) -> list[str]:
    (inside,) = entry.values()
    return [inside] if isinstance(inside, str) else [page for each in inside for page in leaves(each)]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them: lower case, punctuation gone, blanks become hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in re.findall(r"^#+ +(.+)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_reference_page_is_the_help(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "typer", "llava_weights.cli.main", "utils", "docs", "--name", "llava-weights", "--output", "cli.md"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert (tmp_path / "cli.md").read_text() == (ROOT / "docs/cli.md").read_text(), "run `make docs`"


def test_the_slurm_lines_run(shelf: Path) -> None:
    """docs/cluster.md, with stand-ins for `sbatch` and `srun` that run everything here; three portions in place of sixteen."""
    section = read("docs/cluster.md").split("## Slurm")[1].split("\n## ")[0]
    script, submit = (block.replace("16", "3").replace("1GB", "60kB") for block in re.findall(r"```bash\n(.*?)```", section, re.DOTALL))
    (shelf / "portions.sbatch").write_text(script)
    portions = 'for i in 1 2 3; do SLURM_ARRAY_TASK_ID=$i bash -e "$2" >&2 || exit; done; echo 7'
    sbatch = f'if [ "$1" = --parsable ]; then {portions}; else sh -c "${{@: -1}}"; fi'
    for name, line in {"sbatch": sbatch, "srun": '"$@"'}.items():
        (shelf / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
        (shelf / "bin" / name).chmod(0o755)
    done = run(f"set -e\n{submit}", shelf)
    assert done.returncode == 0, done.stderr
    assert "Portion 3/3 is finished" in done.stderr
    assert run("cd LLaVA-13B-v0 && sha256sum --quiet -c SHA256SUMS", shelf).returncode == 0
