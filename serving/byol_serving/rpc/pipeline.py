"""Bytes to vectors: room in the budget, decode, inference. The serving path from top to bottom.

Each step is a `Batcher`, so that at any time the decoders work on the images of one moment while
the encoder works on those of the moment before.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from byol_serving.batcher import Batcher, Budget, Claim
from byol_serving.config import ServeConfig
from byol_serving.decoder import decode_all
from byol_serving.errors import InvalidImage, InvalidRequest
from byol_serving.images import Pixels, Preprocess
from byol_serving.timing import BatchRun

Embeddings = NDArray[np.float32]

_DECODE_CHUNK = 16
"""Images that one decode worker takes at a time; more only delays the other requests."""


class Pipeline:
    """Embeds the images of concurrent requests. Belongs to one event loop."""

    def __init__(
        self,
        embed: Callable[[Pixels], Embeddings],
        preprocess: Preprocess,
        config: ServeConfig,
        *,
        watch: Callable[[str, BatchRun], None] | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            embed: the encoder's: uint8 [N, S, S, 3] to float32 [N, D], blocking, thread-safe.
            preprocess: of the encoder's bundle.
            config: with `max_batch` and `inference_workers` as the encoder wants them, not 0.
            watch: told of each batch of each step.
        """
        self._embed = embed
        self._pixel_bytes = preprocess.size**2 * 3
        self._max_batch = config.max_batch
        self._decoding: Batcher[bytes, list[Pixels | InvalidImage]] = Batcher(
            partial(decode_all, how=preprocess, limits=config.limits),
            max_batch=_DECODE_CHUNK,
            workers=config.decode_workers,
            share=True,
            name="decode",
            watch=partial(watch, "decode") if watch else None,
        )
        self._inference: Batcher[Pixels, Embeddings] = Batcher(
            self._infer,
            max_batch=config.max_batch,
            workers=config.inference_workers,
            share=True,
            name="inference",
            watch=partial(watch, "inference") if watch else None,
        )
        self.budget = Budget(
            max_images=config.max_queued_images,
            max_bytes=config.max_queued_bytes,
            seconds_per_image=lambda: max(
                self._decoding.seconds_per_item / config.decode_workers,
                self._inference.seconds_per_item / config.inference_workers,
            ),
        )

    async def embed_images(
        self, images: Sequence[bytes], *, deadline: float | None = None, wait: bool = False
    ) -> Embeddings:
        """Embeds image files; float32 [N, D] in their order.

        Args:
            images: at least one.
            deadline: on time.monotonic()'s clock; see `Batcher.submit`.
            wait: for room in the budget, instead of Overloaded.

        Raises:
            InvalidRequest: no images, or more than could ever be queued.
            InvalidImage: names the position of the first bad image.
            Overloaded, DeadlinePassed, Unavailable: nothing is wrong with the images.
        """
        size = sum(map(len, images)) + len(images) * self._pixel_bytes
        with await self._claim(len(images), size, wait):
            step = self._max_batch
            if len(images) <= step:
                return await self._piece(images, 0, deadline)
            # In pieces, so that the first are in the encoder while the last are being decoded.
            pieces = await asyncio.gather(
                *(
                    self._piece(images[at : at + step], at, deadline)
                    for at in range(0, len(images), step)
                ),
                return_exceptions=True,
            )
        if errors := [piece for piece in pieces if isinstance(piece, BaseException)]:
            raise errors[0]
        return np.concatenate([piece for piece in pieces if isinstance(piece, np.ndarray)])

    async def embed_pixels(
        self, pixels: Pixels, *, deadline: float | None = None, wait: bool = False
    ) -> Embeddings:
        """Embeds uint8 [N, S, S, 3]; otherwise as `embed_images`."""
        with await self._claim(len(pixels), pixels.nbytes, wait):
            return _joined(await self._inference.submit(list(pixels), deadline=deadline))

    async def decode(
        self, images: Sequence[bytes], *, deadline: float | None = None, offset: int = 0
    ) -> list[Pixels]:
        """Decodes image files to uint8 [S, S, 3] each; within a claim.

        Args:
            images: at least one.
            deadline: on time.monotonic()'s clock; see `Batcher.submit`.
            offset: position of the first in its request, for the message of an error.

        Raises:
            InvalidImage: names the position of the first bad image.
            DeadlinePassed, Unavailable: nothing is wrong with the images.
        """
        frames: list[Pixels] = []
        for part in await self._decoding.submit(images, deadline=deadline):
            for decoded in part:
                if isinstance(decoded, InvalidImage):
                    raise decoded.at(offset + len(frames))
                frames.append(decoded)
        return frames

    def queued(self) -> dict[str, int]:
        """Images that wait for each step."""
        return {"decode": self._decoding.queued, "inference": self._inference.queued}

    async def close(self) -> None:
        """Ends the threads, after the batches that are in them."""
        await self._decoding.close()
        await self._inference.close()

    def claim(self, images: int, size: int) -> Claim:
        """Room in the budget.

        Raises:
            InvalidRequest: no images, or more than could ever be queued.
            Overloaded: no room now.
        """
        _check_any(images)
        return self.budget.claim(images, size)

    async def _claim(self, images: int, size: int, wait: bool) -> Claim:
        if not wait:
            return self.claim(images, size)
        _check_any(images)
        return await self.budget.wait_for(images, size)

    async def _piece(
        self, images: Sequence[bytes], offset: int, deadline: float | None
    ) -> Embeddings:
        frames = await self.decode(images, deadline=deadline, offset=offset)
        return _joined(await self._inference.submit(frames, deadline=deadline))

    def _infer(self, frames: list[Pixels]) -> Embeddings:
        """Runs in an inference thread."""
        return self._embed(frames[0][None] if len(frames) == 1 else np.stack(frames))


def _check_any(images: int) -> None:
    if not images:
        raise InvalidRequest("the request has no images; send at least one")


def _joined(parts: list[Embeddings]) -> Embeddings:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
