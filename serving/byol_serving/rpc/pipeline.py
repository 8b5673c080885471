"""Bytes to vectors: room in the budget, decode, inference. The serving path from top to bottom.

Each step is a `Batcher`, so that at any time the decoders work on the images of one moment while
the encoder works on those of the moment before. Where the encoder is so quick that handing pixels
to another thread would cost more than the inference does, one batcher does both; and thumbnails,
which cost even less, stay on the event loop. So do photographs in a process that has one core.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from byol_serving.batcher import Batcher
from byol_serving.budget import Budget
from byol_serving.config import ServeConfig
from byol_serving.decoder import decode_all
from byol_serving.errors import InvalidImage
from byol_serving.gatherer import Gatherer
from byol_serving.images import Pixels, Preprocess
from byol_serving.jpeg_header import Jpeg, plain_jpeg
from byol_serving.own_cores import cores_for
from byol_serving.timing import BatchRun, note

Embeddings = NDArray[np.float32]
Row = NDArray[np.float32]
"""One embedding, [D]."""
_Answers = Embeddings | list[Row | InvalidImage]
"""A list where an image is bad."""
Value = TypeVar("Value", bound=np.generic)

_DECODE_CHUNK = 64
"""Images that one decode worker takes at a time, of thumbnails that come many in a request."""

_DECODE_TURN_S = 0.008
"""And as many as take so long: four VGA photographs. With 16, p99 was 1.7 times p50, not 1.2."""
_THUMBNAIL_S = 0.0003
"""CPU time of an image that is not worth a second decoding thread: a VGA photograph takes 2 ms."""


@dataclass(frozen=True, kw_only=True)
class _OnLoop:
    """Images that the event loop decodes itself: plain JPEGs that are no larger than this."""

    side: int
    """Pixels of an image, and of the encoder's input, are no more than this squared."""
    max_bytes: int
    max_batch: int
    """Images in a batch."""
    turn_s: float
    """That a batch should keep the loop from its other work at most."""

    def headers(self, images: Sequence[bytes]) -> "list[_WithHeader] | None":
        """The images with their headers; None if one of them is not such an image."""
        found = []
        for data in images:
            header = plain_jpeg(data) if len(data) <= self.max_bytes else None
            if header is None or header.many_scans:
                return None
            if header.width * header.height > self.side**2:
                return None
            found.append((data, header))
        return found


_WithHeader = tuple[bytes, Jpeg]
_THUMBNAILS = _OnLoop(side=96, max_bytes=32 * 2**10, max_batch=64, turn_s=0.002)
"""They take 20 to 100 µs."""
_AT_ONCE = 4
"""Thumbnails of one request; more would keep the event loop from its other work."""
_PHOTOGRAPHS = _OnLoop(side=1024, max_bytes=2**20, max_batch=16, turn_s=0.02)
"""They take 1 to 6 ms: only where a thread for them would have to share the loop's core."""


