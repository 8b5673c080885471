"""Searches, filters and pages of every backend, against brute force."""

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
from byol_serving.collections.outliers import find_outliers
from byol_serving.collections.querying import Query, Wanted, find
from byol_serving.collections.types import Collection
from byol_serving.errors import (
    InvalidRequest,
    InvalidVector,
)
from serving.collections.backends.items import (
    COUNT,
    DIM,
    IDS,
    KEYS,
    METADATA,
    RNG,
    VALUES,
    VECTORS,
    origins,
    ranked,
    unit,
)


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
