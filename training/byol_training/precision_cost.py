"""What fp16 or int8 costs in accuracy: the figures that an export writes in its bundle."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from byol_serving.bundle import cosine_distance
from byol_serving.errors import InvalidSource
from byol_serving.images import Pixels, Preprocess, to_input
from byol_training.data import list_images, load_images
from byol_training.neighbours import knn_accuracy
from byol_training.quantize import split
from byol_training.served import ServedEncoder

MEASURED_IMAGES = 2000
"""More would measure kNN finer, and take minutes on a CPU."""


@dataclass(frozen=True)
class Labelled:
    """Images with labels; every sixth is a query, the others are the bank."""

    pixels: Pixels
    """uint8 [N, S, S, 3], as the encoder takes them."""
    labels: NDArray[np.int64]
    """[N]."""


def precision_cost(
    encode: Callable[[Pixels], NDArray[np.float32]],
    served: ServedEncoder,
    samples: Pixels,
    wanted: NDArray[np.float32],
    labelled: Labelled | None,
) -> dict[str, float]:
    """Cosine to fp32 on real images that did not calibrate, and with labels the change in kNN.

    Args:
        encode: the encoder of lower precision, uint8 [N, S, S, 3] to float32 [N, D].
        served: the same at float32.
        samples: uint8 [N, S, S, 3]; half of them may have been used to calibrate (see `split`).
        wanted: float32 [N, D], what `served` gives for them.
        labelled: to measure kNN accuracy on, if there is any.
    """
    _, held_out = split(len(samples))
    cosine = 1 - cosine_distance(encode(samples[held_out]), wanted[held_out])
    cost = {
        "cosine_to_fp32_mean": float(cosine.mean()),
        "cosine_to_fp32_min": float(cosine.min()),
    }
    if labelled is not None:
        accurate = _knn(served.embed(labelled.pixels), labelled.labels)
        cost["knn_accuracy_fp32"] = accurate
        cost["knn_change"] = _knn(encode(labelled.pixels), labelled.labels) - accurate
    return cost


def load_labelled(source: Path, preprocess: Preprocess) -> Labelled:
    """Up to `MEASURED_IMAGES` images of a folder or tar, their class sub-folders as labels.

    Raises:
        InvalidSource: nothing readable there, or no labels.
    """
    names = list_images(source)
    chosen = np.linspace(0, len(names) - 1, min(MEASURED_IMAGES, len(names))).astype(int)
    side = math.ceil(preprocess.size / preprocess.crop_fraction)
    images = load_images(source, side, only=[names[row] for row in chosen])
    if images.labels is None or len(images) < 2:
        raise InvalidSource(f"{source} has no class sub-folders; labels are needed to measure kNN")
    return Labelled(np.stack([to_input(each, preprocess) for each in images.pixels]), images.labels)


def _knn(rows: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    held = np.arange(len(rows)) % 6 == 0
    return knn_accuracy(rows[~held], labels[~held], rows[held], labels[held])
