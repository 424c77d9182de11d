"""The commands of docs/signing.md, run as they stand there with a local key, and what they catch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = re.findall(r"^\$ (.+)$", (ROOT / "docs/signing.md").read_text(), re.M)

pytestmark = pytest.mark.faults


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    names = {"python": sys.executable, "llava-weights": f"{sys.executable} -m llava_weights"}
    first, rest = command.split(" ", 1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(f"{names.get(first, first)} {rest}", shell=True, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of ours, signed by every command of the page."""
    folder = tmp_path_factory.mktemp("signed")
    if shutil.which("openssl") is None:
        pytest.skip("there is no `openssl`")
    if (missing := run("python -m model_signing --help", folder)).returncode:
        pytest.skip(f"model-signing does not run here: {missing.stderr.strip().splitlines()[-1]}")
    inputs = ROOT / "fixtures/A-delta-v0"
    make = f"llava-weights apply-delta --base {inputs}/base-hf-bin --delta {inputs}/delta-307-apr17 -o llava --max-shard-size 60kB"
    assert run(make, folder).returncode == 0
    for command in COMMANDS:
        done = run(command, folder)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return folder


def verified(folder: Path, signature: str) -> bool:
    """Whether the page's own command accepts what lies there."""
    (command,) = (command for command in COMMANDS if " verify key " in command and f" {signature} " in command)
    return run(command, folder).returncode == 0


CHANGES = {
    "a byte of a weight": lambda at: flip(at / "model-00002-of-00004.safetensors"),
    "a byte of the manifest": lambda at: flip(at / "llava-weights.manifest.json"),
    "a file is gone": lambda at: (at / "config.json").unlink(),
    "a file more": lambda at: (at / "modeling_evil.py").write_text("import os"),
    "weights and digests, rewritten together": lambda at: rewrite(at),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def rewrite(at: Path) -> None:
    flip(at / "model-00002-of-00004.safetensors")
    assert run(f"llava-weights checksum {at} --force", at.parent).returncode == 0
    assert run(f"llava-weights verify {at} --deep", at.parent).returncode == 0, "digests alone can't see this"


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_signature_catches(signed: Path, tmp_path: Path, change: str) -> None:
    shutil.copytree(signed, tmp_path, dirs_exist_ok=True)
    assert verified(tmp_path, "llava.sig")
    CHANGES[change](tmp_path / "llava")
    assert not verified(tmp_path, "llava.sig")


def test_another_key_did_not_sign(signed: Path, tmp_path: Path) -> None:
    shutil.copytree(signed, tmp_path, dirs_exist_ok=True)
    for command in COMMANDS[:3]:  # another pair of the same name, and its public half
        if command.startswith("openssl"):
            assert run(command, tmp_path).returncode == 0
    assert not verified(tmp_path, "llava.sig")


def test_a_signed_manifest_catches_a_changed_weight(signed: Path, tmp_path: Path) -> None:
    shutil.copytree(signed, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path / "llava")
    assert verified(tmp_path, "manifest.sig")
    (against,) = (command for command in COMMANDS if "--against" in command)
    assert run(against, tmp_path).returncode == 4
