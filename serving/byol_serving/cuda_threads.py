"""Threads that use CUDA while another one records a CUDA graph.

ONNX Runtime records in CUDA's global capture mode. While it does, calls that a recording would
miss, such as to allocate memory, fail in every thread of the process, and spoil the recording. A
thread that has taken the thread-local mode is left out of that (CUDA Runtime API,
`cudaThreadExchangeStreamCaptureMode`).
"""

import threading

_thread = threading.local()


def apart_from_recordings() -> bool:
    """Lets the calling thread use CUDA while others record; called before any use of CUDA.

    Costs something in a thread's first call only.

    Returns:
        Whether it is so: False without a GPU, or without cuda-bindings (extra `gpu`).
    """
    apart: bool | None = getattr(_thread, "apart", None)
    if apart is None:
        apart = _thread.apart = _take_thread_local_mode()
    return apart


def _take_thread_local_mode() -> bool:
    try:
        from cuda.bindings import runtime
    except ImportError:
        return False
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    error, _ = runtime.cudaThreadExchangeStreamCaptureMode(mode)
    return bool(error == runtime.cudaError_t.cudaSuccess)
