"""A server's life: readiness, TLS, overload, deadlines, unexpected errors, draining, ownership."""

import asyncio
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from byol_serving.client import AsyncClient, Client, ClientTls, Retry
from byol_serving.config import ServeConfig, TlsConfig
from byol_serving.encoder import Encoder
from byol_serving.errors import (
    ByolError,
    DeadlinePassed,
    InvalidBundle,
    InvalidConfig,
    Overloaded,
    StoreLocked,
    Unavailable,
)
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.pb.byol.v1 import byol_pb2_grpc
from byol_serving.server import serving
from byol_serving.server_parts import SERVICES
from serving.support import DIM, make_bundle, png, random_pixels, reference

PIXELS = random_pixels(4)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ONCE = Retry(attempts=1)


class Slow:
    """Stands in for `Encoder.embed`, and lets a batch through only when told to."""

    def __init__(self) -> None:
        self.began, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.sizes: list[int] = []

    def __call__(self, encoder: Encoder, pixels: Any) -> Any:
        self.sizes.append(len(pixels))
        self.began.release()
        assert self.go.acquire(timeout=20)
        return np.ones((len(pixels), DIM), np.float32)

    async def wait(self) -> None:
        """Until the next batch is in the encoder."""
        assert await asyncio.to_thread(self.began.acquire, timeout=10)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    slow = Slow()
    monkeypatch.setattr("byol_serving.server_parts.Encoder", _slow_encoder(slow))
    return slow


def _slow_encoder(slow: Slow) -> type[Encoder]:
    class SlowEncoder(Encoder):
        served = False

        def check_golden(self) -> float:
            return super().check_golden()

        def embed(self, pixels: Any) -> Any:
            # Loading and warming up happen outside the inference threads, at full speed.
            if threading.current_thread().name.startswith("inference"):
                return slow(self, pixels)
            return super().embed(pixels)

    return SlowEncoder


