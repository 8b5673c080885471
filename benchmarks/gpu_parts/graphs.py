"""CUDA graphs: what it wins to record the launches of a batch, and to repeat them as one.

The server does not use them, because of two things in ONNX Runtime. A session with graphs must not
be run by several threads (its CUDA execution provider's documentation); and it records in CUDA's
global mode (`CUDAGraphManager::CaptureBegin`), in which calls such as an allocation fail in every
other thread of the process, which may be answering requests while a model is loaded. What graphs
win says whether to make room for them all the same.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import onnxruntime as ort
from gpu_parts.rows import Asked, Row, at_most
from load_material import photographs, pixels_of, untrained_resnet
from numpy.typing import NDArray

from byol_serving.bundle import Bundle, cosine_distance
from byol_serving.images import Pixels
from byol_training.export import Precision
from harness import interleaved

BATCHES = (1, 4, 16, 64)
WARM = 5
"""Runs before any counts: the first allocate, one records."""


class Bound:
    """A session with the buffers of one batch, each at an address of its own."""

    def __init__(self, asked: Asked, bundle: Bundle, batch: int, *, graphs: bool) -> None:
        provider, options = "CPUExecutionProvider", {}
        if asked.on_gpu:
            provider = "CUDAExecutionProvider"
            options = {"cudnn_conv_algo_search": "HEURISTIC", "enable_cuda_graph": str(int(graphs))}
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        self._session = ort.InferenceSession(
            bundle.model_path, settings, providers=[(provider, options)]
        )
        size, dim = bundle.info.preprocess.size, bundle.info.dim
        device = "cuda" if asked.on_gpu else "cpu"
        self._input, self._output = (
            ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, device)
            for shape, kind in (([batch, size, size, 3], np.uint8), ([batch, dim], np.float32))
        )
        self._io = self._session.io_binding()
        self._io.bind_ortvalue_input("images", self._input)
        self._io.bind_ortvalue_output("embedding", self._output)

    def embed(self, pixels: Pixels) -> NDArray[np.float32]:
        """Uint8 [batch, S, S, 3] to float32 [batch, D], copies to and from the device included."""
        self._input.update_inplace(pixels)
        self._session.run_with_iobinding(self._io)
        rows: NDArray[np.float32] = self._output.numpy()
        return rows.copy()


def resnet18(asked: Asked) -> list[Row]:
    """ResNet-18 at 224, with graphs and without, in turn."""
    photos = pixels_of(photographs(4), 224)
    precision: Precision = "fp16" if asked.on_gpu else "fp32"
    bundle = untrained_resnet(asked.scratch / "graphs", photos, precision)
    rows = []
    for batch in BATCHES[:2] if asked.quick else BATCHES:
        rows += _compared(asked, bundle, np.resize(photos, (batch, *photos.shape[1:])))
    return rows


def _compared(asked: Asked, bundle: Bundle, pixels: Pixels) -> list[Row]:
    batch, rounds = len(pixels), 1 if asked.quick else 50
    kinds = {
        name: Bound(asked, bundle, batch, graphs=graphs)
        for name, graphs in (("without", False), ("with", True))
    }
    for bound in kinds.values():
        for _ in range(WARM):
            bound.embed(pixels)
    wanted, found = (bound.embed(pixels) for bound in kinds.values())
    rates = interleaved(
        {
            name: _timing(partial(bound.embed, pixels), rounds, batch)
            for name, bound in kinds.items()
        },
        unit="images/s",
        repeats=1 if asked.quick else 7,
    )
    what = f"ResNet-18 at 224, batches of {batch}"
    distance = float(np.abs(cosine_distance(found, wanted)).max())
    gain = rates["with"].median / rates["without"].median
    return [
        at_most(f"{what}: cosine distance with CUDA graphs", distance, 1e-4),
        Row(what=f"{what}: without", value=rates["without"].median, unit="images/s"),
        Row(
            what=f"{what}: with CUDA graphs",
            value=rates["with"].median,
            unit="images/s",
            note=f"{gain:.2f} times that without",
        ),
    ]


def _timing(run: Callable[[], object], rounds: int, batch: int) -> Callable[[], float]:
    def rate() -> float:
        began = time.perf_counter()
        for _ in range(rounds):
            run()
        return rounds * batch / (time.perf_counter() - began)

    return rate
