"""The folders that the cases read: made once from a seed, kept for the next time, made again where anything about them changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.synthetic import (
    CLIP,
    TINY,
    TINY_CLIP,
    Clip,
    cut_to,
    write_base,
    write_bin,
    write_clip,
    write_delta,
    write_llava,
    write_lora,
)
from llava_weights.families.decoders import LLAMA_SIZES, Size

SIZES = {size.name: size for size in (*LLAMA_SIZES, TINY)}


@dataclass(frozen=True)
class Inputs:
    """A root folder and what is made in it."""

    root: Path
    size: Size
    clip: Clip
    rank: int = 64
    seed: int = 0

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def prepare(self, names: Iterable[str]) -> None:
        """Make those of the named folders that are not there yet."""
        for name in names:
            stamp = self.root / "stamps" / name
            wanted = json.dumps({"size": asdict(self.size), "clip": dict(self.clip), "rank": self.rank, "seed": self.seed})
            if stamp.exists() and stamp.read_text() == wanted:
                continue
            stamp.unlink(missing_ok=True)
            shutil.rmtree(self / name, ignore_errors=True)
            make, *before = MAKERS[name]
            self.prepare(before)
            make(self, self / name)
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(wanted)


def inputs_of(root: Path, gigabytes: float, width: str, *, seed: int = 0) -> Inputs:
    """Checkpoints of about `gigabytes` in the tensor shapes of `width`, with as many layers as fit."""
    tiny = width == TINY.name
    return Inputs(root, cut_to(gigabytes, SIZES[width]), TINY_CLIP if tiny else CLIP, rank=8 if tiny else 64, seed=seed)


def convert(source: Path, out: Path) -> None:
    subprocess.run([sys.executable, "-m", "llava_weights", "convert", source, "-o", out, "-q"], check=True, stdout=subprocess.DEVNULL)


def recipe(inputs: Inputs, out: Path) -> None:
    """What mergekit is asked for: the sum, nothing normalized. JSON is YAML."""
    models = [{"model": str((inputs / name).resolve()), "parameters": {"weight": 1.0}} for name in ("base", "plain")]
    out.mkdir(parents=True)
    text = json.dumps({"merge_method": "linear", "models": models, "parameters": {"normalize": False}, "dtype": "float16"})
    (out / "merge.yml").write_text(text)


Maker = Callable[[Inputs, Path], None]
# Each with what it is made from. `plain` is the delta of a LLaMA with the base's own shapes, as Vicuna's: all that programs know which
# are not LLaVA's own.
MAKERS: dict[str, tuple[Maker, *tuple[str, ...]]] = {
    "base": (lambda i, out: write_base(out, i.size, seed=i.seed),),
    "delta": (lambda i, out: write_delta(out, i.size, vision=int(i.clip["hidden_size"]), seed=i.seed),),
    "plain": (lambda i, out: write_delta(out, i.size, added=0, vision=0, seed=i.seed),),
    "base-bin": (lambda i, out: write_bin(i / "base", out), "base"),
    "plain-bin": (lambda i, out: write_bin(i / "plain", out), "plain"),
    "lora": (lambda i, out: write_lora(out, i.size, i.rank, seed=i.seed + 2),),
    "llava": (lambda i, out: write_llava(out, i.size, clip=i.clip, seed=i.seed),),
    "llava-hf": (lambda i, out: convert(i / "llava", out), "llava"),
    "clip": (lambda i, out: write_clip(out, clip=i.clip, seed=i.seed + 3),),
    "recipe": (recipe, "base", "plain"),
}
