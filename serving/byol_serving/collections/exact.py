"""Exact nearest neighbours over a float32 matrix, by FAISS's kernels.

The kernels are called on our own memory rather than through an IndexFlat: rows below a size that
was published never change, so readers need no lock while a writer appends behind them. (IndexFlat
crashes the process when it is added to during a search.)
"""

import os
import threading
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from byol_serving.collections.faiss_library import faiss
from byol_serving.collections.types import Vectors

Positions: TypeAlias = NDArray[np.int64]
Bits: TypeAlias = NDArray[np.uint8]
Found: TypeAlias = tuple[Vectors, Positions]
"""Scores float32 [Q, k] and positions int64 [Q, k], best first; -1 where there are fewer than k."""

# FAISS's default keeps batches of hundreds off BLAS: 256 queries of 128-d ran at 40/s a core
# instead of 303/s. It is a global that only says when BLAS pays; single queries go around it below.
faiss.cvar.distance_compute_blas_threshold = 8

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_BLAS_FROM = 4
"""Queries from which BLAS beats a scan; below, the scan is up to twice as fast."""
_THREADS_FROM = 32
"""Queries from which a search uses all cores: one Flat query ran at 34/s with one OpenMP thread and
at 6/s with two."""
_BLOCK = 65_536
_MAX_EXTRA = 64


class _Searching:
    """Counts the searches of the moment: `with SEARCHING: ...`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0

    def __enter__(self) -> None:
        with self._lock:
            self.count += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self.count -= 1


SEARCHING = _Searching()


def threads_for(queries: int) -> int:
    """Threads for a search of so many queries; searches at the same time share the cores."""
    return max(1, CORES // max(1, SEARCHING.count)) if queries >= _THREADS_FROM else 1


def share_cores(queries: int) -> None:
    """Sets this thread's OpenMP threads for a search of so many queries.

    With more threads than cores, each of OpenMP's barriers waits for threads that do not run.
    """
    faiss.omp_set_num_threads(threads_for(queries))


def pack(mask: NDArray[np.bool_]) -> Bits:
    """A mask as FAISS's bitmap."""
    return np.packbits(mask, bitorder="little")


def unpack(bits: Bits, size: int) -> NDArray[np.bool_]:
    """The first `size` bits of a bitmap as a mask."""
    mask: NDArray[np.bool_] = np.unpackbits(bits, count=size, bitorder="little").view(np.bool_)
    return mask


def bits_at(bits: Bits, positions: Positions) -> NDArray[np.bool_]:
    """The bits at `positions`, of any shape; False where a position is -1."""
    chosen = (bits[positions >> 3] >> (positions & 7).astype(np.uint8)) & 1
    mask: NDArray[np.bool_] = chosen.astype(np.bool_) & (positions >= 0)
    return mask


def nearest(queries: Vectors, vectors: Vectors, k: int, alive: Bits | None, dead: int) -> Found:
    """The k best of each query among the rows of `vectors` whose bit is set (all without `alive`).

    Args:
        queries: float32 [Q, D].
        vectors: float32 [N, D], contiguous.
        k: how many, at least 1.
        alive: bitmap over N.
        dead: how many of its bits are not set.
    """
    if alive is None or dead == 0:
        return _knn(queries, vectors, k, None)
    if len(queries) < _BLAS_FROM:
        return _knn(queries, vectors, k, faiss.IDSelectorBitmap(alive))
    # BLAS takes no selector: ask for some more and drop the dead among them.
    extra = min(dead, _MAX_EXTRA)
    scores, positions = _knn(queries, vectors, k + extra, None)
    living = bits_at(alive, positions)
    order = np.argsort(~living, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, order, axis=1)
    positions = np.take_along_axis(positions, order, axis=1)
    short = np.flatnonzero(living.sum(axis=1) < k)
    if short.size:
        scores[short], positions[short] = _knn(
            queries[short], vectors, k, faiss.IDSelectorBitmap(alive)
        )
    return scores, positions


def nearest_among(queries: Vectors, vectors: Vectors, chosen: Positions, k: int) -> Found:
    """The k best of each query among the rows at `chosen` (sorted, without repeats)."""
    if len(queries) < _BLAS_FROM:
        # Scanned where they lie: 3,000 of 300,000 in 0.07 ms; copied together first, 0.23 ms.
        return _knn(queries, vectors, k, faiss.IDSelectorArray(len(chosen), faiss.swig_ptr(chosen)))
    best = nothing(len(queries), k)
    for start in range(0, len(chosen), _BLOCK):
        block = chosen[start : start + _BLOCK]
        scores, local = _knn(queries, vectors[block], k, None)
        positions = np.where(local >= 0, block[local], -1)
        best = merged(best, (scores, positions), k)
    return best


def rescored(queries: Vectors, vectors: Vectors, candidates: Positions, k: int) -> Found:
    """The k best of each query among its own candidates (int64 [Q, C]; -1 for none, at the end)."""
    scores, positions = room(len(queries), k)
    among = candidates.shape[1]
    faiss.knn_inner_products_by_idx(
        faiss.swig_ptr(queries),
        faiss.swig_ptr(vectors),
        faiss.swig_ptr(candidates),
        queries.shape[1],
        len(queries),
        len(vectors),
        among,
        k,
        faiss.swig_ptr(scores),
        faiss.swig_ptr(positions),
        among,  # FAISS's default, -1, reads past the second query's
    )
    return marked(scores, positions)


def merged(left: Found, right: Found, k: int) -> Found:
    """The k best of two answers over different rows."""
    scores = np.concatenate([left[0], right[0]], axis=1)
    positions = np.concatenate([left[1], right[1]], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(positions, order, axis=1)


def marked(scores: Vectors, positions: Positions) -> Found:
    """FAISS's answer, with -inf in place of its least number where there is no position."""
    if lacking(positions):
        scores[positions < 0] = -np.inf
    return scores, positions


def lacking(positions: Positions) -> bool:
    """Whether a query of an answer (int64 [Q, k]) has fewer than k: -1 at its end."""
    if len(positions) == 1:  # as a plain number, a tenth of NumPy's fixed costs
        return bool(positions.item(-1) < 0)
    return bool((positions[:, -1] < 0).any())


def room(queries: int, k: int) -> Found:
    """Room for an answer, which FAISS fills."""
    return np.empty((queries, k), np.float32), np.empty((queries, k), np.int64)


def nothing(queries: int, k: int) -> Found:
    """The answer that found nothing."""
    return np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1, np.int64)


def _knn(queries: Vectors, vectors: Vectors, k: int, selector: Any) -> Found:
    count, dim = queries.shape
    if not len(vectors):
        return nothing(count, k)
    scores, positions = room(count, k)
    if selector is None and count < _BLAS_FROM:
        selector = faiss.IDSelectorAll()  # any selector takes the scan instead of BLAS
    with SEARCHING:
        share_cores(count)
        faiss.knn_inner_product(
            faiss.swig_ptr(queries),
            faiss.swig_ptr(vectors),
            dim,
            count,
            len(vectors),
            k,
            faiss.swig_ptr(scores),
            faiss.swig_ptr(positions),
            selector,
        )
    return marked(scores, positions)
