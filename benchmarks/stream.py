"""Alternated pairs of runs: ours against what else would do the job, on synthetic checkpoints with true shapes.

    python benchmarks/stream.py                    # apply-delta against cp, merge-lora against PEFT, 1.5 GB, 5 pairs
    python benchmarks/stream.py --gigabytes 4 --pairs 7 --folder /data/bench

Each figure is of whole processes: wall and CPU seconds, peak resident memory. The page cache is dropped for the inputs before
each run. Ratios are taken pair by pair; the machine may be busy, so read the medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from synthetic import LLAMA_SIZES, Size, cut_to, write_llava, write_lora, write_pair

OURS = [sys.executable, "-m", "llava_weights"]
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def measure(command: list[str], inputs: list[Path], out: Path) -> tuple[float, float, float]:
    """(wall s, CPU s, peak MiB) of one run from a cold cache; the output is deleted before."""
    shutil.rmtree(out, ignore_errors=True)
    for path in (file for folder in inputs for file in folder.iterdir()):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    os.sync()
    before, begun, peak = os.times(), time.perf_counter(), [0]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        watcher = threading.Thread(target=watch, args=(process, peak))
        watcher.start()
        assert process.stderr
        errors = process.stderr.read()
    wall, after = time.perf_counter() - begun, os.times()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command[:4]} failed:\n{errors[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu, peak[0] / 1024


def watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    """The highest VmHWM seen, in KiB: it never falls, so the last reading before the end counts."""
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return
        peak[0] = max(peak[0], *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
        time.sleep(0.02)


def compare(title: str, ours: list[str], other: list[str], inputs: list[Path], out: Path, pairs: int) -> None:
    """One warm-up each, then `pairs` alternated runs; prints medians and the ratios other / ours."""
    runs: dict[str, list[tuple[float, float, float]]] = {"ours": [], "other": []}
    for number in range(pairs + 1):
        for name, command in (("ours", ours), ("other", other)):
            figures = measure(command, inputs, out)
            if number:
                runs[name].append(figures)
    print(f"\n### {title} ({pairs} pairs)\n\n| | wall s | CPU s | peak MiB |\n|---|---|---|---|")
    for name, rows in runs.items():
        print(f"| {name} | " + " | ".join(spread([row[i] for row in rows]) for i in range(3)) + " |")
    ratios = [[b[i] / max(a[i], 1e-9) for a, b in zip(runs["ours"], runs["other"], strict=True)] for i in range(3)]
    print("| other / ours | " + " | ".join(spread(ratio) for ratio in ratios) + " |", flush=True)


def convert(title: str, original: Path, out: Path, pairs: int, size: Size) -> None:
    """The original layout to llava-hf, and llava-hf to llava-hf, which only renames; against `cp` of the same files."""
    hub = original.with_name("llava-hf")
    write_llava(original, size)
    subprocess.run([*OURS, "convert", f"{original}", "-o", f"{hub}", "-q"], check=True)
    for text, source in ((title, original), ("convert, renames only", hub)):
        copy = ["sh", "-c", f"mkdir {out}; cp {source}/*.safetensors {out}/"]
        for options in ([], ["--no-reread"]):
            ours = [*OURS, "convert", f"{source}", "-o", f"{out}", "-q", *options]
            compare(f"{' '.join([text, *options])}, against `cp`", ours, copy, [source], out, pairs)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench"))
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", choices=["apply-delta", "merge-lora", "convert"])
    given = parser.parse_args()
    size = cut_to(given.gigabytes, LLAMA_SIZES[1])
    base, delta, lora, out = (given.folder / name for name in ("base", "delta", "lora", "out"))
    if given.only != "convert":
        write_pair(given.folder, size)
        write_lora(lora, size, given.rank)
    cases: dict[str, Callable[[], None]] = {
        "apply-delta": lambda: compare(
            "apply-delta against `cp base out; cat delta`",
            [*OURS, "apply-delta", "--base", f"{base}", "--delta", f"{delta}", "-o", f"{out}", "-q"],
            ["sh", "-c", f"mkdir {out}; cp {base}/*.safetensors {out}/; cat {delta}/*.safetensors > /dev/null"],
            [base, delta],
            out,
            given.pairs,
        ),
        "merge-lora": lambda: compare(
            f"merge-lora, rank {given.rank} on all projections, against PEFT's merge_and_unload and save_pretrained",
            [*OURS, "merge-lora", "--base", f"{base}", "--lora", f"{lora}", "-o", f"{out}", "-q"],
            [sys.executable, "-c", PEFT, f"{base}", f"{lora}", f"{out}"],
            [base, lora],
            out,
            given.pairs,
        ),
    }
    cases |= {
        "convert": lambda: convert(
            f"convert to llava-hf, {given.gigabytes} GB, new vocabulary rows", given.folder / "llava", out, given.pairs, size
        ),
    }
    for name, case in cases.items():
        if given.only in (None, name):
            case()
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
