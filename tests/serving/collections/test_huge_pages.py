"""Huge pages: taken where there are any, and never a reason to fail."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from byol_serving.collections import huge_pages
from byol_serving.collections.huge_pages import prefer_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SIZE = 16 * 2**20


def _huge() -> int:
    """Bytes of this process on huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (line,) = (each for each in lines if each.startswith("AnonHugePages"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this system has no huge pages"
)
def test_memory_moves_to_huge_pages_and_keeps_what_it_holds() -> None:
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = np.frombuffer(memory, np.uint8)
    values[:] = np.arange(SIZE) % 251
    before = _huge()
    prefer_huge_pages(values.ctypes.data + 12_345, SIZE - 12_345)
    assert _huge() - before >= SIZE // 2
    np.testing.assert_array_equal(values, np.arange(SIZE) % 251)


@pytest.mark.parametrize("nbytes", [0, 1, 2**20])
def test_less_than_a_page_is_left_alone(nbytes: int) -> None:
    values = np.zeros(2**20, np.uint8)
    prefer_huge_pages(values.ctypes.data // 2**21 * 2**21 + 2**21, nbytes)
    assert not values.any()


def test_a_system_without_them_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_madvise", None)
    values = np.ones(SIZE, np.uint8)
    prefer_huge_pages(values.ctypes.data, values.nbytes)
    assert values.all()
