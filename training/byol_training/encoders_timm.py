"""Backbones of timm, by name: convolutional ones and transformers."""

import warnings
from typing import Any

from torch import Tensor, nn

from byol_serving.errors import InvalidConfig


class TimmTrunk(nn.Module):
    """A timm network without its classifier, and its feature maps.

    Args:
        net: with `num_classes` 0: float [N, 3, H, W] → [N, dim], pooled as its authors do.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Normalised float [N, 3, H, W] → float [N, dim]."""
        pooled: Tensor = self.net(images)
        return pooled

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Name → float [N, C, H', W']: of each block for transformers, of each stage for others."""
        names = [info["module"].replace(".", "_") for info in self.net.feature_info]
        maps = self.net.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
        return dict(zip(names, maps, strict=True))


def build_trunk(name: str, *, image_size: int, pretrained: bool = False) -> tuple[TimmTrunk, int]:
    """The network that timm calls `name`, and the width of its embeddings.

    Args:
        name: as `timm.list_models` has it.
        image_size: side of the images it will see.
        pretrained: with the weights that timm downloads for it.

    Raises:
        InvalidConfig: timm is not installed, or knows no such network, or has no weights for it.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise InvalidConfig(
            f"encoder timm:{name} needs timm; run: pip install 'byol-server[timm]'"
        ) from error
    if name.split(".")[0] not in timm.list_models():
        close = timm.list_models(f"*{name[:5]}*")[:5]
        raise InvalidConfig(f"timm has no network {name!r}; names like it: {', '.join(close)}")
    options: dict[str, Any] = {"num_classes": 0, "pretrained": pretrained}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own renamed networks
            try:
                net = timm.create_model(name, img_size=image_size, **options)
            except TypeError:  # networks without positions take no size
                net = timm.create_model(name, **options)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidConfig(f"timm cannot make {name} with its weights ({reason})") from error
    # `num_features` is the width of the last map, which some networks widen before pooling.
    width: Any = getattr(net, "head_hidden_size", None) or net.num_features
    return TimmTrunk(net), int(width)
