"""What a run counts while it goes: images, and how busy each stage is."""

import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypedDict


class Measured(TypedDict):
    """The figures of `plan.Progress`."""

    done: int
    skipped: int
    rejected: int
    duplicates: int
    total: int | None
    seconds: float
    rate: float
    seconds_left: float | None
    busy: Mapping[str, float]
    peak_rss: int


class Meter:
    """Counts are for one thread, `timed` and `worked` for any."""

    def __init__(self, workers: Mapping[str, int]) -> None:
        """Starts the clock. `workers`: of each stage, how many."""
        self.done = self.skipped = self.rejected = self.duplicates = 0
        self.total: int | None = None
        self._workers = workers
        self._busy = dict.fromkeys(workers, 0.0)
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._working_since: float | None = None

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Notes that one of the stage's workers works."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.worked(stage, time.monotonic() - began)

    def worked(self, stage: str, seconds: float) -> None:
        """Notes that one of the stage's workers worked, until now, here or elsewhere."""
        began = time.monotonic() - seconds
        with self._lock:
            self._busy[stage] += seconds
            self._working_since = min(self._working_since or began, began)

    def measured(self) -> Measured:
        """The figures so far. Rates count from when the first image was read."""
        now = time.monotonic()
        with self._lock:
            working = max(now - (self._working_since or now), 1e-9)
            busy = {
                stage: min(1.0, seconds / working / self._workers[stage])
                for stage, seconds in self._busy.items()
            }
        rate = self.done / working
        left = None
        if self.total is not None and rate > 0:
            met = self.done + self.skipped + self.rejected + self.duplicates
            left = max(0, self.total - met) / rate
        return Measured(
            done=self.done,
            skipped=self.skipped,
            rejected=self.rejected,
            duplicates=self.duplicates,
            total=self.total,
            seconds=now - self._began,
            rate=rate,
            seconds_left=left,
            busy=busy,
            peak_rss=peak_rss(),
        )


def peak_rss() -> int:
    """Bytes of memory that this process held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
