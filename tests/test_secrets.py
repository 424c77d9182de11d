"""Fake tokens wherever a true one may be, every command, and then a search through all that was shown or written."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from typer.testing import CliRunner

from llava_weights.cli.main import app
from llava_weights.text import SECRET_VARIABLES, redact, redacted

FILE_TOKEN = "hf_" + "PlAnTeDiNaFiLeNaMe" + "0123456789abcdef"
VALUES = {variable: f"planted+in/{variable.lower()}=value" for variable in SECRET_VARIABLES} | {
    "HF_TOKEN": "hf_" + "PlAnTeDiNtHeEnViRoNmEnT" + "01234567890"
}
PASSWORD = "planted-password-of-the-proxy"
SIGNATURE = "planted0signature0of0a0redirect"
PLANTED = (FILE_TOKEN, PASSWORD, SIGNATURE, *VALUES.values())


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in VALUES.items():
        monkeypatch.setenv(variable, value)


@pytest.fixture
def place(tmp_path: Path, fixtures: Path, monkeypatch: pytest.MonkeyPatch, planted: None) -> Path:
    """The inputs of every command, in folders that have a token in their names; temporary files of a bug report lie beside them."""
    sources = {
        "base": "A-delta-v0/base-hf-bin", "delta": "A-delta-v0/delta-307-apr17", "tuned": "A-delta-v0/target-307/llava-tiny-v0",
        "lora-base": "B-lora/base-vicuna-tiny", "lora": "B-lora/llava-v1.5-tiny-lora", "tower": "common/clip-tiny-42px",
        "original": "C-v1.5/original-with-vision-safetensors", "hf": "C-v1.5/hf-by-tf4.47.1",
    }  # fmt: skip
    for name, folder in sources.items():
        shutil.copytree(fixtures / folder, tmp_path / f"{name}-{FILE_TOKEN}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, [argument.replace("{t}", FILE_TOKEN) for argument in arguments])
    return done.exit_code, done.stdout + done.stderr


def texts(folder: Path, inputs: set[Path]) -> Iterator[tuple[str, bytes]]:
    """Every file that a command wrote; the names of copies of a user's own files are the user's."""
    yield from ((str(path.relative_to(folder)), path.read_bytes()) for path in folder.rglob("*") if path.is_file() and path not in inputs)


COMMANDS: dict[str, tuple[int, list[str]]] = {
    "inspect": (0, ["inspect", "base-{t}", "--tensors"]),
    "apply-delta": (0, ["apply-delta", "--base", "base-{t}", "--delta", "delta-{t}", "-o", "out"]),
    "make-delta": (0, ["make-delta", "--base", "base-{t}", "--tuned", "tuned-{t}", "-o", "out"]),
    "merge-lora": (0, ["merge-lora", "--base", "lora-base-{t}", "--lora", "lora-{t}", "-o", "out"]),
    "convert": (0, ["convert", "original-{t}", "--vision-tower", "tower-{t}", "-o", "out"]),
    "verify": (3, ["verify", "tuned-{t}", "--deep", "--junit", "junit.xml", "--summary", "summary.md"]),
    "verify again": (4, ["verify", "base-{t}", "--against", "tuned-{t}", "--junit", "junit.xml", "--summary", "summary.md"]),
    "checksum": (0, ["checksum", "original-{t}"]),
    "diff": (4, ["diff", "base-{t}", "tuned-{t}", "--plot", "plot.svg"]),
    "record": (0, ["smoke", "hf-{t}", "--record", "reference.safetensors"]),
    "env": (0, ["env"]),
    "a path that is not there": (3, ["inspect", "./nowhere-{t}"]),
    "inputs that do not fit": (3, ["apply-delta", "--base", "delta-{t}", "--delta", "base-{t}", "-o", "out"]),
    "an address": (2, ["inspect", f"https://user:{PASSWORD}@huggingface.co/owner/name/tree/main?token={VALUES['HF_TOKEN']}"]),
    "no repository": (6, ["inspect", "owner/{t}"]),
    "a revision": (6, ["inspect", "owner/name@{t}"]),
}


FORMS = [(command, form) for command in COMMANDS for form in ("", "--json", "-v") if (command, form) != ("env", "-v")]  # it has none


@pytest.mark.parametrize(("command", "form"), FORMS)
def test_no_command_shows_or_writes_a_secret(place: Path, command: str, form: str) -> None:
    code, arguments = COMMANDS[command]
    inputs = set(place.rglob("*"))
    found, shown = invoke(*arguments, *filter(None, [form]))
    assert found == code, shown
    assert shown
    assert [secret for secret in PLANTED if secret in shown] == []
    leaked = [(name, secret) for name, data in texts(place, inputs) for secret in PLANTED if secret.encode() in data]
    assert leaked == []


def test_work_in_progress_holds_no_secret(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends half-way, and a bug of ours: the identity of the work, the journal, and the file that goes into a report."""
    from llava_weights.write import execute

    def broken(*arguments: Any) -> None:
        raise RuntimeError(f"GET https://user:{PASSWORD}@hub.example/{FILE_TOKEN}?X-Amz-Signature={SIGNATURE} Bearer {VALUES['HF_TOKEN']}")

    monkeypatch.setattr(execute, "finish", broken)
    inputs = set(place.rglob("*"))
    code, shown = invoke("apply-delta", "--base", "base-{t}", "--delta", "delta-{t}", "-o", "out", "-v")
    written = dict(texts(place, inputs))
    assert (code, "Traceback" in shown) == (1, True)
    assert {"out.partial/plan.json", "out.partial/journal"} <= written.keys()
    assert any(name.startswith("llava-weights-") for name in written), "the traceback is kept"
    assert [secret for secret in PLANTED if secret in shown] == []
    assert [(name, secret) for name, data in written.items() for secret in PLANTED if secret.encode() in data] == []


