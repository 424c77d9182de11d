"""The files of a llava-hf model that `AutoProcessor` reads: how images are prepared, and how text and images become one prompt.

Sources: transformers 4.45.2, 4.47.1, 4.57.6 and 5.23.0, which read the same files as the same settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, MismatchError
from ..families.targets import TARGETS, Target
from ..families.towers import Tower
from ..storage.strict_json import json_bytes
from ..text import shown

STEPS = ("do_resize", "do_rescale", "do_normalize")  # every tower of LLaVA wants all three
LAST_RESAMPLE = 5  # PIL's filters are 0 to 5, 3 is bicubic
LARGEST_SETTING = 1e6  # mean, deviation or factor; real ones are below 256
RIGHT_FILE = "give the preprocessor_config.json that belongs to the vision tower"
VIDEO_PREPROCESSOR = "video_preprocessor_config.json"  # read from transformers 4.52 on; before that a folder, else preprocessor_config.json
MAX_PINPOINTS = 1024  # the largest known list has 36


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes the input of a vision tower: `size` and `patch` in pixels, `mean` and `std` of red, green and blue
    from 0 to 1, `resample` as PIL numbers its filters."""

    tower: Tower
    size: int
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3
    rescale: float = 1 / 255


def read_image_settings(preprocessor: Mapping[str, Any] | None, *, tower: Tower, size: int, patch: int) -> ImageSettings:
    """The settings in a tower's preprocessor_config.json of any transformers version; missing ones are those of the `tower`'s row.

    `size` and `patch` are those of the tower itself. Raises InputError for a setting that no image processor could have,
    MismatchError where the file prepares images of another size than the tower's.
    """
    given = {key: value for key, value in (preprocessor or {}).items() if value is not None}
    for key in STEPS:
        if given.get(key, True) is not True:
            raise _refusal(key, given[key])
    for key in ("size", "crop_size"):
        if key in given and _square(key, given[key]) != size:
            facts = {f"`{key}` in preprocessor_config.json": f"{_square(key, given[key])} pixels", "the vision tower": f"{size} pixels"}
            raise MismatchError("preprocessor_config.json belongs to another vision tower", facts=facts, hint=RIGHT_FILE)
    usual = tower.pixels[0]
    resample = given.get("resample", 3)
    if type(resample) is not int or not 0 <= resample <= LAST_RESAMPLE:
        raise _refusal("resample", resample)
    return ImageSettings(
        tower=tower,
        size=size,
        patch=patch,
        mean=_colours(given, "image_mean", usual.mean),
        std=_colours(given, "image_std", usual.std, positive=True),
        resample=resample,
        rescale=_number("rescale_factor", given.get("rescale_factor", 1 / 255), positive=True),
    )


