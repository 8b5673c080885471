"""A gRPC server for asyncio on gRPC's own core, all of whose methods go through `Calls`.

It takes the place of grpc.aio's, which answers half to two thirds as many calls
(benchmarks/rpc_server.py; `completions` says why). Services are written as for that.
"""

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # not in the stubs

from byol_serving.rpc.calls import Calls
from byol_serving.rpc.completions import Completions
from byol_serving.rpc.server_call import Handler, Metadata, ServerCall

_ASKED = 64
"""Calls that gRPC may hand over before it is asked for more."""


class AsyncServer(grpc.aio.Server):
    """As grpc.aio's; belongs to the event loop that it was made on."""

    def __init__(self, calls: Calls, options: Sequence[tuple[str, Any]]) -> None:
        """Without services; listens nowhere yet.

        Args:
            calls: what happens around each call.
            options: channel arguments of gRPC's core.
        """
        self._calls = calls
        self._services: list[grpc.GenericRpcHandler] = []
        self._handlers: dict[bytes, tuple[str, Handler]] = {}
        """Of the methods that were called before."""
        self._completions = Completions()
        self._core: Any = cygrpc.Server(tuple(options), False)
        self._core.register_completion_queue(self._completions.queue)
        self._stopping = self._stopped = False

    def add_generic_rpc_handlers(
        self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]
    ) -> None:
        """Adds services; before the start."""
        self._services += generic_rpc_handlers

    def add_insecure_port(self, address: str) -> int:
        """The port; as grpc.aio's."""
        return int(self._core.add_http2_port(address.encode()))

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """The port; as grpc.aio's."""
        credentials: Any = server_credentials
        return int(self._core.add_http2_port(address.encode(), credentials._credentials))

    async def start(self) -> None:
        """Takes calls from now on."""
        self._core.start()
        for _ in range(_ASKED):
            self._ask()
        self._completions.start()

    async def stop(self, grace: float | None) -> None:
        """Takes no more calls, and ends when the present ones have.

        Args:
            grace: seconds after which they are cancelled; None: at once. A later stop may have less
                patience than an earlier.
        """
        if not self._stopping:
            self._stopping = True
            self._core.shutdown(self._completions.queue, self._shut_down)
        ended = self._completions.ended
        with suppress(TimeoutError):
            async with asyncio.timeout(grace or 0.0):
                await ended.wait()
        if not self._stopped:
            self._core.cancel_all_calls()
        await ended.wait()

    async def wait_for_termination(
        self,
        timeout: float | None = None,  # noqa: ASYNC109  # grpc.aio's signature
    ) -> bool:
        """Whether the timeout, in seconds, passed before the server had stopped."""
        try:
            async with asyncio.timeout(timeout):
                await self._completions.ended.wait()
        except TimeoutError:
            return True
        return False

    def _ask(self) -> None:
        self._core.request_call(self._completions.queue, self._completions.queue, self._called)

    def _called(self, event: Any) -> None:
        """A call has come, or none will any more."""
        if not event.success:
            return
        if not self._stopping:
            self._ask()
        name: bytes = event.call_details.method
        method, handler = self._handlers.get(name) or self._find(name, event.invocation_metadata)
        ServerCall(event, method, handler, self._is_open).begin()

    def _find(self, name: bytes, metadata: Metadata) -> "tuple[str, Handler | None]":
        method = name.decode(errors="replace")
        for service in self._services:
            handler: Any = service.service(_Details(method, metadata))  # type: ignore[arg-type]  # it has what the abstract class has
            if handler is not None:
                self._handlers[name] = method, self._calls.wrapped(method, handler)
                return self._handlers[name]
        return method, None

    def _is_open(self) -> bool:
        return not self._stopped

    def _shut_down(self, event: Any) -> None:
        """The last call has ended."""
        self._stopped = True
        self._completions.close()


class _Details(NamedTuple):
    """A `grpc.HandlerCallDetails`."""

    method: str
    invocation_metadata: Metadata
