"""Checkpoints over a network: against the same ones on disk, a Hub and a web server on the loopback interface, and moto's S3."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from huggingface_hub import constants

from benchmarks.synthetic import write_pair
from llava_weights.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llava_weights.errors import HubError, InputError, LlavaWeightsError, UsageError
from llava_weights.storage import buckets, http, ranges, retry
from llava_weights.storage.reading import Workspace
from llava_weights.transforms.adapter import open_adapter
from llava_weights.transforms.delta import apply_delta
from llava_weights.write.execute import execute
from llava_weights.write.plan import Plan, Settings, make_plan

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "FaKeToKeN0123456789"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Short pauses, no caches of the test before, and nothing of what is read on the disk."""
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    http._signed.clear()
    yield
    assert not any((tmp_path / "temporary").iterdir())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of our own, with an empty cache and nobody logged in."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1,localhost")
    for name, value in {"HF_HUB_CACHE": tmp_path / "cache", "HF_TOKEN_PATH": tmp_path / "token"}.items():
        monkeypatch.setattr(constants, name, str(value))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer() as server:
        server.storage = server.url.replace("127.0.0.1", "localhost")  # another server, as far as anybody can tell
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `delta` and their sum `out`, in shards of 100 kB; matrices so small that a sample of each is one request."""
    from llava_weights.families.decoders import Size

    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder, Size("small", 96, 2, 8, 256), vocabulary=320, seed=8)
    execute(plan_of(folder / "base", folder / "delta"), folder / "out")
    return folder


def plan_of(base: str | Path, delta: str | Path, **options: Any) -> Plan:
    return make_plan(apply_delta(open_checkpoint(base), open_checkpoint(delta)), **{"max_shard_size": "100kB", **options})


@pytest.fixture(scope="module")
def pinned(pair: Path) -> Plan:
    """The plan of a delta on the Hub, for one worker. It names commits and no server, so any that has them can serve it."""
    with pytest.MonkeyPatch.context() as patch, HubServer() as server:
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        return replace(plan_of(*served(server, pair)), settings=Settings(jobs=1))


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors" or "index" in path.name}


def served(hub: HubServer, pair: Path) -> tuple[str, str]:
    hub.add("owner/base", pair / "base")
    hub.add("owner/delta", pair / "delta")
    return "hf://owner/base", "hf://owner/delta"


def values(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found, work = {}, Workspace()
    for name, tensor in checkpoint.tensors.items():
        data = bytearray(tensor.nbytes)
        tensor.rows_into(memoryview(data), 0, tensor.rows, work)
        found[name] = tensor.dtype, tensor.shape, bytes(data)
    work.recheck_sources()
    work.close()
    return found


def text_of(error: LlavaWeightsError) -> str:
    return "\n".join((error.what, *(f"{label} {value}" for label, value in error.facts.items()), error.hint or "", error.kept or ""))


# --- equal to the local run -----------------------------------------------------------------------------------------


def test_a_delta_without_either_side_on_disk(hub: HubServer, pair: Path, tmp_path: Path) -> None:
    """Byte for byte the local result; each byte of the weights is sent once, and nothing lies on the disk meanwhile."""
    plan = plan_of(*served(hub, pair))
    small = sum(path.stat().st_size for side in ("base", "delta") for path in (pair / side).iterdir() if path.suffix != ".safetensors")
    asked = Counter(path for _, path, _ in hub.requests)
    assert all(count == 1 for path, count in asked.items() if not path.endswith(".safetensors")), "small files are sent once"
    before = hub.sent
    execute(plan, tmp_path / "out")
    needed = sum(leaf.nbytes for shard in plan.shards for _, tensor in shard.tensors for leaf in tensor.leaves())
    assert weights(tmp_path / "out") == weights(pair / "out")
    assert needed <= hub.sent - before <= 1.02 * needed
    assert small < before  # the small files, the headers and the samples
    text = "\n".join(plan.identity.values()) + repr(plan.shards) + (tmp_path / "out" / "llava-weights.manifest.json").read_text()
    assert str(tmp_path) not in text
    assert all(f"hf://owner/{side}@{hub.repos[f'owner/{side}'].refs['main']}/" in plan.identity["inputs"] for side in ("base", "delta"))


@pytest.mark.parametrize("whole", [False, True], ids=["a range", "a matrix"])
def test_zeros_where_values_should_be(hub: HubServer, pair: Path, tmp_path: Path, whole: bool) -> None:
    """Seen while they stream, and nothing is published."""
    shutil.copytree(pair / "base", tmp_path / "base")
    hub.add("owner/delta", pair / "delta")
    tensor = open_checkpoint(tmp_path / "base").tensors["model.layers.1.mlp.down_proj.weight"]
    start, size = (tensor.offset, tensor.nbytes) if whole else (tensor.offset + 1011, 9_000)
    with open(tensor.file.path, "r+b") as file:
        file.seek(start)
        file.write(bytes(size))
    hub.add("owner/base", tmp_path / "base")
    merged = apply_delta(open_checkpoint("hf://owner/base"), open_checkpoint("hf://owner/delta"), accept_base=True)
    with pytest.raises(InputError, match="zeros where values should be") as raised:
        execute(make_plan(merged), tmp_path / "out")
    assert "down_proj" in raised.value.what
    assert not (tmp_path / "out").exists()
    execute(make_plan(merged, accept_values=True), tmp_path / "out")


@pytest.mark.slow
def test_all_that_is_transferred(hub: HubServer, tmp_path: Path) -> None:
    """With headers, small files and samples of the checks, no more than 2 % of 300 MB are sent twice."""
    from llava_weights.families.decoders import Size

    write_pair(tmp_path, Size("middle", 2048, 2, 8, 5504), vocabulary=4000, seed=1, sparse=True)
    hub.add("owner/base", tmp_path / "base")
    hub.add("owner/delta", tmp_path / "delta")
    merged = apply_delta(open_checkpoint("hf://owner/base"), open_checkpoint("hf://owner/delta"), accept_base=True)
    execute(make_plan(merged, accept_values=True), tmp_path / "out")
    assert hub.sent <= 1.02 * sum(leaf.nbytes for tensor in merged.tensors.values() for leaf in tensor.leaves())


CHILD = """
import resource, sys
from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.transforms.delta import apply_delta
from llava_weights.write.plan import make_plan
from llava_weights.write.execute import execute

