"""What a version of transformers computes with a converted Video-LLaVA, and what a splice of its original's parts gives: a task of
run_transformers.py."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, VideoLlavaForConditionalGeneration

Json = dict[str, Any]
LAYER = -2
FRAMES = 3
SIDES = {"text": "model.", "tower": "model.image_tower.image_tower.", "frames": "model.video_tower.video_tower."}


class Original:
    """The parts of an original, each by the class of its own, joined by hand as its code joins them, without attention over frames."""

    def __init__(self, folder: Path, text: Json, vision: Json) -> None:
        stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
        self.tensors = {name: tensor.float() for name, tensor in stored.items() if ".temporal_" not in name}
        rows = len(self.tensors["model.embed_tokens.weight"])
        self.decoder = self._filled(LlamaForCausalLM(LlamaConfig(**{**text, "vocab_size": rows, "pad_token_id": None})), "")
        self.image, self.video = (self._filled(CLIPVisionModel(CLIPVisionConfig(**vision)), SIDES[part]) for part in ("tower", "frames"))

    def _filled(self, model: Any, prefix: str) -> Any:
        given = {name.removeprefix("vision_model."): name for name in model.state_dict()}
        tensors = {full: self.tensors[prefix + name] for name, full in given.items() if "position_ids" not in name}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected
        assert all("position_ids" in name for name in missing)
        return model.eval()

    def projected(self, features: Any) -> Any:
        first, second = ([self.tensors[f"model.mm_projector.{n}.{part}"] for part in ("weight", "bias")] for n in (0, 2))
        return torch.nn.functional.linear(torch.nn.functional.gelu(torch.nn.functional.linear(features, *first)), *second)

    def logits(self, before: list[int], features: Any, behind: list[int]) -> Any:
        embed = self.decoder.get_input_embeddings()
        joined = torch.cat([embed(torch.tensor(before)), self.projected(features), embed(torch.tensor(behind))])
        return self.decoder(inputs_embeds=joined[None]).logits[0]

    def of_image(self, pixels: Any, before: list[int], behind: list[int]) -> Any:
        """The class token is left out (`mm_vision_select_feature` patch)."""
        return self.logits(before, self.image(pixels, output_hidden_states=True).hidden_states[LAYER][0, 1:], behind)

    def of_video(self, frames: Any, before: list[int], behind: list[int]) -> Any:
        """All features of every frame (`LanguageBindVideoTower.feature_select`)."""
        return self.logits(before, self.video(frames, output_hidden_states=True).hidden_states[LAYER].flatten(0, 1), behind)


def run(job: Json) -> Json:
    folder = Path(job["folder"])
    config = json.loads((folder / "config.json").read_text())
    model, told = VideoLlavaForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    model.eval()
    if save := job.get("save"):
        model.half().save_pretrained(save)
        model.float()
    original = Original(Path(job["original"]), config["text_config"], config["vision_config"])
    key = "pixel_values" if "pixel_values" in inspect.signature(model.forward).parameters else "pixel_values_images"
    torch.manual_seed(3)
    side, rows = config["vision_config"]["image_size"], len(original.tensors["model.embed_tokens.weight"])
    pixels, frames = torch.randn(1, 3, side, side), torch.randn(FRAMES, 3, side, side)
    before, behind = [1, 20, 30], [50, 60]
    patches = (side // config["vision_config"]["patch_size"]) ** 2
    found: Json = {"version": transformers.__version__, "keys": {name: sorted(told[name]) for name in ("missing_keys", "unexpected_keys")}}
    with torch.inference_mode():
        expected = {"image": original.of_image(pixels, before, behind), "video": original.of_video(frames, before, behind)}
        original.image, original.video = original.video, original.image  # so much the towers matter
        others = {"image": original.of_image(pixels, before, behind), "video": original.of_video(frames, before, behind)}
        for name, count, given in (
            ("image", patches, {key: pixels}),
            ("video", FRAMES * (patches + 1), {"pixel_values_videos": frames[None]}),
        ):
            ids = torch.tensor([[*before, *[config[f"{name}_token_index"]] * count, *behind]])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits[0]
            found[name] = float((logits[:, :rows] - expected[name]).abs().max())
            found[f"{name} seen"] = float((others[name] - expected[name]).abs().max())
        found |= processed(folder, model) if importlib.util.find_spec("torchvision") else {}  # which its video processor needs
    return found


def processed(folder: Path, model: Any) -> Json:
    """The processor makes inputs that the model takes, of a picture and of a video that are no squares."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    picture = np.random.default_rng(3).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    found: Json = {"processor": type(processor).__name__, "image processor": type(processor.image_processor).__name__}
    for kind, given in (("image", {"images": picture}), ("video", {"videos": np.stack([picture] * FRAMES)})):
        talk = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "Where?"}]}]
        prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
        inputs = processor(text=prompt, return_tensors="pt", **given)
        found[f"{kind} prompt"] = prompt
        found[f"{kind} shape"] = next(list(value.shape) for key, value in inputs.items() if key.startswith("pixel_values"))
        found[f"{kind} finite"] = bool(model(**inputs).logits.isfinite().all())
    return found
