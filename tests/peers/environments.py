"""The environments of other versions of transformers, which `make peer` sets up, and how a script is run in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_weights.families.targets import TARGETS

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent.parent / ".peers"
MAIN = "main"  # transformers of the environment that runs the tests, 5.17 or later
NEWEST = max((row.tested for row in TARGETS), key=lambda version: tuple(map(int, version.split("."))))
Json = dict[str, Any]


def folder_of(version: str) -> Path:
    """The environment of a version of transformers, or of another program by its name."""
    return PEERS / (f"transformers-{version}" if version[:1].isdigit() else version)


def run(version: str, task: str, jobs: Json, folder: Path, script: str = "run_transformers.py") -> Json:
    """What `script` prints for these jobs in the environment of that version."""
    python = Path(sys.executable) if version == MAIN else folder_of(version) / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} is missing: run `make peer`, which sets it up")
    path = folder / f"{task}-{version}.json"
    path.write_text(json.dumps(jobs))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [str(python), str(HERE / script), task, str(path)]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: Json = json.loads(done.stdout.splitlines()[-1])
    return found


def without_error(found: Json) -> Json:
    assert "error" not in found, found["error"]
    return found