base, delta, out = sys.argv[1:]
plan = make_plan(apply_delta(open_checkpoint(base), open_checkpoint(delta), accept_base=True), max_memory="450MiB", accept_values=True)
execute(plan, out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, plan.memory)
"""


@pytest.mark.slow
def test_the_memory_promise(hub: HubServer, tmp_path: Path) -> None:
    """A process that reads 270 MB over the network, with as many workers as fit into its limit, needs no more than that."""
    from llava_weights.families.decoders import Size

    write_pair(tmp_path, Size("middle", 2048, 1, 8, 5504), vocabulary=4000, seed=1, sparse=True)
    hub.add("owner/base", tmp_path / "base")
    hub.add("owner/delta", tmp_path / "delta")
    command = [sys.executable, "-c", CHILD, "hf://owner/base", "hf://owner/delta", str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, promise = map(int, done.stdout.split())
    assert peak <= promise <= 450 << 20


FOLDERS = (
    "A-delta-v0/base-hf-bin", "A-delta-v0/base-meta", "A-delta-v0/delta-307-apr17", "C-v1.5/original-with-vision-safetensors",
    "C-v1.5/original-no-vision-bin", "D-v1.6/hf-by-tf4.47.1-vicuna",
)  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_every_container_as_on_disk(hub: HubServer, fixtures: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "flat"  # Meta keeps `tokenizer.model` one above the weights, where nobody looks over a network
    folder.mkdir()
    for path in (fixtures / name).rglob("*.*"):
        shutil.copy(path, folder)
    hub.static["web"] = folder
    hub.add("owner/model", folder)
    local = open_checkpoint(folder)
    for address in ("hf://owner/model", f"{hub.url}/web/"):
        found = open_checkpoint(address)
        assert (found.config, found.metadata, found.layout) == (local.config, local.metadata, local.layout)
        assert found.files.keys() == local.files.keys()
        assert [(file.name, file.size, file.header_sha256) for file in found.origin.files] == [
            (file.name, file.size, file.header_sha256) for file in local.origin.files
        ]
        assert values(found) == values(local)


def test_one_file_and_a_folder_of_a_repository(hub: HubServer, fixtures: Path, tmp_path: Path) -> None:
    shutil.copytree(fixtures / "C-v1.5/original-with-vision-safetensors", tmp_path / "repo" / "inner")
    sha, inner = hub.add("owner/model", tmp_path / "repo"), tmp_path / "repo" / "inner"
    name = next(path.name for path in sorted(inner.glob("*.safetensors")))
    for address, path in ((f"hf://owner/model@{sha[:40]}/inner", inner), (f"hf://owner/model/inner/{name}", inner / name)):
        found, local = open_checkpoint(address), open_checkpoint(path)
        assert (found.config, list(found.tensors), found.notes) == (local.config, list(local.tensors), local.notes)
        assert found.origin.revision == sha
        assert found.origin.files[0].path == f"hf://owner/model@{sha}/inner/{found.origin.files[0].name}"
    with pytest.raises(InputError, match="no weights"):
        open_checkpoint("hf://owner/model")


def test_an_adapter(hub: HubServer, fixtures: Path) -> None:
    folder = fixtures / "B-lora/llava-v1.5-tiny-lora"
    hub.static["lora"] = folder
    hub.add("owner/lora", folder)
    local = open_adapter(folder)
    for address in ("hf://owner/lora", f"{hub.url}/lora", f"{hub.url}/lora/{local.origin.files[0].name}"):
        found = open_adapter(address)
        assert [module.name for module in found.modules] == [module.name for module in local.modules]
        assert found.origin.remote
        assert (found.config, found.peft, found.notes) == (local.config, local.peft, local.notes)


def test_commands(hub: HubServer, pair: Path, fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llava_weights.cli.main import app

    base, delta = served(hub, pair)
    hub.static["lora"], hub.static["base"] = fixtures / "B-lora/llava-v1.5-tiny-lora", fixtures / "B-lora/base-vicuna-tiny"

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            app(list(map(str, arguments)))
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    assert run("inspect", delta)[0] == 0
    code, said = run("apply-delta", "--base", base, "--delta", delta, "-o", str(tmp_path / "out"), "--max-shard-size", "100kB")
    assert (code, weights(tmp_path / "out")) == (0, weights(pair / "out")), said
    assert run("diff", base, str(pair / "base"))[0] == 0
    merge = ("merge-lora", "-o", str(tmp_path / "merged"), "--base")
    assert run(*merge, f"{hub.url}/base", "--lora", f"{hub.url}/lora")[0] == 0
    local = ("merge-lora", "-o", str(tmp_path / "here"), "--base", str(hub.static["base"]), "--lora", str(hub.static["lora"]))
    assert run(*local)[0] == 0
    assert weights(tmp_path / "merged") == weights(tmp_path / "here")
    assert not (tmp_path / "cache").exists()
    code, said = run("verify", base, "--against", str(pair / "base"), "--deep")  # reads everything, so it downloads
    assert code == 0, said
    shutil.rmtree(tmp_path / "cache")
    hashing = ("apply-delta", "--check-inputs", "--base", base, "--delta", delta, "-o", "x")
    for command in (("verify", f"{hub.url}/base"), ("checksum", base), hashing):
        code, said = run(*command)
        assert (code, "whole files" in said or "keeps checksums itself" in said, "/base" in said) == (3, True, True), said


# --- faults ---------------------------------------------------------------------------------------------------------

PASSING = ("reset", "429", "500", "503", "short", "long", "wrong range", "whole", "compressed", "expired", "stall")


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes(hub: HubServer, pair: Path, pinned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Every second answer is bad, or a few of them where that takes time; the bytes are those of the local run."""
    served(hub, pair)
    if fault == "stall":
        monkeypatch.setattr(http, "TIMEOUT", 0.3)
    hub.faults = [fault, ""] * 100 if fault != "stall" else ["", fault, "", fault] + [""] * 100
    execute(pinned, tmp_path / "out")
    assert weights(tmp_path / "out") == weights(pair / "out")
    assert len(hub.faults) < 150


