"""What lay in the page cache before a run stays there, and what a run brought in goes."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from llava_weights.storage.reading import DropBehind, SourceFile, Workspace, drop_cache
from llava_weights.storage.residency import by_cachestat, by_mincore, resident_stretches

SIZE, STRETCH = 1 << 20, 1 << 18


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A file that is on the disk and not in the cache. Skips where the file system lives in the cache, as tmpfs."""
    path = tmp_path / "weights.raw"
    with open(path, "wb") as file:
        file.write(os.urandom(SIZE))
        file.flush()
        os.fsync(file.fileno())
        drop_cache(file.fileno())
    if cached(path):
        pytest.skip("this file system does not drop its cache")
    fill(path, 0, SIZE)
    if not cached(path):
        pytest.skip("the system does not tell what it caches")
    forget(path)
    return path


def cached(path: Path, stretch: int = STRETCH) -> frozenset[int]:
    with open(path, "rb") as file:
        return resident_stretches(file.fileno(), SIZE, stretch)


def forget(path: Path) -> None:
    with open(path, "rb") as file:
        drop_cache(file.fileno())


def fill(path: Path, start: int, stop: int) -> None:
    """Read bytes [start, stop) and nothing ahead of them."""
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), stop - start, start)


def read_all(path: Path) -> None:
    with closing(Workspace()) as work:
        file = SourceFile.at(path)
        for start in range(0, SIZE, STRETCH):
            work.read(file, start, memoryview(bytearray(STRETCH)))


def test_what_was_not_cached_is_dropped_again(stored: Path) -> None:
    read_all(stored)
    assert cached(stored) == set()


def test_what_was_cached_stays(stored: Path) -> None:
    fill(stored, 0, SIZE)
    read_all(stored)
    assert cached(stored) == {0, 1, 2, 3}


def test_a_file_of_which_the_cache_held_little_is_dropped(stored: Path) -> None:
    fill(stored, 0, SIZE // 4)
    read_all(stored)
    assert cached(stored) == set()


@pytest.mark.parametrize("ask", [by_cachestat, by_mincore])
def test_pages_of_each_stretch(stored: Path, ask: Callable[[int, int, int], list[int] | None]) -> None:
    fill(stored, STRETCH, 2 * STRETCH)
    with open(stored, "rb") as file:
        counts = ask(file.fileno(), SIZE - 1, STRETCH)
    if counts is None:
        pytest.skip("this kernel does not have the call")
    assert counts == [0, STRETCH // os.sysconf("SC_PAGESIZE"), 0, 0]


def test_only_the_first_opening_of_a_file_looks(stored: Path) -> None:
    """Of several workers the later ones would find what the first has read."""
    file, behind = SourceFile.at(stored), DropBehind()
    with open(stored, "rb") as opened:
        behind.opened(file, opened.fileno())
        fill(stored, 0, SIZE)
        behind.opened(file, opened.fileno())
        behind.passed(file, opened.fileno(), 0, SIZE, least=1)
    assert cached(stored) == set()


def test_an_empty_file_has_no_stretches(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with open(tmp_path / "empty", "rb") as file:
        assert resident_stretches(file.fileno(), 0, STRETCH) == set()


def test_a_system_that_drops_nothing_does_no_harm() -> None:
    drop_cache(-1)
    assert resident_stretches(-1, 0, STRETCH) == set()
