"""Does a checkpoint read and write English? What follows a prompt, and how surprised the model is by a plain paragraph.

The test that users of the published models make: give "the meaning of life is" and see whether language follows. An unapplied delta, a
delta on the wrong base or a LoRA left out of half the layers babbles; a small fault does not, and needs logits.py. The reader judges, since
the right perplexity depends on the model. Only an unapplied delta, which the values themselves show, is a failure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.chat_template import Choice, example, written_as
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.diagnose import role_of
from ..checkpoint.hf_tokenizer import hf_tokenizer
from ..checkpoint.processor import processor_files, read_image_settings
from ..checkpoint.prompt import likely_prompt, own_template
from ..checkpoint.small_files import small_object, small_text
from ..checkpoint.tokenizer import FAST, FAST_LIMIT
from ..checkpoint.tower import tower_hint
from ..errors import InputError
from ..events import Listener
from ..families.prompts import Conversation
from ..families.targets import TARGETS
from ..families.towers import TOWERS
from ..findings import Finding
from ..storage.reading import open_regular
from ..storage.strict_json import parse_json
from ..text import shown
from .forward import PIXELS, Passes, Probe
from .image_features import IMAGE_INDEX
from .probes import Sight, check_given, find_sight, image_id, table_rows
from .recording import load_runner

if TYPE_CHECKING:
    from tokenizers import Tokenizer


PARAGRAPH = (
    "The train left the small town early in the morning, before most of the people there were awake. A woman sat by the window with "
    "a cup of coffee in her hands and watched the fields go by. It had rained during the night, and the roads between the farms were "
    "still wet. She was on her way to the city to see her brother, who had moved there two years ago to work in a hospital. They had "
    "not talked much since then, but last week he had called her and asked if she would come to visit him for a few days."
)
NEW_TOKENS = 32
IMAGE_WORD = "<image>"
IMAGE_PROCESSORS = {
    *(row.image_processor for row in TOWERS),
    *(name for row in TARGETS for name in (row.padding_processor, row.image_processor) if name),
}
IMAGE_SETTINGS = re.compile(r"do_\w+|image_mean|image_std|size|crop_size|resample|rescale_factor|image_grid_pinpoints")
APPLY_FIRST = "apply it to the very base that it was made from: `llava-weights apply-delta`"


@dataclass(frozen=True)
class Generated:
    """`text` follows `prompt`, the most likely token each time. `perplexity` is that of `PARAGRAPH`, per token."""

    prompt: str
    text: str
    tokens: tuple[int, ...]
    perplexity: float
    delta: bool  # by its values, this is an unapplied delta
    warnings: tuple[str, ...] = ()  # about the vision tower that was given, and about the turns of a chat

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The perplexity, which is no verdict, and what is wrong for certain or perhaps."""
        text = f"perplexity {self.perplexity:,.1f} a token, on a paragraph of plain English"
        found = [Finding("L5", "note", "generate", text)]
        if self.delta:
            found.append(Finding("L1", "failed", "state", "this is a delta that was never applied", APPLY_FIRST, "state"))
        return (*found, *(Finding("L5", "warning", "generate", text) for text in self.warnings))


def generate(
    checkpoint: Checkpoint,
    prompt: str,
    *,
    image: Path | None = None,
    new_tokens: int = NEW_TOKENS,
    tower: Checkpoint | None = None,
    device: str = "cpu",
    dtype: str = "F32",
    resident: bool = False,
    accept_tower: bool = False,
    chat: bool = False,
    on_event: Listener = lambda event: None,
) -> Generated:
    """What the model writes after `prompt`, at most `new_tokens` tokens. An image stands where `<image>` is in it, else before it.

    The prompt is taken as it is. With `chat` it is what a user asks: it gets the turns that the model was trained with, as the chat
    template of a conversion writes them, and an answer ends where they say; a doubt about them is a warning.

    Raises InputError where there is no tokenizer, for an image that can't be read or that the model can't take in, with `chat` where
    nothing tells the turns, and as `load_forward` and `check_given`.
    """
    doubts = check_given(checkpoint, tower, accept=accept_tower)
    runner = load_runner(checkpoint, tower=tower, device=device, dtype=dtype, resident=resident)
    rows = table_rows(checkpoint)
    made = hf_tokenizer(checkpoint.files, rows=rows, processor_class="LlavaProcessor")
    tokenizer = _tokenizer(small_text(made.files, FAST, limit=FAST_LIMIT) or "")
    ends, warnings = {made.eos}, doubts.warnings
    if chat:
        choice = _conversation(checkpoint, made.specials)
        prompt = _asked(checkpoint, choice.conversation, prompt, image is not None)
        if (stop := tokenizer.token_to_id(choice.conversation.stop)) is not None:
            ends.add(stop)
        warnings = (*warnings, *filter(None, [choice.doubt]))
    ids = tokenizer.encode(prompt).ids
    probe = Probe("prompt", np.array(ids, np.int64))
    if image is not None:
        sight = find_sight(checkpoint, tower)
        if sight is None:
            what = f"{shown(checkpoint.origin.name)} can't see an image: no vision tower is at hand"
            raise InputError(what, hint=tower_hint(checkpoint.config) if checkpoint.layout == "llava" else None)
        mark = image_id(checkpoint) if checkpoint.layout == "llava-hf" else made.image_id
        probe = _with_image(checkpoint, sight, tokenizer, prompt, image, mark)
    paragraph = Probe("paragraph", np.array(tokenizer.encode(PARAGRAPH).ids, np.int64))
    passes = Passes(runner, 1 + new_tokens, 2, on_event)  # the prompt takes part in the first of its tokens
    passes.begin(paragraph.name)
    perplexity = _perplexity(runner(paragraph).logits, paragraph.ids)
    passes.begin(probe.name)
    images = {"pixel_values": probe.pixel_values, "image_sizes": probe.image_sizes}
    tokens = runner.generate(probe.ids, **images, new_tokens=new_tokens, eos=ends)
    return Generated(prompt, tokenizer.decode(tokens), tuple(tokens), perplexity, role_of(checkpoint) == "delta", warnings)


