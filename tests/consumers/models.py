"""What the consumers are given: small LLaVAs in every layout that this project writes, and a picture and a prompt for them.

256 wide, with a CLIP of 336 pixels as the published models have: programs for serving refuse heads of other widths, and take the number of
features of an image for granted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image

import llava_weights as lw
from llava_weights.cli import toy
from llava_weights.families.originals import ORIGINALS

TEXT = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
TOWER = {
    "hidden_size": 128,
    "image_size": 336,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "patch_size": 14,
}
# Spread of matrices, and mean and spread of norms: with those of published models so small a toy repeats one token, whatever the picture.
WEIGHT, NORMS = 0.1, (1.0, 0.1)
GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
PIXELS = {"crop_size": TOWER["image_size"], "do_center_crop": True, "do_normalize": True, "do_resize": True}  # as CLIP's repository says
FAMILIES = {"v1.5": "LLaVA v1.5 and v1.6", "v1.6": "LLaVA v1.5 and v1.6, images in tiles", "v1": "LLaVA v1"}
FORMS = ("identity", "relu", "gelu")  # of the single matrix that v1 has as its projector


@contextmanager
def sizes() -> Iterator[None]:
    with patch.multiple(toy, TEXT_SIZES=TEXT, TOWER_SIZES=TOWER, GRIDS=GRIDS, WEIGHT=WEIGHT, NORM_VALUES=NORMS):
        yield


def make_models(folder: Path) -> None:
    """In `folder`: `original-*` and `*-hf` of v1.5, v1.6 and v1, `back-v1.5` and `back-v1.6` made from `*-hf`, `gguf-*`, and `picture.png`.

    Float32 throughout, so that a difference is the program's and no rounding of weights.
    """
    for name, title in FAMILIES.items():
        family = next(row for row in ORIGINALS if row.name == title and "llama" in row.decoders and "clip" in row.towers)
        with sizes():
            toy.make_llava(folder / name, replace(family, says={**family.says, "max_position_embeddings": (4096,)}))
        settings = folder / name / "tower" / "preprocessor_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), **PIXELS}))
    for name in ("v1.5", "v1.6"):
        made(lw.convert(folder / name / "llava", "llava-hf", dtype="F32"), folder / f"{name}-hf")
        made(lw.convert(folder / f"{name}-hf", "llava"), folder / f"{name}-back")
        made(lw.convert(folder / f"{name}-hf", "gguf", dtype="F32"), folder / f"{name}-gguf", name)
    for form in FORMS:
        made(lw.convert(folder / "v1" / "llava", "llava-hf", dtype="F32", projector_form=form), folder / f"v1-{form}-hf")
    made(lw.convert(folder / "v1" / "llava", "gguf", dtype="F32"), folder / "v1-gguf", "v1")
    picture(folder / "picture.png", 336, 336)
    picture(folder / "wide.png", 500, 300)


def made(checkpoint: lw.Checkpoint, out: Path, name: str | None = None) -> None:
    lw.execute(lw.make_plan(checkpoint, name=name) if name else lw.make_plan(checkpoint), out)


def picture(path: Path, width: int, height: int) -> None:
    """Without symmetry in x, y or colour, and smooth, so that two ways of resizing it differ little."""
    y, x = np.mgrid[:height, :width] / 60.0
    colours = [np.sin(x + 0.3 * y), np.sin(0.7 * y + 1), np.cos(0.5 * x - y)]
    Image.fromarray((127.5 + 127.5 * np.stack(colours, axis=-1)).astype(np.uint8)).save(path)


if __name__ == "__main__":
    import sys

    make_models(Path(sys.argv[1]))
