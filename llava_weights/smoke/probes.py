"""The inputs of a smoke test, made from a checkpoint's config and tokenizer alone: the same for every checkpoint of its shapes.

Four kinds: text; an image with text; the ids of every added token and of the last rows; and one row of each part of the vocabulary table,
which row depends on the seed. A reference stores its probes and they are never made again: a change here makes no old reference useless.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any, cast

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import known_decoder
from ..checkpoint.tokenizer import read_special_ids
from ..checkpoint.tower import VIDEO, Doubts, VisionTower, check_tower, holds_tower, open_tower, own_tower
from ..errors import UsageError
from ..families.layouts import canonical
from ..families.originals import fitting
from ..families.projectors import NORM
from ..families.targets import TARGET_BY_TYPE as TARGETS
from ..families.targets import Target
from ..families.towers import TOWERS
from ..text import shown
from .forward import Probe
from .image_features import IMAGE_INDEX, best_grid, limited, most_tiles, unpad

TEXT_TOKENS, TOKENS_AROUND = 32, 12  # tokens of the text probe; before and after an image
LAST_ROWS, MOST_ADDED = 8, 64
FRAMES = 2  # of the video probe
TABLE_PARTS = 256  # equal parts of the vocabulary table, of 125 rows for LLaMA's; about as many places as an image takes
MOST_FEATURES = 1024  # of the image that is shrunk: at the size of published models it would be one of 7,000, an hour of computing
CLIP_PIXELS = TOWERS[0].pixels[0]  # the range of pixels of the images that are made


@dataclass(frozen=True)
class Sight:
    """How a LLaVA takes images in: `side` in pixels of a tile, `patches` along it, `extra` features of a tile beside its patches.
    `pinpoints` are (width, height) in pixels where images are cut into tiles, else None; a picture of more than `most` tiles is shrunk."""

    tower: VisionTower
    target: Target
    extra: int
    pinpoints: list[list[int]] | None
    most: int | None = None
    watches: bool = True  # whether videos are as its class takes them

    @property
    def side(self) -> int:
        return self.tower.image_size

    @property
    def patches(self) -> int:
        return self.side // self.tower.patch_size

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tiles of an image of (height, width)."""
        return best_grid(size, self.pinpoints, self.side)

    def features(self, size: tuple[int, int]) -> int:
        """How many places an image of (height, width) takes in the text."""
        if self.pinpoints is None:
            return self.patches**2 + self.extra
        rows, columns = (tiles * self.patches for tiles in self.grid(size))
        left = unpad(cast(Any, np.empty((rows, columns, 0))), size).shape  # only its shape counts
        rows, columns = limited((left[0], left[1]), self.patches, self.most)
        return self.patches**2 + rows * (columns + 1)

    def places(self, frames: int) -> int:
        """How many places a video of so many frames takes in the text."""
        assert self.target.video
        video = self.target.video
        side = self.patches // video.stride if video.pooled_first else -(-self.patches // video.stride)
        return frames * side**2 + video.newline

    def sizes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Images to try, (height, width): with tiles, one that fits two grids equally well, and one that takes several rows."""
        if self.pinpoints is None:
            yield "image", (self.side, self.side)
            return
        narrow = [(self.side, width) for width in range(3 * self.side // 4, self.side)]
        if self.most is None:
            yield "image", self._first([(4 * self.side // 3, width) for width in range(5 * self.side // 2, 3 * self.side)])
            yield "image-tie", self._first(narrow)
        else:  # its many grids would make the first of these an image of thousands of features
            yield "image", self._first([(7 * self.side // 8, width) for width in range(3 * self.side // 2, 2 * self.side)])
            yield "image-tall", self._first([(height, 7 * self.side // 8) for height in range(3 * self.side // 2, 2 * self.side)])
            yield "image-small", self._first(narrow)
            shrunk = [(edge, edge - self.side // 4) for edge in range(self.side, max(map(max, self.pinpoints)) + 1, self.side // 2)]
            fitting = (size for size in shrunk if self._shrinks(size) and self._clear(size) and self.features(size) <= MOST_FEATURES)
            if size := next(fitting, None):
                yield "image-shrunk", size

    def many_sizes(self) -> Iterator[tuple[int, int]]:
        """(height, width) of images of every kind of grid, up to larger ones than any."""
        longest = max(map(max, self.pinpoints)) if self.pinpoints else self.side
        edges = range(self.side // 2, longest + self.side, -(-self.side // 2))
        yield from product(edges, edges)

    def _first(self, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        return next(filter(self._clear, sizes), sizes[0])

    def _shrinks(self, size: tuple[int, int]) -> bool:
        return self.features(size) != replace(self, most=None).features(size)

    def _clear(self, size: tuple[int, int]) -> bool:
        """Whether the rows of padding to crop are far from a whole number, where programs round in different ways."""
        (height, width), (rows, columns) = size, (tiles * self.patches for tiles in self.grid(size))
        cut = height * columns / width if width / height > columns / rows else width * rows / height
        return cut > 1 and 0.2 < cut % 1 < 0.8


def built_in_probes(checkpoint: Checkpoint, *, tower: Checkpoint | None = None, seed: int = 0) -> tuple[Probe, ...]:
    """Probes in the form of the checkpoint's layout, the same for the same seed; without an image where no vision tower can see it.

    `tower` serves where an original LLaVA has none inside. `seed` tells which row of each part of the vocabulary table is read.
    Raises InputError for tokenizer files or a config that can't be right.
    """
    rows = table_rows(checkpoint)
    known = read_special_ids(checkpoint.files, rows)
    first = [1 if known.bos is None else known.bos]
    hub = checkpoint.layout == "llava-hf"
    mark = image_id(checkpoint) if hub else IMAGE_INDEX
    marks = {mark, video_id(checkpoint)} if hub else {mark}
    words = [word for k in range(1, 100) if (word := 3 + (7919 * k * k + 104729 * k) % max(1, known.base_vocabulary - 3)) not in marks]
    added = [i for i in sorted(known.added.values())[:MOST_ADDED] if i not in marks]
    probes = [
        Probe("text", _joined(first, words[:TEXT_TOKENS])),
        Probe("rows", _joined(first, words[:3], added, (i for i in range(max(3, rows - LAST_ROWS), rows) if i not in marks))),
        Probe("table", _joined(first, [i for i in table_ids(min(known.base_vocabulary, rows), seed) if i not in marks])),
    ]
    sight = find_sight(checkpoint, tower)
    for name, size in sight.sizes() if sight else ():
        count = sight.features(size) if hub and sight else 1
        ids = _joined(first, words[:TOKENS_AROUND], [mark] * count, words[TEXT_TOKENS : TEXT_TOKENS + TOKENS_AROUND])
        probes.append(_image_probe(name, ids, sight, size) if sight else Probe(name, ids))
    if sight and sight.target.video and sight.watches and not sight.target.two_towers:
        count = sight.places(FRAMES) if hub else 1
        run = [video_id(checkpoint) if hub else IMAGE_INDEX] * count
        ids = _joined(first, words[:TOKENS_AROUND], run, words[TEXT_TOKENS : TEXT_TOKENS + TOKENS_AROUND])
        probes.append(Probe("video", ids, frames=pattern(FRAMES, sight.side)[None]))
    return tuple(probes)


def table_ids(rows: int, seed: int) -> list[int]:
    """One id of each of TABLE_PARTS equal parts of `rows` rows. As many seeds in a row as a part has rows give every id."""
    parts = min(TABLE_PARTS, rows)
    edges = [rows * part // parts for part in range(parts + 1)] if parts else [0]
    # A prime step from part to part, so that the ids of one recording are no comb.
    return [start + (seed + 7919 * part) % (stop - start) for part, (start, stop) in enumerate(pairwise(edges))]


def _image_probe(name: str, ids: np.ndarray, sight: Sight, size: tuple[int, int]) -> Probe:
    if sight.pinpoints is None:
        return Probe(name, ids, pattern(1, sight.side))
    rows, columns = sight.grid(size)
    return Probe(name, ids, pattern(1 + rows * columns, sight.side)[None], np.array([size]))


def pattern(tiles: int, side: int) -> np.ndarray:
    """[tiles, 3, side, side] in CLIP's range: no symmetry in x, y or channel, so that no flip, transpose or BGR goes unseen."""
    tile, channel, y, x = np.ogrid[:tiles, :3, :side, :side]
    values = (7 * x + 13 * y + 29 * channel + 53 * tile + x * y // 11) % 256
    mean, std = (np.reshape(each, (3, 1, 1)) for each in (CLIP_PIXELS.mean, CLIP_PIXELS.std))
    return cast(np.ndarray, ((values / 255 - mean) / std).astype(np.float32))


def find_sight(checkpoint: Checkpoint, tower: Checkpoint | None = None) -> Sight | None:
    """How this checkpoint takes images in; None for a text model, and for an original LLaVA whose vision tower is not given."""
    config, hub = checkpoint.config, checkpoint.layout == "llava-hf"
    if checkpoint.layout not in ("llava", "llava-hf"):
        return None
    given = open_tower(tower) if tower and not hub else None
    vision = config.get("vision_config") if hub else None
    found = own_tower(checkpoint.tensors, vision_config=vision, model=checkpoint, reference=given) or given
    if found is None:
        return None
    if hub:
        target = TARGETS.get(str(config.get("model_type")), TARGETS["llava"])
        pairs = config.get("image_grid_pinpoints") if target.tiles else None
        strategy = config.get("vision_feature_select_strategy", target.defaults["vision_feature_select_strategy"])
        most = most_tiles(config.get("vision_aspect_ratio", target.defaults["vision_aspect_ratio"])) if target.capped else None
        turned = [[width, height] for height, width in pairs] if pairs else None
        return Sight(found, target, int(strategy == "full" and found.class_token), turned, most)
    decoder = known_decoder(config)
    parts = set(map(canonical, checkpoint.tensors))
    more: Any = {"norm": NORM[0] in parts, "videos": any(part.startswith(VIDEO) for part in parts)}
    family = next(fitting(config, decoder=decoder.model_type, tower=found.kind, **more), None) if decoder else None
    target, watches = TARGETS[family.target if family else "llava"], not (family and family.warning)
    extra = config.get("mm_vision_select_feature") == "cls_patch" and found.class_token
    most = most_tiles(config.get("image_aspect_ratio")) if target.capped else None
    return Sight(found, target, int(extra), config.get("image_grid_pinpoints") if target.tiles else None, most, watches)


def check_given(checkpoint: Checkpoint, tower: Checkpoint | None, *, accept: bool = False) -> Doubts:
    """Doubts about a tower that is given beside a checkpoint. Raises UsageError where the checkpoint has no use for one,
    MismatchError where its config names another published one, unless `accept`."""
    if tower is None:
        return Doubts()
    if checkpoint.layout != "llava":
        why = "holds its own vision tower" if holds_tower(checkpoint) else "is no LLaVA in the original layout"
        raise UsageError(f"{shown(checkpoint.origin.name)} {why}, so none can be given", hint="leave `--vision-tower` out")
    return Doubts() if holds_tower(checkpoint) else check_tower(checkpoint, open_tower(tower), accept=accept)


def image_id(checkpoint: Checkpoint) -> int:
    """The id that stands for a feature of an image in a llava-hf model."""
    config, target = checkpoint.config, TARGETS.get(str(checkpoint.config.get("model_type")), TARGETS["llava"])
    return int(config.get("image_token_index") or config.get("image_token_id") or target.defaults["image_token_index"])


def video_id(checkpoint: Checkpoint) -> int:
    """The id that stands for a feature of a video in a llava-hf model of a class that takes them, -1 in others."""
    config, target = checkpoint.config, TARGETS.get(str(checkpoint.config.get("model_type")), TARGETS["llava"])
    named = (config.get(key) for key in ("video_token_index", "video_token_id"))
    return int(next((i for i in named if i is not None), target.defaults.get("video_token_index", -1))) if target.video else -1


def table_rows(checkpoint: Checkpoint) -> int:
    """Rows of the embedding table, in any layout."""
    return next((tensor.rows for name, tensor in checkpoint.tensors.items() if canonical(name) == "text.embed_tokens.weight"), 0)


def image_places(checkpoint: Checkpoint, probe: Probe, length: int, tower: Checkpoint | None = None) -> np.ndarray:
    """bool [length]: which places of the sequence that `probe` became hold features of an image."""
    if not probe.sees:
        return np.zeros(length, bool)
    if checkpoint.layout == "llava-hf":
        return np.asarray(probe.ids == (image_id(checkpoint) if probe.frames is None else video_id(checkpoint)))
    marks = probe.ids == IMAGE_INDEX
    if not marks.any():
        patch = read_special_ids(checkpoint.files, checkpoint.vocabulary).added.get("<im_patch>", IMAGE_INDEX)
        return np.asarray(probe.ids == patch)
    images = int(marks.sum())
    counts = [(length - int((~marks).sum())) // images] * images
    if images > 1 and probe.image_sizes is not None and (sight := find_sight(checkpoint, tower)):
        counts = [sight.features((int(height), int(width))) for height, width in probe.image_sizes]
    lengths = np.ones(len(marks), int)
    lengths[marks] = counts
    return np.repeat(marks, lengths)


def in_layout(probe: Probe, places: np.ndarray, checkpoint: Checkpoint) -> Probe:
    """`probe` of another layout, with the ids that `checkpoint` takes: an image token for each feature, or one -200 for an image.

    `places` are those of `image_places`. Pixels and the text's ids stay; images side by side become one -200.
    """
    if not places.any():
        return probe
    ids = probe.ids
    expanded = len(ids) == len(places)
    if checkpoint.layout == "llava-hf":
        full = np.full(len(places), image_id(checkpoint) if probe.frames is None else video_id(checkpoint))
        full[~places] = ids[~places] if expanded else ids[ids != IMAGE_INDEX]
        return replace(probe, ids=full)
    if not expanded:
        return probe
    first = places & ~np.concatenate(([False], places[:-1]))
    return replace(probe, ids=np.where(first, IMAGE_INDEX, ids)[first | ~places])


def _joined(*runs: Iterable[int]) -> np.ndarray:
    return np.array([i for run in runs for i in run], np.int64)
