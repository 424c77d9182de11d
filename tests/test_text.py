"""Words on their way out: secrets are taken out in linear time, names stay as they are, schemes are read in any case."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from llava_weights.errors import HubError, InputError, LlavaWeightsError, UsageError
from llava_weights.storage.hub import HubSource, parse_source
from llava_weights.storage.remote import is_remote
from llava_weights.text import markdown_text, redact
from llava_weights.write.destinations import is_address, open_destination
from llava_weights.write.upload import repository_of

SECRET = "planted0secret"
TOKEN = "hf_" + "PlAnTeDqWeRtYuIoPaSdFgHjKlZxCvBnMx"

ATOMS = (
    "s3://", "://a@/", "https://u:p@", "a://b?", "://#=", "hf_", "hf_aB", "?a", "?token", "&x-amz-", ";a-", "authorization ",
    "authorization=", "authorization:'", "bearer ", "Bearer a ", "HF_TOKEN ", "HF_TOKEN=", "sig=", "gh", "ghp_aa", "`a", "`a|", "`", "@a",
    "a@", "www.", "://a.", "://[", "://a.b:", "a.", " ", "_", "##", "##a", "[", "\\", "\u202e", "]:", "a://b/c:d/", "'", "x-goog-",
)  # fmt: skip


@pytest.mark.timeout(30)
@pytest.mark.parametrize("way", [redact, markdown_text])
def test_any_repetition_is_cleaned_in_linear_time(way: Any) -> None:
    """Each takes some hundredths of a second. A quadratic rule takes half a minute for one of them."""
    for atom in ATOMS:
        count = (200_000 if "3:" in atom else 50_000) // len(atom)
        way(atom * count)
        way(f"https://h/{atom * count}?")


@pytest.mark.timeout(60)
def test_a_config_of_addresses_does_not_stop_inspect(cli: Any, fixtures: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(fixtures / "A-delta-v0/target-307/llava-tiny-v0", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"mm_vision_tower": "s3://" * 200_000}))
    shutil.rmtree(tmp_path / "model/vision_tower", ignore_errors=True)
    assert cli("inspect", "model").code == 0


LEAKING = (
    f"HTTPS://host/path?token={SECRET}", f"hf://owner/name?token={SECRET}", f"owner/name?token={SECRET}", f"az://box/blob?sig={SECRET}",
    f"owner/name#access_token={SECRET}", f"https://host/page#access_token={SECRET}", f"abfss://box@account/x?se=1&sig={SECRET}",
    f"https://user:{SECRET}@host/x", f"https://user:pa/{SECRET}@host/x", f"https://user:{SECRET}/ss@host/x", f"https://{SECRET}@host/x",
    f"s3://key:a/b/{SECRET}@host", f"https://user:a@{SECRET}/x@host/y", f"https://user:12/{SECRET}@host/x", f"HTTP://user:p?{SECRET}@host",
    f"https://user:p#{SECRET}@host", f"hf+x://u:{SECRET}@h", f"x=https://a/b,y=https://u:{SECRET}@h/c", f"'https://host/x?a={SECRET}'",
    f"//box/blob?x=1&client_secret={SECRET}", f"AccountName=x;AccountKey={SECRET};Endpoint=y", f"?X-Amz-Credential={SECRET}",
    f"authorization: {SECRET}", f"Authorization: Bearer {SECRET}0123456789", f"HF_TOKEN={SECRET}", f"AWS_SECRET_ACCESS_KEY: {SECRET}",
    f"hf_oauth_{SECRET}.{SECRET}",
)  # fmt: skip


@pytest.mark.parametrize("text", LEAKING)
def test_what_an_address_hides_is_not_shown(text: str) -> None:
    for around in (text, f"can't read `{text}` now", f"({text}).", f"{text}\n{text}", f"{text},{text}"):
        shown = redact(around)
        assert SECRET not in shown
        assert redact(shown) == shown


@pytest.mark.parametrize("letters", [TOKEN[3:], TOKEN[3:].lower(), TOKEN[3:] + "more", TOKEN[3:23], "0123456789abcdefghijABCDEFGHIJklmn"])
def test_what_can_be_a_token_is_not_shown(letters: str) -> None:
    assert redact(f"/home/x/hf_{letters}/model") == "/home/x/hf_***/model"


NAMES = (
    "hf_llava13bmergedcheckpoint2024", "hf_LLaVA13bMergedCheckpoint", "hf_llava13bmergedcheckpointthatsomebodytrainedin",
    "hf://owner/name@main/folder", "https://hub.example:8080/owner/name@main", "http://127.0.0.1:80/a@b", "http://[::1]:80/a@b", "s3://bucket/v@2/x",
    "https://host/page#section", "https://host/x?", "see https://host/x.", "image_token=5", "owner/name@main", "design?new", "a#1=2",
    "the password is wrong", "sigmoid=1", "C://x", "authorization is needed",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_stay_as_they_are(name: str) -> None:
    assert redact(name) == name


def test_a_folder_with_such_a_name_is_named(cli: Any, fixtures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf_llava13bmergedcheckpoint2024"
    folder.symlink_to(fixtures / "A-delta-v0/base-hf-bin")
    assert folder.name in cli("inspect", folder.name, "--json").stdout + cli("inspect", f"./{folder.name}x").stderr


def test_a_secret_of_a_variable_is_found_where_it_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "ab/cd+ef/gh12")
    assert redact("x ab/cd+ef/gh12 y ab%2Fcd%2Bef%2Fgh12 z") == "x *** y *** z"


@pytest.mark.parametrize(
    "spelled",
    [
        "wJalr/XUtnFEMI+K7MDENG=bPxRfi", "wJalr/XUtnFEMI%2BK7MDENG%3DbPxRfi", "wJalr\\/XUtnFEMI+K7MDENG=bPxRfi", "wJalr/XUtnFEMI+K7MD",
        "d0phbHIvWFV0bkZFTUkrSzdNREVORz1iUHhSZmk=",
    ],
)  # fmt: skip
def test_a_secret_of_a_variable_is_found_encoded_and_cut(monkeypatch: pytest.MonkeyPatch, spelled: str) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr/XUtnFEMI+K7MDENG=bPxRfi")
    assert redact(f"x {spelled}... {spelled}") == "x ***... ***"


@pytest.mark.parametrize(
    "text", ["HF_TOKEN='hidden-one'", '"HF_TOKEN": "hidden-one"', "AccountName=a;AccountKey=hidden-one;", "s3:/user:hidden-one@bucket/x"]
)
def test_a_secret_behind_a_quote_or_in_a_path_is_not_shown(text: str) -> None:
    assert "hidden" not in redact(text)


@pytest.mark.parametrize("kind", [LlavaWeightsError, UsageError, InputError, HubError])
def test_an_error_holds_no_secret(kind: type[LlavaWeightsError]) -> None:
    """In a program that uses the library nothing else stands between an error and a log."""
    words = f"no https://u:{SECRET}@h/x?token={SECRET}"
    error = kind(words, facts={"reason": ValueError(words)}, hint=words)
    assert SECRET not in repr((error, error.args, error.what, error.facts, error.hint))


# --- schemes ---------------------------------------------------------------------------------------------------------


def test_schemes_are_read_in_any_case() -> None:
    assert parse_source("HF://owner/name@v1/folder") == HubSource("owner/name", "v1", "folder")
    assert [is_remote(text) for text in ("HF://o/n", "Https://h/x", "S3://b/k", "gS://b/k", "az://b/k", "o/n")] == [True] * 4 + [False] * 2
    assert open_destination("S3://bucket/Folder").address == "s3://bucket/Folder"
    assert open_destination("Hf://owner/Name@main").address == "hf://owner/Name@main"
    assert repository_of("HF://owner/name").repo == "owner/name"
    assert not is_address("./s3:/folder")


@pytest.mark.parametrize("scheme", ["az", "AZ", "file", "ftp", "abfss", "x-y.z+1"])
def test_an_unknown_scheme_is_refused_by_name(scheme: str) -> None:
    for ask in (parse_source, open_destination):
        with pytest.raises(UsageError, match=r"nothing is read from|no place to write to") as caught:
            ask(f"{scheme}://place/folder")
        assert f"`{scheme.lower()}://`" in caught.value.what
        assert "hf://" in str(caught.value.hint)


@pytest.mark.parametrize(
    "output", ["HTTPS://host/x", "https://host/x", "AZ://c/x", "file:///tmp/x", "S3:/bucket/x", "s3:/x", "HF://dataset", "Gs://b"]
)
def test_no_address_becomes_a_folder(cli: Any, fixtures: Path, tmp_path: Path, output: str) -> None:
    folder = fixtures / "A-delta-v0"
    done = cli("apply-delta", "--base", folder / "base-hf-bin", "--delta", folder / "delta-307-apr17", "-o", output)
    assert (done.code, os.listdir(tmp_path)) == (3 if "HF" in output else 2, [])


@pytest.mark.parametrize("folder", ["s3://bucket/x", "HF://owner/name", "az://c/x"])
def test_a_demo_is_made_on_this_machine(cli: Any, tmp_path: Path, folder: str) -> None:
    assert (cli("demo", folder).code, os.listdir(tmp_path)) == (2, [])


def test_a_bucket_in_capitals_is_the_bucket(cli: Any, fixtures: Path, tmp_path: Path) -> None:
    folder = fixtures / "A-delta-v0"
    done = cli("apply-delta", "--base", folder / "base-hf-bin", "--delta", folder / "delta-307-apr17", "-o", "S3://bucket/x", "--finish")
    assert (done.code, os.listdir(tmp_path)) == (2, [])
    assert "at an address" in done.stderr
