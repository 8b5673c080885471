"""Groups of items that are nearly the same: the union of all pairs above a similarity."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from byol_serving.collections.filters import Filter
from byol_serving.collections.types import Collection, Vectors
from byol_serving.collections.walking import go_on, ids_and_vectors, never
from byol_serving.errors import InvalidRequest

EXACT_UP_TO = 100_000
"""Items of which every pair is looked at, N x N x D operations: 20,000 of 512 dimensions took 3.5
CPU-seconds, so that 100,000 take about 90 and a million two and a half hours."""
_BLOCK = 2048
_QUERIES = 256
_NEIGHBOURS = 16

Pairs: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64], Vectors]
"""Positions of the left and the right items, and their similarities."""


@dataclass(frozen=True, kw_only=True)
class DuplicateGroup:
    """Items connected by pairs at or above the threshold, in the order they were stored."""

    ids: Sequence[str]
    weakest: float
    """The lowest similarity among those pairs ..."""
    strongest: float
    """... and the highest."""


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """What was found; `groups` are largest first, then in the order of their first items."""

    groups: Sequence[DuplicateGroup]
    items: int
    """Items that were looked at."""
    pairs: int
    """Pairs at or above the threshold."""
    exact: bool
    """Whether every pair was looked at."""


def find_duplicates(
    collection: Collection,
    min_score: float,
    *,
    condition: Filter | None = None,
    exact: bool | None = None,
    limit: int = 0,
    stopping: Callable[[], bool] = never,
) -> Duplicates:
    """All groups (or the `limit` largest) of items that pairs of cosine >= min_score connect.

    Args:
        collection: to look through; its vectors are held in memory.
        min_score: -1 .. 1; copies of an image reach 0.95 and more with most encoders.
        condition: only items that match.
        exact: every pair; without it what the index finds, which is much faster for a large
            collection. None: exact for up to EXACT_UP_TO items, and where the index is flat.
        limit: groups to return; 0 for all.
        stopping: asked now and then.

    Raises:
        InvalidRequest: `min_score` is not a cosine.
        DeadlinePassed: `stopping` said so.
    """
    if not -1 <= min_score <= 1:
        raise InvalidRequest(f"min score {min_score} is outside -1..1; try 0.95")
    ids, vectors = ids_and_vectors(collection, condition)
    if exact is None:
        exact = len(ids) <= EXACT_UP_TO or collection.info.index == "flat"
    if exact:
        found = every_pair(vectors, min_score)
    else:
        found = _indexed_pairs(collection, ids, vectors, min_score, condition)
    union = _Union(len(ids))
    for pairs in found:
        go_on(stopping)
        union.join(pairs)
    groups = [_group(ids, members, union) for members in union.groups()]
    groups.sort(key=lambda group: -len(group.ids))  # stable: then by their first items
    pairs_found = union.pairs if exact else union.pairs // 2  # the index finds each from both ends
    return Duplicates(
        groups=groups[: limit or None], items=len(ids), pairs=pairs_found, exact=exact
    )


def every_pair(vectors: Vectors, min_score: float) -> Iterator[Pairs]:
    """All pairs i < j of unit rows (float32 [N, D]) with cosine >= min_score, block by block."""
    for top in range(0, len(vectors), _BLOCK):
        rows = vectors[top : top + _BLOCK]
        for left in range(top, len(vectors), _BLOCK):
            similar = rows @ vectors[left : left + _BLOCK].T
            mask = similar >= min_score
            if left == top:
                mask = np.triu(mask, 1)
            i, j = np.nonzero(mask)
            yield i + top, j + left, similar[i, j]


def _indexed_pairs(
    collection: Collection,
    ids: list[str],
    vectors: Vectors,
    min_score: float,
    condition: Filter | None,
) -> Iterator[Pairs]:
    """Each item's neighbours by the index; more of them where all that were asked for are near."""
    place = {each: position for position, each in enumerate(ids)}
    for start in range(0, len(ids), _QUERIES):
        waiting = np.arange(start, min(start + _QUERIES, len(ids)))
        k = _NEIGHBOURS
        while len(waiting):
            k = min(k, collection.info.count)
            found = collection.search(
                vectors[waiting], k, condition=condition, min_score=min_score, with_metadata=False
            )
            whole = [len(hits) < k or k == collection.info.count for hits in found]
            triples = [
                (position, place[hit.id], hit.score)
                for position, hits, all_there in zip(waiting.tolist(), found, whole, strict=True)
                for hit in hits
                if all_there and place.get(hit.id, position) != position
            ]
            left, right, scores = zip(*triples, strict=True) if triples else ((), (), ())
            yield np.array(left, np.int64), np.array(right, np.int64), np.array(scores, np.float32)
            waiting = waiting[~np.array(whole)]
            k *= 4


class _Union:
    """Connected components of growing sets of pairs, all pairs of a set at once."""

    def __init__(self, count: int) -> None:
        self.pairs = 0
        self._root = np.arange(count)
        self.low = np.full(count, np.inf, np.float32)
        self.high = np.full(count, -np.inf, np.float32)

    def join(self, pairs: Pairs) -> None:
        """Connects them: every root is hung under the smallest that a pair ties it to."""
        left, right, scores = pairs
        self.pairs += len(left)
        np.minimum.at(self.low, left, scores)
        np.maximum.at(self.high, left, scores)
        while True:
            a, b = self._root[left], self._root[right]
            apart = a != b
            if not apart.any():
                return
            left, right, a, b = left[apart], right[apart], a[apart], b[apart]
            np.minimum.at(self._root, np.maximum(a, b), np.minimum(a, b))
            while not np.array_equal(above := self._root[self._root], self._root):
                self._root = above

    def groups(self) -> list[NDArray[np.int64]]:
        """The positions of each component of two and more, ascending, by their first."""
        order = np.argsort(self._root, kind="stable")
        starts = np.flatnonzero(np.diff(self._root[order], prepend=-1))
        parts = np.split(order, starts[1:]) if len(order) else []
        return [part for part in parts if len(part) > 1]


def _group(ids: list[str], members: NDArray[np.int64], union: _Union) -> DuplicateGroup:
    return DuplicateGroup(
        ids=[ids[each] for each in members],
        weakest=float(union.low[members].min()),
        strongest=min(1.0, float(union.high[members].max())),
    )
