"""Linear probes: how much of the labels a linear classifier reads off frozen embeddings.

Two protocols, because published figures come from both: logistic regression with L2 (the paper's
for transfer, appendix C.2) and SGD (the paper's linear evaluation, appendix C.1). Both standardise
the embeddings by the bank's mean and standard deviation, choose their one setting on a tenth of the
bank that is held out, and are fitted again on all of it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from byol_training.neighbours import Embeddings, Labels

L2_CHOICES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Weights of the squared norm beside the mean cross-entropy, from strong to weak."""
LEARNING_RATES = (0.4, 0.3, 0.2, 0.1, 0.05)
"""The paper's sweep for its linear evaluation (appendix C.1)."""
SGD_EPOCHS, SGD_BATCH = 80, 1024
"""Likewise; Nesterov momentum 0.9, no weight decay."""
_HELD_OUT = 0.1


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a probe reached on the queries, and the setting that the held-out part chose."""

    accuracy: float
    setting: float


def logistic_probe(
    bank: Embeddings, bank_labels: Labels, queries: Embeddings, query_labels: Labels
) -> Fitted:
    """L2-regularised logistic regression by full-batch L-BFGS, L2 out of `L2_CHOICES`."""
    features, asked, labels, classes = _prepare(bank, bank_labels, queries, query_labels)
    fit, check = (torch.from_numpy(part) for part in split(bank_labels, 1 - _HELD_OUT, seed=0))
    weights = torch.zeros(classes, features.shape[1])
    reached: list[float] = []
    for l2 in L2_CHOICES:  # each starts where the stronger one ended
        weights = _minimise(features[fit], labels[fit], weights, l2)
        reached.append(_accuracy(weights, features[check], labels[check]))
    best = L2_CHOICES[int(np.argmax(reached))]
    weights = _minimise(features, labels, torch.zeros_like(weights), best)
    return Fitted(accuracy=_accuracy(weights, asked, torch.from_numpy(query_labels)), setting=best)


def sgd_probe(
    bank: Embeddings,
    bank_labels: Labels,
    queries: Embeddings,
    query_labels: Labels,
    *,
    epochs: int = SGD_EPOCHS,
) -> Fitted:
    """The paper's linear evaluation on embeddings of whole images, learning rate chosen.

    Unlike the paper's it sees no random crops and flips of the images, only their embeddings.
    """
    features, asked, labels, classes = _prepare(bank, bank_labels, queries, query_labels)
    fit, check = (torch.from_numpy(part) for part in split(bank_labels, 1 - _HELD_OUT, seed=0))
    swept = _descend(features[fit], labels[fit], classes, LEARNING_RATES, epochs)
    reached = [_accuracy(weights, features[check], labels[check]) for weights in swept]
    best = LEARNING_RATES[int(np.argmax(reached))]
    (weights,) = _descend(features, labels, classes, (best,), epochs)
    return Fitted(accuracy=_accuracy(weights, asked, torch.from_numpy(query_labels)), setting=best)


def few_shot(
    bank: Embeddings,
    bank_labels: Labels,
    queries: Embeddings,
    query_labels: Labels,
    *,
    part: float,
    draws: int = 3,
) -> float:
    """Accuracy of `logistic_probe` given a part of the bank's labels, averaged over draws.

    Every class keeps its share, and one image at least. (Table 2 of the paper fine-tunes the whole
    network on 1% and 10%; here the encoder stays frozen.)
    """
    reached = []
    for seed in range(draws):
        rows, _ = split(bank_labels, part, seed=seed + 1)
        found = logistic_probe(bank[rows], bank_labels[rows], queries, query_labels)
        reached.append(found.accuracy)
    return float(np.mean(reached))


def split(labels: Labels, part: float, *, seed: int) -> tuple[Labels, Labels]:
    """Rows in two: `part` of every class, but one image at least, and the rest.

    Where every class has one image, the rest is all of them: there is nothing to hold out.
    """
    rng = np.random.default_rng(seed)
    kept = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        kept[rows[: max(1, round(len(rows) * part))]] = True
    rest = np.flatnonzero(~kept)
    return np.flatnonzero(kept), rest if len(rest) else np.arange(len(labels))


def _prepare(
    bank: Embeddings, bank_labels: Labels, queries: Embeddings, query_labels: Labels
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Standardised [N, D + 1] and [Q, D + 1], the last column of ones; labels; classes."""
    center, scale = bank.mean(axis=0), bank.std(axis=0) + 1e-6
    features, asked = (
        F.pad(torch.from_numpy((rows - center) / scale), (0, 1), value=1.0)
        for rows in (bank, queries)
    )
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    return features, asked, torch.from_numpy(bank_labels), classes


def _minimise(features: Tensor, labels: Tensor, start: Tensor, l2: float) -> Tensor:
    """Weights [C, D + 1] of the least mean cross-entropy + l2·|W|², the bias left out of |W|."""
    weights = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(features @ weights.T, labels)
        loss = loss + l2 * weights[:, :-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
        return loss

    solver.step(objective)  # type: ignore[no-untyped-call]  # likewise
    return weights.detach()


def _descend(
    features: Tensor, labels: Tensor, classes: int, rates: tuple[float, ...], epochs: int
) -> Tensor:
    """Weights [R, C, D + 1] by SGD, all learning rates at once on the same batches."""
    weights = torch.zeros(len(rates), classes, features.shape[1], requires_grad=True)
    speed = torch.tensor(rates).view(-1, 1, 1)
    moment = torch.zeros_like(weights)
    generator = torch.Generator().manual_seed(0)
    batches = -(-len(labels) // SGD_BATCH)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator).chunk(batches)
        for number, rows in enumerate(order):
            logits = features[rows] @ weights.transpose(1, 2)
            wanted = labels[rows].expand(len(rates), -1).flatten()
            loss = F.cross_entropy(logits.flatten(0, 1), wanted) * len(rates)
            (gradient,) = torch.autograd.grad(loss, weights)
            progress = (epoch + number / batches) / epochs
            rate = speed * 0.5 * (1 + np.cos(np.pi * progress))
            with torch.no_grad():
                moment.mul_(0.9).add_(gradient)
                weights.sub_(rate * (gradient + 0.9 * moment))  # Nesterov's
    return weights.detach()


def _accuracy(weights: Tensor, features: Tensor, labels: Tensor) -> float:
    return float(((features @ weights.T).argmax(dim=1) == labels).float().mean())
