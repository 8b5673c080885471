"""A gRPC server all of whose methods go through `Calls`.

What an interceptor does, which grpc.aio runs as two more coroutines for each call: a tenth of the
CPU time of a thumbnail.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import grpc

from byol_serving.rpc.calls import METADATA, Calls


class WrappedServer(grpc.aio.Server):
    """As grpc.aio's, but for the handlers that are added to it."""

    def __init__(self, calls: Calls, options: Sequence[tuple[str, Any]]) -> None:
        """Without services; listens nowhere yet."""
        self._calls = calls
        self._server = grpc.aio.server(options=options)

    def add_generic_rpc_handlers(
        self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]
    ) -> None:
        """Adds services; before the start."""
        wrapped = [_Wrapped(self._calls, each) for each in generic_rpc_handlers]
        self._server.add_generic_rpc_handlers(wrapped)

    def add_insecure_port(self, address: str) -> int:
        """As grpc.aio's."""
        return self._server.add_insecure_port(address)

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """As grpc.aio's."""
        return self._server.add_secure_port(address, server_credentials)

    async def start(self) -> None:
        """As grpc.aio's."""
        await self._server.start()

    async def stop(self, grace: float | None) -> None:
        """As grpc.aio's."""
        await self._server.stop(grace)

    async def wait_for_termination(
        self,
        timeout: float | None = None,  # noqa: ASYNC109  # grpc.aio's signature
    ) -> bool:
        """As grpc.aio's."""
        return await self._server.wait_for_termination(timeout)


class _Wrapped(grpc.GenericRpcHandler):
    """One service, asked by gRPC for each call."""

    def __init__(self, calls: Calls, handler: grpc.GenericRpcHandler) -> None:
        self._calls, self._handler = calls, handler

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """The wrapped handler of the method; None: it is not of this service."""
        method = handler_call_details.method
        METADATA.set(handler_call_details.invocation_metadata)
        known = self._calls.known(method)
        if known is not None:
            return known
        handler = self._handler.service(handler_call_details)
        return None if handler is None else self._calls.wrapped(method, handler)
