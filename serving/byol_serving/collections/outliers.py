"""Items that are like no other: the mean distance to their nearest neighbours."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from byol_serving.collections.filters import Filter
from byol_serving.collections.types import Collection
from byol_serving.collections.walking import go_on, ids_and_vectors, never
from byol_serving.errors import InvalidRequest

NEIGHBOURS = 10
_QUERIES = 256


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """An item and its mean of 1 - cosine similarity to the k nearest others, 0 .. 2."""

    id: str
    distance: float


def find_outliers(
    collection: Collection,
    *,
    k: int = NEIGHBOURS,
    limit: int = 20,
    condition: Filter | None = None,
    stopping: Callable[[], bool] = never,
) -> tuple[Sequence[Outlier], int]:
    """The `limit` items farthest from their neighbours, and how many were looked at.

    The score is the mean over the k nearest (Angiulli & Pizzuti, PKDD 2002), not the distance to
    the k-th alone, which one chance neighbour decides. Equal ones are in the order of storing.

    Args:
        collection: to look through; its vectors are held in memory.
        k: neighbours, 1 .. the collection's size - 1; fewer count where fewer match the condition.
        limit: how many to return.
        condition: only items that match, among one another.
        stopping: asked now and then.

    Raises:
        InvalidRequest: no such k or limit.
        DeadlinePassed: `stopping` said so.
    """
    count = collection.info.count
    if not 1 <= k < count:
        raise InvalidRequest(
            f"k {k} is outside 1..{count - 1}, the other items of the collection; ask for fewer, or"
            " add items first"
        )
    if limit < 1:
        raise InvalidRequest(f"limit {limit} is below 1: ask for at least one item")
    ids, vectors = ids_and_vectors(collection, condition)
    found: list[Outlier] = []
    for start in range(0, len(ids), _QUERIES):
        go_on(stopping)
        block = vectors[start : start + _QUERIES]
        answers = collection.search(block, k + 1, condition=condition, with_metadata=False)
        for own, hits in zip(ids[start:], answers, strict=False):
            scores = [hit.score for hit in hits if hit.id != own][:k]
            if scores:
                found.append(Outlier(id=own, distance=max(0.0, 1 - sum(scores) / len(scores))))
    # nlargest keeps the order of equal ones.
    return heapq.nlargest(limit, found, key=lambda each: each.distance), len(ids)
