"""What the decoder of an original LLaVA is given: embeddings of the ids, with image features in the places of images.

The rules of `prepare_inputs_labels_for_multimodal` in `llava_arch.py` (haotian-liu/LLaVA c121f04) and, for a run of
<im_patch> ids, of `LlavaLlamaModel.forward` (74f8877): written here once more, so that a conversion can be compared with
something other than transformers' own LLaVA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..text import shown

if TYPE_CHECKING:
    import torch


IMAGE_INDEX = -200  # LLaVA's IMAGE_TOKEN_INDEX: one for each image, replaced by its features

CONFIG_HINT = "give the config.json that its authors published"


@dataclass(frozen=True)
class InputEmbeddings:
    """Tower, projector and embedding table, and the config that says how their outputs are joined."""

    config: Mapping[str, Any]
    embed: Any  # ids -> embeddings
    vision: Any  # the model of the vision tower, None where there is none
    side: int  # pixels along each side of a tile
    layer: int  # the hidden state of the tower that is taken
    class_token: bool  # whether its first feature is that of a class token
    projector: Any
    newline: torch.Tensor | None  # [H]
    patch: int  # id of <im_patch>, IMAGE_INDEX where there is none

    def __call__(self, ids: torch.Tensor, pixels: torch.Tensor | None, sizes: np.ndarray | None) -> torch.Tensor:
        """[T', H] for ids [T], pixels [images, 3, S, S] or [images, tiles, 3, S, S] and the images' (height, width).

        Raises InputError where images and their places in the ids do not match, or the config asks for something unknown.
        """
        import torch

        images = [] if pixels is None else self._features(pixels, sizes)
        places, counts = ids == IMAGE_INDEX, torch.ones_like(ids)
        if places.any() or not images:
            lengths = counts.new_tensor([len(rows) for rows in images])
        else:
            places, lengths = ids == self.patch, counts.new_ones(sum(map(len, images)))
        if int(places.sum()) != len(lengths):
            facts = {"places in the ids": int(places.sum()), "to be placed": len(lengths)}
            what = "the ids do not have one place for each image, or for each of its features"
            raise InputError(what, facts=facts, hint="give a recording that was made of the same model")
        counts[places] = lengths
        seen, text = places.repeat_interleave(counts), self.embed(ids[~places])
        joined: torch.Tensor = text.new_empty(len(seen), text.shape[1])
        joined[~seen] = text
        if images:
            joined[seen] = torch.cat(images)
        return joined

    def _features(self, pixels: torch.Tensor, sizes: np.ndarray | None) -> list[torch.Tensor]:
        """Image features: for each image the rows that go into the text."""
        import torch

        config = self.config
        if self.vision is None:
            raise InputError("the checkpoint has no vision tower", hint="give the CLIP repository that it was trained with")
        if pixels.ndim == 4:
            return list(self._project(pixels))
        if sizes is None or config.get("image_aspect_ratio") != "anyres":
            ratio = shown(str(config.get("image_aspect_ratio")))
            raise InputError(
                "tiles need the image sizes and `image_aspect_ratio` `anyres`", facts={"image_aspect_ratio": ratio}, hint=CONFIG_HINT
            )
        grids = [best_grid((height, width), config.get("image_grid_pinpoints"), self.side) for height, width in sizes.tolist()]
        counts = [1 + rows * columns for rows, columns in grids]
        features = torch.split(self._project(torch.cat([tiles[:count] for tiles, count in zip(pixels, counts, strict=True)])), counts)
        return [self._merge(*each) for each in zip(features, grids, sizes.tolist(), strict=True)]

    def _project(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, patches, H] for tiles [N, 3, S, S]."""
        seen = self.vision(pixels, output_hidden_states=True).hidden_states[self.layer]
        whole = not self.class_token or self.config.get("mm_vision_select_feature") == "cls_patch"
        projected: torch.Tensor = self.projector(seen if whole else seen[:, 1:])
        return projected

    def _merge(self, tiles: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        """The features of the whole image, then those of its tiles as one picture, cropped to the image, with a newline after each row."""
        import torch

        kind = self.config.get("mm_patch_merge_type", "flat")
        if kind == "flat":
            return tiles.flatten(0, 1)
        if kind != "spatial_unpad" or self.newline is None:
            facts = {"mm_patch_merge_type": shown(str(kind)), "image_newline": "missing" if self.newline is None else "there"}
            raise InputError("it is not known how this model merges tiles", facts=facts, hint=CONFIG_HINT)
        side = math.isqrt(tiles.shape[1])  # patches along each side of a tile
        picture = tiles[1:].view(*grid, side, side, -1).transpose(1, 2).reshape(grid[0] * side, grid[1] * side, -1)
        picture = unpad(picture, size)
        picture = torch.cat((picture, self.newline.expand(len(picture), 1, -1)), 1)
        return torch.cat((tiles[0], picture.flatten(0, 1)))


def best_grid(size: tuple[int, int], pinpoints: object, side: int) -> tuple[int, int]:
    """(rows, columns) of tiles for an image of (height, width): of the pinpoints, which are (width, height) here and (height,
    width) in transformers, the one that keeps most pixels, then the one that wastes least, then the first.

    Source: `select_best_resolution` in LLaVA's mm_utils.py, whose truncations decide ties.
    """
    height, width = size
    pairs = [tuple(pair) for pair in pinpoints if isinstance(pair, list | tuple)] if isinstance(pinpoints, list | tuple) else []
    if not pairs or any(len(pair) != 2 or not all(isinstance(length, int) and length >= side for length in pair) for pair in pairs):
        raise InputError(f"`image_grid_pinpoints` {shown(str(pinpoints))} is not a list of sizes of at least one tile", hint=CONFIG_HINT)

    def merit(pair: tuple[int, ...]) -> tuple[int, int]:
        scale = min(pair[0] / width, pair[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pair[0] * pair[1]

    best = max(pairs, key=merit)
    return best[1] // side, best[0] // side


def unpad(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`picture` [rows, columns, H] without the rows or columns that padded an image of (height, width) to the grid's shape.

    Source: `unpad_image` in LLaVA's llava_arch.py.
    """
    (height, width), (rows, columns) = size, picture.shape[:2]
    if width / height > columns / rows:
        border = (rows - int(height * (columns / width))) // 2
        return picture[border : rows - border]
    border = (columns - int(width * (rows / height))) // 2
    return picture[:, border : columns - border]
