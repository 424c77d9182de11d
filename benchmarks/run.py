"""Measure llava-weights and everything else that does the job, on synthetic checkpoints, and write docs/benchmarks.md and its picture.

    python -m benchmarks.run                        # all cases, then the growth
    python -m benchmarks.run --only merge-lora --gigabytes 4 --pairs 7 --folder /data/bench
    python -m benchmarks.run --growth               # the growth only
    python -m benchmarks.run --quick                # tiny sizes, one round: does everything run?

Figures are kept in FOLDER/figures.json, so cases can be measured one by one: the report always holds the latest of each. The
machine has to be quiet and FOLDER on the disk that is meant. Nothing of the page cache but the inputs is touched.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.cases import ROOT, Case, Contender, make_cases
from benchmarks.growth import grow
from benchmarks.inputs import SIZES, Inputs, inputs_of
from benchmarks.measure import Failed, measure
from benchmarks.picture import draw
from benchmarks.report import earlier_part, render, spread

TRIAL_GIGABYTES = 0.08
Contenders = list[tuple[int, Contender]]


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    inputs, out = inputs_of(given.folder / given.width, given.gigabytes, given.width), given.folder / "out"
    names = [case.name for case in make_cases(inputs, out)] if not given.growth else []
    for name in given.only or names:
        run_case(name, inputs, out, given)
    if given.growth or not given.only:
        say(f"growth up to {4 * given.gigabytes:g} GB")
        rows = []
        for row in grow(given.folder / "growth", out, given.gigabytes, given.width):
            say(f"  {row['axis']}, {row['command']}: {row['gigabytes']:.2f} GB, {row['run']['wall']:.2f} s")
            rows.append(row)
        keep(given, "growth", {"rows": rows})
    shutil.rmtree(out, ignore_errors=True)
    write_report(given)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "bench", help="on the disk that is meant; some 12 times the gigabytes, with what a run writes"
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the base model; the growth goes up to 4 times that")
    parser.add_argument("--width", default="13B", choices=list(SIZES), help="shapes of the tensors; layers are left out to fit the size")
    parser.add_argument("--pairs", type=int, default=5, help="rounds from a cold cache")
    parser.add_argument("--slow-pairs", type=int, default=3, help="rounds of the slow programs, and of the warm cache")
    parser.add_argument(
        "--only", action="append", metavar="CASE", choices=[c.name for c in make_cases(inputs_of(Path(), 2, "13B"), Path())]
    )
    parser.add_argument("--growth", action="store_true", help="only how time and memory grow")
    parser.add_argument("--quick", action="store_true", help="0.1 GB, one round, report in FOLDER")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "benchmarks.md", help="where to write; the .svg lies beside it")
    given = parser.parse_args(arguments)
    if given.quick:
        given.folder, given.gigabytes, given.width, given.pairs, given.slow_pairs = given.folder / "quick", 0.1, "tiny", 1, 1
        given.report = given.folder / "benchmarks.md"
    given.folder = given.folder.resolve()
    return given


def run_case(name: str, inputs: Inputs, out: Path, given: argparse.Namespace) -> None:
    """Try every contender on tiny inputs, which warms its libraries and tells what cannot run; then the rounds."""
    tiny = inputs_of(given.folder / "trial", TRIAL_GIGABYTES, "tiny")
    not_run = dict(trial(find(name, tiny, out), tiny, out))
    case = find(name, inputs, out)
    say(f"{name}: {case.title}")
    inputs.prepare(case.reads)
    size = sum(path.stat().st_size for folder in case.reads for path in (inputs / folder).rglob("*") if path.is_file())
    facts: dict[str, Any] = {"name": name, "title": case.title, "gigabytes": given.gigabytes, "width": given.width, "bytes": size}
    cold = [(given.slow_pairs if c.slow else given.pairs, c) for c in case.contenders]
    warm = [(given.slow_pairs, c) for c in case.contenders if c.warm]
    facts["cold"] = rounds(case, cold, inputs, out, not_run, warm=False)
    facts["warm"] = rounds(case, warm, inputs, out, not_run, warm=True) if warm else {}
    keep(given, "cases", {name: {**facts, "not_run": not_run}})


def find(name: str, inputs: Inputs, out: Path) -> Case:
    return next(case for case in make_cases(inputs, out) if case.name == name)


def trial(case: Case, tiny: Inputs, out: Path) -> Iterator[tuple[str, str]]:
    """(contender, reason) of each that fails."""
    tiny.prepare(case.reads)
    for contender in case.contenders:
        try:
            measure(contender.commands, [], out)
        except (Failed, OSError) as error:
            give_up(case, contender, error)
            yield contender.name, str(error)


def give_up(case: Case, contender: Contender, error: Exception) -> None:
    """Others that fail are listed; without the first of a case there is nothing to compare with."""
    if contender is case.contenders[0]:
        raise SystemExit(f"{case.name}: llava-weights failed: {error}")
    say(f"  not run: {contender.name}: {error}")


def rounds(case: Case, contenders: Contenders, inputs: Inputs, out: Path, not_run: dict[str, str], *, warm: bool) -> dict[str, Any]:
    """Runs by contender and round. Each round begins with the next contender, and every other one runs backwards: what ran before
    decides what the page cache costs. One that fails is named in `not_run` and left out."""
    runs: dict[str, dict[str, Any]] = {contender.name: {} for _, contender in contenders}
    reads = [inputs / name for name in case.reads]
    for number in range(max(count for count, _ in contenders)):
        turn = number % len(contenders)
        for count, contender in (*contenders[turn:], *contenders[:turn])[:: -1 if number % 2 else 1]:
            if number >= count or contender.name in not_run:
                continue
            try:
                runs[contender.name][str(number)] = asdict(measure(contender.commands, reads, out, warm=warm))
            except (Failed, OSError) as error:
                give_up(case, contender, error)
                not_run[contender.name] = str(error)
    for name, done in runs.items():
        if done:
            say(f"  {'warm' if warm else 'cold'}, {name}: {spread([run['wall'] for run in done.values()])} s")
    return {name: done for name, done in runs.items() if done}


def keep(given: argparse.Namespace, key: str, values: dict[str, Any]) -> None:
    """Put new figures among those in figures.json, which is replaced at once."""
    figures = kept(given.folder)
    figures[key] |= values
    figures["machine"] = describe(given.folder)
    path = given.folder / "figures.json"
    path.with_suffix(".new").write_text(json.dumps(figures, indent=1))
    path.with_suffix(".new").replace(path)


def kept(folder: Path) -> dict[str, Any]:
    path = folder / "figures.json"
    return json.loads(path.read_text()) if path.exists() else {"machine": {}, "cases": {}, "growth": {}}


def write_report(given: argparse.Namespace) -> None:
    figures, picture = kept(given.folder), given.report.with_suffix(".svg")
    given.report.parent.mkdir(parents=True, exist_ok=True)
    given.report.write_text(render(figures, picture.name, earlier_part(given.report)))
    picture.write_text(draw(figures))
    say(f"written: {given.report}, {picture}")


def describe(folder: Path) -> dict[str, str]:
    """What the figures depend on."""
    cpu = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(words[1], words[2]) for words in mounts if folder.is_relative_to(words[1])]
    return {
        "processor": f"{cpu[0] if cpu else platform.machine()}, {os.cpu_count()} logical",
        "memory": f"{memory:.0f} GB",
        "file system": max(above, key=lambda mount: len(mount[0]))[1],
        "system": f"{platform.system()} {platform.release().partition('-')[0]}, Python {platform.python_version()}",
        "libraries": ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers", "peft", "safetensors")),
        "date": time.strftime("%Y-%m-%d"),
    }


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
