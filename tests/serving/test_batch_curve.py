"""Which batch size pays: on curves that are known, and on a real encoder."""

import time
from pathlib import Path

import numpy as np
import pytest

from byol_serving.batch_curve import BatchCurve, measure_curve, sizes_up_to, takes_at_most
from byol_serving.encoder import Encoder
from byol_serving.padded_batches import PaddedBatches
from serving.support import DIM, SIZE, make_bundle, random_pixels, reference


@pytest.mark.parametrize(
    ("fixed", "each", "enough", "best"),
    [
        (0.0, 1.0, 1, 1),  # twice the images take twice the time
        (0.05, 1.0, 1, 8),  # a CPU with a large network: a little is won
        (1.0, 1.0, 16, 64),  # 16 in 17 s and 64 in 65 s: 64 are taken only where many wait
        (100.0, 1.0, 64, 64),  # a GPU with a small one: the launch is all that counts
    ],
)
def test_the_smallest_batch_near_the_best_throughput(
    fixed: float, each: float, enough: int, best: int
) -> None:
    curve = BatchCurve({size: fixed + each * size for size in sizes_up_to(64)})
    assert (curve.enough, curve.best) == (enough, best)


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(1, [1]), (2, [1, 2]), (24, [1, 2, 4, 8, 16, 24]), (32, [1, 2, 4, 8, 16, 32])],
)
def test_sizes(limit: int, sizes: list[int]) -> None:
    assert sizes_up_to(limit) == sizes


def test_a_slow_encoder_is_not_measured_to_the_end() -> None:
    sizes: list[int] = []

    def run(size: int) -> None:
        sizes.append(size)
        time.sleep(0.2 * size)

    curve = measure_curve(run, 1024)
    assert list(curve.seconds) == [1, 2]
    assert max(sizes) == 2


def test_a_busy_moment_does_not_count() -> None:
    free = time.perf_counter() + 0.3

    def run() -> None:
        time.sleep(0.001 if time.perf_counter() > free else 0.03)

    assert takes_at_most(0.01, run)


@pytest.mark.parametrize(("limit", "longest"), [(0.01, 2.0), (0.001, 0.5)])
def test_what_is_too_slow_stays_so(limit: float, longest: float) -> None:
    began = time.perf_counter()
    assert not takes_at_most(limit, lambda: time.sleep(2 * limit))
    assert time.perf_counter() - began < longest


def test_warming_up_measures_the_real_encoder(tmp_path: Path) -> None:
    encoder = Encoder(make_bundle(tmp_path / "bundle"), device="cpu", workers=2, threads=1)
    curve = encoder.warm_up(8)
    assert list(curve.seconds) == [1, 2, 4, 8]
    assert all(took > 0 for took in curve.seconds.values())


@pytest.mark.parametrize("count", [1, 3, 4, 5, 128])
def test_padding_leaves_no_trace(tmp_path: Path, count: int) -> None:
    """On the CPU: the same binding of input and output that a GPU gets."""
    encoder = Encoder(make_bundle(tmp_path / "bundle"), device="cpu")
    padded = PaddedBatches(encoder._session, SIZE, DIM, "cpu")
    padded.embed(random_pixels(128, seed=5))  # leaves other images in the largest buffer
    pixels = random_pixels(count)
    first = padded.embed(pixels)
    padded.embed(random_pixels(count, seed=6))  # and must not write into the answer above
    assert first.shape == (count, DIM)
    np.testing.assert_allclose(first, reference(pixels), atol=1e-6)
