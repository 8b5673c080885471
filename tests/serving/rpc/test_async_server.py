"""The server that asks gRPC's core itself, with handlers of every kind and clients of gRPC."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest

from byol_serving.rpc.async_server import AsyncServer
from byol_serving.rpc.calls import Calls
from byol_serving.rpc.server_call import ServerCall

HOST = "127.0.0.1"
OWN = (("grpc.use_local_subchannel_pool", 1),)
"""A connection for each channel."""
LIMIT = 4096
"""Bytes of a message."""
OK = grpc.StatusCode.OK


class Service:
    """Handlers that do little, and what they have seen."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.left: list[str] = []
        self.written = 0

    async def echo(self, request: bytes, context: Any) -> bytes:
        return request

    async def wait(self, request: bytes, context: Any) -> bytes:
        self.begun.set()
        try:
            await asyncio.sleep(float(request))
        except asyncio.CancelledError:
            self.left.append("wait")
            raise
        return b"waited"

    async def fail(self, request: bytes, context: Any) -> bytes:
        raise LookupError("a secret")

    async def refuse(self, request: bytes, context: ServerCall) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, "kein Schlüssel", (("x-why", "because"),))

    async def tell(self, request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("x-peer", context.peer()),))
        sent = dict(context.invocation_metadata())
        return f"{sent.get('x-name')} {context.time_remaining()}".encode()

    async def give_up(self, request: bytes, context: Any) -> bytes:
        raise asyncio.CancelledError  # as who waits for a task of another's, and that is cancelled

    async def large(self, request: bytes, context: Any) -> bytes:
        return bytes(LIMIT + 1)

    async def double(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        try:
            async for each in requests:
                yield each
                yield each
        finally:
            self.left.append("double")

    async def forever(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        self.begun.set()
        try:
            while True:
                yield bytes(LIMIT)
                self.written += 1
        finally:
            self.left.append("forever")

    async def count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for number in range(int(request)):
            yield str(number).encode()

    async def watch(self, request: bytes, context: Any) -> None:
        for number in range(int(request)):
            await context.write(str(number).encode())


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[Service, AsyncServer, str]]:
    """A started server, and its address."""
    service = Service()
    unary: Any = grpc.unary_unary_rpc_method_handler
    many: Any = grpc.stream_stream_rpc_method_handler
    one_to_many: Any = grpc.unary_stream_rpc_method_handler
    handlers = {
        **{name: unary(getattr(service, name)) for name in UNARY},
        **{name: many(getattr(service, name)) for name in ("double", "forever")},
        **{name: one_to_many(getattr(service, name)) for name in ("count", "watch")},
    }
    limits = [(f"grpc.max_{way}_message_length", LIMIT) for way in ("send", "receive")]
    server = AsyncServer(Calls(), limits)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", handlers)])
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    try:
        yield service, server, f"{HOST}:{port}"
    finally:
        async with asyncio.timeout(10):  # it would wait for calls that something keeps alive
            await server.stop(None)


UNARY = ("echo", "wait", "fail", "refuse", "tell", "large", "give_up")


@pytest.fixture
async def running() -> AsyncIterator[tuple[Service, AsyncServer, grpc.aio.Channel]]:
    """A server, and a channel to it."""
    async with (
        listening() as (service, server, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield service, server, channel


Running = tuple[Service, AsyncServer, grpc.aio.Channel]


def ask(channel: grpc.aio.Channel, method: str, request: bytes = b"", **more: Any) -> Any:
    """A unary call that has begun."""
    call: Any = channel.unary_unary(f"/test/{method}")
    return call(request, **more)


def stream(channel: grpc.aio.Channel, method: str, **more: Any) -> Any:
    """A two-way stream that has begun."""
    call: Any = channel.stream_stream(f"/test/{method}")
    return call(**more)


async def refused(call: Any) -> grpc.aio.AioRpcError:
    """The error of a call."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def until(found: Any) -> None:
    """Waits until it is true, or fails."""
    async with asyncio.timeout(10):
        while not found():  # noqa: ASYNC110  # what is waited for knows nothing of events
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("connections", [1, 40])
async def test_each_of_many_clients_gets_its_own_answer(connections: int) -> None:
    async with listening() as (_, _, address), AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address, OWN))
            for _ in range(connections)
        ]

        async def client(number: int) -> None:
            for turn in range(20):
                wanted = f"{number} {turn}".encode()
                assert await ask(channels[number % connections], "echo", wanted) == wanted

        await asyncio.gather(*map(client, range(80)))
        await asyncio.sleep(0.1)  # the loop has stopped to ask, and is woken
        assert await ask(channels[0], "echo", b"later") == b"later"


async def test_what_goes_along_with_a_call(running: Running) -> None:
    _, _, channel = running
    call = ask(channel, "tell", metadata=(("x-name", "Ada"),))
    assert await call == b"Ada None"
    [(key, peer)] = await call.trailing_metadata()
    assert key == "x-peer"
    assert peer.startswith("ipv4:127.0.0.1:")
    _, left = (await ask(channel, "tell", timeout=20)).split()
    assert 10 < float(left) < 21  # gRPC rounds what it sends


async def test_streams_of_every_kind(running: Running) -> None:
    service, _, channel = running
    call = stream(channel, "double")
    for number in (1, 2, 3):  # answered one by one
        await call.write(bytes([number]))
        assert [await call.read() for _ in range(2)] == [bytes([number])] * 2
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is OK
    for method in ("count", "watch"):
        begin: Any = channel.unary_stream(f"/test/{method}")
        assert [each async for each in begin(b"5")] == [b"0", b"1", b"2", b"3", b"4"]
        assert [each async for each in begin(b"0")] == []
    assert service.left == ["double"]


async def test_errors_reach_the_client(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    _, _, channel = running
    error = await refused(ask(channel, "refuse"))
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "kein Schlüssel")
    assert ("x-why", "because") in tuple(error.trailing_metadata() or ())
    assert not caplog.records
    error = await refused(ask(channel, "fail"))
    assert error.code() is grpc.StatusCode.UNKNOWN
    assert "secret" not in str(error.details())
    assert "LookupError: a secret" in caplog.text
    error = await refused(ask(channel, "give_up", timeout=5))
    assert error.code() is grpc.StatusCode.CANCELLED
    assert await ask(channel, "echo", b"still here") == b"still here"


async def test_what_is_no_method_and_what_is_no_request(running: Running) -> None:
    _, _, channel = running
    error = await refused(ask(channel, "nothing"))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert error.details() == "there is no method /test/nothing"
    silent = stream(channel, "nothing")  # sends no request, and is answered all the same
    assert await silent.code() is grpc.StatusCode.UNIMPLEMENTED
    empty: Any = channel.stream_unary("/test/echo")
    error = await refused(empty(iter(())))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == "the call ended without a request; send one"


async def test_messages_over_the_limit(running: Running) -> None:
    service, _, channel = running
    assert len(await ask(channel, "echo", bytes(LIMIT))) == LIMIT
    for method, request in (("echo", bytes(LIMIT + 1)), ("large", b"")):
        error = await refused(ask(channel, method, request))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    call = stream(channel, "double")
    await call.write(bytes(LIMIT + 1))
    assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(lambda: service.left == ["double"])


@pytest.mark.parametrize("seconds", [None, 0.2])
async def test_who_leaves_or_is_late_ends_the_handler(
    running: Running, seconds: float | None
) -> None:
    service, _, channel = running
    call = ask(channel, "wait", b"60", timeout=seconds)
    await service.begun.wait()
    if seconds is None:
        call.cancel()
    else:
        assert (await refused(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: service.left == ["wait"])


@pytest.mark.parametrize("method", ["double", "forever"])
async def test_who_leaves_a_stream_ends_its_handler(running: Running, method: str) -> None:
    service, _, channel = running
    call = stream(channel, method)
    if method == "double":
        await call.write(b"1")
    await call.read()
    call.cancel()
    await until(lambda: service.left == [method])


async def test_a_slow_reader_holds_back_the_answers(running: Running) -> None:
    service, _, channel = running
    call = stream(channel, "forever")
    await service.begun.wait()
    last = -1
    while service.written > last:
        last = service.written
        await asyncio.sleep(0.3)
    assert last * LIMIT < 16 << 20
    for _ in range(last + 10):
        await call.read()
    assert service.written > last
    call.cancel()


async def test_a_stop_waits_for_the_present_calls_and_takes_no_more(running: Running) -> None:
    service, server, channel = running
    assert await server.wait_for_termination(0.05)
    call = ask(channel, "wait", b"0.5")
    await service.begun.wait()
    stopping = asyncio.ensure_future(server.stop(20))
    await asyncio.sleep(0.1)
    error = await refused(ask(channel, "echo", timeout=5))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert await call == b"waited"
    async with asyncio.timeout(5):
        await stopping
        assert not await server.wait_for_termination()
    await server.stop(None)


@pytest.mark.parametrize("patience", [0.2, None])
async def test_a_stop_cuts_off_who_takes_too_long(running: Running, patience: float | None) -> None:
    service, server, channel = running
    waiting, endless = ask(channel, "wait", b"60"), stream(channel, "forever")
    await service.begun.wait()
    await endless.read()
    patient = asyncio.ensure_future(server.stop(60))
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await server.stop(patience)
        await patient
    cut_off = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED
    assert (await refused(waiting)).code() in cut_off

    async def drained() -> None:
        while await endless.read():
            pass  # what had been sent before

    assert (await refused(drained())).code() in cut_off
    assert sorted(service.left) == ["forever", "wait"]


async def test_a_service_that_raises_leaves_the_others_alone(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    _, server, channel = running

    class Bad(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
            raise LookupError("a bad service")

    server.add_generic_rpc_handlers([Bad()])
    error = await refused(ask(channel, "nothing", timeout=0.5))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "a bad service" in caplog.text
    assert await ask(channel, "echo", b"well") == b"well"


def calls_alive() -> Sequence[ServerCall]:
    """Calls that something still refers to."""
    # Not isinstance, which some objects of other libraries answer with a warning.
    return [each for each in gc.get_objects() if type(each) is ServerCall]


async def test_calls_are_let_go_without_a_garbage_collection(running: Running) -> None:
    service, _, channel = running
    logging.disable()  # pytest keeps what is logged, tracebacks and all
    gc.collect()
    gc.disable()
    try:
        for method in ("echo", "fail", "refuse", "large", "nothing"):
            await asyncio.gather(
                *(ask(channel, method, b"1") for _ in range(20)), return_exceptions=True
            )
        for method in ("double", "forever"):
            call = stream(channel, method)
            await call.write(b"1")
            await call.read()
            call.cancel()
        await refused(ask(channel, "wait", b"60", timeout=0.1))
        await until(lambda: sorted(service.left) == ["double", "forever", "wait"])
        await until(lambda: not calls_alive())
    finally:
        gc.enable()
        logging.disable(logging.NOTSET)