ANSWERS: dict[str, tuple[int, dict[str, str]]] = {
    "an error that repeats the request": (500, {"X-Error-Message": f"no route for Authorization: Bearer {VALUES['HF_TOKEN']}"}),
    "a refused token": (401, {"X-Error-Message": f"token {VALUES['HF_TOKEN']} expired"}),
    "a redirect to a signed address": (302, {"Location": f"http://127.0.0.1:9/f?X-Amz-Signature={SIGNATURE}&X-Amz-Credential={SIGNATURE}"}),
    "too many requests": (403, {"X-Error-Message": f"https://user:{PASSWORD}@hub.example/?sig={SIGNATURE}"}),
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("form", ["--json", "-v"])
def test_the_hub_may_answer_what_it_likes(answer: str, form: str, process: Callable[..., Any]) -> None:
    """Its address has a password, its answers hold the token that was sent, and signed addresses."""
    with HubServer() as hub:
        hub.refuse = ANSWERS[answer]
        address = hub.url.replace("://", f"://user:{PASSWORD}@")
        variables = {**VALUES, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
        code, out, err = process("inspect", "owner/name", form, env=variables)
        assert hub.requests
    assert (code, [secret for secret in PLANTED if secret in out + err]) == (6, [])
    assert "error" in err


@pytest.mark.parametrize(
    "text",
    [
        f"url: /repos/ab?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=x&X-Amz-Signature={SIGNATURE}",
        f"/b/o?X-Goog-Credential=x&X-Goog-Signature={SIGNATURE}",
        f"/c/blob?sv=2024-01-01&sr=b&sig={SIGNATURE}",
        f"/cloudfront?Expires=1&Signature={SIGNATURE}&Key-Pair-Id=K",
        f"s3://bucket/key?X-Amz-Security-Token={SIGNATURE}",
        f"authorization: basic {SIGNATURE}",
        f"ghp_{SIGNATURE}",
    ],
)
def test_secrets_without_their_address(text: str) -> None:
    """As an HTTP library quotes them: the path of a request alone."""
    assert SIGNATURE not in redact(text)


def test_plain_data_is_redacted_to_the_ground(planted: None) -> None:
    deep = {"a": [{FILE_TOKEN: (f"x {VALUES['AWS_SECRET_ACCESS_KEY']}", 3, None, 1.5, True)}]}
    assert redacted(deep) == {"a": [{"hf_***": ["x ***", 3, None, 1.5, True]}]}


@pytest.mark.parametrize(
    "name", ["hf_checkpoints", "hf_llava13bmerged", "./hf_home/hub", "sigmoid=1", "design=new", "what is basic training"]
)
def test_names_are_no_secrets(name: str) -> None:
    assert redact(name) == name


def test_a_tree_of_the_users_is_named_as_it_is(place: Path) -> None:
    """A list of checksums has to name files as they are called: that is the one place, and the token was in the name before."""
    token = f"weights-{FILE_TOKEN}.safetensors"
    shutil.copy(place / f"original-{FILE_TOKEN}/model-00001-of-00002.safetensors", place / token)
    code, shown = invoke("checksum", token)
    assert (code, FILE_TOKEN in shown) == (0, False)
    assert token in (place / f"{token}.sha256").read_text()
    assert json.loads((place / f"{token}.manifest.json").read_text())["files"][0]["path"] == token
