"""What gRPC alone costs: a grpc.aio server that answers each request at once with a constant.

benchmarks/serve_load.py starts it with a port and the size of an answer. With the raw loop it gives
what a Python gRPC server can reach on a machine whose clients share its cores, if it answers each
request by itself, as this one: an image costs what the two cost. To answer many together costs
gRPC less; ours exceeds this ceiling with thumbnails a little.
"""

import asyncio
import sys

import grpc
import uvloop

LISTENERS = 64


class _Constant(grpc.GenericRpcHandler):
    """Any method: bytes in, the same bytes out each time."""

    def __init__(self, answer: bytes) -> None:
        async def handle(request: bytes, context: object) -> bytes:
            return answer

        self._handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(
            handle
        )

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[bytes, bytes]":
        return self._handler


async def main() -> None:
    """Serves until it is killed."""
    port, size = map(int, sys.argv[1:])
    options = [("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 1)]
    servers = [grpc.aio.server(options=options) for _ in range(LISTENERS)]
    for server in servers:
        server.add_generic_rpc_handlers([_Constant(bytes(size))])
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
    await asyncio.gather(*(server.wait_for_termination() for server in servers))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
