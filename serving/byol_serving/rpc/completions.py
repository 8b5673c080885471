"""What gRPC has done, told to the event loop: a call has come, a message is read, an answer sent.

gRPC's core puts such events into a completion queue, and whoever asks the queue for the next also
reads and writes gRPC's sockets meanwhile. grpc.aio leaves the asking to a thread of its own, which
wakes the event loop with every event: four times in a call. Here the event loop asks, as long as
there are events; only when there were none for a while does a thread wait for the next, and wakes
the loop with it. So under load all of a call is done in one thread, on warm caches, and no thread
has to be woken (a third more thumbnails; with a thread that asks alone, a third fewer, since the
two hand Python's lock to each other).

The queue does not belong to gRPC's public interface in Python; `grpc.server` is built on the same.
"""

import asyncio
import logging
import os
import threading
from typing import Any

from grpc._cython import cygrpc  # type: ignore[attr-defined]  # not in the stubs

log = logging.getLogger("byol.rpc")

_AT_ONCE = 64
"""Events after which the loop's other work has its turn."""
_IN_VAIN = 40
"""Looks without an event, one in each turn of the loop, until the thread waits instead: some
0.2 ms, in which most clients that are just being answered ask again."""
_LONG_AGO = 1.0
"""As a deadline in seconds since 1970: what is there now, without waiting."""


class Completions:
    """A completion queue whose events are handled on the event loop that it was made on.

    The tag of an event is the function that handles it, and is given the event.
    """

    def __init__(self) -> None:
        """Nobody asks yet; see `start`."""
        self.queue: Any = cygrpc.CompletionQueue()
        self.ended = asyncio.Event()
        """No event comes any more."""
        self._loop = asyncio.get_running_loop()
        self._loop_asks = threading.Semaphore(0)
        """Lets the thread go on when the event loop has stopped to ask."""
        self._vain = 0

    def start(self) -> None:
        """Begins to ask."""
        threading.Thread(target=self._wait, name="grpc-events", daemon=True).start()

    def close(self) -> None:
        """Nothing may be begun on the queue any more; what was is still handled, then it ends."""
        self.queue.shutdown()

    def _wait(self) -> None:
        """The thread's: waits for an event, and then until the event loop finds no more."""
        while True:
            event = self.queue.poll()
            last = event.completion_type == cygrpc.CompletionType.queue_shutdown
            try:
                self._loop.call_soon_threadsafe(self._woken, event)
            except RuntimeError:
                return  # the loop is closed: the process ends
            del event  # it may hold a call, which cannot end before
            if last:
                return
            self._loop_asks.acquire()

    def _woken(self, event: Any) -> None:
        self._vain = 0
        if self._handle(event):
            self._turn()

    def _turn(self) -> None:
        """Handles what is there, and comes again unless there was nothing for a while."""
        self._vain += 1
        for _ in range(_AT_ONCE):
            event = self.queue.poll(_LONG_AGO)
            if event.completion_type == cygrpc.CompletionType.queue_timeout:
                break
            self._vain = 0
            if not self._handle(event):
                return
        if self._vain == _IN_VAIN:
            self._loop_asks.release()
            return
        if self._vain:
            os.sched_yield()  # other threads, or the clients, may want this core
        self._loop.call_soon(self._turn)

    def _handle(self, event: Any) -> bool:
        """Whether there may be more events."""
        if event.completion_type == cygrpc.CompletionType.queue_shutdown:
            self.ended.set()
            self._loop_asks.release()
            return False
        try:
            event.tag(event)
        except Exception:  # the others' events must be handled all the same
            log.exception("an event of gRPC could not be handled")
        return True
