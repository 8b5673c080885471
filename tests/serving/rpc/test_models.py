"""Several models and versions: found, loaded, switched under load, unloaded, refused."""

import asyncio
import shutil
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from byol_serving.bundle import write_bundle
from byol_serving.client import AsyncClient
from byol_serving.client_admin import AdminClient
from byol_serving.config import ServeConfig
from byol_serving.encoder import Encoder
from byol_serving.errors import (
    EncoderMismatch,
    FailedPrecondition,
    InvalidBundle,
    InvalidConfig,
    InvalidRequest,
    UnknownModel,
)
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.pb.byol.v1 import byol_pb2_grpc
from byol_serving.server import serving
from byol_serving.shelf import Shelf
from serving.rpc.conftest import ServerThread
from serving.support import DIM, make_bundle, png, random_pixels, reference, tiny_model

PIXELS = random_pixels(4)
FILES = [png(each) for each in PIXELS]


def broken_bundle(path: Path) -> Path:
    """A whole bundle whose golden embeddings are another encoder's."""
    golden = random_pixels(4, seed=7)
    info = make_bundle(path.with_name("whole"), seed=5).info
    shutil.rmtree(path.with_name("whole"))
    return write_bundle(path, tiny_model(5), info, golden, reference(golden, seed=6)).path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """cats: v2 (seed 2) and v10 (seed 10); dogs: 1 (seed 20)."""
    make_bundle(tmp_path / "models" / "cats" / "v2", seed=2)
    make_bundle(tmp_path / "models" / "cats" / "v10", seed=10)
    make_bundle(tmp_path / "models" / "dogs" / "1", seed=20)
    return tmp_path / "models"


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[ServerThread]:
    server = ServerThread(
        ServeConfig(models=folder, default_model="cats", store=tmp_path / "store", port=0)
    )
    yield server
    server.stop()


@pytest.fixture
def client(server: ServerThread) -> Iterator[AdminClient]:
    with AdminClient(server.address, timeout=20) as client:
        yield client


def state(client: AdminClient) -> list[tuple[str, str, bool, bool]]:
    return [(m.name, m.version, m.in_use, m.is_default) for m in client.models()]


def health_of(address: str, name: str) -> int:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
        status: int = answer.status
        return status


def test_names_and_versions_choose_the_encoder(client: AdminClient) -> None:
    assert state(client) == [
        ("cats", "v10", True, True),
        ("cats", "v2", False, True),
        ("dogs", "1", True, False),
    ]
    for model, version, seed in (
        ("", "", 10),
        ("cats", "", 10),
        ("cats", "v2", 2),
        ("dogs", "", 20),
    ):
        wanted = reference(PIXELS, seed)
        for images in (PIXELS, FILES):
            rows = client.embed(images, model=model, version=version)
            np.testing.assert_allclose(rows, wanted, atol=1e-5)
        (stream,) = client.embed_stream(FILES, model=model, version=version)
        np.testing.assert_allclose(stream, wanted, atol=1e-5)
    assert client.encoder(model="dogs").version == "1"
    with pytest.raises(UnknownModel, match="no model 'cows'; loaded are: cats, dogs"):
        client.embed(PIXELS, model="cows")
    with pytest.raises(UnknownModel, match="no version 'v3'; loaded are: v10, v2"):
        client.embed(PIXELS, model="cats", version="v3")


def test_load_switch_and_unload(client: AdminClient, server: ServerThread, folder: Path) -> None:
    make_bundle(folder / "cats" / "v11", seed=11)
    loaded = client.load_model("cats")  # the newest in the folder
    assert (loaded.version, loaded.in_use) == ("v11", False)
    np.testing.assert_allclose(client.embed(PIXELS), reference(PIXELS, 10), atol=1e-5)
    assert health_of(server.address, "model:cats/v11") == health_pb2.HealthCheckResponse.SERVING
    client.switch_model("cats", "v11", unload_previous=True)
    np.testing.assert_allclose(client.embed(PIXELS), reference(PIXELS, 11), atol=1e-5)
    assert health_of(server.address, "model:cats/v10") == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(UnknownModel, match="no version 'v10'"):
        client.embed(PIXELS, version="v10")
    with pytest.raises(FailedPrecondition, match="'v11' of model 'cats' is in use; switch"):
        client.unload_model("cats")
    client.unload_model("cats", "v2")
    client.unload_model("dogs")  # in use, but the last
    assert state(client) == [("cats", "v11", True, True)]
    assert health_of(server.address, "model:dogs") == health_pb2.HealthCheckResponse.NOT_SERVING
    assert client.switch_model("cats", "v2").in_use  # loads what was unloaded


def test_a_bundle_that_fails_its_golden_check_never_becomes_ready(
    client: AdminClient, server: ServerThread, folder: Path
) -> None:
    broken_bundle(folder / "cats" / "v99")
    before = state(client)
    for attempt in (client.load_model, client.switch_model):
        with pytest.raises(InvalidBundle, match="fails its golden check"):
            attempt("cats", "v99")
    assert state(client) == before
    np.testing.assert_allclose(client.embed(PIXELS), reference(PIXELS, 10), atol=1e-5)
    with pytest.raises(grpc.RpcError):
        health_of(server.address, "model:cats/v99")


