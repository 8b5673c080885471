"""A time budget becomes a configuration: encoder, image size, batch size and length of the run.

This machine's own throughput is measured, from small encoders to large ones. The largest that sees
every image often enough within the budget is taken: more passes over small views teach more than a
few over large ones (the paper's accuracy still rises from 300 to 1000 passes).
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from byol_training.config import Stem, TrainConfig
from byol_training.data import images_from_arrays
from byol_training.feed import Feed
from byol_training.lars import build_optimizer
from byol_training.machine import choose_machine
from byol_training.pretrain import build_model, gradients
from byol_training.recipes import load_recipe
from byol_training.survey import Survey

WANTED_PASSES = 50
"""Over the images; with fewer, a smaller network learns more in the same time."""
_MEASURE_SHARE = 0.05  # of the budget that measuring may take
_MEASURE_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A network and the recipe that its other settings come from, in order of cost."""

    recipe: str
    encoder: str
    stem: Stem
    image_size: int


CANDIDATES = (
    Candidate(recipe="small", encoder="small", stem="small", image_size=32),
    Candidate(recipe="cifar", encoder="resnet18", stem="small", image_size=32),
    Candidate(recipe="photos", encoder="resnet18", stem="imagenet", image_size=96),
    Candidate(recipe="photos", encoder="resnet18", stem="imagenet", image_size=160),
    Candidate(recipe="photos", encoder="resnet50", stem="imagenet", image_size=160),
    Candidate(recipe="photos", encoder="resnet50", stem="imagenet", image_size=224),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run, and why."""

    config: TrainConfig
    reasons: list[str]
    """One line each, fit to be shown."""


def plan_budget(
    found: Survey,
    seconds: float,
    *,
    device: str = "auto",
    measure: Callable[[TrainConfig], float] | None = None,
) -> Plan:
    """Chooses a configuration that learns most of `found` in `seconds`.

    Args:
        found: how many images there are, and how large.
        seconds: for training, what is measured here included.
        device: where to train.
        measure: images a second of a configuration; by default, a few steps are timed.

    Returns:
        The plan; its `max_seconds` is what is left of the budget, so that schedules end with it.
    """
    started = time.monotonic()
    measure = measure or measure_rate
    batch_size = _batch_size(found.count)
    chosen, reasons, passes = None, [], 0.0
    for candidate in CANDIDATES:
        label = f"{candidate.encoder} at {candidate.image_size} pixels"
        if candidate.image_size > max(1.25 * found.short_side, CANDIDATES[0].image_size):
            reasons.append(f"{label}: the pictures are smaller ({found.short_side} pixels)")
            break
        if chosen is not None and time.monotonic() - started > _MEASURE_SHARE * seconds:
            reasons.append(f"{label}: not tried, measuring it would take too much of the budget")
            break
        config = _config(candidate, batch_size, device)
        rate = measure(config)
        would = rate * (seconds - (time.monotonic() - started)) / found.count
        reasons.append(f"{label}: {rate:,.0f} images/s, {would:,.1f} passes over the images")
        if chosen is not None and would < WANTED_PASSES:
            break
        chosen, passes = config, would
    assert chosen is not None
    left = max(1.0, seconds - (time.monotonic() - started))
    reasons.append(
        f"chosen: {chosen.encoder} at {chosen.image_size} pixels, batch {batch_size}, about"
        f" {passes:,.1f} passes in {left:,.0f} s: the largest with {WANTED_PASSES} passes or more,"
        " or the smallest"
    )
    return Plan(config=dataclasses.replace(chosen, max_seconds=left), reasons=reasons)


def measure_rate(config: TrainConfig) -> float:
    """Images a second of whole steps on this machine: views, networks, optimiser, average."""
    config = dataclasses.replace(config, batch_size=_MEASURE_BATCH)
    machine = choose_machine(config.device, config.precision)
    side = config.image_size
    noise = np.random.default_rng(0).integers(0, 256, (_MEASURE_BATCH, side, side, 3), np.uint8)
    feed = Feed(images_from_arrays(noise), config, _MEASURE_BATCH, machine.device)
    model = build_model(config).to(machine.device).train()
    model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model.trained_parameters(), config.optimizer)

    def step(number: int) -> None:
        loss, _ = gradients(model, feed, number, 1, machine)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_target(0.99)
        loss.item()  # waits for the device

    step(0)  # warms up
    started = time.perf_counter()
    step(1)
    if time.perf_counter() - started < 0.2:  # too short to be exact
        for number in range(2, 6):
            step(number)
        return 5 * _MEASURE_BATCH / (time.perf_counter() - started)
    return _MEASURE_BATCH / (time.perf_counter() - started)


def _config(candidate: Candidate, batch_size: int, device: str) -> TrainConfig:
    return dataclasses.replace(
        load_recipe(candidate.recipe).config,
        encoder=candidate.encoder,
        stem=candidate.stem,
        image_size=candidate.image_size,
        batch_size=batch_size,
        device=device,
    )


def _batch_size(count: int) -> int:
    """256 where that leaves 20 steps a pass, less for small sets; under 64 BYOL suffers."""
    for size in (256, 128, 64):
        if count >= 20 * size:
            return size
    return max(2, min(64, count // 2))
