"""Threads: an acknowledged write is found at once, and readers do not wait for writers."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from byol_serving.collections.filters import Equals
from byol_serving.collections.index import IndexOptions
from byol_serving.collections.store import Store
from byol_serving.collections.types import IndexKind
from serving.collections.model import clustered

DIM = 16
OPTIONS = IndexOptions(
    approximate_from=256, absorb_from=64, compact_from=32, compact_share=0.1, snapshot_every=500
)
KINDS: list[IndexKind] = ["flat", "hnsw", "ivf"]


def _together(*works: Callable[[], None]) -> None:
    """Runs all at once; the first error of any of them is raised."""
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # carried to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_writer_finds_what_it_wrote_while_all_write(tmp_path: Path, kind: IndexKind) -> None:
    """While upkeep rebuilds, absorbs, compacts and writes snapshots behind them."""
    with Store(tmp_path, options=OPTIONS) as store:
        collection = store.create("c", dim=DIM, encoder_id="e", index=kind)

        def write(writer: int) -> None:
            generator = np.random.default_rng(writer)
            mine = Equals("writer", writer)
            for step in range(40):
                vectors = generator.standard_normal((20, DIM)).astype(np.float32)
                ids = [f"{writer}-{step}-{n}" for n in range(20)]
                collection.upsert(ids, vectors, [{"writer": writer}] * 20)
                (hits,) = collection.search(vectors[3:4], 1)
                assert hits[0].id == ids[3]
                (hits,) = collection.search(vectors[4:5], 1, condition=mine)
                assert hits[0].id == ids[4]
                assert collection.delete(ids[:10]) == 10
                (hits,) = collection.search(vectors[3:4], 3)
                assert not {hit.id for hit in hits} & set(ids[:10])
                collection.set_metadata(ids[10:11], [{"writer": writer, "step": step}])
                (hits,) = collection.search(vectors[10:11], 1, condition=Equals("step", step))
                assert hits[0].metadata["step"] == step

        def work(writer: int) -> Callable[[], None]:
            return lambda: write(writer)

        _together(*map(work, range(4)))
        assert collection.info.count == 4 * 40 * 10
        assert collection.verify().ok
    with Store(tmp_path, options=OPTIONS) as store:
        assert store.get("c").info.count == 4 * 40 * 10


def test_a_batch_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    vectors = clustered(50, DIM)
    with Store(tmp_path, options=OPTIONS) as store:
        collection = store.create("c", dim=DIM, encoder_id="e")
        ids = [str(n) for n in range(50)]
        collection.upsert(ids, vectors, [{"version": 0}] * 50)
        stop = threading.Event()

        def write() -> None:
            try:
                for version in range(1, 40):
                    collection.upsert(ids, vectors, [{"version": version}] * 50)
            finally:
                stop.set()

        def read() -> None:
            while not stop.is_set():
                (hits,) = collection.search(vectors[:1], 50)
                assert len({hit.metadata["version"] for hit in hits}) == 1
                assert len(collection.search(vectors[:1], 50, condition=Equals("version", 0))) == 1

        _together(write, read, read)


@pytest.mark.parametrize("kind", KINDS)
def test_readers_do_not_wait_for_a_long_write(tmp_path: Path, kind: IndexKind) -> None:
    """A transaction is held open for a second; searches and gets go on in the meantime."""
    vectors = clustered(2000, DIM)
    with Store(tmp_path, options=OPTIONS) as store:
        collection = store.create("c", dim=DIM, encoder_id="e", index=kind)
        ids = [str(n) for n in range(2000)]
        collection.upsert(ids, vectors)
        collection.settle()
        holding, done = threading.Event(), threading.Event()

        def write() -> None:
            with collection._writing, collection._database.writing() as connection:
                connection.execute("UPDATE meta SET value = value WHERE key = 'seq'")
                holding.set()
                assert done.wait(30)

        def read() -> None:
            assert holding.wait(10)
            try:
                for n in range(20):
                    assert collection.search(vectors[n : n + 1], 1)[0][0].id == ids[n]
                    collection.get([ids[n]])
            finally:
                done.set()

        begin = time.monotonic()
        _together(write, read)
        assert time.monotonic() - begin < 20  # they would wait for each other for ever otherwise
