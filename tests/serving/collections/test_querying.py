"""Examples, pages, groups and diversity, each against a few lines of NumPy over all items."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from byol_serving.collections.collection import LocalCollection
from byol_serving.collections.filters import Equals, Exists, Not, Range
from byol_serving.collections.grouping import find_groups
from byol_serving.collections.querying import Query, Wanted, examples_vector, find
from byol_serving.collections.store import Store
from byol_serving.collections.types import Item, Json, Metadata, Vectors
from byol_serving.errors import InvalidRequest, InvalidVector

COUNT, DIM = 300, 8
RNG = np.random.default_rng(5)


def unit(rows: Vectors) -> Vectors:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


# A third of the items are exact copies of others, so that equal scores are common.
VECTORS = unit(RNG.standard_normal((COUNT, DIM)).astype(np.float32))
VECTORS[200:] = VECTORS[:100]
IDS = [f"i{n:03}" for n in RNG.permutation(COUNT)]
LABELS: list[Json] = ["cat", "dog", 1, True, 1.5, None, ["a", "list"], "owl"]
METADATA: list[Metadata] = [
    {"n": n, "label": LABELS[n % 8]} if n % 9 else {"n": n} for n in range(COUNT)
]
QUERIES = [Query(vector=row) for row in unit(RNG.standard_normal((5, DIM)).astype(np.float32))]


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCollection]:
    with Store(tmp_path_factory.mktemp("store")) as store:
        made = store.create("c", dim=DIM, encoder_id="e")
        made.upsert(IDS, VECTORS, METADATA)
        yield made


def ranked(vector: Vectors) -> list[int]:
    """All positions, best first, equal ones in the order they were stored."""
    scores = VECTORS @ vector
    # A copy's score may differ in the last bit between kernels; here it must not.
    scores[200:] = scores[:100]
    order: list[int] = np.lexsort((np.arange(COUNT), -scores)).tolist()
    return order


@pytest.mark.parametrize("size", [7, 50])
def test_pages_join_to_the_whole_ranking(collection: LocalCollection, size: int) -> None:
    for query in QUERIES:
        walked: list[str] = []
        for offset in range(0, COUNT, size):
            (hits,) = find(collection, [query], Wanted(k=size, offset=offset))
            walked += [hit.id for hit in hits]
        assert walked == [IDS[each] for each in ranked(query.vector)]


def test_a_page_past_the_end_is_empty(collection: LocalCollection) -> None:
    assert find(collection, QUERIES[:1], Wanted(k=10, offset=COUNT)) == [[]]
    (last,) = find(collection, QUERIES[:1], Wanted(k=10, offset=COUNT - 3))
    assert len(last) == 3


def test_a_least_score_makes_k_a_limit(collection: LocalCollection) -> None:
    for query in QUERIES:
        (hits,) = find(collection, [query], Wanted(k=10 * COUNT, min_score=0.3))
        near = [IDS[n] for n in ranked(query.vector) if VECTORS[n] @ query.vector >= 0.3]
        assert [hit.id for hit in hits] == near
        (few,) = find(collection, [query], Wanted(k=4, min_score=0.3))
        assert [hit.id for hit in few] == near[:4]
    with pytest.raises(InvalidRequest, match=r"k 301 is outside 1\.\.300"):
        find(collection, QUERIES, Wanted(k=COUNT + 1))


def test_the_items_of_a_query_are_left_out(collection: LocalCollection) -> None:
    own = frozenset({IDS[3], IDS[7], IDS[203]})
    query = Query(vector=VECTORS[3], own_ids=own)
    (hits,) = find(collection, [query], Wanted(k=COUNT))
    assert [hit.id for hit in hits] == [IDS[n] for n in ranked(VECTORS[3]) if IDS[n] not in own]
    (page,) = find(collection, [query], Wanted(k=5, offset=5))
    assert page == hits[5:10]


def test_like_these_and_not_like_those() -> None:
    like, unlike = VECTORS[:3], VECTORS[10:12]
    mixed = like.mean(axis=0) - 0.2 * unlike.mean(axis=0)
    found = examples_vector(like, unlike)
    np.testing.assert_allclose(found, mixed / np.linalg.norm(mixed), atol=1e-6)
    one = examples_vector(like[:1], unlike[:0])
    np.testing.assert_allclose(one, like[0], atol=1e-6)
    for weight in (0.0, 0.5, 2.0):
        mixed = like.mean(axis=0) - weight * unlike.mean(axis=0)
        found = examples_vector(like, unlike, weight)
        np.testing.assert_allclose(found, mixed / np.linalg.norm(mixed), atol=1e-6)
    with pytest.raises(InvalidRequest, match="at least one positive"):
        examples_vector(like[:0], unlike)
    with pytest.raises(InvalidRequest, match="unlike weight"):
        examples_vector(like, unlike, -1.0)
    with pytest.raises(InvalidVector, match="cancel out"):
        examples_vector(like, like, 1.0)


def slow_mmr(candidates: list[int], query: Vectors, balance: float, count: int) -> list[int]:
    """The paper's formula, term by term."""
    chosen: list[int] = []
    left = list(candidates)
    while left and len(chosen) < count:
        margins = [
            balance * float(VECTORS[each] @ query)
            - (1 - balance) * max((float(VECTORS[each] @ VECTORS[c]) for c in chosen), default=0.0)
            for each in left
        ]
        chosen.append(left.pop(int(np.argmax(np.round(margins, 6)))))
    return chosen


