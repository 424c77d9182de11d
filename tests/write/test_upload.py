"""Outputs that are uploaded while they are made: moto's S3 and a Hub on the loopback interface, against the same output on disk."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_uploads import UploadHub
from huggingface_hub import constants
from typer.testing import CliRunner

from benchmarks.synthetic import write_pair
from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.checkpoint.manifest import MANIFEST
from llava_weights.cli.main import app
from llava_weights.cli.report import explain
from llava_weights.errors import HubError, InputError, Interrupted, OutputError, UsageError
from llava_weights.events import Event, ShardDone
from llava_weights.storage import buckets, http, retry
from llava_weights.transforms.convert import convert
from llava_weights.transforms.delta import apply_delta, make_delta
from llava_weights.write import destinations, work_folder
from llava_weights.write.execute import Report, execute, preflight, run_plan
from llava_weights.write.plan import Plan, make_plan
from llava_weights.write.shards import InBucket, ObjectSink
from llava_weights.write.upload import differences, job_at, push, repository_of

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "FaKeToKeN0123456789"
more = partial(pytest.param, marks=pytest.mark.faults)  # `make faults` runs these
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # how huggingface_hub calls its client


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No pauses that anybody would notice, no tries of the stores' own beyond one more, and a folder to work in."""
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    http._signed.clear()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    (tmp_path / "hub").mkdir()
    with UploadHub(tmp_path / "hub", TOKEN) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


class Bucket:
    """moto's S3 behind a door that notes what is asked, and spoils it."""

    def __init__(self, server: Any, client: Any) -> None:
        self.client, self.inside = client, server.app
        self.actions: list[tuple[str, str]] = []
        self.faults: dict[str, list[str]] = {}  # method and key, as a pattern -> what happens to the next such requests
        self.watch: Callable[[], None] = lambda: None
        server.app = self

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        action = environ["REQUEST_METHOD"], environ["PATH_INFO"].removeprefix("/bucket/") + f"?{environ['QUERY_STRING']}".rstrip("?")
        self.actions.append(action)
        if action[0] == "PUT":
            self.watch()
        faults = next((faults for pattern, faults in self.faults.items() if re.fullmatch(pattern, " ".join(action))), [])
        fault = (faults[0] if faults[1:] == ["*"] else faults.pop(0)) if faults else ""
        if fault == "reset":
            environ["werkzeug.socket"].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError
        if fault:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}[fault]
            start(f"{fault} No", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()]
        return self.inside(environ, start)

    def files(self, prefix: str = "models/out/") -> dict[str, bytes]:
        found = self.client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
        return {item["Key"].removeprefix(prefix): self.client.get_object(Bucket="bucket", Key=item["Key"])["Body"].read() for item in found}

    def put(self) -> list[str]:
        return [key.removeprefix("models/out/") for method, key in self.actions if method == "PUT"]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    with pytest.MonkeyPatch.context() as patch:
        server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        url = "http://{}:{}".format(*server.get_host_and_port())
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1"}
        for name, value in {**keys, "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        buckets.forget()
        client = boto3.client("s3", endpoint_url=url)
        yield server._server, client
        buckets.forget()
        server.stop()


@pytest.fixture
def bucket(server: tuple[Any, Any]) -> Iterator[Bucket]:
    app, client = server
    inside = app.app
    client.create_bucket(Bucket="bucket")
    yield Bucket(app, client)
    app.app = inside
    for item in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=item["Key"])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `delta` and what they make, `out`, in shards of 200 kB."""
    from llava_weights.families.decoders import Size

    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder, Size("small", 96, 2, 8, 256), vocabulary=320, seed=8)
    execute(plan_of(folder), folder / "out")
    return folder


def plan_of(pair: Path) -> Plan:
    made = apply_delta(open_checkpoint(str(pair / "base")), open_checkpoint(str(pair / "delta")))
    return make_plan(made, max_shard_size="200kB", jobs=1)


def upload(plan: Plan, address: str, on_event: Callable[[Event], None] = lambda event: None, **options: Any) -> Report:
    target, make_job = job_at(address, on_event=on_event)
    return run_plan(plan, target, make_job=make_job, on_event=on_event, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def used(folder: Path) -> int:
    """Bytes of the disk that the files in a folder take; one may get its name at this moment."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def partial_of(address: str) -> Path:
    return Path(address.rpartition("/")[2] + ".partial")


