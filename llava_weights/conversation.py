"""How each family of LLaVA is prompted, as a table; the Jinja template that says so to other programs; and which family a checkpoint is.

Source: `llava/conversation.py` of haotian-liu/LLaVA at c121f04, for `qwen` and `llama_3` that of LLaVA-VL/LLaVA-NeXT.
A question follows its image, as in LLaVA's code since 181a2f8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError, UsageError
from .formats import shown

Turn = tuple[str, str]  # what stands before a text, and after

QUESTION = "What is shown in this image?"


@dataclass(frozen=True)
class Conversation:
    """A way to write messages as one prompt.

    Where `inside` is not empty, the system turn stands inside the first user turn: `inside` then opens that turn, and the
    system turn is left out where its text is empty. `stop` is what the model says last. The beginning-of-text token is not
    here, since the tokenizer adds it.
    """

    name: str
    title: str
    system: str
    system_turn: Turn
    user_turn: Turn
    assistant_turn: Turn
    generation: str  # what an answer follows
    stop: str
    inside: str = ""


POLITE = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
HUMAN, USER = POLITE.format("human"), POLITE.format("user")
HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
V0 = (("", "###"), ("Human: ", "###"), ("Assistant: ", "###"), "Assistant:", "###")
V1 = (("", " "), ("USER: ", " "), ("ASSISTANT: ", "</s>"), "ASSISTANT:", "</s>")


def _instruct(later: str) -> tuple[Turn, Turn, Turn, str, str, str]:
    """Llama 2's turns. LLaVA strips the separator off the front of the prompt, so only later user turns begin with it."""
    return ("<<SYS>>\n", "\n<</SYS>>\n\n"), (f"{later}[INST] ", " [/INST]"), (" ", " </s>"), "", "</s>", "[INST] "


def _marked(start: str, middle: str, end: str, stop: str) -> tuple[Turn, Turn, Turn, str, str]:
    """Turns with the role's name between `start` and `middle`, as ChatML and Llama 3 write them."""
    system, user, assistant = (f"{start}{role}{middle}" for role in ("system", "user", "assistant"))
    return (system, end), (user, end), (assistant, end), assistant, stop


FAMILIES = (
    Conversation("llava_v0", "LLaVA v0", HUMAN, *V0),
    Conversation("llava_v1", "LLaVA v1 and v1.1", HUMAN, *V1),
    Conversation("vicuna_v1", "LLaVA v1.5 and v1.6 on Vicuna", USER, *V1),
    Conversation("llava_llama_2", "LLaVA on Llama 2", HELPFUL, *_instruct("<s>")),
    Conversation("mistral_instruct", "LLaVA v1.6 on Mistral", "", *_instruct("")),
    Conversation("chatml_direct", "LLaVA v1.6 34B", "Answer the questions.", *_marked("<|im_start|>", "\n", "<|im_end|>", "<|im_end|>")),
    Conversation("qwen", "LLaVA on Qwen", "You are a helpful assistant.", *_marked("<|im_start|>", "\n", "<|im_end|>\n", "<|im_end|>")),
    # Llama 3's own template, which LLaVA calls. The prompt in transformers' converter has one `<|start_header_id|>` too many.
    Conversation(
        "llama_3", "LLaVA on Llama 3", HELPFUL, *_marked("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>")
    ),
)
CONVERSATIONS = {family.name: family for family in FAMILIES}

# For each message: images first, whatever their place in the list, then its texts. The loops stand on `messages` and
# `message["content"]` by name, since vLLM looks for them to learn that content may be a list. No `generation` tag: other
# readers of Jinja do not know it.
TEMPLATE = """\
{%- set state = namespace(text="", opened=false) -%}
{%- for message in messages -%}
  {%- set state.text = "" -%}
  {%- if message["content"] is string -%}
    {%- set state.text = message["content"] -%}
  {%- else -%}
    {%- for part in message["content"] -%}
      {%- if part["type"] == "image" -%}{%- set state.text = state.text + IMAGE -%}{%- endif -%}
    {%- endfor -%}
    {%- set state.text = state.text + (message["content"] | selectattr("type", "equalto", "text") | map(attribute="text") | join(" ")) -%}
  {%- endif -%}
  {%- if loop.first and message["role"] == "system" -%}
    {{- SYSTEM -}}
  {%- else -%}
    {%- if loop.first -%}{{- OPENING -}}{%- endif -%}
    {%- if message["role"] == "user" -%}
      {{- USER -}}
      {%- set state.opened = true -%}
    {%- elif message["role"] == "assistant" -%}
      {{- ASSISTANT -}}
    {%- else -%}
      {{- raise_exception("after the first message, a role is user or assistant") -}}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- GENERATION -}}{%- endif -%}
"""


