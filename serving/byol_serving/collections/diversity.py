"""Hits that differ from one another: maximal marginal relevance."""

import numpy as np

from byol_serving.collections.types import Vectors


def marginal_relevance(scores: Vectors, vectors: Vectors, balance: float, count: int) -> list[int]:
    """Positions of up to `count` candidates, chosen greedily (Carbonell & Goldstein, SIGIR 1998).

    Each time the candidate i with the largest balance x scores[i] - (1 - balance) x max over the
    chosen j of cos(i, j); of equal ones the first.

    Args:
        scores: float32 [N], similarity to the query.
        vectors: float32 [N, D], L2-normalised.
        balance: the paper's lambda; 1 ranks by similarity alone, 0 by difference alone.
        count: how many to choose.
    """
    relevance = balance * scores.astype(np.float64)
    nearest_chosen = np.zeros(len(scores))  # the first choice has nothing to differ from
    left = np.ones(len(scores), np.bool_)
    chosen: list[int] = []
    for _ in range(min(count, len(scores))):
        margin = np.where(left, relevance - (1 - balance) * nearest_chosen, -np.inf)
        best = int(np.argmax(margin))
        left[best] = False
        similarity = vectors @ vectors[best]
        nearest_chosen = np.maximum(nearest_chosen, similarity) if chosen else similarity
        chosen.append(best)
    return chosen
