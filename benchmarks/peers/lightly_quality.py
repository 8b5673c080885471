"""lightly's BYOL with its published CIFAR-10 settings, for benchmarks/proof_cifar.py.

From its CIFAR-10 benchmark (docs/source/getting_started/benchmarks/cifar10_benchmark.py in its
repository; 200 epochs of ResNet-18 give a kNN of 87%): heads of 1024 and 256, momentum .99, SGD at
.06 per 128 images with momentum .9 and weight decay 5e-4, a cosine to 0, no blur. Views are its
BYOLTransform. The encoder is ours with ours' initial weights: what differs is all the rest.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.utils import update_momentum
from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from lightly_peer import Byol, answer
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / each) for each in ("training", "serving")]

from byol_training.encoders import build_encoder  # noqa: E402 - found by the line above

MOMENTUM = 0.99


class Trainer:
    """Steps of lightly's recipe on pictures in memory."""

    def __init__(
        self, pixels: str, encoder: str, stem: str, batch: int, steps: int, device: str, seed: int
    ) -> None:
        self.pictures = [Image.fromarray(each) for each in np.load(pixels)]
        self.batch, self.device = batch, device
        torch.manual_seed(seed)
        backbone = build_encoder(encoder, stem)
        self.model = Byol(backbone, backbone.dim, 1024, 256).train().to(device)
        size = self.pictures[0].width
        self.transform = BYOLTransform(
            view_1_transform=BYOLView1Transform(input_size=size, gaussian_blur=0.0),
            view_2_transform=BYOLView2Transform(input_size=size, gaussian_blur=0.0),
        )
        self.criterion = NegativeCosineSimilarity()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            trained, lr=0.06 * batch / 128, momentum=0.9, weight_decay=5e-4
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.order: list[int] = []

    def step(self) -> float:
        """One optimiser step; returns its loss, -1 at best."""
        model = self.model
        first, second = self._views()
        update_momentum(model.backbone, model.backbone_momentum, m=MOMENTUM)
        update_momentum(model.projection_head, model.projection_head_momentum, m=MOMENTUM)
        p0, z0 = model(first), model.forward_momentum(first)
        p1, z1 = model(second), model.forward_momentum(second)
        loss = 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return float(loss.detach())

    def _views(self) -> tuple[Tensor, Tensor]:
        """Of the next batch; the last, incomplete one of an epoch is dropped."""
        if len(self.order) < self.batch:
            self.order = torch.randperm(len(self.pictures)).tolist()
        chosen, self.order = self.order[: self.batch], self.order[self.batch :]
        views = [self.transform(self.pictures[row]) for row in chosen]
        first, second = (torch.stack([view[i] for view in views]).to(self.device) for i in (0, 1))
        return first, second


def main() -> None:
    """The first line builds; each further one takes steps and saves the encoder's weights."""
    trainer = Trainer(**json.loads(sys.stdin.readline()))
    answer({"threads": torch.get_num_threads()})
    for line in sys.stdin:
        asked = json.loads(line)
        losses = [trainer.step() for _ in range(asked["steps"])]
        torch.save(trainer.model.backbone.state_dict(), asked["save"])
        answer({"loss": sum(losses) / len(losses)})


if __name__ == "__main__":
    main()
