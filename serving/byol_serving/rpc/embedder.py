"""The Embedder service: images in, vectors out."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
import numpy as np

from byol_serving.errors import InvalidRequest
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.pb.byol.v1 import byol_pb2_grpc
from byol_serving.rpc.calls import deadline_of
from byol_serving.rpc.convert import embeddings_to_tensor, tensor_to_pixels
from byol_serving.rpc.models import Model, Models
from byol_serving.rpc.pipeline import Embeddings
from byol_serving.rpc.pools import in_order

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_NO_ROWS = np.empty((0, 0), np.float32)


class EmbedderService(byol_pb2_grpc.EmbedderServicer):
    """byol.v1.Embedder."""

    def __init__(self, models: Models, *, stream_window: int) -> None:
        """Without a model every call is FAILED_PRECONDITION."""
        self._models = models
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
        model = self._models.find(request.model, request.version)
        info = model.info
        return pb.Encoder(
            encoder_id=info.encoder_id,
            name=info.name,
            image_size=info.preprocess.size,
            dim=info.dim,
            precision=info.precision,
            provider=model.provider,
            model=model.name,
            version=model.version,
        )

    async def _embed(
        self, request: pb.EmbedRequest, deadline: float | None, *, wait: bool
    ) -> pb.EmbedResponse:
        embeddings_to_tensor(_NO_ROWS, request.dtype)  # a wrong dtype is refused before any work
        with self._models.using(request.model, request.version) as model:
            rows = await _rows(model, request, deadline, wait=wait)
        tensor = embeddings_to_tensor(rows, request.dtype)
        return pb.EmbedResponse(embeddings=tensor, encoder_id=model.info.encoder_id)


async def _rows(
    model: Model, request: pb.EmbedRequest, deadline: float | None, *, wait: bool
) -> Embeddings:
    if not request.HasField("pixels"):
        return await model.pipeline.embed_images(request.images, deadline=deadline, wait=wait)
    if request.images:
        raise InvalidRequest("the request has both images and pixels; send one of them")
    pixels = tensor_to_pixels(request.pixels, model.info.preprocess.size)
    return await model.pipeline.embed_pixels(pixels, deadline=deadline, wait=wait)
