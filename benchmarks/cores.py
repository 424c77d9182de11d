"""How apply-delta grows with the processors, where the disk is no limit: measured on this machine's, predicted for more of them.

    python -m benchmarks.cores [--folder /dev/shm/bench] [--gigabytes 1] [--rounds 3]

Inputs and output lie in memory. The processor time of each phase is measured once, on one processor; from it alone follows what is
predicted: starting takes as long on any number, everything else is shared out evenly, and each shard in flight has one thread that takes
its file's digest. A prediction for a disk adds that its bytes pass at its rate.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.cases import ROOT, fastchat, llava_weights
from benchmarks.growth import narrowed
from benchmarks.inputs import SIZES
from benchmarks.synthetic import cut_to, write_base, write_bin, write_delta
from llava_weights import apply_delta, make_plan
from llava_weights.write.plan import USUAL_MEMORY, Settings

PHASES = ROOT / "benchmarks" / "phases.py"
WORKERS = ("reading inputs", "looking for zeros", "arithmetic", "writing", "checksums of kept windows")
FILE_DIGEST, STARTING, IMPORTING = "sha256 of files, XXH3", "starting, planning", "importing torch"
SHARDS = 8
TRUE_GIGABYTES, TRUE_SHARDS = 26.0, 6  # a 13B in shards of 5 GB
BYTES = 4  # that pass the disk for each of the output: two read, one written, one read back
MORE, DISK = (4, 8, 16), 6.0  # processors, GB/s


@dataclass(frozen=True)
class Rates:
    """Of runs on one processor: seconds to start and to import torch, for which the workers wait, and processor seconds per GB of output,
    of all, of what the workers of a shard do, and of its file's digest."""

    start: float
    all: float
    workers: float
    file_digest: float

    def wall(self, gigabytes: float, cores: int, settings: Settings, disk: float = float("inf")) -> float:
        """The predicted seconds."""
        shares = self.all / cores, self.workers / settings.jobs, self.file_digest / settings.in_flight, BYTES / disk
        return self.start + gigabytes * max(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/bench"), help="in memory; seven times the gigabytes")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    try:
        for text in report(given.folder, given.gigabytes, given.rounds):
            print(text, flush=True)
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


def report(folder: Path, gigabytes: float, rounds: int) -> Iterator[str]:
    """The tables, as Markdown."""
    base, delta, out = folder / "base", folder / "delta", folder / "out"
    size, limit = cut_to(gigabytes, narrowed(SIZES["13B"], 2)), int(1.05e9 * gigabytes / SHARDS)
    write_base(base, size, limit=limit)
    write_delta(delta, size, added=0, vision=0, limit=limit)
    options = ["--base", str(base), "--delta", str(delta), "--max-shard-size", f"{limit}B"]
    command = llava_weights("apply-delta", *options, "-o", out / "result")
    phased = [sys.executable, "-P", str(PHASES), str(out / "result"), "apply-delta", *options]
    runs = [json.loads(run(phased, out, 1)[1].splitlines()[-1]) for _ in range(rounds)]
    made = runs[0]["bytes"] / 1e9
    phases = {name: statistics.median(one["phases"][name] for one in runs) for name in runs[0]["phases"]}
    steady = {name: spent / made for name, spent in phases.items() if name not in (STARTING, IMPORTING)}
    rates = Rates(
        statistics.median(one["start"] + one["phases"][IMPORTING] for one in runs),
        sum(steady.values()),
        sum(steady[name] for name in WORKERS),
        steady[FILE_DIGEST],
    )
    settings = {cores: settings_of(base, delta, limit, cores) for cores in (1, 2, *MORE)}
    yield from [f"{made:.2f} GB in {SHARDS} shards, one processor, medians of {rounds}:", "", "| phase | CPU s per GB |", "|---|---|"]
    yield from [f"| {name} | {spent:.2f} |" for name, spent in steady.items()]
    yield from [f"| {name}: once | {phases[name]:.2f} |" for name in (STARTING, IMPORTING)]
    yield from ["", "| processors | measured s | predicted s | predicted / measured |"]
    yield from ["|---|---|---|---|"]
    for cores in (1, 2):
        walls = [run(command, out, cores)[0] for _ in range(rounds)]
        measured, predicted = statistics.median(walls), rates.wall(made, cores, settings[cores])
        yield (f"| {cores} | {measured:.2f} ({min(walls):.2f}-{max(walls):.2f}) | {predicted:.2f} | {predicted / measured:.2f} |")
    write_bin(base, folder / "base-bin")
    write_bin(delta, folder / "delta-bin")
    shutil.rmtree(base)
    shutil.rmtree(delta)
    other = (*fastchat(folder / "base-bin", folder / "delta-bin", out), "--low-cpu-mem")
    one, two = (run(other, out, cores)[0] for cores in (1, 2))
    shared = max(0.0, 2 * (one - two))  # the part that two processors share evenly
    yield from ["", f"FastChat --low-cpu-mem on the same values, in memory too: {one:.1f} s on one processor, {two:.1f} s on two."]
    yield from [
        "",
        "| processors | jobs | shards in flight | llava-weights s, 26 GB | FastChat s, 26 GB | times as fast |",
        "|---|---|---|---|---|---|",
    ]
    for cores in MORE:
        chosen = replace(settings[cores], in_flight=min(TRUE_SHARDS, settings[cores].in_flight))
        ours = rates.wall(TRUE_GIGABYTES, cores, chosen, DISK)
        theirs = TRUE_GIGABYTES / made * (one - shared + shared / cores)
        yield (f"| {cores} | {chosen.jobs} | {chosen.in_flight} | {ours:.0f} | {theirs:.0f} | {theirs / ours:.0f} |")


def settings_of(base: Path, delta: Path, limit: int, cores: int) -> Settings:
    """Those of a run that may use so many processors: the most jobs that the usual memory allows."""
    plans = (make_plan(apply_delta(base, delta), max_shard_size=limit, jobs=jobs) for jobs in range(max(cores, 2), 1, -1))
    return next(plan.settings for plan in plans if plan.memory <= USUAL_MEMORY)


def run(command: Sequence[str], out: Path, cores: int) -> tuple[float, str]:
    """Seconds and standard output of a fresh process on the first `cores` processors, with `out` new."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    begun = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(out), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["taskset", "--cpu-list", ",".join(map(str, chosen)), *command], env=environment, capture_output=True, text=True, check=True
    )
    return time.perf_counter() - begun, done.stdout


if __name__ == "__main__":
    main()
