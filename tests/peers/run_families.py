"""What a version of transformers makes of a conversion, and what the original would have made: a splice written by hand.

Run in the environment of that version: `python run_families.py read JOBS.json` prints one line of JSON. It shares nothing with the
package: text model and tower are transformers' own classes, filled from the original's files, and what joins them is written out below
after `llava_arch.py` and `mm_utils.py` of haotian-liu/LLaVA (c121f04) and LLaVA-VL/LLaVA-NeXT.
"""

from __future__ import annotations

import json
import math
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

Json = dict[str, Any]
Sizes = tuple[int, int]

DTYPE = "torch_dtype" if transformers.__version__ < "5" else "dtype"
OPTIONS: Json = {DTYPE: torch.float32, "attn_implementation": "eager"}
# What a LLaVA of 4.52 and later leaves out of its decoder's head, and a plan says so; the order of the tokens is the same.
PLAIN_HEAD: Json = {"final_logit_softcapping": None, "logits_scaling": 1.0}
BEFORE, BEHIND = [5, 9, 13], [17, 21, 25, 29]
PICTURES = {"square": (31, 31), "tall": (30, 90), "wide": (100, 33), "small": (9, 7), "large": (150, 140)}  # (width, height) in pixels
FRAMES = 3
TOWER, PROJECTOR = "model.vision_tower.vision_tower.vision_model.", "model.mm_projector."


