"""Dynamic batching that never waits: a batch leaves as soon as a worker is free.

While every worker is busy, requests queue; a worker that becomes free takes what is queued, up to
`max_batch`. So an idle server answers at the speed of one call, a loaded one fills its batches, and
there is no delay to tune. The server uses this twice, once for decoding and once for inference, or
once for both where the encoder takes less time than another thread takes to wake up.

A worker takes its next batch itself, in its own thread: a round through the event loop between two
batches left it idle for a tenth of the time. Only idle workers are given theirs by the loop. But
first it lets the loop go before it, which it has just woken to hand the answers out: where all
cores are busy they waited for 0.5 ms otherwise, and one in a hundred for 2.8.

What bounds the queue is a `byol_serving.budget.Budget`.
"""

import asyncio
import logging
import math
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from byol_serving.errors import DeadlinePassed, Unavailable
from byol_serving.own_cores import OwnCores
from byol_serving.timing import BatchRun, note

Item = TypeVar("Item")
Results = TypeVar("Results", bound=Sequence[object] | NDArray[np.generic])
"""A list, or an array whose rows are the results."""

log = logging.getLogger(__name__)

_PATIENCE_S = 0.01
"""A batch of small items takes less."""
_PARTS = 4
"""In which a worker takes its share of the queue where answers are to come evenly: of eight images
by two workers one at a time, of thirty-two four."""


@dataclass(eq=False, slots=True)
class _Job(Generic[Item, Results]):
    """One request's items, and what has come back for them so far."""

    items: Sequence[Item]
    deadline: float | None
    future: "asyncio.Future[list[Results]]"
    sent: int = 0
    done: int = 0
    parts: dict[int, Results] = field(default_factory=dict)
    queued: float = field(default_factory=time.perf_counter)
    began: float = 0.0
    ended: Sequence[float] = ()
    """When each step of the last batch was done."""


_Slice = tuple[_Job[Item, Results], int, int]


@dataclass(frozen=True, slots=True)
class _Done(Generic[Results]):
    """A batch that a worker has run."""

    results: Results | BaseException
    times: Sequence[float]
    """When it began, and when each step ended."""
    counts: Sequence[int]
    """Items that each step had."""
    cpu_s: float


