"""The forward pass of transformers' own model, streamed from a checkpoint: bit for bit the whole-model forward.

`load_forward` builds the model from the config alone, without a value in it; streaming.py gives the values to each part while
it computes. `load_original` is the other path, for comparison: CLIP, projector and decoder joined as LLaVA's own code does it
(image_features.py). Nothing of transformers but its model classes is used: no Auto class, no `from_pretrained`, no code of a checkpoint.
"""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import known_decoder
from ..checkpoint.hf_config import select_layer
from ..checkpoint.kinds import kind_of, refuse_kind
from ..checkpoint.small_files import RIGHT_CONFIG
from ..checkpoint.tokenizer import read_special_ids
from ..checkpoint.tower import VisionTower, open_tower, own_tower
from ..errors import InputError
from ..events import Listener, Progress, Started
from ..families.decoders import CLASSES, DECODER_BY_TYPE, RUNNABLE_PART_TYPES, RUNNABLE_TYPES, Decoder
from ..families.layouts import canonical
from ..families.originals import fitting
from ..families.projectors import NORM
from ..families.targets import DEFAULT_PARTS, TARGET_BY_TYPE, TARGETS, Target
from ..tensors.lazy import FLOATS, LazyTensor
from ..text import brief, shown
from .image_features import IMAGE_INDEX, InputEmbeddings
from .quantised import Bits
from .streaming import MOST, Kept, Most, Streamed, register_attention

if TYPE_CHECKING:
    import torch


PIXELS = ("pixel_values", "pixel_values_images")  # the second in classes with two towers, before transformers 5.23
NOT_RUN = "`verify` and `diff` check what can't be run"
# Keys of a config that change no computed value, only which code runs, how weights are stored or what is returned.
DROPPED_KEYS = re.compile(
    r"_.*|mm_.*|auto_map|architectures|model_type|transformers_version|quantization_config|(torch_)?dtype|attn_implementation"
    r"|output_.*|(use_)?return_dict|torchscript|use_cache|(max|min)_length"
)


@dataclass(frozen=True)
class Probe:
    """What a model is run on. `ids` are int64 [T]; in the form of an original LLaVA -200 stands for an image. `pixel_values` are float32
    [images, 3, S, S], or with tiles [images, tiles, 3, S, S] padded with zeros; `image_sizes`, with tiles, int64 [images, 2] of height and
    width in pixels. They are stored as they are, never made again from a seed or a tokenizer.
    """

    name: str
    ids: np.ndarray  # int64 [T]; for an original LLaVA -200 stands for an image, or a run of <im_patch>
    pixel_values: np.ndarray | None = None  # float32 [images, 3, S, S], for anyres [images, tiles, 3, S, S] padded with zeros
    image_sizes: np.ndarray | None = None  # int64 [images, 2], height and width, for anyres
    frames: np.ndarray | None = None  # float32 [videos, frames, 3, S, S], in place of images

    @property
    def sees(self) -> bool:
        """Whether there is an image or a video in it."""
        return self.pixel_values is not None or self.frames is not None

    def __repr__(self) -> str:
        pixels = "" if self.pixel_values is None else f", pixels {list(self.pixel_values.shape)}"
        return f"Probe({brief(self.name)}, {len(self.ids)} ids{pixels})"


@dataclass(frozen=True)
class Places:
    """Which places of a sequence of T are kept, int64, rising: of the logits for T, and of each hidden state for its name and length."""

    logits: Callable[[int], np.ndarray]
    hidden: Kept


EVERY = Places(np.arange, lambda _, length: np.arange(length))


@dataclass(frozen=True)
class Outcome:
    """`hidden`: "vision" (features behind the projector, all tiles, [N, H]), "embeddings" (what enters the decoder), "layer.0",
    ... (what each layer gives), float32 [T, H]; of the logits and of each hidden state the places that are kept. `length`: T."""

    logits: np.ndarray  # float32 [T, V]
    hidden: Mapping[str, np.ndarray]
    length: int


