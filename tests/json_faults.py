"""Every value of the small JSON files of sound checkpoints, put wrong: files, places, values, and the commands that they go through."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent / "llava_weights"
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
BASE, DELTA, META = (FIXTURES / "A-delta-v0" / name for name in ("base-hf-bin", "delta-308-may4", "base-meta/13B"))
LLAVA, WHOLE, HUB = (
    FIXTURES / "C-v1.5" / name for name in ("original-no-vision-bin", "original-with-vision-safetensors", "hf-by-tf4.47.1")
)
NEXT, NEXT_HUB = (FIXTURES / "D-v1.6" / name for name in ("original-vicuna", "hf-by-tf4.47.1-vicuna"))
CLIP, VICUNA, LORA = FIXTURES / "common/clip-tiny-42px", FIXTURES / "B-lora/base-vicuna-tiny", FIXTURES / "B-lora/llava-v1.5-tiny-lora"
PEFT, PLAIN = FIXTURES / "F-peft/base-fp16", FIXTURES / "F-peft"
PLACES = {
    "base": BASE, "delta": DELTA, "clip": CLIP, "vicuna": VICUNA, "llava": LLAVA, "peft": PEFT, "lora": LORA, "whole": WHOLE, "next": NEXT,
}  # fmt: skip
# Through which commands a kind goes; {it} is the changed copy.
USES: dict[Path, tuple[str, ...]] = {
    BASE: ("inspect {it}", "verify {it}", "apply-delta --base {it} --delta {delta} -o {out}"),
    DELTA: ("inspect {it}", "verify {it}", "apply-delta --base {base} --delta {it} -o {out}"),
    META: ("inspect {it}", "verify {it}", "apply-delta --base {it} --delta {delta} -o {out}"),
    LLAVA: (
        "inspect {it}", "verify {it}", "convert {it} --vision-tower {clip} -o {out}", "convert {it} --to llava -o {out}",
        "smoke {it} --vision-tower {clip} --original {it}",
    ),
    WHOLE: ("inspect {it}", "verify {it}", "convert {it} -o {out}", "smoke {it} --original {whole}"),
    HUB: (
        "inspect {it}", "verify {it}", "convert {it} --to llava -o {out}", "convert {it} --to llava-hf -o {out}",
        "smoke {it} --original {whole}", "smoke {it} --prompt hello",
    ),
    NEXT: ("inspect {it}", "verify {it}", "convert {it} -o {out}", "smoke {it} --original {next}"),
    NEXT_HUB: ("inspect {it}", "verify {it}", "convert {it} --to llava -o {out}", "smoke {it} --original {next}"),
    VICUNA: (
        "merge-lora --base {it} --lora {lora} -o {out}",
        "merge-lora --base {it} --lora {lora} --to llava-hf --vision-tower {clip} -o {out}",
    ),
    LORA: ("merge-lora --base {vicuna} --lora {it} -o {out}",),
    CLIP: ("inspect {it}", "convert {llava} --vision-tower {it} -o {out}", "smoke {llava} --vision-tower {it} --original {llava}"),
    **{
        PLAIN / name / "adapter": ("merge-lora --base {peft} --lora {it} -o {out}",)
        for name in ("plain", "dora", "embedding-lora", "patterns")
    },
}  # fmt: skip
LONG = "x" * 5000
# As they stand in the file; the first few are what a hand-edited or half-written file holds most often.
VALUES = (
    "null", "[]", "{}", '"x"', "-1", "0", "true", "1e308", "1e400", "NaN", '""', "[[]]", '{"a": 1}', str(2**70), "0.5", json.dumps(LONG),
    '[null, "x", {}]', "",
)  # fmt: skip
ASKED = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json")
MOST = 6  # entries of a long list or object that are tried: the first ones and the last


@dataclass(frozen=True)
class Fault:
    """`file` of `kind` with the value at `place` spelled as `value`; "" stands for a key that is missing."""

    kind: Path
    file: str
    place: tuple[str | int, ...]
    value: str
    new: bool = False  # a key that the file lacks

    def __str__(self) -> str:
        where = "".join(f"[{step!r}]" for step in self.place)
        return f"{self.kind.name}/{self.file}{where} = {self.value[:40] or 'missing'}"

    def text(self) -> str:
        """The file's new content."""
        content = json.loads((self.kind / self.file).read_bytes())
        return spelled(content, self.place, self.value)


def spelled(content: Any, place: tuple[str | int, ...], value: str) -> str:
    mark = "\N{SNOWMAN}here"
    if not place:
        return value
    inner = content
    for step in place[:-1]:
        inner = inner[step]
    if value:
        inner[place[-1]] = mark
    else:
        del inner[place[-1]]
    return json.dumps(content, ensure_ascii=False).replace(f'"{mark}"', value)


def places(value: Any, before: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where a value stands in a file: the whole first, then each entry of it."""
    yield before
    steps: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for step in steps if len(steps) <= 8 * MOST else [*steps[: MOST - 1], steps[-1]]:
        yield from places(value[step], (*before, step))


def asked() -> list[str]:
    """Every key that the package asks a mapping for, by its source."""
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    return sorted(set(re.findall(r"""\.get\(f?"(\w+)"|"(\w+)" (?:not )?in \w*config""", source)) - {""}, key=str)


def every() -> list[Fault]:
    """All of them, in an order that does not depend on the machine: in place of each value, and under each key that is asked for."""
    found, keys = list[Fault](), sorted({key for pair in asked() for key in pair if key})
    for kind in USES:
        for path in sorted(kind.glob("*.json")):
            content = json.loads(path.read_bytes())
            found += [Fault(kind, path.name, place, value) for place in places(content) for value in VALUES]
            if path.name in ASKED:
                inner = [(), *((key,) for key in ("text_config", "vision_config") if key in content)]
                absent = [(*where, key) for where in inner for key in keys if key not in (content[where[0]] if where else content)]
                found += [Fault(kind, path.name, place, value, new=True) for place in absent for value in VALUES if value]
    return found


def some(faults: list[Fault], count: int) -> list[Fault]:
    """`count` of them, evenly over the whole; the step is no divisor of the number of values, so that all of these come."""
    step = max(len(faults) // count, 1)
    while math.gcd(step, len(VALUES)) > 1:
        step += 1
    return faults[::step]