async def test_health_and_reflection(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "byol.v1.Embedder", "byol.v1.Collections"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="unknown"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with grpc.insecure_channel(address) as plain:
        database = ProtoReflectionDescriptorDatabase(plain)
        assert set(SERVICES) <= set(database.get_services())
        file = database.FindFileContainingSymbol("byol.v1.Embedder")
        assert file.package == "byol.v1"


async def test_the_request_id_comes_back_and_is_in_the_log(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = byol_pb2_grpc.EmbedderStub(channel)
        with caplog.at_level(logging.INFO, "byol.rpc"):
            for given, kept in (("mine-1", True), ("x" * 200, False)):
                call = stub.GetEncoder(
                    pb.GetEncoderRequest(), metadata=(("x-request-id", given),), timeout=10
                )
                await call
                found = (await call.trailing_metadata())["x-request-id"]
                assert (found == given) is kept
                assert f"code=OK ms=" in caplog.text  # noqa: F541
                assert f"request_id={found}" in caplog.text


async def test_a_request_id_that_leads_nowhere_is_not_sent(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = byol_pb2_grpc.EmbedderStub(channel)
        call = stub.GetEncoder(pb.GetEncoderRequest(), timeout=10)
        await call
        assert "x-request-id" not in (await call.trailing_metadata())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetEncoder(pb.GetEncoderRequest(model="unknown"), timeout=10)
        found = str(caught.value.trailing_metadata()["x-request-id"])
        assert re.fullmatch(r"[0-9a-f]{16}", found)


async def test_an_unexpected_error_tells_the_caller_nothing(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Encoder, pixels: Any) -> Any:
        if threading.current_thread().name.startswith("inference"):
            raise RuntimeError("secret /path")
        return real(self, pixels)

    real: Callable[..., Any] = Encoder.embed
    monkeypatch.setattr(Encoder, "embed", broken)
    async with (
        serving(ServeConfig(bundle=bundle_path, port=0)) as running,
        AsyncClient(running.address) as client,
    ):
        with pytest.raises(ByolError, match=r"^INTERNAL: internal error.*request id [0-9a-f]{16}$"):
            await client.embed(PIXELS)
        assert "secret /path" in caplog.text
        assert (await client.encoder()).dim == DIM


async def flood(client: AsyncClient) -> None:
    """Send one image at a time until the server refuses: those before it may be on their way."""
    while True:
        await client.embed(PIXELS[:1])


async def test_a_full_queue_refuses_at_once_and_a_retry_succeeds(
    bundle_path: Path, slow: Slow
) -> None:
    config = ServeConfig(
        bundle=bundle_path, port=0, max_batch=1, inference_workers=1, max_queued_images=2
    )
    async with (
        serving(config) as running,
        AsyncClient(running.address, retry=ONCE) as once,
        AsyncClient(running.address, retry=Retry(attempts=20)) as patient,
    ):
        accepted = [asyncio.ensure_future(once.embed(PIXELS[:1])) for _ in range(2)]
        await slow.wait()
        began = time.monotonic()
        with pytest.raises(Overloaded, match=r"2 images .* try again later") as caught:
            await flood(once)
        assert time.monotonic() - began < 5
        assert caught.value.retry_after_s > 0
        waiting = asyncio.ensure_future(patient.embed(PIXELS[:1]))
        await asyncio.sleep(0.05)
        slow.go.release(10)
        assert (await waiting).shape == (1, DIM)
        await asyncio.gather(*accepted)


async def test_expired_and_cancelled_requests_are_never_embedded(
    bundle_path: Path, slow: Slow
) -> None:
    config = ServeConfig(bundle=bundle_path, port=0, max_batch=8, inference_workers=1)
    async with (
        serving(config) as running,
        AsyncClient(running.address, retry=ONCE) as client,
        AsyncClient(running.address, retry=ONCE, timeout=0.1) as hasty,
    ):
        first = asyncio.ensure_future(client.embed(PIXELS[:1]))
        await slow.wait()
        gone = asyncio.ensure_future(client.embed(PIXELS[:2]))
        with pytest.raises(DeadlinePassed):
            await hasty.embed(PIXELS[:3])
        gone.cancel()
        await asyncio.sleep(0.1)
        slow.go.release(2)
        await first
        assert (await client.embed(PIXELS)).shape == (4, DIM)
        assert slow.sizes == [1, 4]


async def test_a_drain_answers_what_was_accepted_and_refuses_more(
    bundle_path: Path, slow: Slow
) -> None:
    config = ServeConfig(bundle=bundle_path, port=0, inference_workers=1)
    async with (
        serving(config) as running,
        AsyncClient(running.address, retry=ONCE) as client,
        AsyncClient(running.address, retry=ONCE) as other,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="byol.v1.Embedder"))
        assert (await watch.read()).status == SERVING
        accepted = asyncio.ensure_future(client.embed(PIXELS))
        await slow.wait()
        drained = asyncio.ensure_future(running.drain(20))
        assert (await watch.read()).status == NOT_SERVING
        with pytest.raises(Unavailable):
            await other.encoder()
        assert not drained.done()
        slow.go.release()
        assert (await accepted).shape == (4, DIM)
        async with asyncio.timeout(5):  # an open watch does not hold it up
            assert await drained


async def test_a_drain_ends_at_its_limit(bundle_path: Path, slow: Slow) -> None:
    config = ServeConfig(bundle=bundle_path, port=0, inference_workers=1, drain_seconds=0.1)
    async with serving(config) as running, AsyncClient(running.address, retry=ONCE) as client:
        stuck = asyncio.ensure_future(client.embed(PIXELS))
        await slow.wait()
        assert not await running.drain(0.1)
        with pytest.raises(ByolError):
            await stuck
        slow.go.release()


async def test_a_second_server_on_the_port_or_the_store_is_refused(
    bundle_path: Path, tmp_path: Path
) -> None:
    config = ServeConfig(bundle=bundle_path, store=tmp_path / "store", port=0)
    async with serving(config) as running:
        with pytest.raises(StoreLocked):
            async with serving(config):
                pass
        port = int(running.address.rpartition(":")[2])
        with pytest.raises(InvalidConfig, match=f"cannot listen on 127.0.0.1:{port}"):
            async with serving(ServeConfig(bundle=bundle_path, port=port)):
                pass
    async with serving(config):  # and both are free again
        pass


async def test_a_damaged_bundle_never_becomes_ready(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    bundle.model_path.write_bytes(bundle.model_path.read_bytes()[:-7])
    with pytest.raises(InvalidBundle, match="truncated or altered"):
        async with serving(ServeConfig(bundle=bundle.path, port=0)):
            pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither bundle nor store"),
        ({"store": Path("s"), "port": 70000}, r"port 70000 is outside 0\.\.65535"),
        ({"store": Path("s"), "max_batch": -1}, "max_batch -1"),
        ({"store": Path("s"), "host": ""}, "host is empty"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        ServeConfig(**settings)


def test_tls_files_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="tls cert"):
        TlsConfig(cert=tmp_path / "none", key=tmp_path / "none")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and a server's and a client's certificate signed by it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make certificates")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for name in ("server", "client"):
        openssl(
            *("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr"),
            *("-subj", f"/CN={name}"),
        )
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key"),
            *("-CAcreateserial", "-extfile", "names", "-out", f"{name}.pem"),
        )
    return folder


@pytest.mark.parametrize("mutual", [False, True])
async def test_tls(bundle_path: Path, certificates: Path, mutual: bool) -> None:
    tls = TlsConfig(
        cert=certificates / "server.pem",
        key=certificates / "server.key",
        client_ca=certificates / "ca.pem" if mutual else None,
    )
    anybody = ClientTls(ca=certificates / "ca.pem")
    known = ClientTls(
        ca=certificates / "ca.pem",
        cert=certificates / "client.pem",
        key=certificates / "client.key",
    )
    async with serving(ServeConfig(bundle=bundle_path, port=0, tls=tls)) as running:
        async with AsyncClient(running.address, tls=known, timeout=10) as client:
            np.testing.assert_allclose(await client.embed(PIXELS), reference(PIXELS), atol=1e-5)
        async with AsyncClient(running.address, tls=anybody, timeout=10, retry=ONCE) as client:
            if mutual:
                with pytest.raises(Unavailable):
                    await client.encoder()
            else:
                assert (await client.encoder()).dim == DIM
        async with AsyncClient(running.address, timeout=10, retry=ONCE) as client:
            with pytest.raises(Unavailable):
                await client.encoder()


MAIN = """
import pathlib, sys, time
from byol_serving.config import ServeConfig
from byol_serving import server, server_parts
class Slow(server_parts.Encoder):
    def embed(self, pixels):
        if len(pixels) == 3:
            print("busy", flush=True)
            time.sleep(float(sys.argv[3]))
        return super().embed(pixels)
server_parts.Encoder = Slow
bundle, store = map(pathlib.Path, sys.argv[1:3])
config = ServeConfig(bundle=bundle, store=store, port=0, inference_workers=1)
sys.exit(server.run_server(config, lambda address: print(address, flush=True)))
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_drains_and_a_second_one_stops_at_once(
    bundle_path: Path, tmp_path: Path, signals: int
) -> None:
    seconds = "0.7" if signals == 1 else "30"
    command = [sys.executable, "-c", MAIN, str(bundle_path), str(tmp_path / "store"), seconds]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        answers: list[Any] = []

        def ask() -> None:
            with Client(address, retry=ONCE, timeout=20) as client:
                try:
                    answers.append(client.embed([png(each) for each in PIXELS[:3]]))
                except ByolError as error:
                    answers.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        assert process.stdout.readline() == "busy\n"
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert process.wait(10) == signals - 1
        asking.join(10)
        (answer,) = answers
        if signals == 1:
            np.testing.assert_allclose(answer, reference(PIXELS[:3]), atol=1e-5)
        else:
            assert isinstance(answer, Unavailable)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
