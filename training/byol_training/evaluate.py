"""Is the encoder any good? Measures on frozen embeddings, with labels and without.

Every measure takes L2-normalised float32 embeddings [N, D] (rows) and, where labels are needed,
int64 labels [N]. Nothing here looks at how the embeddings were made, so the same functions score
raw pixels, an untrained encoder and a trained one.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from byol_serving.images import Pixels
from byol_training.checkpoint import load_encoder
from byol_training.data import Images, common_labels, list_images, load_images
from byol_training.encoders import build_encoder
from byol_training.served import ServedEncoder

Embeddings = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LabelledScores:
    """Measures that need labels; all are fractions, 0 .. 1."""

    knn_accuracy: float
    linear_accuracy: float
    precision_at_10: float
    mean_average_precision: float


@dataclass(frozen=True, kw_only=True)
class LabelFreeScores:
    """Measures that need none."""

    rankme: float
    """Effective rank of the embeddings, 1 .. D: near 1 is collapse (Garrido et al. 2023)."""
    uniformity: float
    """log mean exp(-2 |x - y|^2) over pairs, lower is more spread (Wang and Isola 2020)."""
    spread: float
    """Mean per-dimension standard deviation times sqrt(D): 1 is isotropic, 0 is collapse."""


def pixel_embeddings(pixels: Pixels) -> Embeddings:
    """The baseline without an encoder: pixels of each image, standardised, L2-normalised."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    normalised: Embeddings = flat / np.maximum(norms, 1e-6)
    return normalised


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
    k = min(k, len(bank))
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    keys, key_labels = torch.from_numpy(bank), torch.from_numpy(bank_labels)
    correct = 0
    for start in range(0, len(queries), 1024):
        block = torch.from_numpy(queries[start : start + 1024])
        cosine, index = (block @ keys.T).topk(k, dim=1)
        votes = torch.zeros(len(block), classes)
        votes.scatter_add_(1, key_labels[index], (cosine / temperature).exp())
        wanted = torch.from_numpy(query_labels[start : start + 1024])
        correct += int((votes.argmax(dim=1) == wanted).sum())
    return correct / len(queries)


def linear_accuracy(
    bank: Embeddings,
    bank_labels: Labels,
    queries: Embeddings,
    query_labels: Labels,
    *,
    l2: float = 1e-4,
) -> float:
    """Accuracy of an L2-regularised logistic regression on frozen, standardised embeddings.

    Full-batch L-BFGS, so there is no learning rate to choose (paper, appendix C.2, transfer).
    """
    center, scale = bank.mean(axis=0), bank.std(axis=0) + 1e-6
    features = torch.from_numpy((bank - center) / scale)
    labels = torch.from_numpy(bank_labels)
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    weight = torch.zeros(classes, bank.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + l2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
        return loss

    solver.step(objective)  # type: ignore[no-untyped-call]  # likewise
    with torch.no_grad():
        tested = torch.from_numpy((queries - center) / scale) @ weight.T + bias
    return float((tested.argmax(dim=1).numpy() == query_labels).mean())


def retrieval(
    bank: Embeddings, bank_labels: Labels, queries: Embeddings, query_labels: Labels, *, k: int = 10
) -> tuple[float, float]:
    """Precision@k and mean average precision of ranking the bank by cosine, same label = relevant.

    A query whose label is not in the bank is left out of both; (nan, nan) if all are.
    """
    precisions: list[float] = []
    averages: list[float] = []
    for query, label in zip(queries, query_labels, strict=True):
        ranked = bank_labels[np.argsort(-(bank @ query), kind="stable")] == label
        if not ranked.any():
            continue
        precisions.append(float(ranked[:k].mean()))
        places = np.flatnonzero(ranked)
        averages.append(float(np.mean(np.arange(1, len(places) + 1) / (places + 1))))
    if not averages:
        return float("nan"), float("nan")
    return float(np.mean(precisions)), float(np.mean(averages))


def score_with_labels(
    bank: Embeddings, bank_labels: Labels, queries: Embeddings, query_labels: Labels
) -> LabelledScores:
    """All measures that need labels: the bank is what was indexed, the queries are held back."""
    precision, average = retrieval(bank, bank_labels, queries[:2000], query_labels[:2000])
    return LabelledScores(
        knn_accuracy=knn_accuracy(bank, bank_labels, queries, query_labels),
        linear_accuracy=linear_accuracy(bank, bank_labels, queries, query_labels),
        precision_at_10=precision,
        mean_average_precision=average,
    )


def score_without_labels(embeddings: Embeddings) -> LabelFreeScores:
    """All measures that need no labels, over at most 10,000 embeddings."""
    rows = torch.from_numpy(embeddings[:10_000])
    singular = torch.linalg.svdvals(rows.double())
    share = singular / singular.sum() + 1e-12
    pairs = torch.pdist(rows[:2000]).square()
    return LabelFreeScores(
        rankme=float(torch.exp(-(share * share.log()).sum())),
        uniformity=float(pairs.mul(-2).exp().mean().log()),
        spread=float(rows.std(dim=0).mean() * rows.shape[1] ** 0.5),
    )


def evaluate_run(run: Path, source: Path, queries: Path | None) -> dict[str, dict[str, float]]:
    """Scores a trained run beside the same encoder untrained and raw pixels.

    Args:
        run: a run directory.
        source: images to look among; their class sub-folders, if any, are the labels.
        queries: images held back; every sixth of `source` by default.

    Returns:
        For `trained`, `untrained` and `pixels` the fields of LabelFreeScores and, where there are
        labels, of LabelledScores.

    Raises:
        InvalidSource: no checkpoint, or no images.
    """
    encoder, config = load_encoder(run)
    bank, held = _bank_and_queries(source, queries, config.image_size)
    untrained = build_encoder(config.encoder, config.stem)
    mean, std = config.augment.mean, config.augment.std
    labels = common_labels(bank, held)
    scores: dict[str, dict[str, float]] = {}
    for name, embed in (
        ("trained", ServedEncoder(encoder, mean, std).embed),
        ("untrained", ServedEncoder(untrained, mean, std).embed),
        ("pixels", pixel_embeddings),
    ):
        rows, asked = embed(bank.pixels), embed(held.pixels)
        scores[name] = asdict(score_without_labels(asked))
        if labels is not None:
            scores[name] |= asdict(score_with_labels(rows, labels[0], asked, labels[1]))
    return scores


def _bank_and_queries(source: Path, queries: Path | None, size: int) -> tuple[Images, Images]:
    if queries is not None:
        return load_images(source, size), load_images(queries, size)
    names = list_images(source)
    held = names[::6]
    bank = sorted(set(names) - set(held))
    return load_images(source, size, only=bank), load_images(source, size, only=held)
