"""Page-locked ("pinned") memory, which a GPU reads by itself.

From any other memory CUDA copies a batch into a pinned buffer of its own first (CUDA C++ Best
Practices Guide, "Pinned Memory"). CUDA recognises the memory by its address, so that ONNX Runtime
need not know of it.
"""

import ctypes
import logging
import math
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

_PORTABLE = 1
"""cudaHostAllocPortable: pinned for all GPUs and threads of the process."""


def pinned_zeros(shape: tuple[int, ...], device_id: int) -> NDArray[np.uint8]:
    """Zeros, uint8 of `shape`; freed with the last array that shares them.

    Ordinary memory, which is slower and no less right, where there is no pinned memory left, no
    GPU, or no cuda-bindings (extra `gpu`); only the first is worth a line in the log.
    """
    try:
        from cuda.bindings import runtime
    except ImportError:
        return np.zeros(shape, np.uint8)
    size = math.prod(shape)
    error, address = _allocate(runtime, size, device_id)
    if address is None:
        missing = (
            runtime.cudaError_t.cudaErrorInsufficientDriver,
            runtime.cudaError_t.cudaErrorNoDevice,
        )
        if error not in missing:
            log.warning("%d bytes are not pinned, GPU %d: %s", size, device_id, error.name)
        return np.zeros(shape, np.uint8)
    buffer = (ctypes.c_ubyte * size).from_address(address)
    # Not when the process ends, while threads may still work on it.
    weakref.finalize(buffer, runtime.cudaFreeHost, address).atexit = False
    array: NDArray[np.uint8] = np.frombuffer(memoryview(buffer), np.uint8).reshape(shape)
    array.fill(0)
    return array


def _allocate(runtime: Any, size: int, device_id: int) -> tuple[Any, int | None]:
    """CUDA's answer, and the address; None: it has none to give."""
    (error,) = runtime.cudaSetDevice(device_id)
    if error == runtime.cudaError_t.cudaSuccess:
        error, address = runtime.cudaHostAlloc(size, _PORTABLE)
        if error == runtime.cudaError_t.cudaSuccess:
            return error, address
    return error, None
