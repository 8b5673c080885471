"""Views a second: ours, batched; torchvision v2 image by image; and kornia, batched.

The paper's pair of distributions, at 32 pixels and, from stored images of 256 pixels, at 224, on
random images: what a pixel is does not change what it costs. `crop only` is our own crop and resize
without the rest. kornia draws one order of the jitter for a whole batch, and does not antialias.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from byol_training.augment import two_views
from byol_training.config import AugmentConfig, ViewConfig
from harness import Peer, Rate, interleaved, options, report

MEAN, STD = AugmentConfig().mean, AugmentConfig().std


def main() -> None:
    """Measures both sizes and prints."""
    chosen = options(__doc__ or "")
    results: dict[str, Rate] = {}
    ratios: dict[str, float] = {}
    for stored, size, count in ((32, 32, 256), (256, 224, 16 if chosen.quick else 64)):
        rates = measure_size(stored, size, count, peers=chosen.peers, quick=chosen.quick)
        results |= {f"{name}, {size} px": rate for name, rate in rates.items()}
        for name in rates.keys() - {"ours"}:
            ratios[f"ours_vs_{name.replace(' ', '_')}_{size}"] = (
                rates["ours"].median / rates[name].median
            )
    facts = {"distributions": "the paper's, with blur", "threads": torch.get_num_threads()}
    packages = ["torch", "torchvision"]
    report("augmentation", chosen, results, ratios, packages=packages, facts=facts)


def measure_size(
    stored: int, size: int, count: int, *, peers: bool, quick: bool
) -> dict[str, Rate]:
    """Pairs of views a second, by name."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, stored, stored, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels)
    candidates = {
        "ours": ours(images, AugmentConfig(), size),
        "crop only": ours(images, AugmentConfig(first=BARE, second=BARE), size),
        "torchvision": torchvision_v2(images, size),
    }
    repeats = 3 if quick else 7
    if not peers:
        return interleaved(candidates, unit="pairs/s", repeats=repeats)
    with Peer("kornia_peer.py", stored=stored, size=size, count=count) as kornia:
        candidates["kornia"] = lambda: float(kornia.ask()["pairs_per_s"])
        return interleaved(candidates, unit="pairs/s", repeats=repeats)


BARE = ViewConfig(jitter_p=0.0, grey_p=0.0, blur_p=0.0)


def ours(images: Tensor, config: AugmentConfig, size: int) -> Callable[[], float]:
    """`two_views` on the device that training would take."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, generator = images.to(device), torch.Generator().manual_seed(0)

    def measure() -> float:
        started = time.perf_counter()
        first, second = two_views(images, config, size, generator)
        float(first[0, 0, 0, 0] + second[0, 0, 0, 0])  # waits for the device
        return len(images) / (time.perf_counter() - started)

    return measure


def one_view(view: ViewConfig, size: int) -> v2.Compose:
    """Torchvision's transforms in the order and with the probabilities of `view`."""
    jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    blur = v2.GaussianBlur(int(view.blur_kernel * size) // 2 * 2 + 1, view.blur_sigma)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, view.crop_scale, view.crop_ratio, antialias=True),
            v2.RandomHorizontalFlip(view.flip),
            v2.RandomApply([jitter], view.jitter_p),
            v2.RandomGrayscale(view.grey_p),
            v2.RandomApply([blur], view.blur_p),
            v2.RandomSolarize(128, view.solarise_p),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def torchvision_v2(images: Tensor, size: int) -> Callable[[], float]:
    """What torchvision's documentation shows, one picture at a time as a data loader does."""
    config = AugmentConfig()
    first, second = (one_view(view, size) for view in (config.first, config.second))
    planes = images.permute(0, 3, 1, 2).contiguous()

    def measure() -> float:
        started = time.perf_counter()
        for image in planes:
            first(image), second(image)
        return len(planes) / (time.perf_counter() - started)

    return measure


if __name__ == "__main__":
    main()
