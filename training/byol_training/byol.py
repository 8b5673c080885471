"""BYOL: the algorithm and nothing else (Grill et al. 2020, arXiv 2006.07733, section 3.1).

    view v  ─ f_θ ─ y ─ g_θ ─ z ─ q_θ ─ q(z)   online: trained by gradient descent
                                         │ loss = 2 - 2·cos, pulled together
    view v' ─ f_ξ ─ y' ─ g_ξ ─ z' ───────┘     target: no gradient; ξ ← τξ + (1-τ)θ

There are no negative samples: what keeps all embeddings from becoming one is that only the online
side is trained, that it has one network more (the predictor), and that the target follows slowly.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_training.config import HeadConfig
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
        symmetrised: sum the loss over both assignments of the views.
    """

    def __init__(self, encoder: Encoder, head: HeadConfig, *, symmetrised: bool = True) -> None:
        super().__init__()
        self.symmetrised = symmetrised
        self.encoder: Encoder = encoder
        self.projector = Mlp(encoder.dim, head)
        self.predictor = Mlp(head.out, head)
        # The authors' code starts ξ as a draw of its own; starting at θ is what most
        # re-implementations do, and τ makes either forgotten within a few hundred steps.
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch of view pairs.

        Each view goes through alone, so that batch norm sees one distribution at a time (as in the
        authors' code: concatenated views would share their statistics).

        Args:
            first: float [B, 3, H, W], views drawn from T.
            second: float [B, 3, H, W], views of the same images drawn from T'.

        Returns:
            The loss, float32 scalar, and the detached online projections of `first`, [B, out].
        """
        z1 = self.projector(self.encoder(first))
        with torch.no_grad():  # sg(z'): the target is a constant for the gradient (equation 2)
            t2 = self.target_projector(self.target_encoder(second))
        loss = byol_loss(self.predictor(z1), t2)
        if self.symmetrised:
            z2 = self.projector(self.encoder(second))
            with torch.no_grad():
                t1 = self.target_projector(self.target_encoder(first))
            loss = loss + byol_loss(self.predictor(z2), t1)
        return loss, z1.detach()

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        """ξ ← τξ + (1-τ)θ, once after each optimiser step (equation 1 and algorithm 1).

        Parameters only. The target's batch norms keep running statistics of their own, from the
        target's own forward passes in train mode, as in the paper: they already follow ξ, and
        averaging in the online network's (EMAN, arXiv 2101.08482) is another method.
        """
        online: list[Tensor] = [*self.encoder.parameters(), *self.projector.parameters()]
        target: list[Tensor] = [
            *self.target_encoder.parameters(),
            *self.target_projector.parameters(),
        ]
        torch._foreach_lerp_(target, online, 1.0 - tau)

    def trained_parameters(self) -> list[nn.Parameter]:
        """θ with the predictor's: all that an optimiser may touch."""
        return [p for p in self.parameters() if p.requires_grad]


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
