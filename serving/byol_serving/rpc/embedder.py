"""The Embedder service: images in, vectors out."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import numpy as np

from byol_serving.bundle import BundleInfo
from byol_serving.errors import FailedPrecondition, InvalidRequest
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.pb.byol.v1 import byol_pb2_grpc
from byol_serving.rpc.calls import deadline_of
from byol_serving.rpc.convert import embeddings_to_tensor, tensor_to_pixels
from byol_serving.rpc.pipeline import Pipeline
from byol_serving.rpc.pools import in_order

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_NO_ROWS = np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder that is ready to answer."""

    info: BundleInfo
    provider: str
    pipeline: Pipeline


def require(encoder: LoadedEncoder | None) -> LoadedEncoder:
    """The encoder, or FailedPrecondition where the server runs without one."""
    if encoder is None:
        raise FailedPrecondition("this server has no encoder; start it with --bundle")
    return encoder


class EmbedderService(byol_pb2_grpc.EmbedderServicer):
    """byol.v1.Embedder."""

    def __init__(self, encoder: LoadedEncoder | None, *, stream_window: int) -> None:
        """`encoder` may be absent: then every call is FAILED_PRECONDITION."""
        self._encoder = encoder
        self._window = stream_window

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        """One batch."""
        return await self._embed(request, deadline_of(context), wait=False)

    async def EmbedStream(
        self, requests: AsyncIterator[pb.EmbedRequest], context: Context
    ) -> AsyncIterator[pb.EmbedResponse]:
        """Many batches, answered in order."""
        deadline = deadline_of(context)
        answers = in_order(
            requests, lambda each: self._embed(each, deadline, wait=True), window=self._window
        )
        async with aclosing(answers):
            async for response in answers:
                yield response

    async def GetEncoder(self, request: pb.GetEncoderRequest, context: Context) -> pb.Encoder:
        """What is loaded."""
        encoder = require(self._encoder)
        info = encoder.info
        return pb.Encoder(
            encoder_id=info.encoder_id,
            name=info.name,
            image_size=info.preprocess.size,
            dim=info.dim,
            precision=info.precision,
            provider=encoder.provider,
        )

    async def _embed(
        self, request: pb.EmbedRequest, deadline: float | None, *, wait: bool
    ) -> pb.EmbedResponse:
        encoder = require(self._encoder)
        embeddings_to_tensor(_NO_ROWS, request.dtype)  # a wrong dtype is refused before any work
        if not request.HasField("pixels"):
            rows = await encoder.pipeline.embed_images(request.images, deadline=deadline, wait=wait)
        elif request.images:
            raise InvalidRequest("the request has both images and pixels; send one of them")
        else:
            pixels = tensor_to_pixels(request.pixels, encoder.info.preprocess.size)
            rows = await encoder.pipeline.embed_pixels(pixels, deadline=deadline, wait=wait)
        tensor = embeddings_to_tensor(rows, request.dtype)
        return pb.EmbedResponse(embeddings=tensor, encoder_id=encoder.info.encoder_id)