class Batcher(Generic[Item, Results]):
    """Groups items of concurrent requests into batches for a few worker threads.

    Belongs to the event loop it is used on; only `run` is called from threads. What the workers
    share with the loop is the queue and what its pace is known by, under one lock.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Any],
        *,
        then: Mapping[str, Callable[[Any], Any]] = MappingProxyType({}),
        max_batch: int,
        workers: int = 1,
        share: bool = False,
        enough: int = 0,
        turn_s: float = math.inf,
        one_below_s: float = 0.0,
        cores: Sequence[int] = (),
        name: str = "batch",
        watch: Callable[[str, BatchRun], None] | None = None,
    ) -> None:
        """Starts nothing yet; threads come with the first batches.

        Args:
            run: answers a batch with as many results, in order; blocks; called from `workers`
                threads at a time. If it raises, every request in the batch gets the exception.
            then: further steps by name; each is given what the one before returned, at once and in
                the same thread. What the last one returns are the results. Exceptions among the
                items are what became of them before: they are passed on, and do not count.
            max_batch: items in one call of `run`.
            workers: calls of `run` at a time.
            share: divide what is queued among the free workers instead of filling one batch.
            enough: items up to which a worker takes its whole share; beyond them it takes a part,
                so that answers come evenly. 0: `max_batch`.
            turn_s: CPU time that a batch should take at most, so that answers come evenly.
            one_below_s: while an item takes less CPU time than this, one worker takes them all:
                threads that share Python's lock lose more by waiting for each other than they win.
            cores: one for each worker, whose thread is then kept on it (see `OwnCores`).
            name: of the threads, and of `run` as a step in a call's times.
            watch: told of each step of each batch when the batch is done, on the event loop.
        """
        self._name = name
        self._watch = watch
        self._steps = {name: run, **then}
        self._max_batch = max_batch
        self._share = share
        self._enough = enough or max_batch
        self._turn_s = turn_s
        self._one_below_s = one_below_s
        self._free = workers
        self._queue: deque[_Job[Item, Results]] = deque()
        self._queued = 0
        self._pump_scheduled = False
        self._closed = False
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._cores = OwnCores(cores)
        self._todo: queue.SimpleQueue[list[_Slice[Item, Results]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.seconds_per_item = 0.0
        """Moving average of the wall time that one item takes."""
        self._cpu_per_item = math.inf
        self._left = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def queued(self) -> int:
        """Items that wait for a worker."""
        return self._queued

    async def submit(
        self, items: Sequence[Item], *, deadline: float | None = None
    ) -> list[Results]:
        """Results of `items` in order, in as many consecutive parts as the items were split into.

        Cancelling the caller takes what is still queued out of the queue.

        Args:
            items: at least one.
            deadline: on time.monotonic()'s clock; work that did not begin by then is dropped.

        Raises:
            DeadlinePassed: dropped for that reason.
            Unavailable: the batcher is closed.
        """
        if self._closed:
            raise Unavailable("the server is draining; ask another, or again later")
        loop = asyncio.get_running_loop()
        job: _Job[Item, Results] = _Job(items, deadline, loop.create_future())
        with self._lock:
            self._queue.append(job)
            self._queued += len(items)
        if self._free and not self._pump_scheduled:
            # Not now but at the end of this turn of the loop: requests that arrived together then
            # leave together, and nothing waits longer than the loop would have taken anyway.
            self._pump_scheduled = True
            loop.call_soon(self._pump, loop)
        results = await job.future
        queued, began = job.queued, job.began
        for name, ended in zip(self._steps, job.ended, strict=True):
            note(name, len(items), queued, began, ended)
            queued = began = ended
        return results

    async def close(self) -> None:
        """Fails what is queued, waits for the batches in the workers, and ends the threads."""
        with self._lock:
            self._closed = True
            waiting = list(self._queue)
            self._queue.clear()
            self._queued = 0
        for job in waiting:
            if not job.future.done():
                job.future.set_exception(Unavailable("the server stopped before this was done"))
        if self._timer is not None:
            self._timer.cancel()
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _pump(self, loop: asyncio.AbstractEventLoop) -> None:
        """Gives idle workers what is queued."""
        self._pump_scheduled = False
        while not self._closed:
            with self._lock:
                slices, late = self._take(self._free)
                self._free -= bool(slices)
                one_is_busy = not slices and bool(self._queue) and self._free > 0
            _fail(late)
            if one_is_busy and self._timer is None:
                self._timer = loop.call_later(_PATIENCE_S, self._look_again, loop)
            if not slices:
                return
            if len(self._threads) < self._workers:
                self._add_thread(loop)
            self._todo.put(slices)

    def _look_again(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self._pump(loop)

    def _add_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        # Not an executor: its futures and locks cost as much as decoding a thumbnail does.
        worker = len(self._threads)
        name = f"{self._name}_{worker}"
        thread = threading.Thread(target=self._serve, args=(worker, loop), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, worker: int, loop: asyncio.AbstractEventLoop) -> None:
        """A worker thread's life."""
        self._cores.hold(worker)
        while (slices := self._todo.get()) is not None:
            while slices:
                done = self._work(slices)
                self._cores.ran(worker, done.times[-1] - done.times[0], done.cpu_s)
                self._call(loop, self._deliver, slices, done)
                os.sched_yield()
                with self._lock:
                    self._learn(done)
                    slices, late = self._take(self._free + 1)
                    self._free += not slices
                    left_some = not slices and self._queued > 0
                if late or left_some:
                    self._call(loop, self._look_after, loop, late)
                del done, late  # or they would hold the images until the next batch is done

    def _call(
        self, loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object
    ) -> None:
        """Has the event loop call it; from a worker thread."""
        try:
            loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop is closed: nobody waits for the answer
            log.debug("a batch finished after its event loop closed")

    def _look_after(self, loop: asyncio.AbstractEventLoop, late: list[_Job[Item, Results]]) -> None:
        """A worker that looked for its next batch met late requests, or left some for another."""
        _fail(late)
        self._pump(loop)

    def _take(self, free: int) -> tuple[list[_Slice[Item, Results]], list[_Job[Item, Results]]]:
        """The next batch, and the requests in front of it whose deadline has passed.

        Requests that nobody waits for any more are left out. A batch ends before the earliest
        deadline in it, as far as the present pace tells: it stays smaller for a request that is
        short of time. (One that will be late even alone does not shrink it: that would help
        nobody.)

        Args:
            free: workers that the queue is to be divided among, with the one that this is for.
        """
        slices: list[_Slice[Item, Results]] = []
        late: list[_Job[Item, Results]] = []
        size, taken, now = self._size(free), 0, time.monotonic()
        while self._queue and size > taken:
            job = self._queue.popleft()
            left = len(job.items) - job.sent
            if job.future.done():  # cancelled, or another part of it failed
                self._queued -= left
                continue
            if job.deadline is not None and job.deadline <= now:
                self._queued -= left
                late.append(job)
                continue
            in_time = self._in_time(job, now)
            if in_time <= taken:
                self._queue.appendleft(job)  # it goes first the next time, in a smaller batch
                break
            size = min(size, in_time)
            count = min(left, size - taken)
            job.began = job.began or time.perf_counter()
            slices.append((job, job.sent, job.sent + count))
            job.sent += count
            taken += count
            self._queued -= count
            if count < left:
                # To the end of the line: a huge request must not keep small ones waiting.
                self._queue.append(job)
        if slices:
            self._left = time.perf_counter()
        return slices, late

    def _size(self, free: int) -> int:
        """Items that the next batch may have; 0: none yet."""
        if not free:
            return 0
        size = self._max_batch
        if math.inf not in (self._turn_s, self._cpu_per_item):
            size = max(1, min(size, int(self._turn_s / max(self._cpu_per_item, 1e-6))))
        if self._cpu_per_item < self._one_below_s:
            # The worker that has the small items can be expected back soon; but it may have met a
            # large one, and then the others are not to wait behind it.
            busy = free < self._workers
            return 0 if busy and time.perf_counter() - self._left < _PATIENCE_S else size
        if not self._share:
            return size
        whole, part = (-(-self._queued // ways) for ways in (free, _PARTS * self._workers))
        return max(1, min(size, max(part, min(self._enough, whole))))

    def _in_time(self, job: _Job[Item, Results], now: float) -> int:
        """Size up to which a batch with this job in it ends before the job's deadline."""
        if job.deadline is None or self.seconds_per_item == 0:
            return sys.maxsize
        return int((job.deadline - now) / self.seconds_per_item) or sys.maxsize

    def _work(self, slices: list[_Slice[Item, Results]]) -> _Done[Results]:
        """Runs a batch, in a worker thread."""
        times, used = [time.perf_counter()], -time.thread_time()
        results: Any = [item for job, start, end in slices for item in job.items[start:end]]
        counts: list[int] = []
        try:
            for step in self._steps.values():
                counts.append(sum(not isinstance(each, Exception) for each in results))
                results = step(results)
                times.append(time.perf_counter())
            if len(results) != counts[0]:
                results = RuntimeError(f"{counts[0]} items gave {len(results)} results")
        except BaseException as error:
            results = error
            times.append(time.perf_counter())
        return _Done(results, times, counts, used + time.thread_time())

    def _learn(self, done: _Done[Results]) -> None:
        """The pace, from a batch."""
        items = done.counts[0]
        pace, cpu = (done.times[-1] - done.times[0]) / items, done.cpu_s / items
        self.seconds_per_item += (pace - self.seconds_per_item) * 0.2
        before = cpu if math.isinf(self._cpu_per_item) else self._cpu_per_item
        self._cpu_per_item = before + (cpu - before) * 0.2

    def _deliver(self, slices: list[_Slice[Item, Results]], done: _Done[Results]) -> None:
        """Hands the answers of a batch out, on the event loop."""
        offset = 0
        for job, start, end in slices:
            count = end - start
            if not job.future.done():
                if isinstance(done.results, BaseException):
                    job.future.set_exception(done.results)
                else:
                    job.parts[start] = cast(Results, done.results[offset : offset + count])
                    job.done += count
                    if job.done == len(job.items):
                        job.ended = done.times[1:]
                        job.future.set_result([job.parts[at] for at in sorted(job.parts)])
            offset += count
        if self._watch is not None:
            waits = [job.began - job.queued for job, start, _ in slices if start == 0]
            for name, items, (began, ended) in zip(
                self._steps, done.counts, pairwise(done.times), strict=False
            ):
                if items:
                    self._watch(name, BatchRun(items, ended - began, waits))
                waits = [0.0] * len(waits)  # a later step begins where the one before ends


def _fail(late: Sequence[_Job[Item, Results]]) -> None:
    """Tells those who still wait that their deadline has passed."""
    for job in late:
        if not job.future.done():
            job.future.set_exception(
                DeadlinePassed("the deadline passed in the queue; allow more time or send less")
            )
