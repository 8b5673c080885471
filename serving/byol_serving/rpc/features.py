"""Images to any outputs of the graph: dense feature maps, embeddings that are not normalised.

The pipeline's decoding and budget, and batches of their own. Maps are large: 64 images of a
ResNet-50's first stage are 200 MB. So they count in the budget like the images that wait, and an
answer that could not be sent is refused before any work.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from byol_serving.batcher import Batcher
from byol_serving.bundle import EMBEDDING, RAW_EMBEDDING, BundleInfo, FeatureMap
from byol_serving.config import ServeConfig
from byol_serving.errors import InvalidRequest
from byol_serving.images import Pixels
from byol_serving.rpc.pipeline import Pipeline
from byol_serving.timing import BatchRun

_AROUND_MAPS = 1024
"""Bytes of an answer that are not values."""

Extract = Callable[[Pixels, Sequence[str]], Sequence[NDArray[np.float32]]]
Maps = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class _Frame:
    pixels: Pixels
    outputs: frozenset[str]


class Features:
    """Feature maps of concurrent requests. Belongs to one event loop."""

    def __init__(
        self,
        extract: Extract,
        pipeline: Pipeline,
        info: BundleInfo,
        config: ServeConfig,
        *,
        watch: Callable[[str, BatchRun], None] | None = None,
    ) -> None:
        """`extract` is the encoder's; blocking, thread-safe."""
        self._extract = extract
        self._pipeline = pipeline
        self._info = info
        self._limit = config.max_message_bytes - _AROUND_MAPS
        self._batcher: Batcher[_Frame, list[Maps]] = Batcher(
            self._run,
            max_batch=config.max_batch,
            workers=config.inference_workers,
            name="features",
            watch=watch,
        )

    def stage(self, name: str) -> FeatureMap:
        """A stage's facts.

        Raises:
            InvalidRequest: the bundle does not offer it.
        """
        for each in self._info.features:
            if each.name == name:
                return each
        known = ", ".join(each.name for each in self._info.features)
        raise InvalidRequest(
            f"encoder {self._info.name!r} offers no stage {name!r}; "
            + (f"ask for: {known}" if known else "export it with byol export --features")
        )

    async def extract(
        self,
        images: Sequence[bytes] | Pixels,
        outputs: Sequence[str],
        *,
        itemsize: int = 4,
        deadline: float | None = None,
        wait: bool = False,
    ) -> Maps:
        """Runs images through the encoder as far as the outputs need.

        Args:
            images: files, or pixels uint8 [N, S, S, 3]; at least one.
            outputs: stages, `embedding` and `raw_embedding`, in any order.
            itemsize: bytes of a value in the answer.
            deadline: on time.monotonic()'s clock; see `Batcher.submit`.
            wait: for room in the budget, instead of Overloaded.

        Returns:
            Name → float32 [N, C, H, W] of a stage, or [N, D].

        Raises:
            InvalidRequest: no images, no or unknown outputs, or more than an answer can hold.
            FailedPrecondition: the bundle does not offer its embeddings un-normalised.
            InvalidImage: names the position of the first bad image.
            Overloaded, DeadlinePassed, Unavailable: nothing is wrong with the request.
        """
        values = self._values(outputs)
        answer = len(images) * values * itemsize
        if answer > self._limit:
            fit = self._limit // (values * itemsize)
            raise InvalidRequest(
                f"the outputs for {len(images)} images are {answer} bytes, over the limit of"
                f" {self._limit}; send up to {fit} images, or ask for fewer stages or float16"
            )
        size = len(images) * (values * 4 + self._info.preprocess.size**2 * 3)
        if not isinstance(images, np.ndarray):
            images = list(images)  # as in `Pipeline.embed_images`
            size += sum(map(len, images))
        room, count = self._pipeline.budget, len(images)
        with await room.wait_for(count, size) if wait else room.claim(count, size):
            pixels: Sequence[Pixels] | Pixels
            if isinstance(images, np.ndarray):
                pixels = images
            else:
                pixels = await self._pipeline.decode(images, deadline=deadline)
            wanted = frozenset(outputs)
            frames = [_Frame(each, wanted) for each in pixels]
            parts = await self._batcher.submit(frames, deadline=deadline)
            rows = [maps for part in parts for maps in part]
            return {name: np.stack([maps[name] for maps in rows]) for name in outputs}

    async def close(self) -> None:
        """Ends the threads, after the batches that are in them."""
        await self._batcher.close()

    def queued(self) -> int:
        """Images that wait."""
        return self._batcher.queued

    def _values(self, outputs: Sequence[str]) -> int:
        """How many numbers one image's outputs are."""
        if not outputs:
            raise InvalidRequest("the request names no stage; name at least one")
        if len(set(outputs)) != len(outputs):
            raise InvalidRequest(f"stages {', '.join(outputs)}: one is there twice; send it once")
        if RAW_EMBEDDING in outputs:
            self._info.check_raw()
        values = 0
        for name in outputs:
            if name in (EMBEDDING, RAW_EMBEDDING):
                values += self._info.dim
            else:
                stage = self.stage(name)
                values += stage.channels * stage.side**2
        return values

    def _run(self, frames: list[_Frame]) -> list[Maps]:
        """One run of the encoder for what any of the frames asks for; in an inference thread."""
        names = sorted(frozenset[str]().union(*(frame.outputs for frame in frames)))
        arrays = self._extract(np.stack([frame.pixels for frame in frames]), names)
        found = dict(zip(names, arrays, strict=True))
        return [
            {name: found[name][row] for name in frame.outputs} for row, frame in enumerate(frames)
        ]
