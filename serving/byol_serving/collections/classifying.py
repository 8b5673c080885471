"""Labels by the votes of the nearest items that have one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from byol_serving.collections.filters import All, Exists, Filter, Scalar
from byol_serving.collections.querying import Query, Wanted, find
from byol_serving.collections.types import Collection, Hit
from byol_serving.errors import InvalidRequest

NEIGHBOURS = 20
TEMPERATURE = 0.07
"""Wu et al. (CVPR 2018, arXiv 1805.01978), section 3.4."""


@dataclass(frozen=True, kw_only=True)
class LabelVotes:
    """What speaks for one label."""

    label: Scalar
    votes: int
    """Neighbours that have it."""
    share: float
    """Their part of all weights, 0 .. 1."""


@dataclass(frozen=True, kw_only=True)
class Classification:
    """All labels that got a vote, best first; none where no neighbour has a label."""

    labels: Sequence[LabelVotes]

    @property
    def label(self) -> Scalar | None:
        """The answer."""
        return self.labels[0].label if self.labels else None

    @property
    def confidence(self) -> float:
        """The answer's share of the weights, 0 .. 1. Not a calibrated probability."""
        return self.labels[0].share if self.labels else 0.0


def classify(
    collection: Collection,
    queries: Sequence[Query],
    key: str,
    *,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    condition: Filter | None = None,
) -> list[Classification]:
    """Lets the k nearest items that have metadata[key] vote with weight exp(similarity / t).

    Wu et al. 2018 (arXiv 1805.01978), section 3.4. A query made of items is not its own neighbour.

    Raises:
        InvalidRequest: an empty key, k below 1, a temperature that is not positive, or an empty
            collection.
    """
    if not key:
        raise InvalidRequest("the key that holds labels is empty: name a metadata key")
    if not 0 < temperature < math.inf:
        raise InvalidRequest(f"temperature {temperature} is not positive; try {TEMPERATURE}")
    labelled: Filter = Exists(key) if condition is None else All((condition, Exists(key)))
    wanted = Wanted(k=min(k, max(1, collection.info.count)), condition=labelled)
    return [_vote(hits, key, temperature) for hits in find(collection, queries, wanted)]


def _vote(hits: Sequence[Hit], key: str, temperature: float) -> Classification:
    weights: dict[tuple[bool, Scalar], float] = {}
    votes: dict[tuple[bool, Scalar], int] = {}
    for hit in hits:
        label = hit.metadata[key]
        if isinstance(label, (str, int, float)):  # not null, a list or an object
            name = (isinstance(label, bool), label)  # True is not 1
            # Relative to the best: exp(1 / 0.001) would overflow.
            weight = math.exp((hit.score - hits[0].score) / temperature)
            weights[name] = weights.get(name, 0.0) + weight
            votes[name] = votes.get(name, 0) + 1
    total = sum(weights.values())
    ranked = sorted(weights, key=lambda name: -weights[name])
    return Classification(
        labels=[
            LabelVotes(label=name[1], votes=votes[name], share=weights[name] / total)
            for name in ranked
        ]
    )
