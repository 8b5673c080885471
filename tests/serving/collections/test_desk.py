"""A lone query's desk: the same answers as for a batch, and its own."""

import threading

import numpy as np
import pytest

from byol_serving.collections import desk as desks
from byol_serving.collections.approximate import Approximate
from byol_serving.collections.desk import Desk, desk_for
from byol_serving.collections.kinds import ApproximateKind
from byol_serving.collections.types import Vectors
from serving.collections.model import clustered

DIM = 32
VECTORS = clustered(2000, DIM)
QUERIES = clustered(64, DIM, seed=7)


@pytest.fixture(scope="module", params=["hnsw", "ivf-sq8", "ivf", "ivf-pq"])
def index(request: pytest.FixtureRequest) -> Approximate:
    kind: ApproximateKind = request.param
    return Approximate.build(kind, VECTORS, lambda: False)


def _alone(index: Approximate, k: int, queries: Vectors) -> tuple[np.ndarray, np.ndarray]:
    found = [index.search(query[None], k, VECTORS, None, 1.0)[0] for query in queries]
    return np.concatenate([each[0] for each in found]), np.concatenate([each[1] for each in found])


@pytest.mark.parametrize("k", [1, 11, 700])
def test_a_query_alone_finds_what_it_finds_in_a_batch(index: Approximate, k: int) -> None:
    (scores, positions), _ = index.search(QUERIES, k, VECTORS, None, 1.0)
    alone = _alone(index, k, QUERIES)
    # Earlier answers are not written over by later ones, or all rows would be the last query's.
    np.testing.assert_allclose(alone[0], scores, atol=1e-6)
    assert np.mean(alone[1] == positions) > 0.99  # equal scores may change places


def test_each_thread_has_its_own(index: Approximate) -> None:
    right = _alone(index, 11, QUERIES)
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    start = threading.Barrier(4, timeout=10)

    def ask(number: int) -> None:
        start.wait()
        for _ in range(5):
            found[number] = _alone(index, 11, QUERIES[number::4])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for number, (scores, positions) in found.items():
        np.testing.assert_array_equal(scores, right[0][number::4])
        np.testing.assert_array_equal(positions, right[1][number::4])
    assert len(found) == 4


def test_few_are_kept_and_none_for_what_is_large() -> None:
    query = QUERIES[:1]
    first = desk_for(query, 19, 11)
    assert isinstance(first, Desk)
    assert desk_for(query, 19, 11) is first
    assert desk_for(query, 30, 20) is not first
    assert desk_for(QUERIES[:2], 19, 11) is None
    assert desk_for(query, 1_000_000, 11) is None
    for k in range(1, 100):
        desk_for(query, 100, k)
    assert len(desks._desks.of) <= desks._MOST_DESKS
