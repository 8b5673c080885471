"""The Embedder service: images in, vectors out."""

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
import numpy as np

from byol_serving.bundle import EMBEDDING, RAW_EMBEDDING, FeatureMap
from byol_serving.errors import InvalidRequest
from byol_serving.images import Pixels
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.pb.byol.v1 import byol_pb2_grpc
from byol_serving.rpc.calls import deadline_of
from byol_serving.rpc.convert import (
    check_embedding_dtype,
    embeddings_to_tensor,
    pack_embeddings,
    tensor_to_pixels,
)
from byol_serving.rpc.models import Model, Models
from byol_serving.rpc.pools import in_order

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class EmbedderService(byol_pb2_grpc.EmbedderServicer):
    """byol.v1.Embedder."""

    def __init__(self, models: Models, *, stream_window: int) -> None:
        """Without a model every call is FAILED_PRECONDITION."""
        self._models = models
        self._window = stream_window

    def Embed(self, request: pb.EmbedRequest, context: Context) -> Awaitable[pb.EmbedResponse]:
        """One batch; `_embed`'s coroutine as it is, since one around it would cost every call."""
        return self._embed(request, deadline_of(context), wait=False)

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
            stages=map(_stage, info.features),
            unnormalized=info.raw_embedding,
        )

    async def ExtractFeatures(
        self, request: pb.ExtractFeaturesRequest, context: Context
    ) -> pb.ExtractFeaturesResponse:
        """Feature maps of several stages, and the embeddings if asked for."""
        if request.dtype not in (pb.DTYPE_UNSPECIFIED, pb.DTYPE_FLOAT32, pb.DTYPE_FLOAT16):
            raise InvalidRequest("feature maps are float32 or float16; ask for one of them")
        embedding = RAW_EMBEDDING if request.unnormalized else EMBEDDING
        outputs = [*request.stages, *([embedding] if request.with_embeddings else [])]
        with self._models.using(request.model, request.version) as model:
            stages = [model.features.stage(name) for name in request.stages]
            maps = await model.features.extract(
                _images(model, request),
                outputs,
                itemsize=2 if request.dtype == pb.DTYPE_FLOAT16 else 4,
                deadline=deadline_of(context),
            )
        response = pb.ExtractFeaturesResponse(
            maps=[
                pb.FeatureMap(
                    stage=_stage(each), values=embeddings_to_tensor(maps[each.name], request.dtype)
                )
                for each in stages
            ],
            encoder_id=model.info.encoder_id,
            image_size=model.info.preprocess.size,
        )
        if request.with_embeddings:
            pack_embeddings(response.embeddings, maps[embedding], request.dtype)
        return response

    async def _embed(
        self, request: pb.EmbedRequest, deadline: float | None, *, wait: bool
    ) -> pb.EmbedResponse:
        check_embedding_dtype(request.dtype)  # before any work
        if request.unnormalized and request.dtype == pb.DTYPE_INT8:
            raise InvalidRequest(
                "int8 holds values from -1 to 1, which un-normalised embeddings exceed;"
                " ask for float32 or float16"
            )
        with self._models.using(request.model, request.version) as model:
            images = _images(model, request)
            if request.unnormalized:
                found = await model.features.extract(
                    images, [RAW_EMBEDDING], deadline=deadline, wait=wait
                )
                rows = found[RAW_EMBEDDING]
            elif isinstance(images, np.ndarray):
                rows = await model.pipeline.embed_pixels(images, deadline=deadline, wait=wait)
            else:
                rows = await model.pipeline.embed_images(images, deadline=deadline, wait=wait)
        response = pb.EmbedResponse(encoder_id=model.info.encoder_id)
        pack_embeddings(response.embeddings, rows, request.dtype)
        return response


def _images(
    model: Model, request: pb.EmbedRequest | pb.ExtractFeaturesRequest
) -> Sequence[bytes] | Pixels:
    """The request's files, or its pixels uint8 [N, S, S, 3]."""
    if not request.HasField("pixels"):
        return request.images
    if request.images:
        raise InvalidRequest("the request has both images and pixels; send one of them")
    return tensor_to_pixels(request.pixels, model.info.preprocess.size)


def _stage(stage: FeatureMap) -> pb.Stage:
    return pb.Stage(name=stage.name, channels=stage.channels, side=stage.side, stride=stage.stride)
