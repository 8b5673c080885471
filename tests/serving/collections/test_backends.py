"""One suite for every backend: what `types.Collection` and `types.Store` promise.

Milvus runs embedded (Milvus Lite), or where BYOL_TEST_MILVUS names a server (http://HOST:19530).
Answers are compared with brute force over plain lists.
"""

import importlib.util
import itertools
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from byol_serving.collections.classifying import classify
from byol_serving.collections.duplicates import find_duplicates
from byol_serving.collections.filters import (
    All,
    Any,
    Equals,
    Exists,
    Filter,
    In,
    Not,
    Range,
    matches,
)
from byol_serving.collections.grouping import find_groups
from byol_serving.collections.opening import open_store
from byol_serving.collections.outliers import find_outliers
from byol_serving.collections.querying import Query, Wanted, find
from byol_serving.collections.types import (
    Collection,
    Hit,
    IndexKind,
    Item,
    Json,
    Metadata,
    Store,
    Vectors,
)
from byol_serving.collections.walking import pages
from byol_serving.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidRequest,
    InvalidVector,
    Unavailable,
    UnknownCollection,
    UnknownId,
)

DIM, COUNT = 6, 60
BACKENDS = ["local", "milvus"]
HAS_MILVUS = bool(importlib.util.find_spec("pymilvus") and importlib.util.find_spec("milvus_lite"))
RNG = np.random.default_rng(21)


def unit(rows: np.ndarray) -> Vectors:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


VECTORS = unit(RNG.standard_normal((COUNT, DIM)))
VECTORS[50:] = VECTORS[:10]
IDS = [f"i{n:02}" for n in range(COUNT)]
VALUES: list[Json] = [
    "cat",
    "1",
    "",
    'q"uo\\te',
    "ü\n",
    1,
    0,
    -3,
    2.5,
    1e300,
    2**53 + 1,
    True,
    False,
    None,
]
KEYS = ["a", "b b", 'c"\\', "ü"]


def metadata_of(n: int) -> Metadata:
    found: dict[str, Json] = {"n": n}
    for step, key in enumerate(KEYS, 1):
        if n % (step + 2):
            found[key] = VALUES[n * step % len(VALUES)]
    return found | {"a": ["cat", {"deep": 1}]} if n % 11 == 5 else found


METADATA = [metadata_of(n) for n in range(COUNT)]


def address_of(backend: str, folder: Path) -> str:
    if backend == "local":
        return str(folder / "store")
    if server := os.environ.get("BYOL_TEST_MILVUS"):
        return f"milvus:{server}"
    if not HAS_MILVUS:
        pytest.skip("pymilvus or milvus-lite is not installed (extra: milvus)")
    return f"milvus:{folder / 'lite.db'}"


@pytest.fixture(scope="module", params=BACKENDS)
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Store]:
    opened = open_store(address_of(request.param, tmp_path_factory.mktemp(request.param)))
    yield opened
    opened.close()


RUN = uuid.uuid4().hex[:8]
NAMES = (f"c-{RUN}.{n}" for n in itertools.count())  # a server may hold those of other runs


@pytest.fixture
def empty(store: Store) -> Collection:
    return store.create(next(NAMES), dim=DIM, encoder_id="e")


@pytest.fixture(scope="module")
def filled(store: Store) -> Collection:
    """Only read."""
    made = store.create(next(NAMES), dim=DIM, encoder_id="e")
    counts = made.upsert(IDS, VECTORS * 3, METADATA)
    assert (counts.inserted, counts.updated) == (COUNT, 0)
    return made


def everything(collection: Collection) -> dict[str, Item]:
    found = pages(collection, with_metadata=True)
    return {item.id: item for page in found for item in page.items}


