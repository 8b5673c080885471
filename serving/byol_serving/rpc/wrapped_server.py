"""A gRPC server all of whose methods go through `Calls`, and that takes in many calls at a time.

What an interceptor does, which grpc.aio runs as two more coroutines for each call: a tenth of the
CPU time of a thumbnail.

A server of grpc.aio takes in one call at a time: it asks gRPC's thread for the next when it has the
last. While many ask, that round through the event loop is what they wait for. Several servers on
one port take in as many, over the connections that the system spreads over them (a quarter more
thumbnails with 32 and 128 clients who have a connection each; each server costs 14 kB).
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc

from byol_serving.rpc.calls import METADATA, Calls


class WrappedServer(grpc.aio.Server):
    """As grpc.aio's, but for the handlers that are added to it."""

    def __init__(
        self, calls: Calls, options: Sequence[tuple[str, Any]], *, listeners: int = 1
    ) -> None:
        """Without services; listens nowhere yet.

        Args:
            calls: what happens around each.
            options: of each server of grpc.aio.
            listeners: how many of them there are; several need SO_REUSEPORT, and a port that was
                chosen before.
        """
        self._calls = calls
        self._servers = [grpc.aio.server(options=options) for _ in range(listeners)]

    def add_generic_rpc_handlers(
        self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]
    ) -> None:
        """Adds services; before the start."""
        wrapped = [_Wrapped(self._calls, each) for each in generic_rpc_handlers]
        for server in self._servers:
            server.add_generic_rpc_handlers(wrapped)

    def add_insecure_port(self, address: str) -> int:
        """As grpc.aio's."""
        return min(server.add_insecure_port(address) for server in self._servers)

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """As grpc.aio's; where there are several listeners, not with credentials that change."""
        return self.add_secure_ports(address, lambda: server_credentials)

    def add_secure_ports(
        self, address: str, credentials: Callable[[], grpc.ServerCredentials]
    ) -> int:
        """As `add_secure_port`, with credentials of its own for each listener."""
        return min(server.add_secure_port(address, credentials()) for server in self._servers)

    async def start(self) -> None:
        """As grpc.aio's."""
        for server in self._servers:
            await server.start()

    async def stop(self, grace: float | None) -> None:
        """As grpc.aio's."""
        await asyncio.gather(*(server.stop(grace) for server in self._servers))

    async def wait_for_termination(
        self,
        timeout: float | None = None,  # noqa: ASYNC109  # grpc.aio's signature
    ) -> bool:
        """As grpc.aio's."""
        return any(
            await asyncio.gather(*(each.wait_for_termination(timeout) for each in self._servers))
        )


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
