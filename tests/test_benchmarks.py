"""The benchmark suite measures what it says: true bytes and peaks of whole process trees, ratios within a round, tables that parse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cores, inputs, picture, recording, report, run
from benchmarks.measure import Failed, measure
from benchmarks.synthetic import write_base, write_delta
from llava_weights.families.decoders import Size
from llava_weights.write.plan import Settings

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20


def test_it_runs_as_a_script_and_as_a_module() -> None:
    for command in (["-m", "benchmarks.run"], ["benchmarks/run.py"]):
        done = subprocess.run(
            [sys.executable, *command, "--help"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
        )
        assert (done.returncode, b"--growth" in done.stdout) == (0, True), done.stderr


def rows_of(table: str) -> list[dict[str, str]]:
    """A Markdown table as one dict per row. Every row has the heading's number of cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    heading, rule, *rows = lines
    assert set("".join(rule)) == {"-"}
    return [dict(zip(heading, row, strict=True)) for row in rows]


def test_memory_and_bytes_of_a_grandchild_count(tmp_path: Path) -> None:
    """A shell's child that holds 64 MiB and writes 8 MiB: both belong to the run, though the process started is the shell."""
    program = "import time; held = bytearray(b'x' * (64 << 20)); open('OUT', 'wb').write(held[: 8 << 20]); time.sleep(0.2)"
    found = measure(
        [("sh", "-ec", f'"{sys.executable}" -c "{program.replace("OUT", f"{tmp_path}/out/file")}"; true')], [], tmp_path / "out"
    )
    assert 64 * MIB <= found.anonymous <= found.peak < 200 * MIB
    assert 8 * MIB <= found.asked_written < 9 * MIB
    assert found.wall >= 0.2 > 0 < found.cpu


def test_steps_are_summed_and_the_output_is_new(tmp_path: Path) -> None:
    """Each command adds to the times; what an earlier run left in the output folder is gone."""
    step = ("sh", "-ec", f"sleep 0.1; mkdir {tmp_path}/out/made 2> /dev/null || test -e {tmp_path}/out/made")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    found = measure([step, step], [], tmp_path / "out")
    assert found.wall >= 0.2
    assert not (tmp_path / "out" / "old").exists()


def test_a_failure_tells_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"^ValueError: no luck$"):
        measure([(sys.executable, "-c", "raise ValueError('no luck')")], [], tmp_path / "out")


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that became three times as slow in one round changes no ratio, and a round that the other missed is left out."""
    ours = {"0": {"wall": 1.0}, "1": {"wall": 3.0}, "2": {"wall": 100.0}}
    other = {"0": {"wall": 2.0}, "1": {"wall": 6.0}}
    assert report.ratios(ours, other) == [2.0, 2.0]
    assert (report.spread([3.0, 1.0, 2.0]), report.spread([2.001, 2.0])) == ("2.00 (1.00-3.00)", "2.00")


def test_a_line_through_points_of_a_line() -> None:
    assert report.line([1, 2, 4], [5, 7, 11]) == pytest.approx((3, 2, 0))
    assert report.line([0, 1, 2], [0, 3, 0])[2] == pytest.approx(2)


def test_one_case_from_inputs_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`convert` at a tiny size through main(): a program that is missing is listed, tables and picture parse, old text stays."""
    cases = run.make_cases

    def with_missing(inputs: object, out: Path) -> list[object]:
        case = next(case for case in cases(inputs, out) if case.name == "convert-rows")
        first, _, copy, *_ = case.contenders
        contenders = (
            replace(first, warm=False),
            replace(copy, warm=False),
            replace(copy, name="missing", commands=(("/missing/program",),)),
        )
        return [replace(case, contenders=contenders)]

    monkeypatch.setattr(run, "make_cases", with_missing)
    monkeypatch.setattr(run, "TRIAL_GIGABYTES", 0.001)  # one layer
    monkeypatch.setitem(inputs.SIZES, "tiny", Size("tiny", 64, 1, 2, 176))
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("# Old\n\n## Earlier figures\n\nas they were\n")
    sizes = ("--gigabytes", "0.001", "--width", "tiny", "--pairs", "1")
    run.main(["--only", "convert-rows", "--folder", f"{tmp_path}/bench", "--report", f"{page}", *sizes])

    text = page.read_text()
    first, copy = rows_of(text.partition("### convert-rows, cold cache")[2].partition("##")[0])
    assert (first[""], first["runs"], first["wall / llava-weights"], copy[""]) == ("llava-weights", "1", "1.00", "`cp`")
    assert float(copy["wall / llava-weights"]) < 1  # no Python to start
    assert float(copy["peak MiB"]) < float(first["peak MiB"])
    case = json.loads((tmp_path / "bench" / "figures.json").read_text())["cases"]["convert-rows"]
    assert case["cold"]["`cp`"]["0"]["disk_written"] == pytest.approx(case["bytes"], rel=0.01)
    assert "- convert-rows, missing: " in text
    assert text.endswith("## Earlier figures\n\nas they were\n")
    assert "# Old" not in text
    ElementTree.parse(page.with_suffix(".svg"))


