"""The model card (`README.md`) of an output: what was combined, how, what was repaired, and how to check it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__
from ..checkpoint.chat_template import bare_prompt
from ..checkpoint.checkpoint import Origin, Step
from ..checkpoint.manifest import TensorEntry, root_of_tensors
from ..families.files import ADAPTER_CONFIG, CARD_TAGS, IMAGE_TASK
from ..families.llama_cpp import GGUF_TARGETS
from ..families.projectors import FORM_READERS
from ..families.prompts import CONVERSATIONS
from ..families.targets import TARGET_BY_TYPE
from ..storage.hub import REPO
from ..text import markdown_text, redact, visible
from .plan import Plan


def make_card(plan: Plan, tensors: Sequence[TensorEntry], tallies: Mapping[str, int]) -> str:
    """Markdown with front matter. Only Hub ids that were really used become `base_model`; folders name none. What comes from files or
    from the user is text in it, never markup."""
    title = " + ".join(origin.name for step in plan.history for _, origin in step.inputs)
    parts = [_front_matter(plan), f"# {markdown_text(title)}\n", f"Made by llava-weights {__version__}.\n"]
    parts += [_step(step) for step in plan.history]
    parts += [_use_gguf(plan) or _use(plan) or _use_adapter(plan) or _prompt(plan), _projector(plan), _loss(tallies), _checks(tensors)]
    return "\n".join(part for part in parts if part)


def _front_matter(plan: Plan) -> str:
    ids = [origin.name for step in plan.history for _, origin in step.inputs if origin.revision and REPO.fullmatch(origin.name)]
    lines = ["---", f"tags: [{', '.join(CARD_TAGS)}]"]
    if ADAPTER_CONFIG in plan.files:
        lines.append("library_name: peft")
    elif _last(plan, "gguf") or any("projector" in name for shard in plan.shards for name, _ in shard.tensors):
        lines.append(f"pipeline_tag: {IMAGE_TASK}")
    if ids:
        lines += ["base_model:", *(f"- {name}" for name in ids)]
    return "\n".join([*lines, "---", ""])


def _step(step: Step) -> str:
    cells = [(role, origin.name, origin.revision or "-", _files(origin)) for role, origin in step.inputs]
    rows = [*step.summary.items(), *step.options.items()]
    rows += [("repaired", text) for text in step.repairs]
    rows += [("note", text) for text in step.notes]
    rows += [("warning", text) for text in step.warnings]
    lines = [f"## {markdown_text(step.operation)}\n", "| role | input | revision | files |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(map(markdown_text, row))} |" for row in cells]
    lines += ["", *(f"- {markdown_text(label)}: {markdown_text(str(value))}" for label, value in rows)]
    return "\n".join([*lines, ""])


def _files(origin: Origin) -> str:
    return f"{len(origin.files)} {origin.container}, {sum(file.size for file in origin.files):,} bytes"


def _prompt(plan: Plan) -> str:
    prompt = next((str(step.checks["prompt"]) for step in plan.history if "prompt" in step.checks), "")
    found = CONVERSATIONS.get(f"llava_{prompt}")
    return f"## Prompt\n\n`{bare_prompt(found)}`, stop at `{found.stop}`\n" if found else ""


USE = """## Use it

```python
from transformers import AutoProcessor, {model}

model = {model}.from_pretrained(PATH, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(PATH, padding_side="left")
talk = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is shown in this image?"}}]}}]
prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
inputs = processor(images=[image], text=[prompt], padding=True, return_tensors="pt").to(model.device, model.dtype)
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=200), skip_special_tokens=True)[0])
```
{versions}
The template writes this prompt; whoever writes one by hand has to write it so, no program adds a part of it. Generation stops at {stop}.

