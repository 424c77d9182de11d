"""The recorded logits of the original programs, and how a llava-hf model is run on the same inputs. Shared by tests and peers.

Runs under transformers 4.37 to 5.23, so it imports nothing of the package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ATOL = 5e-5  # reference README, E: "float32, atol 5e-5"


def load_model(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model in float32 with eager attention, and what `from_pretrained` says about missing and unexpected keys."""
    import transformers

    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    options = {"torch_dtype" if transformers.__version__ < "5" else "dtype": torch.float32, "attn_implementation": "eager"}
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    return model.eval(), {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys")}


def cases(reference: Path, prefix: str = "", *, tiled: bool, single: int | None = None) -> dict[str, dict[str, torch.Tensor]]:
    """By case: `input_ids` with one image token a feature, the arguments with the pixels, and the original's `logits`.

    With the image token's id as `single` there is one an image, as transformers up to 4.47 takes it and a tokenizer makes it.
    """
    inputs = load_file(reference / "inputs.safetensors")
    (logits,) = (load_file(path) for path in reference.glob("original-*.safetensors"))
    found = {}
    for key, expected in logits.items():
        if not key.endswith(".float32") or key.endswith("embeds.float32") or not key.startswith(prefix):
            continue
        case = key.removesuffix(".float32")
        ids = inputs.get(f"{case}.hf.input_ids", inputs[f"{case}.input_ids"]).view(1, -1)
        if single is not None:
            ids = one_an_image(inputs[f"{case}.input_ids"].flatten(), single).view(1, -1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits": expected.view(-1, expected.shape[-1])}
        pixels = [inputs[name] for name in sorted(inputs) if name.startswith(f"{case}.") and name.endswith("pixel_values")]
        if pixels and tiled:  # padded with zeros to the most that an image has
            tiles = [image.view(-1, *image.shape[-3:]) for image in pixels]
            most = max(map(len, tiles))
            given["pixel_values"] = torch.stack([torch.cat([t, t.new_zeros(most - len(t), *t.shape[1:])]) for t in tiles])
            given["image_sizes"] = inputs[f"{case}.hf.image_sizes"].view(-1, 2)
        elif pixels:
            given["pixel_values"] = torch.cat([image.view(-1, *image.shape[-3:]) for image in pixels])
        found[case] = given
    return found


def one_an_image(ids: torch.Tensor, image: int) -> torch.Tensor:
    """The original's ids, where -200 stands for an image or, in v0, as many `<im_patch>` in a row as it has features."""
    ids = torch.where(ids == -200, image, ids)
    again = (ids[1:] == image) & (ids[:-1] == image)
    return ids[torch.cat([again.new_ones(1), ~again])]


def worst(
    model: Any, reference: Path, prefix: str = "", *, image: tuple[int, int] | None = None, single: int | None = None
) -> dict[str, float]:
    """The largest difference to the original's logits, by case, on the original's vocabulary. `image` renames the image token's id."""
    found = {}
    for case, given in cases(reference, prefix, tiled=model.config.model_type == "llava_next", single=single).items():
        expected = given.pop("logits")
        if image:
            given["input_ids"] = torch.where(given["input_ids"] == image[0], image[1], given["input_ids"])
        with torch.inference_mode():
            ours = model(**given).logits[0]
        assert len(ours) == len(expected), case
        found[case] = float((ours[:, : expected.shape[1]] - expected).abs().max())
    return found
