"""Synthetic LLaMA and LLaVA-delta checkpoints of any size: seeded values, or sparse files of the true shapes that cost no disk.

python -m benchmarks.synthetic FOLDER --size 13B --sparse        # base/ and delta/ of LLaVA-13B-delta-v0's shapes
python -m benchmarks.synthetic FOLDER --gigabytes 2 --seed 1     # the same architecture with fewer layers, real values
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from llava_weights.checkpoint.tower import tower_shapes
from llava_weights.families.decoders import LLAMA_SIZES, Size
from llava_weights.formats.safetensors import make_header
from llava_weights.tensors.lazy import LazyTensor

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
TOKENIZER = FIXTURES / "common" / "tokenizer" / "tokenizer.model"
SHARD = 5_000_000_000
Clip = Mapping[str, int | str]
CLIP: Clip = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
TINY = Size("tiny", 512, 1, 8, 1376)
TINY_CLIP: Clip = {
    **CLIP,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "image_size": 56,
}


def shapes(size: Size, rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a LLaMA with `rows` rows of vocabulary, in transformers' order."""
    hidden, wide = size.hidden, size.intermediate
    yield "model.embed_tokens.weight", (rows, hidden)
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            yield f"{prefix}self_attn.{name}_proj.weight", (hidden, hidden)
        yield f"{prefix}mlp.gate_proj.weight", (wide, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, wide)
        yield f"{prefix}mlp.up_proj.weight", (wide, hidden)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (rows, hidden)


def write_pair(folder: Path, size: Size, *, vocabulary: int = 32000, added: int = 3, seed: int = 0, sparse: bool = False) -> None:
    """`base/` (LLaMA) and `delta/` (LLaVA v0: `added` more rows, a linear projector) as F16 safetensors shards."""
    write_base(folder / "base", size, vocabulary=vocabulary, seed=seed, sparse=sparse)
    write_delta(folder / "delta", size, vocabulary=vocabulary, added=added, seed=seed, sparse=sparse)


def write_base(folder: Path, size: Size, *, vocabulary: int = 32000, seed: int = 0, sparse: bool = False, limit: int = SHARD) -> None:
    """A LLaMA as F16 safetensors shards of at most `limit` bytes."""
    _write(folder, dict(shapes(size, vocabulary)), llama_config(size, vocabulary), None if sparse else partial(weights, seed), limit)


def write_delta(
    folder: Path,
    size: Size,
    *,
    vocabulary: int = 32000,
    added: int = 3,
    vision: int = 1024,
    seed: int = 0,
    sparse: bool = False,
    limit: int = SHARD,
) -> None:
    """A LLaVA v0 delta onto `write_base` of the same seed; with `vision` 0 a LLaMA's delta, as Vicuna's, without a projector."""
    tensors, config = dict(shapes(size, vocabulary + added)), llama_config(size, vocabulary + added)
    if vision:
        tensors |= {"model.mm_projector.weight": (size.hidden, vision), "model.mm_projector.bias": (size.hidden,)}
        config |= {"mm_hidden_size": vision, "mm_vision_tower": "openai/clip-vit-large-patch14", "mm_use_im_start_end": True}
        config |= {"use_mm_proj": True}

    def values(name: str, first: int, count: int) -> np.ndarray:
        """Differences; what the base lacks is stored whole: the projector, the added rows."""
        found = difference(seed, name, first, count)
        table = "embed_tokens" in name or "lm_head" in name
        whole = max(0, vocabulary * size.hidden - first if table else 0 if "projector" in name else count)
        found[whole:] = weights(seed + 1, name, first, count)[whole:]
        return found

    _write(folder, tensors, config, None if sparse else values, limit)


def llama_config(size: Size, rows: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size.hidden, "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float16", "vocab_size": rows,
    }  # fmt: skip