def processor_files(
    settings: ImageSettings,
    *,
    target: Target,
    image_token: str,
    select_strategy: str,
    aspect: str,
    pinpoints: list[list[int]] | None,
    template: str,
    pads: bool = False,
    vision_aspect_ratio: str | None = None,
) -> dict[str, bytes]:
    """The files by name, for the class `target`; `pinpoints` are (height, width) in pixels where it takes tiles, which
    `vision_aspect_ratio` limits where its row says `capped`. A class that takes videos has one more, with the same settings.

    `aspect` is "square" (resize and crop, as llava-hf models do) or "pad" (a square in the mean colour, as LLaVA v1.5 does;
    transformers reads that from 4.49 on). `pads` records that the original padded, though "square" is written: CLIPImageProcessor
    ignores it, in any version. `select_strategy` must be the model's own `vision_feature_select_strategy`. The chat template is
    written twice: transformers 4.45 reads only the JSON file, later ones prefer the other.
    """
    processor: dict[str, Any] = {
        "image_token": image_token,
        # The tower's outputs besides its patches: CLIP has a class token, SigLIP nothing. The strategy "default" removes one, "full"
        # none, so 27 x 27 patches of SigLIP are 729 tokens. transformers 4.45 and 4.46 assume 1 for every tower.
        "num_additional_image_tokens": int(settings.tower.class_token),
        "patch_size": settings.patch,
        "processor_class": target.processor,
        "vision_feature_select_strategy": select_strategy,
    }
    if target.counts:
        del processor["num_additional_image_tokens"], processor["patch_size"]
        processor["num_image_tokens"] = (settings.size // settings.patch) ** 2 + settings.tower.class_token
    if target.capped:
        processor["vision_aspect_ratio"] = vision_aspect_ratio
    preprocessor = _preprocessor(settings, target, aspect=aspect, pads=pads, pinpoints=pinpoints)
    files = {}
    if target.video:
        processor["video_token"] = target.video.token
        shared = {
            key: value for key, value in preprocessor.items() if key not in ("image_processor_type", "image_grid_pinpoints", "do_pad")
        }
        frames = {**shared, "video_processor_type": target.video.processor}
        files[VIDEO_PREPROCESSOR] = json_bytes(dict(sorted(frames.items())))
    return files | {
        "preprocessor_config.json": json_bytes(preprocessor),
        "processor_config.json": json_bytes(dict(sorted(processor.items()))),
        "chat_template.json": json_bytes({"chat_template": template}),
        "chat_template.jinja": template.encode(),
    }


def stored_settings(preprocessor: Mapping[str, Any], processor: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an image processor reads: preprocessor_config.json, or what transformers 5 has in its place inside processor_config.json."""
    nested = processor.get("image_processor")
    return preprocessor or (nested if isinstance(nested, Mapping) else {})


def original_vision_settings(preprocessor: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
    """`image_aspect_ratio` and, with tiles, `image_grid_pinpoints` in (width, height), as LLaVA's own config.json has them.

    A CLIPImageProcessor without `do_pad` gives "square", though the LLaVA v1.5 behind most such files was trained with "pad". Raises
    InputError for pinpoints that are no pairs of sizes.
    """
    settings = stored_settings(preprocessor, processor)
    pinpoints = settings.get("image_grid_pinpoints")
    if pinpoints is not None:
        _check_pinpoints(pinpoints)
        return {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[width, height] for height, width in pinpoints]}
    kind, named = str(settings.get("image_processor_type")), processor.get("processor_class")
    if any(row.tiles and (kind.startswith(str(row.image_processor)) or named == row.processor) for row in TARGETS):
        return {"image_aspect_ratio": "anyres"}
    return {"image_aspect_ratio": "pad" if settings.get("do_pad") is True else "square"}


def _preprocessor(settings: ImageSettings, target: Target, *, aspect: str, pads: bool, pinpoints: list[list[int]] | None) -> dict[str, Any]:
    square = {"height": settings.size, "width": settings.size}
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "processor_class": target.processor,
        "resample": settings.resample,
        "rescale_factor": settings.rescale,
    }
    if not settings.tower.crops and not target.tiles and aspect != "pad":
        return dict(sorted({**common, "image_processor_type": settings.tower.image_processor, "size": square}.items()))
    kind: dict[str, Any] = {"image_processor_type": target.image_processor or settings.tower.image_processor}
    kind |= {"do_pad": True} if pads and target.padding_processor else {}
    if target.tiles:
        _check_pinpoints(pinpoints)
        kind = {"image_processor_type": target.image_processor, "do_pad": True, "image_grid_pinpoints": pinpoints}
    elif aspect == "pad":
        kind = {"image_processor_type": target.padding_processor, "do_pad": True}
    if not target.crops:
        return dict(sorted({**common, "size": square, **kind}.items()))
    crop = {"do_center_crop": True, "crop_size": square, "size": {"shortest_edge": settings.size}}
    return dict(sorted({**common, **crop, **kind}.items()))


def _check_pinpoints(pinpoints: Any) -> None:
    """Raise InputError unless they are pairs of whole numbers of pixels."""
    pairs = pinpoints if isinstance(pinpoints, list) and 0 < len(pinpoints) <= MAX_PINPOINTS else [()]
    if not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(type(edge) is int and edge > 0 for edge in pair) for pair in pairs
    ):
        raise _refusal("image_grid_pinpoints", pinpoints)


def _square(key: str, value: Any) -> int:
    """The edge in pixels, from a number (as in 2022), CLIP's shortest_edge, or SigLIP's height and width."""
    edges = list(value.values()) if isinstance(value, Mapping) else [value]
    if not edges or any(type(edge) is not int or edge < 1 or edge != edges[0] for edge in edges):
        raise _refusal(key, value)
    return int(edges[0])


def _colours(given: Mapping[str, Any], key: str, default: tuple[float, ...], *, positive: bool = False) -> tuple[float, ...]:
    value = given.get(key, list(default))
    if not isinstance(value, list) or len(value) != len(default):
        raise _refusal(key, value)
    return tuple(_number(key, each, positive=positive) for each in value)


def _number(key: str, value: Any, *, positive: bool) -> float:
    if type(value) not in (int, float) or not abs(value) <= LARGEST_SETTING or (positive and value <= 0):
        raise _refusal(key, value)
    return float(value)


def _refusal(key: str, value: object) -> InputError:
    return InputError(f"`{key}` is {shown(str(value))} in preprocessor_config.json, which no vision tower of LLaVA uses", hint=RIGHT_FILE)
