"""Measures without labels against hand calculations, and what they say of known embeddings."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from byol_training.config import AugmentConfig, ViewConfig
from byol_training.label_free import draw_views, rankme, score_without_labels


def unit(count: int, dim: int, seed: int = 0) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    normalised: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return normalised


def test_rankme_of_known_spectra() -> None:
    assert rankme(torch.eye(8)) == pytest.approx(8.0, rel=1e-4)
    assert rankme(torch.ones(10, 8)) == pytest.approx(1.0, rel=1e-4)
    share = np.array([3, 1]) / 4  # singular values 3 and 1
    by_hand = math.exp(-float((share * np.log(share)).sum()))
    assert rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(by_hand, rel=1e-4)


def test_scores_by_hand() -> None:
    rows = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    second = np.array([[0, 1], [0, 1], [-1, 0]], np.float32)  # the first image's view went astray
    found = score_without_labels(rows, (rows, second))
    assert found.view_retrieval == pytest.approx(2 / 3)
    assert found.alignment == pytest.approx(2 / 3)  # |(1,0) - (0,1)|^2 of three
    pairs = [2.0, 4.0, 2.0]
    assert found.uniformity == pytest.approx(
        math.log(sum(math.exp(-2 * each) for each in pairs) / 3)
    )


def test_scores_tell_spread_from_collapse() -> None:
    good, point = unit(500, 16), np.tile(unit(1, 16), (500, 1))
    spread_out, collapsed = (score_without_labels(rows, (rows, rows)) for rows in (good, point))
    assert spread_out.view_retrieval == 1.0
    assert spread_out.spread == pytest.approx(1.0, abs=0.02)
    assert spread_out.rankme > 15
    assert spread_out.uniformity < -3
    assert collapsed.view_retrieval < 0.01
    assert collapsed.spread == pytest.approx(0.0, abs=1e-3)
    assert collapsed.rankme == pytest.approx(1.0, abs=1e-3)
    assert collapsed.uniformity == pytest.approx(0.0, abs=1e-3)


def test_views_are_of_the_same_images_and_repeatable() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (700, 24, 24, 3), dtype=np.uint8)
    first, second = draw_views(pixels, AugmentConfig(), 16, count=600)
    assert first.shape == second.shape == (600, 16, 16, 3)
    assert first.dtype == np.uint8
    again = draw_views(pixels, AugmentConfig(), 16, count=600)
    assert np.array_equal(first, again[0])
    assert np.array_equal(second, again[1])
    assert not np.array_equal(first, draw_views(pixels, AugmentConfig(), 16, seed=1)[0])


def test_views_without_augmentation_are_the_images() -> None:
    still = ViewConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0, jitter_p=0, grey_p=0)
    still = ViewConfig(**(vars(still) | {"blur_p": 0.0}))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    first, second = draw_views(pixels, AugmentConfig(first=still, second=still), 16)
    assert np.array_equal(first, pixels)
    assert np.array_equal(second, pixels)
