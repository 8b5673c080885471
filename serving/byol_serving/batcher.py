"""Dynamic batching that never waits: a batch leaves as soon as a worker is free.

While every worker is busy, requests queue; a worker that becomes free takes what is queued, up to
`max_batch`. So an idle server answers at the speed of one call, a loaded one fills its batches, and
there is no delay to tune. The server uses this twice, once for decoding and once for inference, or
once for both where the encoder takes less time than another thread takes to wake up.

`Budget` is what bounds the queue: images and bytes that were accepted and not yet answered, over
all steps. Over it a request is refused at once, before any work is spent on it.
"""

import asyncio
import logging
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from types import MappingProxyType, TracebackType
from typing import Any, Generic, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from byol_serving.errors import DeadlinePassed, InvalidRequest, Overloaded, Unavailable
from byol_serving.timing import BatchRun, Step, note

Item = TypeVar("Item")
Results = TypeVar("Results", bound=Sequence[object] | NDArray[np.generic])
"""A list, or an array whose rows are the results."""

log = logging.getLogger(__name__)

_STREAM_SHARE = 0.75
"""Part of the budget that streams may fill."""


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


class Batcher(Generic[Item, Results]):
    """Groups items of concurrent requests into batches for a few worker threads.

    Belongs to the event loop it is used on; only `run` is called from threads.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Any],
        *,
        then: Mapping[str, Callable[[Any], Any]] = MappingProxyType({}),
        max_batch: int,
        workers: int = 1,
        share: bool = False,
        name: str = "batch",
        watch: Callable[[str, BatchRun], None] | None = None,
    ) -> None:
        """Starts nothing yet; threads come with the first batches.

        Args:
            run: answers a batch with as many results, in order; blocks; called from `workers`
                threads at a time. If it raises, every request in the batch gets the exception.
            then: further steps by name; each is given what the one before returned, at once and in
                the same thread. What the last one returns are the results.
            max_batch: items in one call of `run`.
            workers: calls of `run` at a time.
            share: divide what is queued among the free workers instead of filling one batch.
            name: of the threads, and of `run` as a step in a call's times.
            watch: told of each step of each batch when the batch is done, on the event loop.
        """
        self._name = name
        self._watch = watch
        self._steps = {name: run, **then}
        self._max_batch = max_batch
        self._share = share
        self._free = workers
        self._queue: deque[_Job[Item, Results]] = deque()
        self._queued = 0
        self._pump_scheduled = False
        self._closed = False
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.seconds_per_item = 0.0
        """Moving average of the wall time that `run` takes for one item."""

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
            note(Step(name, len(items), queued, began, ended))
            queued = began = ended
        return results

    async def close(self) -> None:
        """Fails what is queued, waits for the batches in the workers, and ends the threads."""
        self._closed = True
        for job in self._queue:
            if not job.future.done():
                job.future.set_exception(Unavailable("the server stopped before this was done"))
        self._queue.clear()
        self._queued = 0
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _pump(self, loop: asyncio.AbstractEventLoop) -> None:
        self._pump_scheduled = False
        while self._free and not self._closed:
            size = self._max_batch
            if self._share:
                size = min(size, -(-self._queued // self._free))
            slices = self._take(size)
            if not slices:
                return
            self._free -= 1
            if len(self._threads) < self._workers:
                self._add_thread()
            self._todo.put(partial(self._work, loop, slices))

    def _add_thread(self) -> None:
        # Not an executor: its futures and locks cost as much as decoding a thumbnail does.
        name = f"{self._name}_{len(self._threads)}"
        thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self) -> None:
        """A worker thread's life."""
        while (work := self._todo.get()) is not None:
            work()
            del work  # or it would hold the batch's images until the next one comes

    def _take(self, size: int) -> list[_Slice[Item, Results]]:
        """Up to `size` queued items, leaving out the requests that nobody waits for any more.

        A batch ends before the earliest deadline in it, as far as the present pace tells: it stays
        smaller for a request that is short of time. (One that will be late even alone does not
        shrink it: that would help nobody.)
        """
        slices: list[_Slice[Item, Results]] = []
        taken = 0
        now = time.monotonic()
        while self._queue and size > taken:
            job = self._queue.popleft()
            left = len(job.items) - job.sent
            if not _wanted(job, now):
                self._queued -= left
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
        return slices

    def _in_time(self, job: _Job[Item, Results], now: float) -> int:
        """Size up to which a batch with this job in it ends before the job's deadline."""
        if job.deadline is None or self.seconds_per_item == 0:
            return sys.maxsize
        return int((job.deadline - now) / self.seconds_per_item) or sys.maxsize

    def _work(self, loop: asyncio.AbstractEventLoop, slices: list[_Slice[Item, Results]]) -> None:
        """Runs in a worker thread."""
        times = [time.perf_counter()]
        results: Any = [item for job, start, end in slices for item in job.items[start:end]]
        count = len(results)
        try:
            for step in self._steps.values():
                results = step(results)
                times.append(time.perf_counter())
            if len(results) != count:
                results = RuntimeError(f"{count} items gave {len(results)} results")
        except BaseException as error:
            results = error
            times.append(time.perf_counter())
        try:
            loop.call_soon_threadsafe(self._deliver, loop, slices, results, times, count)
        except RuntimeError:  # the loop is closed: nobody waits for the answer
            log.debug("a batch finished after its event loop closed")

    def _deliver(
        self,
        loop: asyncio.AbstractEventLoop,
        slices: list[_Slice[Item, Results]],
        results: Results | BaseException,
        times: list[float],
        items: int,
    ) -> None:
        self._free += 1
        pace = (times[-1] - times[0]) / items
        self.seconds_per_item += (pace - self.seconds_per_item) * 0.2
        self._pump(loop)  # first, so that the worker is busy again while answers are handed out
        offset = 0
        for job, start, end in slices:
            count = end - start
            if not job.future.done():
                if isinstance(results, BaseException):
                    job.future.set_exception(results)
                else:
                    job.parts[start] = cast(Results, results[offset : offset + count])
                    job.done += count
                    if job.done == len(job.items):
                        job.ended = times[1:]
                        job.future.set_result([job.parts[at] for at in sorted(job.parts)])
            offset += count
        if self._watch is not None:
            waits = [job.began - job.queued for job, start, _ in slices if start == 0]
            for name, (began, ended) in zip(self._steps, pairwise(times), strict=False):
                self._watch(name, BatchRun(items, ended - began, waits))
                waits = [0.0] * len(waits)  # a later step begins where the one before ends