@pytest.mark.parametrize("fault", ["503", "short", "wrong range", "whole"])
def test_a_fault_that_stays(hub: HubServer, pair: Path, pinned: Plan, tmp_path: Path, fault: str) -> None:
    """Exit 6, saying what is kept; when the fault is over, the same plan continues from there."""
    served(hub, pair)
    after = len(pinned.shards[0].tensors) * 2
    hub.faults = [""] * after + [fault] * 10_000
    with pytest.raises(HubError, match="can't be read over the network") as caught:
        execute(pinned, tmp_path / "out")
    assert caught.value.exit_code == 6
    assert "shards are kept" in text_of(caught.value)
    assert f"tries {retry.TRIES}" in text_of(caught.value)
    hub.faults = []
    report = execute(pinned, tmp_path / "out")
    assert report.resumed >= 1
    assert weights(tmp_path / "out") == weights(pair / "out")


def test_a_server_that_is_gone(hub: HubServer, pinned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="can't be read over the network") as caught:
        execute(pinned, tmp_path / "out")
    assert caught.value.exit_code == 6
    with pytest.raises(HubError):
        open_checkpoint("hf://owner/base")


def test_too_many_requests_while_listing(hub: HubServer, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = served(hub, pair)
    hub.refuse, waits, after = (429, {}), [], retry.Attempts.after

    def wait(self: retry.Attempts, error: Exception) -> None:
        waits.append(error)
        hub.refuse = None if len(waits) == 3 else hub.refuse
        after(self, error)

    monkeypatch.setattr(retry.Attempts, "after", wait)
    assert open_checkpoint(base).tensors
    assert len(waits) == 3
    hub.refuse = (429, {})
    with pytest.raises(HubError, match="too many requests"):
        open_checkpoint(base)
    assert len(waits) == 3 + retry.TRIES


@pytest.mark.parametrize("header", ["Retry-After: 7", 'RateLimit: "resolvers";r=0;t=7', "Retry-After: 999999", "Retry-After: soon"])
def test_waits_as_long_as_the_server_asks(header: str) -> None:
    import types

    label, _, text = header.partition(": ")
    answer = types.SimpleNamespace(status_code=429, headers={label.lower(): text})
    with pytest.raises(retry.Passing) as caught:
        http._check_status("https://host/file", answer, False)
    assert caught.value.wait == (7.0 if "7" in text else 999999.0 if "9" in text else 0.0)
    waited: list[float] = []
    stopping: Any = types.SimpleNamespace(wait=lambda seconds: waited.append(seconds))
    retry.Attempts("https://host/file", stopping).after(caught.value)
    assert waited[0] <= retry.LONGEST_PAUSE


@pytest.mark.parametrize("where", ["hub", "web"])
def test_a_file_that_changes_during_the_run(hub: HubServer, pair: Path, tmp_path: Path, where: str) -> None:
    """InputError, exit 3, and no output. On the Hub, whose commits never change, the storage has changed."""
    hub.static["base"] = shutil.copytree(pair / "base", tmp_path / "base")
    served(hub, pair)
    plan = plan_of("hf://owner/base" if where == "hub" else f"{hub.url}/base", pair / "delta")
    if where == "hub":
        hub.faults = [""] * 3 + ["etag"] * 100
    else:
        path = next((tmp_path / "base").glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="changed while it was being read") as caught:
        execute(plan, tmp_path / "out")
    assert (caught.value.exit_code, (tmp_path / "out").exists()) == (3, False)


def test_a_branch_that_moves_on_makes_no_difference(hub: HubServer, pair: Path, pinned: Plan, tmp_path: Path) -> None:
    served(hub, pair)
    hub.add("owner/base", pair / "delta")
    execute(pinned, tmp_path / "out")
    assert weights(tmp_path / "out") == weights(pair / "out")


def test_stopping_ends_the_waiting(hub: HubServer, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAUSE", 1000.0)
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 1000.0)
    file = open_checkpoint(served(hub, pair)[0]).origin.files[0]
    hub.faults = ["503"] * 10
    work = Workspace()
    work.stopping.set()
    with pytest.raises(HubError):
        work.read(file, 0, memoryview(bytearray(100)))


# --- strangers ------------------------------------------------------------------------------------------------------


def test_the_token_is_for_the_hub_alone(hub: HubServer, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files come from another server, which must not see it; nor must a web server."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with HubServer() as storage:
        hub.storage, storage.repos = storage.url, hub.repos
        base, _ = served(hub, pair)
        storage.static["web"] = pair / "base"
        for address in (base, f"{storage.url}/web"):
            assert values(open_checkpoint(address)) == values(open_checkpoint(pair / "base"))
        assert storage.requests
        assert {authorization for _, _, authorization in storage.requests} == {None}
        assert {authorization for _, _, authorization in hub.requests} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    "target", ["http://192.0.2.1/x", "ftp://host/x", "file:///etc/passwd", "http://user:secret@192.0.2.1/x?sig=secret"]
)
def test_redirects_that_are_not_followed(hub: HubServer, pair: Path, target: str) -> None:
    file = open_checkpoint(served(hub, pair)[0]).origin.files[0]
    http._signed.clear()
    hub.refuse = (302, {"Location": target})
    with pytest.raises(HubError) as caught:
        ranges.read(file, 0, memoryview(bytearray(10)))
    assert "redirected" in text_of(caught.value)
    assert "secret" not in text_of(caught.value)


@pytest.mark.parametrize(
    ("source", "target", "followed"),
    [
        ("https://a/x", "https://b/x", True),
        ("https://a/x", "http://a/x", False),
        ("https://a/x", "http://127.0.0.1/x", False),
        ("http://localhost:1/x", "http://127.0.0.1:2/x", True),
        ("http://mirror.lan/x", "http://mirror.lan/y", True),
        ("http://mirror.lan/x", "http://other.lan/y", False),
    ],
)
def test_where_redirects_may_lead(source: str, target: str, followed: bool) -> None:
    assert http._may_follow(source, target) is followed


@pytest.mark.parametrize(
    "text",
    ["https://user:secret@host/x", "https://host/x?X-Amz-Signature=secret", "https://host/x#y", "http://example.com/x", "https:///x",
     "s3://bucket/x?versionId=secret"],
)  # fmt: skip
def test_addresses_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_checkpoint(text)
    assert "secret" not in text_of(caught.value)


def test_names_from_strangers(hub: HubServer, pair: Path, tmp_path: Path) -> None:
    """An index can't name files of another place, and what it names wrongly is an error that shows the address."""
    folder = shutil.copytree(pair / "base", tmp_path / "evil")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/x.safetensors", "b": "..safetensors"}}')
    hub.static["evil"] = folder
    hub.add("owner/evil", folder)
    for address in (f"{hub.url}/evil", "hf://owner/evil"):
        with pytest.raises(InputError) as caught:
            open_checkpoint(address)
        assert "evil" in text_of(caught.value)


@pytest.mark.parametrize("size", [-1, 1 << 50])
def test_a_size_that_is_a_lie(hub: HubServer, pair: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    hub.static["web"] = pair / "base"
    monkeypatch.setattr(http, "_size", lambda answer: size)
    with pytest.raises((HubError, InputError)):
        open_checkpoint(f"{hub.url}/web")


@pytest.mark.parametrize("damage", ["cut", "header", "html", "directory"])
def test_a_damaged_file_is_named_by_its_address(hub: HubServer, fixtures: Path, pair: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(fixtures / "A-delta-v0/base-hf-bin" if damage == "directory" else pair / "base", tmp_path / "broken")
    path = next(path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin"))
    data = path.read_bytes()
    spoilt = {"cut": data[:-10], "header": b"\xff" * 8 + data[8:], "html": b"<html>", "directory": data[:-30] + b"x" * 30}[damage]
    path.write_bytes(spoilt)
    hub.add("owner/broken", folder)
    with pytest.raises(InputError) as caught:
        open_checkpoint("hf://owner/broken")
    with pytest.raises(InputError) as local:
        open_checkpoint(folder)
    assert caught.value.what == local.value.what
    assert "hf://owner/broken@" in text_of(caught.value)


def test_what_is_not_there(hub: HubServer, pair: Path) -> None:
    hub.static["web"] = pair / "base"
    for address in (f"{hub.url}/web/none", f"{hub.url}/none", f"{hub.url}/web/none.safetensors"):
        with pytest.raises(InputError, match="nothing to read"):
            open_checkpoint(address)
    with pytest.raises(HubError, match="not on the Hub"):
        open_checkpoint("hf://owner/none")
    served(hub, pair)
    with pytest.raises(HubError, match="no revision"):
        open_checkpoint("hf://owner/base", revision="none")


def test_offline(hub: HubServer, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = open_checkpoint(served(hub, pair)[0]).origin.files[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        ranges.read(file, 0, memoryview(bytearray(10)))
    with pytest.raises(HubError):
        open_checkpoint("hf://owner/base")


# --- object stores --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """moto's S3 server and a client of it."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    with pytest.MonkeyPatch.context() as patch:
        server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        keys = {
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "y",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}", "NO_PROXY": "127.0.0.1"}.items():
            patch.setenv(name, value)
        buckets.forget()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="bucket")
        yield client
        buckets.forget()
        server.stop()


def test_a_bucket(s3: Any, pair: Path, tmp_path: Path) -> None:
    for side in ("base", "delta"):
        for path in (pair / side).iterdir():
            s3.put_object(Bucket="bucket", Key=f"models/{side}/{path.name}", Body=path.read_bytes())
    base = open_checkpoint("s3://bucket/models/base/")
    assert base.origin.name == "s3://bucket/models/base"
    name = base.origin.files[0].name
    assert list(open_checkpoint(f"s3://bucket/models/base/{name}").tensors) == list(open_checkpoint(pair / "base" / name).tensors)
    plan = plan_of("s3://bucket/models/base", pair / "delta")
    execute(plan, tmp_path / "out")
    assert weights(tmp_path / "out") == weights(pair / "out")
    s3.put_object(Bucket="bucket", Key=f"models/base/{name}", Body=(pair / "base" / name).read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="changed"):
        execute(plan, tmp_path / "again")
    for missing in ("s3://bucket/none", "s3://none/none"):
        with pytest.raises(InputError, match="nothing to read"):
            open_checkpoint(missing)


def test_a_store_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(UsageError) as caught:
        open_checkpoint("gs://bucket/model")
    assert caught.value.exit_code == 2
    assert "pip install 'llava-weights[remote]'" in text_of(caught.value)
