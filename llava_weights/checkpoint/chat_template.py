"""The Jinja template by which other programs prompt a LLaVA, and the choice of the conversation that a checkpoint was trained with."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, UsageError
from ..families.originals import Original, of_tokens
from ..families.prompts import CONVERSATIONS, Conversation, Turn
from ..text import shown

QUESTION = "What is shown in this image?"
NO_SYSTEM = "this model was trained without a system text"

# For each message: images first, whatever their place in the list, then its texts. The loops are over `messages` and
# `message["content"]` by name, since vLLM looks for these to learn that content may be a list. No `generation` tag: readers
# of Jinja other than transformers do not know it.
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


# What a class that takes videos has behind the loop over images.
VIDEOS = """\
    {%- for part in message["content"] -%}
      {%- if part["type"] == "video" -%}{%- set state.text = state.text + VIDEO -%}{%- endif -%}
    {%- endfor -%}
"""
TEXTS = '    {%- set state.text = state.text + (message["content"]'


def chat_template(conversation: Conversation, image: str, video: str = "") -> str:
    """A Jinja template that renders what LLaVA builds of the same messages, for transformers 4.45 and later.

    `image` is the text that stands for one image in the prompt, `video`, where there are such, for a video; a newline follows it.
    A first message with the role `system` replaces the family's own system text. Content is a text or a list of `{"type": "image"}` and
    `{"type": "text", "text": ...}`; several texts are joined by blanks.
    """
    system = _around(conversation.system_turn) if conversation.system_turn else f"raise_exception({_literal(NO_SYSTEM)})"
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
    pieces |= {"VIDEO": _literal(f"{video}\n")} if video else {}
    return re.sub("|".join(pieces), lambda found: pieces[found[0]], TEMPLATE.replace(TEXTS, VIDEOS + TEXTS) if video else TEMPLATE)


LITERAL = re.compile(r'set state\.text = state\.text \+ ("(?:[^"\\]|\\.)*")')


def written_as(template: str) -> Conversation | None:
    """The conversation of which `chat_template` made this text, None where another program did. The template is not rendered."""
    marks = [str(json.loads(text)).removesuffix("\n") for text in LITERAL.findall(template)[:2]]
    if not marks:
        return None
    image, video = marks[0], marks[1] if len(marks) > 1 else ""
    plain = template.rstrip("\n")
    return next((row for row in CONVERSATIONS.values() if chat_template(row, image, video).rstrip("\n") == plain), None)


def example(conversation: Conversation, image: str, question: str = QUESTION) -> str:
    """The prompt for one image and one question, as `chat_template` renders it; without an image where its text is empty."""
    before, after = conversation.user_turn
    opened = _opening(conversation) + ("" if conversation.inside else before)
    line = f"{image}\n" if image else ""
    return f"{opened}{line}{question}{after}{conversation.generation}"


def bare_prompt(conversation: Conversation) -> str:
    """A prompt without system message and image."""
    before, after = conversation.user_turn
    opened = conversation.system_turn[1] if conversation.system_turn else ""
    return f"{opened}{before}<question>{after}{conversation.generation}".strip()


@dataclass(frozen=True)
class Choice:
    """The conversation that a checkpoint was trained with, why it is taken, and the names of those that fit as well: none where it is
    certain."""

    conversation: Conversation
    evidence: str
    rivals: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.conversation.title} ({self.evidence})"

    @property
    def doubt(self) -> str:
        """What was possible and what decided, in a sentence; empty where the prompt is certain."""
        if not self.rivals:
            return ""
        named = [f"`{name}` ({CONVERSATIONS[name].title})" for name in self.rivals]
        every = len(named) + 1 == len(CONVERSATIONS)
        others = "no published LLaVA is like this one, so that any other fits as well" if every else f"{_or(named)} fits as well"
        return f"prompt not certain: `{self.conversation.name}` is taken, since {self.evidence}; {others}"


def choose(config: Mapping[str, Any], specials: Collection[str], families: Sequence[Original], *, name: str | None = None) -> Choice:
    """The conversation that a checkpoint was trained with, and the evidence as a short sentence.

    `families` are the rows that its config fits, `specials` the texts of its added tokens; the folder's name does not matter. `name`
    decides where it is given, else `conv_mode` in the config. Raises UsageError for an unknown `name`, InputError for an unknown
    `conv_mode`, and where none of the families has such tokens.
    """
    if name is not None:
        if name not in CONVERSATIONS:
            raise UsageError(f"there is no conversation {shown(name)}", hint=f"name one of {_known()}")
        return Choice(CONVERSATIONS[name], "named by the caller")
    recorded = config.get("conv_mode")
    if recorded is not None:
        if not isinstance(recorded, str) or recorded not in CONVERSATIONS:
            what = f"`conv_mode` in config.json is {shown(str(recorded))}, which is not a known conversation"
            raise InputError(what, hint=f"known are {_known()}")
        return Choice(CONVERSATIONS[recorded], "`conv_mode` in config.json names it")
    family = of_tokens(families, specials)
    if family is None:
        raise InputError("nothing tells how this model is prompted", hint=f"name the conversation with `--conv-mode`: {_known()}")
    return Choice(CONVERSATIONS[family.prompt], family.evidence, tuple(name for name in family.rivals if name != family.prompt))


def _or(texts: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def _known() -> str:
    return ", ".join(f"`{name}`" for name in CONVERSATIONS)


def _opening(conversation: Conversation) -> str:
    """What a prompt begins with where no system message is given."""
    before, after = conversation.system_turn or ("", "")
    wanted = conversation.system or not (conversation.inside or conversation.optional)
    return conversation.inside + (f"{before}{conversation.system}{after}" if wanted else "")


def _around(turn: Turn) -> str:
    return f"{_literal(turn[0])} + state.text + {_literal(turn[1])}"


def _literal(text: str) -> str:
    """A text as Jinja source; its escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)
