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
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import grpc
import uvloop
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from byol_serving.bundle import Bundle
from byol_serving.collections.opening import open_store
from byol_serving.collections.types import Store
from byol_serving.config import ServeConfig
from byol_serving.encoder import Device, Encoder
from byol_serving.errors import ByolError, InvalidConfig
from byol_serving.pb.byol.v1 import admin_pb2, admin_pb2_grpc, byol_pb2, byol_pb2_grpc
from byol_serving.pb.inference import grpc_service_pb2, grpc_service_pb2_grpc
from byol_serving.rpc.admin import AdminService
from byol_serving.rpc.auth import Gate
from byol_serving.rpc.calls import Calls
from byol_serving.rpc.collections import CollectionsService
from byol_serving.rpc.embedder import EmbedderService
from byol_serving.rpc.features import Features
from byol_serving.rpc.inference import InferenceService
from byol_serving.rpc.keeper import ModelKeeper
from byol_serving.rpc.models import Model, Models
from byol_serving.rpc.pipeline import Pipeline
from byol_serving.rpc.pools import BlockingCalls
from byol_serving.server_tls import server_credentials
from byol_serving.shelf import Shelf
from byol_serving.tokens import Tokens
from byol_serving.watching import Watching

log = logging.getLogger("byol.server")

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_MOST_IN_A_BATCH = 64
"""Where the configuration leaves it to measurement: larger ones make others wait too long."""

_SWITCH_S = 0.001
"""How long a thread waits for Python's lock before it asks for it. Decoding gives the lock up for
each image, and by default had to wait 5 ms behind a busy event loop."""

_QUICK_S = 0.0005
"""An inference of one image in less than this is done where the image is decoded: waking another
thread, and taking the interpreter's lock there, costs as much."""

SERVICES: Sequence[str] = tuple(
    service.full_name
    for file in (byol_pb2.DESCRIPTOR, admin_pb2.DESCRIPTOR, grpc_service_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
)


class Running:
    """A server that answers."""

    def __init__(
        self,
        server: grpc.aio.Server,
        calls: Calls,
        health: Any,
        address: str,
        metrics_port: int | None,
        keeper: ModelKeeper,
    ) -> None:
        """Made by `serving`."""
        self._server, self._calls, self._health = server, calls, health
        self._keeper = keeper
        self.address = address
        """host:port, with the port that was chosen where 0 was asked for."""
        self.metrics_port = metrics_port
        """Likewise; None where metrics were not asked for."""

    async def reload(self) -> None:
        """Reads --bundle again: if another encoder lies there, it takes over; errors are logged."""
        try:
            await self._keeper.refresh()
        except ByolError as error:
            log.error("the bundle is left as it was: %s", error)

    async def drain(self, seconds: float) -> bool:
        """Says NOT_SERVING, refuses new calls, and waits for the accepted ones.

        Returns:
            Whether all of them were answered; after `seconds` the others are cut off.
        """
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
        await self._server.stop(None)
        await closing
        return drained


@asynccontextmanager
async def serving(config: ServeConfig) -> AsyncIterator[Running]:
    """A server that is ready, until the block ends; then it drains and everything is closed.

    Raises:
        InvalidBundle: the bundle is damaged or fails its golden check.
        InvalidConfig: no such device, or the address cannot be listened on.
        StoreLocked, StoreCorrupt, StoreError: the store cannot be opened.
    """
    async with AsyncExitStack() as stack:
        models = Models()
        stack.push_async_callback(models.close)
        watching = stack.enter_context(Watching(config, models))
        health = grpc_health.aio.HealthServicer()
        shelf = await asyncio.to_thread(Shelf, config.bundle, config.models)
        keeper = ModelKeeper(
            models, shelf, partial(_load, config, watching), partial(_say_health, health)
        )
        await keeper.start(config.default_model)
        store = None
        if config.store is not None:
            gpu_memory = config.index_gpu_memory
            store = await asyncio.to_thread(open_store, config.store, gpu_memory=gpu_memory)
            stack.push_async_callback(asyncio.to_thread, store.close)
        blocking = BlockingCalls(config.collection_workers)
        stack.push_async_callback(asyncio.to_thread, blocking.close)
        running = await _start(config, models, keeper, store, blocking, watching, health)
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
    # What lives as long as the process need not be searched again and again, and calls leave few
    # cycles: rarer collections save 3% of the time for a little memory.
    sys.setswitchinterval(_SWITCH_S)
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve_until_signal(config, on_ready))


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


