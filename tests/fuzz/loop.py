"""One target under libFuzzer, which ends this process: `python tests/fuzz/loop.py TARGET FOLDER LIBFUZZER-ARGUMENTS`."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["llava_weights"]):
    from targets import TARGETS, attempt


def main() -> None:
    name, folder, *arguments = sys.argv[1:]
    target, scratch = TARGETS[name], Path(folder)
    atheris.Setup([sys.argv[0], *arguments], lambda data: attempt(target, data, scratch) and None)
    atheris.Fuzz()


main()