async def test_a_broken_version_is_left_out_at_the_start(folder: Path) -> None:
    broken_bundle(folder / "cats" / "v99")
    async with (
        serving(ServeConfig(models=folder, default_model="cats", port=0)) as running,
        AsyncClient(running.address) as client,
    ):
        assert (await client.encoder()).version == "v10"
        status = await asyncio.to_thread(health_of, running.address, "model:cats/v99")
        assert status == health_pb2.HealthCheckResponse.NOT_SERVING
    broken_bundle(folder / "cows" / "1")
    with pytest.raises(FailedPrecondition, match="default model 'cows' is not loaded"):
        async with serving(ServeConfig(models=folder, default_model="cows", port=0)):
            pass


@pytest.mark.parametrize(
    ("name", "version"), [("../cats", ""), ("cats", "../v2"), ("a/b", ""), (".hidden", "")]
)
def test_requests_cannot_name_paths(client: AdminClient, name: str, version: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot name a model or version"):
        client.load_model(name, version)


async def test_a_switch_under_load_fails_no_request(folder: Path) -> None:
    wanted = {seed: reference(PIXELS, seed) for seed in (2, 10)}
    done, answers = asyncio.Event(), {2: 0, 10: 0}

    async def ask(stub: Any, ids: dict[str, int]) -> None:
        while not done.is_set():
            answer = await stub.Embed(pb.EmbedRequest(images=FILES), timeout=20)
            seed = ids[answer.encoder_id]
            rows = np.frombuffer(answer.embeddings.data, "<f4").reshape(4, DIM)
            np.testing.assert_allclose(rows, wanted[seed], atol=1e-5)
            answers[seed] += 1

    config = ServeConfig(models=folder, default_model="cats", port=0)
    async with serving(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        with AdminClient(running.address, timeout=20) as admin:
            models = await asyncio.to_thread(admin.models)
            ids = {m.encoder_id: int(m.version[1:]) for m in models if m.name == "cats"}
            stub = byol_pb2_grpc.EmbedderStub(channel)
            asking = [asyncio.ensure_future(ask(stub, ids)) for _ in range(16)]
            for version in ("v2", "v10") * 4:
                await asyncio.sleep(0.05)
                await asyncio.to_thread(admin.switch_model, "cats", version, unload_previous=True)
            done.set()
            await asyncio.gather(*asking)
    assert min(answers.values()) > 0


@pytest.fixture
async def own(tmp_path: Path) -> AsyncIterator[tuple[Path, Any, AsyncClient]]:
    path = make_bundle(tmp_path / "own", seed=1).path
    config = ServeConfig(bundle=path, store=tmp_path / "store", port=0)
    async with serving(config) as running, AsyncClient(running.address) as client:
        yield path, running, client


async def test_a_reload_takes_the_bundle_that_lies_there_now(own: Any) -> None:
    path, running, client = own
    first = (await client.encoder()).version
    shutil.rmtree(path)
    await running.reload()  # nothing there: the old one goes on
    np.testing.assert_allclose(await client.embed(PIXELS), reference(PIXELS, 1), atol=1e-5)
    make_bundle(path, seed=3)
    await running.reload()
    np.testing.assert_allclose(await client.embed(PIXELS), reference(PIXELS, 3), atol=1e-5)
    second = await client.encoder()
    assert second.version == second.encoder_id[:12] != first
    await running.reload()
    assert (await client.encoder()).version == second.version


async def test_a_collection_keeps_its_encoder_through_a_switch(own: Any) -> None:
    path, running, client = own
    await client.create_collection("old")
    await client.upsert("old", list("abcd"), images=FILES)
    first = (await client.encoder()).version
    shutil.rmtree(path)
    make_bundle(path, seed=3)
    with AdminClient(running.address, timeout=20) as admin:
        await asyncio.to_thread(admin.switch_model)
        (hit,) = await client.search("old", image=FILES[2], k=1)
        assert (hit.id, round(hit.score, 4)) == ("c", 1.0)
        await asyncio.to_thread(admin.unload_model, "tiny", first)
    with pytest.raises(EncoderMismatch, match="collection 'old' holds vectors of encoder"):
        await client.search("old", image=FILES[2], k=1)


def test_the_shelf_refuses_two_of_a_name(folder: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "own")
    make_bundle(folder / "tiny" / "1")
    with pytest.raises(InvalidConfig, match="has a model 'tiny', the name of"):
        Shelf(bundle.path, folder)
    with pytest.raises(InvalidConfig, match="is not a folder"):
        Shelf(None, tmp_path / "none")


async def test_what_is_unloaded_is_let_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoders: list[weakref.ref[Encoder]] = []

    class Watched(Encoder):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            encoders.append(weakref.ref(self))

    monkeypatch.setattr("byol_serving.server_parts.Encoder", Watched)
    config = ServeConfig(models=folder, default_model="cats", port=0)
    async with serving(config) as running, AsyncClient(running.address) as client:
        with AdminClient(running.address, timeout=20) as admin:
            await client.extract_features(PIXELS, ["cells"])
            for version in ("v2", "v10", "v2"):
                await client.embed(FILES)
                await asyncio.to_thread(admin.switch_model, "cats", version, unload_previous=True)
        alive = [each for each in encoders if each() is not None]
        assert len(encoders) == 3 + 2
        assert len(alive) == 2  # cats v2 and dogs
