"""How far a long call of a client has come.

client.embed_stream(files, progress=lambda now: print(now.done, now.rate, now.seconds_left))
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import TypeVar

Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a call stands, after each answer."""

    done: int
    """Images or items that were answered."""
    total: int | None
    """Of how many; None where they come from an iterator."""
    seconds: float
    """Since the call began."""
    rate: float
    """Done a second."""
    seconds_left: float | None
    """At that rate; None where `total` is."""


OnProgress = Callable[[Progress], None]
"""Called in the caller's own thread or task; what it raises ends the call."""


class Tally:
    """Counts answers and tells `progress` of each."""

    def __init__(self, progress: OnProgress | None, of: object) -> None:
        """Starts the clock. `of` is the number of items, or what they come in."""
        self._progress = progress
        match of:
            case int():
                self._total: int | None = of
            case Sized():
                self._total = len(of)
            case _:
                self._total = None
        self._done, self._began = 0, time.monotonic()

    def add(self, count: int) -> None:
        """So many more are answered."""
        self._done += count
        if self._progress is None:
            return
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = self._done / seconds
        left = None
        if self._total is not None and rate > 0:
            left = max(0, self._total - self._done) / rate
        self._progress(
            Progress(
                done=self._done, total=self._total, seconds=seconds, rate=rate, seconds_left=left
            )
        )

    def counted(self, parts: Iterable[Part], size: Callable[[Part], int]) -> Iterator[Part]:
        """The parts as they are, each counted by its size."""
        for part in parts:
            self.add(size(part))
            yield part
