"""Evaluation of a run and of its bundle, end to end on generated pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byol_serving.errors import InvalidSource
from byol_training.config import HeadConfig
from byol_training.data import load_images
from byol_training.evaluate import evaluate, pixel_embeddings, untrained
from byol_training.export import export_run
from byol_training.pretrain import pretrain
from byol_training.recipes import small_config

MEASURES = {"view_retrieval", "rankme", "alignment", "uniformity", "spread"}
LABELLED = {"knn_accuracy", "precision_at_10", "mean_average_precision"}
PROBES = {
    "logistic_accuracy",
    "sgd_probe_accuracy",
    "few_shot_10_percent",
    "few_shot_1_percent",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 24: red stripes that run across, blue ones that run down."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, channel, axis in (("across", 0, 0), ("down", 2, 1)):
        (root / name).mkdir()
        for number in range(24):
            wave = 128 + 100 * np.sin(np.arange(20) + rng.uniform(0, 6))
            picture = rng.integers(0, 60, (20, 20, 3))
            picture[..., channel] = np.expand_dims(wave, 1 - axis)
            Image.fromarray(picture.astype(np.uint8)).save(root / name / f"{number:02d}.png")
    return root


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = small_config(
        image_size=16, batch_size=16, epochs=2, head=HeadConfig(hidden=16, out=8), device="cpu"
    )
    pretrain(load_images(pictures, 16), config, folder)
    return folder


def test_a_run_is_scored_beside_its_baselines(run: Path, pictures: Path) -> None:
    scores = evaluate(run, pictures)
    assert list(scores) == ["trained", "untrained", "pixels"]
    assert set(scores["trained"]) == set(scores["untrained"]) == MEASURES | LABELLED | PROBES
    assert set(scores["pixels"]) == MEASURES | LABELLED
    assert scores["trained"]["logistic_accuracy"] == 1.0  # red or blue
    assert scores["untrained"] != scores["trained"]
    assert scores == evaluate(run, pictures)  # nothing is left to chance


def test_a_bundle_scores_as_its_run_does(run: Path, pictures: Path, tmp_path: Path) -> None:
    bundle = export_run(run, tmp_path / "bundle")
    of_run, of_bundle = evaluate(run, pictures), evaluate(bundle.path, pictures)
    for name, scores in of_run.items():
        assert of_bundle[name] == pytest.approx(scores, rel=1e-3), name


def test_a_bundle_is_evaluated_with_its_own_crop(run: Path, pictures: Path, tmp_path: Path) -> None:
    bundle = export_run(run, tmp_path / "bundle", crop_fraction=0.5)
    assert evaluate(bundle.path, pictures)["pixels"] != evaluate(run, pictures)["pixels"]


def test_without_class_folders_there_are_label_free_measures(run: Path, pictures: Path) -> None:
    scores = evaluate(run, pictures / "across", pictures / "down")
    assert set(scores["trained"]) == MEASURES


def test_what_cannot_be_evaluated(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match="no checkpoint"):
        evaluate(tmp_path, pictures)


def test_large_pictures_are_compared_by_their_32_pixel_averages() -> None:
    small = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    large = small.repeat(4, axis=1).repeat(4, axis=2)
    cosines = pixel_embeddings(large) @ pixel_embeddings(large).T
    assert pixel_embeddings(large).shape == (4, 32 * 32 * 3)
    np.testing.assert_allclose(
        cosines, pixel_embeddings(small) @ pixel_embeddings(small).T, atol=1e-5
    )


def test_the_untrained_network_is_the_run_s_own_and_repeatable() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    config = small_config(image_size=16, seed=3)
    one, other = untrained(config).embed(pixels), untrained(config).embed(pixels)
    assert np.array_equal(one, other)
    assert not np.array_equal(one, untrained(small_config(seed=4)).embed(pixels))
