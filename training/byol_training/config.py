"""Settings of a training run: frozen dataclasses that survive a round trip through JSON.

The defaults are the paper's (Grill et al. 2020, arXiv 2006.07733), ImageNet at 224 pixels; sections
and tables are cited beside each. Settings that go together are recipes (`recipes.py`).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from byol_serving.errors import InvalidConfig
from byol_training.settings import build, check_choice, check_range, check_within

ENCODERS = (
    *("small", "resnet18", "resnet34", "resnet50", "resnet101"),
    *("convnext_tiny", "convnext_small", "convnext_base"),
)
"""Backbones by name; `timm:NAME` is any of timm's."""
Stem = Literal["imagenet", "small"]
OptimizerName = Literal["lars", "sgd", "adamw"]
Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "on", "off", "graphs"]
TargetNorm = Literal["own", "average"]


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
            check_within(name, getattr(self, name), 0.0, 1.0)
        for name in ("brightness", "contrast", "saturation"):
            check_within(name, getattr(self, name), 0.0, 1.0)
        check_within("hue", self.hue, 0.0, 0.5)
        check_within("blur_kernel", self.blur_kernel, 0.0, 1.0)
        check_range("crop_scale", self.crop_scale, 0.001, 1.0)
        check_range("crop_ratio", self.crop_ratio, 0.05, 20.0)
        check_range("blur_sigma", self.blur_sigma, 0.01, 100.0)


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
            check_within("std", value, 1e-3, 1e3)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Projector and predictor: Linear, batch norm, ReLU, Linear (section 3.3)."""

    hidden: int = 4096
    """Width between the two linear layers (section 3.3)."""
    out: int = 256
    """Width of projections and predictions (section 3.3)."""

    def __post_init__(self) -> None:
        """Refuses widths that are not positive."""
        check_within("hidden", self.hidden, 1, 65536)
        check_within("out", self.out, 1, 65536)


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
    trust_clip: bool = False
    """Of lars: never step further than plain SGD would (LARC; solo-learn's clip_lr)."""
    warmup_epochs: float = 10.0
    """Linear warm-up (section 3.3); never more than a tenth of the run."""
    predictor_lr_factor: float = 1.0
    """Learning rate of the predictor over the others'. 10 is what the authors' own search found to
    help where the target is not averaged (paper, appendix I); 1 is their setting otherwise."""
    spike_factor: float = 10.0
    """A gradient longer than this many times the running mean length is shortened to it; 0: never.
    A guard, far from what a healthy run meets: how often it acted is in metrics.jsonl."""

    def __post_init__(self) -> None:
        """Refuses values that no step could be taken with."""
        check_within("lr", self.lr, 1e-9, 1e3)
        check_within("weight_decay", self.weight_decay, 0.0, 1.0)
        check_within("momentum", self.momentum, 0.0, 0.9999)
        check_within("trust_coefficient", self.trust_coefficient, 1e-9, 10.0)
        check_within("warmup_epochs", self.warmup_epochs, 0.0, 1e6)
        check_within("predictor_lr_factor", self.predictor_lr_factor, 0.01, 1000.0)
        check_within("spike_factor", self.spike_factor, 0.0, 1e6)
        if 0.0 < self.spike_factor < 1.5:
            raise InvalidConfig(
                f"spike_factor {self.spike_factor} would shorten ordinary steps; 1.5 or more, or 0"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One pretraining run; with the images and the machine, all that decides its outcome."""

    encoder: str = "resnet50"
    """The backbone (section 3.3: ResNet-50): one of `ENCODERS`, or timm:NAME."""
    stem: Stem = "imagenet"
    """imagenet: 7x7 stride 2 and max-pool; small: 3x3 stride 1, no pool, below 100 px."""
    zero_init: bool = False
    """Start the last batch norm of each residual block at zero, so that blocks start as identities
    (Goyal et al. 2017, arXiv 1706.02677, section 5.1). ResNets only."""
    start_from: str = ""
    """Weights that the encoder starts from, see `weights.py`: a run directory, a bundle exported
    with its weights, a file of torchvision's or timm's, or `timm` for those that timm downloads.
    Empty: fresh ones."""
    image_size: int = 224
    """Side of the views in pixels (section 3.3)."""
    batch_size: int = 256
    """Images per optimiser step, over all processes and micro-batches (section 3.3: 4096 on 512 TPU
    cores; figure 3a: 256 loses 0.7 points)."""
    accumulate: int = 1
    """Micro-batches that a step is split into where memory is short. Batch norm sees one at a time;
    the target moves once a step."""
    epochs: int = 100
    """Passes over the images; ignored where `max_steps` or `max_seconds` is set."""
    max_steps: int | None = None
    """Length of the run in optimiser steps, in place of `epochs`."""
    max_seconds: float | None = None
    """Length of the run in seconds: schedules are fitted so that they end when it does."""
    tau_base: float = 0.99
    """τ at the first step (section 3.3: 0.996 for 1000 epochs; authors' code: 0.99 for 100)."""
    tau_final: float = 1.0
    """τ at the last step (section 3.3: 1)."""
    tau_batch: int | None = None
    """Batch size that `tau_base` was found at: with k times as many images per step τ becomes τ^k
    (Busbridge et al. 2023, arXiv 2307.13813). None: τ as it is."""
    target_norm: TargetNorm = "own"
    """own: the target's batch norms normalise by the batch, as the paper's; average: by averaged
    statistics of the online network (EMAN, Cai et al. 2021, arXiv 2101.08482)."""
    views: int = 2
    """Views of each image; each is predicted against the mean of the others' target projections
    (FastSiam, Pototzky et al. 2022: 4). Step time grows with them."""
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
    """auto: bf16 autocast where the hardware is faster in it, else fp32; a run records which."""
    compile: Compile = "auto"
    """torch.compile for the networks: auto uses it on CUDA, and goes on without where it fails;
    graphs also replays them as CUDA graphs, for steps so short that starting kernels takes longer.
    """
    log_every: int = 20
    """Steps between readings of the loss: reading it waits for the device."""
    tensorboard: bool = False
    """Write the readings for TensorBoard too, into the run's tensorboard/."""
    checkpoint_every_epochs: int = 10
    """Epochs between checkpoints; one is always written at the end."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        if self.encoder not in ENCODERS and not self.encoder.startswith("timm:"):
            raise InvalidConfig(
                f"encoder {self.encoder!r} is unknown; choose one of {', '.join(ENCODERS)}"
                " or timm:NAME"
            )
        check_choice("stem", self.stem, Stem)
        check_choice("optimizer.name", self.optimizer.name, OptimizerName)
        check_choice("precision", self.precision, Precision)
        check_choice("compile", self.compile, Compile)
        check_choice("target_norm", self.target_norm, TargetNorm)
        self._check_batch()
        check_within("image_size", self.image_size, 8, 4096)
        check_within("epochs", self.epochs, 1, 1_000_000)
        check_range("(tau_base, tau_final)", (self.tau_base, self.tau_final), 0.0, 1.0)
        check_within("log_every", self.log_every, 1, 1_000_000)
        check_within("checkpoint_every_epochs", self.checkpoint_every_epochs, 1, 1_000_000)
        check_within("seed", self.seed, 0, 2**31 - 1)
        if self.max_steps is not None:
            check_within("max_steps", self.max_steps, 1, 10**9)
        if self.max_seconds is not None:
            check_within("max_seconds", self.max_seconds, 1.0, 10**8)

    def _check_batch(self) -> None:
        check_within("batch_size", self.batch_size, 2, 1_000_000)
        check_within("accumulate", self.accumulate, 1, self.batch_size // 2)
        if self.batch_size % self.accumulate:
            raise InvalidConfig(
                f"batch_size {self.batch_size} is no multiple of accumulate {self.accumulate};"
                " make it one"
            )
        check_within("views", self.views, 2, 16)
        if self.views > 2 and not self.symmetrised:
            raise InvalidConfig(f"views {self.views} needs symmetrised: every view is predicted")
        if self.tau_batch is not None:
            check_within("tau_batch", self.tau_batch, 1, 1_000_000)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for `json.dumps`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; fields left out keep their defaults.

        Raises:
            InvalidConfig: an unknown field, a value of the wrong type, or one outside its limits.
        """
        return build(cls, values, "")
