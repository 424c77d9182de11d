"""What loads an output: an expression of Python or a line for a shell, by the output's layout.

Sources: transformers' and PEFT's documentation; README of llama.cpp's tools/mtmd; `load_pretrained_model` in llava/model/builder.py of
haotian-liu/LLaVA, which chooses the class by a name that it is given.
"""

from __future__ import annotations

TRANSFORMERS = 'transformers.{model}.from_pretrained({path}, dtype="auto")'
BUILDER = 'llava.model.builder.load_pretrained_model({path}, None, "{name}")'

# layout -> form; {path} is the output, {model} the class that its config names, BASE the model that an adapter belongs to.
LOADING = {
    "llava-hf": TRANSFORMERS,
    "llama": TRANSFORMERS,
    "adapter": "peft.PeftModel.from_pretrained(BASE, {path})",
}
# The same in LLaVA's own layout, by the class that its config names. Other classes are those of other programs.
ORIGINAL_LOADING = {
    "LlavaLlamaForCausalLM": BUILDER.replace("{name}", "llava"),
    "LlavaMistralForCausalLM": BUILDER.replace("{name}", "llava-mistral"),
}
GGUF_LOADING = 'llama-mtmd-cli -m {text} --mmproj {vision} --jinja --image IMAGE -p "What is shown in this image?"'
DELTA_LOADING = "llava-weights apply-delta --base BASE --delta {path} -o OUT"
