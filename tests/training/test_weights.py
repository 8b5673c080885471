"""An encoder starts from an earlier run or bundle, from torchvision's files and from timm's."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from byol_serving.bundle import GOLDEN_TOLERANCE, cosine_distance
from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidBundle, InvalidConfig, InvalidSource
from byol_training.encoders import build_encoder
from byol_training.export import Precision, export_run
from byol_training.pretrain import build_model, pretrain
from byol_training.served import ServedEncoder
from byol_training.weights import start_from
from training.support import stop_at, tiny_config, tiny_images


def load(name: str, where: Path | str, **how: Any) -> torch.nn.Module:
    encoder = build_encoder(name, image_size=32, **how).eval()
    start_from(encoder, str(where), name=name, image_size=32)
    return encoder


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_file(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(3)
    net = torchvision.models.resnet18().eval()
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(net.state_dict(), path)
    else:
        save_file(net.state_dict(), path)
    images = torch.randn(2, 3, 32, 32)
    net.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(load("resnet18", path)(images), net(images))
    small = load("resnet18", path, stem="small")  # another stem: the rest is taken
    assert torch.equal(
        small.state_dict()["stages.layer4.1.conv2.weight"], net.layer4[1].conv2.weight
    )
    with pytest.raises(InvalidSource, match=r"holds [\d,]+ of the [\d,]+ weights of encoder conv"):
        load("convnext_tiny", path)


def test_torchvision_convnext(tmp_path: Path) -> None:
    net = torchvision.models.convnext_tiny().eval()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "w.pth")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = net.features(images)
        torch.testing.assert_close(
            load("convnext_tiny", tmp_path / "w.pth")(images), maps.mean((2, 3))
        )


def test_timm_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="an extra of its own")
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = net.forward_head(net.forward_features(images), pre_logits=True)
        found = load("timm:vit_tiny_patch16_224", tmp_path / "w.safetensors")(images)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(InvalidConfig, match="needs an encoder of timm's, not resnet18"):
        load("resnet18", "timm")


def test_an_earlier_run_goes_on_as_another(tmp_path: Path) -> None:
    first = pretrain(tiny_images(), tiny_config(epochs=1), tmp_path / "first")
    config = tiny_config(epochs=1, start_from=str(tmp_path / "first"), seed=9)
    model = build_model(config)
    for (name, a), b in zip(
        model.encoder.state_dict().items(), first.encoder.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert torch.equal(next(model.target_encoder.parameters()), next(first.encoder.parameters()))
    pretrain(tiny_images(), config, tmp_path / "second", on_step=stop_at(3))
    shutil.rmtree(tmp_path / "first")
    pretrain(tiny_images(), config, tmp_path / "second", resume=True)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_bundle_goes_on_where_it_was_exported(tmp_path: Path, precision: Precision) -> None:
    images = tiny_images()
    pretrain(images, tiny_config(epochs=1), tmp_path / "run")
    bundle = export_run(
        tmp_path / "run", tmp_path / "bundle", precision=precision, keep_weights=True
    )
    shutil.rmtree(tmp_path / "run")
    config = tiny_config(epochs=1, start_from=str(bundle.path), seed=9)
    augment = config.augment
    started = ServedEncoder(build_model(config).encoder, augment.mean, augment.std)
    served = Encoder(bundle, device="cpu").embed(images.pixels)
    limit = GOLDEN_TOLERANCE[precision]
    assert cosine_distance(started.embed(images.pixels), served).max() < limit
    fresh = ServedEncoder(build_model(tiny_config(seed=9)).encoder, augment.mean, augment.std)
    assert cosine_distance(fresh.embed(images.pixels), served).min() > 2 * limit
    pretrain(images, config, tmp_path / "second")


def test_bundles_that_training_cannot_start_from(tmp_path: Path) -> None:
    pretrain(tiny_images(), tiny_config(epochs=1), tmp_path / "run")
    plain = export_run(tmp_path / "run", tmp_path / "plain")
    assert plain.weights_path is None
    with pytest.raises(InvalidSource, match=r"without the weights .* with --with-weights"):
        load("small", plain.path)
    kept = export_run(tmp_path / "run", tmp_path / "kept", keep_weights=True)
    with pytest.raises(InvalidSource, match="weights of encoder resnet18"):
        load("resnet18", kept.path)
    assert kept.weights_path is not None
    kept.weights_path.write_bytes(kept.weights_path.read_bytes()[:-1])
    with pytest.raises(InvalidBundle, match=r"weights\.safetensors is truncated or altered"):
        load("small", kept.path)


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"nothing")
    torch.save([1, 2], tmp_path / "b.pth")
    for path, said in (
        ("a.pth", "no weights that can be read"),
        ("b.pth", "holds a list; give a state dict"),
        ("c.pth", "cannot be read"),
        ("d", "no checkpoint in"),
    ):
        with pytest.raises(InvalidSource, match=said):
            load("small", tmp_path / path)
