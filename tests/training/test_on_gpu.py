"""A step on a GPU: on a pretended one, and on a real one where there is one."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import Tensor

from byol_training import augment
from byol_training.byol import Byol
from byol_training.config import AugmentConfig, Compile, OptimizerConfig, OptimizerName
from byol_training.feed import Feed
from byol_training.guards import SpikeGuard
from byol_training.lars import build_optimizer
from byol_training.machine import Machine, choose_machine, compile_networks
from byol_training.pretrain import build_model, gradients
from training.pretend_gpu import DEVICE, PretendGpu
from training.support import tiny_config, tiny_images


@pytest.mark.parametrize("name", ["lars", "adamw"])  # torch cannot pretend its fused SGD
def test_the_host_never_waits_inside_a_step(
    name: OptimizerName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the backward pass, which is torch's own: views, forward, guard, optimiser, target."""
    monkeypatch.setattr(Feed, "_fits_on_device", lambda feed: True)
    monkeypatch.setattr("byol_training.guards._SETTLED", 2)  # steps until the guard acts
    config = dataclasses.replace(
        tiny_config(accumulate=2), augment=AugmentConfig(), optimizer=OptimizerConfig(name=name)
    )
    augment._constant.cache_clear()
    with PretendGpu(monkeypatch) as gpu, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch finds that there is no GPU
        with torch.device(DEVICE):
            model = build_model(config).train()
        optimizer = build_optimizer(model.trained_parameters(), config.optimizer)
        guard = SpikeGuard(model.trained_parameters(), config.optimizer.spike_factor)
        feed = Feed(tiny_images(), config, config.batch_size, DEVICE)
        assert gpu.waits  # the images were sent, among others
        for step in range(4):
            if step == 1:  # the first sends what stays there
                gpu.waits.clear()
            losses = [forward(model, feed.views(step, micro)) for micro in (0, 1)]
            for parameter in model.trained_parameters():
                parameter.grad = torch.empty_like(parameter)
            guard.apply()
            optimizer.step()
            model.update_target(0.99)
        assert gpu.waits == []
        assert losses[0].device == DEVICE
        with pytest.raises(RuntimeError):
            float(losses[0])
        assert gpu.waits == ["a value was read"]  # it would have been seen
    augment._constant.cache_clear()


def forward(model: Byol, views: list[Tensor]) -> Tensor:
    with torch.no_grad():
        loss: Tensor = model(*views)[0]
    return loss


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("compiled", ["on", "graphs"])
def test_compiled_steps_and_replayed_ones_are_those_of_plain_pytorch(compiled: Compile) -> None:
    machine = choose_machine("cuda", "fp32")
    torch.manual_seed(0)
    plain = build_model(tiny_config())
    other = copy.deepcopy(plain)
    compile_networks(other, compiled, machine)
    for a, b in zip(take_steps(plain, machine), take_steps(other, machine), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    for a, b in zip(plain.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def take_steps(model: Byol, machine: Machine) -> list[Tensor]:
    """The losses of some steps on the machine, two micro-batches each."""
    config = tiny_config(accumulate=2)
    model.to(machine.device).train()
    optimizer = torch.optim.SGD(model.trained_parameters(), lr=0.01)
    feed = Feed(tiny_images(), config, config.batch_size, machine.device)
    losses = []
    for step in range(6):  # the first ones compile and record
        losses.append(gradients(model, feed, step, config.accumulate, machine)[0])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_target(0.99)
    return losses
