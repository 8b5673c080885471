"""The server's life: load and prove the encoder, open the store, warm up, serve, drain.

    config = ServeConfig(bundle=Path("bundle"), store=Path("store"))
    async with serving(config) as running:
        print(running.address)

`run_server` does the same until a signal comes, for the command line.
"""

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import uvloop

from byol_serving.collections.opening import MILVUS, open_store
from byol_serving.collections.types import Store
from byol_serving.config import ServeConfig, available_cpus
from byol_serving.errors import ByolError
from byol_serving.pb.byol.v1 import admin_pb2_grpc, byol_pb2_grpc
from byol_serving.rpc.admin import AdminService
from byol_serving.rpc.async_server import AsyncServer
from byol_serving.rpc.auth import Gate
from byol_serving.rpc.calls import Calls
from byol_serving.rpc.collections import CollectionsService
from byol_serving.rpc.everywhere import ModelsEverywhere
from byol_serving.rpc.forwarding import CHANNEL_OPTIONS
from byol_serving.rpc.keeper import ModelKeeper
from byol_serving.rpc.pools import BlockingCalls
from byol_serving.server_parts import SERVICES, Parts, add_embedding, new_server, open_parts, start
from byol_serving.server_processes import Fronts, owner_socket, rates_folder
from byol_serving.tokens import Tokens

log = logging.getLogger("byol.server")

_SWITCH_S = 0.001
"""How long a thread waits for Python's lock before it asks for it. Decoding gives the lock up for
each image, and by default had to wait 5 ms behind a busy event loop."""

_REMOTE_SEARCHES = 16
"""Searches at a time in a store on another server: they wait, and take no core."""

_LEAVING_S = 2.0
"""For answers to leave that gRPC has been given: a stop at once was seen to cut off their end."""


class Running:
    """A process that answers."""

    def __init__(
        self,
        server: grpc.aio.Server,
        calls: Calls,
        parts: Parts,
        address: str,
        keeper: ModelKeeper | ModelsEverywhere | None = None,
        fronts: Fronts | None = None,
    ) -> None:
        """Made by `serving`."""
        self._server, self._calls, self._health = server, calls, parts.health
        self._keeper = keeper or parts.keeper
        self._fronts = fronts
        self.address = address
        """host:port, with the port that was chosen where 0 was asked for."""
        self.metrics_port = parts.watching.port
        """Likewise; None where metrics were not asked for."""

    async def reload(self) -> None:
        """Reads --bundle again: if another encoder lies there, it takes over; errors are logged."""
        try:
            await self._keeper.refresh()
        except ByolError as error:
            log.error("the bundle is left as it was: %s", error)

    async def drain(self, seconds: float) -> bool:
        """Says NOT_SERVING, refuses new calls, and waits for the accepted ones, in all processes.

        Returns:
            Whether all of them were answered; after `seconds` the others are cut off.
        """
        if self._fronts is None:
            return await self._drain(seconds)
        return all(await asyncio.gather(self._drain(seconds), self._fronts.drain(seconds)))

    async def _drain(self, seconds: float) -> bool:
        await self._health.enter_graceful_shutdown()
        # Tells clients to look for another server. It does not end by itself while somebody
        # watches the health service, so the wait below is for our own calls only.
        closing = asyncio.ensure_future(self._server.stop(seconds))
        try:
            async with asyncio.timeout(seconds):
                await self._calls.drain()
            drained = True
        except TimeoutError:
            log.warning("%d calls were cut off after %g s", self._calls.in_flight, seconds)
            drained = False
        await self._server.stop(_LEAVING_S if drained else None)
        await closing
        return drained


@asynccontextmanager
async def serving(config: ServeConfig) -> AsyncIterator[Running]:
    """A server that is ready, until the block ends; then it drains and everything is closed.

    Raises:
        InvalidBundle: the bundle is damaged or fails its golden check.
        InvalidConfig: no such device, or the address cannot be listened on.
        StoreLocked, StoreCorrupt, StoreError: the store cannot be opened.
        Unavailable: one of several processes ended while it started.
    """
    async with AsyncExitStack() as stack:
        fronts = None
        if config.processes > 1:
            fronts = await stack.enter_async_context(Fronts(config))
            config = fronts.config
        parts = await open_parts(config, stack)
        await parts.keeper.start(config.default_model)
        store = None
        if config.store is not None:
            gpu_memory = config.index_gpu_memory
            store = await asyncio.to_thread(open_store, config.store, gpu_memory=gpu_memory)
            stack.push_async_callback(asyncio.to_thread, store.close)
        running = await _start(parts, store, fronts, stack)
        try:
            yield running
        finally:
            await running.drain(config.drain_seconds)