class Pipeline:
    """Embeds the images of concurrent requests. Belongs to one event loop."""

    def __init__(
        self,
        embed: Callable[[Pixels], Embeddings],
        preprocess: Preprocess,
        config: ServeConfig,
        *,
        enough: int = 0,
        together: bool = False,
        watch: Callable[[str, BatchRun], None] | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            embed: the encoder's: uint8 [N, S, S, 3] to float32 [N, D], blocking, thread-safe.
            preprocess: of the encoder's bundle.
            config: with `max_batch` and both numbers of workers as they are to be, not 0.
            enough: images that one inference should have before there is another, if they wait;
                0: as many as it may have.
            together: let the decoding threads do the inference of their images too.
            watch: told of each batch of each step.
        """
        self._embed = embed
        self._watch = watch
        self._small_input = preprocess.size <= _THUMBNAILS.side
        self._pixel_bytes = preprocess.size**2 * 3
        self._max_batch = config.max_batch
        self._decode_all = partial(decode_all, how=preprocess, limits=config.limits)
        decoder = partial(
            Batcher[bytes, Any],
            self._decode_all,
            workers=config.decode_workers,
            share=True,
            enough=1,
            turn_s=_DECODE_TURN_S,
            one_below_s=_THUMBNAIL_S,
            name="decode",
            watch=watch,
        )
        self._decoding: Batcher[bytes, list[Pixels | InvalidImage]] = decoder(
            max_batch=_DECODE_CHUNK
        )
        self._inference: Batcher[Pixels, Embeddings] = Batcher(
            self._infer,
            max_batch=config.max_batch,
            workers=config.inference_workers,
            share=True,
            enough=enough,
            name="inference",
            watch=watch,
        )
        self._both: Batcher[bytes, _Answers] | None = None
        self._thumbnails: Gatherer[_WithHeader, _Answers] | None = None
        self._photographs: Gatherer[_WithHeader, _Answers] | None = None
        if together:
            most = enough or config.max_batch
            self._thumbnails = self._gatherer(_THUMBNAILS, most)
            if config.decode_workers == 1 and preprocess.size <= _PHOTOGRAPHS.side:
                self._photographs = self._gatherer(_PHOTOGRAPHS, most)
            self._both = decoder(
                then={"inference": self._infer_good},
                max_batch=min(_DECODE_CHUNK, config.max_batch),
                cores=cores_for(config.decode_workers),
            )
        self.budget = Budget(
            max_images=config.max_queued_images,
            max_bytes=config.max_queued_bytes,
            seconds_per_image=partial(self._seconds_per_image, config),
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
        images = list(images)  # a message copies a file each time that it is asked for it
        count = len(images)
        size = sum(map(len, images)) + count * self._pixel_bytes
        room = self.budget
        with await room.wait_for(count, size) if wait else room.claim(count, size):
            few = self._small_input and count <= _AT_ONCE
            if few and (thumbnails := _THUMBNAILS.headers(images)):
                if self._thumbnails is None:
                    return await self._at_once(thumbnails, deadline)
                return _rows(await self._thumbnails.submit(thumbnails, deadline=deadline))
            if self._photographs is not None and (plain := _PHOTOGRAPHS.headers(images)):
                return await self._in_turns(self._photographs, plain, deadline)
            if self._both is not None:
                rows = _good(await self._both.submit(images, deadline=deadline))
                return rows[0][None] if len(rows) == 1 else np.stack(rows)
            step = self._max_batch
            if count <= step:
                return await self._piece(images, 0, deadline)
            # In pieces, so that the first are in the encoder while the last are being decoded.
            pieces = await asyncio.gather(
                *(
                    self._piece(images[at : at + step], at, deadline)
                    for at in range(0, count, step)
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
        room, count, size = self.budget, len(pixels), pixels.nbytes
        with await room.wait_for(count, size) if wait else room.claim(count, size):
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
        return _good(await self._decoding.submit(images, deadline=deadline), offset)

    def queued(self) -> dict[str, int]:
        """Images that wait for each step."""
        both = 0 if self._both is None else self._both.queued
        gathered = sum(gatherer.queued for gatherer in self._gatherers())
        return {
            "decode": self._decoding.queued + both + gathered,
            "inference": self._inference.queued,
        }

    async def close(self) -> None:
        """Ends the threads, after the batches that are in them."""
        for gatherer in self._gatherers():
            gatherer.close()
        for batcher in (self._both, self._decoding, self._inference):
            if batcher is not None:
                await batcher.close()

    def _seconds_per_image(self, config: ServeConfig) -> float:
        """The present pace, of the slowest step."""
        return max(
            (self._both or self._decoding).seconds_per_item / config.decode_workers,
            self._inference.seconds_per_item / config.inference_workers,
            *(gatherer.seconds_per_item for gatherer in self._gatherers()),
        )

    def _gatherers(self) -> list[Gatherer[_WithHeader, _Answers]]:
        return [each for each in (self._thumbnails, self._photographs) if each is not None]

    def _gatherer(self, these: _OnLoop, most: int) -> Gatherer[_WithHeader, _Answers]:
        """For batches of no more than `most` of these images."""
        return Gatherer(
            self._decode_plain,
            then={"inference": self._infer_good},
            max_batch=min(these.max_batch, most),
            turn_s=these.turn_s,
            name="decode",
            watch=self._watch,
        )

    async def _in_turns(
        self,
        gatherer: Gatherer[_WithHeader, _Answers],
        photographs: list[_WithHeader],
        deadline: float | None,
    ) -> Embeddings:
        """Of many, one batch after the other, so that others have their turns in between."""
        step = _PHOTOGRAPHS.max_batch
        return _joined(
            [
                _rows(await gatherer.submit(photographs[at : at + step], deadline=deadline), at)
                for at in range(0, len(photographs), step)
            ]
        )

    async def _at_once(self, thumbnails: list[_WithHeader], deadline: float | None) -> Embeddings:
        """For encoders that take longer than handing pixels to their threads does."""
        began = time.perf_counter()
        frames = _good([self._decode_plain(thumbnails)])
        ended = time.perf_counter()
        note("decode", len(frames), began, began, ended)
        if self._watch is not None:
            self._watch("decode", BatchRun(len(frames), ended - began, [0.0]))
        return _joined(await self._inference.submit(frames, deadline=deadline))

    async def _piece(
        self, images: Sequence[bytes], offset: int, deadline: float | None
    ) -> Embeddings:
        frames = await self.decode(images, deadline=deadline, offset=offset)
        return _joined(await self._inference.submit(frames, deadline=deadline))

    def _decode_plain(self, items: list[_WithHeader]) -> "list[Pixels | InvalidImage]":
        images, headers = zip(*items, strict=True)
        return self._decode_all(images, headers=headers)

    def _infer(self, frames: list[Pixels]) -> Embeddings:
        """Runs in an inference thread."""
        return self._embed(frames[0][None] if len(frames) == 1 else np.array(frames))

    def _infer_good(self, frames: list[Pixels | InvalidImage]) -> _Answers:
        """The embeddings of what could be decoded, in the places of their images."""
        good = [frame for frame in frames if not isinstance(frame, InvalidImage)]
        if len(good) == len(frames):
            return self._infer(good)
        rows = iter(self._infer(good) if good else ())
        return [frame if isinstance(frame, InvalidImage) else next(rows) for frame in frames]


def _good(
    parts: Iterable[Iterable[NDArray[Value] | InvalidImage]], offset: int = 0
) -> list[NDArray[Value]]:
    """All results in one list; the first that is an error is raised, with its position."""
    found: list[NDArray[Value]] = []
    for part in parts:
        for each in part:
            if isinstance(each, InvalidImage):
                raise each.at(offset + len(found))
            found.append(each)
    return found


def _rows(found: _Answers, offset: int = 0) -> Embeddings:
    """What a gatherer answered as an array; raises as `_good`."""
    return found if isinstance(found, np.ndarray) else np.stack(_good([found], offset))


def _joined(parts: list[Embeddings]) -> Embeddings:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
