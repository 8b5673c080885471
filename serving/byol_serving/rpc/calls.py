"""What happens around every call: request id, status, one log line, and the count for draining."""

import asyncio
import logging
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from byol_serving.errors import ByolError, InvalidRequest, Unavailable
from byol_serving.rpc.auth import AUTHORIZATION_KEY, Gate
from byol_serving.rpc.status import ERROR_KEY, Pairs, code_of, trailers_of
from byol_serving.timing import STEPS, Step
from byol_serving.tokens import Token

REQUEST_ID_KEY = "x-request-id"
TRACE_KEY = "traceparent"
"""W3C Trace Context, section 3.2."""
_OURS = ("/byol.", "/inference.")

log = logging.getLogger("byol.rpc")

_GOOD_ID = re.compile(r"[\x21-\x7e]{1,128}")
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Calls:
    """Wraps every method of our services (see `AsyncServer`), so that none can be forgotten.

    Errors of the project's tree become their status; anything else becomes INTERNAL with a request
    id, and only the log has the traceback.
    """

    def __init__(
        self, watchers: "Sequence[Callable[[Call], None]]" = (), gate: Gate | None = None
    ) -> None:
        """Accepts calls at once.

        Args:
            watchers: told of each call when it was answered or given up.
            gate: who may call what; None: everybody everything.
        """
        self._watchers = watchers
        self._gate = gate or Gate(None)
        self.in_flight = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        """Whether new calls are refused."""
        return self._draining

    async def drain(self) -> None:
        """Refuses new calls from now on, and returns when the accepted ones are answered."""
        self._draining = True
        await self._idle.wait()

    def wrapped(self, method: str, handler: _Handler) -> _Handler:
        """The handler of a method, as it is to be called."""
        if not method.startswith(_OURS):  # health and reflection: as they are
            return handler
        return self._wrap(method, handler)

    def _wrap(self, method: str, handler: _Handler) -> _Handler:
        # Requests are parsed in here: bytes that gRPC itself cannot parse become UNKNOWN.
        parse = _parser(method, handler)
        coders = (None, handler.response_serializer)
        if handler.unary_unary is not None:
            answer: Any = handler.unary_unary

            async def unary(data: bytes, context: _Context) -> Any:
                call = Call(self, method, context)
                try:
                    call.token = self._gate.admit(method, call.authorization)
                    response = await answer(parse(data), context)
                except BaseException as error:
                    await call.fail(error)
                else:
                    call.end("OK")
                    return response

            return grpc.unary_unary_rpc_method_handler(unary, *coders)
        if handler.stream_stream is None:
            raise NotImplementedError(f"{method} is neither unary nor a two-way stream")
        stream: Any = handler.stream_stream

        async def streaming(datas: AsyncIterator[bytes], context: _Context) -> AsyncIterator[Any]:
            call = Call(self, method, context)

            async def paced() -> AsyncIterator[Any]:
                first = True
                async for each in datas:
                    if not first:  # which `admit` has counted
                        await self._gate.pace(call.token)
                    first = False
                    yield parse(each)

            requests = paced()
            try:
                self._admit()
                call.token = self._gate.admit(method, call.authorization)
                async with aclosing(stream(requests, context)) as responses:
                    async for response in responses:
                        yield response
            except BaseException as error:
                await call.fail(error)
            else:
                call.end("OK")

        return grpc.stream_stream_rpc_method_handler(streaming, *coders)

    @property
    def watched(self) -> bool:
        """Whether anybody asks what happened in a call."""
        return bool(self._watchers)

    def began(self) -> None:
        """Counts a call in."""
        if not self.in_flight:
            self._idle.clear()
        self.in_flight += 1

    def ended(self, call: "Call") -> None:
        """Counts a call out, and tells those who watch."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()
        for watch in self._watchers:
            watch(call)

    def _admit(self) -> None:
        if self._draining:
            raise Unavailable("the server is draining; ask another, or again later")


def _parser(method: str, handler: _Handler) -> Callable[[bytes], Any]:
    deserialize: Any = handler.request_deserializer

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            raise InvalidRequest(
                f"{len(data)} bytes are no request of {method}; send the message that"
                " protos/byol/v1/byol.proto has for it"
            ) from error

    return parse


class Call:
    """One call from its first to its last moment; what those who watch are told."""

    __slots__ = (
        "_calls",
        "_context",
        "_metadata",
        "_request_id",
        "began",
        "code",
        "ended",
        "error",
        "method",
        "steps",
        "token",
    )

    def __init__(self, calls: Calls, method: str, context: _Context) -> None:
        """Begins now."""
        self._calls, self._context = calls, context
        self.method = method
        """As gRPC has it: /byol.v1.Embedder/Embed."""
        self.began = self.ended = time.perf_counter()
        self._metadata: dict[str, Any] = dict(context.invocation_metadata() or ())
        self._request_id = ""
        self.token: Token | None = None
        """The caller's."""
        self.code = self.error = ""
        """The status, and the name of the error's class, if there was one."""
        self.steps: list[Step] = []
        if calls.watched:
            STEPS.set(self.steps)  # of this call's own task, and of those it starts
        # With an error in any case; else only if there is something to find with the id, as
        # trailers made an empty call 7 to 12% dearer.
        if REQUEST_ID_KEY in self._metadata or log.isEnabledFor(logging.INFO):
            context.set_trailing_metadata(self._trailers)
        calls.began()

    @property
    def request_id(self) -> str:
        """Made when it is first asked for, which most calls that succeed are not."""
        self._request_id = self._request_id or _request_id(self._metadata.get(REQUEST_ID_KEY))
        return self._request_id

    @property
    def authorization(self) -> str | bytes | None:
        """What the caller shows to be let in."""
        return self._metadata.get(AUTHORIZATION_KEY)

    @property
    def trace_parent(self) -> str:
        """W3C trace context of the caller; empty if there is none."""
        return str(self._metadata.get(TRACE_KEY, ""))

    @property
    def _trailers(self) -> Pairs:
        return ((REQUEST_ID_KEY, self.request_id),)

    @property
    def caller(self) -> str:
        """Name of the caller's token; empty where there is none."""
        return self.token.name if self.token else ""

    async def fail(self, error: BaseException) -> NoReturn:
        """Ends the call with the status of `error`."""
        match error:
            case ByolError():
                code = code_of(error)
                self.end(code.name, type(error).__name__, str(error))
                await self._context.abort(code, str(error), (*self._trailers, *trailers_of(error)))
            case grpc.aio.AioRpcError():  # another process's answer, as it is
                code, text = error.code(), error.details() or ""
                trailers: Any = tuple(error.trailing_metadata() or ())
                found = dict(trailers) | dict(self._trailers)
                self.end(code.name, found.get(ERROR_KEY, code.name), text)
                await self._context.abort(code, text, tuple(found.items()))
            case Exception() if not isinstance(error, grpc.aio.AbortError):
                log.error(
                    "unexpected error request_id=%s",
                    self.request_id,
                    exc_info=error,
                    extra={"request_id": self.request_id},
                )
                self.end("INTERNAL", type(error).__name__, "unexpected")
                text = (
                    "internal error; the server's log has the details under request id"
                    f" {self.request_id}"
                )
                await self._context.abort(grpc.StatusCode.INTERNAL, text, self._trailers)
            case _:  # cancelled by the client, by its deadline, or by the end of the drain
                self.end("CANCELLED", "Cancelled")
                try:
                    raise error
                finally:
                    del error  # its traceback would lead back to it, and keep the request

    def end(self, code: str, error: str = "", reason: str = "") -> None:
        """Counts the call out and writes its line."""
        self.code, self.error = code, error
        self.ended = time.perf_counter()
        self._calls.ended(self)
        if not log.isEnabledFor(logging.INFO):
            return
        took = (self.ended - self.began) * 1000
        log.info(
            "method=%s code=%s ms=%.2f request_id=%s peer=%s%s%s",
            self.method,
            code,
            took,
            self.request_id,
            self._context.peer(),
            f" caller={self.caller}" if self.caller else "",
            f" reason={reason!r}" if reason else "",
            extra={
                "method": self.method,
                "code": code,
                "ms": took,
                "request_id": self.request_id,
                "peer": self._context.peer(),
                "caller": self.caller,
                "reason": reason,
            },
        )


def _request_id(given: str | bytes | None) -> str:
    """The caller's own id where it is printable and short, else a new one."""
    if isinstance(given, str) and _GOOD_ID.fullmatch(given):
        return given
    return f"{random.getrandbits(64):016x}"


def deadline_of(context: _Context) -> float | None:
    """The caller's deadline on time.monotonic()'s clock, or None."""
    left = context.time_remaining()
    return None if left is None else time.monotonic() + left
