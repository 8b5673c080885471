"""Ordered streams with a window, and blocking calls off the loop."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from byol_serving.errors import DeadlinePassed
from byol_serving.rpc.pools import BlockingCalls, in_order


class Source:
    """Counts up, and remembers how far it was read."""

    def __init__(self, count: int, *, fails_at: int | None = None) -> None:
        self.read = 0
        self._count, self._fails_at = count, fails_at

    async def __aiter__(self) -> AsyncIterator[int]:
        for number in range(self._count):
            if number == self._fails_at:
                raise ValueError("broken sender")
            self.read += 1
            yield number


async def test_answers_keep_the_order_of_requests() -> None:
    async def work(number: int) -> int:
        await asyncio.sleep(0.02 if number % 3 == 0 else 0)
        return number

    answers = [each async for each in in_order(aiter(Source(20)), work, window=4)]
    assert answers == list(range(20))


async def test_no_more_is_read_than_the_window_holds() -> None:
    source = Source(100)
    release = asyncio.Event()

    async def work(number: int) -> int:
        await release.wait()
        return number

    async with aclosing(in_order(aiter(source), work, window=3)) as answers:
        first = asyncio.ensure_future(anext(answers))
        await asyncio.sleep(0.02)
        assert source.read == 3
        release.set()
        assert await first == 0


async def test_the_first_error_ends_the_stream_and_cancels_the_rest() -> None:
    cancelled: list[int] = []

    async def work(number: int) -> int:
        if number == 1:
            raise ValueError("bad request")
        try:
            await asyncio.sleep(0 if number == 0 else 60)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        return number

    answers = in_order(aiter(Source(100)), work, window=4)
    assert await anext(answers) == 0
    with pytest.raises(ValueError, match="bad request"):
        await anext(answers)
    assert set(cancelled) <= {2, 3, 4}
    assert len(cancelled) >= 2


async def test_an_error_of_the_sender_comes_after_the_answers_before_it() -> None:
    async def work(number: int) -> int:
        return number

    answers = in_order(aiter(Source(9, fails_at=2)), work, window=4)
    assert [await anext(answers), await anext(answers)] == [0, 1]
    with pytest.raises(ValueError, match="broken sender"):
        await anext(answers)


async def test_blocking_calls_are_dropped_before_they_begin() -> None:
    calls = BlockingCalls(1)
    began, go, ran = threading.Event(), threading.Event(), []

    def hold() -> None:
        began.set()
        assert go.wait(5)

    first = asyncio.ensure_future(calls.run(hold))
    assert await asyncio.to_thread(began.wait, 5)
    gone = asyncio.ensure_future(calls.run(lambda: ran.append("gone")))
    late = asyncio.ensure_future(
        calls.run(lambda: ran.append("late"), deadline=time.monotonic() + 0.01)
    )
    await asyncio.sleep(0.02)
    gone.cancel()
    await asyncio.wait([gone])  # it has left the queue; only now may the queue move on
    go.set()
    await first
    with pytest.raises(DeadlinePassed):
        await late
    assert await calls.run(lambda: "kept") == "kept"
    assert not ran
    await asyncio.to_thread(calls.close)
