"""llama.cpp's own converters, out of the source of llama-cpp-python 0.3.36: run in their environment by test_llama_cpp.py."""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

SOURCE = next(Path(sys.prefix).glob("llama_cpp_python-*/vendor/llama.cpp"))


def run_script(path: Path, *arguments: str) -> None:
    before = sys.argv
    sys.argv = [str(path), *arguments]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before


def text(jobs: dict[str, Any]) -> None:
    """convert_hf_to_gguf.py on llava-hf folders. A toy's byte-level tokenizer has no known hash: its pre-tokenizer is told (`pre`)."""
    sys.path[:0] = [str(SOURCE / "gguf-py"), str(SOURCE)]
    from conversion import base

    for job in jobs["jobs"]:
        if job["pre"]:
            base.TextModel.get_vocab_base_pre = lambda self, tokenizer, pre=job["pre"]: pre
        run_script(SOURCE / "convert_hf_to_gguf.py", job["folder"], "--outtype", job["type"].lower(), "--outfile", job["out"])


def mmproj(jobs: dict[str, Any]) -> None:
    """The script for image encoders on what a user makes by hand for it: the tower's own folder and the projector in a file."""
    import torch
    from safetensors.torch import load_file, save_file

    for job in jobs["jobs"]:
        source, folder = Path(job["folder"]), Path(job["work"]) / "Model"
        folder.mkdir(parents=True)
        tensors = load_file(source / "model.safetensors")
        config = json.loads((source / "config.json").read_text())
        pixels = json.loads((source / "preprocessor_config.json").read_text())
        tower = {name.partition("vision_tower.")[2]: values for name, values in tensors.items() if "vision_tower." in name}
        save_file(tower, folder / "model.safetensors", metadata={"format": "pt"})
        vision = {**config["vision_config"], "architectures": ["CLIPVisionModel"], "vision_feature_layer": config["vision_feature_layer"]}
        vision.pop("_name_or_path", None)  # else it is taken as the name
        if config["model_type"] == "llava_next":
            vision |= {"image_grid_pinpoints": [[width, height] for height, width in config["image_grid_pinpoints"]]}
            vision |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "mlp2x_gelu"}
            vision |= {key: config[key] for key in ("image_crop_resolution", "image_split_resolution") if key in config}
        (folder / "config.json").write_text(json.dumps(vision))
        parts = [f"multi_modal_projector.linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")]
        projector = {name: tensors[name] for name in (*parts, "image_newline") if name in tensors}
        torch.save(projector, folder / "projector")
        flags = ["--use-f32"] if job["type"] == "F32" else []
        for name in ("image_mean", "image_std"):
            flags += [f"--{name.replace('_', '-')}", *map(str, pixels[name])]
        script = SOURCE / "tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py"
        run_script(script, "-m", str(folder), "--llava-projector", str(folder / "projector"), "--clip-model-is-vision", *flags)
        next(folder.glob("mmproj-*.gguf")).rename(job["out"])


if __name__ == "__main__":
    {"text": text, "mmproj": mmproj}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
    sys.stdout.write("{}\n")
