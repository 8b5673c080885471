"""CUDA graphs: the launches of a batch recorded once, and repeated as one.

What ONNX Runtime asks for (its CUDA execution provider's documentation, "CUDA Graphs"): buffers
that stay where they are, a number for each shape, and that a session is run by one thread, with
which it keeps what that thread recorded. So a worker's graphs have a session and a thread of their
own, to which its batches are handed. ONNX Runtime records in the first run of a number; then no
other session may record, and all threads that use CUDA must be `apart_from_recordings`.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import onnxruntime as ort

from byol_serving.batch_curve import fastest
from byol_serving.bundle import cosine_distance
from byol_serving.images import Pixels
from byol_serving.padded_batches import Embed, Embeddings, PaddedBatches

log = logging.getLogger(__name__)

_one_records = threading.Lock()


def record(
    padded: PaddedBatches,
    open_session: Callable[[], ort.InferenceSession],
    tolerance: float,
) -> list[int]:
    """Has `padded` repeat recordings of the sizes that are faster so.

    Args:
        padded: has embedded a batch of each size that matters; nobody else uses it now.
        open_session: opens one of the same graph that records (`enable_cuda_graph`).
        tolerance: largest cosine distance of a recording's embeddings to those of `padded`.

    Returns:
        The sizes. None, and a warning, where ONNX Runtime cannot record the graph or what it
        recorded is wrong.
    """
    thread = ThreadPoolExecutor(1, "cuda-graphs")
    noise, side = np.random.default_rng(0), padded.image_size
    faster: dict[int, Embed] = {}
    try:
        session = open_session()
        for size in padded.sizes:
            pixels = noise.integers(0, 256, (size, side, side, 3), np.uint8)
            repeat = _recorded(padded, session, thread, np.zeros_like(pixels))
            distance = float(cosine_distance(repeat(pixels), padded.embed(pixels)).max())
            if not distance <= tolerance:  # NaN is wrong too
                raise RuntimeError(f"a batch of {size} differs, cosine distance {distance:.1e}")
            if fastest(partial(repeat, pixels)) < fastest(partial(padded.embed, pixels)):
                faster[size] = repeat
    except Exception as error:  # whatever it is: batches are launched as before
        reason = " ".join(str(error).split())[:200]
        log.warning("CUDA graphs cannot be used for this encoder: %s", reason)
        return []
    padded.replace(faster)
    return list(faster)


def _recorded(
    padded: PaddedBatches,
    session: ort.InferenceSession,
    thread: ThreadPoolExecutor,
    pixels: Pixels,
) -> Embed:
    """Records a batch of these pixels; returns what repeats it with others."""
    size = len(pixels)
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(size))
    bound = padded.bound(session, size, options)

    def repeat(pixels: Pixels) -> Embeddings:
        return thread.submit(bound.embed, pixels).result()

    with _one_records:
        repeat(pixels)
    return repeat
