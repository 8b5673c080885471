"""ZCA whitening of the exported embedding (Kalapos and Gyires-Tóth 2024, arXiv 2408.07519).

Self-supervised embeddings use few of their directions. Turned so that all have the same variance
over the images, with the least change otherwise (ZCA), they are found more useful by kNN and linear
probes alike. It is a linear layer after the encoder, fitted once on images; training is as it was.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from byol_serving.errors import InvalidSource

SHRINKAGE = 0.1
"""Part of the mean variance that is added to that of every direction: directions that hold next to
nothing are not blown up. On CIFAR-10 kNN is best between 0.03 and 0.3 (docs/evaluation.md)."""


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """rows -> (rows - mean) @ matrix."""

    mean: NDArray[np.float32]
    """[D]"""
    matrix: NDArray[np.float32]
    """[D, D], symmetric."""


def fit_whitening(rows: NDArray[np.float32], *, shrinkage: float = SHRINKAGE) -> Whitening:
    """The ZCA whitening of encoder outputs.

    Args:
        rows: [N, D], as the encoder gives them, not L2-normalised.
        shrinkage: see `SHRINKAGE`.

    Raises:
        InvalidSource: fewer rows than dimensions, or all rows are the same.
    """
    count, dim = rows.shape
    if count <= dim:
        raise InvalidSource(
            f"{count} images cannot tell the variance of {dim} dimensions; whiten on more than"
            f" {dim}, best on all that were trained on"
        )
    wide = torch.from_numpy(rows).double()
    mean = wide.mean(dim=0)
    variance, directions = torch.linalg.eigh(torch.cov(wide.T))
    if not float(variance.mean()) > 1e-12:
        raise InvalidSource("all embeddings are the same: the encoder has collapsed; train again")
    scale = (variance.clamp(min=0) + shrinkage * variance.mean()).rsqrt()
    matrix = directions * scale @ directions.T
    return Whitening(mean=mean.float().numpy(), matrix=matrix.float().numpy())
