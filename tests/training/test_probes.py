"""The probes against sklearn and on problems whose answer is known."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from byol_training.probes import (
    L2_CHOICES,
    LEARNING_RATES,
    _minimise,
    few_shot,
    logistic_probe,
    sgd_probe,
    split,
)


def blobs(
    count: int, *, noise: float, seed: int, classes: int = 4, dim: int = 12
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % classes
    rows = np.eye(classes, dim)[labels] + noise * rng.normal(size=(count, dim))
    return rows.astype(np.float32), labels


def test_minimise_finds_what_sklearn_finds() -> None:
    rows, labels = blobs(300, noise=0.5, seed=0)
    l2 = 1e-2
    features = torch.from_numpy(np.pad(rows, ((0, 0), (0, 1)), constant_values=1.0))
    ours = _minimise(features, torch.from_numpy(labels), torch.zeros(4, 13), l2)
    theirs = LogisticRegression(C=1 / (2 * l2 * len(rows)), tol=1e-8, max_iter=1000)
    theirs.fit(rows, labels)
    np.testing.assert_allclose(ours[:, :-1].numpy(), theirs.coef_, atol=2e-3)


def test_probes_reach_what_can_be_reached() -> None:
    bank, queries = blobs(2000, noise=0.4, seed=0), blobs(1000, noise=0.4, seed=1)
    best = (np.argmax(queries[0][:, :4], axis=1) == queries[1]).mean()  # Bayes, for these blobs
    logistic, sgd = logistic_probe(*bank, *queries), sgd_probe(*bank, *queries, epochs=20)
    assert logistic.accuracy > best - 0.02
    assert sgd.accuracy > best - 0.02
    assert logistic.setting in L2_CHOICES
    assert sgd.setting in LEARNING_RATES


def test_l2_is_chosen_strong_where_there_is_little_to_learn_from() -> None:
    """Sixty rows in 200 dimensions of which four matter: weak L2 would fit the noise."""
    bank = blobs(60, noise=1.0, seed=0, dim=200)
    queries = blobs(2000, noise=1.0, seed=1, dim=200)
    assert logistic_probe(*bank, *queries).setting > L2_CHOICES[-1]


def test_embeddings_without_information_give_chance() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1500, 12)).astype(np.float32)
    labels = rng.integers(0, 4, 1500)
    found = logistic_probe(rows[:1000], labels[:1000], rows[1000:], labels[1000:])
    assert found.accuracy == pytest.approx(0.25, abs=0.08)


def test_few_shot_needs_more_labels_where_noise_is_high() -> None:
    bank, queries = blobs(2000, noise=0.6, seed=0), blobs(1000, noise=0.6, seed=1)
    least, some = (few_shot(*bank, *queries, part=part) for part in (0.01, 0.1))
    assert 0.25 < least < some < 1.0


def test_split_keeps_the_shares_of_classes() -> None:
    labels = np.repeat(np.arange(3), (100, 50, 1))
    kept, rest = split(labels, 0.1, seed=0)
    assert np.bincount(labels[kept]).tolist() == [10, 5, 1]
    assert sorted([*kept, *rest]) == list(range(151))
    assert np.array_equal(kept, split(labels, 0.1, seed=0)[0])
    assert not np.array_equal(kept, split(labels, 0.1, seed=1)[0])
    one_each = np.arange(4)
    assert split(one_each, 0.9, seed=0)[1].tolist() == [0, 1, 2, 3]  # nothing can be held out
