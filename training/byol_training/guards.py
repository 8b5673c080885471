"""What watches over a run: gradient spikes, losses that are no number, collapse."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from byol_serving.errors import InvalidConfig
from byol_training.config import TrainConfig

_SETTLED = 20  # steps whose gradients only make the running mean
_FOLLOW = 0.02  # weight of a step in the running mean, from then on
# Measured on CIFAR-10, encoder `small`, 64 dimensions, batch 64: a healthy run keeps a spread of
# 0.8 and an effective rank of 17 to 25; with 30 times its learning rate it falls to 0.4 and 5.
MIN_SPREAD = 0.3
"""Of projections; below is collapse to a point."""
MIN_RANK_SHARE = 0.1
"""Effective rank of projections over the largest they could have; below is collapse to a plane."""
_RECOVERED = 1.5  # times the limits, after which collapse would be said again
LOSS_RISE = 3.0
"""A mean loss this many times the lowest so far is a spike."""


class SpikeGuard:
    """Keeps a gradient from being many times as long as they usually are.

    All on the device: the host never waits for a length.

    Args:
        parameters: what is trained.
        factor: how many times the running mean a gradient may be long; 0 for any.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], factor: float) -> None:
        self._parameters = list(parameters)
        self._factor = factor
        device = self._parameters[0].device
        self._mean = torch.zeros((), device=device)
        self._steps = 0
        self._total = torch.zeros((), device=device)
        self._shortened = torch.zeros((), device=device)
        self._since = 0

    @torch.no_grad()
    def apply(self) -> None:
        """Between backward and the optimiser's step."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        length = torch.stack(list(torch._foreach_norm(gradients))).norm()
        if self._factor > 0 and self._steps >= _SETTLED:
            scale = (self._factor * self._mean / length).clamp(max=1.0)
            # Asking a GPU whether the scale is 1 costs more than multiplying by it.
            if scale.device.type == "cuda" or float(scale) < 1.0:
                torch._foreach_mul_(gradients, scale)
            self._shortened += scale < 1.0
            length = length * scale
        self._mean.lerp_(length, max(1.0 / (self._steps + 1), _FOLLOW))
        self._total += length
        self._steps += 1
        self._since += 1

    def read(self) -> tuple[float, int]:
        """Mean length and how many were shortened, since the last reading; waits for the device."""
        mean, shortened = float(self._total) / max(self._since, 1), int(self._shortened)
        self._total.zero_()
        self._shortened.zero_()
        self._since = 0
        return mean, shortened

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"mean": self._mean.clone(), "steps": self._steps}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._mean.copy_(state["mean"])
        self._steps = state["steps"]


class Watch:
    """Turns readings into warnings that say what to change; each once, until it is over."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._lowest = math.inf
        self._collapsed = False
        self._risen = False

    def check(
        self, *, step: int, loss: float, spread: float, rank: float, full: int, shortened: int
    ) -> tuple[str, ...]:
        """Warnings about a reading, one line each; `full` is the largest rank there could be."""
        warnings = []
        left = min(spread / MIN_SPREAD, rank / (MIN_RANK_SHARE * full))
        collapsed = step >= _SETTLED and left < (_RECOVERED if self._collapsed else 1.0)
        if collapsed and not self._collapsed:
            optimizer = self._config.optimizer
            warnings.append(
                f"the embeddings are collapsing by step {step}: spread {spread:.2f} (limit"
                f" {MIN_SPREAD:g}), effective rank {rank:.1f} (limit {MIN_RANK_SHARE * full:.1f} of"
                f" {full}); lower the {optimizer.name} learning rate"
                f" {optimizer.lr:g} (try {optimizer.lr / 3:.2g}), raise tau_base"
                f" {self._config.tau_base:g} towards 0.996, or give larger batches"
            )
        risen = step >= _SETTLED and loss > LOSS_RISE * max(self._lowest, 0.05)
        if risen and not self._risen:
            warnings.append(
                f"the loss rose to {loss:.3f} by step {step} from {self._lowest:.3f} at its lowest;"
                " if it stays there, lower the learning rate or lengthen warmup_epochs"
            )
        if shortened:
            warnings.append(
                f"{shortened} gradient(s) before step {step} were over"
                f" {self._config.optimizer.spike_factor:g} times as long as usual and were"
                " shortened; if that goes on, lower the learning rate"
            )
        self._lowest = min(self._lowest, loss)
        self._collapsed, self._risen = collapsed, risen
        return tuple(warnings)


def refuse_no_number(
    loss: float, step: int, names: list[str], config: TrainConfig, report: Path
) -> None:
    """Stops a run whose loss is not finite.

    Args:
        loss: of that step.
        step: 1 for the first.
        names: of the step's images; written to `report`.
        config: of the run.
        report: a file.

    Raises:
        InvalidConfig: naming the first images, and what to change.
    """
    report.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    optimizer = config.optimizer
    raise InvalidConfig(
        f"loss became {loss} at step {step}, on {', '.join(names[:3])} and others (all"
        f" {len(names)} in {report}); lower the {optimizer.name} learning rate {optimizer.lr:g}"
        f" (try {optimizer.lr / 3:.2g}) or set precision to fp32, and resume"
    )
