"""Measures that need no labels, all over L2-normalised float32 embeddings [N, D].

docs/evaluation.md says how each goes with kNN accuracy on CIFAR-10, and so which to trust.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from byol_serving.images import Pixels
from byol_training.augment import two_views
from byol_training.config import AugmentConfig
from byol_training.neighbours import Embeddings, nearest

VIEWS = 1000
"""Images among which a view has to find its other view: the measure depends on how many."""
_RANK_ROWS, _PAIR_ROWS = 10_000, 2000
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class LabelFreeScores:
    """What can be said without labels; the views are drawn as training draws them."""

    view_retrieval: float
    """Part of the images whose one view is nearest to their other view, among those of `VIEWS`
    images, or of all there are: 0 .. 1, higher is better."""
    rankme: float
    """Effective rank of the embeddings, 1 .. D: near 1 is collapse (Garrido et al. 2023)."""
    alignment: float
    """Mean |x - x'|^2 of the two views' embeddings, 0 .. 4: lower is more invariant, and 0 is
    collapse (Wang and Isola 2020, with α = 2)."""
    uniformity: float
    """log mean exp(-2 |x - y|^2) over pairs: lower is more spread, 0 is collapse (likewise)."""
    spread: float
    """Mean per-dimension standard deviation times sqrt(D): 1 is isotropic, 0 is collapse."""


def score_without_labels(
    embeddings: Embeddings, views: tuple[Embeddings, Embeddings]
) -> LabelFreeScores:
    """All of them.

    Args:
        embeddings: of the images themselves, [N, D], N at least 2.
        views: of two views of some of them, [M, D] each, row by row the same image.
    """
    rows, (first, second) = torch.from_numpy(embeddings), views
    _, index = nearest(second, first, 1)
    return LabelFreeScores(
        view_retrieval=float((index[:, 0] == torch.arange(len(first))).float().mean()),
        rankme=rankme(rows[:_RANK_ROWS]),
        alignment=float(np.square(first - second).sum(axis=1).mean()),
        uniformity=float(torch.pdist(rows[:_PAIR_ROWS]).square().mul(-2).exp().mean().log()),
        spread=float(rows.std(dim=0).mean() * rows.shape[1] ** 0.5),
    )


def rankme(rows: Tensor) -> float:
    """Exponential of the entropy of the singular values' shares (Garrido et al. 2023, equation 1).

    Args:
        rows: float [N, D], neither centred nor scaled per dimension.
    """
    singular = torch.linalg.svdvals(rows.double())
    share = singular / singular.sum() + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def draw_views(
    pixels: Pixels, augment: AugmentConfig, size: int, *, count: int = VIEWS, seed: int = 0
) -> tuple[Pixels, Pixels]:
    """Two views of `count` images spread over `pixels`, as an encoder's input: uint8 [M, S, S, 3].

    Args:
        pixels: uint8 [N, S', S', 3].
        augment: the view distributions; its mean and std are left to the encoder.
        size: S, side of the views.
        count: how many images; all if there are fewer.
        seed: of the draw: the same seed gives the same views of the same images.
    """
    rows = np.linspace(0, len(pixels) - 1, min(count, len(pixels))).astype(int)
    plain = replace(augment, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    generator = torch.Generator().manual_seed(seed)
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(rows), _BATCH):
        batch = torch.from_numpy(pixels[rows[start : start + _BATCH]])
        parts.append(two_views(batch, plain, size, generator))
    first, second = (_to_bytes(torch.cat([part[i] for part in parts])) for i in (0, 1))
    return first, second


def _to_bytes(images: Tensor) -> Pixels:
    """Planes, float [N, 3, S, S] in 0 .. 1, to uint8 [N, S, S, 3]."""
    scaled = images.mul(255).round_().clamp_(0, 255).to(torch.uint8)
    found: Pixels = scaled.permute(0, 2, 3, 1).contiguous().numpy()
    return found
