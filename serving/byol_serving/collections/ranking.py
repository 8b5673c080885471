"""A definite order among equal scores, so that a longer answer begins with the shorter one."""

import operator
from collections.abc import Callable

import numpy as np

from byol_serving.collections.exact import Found


def ranked(search: Callable[[int], Found], k: int, most: int) -> Found:
    """The k best by score, equal ones by position, as if all had been sorted.

    Of items that are equal at the k-th place FAISS keeps any; so as long as the border runs through
    such a tie, more are asked for. Copies of an image do make ties.

    Args:
        search: the n best of each query, best first, of equal ones any.
        k: how many are wanted.
        most: more than that there are not.
    """
    asked = min(k + 1, most)
    scores, positions = search(asked)
    if _definite(scores):
        return scores[:, :k], positions[:, :k]
    while asked < most and _tied(scores, positions, k):
        asked = min(2 * asked, most)
        scores, positions = search(asked)
    order = np.lexsort((positions, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(positions, order, axis=1)


def _definite(scores: np.ndarray) -> bool:
    """Whether no two scores of a query are equal."""
    if len(scores) == 1:  # as plain numbers it takes less than NumPy's fixed costs
        (one,) = scores.tolist()
        return all(map(operator.gt, one, one[1:]))
    return bool((scores[:, 1:] < scores[:, :-1]).all())


def _tied(scores: np.ndarray, positions: np.ndarray, k: int) -> bool:
    return bool(np.any((scores[:, k - 1] == scores[:, -1]) & (positions[:, -1] >= 0)))
