"""Measures by nearest neighbours: kNN accuracy, retrieval, and stability between two encoders.

Every function takes L2-normalised float32 embeddings [N, D] and, where labels are needed, int64
labels [N]; cosine similarity is their product. Work goes in blocks of queries, so that 10,000
queries against 50,000 rows need some hundred MB and about half a minute on one core.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Embeddings = NDArray[np.float32]
Labels = NDArray[np.int64]

_BLOCK = 256  # queries at a time: 50 MB of similarities with 50,000 rows


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """How well a ranking of the bank by cosine brings a query's own class to the front."""

    precision: float
    """Part of the first k that are of the query's class, averaged over queries."""
    average_precision: float
    """Mean over queries of the average precision over the whole bank (mAP)."""


def nearest(bank: Embeddings, queries: Embeddings, k: int) -> tuple[Tensor, Tensor]:
    """Cosine float32 [Q, k] and position in the bank int64 [Q, k], best first; k at most N."""
    found = [block.topk(min(k, len(bank)), dim=1) for block in _similarities(bank, queries)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def knn_accuracy(
    bank: Embeddings,
    bank_labels: Labels,
    queries: Embeddings,
    query_labels: Labels,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy of the weighted k-nearest-neighbour vote, weights exp(cos / T) (Wu et al. 2018)."""
    cosine, index = nearest(bank, queries, k)
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    votes = torch.zeros(len(queries), classes)
    votes.scatter_add_(1, torch.from_numpy(bank_labels)[index], (cosine / temperature).exp())
    return float((votes.argmax(dim=1) == torch.from_numpy(query_labels)).float().mean())


def retrieval(
    bank: Embeddings, bank_labels: Labels, queries: Embeddings, query_labels: Labels, *, k: int = 10
) -> Retrieval:
    """Precision@k and mean average precision, an item being relevant if its label is the query's.

    Items of equal similarity share a rank, as in sklearn's average_precision_score. A query whose
    label is not in the bank is left out of both; both are nan if all are.
    """
    known = np.isin(query_labels, bank_labels)
    if not known.any():
        return Retrieval(precision=float("nan"), average_precision=float("nan"))
    queries, query_labels = queries[known], query_labels[known]
    order = np.argsort(bank_labels, kind="stable")  # now the items of a class lie side by side
    bank, bank_labels = bank[order], bank_labels[order]
    first = np.searchsorted(bank_labels, query_labels, side="left")
    last = np.searchsorted(bank_labels, query_labels, side="right")
    averages: list[float] = []
    hits = torch.zeros(())
    for block in _similarities(bank, queries):
        start = len(averages)
        top = torch.from_numpy(bank_labels)[block.topk(min(k, len(bank)), dim=1).indices]
        wanted = torch.from_numpy(query_labels[start : start + len(block)])
        hits += (top == wanted[:, None]).float().mean(dim=1).sum()
        rows = block.numpy()
        for row, ranked in zip(rows, np.sort(rows, axis=1), strict=True):
            place = len(averages)
            averages.append(_average_precision(row[first[place] : last[place]], ranked))
    return Retrieval(
        precision=float(hits) / len(queries), average_precision=float(np.mean(averages))
    )


def neighbour_stability(before: Embeddings, after: Embeddings, *, k: int = 10) -> float:
    """Part of an image's k nearest neighbours that two encoders agree on, averaged over images.

    1 where the second ranks as the first does, about k / N where they have nothing in common: how
    much an index would change with the encoder. Row i of both is the same image.
    """
    k = min(k, len(before) - 1)
    first, second = _others(before, k), _others(after, k)
    return float((first[:, :, None] == second[:, None, :]).any(dim=2).float().mean())


def _others(rows: Embeddings, k: int) -> Tensor:
    """The k nearest others of every row, int64 [N, k]."""
    found: list[Tensor] = []
    start = 0
    for block in _similarities(rows, rows):
        block[torch.arange(len(block)), torch.arange(start, start + len(block))] = -torch.inf
        start += len(block)
        found.append(block.topk(k, dim=1).indices)
    return torch.cat(found)


def _similarities(bank: Embeddings, queries: Embeddings) -> Iterator[Tensor]:
    """Cosine of blocks of queries with the whole bank, float32 [block, N]."""
    keys = torch.from_numpy(bank).T
    for start in range(0, len(queries), _BLOCK):
        yield torch.from_numpy(queries[start : start + _BLOCK]) @ keys


def _average_precision(relevant: Embeddings, ranked: Embeddings) -> float:
    """Of one query: similarities of the relevant items, and of all items in rising order.

    Precision at each relevant item is how many relevant ones are at least as similar, over how many
    items are. Counting by binary search in sorted similarities replaces an argsort of the bank.
    """
    relevant = np.sort(relevant)
    above = len(relevant) - np.searchsorted(relevant, relevant, side="left")
    total = len(ranked) - np.searchsorted(ranked, relevant, side="left")
    return float(np.mean(above / total))