# --- a bucket --------------------------------------------------------------------------------------------------------


def test_a_bucket_gets_the_same_bytes_in_order(bucket: Bucket, pair: Path) -> None:
    plan = plan_of(pair)
    most: list[int] = []
    bucket.watch = lambda: most.append(used(Path("out.partial/out")))
    report = upload(plan, "s3://bucket/models/out/")
    assert (report.shards, report.resumed) == (len(plan.shards), 0)
    assert bucket.files() == contents(pair / "out")
    shards = [shard.name for shard in plan.shards]
    assert bucket.put()[: len(shards)] == shards
    assert bucket.put()[-2:] == ["model.safetensors.index.json", MANIFEST]
    small = sum(path.stat().st_size + 8192 for path in (pair / "out").iterdir() if path.suffix != ".safetensors")
    assert max(most) <= small
    assert max(most[: len(shards)]) <= 8192, "no shard lies on this machine"
    assert not list(Path().iterdir())


def test_a_large_object_goes_up_in_parts(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "PART_BYTES", 5 << 20)  # the smallest that S3 takes
    data = os.urandom(1 << 20) * 12
    (tmp_path / "large").write_bytes(data)
    bucket.faults = {r"PUT models/out/large\?.*partNumber=2.*": ["500", "reset"]}
    destinations.open_destination("s3://bucket/models/out").put(tmp_path / "large", "large")
    assert bucket.files() == {"large": data}
    assert sum("partNumber=2" in key for _, key in bucket.actions) == 3
    assert sum("partNumber" in key for _, key in bucket.actions) <= 3 + 2 * 2  # at most one begins again as a whole


def large(bucket: Bucket) -> ObjectSink:
    return ObjectSink(destinations.Bucket("s3://bucket/models/out"), "large", 14 << 20)


def unfinished(bucket: Bucket) -> list[str]:
    return [each["Key"] for each in bucket.client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])]


