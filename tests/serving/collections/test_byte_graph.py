"""Our walk of FAISS's graph: as right as FAISS's own, on any processor, in any threads."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from byol_serving.collections import byte_graph, kinds
from byol_serving.collections.byte_graph import ByteGraph
from byol_serving.collections.byte_products import dot
from byol_serving.collections.compiling import compiled
from byol_serving.collections.exact import CORES, Bits, Found, nearest, pack, rescored
from byol_serving.collections.tuning import recall_of
from byol_serving.collections.types import Vectors
from serving.collections.model import clustered

COUNT, DIM = 3000, 32
VECTORS = clustered(COUNT, DIM, clusters=150)
QUERIES = clustered(200, DIM, seed=5, clusters=150)


def _call_dot(query: np.ndarray, codes: np.ndarray, start: int, dim: int) -> int:
    return int(dot(query, codes, start, dim))


_dot = numba.njit(_call_dot)


def _graph(vectors: Vectors) -> tuple[ByteGraph, Any]:
    index = kinds.trained("hnsw-sq8", vectors)
    index.add(vectors)
    return ByteGraph(index), index


@pytest.fixture(scope="module")
def graph() -> ByteGraph:
    return _graph(VECTORS)[0]


def _search(
    graph: ByteGraph,
    queries: Vectors,
    k: int,
    *,
    vectors: Vectors = VECTORS,
    covered: int | None = None,
    bits: Bits | None = None,
    effort: int = 64,
    threads: int = 1,
) -> Found:
    return graph.search(
        queries,
        k,
        vectors,
        int(graph._graph.ntotal),
        len(vectors) if covered is None else covered,
        bits,
        effort,
        k + 8,
        threads=threads,
    )


@pytest.mark.parametrize("dim", [1, 7, 63, 64, 65, 128, 200, 512])
def test_products_are_those_of_integers(dim: int) -> None:
    random = np.random.default_rng(dim)
    query = random.integers(-128, 128, dim, dtype=np.int8)
    codes = random.integers(0, 256, 3 * dim, dtype=np.uint8)
    for start in (0, dim, 2 * dim):
        wanted = query.astype(int) @ codes[start : start + dim].astype(int)
        assert _dot(query, codes, start, dim) == wanted
    least, most = np.full(dim, -128, np.int8), np.full(dim, 255, np.uint8)
    assert _dot(least, most, 0, dim) == -128 * 255 * dim


@pytest.mark.parametrize("dim", [20, 64, 100, 128])
def test_it_finds_as_much_as_the_library_at_the_same_effort(dim: int) -> None:
    vectors, queries = clustered(2000, dim, clusters=100), clustered(400, dim, seed=5, clusters=100)
    ours, index = _graph(vectors)
    _, truth = nearest(queries, vectors, 10, None, 0)
    for effort in (18, 40):
        scores, found = _search(ours, queries, 10, vectors=vectors, effort=effort)
        parameters = kinds.parameters("hnsw-sq8", effort, None)
        theirs = index.search(queries, 18, params=parameters)[1]
        _, wanted = rescored(queries, vectors, theirs, 10)
        assert recall_of(found, truth) >= recall_of(wanted, truth) - 0.01
        own = np.take_along_axis(queries @ vectors.T, found, axis=1)
        np.testing.assert_allclose(scores, own, atol=2e-6)


@pytest.mark.parametrize("kept", [1.0, 0.5, 0.02])
@pytest.mark.parametrize("covered", [COUNT, COUNT - 1003])
def test_a_walk_to_everywhere_finds_the_nearest(
    graph: ByteGraph, kept: float, covered: int
) -> None:
    mask = np.random.default_rng(0).random(covered) < kept
    bits = None if kept == 1 else pack(mask)
    scores, found = _search(graph, QUERIES, 10, covered=covered, bits=bits, effort=COUNT)
    alive = np.flatnonzero(mask)
    true, among = nearest(QUERIES, VECTORS[alive], 10, None, 0)
    assert recall_of(found, alive[among]) > 0.999
    np.testing.assert_allclose(scores, true, atol=0.01)
    assert mask[found].all()


def test_where_there_are_fewer_the_rest_is_said_to_be_missing(graph: ByteGraph) -> None:
    mask = np.zeros(COUNT, np.bool_)
    mask[[7, 2000]] = True
    scores, found = _search(graph, QUERIES, 5, bits=pack(mask), effort=COUNT)
    assert set(found[:, :2].ravel()) == {7, 2000}
    assert (found[:, 2:] == -1).all()
    assert np.isneginf(scores[:, 2:]).all()
    small, _ = _graph(VECTORS[:3])
    assert (_search(small, QUERIES, 5, vectors=VECTORS[:3])[1][:, 3:] == -1).all()
    nothing, _ = _graph(VECTORS[:0])
    assert (_search(nothing, QUERIES, 5, vectors=VECTORS[:0])[1] == -1).all()


def test_many_walks_one_after_the_other_forget_where_others_were(graph: ByteGraph) -> None:
    scores, found = _search(graph, QUERIES, 10)
    for _ in range(4):  # 800 of them, and 255 fit into a byte
        alone = [_search(graph, query[None], 10) for query in QUERIES]
        np.testing.assert_array_equal(np.concatenate([each[1] for each in alone]), found)
        np.testing.assert_array_equal(np.concatenate([each[0] for each in alone]), scores)


def test_what_is_added_is_found() -> None:
    graph, index = _graph(VECTORS[:1000])
    _search(graph, QUERIES, 1, vectors=VECTORS[:1000])
    for size in (1016, 1032, COUNT):
        index.add(VECTORS[graph._graph.ntotal : size])
        _, found = _search(graph, VECTORS[size - 16 : size], 1, vectors=VECTORS[:size])
        assert (found[:, 0] == np.arange(size - 16, size)).mean() > 0.9


@pytest.fixture
def late_helpers() -> Iterator[threading.Event]:
    """No helper is free before the event."""
    free = threading.Event()
    for _ in range(CORES):
        byte_graph._helpers.submit(free.wait, 30)
    yield free
    free.set()


def test_queries_are_shared_by_threads_and_late_ones_are_not_waited_for(
    graph: ByteGraph, late_helpers: threading.Event
) -> None:
    one = _search(graph, QUERIES, 10)
    late = _search(graph, QUERIES, 10, threads=3)
    assert not late_helpers.is_set()
    late_helpers.set()
    shared = _search(graph, QUERIES, 10, threads=3)
    for found in (late, shared):
        np.testing.assert_array_equal(found[0], one[0])
        np.testing.assert_array_equal(found[1], one[1])


def test_what_fails_in_a_helper_fails() -> None:
    begun = threading.Event()

    def work(some: slice) -> None:
        if threading.current_thread() is threading.main_thread():
            begun.wait(10)
            return
        begun.set()
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        byte_graph.share(work, 64, 2)


def test_a_helper_is_waited_for_where_the_caller_fails() -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(some: slice) -> None:
        if threading.current_thread() is threading.main_thread():
            begun.wait(10)
            raise MemoryError("no room")
        begun.set()
        time.sleep(0.1)
        ended.set()

    with pytest.raises(MemoryError, match="no room"):
        byte_graph.share(work, 16, 2)
    assert ended.is_set()


def test_it_is_the_same_on_a_processor_with_fewer_instructions(tmp_path: Path) -> None:
    arguments = [
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "products or as_much or everywhere",
    ]
    plain = {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=Path(__file__).parents[3],
        env=os.environ | plain,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_it_is_compiled_where_nothing_can_be_kept() -> None:
    made: dict[str, Callable[[int], int]] = {}
    exec("def double(x): return 2 * x", made)  # without a file, so without a folder beside it
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(made["double"])
    assert compiled(made["double"])(21) == 42
