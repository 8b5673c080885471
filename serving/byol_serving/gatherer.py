"""Batches on the event loop itself, for items that cost less than waking a thread for them does.

Threads that share Python's lock lose some 50 µs each time that they hand it to each other, which is
more than a thumbnail takes through a small encoder. On the loop nothing is handed over; but a batch
that left at once would be of one request nearly always, since the loop takes them in one by one. So
a batch is held back while requests follow each other within `_LINGER_S`, or twice that while there
are fewer than in the last batch; the loop goes on with its other work meanwhile. Once as many are
here as lately at most, nobody else is thought to ask, and the batch leaves at once. Where waiting
brought nobody a few times, there is one client, whose requests leave at once too.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from byol_serving.errors import DeadlinePassed, Unavailable
from byol_serving.timing import BatchRun, note

Item = TypeVar("Item")
Rows = NDArray[np.float32]

_LINGER_S = 0.0002
"""About three times as long as the loop takes to receive one more request."""
_FORGOTTEN = 0.05
"""Clients of those that are thought to ask, with each batch that had fewer: they may only be late,
and where many ask, small batches cost more than waiting does."""
_LOOK = 16
"""Every so many batches it is seen whether more ask than is thought."""
_ALONE = 16
"""Batches of one in a row after which requests are not held back any more: there is one client."""
_TRY = 4
"""But every so many it is tried again."""
_TURN_S = 0.002
"""That a batch may keep the loop from its other work."""


@dataclass(eq=False, slots=True)
class _Job(Generic[Item]):
    """One request."""

    items: Sequence[Item]
    deadline: float | None
    future: "asyncio.Future[Rows]"
    queued: float
    began: float = 0.0
    ended: float = 0.0


class Gatherer(Generic[Item]):
    """Groups the items of concurrent requests, and answers them on the event loop."""

    def __init__(
        self,
        run: Callable[[list[Item]], Rows],
        *,
        max_batch: int,
        name: str,
        watch: Callable[[str, BatchRun], None] | None = None,
    ) -> None:
        """Starts nothing.

        Args:
            run: answers a batch with as many rows, in order, in much less than a millisecond. If it
                raises, every request in the batch gets the exception.
            max_batch: items at which a batch is full; a single request may have more.
            name: of the step in a call's times.
            watch: told of each batch when it is done.
        """
        self._run, self._max_batch, self._name, self._watch = run, max_batch, name, watch
        self._queue: deque[_Job[Item]] = deque()
        self.queued = 0
        """Items that wait."""
        self._turn_is_due = False
        self._closed = False
        self._newest = 0.0
        self._size = max_batch
        """Items that a batch may have now, so that it keeps to its turn."""
        self._last_batch = 1
        """Requests in it."""
        self._crowd = float(max_batch)
        """Clients that are thought to ask at a time."""
        self._batches = 0
        self._lone = 0
        """Batches of a single request in a row."""
        self.seconds_per_item = 0.0
        """Moving average of the time that one item takes."""

    async def submit(self, items: Sequence[Item], *, deadline: float | None = None) -> Rows:
        """The rows of `items`, in order.

        Args:
            items: at least one.
            deadline: on time.monotonic()'s clock; a request that did not begin by then is dropped.

        Raises:
            DeadlinePassed: dropped for that reason.
            Unavailable: the gatherer is closed.
        """
        if self._closed:
            raise Unavailable("the server is draining; ask another, or again later")
        loop = asyncio.get_running_loop()
        self._newest = time.perf_counter()
        job = _Job(items, deadline, loop.create_future(), self._newest)
        self._queue.append(job)
        self.queued += len(items)
        if not self._turn_is_due:
            self._turn_is_due = True
            loop.call_soon(self._turn, loop)
        rows = await job.future
        note(self._name, len(items), job.queued, job.began, job.ended)
        return rows

    def close(self) -> None:
        """Fails what waits, and refuses more."""
        self._closed = True
        for job in self._queue:
            if not job.future.done():
                job.future.set_exception(Unavailable("the server stopped before this was done"))
        self._queue.clear()
        self.queued = 0

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """Runs one batch, or looks again in the loop's next turn."""
        if not self._more_may_come() and (batch := self._take()):
            self._answer(batch)
            self._batches += 1
            self._last_batch = len(batch)
            self._crowd = max(len(batch), self._crowd - _FORGOTTEN)
            self._lone = self._lone + 1 if len(batch) == 1 else 0
        self._turn_is_due = bool(self._queue)
        if self._turn_is_due:
            loop.call_soon(self._turn, loop)

    def _more_may_come(self) -> bool:
        if self.queued >= self._size:
            return False
        if len(self._queue) >= max(2, self._crowd) and self._batches % _LOOK:
            return False
        if len(self._queue) == 1 and self._lone >= _ALONE and self._lone % _TRY:
            return False
        # Who was answered together asks again together.
        patience = 2 * _LINGER_S if len(self._queue) < self._last_batch else _LINGER_S
        return time.perf_counter() - self._newest < patience

    def _take(self) -> list[_Job[Item]]:
        """The oldest requests, without those that nobody waits for any more."""
        batch: list[_Job[Item]] = []
        taken, size, now = 0, self._size, time.monotonic()
        while self._queue and taken < size:
            job = self._queue.popleft()
            self.queued -= len(job.items)
            if job.future.done():  # cancelled
                continue
            if job.deadline is not None and job.deadline <= now:
                job.future.set_exception(
                    DeadlinePassed("the deadline passed in the queue; allow more time")
                )
                continue
            batch.append(job)
            taken += len(job.items)
        return batch

    def _answer(self, batch: list[_Job[Item]]) -> None:
        items = [item for job in batch for item in job.items]
        began = time.perf_counter()
        try:
            rows = self._run(items)
        except Exception as error:
            for job in batch:
                job.future.set_exception(error)
            return
        ended = time.perf_counter()
        if ended - began > _TURN_S:
            self._size = max(1, self._size // 2)
        elif ended - began < _TURN_S / 2:
            self._size = min(self._max_batch, self._size * 2)
        self.seconds_per_item += ((ended - began) / len(items) - self.seconds_per_item) * 0.2
        at = 0
        for job in batch:
            job.began, job.ended = began, ended
            job.future.set_result(rows[at : at + len(job.items)])
            at += len(job.items)
        if self._watch is not None:
            waits = [began - job.queued for job in batch]
            self._watch(self._name, BatchRun(len(items), ended - began, waits))
