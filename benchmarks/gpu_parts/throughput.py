"""Item 2: images a second of the step, against its limit and lightly; model FLOPs utilisation."""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from gpu_parts.rows import Asked, Row, at_least
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode
from train_throughput import bare_steps, our_steps

from byol_training.config import TrainConfig
from byol_training.machine import choose_machine
from byol_training.pretrain import build_model
from byol_training.recipes import load_recipe
from harness import PEER_PYTHON, Peer, interleaved

PEAK_TFLOPS = {
    "H100 80GB HBM3": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}
"""Dense bf16, by a part of the device's name, from NVIDIA's data sheets."""


def resnet18_at_32(asked: Asked) -> list[Row]:
    """ResNet-18 with the 3x3 stem, recipe `cifar`; lightly beside it."""
    rows = []
    for batch in (16,) if asked.quick else (256, 512, 1024):
        config = dataclasses.replace(load_recipe("cifar").config, batch_size=batch)
        rows += _measure(asked, f"ResNet-18 at 32, batch {batch}", config, 32)
    return rows


def resnet50_at_224(asked: Asked) -> list[Row]:
    """ResNet-50, recipe `photos`, from stored images of 256 pixels."""
    config = load_recipe("photos").config
    size, stored = (32, 40) if asked.quick else (224, 256)
    batch = 8 if asked.quick else 256
    config = dataclasses.replace(config, batch_size=batch, encoder="resnet50", image_size=size)
    return _measure(asked, f"ResNet-50 at {size}, batch {config.batch_size}", config, stored)


def lightly_at_32(asked: Asked) -> list[Row]:
    """Lightly's recipe, and ours at the same batch, in turn."""
    if not PEER_PYTHON.exists():
        raise ImportError("no lightly: set PEER_PYTHON to a Python that has it and torch")
    batch = 16 if asked.quick else 256
    config = dataclasses.replace(load_recipe("cifar").config, batch_size=batch)
    pixels = _pixels(2 * batch, 32)
    np.save(asked.scratch / "pixels.npy", pixels[:batch])
    setup: dict[str, Any] = {
        "pixels": str(asked.scratch / "pixels.npy"),
        "hidden": 4096,
        "out": 256,
    }
    steps = 1 if asked.quick else 10
    machine = choose_machine(asked.device, "bf16")
    with ExitStack() as stack:
        peer = stack.enter_context(Peer("lightly_peer.py", **setup))
        candidates: dict[str, Callable[[], float]] = {
            "ours": our_steps(pixels, config, machine, steps),
            "lightly": lambda: float(peer.ask(steps=steps)["images_per_s"]),
        }
        found = interleaved(candidates, unit="images/s", repeats=2 if asked.quick else 5)
    theirs = found["lightly"].median
    return [
        Row(what=f"lightly, ResNet-18 at 32, batch {batch}", value=theirs, unit="images/s"),
        at_least("ours over lightly", found["ours"].median / theirs, 5),
    ]


def _measure(asked: Asked, name: str, config: TrainConfig, stored: int) -> list[Row]:
    machine = choose_machine(asked.device, "bf16")
    pixels = _pixels(2 * config.batch_size, stored)
    steps, repeats = (1, 2) if asked.quick else (20, 5)
    candidates = {
        "ours": our_steps(pixels, config, machine, steps),
        "bare": bare_steps(config, machine, steps),
    }
    if asked.on_gpu:
        graphs = dataclasses.replace(config, compile="graphs")
        candidates["ours, CUDA graphs"] = our_steps(pixels, graphs, machine, steps)
        candidates["bare, CUDA graphs"] = bare_steps(graphs, machine, steps)
    found = interleaved(candidates, unit="images/s", repeats=repeats)
    rows = [
        Row(what=f"{name}: {each}", value=rate.median, unit="images/s")
        for each, rate in found.items()
    ]
    best = max(found, key=lambda each: found[each].median if each.startswith("ours") else 0.0)
    limit = max(rate.median for each, rate in found.items() if each.startswith("bare"))
    rows.append(at_least(f"{name}: {best} over the best bare", found[best].median / limit, 0.9))
    return [*rows, _utilisation(asked, name, config, found[best].median)]


def _utilisation(asked: Asked, name: str, config: TrainConfig, images_per_s: float) -> Row:
    what = f"{name}: model FLOPs utilisation"
    if not asked.on_gpu:
        return Row(what=what, value=None, note="of a GPU only")
    device = torch.cuda.get_device_name()
    peak = next((peak for part, peak in PEAK_TFLOPS.items() if part in device), None)
    if peak is None:
        return Row(what=what, value=None, note=f"the peak of {device} is not in PEAK_TFLOPS")
    used = flops_per_image(config) * images_per_s / (1e12 * peak)
    return Row(what=what, value=100 * used, unit="%", note=f"of {peak:g} TFLOPS, bf16, dense")


def flops_per_image(config: TrainConfig) -> float:
    """Of forward and backward of all networks, both views; counted, not estimated."""
    batch = 2
    model = build_model(config).train()
    views = torch.randn(2, batch, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter:
        loss, _ = model(*views)
        loss.backward()
    return float(counter.get_total_flops()) / batch


def _pixels(count: int, side: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


CHECKS = {
    "ResNet-18 at 32": resnet18_at_32,
    "ResNet-50 at 224": resnet50_at_224,
    "lightly": lightly_at_32,
}
