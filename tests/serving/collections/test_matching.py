"""Kept answers to filters stay right through every change, and spare reading every item."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from byol_serving.collections.collection import LocalCollection
from byol_serving.collections.filters import Equals, Filter, Not, Range
from byol_serving.collections.index import IndexOptions
from byol_serving.collections.store import Store
from serving.collections.model import Model, clustered

DIM = 4
CONDITION = Range("n", lt=10)
FILTERS: list[Filter] = [CONDITION, Equals("n", 3), Not(Equals("n", 3)), Range("n", gte=1000)]


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[LocalCollection]:
    with Store(tmp_path, options=IndexOptions(compact_from=8, compact_share=0.1)) as store:
        yield store.create("c", dim=DIM, encoder_id="e")


def test_kept_answers_follow_every_kind_of_change(collection: LocalCollection) -> None:
    model, ids = Model(), [f"i{n}" for n in range(100)]
    queries = clustered(2, DIM, seed=3)

    def check() -> None:
        for condition in FILTERS * 2:
            model.check_search(collection, queries, 5, condition)

    def upsert(names: list[str], seed: int, first: int) -> None:
        metadata = [{"n": first + n} for n in range(len(names))]
        vectors = clustered(len(names), DIM, seed=seed)
        collection.upsert(names, vectors, metadata)
        model.upsert(names, vectors, metadata)

    upsert(ids, 0, 0)
    check()
    upsert(ids[:5], 1, 50)  # no longer below 10
    check()
    upsert(["new", *ids[90:]], 2, 0)
    check()
    collection.set_metadata(["i7", "i60"], [{"n": 99}, {"n": 3}])
    model.metadata |= {"i7": {"n": 99}, "i60": {"n": 3}}
    check()
    assert collection.delete(["i8", "new"]) == model.delete(["i8", "new"])
    check()
    collection.settle()
    check()
    doomed = model.matching(Range("n", gte=30))
    assert collection.delete_where(Range("n", gte=30)) == model.delete(doomed)
    check()
    collection.settle()  # squeezes the deleted out: positions move
    check()
    upsert(ids, 5, 0)
    check()


def test_only_what_changed_is_read_again(collection: LocalCollection) -> None:
    ids = [f"i{n}" for n in range(3000)]
    collection.upsert(ids, clustered(3000, DIM), [{"n": n} for n in range(3000)])
    collection.search(clustered(1, DIM), 1, condition=CONDITION)
    collection.upsert(["late"], clustered(1, DIM, seed=9), [{"n": 5}])
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    with collection._database.reading() as connection:  # the one that the search will get
        connection.set_progress_handler(count, 100)
        idle: sqlite3.Connection = connection
    (hits,) = collection.search(
        clustered(1, DIM, seed=9), 1, condition=CONDITION, with_metadata=False
    )
    idle.set_progress_handler(None, 0)
    assert hits[0].id == "late"
    assert steps < 10  # of 100 SQLite instructions each; reading all takes over 100