def test_an_object_that_is_cut_off_leaves_nothing(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a part of it nor what somebody pays for; what was there before stays."""
    monkeypatch.setattr(buckets, "PART_BYTES", 5 << 20)
    bucket.client.put_object(Bucket="bucket", Key="models/out/large", Body=b"old")

    def cut_off() -> None:
        with large(bucket) as sink:
            for number in range(12):
                sink.write(memoryview(bytes(1 << 20)), number << 20)
            while not any("partNumber" in key for _, key in bucket.actions):
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert bucket.files() == {"large": b"old"}
    assert not unfinished(bucket)


@pytest.mark.parametrize("what", [r".*partNumber=2.*", r"POST .*uploadId.*"])
def test_an_object_of_which_a_part_is_refused(bucket: Bucket, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "PART_BYTES", 5 << 20)
    bucket.faults = {what: ["403", "*"]}

    def write() -> None:
        with large(bucket) as sink:
            for number in range(14):
                sink.write(memoryview(bytes(1 << 20)), number << 20)
            sink.finish()

    with pytest.raises(HubError, match="refused") as caught:
        write()
    assert caught.value.exit_code == 6
    assert not bucket.files()


def test_workers_send_to_a_bucket_by_themselves(bucket: Bucket, pair: Path) -> None:
    """A task names the bucket and no folder that the workers would have to share."""
    plan = plan_of(pair)
    target, make_job = job_at("s3://bucket/models/out")
    task = InBucket(Path("/nowhere"), destinations.Bucket("s3://bucket/models/other")).task(plan.shards[0], plan.settings)
    assert pickle.loads(pickle.dumps(task))().name == plan.shards[0].name
    with ThreadPoolExecutor(2) as pool:
        run_plan(plan, target, pool=pool, make_job=make_job)
    assert bucket.files() == contents(pair / "out")


def test_an_integer_delta_in_a_bucket(bucket: Bucket, pair: Path, tmp_path: Path) -> None:
    """Made in a file first, since its header tells the sizes of what follows; nothing of that file stays."""
    made = make_delta(str(pair / "base"), str(pair / "out"), codec="integer")
    plan = make_plan(made, max_shard_size="600kB", jobs=1)
    execute(plan, tmp_path / "delta")
    upload(plan, "s3://bucket/models/out")
    assert bucket.files() == contents(tmp_path / "delta")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("place", ["s3", more("hub")])
def test_nothing_is_replaced_without_force(place: str, request: pytest.FixtureRequest, pair: Path) -> None:
    plan, old = plan_of(pair), {"model-00001-of-00001.safetensors": b"old", MANIFEST: b"{}", "added_tokens.json": b"{}"}
    server = request.getfixturevalue("bucket" if place == "s3" else "hub")
    address = "s3://bucket/models/out" if place == "s3" else "hf://owner/out"
    if place == "s3":
        for name, data in old.items():
            server.client.put_object(Bucket="bucket", Key=f"models/out/{name}", Body=data)
        server.client.put_object(Bucket="bucket", Key="models/out/below/file", Body=b"of somebody else")
    else:
        server.repos["owner/out"] = type("Repo", (), {"commits": {}, "refs": {}, "gated": False})()
        server.commit("owner/out", "main", {**old, "below/file": b"of somebody else", ".gitattributes": b"dots stay"})
    server.actions.clear()
    before = server.files() if place == "s3" else server.files("owner/out")
    target, make_job = job_at(address)
    for attempt in (lambda: preflight(plan, target, make_job=make_job), lambda: upload(plan, address)):
        with pytest.raises(OutputError, match="exists and is not empty") as raised:
            attempt()
        assert address in raised.value.facts["output"]
    assert not any(action in ("PUT", "DELETE", "put", "commit", "branch") for action, _ in server.actions)
    complete: list[bool] = []  # whether there is a manifest while shards arrive
    if place == "s3":
        server.watch = lambda: complete.append(MANIFEST in server.files())
    upload(plan, address, force=True)
    assert not any(complete)
    after = server.files() if place == "s3" else server.files("owner/out")
    expected = contents(pair / "out") | {name: data for name, data in before.items() if "/" in name or name.startswith(".")}
    assert after == expected
    if place == "s3":
        assert complete
        assert [action for action in server.actions if action[0] == "PUT"][-1] == ("PUT", f"models/out/{MANIFEST}")


# --- both: faults and resume -----------------------------------------------------------------------------------------


@pytest.fixture(params=["s3", "hub"])
def place(request: pytest.FixtureRequest) -> Any:
    """Where to, how a shard and the last step are spoilt there, and what has arrived."""
    if request.param == "s3":
        bucket = request.getfixturevalue("bucket")
        names = {"shard": r"PUT .*model-00003-of-.*", "last": rf"PUT .*{re.escape(MANIFEST)}", "list": r"GET .*list-type.*"}
        put = lambda: [name for name in bucket.put() if name.endswith(".safetensors")]  # noqa: E731
        return SimpleNamespace(
            address="s3://bucket/models/out", server=bucket, files=bucket.files, faults=bucket.faults, names=names, put=put, skip=0
        )
    hub = request.getfixturevalue("hub")
    put = lambda: [name for action, name in hub.actions if action == "put"]  # noqa: E731
    names = {"shard": "put", "last": "commit", "list": "branch"}
    files = lambda: hub.files("owner/out") if "owner/out" in hub.repos else {}  # noqa: E731
    return SimpleNamespace(address="hf://owner/out", server=hub, files=files, faults=hub.faults_of, names=names, put=put, skip=2)


def spoil(place: Any, what: str, faults: list[str], plan: Plan) -> None:
    """The third shard, or the last step; on the Hub these are counted."""
    skip = {"shard": 2, "last": len(plan.shards), "list": 0}[what] if place.skip else 0
    place.faults[place.names[what]] = [""] * skip + faults


def complete(place: Any, pair: Path) -> bool:
    found = {name: data for name, data in place.files().items() if not name.startswith(".")}
    return found == contents(pair / "out")


@pytest.mark.parametrize("what", ["shard", more("last"), more("list")])
@pytest.mark.parametrize("fault", ["reset", more("500"), more("503")])
def test_a_fault_that_passes(place: Any, pair: Path, fault: str, what: str) -> None:
    plan = plan_of(pair)
    spoil(place, what, [fault, fault, fault], plan)
    upload(plan, place.address)
    assert complete(place, pair)
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("what", "fault"), [("shard", "403"), more("shard", "503"), more("last", "reset"), more("last", "403"), more("list", "500")]
)
def test_a_fault_that_stays_and_the_same_command_later(place: Any, pair: Path, what: str, fault: str) -> None:
    plan = plan_of(pair)
    if place.skip and what != "list":
        counted = len(plan.shards) if what == "last" else 2
        place.faults[place.names[what]] = [""] * counted + [fault] * 100
    else:
        place.faults[place.names[what]] = [fault, "*"]
    with pytest.raises(HubError) as raised:
        upload(plan, place.address)
    assert raised.value.exit_code == 6
    assert raised.value.hint
    assert TOKEN not in f"{raised.value.what} {raised.value.facts} {raised.value.kept}"
    place.faults.clear()
    assert MANIFEST not in place.files()
    if what != "list":
        assert "shards are kept in `out.partial`" in str(raised.value.kept)
        assert "is not complete and has no manifest" in str(raised.value.kept)
    seen = set(place.put())
    failed = seen - {name for name in seen if what == "last" or "00003" not in name}
    before = len(place.put())
    upload(plan, place.address)
    assert complete(place, pair)
    again = place.put()[before:]
    if place.skip == 0:
        assert not set(again) & (seen - failed)
    elif what == "last":
        assert not again
    assert not list(Path().iterdir())


def test_stopped_in_the_middle(place: Any, pair: Path) -> None:
    plan = plan_of(pair)

    def stop(event: Event) -> None:
        if isinstance(event, ShardDone) and event.index == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as raised:
        upload(plan, place.address, stop)
    assert "3 of" in str(raised.value.kept)
    assert MANIFEST not in place.files()
    assert "3 of them are uploaded" in str(raised.value.kept)
    report = upload(plan, place.address)
    assert report.resumed == 3
    assert complete(place, pair)


@pytest.mark.faults
@pytest.mark.parametrize("moment", [1, 3, 4])
def test_killed(hub: UploadHub, process: Callable[..., Any], pair: Path, tmp_path: Path, moment: int) -> None:
    """SIGKILL while a shard arrives; then the same command."""
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = ["apply-delta", "--base", pair / "base", "--delta", pair / "delta", "-o", "hf://owner/out", "--max-shard-size", "200kB"]

    def kill() -> None:
        if [action for action, _ in hub.actions].count("put") == moment:
            os.kill(int((tmp_path / "out.partial" / "lock").read_text()), signal.SIGKILL)

    hub.watch = kill
    assert process(*command, env=environment).code == -signal.SIGKILL
    assert set(hub.files("owner/out")) == {".gitattributes"}
    hub.watch = lambda: None
    done = process(*command, env=environment)
    assert done.code == 0
    assert TOKEN not in done.stdout + done.stderr
    found = {name: data for name, data in hub.files("owner/out").items() if not name.startswith(".")}
    assert found == contents(pair / "out")
    assert set(hub.repos["owner/out"].refs) == {"main"}
    assert len([name for action, name in hub.actions if action == "put"]) == len({name for action, name in hub.actions if action == "put"})
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.faults
def test_stopped_before_the_work_folder_is_deleted(place: Any, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(pair)

    def die(self: work_folder.Job) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work_folder.Job, "clean", die)
        with pytest.raises(Interrupted):
            upload(plan, place.address)
    assert complete(place, pair)
    before = len(place.put())
    assert upload(plan, place.address).resumed == len(plan.shards)
    assert len(place.put()) == before
    assert complete(place, pair)
    assert not list(Path().iterdir())


@pytest.mark.faults
def test_a_shard_that_is_no_longer_there_is_made_again(bucket: Bucket, pair: Path) -> None:
    plan = plan_of(pair)
    first, second = plan.shards[0].name, plan.shards[1].name
    bucket.faults = {rf"PUT .*{re.escape(MANIFEST)}": ["403", "*"]}
    with pytest.raises(HubError):
        upload(plan, "s3://bucket/models/out")
    bucket.faults.clear()
    size = len(bucket.files()[first])
    bucket.client.put_object(Bucket="bucket", Key=f"models/out/{first}", Body=b"x" * size)
    bucket.client.delete_object(Bucket="bucket", Key=f"models/out/{second}")
    bucket.actions.clear()
    assert upload(plan, "s3://bucket/models/out").resumed == len(plan.shards) - 2
    assert [name for name in bucket.put() if name.endswith(".safetensors")] == [first, second]
    assert bucket.files() == contents(pair / "out")


@pytest.mark.faults
def test_work_for_another_place_is_refused(bucket: Bucket, pair: Path) -> None:
    plan = plan_of(pair)
    bucket.faults = {r"PUT .*00002.*": ["403", "*"]}
    with pytest.raises(HubError, match="refused"):
        upload(plan, "s3://bucket/models/out")
    with pytest.raises(OutputError, match="belongs to another command") as raised:
        upload(plan, "s3://bucket/other/out")
    assert raised.value.facts["destination, then"] == "s3://bucket/models/out"
    bucket.faults.clear()
    begun = set(bucket.files())
    other = make_plan(apply_delta(open_checkpoint(str(pair / "base")), open_checkpoint(str(pair / "delta"))), max_shard_size="300kB")
    upload(other, "s3://bucket/models/out", restart=True)
    assert begun
    assert not begun & set(bucket.files())


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "branch", "folder"), [more("hf://owner/out", "main", ""), ("hf://owner/out@tried/a/b", "tried", "a/b/")]
)
def test_a_repository(hub: UploadHub, pair: Path, address: str, branch: str, folder: str) -> None:
    plan, events = plan_of(pair), list[Event]()
    most: list[int] = []
    hub.watch = lambda: most.append(used(partial_of(address) / "out")) or add_file()

    def add_file() -> None:  # somebody else adds a file meanwhile
        if len(most) == 2:
            hub.commit("owner/out", branch, {f"{folder}other.txt": b"x"})

    upload(plan, address, events.append)
    found = {name.removeprefix(folder): data for name, data in hub.files("owner/out", branch).items() if name != ".gitattributes"}
    assert found == contents(pair / "out") | {"other.txt": b"x"}
    assert set(hub.repos["owner/out"].refs) == {"main", branch}
    assert hub.private == {"owner/out"}
    assert any("a new private repository" in str(event) for event in events)
    assert [action for action, _ in hub.actions].count("create_repo") == 1
    commits = [name.rpartition("/")[2] for action, name in hub.actions if action == "commit"]
    assert commits[-1] == branch
    assert all(name.startswith("llava-weights-partial-") for name in commits[:-1])
    assert len(commits) == len(plan.shards) + 1
    largest = max(shard.nbytes for shard in plan.shards) + 8192
    assert max(most) <= largest + 8192 < sum(shard.nbytes for shard in plan.shards), "one shard lies on this machine"


@pytest.mark.parametrize("action", ["commit", more("create_repo"), more("branch"), more("put"), more("delete_branch")])
def test_an_answer_that_is_lost(hub: UploadHub, pair: Path, action: str) -> None:
    hub.faults_of = {action: ["lost"] * 2}
    upload(plan_of(pair), "hf://owner/out")
    assert {name: data for name, data in hub.files("owner/out").items() if name[0] != "."} == contents(pair / "out")
    assert set(hub.repos["owner/out"].refs) == {"main"}


def test_who_may_not_write(hub: UploadHub, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(pair)
    with pytest.raises(HubError, match="the Hub refuses access to `stranger/out`") as raised:
        upload(plan, "hf://stranger/out")
    assert "a token that may write" in str(raised.value.hint)
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1] + "x")
    with pytest.raises(HubError) as raised:
        upload(plan, "hf://owner/other")
    assert "a token that may write" in str(raised.value.hint)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="nobody is logged in") as raised:
        preflight(plan, *reversed_job("hf://owner/out"))
    assert "hf auth login" in str(raised.value.hint)
    assert not hub.repos


def reversed_job(address: str) -> tuple[Path]:
    target, make_job = job_at(address)
    make_job(target).occupied  # noqa: B018
    return (target,)


@pytest.mark.parametrize(
    "address", ["s3://bucket", "s3://bucket/../x", "ftp://a/b", "https://a/b", "hf://owner", "s3://k:s@bucket/out", "s3://bucket/out?a=b"]
)
def test_no_place_to_write_to(address: str) -> None:
    with pytest.raises((UsageError, InputError), match=r"no place to write to|not a model on the Hub"):
        job_at(address)


def test_push(hub: UploadHub, pair: Path) -> None:
    out = repository_of("owner/published")
    hub.faults_of = {"put": ["503", "reset"], "commit": ["500", "lost"]}
    page = push(pair / "out", out)
    assert page == f"{hub.url}/owner/published"
    assert {name: data for name, data in hub.files("owner/published").items() if name[0] != "."} == contents(pair / "out")
    uploads = [action for action, _ in hub.actions].count("put")
    commits = len(hub.repos["owner/published"].commits)
    assert push(pair / "out", repository_of("owner/published")) == page
    assert [action for action, _ in hub.actions].count("put") == uploads
    assert len(hub.repos["owner/published"].commits) == commits
    hub.commit("owner/published", "main", {"other.safetensors": b"x"})
    with pytest.raises(OutputError, match="not empty"):
        push(pair / "out", repository_of("owner/published"))
    push(pair / "out", repository_of("owner/published"), force=True)
    assert "other.safetensors" not in hub.files("owner/published")


def test_commands(hub: UploadHub, bucket: Bucket, pair: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_weights.cli.main import app

    def run(*more: str) -> tuple[int, list[dict[str, Any]], str]:
        capfd.readouterr()
        base, delta = f"--base={pair / 'base'}", f"--delta={pair / 'delta'}"
        with pytest.raises(SystemExit) as end:
            app(["apply-delta", base, delta, "--max-shard-size=200kB", "--json", *more])
        out, err = capfd.readouterr()
        assert TOKEN not in out + err
        return int(end.value.code or 0), [json.loads(line) for line in out.splitlines()], err

    code, lines, _ = run("-o", "s3://bucket/models/out")
    assert (code, lines[-1]["output"]) == (0, "s3://bucket/models/out")
    assert bucket.files()["model.safetensors.index.json"] == (pair / "out" / "model.safetensors.index.json").read_bytes()
    assert run("-o", "s3://bucket/models/out")[0] == 5
    assert run("-o", "s3://bucket/models/out", "--dry-run")[0] == 5
    assert run("-o", "s3://bucket/models/new", "--push", "owner/x")[0] == 2
    code, lines, _ = run("-o", "out", "--push", "owner/x", "--dry-run")
    assert (code, hub.repos, Path("out").exists()) == (0, {}, False)
    hub.faults_of = {"commit": ["503", "*"]}
    code, lines, err = run("-o", "out", "--push", "owner/x")
    assert code == 6
    assert "`out` is complete" in err
    hub.faults_of = {}
    code, lines, _ = run("-o", "out", "--push", "owner/x")
    assert (code, lines[-1]["pushed"]) == (0, f"{hub.url}/owner/x")
    assert {name: data for name, data in hub.files("owner/x").items() if name[0] != "."} == contents(Path("out"))
    monkeypatch.delenv("HF_TOKEN")
    code, lines, err = run("-o", "other", "--push", "owner/x")
    assert (code, Path("other").exists()) == (6, False)
    assert "hf auth login" in err


# --- what is there already is only published -------------------------------------------------------------------------


def other_option(plan: dict[str, Any], out: Path) -> None:
    plan["options"] = {"max_shard_size": 1}


def other_version(plan: dict[str, Any], out: Path) -> None:
    plan["version"] = "0.0.1"


def other_input(plan: dict[str, Any], out: Path) -> None:
    plan["steps"][0]["inputs"]["source"]["files"][0]["header_sha256"] = "0" * 64


def other_tokenizer(plan: dict[str, Any], out: Path) -> None:
    plan["files"]["tokenizer.model"] = "0" * 64


def input_changed_since(plan: dict[str, Any], out: Path) -> None:
    plan["changed"] = time.time_ns() + 10**9


def input_without_a_date(plan: dict[str, Any], out: Path) -> None:
    plan["changed"] = None


def shard_cut_short(plan: dict[str, Any], out: Path) -> None:
    os.truncate(out / "model.safetensors", 1000)


def config_gone(plan: dict[str, Any], out: Path) -> None:
    (out / "config.json").unlink()


def recipe_of_another(plan: dict[str, Any], out: Path) -> None:
    made = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(made | {"recipe": []}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, fixtures: Path) -> tuple[Path, str]:
    """A finished output and the document of its plan, as `--dry-run --json` prints it."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(fixtures / "C-v1.5/hf-by-tf4.47.1", folder / "source")
    plan = make_plan(convert(open_checkpoint(str(folder / "source")), "llava"))
    execute(plan, folder / "out")
    return folder / "out", json.dumps(explain(plan, folder / "out")[1])


def test_the_same_work_is_recognised_and_nothing_else(made: tuple[Path, str], tmp_path: Path) -> None:
    assert differences(json.loads(made[1]), made[0]) == []
    for number, change in enumerate(
        (other_option, other_version, other_input, other_tokenizer, input_changed_since, input_without_a_date, shard_cut_short, config_gone,
         recipe_of_another)
    ):  # fmt: skip
        out, plan = tmp_path / str(number), json.loads(made[1])
        shutil.copytree(made[0], out)
        change(plan, out)
        assert len(differences(plan, out)) == 1, change.__name__


def test_an_input_with_other_values_of_the_same_shapes_is_newer(made: tuple[Path, str], tmp_path: Path) -> None:
    """The header does not tell them apart, and a copy keeps the old time of change: what the system notes at a move still tells."""
    source = tmp_path / "source"
    shutil.copytree(made[0].parent / "source", source)
    weights = bytearray((source / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (source / "other").write_bytes(weights)
    os.utime(source / "other", ns=(0, 0))
    os.rename(source / "other", source / "model.safetensors")
    plan = explain(make_plan(convert(open_checkpoint(str(source)), "llava")), tmp_path / "out")[1]
    assert differences(json.loads(json.dumps(plan)), made[0]) == ["an input that is newer, or can't be dated"]


def test_the_lines_of_the_page_run(hub: UploadHub, bucket: Bucket, fixtures: Path) -> None:
    """docs/remote.md as it stands, but for the account: `you` is `owner` here, and each line has a repository of its own."""
    page = (ROOT / "docs/remote.md").read_text(encoding="utf-8").replace("//you/", "//owner/").replace(" you/llava", " owner/pushed")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    names = {"huggyllama/llama-13b": "base-hf-bin", "liuhaotian/LLaVA-13b-delta-v0": "delta-307-apr17"}
    for repo, source in names.items():
        hub.add(repo, fixtures / "A-delta-v0" / source)
        shutil.copytree(fixtures / "A-delta-v0" / source, repo.partition("/")[2])
    for line in lines:
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.output)
    assert len(lines) == 4
    made = Path("llava-13b/model.safetensors").read_bytes()
    assert bucket.files("models/llava/")["model.safetensors"] == made == Path("llava/model.safetensors").read_bytes()
