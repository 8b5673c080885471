"""Pinned memory: as far as a machine without a GPU can tell, and on one that has one."""

import ctypes
import gc
import logging
from collections.abc import Iterator

import numpy as np
import pytest

from byol_serving.pinned_memory import pinned_zeros

runtime = pytest.importorskip("cuda.bindings.runtime")
GOOD = runtime.cudaError_t.cudaSuccess


def test_without_a_gpu_it_is_ordinary_memory(caplog: pytest.LogCaptureFixture) -> None:
    if runtime.cudaGetDeviceCount()[0] == GOOD:
        pytest.skip("there is a GPU")
    found = pinned_zeros((2, 3, 4), 0)
    assert found.shape == (2, 3, 4)
    assert found.dtype == np.uint8
    assert not found.any()
    assert not caplog.records


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """CUDA's calls on ordinary memory that is full of ones; what was given back."""
    given: dict[int, ctypes.Array[ctypes.c_ubyte]] = {}
    freed: list[int] = []

    def allocate(size: int, flags: int) -> tuple[object, int]:
        assert flags == 1
        buffer = (ctypes.c_ubyte * size)(*[1] * size)
        given[ctypes.addressof(buffer)] = buffer
        return GOOD, ctypes.addressof(buffer)

    monkeypatch.setattr(runtime, "cudaSetDevice", lambda device: (GOOD,))
    monkeypatch.setattr(runtime, "cudaHostAlloc", allocate)
    monkeypatch.setattr(runtime, "cudaFreeHost", freed.append)
    yield freed
    assert freed == list(given)


def test_it_is_given_back_with_the_last_array_that_shares_it(freed: list[int]) -> None:
    whole = pinned_zeros((4, 5), 0)
    assert whole.flags.c_contiguous
    assert not whole.any()
    rows = whole[2:]
    rows[:] = 7
    assert whole.sum() == 70
    del whole
    gc.collect()
    assert freed == []
    assert rows.sum() == 70
    del rows
    gc.collect()
    assert len(freed) == 1


@pytest.mark.parametrize("call", ["cudaSetDevice", "cudaHostAlloc"])
def test_where_none_is_left_the_log_says_so(
    call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime, "cudaSetDevice", lambda device: (GOOD,))
    full = runtime.cudaError_t.cudaErrorMemoryAllocation
    monkeypatch.setattr(runtime, call, lambda *_: (full, None)[: 1 if call[4] == "S" else 2])
    with caplog.at_level(logging.WARNING):
        assert not pinned_zeros((3,), 1).any()
    assert caplog.messages == ["3 bytes are not pinned, GPU 1: cudaErrorMemoryAllocation"]


def test_a_real_gpu_knows_it_for_pinned() -> None:
    if runtime.cudaGetDeviceCount()[0] != GOOD:
        pytest.skip("no CUDA device here")
    found = pinned_zeros((1 << 20,), 0)
    error, attributes = runtime.cudaPointerGetAttributes(found.ctypes.data)
    assert error == GOOD
    assert attributes.type == runtime.cudaMemoryType.cudaMemoryTypeHost