class Passes:
    """Tells how far a runner is in so many passes through its weights, of which each layer counts as the same part."""

    def __init__(self, runner: Runner, count: int, probes: int, on_event: Listener) -> None:
        self._layers, self._nbytes, self._on_event = runner.layers, runner.checkpoint.nbytes, on_event
        self._done, self._name = 0, ""
        if count:
            on_event(Started(probes, count * self._nbytes, what="Running"))
        runner.after_layer = self._layer

    def begin(self, name: str) -> None:
        """From here on it is the probe `name`: passes that ended early count as whole."""
        self._done, self._name = -(-self._done // self._layers) * self._layers, name

    def _layer(self) -> None:
        self._done += 1
        self._on_event(Progress(self._nbytes * self._done // self._layers, self._name))


class Runner:
    """A model that computes from its checkpoint. Made by `load_forward` or `load_original`; not for two threads at a time."""

    def __init__(
        self, checkpoint: Checkpoint, stream: Streamed, model: Any, enter: Callable[[Probe], dict[str, Any]], mark: int | None = None
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, stream.dtype, stream.device
        self._stream, self._model, self._enter = stream, model, enter
        self._mark = mark  # the id that stands for an image and has no row
        self.after_layer: Callable[[], None] = lambda: None
        decoder = getattr(model.model, "language_model", model.model)
        self.layers = len(decoder.layers)
        self.vocabulary: int = decoder.embed_tokens.num_embeddings
        stream.watch("embeddings", decoder.layers[0], entering=True)
        for number, layer in enumerate(decoder.layers):
            stream.watch(f"layer.{number}", layer)
            stream.trim(layer)
            stream.in_blocks(layer.mlp, decoder.config.intermediate_size)
            layer.register_forward_hook(lambda *_: self.after_layer())

    def __call__(self, probe: Probe, places: Places = EVERY) -> Outcome:
        """Logits and hidden states of one probe, at `places`. Raises InputError for a probe that does not fit the model, and where the
        checkpoint's files changed or a `.bin` record is damaged."""
        with self._stream.session(places.hidden) as hidden:
            output, length = self._run(probe, places.logits, use_cache=False)
            return Outcome(_numpy(output.logits), {name: _numpy(value) for name, value in hidden.items()}, length)

    def generate(
        self,
        ids: np.ndarray,
        *,
        pixel_values: np.ndarray | None = None,
        image_sizes: np.ndarray | None = None,
        new_tokens: int,
        eos: Collection[int],
    ) -> list[int]:
        """The tokens that follow `ids`, each the most likely one: at most `new_tokens`, up to and with one of `eos`."""
        import torch

        chosen: list[int] = []
        with self._stream.session():
            output, _ = self._run(Probe("prompt", ids, pixel_values, image_sizes), lambda length: np.array([length - 1]), use_cache=True)
            while True:
                chosen.append(int(output.logits[0, -1].float().argmax()))
                if chosen[-1] in eos or len(chosen) >= new_tokens:
                    return chosen
                latest = torch.tensor([chosen[-1:]], device=self.device)
                output = self._model(input_ids=latest, past_key_values=output.past_key_values, use_cache=True)

    def _run(self, probe: Probe, kept: Callable[[int], np.ndarray], **options: Any) -> tuple[Any, int]:
        """What the model gives, with logits at the `kept` places, and how many places there were."""
        import torch

        ids = probe.ids
        wrong = ids[((ids < 0) | (ids >= self.vocabulary)) & (ids != self._mark)]
        if ids.ndim != 1 or not ids.size or wrong.size:
            facts = {"ids": f"shape {list(ids.shape)}", "without a row": wrong[:5].tolist(), "rows": f"{self.vocabulary:,}"}
            raise InputError(
                f"the ids of probe {shown(probe.name)} do not fit the model",
                facts=facts,
                hint="give a recording of the same model, with the same tokens",
            )
        try:
            inputs = self._enter(probe)
            length = (inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]).shape[1]
            if len(places := kept(length)) < length:
                options["logits_to_keep"] = torch.from_numpy(places).to(self.device)
            return self._model(**inputs, **options), length
        except (ValueError, IndexError, TypeError, RuntimeError) as error:  # transformers' own: image tokens and features do not match
            if "memory" in str(error):
                raise
            what = f"the probe {shown(probe.name)} does not fit the model: {error}"
            raise InputError(
                what, hint="compare config.json, above all `image_grid_pinpoints` and the token ids, with its authors'"
            ) from error


def load_forward(
    checkpoint: Checkpoint,
    *,
    dtype: str = "F32",
    device: str = "cpu",
    resident: bool = False,
    most: Most = MOST,
    quantize: Bits | None = None,
) -> Runner:
    """A text model of a known decoder or a llava-hf model, computing in `dtype` whatever its weights are stored in; with `quantize` as
    transformers computes it with bitsandbytes.

    Raises InputError where config and tensors are not exactly those of a model that transformers can build, UsageError for a
    dtype or device that there is not. With `resident`, weights that were read stay on the device.
    """
    import torch

    refuse_kind(kind_of(checkpoint), checkpoint)
    kind = checkpoint.config.get("model_type")
    if kind not in RUNNABLE_TYPES.get(checkpoint.layout, ()):
        facts = {"layout": checkpoint.layout, "model_type": shown(str(kind)), "known": ", ".join(sum(RUNNABLE_TYPES.values(), ()))}
        raise InputError(f"no forward pass is known for {shown(checkpoint.origin.name)}", facts=facts, hint=NOT_RUN)
    stream = Streamed(dtype=dtype, device=device, resident=resident, most=most, quantize=quantize)
    tensors = _canonical_tensors(checkpoint)
    model = _build(checkpoint.config, str(kind), len(tensors))
    tiles = any(row.model_type == kind and row.tiles for row in TARGETS)
    pixels = next((name for name in PIXELS if name in inspect.signature(model.forward).parameters), PIXELS[0])
    stream.attach(model, tensors, canonical)

    def enter(probe: Probe) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": torch.tensor(probe.ids, device=device)[None]}
        if probe.pixel_values is not None:
            inputs[pixels] = torch.tensor(probe.pixel_values, device=device, dtype=stream.kind)
            if probe.image_sizes is not None and tiles:
                inputs["image_sizes"] = torch.tensor(probe.image_sizes, device=device)
        if probe.frames is not None:
            inputs["pixel_values_videos"] = torch.tensor(probe.frames, device=device, dtype=stream.kind)
        return inputs

    if checkpoint.layout == "llava-hf":
        stream.watch("vision", model.model.multi_modal_projector)
    return Runner(checkpoint, stream, model, enter)


def load_original(
    checkpoint: Checkpoint,
    *,
    tower: Checkpoint | None = None,
    dtype: str = "F32",
    device: str = "cpu",
    resident: bool = False,
    most: Most = MOST,
    quantize: Bits | None = None,
) -> Runner:
    """A LLaVA in the original layout; its vision tower from the checkpoint, else from the CLIP repository `tower`. With `quantize` all but
    the tower is quantised, as LLaVA's own code does it.

    Raises as `load_forward`. Without a tower only probes without an image can run.
    """
    import torch

    refuse_kind(kind_of(checkpoint), checkpoint)
    known = known_decoder(checkpoint.config)
    if checkpoint.layout == "llava" and known is not None and not known.runs:
        raise InputError(f"no forward pass is known for a `{known.model_type}`", hint=NOT_RUN)
    if checkpoint.layout != "llava" or known is None:
        facts = {"layout": checkpoint.layout, "model_type": shown(str(checkpoint.config.get("model_type")))}
        what = f"{shown(checkpoint.origin.name)} is no LLaVA in the original layout"
        raise InputError(what, facts=facts, hint="give a LLaVA as haotian-liu's code writes it, or convert it first")
    stream = Streamed(dtype=dtype, device=device, resident=resident, most=most, quantize=quantize)
    groups: dict[str, dict[str, LazyTensor]] = {"tower": {}, "video_tower": {}, "projector": {}, "newline": {}}
    for place, tensor in _canonical_tensors(checkpoint).items():
        first = place.partition(".")[0]
        groups.setdefault(first if first in groups else "decoder", {})[place] = tensor
    # as the classes of LLaVA do it, to which this is compared
    decoder = _build({**checkpoint.config, **known.head}, known.model_type, len(groups["decoder"]))
    stream.attach(decoder, groups["decoder"], canonical)
    vision, known_tower = _vision(checkpoint, tower, stream)
    norm = NORM[0] in groups["projector"]
    target = target_of(checkpoint.config, known, known_tower, norm=norm, videos=bool(groups["video_tower"])) if known_tower else None
    layer = select_layer(checkpoint.config, known_tower, target) if known_tower and target else 0
    class_token = known_tower is not None and known_tower.class_token
    projector = _projector(groups["projector"])
    stream.attach(projector, groups["projector"], "projector.{}".format)
    stream.watch("vision", projector)
    with stream.session():
        newline = next(map(stream.values, groups["newline"].values()), None)
    patch = read_special_ids(checkpoint.files, checkpoint.vocabulary).added.get("<im_patch>", IMAGE_INDEX)
    embed = InputEmbeddings(
        checkpoint.config,
        decoder.model.embed_tokens,
        vision,
        known_tower.image_size if known_tower else 0,
        layer,
        class_token,
        projector,
        newline,
        patch,
        target.video if target else None,
    )

    def enter(probe: Probe) -> dict[str, Any]:
        ids, pixels = torch.tensor(probe.ids, device=device), None
        if probe.pixel_values is not None:
            pixels = torch.tensor(probe.pixel_values, device=device, dtype=stream.kind)
        frames = None if probe.frames is None else torch.tensor(probe.frames, device=device, dtype=stream.kind)
        return {"inputs_embeds": embed(ids, pixels, probe.image_sizes, frames)[None]}

    return Runner(checkpoint, stream, decoder, enter, IMAGE_INDEX)


def target_of(config: Mapping[str, Any], decoder: Decoder, tower: VisionTower, *, norm: bool, videos: bool = False) -> Target:
    """The class of transformers that holds an original LLaVA, `norm`: with a LayerNorm in its projector, `videos`: with a tower for videos;
    plain Llava where no row says."""
    family = next(fitting(config, decoder=decoder.model_type, tower=tower.kind, norm=norm, videos=videos), None)
    return TARGET_BY_TYPE[family.target if family else "llava"]


def _vision(checkpoint: Checkpoint, given: Checkpoint | None, stream: Streamed) -> tuple[Any, VisionTower | None]:
    """The model of the vision tower, and what it is; None for both where there is none."""
    reference = open_tower(given) if given else None
    tower = own_tower(checkpoint.tensors, vision_config=None, model=checkpoint, reference=reference) or reference
    if tower is None:
        return None, None
    model = _build(tower.config, tower.config["model_type"], len(tower.tensors))
    stream.attach(model, tower.tensors, lambda name: name.removeprefix("vision_model."), quantised=False)
    return model, tower


def _projector(tensors: Mapping[str, LazyTensor]) -> Any:
    """The projector that these tensors make: one Linear, or several with GELU between them, which may stand behind a LayerNorm."""
    import torch
    from torch import nn

    def linear(weight: LazyTensor) -> nn.Module:
        return nn.Linear(weight.shape[-1], weight.shape[0], device="meta", dtype=torch.float32)

    matrices = [tensors[name] for number in range(0, 16, 2) if (name := f"projector.{number}.weight") in tensors]
    with torch.random.fork_rng(devices=[]):
        if whole := tensors.get("projector.weight"):
            return linear(whole)
        modules = [module for matrix in matrices for module in (nn.GELU(), linear(matrix))][1:]
    before = {"norm": nn.LayerNorm(scale.shape[0], device="meta", dtype=torch.float32)} if (scale := tensors.get(NORM[0])) else {}
    return nn.Sequential(OrderedDict({**before, **{str(number): module for number, module in enumerate(modules)}}))


def _build(config: Mapping[str, Any], kind: str, most_layers: int) -> Any:
    """transformers' model of `kind` on the meta device, with eager attention (`attend`). Raises InputError where it can't be built."""
    import torch

    transformers = _transformers()
    attention = register_attention()
    settings = _plain(config)
    for part, kinds in RUNNABLE_PART_TYPES.items():
        inner = settings.get(part, {})
        named = inner.setdefault("model_type", DEFAULT_PARTS[part]) if isinstance(inner, dict) else None
        if isinstance(named, str) and named in DECODER_BY_TYPE and named not in kinds:
            raise InputError(f"no forward pass is known for a `{named}`", facts={"known": ", ".join(kinds)}, hint=NOT_RUN)
        if named not in kinds:
            raise InputError(
                f"no forward pass is known for the `{part}` of this config, {shown(str(named))}",
                facts={"known": ", ".join(kinds)},
                hint=RIGHT_CONFIG,
            )
    layers = [inner.get("num_hidden_layers") for inner in (settings, *(settings.get(part, {}) for part in RUNNABLE_PART_TYPES))]
    if any(not isinstance(number or 0, int) or (number or 0) > most_layers for number in layers):
        raise InputError(f"the config's `num_hidden_layers` {layers} does not fit {most_layers:,} tensors", hint=RIGHT_CONFIG)
    config_class, model_class = (getattr(transformers, name) for name in CLASSES[kind])
    try:
        built = config_class(**settings)
        built._attn_implementation = attention
        with torch.device("meta"), torch.random.fork_rng(devices=[]):  # which is drawn from although nothing is filled
            return model_class(built).eval()
    except Exception as error:  # transformers and its validators raise a dozen kinds
        raise InputError(f"transformers can't build a `{kind}` from this config: {error}", hint=RIGHT_CONFIG) from error


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys of `DROPPED_KEYS`, so that none names code to run; its parts keep their `model_type`."""
    kept = {key: value for key, value in config.items() if not DROPPED_KEYS.fullmatch(key)}
    for part in RUNNABLE_PART_TYPES:
        if isinstance(inner := kept.get(part), dict):
            kept[part] = _plain(inner) | {"model_type": inner["model_type"]} if "model_type" in inner else _plain(inner)
    return kept


def _canonical_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Tensors by their canonical name. Raises InputError for one name twice, and for values that are no floats."""
    for name, tensor in checkpoint.parameters().items():
        if tensor.dtype not in FLOATS:
            raise InputError(f"{shown(name)} is stored as {tensor.dtype}", hint="give a checkpoint that is not quantised")
    return checkpoint.by_canonical_name()


def _numpy(value: torch.Tensor) -> np.ndarray:
    """[.., T, N] as float32 [T, N] in host memory."""
    return value.flatten(0, -2).float().cpu().numpy()


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        hint = "install it: `pip install 'transformers>=5.17'`"
        raise InputError("a forward pass needs the package `transformers`, which is not installed", hint=hint) from error
    return transformers
