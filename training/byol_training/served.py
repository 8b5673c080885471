"""The function that a bundle computes, in PyTorch: what is exported, and what is evaluated."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from byol_serving.images import Pixels
from byol_training.whitening import Whitening


class ServedEncoder(nn.Module):
    """uint8 [N, S, S, 3] -> L2-normalised float32 [N, D]; scaling, mean and std are inside."""

    def __init__(
        self,
        encoder: nn.Module,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        whitening: Whitening | None = None,
    ) -> None:
        super().__init__()
        self.whiten: nn.Module = nn.Identity() if whitening is None else _layer(whitening)
        self.encoder = encoder
        self.register_buffer("scale", 1 / (255 * torch.tensor(std).reshape(3, 1, 1)))
        self.register_buffer("shift", torch.tensor(mean).div(torch.tensor(std)).reshape(3, 1, 1))
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Pixels to embeddings, whitened and normalised in float32."""
        return _normalised(self.raw(images))

    def raw(self, images: Tensor) -> Tensor:
        """Pixels to embeddings float32 [N, D] as they are before normalisation, but whitened."""
        rows: Tensor = self.whiten(self.encode(images))
        return rows

    def planes(self, images: Tensor) -> Tensor:
        """uint8 [N, S, S, 3] -> the encoder's input, normalised float [N, 3, S, S]."""
        planes = images.permute(0, 3, 1, 2).to(torch.float32) * self.scale - self.shift
        return planes.to(next((p.dtype for p in self.encoder.parameters()), torch.float32))

    def encode(self, images: Tensor) -> Tensor:
        """Pixels to what the encoder gives, float32 [N, D], neither whitened nor normalised."""
        rows: Tensor = self.encoder(self.planes(images))
        return rows.to(torch.float32)

    def embed(
        self, pixels: Pixels, *, batch_size: int = 512, normalised: bool = True
    ) -> NDArray[np.float32]:
        """Embeds uint8 [N, S, S, 3] in eval mode, in batches, on the encoder's device.

        Args:
            pixels: the images.
            batch_size: how many at a time.
            normalised: off: what the encoder gives, see `encode`.
        """
        was_training = self.training
        self.eval()
        rows: list[NDArray[np.float32]] = []
        with torch.inference_mode():
            for start in range(0, len(pixels), batch_size):
                batch = torch.from_numpy(pixels[start : start + batch_size]).to(self.scale.device)
                found = self(batch) if normalised else self.encode(batch)
                rows.append(found.float().cpu().numpy())
        self.train(was_training)
        return np.concatenate(rows)


class ServedOutputs(nn.Module):
    """A served encoder with all outputs of its graph."""

    def __init__(self, served: ServedEncoder, stages: Sequence[str]) -> None:
        super().__init__()
        self.served = served
        self.stages = tuple(stages)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 [N, S, S, 3] -> embedding, raw embedding [N, D], then [N, C, H, W] of each stage.

        All are float32. With stages the encoder runs twice here and once in the exported graph,
        which shares what is equal.
        """
        raw = self.served.raw(images)
        embeddings = (_normalised(raw), raw)
        if not self.stages:
            return embeddings
        # An `Encoder` wherever stages are named; nn.Module does not know.
        maps = self.served.encoder.feature_maps(self.served.planes(images))  # type: ignore[operator]
        return (*embeddings, *(maps[name].to(torch.float32) for name in self.stages))


def _normalised(rows: Tensor) -> Tensor:
    """As torch's `normalize`, whose graph expands the norms to a shape that the CPU works out."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norms.clamp_min(1e-12)


def _layer(whitening: Whitening) -> nn.Linear:
    """(rows - mean) @ matrix as one layer."""
    matrix = torch.from_numpy(whitening.matrix)
    layer = nn.Linear(*matrix.shape)
    layer.weight = nn.Parameter(matrix.T.contiguous(), requires_grad=False)
    layer.bias = nn.Parameter(-torch.from_numpy(whitening.mean) @ matrix, requires_grad=False)
    return layer
