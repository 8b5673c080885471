"""What a gRPC server costs by itself: each request is answered at once with a constant.

    bare_server.py PORT BYTES core|ours|aio|aio-64

`core` is gRPC's core alone, asked by one thread that does nothing else: what every server on it has
to pay. benchmarks/serve_load.py holds it against the raw loop; with that it gives what a server can
reach on a machine whose clients share its cores. The others are servers for asyncio on that core
(benchmarks/rpc_server.py): `ours`, with what we do around each call, grpc.aio's, and 64 of
grpc.aio's on one port.
"""

import asyncio
import sys
from typing import Any

import grpc
import uvloop
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # not in the stubs

_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 1))
_ASKED = 64
"""Calls that gRPC may hand over before it is asked for more."""


class _Constant(grpc.GenericRpcHandler):
    """Any method: bytes in, the same bytes out each time."""

    def __init__(self, answer: bytes) -> None:
        async def handle(request: bytes, context: object) -> bytes:
            return answer

        self._handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(
            handle, request_deserializer=bytes
        )

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[bytes, bytes]":
        return self._handler


def main() -> None:
    """Serves until it is killed."""
    port, size, kind = sys.argv[1:]
    address, answer = f"127.0.0.1:{port}", bytes(int(size))
    if kind == "core":
        serve_by_core(address, answer)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve_by_asyncio(address, answer, kind))


def serve_by_core(address: str, answer: bytes) -> None:
    """Asks for events, one after the other; each one's tag is the function that handles it."""
    queue: Any = cygrpc.CompletionQueue()
    server: Any = cygrpc.Server(_OPTIONS, False)
    server.register_completion_queue(queue)
    server.add_http2_port(address.encode())
    server.start()

    def called(event: Any) -> None:
        server.request_call(queue, queue, called)
        call = event.call
        call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(0),), nothing)
        call.start_server_batch(
            (cygrpc.ReceiveMessageOperation(0),), lambda event: received(call, event)
        )

    def received(call: Any, event: Any) -> None:
        if event.batch_operations[0].message() is not None:
            status = cygrpc.SendStatusFromServerOperation((), cygrpc.StatusCode.ok, "", 0)
            beginning = cygrpc.SendInitialMetadataOperation((), 0)
            sending = cygrpc.SendMessageOperation(answer, 0)
            call.start_server_batch((beginning, sending, status), nothing)

    def nothing(event: Any) -> None:
        pass

    for _ in range(_ASKED):
        server.request_call(queue, queue, called)
    while True:
        event = queue.poll()
        event.tag(event)


async def serve_by_asyncio(address: str, answer: bytes, kind: str) -> None:
    """The servers whose handlers are coroutines."""
    servers: list[grpc.aio.Server]
    match kind:
        case "ours":
            from byol_serving.rpc.async_server import AsyncServer
            from byol_serving.rpc.calls import Calls

            servers = [AsyncServer(Calls(), _OPTIONS)]
        case "aio":
            servers = [grpc.aio.server(options=_OPTIONS)]
        case "aio-64":
            servers = [grpc.aio.server(options=_OPTIONS) for _ in range(64)]
        case _:
            raise SystemExit(f"{kind!r} is none of core, ours, aio, aio-64")
    for server in servers:
        server.add_generic_rpc_handlers([_Constant(answer)])
        server.add_insecure_port(address)
        await server.start()
    await asyncio.gather(*(server.wait_for_termination() for server in servers))


if __name__ == "__main__":
    main()
