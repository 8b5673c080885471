"""Where the time of a call goes: the steps it passes through leave their times here.

Logs, metrics and traces all read these; nothing measures twice.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple


class Step(NamedTuple):
    """One request's way through one batcher; times on time.perf_counter()'s clock.

    Made once or twice for every call, and in a third of the time of a frozen dataclass.
    """

    name: str
    """decode, inference or features."""
    items: int
    queued: float
    began: float
    """Of its first batch."""
    ended: float
    """Of its last batch."""


@dataclass(frozen=True)
class BatchRun:
    """One batch of one batcher."""

    items: int
    seconds: float
    """That it was being worked on."""
    waits: Sequence[float]
    """Seconds in the queue of each request that began with this batch."""


STEPS: ContextVar[list[Step] | None] = ContextVar("STEPS", default=None)
"""The steps of the call that the present task works for; None outside of one,
and where nobody watches calls."""


def note(name: str, items: int, queued: float, began: float, ended: float) -> None:
    """Adds a step, as `Step` has it, to the present call, if there is one that is watched."""
    steps = STEPS.get()
    if steps is not None:
        steps.append(Step(name, items, queued, began, ended))
