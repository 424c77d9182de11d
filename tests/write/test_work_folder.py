"""What is the user's stays: a work folder is known by its marker alone, no input lies in a path that is written or deleted, however it is
spelled, and what would fail at the end is refused at the beginning."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llava_weights.checkpoint.checkpoint import Checkpoint, Step, open_checkpoint
from llava_weights.errors import OutputError
from llava_weights.events import Event, ShardDone
from llava_weights.write.execute import execute, preflight, run_plan
from llava_weights.write.plan import Plan, make_plan
from llava_weights.write.portions import Portion, execute_portion
from llava_weights.write.upload import job_at

ROOT = Path(__file__).resolve().parents[2]


def make_source(folder: Path) -> Path:
    torch.manual_seed(4)
    folder.mkdir(parents=True)
    save_file({f"layer.{n}.weight": torch.randn(20, 30).half() for n in range(6)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def plan_of(source: Path) -> Plan:
    opened = open_checkpoint(source)
    step = Step("copy", (("source", opened.origin),))
    return make_plan(Checkpoint(opened.tensors, opened.config, opened.origin, opened.files, (step,)), max_shard_size=3000)


def tree(folder: Path) -> dict[str, Any]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


class Cut(Exception):
    """Ends a run as if the process had died."""


def half_done(source: Path, out: Path) -> Path:
    def cut(event: Event) -> None:
        if isinstance(event, ShardDone) and event.index == 2:
            raise Cut

    with pytest.raises(Cut):
        execute(plan_of(source), out, on_event=cut)
    return out.with_name(out.name + ".partial")


# --- inputs ----------------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[..., Any]] = {
    "execute": execute,
    "force": lambda plan, out: execute(plan, out, force=True),
    "restart": lambda plan, out: execute(plan, out, restart=True),
    "finish": partial(execute, complete=True),
    "portion": lambda plan, out: execute_portion(plan, out, Portion(1, 2)),
    "dry run": preflight,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_with_a_lock_alone_is_no_work_folder(tmp_path: Path, way: str) -> None:
    """An input that is called like a work folder, and holds a file `lock` as one does."""
    source = make_source(tmp_path / "m.partial")
    (source / "lock").write_text("12345\n")
    before = tree(tmp_path)
    with pytest.raises(OutputError) as caught:
        WAYS[way](plan_of(source), tmp_path / "m")
    assert caught.value.exit_code == 5
    assert tree(tmp_path) == before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["out", "replaced", "mine"])
def test_an_input_in_the_work_folder(tmp_path: Path, place: str, way: str) -> None:
    """A base that lies in a true work folder: `--base n.partial/out -o n --restart`."""
    partial = half_done(make_source(tmp_path / "source"), tmp_path / "n")
    shutil.rmtree(partial / place, ignore_errors=True)
    source = make_source(partial / place)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"the work folder `n\.partial` is, holds or lies inside an input"):
        WAYS[way](plan_of(source), tmp_path / "n")
    assert tree(tmp_path) == before


def spelled(name: str, tmp_path: Path) -> Path:
    """Another name for the folder `n.partial/base`."""
    real, link = tmp_path / "n.partial/base", tmp_path / "link"
    if name == "dots":
        return tmp_path / "source/.." / "n.partial/base"
    if name == "relative":
        return Path(os.path.relpath(real))
    if name == "a link to it":
        link.symlink_to(real)
    elif name == "a link to above it":
        link.symlink_to(tmp_path)
        return link / "n.partial/base"
    elif name == "a link to a link":
        (tmp_path / "first").symlink_to(real)
        link.symlink_to("first")
    elif name == "links inside":  # the weights lie in another folder, their names here
        link = real
        moved = tmp_path / "moved"
        real.rename(moved)
        real.symlink_to(moved)
    return link


@pytest.mark.parametrize("name", ["dots", "relative", "a link to it", "a link to above it", "a link to a link", "links inside"])
def test_however_it_is_spelled(tmp_path: Path, name: str) -> None:
    partial = half_done(make_source(tmp_path / "source"), tmp_path / "n")
    make_source(partial / "base")
    source = spelled(name, tmp_path)
    plan, before = plan_of(source), tree(tmp_path)
    for out in (tmp_path / "n", tmp_path / "source/../n"):
        with pytest.raises(OutputError, match="is, holds or lies inside an input"):
            execute(plan, out, restart=True)
        assert tree(tmp_path) == before


def test_small_files_and_other_inputs_count_too(tmp_path: Path) -> None:
    partial = half_done(make_source(tmp_path / "source"), tmp_path / "n")
    (partial / "tokenizer.model").write_text("mine")
    plan = plan_of(tmp_path / "source")
    files = {**plan.files, "tokenizer.model": partial / "tokenizer.model"}
    with pytest.raises(OutputError, match="lies inside an input"):
        execute(Plan(plan.shards, plan.config, files, plan.history, plan.settings, plan.options), tmp_path / "n", restart=True)
    assert (partial / "tokenizer.model").read_text() == "mine"


def test_an_upload_writes_beside_nothing_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work folder of an upload is made in the current folder."""
    monkeypatch.chdir(tmp_path)
    partial = half_done(make_source(tmp_path / "source"), tmp_path / "model")
    source = make_source(partial / "base")
    before = tree(tmp_path)
    target, make_job = job_at("hf://owner/model", on_event=lambda event: None)
    monkeypatch.setattr("llava_weights.write.upload.UploadJob.occupied", False)
    with pytest.raises(OutputError, match=r"the work folder `model\.partial`"):
        run_plan(plan_of(source), target, make_job=make_job, restart=True)
    assert tree(tmp_path) == before


