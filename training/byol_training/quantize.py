"""A float32 ONNX encoder as int8: static quantisation (QDQ), calibrated on real images.

Weights are signed with a scale for each output channel, activations unsigned with a scale for each
tensor: what processors with VNNI multiply fastest (signed activations take three times as long).
The input's scaling and the final normalisation stay float32. How the range of a tensor is chosen
(`METHODS`) makes a difference from one network to the next, so each is tried and the cosine on
images that were not calibrated on decides.

The only module of training that imports ONNX Runtime: its quantiser is part of that package.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from byol_serving.bundle import cosine_distance
from byol_serving.images import Pixels

METHODS = {"minmax": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile}
"""Entropy was tried too: it never beat both of these, and takes twice as long."""
PERCENTILE = 99.99
CALIBRATION_IMAGES = 32
_HISTOGRAM_IMAGES = 16
"""For percentile, which keeps every activation in memory: 50 MB an image for ResNet-18 at 224."""
_BATCH = 8

_QUANTIZED = ["Add", "Conv", "Gemm", "MatMul", "MaxPool", "Relu"]
"""Not the operations of scaling and normalisation, whose small cost is not worth their error."""


@dataclass(frozen=True)
class Quantized:
    """The best of the methods."""

    model: bytes
    method: str


def quantize(model: bytes, samples: Pixels, wanted: NDArray[np.float32]) -> Quantized:
    """Quantises with each method, and keeps the one nearest to `wanted` on average.

    Args:
        model: a serialised float32 ONNX encoder.
        samples: real images, uint8 [N, S, S, 3]; of two neighbours the first calibrates and the
            second measures (a single one does both).
        wanted: float32 [N, D], the float32 encoder's embeddings of them.
    """
    calibration, measured = split(len(samples))
    candidates: list[tuple[float, Quantized]] = []
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        source, prepared = Path(scratch) / "source.onnx", Path(scratch) / "prepared.onnx"
        source.write_bytes(model)
        # Symbolic shape inference fails on graphs that expand a tensor, and is not needed.
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        for method in METHODS:
            quantized = _with_method(prepared, samples[calibration], method, Path(scratch))
            distance = cosine_distance(_embed(quantized, samples[measured]), wanted[measured])
            candidates.append((float(distance.mean()), Quantized(quantized, method)))
    return min(candidates, key=lambda each: each[0])[1]


def split(count: int) -> tuple[slice, slice]:
    """Which of `count` samples calibrate, and which are held out to measure."""
    return slice(0, None, 2), slice(1 if count > 1 else 0, None, 2)


def _with_method(prepared: Path, images: Pixels, method: str, scratch: Path) -> bytes:
    limit = CALIBRATION_IMAGES if method == "minmax" else _HISTOGRAM_IMAGES
    rows = np.linspace(0, len(images) - 1, min(limit, len(images))).astype(int)
    out = scratch / f"{method}.onnx"
    quantize_static(
        prepared,
        out,
        _Batches(images[rows]),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=_QUANTIZED,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=METHODS[method],
        extra_options={"CalibPercentile": PERCENTILE},
    )
    return out.read_bytes()


def _embed(model: bytes, pixels: Pixels) -> NDArray[np.float32]:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    rows = [
        session.run(["embedding"], {"images": pixels[at : at + _BATCH]})[0]
        for at in range(0, len(pixels), _BATCH)
    ]
    return np.concatenate(rows)


class _Batches(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime ships no types
    """Hands the images to the quantiser, a few at a time."""

    def __init__(self, images: Pixels) -> None:
        self._batches = (images[at : at + _BATCH] for at in range(0, len(images), _BATCH))

    def get_next(self) -> dict[str, Pixels] | None:
        """The graph's next input, or None."""
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser prints its progress, and warns through the root logger."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)
