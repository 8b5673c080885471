"""Calls that another process answers: passed on as bytes, with everything that belongs to them.

Deadline and cancellation go along with the call; what comes back, failures with their details and
trailing metadata included, is the caller's answer unchanged (see `calls`).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from byol_serving.rpc.calls import TRACE_KEY, deadline_of
from byol_serving.rpc.pools import in_order

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Prepare: TypeAlias = Callable[[Any, float | None, bool], Awaitable[None]]
"""Changes a request in place before it is passed on. Told the deadline, and whether to wait for
room in the queue."""

CHANNEL_OPTIONS = (
    # What comes in was bounded where it came from, and vectors may be larger than their images.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_reconnect_backoff_ms", 500),
)
"""Of channels and servers between processes of one server."""


class Forwarder:
    """Answers methods by asking another process for them."""

    def __init__(self, channel: grpc.aio.Channel, *, stream_window: int) -> None:
        """Connects with the first call."""
        self._channel, self._window = channel, stream_window

    def handler(
        self, service: ServiceDescriptor, prepare: Mapping[str, Prepare]
    ) -> grpc.GenericRpcHandler:
        """All methods of a service, for a server; those named in `prepare` are parsed."""
        handlers = {
            each.name: self._method(each, prepare.get(each.name)) for each in service.methods
        }
        return grpc.method_handlers_generic_handler(service.full_name, handlers)

    def _method(
        self, method: MethodDescriptor, prepare: Prepare | None
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        path = f"/{method.containing_service.full_name}/{method.name}"
        parse: Callable[[bytes], Any] = bytes  # which leaves bytes as they are
        if prepare is not None:
            parse = GetMessageClass(method.input_type).FromString
        if method.client_streaming:
            stream = self._stream(path, prepare)
            return grpc.stream_stream_rpc_method_handler(stream, parse)
        return grpc.unary_unary_rpc_method_handler(self._unary(path, prepare), parse)

    def _unary(self, path: str, prepare: Prepare | None) -> Any:
        call: Any = self._channel.unary_unary(path)

        async def unary(request: Any, context: Context) -> Any:
            data = await _prepared(request, prepare, deadline_of(context), wait=False)
            return await call(data, timeout=context.time_remaining(), metadata=_along(context))

        return unary

    def _stream(self, path: str, prepare: Prepare | None) -> Any:
        begin: Any = self._channel.stream_stream(path)

        async def stream(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            deadline = deadline_of(context)
            call = begin(timeout=context.time_remaining(), metadata=_along(context))
            prepared = in_order(
                requests,
                lambda each: _prepared(each, prepare, deadline, wait=True),
                window=self._window,
            )
            sending = asyncio.ensure_future(_send(call, prepared))
            try:
                async for answer in call:
                    yield answer
                # A request that could not be prepared ended the sending, and this is its turn.
                await sending
            finally:
                call.cancel()
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

        return stream


async def _send(call: Any, requests: Any) -> None:
    """Sends them all. What was sent before one that cannot be prepared is answered all the same."""
    try:
        async with aclosing(requests):
            async for each in requests:
                try:
                    await call.write(each)
                except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
                    return  # the call has ended; its answers say why
    finally:
        await call.done_writing()


async def _prepared(
    request: Any, prepare: Prepare | None, deadline: float | None, *, wait: bool
) -> bytes:
    if prepare is None:
        return bytes(request)
    await prepare(request, deadline, wait)
    message: Message = request
    return message.SerializeToString()


def _along(context: Context) -> tuple[tuple[str, str], ...]:
    """The request's id, as it will be answered with, and its trace."""
    known = dict(context.invocation_metadata() or ())
    trace = ((TRACE_KEY, str(known[TRACE_KEY])),) if TRACE_KEY in known else ()
    answer: Any = context.trailing_metadata()
    return (*((str(key), str(value)) for key, value in answer), *trace)
