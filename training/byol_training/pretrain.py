"""The training loop: images and a configuration in, a run directory and a model out.

A run directory holds config.json, metrics.jsonl (a line per reading), rejected.jsonl (files that
could not be read), samples.npy (images for export to check itself on) and checkpoints/.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from byol_serving.errors import InvalidSource
from byol_training import parallel, schedules
from byol_training.byol import Byol
from byol_training.checkpoint import list_checkpoints
from byol_training.config import Precision, TrainConfig
from byol_training.data import Images
from byol_training.encoders import build_encoder, zero_last_norms
from byol_training.feed import Feed
from byol_training.guards import SpikeGuard, refuse_no_number
from byol_training.lars import build_optimizer
from byol_training.machine import Machine, choose_machine, compile_networks
from byol_training.meter import LostRun, Meter, Progress
from byol_training.run_dir import SAMPLES_FILE, RunDirectory
from byol_training.weights import start_from

__all__ = ["SAMPLES_FILE", "Progress", "Stop", "build_model", "gradients", "pretrain"]


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

    Under torchrun all processes call this with the same arguments; see `parallel`.

    Args:
        images: what to learn from; labels are not looked at.
        config: all settings.
        run_dir: created if missing.
        resume: go on from the newest checkpoint in `run_dir`, if it has one. A run stopped and
            resumed ends with the very weights of one that was not (on a CPU bit for bit, except
            under `max_seconds`, whose plan follows the clock).
        on_step: called in the leading process at every reading of the loss (`config.log_every`).
        on_epoch: called there with the model and the steps done after every pass over the images,
            and at the end; it must leave weights, modes and torch's global generators as they are.

    Returns:
        The model, in train mode, on the device it was trained on.

    Raises:
        InvalidSource: too few images for a batch, none that differ, or a damaged checkpoint.
        InvalidConfig: a device that is not there; a run directory in use; other settings or images
            than those of the run to resume; a loss that is no longer finite.
        StoreError: a checkpoint cannot be written; those before it are whole.
    """
    world = parallel.current()
    goes_on = resume and bool(list_checkpoints(run_dir / "checkpoints"))
    machine = _machine(config, run_dir if goes_on else None, world)
    config = replace(config, precision="bf16" if machine.bf16 else "fp32")
    feed = Feed(images, config, _batch_size(images, config, world), machine.device, world)
    # A run that goes on has its own weights: those it started from may be gone.
    trained = _set_up(replace(config, start_from="") if goes_on else config, machine, world)
    model, optimizer, guard = trained.model, trained.optimizer, trained.guard
    run = RunDirectory(run_dir, images, config, model, optimizer, guard, world, resume=resume)
    meter = Meter(config, feed, guard, world, done=run.step, steps=run.steps, seconds=run.seconds)
    save_every = config.checkpoint_every_epochs * feed.steps_per_epoch

    step, saved, stopped = run.step, run.step, False
    while step < meter.steps and not stopped:
        lr = _set_learning_rate(optimizer, config, step, meter.steps, feed)
        loss, projections = gradients(trained.network, feed, step, config.accumulate, machine)
        guard.apply()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tau = _tau(config, step, meter.steps, feed)
        model.update_target(tau)  # once a step, however many micro-batches it had
        step += 1
        meter.add(loss)
        if on_epoch is not None and (step % feed.steps_per_epoch == 0 or step >= meter.steps):
            stopped = world.decide(world.leads and _stops(on_epoch, model, step))
        due = step % save_every == 0
        if due or meter.is_due(step):
            progress = _read(meter, step, projections, feed, config, run)
            told = world.leads and _tell(run, progress, on_step, lr=lr, tau=tau)
            stopped = world.decide(told) or stopped
            if due and not stopped:
                run.save(step, meter.steps, progress.seconds)
                saved = step
    if saved != step or step == 0:
        run.save(step, meter.steps, meter.seconds)
    run.close()
    return model


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """What a step changes."""

    model: Byol
    network: nn.Module
    """The model as it is called: among several processes its backward pass averages gradients."""
    optimizer: Optimizer
    guard: SpikeGuard


def _set_up(config: TrainConfig, machine: Machine, world: parallel.World) -> _Trained:
    """The networks on their machine, and what moves them."""
    torch.manual_seed(config.seed)
    model = build_model(config).to(machine.device).train()
    model.to(memory_format=torch.channels_last)  # convolutions are fastest so, in bf16 above all
    parallel.synchronise_batch_norm(model, world, machine.device)
    compile_networks(model, config.compile, machine)
    return _Trained(
        model=model,
        network=world.wrap(model, machine.device),
        optimizer=build_optimizer(
            model.trained_parameters(), config.optimizer, predictor=model.predictor.parameters()
        ),
        guard=SpikeGuard(model.trained_parameters(), config.optimizer.spike_factor),
    )


