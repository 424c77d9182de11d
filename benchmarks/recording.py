"""A picture of a run: the command in a terminal of its own, what it showed as an SVG. Of a progress bar one frame is kept.

python -m benchmarks.recording docs/run.svg [--gigabytes 2]    # apply-delta on synthetic inputs of LLaVA-7B's shapes
python -m benchmarks.recording FILE -- llava-weights verify it # any command
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

from benchmarks.synthetic import cut_to, write_base, write_delta
from llava_weights.families.decoders import LLAMA_SIZES

COLUMNS = 110  # of the terminal
LETTER, LINE, EDGE = 7.8, 18, 16  # pixels: width of a letter of 13 pixels in a monospaced font, height of a line, margin
COLOURS = {"31": "#ff7b72", "32": "#7ee787", "33": "#e3b341", "36": "#79c0ff", "34": "#79c0ff", "35": "#d2a8ff"}
FRAME = 0.62  # which of a bar's frames is kept
NAME = "LLaVA-7B-v0"


def record(command: Sequence[str], folder: Path) -> bytes:
    """What `command` writes to a terminal of `COLUMNS` columns. Raises CalledProcessError where it fails."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 60, COLUMNS, 0, 0))
    here = str(Path(__file__).resolve().parent.parent)
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "PYTHONPATH": here}
    running = subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave)
    os.close(slave)
    data = bytearray()
    with suppress(OSError):  # the end of a terminal is an error on Linux
        while piece := os.read(master, 1 << 16):
            data += piece
    os.close(master)
    if running.wait():
        raise subprocess.CalledProcessError(running.returncode, command, bytes(data))
    return bytes(data)


def lines(data: bytes) -> list[str]:
    """The lines that were shown, colours still in them, wrapped as the terminal wraps them. A line that was written over again and again
    is a bar: one frame of it is kept, and what stood there last."""
    found: list[str] = []
    for line in data.decode(errors="replace").replace("\x1b[K", "").replace("\r\n", "\n").removesuffix("\n").split("\n"):
        frames = [frame for frame in line.split("\r") if frame.strip()] or [""]
        kept = [frames[int(FRAME * (len(frames) - 1))], frames[-1]] if len(frames) > 2 else frames[-1:]
        for text in kept:
            found += wrapped(text.rstrip())
    return found


def wrapped(text: str) -> list[str]:
    if len(re.sub("\x1b\\[[0-9;]*m", "", text)) <= COLUMNS:
        return [text]
    plain = re.sub("\x1b\\[[0-9;]*m", "", text)
    return [plain[at : at + COLUMNS] for at in range(0, len(plain), COLUMNS)]


def draw(command: str, shown: Sequence[str]) -> str:
    """The picture of a terminal with `command` at its prompt and these lines below."""
    rows = [f"\x1b[1m$ {command}\x1b[0m", *shown]
    width, height = round(COLUMNS * LETTER + 2 * EDGE), LINE * len(rows) + 2 * EDGE
    body = [f"<text x='{EDGE}' y='{EDGE + LINE * (number + 0.75):.1f}'>{spans(row)}</text>" for number, row in enumerate(rows)]
    style = "font-family='ui-monospace,SFMono-Regular,Menlo,Consolas,monospace' font-size='13' fill='#e6edf3'"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img' {style}>"
    title = f"<title>{escape(command)}</title>"
    return "\n".join([head, title, f"<rect width='{width}' height='{height}' rx='8' fill='#0d1117'/>", *body, "</svg>"]) + "\n"


def spans(row: str) -> str:
    """A line with its colours as SVG."""
    out, style = [], ""
    for piece in re.split("(\x1b\\[[0-9;]*m)", row):
        if code := re.fullmatch("\x1b\\[([0-9;]*)m", piece):
            codes = code[1].split(";")
            colour = next((f" fill='{COLOURS[each]}'" for each in codes if each in COLOURS), "")
            style = colour + (" font-weight='bold'" if "1" in codes else "")
        elif piece:
            shown = escape(piece).replace(" ", "\N{NO-BREAK SPACE}")  # browsers make several blanks one
            out.append(f"<tspan{style}>{shown}</tspan>" if style else shown)
    return "".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2, help="of base and of delta")
    parser.add_argument("command", nargs="*")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        folder = Path.cwd() if given.command else Path(scratch)
        command = given.command
        if not command:
            size = cut_to(given.gigabytes, next(size for size in LLAMA_SIZES if size.name == "7B"))
            write_base(folder / "llama-7b", size)
            write_delta(folder / "LLaVA-7b-delta-v0", size)
            command = ["llava-weights", "apply-delta", "--base", "llama-7b", "--delta", "LLaVA-7b-delta-v0", "-o", NAME]
        program = [sys.executable, "-m", "llava_weights", *command[1:]] if command[0] == "llava-weights" else command
        given.picture.write_text(draw(" ".join(command), lines(record(program, folder))), encoding="utf-8")


if __name__ == "__main__":
    main()