class Original:
    """The original's parts in float32, from `llava`, with the text model of its decoder and the sizes of its tower from `tower`."""

    def __init__(self, folder: Path, decoder: str, video: Json | None) -> None:
        self.config = json.loads((folder / "llava" / "config.json").read_text())
        self.video = video
        tensors = torch.load(folder / "llava" / "pytorch_model.bin", weights_only=True)
        part = {prefix: {name.removeprefix(prefix): x.float() for name, x in tensors.items() if name.startswith(prefix)}
                for prefix in (TOWER, PROJECTOR)}  # fmt: skip
        text = {name: x for name, x in tensors.items() if not name.startswith((TOWER, PROJECTOR, "model.image_newline"))}
        self.newline = tensors["model.image_newline"].float() if "model.image_newline" in tensors else None
        self.projector = part[PROJECTOR]
        self.text = text_model(folder / f"text-{transformers.__version__}", self.config, decoder, text)
        self.tower, self.clip = tower_model(json.loads((folder / "tower" / "config.json").read_text())["vision_config"], part[TOWER])
        settings = json.loads((folder / "tower" / "preprocessor_config.json").read_text())
        self.mean, self.std, self.side = settings["image_mean"], settings["image_std"], settings["size"]

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, patches, width of the tower] for [N, 3, S, S]: CLIP's last layer but one without its class token, ViP-LLaVA's five, or the
        last that is stored of a SigLIP."""
        states = self.tower(pixels, output_hidden_states=True).hidden_states
        if not self.clip:
            return states[-1]
        layers = (-2, -5, -8, -11, 6) if "clip_layernorm.weight" in self.projector else (-2,)
        return torch.cat([states[layer][:, 1:] for layer in layers], -1)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        parts = dict(self.projector)
        if "clip_layernorm.weight" in parts:
            features = functional.layer_norm(features, features.shape[-1:], parts["clip_layernorm.weight"], parts["clip_layernorm.bias"])
            parts = {name.removeprefix("final_linear."): x for name, x in parts.items()}
        if "weight" in parts:
            return features @ parts["weight"].T + parts["bias"]
        return functional.gelu(features @ parts["0.weight"].T + parts["0.bias"]) @ parts["2.weight"].T + parts["2.bias"]

    def normalised(self, picture: Image.Image) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - mean) / std

    def whole(self, picture: Image.Image) -> torch.Tensor:
        """[1, 3, S, S] of a picture that is padded to a square with the mean of all, as `image_aspect_ratio` pad has it."""
        if self.config.get("image_aspect_ratio") == "pad":
            length = max(picture.size)
            square = Image.new("RGB", (length, length), tuple(int(value * 255) for value in self.mean))
            square.paste(picture, ((length - picture.width) // 2, (length - picture.height) // 2))
            picture = square
        elif self.clip:
            scale = self.side / min(picture.size)
            wide, high = (int(self.side * length / min(picture.size)) if scale else 0 for length in picture.size)
            picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
            left, top = (wide - self.side) // 2, (high - self.side) // 2
            picture = picture.crop((left, top, left + self.side, top + self.side))
        return self.normalised(picture.resize((self.side, self.side), Image.Resampling.BICUBIC))[None]

    def grid(self, picture: Image.Image) -> Sizes:
        """(columns, rows) of tiles: of the pinpoints, (width, height) here, the one that keeps most, then wastes least."""
        (width, height), best = picture.size, None
        for pair in self.config["image_grid_pinpoints"]:
            scale = min(pair[0] / width, pair[1] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            if best is None or (kept, kept - pair[0] * pair[1]) > best[0]:
                best = (kept, kept - pair[0] * pair[1]), pair
        assert best
        return best[1][0] // self.side, best[1][1] // self.side

    def tiles(self, picture: Image.Image) -> torch.Tensor:
        """[1 + tiles, 3, S, S]: the whole picture squeezed, then its tiles row by row, in the middle of a black ground."""
        (columns, rows), side = self.grid(picture), self.side
        wide, high = columns * side, rows * side
        scales = wide / picture.width, high / picture.height
        if scales[0] < scales[1]:
            size = wide, min(math.ceil(picture.height * scales[0]), high)
        else:
            size = min(math.ceil(picture.width * scales[1]), wide), high
        ground = Image.new("RGB", (wide, high), (0, 0, 0))
        ground.paste(picture.resize(size, Image.Resampling.BICUBIC), ((wide - size[0]) // 2, (high - size[1]) // 2))
        boxes = [(x, y, x + side, y + side) for y in range(0, high, side) for x in range(0, wide, side)]
        squeezed = picture.resize((side, side), Image.Resampling.BICUBIC)
        return torch.stack([self.normalised(part) for part in (squeezed, *map(ground.crop, boxes))])

    def joined(self, features: torch.Tensor, picture: Image.Image) -> torch.Tensor:
        """[features, H]: the whole picture, then its tiles as one, without what only pads, a newline behind each row."""
        columns, rows = self.grid(picture)
        side, (width, height) = math.isqrt(features.shape[1]), picture.size
        plane = features[1:].view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
        _, high, wide = plane.shape
        if width / height > wide / high:
            border = (high - int(height * (wide / width))) // 2
            plane = plane[:, border : high - border]
        else:
            border = (wide - int(width * (high / height))) // 2
            plane = plane[:, :, border : wide - border]
        if most := re.fullmatch(r"anyres_max_(\d+)", self.config["image_aspect_ratio"]):
            _, high, wide = plane.shape
            times = math.sqrt(high * wide / (int(most[1]) * side**2))
            if times > 1.1:
                plane = functional.interpolate(plane[None], [int(high // times), int(wide // times)], mode="bilinear")[0]
        assert self.newline is not None
        plane = torch.cat([plane, self.newline[:, None, None].expand(-1, plane.shape[1], 1)], -1)
        return torch.cat([features[0], plane.flatten(1, 2).T])

    def film(self, frames: torch.Tensor) -> torch.Tensor:
        """[features, H] of frames [N, 3, S, S]. LLaVA-NeXT-Video pools patches, by 2 in its demo; OneVision projected ones, with a
        newline at the end."""
        assert self.video
        seen = self.features(frames)
        seen = seen if self.video["pooled_first"] else self.project(seen)
        side = math.isqrt(seen.shape[1])
        plane = seen.transpose(1, 2).reshape(len(seen), -1, side, side)
        if self.video["pooled_first"]:
            pooled = (functional.max_pool2d if self.config.get("mm_spatial_pool_mode") == "max" else functional.avg_pool2d)(plane, 2)
        else:
            pooled = functional.interpolate(plane, size=[math.ceil(side / 2)] * 2, mode="bilinear")
        rows = pooled.flatten(2).transpose(1, 2)
        rows = (self.project(rows) if self.video["pooled_first"] else rows).flatten(0, 1)
        assert self.newline is not None
        return torch.cat([rows, self.newline[None]]) if self.video["newline"] else rows

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        embed = self.text.get_input_embeddings()
        before, behind = (embed(torch.tensor(ids)) for ids in (BEFORE, BEHIND))
        return self.text(inputs_embeds=torch.cat([before, features, behind])[None]).logits[0]


def text_model(folder: Path, config: Json, decoder: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The decoder alone, as transformers reads a folder of it."""
    folder.mkdir(exist_ok=True)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    mine = {key: value for key, value in config.items() if not key.startswith(("mm_", "image_")) and key != "architectures"}
    (folder / "config.json").write_text(json.dumps({**mine, **PLAIN_HEAD, "model_type": decoder}))
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **OPTIONS)
    assert not told["missing_keys"], told
    assert not told["unexpected_keys"], told
    return model.eval()