def test_collections_come_and_go(store: Store) -> None:
    name = next(NAMES)
    made = store.create(name, dim=DIM, encoder_id="e" * 64)
    info = made.info
    assert (info.name, info.dim, info.encoder_id, info.count) == (name, DIM, "e" * 64, 0)
    assert (info.index, info.recall) == ("flat", 1.0)
    assert store.get(name).info == info
    assert info in store.list()
    assert [each.name for each in store.list()] == sorted(each.name for each in store.list())
    with pytest.raises(AlreadyExists, match=name):
        store.create(name, dim=DIM, encoder_id="e")
    made.upsert(IDS[:3], VECTORS[:3])
    store.drop(name)
    with pytest.raises(UnknownCollection, match=name):
        store.get(name)
    with pytest.raises(UnknownCollection):
        store.drop(name)
    with pytest.raises(UnknownCollection):
        made.search(VECTORS[:1], 1)
    assert store.create(name, dim=3, encoder_id="f").info.count == 0
    assert store.get(name).info.dim == 3


@pytest.mark.parametrize(
    ("name", "dim", "index"),
    [("", DIM, "flat"), ("../x", DIM, "flat"), ("ok", 0, "flat"), ("ok", DIM, "tree")],
)
def test_collections_that_cannot_be(store: Store, name: str, dim: int, index: str) -> None:
    with pytest.raises(InvalidRequest):
        store.create(name, dim=dim, encoder_id="e", index=index)  # type: ignore[arg-type]


def test_items_are_inserted_replaced_and_read(empty: Collection) -> None:
    assert empty.upsert(IDS[:4], VECTORS[:4]).inserted == 4
    again = empty.upsert(["i03", "new"], VECTORS[10:12], [{"x": [1, None]}, {"y": 0.5}])
    assert (again.inserted, again.updated) == (1, 1)
    items = empty.get(["new", "i03", "i00"], with_vectors=True)
    assert [item.id for item in items] == ["new", "i03", "i00"]
    assert [item.metadata for item in items] == [{"y": 0.5}, {"x": [1, None]}, {}]
    rows = np.stack([np.asarray(item.vector) for item in items])
    np.testing.assert_allclose(rows, VECTORS[[11, 10, 0]], atol=1e-6)
    assert empty.get(["i00"])[0].vector is None
    assert empty.get([]) == []
    with pytest.raises(UnknownId, match="never"):
        empty.get(["i00", "never"])
    assert empty.info.count == 5


def test_metadata_alone_is_replaced_whole_or_not(empty: Collection) -> None:
    empty.upsert(IDS[:3], VECTORS[:3], [{"a": 1}, {"b": 2}, {}])
    empty.set_metadata(IDS[1:3], [{"c": 3}, {"d": True}])
    with pytest.raises(UnknownId, match="never"):
        empty.set_metadata(["i00", "never"], [{"z": 1}, {"z": 1}])
    found = everything(empty)
    assert [found[each].metadata for each in IDS[:3]] == [{"a": 1}, {"c": 3}, {"d": True}]
    np.testing.assert_allclose(np.asarray(found["i02"].vector), VECTORS[2], atol=1e-6)
    assert [h.id for h in empty.search(VECTORS[:1], 3, condition=Equals("d", True))[0]] == ["i02"]


def test_items_are_deleted(empty: Collection) -> None:
    empty.upsert(IDS[:20], VECTORS[:20], METADATA[:20])
    assert empty.delete(["i03", "never", "i04"]) == 2
    assert empty.delete(["i03"]) == 0
    assert empty.delete([]) == 0
    assert empty.delete_where(Range("n", gte=15)) == 5
    assert empty.delete_where(Range("n", gte=15)) == 0
    assert sorted(everything(empty)) == [each for each in IDS[:15] if each not in ("i03", "i04")]
    assert empty.info.count == 13
    assert all(hit.id != "i03" for hit in empty.search(VECTORS[3:4], 13)[0])
    assert empty.delete_where(All(())) == 13
    with pytest.raises(InvalidRequest, match="empty"):
        empty.search(VECTORS[:1], 1)


