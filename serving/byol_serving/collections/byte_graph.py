"""Searches in a graph of bytes that FAISS has built: by our own walk, in as many threads as pay."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from byol_serving.collections import graph_walk
from byol_serving.collections.exact import CORES, Bits, Found, nothing, room
from byol_serving.collections.faiss_library import faiss
from byol_serving.collections.graph_walk import Bytes, Links, Words
from byol_serving.collections.types import Vectors

_AT_ONCE = 8
"""Queries that a thread takes on at a time: some 0.2 ms."""
_EVERYTHING = np.empty(0, np.uint8)


@dataclass(frozen=True)
class _Arrays:
    """FAISS's own memory, as of so many nodes: adding may move it. See graph_walk."""

    nodes: int
    codes: Bytes
    links: Links
    offsets: Words
    layers: Words
    entry: int


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
        self._rotation = faiss.vector_to_array(rotation.A).reshape(dim, dim).T.copy()
        self._arrays: _Arrays | None = None
        self._seen: deque[Bytes] = deque()
        """What walks that are not under way have marked; each has one to itself."""

    def search(
        self,
        queries: Vectors,
        k: int,
        vectors: Vectors,
        covered: int,
        bits: Bits | None,
        *,
        effort: int,
        candidates: int,
        threads: int,
    ) -> Found:
        """The k best of each query by their true scores, among the nodes whose bit is set.

        Args:
            queries: float32 [Q, D].
            k: how many, at least 1.
            vectors: float32 [N, D] by node.
            covered: nodes from here on are not found.
            bits: bitmap over the others; None for all.
            effort: how wide the walks are, at least `candidates`.
            candidates: how many are ranked by their true scores, at least k.
            threads: that share the queries.
        """
        arrays = self._current()
        if not arrays.nodes:
            return nothing(len(queries), k)
        scores, positions = room(len(queries), k)

        def walk(some: slice) -> None:
            seen = self._unmarked(arrays.nodes)
            graph_walk.search(
                queries[some],
                queries[some] @ self._rotation,
                vectors,
                arrays.codes,
                arrays.links,
                arrays.offsets,
                arrays.layers,
                arrays.entry,
                covered,
                _EVERYTHING if bits is None else bits,
                seen,
                effort,
                candidates,
                scores[some],
                positions[some],
            )
            self._seen.append(seen)

        _share(walk, len(queries), threads)
        return scores, positions

    def _current(self) -> _Arrays:
        nodes, known = int(self._graph.ntotal), self._arrays
        if known is None or known.nodes != nodes:
            hnsw = self._graph.hnsw
            codes = faiss.downcast_index(self._graph.storage).codes
            known = self._arrays = _Arrays(
                nodes=nodes,
                codes=_view(codes.data(), codes.size()),
                links=_view(hnsw.neighbors.data(), hnsw.neighbors.size()),
                offsets=_view(hnsw.offsets.data(), hnsw.offsets.size()).view(np.int64),
                layers=_layers(hnsw),
                entry=int(hnsw.entry_point),
            )
        return known

    def _unmarked(self, nodes: int) -> Bytes:
        try:
            seen = self._seen.pop()
        except IndexError:
            seen = _EVERYTHING
        return seen if len(seen) == nodes + 1 else np.zeros(nodes + 1, np.uint8)


def _view(pointer: Any, size: int) -> Any:
    return faiss.rev_swig_ptr(pointer, size)


def _layers(hnsw: Any) -> Words:
    begins = hnsw.cum_nneighbor_per_level
    return np.array([begins.at(layer) for layer in range(hnsw.max_level + 2)], np.int64)


_helpers = ThreadPoolExecutor(max(1, CORES - 1), "search")


def _share(work: Callable[[slice], None], count: int, threads: int) -> None:
    """Does `work` on all parts of 0 to `count`; waits for no thread that is late to begin."""
    step = _AT_ONCE if threads > 1 else count
    todo = deque(slice(start, min(count, start + step)) for start in range(0, count, step))

    def go() -> None:
        while True:
            try:
                some = todo.popleft()
            except IndexError:
                return
            work(some)

    helping = [_helpers.submit(go) for _ in range(threads - 1)]
    go()
    for each in helping:
        if not each.cancel():
            each.result()
