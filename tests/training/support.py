"""Tiny runs, and what is compared of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byol_training.byol import Byol
from byol_training.config import HeadConfig, TrainConfig
from byol_training.data import Images, images_from_arrays
from byol_training.pretrain import Progress, Stop, pretrain
from byol_training.recipes import small_config

__all__ = ["assert_same", "metrics", "pretrain", "stop_at", "tiny_config", "tiny_images"]


def tiny_images(count: int = 40, seed: int = 0) -> Images:
    rng = np.random.default_rng(seed)
    return images_from_arrays(rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))


def tiny_config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "image_size": 16,
        "batch_size": 8,
        "epochs": 4,
        "head": HeadConfig(hidden=16, out=8),
        "device": "cpu",
        "precision": "fp32",
        "log_every": 3,
        "checkpoint_every_epochs": 1,
    }
    return small_config(**settings | changes)


def stop_at(step: int) -> Callable[[Progress], None]:
    def on_step(progress: Progress) -> None:
        if progress.step >= step:
            raise Stop

    return on_step


def assert_same(one: Byol, other: Byol) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