def test_a_batch_that_is_wrong_changes_nothing(empty: Collection) -> None:
    empty.upsert(["a"], VECTORS[:1], [{"x": 1}])
    zero, nan = np.zeros((1, DIM), np.float32), np.full((1, DIM), np.nan, np.float32)
    for ids, rows, metadata, error in (
        (["b", ""], VECTORS[:2], None, InvalidRequest),
        (["b", "b"], VECTORS[:2], None, InvalidRequest),
        (["b", "x" * 513], VECTORS[:2], None, InvalidRequest),
        (["b"], VECTORS[:2], None, InvalidRequest),
        (["b"], VECTORS[:1], [{}, {}], InvalidRequest),
        (["b"], VECTORS[:1], [{"x": float("nan")}], InvalidRequest),
        (["b"], VECTORS[:1, :3], None, InvalidVector),
        (["a", "b"], np.concatenate([VECTORS[1:2], zero]), None, InvalidVector),
        (["a", "b"], np.concatenate([VECTORS[1:2], nan]), None, InvalidVector),
    ):
        with pytest.raises(error):
            empty.upsert(ids, rows, metadata)
    found = everything(empty)
    assert list(found) == ["a"]
    assert found["a"].metadata == {"x": 1}
    np.testing.assert_allclose(np.asarray(found["a"].vector), VECTORS[0], atol=1e-6)
    assert empty.upsert([], VECTORS[:0]).inserted == 0


def test_ids_may_hold_any_text(empty: Collection) -> None:
    ids = [
        "a b",
        'quo"te',
        "back\\slash",
        "new\nline",
        "ü€😀",
        "'",
        "%",
        "id",
        "x" * 512,
        "\t",
        "é",
    ]
    empty.upsert(ids, VECTORS[: len(ids)], [{"n": n} for n in range(len(ids))])
    for n, each in enumerate(ids):
        assert empty.get([each])[0].metadata == {"n": n}
    assert set(everything(empty)) == set(ids)
    assert [hit.id for hit in empty.search(VECTORS[3:4], 1)[0]] == ["new\nline"]
    assert empty.delete(ids[:5]) == 5
    assert set(everything(empty)) == set(ids[5:])


def origins(found: Iterable[Hit | str]) -> list[str]:
    """Ids, a copy's as its original's: their scores may differ in the last bit, either way."""
    ids = [each if isinstance(each, str) else each.id for each in found]
    return [f"i0{each[2]}" if each[1] == "5" else each for each in ids]


def ranked(vector: Vectors, condition: Filter | None = None) -> list[str]:
    """Best first, an item before its copy."""
    scores = VECTORS @ vector
    scores[50:] = scores[:10]
    return [
        IDS[n]
        for n in np.lexsort((np.arange(COUNT), -scores))
        if condition is None or matches(condition, METADATA[n])
    ]


@pytest.mark.parametrize("k", [1, 7, COUNT])
def test_search_is_brute_force(filled: Collection, k: int) -> None:
    queries = unit(RNG.standard_normal((9, DIM)))
    for vector, hits in zip(queries, filled.search(queries * 2, k), strict=True):
        assert origins(hits) == origins(ranked(vector)[:k])
        for hit in hits:
            n = IDS.index(hit.id)
            assert hit.score == pytest.approx(float(VECTORS[n] @ vector), abs=1e-5)
            assert hit.metadata == METADATA[n]
            assert hit.vector is None
    (near,) = filled.search(queries[:1], COUNT, min_score=0.2, with_metadata=False)
    scores = {each: float(VECTORS[n] @ queries[0]) for n, each in enumerate(IDS)}
    assert origins(near) == origins(each for each in ranked(queries[0]) if scores[each] >= 0.2)
    assert near[0].metadata == {}
    (shown,) = filled.search(queries[:1], 1, with_vectors=True)
    place = IDS.index(shown[0].id)
    np.testing.assert_allclose(np.asarray(shown[0].vector), VECTORS[place], atol=1e-6)
    assert filled.search(queries[:0], 1) == []


