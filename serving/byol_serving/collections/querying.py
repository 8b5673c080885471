"""What a search can ask beyond the k nearest of a vector: examples, pages, groups, diversity.

Built on `Collection.search` alone, so that every backend has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from byol_serving.collections.diversity import marginal_relevance
from byol_serving.collections.filters import Filter
from byol_serving.collections.types import Collection, Columns, Hit, Vectors
from byol_serving.errors import InvalidRequest, InvalidVector

UNLIKE_WEIGHT = 0.2
"""gamma / beta = 0.15 / 0.75, the values that Manning, Raghavan & Schuetze (2008), "Introduction to
Information Retrieval", section 9.1.1, call reasonable."""
_MIN_CANDIDATES = 64
_CANDIDATES_PER_HIT = 4


@dataclass(frozen=True, kw_only=True)
class Query:
    """One query as a collection can answer it."""

    vector: Vectors
    """float32 [D]"""
    own_ids: frozenset[str] = frozenset()
    """Items that it was made of, which are left out of its answer."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of every query."""

    k: int
    offset: int = 0
    """Leaves out the best so many."""
    condition: Filter | None = None
    min_score: float | None = None
    """With it, k is a limit and may be above the collection's size."""
    mmr_lambda: float | None = None
    """Maximal marginal relevance (see `diversity`); None: by similarity alone."""
    mmr_candidates: int = 0
    """The nearest so many are its choice; 0: four for each hit, at least 64."""
    with_metadata: bool = True
    with_vectors: bool = False
    effort: int | None = None
    """Of an approximate index; see `types.Collection.search`."""


def examples_vector(
    like: Vectors, unlike: Vectors, unlike_weight: float = UNLIKE_WEIGHT
) -> Vectors:
    """The query "like these, not like those": mean(like) - unlike_weight x mean(unlike).

    Rocchio's formula (Rocchio 1971; Manning et al. 2008, section 9.1.1) without an original query,
    over unit vectors, scaled to length 1.

    Args:
        like: float32 [P, D], at least one row, L2-normalised.
        unlike: float32 [N, D], L2-normalised; may have no row.
        unlike_weight: 0 ignores `unlike`; 1 weighs both sides alike.

    Raises:
        InvalidRequest: no row in `like`, or a weight that is negative or not finite.
        InvalidVector: the two sides cancel out.
    """
    if not len(like):
        raise InvalidRequest("there is nothing to be like: give at least one positive example")
    if not 0 <= unlike_weight < np.inf:
        raise InvalidRequest(f"unlike weight {unlike_weight} is not a number from 0 up; try 0.2")
    mixed = like.astype(np.float64).mean(axis=0)
    if len(unlike):
        mixed -= unlike_weight * unlike.astype(np.float64).mean(axis=0)
    length = np.linalg.norm(mixed)
    if length < 1e-6:
        raise InvalidVector(
            "the examples cancel out, so no direction is left: lower the unlike weight, or give"
            " other examples"
        )
    return np.asarray(mixed / length, np.float32)


def find(collection: Collection, queries: Sequence[Query], wanted: Wanted) -> list[list[Hit]]:
    """The hits of each query, best first (with `mmr_lambda`: in the order they are chosen).

    Raises:
        InvalidRequest: no such k, offset or lambda; an empty collection.
    """
    count = checked_count(collection, wanted.k, limit=wanted.min_score is not None)
    pool = _pool(wanted)
    diverse = wanted.mmr_lambda is not None
    found = collection.search(
        stacked(queries),
        min(pool + max(len(each.own_ids) for each in queries), count),
        condition=wanted.condition,
        min_score=wanted.min_score,
        with_metadata=wanted.with_metadata,
        with_vectors=wanted.with_vectors or diverse,
        effort=wanted.effort,
    )
    answers = []
    for query, hits in zip(queries, found, strict=True):
        own = query.own_ids
        others = ([hit for hit in hits if hit.id not in own] if own else hits)[:pool]
        if wanted.mmr_lambda is not None:
            others = _diverse(others, wanted.mmr_lambda, wanted)
        answers.append(others[wanted.offset : wanted.offset + wanted.k])
    return answers


def find_columns(collection: Collection, vectors: Vectors, wanted: Wanted) -> Columns:
    """As `find` for plain vectors (float32 [Q, D]), ids and scores alone; not with `mmr_lambda`."""
    count = checked_count(collection, wanted.k, limit=wanted.min_score is not None)
    found = collection.search_columns(
        vectors,
        min(wanted.offset + wanted.k, count),
        condition=wanted.condition,
        min_score=wanted.min_score,
        effort=wanted.effort,
    )
    return found.after(wanted.offset) if wanted.offset else found


def checked_count(collection: Collection, k: int, *, limit: bool) -> int:
    """The collection's size; raises InvalidRequest for a k above it, unless k is only a limit."""
    info = collection.info
    if info.count == 0:
        raise InvalidRequest(f"collection {info.name!r} is empty: add items before searching")
    if k < 1 or (k > info.count and not limit):
        raise InvalidRequest(
            f"k {k} is outside 1..{info.count}, the size of collection {info.name!r};"
            " ask for fewer, or add items first"
        )
    return info.count


def stacked(queries: Sequence[Query]) -> Vectors:
    """The queries' vectors, float32 [Q, D]."""
    return np.stack([each.vector for each in queries])


def _pool(wanted: Wanted) -> int:
    """How many of the nearest are needed to choose from."""
    deep = wanted.offset + wanted.k
    if wanted.mmr_lambda is None:
        return deep
    if not 0 <= wanted.mmr_lambda <= 1:
        raise InvalidRequest(f"mmr lambda {wanted.mmr_lambda} is outside 0..1; try 0.5")
    if wanted.mmr_candidates:
        return max(deep, wanted.mmr_candidates)
    if wanted.offset:
        raise InvalidRequest(
            "an offset into diverse hits needs mmr_candidates, the same for every page;"
            f" try {max(_MIN_CANDIDATES, _CANDIDATES_PER_HIT * deep)}"
        )
    return max(_MIN_CANDIDATES, _CANDIDATES_PER_HIT * deep)


def _diverse(hits: list[Hit], balance: float, wanted: Wanted) -> list[Hit]:
    if not hits:
        return hits
    scores = np.array([hit.score for hit in hits], np.float32)
    vectors = np.stack([np.asarray(hit.vector) for hit in hits])
    chosen = marginal_relevance(scores, vectors, balance, wanted.offset + wanted.k)
    ordered = [hits[each] for each in chosen]
    return ordered if wanted.with_vectors else [replace(hit, vector=None) for hit in ordered]
