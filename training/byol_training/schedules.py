"""τ and the learning rate: pure functions of the step, so that resuming cannot bend them."""

import math


def tau(
    step: int, steps: int, base: float, *, final: float = 1.0, batch_factor: float = 1.0
) -> float:
    """Decay of the target's average: from `base` at step 0 to 1 at the end (paper, section 3.3).

    τ = 1 - (1 - τ_base) · (cos(πk/K) + 1) / 2

    Args:
        step: 0 for the first.
        steps: of the whole run.
        base: τ at the first step.
        final: τ at the last; the paper's is 1.
        batch_factor: how many times larger the batch is than the one `base` was found at. One step
            of k batches must average as k steps would: τ^k (Busbridge et al. 2023, arXiv
            2307.13813, definition 1.2).
    """
    turn = (math.cos(math.pi * min(step / steps, 1.0)) + 1.0) / 2.0
    value: float = (final - (final - base) * turn) ** batch_factor
    return value


def warmup_steps(steps: int, steps_per_epoch: int, warmup_epochs: float) -> int:
    """Steps of linear warm-up; a tenth of the run at most, so that it fits short runs."""
    return min(round(warmup_epochs * steps_per_epoch), steps // 10)


def learning_rate(step: int, steps: int, warmup: int, *, base: float, batch_size: int) -> float:
    """Linear warm-up from 0, then a cosine to 0 without restarts (paper, section 3.3).

    Args:
        step: 0 for the first.
        steps: of the whole run.
        warmup: how many of them rise.
        base: learning rate at batch 256.
        batch_size: the peak is `base` · batch_size / 256.
    """
    peak = base * batch_size / 256
    if step < warmup:
        return peak * step / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (math.cos(math.pi * progress) + 1.0) / 2.0
