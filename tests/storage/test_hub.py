"""Sources and downloads, against huggingface_hub itself and a Hub on the loopback interface."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from string import ascii_letters, digits

import pytest
from conftest import Finished
from hub_server import HubServer
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st

from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.errors import HubError, InputError, LlavaWeightsError, OutputError, UsageError
from llava_weights.events import Note, listening
from llava_weights.storage.hub import FetchedRepo, HubSource, LocalSource, choose_files, fetch, parse_source, source_text
from llava_weights.text import redact
from llava_weights.transforms.adapter import open_adapter
from llava_weights.transforms.lora import open_weighted

TOKEN = "hf_" + "FaKeToKeN0123456789"
REPO = HubSource("owner/model")
SHARDED = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NEEDED = ("LICENSE", "config.json", "model.safetensors.index.json", "tokenizer.model", "tokenizer_config.json", *SHARDED)
UNWANTED = (
    "README.md", "modeling_evil.py", "pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "mm_projector.bin",
    "trainer_state.json", "checkpoint-500/model.safetensors", "original/consolidated.00.pth",
)  # fmt: skip


def make_repo(folder: Path, names: tuple[str, ...] = NEEDED + UNWANTED, salt: str = "") -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} {salt}")
    if "model.safetensors.index.json" in names:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", SHARDED, strict=True))}))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of our own that the library in this process asks, with an empty cache and nobody logged in."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1")
    for name, value in {"HF_HUB_CACHE": tmp_path / "cache", "HF_TOKEN_PATH": tmp_path / "token"}.items():
        monkeypatch.setattr(constants, name, str(value))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def message(error: LlavaWeightsError) -> str:
    return "\n".join((error.what, *(f"{label} {value}" for label, value in error.facts.items()), error.hint or ""))


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("owner/name", HubSource("owner/name")),
        ("owner/name@f50f69d", HubSource("owner/name", "f50f69d")),
        ("owner/name@refs/pr/3", HubSource("owner/name", "refs/pr/3")),
        ("liuhaotian/LLaVA-13b-delta-v1-1", HubSource("liuhaotian/LLaVA-13b-delta-v1-1")),
        ("hf://owner/name", HubSource("owner/name")),
        ("hf://models/owner/name", HubSource("owner/name")),
        ("hf://owner/name@v1.0", HubSource("owner/name", "v1.0")),
        ("hf://owner/name@v1.0/sub/folder/", HubSource("owner/name", "v1.0", "sub/folder")),
        ("hf://owner/name@refs/pr/3/sub", HubSource("owner/name", "refs/pr/3", "sub")),
        ("hf://owner/name@feature%2Fone/sub", HubSource("owner/name", "feature/one", "sub")),
        ("hf://owner/name/sub", HubSource("owner/name", None, "sub")),
    ],
)
def test_addresses_of_the_hub(text: str, source: HubSource) -> None:
    assert parse_source(text) == source


def test_an_existing_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("owner/name", "owner/name@main", "hf:/owner/name", "one.safetensors"):
        Path(text).mkdir(parents=True)
        assert parse_source(text) == LocalSource(Path(text))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_source("~/owner") == LocalSource(tmp_path / "owner")
    assert parse_source("owner/other") == HubSource("owner/other")


@pytest.mark.parametrize(
    "text",
    ["", "name", "./owner/name", "/no/such/folder", "owner/name/more", "models/model.safetensors", "own er/name", "owner/na--me",
     "owner/na..me", "owner/name@", "hf://name", "hf://owner/name/../../x", "hf://owner/name@",
     "hf://datasets/owner/name", "owner/-name", "a\0b"],
)  # fmt: skip
def test_anything_else_is_a_missing_path(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        parse_source(text)
    assert caught.value.exit_code == 3
    assert f"`{text}`" in caught.value.what
    assert caught.value.hint


def test_a_wrong_name_gets_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/LLaVA-13B/weights").mkdir(parents=True)
    for text, meant in {
        "./models/llava-13b": "models/LLaVA-13B",
        str(tmp_path / "modles/LLaVA-13B/weights"): str(tmp_path / "models/LLaVA-13B/weights"),
        "./models/LLaVA-13B/weight": "models/LLaVA-13B/weights",
        "model": "models",
    }.items():
        with pytest.raises(InputError) as caught:
            parse_source(text)
        assert caught.value.hint == f"did you mean the local path `{meant}`?"
    with pytest.raises(InputError) as caught:
        parse_source("./models/pixtral")
    assert "did you mean" not in (caught.value.hint or "")
    assert caught.value.facts == {"looked in": str(tmp_path / "models")}


def test_a_page_of_the_hub_is_named_as_repository() -> None:
    with pytest.raises(InputError) as caught:
        parse_source(f"https://user:{TOKEN}@huggingface.co/liuhaotian/llava-v1.5-13b/tree/main")
    assert caught.value.hint == "write `liuhaotian/llava-v1.5-13b` for this repository of the Hub"
    assert TOKEN not in message(caught.value)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (NEEDED + UNWANTED, NEEDED),
        (  # liuhaotian/LLaVA-13b-delta-v0 at f1689f5: the projector is in the shards already
            (".gitattributes", "README.md", "added_tokens.json", "config.json", "generation_config.json", "mm_projector.bin",
             "pytorch_model-00001-of-00003.bin", "pytorch_model-00002-of-00003.bin", "pytorch_model-00003-of-00003.bin",
             "pytorch_model.bin.index.json", "special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"),
            ("added_tokens.json", "config.json", "generation_config.json", "pytorch_model-00001-of-00003.bin",
             "pytorch_model-00002-of-00003.bin", "pytorch_model-00003-of-00003.bin", "pytorch_model.bin.index.json",
             "special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"),
        ),
        (  # a LoRA folder of LLaVA's train.py
            ("README.md", "adapter_config.json", "adapter_model.bin", "config.json", "non_lora_trainables.bin", "trainer_state.json"),
            ("adapter_config.json", "adapter_model.bin", "config.json", "non_lora_trainables.bin"),
        ),
        (("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"), ("adapter_config.json", "adapter_model.safetensors")),
        (  # Mistral keeps the same weights twice, both as safetensors
            ("config.json", "consolidated.safetensors", *SHARDED, "model.safetensors.index.json", "tokenizer.model.v3", "params.json"),
            ("config.json", *SHARDED, "model.safetensors.index.json"),
        ),
        (
            ("USE_POLICY.md", "checklist.chk", "consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"),
            ("USE_POLICY.md", "consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"),
        ),
        (("config.json", "mm_projector.bin"), ("config.json", "mm_projector.bin")),
        (("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"), ("model.safetensors",)),
        (("llava.safetensors", "config.json"), ("config.json", "llava.safetensors")),
        (("model.gguf", "config.json", "training_args.bin"), ()),
    ],
)  # fmt: skip
def test_one_kind_of_weights_is_chosen(names: tuple[str, ...], chosen: tuple[str, ...]) -> None:
    assert choose_files(reversed(names)) == tuple(sorted(chosen))


def test_only_what_is_needed_is_downloaded(hub: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_repo(tmp_path / "repo")
    sha = hub.add("owner/model", folder)
    fetched = fetch(REPO)
    assert hub.downloads == sorted(NEEDED)
    assert fetched == FetchedRepo(fetched.folder, "owner/model", sha)
    assert {path.name: path.read_text() for path in fetched.folder.iterdir()} == {name: (folder / name).read_text() for name in NEEDED}
    assert fetch(REPO) == fetched
    assert hub.downloads == sorted(NEEDED)
    assert capfd.readouterr() == ("", "")


def test_bars_go_to_stderr(hub: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hub.add("owner/model", make_repo(tmp_path / "repo"))
    fetch(REPO, progress=True)
    output, narration = capfd.readouterr()
    assert output == ""
    assert narration


def test_a_folder_of_a_repository(hub: HubServer, tmp_path: Path) -> None:
    hub.add("owner/model", make_repo(tmp_path / "repo"))
    fetched = fetch(HubSource("owner/model", folder="checkpoint-500"))
    assert hub.downloads == ["checkpoint-500/model.safetensors"]
    assert [path.name for path in fetched.folder.iterdir()] == ["model.safetensors"]


def test_a_revision_is_pinned(hub: HubServer, tmp_path: Path) -> None:
    old = hub.add("owner/model", make_repo(tmp_path / "old", salt="old"))
    assert fetch(REPO).revision == old
    new = hub.add("owner/model", make_repo(tmp_path / "new", salt="new"))
    assert fetch(REPO).revision == new
    asked = len(hub.downloads)
    again = fetch(HubSource("owner/model", old))
    assert (again.revision, (again.folder / "config.json").read_text()) == (old, "config.json old")
    assert fetch(REPO, revision=old) == fetch(HubSource("owner/model", old), revision=old) == again
    assert len(hub.downloads) == asked
    with pytest.raises(UsageError):
        fetch(HubSource("owner/model", old), revision=new)


def test_a_branch_with_a_slash(hub: HubServer, tmp_path: Path) -> None:
    sha = hub.add("owner/model", make_repo(tmp_path / "repo"), ref="refs/pr/3")
    assert fetch(HubSource("owner/model", "refs/pr/3")).revision == sha


@pytest.mark.parametrize("why", ["HF_HUB_OFFLINE", "503", "refused"])
def test_the_cache_serves_without_a_network(why: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/model", make_repo(tmp_path / "repo"))
    first = fetch(REPO)
    hub.requests.clear()
    lose_network(why, hub, monkeypatch)
    again = fetch(REPO)
    assert again == FetchedRepo(first.folder, "owner/model", first.revision, from_cache=True)
    assert fetch(REPO, revision=first.revision).folder == first.folder
    assert hub.downloads == []
    assert why == "503" or not hub.requests


@pytest.mark.parametrize("why", ["HF_HUB_OFFLINE", "503", "refused", "timeout"])
def test_without_a_network_and_a_copy(why: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_network(why, hub, monkeypatch)
    with pytest.raises(HubError) as caught:
        fetch(REPO)
    assert caught.value.exit_code == 6
    offline = "`owner/model` is no local path, nor in the cache, and `HF_HUB_OFFLINE` is set"
    assert caught.value.what == (
        offline if why == "HF_HUB_OFFLINE" else "`owner/model` is no local path, and the Hub can't be reached for it"
    )
    monkeypatch.chdir(tmp_path)
    Path("owner/models").mkdir(parents=True)
    with pytest.raises(HubError) as caught:
        fetch(REPO)
    assert caught.value.hint == "did you mean the local path `owner/models`?"


def lose_network(why: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif why == "503":
        hub.refuse = (503, {})
    elif why == "timeout":
        hub.delay = 1.0
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    else:
        with HubServer() as gone:
            monkeypatch.setenv("HF_ENDPOINT", gone.url)


@pytest.mark.parametrize("lost", [SHARDED[1:], SHARDED])
def test_an_unfinished_download_is_not_taken_for_a_copy(
    lost: tuple[str, ...], hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("owner/model", make_repo(tmp_path / "repo"))
    folder = fetch(REPO).folder
    for name in lost:
        (folder / name).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as caught:
        fetch(REPO)
    assert caught.value.what == "the copy of `owner/model` in the cache is not complete"
    assert caught.value.facts["missing"] == (SHARDED[1] if len(lost) == 1 else "the weights")


NOBODY = "nobody (no HF_TOKEN, no `hf auth login`)"
BAD_TOKEN, DISABLED = "Invalid credentials in Authorization header", "Access to this resource is disabled."  # as the Hub words them
REFUSALS = {
    "gated": (HubSource("owner/gated"), None, "access to `owner/gated` is gated", "accept the licence on {url}/owner/gated, then `hf auth"),
    "missing": (HubSource("owner/none"), None, "`owner/none` is no local path, and not on the Hub, or private there", "check the name"),
    "revision": (HubSource("owner/model", "v9"), None, "`owner/model` has no revision `v9`", "{url}/owner/model/commits/main"),
    "token": (REPO, (401, {"X-Error-Message": BAD_TOKEN}), "the Hub does not accept the token", "`HF_TOKEN`"),
    "forbidden": (REPO, (403, {"X-Error-Message": "not yours"}), "the Hub refuses access to `owner/model`", "may read {url}/owner/model"),
    "too many": (REPO, (429, {}), "the Hub gets too many requests from here", "wait some minutes"),
    "disabled": (REPO, (403, {"X-Error-Message": DISABLED}), "`owner/model` was disabled on the Hub", "digests"),
    "not a hub": (REPO, (200, {}), "`owner/model` can't be downloaded", "`HF_ENDPOINT`"),
}  # fmt: skip


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("case", REFUSALS)
def test_every_refusal_says_what_to_do(
    case: str, token: str | None, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source, hub.refuse, what, hint = REFUSALS[case]
    hub.add("owner/model", make_repo(tmp_path / "repo"))
    hub.add("owner/gated", tmp_path / "repo", gated=True)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("://", f"://user:{token}@"))
    with pytest.raises(HubError) as caught:
        fetch(source)
    assert (caught.value.exit_code, caught.value.what) == (6, what)
    address = hub.url.replace("://", "://***@") if token else hub.url
    assert hint.format(url=address) in (caught.value.hint or "")
    assert caught.value.facts.get("logged in as") in (None, NOBODY if token is None else "the owner of `HF_TOKEN`")
    if token:
        assert any(sent for *_, sent in hub.requests)  # so there was something to leak
        everything = message(caught.value) + "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())
        assert token not in everything


def test_a_mistyped_path_that_looks_like_a_repository(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/llava-13b").mkdir(parents=True)
    heard: list[object] = []
    with listening(heard.append):
        source = parse_source("models/llava13b")
    assert heard == [Note("there is no local path `models/llava13b`, so it is looked for on the Hub")]  # before anything is asked
    assert hub.requests == []
    assert isinstance(source, HubSource)
    with pytest.raises(HubError, match="`models/llava13b` is no local path") as caught:
        fetch(source)
    assert caught.value.hint == "did you mean the local path `models/llava-13b`?"


def test_the_command_line_says_first_that_there_is_no_such_path(hub: HubServer, tmp_path: Path, process: Callable[..., Finished]) -> None:
    (tmp_path / "models/llama-13b").mkdir(parents=True)
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    code, _, errors = process("inspect", "models/llama-13", cwd=tmp_path, env=environment)
    assert code == 6
    first, *_, last = filter(None, errors.splitlines())
    assert first.endswith("there is no local path `models/llama-13`, so it is looked for on the Hub")
    assert "did you mean the local path `models/llama-13b`?" in last


def test_revisions_that_look_like_weights(hub: HubServer, fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first `@` behind a repository's name is its revision, whatever it looks like; behind a path it is a weight."""
    adapter = fixtures / "F-peft/plain/adapter"
    revisions = {ref: hub.add("owner/lora", adapter, ref=ref) for ref in ("main", "2", "1.0")}
    opened = {name: open_weighted(f"owner/lora{name}", progress=False) for name in ("", "@2", "@1.0", "@main@0.5", "@2@-3", "@1.0@2")}
    assert {name: weight for name, (_, weight) in opened.items()} == {"": 1, "@2": 1, "@1.0": 1, "@main@0.5": 0.5, "@2@-3": -3, "@1.0@2": 2}
    commits = {name: adapter.origin.revision for name, (adapter, _) in opened.items()}
    assert commits == {name: revisions[name.split("@")[1] if name else "main"] for name in opened}
    found, weight = open_weighted("hf://owner/lora@1.0", progress=False)
    assert (found.origin.revision, weight) == (revisions["1.0"], 1)
    with pytest.raises(HubError) as caught:
        open_weighted("owner/lora@0.5")
    assert "write `owner/lora@main@0.5` to weigh it" in str(caught.value.hint)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter, "owner/lora")
    assert open_weighted("owner/lora@2")[1] == 2  # an existing local path wins
    shutil.copytree(adapter, "owner/lora@2")
    assert open_weighted("owner/lora@2")[1] == 1


