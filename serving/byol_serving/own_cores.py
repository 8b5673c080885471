"""Worker threads on a core of their own each, while nothing else wants that core.

Threads that share Python's lock keep waking each other, and Linux puts a thread on the core of the
one that wakes it when it sees no idle one. Two workers then take turns on one core for a while, and
the other core idles in between for less time than the kernel finds worth a move. Held apart they do
8 to 19% more photographs, more evenly (docs/performance.md).

But a thread that is held cannot leave a core that another process takes, and what it has in hand
comes late. A worker that falls behind the others is therefore let go for a while.
"""

import math
import os
import time
from collections.abc import Collection, Sequence
from contextlib import suppress

_MEMORY = 0.03
"""Weight of a batch in a worker's moving average."""
_BEHIND = 1.5
"""Times the delay of the least delayed worker. gRPC's threads and clients on the same machine bring
it to 1.3 at most, another busy process to 1.6 and more."""
_LONGEST = 4.0
"""Times its CPU time that a batch counts at most: the whole process may have been stopped."""
_FREE_S = 5.0


def cores_for(workers: int) -> tuple[int, ...]:
    """The cores that this process may use, if `workers` are several and as many; else none."""
    if workers < 2 or not hasattr(os, "sched_setaffinity"):
        return ()
    cores = sorted(os.sched_getaffinity(0))
    return tuple(cores) if len(cores) == workers else ()


class OwnCores:
    """The cores of a pool's workers. Each worker calls for itself, from its own thread."""

    def __init__(self, cores: Sequence[int]) -> None:
        """`cores` has one number for each worker; empty: all run where the system likes."""
        self._cores = cores
        self._delays = [math.inf] * len(cores)
        """Moving averages of how long a batch takes, in multiples of its CPU time; infinite for
        workers that have not begun."""
        self._free_until = [0.0] * len(cores)
        """On time.monotonic()'s clock; 0 while held."""

    def hold(self, worker: int) -> None:
        """Keeps the calling thread on the core of `worker`."""
        if self._cores:
            least = min(self._delays)
            self._delays[worker] = 1.0 if math.isinf(least) else least
            self._free_until[worker] = 0.0
            _run_on([self._cores[worker]])

    def ran(self, worker: int, wall_s: float, cpu_s: float) -> None:
        """Takes note of a batch; lets the calling thread go, or holds it again."""
        if not self._cores:
            return
        delay = min(wall_s / max(cpu_s, 1e-6), _LONGEST)
        self._delays[worker] += (delay - self._delays[worker]) * _MEMORY
        if until := self._free_until[worker]:
            if time.monotonic() > until:
                self.hold(worker)
        elif self._delays[worker] > _BEHIND * min(self._delays):
            self._free_until[worker] = time.monotonic() + _FREE_S
            _run_on(self._cores)


def _run_on(cores: Collection[int]) -> None:
    with suppress(OSError):  # they have been taken from this process meanwhile
        os.sched_setaffinity(0, cores)
