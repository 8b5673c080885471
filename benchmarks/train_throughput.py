"""BYOL training throughput: ours, the bare step of the same network, and lightly's recipe.

CIFAR-10 images (or random ones where there are none), ResNet-18 with the small-image stem, heads of
4096 and 256, recipe `cifar`. `bare` is the forward and backward of both networks on random tensors,
in the same precision and layout, compiled likewise: no views, no input, no optimiser, no metrics.
`lightly` runs as its documentation shows, in fp32 and the default layout, with its own optimiser
and transform.
"""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from byol_training.config import Precision, TrainConfig
from byol_training.data import images_from_arrays, list_images, load_images
from byol_training.feed import Feed
from byol_training.guards import SpikeGuard
from byol_training.lars import build_optimizer
from byol_training.machine import Machine, bf16_in_hardware, choose_machine, compile_networks
from byol_training.meter import Meter
from byol_training.parallel import World
from byol_training.pretrain import build_model, gradients
from byol_training.recipes import load_recipe
from harness import Options, Peer, Rate, interleaved, options, report

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10" / "test.tar"
SIZE = 32


def main() -> None:
    """Measures and prints."""
    chosen = options(__doc__ or "")
    batch, steps, repeats = (32, 1, 3) if chosen.quick else (256, 1, 3)
    config = dataclasses.replace(load_recipe("cifar").config, batch_size=batch)
    pixels = real_images(max(batch * 2, 512))
    candidates: dict[str, Callable[[], float]] = {}
    for precision in precisions():
        machine = choose_machine("auto", precision)
        candidates[f"ours {precision}"] = our_steps(pixels, config, machine, steps)
        candidates[f"bare {precision}"] = bare_steps(config, machine, steps)
    if not chosen.peers:
        finish(chosen, interleaved(candidates, unit="images/s", repeats=repeats), batch)
        return
    with tempfile.TemporaryDirectory() as scratch:
        np.save(f"{scratch}/pixels.npy", pixels[:batch])
        pixels_file = f"{scratch}/pixels.npy"
        with Peer("lightly_peer.py", pixels=pixels_file, hidden=4096, out=256) as lightly:
            candidates["lightly"] = lambda: float(lightly.ask(steps=steps)["images_per_s"])
            finish(chosen, interleaved(candidates, unit="images/s", repeats=repeats), batch)


def precisions() -> list[Precision]:
    """Both, where the hardware has bf16."""
    has_bf16 = torch.cuda.is_available() or bf16_in_hardware()
    return ["bf16", "fp32"] if has_bf16 else ["fp32"]


def our_steps(
    pixels: NDArray[np.uint8], config: TrainConfig, machine: Machine, steps: int
) -> Callable[[], float]:
    """All that `pretrain` does in a step, and a reading of its metrics after each few of them.

    Input, views, both networks, the guard, the optimiser and the average; `pretrain` itself reads
    the metrics seldomer.
    """
    model = build_model(config).to(machine.device).train()
    model.to(memory_format=torch.channels_last)
    compile_networks(model, config.compile, machine)
    optimizer = build_optimizer(model.trained_parameters(), config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    guard = SpikeGuard(model.trained_parameters(), config.optimizer.spike_factor)
    feed = Feed(images_from_arrays(pixels), config, config.batch_size, machine.device)
    meter = Meter(config, feed, guard, World(), done=0, steps=None, seconds=0.0)
    numbers = itertools.count()

    def measure() -> float:
        started = time.perf_counter()
        for number in itertools.islice(numbers, steps):
            loss, projections = gradients(model, feed, number, 1, machine)
            guard.apply()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.update_target(0.99)
            meter.add(loss)
        meter.read(number + 1, projections)  # waits for the device
        return steps * config.batch_size / (time.perf_counter() - started)

    return measure


def bare_steps(config: TrainConfig, machine: Machine, steps: int) -> Callable[[], float]:
    """Forward and backward on tensors that are there already: the limit."""
    model = build_model(config).to(machine.device).to(memory_format=torch.channels_last).train()
    compile_networks(model, config.compile, machine)
    side = config.image_size
    views = torch.randn(2, config.batch_size, 3, side, side, device=machine.device)
    first, second = (each.contiguous(memory_format=torch.channels_last) for each in views)

    def measure() -> float:
        started = time.perf_counter()
        for _ in range(steps):
            with machine.autocast():
                loss, _ = model(first, second)
            model.zero_grad(set_to_none=True)
            loss.backward()
        wait(machine)
        return steps * config.batch_size / (time.perf_counter() - started)

    return measure


def wait(machine: Machine) -> None:
    """Until the device has done all it was given."""
    if machine.device.type == "cuda":
        torch.cuda.synchronize(machine.device)


def real_images(count: int) -> NDArray[np.uint8]:
    """uint8 [count, 32, 32, 3]: CIFAR-10's, or random where they are not here."""
    if not CIFAR.exists():
        return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    return load_images(CIFAR, SIZE, only=list_images(CIFAR)[:count]).pixels


def finish(chosen: Options, results: dict[str, Rate], batch: int) -> None:
    """The ratios that the project's targets speak of."""
    best = max(precisions(), key=lambda name: results[f"ours {name}"].median)
    ratios = {"step_vs_bare": results[f"ours {best}"].median / results[f"bare {best}"].median}
    if "lightly" in results:
        ratios["step_vs_lightly"] = results[f"ours {best}"].median / results["lightly"].median
        ratios["step_vs_lightly_fp32"] = results["ours fp32"].median / results["lightly"].median
    facts = {
        "network": "ResNet-18, 3x3 stem",
        "images": f"{SIZE}x{SIZE}",
        "batch": batch,
        "ratios of": best,
        "auto takes": "bf16" if choose_machine("auto", "auto").bf16 else "fp32",
    }
    report("train_throughput", chosen, results, ratios, packages=["torch"], facts=facts)


if __name__ == "__main__":
    main()
