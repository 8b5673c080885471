"""BYOL: the algorithm and nothing else (Grill et al. 2020, arXiv 2006.07733, section 3.1).

    view v  ─ f_θ ─ y ─ g_θ ─ z ─ q_θ ─ q(z)   online: trained by gradient descent
                                         │ loss = 2 - 2·cos, pulled together
    view v' ─ f_ξ ─ y' ─ g_ξ ─ z' ───────┘     target: no gradient; ξ ← τξ + (1-τ)θ

There are no negative samples: what keeps all embeddings from becoming one is that only the online
side is trained, that it has one network more (the predictor), and that the target follows slowly.
"""

import copy
import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_training.config import HeadConfig, TargetNorm
from byol_training.encoders import Encoder


class Mlp(nn.Sequential):
    """Projector g and predictor q: Linear, batch norm, ReLU, Linear (section 3.3).

    The output has no batch norm: "contrary to SimCLR, the output of this MLP is not normalised".
    """

    def __init__(self, inputs: int, head: HeadConfig) -> None:
        super().__init__(
            nn.Linear(inputs, head.hidden),
            nn.BatchNorm1d(head.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(head.hidden, head.out),
        )


class Byol(nn.Module):
    """Online and target networks.

    Args:
        encoder: the backbone f, [N, 3, H, W] → [N, encoder.dim]; becomes the online encoder, and is
            copied for the target.
        head: widths of projector and predictor.
        symmetrised: predict every view; else only the first, against the second's target.
        target_norm: own: the target's batch norms normalise by the batch, as the paper's do, and
            keep running statistics of their own passes. average: they normalise by running
            statistics, which are averaged from the online network's as the weights are (EMAN).
    """

    def __init__(
        self,
        encoder: Encoder,
        head: HeadConfig,
        *,
        symmetrised: bool = True,
        target_norm: TargetNorm = "own",
    ) -> None:
        super().__init__()
        self.symmetrised = symmetrised
        self.target_norm = target_norm
        self.encoder: Encoder = encoder
        self.projector = Mlp(encoder.dim, head)
        self.predictor = Mlp(head.out, head)
        # The authors' code starts ξ as a draw of its own; starting at θ is what most
        # re-implementations do, and τ makes either forgotten within a few hundred steps.
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch of views.

        Each view goes through alone, so that batch norm sees one distribution at a time (as in the
        authors' code: concatenated views would share their statistics).

        Args:
            views: two or more float [B, 3, H, W] of the same images; the paper's are one drawn from
                T and one from T'.

        Returns:
            The loss, float32 scalar: the sum over both directions for two views; for V views, each
            predicted against the mean of the others' target projections (FastSiam), their mean
            times 2. And the detached online projections of the first, [B, out].
        """
        if not self.symmetrised:
            first, second = views
            z = self.projector(self.encoder(first))
            return byol_loss(self.predictor(z), self._target(second)), z.detach()
        targets = [self._target(view) for view in views]
        online = [self.projector(self.encoder(view)) for view in views]
        losses = [
            byol_loss(self.predictor(z), _mean_of_others(targets, i)) for i, z in enumerate(online)
        ]
        return torch.stack(losses).sum() * (2 / len(views)), online[0].detach()

    @torch.no_grad()  # sg(z'): the target is a constant for the gradient (equation 2)
    def _target(self, view: Tensor) -> Tensor:
        projection: Tensor = self.target_projector(self.target_encoder(view))
        return projection

    def train(self, mode: bool = True) -> Self:
        """As of every module; but an averaged target normalises as in evaluation, always."""
        super().train(mode)
        if self.target_norm == "average":
            self.target_encoder.eval()
            self.target_projector.eval()
        return self

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        """ξ ← τξ + (1-τ)θ, once after each optimiser step (equation 1 and algorithm 1).

        Of batch norms the paper averages the parameters only: the target's keep running statistics
        of their own passes, which follow ξ already. Under EMAN the statistics are averaged too.
        """
        online, target = self._pairs()
        torch._foreach_lerp_(target, online, 1.0 - tau)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """What is averaged, and into what."""
        sides = (
            (self.encoder, self.projector),
            (self.target_encoder, self.target_projector),
        )
        online, target = (list[Tensor](p for m in side for p in m.parameters()) for side in sides)
        if self.target_norm == "average":
            statistics = ([b for m in side for b in m.buffers()] for side in sides)
            for found, buffers in zip((online, target), statistics, strict=True):
                found.extend(b for b in buffers if b.is_floating_point())  # not the counts
        return online, target

    def trained_parameters(self) -> list[nn.Parameter]:
        """θ with the predictor's: all that an optimiser may touch."""
        return [p for p in self.parameters() if p.requires_grad]


def _mean_of_others(targets: list[Tensor], position: int) -> Tensor:
    others = [target for i, target in enumerate(targets) if i != position]
    return others[0] if len(others) == 1 else torch.stack(others).mean(0)


def byol_loss(prediction: Tensor, projection: Tensor) -> Tensor:
    """Mean squared error of l2-normalised vectors: 2 - 2·cos(q(z), z') (equation 2).

    Args:
        prediction: float [B, D], q(z) of the online network.
        projection: float [B, D], z' of the target network, of the same images' other views.

    Returns:
        float32 scalar, the mean over the batch, within 0..4.
    """
    # float32 whatever autocast chose: bf16 cannot tell 0.99 from 0.993.
    return 2.0 - 2.0 * F.cosine_similarity(prediction.float(), projection.float(), dim=1).mean()


def spread(embeddings: Tensor) -> Tensor:
    """How much of the sphere embeddings use: 0 collapsed to a point, 1 spread evenly.

    The standard deviation over the batch of each dimension of the l2-normalised vectors, averaged,
    times √D (as SimSiam measures collapse: Chen and He 2020, arXiv 2011.10566, section 4.1).

    Args:
        embeddings: float [B, D], B at least 2.

    Returns:
        float32 scalar.
    """
    normalised = F.normalize(embeddings.float(), dim=1)
    return normalised.std(dim=0).mean() * math.sqrt(normalised.shape[1])


def effective_rank(embeddings: Tensor) -> Tensor:
    """How many directions embeddings use: 1 collapsed to a line, min(B, D) all of them.

    The exponential of the entropy of the singular values' shares (RankMe: Garrido et al. 2023,
    arXiv 2210.02885, equation 1), of the l2-normalised vectors.

    Args:
        embeddings: float [B, D].

    Returns:
        float32 scalar, on the CPU.
    """
    # From the smaller product of the rows with themselves, on the CPU: GPUs are slow at this.
    rows = F.normalize(embeddings.float(), dim=1).cpu().double()
    product = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    singular = torch.linalg.eigvalsh(product).clamp(min=0.0).sqrt().float()
    share = singular / singular.sum() + 1e-7
    return torch.exp(-(share * share.log()).sum())
