"""The Admin service: which encoders the server holds."""

from typing import Any, TypeAlias

import grpc

from byol_serving.pb.byol.v1 import admin_pb2 as pb
from byol_serving.pb.byol.v1 import admin_pb2_grpc
from byol_serving.rpc.everywhere import ModelsEverywhere
from byol_serving.rpc.keeper import ModelKeeper
from byol_serving.rpc.models import Model, Models

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AdminService(admin_pb2_grpc.AdminServicer):
    """byol.v1.Admin."""

    def __init__(self, models: Models, keeper: ModelKeeper | ModelsEverywhere) -> None:
        """Shows the models, and changes them through their keeper."""
        self._models, self._keeper = models, keeper

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """Every loaded version."""
        return pb.ListModelsResponse(models=map(self._status, self._models.all()))

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.ModelStatus:
        """Loads a version beside the others."""
        return self._status(await self._keeper.load(request.name, request.version))

    async def SwitchModel(self, request: pb.SwitchModelRequest, context: Context) -> pb.ModelStatus:
        """Makes a version the one in use."""
        model = await self._keeper.switch(
            request.name, request.version, unload_previous=request.unload_previous
        )
        return self._status(model)

    async def UnloadModel(
        self, request: pb.UnloadModelRequest, context: Context
    ) -> pb.UnloadModelResponse:
        """Takes a version out."""
        await self._keeper.unload(request.name, request.version)
        return pb.UnloadModelResponse()

    def _status(self, model: Model) -> pb.ModelStatus:
        return pb.ModelStatus(
            name=model.name,
            version=model.version,
            encoder_id=model.info.encoder_id,
            precision=model.info.precision,
            provider=model.provider,
            in_use=self._models.is_in_use(model),
            is_default=model.name == self._models.default,
            requests=model.requests,
        )
