"""Two ways to keep the event loop free and memory bounded: blocking calls, and ordered streams."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from byol_serving.errors import DeadlinePassed, Overloaded

In = TypeVar("In")
Out = TypeVar("Out")

_MAX_WAITING = 1024
"""Blocking calls accepted and not yet answered."""
_RETRY_S = 0.1


class BlockingCalls:
    """Runs blocking calls of the store in a few threads, in the order they came."""

    def __init__(self, workers: int) -> None:
        """Starts no thread yet."""
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="collections")
        self._accepted = 0

    async def run(self, call: Callable[[], Out], *, deadline: float | None = None) -> Out:
        """What `call` returns or raises. A call that has not begun is dropped with its caller.

        Raises:
            Overloaded: too many wait already.
            DeadlinePassed: before the call began.
        """
        if self._accepted >= _MAX_WAITING:
            raise Overloaded(
                f"{self._accepted} calls wait for the store, the limit; try again later", _RETRY_S
            )

        def begin() -> Out:
            if deadline is not None and deadline <= time.monotonic():
                raise DeadlinePassed("the deadline passed before the call began; allow more time")
            return call()

        self._accepted += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, begin)
        finally:
            self._accepted -= 1

    def close(self) -> None:
        """Waits for the calls that have begun, and ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


async def in_order(
    requests: AsyncIterator[In], work: Callable[[In], Awaitable[Out]], *, window: int
) -> AsyncGenerator[Out]:
    """Works on up to `window` requests at a time and answers in their order.

    No further request is read while the window is full, so that gRPC's flow control holds the
    sender back. The first error ends the answers; whatever was in flight is cancelled.
    """
    started: asyncio.Queue[asyncio.Future[Out] | None] = asyncio.Queue()
    slots = asyncio.Semaphore(window)
    source = aiter(requests)

    async def read() -> None:
        try:
            while True:
                await slots.acquire()
                started.put_nowait(asyncio.ensure_future(work(await anext(source))))
        except StopAsyncIteration:
            pass
        finally:
            started.put_nowait(None)

    reader = asyncio.ensure_future(read())
    current: asyncio.Future[Out] | None = None
    try:
        while (current := await started.get()) is not None:
            yield await current
            slots.release()
        await reader
    finally:
        await _cancel(reader, current)
        while not started.empty():
            await _cancel(started.get_nowait())


async def _cancel(*futures: asyncio.Future[None] | asyncio.Future[Out] | None) -> None:
    """Cancels them, and waits until they have let go; what they raise interests nobody."""
    left = [each for each in futures if each is not None]
    for future in left:
        future.cancel()
    await asyncio.gather(*left, return_exceptions=True)
