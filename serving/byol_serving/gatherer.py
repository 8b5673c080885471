"""Batches on the event loop itself, for what another thread would not do sooner.

Threads that share Python's lock lose some 50 µs each time that they hand it to each other, which is
more than a thumbnail takes through a small encoder. And in a process that has one core, a thread
that decodes photographs and a loop that receives the next drive each other from the processor's
caches. On the loop nothing is handed over; but a batch that left at once would be of one request
nearly always, since the loop takes them in one by one. So a batch is held back while requests
follow each other within `_LINGER_S`, or four times that while there are fewer than in the last
batch; the loop goes on with its other work meanwhile. Once as many are here as lately at most,
nobody else is thought to ask, and the batch leaves at once. Where waiting brought nobody a few
times, there is one client, whose requests leave at once too.

All work on an item is done in its batch, although it could begin when the item comes: code that
runs thirty times in a row finds itself in the processor's caches, from which the receiving of each
request drives it out (5 to 12% more thumbnails a second).
"""

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from byol_serving.errors import DeadlinePassed, Unavailable
from byol_serving.timing import STEPS, BatchRun, Step

Item = TypeVar("Item")
Results = TypeVar("Results", bound=Sequence[object] | NDArray[np.generic])
"""A list, or an array whose rows are the results."""

_LINGER_S = 0.0002
"""About three times as long as the loop takes to receive one more request."""
_GLANCE_S = 0.00005
"""Of a turn of the loop at most so much counts as waiting: in a longer one it did not look for
requests, but sent answers. (Counted in full, thirty clients fell apart into the two or three who
were answered first, and the others.)"""
_FORGOTTEN = 0.05
"""Clients of those that are thought to ask, with each batch that had fewer: they may only be late,
and where many ask, small batches cost more than waiting does."""
_FORGOTTEN_SHARE = 0.02
"""And of those that were missing: who asks no more is waited for during a tenth of a second."""
_LOOK = 16
"""Every so many batches it is seen whether more ask than is thought."""
_ALONE = 16
"""Batches of one in a row after which requests are not held back any more: there is one client."""
_TRY = 4
"""But every so many it is tried again."""
_TURN_EACH_S = 0.0025
"""Of a batch, for which the loop's other work has a turn: a call that is no embedding needs several
turns, and is not to wait for a batch in each."""


@dataclass(eq=False, slots=True)
class _Job(Generic[Item, Results]):
    """One request."""

    items: Sequence[Item]
    deadline: float | None
    future: "asyncio.Future[Results]"
    queued: float
    steps: list[Step] | None
    """Of its call, if that is watched."""


