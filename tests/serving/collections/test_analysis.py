"""Duplicates, outliers, labels and pairs, each against brute force."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from byol_serving.collections.classifying import classify
from byol_serving.collections.collection import LocalCollection
from byol_serving.collections.duplicates import find_duplicates
from byol_serving.collections.filters import Range
from byol_serving.collections.index import IndexOptions
from byol_serving.collections.outliers import find_outliers
from byol_serving.collections.pairs import Calibration, calibrate
from byol_serving.collections.querying import Query
from byol_serving.collections.store import Store
from byol_serving.collections.types import Metadata, Vectors
from byol_serving.errors import DeadlinePassed, InvalidRequest

COUNT, DIM = 2500, 16
RNG = np.random.default_rng(11)
CENTRES = RNG.standard_normal((60, DIM))
CENTRE_OF = RNG.integers(0, 60, COUNT)
SPREAD = RNG.choice([0.05, 0.3, 1.0], (COUNT, 1))
ROWS = CENTRES[CENTRE_OF] + SPREAD * RNG.standard_normal((COUNT, DIM))
VECTORS: Vectors = np.asarray(ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True), np.float32)
COSINES = VECTORS @ VECTORS.T
IDS = [f"i{n}" for n in range(COUNT)]
METADATA: list[Metadata] = [
    {"n": n, "label": int(CENTRE_OF[n]) % 7} if n % 3 else {"n": n} for n in range(COUNT)
]


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCollection]:
    with Store(tmp_path_factory.mktemp("store")) as store:
        made = store.create("c", dim=DIM, encoder_id="e")
        made.upsert(IDS, VECTORS, METADATA)
        yield made


def slow_groups(items: list[int], min_score: float) -> list[list[int]]:
    """Connected components by walking, largest first, then by first item."""
    groups, seen = [], set[int]()
    for start in items:
        if start in seen:
            continue
        group, waiting = {start}, [start]
        while waiting:
            near = np.flatnonzero(COSINES[waiting.pop()] >= min_score)
            fresh = set(near.tolist()) & set(items) - group
            group |= fresh
            waiting += fresh
        seen |= group
        if len(group) > 1:
            groups.append(sorted(group))
    return sorted(groups, key=lambda group: (-len(group), group[0]))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("min_score", [0.9, 0.98])
def test_duplicates_are_connected_components(
    collection: LocalCollection, min_score: float, exact: bool
) -> None:
    found = find_duplicates(collection, min_score, exact=exact)
    expected = slow_groups(list(range(COUNT)), min_score)
    assert len(expected) > 10
    assert [list(group.ids) for group in found.groups] == [
        [IDS[n] for n in group] for group in expected
    ]
    near = np.triu(min_score <= COSINES, 1)
    assert (found.items, found.exact) == (COUNT, exact)
    assert found.pairs == near.sum()
    for group, members in zip(found.groups, expected, strict=True):
        inside = COSINES[np.ix_(members, members)][near[np.ix_(members, members)]]
        assert group.weakest == pytest.approx(inside.min(), abs=1e-5)
        assert group.strongest == pytest.approx(inside.max(), abs=1e-5)


def test_an_approximate_index_finds_nearly_all_pairs(tmp_path: Path) -> None:
    with Store(tmp_path, options=IndexOptions(approximate_from=1000)) as store:
        made = store.create("c", dim=DIM, encoder_id="e", index="hnsw")
        made.upsert(IDS, VECTORS, METADATA)
        made.settle()
        assert made.info.index == "hnsw"
        pairs = np.triu(COSINES >= 0.97, 1).sum()
        found = find_duplicates(made, 0.97, exact=False)
        assert not found.exact
        assert 0.95 * pairs <= found.pairs <= pairs
        assert find_duplicates(made, 0.97).pairs == pairs


def test_duplicates_among_what_matches(collection: LocalCollection) -> None:
    some = list(range(500, 900))
    found = find_duplicates(collection, 0.95, condition=Range("n", gte=500, lt=900), limit=3)
    expected = slow_groups(some, 0.95)
    assert found.items == 400
    assert [list(group.ids) for group in found.groups] == [
        [IDS[n] for n in group] for group in expected[:3]
    ]
    nothing = find_duplicates(collection, 0.95, condition=Range("n", gte=10**6))
    assert (nothing.groups, nothing.items) == ([], 0)
    everything = find_duplicates(collection, -1.0)
    assert [len(group.ids) for group in everything.groups] == [COUNT]


def test_work_that_nobody_waits_for_is_stopped(collection: LocalCollection) -> None:
    with pytest.raises(DeadlinePassed):
        find_duplicates(collection, 0.9, stopping=lambda: True)
    with pytest.raises(DeadlinePassed):
        find_outliers(collection, stopping=lambda: True)
    with pytest.raises(InvalidRequest, match="outside -1"):
        find_duplicates(collection, float("nan"))


@pytest.mark.parametrize("k", [1, 10])
def test_outliers_are_far_from_their_nearest(collection: LocalCollection, k: int) -> None:
    some = np.arange(300, 1000)
    others = COSINES[np.ix_(some, some)].copy()
    np.fill_diagonal(others, -np.inf)
    distances = 1 - np.sort(others, axis=1)[:, -k:].mean(axis=1)
    found, items = find_outliers(collection, k=k, limit=15, condition=Range("n", gte=300, lt=1000))
    assert items == len(some)
    order = np.argsort(-distances)[:15]
    assert [each.id for each in found] == [IDS[n] for n in some[order]]
    np.testing.assert_allclose([each.distance for each in found], distances[order], atol=1e-5)


def test_outliers_that_cannot_be_asked_for(collection: LocalCollection) -> None:
    for k, limit, message in ((0, 1, "k 0"), (COUNT, 1, f"k {COUNT}"), (1, 0, "limit 0")):
        with pytest.raises(InvalidRequest, match=message):
            find_outliers(collection, k=k, limit=limit)
    alone, items = find_outliers(collection, condition=Range("n", gte=7, lte=7))
    assert (alone, items) == ([], 1)


@pytest.mark.parametrize("temperature", [0.001, 0.07, 10.0])
def test_labels_by_weighted_votes(collection: LocalCollection, temperature: float) -> None:
    own = range(0, 400, 3)  # unlabelled
    queries = [Query(vector=VECTORS[n], own_ids=frozenset({IDS[n]})) for n in own]
    found = classify(collection, queries, "label", k=15, temperature=temperature)
    labelled = [n for n in range(COUNT) if n % 3]
    right = 0
    for n, answer in zip(own, found, strict=True):
        near = sorted(labelled, key=lambda each: -COSINES[n, each])[:15]
        weights: dict[int, float] = {}
        for each in near:
            label = int(CENTRE_OF[each]) % 7
            weight = np.exp((COSINES[n, each] - COSINES[n, near[0]]) / temperature)
            weights[label] = weights.get(label, 0.0) + float(weight)
        shares = {label: weight / sum(weights.values()) for label, weight in weights.items()}
        assert answer.label == max(shares, key=lambda label: shares[label])
        assert answer.confidence == pytest.approx(max(shares.values()), abs=1e-3)
        assert {each.label: each.share for each in answer.labels} == pytest.approx(shares, abs=1e-3)
        assert sum(each.votes for each in answer.labels) == 15
        right += answer.label == CENTRE_OF[n] % 7
    assert right / len(own) > 0.8  # neighbours do share a centre here


def test_labels_of_nothing_and_of_other_kinds(collection: LocalCollection) -> None:
    query = [Query(vector=VECTORS[0])]
    (none,) = classify(collection, query, "no such key")
    assert (none.label, none.confidence, none.labels) == (None, 0.0, [])
    with pytest.raises(InvalidRequest, match="labels is empty"):
        classify(collection, query, "")
    with pytest.raises(InvalidRequest, match="temperature"):
        classify(collection, query, "label", temperature=-1)
    with pytest.raises(InvalidRequest, match="k 0"):
        classify(collection, query, "label", k=0)


def accepted(scores: Vectors, threshold: float) -> float:
    return float((scores >= threshold).mean())


def pairs(count: int, distance: float) -> tuple[Vectors, np.ndarray]:
    same = RNG.random(count) < 0.4
    scores = RNG.normal(np.where(same, 0.3 + distance, 0.3), 0.1).clip(-1, 1)
    return np.round(scores, 2).astype(np.float32), same  # rounded: ties between the kinds


@pytest.mark.parametrize("distance", [0.0, 0.2, 0.5, -0.2])
def test_the_most_accurate_threshold(distance: float) -> None:
    scores, same = pairs(400, distance)
    found = calibrate(scores, same)
    best = max(
        float(((scores >= threshold) == same).mean()) for threshold in np.linspace(-1, 1.01, 2011)
    )
    assert float(((scores >= found.threshold) == same).mean()) == pytest.approx(best)
    assert found.accuracy <= best + 0.01  # folds differ in size by one
    if distance == 0.5:
        assert found.accuracy > 0.95


def check_rates(found: Calibration, scores: Vectors, same: np.ndarray) -> None:
    for rate in found.rates:
        false = accepted(scores[~same], rate.threshold)
        assert false <= rate.false_accepts
        lower = scores[~same & (scores < rate.threshold)]
        if lower.size:  # the next lower threshold accepts too many
            assert accepted(scores[~same], float(lower.max())) > rate.false_accepts
        assert rate.true_accepts == accepted(scores[same], rate.threshold)


def test_true_accepts_at_false_accept_rates() -> None:
    scores, same = pairs(3000, 0.3)
    found = calibrate(scores, same)
    assert [rate.false_accepts for rate in found.rates] == [0.1, 0.01, 0.001]
    check_rates(found, scores, same)
    strict = calibrate(scores, same, max_false_accepts=0.01)
    assert strict.threshold == found.rates[1].threshold
    assert calibrate(scores, same, max_false_accepts=1.0).threshold == -1.0
    few = calibrate(scores[:30], same[:30])
    assert [rate.false_accepts for rate in few.rates] == [0.1]


def test_accuracy_is_of_pairs_that_had_no_part_in_the_threshold() -> None:
    """Noise cannot be learned, though a threshold chosen on itself seems to."""
    accuracies = []
    for _ in range(20):
        scores = RNG.random(40).astype(np.float32)
        accuracies.append(calibrate(scores, np.arange(40) % 2 == 0).accuracy)
    assert np.mean(accuracies) < 0.55


def test_pairs_that_show_too_little() -> None:
    scores = np.linspace(0, 1, 10, dtype=np.float32)
    with pytest.raises(InvalidRequest, match="1 same and 9 different"):
        calibrate(scores, np.arange(10) == 0)
    for rate in (0.0, 0.1, 1.1, float("nan")):
        with pytest.raises(InvalidRequest, match="cannot be shown with 5"):
            calibrate(scores, np.arange(10) < 5, max_false_accepts=rate)
