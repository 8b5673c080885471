"""What an export gives beside unit vectors: the facts of feature maps, and how exact all is."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from byol_serving.bundle import GOLDEN_TOLERANCE, RAW_EMBEDDING, FeatureMap, cosine_distance
from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidBundle, InvalidConfig
from byol_serving.images import Pixels
from byol_training.served import ServedEncoder


def feature_facts(
    served: ServedEncoder, example: Pixels, stages: Sequence[str]
) -> tuple[FeatureMap, ...]:
    """Channels, side and stride of stages' maps, as the encoder gives them for an image.

    Raises:
        InvalidConfig: a stage that the encoder does not have, or one named twice.
    """
    if not stages:
        return ()
    maps = _maps(served, example)
    for name in stages:
        if name not in maps or stages.count(name) > 1:
            raise InvalidConfig(
                f"features {','.join(stages)}: {name!r} is not one of this encoder's stages"
                f" ({', '.join(maps)}), or is named twice"
            )
    size = example.shape[1]
    return tuple(
        FeatureMap(
            name=name,
            channels=maps[name].shape[1],
            side=maps[name].shape[2],
            stride=_stride(size, maps[name].shape[2]),
        )
        for name in stages
    )


def features_parity(encoder: Encoder, served: ServedEncoder, samples: Pixels) -> dict[str, float]:
    """The worst cosine distance between ONNX Runtime's and PyTorch's map of one image.

    Raises:
        InvalidBundle: past the `GOLDEN_TOLERANCE` of the bundle's precision.
    """
    info = encoder.bundle.info
    names = [each.name for each in info.features]
    wanted, got = _maps(served, samples), encoder.extract(samples, names)
    worst = 0.0
    for name, values in zip(names, got, strict=True):
        flat = wanted[name].float().numpy().reshape(len(samples), -1)
        distance = float(cosine_distance(values.reshape(len(samples), -1), flat).max())
        limit = GOLDEN_TOLERANCE[info.precision]
        if not distance <= limit:
            raise InvalidBundle(
                f"ONNX Runtime's map {name} differs from PyTorch's by a cosine distance of"
                f" {distance:.2e}, over {limit:.0e}; leave it out, or export as fp32"
            )
        worst = max(worst, distance)
    return {"features_max_cosine_distance": worst}


def raw_parity(encoder: Encoder, served: ServedEncoder, samples: Pixels) -> dict[str, float]:
    """The worst error of ONNX Runtime's un-normalised embedding of one image, of its length.

    Raises:
        InvalidBundle: past the error of a unit vector whose cosine distance is the
            `GOLDEN_TOLERANCE` of the bundle's precision.
    """
    with torch.inference_mode():
        wanted = served.raw(torch.from_numpy(np.ascontiguousarray(samples))).numpy()
    (got,) = encoder.extract(samples, [RAW_EMBEDDING])
    lengths = np.maximum(np.linalg.norm(wanted, axis=1), 1e-12)
    worst = float((np.linalg.norm(got - wanted, axis=1) / lengths).max())
    # |a - b|^2 = 2 (1 - cos) between unit vectors.
    limit = math.sqrt(2 * GOLDEN_TOLERANCE[encoder.bundle.info.precision])
    if not worst <= limit:
        raise InvalidBundle(
            f"ONNX Runtime's un-normalised embeddings differ from PyTorch's by {worst:.2e} of their"
            f" length, over {limit:.0e}; export as fp32"
        )
    return {"raw_max_relative_error": worst}


def _maps(served: ServedEncoder, pixels: Pixels) -> dict[str, Tensor]:
    with torch.inference_mode():
        planes = served.planes(torch.from_numpy(np.ascontiguousarray(pixels)))
        maps: dict[str, Tensor] = served.encoder.feature_maps(planes)  # type: ignore[operator]  # see served
    return maps


def _stride(size: int, side: int) -> int:
    """Input pixels between neighbours: 32 where 100 pixels become 4 columns by five halvings.

    A power of two if that many halvings give `side`, else what divides (transformers' patches).
    """
    stride = 2 ** math.ceil(math.log2(size / side))
    return stride if math.ceil(size / stride) == side else size // side
