"""Lets PyPI's torchvision, a CUDA build, be imported beside a CPU build of torch: it expects two of its compiled operators to be declared.

Copied into an environment by `make consumers`, with a .pth file that imports it. torchvision's own CPU build, which PyTorch's index has,
needs none of this. Only reading and resizing of pictures is used of torchvision, and neither is in the compiled part.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class Declare(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Declare())
