"""Settings of a training run: frozen dataclasses that survive a round trip through JSON.

The defaults are the paper's (Grill et al. 2020, arXiv 2006.07733), ImageNet at 224 pixels; sections
and tables are cited beside each. `TrainConfig.small` holds what was measured on small images.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

from byol_serving.errors import InvalidConfig

EncoderName = Literal["small", "resnet18", "resnet34", "resnet50"]
Stem = Literal["imagenet", "small"]
OptimizerName = Literal["lars", "sgd", "adamw"]
Precision = Literal["auto", "fp32", "bf16"]
T = TypeVar("T")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidConfig(f"{name} {value} is outside {low}..{high}; set it within")


def _range(name: str, value: tuple[float, float], low: float, high: float) -> None:
    if not low <= value[0] <= value[1] <= high:
        raise InvalidConfig(
            f"{name} {list(value)} is not a rising pair within {low}..{high}; set it so"
        )


def _choice(name: str, value: str, allowed: Any) -> None:
    names = typing.get_args(allowed)
    if value not in names:
        raise InvalidConfig(f"{name} {value!r} is unknown; choose one of {', '.join(names)}")


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """One of the two distributions that views are drawn from (paper, appendix B and table 6)."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the crop as a part of the image's, drawn uniformly (appendix B)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect, width over height, of the crop; its logarithm is drawn uniformly (appendix B)."""
    flip: float = 0.5
    """Probability of a left-right flip (table 6)."""
    jitter_p: float = 0.8
    """Probability of colour jitter (table 6)."""
    brightness: float = 0.4
    """Largest change of brightness: the factor is uniform in 1 ± this (table 6)."""
    contrast: float = 0.4
    """Largest change of contrast (table 6)."""
    saturation: float = 0.2
    """Largest change of saturation (table 6)."""
    hue: float = 0.1
    """Largest turn of the hue, in turns of the colour circle, at most 0.5 (table 6)."""
    grey_p: float = 0.2
    """Probability of losing all colour (table 6)."""
    blur_p: float = 1.0
    """Probability of Gaussian blur: 1.0 for the first view, 0.1 for the second (table 6)."""
    blur_kernel: float = 0.1
    """Side of the blur kernel as a part of the view's: 23 of 224 pixels (appendix B), made odd."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels, uniform (appendix B)."""
    solarise_p: float = 0.0
    """Probability of inverting pixels of 0.5 and above: 0 first view, 0.2 second (table 6)."""

    def __post_init__(self) -> None:
        """Refuses values no view could be drawn with."""
        for name in ("flip", "jitter_p", "grey_p", "blur_p", "solarise_p"):
            _within(name, getattr(self, name), 0.0, 1.0)
        for name in ("brightness", "contrast", "saturation"):
            _within(name, getattr(self, name), 0.0, 1.0)
        _within("hue", self.hue, 0.0, 0.5)
        _within("blur_kernel", self.blur_kernel, 0.0, 1.0)
        _range("crop_scale", self.crop_scale, 0.001, 1.0)
        _range("crop_ratio", self.crop_ratio, 0.05, 20.0)
        _range("blur_sigma", self.blur_sigma, 0.01, 100.0)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """The asymmetric pair of view distributions, and the normalisation that follows both."""

    first: ViewConfig = field(default_factory=ViewConfig)
    """T in the paper: always blurred, never solarised (table 6)."""
    second: ViewConfig = field(default_factory=lambda: ViewConfig(blur_p=0.1, solarise_p=0.2))
    """T' in the paper: seldom blurred, sometimes solarised (table 6)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted per channel from pixels in 0..1: ImageNet's average (appendix B)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divided by, per channel: ImageNet's standard deviation (appendix B)."""

    def __post_init__(self) -> None:
        """Refuses a standard deviation that cannot be divided by."""
        for value in self.std:
            _within("std", value, 1e-3, 1e3)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Projector and predictor: Linear, batch norm, ReLU, Linear (section 3.3)."""

    hidden: int = 4096
    """Width between the two linear layers (section 3.3)."""
    out: int = 256
    """Width of projections and predictions (section 3.3)."""

    def __post_init__(self) -> None:
        """Refuses widths that are not positive."""
        _within("hidden", self.hidden, 1, 65536)
        _within("out", self.out, 1, 65536)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the online network's weights move."""

    name: OptimizerName = "lars"
    """lars (paper, section 3.3), sgd or adamw."""
    lr: float = 0.2
    """Learning rate at batch 256, scaled by batch/256 (section 3.3: 0.2 for 1000 epochs; the
    authors' configs/byol.py: 0.3 for 300 epochs, 0.45 for 100)."""
    weight_decay: float = 1.5e-6
    """Not applied to biases and batch-norm parameters (section 3.3)."""
    momentum: float = 0.9
    """Of lars and sgd (the authors' code); adamw uses its (0.9, 0.999)."""
    trust_coefficient: float = 1e-3
    """Of lars: length of a step as a part of the weights' (the authors' code, eta)."""
    warmup_epochs: float = 10.0
    """Linear warm-up (section 3.3); never more than a tenth of the run."""

    def __post_init__(self) -> None:
        """Refuses values that no step could be taken with."""
        _within("lr", self.lr, 1e-9, 1e3)
        _within("weight_decay", self.weight_decay, 0.0, 1.0)
        _within("momentum", self.momentum, 0.0, 0.9999)
        _within("trust_coefficient", self.trust_coefficient, 1e-9, 10.0)
        _within("warmup_epochs", self.warmup_epochs, 0.0, 1e6)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One pretraining run; with the images and the machine, all that decides its outcome."""

    encoder: EncoderName = "resnet50"
    """The backbone (section 3.3: ResNet-50)."""
    stem: Stem = "imagenet"
    """imagenet: 7x7 stride 2 and max-pool; small: 3x3 stride 1, no pool, below 100 px."""
    image_size: int = 224
    """Side of the views in pixels (section 3.3)."""
    batch_size: int = 256
    """Images per step (section 3.3: 4096 on 512 TPU cores; figure 3a: 256 loses 0.7 points)."""
    epochs: int = 100
    """Passes over the images; ignored where `max_steps` or `max_seconds` is set."""
    max_steps: int | None = None
    """Length of the run in optimiser steps, in place of `epochs`."""
    max_seconds: float | None = None
    """Length of the run in seconds: schedules are fitted so that they end when it does."""
    tau_base: float = 0.99
    """τ at the first step (section 3.3: 0.996 for 1000 epochs; authors' code: 0.99 for 100)."""
    symmetrised: bool = True
    """Sum the loss over both assignments of the views (section 3.1, equation 2 and below)."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """Widths of projector and predictor."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How weights move."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How views are drawn."""
    seed: int = 0
    """Of weights, shuffling and views."""
    device: str = "auto"
    """auto: the first CUDA device if there is one; or a torch device name."""
    precision: Precision = "auto"
    """auto: bf16 autocast where the hardware multiplies in it, else fp32."""
    log_every: int = 20
    """Steps between readings of the loss: reading it waits for the device."""
    checkpoint_every_epochs: int = 10
    """Epochs between checkpoints; one is always written at the end."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        _choice("encoder", self.encoder, EncoderName)
        _choice("stem", self.stem, Stem)
        _choice("optimizer.name", self.optimizer.name, OptimizerName)
        _choice("precision", self.precision, Precision)
        _within("image_size", self.image_size, 8, 4096)
        _within("batch_size", self.batch_size, 2, 1_000_000)
        _within("epochs", self.epochs, 1, 1_000_000)
        _within("tau_base", self.tau_base, 0.0, 1.0)
        _within("log_every", self.log_every, 1, 1_000_000)
        _within("checkpoint_every_epochs", self.checkpoint_every_epochs, 1, 1_000_000)
        _within("seed", self.seed, 0, 2**31 - 1)
        if self.max_steps is not None:
            _within("max_steps", self.max_steps, 1, 10**9)
        if self.max_seconds is not None:
            _within("max_seconds", self.max_seconds, 1.0, 10**8)

    @classmethod
    def small(cls, **changes: Any) -> Self:
        """For small pictures on a CPU: the six-layer encoder at 32 pixels; see docs/byol.md.

        Args:
            changes: fields of `TrainConfig` to set otherwise.
        """
        return dataclasses.replace(cls(**_SMALL), **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for `json.dumps`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; fields left out keep their defaults.

        Raises:
            InvalidConfig: an unknown field, a value of the wrong type, or one outside its limits.
        """
        return _build(cls, values, "")


# Jitter, grey and crops as solo-learn's CIFAR recipe (scripts/pretrain/cifar/byol.yaml): no blur at
# 32 pixels, where two pixels of sigma leave little to recognise. The rest was measured; see docs.
_SMALL_VIEW = ViewConfig(crop_scale=(0.2, 1.0), blur_p=0.0)
_SMALL: dict[str, Any] = {
    "encoder": "small",
    "stem": "small",
    "image_size": 32,
    "batch_size": 128,
    "epochs": 100,
    "tau_base": 0.99,
    "head": HeadConfig(hidden=256, out=64),
    "optimizer": OptimizerConfig(name="adamw", lr=2e-3, weight_decay=1e-4, warmup_epochs=2.0),
    "augment": AugmentConfig(
        first=_SMALL_VIEW, second=dataclasses.replace(_SMALL_VIEW, solarise_p=0.2)
    ),
}


def _build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of dataclass `cls` from plain values; `where` is the path for messages."""
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise InvalidConfig(
                f"unknown setting {where}{key}; choose one of {', '.join(sorted(hints))}"
            )
    return cls(**{key: _convert(hints[key], value, where + key) for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type a field declares: JSON knows neither tuples nor dataclasses."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return _build(hint, value, where + ".")
    if origin is tuple and isinstance(value, list | tuple):
        items = typing.get_args(hint)
        if len(value) == len(items):
            pairs = zip(items, value, strict=True)
            return tuple(_convert(item, one, where) for item, one in pairs)
    elif origin is Literal and value in typing.get_args(hint):
        return value
    elif origin is types.UnionType:
        if value is None:
            return None
        return _convert(typing.get_args(hint)[0], value, where)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    elif hint is float and type(value) is int:
        return float(value)
    raise InvalidConfig(f"{where} cannot be {value!r}; it must be {_hint_name(hint)}")


def _hint_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint)
