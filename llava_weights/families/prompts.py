"""How each family of LLaVA is prompted.

Source: `llava/conversation.py` of haotian-liu/LLaVA at c121f04, for `qwen` and `llama_3` that of LLaVA-VL/LLaVA-NeXT.
"""

from __future__ import annotations

from dataclasses import dataclass

Turn = tuple[str, str]  # what stands before a text, and after


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
    generation: str  # what a prompt ends with, for the model to go on
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


PROMPTS = (
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
CONVERSATIONS = {row.name: row for row in PROMPTS}
