"""Run a model that is larger than memory: each leaf module has its parameters only while it computes.

The model is built on the meta device, where tensors have shapes and no values. Hooks read each leaf's parameters just before
its forward and let them go right after, and the arithmetic is the model's own: bit for bit while neither weights nor values
are larger than `Most`. What is larger is computed in pieces (a head by its rows, attention by its queries, a feed-forward by its places),
which may add in another order: a few units in the last place.
"""

from __future__ import annotations

import ctypes
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, MismatchError, UsageError
from ..storage.reading import Workspace, check_crcs
from ..tensors.dtypes import TORCH_DTYPE, all_threads
from ..tensors.lazy import LazyTensor
from ..tensors.windows import WINDOW_BYTES, MiB, row_ranges
from ..text import listed, shown
from .quantised import Bits, Quantiser

if TYPE_CHECKING:
    import torch
    from torch import nn

ATTENTION = "llava_weights_eager"  # transformers' eager attention, query by query where the scores would be larger
Kept = Callable[[str, int], np.ndarray]  # name and length of a hidden state -> int64, the places of it that are kept


@dataclass(frozen=True)
class Most:
    """Bytes in memory at a time, in the dtype of the computation: of the `weights` of a leaf, of which the head of a 7B with 32,000 rows is
    less, and of the `values` between two leaves: scores of attention, of which 32 heads have these for 1,000 places, or inside a
    feed-forward."""

    weights: int = 512 * MiB
    values: int = 128 * MiB


MOST = Most()
_malloc_trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other systems have none
_most_values: ContextVar[int] = ContextVar("_most_values", default=MOST.values)


