"""The published checksums, against bytes that are known to have them, and hashing against coreutils."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llava_weights.checkpoint.rehash import WINDOW_BYTES
from llava_weights.checks.published import check_inputs
from llava_weights.errors import InputError
from llava_weights.events import Event, Progress
from llava_weights.families import published
from llava_weights.families.published import PUBLISHED, Published, recognise

PARAMS = '{{"dim": {}, "multiple_of": 256, "n_heads": {}, "n_layers": {}, "norm_eps": {}, "vocab_size": -1}}'
ADDED = {"<im_end>": 32002, "<im_patch>": 32000, "<im_start>": 32001, "[PAD]": 32003}
SPECIAL = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "<unk>"}
GENERATION = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "transformers_version": "4.28.0.dev0"}


def as_saved(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def test_every_record_is_well_formed() -> None:
    for record in PUBLISHED:
        assert record.what
        assert record.source
        assert record.sha256 or record.md5
        assert re.fullmatch(r"([0-9a-f]{64})?", record.sha256)
        assert re.fullmatch(r"([0-9a-f]{32})?", record.md5)
        assert record.size is None or record.size > 0
        assert record.kind in {kind for reasons in published.UNFIT.values() for kind in reasons} | {"tokenizer", "sidecar"}


def test_no_digest_and_no_file_is_listed_twice() -> None:
    for values in ([record.sha256 for record in PUBLISHED], [record.md5 for record in PUBLISHED], [record.what for record in PUBLISHED]):
        given = [value for value in values if value]
        assert len(given) == len(set(given))


def test_the_table_is_complete() -> None:
    """Meta: 1 tokenizer, 1 + 2 + 4 + 8 weight files and 4 params.json; Llama 2: 3; LLaVA #48: 10 with the tokenizer."""
    meta = [record for record in PUBLISHED if record.what.startswith("Meta's LLaMA ")]
    assert sum(record.what.endswith(".pth") for record in meta) == 15
    assert sum(record.what.endswith("params.json") for record in meta) == 4
    assert all(record.md5 and record.sha256 for record in meta)
    assert sum(record.kind == "llama2" for record in PUBLISHED) == 3
    assert sum("haotian-liu/LLaVA #48" in record.source for record in PUBLISHED) == 10
    assert sum("LLaVA-13b-delta-v0/pytorch_model" in record.what for record in PUBLISHED) == 3


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (PARAMS.format(4096, 32, 32, "1e-06").encode(), "Meta's LLaMA 7B/params.json"),
        (PARAMS.format(5120, 40, 40, "1e-06").encode(), "Meta's LLaMA 13B/params.json"),
        (PARAMS.format(6656, 52, 60, "1e-06").encode(), "Meta's LLaMA 30B/params.json"),
        (PARAMS.format(8192, 64, 80, "1e-05").encode(), "Meta's LLaMA 65B/params.json"),
        (as_saved(ADDED), "the author's merged LLaVA-13B-v0, added_tokens.json"),
        (as_saved(SPECIAL), "the author's merged LLaVA-13B-v0, special_tokens_map.json"),
        (as_saved(GENERATION), "the author's merged LLaVA-13B-v0, generation_config.json"),
    ],
)
def test_bytes_with_the_published_digests(data: bytes, what: str) -> None:
    """These files are short enough to be written again from their known content, which shows that the digests in the table are right."""
    found = recognise(sha256=hashlib.sha256(data).hexdigest(), md5=hashlib.md5(data).hexdigest())
    assert found is not None
    assert found.what == what


def test_the_tokenizer_has_one_record_for_both_digests() -> None:
    md5, sha256 = "eeec4125e9c7560836b4873b6f8e3025", "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
    found = recognise(md5=md5)
    assert found is not None
    assert (found.kind, found.size) == ("tokenizer", 499_723)
    assert recognise(sha256=sha256.upper()) == recognise(sha256=sha256, md5=md5) == found
    assert recognise(sha256="0" * 64, md5=md5) is None  # an md5 is easy to forge
    assert recognise() is None
    assert recognise(sha256="", md5="") is None


def test_a_record_with_one_digest_matches_whatever_the_other_is() -> None:
    merged = next(record for record in PUBLISHED if record.kind == "merged" and not record.sha256)
    assert recognise(sha256="0" * 64, md5=merged.md5) == merged


