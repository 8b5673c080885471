"""Loads, switches and unloads models in all processes of a server, as if they were one.

This process goes first where something may fail, and the others follow it. A change that fails in
one of them is taken back in all. A process that is started again learns what is loaded here.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import grpc

from byol_serving.errors import ByolError, Unavailable
from byol_serving.pb.byol.v1 import admin_pb2 as pb
from byol_serving.rpc.keeper import ModelKeeper
from byol_serving.rpc.models import Model, Models
from byol_serving.rpc.status import error_from

Out = TypeVar("Out")


class Process(Protocol):
    """Another process of this server."""

    @property
    def number(self) -> int:
        """Tells it from the others; this one is 0."""

    @property
    def admin(self) -> Any:
        """A stub of its Admin service."""

    def serve(self, default_model: str) -> Awaitable[None]:
        """Makes it answer calls."""


class ModelsEverywhere:
    """Changes the models of all processes; for `AdminService`, as `ModelKeeper` is."""

    def __init__(
        self, keeper: ModelKeeper, models: Models, own: str, others: Callable[[], Sequence[Process]]
    ) -> None:
        """Changes nothing yet.

        Args:
            keeper: of this process's models.
            models: of this process.
            own: name of the model of --bundle; empty without one.
            others: the processes that answer calls now.
        """
        self._keeper, self._models, self._own, self._others = keeper, models, own, others
        self._change = asyncio.Lock()

    async def load(self, name: str, version: str) -> Model:
        """As that of `ModelKeeper`; an error of another process names it."""
        return await self._whole(self._load(name, version))

    async def switch(self, name: str, version: str, *, unload_previous: bool = False) -> Model:
        """As that of `ModelKeeper`: loaded by all before any of them switches."""
        return await self._whole(self._switch(name, version, unload_previous))

    async def refresh(self) -> None:
        """As that of `ModelKeeper`."""
        if self._own:
            await self.switch(self._own, "", unload_previous=True)

    async def unload(self, name: str, version: str) -> None:
        """As that of `ModelKeeper`."""
        await self._whole(self._unload(name, version))

    async def teach(self, *processes: Process) -> None:
        """Makes new processes load what is loaded here, and then answer calls.

        Raises:
            ByolError: one of them cannot; it names the process.
        """
        async with self._change:
            await asyncio.gather(*map(self._teach, processes))

    async def _whole(self, change: Coroutine[Any, Any, Out]) -> Out:
        async def alone() -> Out:
            async with self._change:
                return await change

        # Whoever asked may leave, and the processes must agree all the same.
        return await asyncio.shield(alone())

    async def _load(self, name: str, version: str) -> Model:
        before = {(each.name, each.version) for each in self._models.all()}
        model = await self._keeper.load(name, version)
        key = (model.name, model.version)
        try:
            await self._tell("LoadModel", pb.LoadModelRequest(name=key[0], version=key[1]))
        except ByolError:
            if key not in before:
                del model  # unloading lets go of the last reference
                await self._take_back(*key)
            raise
        return model

    async def _take_back(self, name: str, version: str) -> None:
        await self._keeper.unload(name, version)
        request = pb.UnloadModelRequest(name=name, version=version)
        for each in self._others():
            try:
                await each.admin.UnloadModel(request)
            except grpc.aio.AioRpcError:  # it is the one that could not load it, or has ended
                continue

    async def _switch(self, name: str, version: str, unload_previous: bool) -> Model:
        name = name or self._models.default
        before = self._models.in_use(name)
        loaded = await self._load(name, version)
        name, version = loaded.name, loaded.version
        await self._tell("SwitchModel", pb.SwitchModelRequest(name=name, version=version))
        model = await self._keeper.switch(name, version)
        if unload_previous and before not in ("", version):
            await self._unload(name, before)
        return model

    async def _unload(self, name: str, version: str) -> None:
        model = self._models.find(name, version)
        name, version = model.name, model.version
        del model  # unloading lets go of the last reference
        await self._keeper.unload(name, version)
        await self._tell("UnloadModel", pb.UnloadModelRequest(name=name, version=version))

    async def _teach(self, process: Process) -> None:
        for model in self._models.all():
            name, version = model.name, model.version
            await _ask(process, "LoadModel", pb.LoadModelRequest(name=name, version=version))
            if self._models.is_in_use(model):
                request = pb.SwitchModelRequest(name=name, version=version)
                await _ask(process, "SwitchModel", request)
        await process.serve(self._models.default)

    async def _tell(self, method: str, request: Any) -> None:
        """Asks all others at a time; raises what the first of those that failed answered."""
        answers = await asyncio.gather(
            *(_ask(each, method, request) for each in self._others()), return_exceptions=True
        )
        for answer in answers:
            # Who has ended learns what is loaded here when it is started again.
            if isinstance(answer, BaseException) and not isinstance(answer, Unavailable):
                raise answer


async def _ask(process: Process, method: str, request: Any) -> None:
    """Raises what the process answered, and Unavailable if it has ended."""
    try:
        await getattr(process.admin, method)(request)
    except grpc.aio.AioRpcError as failure:
        text = f"process {process.number}: {failure.details()}"
        if failure.code() is grpc.StatusCode.UNAVAILABLE:
            raise Unavailable(text) from failure
        trailers: Any = failure.trailing_metadata() or ()
        raise error_from(failure.code(), text, trailers) from failure