def test_addresses_as_paths(hub: HubServer, fixtures: Path) -> None:
    """pathlib makes one slash of the two behind a scheme."""
    hub.add("owner/clip", fixtures / "common/clip-tiny-42px")
    hub.add("owner/lora", fixtures / "F-peft/plain/adapter")
    assert open_checkpoint(Path("hf://owner/clip")).origin.name == "owner/clip"
    assert open_adapter(Path("hf://owner/lora")).origin.name == "owner/lora"
    assert source_text(Path("s3://bucket/a/b")) == "s3://bucket/a/b"
    assert [source_text(text) for text in ("hf:/a", Path("/a/b"), Path("a:/b"), Path("hf"))] == ["hf:/a", "/a/b", "a:/b", "hf"]


def test_a_repository_without_weights(hub: HubServer, tmp_path: Path) -> None:
    hub.add("owner/model", make_repo(tmp_path / "repo", ("README.md", "config.json", "model.Q4_K_M.gguf")))
    with pytest.raises(InputError) as caught:
        fetch(REPO)
    assert caught.value.facts == {"files": "README.md, config.json, model.Q4_K_M.gguf"}
    assert hub.downloads == []


def test_a_full_disk_is_noticed_before_the_download(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_repo(tmp_path / "repo")
    hub.add("owner/model", folder)
    size = sum((folder / name).stat().st_size for name in NEEDED)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) if not Path(path).exists() else Usage(size - 1))
    with pytest.raises(OutputError) as caught:
        fetch(REPO)
    assert (caught.value.exit_code, hub.downloads) == (5, [])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(size))
    fetch(REPO)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0))
    fetch(REPO)  # nothing is to come any more
    hub.add("owner/model", folder)
    fetch(REPO)  # nor for a commit of the same files


