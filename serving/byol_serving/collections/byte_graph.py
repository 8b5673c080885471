"""Searches in a graph of bytes that FAISS has built: by our own walk, in as many threads as pay."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from byol_serving.collections import graph_walk
from byol_serving.collections.exact import CORES, Bits, Found, Positions, nothing
from byol_serving.collections.faiss_library import faiss
from byol_serving.collections.graph_walk import Bytes, Words
from byol_serving.collections.types import Vectors

_AT_ONCE = 8
"""Queries that a thread takes on at a time: some 0.2 ms."""
_EVERYTHING = np.empty(0, np.uint8)


@dataclass(frozen=True)
class _Arrays:
    """FAISS's own memory, as of so many nodes: adding may move it."""

    nodes: int
    walk: Callable[..., None]
    """`graph_walk.search` in that memory."""


class ByteGraph:
    """Walks of an IndexPreTransform over an IndexHNSWSQ, which outlives this.

    Not during an `add`.
    """

    def __init__(self, index: Any) -> None:
        """Reads nothing yet."""
        self._index = index
        self._graph = faiss.downcast_index(index.index)
        rotation = faiss.downcast_VectorTransform(index.chain.at(0))
        dim = int(index.d)
        self._rotation = faiss.vector_to_array(rotation.A).reshape(dim, dim)
        self._arrays: _Arrays | None = None
        self._seen: deque[Bytes] = deque()
        """What walks that are not under way have marked; each has one to itself."""

    def search(
        self,
        queries: Vectors,
        k: int,
        vectors: Vectors,
        nodes: int,
        covered: int,
        bits: Bits | None,
        effort: int,
        candidates: int,
        threads: int,
    ) -> Found:
        """The k best of each query by their true scores, among the nodes whose bit is set.

        Args:
            queries: float32 [Q, D].
            k: how many, at least 1.
            vectors: float32 [N, D] by node.
            nodes: that the graph has.
            covered: nodes from here on are not found.
            bits: bitmap over the others; None for all.
            effort: how wide the walks are, at least `candidates`.
            candidates: how many are ranked by their true scores, at least k.
            threads: that share the queries.
        """
        if self._arrays is None or self._arrays.nodes != nodes:
            self._arrays = self._current(nodes)
        arrays = self._arrays
        if not nodes:
            return nothing(len(queries), k)
        scores = np.empty((len(queries), k), np.float32)
        positions = np.empty((len(queries), k), np.int64)
        mask = _EVERYTHING if bits is None else bits

        def walk(queries: Vectors, scores: Vectors, positions: Positions) -> None:
            try:
                seen = self._seen.pop()
            except IndexError:  # all are in use
                seen = _EVERYTHING
            if len(seen) != nodes + 1:
                seen = np.zeros(nodes + 1, np.uint8)
            arrays.walk(
                vectors, covered, mask, effort, candidates, queries, seen, scores, positions
            )
            self._seen.append(seen)

        if threads == 1:
            walk(queries, scores, positions)
        else:
            share(
                lambda some: walk(queries[some], scores[some], positions[some]),
                len(queries),
                threads,
            )
        return scores, positions

    def _current(self, nodes: int) -> _Arrays:
        hnsw = self._graph.hnsw
        codes = faiss.downcast_index(self._graph.storage).codes
        walk = partial(
            graph_walk.search,
            _view(codes),
            _view(hnsw.neighbors),
            _view(hnsw.offsets).view(np.int64),
            _layers(hnsw),
            int(hnsw.entry_point),
            self._rotation,
        )
        return _Arrays(nodes, walk)


def _view(vector: Any) -> Any:
    return faiss.rev_swig_ptr(vector.data(), vector.size())


def _layers(hnsw: Any) -> Words:
    begins = hnsw.cum_nneighbor_per_level
    return np.array([begins.at(layer) for layer in range(hnsw.max_level + 2)], np.int64)


_helpers = ThreadPoolExecutor(max(1, CORES - 1), "search")


def share(work: Callable[[slice], None], count: int, threads: int) -> None:
    """Does `work` on all parts of 0 to `count`; waits for no thread that is late to begin."""
    starts = range(0, count, _AT_ONCE)
    todo = deque(slice(start, min(count, start + _AT_ONCE)) for start in starts)

    def go() -> None:
        while todo:
            try:
                some = todo.popleft()
            except IndexError:  # another thread was quicker
                return
            work(some)

    helping = [_helpers.submit(go) for _ in range(threads - 1)]
    try:
        go()
    finally:  # none may go on in memory that the caller gives up
        begun = [each for each in helping if not each.cancel()]
        wait(begun)
    for each in begun:
        each.result()