def test_columns_hold_what_hits_hold(filled: Collection) -> None:
    queries = unit(RNG.standard_normal((9, DIM)))
    few, none = In("n", (3, 4, 5)), Exists("no such key")
    for k, condition, least in [(7, None, None), (COUNT, few, None), (30, few, 0.1), (3, none, 0)]:
        hits = filled.search(queries, k, condition=condition, min_score=least, with_metadata=False)
        found = filled.search_columns(queries, k, condition=condition, min_score=least)
        assert found.counts.tolist() == list(map(len, hits))
        assert [[hit.id for hit in each] for each in found.hits()] == [
            [hit.id for hit in each] for each in hits
        ]
        scores = [hit.score for each in hits for hit in each]
        np.testing.assert_allclose(found.flat()[1], scores, atol=1e-6)
        assert (found.ids != "").sum() == len(scores)
    with pytest.raises(InvalidRequest):
        filled.search_columns(queries, 0)


def test_searches_that_cannot_be(filled: Collection) -> None:
    for k in (0, COUNT + 1):
        with pytest.raises(InvalidRequest, match=f"k = {k}"):
            filled.search(VECTORS[:1], k)
    for rows in (VECTORS[:1, :2], 0 * VECTORS[:1]):
        with pytest.raises(InvalidVector):
            filled.search(rows, 1)
    deep: Filter = Exists("a")
    for _ in range(200):
        deep = Not(deep)
    with pytest.raises(InvalidRequest, match="deep"):
        filled.search(VECTORS[:1], 1, condition=deep)


