"""Older versions of transformers read the same processor files as the same settings. Run by `make peer`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llava_weights.checkpoint.chat_template import QUESTION, chat_template, example
from llava_weights.checkpoint.processor import processor_files, read_image_settings
from llava_weights.families.prompts import CONVERSATIONS
from llava_weights.families.targets import TARGETS
from llava_weights.families.towers import TOWERS

PEERS = Path(__file__).resolve().parent.parent.parent / ".peers"
PINPOINTS = [[336, 672], [672, 336], [336, 1008]]  # height, width
KEYS = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor", "do_pad", "image_grid_pinpoints")
IMAGE = "<image>"

# Prints what AutoProcessor made of each folder, with the number of image tokens (id 304) for one square picture.
READER = """
import json, sys
import numpy
from transformers import AutoProcessor

found = {}
for folder, size in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    processor = AutoProcessor.from_pretrained(folder)
    images = processor.image_processor
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "QUESTION"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    read = processor(images=numpy.zeros((size, size, 3), dtype=numpy.uint8), text=prompt)
    found[folder] = {
        "processor": type(processor).__name__, "image_processor": type(images).__name__.removesuffix("Fast"), "prompt": prompt,
        "tokens": list(read["input_ids"][0]).count(304), **{key: getattr(images, key, None) for key in KEYS},
    }
print(json.dumps(found))
"""

pytestmark = pytest.mark.peer


def read_by(version: str, folders: dict[Path, int]) -> dict[str, Any]:
    """What a version of transformers reads from each folder, whose images have so many pixels on a side."""
    python = PEERS / f"transformers-{version}" / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} is missing: run `make peer`, which sets it up")
    reader = READER.replace("KEYS", repr(KEYS)).replace("QUESTION", QUESTION)
    command = [str(python), "-c", reader, *(str(part) for pair in folders.items() for part in pair)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write(folder: Path, fixtures: Path, *, size: int, strategy: str, aspect: str, tiles: bool, siglip: bool) -> Path:
    """A llava-hf folder without weights, its tokenizer the reference's."""
    shutil.copytree(fixtures / "C-v1.5" / "hf-by-tf4.47.1", folder, ignore=shutil.ignore_patterns("*.safetensors", "p*.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_next" if tiles else "llava", "image_token_index": 304}))
    files = processor_files(
        read_image_settings(None, size=size, patch=14, tower=TOWERS[siglip]),
        target=TARGETS[tiles],
        image_token=IMAGE,
        select_strategy=strategy,
        aspect=aspect,
        pinpoints=PINPOINTS if tiles else None,
        template=chat_template(CONVERSATIONS["llava_v1"], IMAGE),
    )
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("version", ["4.45.2", "4.47.1", "4.57.6"])
def test_older_transformers_read_the_files(version: str, fixtures: Path, tmp_path: Path) -> None:
    # 4.45 counts a class token for every tower; LlavaImageProcessor came with 4.49.
    expected = {
        write(tmp_path / "clip", fixtures, size=336, strategy="default", aspect="square", tiles=False, siglip=False): 576,
        write(tmp_path / "full", fixtures, size=336, strategy="full", aspect="square", tiles=False, siglip=False): 577,
        write(tmp_path / "next", fixtures, size=336, strategy="default", aspect="square", tiles=True, siglip=False): 576 + 24 * 25,
        write(tmp_path / "siglip", fixtures, size=384, strategy="full", aspect="square", tiles=False, siglip=True): 730
        if version == "4.45.2"
        else 729,
    }
    if version == "4.57.6":
        expected[write(tmp_path / "pad", fixtures, size=336, strategy="default", aspect="pad", tiles=False, siglip=False)] = 576
    found = read_by(version, {folder: 384 if folder.name == "siglip" else 336 for folder in expected})
    for folder, tokens in expected.items():
        read = found[str(folder)]
        assert read["tokens"] == tokens, folder.name
        assert read["prompt"] == example(CONVERSATIONS["llava_v1"], IMAGE)
        written = json.loads((folder / "preprocessor_config.json").read_bytes())
        assert (read["processor"], read["image_processor"]) == (written["processor_class"], written["image_processor_type"])
        assert {key: read[key] for key in KEYS if key in written} == {key: written[key] for key in KEYS if key in written}