class Streamed:
    """Gives every leaf of a model its parameters just before its forward, and takes them away after it unless `resident`. With `quantize`
    bitsandbytes quantises the matrix of each Linear but the head, and computes with it."""

    def __init__(self, *, dtype: str, device: str, resident: bool, most: Most = MOST, quantize: Bits | None = None) -> None:
        import torch

        if dtype not in ("F32", "F16", "BF16"):
            raise UsageError(f"no forward pass computes in {shown(dtype)}", hint="choose F32, F16 or BF16")
        if device != "cpu" and not (re.fullmatch(r"cuda(:\d+)?", device) and torch.cuda.is_available()):
            raise UsageError(f"there is no device {shown(device)} here", hint="compute on `cpu`")
        self.dtype, self.device, self.resident = dtype, device, resident
        self.kind: torch.dtype = getattr(torch, TORCH_DTYPE[dtype])
        self._most = most
        self._quantiser = Quantiser(quantize, self.kind) if quantize else None
        self._work = Workspace()
        self._hidden: dict[str, torch.Tensor] = {}
        self._kept: Kept | None = None

    @contextmanager
    def session(self, kept: Kept | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Inside, weights are read and values computed, in true float32; yields the dict of the watched values, [places, width]: the places
        that `kept` tells, none without it."""
        import torch

        self._work, self._hidden, self._kept = Workspace(), {}, kept
        most = _most_values.set(self._most.values)
        precision, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")  # also `torch.backends.cuda.matmul.allow_tf32 = False`
        torch.backends.cudnn.allow_tf32 = False
        try:
            quiet = self._quantiser.quiet() if self._quantiser else nullcontext()
            with closing(self._work), all_threads(), torch.inference_mode(), quiet:
                yield self._hidden
                self._work.recheck_sources()
                check_crcs([self._work])
        finally:
            self._hidden, self._kept = {}, None
            _most_values.reset(most)
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = convolution

    def watch(self, name: str, module: nn.Module, *, entering: bool = False) -> None:
        """Keep what enters or leaves `module` in the session's dict."""

        def keep(value: torch.Tensor) -> None:
            if self._kept is not None:
                rows = value.flatten(0, -2)
                self._hidden[name] = _places(rows, self._kept(name, len(rows)))

        def enters(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            keep(given[0] if given else named["hidden_states"])

        def leaves(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            keep(output[0] if isinstance(output, tuple) else output)

        if entering:
            module.register_forward_pre_hook(enters, with_kwargs=True)
        else:
            module.register_forward_hook(leaves)

    def attach(self, model: nn.Module, tensors: Mapping[str, LazyTensor], place: Callable[[str], str], *, quantised: bool = True) -> None:
        """Bind every parameter of a model on the meta device to its tensor. `place` gives a parameter's key in `tensors`. Without
        `quantised` its matrices stay as they are where those of others are quantised.

        Raises InputError listing names without a partner, MismatchError for another shape.
        """
        import torch

        bound = _bind(model, tensors, place)
        for path, module in list(model.named_modules()):  # buffers are never stored: their module makes them anew
            if not any(True for _ in module.buffers(recurse=False)):
                continue
            if hasattr(module, "config"):
                with torch.random.fork_rng(devices=[]):  # its weights are drawn, and replaced below
                    model.set_submodule(path, type(module)(module.config).to(self.device))
            else:  # a number in a leaf that has parameters, as of embeddings that are scaled: set as before training
                for name, value in list(module.named_buffers(recurse=False)):
                    setattr(module, name, torch.empty_like(value, device=self.device))
                with torch.random.fork_rng(devices=[]):
                    _owner(model, path)._init_weights(module)
        for path, module in model.named_modules():
            own = {name: bound[f"{path}.{name}" if path else name] for name, value in module.named_parameters(recurse=False)}
            if own and any(True for _ in module.children()):  # CLIP's class_embedding, image_newline: small, and read from outside
                with self.session():
                    self._give(module, own)
            elif own and quantised and self._quantiser and type(module) is torch.nn.Linear and place(f"{path}.weight") != "head.weight":
                self._quantise(module, own, self._quantiser)
            elif own:
                self._hook(module, own, rows=path.endswith("embed_tokens") and not self.resident)

    def trim(self, module: nn.Module) -> None:
        """Give what is free back to the system after `module`: glibc keeps blocks of less than 32 MiB, and in 32 layers of a 7B with 2,000
        places their gaps grow to a GiB."""

        def give_back(*_: Any) -> None:
            _malloc_trim(0)

        if _malloc_trim is not None:
            module.register_forward_hook(give_back)

    def in_blocks(self, module: Any, width: int) -> None:
        """Let `module`, which takes [N, T, H] and computes each of T alone with up to `width` values, take no more of them at a time than
        have `most.values`; each time it reads its weights again."""
        import torch

        whole = module.forward

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            size = _block(hidden.shape[1], len(hidden) * width * hidden.element_size())
            blocks = [whole(part) for part in torch.split(hidden, size, 1)]
            return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)

        module.forward = forward

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
        large = sum(parameter.nbytes for parameter in blank.values()) > self._most.weights
        in_pieces = large and isinstance(module, torch.nn.Linear) and not self.resident
        if in_pieces:
            module.forward = lambda hidden: self._linear(hidden, **own)
            return
        if rows:
            module.padding_idx = None  # matters only to a gradient, and may lie beyond the few rows
        module.register_forward_pre_hook(give_rows if rows else give)
        if not self.resident:
            module.register_forward_hook(take)

    def _quantise(self, module: Any, own: Mapping[str, LazyTensor], quantiser: Quantiser) -> None:
        quantiser.check(own["weight"].shape, self.device)
        kept: list[nn.Module] = []

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            layer = kept[0] if kept else quantiser.layer(**{name: self.values(tensor) for name, tensor in own.items()})
            if self.resident and not kept:
                kept.append(layer)
            value: torch.Tensor = layer(hidden)
            return value

        module.forward = forward

    def _give(self, module: nn.Module, own: Mapping[str, LazyTensor]) -> None:
        for name, tensor in own.items():
            setattr(module, name, self._parameter(self.values(tensor)))

    def _parameter(self, value: torch.Tensor) -> nn.Parameter:
        from torch import nn

        return nn.Parameter(value, requires_grad=False)

    def values(self, tensor: LazyTensor, windows: Sequence[tuple[int, int]] | None = None) -> torch.Tensor:
        """`tensor` on the device, in the dtype of the computation, read in windows: all of it, or the rows of `windows` that follow on
        each other."""
        import torch

        windows = windows or list(row_ranges(tensor, WINDOW_BYTES))
        first, last = windows[0][0], windows[-1][1]
        out = torch.empty((last - first, *tensor.shape[1:]), dtype=self.kind, device=self.device)
        for start, stop in windows:
            with self._work.scratch((stop - start) * tensor.row_nbytes) as raw:
                out[start - first : stop - first].copy_(self._window(tensor, start, stop, raw))
        return out

    def _linear(self, hidden: torch.Tensor, weight: LazyTensor, bias: LazyTensor | None = None) -> torch.Tensor:
        """What a Linear makes of [.., H], [.., rows], with about `most.weights` of its bytes in memory at a time."""
        from torch.nn.functional import linear

        out, added = hidden.new_empty(*hidden.shape[:-1], weight.rows), self.values(bias) if bias else None
        size, windows = math.prod(weight.shape) * self.kind.itemsize, list(row_ranges(weight, WINDOW_BYTES))
        pieces = min(len(windows), -(-size // self._most.weights))
        for part in np.array_split(windows, pieces):  # of like size: for a rest of few rows another kernel adds in another order
            rows = slice(part[0][0], part[-1][1])
            out[..., rows] = linear(hidden, self.values(weight, part.tolist()), None if added is None else added[rows])
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


def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> tuple[torch.Tensor, None]:
    """The eager attention of the file that `module` is from, for no more queries at a time than have scores of `Most.values`; [N, T, heads,
    width] for a query [N, heads, T, width]."""
    import torch

    eager = sys.modules[type(module).__module__].eager_attention_forward
    size = _block(query.shape[2], len(query) * query.shape[1] * key.shape[2] * query.element_size())
    starts = range(0, query.shape[2], size)
    masks = [None if attention_mask is None else attention_mask[:, :, start : start + size] for start in starts]
    parts = [eager(module, part, key, value, mask, **options)[0] for part, mask in zip(torch.split(query, size, 2), masks, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1), None


def register_attention() -> str:
    """The name under which transformers finds `attend`; its masks are those of eager attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    return ATTENTION


def _block(places: int, size: int) -> int:
    """How many of `places` are computed at a time where each has values of `size` bytes: all, or parts of like size."""
    return -(-places // max(1, min(places, -(-places * size // _most_values.get()))))


def _places(rows: torch.Tensor, places: np.ndarray) -> torch.Tensor:
    import torch

    return rows if len(places) == len(rows) else rows[torch.from_numpy(places).to(rows.device)]


def _owner(model: nn.Module, path: str) -> Any:
    """The innermost model of transformers that the module at `path` is of."""
    parts = path.split(".")
    above = (model.get_submodule(".".join(parts[:length])) for length in range(len(parts), -1, -1))
    return next(module for module in above if hasattr(module, "_init_weights"))


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