scalars = st.sampled_from([each for each in VALUES if each is not None]) | st.integers(-5, 60)
keys = st.sampled_from([*KEYS, "n", "missing"])
bounds = st.none() | st.integers(-5, 60) | st.sampled_from([0.5, 2.5, float("inf"), -float("inf")])
leaves: st.SearchStrategy[Filter] = st.one_of(
    st.builds(Equals, keys, scalars),
    st.builds(In, keys, st.lists(scalars, max_size=4).map(tuple)),
    st.builds(Range, keys, bounds, bounds, bounds, bounds),
    st.builds(Exists, keys),
)
filters = st.recursive(
    leaves,
    lambda inner: (
        st.builds(Not, inner)
        | st.builds(All, st.lists(inner, max_size=3).map(tuple))
        | st.builds(Any, st.lists(inner, max_size=3).map(tuple))
    ),
    max_leaves=6,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(condition=filters)
def test_filters_mean_what_matches_says(filled: Collection, condition: Filter) -> None:
    (hits,) = filled.search(VECTORS[7:8], 12, condition=condition)
    assert origins(hits) == origins(ranked(VECTORS[7], condition)[:12])
    page = filled.page("", COUNT, condition=condition)
    assert [item.id for item in page.items] == [
        each for each, metadata in zip(IDS, METADATA, strict=True) if matches(condition, metadata)
    ]


@pytest.mark.parametrize("limit", [1, 7, COUNT])
def test_pages_give_every_item_once(filled: Collection, limit: int) -> None:
    after, seen = "", []
    while True:
        page = filled.page(after, limit, with_vectors=True)
        assert len(page.items) <= limit
        seen += [(item.id, item.metadata) for item in page.items]
        if not page.after:
            break
        after = page.after
    assert seen == list(zip(IDS, METADATA, strict=True))
    for limit in (0, 10_001):
        with pytest.raises(InvalidRequest, match="page size"):
            filled.page("", limit)


def test_what_is_built_on_search(filled: Collection) -> None:
    query = Query(vector=VECTORS[5], own_ids=frozenset({"i05"}))
    best = [each for each in ranked(VECTORS[5]) if each != "i05"]
    (hits,) = find(filled, [query], Wanted(k=7, offset=3))
    assert origins(hits) == origins(best[3:10])
    (groups,) = find_groups(filled, [query], Wanted(k=5), key="n", size=1)
    assert origins(group.hits[0] for group in groups) == origins(best[:5])
    (diverse,) = find(filled, [query], Wanted(k=5, mmr_lambda=0.5))
    assert diverse[0].id == best[0] == "i55"
    assert len({hit.id for hit in diverse}) == 5
    for exact in (True, False):
        found = find_duplicates(filled, 0.9999, exact=exact)
        assert [group.ids for group in found.groups] == [
            (f"i0{n}", f"i5{n}") for n in range(10)
        ] or [list(group.ids) for group in found.groups] == [
            [f"i0{n}", f"i5{n}"] for n in range(10)
        ]
        assert found.pairs == 10
    outliers, items = find_outliers(filled, k=1, limit=COUNT)
    assert items == COUNT
    assert {each.id for each in outliers[-20:]} == {*IDS[:10], *IDS[50:]}
    (labels,) = classify(filled, [Query(vector=VECTORS[5])], "n", k=2)
    assert {each.label for each in labels.labels} == {5, 55}


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_stored_is_there_after_a_restart(backend: str, tmp_path: Path) -> None:
    address = address_of(backend, tmp_path)
    kept, gone = next(NAMES), next(NAMES)
    store = open_store(address)
    store.create(kept, dim=DIM, encoder_id="e").upsert(IDS, VECTORS, METADATA)
    store.create(gone, dim=DIM, encoder_id="e")
    store.get(kept).delete(IDS[:5])
    store.drop(gone)
    store.close()
    with pytest.raises(Unavailable, match="shutting down"):
        store.get(kept)
    store.close()
    again = open_store(address)
    counts = {info.name: info.count for info in again.list()}
    assert counts[kept] == COUNT - 5
    assert gone not in counts
    assert origins(again.get(kept).search(VECTORS[9:10], 2)[0]) == ["i09", "i09"]
    again.close()


def test_what_milvus_cannot_do_it_says_by_name(tmp_path: Path) -> None:
    store = open_store(address_of("milvus", tmp_path))
    made = store.create(next(NAMES), dim=DIM, encoder_id="e")
    assert made.info.version is None
    for call, feature in (
        (lambda: made.stats(), "stats"),
        (lambda: made.verify(), "verify"),
        (
            lambda: store.create("x", dim=DIM, encoder_id="e", index="ivf-rabitq"),
            "ivf-rabitq index",
        ),
        (lambda: store.backup(tmp_path / "b"), "backup"),
        (lambda: store.restore(tmp_path / "b", "c"), "restore"),
    ):
        with pytest.raises(FailedPrecondition, match=f"milvus backend has no {feature}"):
            call()
    made.upsert(["a"], VECTORS[:1])
    with pytest.raises(InvalidRequest, match="milvus backend, which holds 4096 terms"):
        made.upsert(["b"], VECTORS[:1], [{f"k{n}": n for n in range(2000)}])
    with pytest.raises(InvalidRequest, match="milvus backend takes at most 65536"):
        made.upsert(["b"], VECTORS[:1], [{"text": "x" * 65_536}])
    with pytest.raises(InvalidRequest, match="dimension in fours"):
        store.create(next(NAMES), dim=DIM, encoder_id="e", index="ivf-pq")
    store.close()


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "ivf-sq8", "ivf-pq", "auto"])
def test_index_kinds_of_milvus(kind: IndexKind, tmp_path: Path) -> None:
    store = open_store(address_of("milvus", tmp_path))
    made = store.create(next(NAMES), dim=8, encoder_id="e", index=kind)
    rows = unit(RNG.standard_normal((COUNT, 8)))
    made.upsert(IDS, rows)
    assert (made.info.index, made.info.recall) == (kind, None)
    for effort in (None, 1000):
        assert made.search(rows[30:31], 1, effort=effort)[0][0].id == "i30"
    with pytest.raises(InvalidRequest, match="effort 0"):
        made.search(rows[:1], 1, effort=0)
    store.close()


def test_a_milvus_that_is_not_there() -> None:
    if not HAS_MILVUS:
        pytest.skip("pymilvus is not installed (extra: milvus)")
    with pytest.raises(Unavailable, match="does not answer"):
        open_store("milvus:http://127.0.0.1:1")
