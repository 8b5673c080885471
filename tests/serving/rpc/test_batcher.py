"""The batcher with a real encoder, and with a slow one where something must go wrong on cue."""

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from byol_serving.batcher import Batcher
from byol_serving.budget import Budget
from byol_serving.encoder import Encoder
from byol_serving.errors import DeadlinePassed, InvalidRequest, Overloaded, Unavailable
from byol_serving.images import Pixels
from serving.support import make_bundle, random_pixels, reference


class Gate:
    """Doubles numbers, each batch only when told to."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)
        self.error: Exception | None = None

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.entered.release()
        assert self.permits.acquire(timeout=10)
        if self.error:
            raise self.error
        return [2 * item for item in items]


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def batcher(gate: Gate) -> AsyncIterator[Batcher[int, list[int]]]:
    batcher = Batcher[int, list[int]](gate, max_batch=4)
    yield batcher
    gate.permits.release(100)
    await batcher.close()


async def busy(gate: Gate) -> None:
    """Waits until the worker is inside another batch."""
    assert await asyncio.to_thread(gate.entered.acquire, timeout=5)


async def test_results_reach_their_own_request_with_a_real_encoder(tmp_path: Path) -> None:
    encoder = Encoder(make_bundle(tmp_path / "tiny"))

    def embed(frames: list[Pixels]) -> NDArray[np.float32]:
        return encoder.embed(np.stack(frames))

    batcher = Batcher[Pixels, NDArray[np.float32]](embed, max_batch=8)
    pixels = random_pixels(60)
    cuts = [0, 1, 2, 5, 25, 26, 60]
    parts = await asyncio.gather(
        *(batcher.submit(list(pixels[a:b])) for a, b in itertools.pairwise(cuts))
    )
    await batcher.close()
    rows = np.concatenate([row for part in parts for row in part])
    np.testing.assert_allclose(rows, reference(pixels), atol=1e-5)


async def test_an_idle_batcher_does_not_wait_and_a_busy_one_fills_batches(
    gate: Gate, batcher: Batcher[int, list[int]]
) -> None:
    first = asyncio.ensure_future(batcher.submit([0]))
    await busy(gate)
    rest = [asyncio.ensure_future(batcher.submit([n])) for n in range(1, 6)]
    await asyncio.sleep(0)
    assert batcher.queued == 5
    gate.permits.release(3)
    assert await first == [[0]]
    assert [await each for each in rest] == [[[2]], [[4]], [[6]], [[8]], [[10]]]
    assert gate.batches == [[0], [1, 2, 3, 4], [5]]
    assert batcher.queued == 0


async def test_a_worker_takes_its_next_batch_while_the_event_loop_is_busy(
    gate: Gate, batcher: Batcher[int, list[int]]
) -> None:
    first = asyncio.ensure_future(batcher.submit([0]))
    await busy(gate)
    second = asyncio.ensure_future(batcher.submit([1]))
    await asyncio.sleep(0)
    gate.permits.release(2)
    assert gate.entered.acquire(timeout=5)  # and the loop does nothing until then
    assert [await first, await second] == [[[0]], [[2]]]


async def test_a_large_request_is_split_and_lets_small_ones_through(
    gate: Gate, batcher: Batcher[int, list[int]]
) -> None:
    large = asyncio.ensure_future(batcher.submit(list(range(20))))
    await busy(gate)
    small = asyncio.ensure_future(batcher.submit([100]))
    await asyncio.sleep(0)  # it is queued now
    gate.permits.release(3)
    assert await small == [[200]]
    assert not large.done()
    gate.permits.release(3)
    assert [n for part in await large for n in part] == [2 * n for n in range(20)]
    assert max(map(len, gate.batches)) == 4


async def test_cancelled_and_expired_requests_never_reach_the_worker(
    gate: Gate, batcher: Batcher[int, list[int]]
) -> None:
    first = asyncio.ensure_future(batcher.submit([0]))
    await busy(gate)
    gone = asyncio.ensure_future(batcher.submit([1]))
    late = asyncio.ensure_future(batcher.submit([2], deadline=time.monotonic() + 0.01))
    kept = asyncio.ensure_future(batcher.submit([3], deadline=time.monotonic() + 60))
    await asyncio.sleep(0.02)
    gone.cancel()
    gate.permits.release(2)
    assert await kept == [[6]]
    assert await first == [[0]]
    with pytest.raises(DeadlinePassed):
        await late
    assert gate.batches == [[0], [3]]
    assert batcher.queued == 0


async def test_a_batch_stays_small_for_a_request_that_is_short_of_time(gate: Gate) -> None:
    batcher = Batcher[int, list[int]](gate, max_batch=8)
    first = asyncio.ensure_future(batcher.submit([0]))
    await busy(gate)
    batcher.seconds_per_item = 12.5  # a pace that is 10 after the first batch, 8 after the second
    now = time.monotonic()
    waiting = [
        batcher.submit([1, 2, 3], deadline=now + 10_000),
        batcher.submit([4], deadline=now + 25),  # too late in a batch of 4
        batcher.submit([5, 6, 7]),  # of which two end in time for it
        batcher.submit([8], deadline=now + 5),  # late even alone: makes no batch smaller
    ]
    done = asyncio.gather(*waiting)
    await asyncio.sleep(0)
    gate.permits.release(100)
    await first
    await done
    await batcher.close()
    assert gate.batches == [[0], [1, 2, 3], [4, 5, 6], [8, 7]]


async def test_small_items_keep_to_one_worker_unless_it_stays_away(gate: Gate) -> None:
    batcher = Batcher[int, list[int]](gate, max_batch=8, workers=2, share=True, one_below_s=1)
    gate.permits.release(1)
    assert await batcher.submit([0]) == [[0]]  # now it knows how small they are
    await busy(gate)
    first = asyncio.ensure_future(batcher.submit([1, 2]))
    await busy(gate)
    second = asyncio.ensure_future(batcher.submit([3]))
    await asyncio.sleep(0)
    assert batcher.queued == 1
    await busy(gate)  # in the other worker: the first is not coming back
    gate.permits.release(2)
    assert await first == [[2, 4]]
    assert await second == [[6]]
    await batcher.close()
    assert gate.batches == [[0], [1, 2], [3]]


async def test_what_a_worker_leaves_to_another_that_stays_away_is_taken_all_the_same(
    gate: Gate,
) -> None:
    batcher = Batcher[int, list[int]](gate, max_batch=8, workers=2, share=True, one_below_s=1)
    gate.permits.release(1)
    await batcher.submit([0])
    await busy(gate)
    waiting = [asyncio.ensure_future(batcher.submit([1]))]
    await busy(gate)
    waiting.append(asyncio.ensure_future(batcher.submit([2])))
    await busy(gate)  # both workers are in batches now
    waiting.append(asyncio.ensure_future(batcher.submit([3])))
    await asyncio.sleep(0)
    gate.permits.release(1)  # one of them ends, and leaves the small item to the other
    await busy(gate)  # which does not come
    gate.permits.release(2)
    await asyncio.gather(*waiting)
    await batcher.close()
    assert gate.batches == [[0], [1], [2], [3]]


async def test_items_that_take_long_leave_in_small_batches() -> None:
    batches: list[int] = []

    def work(items: list[int]) -> list[int]:
        batches.append(len(items))
        ends = time.thread_time() + 0.01 * len(items)
        while time.thread_time() < ends:
            pass
        return items

    batcher = Batcher[int, list[int]](work, max_batch=8, turn_s=0.029)  # for 9.7 to 14.5 ms, two
    await batcher.submit([0])
    assert await batcher.submit(list(range(6))) == [[0, 1], [2, 3], [4, 5]]
    await batcher.close()
    assert batches == [1, 2, 2, 2]


async def test_an_error_fails_its_batch_only(gate: Gate, batcher: Batcher[int, list[int]]) -> None:
    gate.error = ValueError("broken")
    gate.permits.release(1)
    with pytest.raises(ValueError, match="broken"):
        await batcher.submit([1, 2, 3, 4])
    gate.error = None
    gate.permits.release(1)
    assert await batcher.submit([1]) == [[2]]


async def test_closing_fails_what_waits_and_refuses_more(gate: Gate) -> None:
    batcher = Batcher[int, list[int]](gate, max_batch=1)
    first = asyncio.ensure_future(batcher.submit([0]))
    await busy(gate)
    waiting = asyncio.ensure_future(batcher.submit([1]))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(batcher.close())
    await asyncio.sleep(0)
    gate.permits.release(1)
    await closing
    assert await first == [[0]]
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await batcher.submit([2])


async def test_shared_work_is_divided_among_free_workers() -> None:
    gate = Gate()
    batcher = Batcher[int, list[int]](gate, max_batch=16, workers=2, share=True)
    gate.permits.release(2)
    await batcher.submit(list(range(8)))
    await batcher.close()
    assert sorted(map(len, gate.batches)) == [4, 4]


@pytest.mark.parametrize(
    ("enough", "largest"),
    [
        (1, 4),  # of 32 by two workers in four parts each
        (3, 4),
        (8, 8),
        (0, 16),  # the whole share
    ],
)
async def test_shares_beyond_what_is_enough_are_taken_in_parts(enough: int, largest: int) -> None:
    gate = Gate()
    batcher = Batcher[int, list[int]](gate, max_batch=16, workers=2, share=True, enough=enough)
    gate.permits.release(100)
    await batcher.submit(list(range(32)))
    await batcher.close()
    assert len(gate.batches[0]) == max(map(len, gate.batches)) == largest
    assert sum(map(len, gate.batches)) == 32


def budget(images: int = 8, size: int = 1000) -> Budget:
    return Budget(max_images=images, max_bytes=size, seconds_per_image=lambda: 0.1)


async def test_a_full_budget_refuses_at_once_with_a_hint() -> None:
    room = budget()
    with room.claim(6, 10):
        with pytest.raises(Overloaded) as caught:
            room.claim(3, 10)
        assert caught.value.retry_after_s == pytest.approx(0.6)
        with pytest.raises(Overloaded):
            room.claim(1, 995)
        with room.claim(2, 10):
            assert (room.images, room.bytes) == (8, 20)
    assert (room.images, room.bytes) == (0, 0)


async def test_what_can_never_fit_is_not_worth_a_retry() -> None:
    with pytest.raises(InvalidRequest, match="send fewer"):
        budget().claim(9, 1)
    with pytest.raises(InvalidRequest, match="send fewer"):
        await budget().wait_for(1, 1001)


async def test_streams_wait_in_turn_and_leave_room_for_others() -> None:
    room = budget()
    first = await room.wait_for(6, 1)
    second = asyncio.ensure_future(room.wait_for(6, 1))
    third = asyncio.ensure_future(room.wait_for(1, 1))
    await asyncio.sleep(0)
    assert not second.done()
    assert not third.done()
    with room.claim(2, 1):  # the quarter that streams may not fill
        pass
    second.cancel()
    await asyncio.sleep(0)
    with first:
        pass
    with await third:
        assert room.images == 1
    assert (room.images, room.bytes) == (0, 0)


async def test_a_stream_cancelled_in_the_turn_it_is_granted_gives_its_room_back() -> None:
    room = budget()
    first = await room.wait_for(6, 1)
    second = asyncio.ensure_future(room.wait_for(6, 1))
    await asyncio.sleep(0)
    with first:
        pass
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert room.images == 0
