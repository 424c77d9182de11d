"""What else does the job, as small programs: `python benchmarks/others.py NAME ARGUMENTS`, each in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path


def peft(base: str, adapter: str, out: str) -> None:
    """PEFT's merge_and_unload and save_pretrained, in float16."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def llava(base: str, delta: str, out: str) -> None:
    """What LLaVA's apply_delta does, on a model that transformers knows: the base added in place in the delta's order."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16).state_dict()
    model = AutoModelForCausalLM.from_pretrained(delta, dtype=torch.float16)
    for name, parameter in model.state_dict().items():
        if parameter.shape == source[name].shape:
            parameter.data += source[name]
        else:
            rows, columns = source[name].shape
            parameter.data[:rows, :columns] += source[name]
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(delta).save_pretrained(out)


def add(base: str, delta: str, out: str) -> None:
    """`safe_open` and `save_file`, one shard of the delta at a time, added in place."""
    from contextlib import ExitStack

    from safetensors import safe_open
    from safetensors.torch import save_file

    Path(out).mkdir()
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, "pt")) for path in sorted(Path(base).glob("*.safetensors"))]
        source = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - no mapping
        for path in sorted(Path(delta).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for name, tensor in tensors.items():
                if name in source:
                    values = source[name].get_tensor(name)
                    tensor[: len(values)] += values
            save_file(tensors, Path(out) / path.name, {"format": "pt"})


def rename(source: str, out: str) -> None:
    """`safe_open` and `save_file`, one shard at a time, each tensor under another name."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    Path(out).mkdir()
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {f"renamed.{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        save_file(tensors, Path(out) / path.name, {"format": "pt"})


if __name__ == "__main__":
    {"peft": peft, "llava": llava, "add": add, "rename": rename}[sys.argv[1]](*sys.argv[2:])
