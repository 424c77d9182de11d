"""Coverage-guided fuzzing of the readers: `python tests/fuzz/run.py [TARGET...] [--seconds N] [--corpus DIR] [--findings DIR]`.

One target after another, each in a process of its own, from the seeds in fixtures/fuzz. What reaches new code is kept in the
corpus, for the next campaign; an input that breaks a target ends its turn and is kept among the findings. Exit status 1: there were some.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from targets import SEEDS, TARGETS

MEMORY, SECONDS_AN_INPUT = 2048, 10  # MiB, s
MEMORY_DISK = Path("/dev/shm")
WORD = re.compile(rb'"([A-Za-z_][A-Za-z0-9_.\-]{1,40})"')


class Turn(NamedTuple):
    """What came of one target."""

    status: int
    executions: int
    coverage: int
    corpus: int
    findings: list[Path]
    log: str


def fuzz(target: str, seconds: int, corpus: Path, findings: Path) -> Turn:
    """Run libFuzzer on one target. `corpus` and `findings` are made where they are missing."""
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    before = set(findings.iterdir())
    with TemporaryDirectory(dir=MEMORY_DISK if MEMORY_DISK.is_dir() else None) as scratch:
        words = Path(scratch) / "words"
        words.write_text("# words of the seeds\n" + "".join(dictionary(SEEDS / target)))
        (place := Path(scratch) / "files").mkdir()
        options = {
            "max_total_time": seconds, "rss_limit_mb": MEMORY, "timeout": SECONDS_AN_INPUT, "print_final_stats": 1,
            "dict": words, "artifact_prefix": f"{findings}/", "max_len": longest(SEEDS / target),
        }  # fmt: skip
        arguments = [*(f"-{key}={value}" for key, value in options.items()), corpus, SEEDS / target]
        command = [sys.executable, Path(__file__).with_name("loop.py"), target, place, *arguments]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    executed, covered = (re.findall(pattern, done.stdout) for pattern in (r"number_of_executed_units: +(\d+)", r" cov: (\d+)"))
    numbers = (int(found[-1]) if found else 0 for found in (executed, covered))
    return Turn(done.returncode, *numbers, len(list(corpus.iterdir())), sorted(set(findings.iterdir()) - before), why(done.stdout))


def why(log: str) -> str:
    """The part of libFuzzer's output that says what went wrong."""
    return "\n".join(line for line in log.splitlines() if not re.match(r"INFO|WARNING|#\d|stat::", line))


def dictionary(seeds: Path) -> Iterator[str]:
    """The words of the seeds in quotes, for libFuzzer to put in as a whole."""
    for word in sorted({word.decode() for seed in seeds.iterdir() for word in WORD.findall(seed.read_bytes())}):
        yield f'"{word}"\n'


def longest(seeds: Path) -> int:
    return 2 * max(seed.stat().st_size for seed in seeds.iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"any of {', '.join(TARGETS)}; all of them by default")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz/corpus"))
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz/findings"))
    given = parser.parse_args()
    if unknown := set(given.targets) - TARGETS.keys():
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    broken = False
    for target in given.targets or TARGETS:
        turn = fuzz(target, given.seconds, given.corpus / target, given.findings / target)
        say(f"{target:20}{turn.executions:>12,} executions{turn.coverage:>8,} edges{turn.corpus:>8,} inputs kept")
        if turn.status:
            broken = True
            say(turn.log, *map(str, turn.findings))
    return int(broken)


def say(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
