"""Counts, times, and keeps a run with a time budget in line with the clock."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from byol_training.byol import effective_rank, spread
from byol_training.config import TrainConfig
from byol_training.feed import Feed
from byol_training.guards import SpikeGuard, Watch
from byol_training.parallel import World

_RANK_ROWS = 512  # embeddings that the effective rank is taken of: its cost is cubic
_CLOCK_SECONDS = 1.0  # between readings where the clock rules


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a reading tells; also, with lr and tau, a line of metrics.jsonl."""

    step: int
    """Steps done."""
    steps: int
    """Steps planned; changes while a run with `max_seconds` goes on."""
    epoch: float
    """Passes over the images done."""
    epochs: float
    """Passes planned."""
    loss: float
    """Mean since the last reading; 0..4 a direction, so 0..8 for the symmetrised loss."""
    spread: float
    """Of the online projections, see `byol.spread`: towards 0 is collapse."""
    effective_rank: float
    """Of the online projections, see `byol.effective_rank`: towards 1 is collapse."""
    gradient: float
    """Mean length of the gradient since the last reading."""
    images_per_s: float
    """Since the last reading."""
    seconds: float
    """Training time so far, from before any resume on."""
    seconds_left: float
    """Estimate."""
    warnings: tuple[str, ...] = ()
    """What is wrong, one line each, with what to change."""


class LostRun(Exception):
    """The loss of a step is no number."""

    def __init__(self, loss: float, step: int) -> None:
        super().__init__(f"loss {loss} at step {step}")
        self.loss = loss
        self.step = step
        """1 for the first."""


class Meter:
    """Readings of a run.

    Args:
        config: of the run.
        feed: what it is fed by.
        guard: knows the gradients.
        world: whose losses are averaged; the leading process's clock counts.
        done: steps that a resumed run has behind it.
        steps: its plan; None for a fresh run.
        seconds: its training time.
    """

    def __init__(
        self,
        config: TrainConfig,
        feed: Feed,
        guard: SpikeGuard,
        world: World,
        *,
        done: int,
        steps: int | None,
        seconds: float,
    ) -> None:
        self._config, self._feed, self._guard, self._world = config, feed, guard, world
        self._watch = Watch(config)
        self.steps = steps or config.max_steps or config.epochs * feed.steps_per_epoch
        now = time.perf_counter()
        self._start = now - seconds
        self._losses: list[Tensor] = []
        self._last_step, self._last_time = done, now
        self._pace_step, self._pace_time = done, now
        self._due = self._next_due(done, rate=0.0)

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return time.perf_counter() - self._start

    def add(self, loss: Tensor) -> None:
        """Keeps a step's loss on the device: reading each would make the host wait for it."""
        self._losses.append(loss.detach())

    def is_due(self, step: int) -> bool:
        """A reading every `log_every` steps, at the end, and each second if the clock rules."""
        return step >= min(self._due, self.steps)

    def read(self, step: int, projections: Tensor) -> Progress:
        """What happened since the last reading; waits for the device.

        Raises:
            LostRun: one of the losses is not finite.
        """
        losses = self._world.mean(torch.stack(self._losses)).tolist()
        for number, loss in enumerate(losses, start=self._last_step + 1):
            if not math.isfinite(loss):
                raise LostRun(loss, number)
        now = time.perf_counter()
        rate = len(losses) / max(now - self._last_time, 1e-9)
        pace = self._pace(step, now, rate)
        self.steps = self._world.decide(self._plan(step, now, pace))
        self._due = self._world.decide(self._next_due(step, rate))
        self._losses, self._last_step, self._last_time = [], step, now
        per_epoch, loss = self._feed.steps_per_epoch, sum(losses) / len(losses)
        gradient, shortened = self._guard.read()
        used = float(spread(projections))
        looked_at = projections[:_RANK_ROWS]
        rank = float(effective_rank(looked_at))
        return Progress(
            step=step,
            steps=self.steps,
            epoch=step / per_epoch,
            epochs=self.steps / per_epoch,
            loss=loss,
            spread=used,
            effective_rank=rank,
            gradient=gradient,
            images_per_s=rate * self._feed.batch_size,
            seconds=now - self._start,
            seconds_left=(self.steps - step) / pace,
            warnings=self._watch.check(
                step=step,
                loss=loss,
                spread=used,
                rank=rank,
                full=min(looked_at.shape),
                shortened=shortened,
            ),
        )

    def _next_due(self, step: int, rate: float) -> int:
        """In steps, so that all processes read at the same one."""
        every = self._config.log_every
        due = step + every - step % every
        if self._config.max_seconds is None:
            return due
        return min(due, step + max(1, int(rate * _CLOCK_SECONDS)))

    def _pace(self, step: int, now: float, otherwise: float) -> float:
        """Steps a second from the second reading on: the first steps pay for warming up."""
        if self._pace_step == self._last_step:
            return otherwise
        return (step - self._pace_step) / max(now - self._pace_time, 1e-9)

    def _plan(self, step: int, now: float, pace: float) -> int:
        """Under `max_seconds`, as many steps as the pace so far leaves time for.

        Done again at every reading, so that the last plan is right whatever else the machine does;
        the schedules are smooth, so that a plan that moves a little moves them a little.
        """
        if self._config.max_seconds is None:
            return self.steps
        left = self._config.max_seconds - (now - self._start)
        return step + max(0, int(left * pace))
