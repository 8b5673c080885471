"""The Open Inference Protocol v2: the same models, for clients that speak Triton's and KServe's.

A model has two inputs, of which a request sends one: `images`, BYTES [N], encoded files; or
`pixels`, UINT8 [N, S, S, 3], RGB of the encoder's input size. Its outputs are `embedding`, FP32
[N, D], and, as its bundle offers them, `raw_embedding`, FP32 [N, D], which is that before its
normalisation, and feature maps, FP32 [N, C, H, W].
"""

import time
from collections.abc import Sequence
from importlib.metadata import version as installed_version
from typing import Any, TypeAlias

import grpc
import numpy as np

from byol_serving.bundle import EMBEDDING, RAW_EMBEDDING, BundleInfo
from byol_serving.errors import InvalidRequest, NotFound
from byol_serving.images import Pixels
from byol_serving.pb.inference import grpc_service_pb2 as pb
from byol_serving.pb.inference import grpc_service_pb2_grpc
from byol_serving.rpc.calls import deadline_of
from byol_serving.rpc.features import Maps
from byol_serving.rpc.inference_tensors import fill_output, read_images, read_pixels
from byol_serving.rpc.models import Model, Models

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

PLATFORM = "onnxruntime_onnx"
IMAGES, PIXELS = "images", "pixels"
_TYPES = {"BYTES": pb.TYPE_STRING, "FP32": pb.TYPE_FP32, "UINT8": pb.TYPE_UINT8}


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
        """Name, version and extensions of this software."""
        return pb.ServerMetadataResponse(
            name="byol-server",
            version=installed_version("byol-server"),
            extensions=["model_configuration"],
        )

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """Inputs and outputs of a model."""
        model = self._models.find(_named(request.name), request.version)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=model.name,
            versions=[each.version for each in self._models.all() if each.name == model.name],
            platform=PLATFORM,
            inputs=[
                tensor(name=name, datatype=kind, shape=sides)
                for name, (kind, sides) in _inputs(model.info).items()
            ],
            outputs=[
                tensor(name=name, datatype="FP32", shape=sides)
                for name, sides in _outputs(model.info).items()
            ],
        )

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        """The same as Triton's configuration files have it."""
        model = self._models.find(_named(request.name), request.version)
        return pb.ModelConfigResponse(
            config=pb.ModelConfig(
                name=model.name,
                platform=PLATFORM,
                input=[
                    pb.ModelInput(name=name, data_type=_TYPES[kind], dims=sides, optional=True)
                    for name, (kind, sides) in _inputs(model.info).items()
                ],
                output=[
                    pb.ModelOutput(name=name, data_type=_TYPES["FP32"], dims=sides)
                    for name, sides in _outputs(model.info).items()
                ],
            )
        )

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        """Embeds a batch, or gives its feature maps. Raw contents are answered in raw contents.

        Outputs are those asked for, by default the embedding. The parameter `timeout` (int64,
        microseconds) shortens the call's deadline.
        """
        outputs = [each.name for each in request.outputs] or [EMBEDDING]
        with self._models.using(_named(request.model_name), request.model_version) as model:
            found = await _infer(model, request, outputs, _deadline(request, context))
        response = pb.ModelInferResponse(
            model_name=model.name, model_version=model.version, id=request.id
        )
        for name in outputs:
            fill_output(response, name, found[name], raw=bool(request.raw_input_contents))
        return response


def _inputs(info: BundleInfo) -> dict[str, tuple[str, list[int]]]:
    """Datatype and shape by name."""
    size = info.preprocess.size
    return {IMAGES: ("BYTES", [-1]), PIXELS: ("UINT8", [-1, size, size, 3])}


def _outputs(info: BundleInfo) -> dict[str, list[int]]:
    """Shape by name; all are FP32."""
    vectors = [EMBEDDING, *([RAW_EMBEDDING] if info.raw_embedding else [])]
    maps = {each.name: [-1, each.channels, each.side, each.side] for each in info.features}
    return {**{name: [-1, info.dim] for name in vectors}, **maps}


async def _infer(
    model: Model, request: pb.ModelInferRequest, outputs: list[str], deadline: float | None
) -> Maps:
    images = _input(model, request)
    if outputs != [EMBEDDING]:
        return await model.features.extract(images, outputs, deadline=deadline)
    if isinstance(images, np.ndarray):
        return {EMBEDDING: await model.pipeline.embed_pixels(images, deadline=deadline)}
    return {EMBEDDING: await model.pipeline.embed_images(images, deadline=deadline)}


def _input(model: Model, request: pb.ModelInferRequest) -> Sequence[bytes] | Pixels:
    """The request's files, or its pixels uint8 [N, S, S, 3]."""
    if len(request.inputs) != 1:
        raise InvalidRequest(
            f"the request has {len(request.inputs)} inputs; send one, {IMAGES} or {PIXELS}"
        )
    match request.inputs[0].name:
        case "images":
            return read_images(request)
        case "pixels":
            return read_pixels(request, model.info.preprocess.size)
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
