"""Threads on their own cores, by what Linux says of them."""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

from byol_serving import own_cores
from byol_serving.batcher import Batcher
from byol_serving.own_cores import OwnCores, cores_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds threads to cores")

T = TypeVar("T")


def in_a_thread(work: Callable[[], T]) -> T:
    """What `work` returns in a thread of its own, which takes its affinity with it."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join(20)
    return found[0]


def here() -> set[int]:
    return os.sched_getaffinity(0)


def test_only_as_many_workers_as_cores_are_held() -> None:
    cores = sorted(here())
    assert cores_for(1) == ()
    assert cores_for(len(cores) + 1) == ()
    assert cores_for(len(cores)) == (tuple(cores) if len(cores) > 1 else ())


def test_a_worker_that_falls_behind_is_let_go_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_cores, "_FREE_S", 0.5)
    everywhere = sorted(here())
    cores = OwnCores([everywhere[0], everywhere[-1]])

    def work() -> list[set[int]]:
        cores.hold(1)  # the other worker, whose thread this is not
        cores.hold(0)
        seen = [here()]
        for _ in range(200):
            cores.ran(0, 0.0029, 0.0020)
            cores.ran(1, 0.0028, 0.0020)
        seen.append(here())
        for _ in range(200):
            cores.ran(0, 0.0060, 0.0020)
        seen.append(here())
        time.sleep(0.6)
        cores.ran(0, 0.0060, 0.0020)
        seen.append(here())
        return seen

    held, released = {everywhere[0]}, {everywhere[0], everywhere[-1]}
    assert in_a_thread(work) == [held, held, released, held]
    assert here() == set(everywhere)


def test_a_worker_that_has_not_begun_is_nobody_to_fall_behind() -> None:
    everywhere = sorted(here())
    cores = OwnCores([everywhere[0], everywhere[-1]])

    def work() -> set[int]:
        cores.hold(0)
        for _ in range(200):
            cores.ran(0, 0.0060, 0.0020)
        return here()

    assert in_a_thread(work) == {everywhere[0]}


def test_one_stopped_process_lets_nobody_go() -> None:
    everywhere = sorted(here())
    core = everywhere[0]
    cores = OwnCores([core, everywhere[-1]])

    def work() -> set[int]:
        cores.hold(1)
        cores.hold(0)
        for wall in (0.003,) * 50 + (60.0,) + (0.003,) * 50:
            cores.ran(0, wall, 0.002)
        return here()

    assert in_a_thread(work) == {core}


async def test_the_threads_of_a_batcher_are_held() -> None:
    core = max(here())

    def look(items: list[int]) -> list[set[int]]:
        return [here() for _ in items]

    held = Batcher[int, list[set[int]]](look, max_batch=4, cores=[core])
    free = Batcher[int, list[set[int]]](look, max_batch=4)
    assert (await held.submit([1])) == [[{core}]]
    assert (await free.submit([1])) == [[here()]]
    await held.close()
    await free.close()


def test_a_core_that_was_taken_away_stops_nobody() -> None:
    cores = OwnCores([max(here()) + 1000])

    def work() -> set[int]:
        cores.hold(0)
        return here()

    assert in_a_thread(work) == here()
