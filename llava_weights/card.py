"""The model card (`README.md`) of an output: what was combined, how, what was repaired, and how to check it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import __version__
from .checkpoint import Origin, Step
from .manifest import FileEntry, TensorEntry, root_of_tensors
from .plan import Plan

PROMPTS = {  # llava/conversation.py at 8959d5c: `v0` turns end in ###, `v1` assistant turns in </s>
    "v0": "`###Human: <question>###Assistant:`, stop at `###`",
    "v1": "`USER: <question> ASSISTANT:`, stop at `</s>`",
}


def make_card(plan: Plan, files: Sequence[FileEntry], tensors: Sequence[TensorEntry], tallies: Mapping[str, int]) -> str:
    """Markdown with front matter. Only Hub ids that were really used become `base_model`; nothing is invented for folders."""
    title = " + ".join(origin.name for step in plan.history for _, origin in step.inputs)
    parts = [_front_matter(plan), f"# {title}\n", f"Made by llava-weights {__version__}.\n"]
    parts += [_step(step) for step in plan.history]
    parts += [_prompt(plan), _loss(tallies), _checks(files, tensors)]
    return "\n".join(part for part in parts if part)


def _front_matter(plan: Plan) -> str:
    ids = [origin.name for step in plan.history for _, origin in step.inputs if origin.revision]
    lines = ["---", "tags: [llava, llava-weights]"]
    if any(name.startswith("model.mm_projector") for shard in plan.shards for name, _ in shard.tensors):
        lines.append("pipeline_tag: image-text-to-text")
    if ids:
        lines += ["base_model:", *(f"- {name}" for name in ids)]
    return "\n".join([*lines, "---", ""])


def _step(step: Step) -> str:
    lines = [f"## {step.operation}\n", "| role | input | revision | files |", "|---|---|---|---|"]
    lines += [f"| {role} | {origin.name} | {origin.revision or '-'} | {_files(origin)} |" for role, origin in step.inputs]
    lines += ["", *(f"- {label}: {text}" for label, text in step.summary.items())]
    lines += [f"- {label}: {value}" for label, value in step.options.items()]
    lines += [f"- repaired: {repair}" for repair in step.repairs]
    lines += [f"- note: {note}" for note in step.notes]
    lines += [f"- warning: {warning}" for warning in step.warnings]
    return "\n".join([*lines, ""])


def _files(origin: Origin) -> str:
    return f"{len(origin.files)} {origin.container}, {sum(file.size for file in origin.files):,} bytes"


def _prompt(plan: Plan) -> str:
    prompt = next((str(step.checks["prompt"]) for step in plan.history if "prompt" in step.checks), "")
    return f"## Prompt\n\n{PROMPTS[prompt]}\n" if prompt in PROMPTS else ""


def _loss(tallies: Mapping[str, int]) -> str:
    if not tallies.get("elements"):
        return ""
    lost, elements = tallies.get("lost", 0), tallies["elements"]
    share = f"{lost:,} of {elements:,} values ({lost / elements:.4%})"
    return f"Adding the base again gives the tuned model but for {share}, each one rounding off.\n"


def _checks(files: Sequence[FileEntry], tensors: Sequence[TensorEntry]) -> str:
    lines = ["## Check it\n", "```", "sha256sum -c SHA256SUMS", "```\n", f"Root of all tensors: `{root_of_tensors(tensors)}`\n"]
    return "\n".join(lines)