def chat_template(conversation: Conversation, image: str) -> str:
    """A Jinja template that renders what LLaVA builds of the same messages, for transformers 4.45 and later.

    `image` is the text that stands for one image in the prompt; a newline follows it. A first message with the role
    `system` replaces the family's own system text. Content is a text or a list of `{"type": "image"}` and
    `{"type": "text", "text": ...}`; several texts are joined by blanks.
    """
    system = _around(conversation.system_turn)
    user = _around(conversation.user_turn)
    if conversation.inside:
        system = f'{_literal(conversation.inside)} + ({system} if state.text else "")'
        user = f"({user} if state.opened else {_around(('', conversation.user_turn[1]))})"
    pieces = {
        "IMAGE": _literal(f"{image}\n"),
        "SYSTEM": system,
        "OPENING": _literal(_opening(conversation)),
        "USER": user,
        "ASSISTANT": _around(conversation.assistant_turn),
        "GENERATION": _literal(conversation.generation),
    }
    return re.sub("|".join(pieces), lambda found: pieces[found[0]], TEMPLATE)


def example(conversation: Conversation, image: str) -> str:
    """The prompt for one image and one question, as `chat_template` renders it."""
    before, after = conversation.user_turn
    opened = _opening(conversation) + ("" if conversation.inside else before)
    return f"{opened}{image}\n{QUESTION}{after}{conversation.generation}"


def bare(conversation: Conversation) -> str:
    """A prompt without system message and image."""
    before, after = conversation.user_turn
    return f"{conversation.system_turn[1]}{before}<question>{after}{conversation.generation}".strip()


def choose(config: Mapping[str, Any], specials: Collection[str], *, name: str | None = None) -> tuple[Conversation, str]:
    """The conversation that a checkpoint was trained with, and the evidence as a short sentence.

    `config` is its config.json, `specials` the texts of its added tokens; the folder's name is not asked. `name` decides
    where it is given, then `conv_mode` in the config. Raises UsageError for an unknown `name`, InputError for an unknown
    `conv_mode`.
    """
    if name is not None:
        if name not in CONVERSATIONS:
            raise UsageError(f"there is no conversation {shown(name)}", hint=f"name one of {_known()}")
        return CONVERSATIONS[name], "named by the caller"
    recorded = config.get("conv_mode")
    if recorded is not None:
        if not isinstance(recorded, str) or recorded not in CONVERSATIONS:
            what = f"`conv_mode` in config.json is {shown(str(recorded))}, which is not a known conversation"
            raise InputError(what, hint=f"known are {_known()}")
        return CONVERSATIONS[recorded], "`conv_mode` in config.json names it"
    found, evidence = next((found, evidence) for fits, found, evidence in _rules(config, specials) if fits)
    return CONVERSATIONS[found], evidence


def _rules(config: Mapping[str, Any], specials: Collection[str]) -> Iterator[tuple[bool, str, str]]:
    """(does it fit, conversation, evidence): the first that fits wins, the last always does."""
    kinds = _kinds(config)
    projector = str(config.get("mm_projector_type") or "linear")
    aspect = str(config.get("image_aspect_ratio"))
    chatml = "<|im_start|>" in specials
    yield chatml and "qwen" in kinds, "qwen", "the text model is a Qwen and `<|im_start|>` one of its tokens"
    yield chatml, "chatml_direct", "`<|im_start|>` is one of its tokens and the text model is not a Qwen"
    yield "mistral" in kinds, "mistral_instruct", "the text model is a Mistral"
    yield "<|start_header_id|>" in specials, "llama_3", "`<|start_header_id|>` is one of its tokens"
    yield "max_sequence_length" in config, "llava_v0", "`max_sequence_length` in config.json, a key of the v0 releases alone"
    marked = projector == "linear" and config.get("mm_use_im_start_end") is True
    yield marked, "llava_v1", "its projector is linear and its images stand between `<im_start>` and `<im_end>`"
    yield projector == "mlp2x_gelu", "vicuna_v1", "its projector is `mlp2x_gelu`, which came with v1.5"
    yield aspect.startswith("anyres"), "vicuna_v1", "its images are cut into tiles (`anyres`), which came with v1.6"
    yield True, "llava_v1", "nothing in config.json or the tokens speaks for another one"


def _kinds(config: Mapping[str, Any]) -> str:
    """Model types and architectures, of the text model too, in small letters."""
    nested = config.get("text_config")
    configs = (config, nested) if isinstance(nested, Mapping) else (config,)
    return " ".join(f"{each.get('model_type')} {each.get('architectures')}" for each in configs).lower()


def _known() -> str:
    return ", ".join(f"`{name}`" for name in CONVERSATIONS)


def _opening(conversation: Conversation) -> str:
    """What a prompt begins with where no system message is given."""
    before, after = conversation.system_turn
    wanted = conversation.system or not conversation.inside
    return conversation.inside + (f"{before}{conversation.system}{after}" if wanted else "")


def _around(turn: Turn) -> str:
    return f"{_literal(turn[0])} + state.text + {_literal(turn[1])}"


def _literal(text: str) -> str:
    """A text as Jinja source; its escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)
