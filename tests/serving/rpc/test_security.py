"""Who gets in: tokens, scopes and rates over real gRPC; TLS that is renewed; open addresses."""

import asyncio
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from byol_serving.client import AsyncClient, ClientTls, Retry, SearchOptions
from byol_serving.client_admin import AdminClient
from byol_serving.config import ServeConfig, TlsConfig, is_loopback
from byol_serving.errors import Forbidden, InvalidConfig, Overloaded, Unauthenticated, Unavailable
from byol_serving.pb.byol.v1 import admin_pb2, byol_pb2
from byol_serving.pb.inference import grpc_service_pb2
from byol_serving.rpc.auth import scope_of
from byol_serving.server import serving
from byol_serving.tokens import Scope, Token, add_token, new_token
from serving.certificates import Authority
from serving.support import random_pixels, reference

PIXELS = random_pixels(3)
ONCE = Retry(attempts=1)

AddToken = Callable[..., str]


@pytest.fixture
def tokens(tmp_path: Path) -> tuple[Path, AddToken]:
    path = tmp_path / "tokens.toml"

    def add(name: str, *scopes: Scope, rate: float | None = None) -> str:
        secret, digest = new_token()
        add_token(path, Token(name=name, sha256=digest, scopes=frozenset(scopes), rate=rate))
        return secret

    return path, add


async def test_scopes_decide_who_may_call_what(
    bundle_path: Path, tmp_path: Path, tokens: tuple[Path, AddToken]
) -> None:
    path, add = tokens
    reader, writer, chief = add("r", "read"), add("w", "write"), add("a", "admin", "read")
    config = ServeConfig(bundle=bundle_path, store=tmp_path / "store", tokens=path, port=0)
    async with serving(config) as running:

        def connect(token: str) -> AsyncClient:
            return AsyncClient(running.address, token=token, retry=ONCE, timeout=20)

        async with connect("") as nobody, connect("byol_wrong") as stranger:
            with pytest.raises(Unauthenticated, match="asks for a token"):
                await nobody.embed(PIXELS)
            with pytest.raises(Unauthenticated, match="not known here"):
                await stranger.embed(PIXELS)
        async with connect(reader) as client:
            np.testing.assert_allclose(await client.embed(PIXELS), reference(PIXELS), atol=1e-5)
            assert [each async for each in client.embed_stream(list(PIXELS))]
            with pytest.raises(Forbidden, match=r"'r' has the scopes read.*needs write"):
                await client.create_collection("c")
        async with connect(writer) as client:
            await client.create_collection("c")
            await client.upsert("c", ["a"], images=PIXELS[:1])
            with pytest.raises(Forbidden, match="needs read"):
                await client.collections()
        with AdminClient(running.address, token=reader, retry=ONCE) as blocking:
            batches = [reference(PIXELS[:1])] * 2
            answers = blocking.search_stream("c", batches, SearchOptions(k=1))
            assert [hits[0].id for (hits,) in await asyncio.to_thread(list, answers)] == ["a", "a"]
        with AdminClient(running.address, token=chief, retry=ONCE) as admin:
            assert (await asyncio.to_thread(admin.models))[0].name == "tiny"
        with (
            AdminClient(running.address, token=reader, retry=ONCE) as admin,
            pytest.raises(Forbidden, match="needs admin"),
        ):
            await asyncio.to_thread(admin.models)
        async with grpc.aio.insecure_channel(running.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_every_method_has_the_scope_it_should() -> None:
    scopes = {
        f"{service.name}/{method.name}": scope_of(f"/{service.full_name}/{method.name}")
        for file in (byol_pb2, admin_pb2, grpc_service_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    for name, scope in scopes.items():
        service, method = name.split("/")
        match service:
            case "Admin":
                assert scope == "admin"
            case "Embedder" | "GRPCInferenceService":
                assert scope == "read", name
            case _ if method in ("Backup", "Restore"):
                assert scope == "admin"
            case _ if method.startswith(("Create", "Delete", "Drop", "Set", "Upsert")):
                assert scope == "write"
            case _:
                assert scope == "read", f"{name}: say in rpc/auth.py what it needs"
    assert scope_of("/byol.v1.Collections/Whatever") == "admin"


async def flood(client: AsyncClient) -> None:
    for _ in range(2000):
        await client.encoder()


async def test_a_rate_refuses_calls_with_a_hint_and_holds_streams_back(
    bundle_path: Path, tokens: tuple[Path, AddToken]
) -> None:
    path, add = tokens
    slow, other = add("slow", "read", rate=20.0), add("other", "read")
    config = ServeConfig(bundle=bundle_path, tokens=path, port=0)
    async with serving(config) as running:
        async with (
            AsyncClient(running.address, token=slow, retry=ONCE) as client,
            AsyncClient(running.address, token=other, retry=ONCE) as free,
        ):
            with pytest.raises(Overloaded, match="'slow' is over its rate of 20") as refused:
                await flood(client)
            assert 0 < refused.value.retry_after_s <= 0.06
            await free.encoder()
        async with AsyncClient(running.address, token=slow, timeout=20) as patient:
            await patient.encoder()  # waits as long as the hint says
        stub = "/byol.v1.Embedder/EmbedStream"
        async with grpc.aio.insecure_channel(running.address) as channel:
            stream: Any = channel.stream_stream(stub)
            data = byol_pb2.EmbedRequest(
                pixels=byol_pb2.Tensor(data=PIXELS.tobytes(), shape=PIXELS.shape)
            ).SerializeToString()
            await asyncio.sleep(0.2)
            began = time.monotonic()
            call = stream(iter([data] * 30), metadata=(("authorization", f"Bearer {slow}"),))
            assert len([each async for each in call]) == 30
            assert time.monotonic() - began > 0.3  # 20 at once at most, and then 20 a second


async def test_the_log_names_the_caller_and_never_the_token(
    bundle_path: Path, tokens: tuple[Path, AddToken], caplog: pytest.LogCaptureFixture
) -> None:
    path, add = tokens
    secret = add("alice", "read")
    config = ServeConfig(bundle=bundle_path, tokens=path, port=0)
    with caplog.at_level(logging.DEBUG):
        async with (
            serving(config) as running,
            AsyncClient(running.address, token=secret) as client,
            AsyncClient(running.address, token=secret[:-1], retry=ONCE) as wrong,
        ):
            await client.encoder()
            with pytest.raises(Unauthenticated):
                await wrong.encoder()
    assert "caller=alice" in caplog.text
    assert secret[:-1] not in caplog.text


@pytest.mark.parametrize(
    ("host", "settings", "missing"),
    [
        ("0.0.0.0", {}, "no TLS and neither tokens nor client certificates"),
        ("::", {"tokens": True}, "no TLS"),
        ("10.0.0.7", {"tls": True}, "neither tokens nor client certificates"),
        ("example.org", {}, "no TLS and neither tokens nor client certificates"),
        ("0.0.0.0", {"tls": True, "tokens": True}, None),
        ("0.0.0.0", {"mutual": True}, None),
        ("0.0.0.0", {"insecure": True}, None),
        ("127.0.0.1", {}, None),
        ("localhost", {}, None),
    ],
)
def test_an_open_address_needs_tls_and_tokens_or_says_so(
    tmp_path: Path, host: str, settings: dict[str, bool], missing: str | None
) -> None:
    cert, key = Authority(tmp_path).issue("server")
    tls = None
    if settings.get("tls") or settings.get("mutual"):
        client_ca = tmp_path / "ca.pem" if settings.get("mutual") else None
        tls = TlsConfig(cert=cert, key=key, client_ca=client_ca)
    chosen: dict[str, Any] = {
        "host": host,
        "tls": tls,
        "tokens": tmp_path / "t.toml" if settings.get("tokens") else None,
        "insecure": settings.get("insecure", False),
    }
    if missing is None:
        ServeConfig(store=tmp_path, **chosen)
    else:
        with pytest.raises(InvalidConfig, match=f"the server has {missing}; .*say --insecure"):
            ServeConfig(store=tmp_path, **chosen)


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "localhost.example.org")))


