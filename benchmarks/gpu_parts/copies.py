"""Copies of a batch to the device: what it wins that `PaddedBatches` gathers in pinned memory."""

import time
from collections.abc import Callable

import numpy as np
import onnxruntime as ort
from gpu_parts.rows import Asked, Row

from byol_serving.images import Pixels
from byol_serving.padded_batches import GPU_MAX_BATCH
from byol_serving.pinned_memory import pinned_zeros
from harness import interleaved


def to_device(asked: Asked) -> list[Row]:
    """A full batch of ResNet's pixels, from both kinds of memory in turn."""
    shape = (8 if asked.quick else GPU_MAX_BATCH, 224, 224, 3)
    device, rounds = ("cuda", 50) if asked.on_gpu else ("cpu", 1)
    kinds = {"ordinary": np.zeros(shape, np.uint8), "pinned": pinned_zeros(shape, 0)}
    rates = interleaved(
        {name: _copying(pixels, device, rounds) for name, pixels in kinds.items()},
        unit="GB/s",
        repeats=1 if asked.quick else 7,
    )
    gain = rates["pinned"].median / rates["ordinary"].median
    what = f"{shape[0]} images of 224 to the device, from"
    return [
        Row(what=f"{what} ordinary memory", value=rates["ordinary"].median, unit="GB/s"),
        Row(
            what=f"{what} pinned memory",
            value=rates["pinned"].median,
            unit="GB/s",
            note=f"{gain:.2f} times" if asked.on_gpu else "ordinary as well: pinning needs CUDA",
        ),
    ]


def _copying(pixels: Pixels, device: str, rounds: int) -> Callable[[], float]:
    there = ort.OrtValue.ortvalue_from_numpy(pixels, device)

    def rate() -> float:
        began = time.perf_counter()
        for _ in range(rounds):
            there.update_inplace(pixels)
        return rounds * pixels.nbytes / 1e9 / (time.perf_counter() - began)

    return rate
