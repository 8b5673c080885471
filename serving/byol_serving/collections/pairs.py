"""Whether two images show the same thing: a threshold, and what it is worth on known pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from byol_serving.collections.types import Vectors
from byol_serving.errors import InvalidRequest

FALSE_ACCEPT_RATES = (0.1, 0.01, 0.001, 0.0001)
_FOLDS = 10
"""As in the protocol of Labeled Faces in the Wild (Huang et al. 2007)."""

Same = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class AcceptRate:
    """TAR at FAR: how many same pairs are accepted where so many different ones are."""

    false_accepts: float
    """The rate asked for, 0 .. 1."""
    true_accepts: float
    threshold: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold found from labelled pairs."""

    threshold: float
    """Pairs with cosine similarity >= threshold are taken for the same."""
    accuracy: float
    """Mean over up to 10 folds, each with a threshold that the other folds gave."""
    rates: Sequence[AcceptRate]
    """Those of FALSE_ACCEPT_RATES that so many different pairs can show (rate x pairs >= 1)."""


def calibrate(
    scores: Vectors, same: Same, *, max_false_accepts: float | None = None
) -> Calibration:
    """Finds a threshold for cosine similarities.

    Args:
        scores: float32 [N].
        same: bool [N], whether each pair is the same thing.
        max_false_accepts: the threshold accepts at most this part of the different pairs; None: it
            is the most accurate one.

    Raises:
        InvalidRequest: fewer than two pairs of either kind, or a rate that these cannot show.
    """
    positives, negatives = int(same.sum()), int((~same).sum())
    if min(positives, negatives) < 2:
        raise InvalidRequest(
            f"{positives} same and {negatives} different pairs are too few: give at least two of"
            " each, better hundreds"
        )
    if max_false_accepts is not None and not 1 / negatives <= max_false_accepts <= 1:
        raise InvalidRequest(
            f"a false accept rate of {max_false_accepts:g} cannot be shown with {negatives}"
            f" different pairs: ask for {1 / negatives:.2g} to 1, or give more pairs"
        )
    return Calibration(
        threshold=_threshold(scores, same, max_false_accepts),
        accuracy=_accuracy(scores, same, max_false_accepts),
        rates=[_rate(scores, same, each) for each in FALSE_ACCEPT_RATES if each * negatives >= 1],
    )


def _threshold(scores: Vectors, same: Same, max_false_accepts: float | None) -> float:
    if max_false_accepts is None:
        return _most_accurate(scores, same)
    return _at_rate(scores[~same], max_false_accepts)


def _most_accurate(scores: Vectors, same: Same) -> float:
    """Between two neighbouring scores; in the middle where several borders are equally good."""
    order = np.argsort(scores, kind="stable")
    ascending = scores[order].astype(np.float64)
    # Accepting from position i on: the different ones before it and the same ones after are right.
    right = np.concatenate([[0], np.cumsum(~same[order])])
    right = right + same.sum() - np.concatenate([[0], np.cumsum(same[order])])
    borders = np.concatenate([[-1.0], (ascending[1:] + ascending[:-1]) / 2, [1.0]])
    # A border within equal scores cannot be drawn; nor can "accept nothing" below 1.
    possible = np.concatenate([[True], ascending[1:] > ascending[:-1], [ascending[-1] < 1]])
    best = np.flatnonzero(possible & (right == right[possible].max()))
    return float(borders[best[len(best) // 2]])


def _at_rate(different: Vectors, rate: float) -> float:
    """The lowest threshold that accepts at most this part of the different pairs."""
    allowed = int(np.floor(rate * len(different) + 1e-9))
    if allowed >= len(different):
        return -1.0
    first_refused = np.sort(different)[::-1][allowed]
    return float(np.nextafter(first_refused, np.float32(np.inf), dtype=np.float32))


def _rate(scores: Vectors, same: Same, rate: float) -> AcceptRate:
    threshold = _at_rate(scores[~same], rate)
    accepted = float((scores[same] >= threshold).mean())
    return AcceptRate(false_accepts=rate, true_accepts=accepted, threshold=threshold)


def _accuracy(scores: Vectors, same: Same, max_false_accepts: float | None) -> float:
    """Cross-validated; every fold has its part of either kind."""
    folds = min(_FOLDS, int(same.sum()), int((~same).sum()))
    fold = np.empty(len(same), np.int64)
    for kind in (same, ~same):
        fold[kind] = np.arange(kind.sum()) % folds
    accuracies = []
    for each in range(folds):
        held = fold == each
        threshold = _threshold(scores[~held], same[~held], max_false_accepts)
        accuracies.append(float(((scores[held] >= threshold) == same[held]).mean()))
    return float(np.mean(accuracies))
