"""One call to the server, from gRPC's core to its handler and back."""

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NoReturn, TypeAlias

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # not in the stubs

log = logging.getLogger("byol.rpc")

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_ENDLESS_S = 1e12
"""Seconds since 1970; a deadline beyond is none."""
_NO_FLAGS = 0


class ServerCall:
    """A call as its handler knows it: as much of `grpc.aio.ServicerContext` as is used here, and by
    the services of grpc-health and grpc-reflection.

    Belongs to the event loop. Handlers get a request, or an iterator over them, and return an
    answer, yield answers, or `write` them.
    """

    __slots__ = (
        "_answered",
        "_answering",
        "_core",
        "_deadline",
        "_handler",
        "_is_open",
        "_loop",
        "_metadata",
        "_method",
        "_task",
        "_trailers",
    )

    def __init__(
        self,
        event: Any,
        method: str,
        handler: "Handler | None",
        is_open: Callable[[], bool],
    ) -> None:
        """The call that came with an event, not begun.

        Args:
            event: of gRPC's core.
            method: as gRPC has it: /byol.v1.Embedder/Embed.
            handler: None: there is no such method.
            is_open: whether gRPC's core still takes anything.
        """
        self._core: Any = event.call
        """None once the call has ended: the server stops only when all of these are gone."""
        self._deadline: float = event.call_details.deadline
        self._metadata: Metadata = event.invocation_metadata
        self._method, self._handler, self._is_open = method, handler, is_open
        self._loop = asyncio.get_running_loop()
        self._trailers: Metadata = ()
        self._answering = self._answered = False
        """Whether an answer, or the status, has been sent."""
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Starts the handler as soon as there is what it needs."""
        self._start(self._closed, cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS))
        if self._handler is None:
            self._end(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {self._method}")
        elif self._handler.request_streaming:
            self._task = self._loop.create_task(self._run(_Requests(self)))
        else:
            self._start(self._requested, cygrpc.ReceiveMessageOperation(_NO_FLAGS))

    def invocation_metadata(self) -> Metadata:
        """What the caller sent beside the request."""
        return self._metadata

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None: there is none."""
        return None if self._deadline > _ENDLESS_S else max(0.0, self._deadline - time.time())

    def peer(self) -> str:
        """Where the caller is, as gRPC writes it (ipv4:127.0.0.1:5000); empty if it has left."""
        return "" if self._core is None else str(self._core.peer(), "utf-8")

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        """Sent with the status."""
        self._trailers = trailing_metadata

    def trailing_metadata(self) -> Metadata:
        """What was set."""
        return self._trailers

    async def read(self) -> Any:
        """The next request of a stream; `grpc.aio.EOF` after the last."""
        event = await self._done(cygrpc.ReceiveMessageOperation(_NO_FLAGS))
        data = event.batch_operations[0].message()
        return grpc.aio.EOF if data is None else self._parsed(data)

    async def write(self, message: Any) -> None:
        """Sends an answer, and waits until gRPC takes the next."""
        sending = cygrpc.SendMessageOperation(self._serialized(message), _NO_FLAGS)
        if not (await self._done(*self._beginning(), sending)).success:
            raise asyncio.CancelledError("the client has left")

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()
    ) -> NoReturn:
        """Ends the call with an error.

        Raises:
            AbortError: grpc.aio's, in any case.
        """
        self._trailers = trailing_metadata or self._trailers
        self._end(code, details)
        raise grpc.aio.AbortError(f"{code.name}: {details}")

    def _closed(self, event: Any) -> None:
        """Nothing more comes, and where the client left or was late nothing can be sent either."""
        if self._task is None or self._task.done():
            self._let_go()
            return
        self._task.add_done_callback(self._let_go)
        if event.batch_operations[0].cancelled():
            self._task.cancel()

    def _let_go(self, task: object = None) -> None:
        """Refers to nothing any more that refers to this: garbage is collected rarely here."""
        self._core = self._task = None

    def _requested(self, event: Any) -> None:
        """The only request has come, or none will."""
        data = event.batch_operations[0].message()
        if self._core is None:
            return  # the client has left meanwhile
        if data is None:
            self._end(grpc.StatusCode.INTERNAL, "the call ended without a request; send one")
            return
        self._task = self._loop.create_task(self._run(data))

    async def _run(self, given: "bytes | _Requests") -> None:
        """The handler, and the end of the call."""
        handler: Any = self._handler
        last: tuple[Any, ...] = ()
        try:
            if handler.unary_unary is None:
                await self._answer_many(handler, given)
            else:
                response = await handler.unary_unary(self._parsed(given), self)
                last = (cygrpc.SendMessageOperation(self._serialized(response), _NO_FLAGS),)
        except asyncio.CancelledError:
            # By the client, who is told nothing any more, or by what the handler waited for.
            self._end(grpc.StatusCode.CANCELLED, "the call was cancelled")
            raise
        except grpc.aio.AbortError:
            pass  # the status has been sent
        except Exception as error:
            log.error("unexpected error in %s", self._method, exc_info=error)
            self._end(grpc.StatusCode.UNKNOWN, "unexpected error; the server's log has it")
        else:
            self._end(grpc.StatusCode.OK, "", *last)

    async def _answer_many(self, handler: Any, given: "bytes | _Requests") -> None:
        if handler.request_streaming:
            answers = handler.stream_stream(given, self)
        else:
            answers = handler.unary_stream(self._parsed(given), self)
        if inspect.isasyncgen(answers):
            async with aclosing(answers):
                async for each in answers:
                    await self.write(each)
        else:
            await answers  # it writes them itself

    def _parsed(self, data: Any) -> Any:
        parse: Any = self._handler and self._handler.request_deserializer
        return data if parse is None else parse(data)

    def _serialized(self, message: Any) -> bytes:
        serialize: Any = self._handler and self._handler.response_serializer
        data: bytes = message if serialize is None else serialize(message)
        return data

    def _end(self, code: grpc.StatusCode, details: str, *last: Any) -> None:
        """Sends the last answer, if there is one, and the status, once."""
        if self._answered:
            return
        self._answered = True
        status = cygrpc.SendStatusFromServerOperation(
            self._trailers, code.value[0], details, _NO_FLAGS
        )
        if self._core is not None and self._is_open():
            self._start(_nothing, *self._beginning(), *last, status)

    def _beginning(self) -> tuple[Any, ...]:
        """What goes before the first answer or the status."""
        if self._answering:
            return ()
        self._answering = True
        return (cygrpc.SendInitialMetadataOperation((), _NO_FLAGS),)

    async def _done(self, *operations: Any) -> Any:
        """The event that tells of the end of operations."""
        done: asyncio.Future[Any] = self._loop.create_future()

        def tell(event: Any) -> None:
            if not done.done():  # cancelled
                done.set_result(event)

        if self._core is None or not self._is_open():
            raise asyncio.CancelledError("the call has ended")
        self._start(tell, *operations)
        return await done

    def _start(self, tell: Callable[[Any], None], *operations: Any) -> None:
        if fault := self._core.start_server_batch(operations, tell):
            raise RuntimeError(f"gRPC refuses {operations} of {self._method}: error {fault}")


class _Requests:
    """The requests of a stream."""

    def __init__(self, call: ServerCall) -> None:
        self._call = call

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        request = await self._call.read()
        if request is grpc.aio.EOF:
            raise StopAsyncIteration
        return request


def _nothing(event: Any) -> None:
    """Handles the event of operations that nobody waits for."""
