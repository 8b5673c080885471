"""The training loop: images and a configuration in, a run directory and a model out.

A run directory holds config.json, metrics.jsonl (a line per reading), rejected.jsonl (files that
could not be read), samples.npy (images for export to check itself on) and checkpoints/.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from byol_serving.errors import InvalidConfig, InvalidSource
from byol_training import checkpoint as checkpoints
from byol_training import schedules
from byol_training.byol import Byol, spread
from byol_training.config import TrainConfig
from byol_training.data import Images
from byol_training.encoders import build_encoder
from byol_training.feed import Feed
from byol_training.lars import build_optimizer
from byol_training.machine import choose_machine

# Settings that a resumed run may change: they leave the weights as they would have been
# (device and precision: to within rounding).
_FREE_ON_RESUME = ("device", "precision", "log_every", "checkpoint_every_epochs")


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
    images_per_s: float
    """Since the last reading."""
    seconds: float
    """Training time so far, from before any resume on."""
    seconds_left: float
    """Estimate."""


SAMPLES = 64
SAMPLES_FILE = "samples.npy"
"""Some of the run's images, uint8 [n, S, S, 3]: what export measures parity on."""


class Stop(Exception):
    """Raise it in `on_step` to end a run early: a checkpoint is written and the model returned."""


def pretrain(
    images: Images,
    config: TrainConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    on_step: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[Byol, int], None] | None = None,
) -> Byol:
    """Pretrains an encoder with BYOL (paper, section 3.1 and algorithm 1).

    Args:
        images: what to learn from; labels are not looked at.
        config: all settings.
        run_dir: created if missing.
        resume: go on from the newest checkpoint in `run_dir`, if it has one. A run stopped and
            resumed ends with the very weights of one that was not (on a CPU bit for bit, except
            under `max_seconds`, whose plan follows the clock).
        on_step: called at every reading of the loss (`config.log_every`).
        on_epoch: called with the model and the steps done after every pass over the images, and at
            the end; it must leave weights, modes and torch's global generators as they are.

    Returns:
        The model, in train mode, on the device it was trained on.

    Raises:
        InvalidSource: too few images for a batch, or a damaged checkpoint.
        InvalidConfig: a device that is not there; a run directory in use; other settings or images
            than those of the run to resume; a loss that is no longer finite.
    """
    machine = choose_machine(config.device, config.precision)
    batch_size = _batch_size(images, config)
    torch.manual_seed(config.seed)
    model = build_model(config).to(machine.device).train()
    model.to(memory_format=torch.channels_last)  # convolutions are fastest so, in bf16 above all
    optimizer = build_optimizer(model.trained_parameters(), config.optimizer)
    feed = Feed(images, config, batch_size, machine.device)
    run = _Run(run_dir, images, config, model, optimizer, resume=resume)
    meter = _Meter(config, feed, done=run.step, steps=run.steps, seconds=run.seconds)
    save_every = config.checkpoint_every_epochs * feed.steps_per_epoch

    step, saved = run.step, run.step
    try:
        while step < meter.steps:
            lr = _set_learning_rate(optimizer, config, step, meter.steps, feed)
            first, second = feed.views(step)
            with machine.autocast():
                loss, projections = model(first, second)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            tau = schedules.tau(step, meter.steps, config.tau_base)
            model.update_target(tau)
            step += 1
            meter.add(loss)
            if on_epoch is not None and (step % feed.steps_per_epoch == 0 or step >= meter.steps):
                on_epoch(model, step)
            due = step % save_every == 0
            if due or meter.is_due(step):
                progress = meter.read(step, projections)
                run.log(progress, lr=lr, tau=tau)
                if due:
                    run.save(step, meter.steps, progress.seconds)
                    saved = step
                if on_step is not None:
                    on_step(progress)
    except Stop:
        pass
    if saved != step or step == 0:
        run.save(step, meter.steps, meter.seconds)
    return model


def build_model(config: TrainConfig) -> Byol:
    """Online and target networks with fresh weights, drawn from torch's global generator."""
    encoder = build_encoder(config.encoder, config.stem)
    return Byol(encoder, config.head, symmetrised=config.symmetrised)


def _batch_size(images: Images, config: TrainConfig) -> int:
    """The configured size, or all images where there are a few less than that."""
    if len(images) < max(2, config.batch_size / 2):
        raise InvalidSource(
            f"{len(images)} images are too few for batches of {config.batch_size};"
            f" give at least {config.batch_size}, or set batch_size to {len(images) // 2} or less"
        )
    return min(config.batch_size, len(images))


def _set_learning_rate(
    optimizer: Optimizer, config: TrainConfig, step: int, steps: int, feed: Feed
) -> float:
    settings = config.optimizer
    warmup = schedules.warmup_steps(steps, feed.steps_per_epoch, settings.warmup_epochs)
    lr = schedules.learning_rate(step, steps, warmup, base=settings.lr, batch_size=feed.batch_size)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


