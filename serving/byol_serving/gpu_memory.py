"""How much of the GPUs' memory is taken, as the driver sees it: by this process and by others."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuMemory:
    """One GPU's, in bytes."""

    gpu: int
    used: int
    total: int


def gpu_memory() -> Sequence[GpuMemory]:
    """One entry for each GPU; none without a driver, or without nvidia-ml-py (extra `gpu`)."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return ()
    try:
        pynvml.nvmlInit()  # counts its calls, and costs nothing after the first
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(gpu) for gpu in range(pynvml.nvmlDeviceGetCount())
        ]
        found = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
    except pynvml.NVMLError:  # no driver, or it is gone
        return ()
    return [GpuMemory(gpu, int(info.used), int(info.total)) for gpu, info in enumerate(found)]
