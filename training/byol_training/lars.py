"""LARS, layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888), as BYOL uses it.

The order is that of the authors' code (deepmind-research/byol/utils/optimizers.py): weight decay,
then the trust ratio, then momentum, then the learning rate. Written over lists of tensors, so that
a ResNet's 160 tensors cost a few calls, and nothing is read back to the host.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from byol_training.config import OptimizerConfig


def split_parameters(parameters: Iterable[nn.Parameter]) -> tuple[list[Any], list[Any]]:
    """(weights, the rest): biases and batch-norm parameters are those of one dimension.

    The paper leaves the rest out of LARS' adaptation and of weight decay (section 3.3).
    """
    every = list(parameters)
    return [p for p in every if p.ndim > 1], [p for p in every if p.ndim <= 1]


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimizerConfig,
    *,
    predictor: Iterable[nn.Parameter] = (),
) -> Optimizer:
    """The optimiser `config` names; its learning rate is set by the training loop at each step.

    Args:
        parameters: all that is trained.
        config: of the optimiser.
        predictor: those of `parameters` whose rate is multiplied by `config.predictor_lr_factor`.
    """
    apart = {id(p) for p in predictor} if config.predictor_lr_factor != 1.0 else set()
    every = list(parameters)
    groups = [
        *_groups((p for p in every if id(p) not in apart), config, 1.0),
        *_groups((p for p in every if id(p) in apart), config, config.predictor_lr_factor),
    ]
    match config.name:
        case "lars":
            return Lars(
                groups,
                momentum=config.momentum,
                trust_coefficient=config.trust_coefficient,
                clip=config.trust_clip,
            )
        case "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=0.0, fused=True)


def _groups(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, lr_factor: float
) -> list[dict[str, Any]]:
    weights, rest = split_parameters(parameters)
    groups = [
        {"params": weights, "weight_decay": config.weight_decay, "adapt": True},
        {"params": rest, "weight_decay": 0.0, "adapt": False},
    ]
    return [group | {"lr_factor": lr_factor} for group in groups if group["params"]]


class Lars(Optimizer):
    """SGD with momentum whose step is, per tensor, a set part of the tensor's length.

    Args:
        params: parameter groups; `adapt` False in a group leaves the trust ratio out.
        lr: learning rate.
        momentum: of the adapted gradients.
        weight_decay: added to the gradient before adaptation.
        trust_coefficient: η; the ratio is η·‖w‖/‖g‖, and 1 where either length is zero.
        clip: divide the ratio by the learning rate and keep it to 1 at most (LARC).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        clip: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "clip": clip,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # gives no loss
        """One step from the gradients in `.grad`, which it alters; tensors without one stay."""
        if closure is not None:
            raise NotImplementedError("Lars takes no closure: call backward before step")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [cast(Tensor, p.grad) for p in params]  # changed in place: they are used up here
        if group["weight_decay"]:
            torch._foreach_add_(grads, params, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(grads, _trust(group, params, grads))
        moments = [self._momentum(p) for p in params]
        torch._foreach_mul_(moments, group["momentum"])
        torch._foreach_add_(moments, grads)
        torch._foreach_add_(params, moments, alpha=-group["lr"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return cast(Tensor, state["momentum"])


def _trust(group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """η·‖w‖/‖g‖ per tensor, as scalars on the device."""
    weight = torch.stack(list(torch._foreach_norm(params)))
    grad = torch.stack(list(torch._foreach_norm(grads)))
    ratio = group["trust_coefficient"] * weight / grad
    if group["clip"]:
        ratio = (ratio / max(group["lr"], 1e-30)).clamp(max=1.0)
    ones = torch.ones_like(ratio)
    return list(torch.where((weight > 0) & (grad > 0), ratio, ones).unbind())