class _Meter:
    """Counts, times, and under `max_seconds` keeps the plan in line with the clock."""

    def __init__(
        self, config: TrainConfig, feed: Feed, *, done: int, steps: int | None, seconds: float
    ) -> None:
        self.config = config
        self.feed = feed
        self.steps = steps or config.max_steps or config.epochs * feed.steps_per_epoch
        self._start = time.perf_counter() - seconds
        self._loss: Tensor | None = None
        self._last_step, self._last_time = done, time.perf_counter()
        self._pace_step, self._pace_time = done, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def add(self, loss: Tensor) -> None:
        """Sums on the device: reading each loss would make the host wait for every step."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def is_due(self, step: int) -> bool:
        """A reading every `log_every` steps, at the end, and each second if the clock rules."""
        if step % self.config.log_every == 0 or step >= self.steps:
            return True
        on_clock = self.config.max_seconds is not None
        return on_clock and time.perf_counter() - self._last_time > 1.0

    def read(self, step: int, projections: Tensor) -> Progress:
        assert self._loss is not None
        count = step - self._last_step
        loss = float(self._loss) / count  # waits for the device
        if not math.isfinite(loss):
            settings = self.config.optimizer
            raise InvalidConfig(
                f"loss became {loss} by step {step}; lower the {settings.name} learning rate"
                f" {settings.lr:g} (try {settings.lr / 3:.2g}) or set precision to fp32"
            )
        now = time.perf_counter()
        rate = count / max(now - self._last_time, 1e-9)
        self._fit_to_budget(step, now)
        self._loss, self._last_step, self._last_time = None, step, now
        per_epoch = self.feed.steps_per_epoch
        return Progress(
            step=step,
            steps=self.steps,
            epoch=step / per_epoch,
            epochs=self.steps / per_epoch,
            loss=loss,
            spread=float(spread(projections)),
            images_per_s=rate * self.feed.batch_size,
            seconds=now - self._start,
            seconds_left=(self.steps - step) / self._pace(step, now, rate),
        )

    def _pace(self, step: int, now: float, otherwise: float) -> float:
        """Steps a second from the second reading on: the first steps pay for warming up."""
        if self._pace_step == self._last_step:
            return otherwise
        return (step - self._pace_step) / max(now - self._pace_time, 1e-9)

    def _fit_to_budget(self, step: int, now: float) -> None:
        """Plans as many steps as the pace so far leaves time for.

        Done again at every reading, so that the last plan is right whatever else the machine does;
        the schedules are smooth, so that a plan that moves a little moves them a little.
        """
        if self.config.max_seconds is None:
            return
        left = self.config.max_seconds - (now - self._start)
        rate = (step - self._last_step) / max(now - self._last_time, 1e-9)
        self.steps = step + max(0, int(left * self._pace(step, now, rate)))


class _Run:
    """The run directory: what is on disk, and the state it was left in."""

    def __init__(
        self,
        folder: Path,
        images: Images,
        config: TrainConfig,
        model: Byol,
        optimizer: Optimizer,
        *,
        resume: bool,
    ) -> None:
        self.folder, self.config, self.fingerprint = folder, config, images.fingerprint
        self.model, self.optimizer = model, optimizer
        self.step, self.seconds = 0, 0.0
        self.steps: int | None = None
        found = checkpoints.list_checkpoints(folder / "checkpoints")
        if found and not resume:
            raise InvalidConfig(
                f"{folder} holds a run already ({found[-1].name});"
                " resume it or choose another directory"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if found:
            self._restore(found[-1])
        _write(folder / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
        rejected = [json.dumps(dataclasses.asdict(r)) + "\n" for r in images.rejected]
        _write(folder / "rejected.jsonl", "".join(rejected))
        rows = np.linspace(0, len(images) - 1, min(SAMPLES, len(images))).astype(int)
        np.save(folder / SAMPLES_FILE, images.pixels[rows])
        self._metrics = folder / "metrics.jsonl"
        _write(self._metrics, "".join(self._lines_so_far()))

    def _restore(self, path: Path) -> None:
        device = next(self.model.parameters()).device
        state = checkpoints.load_checkpoint(path, device)
        _check_same(TrainConfig.from_dict(state.config), self.config)
        if state.fingerprint != self.fingerprint:
            raise InvalidConfig(
                f"{self.folder} was begun on other images (fingerprint {state.fingerprint[:12]},"
                f" now {self.fingerprint[:12]}); give the same ones or choose another directory"
            )
        self.model.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        checkpoints.restore_rng(state.rng)
        self.step, self.steps, self.seconds = state.step, state.steps, state.seconds

    def _lines_so_far(self) -> list[str]:
        """Lines up to the restored step: those after it are about to be written again."""
        if self.step == 0 or not self._metrics.exists():
            return []
        lines = self._metrics.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("}\n")]
        return [line for line in whole if json.loads(line)["step"] <= self.step]

    def log(self, progress: Progress, **more: float) -> None:
        with self._metrics.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(progress) | more) + "\n")

    def save(self, step: int, steps: int, seconds: float) -> None:
        state = checkpoints.Checkpoint(
            config=self.config.to_dict(),
            fingerprint=self.fingerprint,
            step=step,
            steps=steps,
            seconds=seconds,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            rng=checkpoints.capture_rng(),
        )
        checkpoints.save_checkpoint(self.folder / "checkpoints", state)


def _check_same(before: TrainConfig, now: TrainConfig) -> None:
    """Refuses to go on with settings that would bend the run."""
    old, new = before.to_dict(), now.to_dict()
    changed = _differences(old, new)
    if changed:
        raise InvalidConfig(
            f"settings differ from those of the run to resume: {', '.join(changed)};"
            " keep them or choose another directory"
        )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{key} {old[key]} is now {new[key]}"
        for key in old
        if old[key] != new[key] and key not in _FREE_ON_RESUME
    ]


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