def common_name(address: str, ca: Path) -> str:
    """Of the certificate that a server shows now."""
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        shown = secure.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).subject.rfc4514_string().removeprefix("CN=")


async def test_a_renewed_certificate_is_taken_up_and_a_broken_one_is_not(
    bundle_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "byol.tls")
    authority = Authority(tmp_path)
    cert, key = authority.issue("first", stem="server")
    config = ServeConfig(bundle=bundle_path, port=0, tls=TlsConfig(cert=cert, key=key))
    async with serving(config) as running:

        async def shown() -> str:
            return await asyncio.to_thread(common_name, running.address, authority.ca)

        tls = ClientTls(ca=authority.ca)
        async with AsyncClient(running.address, tls=tls, timeout=20) as client:
            await client.encoder()
            assert await shown() == "first"
            key.write_text("half a renewal")
            os.utime(key, (1, 1))
            for _ in range(3):
                assert await shown() == "first"
            assert caplog.text.count("left as it was") == 1
            authority.issue("second", stem="server")
            for _ in range(3):
                assert await shown() == "second"
            assert caplog.text.count("took up") == 1
            await client.encoder()  # connections that stand are not cut


async def test_the_authority_of_clients_can_be_renewed_too(
    bundle_path: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    old, old_key = authority.issue("client")
    (tmp_path / "other").mkdir()
    newer = Authority(tmp_path / "other")
    new, new_key = newer.issue("client")
    clients = tmp_path / "clients.pem"
    clients.write_bytes(authority.ca.read_bytes())
    tls = TlsConfig(cert=cert, key=key, client_ca=clients)
    async with serving(ServeConfig(bundle=bundle_path, port=0, tls=tls)) as running:

        async def welcome(cert: Path, key: Path) -> bool:
            known = ClientTls(ca=authority.ca, cert=cert, key=key)
            async with AsyncClient(running.address, tls=known, timeout=5, retry=ONCE) as client:
                try:
                    await client.encoder()
                except Unavailable:
                    return False
                return True

        assert await welcome(old, old_key)
        assert not await welcome(new, new_key)
        clients.write_bytes(newer.ca.read_bytes())
        os.utime(clients, (1, 1))
        assert await welcome(new, new_key)
        assert not await welcome(old, old_key)


def test_tls_files_that_do_not_fit_are_refused_at_once(bundle_path: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, _ = authority.issue("a")
    _, key = authority.issue("b")
    config = ServeConfig(bundle=bundle_path, port=0, tls=TlsConfig(cert=cert, key=key))

    async def start() -> None:
        async with serving(config):
            pass

    with pytest.raises(InvalidConfig, match="cannot be used"):
        asyncio.run(start())


async def test_clients_take_tls_from_the_environment(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    mine, my_key = authority.issue("client")
    tls = TlsConfig(cert=cert, key=key, client_ca=authority.ca)
    async with serving(ServeConfig(bundle=bundle_path, port=0, tls=tls)) as running:
        for name, path in (("CA", authority.ca), ("CERT", mine), ("KEY", my_key)):
            monkeypatch.setenv(f"BYOL_TLS_{name}", str(path))
        async with AsyncClient(running.address, timeout=20) as client:
            np.testing.assert_allclose(await client.embed(PIXELS), reference(PIXELS), atol=1e-5)
