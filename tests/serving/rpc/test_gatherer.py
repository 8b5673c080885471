"""Batches on the event loop: who is in them, and who waits for company."""

import asyncio
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from byol_serving.errors import DeadlinePassed, Unavailable
from byol_serving.gatherer import Gatherer
from byol_serving.timing import STEPS, BatchRun, Step


class Squares:
    """Squares numbers; keeps what it was given."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[int]] = []
        self.seconds = seconds

    def __call__(self, items: list[int]) -> NDArray[np.float32]:
        self.batches.append(items)
        time.sleep(self.seconds)
        return np.array([[item**2] for item in items], np.float32)


async def test_requests_that_follow_each_other_share_a_batch_and_get_their_own_rows() -> None:
    run = Squares()
    runs: list[tuple[str, BatchRun]] = []
    gatherer: Gatherer[int, NDArray[np.float32]] = Gatherer(
        run,
        max_batch=100,
        turn_s=0.002,
        name="inference",
        watch=lambda name, batch: runs.append((name, batch)),
    )
    steps: list[Step] = []

    async def client(number: int) -> None:
        for _ in range(number):  # so that they arrive in different turns of the loop
            await asyncio.sleep(0)
        STEPS.set(steps)
        rows = await gatherer.submit([number, number + 1])
        assert rows.tolist() == [[number**2], [(number + 1) ** 2]]

    await asyncio.gather(*(client(number) for number in range(20)))
    assert sum(map(len, run.batches)) == 40
    assert max(map(len, run.batches)) >= 10  # they were not answered one by one
    assert gatherer.queued == 0
    assert len(steps) == 20
    assert all(each.queued <= each.began <= each.ended for each in steps)
    assert sum(batch.items for _, batch in runs) == 40
    assert all(isinstance(batch, BatchRun) and name == "inference" for name, batch in runs)


async def test_a_loop_that_was_busy_has_not_waited_in_vain() -> None:
    run = Squares()
    gatherer: Gatherer[int, NDArray[np.float32]] = Gatherer(
        run, max_batch=100, turn_s=0.002, name="inference"
    )

    async def client(number: int) -> None:
        for _ in range(number):
            time.sleep(0.001)  # noqa: ASYNC251  # as when the last batch's answers are sent
            await asyncio.sleep(0)
        await gatherer.submit([number])

    await asyncio.gather(*(client(number) for number in range(6)))
    assert run.batches == [[0, 1, 2, 3, 4, 5]]


async def test_a_client_by_itself_is_not_held_back_for_long() -> None:
    gatherer: Gatherer[int, NDArray[np.float32]] = Gatherer(
        Squares(), max_batch=100, turn_s=0.002, name="inference"
    )
    steps: list[Step] = []
    STEPS.set(steps)
    for number in range(100):
        await gatherer.submit([number])
    at_once = [each.began - each.queued < 0.0002 for each in steps]
    assert not any(at_once[:16])  # there might have been others
    assert sum(at_once) > 40  # most of the later ones, on however busy a machine


async def test_when_everybody_who_asks_is_there_nobody_waits_and_more_are_noticed() -> None:
    run = Squares()
    gatherer: Gatherer[int, NDArray[np.float32]] = Gatherer(
        run, max_batch=8, turn_s=0.002, name="inference"
    )
    steps: list[Step] = []
    STEPS.set(steps)
    for _ in range(400):
        await asyncio.gather(*(gatherer.submit([number]) for number in range(3)))
    last = [each.began - each.queued < 0.0002 for each in steps[-300:]]
    assert sum(last) > 200  # most, on however busy a machine

    async def late(number: int) -> None:
        for _ in range(number):
            await asyncio.sleep(0)
        await gatherer.submit([number])

    del run.batches[:]
    for _ in range(40):
        await asyncio.gather(*(late(number) for number in range(6)))
    assert max(map(len, run.batches)) > 3


async def test_a_full_batch_leaves_and_a_slow_one_makes_the_next_smaller() -> None:
    run = Squares(seconds=0.005)
    gatherer: Gatherer[int, NDArray[np.float32]] = Gatherer(
        run, max_batch=8, turn_s=0.002, name="inference"
    )
    await asyncio.gather(*(gatherer.submit([number]) for number in range(30)))
    assert [len(batch) for batch in run.batches][:4] == [8, 4, 2, 1]


async def test_cancelled_and_expired_requests_are_never_run() -> None:
    run = Squares()
    gatherer: Gatherer[int, NDArray[np.float32]] = Gatherer(
        run, max_batch=8, turn_s=0.002, name="inference"
    )
    left = asyncio.ensure_future(gatherer.submit([1]))
    late = asyncio.ensure_future(gatherer.submit([2], deadline=time.monotonic() - 1))
    await asyncio.sleep(0)
    left.cancel()
    assert (await gatherer.submit([3], deadline=time.monotonic() + 60)).tolist() == [[9]]
    with pytest.raises(DeadlinePassed, match="the deadline passed in the queue"):
        await late
    assert run.batches == [[3]]


async def test_a_batch_ends_before_the_earliest_deadline_in_it() -> None:
    run = Squares()
    gatherer: Gatherer[int, NDArray[np.float32]] = Gatherer(
        run, max_batch=8, turn_s=1.0, name="inference"
    )
    gatherer.seconds_per_item = 1.0
    now = time.monotonic()
    late_even_alone = now + 0.9
    deadlines = [None, now + 4.5, None, late_even_alone, *([None] * 4)]
    await asyncio.gather(
        *(gatherer.submit([n], deadline=until) for n, until in enumerate(deadlines))
    )
    assert run.batches[0] == [0, 1, 2, 3]  # the second's deadline leaves room for so many
    assert sorted(each for batch in run.batches for each in batch) == list(range(8))
    assert gatherer.queued == 0


async def test_a_long_batch_leaves_the_loops_other_work_its_turns_before_the_next() -> None:
    run = Squares(seconds=0.02)
    gatherer: Gatherer[int, NDArray[np.float32]] = Gatherer(
        run, max_batch=2, turn_s=0.1, name="inference"
    )
    turns: list[int] = []

    async def other_work() -> None:
        while True:
            turns.append(len(run.batches))
            await asyncio.sleep(0)

    other = asyncio.ensure_future(other_work())
    await asyncio.gather(*(gatherer.submit([number]) for number in range(6)))
    other.cancel()
    between = [turns.count(batches) for batches in (1, 2)]
    assert min(between) >= 8  # one for each 2.5 ms


async def test_an_error_fails_its_batch_only() -> None:
    def odd_is_broken(items: list[int]) -> NDArray[np.float32]:
        if items[0] % 2:
            raise ValueError("broken")
        return np.zeros((len(items), 1), np.float32)

    gatherer: Gatherer[int, NDArray[np.float32]] = Gatherer(
        odd_is_broken, max_batch=1, turn_s=0.002, name="inference"
    )
    first, second, third = await asyncio.gather(
        *(gatherer.submit([number]) for number in (2, 3, 4)), return_exceptions=True
    )
    assert isinstance(first, np.ndarray)
    assert isinstance(third, np.ndarray)
    assert str(second) == "broken"


async def test_closing_fails_what_waits_and_refuses_more() -> None:
    run = Squares()
    gatherer: Gatherer[int, NDArray[np.float32]] = Gatherer(
        run, max_batch=8, turn_s=0.002, name="inference"
    )
    waiting = asyncio.ensure_future(gatherer.submit([1]))
    await asyncio.sleep(0)
    gatherer.close()
    with pytest.raises(Unavailable, match="stopped before"):
        await waiting
    with pytest.raises(Unavailable, match="draining"):
        await gatherer.submit([2])
    assert not run.batches
