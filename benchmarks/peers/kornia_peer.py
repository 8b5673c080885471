"""kornia's augmentation of a batch, for benchmarks/augmentation.py: the paper's two views."""

import json
import sys
import time
from typing import Any

import kornia.augmentation as K
import torch
from torch import nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def view(size: int, blur_p: float, solarise_p: float) -> nn.Module:
    """One of the paper's distributions; kornia draws the order of the jitter once a batch."""
    kernel = int(0.1 * size) // 2 * 2 + 1
    return nn.Sequential(
        K.RandomResizedCrop((size, size), scale=(0.08, 1.0)),
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=blur_p),
        K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=solarise_p),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )


def main() -> None:
    """The first line builds, each further one measures one batch."""
    setup = json.loads(sys.stdin.readline())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (setup["count"], 3, setup["stored"], setup["stored"])
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    first, second = view(setup["size"], 1.0, 0.0), view(setup["size"], 0.1, 0.2)
    answer({"threads": torch.get_num_threads()})
    for _ in sys.stdin:
        started = time.perf_counter()
        floats = images.float() / 255
        one, other = first(floats), second(floats)
        float(one[0, 0, 0, 0] + other[0, 0, 0, 0])  # waits for the device
        answer({"pairs_per_s": len(images) / (time.perf_counter() - started)})


def answer(result: dict[str, Any]) -> None:
    """One JSON object, one line."""
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
