"""Bundles that offer dense feature maps, exported from PyTorch."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from byol_serving.bundle import load_bundle
from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidBundle, InvalidConfig
from byol_serving.images import Preprocess
from byol_training.encoders import build_encoder
from byol_training.export import Precision, export_bundle
from byol_training.feature_export import feature_facts, raw_parity
from byol_training.served import ServedEncoder

MEAN = STD = (0.5, 0.5, 0.5)


def pixels(count: int, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_graph_gives_pytorchs_maps_and_computes_nothing_twice(
    tmp_path: Path, precision: Precision
) -> None:
    torch.manual_seed(0)
    network = build_encoder("small").eval()
    samples = pixels(4, 36)
    export_bundle(
        network,
        tmp_path / "b",
        name="small",
        preprocess=Preprocess(size=36),
        mean=MEAN,
        std=STD,
        samples=samples,
        training={},
        precision=precision,
        features=["conv4", "conv6"],
    )
    bundle = load_bundle(tmp_path / "b")
    facts = [(each.name, each.channels, each.side, each.stride) for each in bundle.info.features]
    assert facts == [("conv4", 96, 9, 4), ("conv6", 128, 5, 8)]
    assert 0 <= bundle.info.scores["features_max_cosine_distance"] < 1e-3
    encoder = Encoder(bundle, device="cpu")
    encoder.check_golden()
    names = ["conv6", "embedding", "conv4", "raw_embedding"]
    deep, embedding, shallow, raw = encoder.extract(samples, names)
    served = ServedEncoder(network, MEAN, STD).eval()
    with torch.inference_mode():
        wanted = network.feature_maps(served.planes(torch.from_numpy(samples)))
        lengths = served.encode(torch.from_numpy(samples)).norm(dim=1)
    near = 1e-4 if precision == "fp32" else 2e-2
    np.testing.assert_allclose(shallow, wanted["conv4"].numpy(), atol=near)
    np.testing.assert_allclose(deep, wanted["conv6"].numpy(), atol=near)
    np.testing.assert_allclose(embedding, encoder.embed(samples), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(raw, axis=1), lengths.numpy(), rtol=near)
    np.testing.assert_allclose(raw / lengths.numpy()[:, None], embedding, atol=near)
    assert 0 <= bundle.info.scores["raw_max_relative_error"] < near
    operations = [node.op_type for node in onnx.load(bundle.model_path).graph.node]
    assert operations.count("Conv") == 6
    assert "BatchNormalization" not in operations
    # The CPU works shapes out, and what it does cannot be recorded in a CUDA graph.
    assert "Shape" not in operations


def test_a_raw_embedding_that_is_not_pytorchs_fails_the_export(tmp_path: Path) -> None:
    samples = pixels(4, 32)
    network = build_encoder("small").eval()
    path = tmp_path / "b"
    export_bundle(
        network,
        path,
        name="small",
        preprocess=Preprocess(size=32),
        mean=MEAN,
        std=STD,
        samples=samples,
        training={},
    )
    encoder = Encoder(load_bundle(path), device="cpu")
    served = ServedEncoder(network, MEAN, STD).eval()
    assert raw_parity(encoder, served, samples)["raw_max_relative_error"] < 1e-4
    with torch.no_grad():  # the same directions, of another length
        served.whiten = torch.nn.Linear(128, 128, bias=False)
        served.whiten.weight.copy_(1.1 * torch.eye(128))
    with pytest.raises(InvalidBundle, match=r"un-normalised embeddings differ .* of their length"):
        raw_parity(encoder, served, samples)


@pytest.mark.parametrize("stages", [["conv9"], ["conv4", "conv4"]])
def test_stages_must_exist_once(stages: list[str]) -> None:
    served = ServedEncoder(build_encoder("small").eval(), MEAN, STD).eval()
    with pytest.raises(InvalidConfig, match=r"not one of this encoder.s stages \(conv1, conv2"):
        feature_facts(served, pixels(1, 32), stages)


def test_strides_are_those_of_the_network_whatever_the_input() -> None:
    served = ServedEncoder(build_encoder("resnet18").eval(), MEAN, STD).eval()
    for size in (64, 100):
        facts = feature_facts(served, pixels(1, size), ["stem", "layer2", "layer4"])
        assert [each.stride for each in facts] == [4, 8, 32]
