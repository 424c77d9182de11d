"""What `smoke` says: each result once, in tokens, no warnings meant for developers, and nothing run in vain."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def hub(fixtures: Path) -> Path:
    return fixtures / "C-v1.5/hf-by-tf4.47.1"


@pytest.fixture
def original(fixtures: Path) -> Path:
    return fixtures / "C-v1.5/original-with-vision-safetensors"


def test_each_result_stands_once(cli: Any, hub: Path, original: Path) -> None:
    done = cli("smoke", hub, "--original", original)
    said = done.stdout + done.stderr
    assert done.code == 0
    assert re.findall(r"`(\w+)` same: ", said) == ["text", "rows", "table", "image"]
    assert said.count("top-1") == 4
    assert "place" not in said
    table = cli("smoke", hub, "--original", original, "-v").stdout.splitlines()
    assert table[0].split()[:3] == ["probe", "tokens", "NMSE"]
    quiet = cli("smoke", hub, "--original", original, "-q")
    assert (quiet.stdout, len(quiet.stderr.splitlines())) == ("", 1)


def test_half_precision_says_what_it_hides(cli: Any, hub: Path, original: Path) -> None:
    assert "plausible: half precision hides small faults" in cli("smoke", hub, "--original", original, "--dtype", "BF16").stdout


def test_the_words_of_a_model_stay_on_stdout(cli: Any, hub: Path) -> None:
    loud, quiet = cli("smoke", hub), cli("smoke", hub, "-q")
    assert quiet.stdout.startswith("the meaning of life is")
    assert loud.stdout.startswith(quiet.stdout)
    assert quiet.stderr.startswith("hf-by-tf4.47.1: ")


def test_a_recording_that_exists_is_refused_before_anything_is_opened(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    done = cli("smoke", "./nowhere", "--record", "there")
    assert (done.code, "`there` exists already" in done.stderr, (tmp_path / "there").read_text()) == (5, True, "mine")


def test_every_pass_through_the_weights_is_told(cli: Any, hub: Path, original: Path) -> None:
    lines = [json.loads(line) for line in cli("smoke", hub, "--original", original, "--json").stdout.splitlines()]
    started = [line for line in lines if line["type"] == "started"]
    assert [(line["what"], line["shards"]) for line in started] == [("Running", 4)] * 2


def test_progress_reaches_the_end_layer_by_layer(hub: Path, tmp_path: Path) -> None:
    import llava_weights as lw
    from llava_weights.smoke.generate import generate

    events: list[lw.Event] = []
    lw.record(hub, tmp_path / "new", on_event=events.append)
    (started,) = (event for event in events if isinstance(event, lw.Started))
    steps = [event for event in events if isinstance(event, lw.Progress)]
    assert [step.nbytes for step in steps] == sorted(step.nbytes for step in steps)
    assert steps[-1].nbytes == started.nbytes == 4 * lw.open_checkpoint(hub).nbytes
    assert len(steps) == 4 * 2  # layers
    assert list(dict.fromkeys(step.shard for step in steps)) == ["text", "rows", "table", "image"]
    events.clear()
    generate(lw.open_checkpoint(hub, whole=True), "the", new_tokens=3, on_event=events.append)
    nbytes = [event.nbytes for event in events if isinstance(event, lw.Progress)]
    assert nbytes == sorted(nbytes)
    assert nbytes[-1] <= events[0].nbytes  # type: ignore[union-attr]


def test_warnings_for_the_developers_of_transformers_are_not_shown(cli: Any, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_weights.smoke import recording

    def warn(*given: Any, **named: Any) -> Any:
        warnings.warn_explicit("`x` is deprecated", FutureWarning, "modeling.py", 1, module="transformers.modeling")
        return load(*given, **named)

    load = recording.load_forward
    monkeypatch.setattr(recording, "load_forward", warn)
    done = cli("smoke", hub)  # warnings are errors in tests
    assert (done.code, "deprecated" in done.stdout + done.stderr) == (0, False)
