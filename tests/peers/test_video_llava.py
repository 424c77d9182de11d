"""A converted Video-LLaVA in several versions of transformers: every key has its place, logits are those of its parts.

Run by `make peer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peers.environments import MAIN, NEWEST, run, without_error

import llava_weights as lw
from llava_weights.cli.toy import make_llava
from llava_weights.families.originals import ORIGINALS

VERSIONS = ("4.57.6", MAIN, NEWEST)
CLOSE = 1e-6

pytestmark = [pytest.mark.peer, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each version found, and where it saved the model again, in its own names."""
    folder = tmp_path_factory.mktemp("video")
    make_llava(folder, next(row for row in ORIGINALS if row.target == "video_llava"))
    lw.execute(lw.make_plan(lw.convert(folder / "llava", "llava-hf", lossy=True)), folder / "hf")
    found: dict[str, Any] = {"": folder / "hf"}
    for version in VERSIONS:
        job = {"folder": str(folder / "hf"), "original": str(folder / "llava"), "save": str(folder / version)}
        found[version] = without_error(run(version, "video_llava", {"it": job}, folder)["it"]) | {"saved": folder / version}
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_keys_and_logits(seen: dict[str, Any], version: str) -> None:
    found = seen[version]
    assert found["keys"] == {"missing_keys": [], "unexpected_keys": []}
    for kind in ("image", "video"):
        assert found[kind] <= CLOSE
        assert found[f"{kind} seen"] > 1000 * CLOSE  # by which the other tower changes them


@pytest.mark.parametrize("version", VERSIONS)
def test_its_processor_makes_what_the_model_takes(seen: dict[str, Any], version: str) -> None:
    found = seen[version]
    if "processor" not in found:
        pytest.skip("the video processor needs torchvision, which is not installed")
    assert (found["processor"], found["image processor"]) == ("VideoLlavaProcessor", "VideoLlavaImageProcessor")
    for kind, shape in (("image", [1, 3, 28, 28]), ("video", [1, 3, 3, 28, 28])):
        assert found[f"{kind} shape"] == shape
        assert found[f"{kind} finite"]
        assert f"USER: <{kind}>\nWhere? ASSISTANT:" in found[f"{kind} prompt"]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_it_saves_comes_back_with_every_value_of_its_config(seen: dict[str, Any], version: str) -> None:
    made, saved = lw.open_checkpoint(seen[""]), seen[version]["saved"]
    for name, file in made.files.items():
        if not (saved / name).exists():
            (saved / name).write_bytes(file.read_bytes() if isinstance(file, Path) else file)
    again, config = lw.convert(saved, "llava-hf"), json.loads((saved / "config.json").read_text())
    assert set(again.tensors) == set(made.tensors)
    del config["transformers_version"]
    assert {key: again.config[key] for key in config if key not in ("text_config", "vision_config")} == {
        key: value for key, value in config.items() if key not in ("text_config", "vision_config")
    }
