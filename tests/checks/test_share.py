"""`verify --deep --part I/N`: every byte that is read in parts belongs to one part, and no part says more than it read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llava_weights as lw
from llava_weights.checkpoint.manifest import MANIFEST, SUMS
from llava_weights.checks.share import share_of, to_part
from llava_weights.cli import report
from llava_weights.errors import UsageError
from llava_weights.formats.safetensors import index_safetensors

SIZES = st.dictionaries(st.text(max_size=4), st.integers(0, 1 << 40), max_size=30)


@pytest.fixture(scope="module")
def made(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output of several shards. Not to be changed."""
    folder = fixtures / "A-delta-v0"
    out = tmp_path_factory.mktemp("made") / "model"
    merged = lw.apply_delta(folder / "base-hf-bin", folder / "delta-307-apr17")
    lw.execute(lw.make_plan(merged, max_shard_size=60_000), out)
    return out


def headline(found: lw.Verification) -> str:
    return report.verdict(found.findings, found.exit_code)


@given(SIZES, SIZES, st.integers(1, 40))
def test_every_unit_belongs_to_one_part(tensors: dict[str, int], files: dict[str, int], count: int) -> None:
    shares = [share_of((number, count), tensors, files) for number in range(1, count + 1)]
    assert sorted(name for share in shares for name in share.tensors) == sorted(tensors)
    assert sorted(name for share in shares for name in share.files) == sorted(files)
    total = sum(tensors.values()) + sum(files.values())
    assert sum(share.nbytes for share in shares) == total
    largest = max([*tensors.values(), *files.values(), 0])
    assert all(share.nbytes <= total / count + largest and share.total == total for share in shares)
    assert all(share.nbytes == sum(tensors[n] for n in share.tensors) + sum(files[n] for n in share.files) for share in shares)


@pytest.mark.parametrize("records", ["manifest", "SHA256SUMS", "torch", "meta"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_together_the_parts_read_everything(made: Path, fixtures: Path, tmp_path: Path, records: str, count: int) -> None:
    """A bit that is changed in a tensor is found by one part, and by no other where no CRC tells it."""
    source = {"torch": fixtures / "A-delta-v0/base-hf-bin", "meta": fixtures / "A-delta-v0/base-meta/13B"}.get(records, made)
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    if records in ("torch", "meta"):
        lw.checksum(folder)
    if records == "SHA256SUMS":
        (folder / MANIFEST).unlink()
    found = [lw.verify(folder, deep=True, part=f"{number}/{count}") for number in range(1, count + 1)]
    assert {each.exit_code for each in found} == {0}
    facts = [each.facts["part"] for each in found]
    assert sum(each["nbytes"] for each in facts) == facts[0]["total"]
    if count > 1:
        assert all(f"part {number}/{count} alone was read" in headline(each) for number, each in enumerate(found, 1))
    if records == "manifest":
        assert facts[0]["total"] == sum(tensor.nbytes for tensor in lw.open_checkpoint(folder).tensors.values())
        assert [each.facts["root"] != "" for each in found] == [count == 1] * count
    for name, tensor in list(lw.open_checkpoint(folder).tensors.items())[::4]:
        leaf = tensor.leaves()[0]
        path = Path(leaf.file.path)
        data = bytearray(path.read_bytes())
        data[leaf.offset] ^= 1
        whole, _ = path.read_bytes(), path.write_bytes(data)
        codes = [lw.verify(folder, deep=True, part=f"{number}/{count}").exit_code for number in range(1, count + 1)]
        path.write_bytes(whole)
        if records in ("torch", "meta"):  # samples see the CRC-32 of a small tensor in every part
            assert 4 in codes, name
        else:
            assert sorted(codes) == [0] * (count - 1) + [4], name


def test_only_its_share_is_read(made: Path) -> None:
    small = sum(path.stat().st_size for path in made.iterdir() if path.suffix != ".safetensors" and path.name not in (MANIFEST, SUMS))
    headers = sum(min(t.offset for t in index_safetensors(path)[0].values()) for path in made.glob("*.safetensors"))
    for number in range(1, 6):
        found = lw.verify(made, deep=True, part=f"{number}/5")
        mine = found.facts["part"]["nbytes"]
        assert mine + small <= found.facts["read"] <= mine + small + headers


def test_more_parts_than_tensors(made: Path) -> None:
    found = [lw.verify(made, deep=True, part=f"{number}/97") for number in (1, 50, 97)]
    assert {each.exit_code for each in found} == {0}
    assert any(each.facts["part"]["nbytes"] == 0 for each in found)
    assert all("values of 0" not in headline(each) for each in found)


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/0", "1/3 ", "-1/3", "1/99999", 3, "\u0661/3"])
def test_what_is_no_part(made: Path, part: Any) -> None:
    with pytest.raises(UsageError, match="no part"):
        lw.verify(made, deep=True, part=part)


def test_a_part_of_what(made: Path, cli: Any) -> None:
    for options in ({}, {"deep": True, "against": made}, {"deep": True, "base": made}):
        with pytest.raises(UsageError, match="`--deep` reads"):
            lw.verify(made, part="1/2", **options)
    assert to_part("3/7") == (3, 7)
    code, out, _ = cli("verify", made, "--deep", "--part", "2/3")
    assert code == 0
    assert "part 2/3 alone was read" in out.splitlines()[0]
