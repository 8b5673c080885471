"""Backbones: images in, one vector per image out.

All are `Encoder`: named stages one after another, then the average over the plane. The stages'
names are the names of the dense feature maps an export may offer.
"""

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from byol_serving.errors import InvalidConfig
from byol_training.config import ENCODERS
from byol_training.encoders_timm import TimmTrunk, build_trunk


class Encoder(nn.Module):
    """Stages in a row and a global average.

    Args:
        stages: name → module [N, C, H, W] → [N, C', H', W'], in order.
        dim: channels of the last one.
    """

    def __init__(self, stages: dict[str, nn.Module], dim: int) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.dim = dim

    def forward(self, images: Tensor) -> Tensor:
        """Normalised float [N, 3, H, W] → float [N, dim], not l2-normalised."""
        for stage in self.stages.values():
            images = stage(images)
        return images.mean((2, 3))

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """What every stage gives for float [N, 3, H, W]: name → float [N, C, H', W']."""
        maps = {}
        for name, stage in self.stages.items():
            images = maps[name] = stage(images)
        return maps


class TimmEncoder(Encoder):
    """A timm network as one stage, pooled and mapped its own way."""

    def __init__(self, trunk: TimmTrunk, dim: int) -> None:
        super().__init__({"trunk": trunk}, dim)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised float [N, 3, H, W] → float [N, dim], not l2-normalised."""
        pooled: Tensor = self.stages["trunk"](images)
        return pooled

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Of each block for transformers, of each stage for others."""
        trunk = self.stages["trunk"]
        assert isinstance(trunk, TimmTrunk)
        return trunk.maps(images)


def build_encoder(name: str, stem: str = "imagenet", *, image_size: int = 224) -> Encoder:
    """A backbone with fresh weights.

    Args:
        name: one of `config.ENCODERS`, or timm:NAME for any of timm's.
        stem: of the ResNets: imagenet (7x7 stride 2, max-pool) or small (3x3 stride 1, no pool; as
            the CIFAR experiments of He et al. 2015 and of SimCLR, appendix B.9). Others have one.
        image_size: side of the images it will see: transformers have a position for each patch.

    Raises:
        InvalidConfig: an unknown name or stem.
    """
    if stem not in ("imagenet", "small"):
        raise InvalidConfig(f"stem {stem!r} is unknown; choose one of imagenet, small")
    match name:
        case "small":
            return _small()
        case "resnet18":
            return _resnet(torchvision.models.resnet18(), 512, stem)
        case "resnet34":
            return _resnet(torchvision.models.resnet34(), 512, stem)
        case "resnet50":
            return _resnet(torchvision.models.resnet50(), 2048, stem)
        case "resnet101":
            return _resnet(torchvision.models.resnet101(), 2048, stem)
        case "convnext_tiny":
            return _convnext(torchvision.models.convnext_tiny(), 768)
        case "convnext_small":
            return _convnext(torchvision.models.convnext_small(), 768)
        case "convnext_base":
            return _convnext(torchvision.models.convnext_base(), 1024)
        case _ if name.startswith("timm:"):
            return TimmEncoder(*build_trunk(name.removeprefix("timm:"), image_size=image_size))
        case _:
            raise InvalidConfig(
                f"encoder {name!r} is unknown; choose one of {', '.join(ENCODERS)} or timm:NAME"
            )


def zero_last_norms(encoder: Encoder) -> None:
    """Zeroes the scale of each residual block's last batch norm, so that it starts as identity.

    Raises:
        InvalidConfig: the encoder has no such blocks.
    """
    found = 0
    for module in encoder.modules():
        match module:
            case Bottleneck():
                nn.init.zeros_(module.bn3.weight)
            case BasicBlock():
                nn.init.zeros_(module.bn2.weight)
            case _:
                continue
        found += 1
    if not found:
        raise InvalidConfig("zero_init needs a ResNet; choose one or leave it out")


def _resnet(net: nn.Module, dim: int, stem: str) -> Encoder:
    """A torchvision ResNet taken apart into stages, its classifier left behind."""
    parts = dict(net.named_children())
    if stem == "small":
        conv = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        first = nn.Sequential(conv, parts["bn1"], parts["relu"])
    else:
        first = nn.Sequential(parts["conv1"], parts["bn1"], parts["relu"], parts["maxpool"])
    layers = {f"layer{i}": parts[f"layer{i}"] for i in (1, 2, 3, 4)}
    return Encoder({"stem": first, **layers}, dim)


def _convnext(net: nn.Module, dim: int) -> Encoder:
    """A torchvision ConvNeXt (Liu et al. 2022, arXiv 2201.03545), its classifier left behind.

    `features` holds the stem, then stages of blocks with a downsampling layer before each but one.
    """
    parts = list(net.features.children())  # type: ignore[union-attr]  # a module
    pairs = {f"stage{i}": parts[2 * i - 2 : 2 * i] for i in (1, 2, 3, 4)}
    return Encoder({name: nn.Sequential(*pair) for name, pair in pairs.items()}, dim)


def _small() -> Encoder:
    """Six convolutions, 290,000 parameters; 32 pixels become 4."""
    plan = [(3, 32, 1), (32, 48, 2), (48, 64, 1), (64, 96, 2), (96, 96, 1), (96, 128, 2)]
    blocks = {f"conv{i}": _block(*sizes) for i, sizes in enumerate(plan, start=1)}
    return Encoder(blocks, dim=plan[-1][1])


def _block(inputs: int, outputs: int, stride: int) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    torch.nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
