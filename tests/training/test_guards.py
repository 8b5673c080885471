"""Spikes are shortened, collapse and rising losses are said, each with what to change."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import nn

from byol_training.byol import effective_rank
from byol_training.config import OptimizerConfig
from byol_training.guards import SpikeGuard, Watch
from byol_training.recipes import small_config


def lengths(guard: SpikeGuard, parameter: nn.Parameter, wanted: list[float]) -> list[float]:
    """Applies the guard to gradients of these lengths; their lengths afterwards."""
    found = []
    for length in wanted:
        parameter.grad = torch.full((4,), length / 2)
        guard.apply()
        found.append(float(parameter.grad.norm()))
    return found


def test_a_spike_is_shortened_and_counted() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    guard = SpikeGuard([parameter], factor=10.0)
    usual = [1.0] * 30
    assert lengths(guard, parameter, usual) == usual
    assert lengths(guard, parameter, [9.0, 500.0]) == pytest.approx([9.0, 12.58], abs=0.01)
    mean, shortened = guard.read()
    assert shortened == 1
    assert mean == pytest.approx((30 + 9.0 + 12.58) / 32, abs=0.01)
    assert guard.read() == (0.0, 0)


def test_the_first_steps_and_factor_zero_pass() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    assert lengths(SpikeGuard([parameter], 10.0), parameter, [1.0, 100.0]) == [1.0, 100.0]
    steps = [1.0] * 30 + [1000.0]
    assert lengths(SpikeGuard([parameter], 0.0), parameter, steps) == steps


def test_the_mean_survives_a_resume() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    guard, again = SpikeGuard([parameter], 10.0), SpikeGuard([parameter], 10.0)
    lengths(guard, parameter, [2.0] * 25)
    again.restore(guard.state())
    assert lengths(again, parameter, [500.0]) == pytest.approx([20.0])


def watch(**changes: float) -> tuple[str, ...]:
    healthy: dict[str, Any] = {
        "step": 100,
        "loss": 1.0,
        "spread": 0.6,
        "rank": 20.0,
        "full": 64,
        "shortened": 0,
    }
    both = Watch(small_config())
    assert both.check(**healthy) == ()
    found = both.check(**healthy | changes)
    again = both.check(**healthy | changes | {"shortened": 0})
    assert again == ()  # said once
    return found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spread": 0.01}, "collapsing by step 100: spread 0.01 .*adamw learning rate 0.002"),
        ({"rank": 1.2}, r"effective rank 1\.2 \(limit 6\.4 of 64\); lower .* tau_base 0"),
        ({"loss": 3.5}, "loss rose to 3.500 by step 100 from 1.000"),
        ({"shortened": 2}, r"2 gradient\(s\) before step 100 were over 10 times"),
    ],
)
def test_warnings(changes: dict[str, float], said: str) -> None:
    (warning,) = watch(**changes)
    assert re.search(said, warning)
    assert "\n" not in warning


def test_collapse_is_said_again_only_after_it_was_over() -> None:
    watching, said = Watch(small_config()), []
    for rank in (20.0, 6.0, 7.0, 6.0, 12.0, 6.0):
        found = watching.check(step=50, loss=1.0, spread=0.8, rank=rank, full=64, shortened=0)
        said.append(len(found))
    assert said == [0, 1, 0, 0, 0, 1]


def test_effective_rank() -> None:
    torch.manual_seed(0)
    line = torch.randn(64, 1) * torch.ones(1, 16)
    assert float(effective_rank(line)) == pytest.approx(1.0, abs=0.01)
    assert float(effective_rank(torch.eye(16))) == pytest.approx(16.0, abs=0.01)


def test_spike_factors_that_would_shorten_ordinary_steps_are_refused() -> None:
    assert dataclasses.replace(OptimizerConfig(), spike_factor=0.0).spike_factor == 0.0
    with pytest.raises(Exception, match=r"spike_factor 1\.2 would shorten"):
        OptimizerConfig(spike_factor=1.2)
