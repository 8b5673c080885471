"""How long a reader waits for whoever writes: docs/collections.md states the bound.

Whatever a writer, a snapshot or a reorganisation is held up in, readers answer meanwhile; and with
all of them at work none waits as long as WORST_S, twice what is stated.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byol_serving.collections import approximate, snapshot
from byol_serving.collections.approximate import Approximate
from byol_serving.collections.collection import LocalCollection
from byol_serving.collections.filters import Equals
from byol_serving.collections.index import IndexOptions
from byol_serving.collections.store import Store
from byol_serving.collections.types import IndexKind
from serving.collections.model import clustered

DIM, COUNT = 16, 1200
WORST_S = 2.0
OPTIONS = IndexOptions(approximate_from=256, absorb_from=64, compact_from=64, compact_share=0.05)
VECTORS = clustered(COUNT, DIM)
IDS = [str(n) for n in range(COUNT)]
METADATA = [{"tenth": n % 10} for n in range(COUNT)]
READS: dict[str, Callable[[LocalCollection], object]] = {
    "search": lambda c: c.search(VECTORS[:1], 5, with_metadata=False),
    "search with metadata": lambda c: c.search(VECTORS[:2], 5),
    "filtered search": lambda c: c.search(VECTORS[:1], 5, condition=Equals("tenth", 3)),
    "get": lambda c: c.get(["7"], with_vectors=True),
    "page": lambda c: c.page("", 20),
    "info": lambda c: c.info,
}


@contextmanager
def _filled(path: Path, kind: IndexKind) -> Iterator[LocalCollection]:
    with Store(path, options=OPTIONS) as store:
        collection = store.create("c", dim=DIM, encoder_id="e", index=kind)
        collection.upsert(IDS, VECTORS, METADATA)
        collection.settle()
        yield collection


def _slowest(collection: LocalCollection) -> dict[str, float]:
    """Seconds that each kind of read took."""
    taken = {}
    for name, read in READS.items():
        begin = time.monotonic()
        read(collection)
        taken[name] = time.monotonic() - begin
    return taken


def _replace_many(collection: LocalCollection) -> None:
    collection.upsert(IDS[:300], VECTORS[:300], METADATA[:300])
    collection.settle()  # squeezes out the replaced, which builds the index anew


@pytest.mark.parametrize(
    ("work", "place", "held"),
    [
        (lambda c: c.snapshot(), snapshot, "checksum"),
        (_replace_many, Approximate, "build"),
        (_replace_many, approximate, "tuned"),
    ],
    ids=["snapshot", "compaction and switch", "tuning"],
)
def test_readers_answer_while_it_is_held_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[LocalCollection], None],
    place: Any,
    held: str,
) -> None:
    inside, go_on = threading.Event(), threading.Event()
    original = getattr(place, held)

    def hold(*args: Any, **options: Any) -> Any:
        inside.set()
        assert go_on.wait(60)
        return original(*args, **options)

    with _filled(tmp_path, "hnsw") as collection:
        _slowest(collection)
        monkeypatch.setattr(place, held, hold)
        thread = threading.Thread(target=work, args=(collection,))
        thread.start()
        assert inside.wait(30)
        try:
            reading = threading.Thread(target=_slowest, args=(collection,))
            reading.start()
            reading.join(10 * WORST_S)  # a reader that waits would wait for ever
            assert not reading.is_alive()
        finally:
            go_on.set()
            thread.join(60)
            reading.join(60)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf-sq8"])
def test_no_reader_waits_long_while_everything_goes_on(tmp_path: Path, kind: IndexKind) -> None:
    stop = threading.Event()
    done = {"writes": 0, "snapshots": 0}
    errors: list[BaseException] = []
    worst = dict.fromkeys(READS, 0.0)

    def until_stopped(work: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as error:  # carried to the test's own thread
            errors.append(error)

    with _filled(tmp_path, kind) as collection:
        before = collection._index.view.generation

        def write() -> None:
            some = np.random.default_rng(done["writes"]).choice(COUNT, 200, replace=False)
            ids, texts = [IDS[n] for n in some], [METADATA[n] for n in some]
            collection.upsert(ids, VECTORS[some], texts)
            done["writes"] += 1

        def keep() -> None:
            collection.snapshot()
            done["snapshots"] += 1

        def read() -> None:
            for name, seconds in _slowest(collection).items():
                worst[name] = max(worst[name], seconds)

        works = (write, keep, read)
        threads = [threading.Thread(target=until_stopped, args=(each,)) for each in works]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 30
        while time.monotonic() < end and (
            done["writes"] < 40
            or done["snapshots"] < 2
            or collection._index.view.generation - before < 2
        ):
            time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert errors == []
        assert done["writes"] >= 40
        assert done["snapshots"] >= 2
        assert collection._index.view.generation - before >= 2  # compactions and switches
        assert max(worst.values()) < WORST_S, worst
