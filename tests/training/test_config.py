"""Configurations survive JSON; what is wrong in one is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from byol_serving.errors import InvalidConfig
from byol_training.config import AugmentConfig, HeadConfig, OptimizerConfig, TrainConfig, ViewConfig
from byol_training.recipes import small_config


@pytest.mark.parametrize("config", [TrainConfig(), small_config(max_seconds=60, seed=3)])
def test_round_trip(config: TrainConfig) -> None:
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_are_the_papers_asymmetric_views() -> None:
    augment = TrainConfig().augment
    assert (augment.first.blur_p, augment.first.solarise_p) == (1.0, 0.0)
    assert (augment.second.blur_p, augment.second.solarise_p) == (0.1, 0.2)


def test_fields_left_out_keep_their_defaults() -> None:
    config = TrainConfig.from_dict({"optimizer": {"lr": 1}, "max_seconds": 5})
    assert config.optimizer == OptimizerConfig(lr=1.0)
    assert config.max_seconds == 5.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "unknown setting epoch;"),
        ({"optimizer": {"rate": 1.0}}, "unknown setting optimizer.rate;"),
        ({"augment": {"first": {"blurp": 1.0}}}, "unknown setting augment.first.blurp;"),
        ({"epochs": "ten"}, "epochs cannot be 'ten'"),
        ({"epochs": True}, "epochs cannot be True"),
        ({"augment": {"first": {"crop_scale": [0.1]}}}, "augment.first.crop_scale cannot be"),
        ({"encoder": "vgg"}, "encoder 'vgg' is unknown; choose one of small, resnet18"),
        ({"head": 5}, "head cannot be 5; it must be HeadConfig"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        TrainConfig.from_dict(values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        *({"tau_base": 1.1}, {"batch_size": 1}, {"encoder": "vgg"}, {"stem": "big"}),
        *({"max_steps": 0}, {"accumulate": 3}, {"views": 1}, {"compile": "maybe"}),
    ],
)
def test_values_outside_limits_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match=str(next(iter(changes.values())))):
        small_config(**changes)


def test_view_limits() -> None:
    with pytest.raises(InvalidConfig, match="hue"):
        ViewConfig(hue=0.6)
    with pytest.raises(InvalidConfig, match="crop_scale"):
        ViewConfig(crop_scale=(0.9, 0.1))


def test_every_setting_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    for kind, prefix in (
        (TrainConfig, ""),
        (OptimizerConfig, "optimizer."),
        (HeadConfig, "head."),
        (AugmentConfig, "augment."),
        (ViewConfig, "augment.first.` / `second.` `"),
    ):
        for field in dataclasses.fields(kind):
            assert f"| `{prefix}{field.name}` |" in text, field.name
