"""Batches padded to a few sizes, in buffers on a device that are allocated once.

Every new shape makes CUDA allocate and choose its algorithms again.
"""

from collections.abc import Callable, Mapping

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from byol_serving.batch_curve import sizes_up_to
from byol_serving.bundle import EMBEDDING
from byol_serving.cuda_threads import apart_from_recordings
from byol_serving.images import Pixels
from byol_serving.pinned_memory import pinned_zeros

Embeddings = NDArray[np.float32]
Embed = Callable[[Pixels], Embeddings]
"""Uint8 [N, S, S, 3] to float32 [N, D]."""

GPU_MAX_BATCH = 128
"""The largest padded size; larger arrays are embedded in pieces."""


class PaddedBatches:
    """Batches padded to powers of two. Not thread-safe, but not bound to a thread."""

    def __init__(
        self, session: ort.InferenceSession, size: int, dim: int, device: str, device_id: int = 0
    ) -> None:
        """`device` is ONNX Runtime's name of where the buffers lie: cuda, or cpu for a test."""
        self._session, self.image_size, self._dim = session, size, dim
        self._device, self._device_id = device, device_id
        self._by_size: dict[int, Embed] = {}

    @property
    def sizes(self) -> list[int]:
        """Padded sizes that were used."""
        return sorted(self._by_size)

    def embed(self, pixels: Pixels) -> Embeddings:
        """Embeds uint8 [N, S, S, 3], N from 1 to `GPU_MAX_BATCH`, as float32 [N, D]."""
        size = next(size for size in sizes_up_to(GPU_MAX_BATCH) if size >= len(pixels))
        embed = self._by_size.get(size)
        if embed is None:
            embed = self._by_size[size] = self.bound(self._session, size).embed
        return embed(pixels)

    def bound(
        self, session: ort.InferenceSession, size: int, options: ort.RunOptions | None = None
    ) -> "BoundBatch":
        """New buffers for batches of `size`, and a session of the same graph bound to them."""
        shape = (size, self.image_size, self.image_size, 3)
        return BoundBatch(session, shape, self._dim, self._device, self._device_id, options)

    def replace(self, by_size: Mapping[int, Embed]) -> None:
        """Has others embed the batches of these padded sizes."""
        self._by_size.update(by_size)


class BoundBatch:
    """The buffers of one padded size, bound to a session's input and output."""

    def __init__(
        self,
        session: ort.InferenceSession,
        shape: tuple[int, ...],
        dim: int,
        device: str,
        device_id: int,
        options: ort.RunOptions | None,
    ) -> None:
        apart_from_recordings()
        self._session, self._options = session, options
        on_gpu = device != "cpu"
        self._host = pinned_zeros(shape, device_id) if on_gpu else np.zeros(shape, np.uint8)
        self._input = ort.OrtValue.ortvalue_from_numpy(self._host, device, device_id)
        self._output = ort.OrtValue.ortvalue_from_shape_and_type(
            [shape[0], dim], np.float32, device, device_id
        )
        self._io = session.io_binding()
        self._io.bind_ortvalue_input("images", self._input)
        self._io.bind_ortvalue_output(EMBEDDING, self._output)

    def embed(self, pixels: Pixels) -> Embeddings:
        """Rows of `pixels` only; what the padding gives is thrown away."""
        apart_from_recordings()
        self._host[: len(pixels)] = pixels
        self._input.update_inplace(self._host)
        self._session.run_with_iobinding(self._io, self._options)
        rows: Embeddings = self._output.numpy()[: len(pixels)]
        return rows.copy()