async def _say_health(health: Any, model: str, ready: bool) -> None:
    """Models have a health of their own, under `model:NAME` and `model:NAME/VERSION`."""
    await health.set(f"model:{model}", _SERVING if ready else _NOT_SERVING)


def _load(
    config: ServeConfig, watching: Watching, bundle: Bundle, name: str, version: str
) -> Model:
    """Loads the encoder, holds it against its golden pairs, and runs every step once."""
    encoder = Encoder(
        bundle,
        device=cast(Device, config.device),
        threads=config.threads,
        workers=config.inference_workers,
    )
    worst = encoder.check_golden()
    log.info(
        "encoder=%s id=%s provider=%s golden_cosine_distance=%.1e",
        bundle.info.name,
        bundle.info.encoder_id[:12],
        encoder.provider,
        worst,
    )
    curve = encoder.warm_up(config.max_batch or _MOST_IN_A_BATCH)
    max_batch = config.max_batch or curve.best
    # Who says how many inferences may run at a time gets threads for them.
    together = not (config.inference_workers or encoder.on_gpu) and curve.seconds[1] < _QUICK_S
    log.info(
        "workers=%d max_batch=%d%s",
        encoder.workers,
        max_batch,
        " in the decoding threads" if together else "",
    )
    config = replace(config, inference_workers=encoder.workers, max_batch=max_batch)
    watch = watching.batches(name)
    pipeline = Pipeline(
        encoder.embed,
        bundle.info.preprocess,
        config,
        together=together,
        watch=watch,
    )
    features = Features(encoder.extract, pipeline, bundle.info, config, watch=watch)
    return Model(
        name=name,
        version=version,
        info=bundle.info,
        provider=encoder.provider,
        pipeline=pipeline,
        features=features,
    )


async def _start(
    config: ServeConfig,
    models: Models,
    keeper: ModelKeeper,
    store: Store | None,
    blocking: BlockingCalls,
    watching: Watching,
    health: Any,
) -> Running:
    tokens = None if config.tokens is None else Tokens(config.tokens)
    calls = Calls(watching.calls, Gate(tokens))
    watching.follow(calls)
    server = grpc.aio.server(
        interceptors=[calls],
        options=[
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", config.max_message_bytes),
            # Otherwise a second server on the port starts happily and takes half of the calls.
            ("grpc.so_reuseport", 0),
        ],
    )
    window = config.stream_window
    byol_pb2_grpc.add_EmbedderServicer_to_server(
        EmbedderService(models, stream_window=window), server
    )
    byol_pb2_grpc.add_CollectionsServicer_to_server(
        CollectionsService(store, models, blocking, stream_window=window, backups=config.backups),
        server,
    )
    grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
        InferenceService(models), server
    )
    admin_pb2_grpc.add_AdminServicer_to_server(AdminService(models, keeper), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (*SERVICES, grpc_health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    port = _listen(server, config)
    await server.start()
    for name in ("", *SERVICES):
        await health.set(name, _SERVING)
    watching.listen(config)
    return Running(server, calls, health, f"{config.host}:{port}", watching.port, keeper)


def _listen(server: grpc.aio.Server, config: ServeConfig) -> int:
    address = f"{config.host}:{config.port}"
    try:
        if config.tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, server_credentials(config.tls))
    except RuntimeError as error:
        port = 0
        reason: RuntimeError | None = error
    else:
        reason = None
    if port == 0:
        raise InvalidConfig(
            f"cannot listen on {address}: in use, not an address of this machine, or not allowed;"
            " choose another with --host and --port"
        ) from reason
    return port
