"""How the time of a batch grows with its size, and from which size on more does not pay."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

_ENOUGH = 0.95
"""Part of the best throughput from which on a larger batch mostly adds latency."""
_BEST = 0.99
"""Part that is as good as all of it."""
_BUDGET_S = 1.0
_RUNS = 3
_BRIEF_S = 0.002
_PATIENCE_S = 1.0
_PAUSE_S = 0.05


@dataclass(frozen=True)
class BatchCurve:
    """Seconds that one batch takes, by its size; sizes ascend."""

    seconds: dict[int, float]

    @property
    def enough(self) -> int:
        """The smallest batch that is worth filling while others wait for a worker."""
        return self._reaching(_ENOUGH)

    @property
    def best(self) -> int:
        """The smallest batch that no larger one outdoes."""
        return self._reaching(_BEST)

    def _reaching(self, part: float) -> int:
        rates = {size: size / max(took, 1e-9) for size, took in self.seconds.items()}
        return next(size for size, rate in rates.items() if rate >= part * max(rates.values()))


def sizes_up_to(limit: int) -> list[int]:
    """1, 2, 4, ... below `limit`, and `limit` itself."""
    return [*(2**power for power in range(math.ceil(math.log2(limit)))), limit]


def measure_curve(run: Callable[[int], object], max_batch: int) -> BatchCurve:
    """Runs batches of growing size for about a second.

    A size is left out, with all larger ones, once the time is spent: an encoder so slow has shown
    its curve by then. The first run of each size does not count, since it allocates.

    Args:
        run: embeds a batch of so many images; blocks.
        max_batch: the largest size to consider.
    """
    seconds: dict[int, float] = {}
    ends = time.perf_counter() + _BUDGET_S
    for size in sizes_up_to(max_batch):
        run(size)
        seconds[size] = fastest(partial(run, size))
        if time.perf_counter() > ends:
            break
    return BatchCurve(seconds)


def fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs: what else the machine does only makes one slower."""
    return min(_timed(run) for _ in range(_RUNS))


def takes_at_most(seconds: float, run: Callable[[], object]) -> bool:
    """Whether `run` ever is so fast.

    Where it is not, it is tried again for a second: who keeps the machine busy for a moment is not
    to decide how a server works for as long as it runs. Limits of up to two milliseconds are tried
    once: there is little to lose, and small encoders would start a second later for it.
    """
    run()
    ends = time.perf_counter() + (_PATIENCE_S if seconds > _BRIEF_S else 0.0)
    while fastest(run) > seconds:
        if time.perf_counter() > ends:
            return False
        time.sleep(_PAUSE_S)
    return True


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
