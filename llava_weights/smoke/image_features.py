"""What the decoder of an original LLaVA is given: embeddings of the ids, with image features in the places of images.

The rules of `prepare_inputs_labels_for_multimodal` in `llava_arch.py` (haotian-liu/LLaVA c121f04, for `anyres_max_N` LLaVA-VL/LLaVA-NeXT)
and, for a run of <im_patch> ids, of `LlavaLlamaModel.forward` (74f8877): written here once more, so that a conversion has something
else to be compared with than transformers' own LLaVA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..families.targets import ANYRES_MAX, Video
from ..text import shown

if TYPE_CHECKING:
    import torch


TILES_AT_ONCE = 4  # through the tower, whose states of every layer are in memory meanwhile: 90 MiB a tile of SigLIP so400m
IMAGE_INDEX = -200  # LLaVA's IMAGE_TOKEN_INDEX: one for each image, replaced by its features

CONFIG_HINT = "give the config.json that its authors published"


@dataclass(frozen=True)
class InputEmbeddings:
    """Tower, projector and embedding table, and the config that says how their outputs are joined."""

    config: Mapping[str, Any]
    embed: Any  # ids -> embeddings
    vision: Any  # the model of the vision tower, None where there is none
    side: int  # pixels along each side of a tile
    layer: int | list[int]  # the hidden state of the tower that is taken, or several, one behind the other
    class_token: bool  # whether its first feature is that of a class token
    projector: Any
    newline: torch.Tensor | None  # [H]
    patch: int  # id of <im_patch>, IMAGE_INDEX where there is none
    video: Video | None = None  # how its family takes videos

    def __call__(
        self, ids: torch.Tensor, pixels: torch.Tensor | None, sizes: np.ndarray | None, frames: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T', H] for ids [T], pixels [images, 3, S, S] or [images, tiles, 3, S, S] and the images' (height, width), or frames [videos,
        frames, 3, S, S].

        Raises InputError where images and their places in the ids do not match, or the config asks for something unknown.
        """
        import torch

        images = [] if pixels is None else self._features(pixels, sizes)
        images += [] if frames is None else [self._video(each) for each in frames]
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
        if sizes is None or not re.fullmatch(f"anyres|{ANYRES_MAX}", str(config.get("image_aspect_ratio"))):
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
        projected: torch.Tensor = self.projector(self._see(pixels))
        return projected

    def _see(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, patches, width of the tower] for tiles [N, 3, S, S]."""
        import torch

        whole = not self.class_token or self.config.get("mm_vision_select_feature") == "cls_patch"
        layers, seen = self.layer if isinstance(self.layer, list) else [self.layer], []
        for some in torch.split(pixels, TILES_AT_ONCE):
            states = self.vision(some, output_hidden_states=True).hidden_states
            seen.append(torch.cat([states[layer] if whole else states[layer][:, 1:] for layer in layers], dim=-1))
        return torch.cat(seen)

    def _video(self, frames: torch.Tensor) -> torch.Tensor:
        """[features, H] of one video of frames [N, 3, S, S]: `spatial_pool` of LLaVA-NeXT-Video's release, `get_2dPool` of OneVision's."""
        import torch

        if self.vision is None or self.video is None:
            raise InputError("this model takes no videos", hint="give a recording that was made of the same model")
        seen = self._see(frames)
        features = self.projector(self._pooled(seen)) if self.video.pooled_first else self._pooled(self.projector(seen))
        joined: torch.Tensor = features.flatten(0, 1)
        return torch.cat((joined, self.newline[None])) if self.video.newline and self.newline is not None else joined

    def _pooled(self, patches: torch.Tensor) -> torch.Tensor:
        """[N, fewer, D] for the patches [N, P, D] of square frames."""
        from torch.nn import functional

        assert self.video
        mode, side, stride = self.config.get("mm_spatial_pool_mode") or "bilinear", math.isqrt(patches.shape[1]), self.video.stride
        square = patches.transpose(1, 2).reshape(len(patches), -1, side, side)
        if mode == "bilinear":
            pooled = functional.interpolate(square, size=[-(-side // stride)] * 2, mode="bilinear")
        elif mode in ("average", "max"):
            pooled = (functional.avg_pool2d if mode == "average" else functional.max_pool2d)(square, stride)
        else:
            facts = {"mm_spatial_pool_mode": shown(str(mode))}
            raise InputError("it is not known how this model pools frames", facts=facts, hint=CONFIG_HINT)
        return pooled.flatten(2).transpose(1, 2)

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
        rows, columns = limited((len(picture), picture.shape[1]), side, most_tiles(self.config.get("image_aspect_ratio")))
        if (rows, columns) != picture.shape[:2]:
            shrunk = torch.nn.functional.interpolate(picture.permute(2, 0, 1)[None], [rows, columns], mode="bilinear")
            picture = shrunk[0].permute(1, 2, 0)
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


def most_tiles(ratio: object) -> int | None:
    """The N of `anyres_max_N`, None for other ways to take images."""
    found = re.fullmatch(ANYRES_MAX, ratio) if isinstance(ratio, str) else None
    return int(found[1]) if found else None


def limited(shape: tuple[int, int], side: int, most: int | None) -> tuple[int, int]:
    """(rows, columns) of a picture of features, shrunk to those of `most` tiles with `side` of them along each edge, where it has a tenth
    more along its own.

    Source: `anyres_max` in `prepare_inputs_labels_for_multimodal` of LLaVA-VL/LLaVA-NeXT.
    """
    rows, columns = shape
    times = math.sqrt(rows * columns / (most * side**2)) if most else 0
    return (int(rows // times), int(columns // times)) if times > 1.1 else shape


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