def write_lora(folder: Path, size: Size, rank: int, *, seed: int = 0, sparse: bool = False) -> None:
    """A PEFT adapter on all seven projections of every layer, F16, alpha = 2 * rank."""
    tensors: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes(size, 1):
        if "_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{module}.lora_A.weight": (rank, shape[1]), f"{module}.lora_B.weight": (shape[0], rank)}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "base"}
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    _write(folder, tensors, {}, None if sparse else partial(factors, seed), limit=1 << 62)
    (folder / "model-00001-of-00001.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
    for name in ("model.safetensors.index.json", "config.json", "tokenizer.model"):
        (folder / name).unlink()


def write_llava(folder: Path, size: Size, *, clip: Clip = CLIP, seed: int = 0, sparse: bool = False) -> None:
    """A LLaVA-1.5 in the original layout, F16, with its tower (CLIP L/14 at 336 pixels) inside."""
    tower = {f"model.vision_tower.vision_tower.vision_model.{name}": shape for name, shape in tower_shapes(clip).items()}
    hidden, vision = size.hidden, int(clip["hidden_size"])
    projector = {"0.weight": (hidden, vision), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    tensors = {**dict(shapes(size, 32000)), **{f"model.mm_projector.{name}": shape for name, shape in projector.items()}, **tower}
    config = {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "hidden_size": hidden, "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
        "mm_hidden_size": vision, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "use_mm_proj": True, "torch_dtype": "float16", "vocab_size": 32000,
    }  # fmt: skip
    _write(folder, tensors, config, None if sparse else partial(weights, seed))


def write_clip(folder: Path, *, clip: Clip = CLIP, seed: int = 0) -> None:
    """The vision half of a CLIP repository, F16, as `openai/clip-vit-large-patch14-336` names its tensors."""
    tensors = {f"vision_model.{name}": shape for name, shape in tower_shapes(clip).items()}
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "vision_config": dict(clip), "torch_dtype": "float16"}
    _write(folder, tensors, config, partial(weights, seed))
    (folder / "tokenizer.model").unlink()


def write_bin(source: Path, folder: Path) -> None:
    """The safetensors shards of `source` as the `.bin` files of 2023, which is all that FastChat's `--low-cpu-mem` reads."""
    import torch
    from safetensors.torch import load_file

    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.safetensors")):
        torch.save(load_file(path), folder / f"pytorch_{path.stem}.bin")
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(source / name, folder)


def factors(seed: int, name: str, first: int, count: int) -> np.ndarray:
    """Values of a trained LoRA's orders of magnitude: an update of about a twentieth of the weights."""
    return (4e-3 * _generator(seed, name, first).standard_normal(count, np.float32)).astype(np.float16)


def weights(seed: int, name: str, first: int, count: int) -> np.ndarray:
    """Values of LLaMA's orders of magnitude: norms about 0.5, everything else of standard deviation 0.02."""
    draw = _generator(seed, name, first).standard_normal(count, np.float32)
    return (0.5 + 0.1 * draw if "norm" in name else 0.02 * draw).astype(np.float16)


def difference(seed: int, name: str, first: int, count: int) -> np.ndarray:
    """fp16(tuned - base) for a fine-tune that moved each value by about 3e-4: a delta that the round-trip test accepts."""
    base = weights(seed, name, first, count)
    tuned = (base + 3e-4 * _generator(seed + 1, name, first).standard_normal(count, np.float32)).astype(np.float16)
    return tuned - base


def _generator(seed: int, name: str, first: int) -> np.random.Generator:
    return np.random.default_rng([seed, first, *name.encode()])


Values = Callable[[str, int, int], np.ndarray]


def _write(folder: Path, tensors: dict[str, tuple[int, ...]], config: dict[str, object], values: Values | None, limit: int = SHARD) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lazy = [(name, LazyTensor(dtype="F16", shape=shape)) for name, shape in tensors.items()]
    groups: list[list[tuple[str, LazyTensor]]] = [[]]
    for name, tensor in lazy:
        if groups[-1] and sum(t.nbytes for _, t in groups[-1]) + tensor.nbytes > limit:
            groups.append([])
        groups[-1].append((name, tensor))
    placed: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        placed |= dict.fromkeys((name for name, _ in group), file)
        header, laid_out = make_header(tuple(group), {"format": "pt"})
        with open(folder / file, "wb") as out:
            out.write(header)
            out.truncate(len(header) + sum(tensor.nbytes for _, tensor, _ in laid_out))
            for name, tensor, offset in laid_out if values else ():
                out.seek(len(header) + offset)
                step = 1 << 22  # values are drawn block by block, the same in base and delta
                for first in range(0, tensor.numel, step):
                    out.write(values(name, first, min(step, tensor.numel - first)).tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copy(TOKENIZER, folder / "tokenizer.model")


def cut_to(gigabytes: float, size: Size) -> Size:
    """`size` with as many layers as make an F16 checkpoint of about `gigabytes`."""
    layer = sum(int(np.prod(shape)) for name, shape in shapes(size, 1) if ".layers.0." in name)
    rest = 2 * 32000 * size.hidden
    return Size(f"{gigabytes} GB", size.hidden, max(1, round((gigabytes * 5e8 - rest) / layer)), size.heads, size.intermediate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="13B", choices=[size.name for size in LLAMA_SIZES])
    parser.add_argument("--gigabytes", type=float, help="bytes of the base; layers are left out to fit")
    parser.add_argument("--sparse", action="store_true", help="true shapes, all values zero, no disk used")
    parser.add_argument("--rank", type=int, help="write an adapter of this rank too")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    size = next(size for size in LLAMA_SIZES if size.name == given.size)
    size = cut_to(given.gigabytes, size) if given.gigabytes else size
    write_pair(given.folder, size, seed=given.seed, sparse=given.sparse)
    if given.rank:
        write_lora(given.folder / "lora", size, given.rank, seed=given.seed + 2, sparse=given.sparse)


if __name__ == "__main__":
    main()
