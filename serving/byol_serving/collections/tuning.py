"""How hard an approximate index has to search: what reaches a recall, in the least time."""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from byol_serving.collections.exact import Bits, Positions, nearest, nearest_among, pack, unpack
from byol_serving.collections.types import Vectors

_HELD_BACK = 256
_HELD_SHARE = 8
RECALL_AT = 10

Search: TypeAlias = Callable[[Vectors, int, Bits | None, int, float], Positions]
"""(queries, k, alive, effort, depth) -> positions int64 [Q, k]."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a search costs and finds, as measured when the index was built."""

    effort: int = 1
    """Lists that a search reads (IVF), or the width of its walk (HNSW)."""
    depth: int = 1
    """Candidates that are re-ranked for each hit, where codes are coarse."""
    effort_of_tenth: int = 1
    """The effort where a filter keeps a tenth of the items: their neighbours lie farther away."""
    recall: float = 0
    """Recall@10 of queries that the index had not been given yet: see `held_back`."""
    items: int = 0
    """How many the index held then."""
    target: float
    """What was asked for; `recall` is below it where no effort reaches it."""


def held_back(count: int) -> int:
    """How many of so many vectors, the last, an index is tuned with before they are added to it.

    Vectors that it has would flatter a graph, which was built around them: on 300,000 clustered
    vectors, they found .99 of their neighbours at an effort that found new queries .75 of theirs.
    """
    return min(_HELD_BACK, count // _HELD_SHARE)


def tuned(
    search: Search,
    vectors: Vectors,
    queries: Vectors,
    target: float,
    *,
    efforts: Sequence[int],
    depths: Sequence[int],
) -> Tuning:
    """The fastest of efforts and depths (both rising) that reach the target, or the best found.

    Deep re-ranking lets a search read fewer lists: which of the two costs less, the data decides.

    Args:
        search: of an index of `vectors`.
        vectors: float32 [N, D].
        queries: float32 [Q, D], not among them.
        target: recall@10 that is wanted.
        efforts: to choose from.
        depths: to choose from.
    """
    if not len(queries):
        return Tuning(items=len(vectors), target=target)
    whole = _Held(queries, vectors, None)
    tried = [_least(search, whole, target, efforts, depth) for depth in depths]
    reached = [each for each in tried if each.recall >= target]
    best = (
        min(reached, key=lambda each: each.seconds)
        if reached
        else max(tried, key=lambda each: each.recall)
    )
    of_tenth = best.effort
    tenth = np.random.default_rng(2).random(len(vectors)) < 0.1
    if tenth.sum() >= RECALL_AT:
        wider = [each for each in efforts if each >= best.effort]
        held = _Held(queries, vectors, pack(tenth))
        of_tenth = _least(search, held, target, wider, best.depth).effort
    return Tuning(
        effort=best.effort,
        depth=best.depth,
        effort_of_tenth=of_tenth,
        recall=best.recall,
        items=len(vectors),
        target=target,
    )


class _Held:
    """Queries, and what is right for each."""

    def __init__(self, queries: Vectors, vectors: Vectors, alive: Bits | None) -> None:
        self._queries, self._alive = queries, alive
        self._k = min(RECALL_AT, len(vectors))
        if alive is None:
            _, self._truth = nearest(queries, vectors, self._k, None, 0)
        else:
            living = np.flatnonzero(unpack(alive, len(vectors)))
            _, self._truth = nearest_among(queries, vectors, living, self._k)

    def recall(self, search: Search, effort: int, depth: int) -> float:
        """The part of the right ones that it finds."""
        found = search(self._queries, self._k + 1, self._alive, effort, depth)  # as `ranked` asks
        return recall_of(found[:, : self._k], self._truth)


@dataclass(frozen=True, kw_only=True)
class _Tried:
    effort: int
    depth: int
    recall: float
    seconds: float


def _least(
    search: Search, held: _Held, target: float, efforts: Sequence[int], depth: int
) -> _Tried:
    """The least of the efforts that reaches the target at this depth, or else the greatest."""
    place = bisect_left(efforts, target, key=lambda each: held.recall(search, each, depth))
    effort = efforts[min(place, len(efforts) - 1)]
    started = time.perf_counter()
    recall = held.recall(search, effort, depth)
    seconds = time.perf_counter() - started
    return _Tried(effort=effort, depth=depth, recall=recall, seconds=seconds)


def recall_of(found: Positions, truth: Positions) -> float:
    """The part of `truth` (int64 [Q, k]) that is in `found`."""
    hits = (found[:, :, None] == truth[:, None, :]).any(axis=1)
    return float(hits.mean())
