"""A budget becomes a plan that this machine can keep."""

import pytest

from byol_training.budget import measure_rate, plan_budget
from byol_training.config import TrainConfig
from byol_training.recipes import load_recipe
from byol_training.survey import Survey


def plan(count: int, short_side: int, seconds: float, rates: dict[str, float]) -> TrainConfig:
    """The choice where encoders have these rates; the reasons must tell it."""

    def measure(config: TrainConfig) -> float:
        return rates[f"{config.encoder}@{config.image_size}"]

    found = plan_budget(Survey(count=count, short_side=short_side), seconds, measure=measure)
    config = found.config
    assert f"chosen: {config.encoder} at {config.image_size} pixels" in found.reasons[-1]
    assert config.max_seconds == pytest.approx(seconds, rel=0.05)
    return config


CPU = {"small@32": 2000.0, "resnet18@32": 40.0, "resnet18@96": 60.0}
GPU = {
    **{"small@32": 90_000.0, "resnet18@32": 15_000.0, "resnet18@96": 12_000.0},
    **{"resnet18@160": 5_000.0, "resnet50@160": 2_500.0, "resnet50@224": 1_300.0},
}


@pytest.mark.parametrize(
    ("count", "short_side", "hours", "rates", "chosen"),
    [
        (10_000, 32, 0.5, CPU, ("small", 32)),
        (300, 400, 0.5, CPU, ("resnet18", 96)),
        (50_000, 32, 0.5, GPU, ("resnet18", 32)),
        (50_000, 400, 0.5, GPU, ("resnet50", 160)),
        (50_000, 400, 10.0, GPU, ("resnet50", 224)),
        (10_000_000, 400, 0.1, GPU, ("small", 32)),
    ],
)
def test_choice(
    count: int, short_side: int, hours: float, rates: dict[str, float], chosen: tuple[str, int]
) -> None:
    rates = {"resnet18@160": 1.0, **rates}
    config = plan(count, short_side, hours * 3600, rates)
    assert (config.encoder, config.image_size) == chosen


def test_small_sets_get_small_batches() -> None:
    sizes = [plan(count, 32, 600, GPU).batch_size for count in (50_000, 3000, 1500, 100, 5)]
    assert sizes == [256, 128, 64, 50, 2]


def test_rate_is_measured() -> None:
    assert 1 < measure_rate(load_recipe("small").config) < 1e7


def test_stored_side() -> None:
    assert Survey(count=100, short_side=32).stored_side(32) == 32
    assert Survey(count=100, short_side=300).stored_side(224) == 300
    assert Survey(count=100, short_side=3000).stored_side(224) == 448
    assert Survey(count=1_000_000, short_side=3000).stored_side(224) < 200 * 1.2
    assert Survey(count=10**9, short_side=3000).stored_side(224) == 224
