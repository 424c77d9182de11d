"""How each family of LLaVA is prompted.

Source: `llava/conversation.py` of haotian-liu/LLaVA at c121f04, for `qwen`, `llama_3` and `gemma_instruct` that of LLaVA-VL/LLaVA-NeXT;
for `llava_onevision` convert_llava_onevision_weights_to_hf.py of transformers 4.47.1; for the others the file that stands beside them.
Names are those of these files, where they are not another row's.
"""

from __future__ import annotations

from dataclasses import dataclass

Turn = tuple[str, str]  # what stands before a text, and after


@dataclass(frozen=True)
class Conversation:
    """A way to write messages as one prompt.

    Where `inside` is not empty, the system turn stands inside the first user turn: `inside` then opens that turn, and the
    system turn is left out where its text is empty; so it is, wherever it stands, with `optional`. `system_turn` is None where the
    model was trained without any. `stop` is what the model says last. The beginning-of-text token is not here: the tokenizer adds it.
    """

    name: str
    title: str
    system: str
    system_turn: Turn | None
    user_turn: Turn
    assistant_turn: Turn
    generation: str  # what a prompt ends with, for the model to go on
    stop: str
    inside: str = ""
    optional: bool = False

    @property
    def marks(self) -> frozenset[str]:
        """Which of `MARKS` a prompt of this form holds."""
        turns = (*(self.system_turn or ()), *self.user_turn, *self.assistant_turn, self.generation, self.inside)
        return marks("".join(turns))


# By these a template shows which kind of turns it writes, whatever else stands in it.
MARKS = ("###", "ASSISTANT:", "[INST]", "<|im_start|>", "<|start_header_id|>", "<|end|>", "<start_of_turn>")


def marks(text: str) -> frozenset[str]:
    """Those of `MARKS` that are in a text."""
    return frozenset(mark for mark in MARKS if mark in text)


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


def _v1(end: str) -> tuple[Turn, Turn, Turn, str, str]:
    """Vicuna's turns; `end` is the text of the tokenizer's end."""
    return ("", " "), ("USER: ", " "), ("ASSISTANT: ", end), "ASSISTANT:", end


def _instruct(later: str) -> tuple[Turn, Turn, Turn, str, str, str]:
    """Llama 2's turns. LLaVA strips the separator off the front of the prompt, so only later user turns begin with it."""
    return ("<<SYS>>\n", "\n<</SYS>>\n\n"), (f"{later}[INST] ", " [/INST]"), (" ", " </s>"), "", "</s>", "[INST] "


def _marked(start: str, middle: str, end: str, stop: str) -> tuple[Turn, Turn, Turn, str, str]:
    """Turns with the role's name between `start` and `middle`, as ChatML and Llama 3 write them."""
    system, user, assistant = (f"{start}{role}{middle}" for role in ("system", "user", "assistant"))
    return (system, end), (user, end), (assistant, end), assistant, stop


PROMPTS = (
    Conversation("llava_v0", "LLaVA v0", HUMAN, *V0),
    Conversation("llava_v1", "LLaVA v1 and v1.1", HUMAN, *_v1("</s>")),
    Conversation("vicuna_v1", "LLaVA v1.5 and v1.6 on Vicuna", USER, *_v1("</s>")),
    Conversation("llava_llama_2", "LLaVA on Llama 2", HELPFUL, *_instruct("<s>")),
    Conversation("mistral_instruct", "LLaVA v1.6 on Mistral", "", *_instruct("")),
    Conversation("chatml_direct", "LLaVA v1.6 34B", "Answer the questions.", *_marked("<|im_start|>", "\n", "<|im_end|>", "<|im_end|>")),
    Conversation("qwen", "LLaVA on Qwen", "You are a helpful assistant.", *_marked("<|im_start|>", "\n", "<|im_end|>\n", "<|im_end|>")),
    # The template of transformers' converter; LLaVA's own documents use `qwen`, with a system text.
    Conversation("llava_onevision", "LLaVA-OneVision", "", *_marked("<|im_start|>", "\n", "<|im_end|>\n", "<|im_end|>"), optional=True),
    # Llama 3's own template, which LLaVA calls. The prompt in transformers' converter has one `<|start_header_id|>` too many.
    Conversation(
        "llama_3", "LLaVA on Llama 3", HELPFUL, *_marked("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>")
    ),
    # LLaMA-3-V/ and Phi-3-V/conversation.py of mbzuai-oryx/LLaVA-pp at edb5d21. Its Llama 3 text begins with the `<|begin_of_text|>` that
    # the tokenizer adds.
    Conversation(
        "llama3", "LLaVA++ on Llama 3", USER, *_marked("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>")
    ),
    Conversation("phi3_instruct", "LLaVA++ on Phi-3", "You are a helpful AI assistant.", *_marked("<|", "|>\n", "<|end|>\n", "<|end|>")),
    # xtuner/utils/templates.py of InternLM/xtuner: a system text only where the data has one, which LLaVA's has not.
    Conversation(
        "llama3_chat",
        "xtuner on Llama 3",
        "",
        *_marked("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>"),
        optional=True,
    ),
    Conversation("phi3_chat", "xtuner on Phi-3", "", *_marked("<|", "|>\n", "<|end|>\n", "<|end|>"), optional=True),
    # bunny/conversation.py of BAAI-DCAI/Bunny at 08273ac: `bunny` and `phi3` there are one prompt, `llama` is `bunny_llama` here, and
    # `minicpm` is `vicuna_v1`.
    Conversation("bunny", "Bunny on Qwen and Phi", USER, *_v1("<|endoftext|>")),
    Conversation("bunny_llama", "Bunny on Llama 3", USER, *_v1("<|end_of_text|>")),
    # The model card of qnguyen3/nanoLLaVA.
    Conversation("nanollava", "nanoLLaVA", "Answer the question", *_marked("<|im_start|>", "\n", "<|im_end|>", "<|im_end|>")),
    # cli.py of FreedomIntelligence/HuatuoGPT-Vision at 546b25f, which stops at the tokenizer's own end.
    Conversation(
        "huatuo",
        "HuatuoGPT-Vision",
        "",
        None,
        ("<|user|>\n", "\n"),
        ("<|assistant|>\n", " \n"),
        "<|assistant|>\n",
        "<|endoftext|>",
    ),
    Conversation(
        "gemma_instruct",
        "LLaVA on Gemma",
        "",
        None,
        ("<start_of_turn>user\n", "<end_of_turn>\n"),
        ("<start_of_turn>model\n", "<end_of_turn>\n"),
        "<start_of_turn>model\n",
        "<end_of_turn>",
    ),
)
CONVERSATIONS = {row.name: row for row in PROMPTS}
