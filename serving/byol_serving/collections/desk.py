"""A lone query through FAISS, without what its Python costs a call.

An array for each answer and a pointer to each array took 8 us, and a graph of 20,000 vectors 36 for
all of a search. They are made once a thread instead.
"""

import threading
from typing import Any

import numpy as np

from byol_serving.collections.exact import Found, marked, room
from byol_serving.collections.faiss_library import faiss
from byol_serving.collections.types import Vectors

_MOST_DESKS = 16
"""A thread keeps; each is for one number of candidates and hits."""
_MOST_CANDIDATES = 1024
"""Of a desk, so that what is kept stays small; for more, arrays cost little beside the search."""


class Desk:
    """Where a thread lays one query, its candidates and its hits."""

    def __init__(self, dim: int, count: int, k: int) -> None:
        """For `count` candidates, of which the best `k` may be wanted."""
        self._dim, self._count, self._k = dim, count, k
        self._query = np.empty((1, dim), np.float32)
        self._candidates, self._best = room(1, count), room(1, k)
        self._at_query = faiss.swig_ptr(self._query)
        self._at_candidates = tuple(map(faiss.swig_ptr, self._candidates))
        self._at_best = tuple(map(faiss.swig_ptr, self._best))

    def search(self, index: Any, query: Vectors, parameters: Any) -> None:
        """Lays down the candidates that an index has for a query, float32 [1, D]."""
        self._query[:] = query
        index.search_c(1, self._at_query, self._count, *self._at_candidates, parameters)

    def candidates(self) -> Found:
        """The candidates, by the index's scores."""
        scores, positions = self._candidates
        return marked(scores.copy(), positions.copy())

    def rescored(self, vectors: Vectors) -> Found:
        """The best k of the candidates by their true scores; see `exact.rescored`."""
        faiss.knn_inner_products_by_idx(
            self._at_query,
            faiss.swig_ptr(vectors),
            self._at_candidates[1],
            self._dim,
            1,
            len(vectors),
            self._count,
            self._k,
            *self._at_best,
            self._count,
        )
        scores, positions = self._best
        return marked(scores.copy(), positions.copy())


class _Desks(threading.local):
    def __init__(self) -> None:
        self.of: dict[tuple[int, int, int], Desk] = {}


_desks = _Desks()


def desk_for(queries: Vectors, count: int, k: int) -> Desk | None:
    """This thread's desk for so many candidates and hits; None for several queries or very many."""
    if len(queries) != 1 or count > _MOST_CANDIDATES:
        return None
    kept, of = _desks.of, (queries.shape[1], count, k)
    found = kept.get(of)
    if found is None:
        if len(kept) >= _MOST_DESKS:
            kept.clear()
        found = kept[of] = Desk(*of)
    return found