def test_a_recording_shows_what_a_terminal_showed(tmp_path: Path) -> None:
    """Of a line that is written over again and again one frame stays, and what stood there last; long lines wrap; colours become SVG."""
    bar = "".join(f"\r{percent:3}% |\x1b[K" for percent in range(101))
    data = f"Plan\r\n  \x1b[32mok\x1b[0m  <b>\r\n{bar}\r\x1b[KWrote it\r\n{'x' * 150}\r\n".encode()
    shown = recording.lines(data)
    assert shown == ["Plan", "  \x1b[32mok\x1b[0m  <b>", " 62% |", "Wrote it", "x" * 110, "x" * 40]
    svg = ElementTree.fromstring(recording.draw("llava-weights demo", shown))
    texts = ["".join(element.itertext()).replace("\N{NO-BREAK SPACE}", " ") for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["$ llava-weights demo", "Plan", "  ok  <b>", *shown[2:]]
    assert b"Python" in recording.record([sys.executable, "--version"], tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        recording.record(["false"], tmp_path)


@pytest.mark.parametrize(("most", "last", "count"), [(38.2, 40, 5), (308, 400, 5), (0.93, 1, 6), (11, 15, 4), (5, 5, 6)])
def test_ticks_are_round_and_reach_the_data(most: float, last: float, count: int) -> None:
    found = picture.ticks(most)
    assert (found[0], found[-1], len(found)) == (0, last, count)


def test_the_phases_of_a_command_add_up(tmp_path: Path) -> None:
    """Every phase that the model of processors needs is measured, and no call is counted twice."""
    size = Size("tiny", 512, 2, 4, 1408)
    write_base(tmp_path / "base", size, vocabulary=2000)
    write_delta(tmp_path / "delta", size, vocabulary=2000, added=0, vision=0)
    options = ["apply-delta", "--base", tmp_path / "base", "--delta", tmp_path / "delta"]
    done = subprocess.run(
        [sys.executable, cores.PHASES, tmp_path / "out", *options], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert {*cores.WORKERS, cores.FILE_DIGEST, cores.STARTING, "reading back"} <= found["phases"].keys()
    assert all(spent >= 0 for spent in found["phases"].values()), found
    assert 0 < found["start"] < found["wall"]


def test_what_bounds_a_prediction() -> None:
    """Start-up is paid once; then the slowest of processors, workers, a file's digest and the disk counts."""
    rates = cores.Rates(start=1, all=4, workers=2, file_digest=1)
    assert rates.wall(10, 1, Settings(2)) == 1 + 10 * 4
    assert rates.wall(10, 2, Settings(2)) == 1 + 10 * 2
    assert rates.wall(10, 16, Settings(16, in_flight=1)) == 1 + 10 * 1
    assert rates.wall(10, 16, Settings(2, in_flight=8)) == 1 + 10 * 1
    assert rates.wall(10, 16, Settings(16, in_flight=8), disk=4) == 1 + 10 * 1
    assert rates.wall(10, 16, Settings(16, in_flight=8)) == 1 + 10 * 0.25
