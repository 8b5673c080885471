"""Backbones: shapes of embeddings and feature maps, names that are refused."""

import pytest
import torch
from torch import nn

from byol_serving.errors import InvalidConfig
from byol_training.encoders import build_encoder, zero_last_norms


@pytest.mark.parametrize(
    ("name", "stem", "dim", "last"),
    [
        ("small", "small", 128, 4),
        ("resnet18", "small", 512, 4),
        ("resnet50", "imagenet", 2048, 1),
        ("convnext_tiny", "imagenet", 768, 1),
    ],
)
def test_encoders(name: str, stem: str, dim: int, last: int) -> None:
    encoder = build_encoder(name, stem).eval()
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        features, maps = encoder(images), encoder.feature_maps(images)
    assert encoder.dim == dim
    assert features.shape == (2, dim)
    final = list(maps.values())[-1]
    assert final.shape == (2, dim, last, last)
    torch.testing.assert_close(final.mean((2, 3)), features)


@pytest.mark.parametrize(
    ("name", "dim", "first", "last"),
    [
        ("resnet10t", 512, (64, 16, 16), (512, 1, 1)),
        ("vit_tiny_patch16_224", 192, (192, 2, 2), (192, 2, 2)),
        ("mobilenetv3_small_050", 1024, (16, 16, 16), (288, 1, 1)),
    ],
)
def test_timm(name: str, dim: int, first: tuple[int, ...], last: tuple[int, ...]) -> None:
    pytest.importorskip("timm", reason="an extra of its own")
    encoder = build_encoder(f"timm:{name}", image_size=32).eval()
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        features, maps = encoder(images), list(encoder.feature_maps(images).values())
    assert encoder.dim == dim
    assert features.shape == (2, dim)
    assert maps[0].shape == (2, *first)
    assert maps[-1].shape == (2, *last)


def test_unknown_encoder() -> None:
    with pytest.raises(InvalidConfig, match="'vgg'"):
        build_encoder("vgg")
    with pytest.raises(InvalidConfig, match="'wide'"):
        build_encoder("small", "wide")
    pytest.importorskip("timm", reason="an extra of its own")
    with pytest.raises(InvalidConfig, match="no network 'vit_tinny'"):
        build_encoder("timm:vit_tinny")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zeroed_blocks_start_as_identity(name: str) -> None:
    encoder = build_encoder(name).eval()
    block = encoder.stages["layer1"][1]  # type: ignore[index]  # a Sequential of blocks
    images = torch.rand(1, 256 if name == "resnet50" else 64, 8, 8)
    assert isinstance(block, nn.Module)
    with torch.no_grad():
        assert not torch.equal(block(images), images)
        zero_last_norms(encoder)
        assert torch.equal(block(images), images)
    with pytest.raises(InvalidConfig, match="needs a ResNet"):
        zero_last_norms(build_encoder("small"))
