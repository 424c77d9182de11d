"""What is measured against what: a table. To add a case, add a row."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from benchmarks.inputs import Inputs

ROOT = Path(__file__).resolve().parent.parent
OTHERS = (sys.executable, str(ROOT / "benchmarks" / "others.py"))
Command = tuple[str, ...]


@dataclass(frozen=True)
class Contender:
    """One way to do a case's job. The first of a case is llava-weights, to which the others are compared."""

    name: str
    commands: tuple[Command, ...]
    slow: bool = False  # runs in some of the rounds only
    warm: bool = False  # runs from a warm cache too


@dataclass(frozen=True)
class Case:
    """One job: `reads` names the inputs that are dropped from the cache before a run, or read into it."""

    name: str
    title: str
    reads: tuple[str, ...]
    contenders: tuple[Contender, ...]


def make_cases(inputs: Inputs, out: Path) -> list[Case]:
    """All cases, on inputs that need not be there yet; every output lies in `out`."""
    base, delta, plain, lora, llava, hub, clip = (inputs / x for x in ("base", "delta", "plain", "lora", "llava", "llava-hf", "clip"))
    return [
        Case(
            "apply-delta",
            "LLaMA + LLaVA's delta",
            ("base", "delta"),
            (
                *llava_weights_pair(out, "apply-delta", "--base", base, "--delta", delta),
                Contender("`cp` base, `cat` delta", (shell(copy(base, out), f"cat {files(delta)} > /dev/null"),), warm=True),
                limit(out, direct(base, out), direct(delta)),
                Contender("`safe_open`, add, `save_file`", ((*OTHERS, "add", f"{base}", f"{delta}", f"{out}/result"),), slow=True),
            ),
        ),
        Case(
            "apply-delta-plain",
            "LLaMA + a delta of the same shapes, as Vicuna's",
            ("base", "plain", "base-bin", "plain-bin", "recipe"),
            (
                replace(llava_weights_pair(out, "apply-delta", "--base", base, "--delta", plain)[0], slow=True, warm=False),
                Contender("LLaVA's algorithm, transformers", ((*OTHERS, "llava", f"{base}", f"{plain}", f"{out}/result"),), slow=True),
                Contender("FastChat 0.2.36", (fastchat(base, plain, out),), slow=True),
                Contender(
                    "FastChat 0.2.36 --low-cpu-mem",
                    ((*fastchat(inputs / "base-bin", inputs / "plain-bin", out), "--low-cpu-mem"),),
                    slow=True,
                ),
                Contender("mergekit 0.1.5, linear", (mergekit(inputs / "recipe", out),), slow=True),
            ),
        ),
        Case(
            "merge-lora",
            f"LLaMA + LoRA of rank {inputs.rank} on all projections",
            ("base", "lora"),
            (
                *llava_weights_pair(out, "merge-lora", "--base", base, "--lora", lora),
                Contender("`cp` base, `cat` adapter", (shell(copy(base, out), f"cat {files(lora)} > /dev/null"),), warm=True),
                limit(out, direct(base, out), direct(lora)),
                Contender("PEFT, merge and save", ((*OTHERS, "peft", f"{base}", f"{lora}", f"{out}/result"),), slow=True),
            ),
        ),
        Case(
            "convert-rename",
            "llava-hf to llava-hf: names only",
            ("llava-hf",),
            (
                *llava_weights_pair(out, "convert", hub),
                Contender("`cp`", (shell(copy(hub, out)),), warm=True),
                Contender("`cp`, `sync`, `cat` of the output", (shell(copy(hub, out), "sync", f"cat {files(out)} > /dev/null"),)),
                limit(out, direct(hub, out)),
                Contender("`safe_open`, `save_file`", ((*OTHERS, "rename", f"{hub}", f"{out}/result"),), slow=True),
            ),
        ),
        Case(
            "convert-rows",
            "original layout to llava-hf: names and new vocabulary rows",
            ("llava",),
            (
                *llava_weights_pair(out, "convert", llava),
                Contender("`cp`", (shell(copy(llava, out)),), warm=True),
                limit(out, direct(llava, out)),
            ),
        ),
        Case(
            "verify-deep",
            "every byte against the recorded digests, NaN and inf",
            ("llava-hf",),
            (
                Contender("llava-weights", (llava_weights("verify", hub, "--deep"),), warm=True),
                Contender("`sha256sum -c`", (shell(f"cd {quote(str(hub))}", "sha256sum --quiet -c SHA256SUMS"),), warm=True),
                Contender("`cat` > /dev/null", (shell(f"cat {files(hub)} > /dev/null"),), warm=True),
                Contender("`dd`, O_DIRECT: the limit", (shell(direct(hub)),)),
            ),
        ),
        Case(
            "one-pass",
            "LLaMA + delta + LoRA to llava-hf: one command, or three with folders between",
            ("base", "delta", "lora", "clip"),
            (
                replace(
                    llava_weights_pair(out, "convert", base, "--delta", delta, "--lora", lora, "--vision-tower", clip, "--accept-tower")[0],
                    slow=True,
                    warm=False,
                ),
                Contender("llava-weights, three steps", three_steps(base, delta, lora, clip, out), slow=True),
            ),
        ),
    ]


def llava_weights(*arguments: str | Path) -> Command:
    return (sys.executable, "-m", "llava_weights", *map(str, arguments), "-q")


def llava_weights_pair(out: Path, *arguments: str | Path) -> tuple[Contender, Contender]:
    command = llava_weights(*arguments, "-o", out / "result")
    return Contender("llava-weights", (command,), warm=True), Contender(
        "llava-weights --no-reread", ((*command, "--no-reread"),), warm=True
    )


def three_steps(base: Path, delta: Path, lora: Path, clip: Path, out: Path) -> tuple[Command, ...]:
    applied, merged = out / "applied", out / "merged"
    return (
        llava_weights("apply-delta", "--base", base, "--delta", delta, "-o", applied),
        llava_weights("merge-lora", "--base", applied, "--lora", lora, "-o", merged),
        llava_weights("convert", merged, "--vision-tower", clip, "--accept-tower", "-o", out / "result"),
    )


def fastchat(base: Path, delta: Path, out: Path) -> Command:
    names = ("--base-model-path", f"{base}", "--delta-path", f"{delta}", "--target-model-path", f"{out}/result")
    return (str(ROOT / ".peers/fschat/bin/python"), "-m", "fastchat.model.apply_delta", *names)


def mergekit(recipe: Path, out: Path) -> Command:
    return (str(ROOT / ".peers/mergekit/bin/python"), "-m", "mergekit.scripts.run_yaml", f"{recipe}/merge.yml", f"{out}/result", "--quiet")


def shell(*steps: str) -> Command:
    return ("sh", "-ec", "; ".join(steps))


def files(folder: Path) -> str:
    return f"{quote(str(folder))}/*.safetensors"


def copy(source: Path, out: Path) -> str:
    return f"cp {files(source)} {quote(str(out))}/"


def limit(out: Path, *steps: str) -> Contender:
    """What these steps take, and reading the output again."""
    return Contender("`dd`, O_DIRECT, output read again: the limit", (shell(*steps, direct(out)),))


def direct(source: Path, out: Path | None = None) -> str:
    """Every file past the page cache; without `out` only read."""
    to = f'of={quote(str(out))}/"$(basename "$f")" oflag=direct' if out else "of=/dev/null"
    return f'for f in {files(source)}; do dd if="$f" {to} bs=8M iflag=direct status=none; done'
