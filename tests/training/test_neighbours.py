"""kNN, retrieval and stability against hand calculations and sklearn."""

import math
import time

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from byol_training.neighbours import knn_accuracy, nearest, neighbour_stability, retrieval


def unit(count: int, dim: int = 8, seed: int = 0) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    normalised: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return normalised


def on_circle(*degrees: float) -> NDArray[np.float32]:
    turns = np.radians(degrees)
    return np.stack([np.cos(turns), np.sin(turns)], axis=1).astype(np.float32)


def labels(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def test_nearest_is_the_best_first() -> None:
    cosine, index = nearest(on_circle(0, 90, 10, 180), on_circle(4), 9)
    assert index.tolist() == [[0, 2, 1, 3]]
    assert cosine[0, 0] == pytest.approx(math.cos(math.radians(4)))


def test_knn_votes_are_weighted_by_hand() -> None:
    """One neighbour at 0 degrees outweighs two at 60 at T = 0.07, but not at T = 10."""
    bank, query = on_circle(0, 60, -60), on_circle(0)
    assert math.exp(1 / 0.07) > 2 * math.exp(0.5 / 0.07)
    assert math.exp(1 / 10) < 2 * math.exp(0.5 / 10)
    given = (bank, labels(1, 0, 0), query, labels(1))
    assert knn_accuracy(*given) == 1.0
    assert knn_accuracy(*given, temperature=10.0) == 0.0
    assert knn_accuracy(*given, temperature=10.0, k=1) == 1.0


def test_knn_agrees_with_sklearn() -> None:
    bank, queries = unit(300), unit(700, seed=1)
    bank_labels, query_labels = (bank[:, 0] > 0.1).astype(np.int64), labels(*([1] * 700))

    def weights(distances: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.exp((1 - distances) / 0.07))

    theirs = KNeighborsClassifier(20, weights=weights, metric="cosine").fit(bank, bank_labels)
    assert knn_accuracy(bank, bank_labels, queries, query_labels) == pytest.approx(
        theirs.score(queries, query_labels)
    )


def test_retrieval_by_hand() -> None:
    # From 0 degrees: classes 1, 0, 1, 0 in order. From 90: 0, 1, 0, 1.
    bank, bank_labels = on_circle(10, 30, 50, 70), labels(1, 0, 1, 0)
    found = retrieval(bank, bank_labels, on_circle(0, 90), labels(1, 1), k=3)
    assert found.precision == pytest.approx((2 / 3 + 1 / 3) / 2)
    first, second = (1 / 1 + 2 / 3) / 2, (1 / 2 + 2 / 4) / 2
    assert found.average_precision == pytest.approx((first + second) / 2)


def test_retrieval_agrees_with_sklearn_ties_included() -> None:
    bank, queries = np.repeat(unit(40), 3, axis=0), unit(300, seed=1)
    rng = np.random.default_rng(2)
    bank_labels, query_labels = rng.integers(0, 4, 120), rng.integers(0, 4, 300)
    wanted = [
        average_precision_score(bank_labels == label, bank @ query)
        for query, label in zip(queries, query_labels, strict=True)
    ]
    found = retrieval(bank, bank_labels, queries, query_labels)
    assert found.average_precision == pytest.approx(np.mean(wanted), abs=1e-3)


def test_queries_of_classes_not_in_the_bank_are_left_out() -> None:
    bank, bank_labels = on_circle(0, 90), labels(0, 1)
    found = retrieval(bank, bank_labels, on_circle(0, 45), labels(0, 7), k=1)
    assert (found.precision, found.average_precision) == (1.0, 1.0)
    assert math.isnan(retrieval(bank, bank_labels, on_circle(45), labels(7)).average_precision)


def test_retrieval_of_thousands_is_a_matter_of_seconds() -> None:
    """A tenth of 10,000 queries x 50,000 rows: a second or two when idle, minutes by argsort."""
    bank, queries = unit(50_000, 32), unit(1000, 32, seed=1)
    rng = np.random.default_rng(2)
    started = time.process_time()
    found = retrieval(bank, rng.integers(0, 10, 50_000), queries, rng.integers(0, 10, 1000))
    assert time.process_time() - started < 20
    assert found.average_precision == pytest.approx(0.1, abs=0.01)  # labels are noise


def test_stability() -> None:
    rows = unit(400, 16)
    assert neighbour_stability(rows, rows) == 1.0
    turned = rows[:, ::-1].copy()  # all cosines stay
    assert neighbour_stability(rows, turned) == pytest.approx(1.0, abs=1e-3)
    assert neighbour_stability(rows, unit(400, 16, seed=1)) == pytest.approx(10 / 399, abs=0.01)
    line, swapped = on_circle(0, 1, 50, 52), on_circle(0, 1, 52, 5)
    # Nearest others: 1 0 3 2; after the change of the last: 1 0 3 1.
    assert neighbour_stability(line, swapped, k=1) == 0.75


def test_an_image_is_no_neighbour_of_itself_even_among_duplicates() -> None:
    rows = np.repeat(unit(1), 5, axis=0)
    assert neighbour_stability(rows, rows, k=99) == 1.0
