"""One collection: what is put in comes out, what is refused changes nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byol_serving.collections import checks
from byol_serving.collections.collection import LocalCollection
from byol_serving.collections.filters import Equals, Exists, Range
from byol_serving.collections.store import Store
from byol_serving.errors import InvalidRequest, InvalidVector, UnknownId
from serving.collections.model import Model, clustered

DIM = 8
IDS = [f"i{n}" for n in range(200)]
VECTORS = clustered(200, DIM)
METADATA = [{"n": n, "kind": "odd" if n % 2 else "even"} for n in range(200)]


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[LocalCollection]:
    with Store(tmp_path) as store:
        yield store.create("c", dim=DIM, encoder_id="e")


@pytest.fixture
def filled(collection: LocalCollection) -> tuple[LocalCollection, Model]:
    model = Model()
    model.upsert(IDS, VECTORS, METADATA)
    counts = collection.upsert(IDS, VECTORS * 3, METADATA)
    assert (counts.inserted, counts.updated) == (200, 0)
    return collection, model


def test_what_is_put_in_comes_out(filled: tuple[LocalCollection, Model]) -> None:
    collection, model = filled
    model.check_all(collection)
    queries = clustered(7, DIM, seed=5)
    for k in (1, 10, 200):
        model.check_search(collection, queries, k)
    for condition in (Equals("kind", "odd"), Range("n", lt=3), Equals("n", -1), Exists("n")):
        model.check_search(collection, queries, 10, condition)


def test_replacing_deleting_and_changing_metadata(filled: tuple[LocalCollection, Model]) -> None:
    collection, model = filled
    newer = clustered(60, DIM, seed=9)
    names = [*IDS[:50], *(f"new{n}" for n in range(10))]
    counts = collection.upsert(names, newer)
    assert (counts.inserted, counts.updated) == (10, 50)
    model.upsert(names, newer)
    assert collection.delete(["i60", "i61", "absent", "a\x00", "\ud800", ""]) == 2
    model.delete(["i60", "i61"])
    collection.set_metadata(["i70", "new1"], [{"n": -5}, {"n": -6, "x": [1, {"y": None}]}])
    model.metadata |= {"i70": {"n": -5}, "new1": {"n": -6, "x": [1, {"y": None}]}}
    assert collection.delete_where(Range("n", gte=100)) == 100
    model.delete(model.matching(Range("n", gte=100)))
    model.check_all(collection)
    model.check_search(collection, newer[:5], 20)
    model.check_search(collection, newer[:5], 20, Range("n", lt=0))
    assert collection.delete_where(Equals("n", "nothing")) == 0


def test_order_scores_and_what_comes_with_them(filled: tuple[LocalCollection, Model]) -> None:
    collection, _ = filled
    (hits,) = collection.search(VECTORS[3:4] * 100, 5, with_vectors=True)
    assert hits[0].id == "i3"
    assert hits[0].score == pytest.approx(1)
    assert hits[0].score <= 1
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert hits[0].vector is not None
    np.testing.assert_allclose(hits[0].vector, VECTORS[3], atol=1e-6)
    (bare,) = collection.search(VECTORS[3:4], 5, with_metadata=False)
    assert [(hit.id, hit.metadata, hit.vector) for hit in bare] == [(h.id, {}, None) for h in hits]
    least = hits[2].score
    (near,) = collection.search(VECTORS[3:4], 200, min_score=least)
    assert [hit.id for hit in near] == [hit.id for hit in hits[:3]]


def test_searches_that_cannot_be_answered(collection: LocalCollection) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        collection.search(VECTORS[:1], 1)
    collection.upsert(IDS[:3], VECTORS[:3])
    for k in (0, -1, 4):
        with pytest.raises(InvalidRequest, match=f"k = {k} is outside 1 to 3"):
            collection.search(VECTORS[:1], k)
    assert collection.search(np.empty((0, DIM), np.float32), 1) == []


BAD = [
    (np.ones((1, DIM + 1)), r"shape \[1, 9\]"),
    (np.ones(DIM), r"shape \[8\]"),
    (np.zeros((1, DIM)), "vector 0 is zero"),
    (np.array([[1.0] * DIM, [np.nan] * DIM]), "vector 1 is not finite"),
    (np.full((1, DIM), np.inf), "vector 0 is not finite"),
    (np.array([["x"] * DIM]), "<U1"),
]


@pytest.mark.parametrize(("vectors", "message"), BAD)
def test_bad_vectors(
    filled: tuple[LocalCollection, Model], vectors: np.ndarray, message: str
) -> None:
    collection, model = filled
    ids = [f"i{n}" for n in range(len(vectors))]
    for call in (lambda: collection.upsert(ids, vectors), lambda: collection.search(vectors, 1)):
        with pytest.raises(InvalidVector, match=message):
            call()
    model.check_all(collection)


def test_vectors_may_lie_in_memory_in_any_way() -> None:
    wanted = checks.unit_vectors(VECTORS[:4], DIM)
    odd = np.frombuffer(b"-" + VECTORS[:4].tobytes(), np.uint8)[1:].view(np.float32)
    assert not odd.flags.aligned
    ways: list[Any] = [
        VECTORS[:4].astype(">f4"),
        odd.reshape(4, DIM),
        np.asfortranarray(VECTORS[:4]),
        VECTORS[:8][::2][:, ::-1][:, ::-1][:1],
        VECTORS[:4].astype(np.float64),
    ]
    for given in ways:
        unit = checks.unit_vectors(given, DIM)
        np.testing.assert_allclose(unit, wanted[: len(unit)], atol=1e-7)
        assert unit.flags.c_contiguous
        assert unit.dtype == np.float32


def test_extreme_vectors_are_normalised(collection: LocalCollection) -> None:
    extreme = np.stack([np.full(DIM, 3e38), np.full(DIM, 1e-44)]).astype(np.float32)
    collection.upsert(["huge", "tiny"], extreme)
    assert [hit.score for hit in collection.search(extreme[:1], 2)[0]] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b", "a"], "'a' is twice"),
        (["a", "", "c"], "id 1 is empty"),
        (["a", "b\x00", "c"], "id 1 is holding a NUL"),
        (["a", "\ud800", "c"], "id 1 is not valid Unicode"),
        (["a", "é" * 257, "c"], "514 bytes"),
        (["a", "b"], "2 ids but 3 vectors"),
    ],
)
def test_bad_ids(collection: LocalCollection, ids: list[str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        collection.upsert(ids, VECTORS[:3])
    assert collection.info.count == 0


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": float("nan")}, "not JSON"),
        ({"a": {1, 2}}, "not JSON"),
        ({"a": "b\x00"}, "NUL"),
        ({"a": 2**63}, "outside 64 bits"),
        ({1: "a"}, "keys are strings"),
        ({"a": "x" * 2**20}, "at most 1048576"),
        ({"a": "\ud800"}, "not JSON"),
    ],
)
def test_bad_metadata(
    filled: tuple[LocalCollection, Model], metadata: dict[str, object], message: str
) -> None:
    collection, model = filled
    pair = [{}, metadata]  # not JSON, as a caller without types could send it
    with pytest.raises(InvalidRequest, match=message):
        collection.upsert(["i1", "new"], VECTORS[:2], pair)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=message):
        collection.set_metadata(["i1", "i2"], pair)  # type: ignore[arg-type]
    model.check_all(collection)


def test_unknown_ids_change_nothing(filled: tuple[LocalCollection, Model]) -> None:
    collection, model = filled
    with pytest.raises(UnknownId, match="'never'"):
        collection.set_metadata(["i1", "never"], [{}, {}])
    for name in ("never", "\ud800", "a\x00"):
        with pytest.raises(UnknownId):
            collection.get(["i1", name])
    model.check_all(collection)


def test_empty_batches(filled: tuple[LocalCollection, Model]) -> None:
    collection, model = filled
    assert collection.upsert([], np.empty((0, DIM), np.float32)).inserted == 0
    collection.set_metadata([], [])
    assert collection.delete([]) == 0
    assert collection.get([]) == []
    model.check_all(collection)


def test_more_ids_than_sqlite_takes_parameters(collection: LocalCollection) -> None:
    count = 40_000
    ids = [str(n) for n in range(count)]
    vectors = np.random.default_rng(0).standard_normal((count, DIM)).astype(np.float32)
    assert collection.upsert(ids, vectors).inserted == count
    assert collection.upsert(ids, vectors).updated == count
    assert len(collection.get(ids, with_vectors=True)) == count
    assert collection.delete(ids) == count
