"""τ and the learning rate at the start, in the middle and at the end."""

import pytest

from byol_training.schedules import learning_rate, tau, warmup_steps


def test_tau() -> None:
    assert tau(0, 1000, 0.996) == pytest.approx(0.996)
    assert tau(500, 1000, 0.996) == pytest.approx(0.998)
    assert tau(250, 1000, 0.996) == pytest.approx(1 - 0.004 * (0.5**0.5 + 1) / 2)
    assert tau(1000, 1000, 0.996) == 1.0
    assert tau(1001, 1000, 0.996) == 1.0  # a plan that was shortened must not turn round


def test_tau_of_larger_batches_averages_as_as_many_small_ones_would() -> None:
    assert tau(0, 100, 0.99, batch_factor=4.0) == pytest.approx(0.99**4)
    assert tau(0, 100, 0.99, batch_factor=0.5) == pytest.approx(0.99**0.5)
    assert tau(100, 100, 0.99, batch_factor=4.0) == 1.0


def test_tau_may_stay() -> None:
    assert {tau(k, 10, 0.99, final=0.99) for k in range(11)} == {0.99}


def test_tau_never_falls() -> None:
    values = [tau(k, 100, 0.9) for k in range(101)]
    assert values == sorted(values)


def test_learning_rate() -> None:
    def at(step: int) -> float:
        return learning_rate(step, 1000, 100, base=0.2, batch_size=4096)

    assert at(0) == 0.0
    assert at(50) == pytest.approx(1.6)
    assert at(100) == pytest.approx(3.2)  # 0.2 · 4096 / 256
    assert at(550) == pytest.approx(1.6)
    assert at(1000) == pytest.approx(0.0)


def test_learning_rate_without_warm_up_starts_at_its_peak() -> None:
    assert learning_rate(0, 10, 0, base=0.1, batch_size=128) == pytest.approx(0.05)


def test_warm_up_is_a_tenth_at_most() -> None:
    assert warmup_steps(10_000, 50, 10) == 500
    assert warmup_steps(1_000, 50, 10) == 100
    assert warmup_steps(5, 50, 10) == 0