def _conversation(checkpoint: Checkpoint, specials: Collection[str]) -> Choice:
    """The turns that a model was trained with: those of the template that a conversion wrote, else what config and tokens tell."""
    choice = likely_prompt(checkpoint.layout, checkpoint.config, checkpoint.parameters(), specials)
    written = written_as(own_template(checkpoint.files)) if checkpoint.layout == "llava-hf" else None
    if written and (choice is None or choice.conversation != written):
        return Choice(written, "its chat template is so")
    if choice is None:
        what = f"nothing tells how {shown(checkpoint.origin.name)} is prompted"
        raise InputError(what, hint="leave `--chat` out, and write the whole prompt")
    return choice


def _asked(checkpoint: Checkpoint, conversation: Conversation, question: str, sees: bool) -> str:
    marked = checkpoint.config.get("mm_use_im_start_end") or "<im_start>" in own_template(checkpoint.files)
    image = (f"<im_start>{IMAGE_WORD}<im_end>" if marked else IMAGE_WORD) if sees else ""
    return example(conversation, image, question.replace(IMAGE_WORD, "").strip() if sees else question)


def _tokenizer(text: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json; transformers' classes are not used: their ids depend on its version."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises Exception itself
        raise InputError(f"`{FAST}` can't be used: {shown(str(error))}", hint="take the tokenizer from the authors of the model") from error


def _perplexity(logits: np.ndarray, ids: np.ndarray) -> float:
    """exp of the mean surprise of each token but the first, in nats; infinite where logits are."""
    values = logits[:-1].astype(np.float64)
    if not np.isfinite(values).all():
        return math.inf
    shifted = values - values.max(axis=1, keepdims=True)
    surprise = np.log(np.exp(shifted).sum(axis=1)) - np.take_along_axis(shifted, ids[1:, None], axis=1)[:, 0]
    return float(np.exp(min(surprise.mean(), 700.0)))  # exp(710) is more than a float64 holds


def _with_image(checkpoint: Checkpoint, sight: Sight, tokenizer: Tokenizer, prompt: str, image: Path, mark: int) -> Probe:
    """The prompt with one place for each feature of the image in llava-hf, and -200 in LLaVA's own form."""
    word = tokenizer.id_to_token(mark)
    if word is None:
        raise InputError(
            f"the tokenizer has no token for the image, id {mark}", hint="convert the model again: llava-weights adds the token"
        )
    text = prompt.replace(IMAGE_WORD, word) if IMAGE_WORD in prompt else prompt if word in prompt else f"{word}\n{prompt}"
    ids = tokenizer.encode(text).ids
    if ids.count(mark) != 1:
        raise InputError(f"the prompt has {ids.count(mark)} places for one image", hint=f"write `{IMAGE_WORD}` once")
    pixels, sizes = _pixels(_image_settings(checkpoint, sight), image)
    size = (int(sizes[0, 0]), int(sizes[0, 1])) if sizes is not None else (sight.side, sight.side)
    run = [mark] * sight.features(size) if checkpoint.layout == "llava-hf" else [IMAGE_INDEX]
    at = ids.index(mark)
    return Probe("prompt", np.array([*ids[:at], *run, *ids[at + 1 :]], np.int64), pixels, sizes)


def _image_settings(checkpoint: Checkpoint, sight: Sight) -> dict[str, Any]:
    """What preprocessor_config.json says; for an original, which has none, what a conversion would write."""
    own = small_object(checkpoint.files, "preprocessor_config.json")
    if own.get("image_processor_type") in IMAGE_PROCESSORS:
        return own
    tower = sight.tower
    settings = read_image_settings(tower.preprocessor, tower=tower.row, size=tower.image_size, patch=tower.patch_size)
    files = processor_files(
        settings,
        target=sight.target,
        image_token=IMAGE_WORD,
        select_strategy="default",
        aspect="pad" if checkpoint.config.get("image_aspect_ratio") == "pad" and sight.target.padding_processor else "square",
        pinpoints=[[height, width] for width, height in sight.pinpoints] if sight.pinpoints else None,
        template="",
    )
    made: dict[str, Any] = parse_json(files["preprocessor_config.json"], name="preprocessor_config.json")
    return made


def _pixels(settings: dict[str, Any], path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """pixel_values and image_sizes of one image, by transformers' class built from settings alone: no Auto class."""
    try:
        import transformers
        from PIL import Image
    except ImportError as error:
        raise InputError("reading an image needs the package `pillow`, which is not installed", hint="`pip install pillow`") from error
    name = settings["image_processor_type"]
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)  # 5.x: the bare name needs torchvision
    with open_regular(path):  # a pipe or a missing file is refused before PIL waits for it
        pass
    try:
        with Image.open(path) as picture:
            rgb = picture.convert("RGB")
    except Exception as error:  # PIL raises a dozen kinds, for a picture of too many pixels too
        raise InputError(f"{shown(path.name)} is no image that can be read: {shown(str(error))}", hint="give a PNG or JPEG file") from error
    made = kind(**{key: value for key, value in settings.items() if IMAGE_SETTINGS.fullmatch(key)})(images=rgb, return_tensors="np")
    sizes = made.get("image_sizes")
    pixels = next(made[key] for key in PIXELS if key in made)
    return np.asarray(pixels, np.float32), None if sizes is None else np.asarray(sizes, np.int64)
