"""The digests that the other tests compare with are those of bitsandbytes itself, on this machine. Run by `make peer`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PYTHON = HERE.parent.parent / ".peers/bitsandbytes/bin/python"

pytestmark = [pytest.mark.peer, pytest.mark.timeout(300)]


def test_the_recorded_digests_are_bitsandbytes_own(fixtures: Path) -> None:
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: run `make peer`, which sets it up")
    done = subprocess.run([str(PYTHON), str(HERE / "run_bitsandbytes.py")], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((fixtures / "G-bitsandbytes/digests.json").read_text())
