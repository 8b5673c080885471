"""What every process of a server is made of: models, what watches them, and the services."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import grpc
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from byol_serving.bundle import Bundle
from byol_serving.config import ServeConfig
from byol_serving.encoder import Device, Encoder
from byol_serving.held_port import cannot_listen
from byol_serving.pb.byol.v1 import admin_pb2, byol_pb2, byol_pb2_grpc
from byol_serving.pb.inference import grpc_service_pb2, grpc_service_pb2_grpc
from byol_serving.rpc.async_server import AsyncServer
from byol_serving.rpc.calls import Calls
from byol_serving.rpc.embedder import EmbedderService
from byol_serving.rpc.features import Features
from byol_serving.rpc.inference import InferenceService
from byol_serving.rpc.keeper import ModelKeeper
from byol_serving.rpc.models import Model, Models
from byol_serving.rpc.pipeline import Pipeline
from byol_serving.server_tls import server_credentials
from byol_serving.shelf import Shelf
from byol_serving.watching import Watching

log = logging.getLogger("byol.server")

SERVICES: Sequence[str] = tuple(
    service.full_name
    for file in (byol_pb2.DESCRIPTOR, admin_pb2.DESCRIPTOR, grpc_service_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_MOST_IN_A_BATCH = 64
"""Where the configuration leaves it to measurement: larger ones make others wait too long."""

_QUICK_S = 0.0005
"""An inference of one image in less than this is done where the image is decoded: waking another
thread, and taking the interpreter's lock there, costs as much."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What embeds, and what watches it. Closed by the stack that it was opened with."""

    config: ServeConfig
    models: Models
    keeper: ModelKeeper
    watching: Watching
    health: Any
    own: str
    """The name of the model of --bundle; empty without one."""


async def open_parts(config: ServeConfig, stack: AsyncExitStack) -> Parts:
    """Loads nothing yet; raises as `Shelf` and `Watching`."""
    models = Models()
    stack.push_async_callback(models.close)
    watching = stack.enter_context(Watching(config, models))
    health = grpc_health.aio.HealthServicer()
    shelf = await asyncio.to_thread(Shelf, config.bundle, config.models)
    return Parts(
        config=config,
        models=models,
        keeper=ModelKeeper(
            models, shelf, partial(_load, config, watching), partial(_say_health, health)
        ),
        watching=watching,
        health=health,
        own=shelf.own,
    )


def new_server(config: ServeConfig, calls: Calls) -> AsyncServer:
    """A server without services that listens nowhere yet."""
    return AsyncServer(
        calls,
        options=[
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", config.max_message_bytes),
            ("grpc.so_reuseport", int(config.processes > 1)),
        ],
    )


def add_embedding(server: grpc.aio.Server, parts: Parts) -> None:
    """Adds the services that need nothing but the models."""
    models, window = parts.models, parts.config.stream_window
    byol_pb2_grpc.add_EmbedderServicer_to_server(
        EmbedderService(models, stream_window=window), server
    )
    grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
        InferenceService(models), server
    )
    health_pb2_grpc.add_HealthServicer_to_server(parts.health, server)
    names = (*SERVICES, grpc_health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
        reflection.aio.ReflectionServicer(names), server
    )


async def start(server: AsyncServer, parts: Parts) -> str:
    """Listens, and says SERVING.

    Returns:
        host:port, with the port that was chosen where 0 was asked for.

    Raises:
        InvalidConfig: the address cannot be listened on.
    """
    config = parts.config
    port = _listen(server, config, f"{config.host}:{config.port}")
    await server.start()
    for name in ("", *SERVICES):
        await parts.health.set(name, _SERVING)
    return f"{config.host}:{port}"


def _listen(server: AsyncServer, config: ServeConfig, address: str) -> int:
    try:
        if config.tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, server_credentials(config.tls))
    except RuntimeError as error:
        raise cannot_listen(address) from error
    if port == 0:
        raise cannot_listen(address)
    return port


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
        cores=config.cores,
        cuda_graphs=config.cuda_graphs,
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
    if config.cuda_graphs:
        log.info("batches repeated as CUDA graphs: %s", encoder.graph_sizes or "none")
    max_batch = config.max_batch or curve.best
    # Who says how many inferences may run at a time gets threads for them.
    together = not (config.inference_workers or encoder.on_gpu) and curve.seconds[1] < _QUICK_S
    log.info(
        "workers=%d max_batch=%d%s",
        encoder.workers,
        max_batch,
        " in the decoding threads" if together else "",
    )
    config = replace(
        config,
        inference_workers=encoder.workers,
        decode_workers=config.decode_workers or config.cores,
        max_batch=max_batch,
    )
    watch = watching.batches(name)
    pipeline = Pipeline(
        encoder.embed,
        bundle.info.preprocess,
        config,
        enough=min(curve.enough, max_batch),
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
