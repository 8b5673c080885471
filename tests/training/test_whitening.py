"""Whitening: what it does to embeddings, in PyTorch and in the exported graph."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidSource
from byol_training.config import HeadConfig
from byol_training.data import load_images
from byol_training.export import export_run
from byol_training.label_free import rankme
from byol_training.pretrain import pretrain
from byol_training.recipes import small_config
from byol_training.served import ServedEncoder
from byol_training.whitening import Whitening, fit_whitening


def lopsided(count: int = 4000) -> NDArray[np.float32]:
    """Five dimensions, correlated, of variances over four orders of magnitude, off centre."""
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    rows: NDArray[np.float64] = rng.normal(size=(count, 5)) * [10, 3, 1, 0.3, 0.1] @ turn + 7
    return rows.astype(np.float32)


def apply(whitening: Whitening, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = ((rows - whitening.mean) @ whitening.matrix).astype(np.float32)
    return found


def test_whitened_rows_have_unit_covariance() -> None:
    rows = lopsided()
    white = apply(fit_whitening(rows, shrinkage=0.0), rows)
    np.testing.assert_allclose(np.cov(white.T), np.eye(5), atol=1e-3)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-3)


def test_zca_is_the_whitening_that_turns_nothing() -> None:
    """Its matrix is symmetric and positive: rows already white stay where they are."""
    found = fit_whitening(lopsided())
    np.testing.assert_allclose(found.matrix, found.matrix.T, rtol=1e-4)
    assert np.linalg.eigvalsh(found.matrix).min() > 0
    white = apply(fit_whitening(lopsided(), shrinkage=0.0), lopsided())
    again = fit_whitening(white, shrinkage=0.0)
    np.testing.assert_allclose(again.matrix, np.eye(5), atol=1e-3)


def test_shrinkage_leaves_empty_directions_alone() -> None:
    rows = lopsided()
    rows[:, 2] = 0.0  # a unit that is dead
    assert np.abs(fit_whitening(rows).matrix).max() < 100


def test_what_cannot_be_whitened() -> None:
    with pytest.raises(InvalidSource, match="5 images cannot tell the variance of 5 dimensions"):
        fit_whitening(lopsided(5))
    with pytest.raises(InvalidSource, match="collapsed"):
        fit_whitening(np.ones((9, 5), np.float32))


class Colours(nn.Module):
    """The mean colour, as an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.gain * images.mean((2, 3))


def test_the_served_encoder_whitens_before_it_normalises() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 2, 2, 3), dtype=np.uint8)
    plain = ServedEncoder(Colours(), (0.1, 0.2, 0.3), (0.5, 0.4, 0.3))
    rows = plain.embed(pixels, normalised=False)
    whitening = fit_whitening(rows)
    wanted = apply(whitening, rows)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    served = ServedEncoder(Colours(), (0.1, 0.2, 0.3), (0.5, 0.4, 0.3), whitening)
    np.testing.assert_allclose(served.embed(pixels), wanted, atol=1e-5)
    assert rankme(torch.from_numpy(wanted)) > rankme(torch.from_numpy(plain.embed(pixels)))


def test_a_whitened_bundle_is_served_whitened(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(160):  # more than the encoder's 128 dimensions
        picture = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number}.png")
    config = small_config(
        image_size=16, batch_size=32, epochs=1, head=HeadConfig(hidden=16, out=8), device="cpu"
    )
    images = load_images(tmp_path / "pictures", 16)
    pretrain(images, config, tmp_path / "run")
    plain = export_run(tmp_path / "run", tmp_path / "plain")
    white = export_run(tmp_path / "run", tmp_path / "white", whiten_on=tmp_path / "pictures")
    rows = [Encoder(bundle).embed(images.pixels) for bundle in (plain, white)]
    ranks = [rankme(torch.from_numpy(each)) for each in rows]
    assert ranks[1] > 1.5 * ranks[0]
    assert white.info.encoder_id != plain.info.encoder_id
    assert white.info.scores["parity_max_cosine_distance"] < 1e-4
    images_8 = images.pixels[:8]
    embedding, raw = Encoder(white).extract(images_8, ["embedding", "raw_embedding"])
    assert white.info.scores["raw_max_relative_error"] < 1e-3
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1)[:, None], embedding, atol=1e-5)
    (plain_raw,) = Encoder(plain).extract(images_8, ["raw_embedding"])
    assert np.abs(raw - plain_raw).max() > 0.1  # it is whitened too
