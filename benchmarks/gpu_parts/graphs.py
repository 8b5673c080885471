"""CUDA graphs (`byol serve --cuda-graphs`): what they win, and whether recording disturbs others.

An encoder that takes graphs keeps those of the padded sizes that were faster. Another one computes
and allocates beside it while it records, in which ONNX Runtime concerns all threads of a process
(byol_serving/cuda_threads.py): calls of either that fail are counted.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from gpu_parts.rows import Asked, Row, at_most
from load_material import photographs, pixels_of, untrained_resnet

from byol_serving.bundle import Bundle, cosine_distance
from byol_serving.encoder import Device, Encoder
from byol_serving.images import Pixels
from byol_training.export import Precision
from harness import interleaved

BATCHES = (1, 4, 16, 64)


def resnet18(asked: Asked) -> list[Row]:
    """ResNet-18 at 224, with graphs and without, in turn."""
    photos = pixels_of(photographs(4), 224)
    precision: Precision = "fp16" if asked.on_gpu else "fp32"
    bundle = untrained_resnet(asked.scratch / "graphs", photos, precision)
    batches = BATCHES[:2] if asked.quick else BATCHES
    device: Device = "cuda" if asked.on_gpu else "cpu"
    without = Encoder(bundle, device=device)
    without.warm_up(batches[-1])
    recording = Encoder(bundle, device=device, cuda_graphs=asked.on_gpu)
    failures: list[Exception] = []
    with _computing_beside(bundle, device, photos, failures):
        recording.warm_up(batches[-1])
    rows = [
        at_most("calls that failed beside recordings", len(failures), 0, note=_first(failures)),
        Row(
            what="padded sizes that are faster as CUDA graphs",
            value=len(recording.graph_sizes),
            note=str(recording.graph_sizes),
        ),
    ]
    for batch in batches:
        pixels = np.resize(photos, (batch, *photos.shape[1:]))
        rows += _compared(asked, without, recording, pixels)
    return rows


@contextmanager
def _computing_beside(
    bundle: Bundle, device: Device, photos: Pixels, failures: list[Exception]
) -> Iterator[None]:
    """Loads encoders and embeds, in another thread."""
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            try:
                Encoder(bundle, device=device).embed(photos)
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _first(failures: list[Exception]) -> str:
    return " ".join(str(failures[0]).split())[:100] if failures else ""


def _compared(asked: Asked, without: Encoder, recording: Encoder, pixels: Pixels) -> list[Row]:
    batch, rounds = len(pixels), 1 if asked.quick else 50
    distance = np.abs(cosine_distance(recording.embed(pixels), without.embed(pixels))).max()
    rates = interleaved(
        {
            "without": _timing(without, pixels, rounds),
            "with": _timing(recording, pixels, rounds),
        },
        unit="images/s",
        repeats=1 if asked.quick else 7,
    )
    what = f"ResNet-18 at 224, batches of {batch}"
    gain = rates["with"].median / rates["without"].median
    return [
        at_most(f"{what}: cosine distance with CUDA graphs", float(distance), 1e-4),
        Row(what=f"{what}: without", value=rates["without"].median, unit="images/s"),
        Row(
            what=f"{what}: with CUDA graphs",
            value=rates["with"].median,
            unit="images/s",
            note=f"{gain:.2f} times" if asked.on_gpu else "without as well: graphs need CUDA",
        ),
    ]


def _timing(encoder: Encoder, pixels: Pixels, rounds: int) -> Callable[[], float]:
    def rate() -> float:
        began = time.perf_counter()
        for _ in range(rounds):
            encoder.embed(pixels)
        return rounds * len(pixels) / (time.perf_counter() - began)

    return rate
