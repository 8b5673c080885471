"""Scores while training: what is written, when, and that the run does not notice."""

from pathlib import Path

import numpy as np
import torch

from byol_training.config import HeadConfig
from byol_training.data import Images, images_from_arrays
from byol_training.online import OnlineScores, read_scores
from byol_training.pretrain import Stop, pretrain
from byol_training.recipes import small_config

CONFIG = small_config(
    image_size=16, batch_size=8, epochs=4, head=HeadConfig(hidden=16, out=8), device="cpu"
)


def pictures(*, labelled: bool, size: int = 16) -> Images:
    """Forty dark or bright ones."""
    rng = np.random.default_rng(0)
    labels = np.arange(40, dtype=np.int64) % 2
    pixels = rng.integers(0, 60, (40, size, size, 3)) + 150 * labels[:, None, None, None]
    return images_from_arrays(pixels.astype(np.uint8), labels=labels if labelled else None)


def test_a_line_every_few_epochs(tmp_path: Path) -> None:
    images = pictures(labelled=True)
    scores = OnlineScores(images, CONFIG, tmp_path, every=2)
    pretrain(images, CONFIG, tmp_path, on_epoch=scores)
    first, second = read_scores(tmp_path)
    assert (first["step"], first["epoch"], second["step"]) == (10, 2, 20)
    assert second["knn_accuracy"] == 1.0  # dark or bright
    assert "stability" not in first
    assert 0.2 < second["stability"] <= 1.0
    assert scores.last["rankme"] == second["rankme"]


def test_scoring_changes_no_weight(tmp_path: Path) -> None:
    images = pictures(labelled=True)
    plain = pretrain(images, CONFIG, tmp_path / "plain")
    scores = OnlineScores(images, CONFIG, tmp_path / "scored", every=1)
    scored = pretrain(images, CONFIG, tmp_path / "scored", on_epoch=scores)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, scored.state_dict()[name]), name


def test_a_resumed_run_goes_on_with_its_scores(tmp_path: Path) -> None:
    images = pictures(labelled=False)
    scores = OnlineScores(images, CONFIG, tmp_path, every=1)
    scores._write({"step": 5, "rankme": 1.0})
    scores._write({"step": 10, "rankme": 2.0})
    scores._write({"step": 10, "rankme": 3.0})  # resumed from step 5
    assert read_scores(tmp_path) == [{"step": 5, "rankme": 1.0}, {"step": 10, "rankme": 3.0}]


def test_without_labels_and_with_larger_stored_images(tmp_path: Path) -> None:
    images = pictures(labelled=False, size=24)
    pretrain(images, CONFIG, tmp_path, on_epoch=OnlineScores(images, CONFIG, tmp_path, every=4))
    (line,) = read_scores(tmp_path)
    assert "knn_accuracy" not in line
    assert 1 <= line["rankme"] <= 128


def test_an_epoch_hook_may_stop_the_run(tmp_path: Path) -> None:
    seen: list[int] = []

    def on_epoch(model: object, step: int) -> None:
        seen.append(step)
        raise Stop

    pretrain(pictures(labelled=False), CONFIG, tmp_path, on_epoch=on_epoch)
    assert seen == [5]
    assert read_scores(tmp_path) == []
