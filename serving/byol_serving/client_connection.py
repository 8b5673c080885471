"""How both clients send: one channel, a deadline that spans all tries, tries with backoff."""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from google.protobuf.message import Message

from byol_serving import client_calls as calls
from byol_serving.client_calls import Call, Retry
from byol_serving.client_channel import OPTIONS, ClientTls, bearer, byol_error, environment_tls
from byol_serving.client_trace import traced
from byol_serving.rpc.pools import in_order

In = TypeVar("In")
Out = TypeVar("Out")
Answer = TypeVar("Answer", bound=Message)


class Connection:
    """What `Client` sends by. Thread-safe."""

    def __init__(
        self,
        address: str,
        *,
        timeout: float = 60.0,
        retry: Retry | None = None,
        tls: ClientTls | None = None,
        token: str | None = None,
        batch_size: int = 64,
        concurrency: int = 4,
    ) -> None:
        """Connects with the first call.

        Args:
            address: host:port.
            timeout: seconds for a call with all its tries.
            retry: how often and how fast to try again.
            tls: without it what BYOL_TLS_CA, BYOL_TLS_CERT and BYOL_TLS_KEY name, else plain text.
            token: to show with each call; by default that of BYOL_TOKEN.
            batch_size: images in one request; longer lists are split.
            concurrency: requests in flight for a list that was split.
        """
        tls = tls or environment_tls()
        self._credentials = bearer(token)
        self._channel = (
            grpc.insecure_channel(address, OPTIONS)
            if tls is None
            else grpc.secure_channel(address, tls.credentials(), OPTIONS)
        )
        self._timeout = timeout
        self._retry = retry or Retry()
        self._batch_size = batch_size
        self._concurrency = concurrency
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="byol-client")
        self._methods: dict[str, Callable[..., Any]] = {}

    def close(self) -> None:
        """Ends the connection."""
        self._pool.shutdown(cancel_futures=True)
        self._channel.close()

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()

    def _send(self, call: Call[Out], *, offset: int = 0) -> Out:
        """Sends a call, again where that is safe and promises something."""
        with traced(call.method) as trace:
            metadata = (*self._credentials, *trace)
            return self._try(call, offset, metadata)

    def _try(self, call: Call[Out], offset: int, metadata: Sequence[tuple[str, str]]) -> Out:
        send = self._method(call)
        deadline = time.monotonic() + self._timeout
        for tried in itertools.count(1):
            try:
                left = max(0.0, deadline - time.monotonic())
                return call.parse(send(call.request, timeout=left, metadata=metadata))
            except grpc.RpcError as failure:
                error = byol_error(failure)
                pause = self._retry.pause(error, call, tried, deadline - time.monotonic())
                if pause is None:
                    raise calls.moved(error, offset) from failure
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _method(self, call: Call[Any]) -> Callable[..., Any]:
        if (known := self._methods.get(call.method)) is None:
            known = self._methods[call.method] = self._channel.unary_unary(
                call.method,
                request_serializer=type(call.request).SerializeToString,
                response_deserializer=call.answer.FromString,
            )
        return known

    def _stream(
        self, method: str, requests: Iterator[Message], answer: type[Answer]
    ) -> Iterator[Answer]:
        """Answers of a two-way stream, in order. No timeout, and nothing is tried again."""
        send: Any = self._channel.stream_stream(
            method,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        answers = send(requests, metadata=self._credentials)
        try:
            yield from answers
        except grpc.RpcError as failure:
            raise byol_error(failure) from failure
        finally:
            answers.cancel()

    def _spread(self, send: Callable[[In], Out], parts: Iterable[In]) -> Iterator[Out]:
        """Sends parts, a few at a time, and yields the answers in order."""
        parts = iter(parts)
        first = list(itertools.islice(parts, 2))
        if len(first) < 2:  # a lone part needs no thread
            yield from map(send, first)
            return
        pending: deque[Future[Out]] = deque()
        try:
            for part in itertools.chain(first, parts):
                if len(pending) == self._concurrency:
                    yield pending.popleft().result()
                pending.append(self._pool.submit(send, part))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class AsyncConnection:
    """What `AsyncClient` sends by, on one event loop."""

    def __init__(
        self,
        address: str,
        *,
        timeout: float = 60.0,
        retry: Retry | None = None,
        tls: ClientTls | None = None,
        token: str | None = None,
        batch_size: int = 64,
        concurrency: int = 4,
    ) -> None:
        """Connects with the first call.

        Args:
            address: host:port.
            timeout: seconds for a call with all its tries.
            retry: how often and how fast to try again.
            tls: without it what BYOL_TLS_CA, BYOL_TLS_CERT and BYOL_TLS_KEY name, else plain text.
            token: to show with each call; by default that of BYOL_TOKEN.
            batch_size: images in one request; longer lists are split.
            concurrency: requests in flight for a list that was split.
        """
        tls = tls or environment_tls()
        self._credentials = bearer(token)
        self._channel = (
            grpc.aio.insecure_channel(address, OPTIONS)
            if tls is None
            else grpc.aio.secure_channel(address, tls.credentials(), OPTIONS)
        )
        self._timeout = timeout
        self._retry = retry or Retry()
        self._batch_size = batch_size
        self._concurrency = concurrency
        self._methods: dict[str, Callable[..., Any]] = {}

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes it."""
        await self.close()

    async def _send(self, call: Call[Out], *, offset: int = 0) -> Out:
        """Sends a call, again where that is safe and promises something."""
        with traced(call.method) as trace:
            metadata = (*self._credentials, *trace)
            return await self._try(call, offset, metadata)

    async def _try(self, call: Call[Out], offset: int, metadata: Sequence[tuple[str, str]]) -> Out:
        send = self._method(call)
        deadline = time.monotonic() + self._timeout
        for tried in itertools.count(1):
            try:
                left = max(0.0, deadline - time.monotonic())
                return call.parse(await send(call.request, timeout=left, metadata=metadata))
            except grpc.RpcError as failure:
                error = byol_error(failure)
                pause = self._retry.pause(error, call, tried, deadline - time.monotonic())
                if pause is None:
                    raise calls.moved(error, offset) from failure
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    def _method(self, call: Call[Any]) -> Callable[..., Any]:
        if (known := self._methods.get(call.method)) is None:
            known = self._methods[call.method] = self._channel.unary_unary(
                call.method,
                request_serializer=type(call.request).SerializeToString,
                response_deserializer=call.answer.FromString,
            )
        return known

    def _spread(
        self, send: Callable[[In], Awaitable[Out]], parts: Iterable[In]
    ) -> AsyncGenerator[Out]:
        """Sends parts, a few at a time, and yields the answers in order."""
        return in_order(_read_aside(parts), send, window=self._concurrency)


async def _read_aside(parts: Iterable[In]) -> AsyncGenerator[In]:
    """Iterates in a thread, because the next part may have to be read from files."""
    source = iter(parts)
    while part := await asyncio.to_thread(lambda: list(itertools.islice(source, 1))):
        yield part[0]