@pytest.mark.parametrize("size", [0, 1, WINDOW_BYTES - 1, WINDOW_BYTES, 2 * WINDOW_BYTES + 7])
def test_digests_are_those_of_coreutils(size: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes((b"0123456789abcdef" * (size // 16 + 1))[:size])
    events: list[Event] = []
    (found,) = check_inputs([path], "base", on_event=events.append)
    for digest, program in ((found.sha256, "sha256sum"), (found.md5, "md5sum")):
        assert digest == subprocess.run([program, path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert max((event.nbytes for event in events if isinstance(event, Progress)), default=0) == size


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_many_files_keep_their_order_and_are_read_once(jobs: int, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.bin" for i in (3, 1, 4, 2, 0)]
    for path in paths:
        path.write_text(path.name)
    events: list[Event] = []
    found = check_inputs([*paths, paths[0]], "base", jobs=jobs, on_event=events.append)
    assert [(each.file, each.sha256) for each in found] == [(path, hashlib.sha256(path.name.encode()).hexdigest()) for path in paths]
    assert [event.nbytes for event in events if isinstance(event, Progress)] == [5, 10, 15, 20, 25]


def test_progress_is_reported_by_one_thread_at_a_time(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(40)]
    for path in paths:
        path.write_bytes(b"x")
    inside, overlaps = threading.Lock(), []

    def progress(_: Event) -> None:
        overlaps.append(not inside.acquire(blocking=False))
        threading.Event().wait(0.001)
        inside.release()

    check_inputs(paths, "base", jobs=4, on_event=progress)
    assert overlaps == [False] * 41


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("good")
    for name, why in {"absent": "No such file", ".": "Is a directory"}.items():
        with pytest.raises(InputError, match=why):
            check_inputs([tmp_path / "good", tmp_path / name], "base")


def test_a_file_that_shrinks_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(2 * WINDOW_BYTES))
    with pytest.raises(InputError, match="changed while it was being read"):
        check_inputs([path], "base", on_event=lambda event: path.write_bytes(b"") if isinstance(event, Progress) else 0)


INTERRUPTED = """
import sys
from pathlib import Path
from llava_weights.checks.published import check_inputs
check_inputs([Path(name) for name in sys.argv[1:]], "base", on_event=lambda _: print(flush=True))
"""


def test_an_interrupt_stops_it_quickly(tmp_path: Path) -> None:
    """The files are holes: hashing all of these zeros would take minutes."""
    paths = [tmp_path / f"{i}.bin" for i in range(4)]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(200 << 30)
    command = [sys.executable, "-c", INTERRUPTED, *map(str, paths)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "\n"
        run.send_signal(signal.SIGINT)
        _, narration = run.communicate(timeout=10)
    assert "KeyboardInterrupt" in narration
    assert run.returncode in (1, -signal.SIGINT)


def test_findings_by_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("base", "llama2", "delta", "merged", "projector", "tokenizer", "sidecar")
    files = {kind: tmp_path / f"{kind}.bin" for kind in (*kinds, "new")}
    for kind, path in files.items():
        path.write_text(kind)
    planted = tuple(Published(f"some {kind}", kind, "a test", md5=hashlib.md5(kind.encode()).hexdigest()) for kind in kinds)
    monkeypatch.setattr(published, "PUBLISHED", planted)

    wrong = {
        "base": {"llama2", "merged", "delta", "projector"},
        "delta": {"base", "llama2", "merged"},
        "merged": {"base", "llama2", "delta"},
    }
    for role, unfit in wrong.items():
        findings = check_inputs(list(files.values()), role)
        assert [finding.file for finding in findings] == list(files.values())
        for kind, finding in zip(files, findings, strict=True):
            expected = "unknown" if kind == "new" else "wrong" if kind in unfit else "known"
            assert finding.verdict == expected, (role, kind)
            assert (finding.sha256, finding.md5) == (hashlib.sha256(kind.encode()).hexdigest(), hashlib.md5(kind.encode()).hexdigest())
            assert f"`{kind}.bin`" in finding.text
            assert kind == "new" or f"some {kind}" in finding.text


def test_swapped_inputs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "consolidated.00.pth"
    shutil.copyfile(__file__, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(published, "PUBLISHED", (Published("Meta's LLaMA 13B", "base", "a test", sha256=digest),))
    (finding,) = check_inputs([path], "delta")
    assert finding.text == "`consolidated.00.pth` is Meta's LLaMA 13B: this is a base; are `--base` and `--delta` swapped?"