def run_server(config: ServeConfig, on_ready: Callable[[str], None] = lambda address: None) -> int:
    """Serves until SIGTERM or SIGINT, then drains; a second signal stops the process at once.

    SIGHUP makes it read the bundle again, and switch to it if it is another.

    Args:
        config: what to serve, and where.
        on_ready: called with host:port once requests are answered.

    Returns:
        The exit status: 0 if everything that was accepted was answered, else 1.

    Raises:
        As `serving`.
    """
    tune_process()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve_until_signal(config, on_ready))


def tune_process() -> None:
    """Sets what Python leaves to the whole process, for one that does nothing but serve."""
    # What lives as long as the process need not be searched again and again, and calls leave few
    # cycles: rarer collections save 3% of the time for a little memory.
    sys.setswitchinterval(_SWITCH_S)
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


async def _serve_until_signal(config: ServeConfig, on_ready: Callable[[str], None]) -> int:
    stopping = asyncio.Event()

    def stop(name: str) -> None:
        if stopping.is_set():
            log.warning("%s again: stopping at once", name)
            logging.shutdown()
            os._exit(1)  # a batch in a thread must not be able to delay this; the store is durable
        log.info("%s: draining", name)
        stopping.set()

    if config.open_by:
        log.warning(
            "INSECURE: %s is open to the network with %s", config.host, " and ".join(config.open_by)
        )
    async with serving(config) as running:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number.name)
        reloads: set[asyncio.Task[None]] = set()  # which the event loop would not keep alive

        def reload() -> None:
            task = asyncio.ensure_future(running.reload())
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        loop.add_signal_handler(signal.SIGHUP, reload)
        log.info("ready address=%s services=%s", running.address, ",".join(SERVICES))
        on_ready(running.address)
        await stopping.wait()
        return 0 if await running.drain(config.drain_seconds) else 1


async def _start(
    parts: Parts,
    store: Store | None,
    fronts: Fronts | None,
    stack: AsyncExitStack,
) -> Running:
    config, models, watching = parts.config, parts.models, parts.watching
    blocking = BlockingCalls(config.collection_workers)
    searches = BlockingCalls(config.search_workers or _searches_at_a_time(config.store))
    for pool in (blocking, searches):
        stack.push_async_callback(asyncio.to_thread, pool.close)
    collections = CollectionsService(
        store,
        models,
        blocking,
        searches,
        stream_window=config.stream_window,
        backups=config.backups,
    )
    keeper: ModelKeeper | ModelsEverywhere = parts.keeper
    shared = None
    if fronts is not None:
        keeper = everywhere = ModelsEverywhere(parts.keeper, models, parts.own, fronts.live)
        shared = rates_folder(fronts.folder)
        # The fronts have let these calls in, and count them.
        private = AsyncServer(Calls(watching.forwarded), CHANNEL_OPTIONS)
        byol_pb2_grpc.add_CollectionsServicer_to_server(collections, private)
        admin_pb2_grpc.add_AdminServicer_to_server(AdminService(models, keeper), private)
        private.add_insecure_port(owner_socket(fronts.folder))
        await private.start()
        stack.push_async_callback(private.stop, None)
        await fronts.serve(everywhere.teach)
    calls = Calls(
        watching.calls, Gate(None if config.tokens is None else Tokens(config.tokens, shared))
    )
    watching.follow(calls, fronts)
    server = new_server(config, calls)
    add_embedding(server, parts)
    byol_pb2_grpc.add_CollectionsServicer_to_server(collections, server)
    admin_pb2_grpc.add_AdminServicer_to_server(AdminService(models, keeper), server)
    address = await start(server, parts)
    watching.listen(config)
    return Running(server, calls, parts, address, keeper, fronts)


def _searches_at_a_time(store: Path | str | None) -> int:
    return _REMOTE_SEARCHES if str(store).startswith(MILVUS) else available_cpus()