class Usage:
    def __init__(self, free: int) -> None:
        self.free = free


@pytest.mark.parametrize(
    ("error", "kind", "what"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "not enough space for the cache of the Hub"),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), OutputError, "not enough space for the cache"),
        (PermissionError(errno.EACCES, "Permission denied"), OutputError, "can't be written"),
        (LocalEntryNotFoundError("no"), HubError, "`owner/model` is no local path, nor in the cache"),
        (RuntimeError(f"broken {TOKEN}"), HubError, "`owner/model` can't be downloaded"),
    ],
)  # fmt: skip
def test_failures_while_downloading(
    error: Exception, kind: type[LlavaWeightsError], what: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    hub.add("owner/model", make_repo(tmp_path / "repo"))
    monkeypatch.setattr(HfApi, "snapshot_download", fail)
    with pytest.raises(kind) as caught:
        fetch(REPO)
    assert what in caught.value.what
    assert TOKEN not in message(caught.value) + "".join(traceback.format_exception(caught.value))


def test_our_own_mistakes_are_not_blamed_on_the_hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/model", make_repo(tmp_path / "repo"))
    monkeypatch.setattr(HfApi, "snapshot_download", lambda *_, **__: [][1])
    with pytest.raises(IndexError):
        fetch(REPO)


SCRIPT = """
import sys
from llava_weights.storage.hub import HubSource, fetch
assert not {"huggingface_hub", "torch"} & set(sys.modules)
fetched = fetch(HubSource("owner/model"))
print(fetched.folder)
fetch(HubSource("owner/gated"))
"""


def test_the_variables_of_the_library_hold(hub: HubServer, tmp_path: Path) -> None:
    sha = hub.add("owner/model", make_repo(tmp_path / "repo"))
    hub.add("owner/gated", tmp_path / "repo", gated=True)
    variables = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "elsewhere"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": ""}
    variables["HF_ENDPOINT"] = hub.url
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=os.environ | variables, capture_output=True, text=True, check=False)
    assert run.stdout == f"{tmp_path}/elsewhere/models--owner--model/snapshots/{sha}\n"
    assert "access to `owner/gated` is gated" in run.stderr
    assert TOKEN not in run.stdout + run.stderr
    assert {sent for _, path, sent in hub.requests if "/model" in path} == {f"Bearer {TOKEN}"}
    assert not (tmp_path / "cache").exists()


@given(st.text(max_size=20), st.text(ascii_letters + digits, min_size=34, max_size=34), st.text(max_size=20))
def test_no_token_survives_redaction(before: str, token: str, after: str) -> None:
    """What has its form: 34 letters of both cases and digits, whatever stands around them."""
    token = f"aB{token[2:]}"
    assert f"hf_{token}" not in redact(f"{before}hf_{token}{after}")


def test_a_token_of_any_form_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "an odd: token")
    assert redact("sent an odd: token to the Hub") == "sent *** to the Hub"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://user:pa@ss@hub.example/owner/name", "https://***@hub.example/owner/name"),
        ("GET https://cdn.example/a/b?X-Signature=abc&Expires=1 failed", "GET https://cdn.example/a/b?*** failed"),
        ("Authorization: Bearer eyJhbGciOi.eyJzdWIi", "Authorization: Bearer ***"),
        ("hf://owner/name@main and `hf auth login` and hf_hub_download", "hf://owner/name@main and `hf auth login` and hf_hub_download"),
        ("owner/name@v1 ~/hf_cache/x", "owner/name@v1 ~/hf_cache/x"),
    ],
)
def test_redaction_leaves_the_rest(text: str, clean: str) -> None:
    assert redact(text) == clean