@pytest.mark.parametrize("balance", [0.0, 0.3, 0.7, 1.0])
def test_diverse_hits(collection: LocalCollection, balance: float) -> None:
    for query in QUERIES:
        (hits,) = find(collection, [query], Wanted(k=12, mmr_lambda=balance, mmr_candidates=40))
        # Copies leave ties to rounding; what is compared is what each choice is worth.
        expected = slow_mmr(ranked(query.vector)[:40], query.vector, balance, 12)
        chosen = np.stack([VECTORS[IDS.index(hit.id)] for hit in hits])
        np.testing.assert_allclose(chosen, VECTORS[expected], atol=1e-6)
        assert all(hit.vector is None for hit in hits)


def test_diversity_is_paged_over_the_same_candidates(collection: LocalCollection) -> None:
    wanted = Wanted(k=10, mmr_lambda=0.5, mmr_candidates=60)
    (first,) = find(collection, QUERIES[:1], wanted)
    (again,) = find(
        collection, QUERIES[:1], Wanted(k=4, offset=6, mmr_lambda=0.5, mmr_candidates=60)
    )
    assert again == first[6:]
    with pytest.raises(InvalidRequest, match="needs mmr_candidates"):
        find(collection, QUERIES[:1], Wanted(k=4, offset=6, mmr_lambda=0.5))
    with pytest.raises(InvalidRequest, match=r"mmr lambda 1\.5"):
        find(collection, QUERIES[:1], Wanted(k=4, mmr_lambda=1.5))


def kind(value: object) -> tuple[bool, object]:
    return (isinstance(value, bool), value)


@pytest.mark.parametrize(("groups", "size"), [(2, 1), (3, 4), (6, 2), (20, 50)])
def test_groups_are_what_dealing_the_ranking_gives(
    collection: LocalCollection, groups: int, size: int
) -> None:
    for query in QUERIES:
        dealt: dict[tuple[bool, object], list[str]] = {}
        for n in ranked(query.vector):
            label = METADATA[n].get("label")
            if isinstance(label, (str, int, float)):
                dealt.setdefault(kind(label), []).append(IDS[n])
        (found,) = find_groups(collection, [query], Wanted(k=groups), key="label", size=size)
        assert [(kind(each.value), [hit.id for hit in each.hits]) for each in found] == [
            (label, ids[:size]) for label, ids in list(dealt.items())[:groups]
        ]


def test_groups_with_a_filter_an_offset_and_a_least_score(collection: LocalCollection) -> None:
    for query in QUERIES:
        best: dict[int, str] = {}
        for n in ranked(query.vector):
            if n < 150 and VECTORS[n] @ query.vector >= 0.2:
                best.setdefault(n, IDS[n])
        wanted = Wanted(k=20, offset=2, condition=Range("n", lt=150), min_score=0.2)
        (found,) = find_groups(collection, [query], wanted, key="n", size=3)
        assert [each.value for each in found] == list(best)[2:22]
        assert [each.hits[0].id for each in found] == list(best.values())[2:22]


def test_groups_that_cannot_be(collection: LocalCollection) -> None:
    for key, size, wanted, message in (
        ("", 1, Wanted(k=1), "group by is empty"),
        ("n", 0, Wanted(k=1), "group size 0"),
        ("n", 1, Wanted(k=1, mmr_lambda=0.5), "exclude each other"),
        ("n", 1, Wanted(k=1001), "1001 groups"),
        ("n", 1, Wanted(k=0), "k 0"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            find_groups(collection, QUERIES, wanted, key=key, size=size)


def test_nothing_can_be_asked_of_an_empty_collection(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        empty = store.create("c", dim=DIM, encoder_id="e")
        with pytest.raises(InvalidRequest, match="empty"):
            find(empty, QUERIES, Wanted(k=1, min_score=0.1))
        page = empty.page("", 10)
        assert (page.items, page.after) == ([], "")


@pytest.mark.parametrize("limit", [7, COUNT])
def test_pages_of_items(collection: LocalCollection, limit: int) -> None:
    after = ""
    seen: list[Item] = []
    while True:
        page = collection.page(after, limit, with_vectors=True)
        seen += page.items
        if not page.after:
            break
        after = page.after
    assert [item.id for item in seen] == IDS
    assert [item.metadata for item in seen] == METADATA
    stored = np.stack([np.asarray(each.vector) for each in seen])
    np.testing.assert_allclose(stored, VECTORS, atol=1e-6)


def test_pages_of_items_that_match(collection: LocalCollection) -> None:
    cats = collection.page("", 1000, condition=Equals("label", "cat"), with_metadata=False)
    assert [item.id for item in cats.items] == [
        IDS[n] for n in range(COUNT) if METADATA[n].get("label") == "cat"
    ]
    assert cats.items[0].metadata == {}
    none = collection.page("", 10, condition=Not(Exists("n")))
    assert (none.items, none.after) == ([], "")
    for token in ("x", "-1", "9" * 19, "1.5", "²"):
        with pytest.raises(InvalidRequest, match="page token"):
            collection.page(token, 10)
    for size in (0, 10_001):
        with pytest.raises(InvalidRequest, match="page size"):
            collection.page("", size)


def test_walking_while_items_come_and_go(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        made = store.create("c", dim=DIM, encoder_id="e")
        made.upsert(IDS, VECTORS)
        page = made.page("", 100)
        made.delete(IDS[50:150])
        made.upsert([IDS[0], "new"], VECTORS[:2])
        seen = [item.id for item in page.items]
        while page.after:
            page = made.page(page.after, 100)
            seen += [item.id for item in page.items]
        assert set(IDS[:50] + IDS[150:]) <= set(seen)
        assert not set(IDS[100:150]) & set(seen)
        versions = [made.info.version]
        made.set_metadata(["new"], [{"a": 1}])
        versions.append(made.info.version)
        made.delete(["new"])
        versions.append(made.info.version)
        assert all(a is not None and b is not None and a < b for a, b in pairwise(versions))