def tower_model(sizes: Json, tensors: dict[str, torch.Tensor]) -> tuple[Any, bool]:
    """The layers that the original stores, and whether it is a CLIP."""
    clip = sizes["model_type"] == "clip_vision_model"
    depth = 1 + max(int(found[1]) for name in tensors if (found := re.match(r"encoder\.layers\.(\d+)\.", name)))
    kind = "CLIP" if clip else "Siglip"
    config = getattr(transformers, f"{kind}VisionConfig")(**{**sizes, "num_hidden_layers": depth, "vision_use_head": False})
    model = getattr(transformers, f"{kind}VisionModel")(config)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    told = model.load_state_dict({prefix + name: x for name, x in tensors.items() if not name.startswith("head.")}, strict=False)
    assert not told.unexpected_keys, told
    assert all("position_ids" in name for name in told.missing_keys), told
    return model.eval(), clip


def picture(size: Sizes) -> Image.Image:
    wide, high = size
    return Image.fromarray(np.random.default_rng(wide).integers(0, 255, (high, wide, 3), dtype=np.uint8))


def class_keys(folder: Path, config: Json) -> tuple[Any, Json]:
    model, told = getattr(transformers, config["architectures"][0]).from_pretrained(folder, output_loading_info=True, **OPTIONS)
    return model.eval(), {key: sorted(map(str, told[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max()) if found.shape == expected.shape else math.inf


def read(job: Json) -> Json:
    """Which keys have no place, by picture the largest differences of pixels and logits, and how many features the processor counts."""
    folder = Path(job["folder"])
    there = folder / "hf"
    config = json.loads((there / "config.json").read_text())
    original = Original(folder, job["decoder"], job["video"])
    model, keys = class_keys(there, config)
    processor = transformers.AutoImageProcessor.from_pretrained(there)
    found: Json = {"keys": keys, "pixels": {}, "logits": {}, "counted": {}, "largest": 0.0}
    with torch.inference_mode():
        for name, size in PICTURES.items():
            image = picture(size)
            pixels = original.tiles(image) if job["tiles"] else original.whole(image)
            given = processor(image, return_tensors="pt")["pixel_values"]
            found["pixels"][name] = difference(given[0][: len(pixels)] if job["tiles"] else given, pixels)
            seen = original.project(original.features(pixels))
            features = original.joined(seen, image) if job["tiles"] else seen[0]
            more = {"pixel_values": pixels[None] if job["tiles"] else pixels}
            more |= {"image_sizes": torch.tensor([[image.height, image.width]])} if job["tiles"] else {}
            found["logits"][name] = compared(model, original, features, config["image_token_index"], more)
            found["counted"][name] = counted(there, config, processor, image), len(features)
        if job["video"]:
            frames = torch.randn(FRAMES, 3, original.side, original.side, generator=torch.Generator().manual_seed(5))
            film = original.film(frames)
            found["logits"]["video"] = compared(model, original, film, config["video_token_index"], {"pixel_values_videos": frames[None]})
        found["largest"] = float(original.logits(features).abs().max())
    return found


def compared(model: Any, original: Original, features: torch.Tensor, token: int, more: Json) -> float:
    ids = torch.tensor([[*BEFORE, *[token] * len(features), *BEHIND]])
    expected = original.logits(features)
    return difference(model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0, :, : expected.shape[1]], expected)


def counted(folder: Path, config: Json, images: Any, image: Image.Image) -> int:
    """Image tokens that the processor puts for a picture. Those of videos want torchvision: there its own class is made without one."""
    settings = json.loads((folder / "processor_config.json").read_text())
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder)
    except (ImportError, ValueError) as error:
        if "torchvision" not in str(error).lower():
            raise
        kind = getattr(transformers, settings.pop("processor_class"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        kind.check_argument_for_proper_class = lambda *_: None
        processor = kind(image_processor=images, tokenizer=tokenizer, video_processor=None, **settings)
    ids = processor(text=f"a {settings['image_token']} b", images=image, return_tensors="pt")["input_ids"]
    return int((ids == config["image_token_index"]).sum())


def attempt(job: Json) -> Json:
    try:
        return read(job)
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps({name: attempt(job) for name, job in json.loads(Path(sys.argv[2]).read_text()).items()}))