class Gatherer(Generic[Item, Results]):
    """Groups the items of concurrent requests, and answers them on the event loop."""

    def __init__(
        self,
        run: Callable[[list[Item]], Any],
        *,
        then: Mapping[str, Callable[[Any], Any]] = MappingProxyType({}),
        max_batch: int,
        turn_s: float,
        name: str,
        watch: Callable[[str, BatchRun], None] | None = None,
    ) -> None:
        """Starts nothing.

        Args:
            run: answers a batch with as many results, in order. If it raises, every request in the
                batch gets the exception.
            then: further steps by name; each is given what the one before returned. What the last
                one returns are the results. Exceptions among the items are what became of them
                before: they are passed on, and do not count.
            max_batch: items at which a batch is full; a single request may have more.
            turn_s: that a batch should keep the loop from its other work at most.
            name: of `run` as a step in a call's times.
            watch: told of each step of each batch when the batch is done.
        """
        self._steps = {name: run, **then}
        self._max_batch, self._turn_s, self._watch = max_batch, turn_s, watch
        self._queue: deque[_Job[Item, Results]] = deque()
        self.queued = 0
        """Items that wait."""
        self._turn_is_due = False
        self._closed = False
        self._looked = 0.0
        """When the loop last looked for more requests."""
        self._waited = 0.0
        """Seconds that it has looked in vain since the last one came."""
        self._size = max_batch
        """Items that a batch may have now, so that it keeps to its turn."""
        self._last_batch = 1
        """Requests in it."""
        self._crowd = float(max_batch)
        """Clients that are thought to ask at a time."""
        self._batches = 0
        self._owed = 0
        """Turns of the loop that its other work has before the next batch."""
        self._lone = 0
        """Batches of a single request in a row."""
        self.seconds_per_item = 0.0
        """Moving average of the time that one item takes."""

    def submit(
        self, items: Sequence[Item], *, deadline: float | None = None
    ) -> "asyncio.Future[Results]":
        """The results of `items`, in order, as a future: a coroutine would cost one more.

        Who cancels it while it is queued gives up the request.

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
        now = self._looked = time.perf_counter()
        self._waited = 0.0
        job: _Job[Item, Results] = _Job(items, deadline, loop.create_future(), now, STEPS.get())
        self._queue.append(job)
        self.queued += len(items)
        if not self._turn_is_due:
            self._turn_is_due = True
            self._owed = 0
            loop.call_soon(self._turn, loop)
        return job.future

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
        if self._owed:
            self._owed -= 1
            loop.call_soon(self._turn, loop)
            return
        if self._more_may_come():
            os.sched_yield()  # gRPC's threads, or the clients, may want this core to send more
            loop.call_soon(self._turn, loop)
            return
        if batch := self._take():
            self._answer(batch)
            self._batches += 1
            self._last_batch = len(batch)
            missing = self._crowd - len(batch)
            self._crowd = max(len(batch), self._crowd - _FORGOTTEN - _FORGOTTEN_SHARE * missing)
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
        now = time.perf_counter()
        self._waited += min(now - self._looked, _GLANCE_S)
        self._looked = now
        # Who was answered together asks again together.
        patience = 4 * _LINGER_S if len(self._queue) < self._last_batch else _LINGER_S
        return self._waited < patience

    def _take(self) -> list[_Job[Item, Results]]:
        """The oldest requests, without those that nobody waits for any more.

        The batch ends before the earliest deadline in it, as far as the present pace tells. (A
        request that will be late even alone does not shrink it.)
        """
        batch: list[_Job[Item, Results]] = []
        taken, size, now = 0, self._size, time.monotonic()
        until = math.inf
        while self._queue and taken < size:
            job = self._queue.popleft()
            count = len(job.items)
            self.queued -= count
            if job.future.done():  # cancelled
                continue
            if job.deadline is not None and job.deadline <= now:
                job.future.set_exception(
                    DeadlinePassed("the deadline passed in the queue; allow more time")
                )
                continue
            if job.deadline is not None and job.deadline > now + count * self.seconds_per_item:
                until = min(until, job.deadline)
            if batch and now + (taken + count) * self.seconds_per_item > until:
                self._queue.appendleft(job)
                self.queued += count
                break
            batch.append(job)
            taken += count
        return batch

    def _answer(self, batch: list[_Job[Item, Results]]) -> None:
        given: list[Any] = [[item for job in batch for item in job.items]]
        times = [time.perf_counter()]
        try:
            for step in self._steps.values():
                given.append(step(given[-1]))
                times.append(time.perf_counter())
        except Exception as error:
            for job in batch:
                job.future.set_exception(error)
            return
        took = times[-1] - times[0]
        self._owed = int(took / _TURN_EACH_S)
        if took > self._turn_s:
            self._size = max(1, self._size // 2)
        elif took < self._turn_s / 2:
            self._size = min(self._max_batch, self._size * 2)
        self.seconds_per_item += (took / len(given[0]) - self.seconds_per_item) * 0.2
        results, at = given.pop(), 0
        for job in batch:
            if job.steps is not None:
                self._note(job.steps, job, times)
            job.future.set_result(results[at : at + len(job.items)])
            at += len(job.items)
        if self._watch is not None:
            waits = [times[0] - job.queued for job in batch]
            for name, items, (began, ended) in zip(
                self._steps, given, pairwise(times), strict=True
            ):
                if count := sum(not isinstance(each, Exception) for each in items):
                    self._watch(name, BatchRun(count, ended - began, waits))
                waits = [0.0] * len(waits)  # a later step begins where the one before ends

    def _note(self, steps: list[Step], job: _Job[Item, Results], times: list[float]) -> None:
        queued = job.queued
        for name, (began, ended) in zip(self._steps, pairwise(times), strict=True):
            steps.append(Step(name, len(job.items), queued, began, ended))
            queued = ended
