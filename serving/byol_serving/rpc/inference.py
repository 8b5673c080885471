"""The Open Inference Protocol v2: the same models, for clients that speak Triton's and KServe's.

A model has two inputs, of which a request sends one: `images`, BYTES [N], encoded files; or
`pixels`, UINT8 [N, S, S, 3], RGB of the encoder's input size. Its output is `embedding`, FP32
[N, D].
"""

import time
from importlib.metadata import version as installed_version
from typing import Any, TypeAlias

import grpc

from byol_serving.errors import InvalidRequest, NotFound
from byol_serving.pb.inference import grpc_service_pb2 as pb
from byol_serving.pb.inference import grpc_service_pb2_grpc
from byol_serving.rpc.calls import deadline_of
from byol_serving.rpc.inference_tensors import fill_output, read_images, read_pixels
from byol_serving.rpc.models import Model, Models
from byol_serving.rpc.pipeline import Embeddings

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

PLATFORM = "onnxruntime_onnx"
IMAGES, PIXELS, EMBEDDING = "images", "pixels", "embedding"


class InferenceService(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
    """inference.GRPCInferenceService."""

    def __init__(self, models: Models) -> None:
        """Answers for all of them."""
        self._models = models

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        """It is, if it answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        """Whether a model is loaded; a server that drains does not answer at all."""
        return pb.ServerReadyResponse(ready=bool(self._models.all()))

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        """Whether the model, or this version of it, is loaded."""
        try:
            self._models.find(_named(request.name), request.version)
        except NotFound:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Name and version of this software; it has none of the protocol's extensions."""
        return pb.ServerMetadataResponse(
            name="byol-server", version=installed_version("byol-server")
        )

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """Inputs and outputs of a model."""
        model = self._models.find(_named(request.name), request.version)
        size = model.info.preprocess.size
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=model.name,
            versions=[each.version for each in self._models.all() if each.name == model.name],
            platform=PLATFORM,
            inputs=[
                tensor(name=IMAGES, datatype="BYTES", shape=[-1]),
                tensor(name=PIXELS, datatype="UINT8", shape=[-1, size, size, 3]),
            ],
            outputs=[tensor(name=EMBEDDING, datatype="FP32", shape=[-1, model.info.dim])],
        )

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        """Embeds a batch. Answers in raw contents where the request used them, else in typed ones.

        The parameter `timeout` (int64, microseconds) shortens the call's deadline.
        """
        with self._models.using(_named(request.model_name), request.model_version) as model:
            for output in request.outputs:
                if output.name != EMBEDDING:
                    raise InvalidRequest(
                        f"model {model.name!r} has no output {output.name!r}; ask for {EMBEDDING}"
                    )
            rows = await _embed(model, request, _deadline(request, context))
        response = pb.ModelInferResponse(
            model_name=model.name, model_version=model.version, id=request.id
        )
        fill_output(response, EMBEDDING, rows, raw=bool(request.raw_input_contents))
        return response


async def _embed(model: Model, request: pb.ModelInferRequest, deadline: float | None) -> Embeddings:
    if len(request.inputs) != 1:
        raise InvalidRequest(
            f"the request has {len(request.inputs)} inputs; send one, {IMAGES} or {PIXELS}"
        )
    match request.inputs[0].name:
        case "images":
            images = read_images(request)
            return await model.pipeline.embed_images(images, deadline=deadline)
        case "pixels":
            pixels = read_pixels(request, model.info.preprocess.size)
            return await model.pipeline.embed_pixels(pixels, deadline=deadline)
        case other:
            raise InvalidRequest(
                f"model {model.name!r} has no input {other!r}; send {IMAGES} or {PIXELS}"
            )


def _named(name: str) -> str:
    """The protocol always names the model; an empty name must not mean the default one."""
    if not name:
        raise InvalidRequest("the request names no model; set its name")
    return name


def _deadline(request: pb.ModelInferRequest, context: Context) -> float | None:
    """The call's deadline, or the request's own where that is sooner."""
    deadline = deadline_of(context)
    own = request.parameters.get("timeout")
    if own is None or own.int64_param <= 0:
        return deadline
    until = time.monotonic() + own.int64_param / 1e6
    return until if deadline is None else min(until, deadline)
