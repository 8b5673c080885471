"""LARS against a calculation by hand, and what is left out of it."""

import math

import pytest
import torch
from torch import nn

from byol_training.byol import Byol
from byol_training.config import HeadConfig, OptimizerConfig
from byol_training.encoders import build_encoder
from byol_training.lars import Lars, build_optimizer


def reference(
    weight: list[float], grads: list[list[float]], lr: float, *, decay: float, adapt: bool
) -> list[float]:
    """Plain Python over one tensor: decay, trust ratio, momentum, step."""
    moment = [0.0] * len(weight)
    for grad in grads:
        g = [gi + decay * wi for gi, wi in zip(grad, weight, strict=True)]
        w_norm, g_norm = math.hypot(*weight), math.hypot(*g)
        trust = 1e-3 * w_norm / g_norm if adapt and w_norm > 0 and g_norm > 0 else 1.0
        moment = [0.9 * mi + trust * gi for mi, gi in zip(moment, g, strict=True)]
        weight = [wi - lr * mi for wi, mi in zip(weight, moment, strict=True)]
    return weight


def test_against_reference() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64))
    bias = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))
    zero = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
    optimizer = build_optimizer([weight, bias, zero], OptimizerConfig(weight_decay=0.1))
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    starts = [p.detach().flatten().tolist() for p in (weight, bias, zero)]
    grads = [[[0.1, 0.2, -0.3, 0.4], [0.5, 0.5], [1.0, 2.0]], [[0.0] * 4, [-1.0, 2.0], [0.0] * 2]]
    for step in grads:
        for parameter, grad in zip((weight, bias, zero), step, strict=True):
            parameter.grad = torch.tensor(grad, dtype=torch.float64).view_as(parameter)
        optimizer.step()
    for i, parameter in enumerate((weight, bias, zero)):
        adapted = parameter is not bias
        expected = reference(
            starts[i], [g[i] for g in grads], 0.5, decay=0.1 if adapted else 0.0, adapt=adapted
        )
        assert parameter.detach().flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_biases_and_batch_norm_are_left_out(name: str) -> None:
    model = Byol(build_encoder("small"), HeadConfig(hidden=8, out=4))
    config = OptimizerConfig(name=name, weight_decay=0.5)  # type: ignore[arg-type]  # a name
    optimizer = build_optimizer(model.trained_parameters(), config)
    decayed, rest = optimizer.param_groups
    assert decayed["weight_decay"] == 0.5
    assert rest["weight_decay"] == 0.0
    assert not rest["adapt"]
    assert all(p.ndim > 1 for p in decayed["params"])
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".")[-1] for p in rest["params"]} == {"weight", "bias"}
    assert len(decayed["params"]) + len(rest["params"]) == len(model.trained_parameters())


def test_a_parameter_without_gradient_stays() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    Lars([parameter], lr=1.0).step()
    assert torch.equal(parameter.detach(), torch.ones(2, 2))


def test_clipped_ratio_never_exceeds_plain_sgd() -> None:
    """solo-learn's clip_lr: the step is min(η·‖w‖/‖g‖, lr) times the gradient."""
    for eta, scale in ((0.02, 0.02 * 2.0 / 4.0), (5.0, 0.1)):
        weight = nn.Parameter(torch.ones(2, 2))
        weight.grad = torch.full((2, 2), 2.0)
        Lars([weight], lr=0.1, trust_coefficient=eta, clip=True).step()
        torch.testing.assert_close(weight.detach(), torch.ones(2, 2) - scale * 2.0)


def test_predictor_has_a_rate_of_its_own() -> None:
    model = Byol(build_encoder("small"), HeadConfig(hidden=8, out=4))
    optimizer = build_optimizer(
        model.trained_parameters(),
        OptimizerConfig(predictor_lr_factor=10.0),
        predictor=model.predictor.parameters(),
    )
    factor = {id(p): g["lr_factor"] for g in optimizer.param_groups for p in g["params"]}
    predictor = {id(p) for p in model.predictor.parameters()}
    for parameter in model.trained_parameters():
        assert factor[id(parameter)] == (10.0 if id(parameter) in predictor else 1.0)
