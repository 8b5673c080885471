"""lightly's BYOL recipe as its documentation says to use it, for benchmarks/train_throughput.py.

https://docs.lightly.ai/self-supervised-learning/examples/byol.html: BYOLTransform on PIL images in
the data loader, BYOLProjectionHead, BYOLPredictionHead, NegativeCosineSimilarity, update_momentum.
On a GPU the loader has a process for each processor; on a processor it shares the step's threads,
for which further processes would compete.
"""

import copy
import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Byol(nn.Module):
    """The model of lightly's example."""

    def __init__(self, backbone: nn.Module, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = BYOLProjectionHead(dim, hidden, out)
        self.prediction_head = BYOLPredictionHead(out, hidden, out)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, images: Tensor) -> Tensor:
        """The online network."""
        prediction: Tensor = self.prediction_head(
            self.projection_head(self.backbone(images).flatten(1))
        )
        return prediction

    def forward_momentum(self, images: Tensor) -> Tensor:
        """The target network."""
        projection: Tensor = self.projection_head_momentum(
            self.backbone_momentum(images).flatten(1)
        )
        return projection.detach()


def resnet18_small() -> nn.Module:
    """ResNet-18 with a 3x3 stem and no max-pool, as CIFAR recipes have it."""
    import torchvision

    net = torchvision.models.resnet18()
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.maxpool = nn.Identity()
    return nn.Sequential(*list(net.children())[:-1])


class Pictures(Dataset[list[Tensor]]):
    """The same pictures over and over: both views of each, as lightly's data sets give them."""

    def __init__(self, pictures: list[Image.Image], transform: BYOLTransform) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        """More than will be asked for."""
        return 10**9

    def __getitem__(self, index: int) -> list[Tensor]:
        """The two views of a picture."""
        views: list[Tensor] = self.transform(self.pictures[index % len(self.pictures)])
        return views


def main() -> None:
    """The first line builds, each further one measures some steps."""
    setup = json.loads(sys.stdin.readline())
    pixels = np.load(setup["pixels"])
    pictures = [Image.fromarray(each) for each in pixels]
    size = pixels.shape[1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Byol(resnet18_small(), 512, setup["hidden"], setup["out"]).train().to(device)
    transform = BYOLTransform(
        view_1_transform=BYOLView1Transform(input_size=size, gaussian_blur=0.0),
        view_2_transform=BYOLView2Transform(input_size=size, gaussian_blur=0.0),
    )
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    workers = (os.cpu_count() or 1) if device.type == "cuda" else 0
    loader = DataLoader(Pictures(pictures, transform), len(pictures), num_workers=workers)
    batches = iter(loader)
    answer({"threads": torch.get_num_threads(), "workers": workers})
    for line in sys.stdin:
        steps = json.loads(line)["steps"]
        started = time.perf_counter()
        for _ in range(steps):
            first, second = (view.to(device) for view in next(batches))
            update_momentum(model.backbone, model.backbone_momentum, m=0.99)
            update_momentum(model.projection_head, model.projection_head_momentum, m=0.99)
            p0, z0 = model(first), model.forward_momentum(first)
            p1, z1 = model(second), model.forward_momentum(second)
            loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - started
        answer({"images_per_s": steps * len(pictures) / seconds})


def answer(result: dict[str, Any]) -> None:
    """One JSON object, one line."""
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
