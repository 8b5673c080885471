"""Upserts of several threads share a transaction, and nothing else."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from byol_serving.collections.collection import LocalCollection
from byol_serving.collections.committing import Batch, Committing
from byol_serving.collections.store import Store
from byol_serving.collections.types import UpsertCounts, Vectors
from byol_serving.errors import StoreError
from serving.collections.model import Model, clustered

DIM, WRITERS = 8, 12
VECTORS = clustered(WRITERS, DIM)


def _at_once(
    collection: LocalCollection, upserts: Sequence[Callable[[], UpsertCounts]]
) -> list[UpsertCounts | Exception]:
    """What each answered that came, in this order, while another transaction was going on."""
    answers: list[UpsertCounts | Exception] = [UpsertCounts(inserted=0, updated=0)] * len(upserts)
    queue = collection._committing

    def run(n: int) -> None:
        try:
            answers[n] = upserts[n]()
        except Exception as error:  # handed to the test
            answers[n] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(upserts))]
    with collection._writing:
        for n, thread in enumerate(threads):
            thread.start()
            _until_waiting(queue, n)
    for thread in threads:
        thread.join(10)
    return answers


def _until_waiting(queue: Committing, count: int) -> None:
    end = time.monotonic() + 10
    while not (queue._committing and len(queue._waiting) == count):
        assert time.monotonic() < end
        time.sleep(0.001)


@contextmanager
def _transactions(collection: LocalCollection) -> Iterator[list[int]]:
    """Gets an element for each that is begun."""
    begun: list[int] = []
    writing = collection._database.writing

    def counted() -> AbstractContextManager[object]:
        begun.append(1)
        return writing()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collection._database, "writing", counted)
        yield begun


def _upsert(collection: LocalCollection, name: str, row: Vectors) -> Callable[[], UpsertCounts]:
    return lambda: collection.upsert([name], row[None], [{"by": name}])


def test_who_waits_for_the_disk_waits_together(tmp_path: Path) -> None:
    model = Model()
    with Store(tmp_path) as store:
        collection = store.create("c", dim=DIM, encoder_id="e")
        before = collection.info.version
        names = [f"w{n}" for n in range(WRITERS)]
        calls = [_upsert(collection, *each) for each in zip(names, VECTORS, strict=True)]
        with _transactions(collection) as begun:
            answers = _at_once(collection, calls)
        assert len(begun) == 2  # the first alone, the others together
        assert answers == [UpsertCounts(inserted=1, updated=0)] * WRITERS
        assert before is not None
        assert collection.info.version == before + WRITERS  # a change each, as if they came alone
        model.upsert(names, VECTORS, [{"by": name} for name in names])
        model.check_all(collection)
        model.check_search(collection, VECTORS[:3], 5)
    with Store(tmp_path) as store:
        model.check_all(store.get("c"))


def test_of_one_id_in_several_batches_the_last_stays(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        collection = store.create("c", dim=DIM, encoder_id="e")
        answers = _at_once(collection, [_upsert(collection, "x", row) for row in VECTORS[:5]])
        new, old = UpsertCounts(inserted=1, updated=0), UpsertCounts(inserted=0, updated=1)
        assert answers == [new, old, old, old, old]
        model = Model()
        model.upsert(["x"], VECTORS[4:5], [{"by": "x"}])
        model.check_all(collection)
        assert len(collection.search(VECTORS[:1], 1)[0]) == 1


def test_a_transaction_that_fails_is_refused_to_all_in_it(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        collection = store.create("c", dim=DIM, encoder_id="e")
        collection.upsert(["before"], VECTORS[:1])
        connection = collection._database._writer
        ((pages,),) = connection.execute("PRAGMA page_count").fetchall()
        connection.execute(f"PRAGMA max_page_count = {pages}")  # a disk that is full
        heavy = [{"text": "x" * 50_000}]
        calls = [partial(collection.upsert, [f"w{n}"], VECTORS[:1], heavy) for n in range(4)]
        for answer in _at_once(collection, calls):
            assert isinstance(answer, StoreError)
            assert "is full: free space and retry" in str(answer)
        connection.execute(f"PRAGMA max_page_count = {pages + 1000}")
        assert [item.id for item in collection.page("", 10).items] == ["before"]
        assert collection.upsert(["after"], VECTORS[1:2]).inserted == 1
        assert collection.verify().ok


def test_a_transaction_is_bounded_and_an_interrupt_is_its_own_threads() -> None:
    groups: list[int] = []
    go_on = threading.Event()

    def commit(batches: Sequence[Batch]) -> None:
        groups.append(len(batches))
        if len(groups) == 1:
            assert go_on.wait(10)
            raise KeyboardInterrupt
        for batch in batches:
            batch.counts = UpsertCounts(inserted=len(batch.ids), updated=0)

    queue = Committing(commit)
    ends: list[str] = []

    def run(count: int) -> None:
        batch = Batch(ids=["x"] * count, texts=[], vectors=np.empty((0, 0), np.float32))
        try:
            ends.append(str(queue.upsert(batch).inserted))
        except KeyboardInterrupt:
            ends.append("interrupted")

    threads = [threading.Thread(target=run, args=(count,)) for count in (1, 3000, 5000, 200, 9000)]
    for n, thread in enumerate(threads):
        thread.start()
        _until_waiting(queue, n)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert groups == [1, 2, 1, 1]
    assert sorted(ends) == ["200", "3000", "5000", "9000", "interrupted"]