def _wanted(job: _Job[Item, Results], now: float) -> bool:
    """Whether anybody waits for this; tells the waiter if its deadline is why not."""
    if job.future.done():  # cancelled, or another part of it failed
        return False
    if job.deadline is not None and job.deadline <= now:
        job.future.set_exception(
            DeadlinePassed("the deadline passed in the queue; allow more time or send less")
        )
        return False
    return True


class Budget:
    """Images and bytes that were accepted and are not yet answered."""

    def __init__(
        self, *, max_images: int, max_bytes: int, seconds_per_image: Callable[[], float]
    ) -> None:
        """`seconds_per_image` is the present pace, for the hint when to try again."""
        self.max_images, self.max_bytes = max_images, max_bytes
        self.images = self.bytes = 0
        self._pace = seconds_per_image
        self._waiting: deque[tuple[asyncio.Future[None], Claim]] = deque()

    def claim(self, images: int, size: int) -> "Claim":
        """Room for a request, until the claim's `with` block ends.

        Raises:
            InvalidRequest: it would not fit an empty server.
            Overloaded: it does not fit now; with a hint when it might.
        """
        claim = self._possible(images, size)
        if not self._fits(claim, share=1.0):
            raise Overloaded(
                f"{self.images} images ({self.bytes} bytes) are queued and {images} more exceed"
                f" the limit of {self.max_images} images ({self.max_bytes} bytes); try again later",
                retry_after_s=min(10.0, max(0.01, self.images * self._pace())),
            )
        return self._grant(claim)

    async def wait_for(self, images: int, size: int) -> "Claim":
        """As `claim`, but waits for room, first come first served.

        For streams, whose flow control then holds the sender back. They fill three quarters at
        most, so that bulk work leaves room for the requests of people who wait.
        """
        claim = self._possible(images, size)
        if not self._waiting and self._fits(claim, share=_STREAM_SHARE):
            return self._grant(claim)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, claim))
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._give_back(claim)  # granted in the same turn as the cancellation
            raise
        finally:
            self._wake()
        return claim

    def _possible(self, images: int, size: int) -> "Claim":
        if images > self.max_images or size > self.max_bytes:
            raise InvalidRequest(
                f"{images} images ({size} bytes with their pixels) can never fit the queue of"
                f" {self.max_images} images ({self.max_bytes} bytes); send fewer in a request"
            )
        return Claim(self, images, size)

    def _fits(self, claim: "Claim", share: float) -> bool:
        """Whether the claim leaves the budget within `share` of its limits, or is alone in it."""
        return self.images == 0 or (
            self.images + claim.images <= self.max_images * share
            and self.bytes + claim.size <= self.max_bytes * share
        )

    def _grant(self, claim: "Claim") -> "Claim":
        self.images += claim.images
        self.bytes += claim.size
        return claim

    def _give_back(self, claim: "Claim") -> None:
        self.images -= claim.images
        self.bytes -= claim.size
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            future, claim = self._waiting[0]
            if not future.done():
                if not self._fits(claim, share=_STREAM_SHARE):
                    return
                self._grant(claim)
                future.set_result(None)
            self._waiting.popleft()


class Claim:
    """Room in a `Budget`, given back when the `with` block ends."""

    def __init__(self, budget: Budget, images: int, size: int) -> None:
        """Made by the budget only."""
        self._budget, self.images, self.size = budget, images, size

    def __enter__(self) -> Self:
        """The claim itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the room back, and wakes who waits for it."""
        self._budget._give_back(self)
