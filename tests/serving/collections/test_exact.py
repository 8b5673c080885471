"""The exact kernels against a product of matrices and a sort."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from byol_serving.collections import exact
from byol_serving.collections.exact import (
    SEARCHING,
    Found,
    bits_at,
    merged,
    nearest,
    nearest_among,
    nothing,
    pack,
    rescored,
    share_cores,
    unpack,
)
from byol_serving.collections.faiss_library import faiss
from byol_serving.collections.types import Vectors
from serving.collections.model import clustered

DIM = 8


def _expect(
    found: Found, queries: Vectors, vectors: Vectors, mask: NDArray[np.bool_], k: int
) -> None:
    scores = np.where(mask, queries @ vectors.T, -np.inf)
    best = -np.sort(-scores, axis=1)[:, :k]
    best = np.pad(best, ((0, 0), (0, k - best.shape[1])), constant_values=-np.inf)
    np.testing.assert_allclose(found[0], best, atol=2e-6)
    inside = found[1] >= 0
    np.testing.assert_array_equal(inside, np.isfinite(best))
    own = np.take_along_axis(scores, np.maximum(found[1], 0), axis=1)
    np.testing.assert_allclose(found[0][inside], own[inside], atol=2e-6)
    for row, held in zip(found[1], inside, strict=True):
        assert len(set(row[held].tolist())) == held.sum()


# 1 and 3 queries are scanned, 4 go through BLAS, 40 use all threads.
@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 300),
    queries=st.sampled_from([1, 3, 4, 40]),
    k=st.sampled_from([1, 10, 100]),
    kept=st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_nearest_under_any_mask(count: int, queries: int, k: int, kept: float, seed: int) -> None:
    vectors, asked = clustered(count, DIM, seed=seed), clustered(queries, DIM, seed=seed + 1)
    mask = np.random.default_rng(seed).random(count) < kept
    dead = int(count - mask.sum())
    _expect(nearest(asked, vectors, k, pack(mask), dead), asked, vectors, mask, k)
    _expect(nearest_among(asked, vectors, np.flatnonzero(mask), k), asked, vectors, mask, k)
    if dead == 0:
        _expect(nearest(asked, vectors, k, None, 0), asked, vectors, mask, k)


@settings(max_examples=40, deadline=None)
@given(
    queries=st.sampled_from([1, 3, 64]),
    candidates=st.integers(1, 40),
    k=st.sampled_from([1, 10, 50]),
    seed=st.integers(0, 2**16),
)
def test_candidates_are_ranked_by_true_scores(
    queries: int, candidates: int, k: int, seed: int
) -> None:
    vectors, asked = clustered(300, DIM, seed=seed), clustered(queries, DIM, seed=seed + 1)
    generator = np.random.default_rng(seed)
    among = np.stack([generator.choice(300, candidates, replace=False) for _ in range(queries)])
    among[np.arange(candidates) >= generator.integers(0, candidates + 1, (queries, 1))] = -1
    scores, found = rescored(asked, vectors, among, k)
    for row, chosen in enumerate(among):
        chosen = chosen[chosen >= 0]
        true = vectors[chosen] @ asked[row]
        best = chosen[np.argsort(-true, kind="stable")][:k]
        expected = np.pad(best, (0, k - len(best)), constant_values=-1)
        np.testing.assert_array_equal(found[row], expected)
        np.testing.assert_allclose(scores[row, : len(best)], np.sort(true)[::-1][:k], atol=2e-6)
        assert np.isneginf(scores[row, len(best) :]).all()


def test_searches_at_once_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "CORES", 4)
    threads = []
    for queries in (1, 64):
        share_cores(queries)
        threads.append(faiss.omp_get_max_threads())
    with SEARCHING, SEARCHING:
        share_cores(64)
        threads.append(faiss.omp_get_max_threads())
    assert threads == [1, 4, 2]
    assert SEARCHING.count == 0


def test_candidates_over_many_blocks() -> None:
    vectors, asked = clustered(140_000, DIM), clustered(20, DIM, seed=1)
    chosen = np.arange(0, 140_000, 2)
    mask = np.zeros(len(vectors), np.bool_)
    mask[chosen] = True
    _expect(nearest_among(asked, vectors, chosen, 10), asked, vectors, mask, 10)


def test_nothing_to_search() -> None:
    asked, empty = clustered(5, DIM), np.empty((0, DIM), np.float32)
    for found in (nearest(asked, empty, 3, None, 0), nothing(5, 3)):
        assert found[0].shape == found[1].shape == (5, 3)
        assert np.all(np.isneginf(found[0]))
        assert np.all(found[1] == -1)


def test_bits_and_merging() -> None:
    mask = np.random.default_rng(0).random(77) < 0.5
    np.testing.assert_array_equal(unpack(pack(mask), 77), mask)
    positions = np.array([[3, -1], [76, 0]])
    np.testing.assert_array_equal(
        bits_at(pack(mask), positions), [[mask[3], False], [mask[76], mask[0]]]
    )
    left = (np.array([[0.9, 0.5]], np.float32), np.array([[1, 2]]))
    right = (np.array([[0.7, -np.inf]], np.float32), np.array([[8, -1]]))
    scores, found = merged(left, right, 2)
    assert found.tolist() == [[1, 8]]
    np.testing.assert_array_equal(scores, np.array([[0.9, 0.7]], np.float32))
