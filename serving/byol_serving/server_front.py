"""A further process of a server, started and led by `server_processes`.

It is a whole embedding server on the shared port. Calls to collections and Admin go on to the
owner; images in them are embedded here.
"""

import asyncio
import logging
import os
import pickle
import shutil
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import uvloop

from byol_serving import logs
from byol_serving.config import ServeConfig
from byol_serving.errors import ByolError
from byol_serving.pb.byol.v1 import admin_pb2, admin_pb2_grpc, byol_pb2
from byol_serving.rpc.admin import AdminService
from byol_serving.rpc.async_server import AsyncServer
from byol_serving.rpc.auth import Gate
from byol_serving.rpc.calls import Calls
from byol_serving.rpc.forwarding import CHANNEL_OPTIONS, Forwarder
from byol_serving.rpc.fronting import ImagesToVectors
from byol_serving.server import Running, tune_process
from byol_serving.server_parts import Parts, add_embedding, new_server, open_parts, start
from byol_serving.server_processes import METRICS, front_socket, owner_socket, rates_folder
from byol_serving.tokens import Tokens

log = logging.getLogger("byol.processes")


def main() -> None:
    """Serves until the owner says drain, or ends."""
    # Who means the server asks the owner: a terminal and a supervisor reach this process as well.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is for the log
    config, number, folder = pickle.load(sys.stdin.buffer)
    logs.configure(config.log_format, config.log_level, calls=config.log_calls, process=number)
    tune_process()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            status = runner.run(_serve(config, number, folder, Owner(answers, folder)))
        except ByolError as error:
            log.error("cannot start: %s", error)
            status = 1
    sys.exit(status)


class Owner:
    """The process that started this one."""

    def __init__(self, answers: int, folder: Path) -> None:
        """`answers` is the descriptor that it reads from."""
        self._answers, self._folder = answers, folder
        self._commands: asyncio.Queue[str] = asyncio.Queue()

    async def listen(self) -> None:
        """Collects its commands, and ends this process when it has ended."""
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
        while line := await reader.readline():
            self._commands.put_nowait(line.decode())
        log.warning("the process that owns this one has ended: stopping at once")
        logging.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)  # which it could not remove any more
        os._exit(1)

    async def command(self, name: str) -> str:
        """Waits for the next command, and returns its argument."""
        found, _, argument = (await self._commands.get()).rstrip("\n").partition(" ")
        assert found == name, f"{found!r} came instead of {name!r}"
        return argument

    def say(self, word: str) -> None:
        """Tells it how far this process is."""
        os.write(self._answers, f"{word}\n".encode())


async def _serve(config: ServeConfig, number: int, folder: Path, owner: Owner) -> int:
    """The exit status: 0 if everything that was accepted was answered, else 1."""
    listening = asyncio.ensure_future(owner.listen())
    async with AsyncExitStack() as stack:
        parts = await open_parts(config, stack)
        private = await _private_server(parts, front_socket(folder, number))
        stack.push_async_callback(private.stop, None)
        owner.say("up")
        parts.models.default = await owner.command("serve")
        channel = grpc.aio.insecure_channel(owner_socket(folder), CHANNEL_OPTIONS)
        stack.push_async_callback(channel.close)
        running = await _public_server(parts, channel, folder)
        owner.say("serving")
        drained = await running.drain(float(await owner.command("drain")))
    listening.cancel()
    return 0 if drained else 1


async def _private_server(parts: Parts, address: str) -> grpc.aio.Server:
    """What the owner asks this process."""

    async def metrics(request: bytes, context: Any) -> bytes:
        return await asyncio.to_thread(parts.watching.render)

    server = AsyncServer(Calls(), CHANNEL_OPTIONS)
    admin_pb2_grpc.add_AdminServicer_to_server(AdminService(parts.models, parts.keeper), server)
    _, service, method = METRICS.split("/")
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(metrics)
    handlers = grpc.method_handlers_generic_handler(service, {method: handler})
    server.add_generic_rpc_handlers([handlers])
    server.add_insecure_port(address)
    await server.start()
    return server


async def _public_server(parts: Parts, owner: grpc.aio.Channel, folder: Path) -> Running:
    config = parts.config
    tokens = None if config.tokens is None else Tokens(config.tokens, rates_folder(folder))
    calls = Calls(parts.watching.calls, Gate(tokens))
    parts.watching.follow(calls)
    server = new_server(config, calls)
    add_embedding(server, parts)
    forwarder = Forwarder(owner, stream_window=config.stream_window)
    collections, admin = (
        file.DESCRIPTOR.services_by_name[name]
        for file, name in ((byol_pb2, "Collections"), (admin_pb2, "Admin"))
    )
    images = ImagesToVectors(parts.models, owner)
    server.add_generic_rpc_handlers(
        [forwarder.handler(collections, images.methods()), forwarder.handler(admin, {})]
    )
    return Running(server, calls, parts, await start(server, parts))


if __name__ == "__main__":
    main()
