"""Prompts: each family's template gives LLaVA's own prompt, letter by letter; config and tokens decide the family."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Template
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llava_weights.checkpoint.chat_template import QUESTION, chat_template, choose, example, written_as
from llava_weights.checkpoint.config import decoder_of
from llava_weights.errors import InputError, UsageError
from llava_weights.families.originals import fitting
from llava_weights.families.prompts import CONVERSATIONS

IMAGE = {"type": "image"}
PLAIN = ImmutableSandboxedEnvironment()
TRANSFORMERS = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
USER = HUMAN.replace("human", "user")
HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and "
    "assist the user with a variety of tasks using natural language."
)

# What `get_prompt` of LLaVA's conversation.py (c121f04; LLaVA-NeXT's for the last two) returns for an image with "Who?", and for the same
# with the answer "Ann." and the question "Why?"; for LLaVA-OneVision the template of transformers' converter. Those behind `llama_3` are
# by LLaVA-pp's and Bunny's conversation.py, xtuner's templates.py, nanoLLaVA's card, HuatuoGPT-Vision's cli.py, for Gemma LLaVA-NeXT's.
ONE_TURN = {
    "llava_v0": f"{HUMAN}###Human: <image>\nWho?###Assistant:",
    "llava_v1": f"{HUMAN} USER: <image>\nWho? ASSISTANT:",
    "vicuna_v1": f"{USER} USER: <image>\nWho? ASSISTANT:",
    "llava_llama_2": f"[INST] <<SYS>>\n{HELPFUL}\n<</SYS>>\n\n<image>\nWho? [/INST]",
    "mistral_instruct": "[INST] <image>\nWho? [/INST]",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWho?<|im_end|><|im_start|>assistant\n",
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWho?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llava_onevision": "<|im_start|>user\n<image>\nWho?<|im_end|>\n<|im_start|>assistant\n",
    "llama_3": (
        f"<|start_header_id|>system<|end_header_id|>\n\n{HELPFUL}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWho?"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "llama3": (
        f"<|start_header_id|>system<|end_header_id|>\n\n{USER}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWho?"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "phi3_instruct": "<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n<image>\nWho?<|end|>\n<|assistant|>\n",
    "llama3_chat": ("<|start_header_id|>user<|end_header_id|>\n\n<image>\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    "phi3_chat": "<|user|>\n<image>\nWho?<|end|>\n<|assistant|>\n",
    "bunny": f"{USER} USER: <image>\nWho? ASSISTANT:",
    "bunny_llama": f"{USER} USER: <image>\nWho? ASSISTANT:",
    "nanollava": "<|im_start|>system\nAnswer the question<|im_end|><|im_start|>user\n<image>\nWho?<|im_end|><|im_start|>assistant\n",
    "huatuo": "<|user|>\n<image>\nWho?\n<|assistant|>\n",
    "gemma_instruct": "<start_of_turn>user\n<image>\nWho?<end_of_turn>\n<start_of_turn>model\n",
}
TWO_TURNS = {
    "llava_v0": f"{HUMAN}###Human: <image>\nWho?###Assistant: Ann.###Human: Why?###Assistant:",
    "llava_v1": f"{HUMAN} USER: <image>\nWho? ASSISTANT: Ann.</s>USER: Why? ASSISTANT:",
    "vicuna_v1": f"{USER} USER: <image>\nWho? ASSISTANT: Ann.</s>USER: Why? ASSISTANT:",
    "llava_llama_2": f"[INST] <<SYS>>\n{HELPFUL}\n<</SYS>>\n\n<image>\nWho? [/INST] Ann. </s><s>[INST] Why? [/INST]",
    "mistral_instruct": "[INST] <image>\nWho? [/INST] Ann. </s>[INST] Why? [/INST]",
    "chatml_direct": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWho?<|im_end|><|im_start|>assistant\nAnn.<|im_end|>"
        "<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n"
    ),
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nAnn.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llava_onevision": (
        "<|im_start|>user\n<image>\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nAnn.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama_3": (
        f"<|start_header_id|>system<|end_header_id|>\n\n{HELPFUL}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWho?"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nAnn.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "llama3": (
        f"<|start_header_id|>system<|end_header_id|>\n\n{USER}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWho?"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nAnn.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "phi3_instruct": (
        "<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n<image>\nWho?<|end|>\n<|assistant|>\nAnn.<|end|>\n"
        "<|user|>\nWhy?<|end|>\n<|assistant|>\n"
    ),
    "llama3_chat": (
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nAnn.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "phi3_chat": "<|user|>\n<image>\nWho?<|end|>\n<|assistant|>\nAnn.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n",
    "bunny": f"{USER} USER: <image>\nWho? ASSISTANT: Ann.<|endoftext|>USER: Why? ASSISTANT:",
    "bunny_llama": f"{USER} USER: <image>\nWho? ASSISTANT: Ann.<|end_of_text|>USER: Why? ASSISTANT:",
    "nanollava": (
        "<|im_start|>system\nAnswer the question<|im_end|><|im_start|>user\n<image>\nWho?<|im_end|><|im_start|>assistant\nAnn.<|im_end|>"
        "<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n"
    ),
    "huatuo": "<|user|>\n<image>\nWho?\n<|assistant|>\nAnn. \n<|user|>\nWhy?\n<|assistant|>\n",
    "gemma_instruct": (
        "<start_of_turn>user\n<image>\nWho?<end_of_turn>\n<start_of_turn>model\nAnn.<end_of_turn>\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    ),
}
DEFAULT_SYSTEM = {
    "llava_v0": HUMAN, "llava_v1": HUMAN, "vicuna_v1": USER, "llava_llama_2": HELPFUL, "chatml_direct": "Answer the questions.",
    "qwen": "You are a helpful assistant.", "llama_3": HELPFUL, "llama3": USER, "phi3_instruct": "You are a helpful AI assistant.",
    "bunny": USER, "bunny_llama": USER, "nanollava": "Answer the question",
}  # fmt: skip


def say(role: str, *content: Any) -> dict[str, Any]:
    """A message: of one string as it is, else of parts in the list form."""
    if len(content) == 1 and isinstance(content[0], str):
        return {"role": role, "content": content[0]}
    return {"role": role, "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]}


FIRST = say("user", IMAGE, "Who?")
SECOND = [FIRST, say("assistant", "Ann."), say("user", "Why?")]


@cache
def templates(name: str, image: str) -> list[Template]:
    return [environment.from_string(chat_template(CONVERSATIONS[name], image)) for environment in (PLAIN, TRANSFORMERS)]


def render(name: str, messages: list[dict[str, Any]], *, image: str = "<image>", ask: bool = True) -> str:
    """The prompt by the template, the same in every environment."""
    prompts = {template.render(messages=messages, add_generation_prompt=ask) for template in templates(name, image)}
    assert len(prompts) == 1
    return prompts.pop()


def test_every_family_is_here() -> None:
    assert CONVERSATIONS.keys() == ONE_TURN.keys() == TWO_TURNS.keys()
    assert [family.name for family in CONVERSATIONS.values()] == list(CONVERSATIONS)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_are_those_of_llava(name: str) -> None:
    assert render(name, [FIRST]) == ONE_TURN[name]
    assert render(name, SECOND) == TWO_TURNS[name]


@pytest.mark.parametrize("name", DEFAULT_SYSTEM)
def test_a_system_message_replaces_the_system_text(name: str) -> None:
    for system in ("Be short.", 'It\'s "so"\\n {{ x }} {% y %}\nÄ.'):
        expected = TWO_TURNS[name].replace(DEFAULT_SYSTEM[name], system)
        assert render(name, [say("system", system), *SECOND]) == expected
        assert render(name, [say("system", {"type": "text", "text": system}), *SECOND]) == expected


def test_a_system_message_for_mistral_and_none_for_llama_2() -> None:
    system = say("system", "Be short.")
    expected = "[INST] <<SYS>>\nBe short.\n<</SYS>>\n\n<image>\nWho? [/INST] Ann. </s>[INST] Why? [/INST]"
    assert render("mistral_instruct", [system, *SECOND]) == expected
    assert render("llava_llama_2", [say("system", ""), FIRST]) == "[INST] <image>\nWho? [/INST]"
    assert render("phi3_chat", [system, FIRST]) == f"<|system|>\nBe short.<|end|>\n{ONE_TURN['phi3_chat']}"
    for name in ("huatuo", "gemma_instruct"):  # trained without any
        with pytest.raises(TemplateError):
            render(name, [system, FIRST])


def test_images_come_first_whatever_their_place() -> None:
    message = say("user", "Which", IMAGE, "is older?", IMAGE)
    assert render("vicuna_v1", [message]) == f"{USER} USER: <image>\n<image>\nWhich is older? ASSISTANT:"
    later = [*SECOND, say("assistant", "So."), say("user", IMAGE, "And here?")]
    assert render("llava_v0", later).endswith("###Assistant: So.###Human: <image>\nAnd here?###Assistant:")


def test_the_image_can_be_any_text() -> None:
    marked = "<im_start><im_patch><im_end>"
    assert render("llava_v1", [FIRST], image=marked) == f"{HUMAN} USER: {marked}\nWho? ASSISTANT:"
    assert render("llava_v1", [FIRST], image='"%}{{"') == f'{HUMAN} USER: "%}}{{{{"\nWho? ASSISTANT:'


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_an_answered_conversation_ends_with_the_stop(name: str) -> None:
    prompt = render(name, [FIRST, say("assistant", "Ann.")], ask=False)
    if name == "huatuo":  # the tokenizer's own end, which no later turn has before it
        assert prompt.endswith("Ann. \n")
        return
    assert prompt.rstrip("\n").endswith(f"Ann.{' ' if '[INST]' in prompt else ''}{CONVERSATIONS[name].stop}")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_example_is_what_the_template_renders(name: str) -> None:
    assert example(CONVERSATIONS[name], "<im>") == render(name, [say("user", IMAGE, QUESTION)], image="<im>")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_template_of_ours_is_recognised_and_no_other(name: str) -> None:
    text = chat_template(CONVERSATIONS[name], '<im_start><i"m><im_end>', "<video>")
    assert written_as(text) == written_as(chat_template(CONVERSATIONS[name], "<image>") + "\n") == CONVERSATIONS[name]
    assert written_as(text.replace("state.opened = true", "state.opened = false")) is None
    assert written_as(f"{ONE_TURN[name]} {{{{ messages }}}}") is None


@given(name=st.sampled_from(list(CONVERSATIONS)), texts=st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_both_forms_of_content_are_the_same(name: str, texts: list[str]) -> None:
    roles = ["user", "assistant"] * 3
    plain = [say(role, text) for role, text in zip(roles, texts, strict=False)]
    listed = [say(role, {"type": "text", "text": text}) for role, text in zip(roles, texts, strict=False)]
    prompt = render(name, plain)
    assert prompt == render(name, listed)
    assert all(text in prompt for text in texts)


@pytest.mark.parametrize("messages", [[say("tool", "42")], [FIRST, say("system", "Be short.")]])
def test_other_roles_are_refused(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(TemplateError):
        render("vicuna_v1", messages)


V0 = {"model_type": "llama", "max_sequence_length": 2048, "mm_use_im_start_end": True, "use_mm_proj": True}
V1 = {"model_type": "llava", "max_position_embeddings": 2048, "mm_use_im_start_end": True}
V15 = {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad", "mm_use_im_start_end": False}
QWEN = {"model_type": "llava", "architectures": ["LlavaQwenForCausalLM"], "mm_projector_type": "mlp2x_gelu"}


@pytest.mark.parametrize(
    ("expected", "config", "specials", "because"),
    [
        ("llava_v0", V0, ["<im_patch>", "<im_start>", "<im_end>"], "max_sequence_length"),
        ("llava_v1", V1, ["<im_patch>", "<im_start>", "<im_end>"], "linear"),
        ("llava_v1", {**V1, "mm_projector_type": "linear"}, [], "linear"),
        ("vicuna_v1", V15, [], "mlp2x_gelu"),
        (
            "vicuna_v1",
            {
                "model_type": "llava",
                "mm_projector_type": "mlp3x_gelu",
                "image_aspect_ratio": "anyres",
                "mm_patch_merge_type": "spatial_unpad",
            },
            [],
            "anyres",
        ),
        ("mistral_instruct", {**V15, "model_type": "llava_mistral"}, [], "Mistral"),
        ("vicuna_v1", {**V15, "model_type": "llava_mistral", "sliding_window": 4096}, [], "BakLLaVA"),
        ("bunny_llama", {**V15, "model_type": "bunny-llama"}, {"<|start_header_id|>"}, "Bunny"),
        ("bunny", {**V15, "model_type": "bunny-qwen2"}, {"<|im_start|>"}, "Bunny"),
        ("bunny", {**V15, "model_type": "bunny-phi3", "rms_norm_eps": 1e-5}, {"<|end|>"}, "Bunny"),
        ("llama3_chat", {**V15, "unfreeze_mm_vision_tower": True}, {"<|start_header_id|>"}, "xtuner"),
        ("phi3_chat", V15, {"<|end|>"}, "xtuner"),
        ("phi3_instruct", {**V15, "model_type": "llava_phi", "rms_norm_eps": 1e-5}, {"<|end|>"}, "Phi-3"),
        ("llava_llama_2", {"model_type": "llava", "_name_or_path": "./checkpoints/llama-2-7b-chat"}, [], "Llama 2 chat"),
        ("llava_v1", {"model_type": "llava", "_name_or_path": "meta-llama/Llama-2-13b-hf"}, [], "nothing"),
        ("gemma_instruct", {**V15, "model_type": "llava_gemma"}, [], "Gemma"),
        ("huatuo", {**V15, "model_type": "llava_qwen2"}, {"<|im_start|>"}, "HuatuoGPT"),
        ("mistral_instruct", {"model_type": "llava", "architectures": ["LlavaMistralForCausalLM"]}, [], "Mistral"),
        ("chatml_direct", V15, {"<|im_start|>", "<|im_end|>"}, "not a Qwen"),
        ("qwen", QWEN, {"<|im_start|>", "<|im_end|>"}, "a Qwen"),
        ("qwen", {**V15, "model_type": "llava_qwen"}, {"<|im_start|>"}, "a Qwen"),
        ("llama3", V15, {"<|start_header_id|>"}, "start_header_id"),
        (
            "llama_3",
            {**V15, "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"},
            {"<|start_header_id|>"},
            "start_header_id",
        ),
        ("llava_v1", {"model_type": "llava"}, [], "nothing"),
        ("llava_v1", {"model_type": "llava", "architectures": 7, "mm_projector_type": {}, "text_config": []}, [], "nothing"),
        ("llava_llama_2", {**V15, "conv_mode": "llava_llama_2"}, {"<|im_start|>"}, "conv_mode"),
    ],
)
def test_the_family_is_chosen_by_evidence(expected: str, config: dict[str, Any], specials: Any, because: str) -> None:
    families = tuple(fitting(config, decoder=decoder_of(config).model_type))
    choice = choose(config, specials, families)
    assert choice.conversation.name == expected
    assert because in choice.evidence
    assert choice.rivals == () or "prompt not certain" in choice.doubt
    named = choose(config, specials, families, name="qwen")  # a name given wins over everything
    assert (named.conversation.name, named.doubt) == ("qwen", "")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="llava_v9") as refusal:
        choose(V15, [], (), name="llava_v9")
    assert all(name in str(refusal.value.hint) for name in CONVERSATIONS)
    for recorded in ("llava_v9\x1b", ["llava_v1"], 1):
        with pytest.raises(InputError, match="conv_mode") as refused:
            choose({"conv_mode": recorded}, [], ())
        assert "\x1b" not in refused.value.what
