"""The demo: toy weights in the published layouts, and the real commands run on them, each shown before its output.

This module decides what is shown; `toy.py` makes the weights.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import Interrupted, LlavaWeightsError, OutputError
from ..storage.atomic import output_error
from ..write.work_folder import partial_folder
from .console import Console
from .toy import make_toys

DEMO_MARKER = ".llava-weights-demo"
DEMO_MARK = b"Made by `llava-weights demo`, which deletes and makes again the folders beside this file that it made.\n"
MADE = ("llama", "delta", "vicuna", "lora", "clip", "llava", "wrong", "small", "again", "tuned", "llava-hf")


@dataclass(frozen=True)
class Scene:
    """One command: why it is run, its arguments, the exit code it should end with. Run inside `inside` if that is given."""

    title: str
    command: tuple[str, ...]
    code: int = 0
    inside: Path | None = None

    @property
    def line(self) -> str:
        """What a user would type."""
        typed = shlex.join(self.command)
        return f"$ {typed}" if self.inside is None else f"$ (cd {shlex.quote(str(self.inside))} && {typed})"


def run(folder: Path, console: Console, scenes: Callable[[Path], Iterable[Scene]] | None = None) -> int:
    """Make the toys in `folder`, play every scene, and return 0 or the exit code of the first command that did not end as it should.

    The scenes are those of `demo_scenes`, unless others are given.
    Raises OutputError for a folder that holds anything but an earlier demo, or can't be written.
    """
    _clear(folder)
    try:
        return _perform(folder, console, scenes or demo_scenes)
    except (LlavaWeightsError, KeyboardInterrupt) as error:
        known = Interrupted.of(error) if isinstance(error, KeyboardInterrupt) else error
        known.kept = f"What was made is in `{folder}`"
        raise known from error


def _perform(folder: Path, console: Console, scenes: Callable[[Path], Iterable[Scene]]) -> int:
    try:
        make_toys(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        _say(console, f"Made a toy LLaMA and a LLaVA delta in {folder}: {size / 1e6:.1f} MB of random values, in the published layouts.")
        for scene in scenes(folder):
            if code := _play(scene, console):
                return code
    except OSError as error:
        raise output_error(error, folder) from error
    _say(console, "\n" + "\n".join(_closing(folder)))
    console.summary((), {}, str(folder))
    return 0


def demo_scenes(folder: Path) -> Iterator[Scene]:
    llama, delta, vicuna, lora, clip, llava, wrong, small, again, tuned, hub = (str(folder / name) for name in MADE)
    inspect, apply, make, merge, convert = (
        ("llava-weights", verb) for verb in ("inspect", "apply-delta", "make-delta", "merge-lora", "convert")
    )
    yield Scene("What is this? LLaMA, as Meta ships it.", (*inspect, llama))
    yield Scene("And this? It looks like a model, but is only a difference.", (*inspect, delta))
    added = "Add the two. What was wrong in the small files is repaired and listed."
    yield Scene(added, (*apply, "--base", llama, "--delta", delta, "-o", llava, "-v"))
    if shutil.which("sha256sum"):
        yield Scene("Is on disk what was computed? Any machine can check it.", ("sha256sum", "-c", "SHA256SUMS"), inside=Path(llava))
    yield Scene("What is it now?", (*inspect, llava))
    mistaken = "A mistake often made: Vicuna as the base. Its names and shapes fit, its values do not. Nothing is written."
    yield Scene(mistaken, (*apply, "--base", vicuna, "--delta", delta, "-o", wrong), code=3)
    tuning = "A LoRA that somebody trained on the result. Each of its tensors must find its place, and how much of it arrives is printed."
    yield Scene(tuning, (*merge, "--base", llava, "--lora", lora, "-o", tuned))
    published = "For publishers: a delta that loses nothing, and is smaller."
    yield Scene(published, (*make, "--base", llama, "--tuned", llava, "--codec", "integer", "-o", small))
    yield Scene("Back to the model, quietly this time.", (*apply, "--base", llama, "--delta", small, "-o", again, "-q"))
    if shutil.which("cmp"):
        yield Scene(
            "Is it the same? Then `cmp` says nothing.", ("cmp", *(os.path.join(made, "model.safetensors") for made in (llava, again)))
        )
    everything = "All of it in one pass, and in the layout that transformers, vLLM and others load: delta, LoRA, vision tower."
    yield Scene(everything, (*convert, llama, "--delta", delta, "--lora", lora, "--vision-tower", clip, "-o", hub))


def _closing(folder: Path) -> tuple[str, ...]:
    return (
        "Done: LLaMA + delta = LLaVA, checked to the last byte; a wrong base was refused before a byte was written; a LoRA is merged.",
        f"{folder / 'llava-hf'} loads with transformers' AutoProcessor and LlavaForConditionalGeneration; its README.md shows the lines.",
        "With real weights: llava-weights apply-delta --base LLAMA-13B --delta liuhaotian/LLaVA-13b-delta-v0 -o LLaVA-13B-v0",
    )


def _play(scene: Scene, console: Console) -> int:
    """Show and run one command, its two streams as one so that they stay in order. Returns 0 where it ended as it should."""
    _say(console, f"\n{scene.title}\n{scene.line}")
    sink = subprocess.PIPE if console.quiet else None if sys.stdout else subprocess.DEVNULL
    program, *arguments = scene.command
    command = [sys.executable, "-m", "llava_weights", *arguments] if program == "llava-weights" else [program, *arguments]
    done = subprocess.run(command, cwd=scene.inside, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
    if done.returncode == scene.code:
        return 0
    if done.stdout:
        console.document(f"{scene.line}\n{done.stdout.decode(errors='replace')}", {})
    console.document(f"\nThe demo ends here: exit code {done.returncode}, expected {scene.code}", {})
    return 128 - done.returncode if done.returncode < 0 else done.returncode or 1  # below 0: killed by that signal


def _say(console: Console, text: str) -> None:
    if not console.quiet:
        console.document(text, {})


def _clear(folder: Path) -> None:
    """An empty folder but for the marker. Deletes what an earlier demo made, and nothing else. Raises OutputError where there is more."""
    marker = folder / DEMO_MARKER
    earlier = marker.is_file() and marker.read_bytes() == DEMO_MARK and not any(path.is_symlink() for path in _made(folder))
    if os.path.lexists(folder) and not earlier and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(
            f"`{folder.name}` exists and is not an earlier demo",
            facts={"folder": folder.absolute()},
            hint="give a folder that does not exist yet: `llava-weights demo DIR`",
        )
    try:
        for path in _made(folder):
            if path.exists():
                shutil.rmtree(path)
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_bytes(DEMO_MARK)
    except OSError as error:
        raise output_error(error, folder) from error


def _made(folder: Path) -> list[Path]:
    """What a demo may have left, finished or not."""
    return [path for name in MADE for path in (folder / name, partial_folder(folder / name))]