{prompt}
{doubt}"""


VERSIONS = "\ntransformers has {model} from {since} on; {tested} is the newest that conversions to it were tested with.\n"
TORCHVISION = "Its AutoProcessor wants torchvision, for videos.\n"


def _use(plan: Plan) -> str:
    """How to run a llava-hf output, with the prompt that it was trained on."""
    checks = _last(plan, "prompt_text")
    if not checks:
        return ""
    model, stop = str(plan.config["architectures"][0]), f"`{checks['stop']}`"
    model = model if model.isidentifier() else "AutoModelForImageTextToText"
    row = TARGET_BY_TYPE.get(str(plan.config.get("model_type")))
    versions = VERSIONS.format(model=model, since=row.since, tested=row.tested) if row else ""
    versions += TORCHVISION if row and row.video else ""
    doubt = f"\n{markdown_text(checks['prompt_doubt'])}\n" if checks.get("prompt_doubt") else ""
    return USE.format(model=model, versions=versions, stop=markdown_text(stop), prompt=_block(checks["prompt_text"]), doubt=doubt)


USE_GGUF = """## Use it

```
llama-mtmd-cli -m {text} --mmproj {vision} --jinja --image IMAGE -p "What is shown in this image?"
llama-server -m {text} --mmproj {vision} --jinja
```

Without `--jinja` llama.cpp writes another prompt than the model was trained with, which is this one. Generation stops at {stop}.

{prompt}
{doubt}
What llama.cpp gets wrong of such a model today: {wrong}. The text model computes as in transformers, to rounding.
{smaller}"""
SMALLER = """
Smaller files, with other types than can be made without llama.cpp (the text model only):

```
llama-quantize {text} {small} Q4_K_M
```
"""


def _use_gguf(plan: Plan) -> str:
    """How to run a GGUF output with llama.cpp."""
    checks = _last(plan, "gguf")
    if not checks:
        return ""
    text, vision = (shard.name for shard in plan.shards)
    label = next((dtype for dtype in ("F32", "BF16", "F16") if text.endswith(f"-{dtype}.gguf")), "")
    small = shlex.quote(f"{text.removesuffix(f'-{label}.gguf')}-Q4_K_M.gguf") if label else ""
    words = {"text": shlex.quote(text), "vision": shlex.quote(vision)}
    return USE_GGUF.format(
        **words,
        stop=markdown_text(f"`{checks['stop']}`" if checks.get("stop") else "the token that the file names"),
        prompt=_block(checks["prompt_text"]) if checks.get("prompt_text") else "Its own chat template writes it.",
        doubt=f"\n{markdown_text(checks['prompt_doubt'])}\n" if checks.get("prompt_doubt") else "",
        wrong=GGUF_TARGETS[checks["gguf"]],
        smaller=SMALLER.format(text=words["text"], small=small) if small else "",
    )


USE_ADAPTER = """## Use it

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, PATH)  # onto the model that the adapter belongs to, in the layout named above
```

`llava-weights merge-lora --base BASE --lora PATH -o OUT` merges it.
"""


def _use_adapter(plan: Plan) -> str:
    """How to load an adapter."""
    return USE_ADAPTER if ADAPTER_CONFIG in plan.files else ""


def _block(text: str) -> str:
    """A block of code: its fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return "\n".join([fence, *(visible(redact(line)) for line in text.split("\n")), fence])


def _projector(plan: Plan) -> str:
    form = _last(plan, "projector_form").get("projector_form")
    if not form:
        return ""
    rows = [f"| {name}{' (this one)' if name == form else ''} | {consumers} |" for name, consumers in FORM_READERS.items()]
    text = "This model has one Linear between tower and decoder, where llava-hf has two. They can be the same map in three forms:"
    return "\n".join(["## Projector\n", f"{text}\n", "| `--projector-form` | consumers |", "|---|---|", *rows, ""])


def _last(plan: Plan, key: str) -> Mapping[str, Any]:
    return next((step.checks for step in reversed(plan.history) if key in step.checks), {})


def _loss(tallies: Mapping[str, int]) -> str:
    if not tallies.get("elements"):
        return ""
    lost, elements = tallies.get("lost", 0), tallies["elements"]
    share = f"{lost:,} of {elements:,} values ({lost / elements:.4%})"
    return f"Adding the base again gives the tuned model but for {share}, each one rounding off.\n"


def _checks(tensors: Sequence[TensorEntry]) -> str:
    return "\n".join(["## Check it\n", "```", "sha256sum -c SHA256SUMS", "```\n", f"Root of all tensors: `{root_of_tensors(tensors)}`\n"])
