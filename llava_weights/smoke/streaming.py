"""Run a model that is larger than memory: each leaf module has its parameters only while it computes.

The model is built on the meta device, where tensors have shapes and no values. Hooks read each leaf's parameters just before
its forward and let them go right after, so memory is that of the largest leaf (lm_head of a 13B: 656 MB in float32), and
the arithmetic is the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import InputError, MismatchError, UsageError
from ..storage.reading import Workspace, check_crcs
from ..tensors.dtypes import TORCH_DTYPE, all_threads
from ..tensors.lazy import LazyTensor
from ..tensors.windows import WINDOW_BYTES, row_ranges
from ..text import listed, shown

if TYPE_CHECKING:
    import torch
    from torch import nn


class Streamed:
    """Gives every leaf of a model its parameters just before its forward, and takes them away after it unless `resident`."""

    def __init__(self, *, dtype: str, device: str, resident: bool) -> None:
        import torch

        if dtype not in ("F32", "F16", "BF16"):
            raise UsageError(f"no forward pass computes in {shown(dtype)}", hint="choose F32, F16 or BF16")
        if device != "cpu" and not (re.fullmatch(r"cuda(:\d+)?", device) and torch.cuda.is_available()):
            raise UsageError(f"there is no device {shown(device)} here", hint="compute on `cpu`")
        self.dtype, self.device, self.resident = dtype, device, resident
        self.kind: torch.dtype = getattr(torch, TORCH_DTYPE[dtype])
        self._work = Workspace()
        self._hidden: dict[str, torch.Tensor] = {}

    @contextmanager
    def session(self) -> Iterator[dict[str, torch.Tensor]]:
        """Inside, weights are read and values computed, in true float32; yields the dict of the watched values."""
        import torch

        self._work, self._hidden = Workspace(), {}
        precision, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")  # also `torch.backends.cuda.matmul.allow_tf32 = False`
        torch.backends.cudnn.allow_tf32 = False
        try:
            with closing(self._work), all_threads(), torch.inference_mode():
                yield self._hidden
                self._work.recheck_sources()
                check_crcs([self._work])
        finally:
            self._hidden = {}
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = convolution

    def watch(self, name: str, module: nn.Module, *, entering: bool = False) -> None:
        """Keep what enters or leaves `module` in the session's dict."""

        def enters(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._hidden[name] = given[0] if given else named["hidden_states"]

        def leaves(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._hidden[name] = output[0] if isinstance(output, tuple) else output

        if entering:
            module.register_forward_pre_hook(enters, with_kwargs=True)
        else:
            module.register_forward_hook(leaves)

    def attach(self, model: nn.Module, tensors: Mapping[str, LazyTensor], place: Callable[[str], str]) -> None:
        """Bind every parameter of a model on the meta device to its tensor. `place` gives a parameter's key in `tensors`.

        Raises InputError listing names without a partner, MismatchError for another shape.
        """
        import torch

        bound = _bind(model, tensors, place)
        for path, module in list(model.named_modules()):  # buffers are never stored: their module makes them anew
            if any(True for _ in module.buffers(recurse=False)):
                with torch.random.fork_rng(devices=[]):  # its weights are drawn, and replaced below
                    model.set_submodule(path, type(module)(module.config).to(self.device))
        for path, module in model.named_modules():
            own = {name: bound[f"{path}.{name}" if path else name] for name, value in module.named_parameters(recurse=False)}
            if own and any(True for _ in module.children()):  # CLIP's class_embedding, image_newline: small, and read from outside
                with self.session():
                    self._give(module, own)
            elif own:
                self._hook(module, own, rows=path.endswith("embed_tokens") and not self.resident)

    def _hook(self, module: Any, own: Mapping[str, LazyTensor], *, rows: bool) -> None:
        import torch

        blank = {name: self._parameter(torch.empty(tensor.shape, dtype=self.kind, device="meta")) for name, tensor in own.items()}

        def take(*_: Any) -> None:
            for name, parameter in blank.items():
                setattr(module, name, parameter)

        def give(*_: Any) -> None:
            if next(module.parameters()).is_meta:
                self._give(module, own)

        def give_rows(_: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            unique, positions = torch.unique(given[0], return_inverse=True)
            module.weight = self._parameter(self._rows(own["weight"], unique.tolist()))
            return (positions,)

        take()
        if rows:
            module.padding_idx = None  # matters only to a gradient, and may lie beyond the few rows
        module.register_forward_pre_hook(give_rows if rows else give)
        if not self.resident:
            module.register_forward_hook(take)

    def _give(self, module: nn.Module, own: Mapping[str, LazyTensor]) -> None:
        for name, tensor in own.items():
            setattr(module, name, self._parameter(self.values(tensor)))

    def _parameter(self, value: torch.Tensor) -> nn.Parameter:
        from torch import nn

        return nn.Parameter(value, requires_grad=False)

    def values(self, tensor: LazyTensor) -> torch.Tensor:
        """All of `tensor` on the device, in the dtype of the computation, read in windows."""
        import torch

        out = torch.empty(tensor.shape, dtype=self.kind, device=self.device)
        for start, stop in row_ranges(tensor, WINDOW_BYTES):
            with self._work.scratch((stop - start) * tensor.row_nbytes) as raw:
                out[start:stop].copy_(self._window(tensor, start, stop, raw))
        return out

    def _rows(self, tensor: LazyTensor, numbers: list[int]) -> torch.Tensor:
        """Some rows. Each is cut out of its whole unit: made alone, a row may get other bits (tensors/windows.py)."""
        import torch

        out = torch.empty((len(numbers), *tensor.shape[1:]), dtype=self.kind, device=self.device)
        blocks = {number: found for found in row_ranges(tensor, tensor.row_unit * tensor.row_nbytes) for number in range(*found)}
        at = None
        for position, number in enumerate(numbers):
            start, stop = blocks[number]
            if at != start:
                at, raw = start, memoryview(bytearray((stop - start) * tensor.row_nbytes))
                block = self._window(tensor, start, stop, raw)
            out[position].copy_(block[number - start])
        return out

    def _window(self, tensor: LazyTensor, start: int, stop: int, raw: memoryview) -> torch.Tensor:
        import torch

        tensor.rows_into(raw, start, stop, self._work)
        return torch.frombuffer(raw, dtype=getattr(torch, TORCH_DTYPE[tensor.dtype])).view(stop - start, *tensor.shape[1:])


def _bind(model: nn.Module, tensors: Mapping[str, LazyTensor], place: Callable[[str], str]) -> dict[str, LazyTensor]:
    """The tensor of each parameter, by the parameter's name. A head that is tied may be stored once, as the embeddings."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places = {name: place(name) for name in parameters}
    if "head.weight" not in tensors and "lm_head.weight" in parameters:
        tied = next(name for name in parameters if name.endswith("embed_tokens.weight"))
        if parameters["lm_head.weight"] is parameters[tied]:
            places["lm_head.weight"] = places[tied]
    missing = [at for at in places.values() if at not in tensors]
    unknown = sorted(tensors.keys() - places.values())
    if missing or unknown:
        facts = {"missing": listed(missing), "without a place": listed(unknown)}
        raise InputError(
            f"the tensors are not those of the model that the config describes ({type(model).__name__})",
            facts={label: names for label, names in facts.items() if names},
            hint="see `inspect --tensors`; config.json and weights must be of the same model",
        )
    for name, parameter in parameters.items():
        if (tensor := tensors[places[name]]).shape != tuple(parameter.shape):
            what = f"{shown(places[name])} has shape {list(tensor.shape)}, {list(parameter.shape)} by the config"
            raise MismatchError(what, hint="give the config.json that belongs to these weights")
    return {name: tensors[at] for name, at in places.items()}