def test_the_commands(tmp_path: Path, fixtures: Path, cli: Callable[..., Any]) -> None:
    """As a user would do it, with the base's folder named like the work folder of the output."""
    shutil.copytree(fixtures / "A-delta-v0/base-hf-bin", tmp_path / "m.partial")
    (tmp_path / "m.partial/lock").write_text("")
    before = tree(tmp_path / "m.partial")
    for more in ([], ["--force"], ["--restart"], ["--shards", "1/2"], ["--finish"], ["--dry-run"]):
        done = cli("apply-delta", "--base", "m.partial", "--delta", fixtures / "A-delta-v0/delta-307-apr17", "-o", "m", *more)
        assert done.code == 5, done.stderr
        assert "Traceback" not in done.stderr
        assert tree(tmp_path / "m.partial") == before


def test_what_the_user_put_into_a_work_folder_stays(tmp_path: Path) -> None:
    partial = half_done(make_source(tmp_path / "source"), tmp_path / "out")
    (partial / "notes.txt").write_text("three years of work")
    (partial / "base").mkdir()
    execute(plan_of(tmp_path / "source"), tmp_path / "out")
    assert sorted(os.listdir(partial)) == ["base", "notes.txt"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3


def test_hard_links_and_neighbours_do_not_count(tmp_path: Path) -> None:
    """An old output that shares files with the input, as `cp -l` makes it, may be replaced; names that only look alike may be used."""
    source = make_source(tmp_path / "source")
    (tmp_path / "out").mkdir()
    os.link(source / "model.safetensors", tmp_path / "out/model.safetensors")
    before = tree(source)
    execute(plan_of(source), tmp_path / "out", force=True)
    execute(plan_of(source), tmp_path / "source2")
    assert tree(source) == before


# --- whose work ------------------------------------------------------------------------------------------------------


def as_of_0_1_0(partial: Path) -> None:
    """The work folder as 0.1.0 (aca22b4) leaves it: no marker, no `sources`, no format in the plan."""
    for name in (".llava-weights-work", "sources"):
        (partial / name).unlink()
    plan = json.loads((partial / "plan.json").read_text())
    del plan["format"]
    (partial / "plan.json").write_text(json.dumps(plan | {"version": "0.1.0"}, indent=2))


@pytest.mark.parametrize("lock", ["4321\n", "portions\n", ""])
def test_work_of_0_1_0_is_refused_in_plain_words(tmp_path: Path, lock: str) -> None:
    partial, out = half_done(make_source(tmp_path / "source"), tmp_path / "out"), tmp_path / "out"
    as_of_0_1_0(partial)
    (partial / "lock").write_text(lock)
    before = tree(partial / "out")
    assert before
    with pytest.raises(OutputError, match="was begun by another version of llava-weights") as caught:
        execute(plan_of(tmp_path / "source"), out)
    assert caught.value.facts["version, then"].startswith("0.1.0")
    assert "--restart" in str(caught.value.hint)
    assert tree(partial / "out") == before
    execute(plan_of(tmp_path / "source"), out, restart=True)
    assert not partial.exists()
    assert len(list(out.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("lock", [b"43", b"4\0\0\0\0", b"portio", b"\0" * 9])
def test_a_lock_that_a_power_cut_left(tmp_path: Path, lock: bytes) -> None:
    """It is never synced, so any part of it may be on the disk, with zeros for the rest."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/lock").write_bytes(lock)
    execute(plan_of(make_source(tmp_path / "source")), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("lock", ["held by another program\n", "\n\nx", "link"])
def test_a_lock_of_another_program(tmp_path: Path, lock: str) -> None:
    """A folder of that name with nothing but a lock that no run made."""
    (tmp_path / "out.partial").mkdir()
    if lock == "link":
        (tmp_path / "out.partial/lock").symlink_to("/dev/null")
    else:
        (tmp_path / "out.partial/lock").write_text(lock)
    source = make_source(tmp_path / "source")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="is not the work of an earlier run"):
        execute(plan_of(source), tmp_path / "out")
    assert tree(tmp_path) == before


# --- places where no output can end -----------------------------------------------------------------------------------

MOUNTED = """
import os, sys
import llava_weights as lw
plan = lw.make_plan(lw.open_checkpoint("source"))
for way in ({}, {"force": True}, {"restart": True}):
    try:
        lw.execute(plan, "here/out", **way)
        print("made")
    except lw.OutputError as error:
        print(error.what, error.kept, sorted(os.listdir("here")), sorted(os.listdir(sys.argv[1])))
"""


@pytest.fixture
def mounts() -> None:
    if os.geteuid() or not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("only root may mount, in a name space of its own")


@pytest.mark.parametrize(
    ("place", "mount"),
    [
        ("here/out", "mount -t tmpfs none here/out"),
        ("here/out", "mount --bind here/out here/out"),
        ("here/out.partial", "mount -t tmpfs none here/out.partial"),
        ("here/out.partial", "mount --bind other here/out.partial"),
    ],
)
def test_a_mount_point_can_not_be_replaced(mounts: None, tmp_path: Path, place: str, mount: str) -> None:
    """EBUSY and EXDEV, which came at the end, are reported before the first byte, even for a bind mount of the same file system."""
    make_source(tmp_path / "source")
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / "other").mkdir()
    inside = f'{mount} && exec "$0" -c "$1" {place}'
    words = ["unshare", "-m", "--propagation", "private", "bash", "-c", inside, sys.executable, MOUNTED]
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    name = Path(place).name
    expected = f"`{name}` is a mount point, so no output can get its name there None ['{name}'] []\n"
    assert done.stdout == expected * 3, done.stderr


def test_an_input_on_another_mount_is_the_same(mounts: None, tmp_path: Path) -> None:
    """`n.partial/base` seen through another mount."""
    partial = half_done(make_source(tmp_path / "source"), tmp_path / "n")
    make_source(partial / "base")
    (tmp_path / "other").mkdir()
    text = (
        'import llava_weights as lw\ntry:\n    lw.execute(lw.make_plan(lw.open_checkpoint("other")), "n", restart=True)\n'
        "except lw.OutputError as error:\n    print(error.what)"
    )
    inside = 'mount --bind n.partial/base other && exec "$0" -c "$1"'
    words = ["unshare", "-m", "--propagation", "private", "bash", "-c", inside, sys.executable, text]
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.stdout == "the work folder `n.partial` is, holds or lies inside an input\n", done.stderr
    assert (partial / "base/model.safetensors").exists()


def test_a_read_only_parent_with_a_work_folder_that_is_not(mounts: None, tmp_path: Path) -> None:
    (tmp_path / "here/out.partial").mkdir(parents=True)
    make_source(tmp_path / "source")
    inside = 'mount --bind here here && mount -o remount,ro,bind here && exec "$0" -c "$1" here/out.partial'
    words = ["unshare", "-m", "--propagation", "private", "bash", "-c", inside, sys.executable, MOUNTED]
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.stdout.count("can't write to `") == 3, done.stderr
    assert tree(tmp_path / "here") == {"out.partial": None}


def test_an_old_output_of_a_container_image(mounts: None, tmp_path: Path) -> None:
    """overlayfs moves no folder of a lower layer: the message says so, and once the old one is deleted only the rename is left."""
    make_source(tmp_path / "source")
    for name in ("lower/out", "upper", "here"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lower/out/old").write_text("old")
    layers = "lowerdir=lower,upperdir=upper/u,workdir=upper/w"
    inside = f'mount -t tmpfs none upper && mkdir upper/u upper/w && mount -t overlay none -o {layers} here || exit 9; exec "$0" -c "$1"'
    text = (
        'import shutil\nimport llava_weights as lw\nplan = lw.make_plan(lw.open_checkpoint("source"))\n'
        'try:\n    lw.execute(plan, "here/out", force=True)\nexcept lw.OutputError as error:\n    print(error.what, "|", error.kept)\n'
        'shutil.rmtree("here/out")\nprint(lw.execute(plan, "here/out").resumed)'
    )
    words = ["unshare", "-m", "--propagation", "private", "bash", "-c", inside, sys.executable, text]
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    if done.returncode == 9:
        pytest.skip("no overlayfs here")
    kept = "1 of 1 shards are kept in `out.partial`; `out` was not touched"
    assert done.stdout == f"`out` can't be moved out of the way: Invalid cross-device link | {kept}\n1\n", done.stderr


def test_a_bucket_that_is_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llava_weights.write.upload.UploadJob.occupied", False)
    plan = plan_of(make_source(tmp_path / "source"))
    origin = plan.history[0].inputs[0][1]
    file = replace(origin.files[0], path="s3://bucket/model/model.safetensors", etag="1")
    step = replace(plan.history[0], inputs=(("source", replace(origin, files=(file,))),))
    target, make_job = job_at("s3://bucket/model/", on_event=lambda event: None)
    with pytest.raises(OutputError, match="the output `s3://bucket/model` is an input"):
        preflight(replace(plan, history=(step,)), target, force=True, make_job=make_job)
    target, make_job = job_at("s3://bucket/model2", on_event=lambda event: None)
    preflight(replace(plan, history=(step,)), target, make_job=make_job)


def test_killed_0_1_0_can_be_begun_again_by_the_command(tmp_path: Path, fixtures: Path, cli: Callable[..., Any]) -> None:
    shutil.copytree(fixtures / "A-delta-v0/base-hf-bin", tmp_path / "base")
    words = ["apply-delta", "--base", "base", "--delta", fixtures / "A-delta-v0/delta-307-apr17", "-o", "out"]
    (tmp_path / "out.partial/out").mkdir(parents=True)
    (tmp_path / "out.partial/lock").write_text("77\n")
    parts = {"version": "0.1.0", "command": "apply-delta", "options": "{}", "inputs": "", "small files": "0", "tensors": "0"}
    (tmp_path / "out.partial/plan.json").write_text(json.dumps(parts, indent=2))
    done = cli(*words)
    assert done.code == 5
    assert "was begun by another version of llava-weights" in done.stderr
    assert "hint: pass `--restart` to begin again" in done.stderr
    assert cli(*words, "--restart").code == 0
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]