def build_model(config: TrainConfig) -> Byol:
    """Online and target networks with fresh weights, drawn from torch's global generator."""
    encoder = build_encoder(config.encoder, config.stem, image_size=config.image_size)
    if config.zero_init:
        zero_last_norms(encoder)
    if config.start_from:
        start_from(encoder, config.start_from, name=config.encoder, image_size=config.image_size)
    return Byol(
        encoder, config.head, symmetrised=config.symmetrised, target_norm=config.target_norm
    )


def _machine(config: TrainConfig, goes_on: Path | None, world: parallel.World) -> Machine:
    """This process's device, and the precision that the leading one chose."""
    machine = choose_machine(config.device, _precision(config, goes_on))
    return replace(machine, bf16=world.decide(machine.bf16))


def _precision(config: TrainConfig, goes_on: Path | None) -> Precision:
    """What was asked for; a run that goes on keeps what `auto` had chosen."""
    if goes_on is None or config.precision != "auto":
        return config.precision
    before = json.loads((goes_on / "config.json").read_text())
    return TrainConfig.from_dict(before).precision


def gradients(
    network: nn.Module, feed: Feed, step: int, micro_batches: int, machine: Machine
) -> tuple[Tensor, Tensor]:
    """Views, forward and backward of a step: its gradients are left in the parameters.

    Returns:
        Its loss, and the projections of its last micro-batch, both detached.
    """
    total: Tensor | None = None
    for micro in range(micro_batches):
        views = feed.views(step, micro)
        with parallel.without_sync(network, last=micro + 1 == micro_batches):
            with machine.autocast():
                loss, projections = network(*views)
            loss = loss / micro_batches
            loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total, projections


def _tell(
    run: RunDirectory,
    progress: Progress,
    on_step: Callable[[Progress], None] | None,
    **more: float,
) -> bool:
    """Logs a reading and shows it; whether the run is to stop."""
    run.log(progress, **more)
    return on_step is not None and _stops(on_step, progress)


def _stops(hook: Callable[..., None], *args: object) -> bool:
    """Calls a hook; whether it asked to stop."""
    try:
        hook(*args)
    except Stop:
        return True
    return False


def _read(
    meter: Meter,
    step: int,
    projections: Tensor,
    feed: Feed,
    config: TrainConfig,
    run: RunDirectory,
) -> Progress:
    try:
        return meter.read(step, projections)
    except LostRun as lost:
        names = feed.names(lost.step - 1)
        refuse_no_number(lost.loss, lost.step, names, config, run.folder / "no-number.txt")
        raise


def _batch_size(images: Images, config: TrainConfig, world: parallel.World) -> int:
    """The configured size, or all images where there are a few less than that.

    Raises:
        InvalidSource: too few images, or none that differ.
        InvalidConfig: no batch that the processes could share.
    """
    if len(images) < max(2, config.batch_size / 2):
        raise InvalidSource(
            f"{len(images)} images are too few for batches of {config.batch_size};"
            f" give at least {config.batch_size}, or set batch_size to {len(images) // 2} or less"
        )
    size = min(config.batch_size, len(images) - len(images) % config.accumulate)
    parallel.check_parts(world, size, config.accumulate)
    _refuse_identical(images)
    return size


def _refuse_identical(images: Images) -> None:
    """Raises InvalidSource where all images are one: the first that differs ends the search."""
    first = images.pixels[0]
    if not any(np.any(images.pixels[row] != first) for row in range(1, len(images))):
        raise InvalidSource(
            f"all {len(images)} images are identical, so that there is nothing to tell apart;"
            " give different ones"
        )


def _set_learning_rate(
    optimizer: Optimizer, config: TrainConfig, step: int, steps: int, feed: Feed
) -> float:
    settings = config.optimizer
    warmup = schedules.warmup_steps(steps, feed.steps_per_epoch, settings.warmup_epochs)
    lr = schedules.learning_rate(step, steps, warmup, base=settings.lr, batch_size=feed.batch_size)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    return lr


def _tau(config: TrainConfig, step: int, steps: int, feed: Feed) -> float:
    factor = feed.batch_size / config.tau_batch if config.tau_batch else 1.0
    return schedules.tau(step, steps, config.tau_base, final=config.tau_final, batch_factor=factor)
