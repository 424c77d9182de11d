"""How a script in a consumer's own environment is told what to do, and answers. It imports nothing that such an environment may lack."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def answer(tasks: Mapping[str, Callable[[Json, Json], Json]], packages: Sequence[str]) -> None:
    """`python SCRIPT TASK FILE`: run one of `tasks` on each job of the file, and write, as the last line, what it found or its error.

    A job is a model (`folder`), a `prompt`, the `question` in it and a `picture`. What is found: `ids` of the prompt, the `tokens` that are
    the most likely ones behind it and their `logprobs`, the `logits` from which the first is chosen, the `text` of the tokens: whichever
    the program gives away.
    """
    task, given = tasks[sys.argv[1]], json.loads(Path(sys.argv[2]).read_text())
    found: Json = {}
    for name, job in given["jobs"].items():
        try:
            found[name] = task(job, given)
        except Exception as error:  # which the table shows
            traceback.print_exc()
            text = str(error).strip() or type(error).__name__
            found[name] = {"error": f"{type(error).__name__}: {text}"[:2000]}
    sys.stdout.write(json.dumps({"versions": {name: _version(name) for name in packages}, "found": found}) + "\n")


def _version(name: str) -> str:
    """Of a package, or of a module that was put there without one."""
    try:
        return version(name)
    except PackageNotFoundError:
        found: str = import_module(name).__version__
        return found
