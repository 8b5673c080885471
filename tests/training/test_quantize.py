"""Bundles of lower precision: exported, quantised and measured on real images."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from byol_serving.bundle import GOLDEN_TOLERANCE, load_bundle
from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidBundle, InvalidSource
from byol_serving.images import Pixels, Preprocess
from byol_training.data import list_images, load_images
from byol_training.encoders import build_encoder
from byol_training.export import Precision, export_bundle
from byol_training.precision_cost import Labelled, load_labelled
from byol_training.quantize import METHODS, split
from byol_training.recipes import small_config

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10" / "test.tar"
HOW = Preprocess(size=32)
COUNT = 120


@pytest.fixture(scope="module")
def labelled() -> Labelled:
    if not CIFAR.exists():
        pytest.skip("needs real images, CIFAR-10 in ../shared/data")
    names = list_images(CIFAR)
    images = load_images(CIFAR, 32, only=names[:: len(names) // COUNT])
    assert images.labels is not None
    return Labelled(images.pixels, images.labels)


def export(path: Path, labelled: Labelled, precision: Precision) -> Encoder:
    torch.manual_seed(0)
    config = small_config()
    network = build_encoder("small")
    with torch.no_grad():  # batch-norm statistics of real images, as after training
        network.train()
        for part in np.array_split(labelled.pixels, 4):
            network(torch.from_numpy(part).permute(0, 3, 1, 2).float() / 128 - 1)
    export_bundle(
        network,
        path,
        name="small",
        preprocess=HOW,
        mean=config.augment.mean,
        std=config.augment.std,
        samples=labelled.pixels[:40],
        training={},
        precision=precision,
        labelled=labelled,
    )
    return Encoder(load_bundle(path), device="cpu")


@pytest.fixture(scope="module")
def encoders(
    labelled: Labelled, tmp_path_factory: pytest.TempPathFactory
) -> dict[Precision, Encoder]:
    folder = tmp_path_factory.mktemp("bundles")
    kinds: tuple[Precision, ...] = ("fp32", "fp16", "int8")
    return {kind: export(folder / kind, labelled, kind) for kind in kinds}


@pytest.mark.parametrize(
    ("precision", "size", "cosine"), [("fp16", 0.6, 0.9999), ("int8", 0.4, 0.99)]
)
def test_a_lower_precision_is_smaller_near_and_says_what_it_costs(
    encoders: dict[Precision, Encoder],
    labelled: Labelled,
    precision: Precision,
    size: float,
    cosine: float,
) -> None:
    full, low = encoders["fp32"], encoders[precision]
    low.check_golden()
    (raw,) = low.extract(labelled.pixels[:40], ["raw_embedding"])
    (wanted,) = full.extract(labelled.pixels[:40], ["raw_embedding"])
    assert (np.linalg.norm(raw - wanted, axis=1) < 0.2 * np.linalg.norm(wanted, axis=1)).all()
    assert low.bundle.info.precision == precision
    assert low.bundle.info.encoder_id != full.bundle.info.encoder_id
    bytes_of = [each.bundle.model_path.stat().st_size for each in (low, full)]
    assert bytes_of[0] < size * bytes_of[1]

    rows = low.embed(labelled.pixels)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert (rows * full.embed(labelled.pixels)).sum(axis=1).min() > cosine

    scores = low.bundle.info.scores
    assert cosine < scores["cosine_to_fp32_min"] <= scores["cosine_to_fp32_mean"] < 1
    assert 0 < scores["knn_accuracy_fp32"] < 1
    assert abs(scores["knn_change"]) < 0.2
    assert "cosine_to_fp32_mean" not in full.bundle.info.scores


def test_int8_convolves_integers_and_fp16_halves(encoders: dict[Precision, Encoder]) -> None:
    low = encoders["int8"].bundle
    assert low.info.versions["calibration"] in METHODS
    graph = onnx.load(low.model_path).graph
    made_by = {output: node for node in graph.node for output in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 6
    for node in convolutions:
        assert {made_by[name].op_type for name in node.input[:2]} == {"DequantizeLinear"}
    half = onnx.load(encoders["fp16"].bundle.model_path).graph
    kinds = {each.data_type for each in half.initializer if len(each.dims) == 4}
    assert kinds == {onnx.TensorProto.FLOAT16}


def test_a_precision_too_coarse_is_refused(
    tmp_path: Path, labelled: Labelled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GOLDEN_TOLERANCE, "int8", 1e-9)
    with pytest.raises(InvalidBundle, match="int8 is too coarse for this encoder; export it as"):
        export(tmp_path / "int8", labelled, "int8")
    assert not (tmp_path / "int8").exists()


def test_what_calibrates_does_not_measure() -> None:
    rows = np.arange(9)
    calibration, measured = split(9)
    assert sorted([*rows[calibration], *rows[measured]]) == list(rows)
    assert len(rows[:1][split(1)[0]]) == len(rows[:1][split(1)[1]]) == 1


def test_measuring_needs_labels(tmp_path: Path) -> None:
    pixels: Pixels = np.zeros((40, 40, 3), np.uint8)
    for name in ("a", "b"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    with pytest.raises(InvalidSource, match="no class sub-folders"):
        load_labelled(tmp_path, HOW)
    for name in ("a", "b"):
        (tmp_path / f"class-{name}").mkdir()
        (tmp_path / f"{name}.png").rename(tmp_path / f"class-{name}" / f"{name}.png")
    found = load_labelled(tmp_path, HOW)
    assert found.pixels.shape == (2, 32, 32, 3)
    assert found.labels.tolist() == [0, 1]
