"""The algorithm: loss, gradients, target average, batch norm, and why it does not collapse."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from byol_training.byol import Byol, byol_loss, spread
from byol_training.config import HeadConfig
from byol_training.encoders import Encoder


def tiny_encoder(dim: int = 16) -> Encoder:
    """One convolution: enough to see everything the algorithm does."""
    block = nn.Sequential(nn.Conv2d(3, dim, 3, stride=2), nn.BatchNorm2d(dim), nn.ReLU())
    return Encoder({"conv": block}, dim)


def tiny_byol(*, symmetrised: bool = True) -> Byol:
    torch.manual_seed(0)
    return Byol(tiny_encoder(), HeadConfig(hidden=32, out=8), symmetrised=symmetrised)


def layer(encoder: Encoder, number: int) -> Any:
    """The convolution, 0, or the batch norm, 1."""
    return encoder.stages["conv"][number]  # type: ignore[index]  # a Sequential


def views(count: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, 3, 8, 8, generator=generator)
    return first, first + 0.3 * torch.randn(count, 3, 8, 8, generator=generator)


def test_loss_by_hand() -> None:
    prediction = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    projection = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    # cosines 3/5 and 0, so 2 - 1.2 = 0.8 and 2
    assert byol_loss(prediction, projection).item() == pytest.approx(1.4)


def test_loss_is_the_squared_distance_of_normalised_vectors() -> None:
    p, z = torch.randn(5, 7), torch.randn(5, 7)
    p_bar, z_bar = (v / v.norm(dim=1, keepdim=True) for v in (p, z))
    assert byol_loss(p, z).item() == pytest.approx((p_bar - z_bar).square().sum(1).mean().item())


def test_loss_ignores_lengths_and_order_and_stays_in_its_range() -> None:
    p, z = torch.randn(6, 4), torch.randn(6, 4)
    loss = byol_loss(p, z)
    torch.testing.assert_close(byol_loss(3.0 * p, 0.2 * z), loss)
    torch.testing.assert_close(byol_loss(p.flip(0), z.flip(0)), loss)
    torch.testing.assert_close(byol_loss(z, p), loss)
    assert byol_loss(p, p).item() == pytest.approx(0.0, abs=1e-6)
    assert byol_loss(p, -p).item() == pytest.approx(4.0)


def test_symmetrised_loss_is_the_sum_of_both_directions() -> None:
    first, second = views()
    one = tiny_byol(symmetrised=False)(first, second)[0]
    other = tiny_byol(symmetrised=False)(second, first)[0]
    torch.testing.assert_close(tiny_byol()(first, second)[0], one + other)


def test_loss_is_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny_byol()(*views())[0].dtype == torch.float32


def test_no_gradient_reaches_the_target() -> None:
    model = tiny_byol()
    model(*views())[0].backward()
    target = [*model.target_encoder.parameters(), *model.target_projector.parameters()]
    assert target
    assert all(p.grad is None and not p.requires_grad for p in target)
    trained = {id(p) for p in model.trained_parameters()}
    assert not trained & {id(p) for p in target}
    assert all(p.grad is not None for p in model.trained_parameters())


def test_target_is_the_closed_form_average() -> None:
    model = tiny_byol()
    source = layer(model.encoder, 0).weight
    target = layer(model.target_encoder, 0).weight
    start, taus = target.detach().clone(), [0.9, 0.95, 0.99, 1.0]
    history = []
    for tau in taus:
        with torch.no_grad():
            source.add_(torch.randn_like(source))
        history.append(source.detach().clone())
        model.update_target(tau)
    expected = start * math.prod(taus)
    for i, weight in enumerate(history):
        expected = expected + (1 - taus[i]) * math.prod(taus[i + 1 :]) * weight
    torch.testing.assert_close(target.detach(), expected)


def test_target_batch_norm_keeps_statistics_of_its_own_forward_passes() -> None:
    model = tiny_byol()
    online = layer(model.encoder, 1)
    target = layer(model.target_encoder, 1)
    with torch.no_grad():
        layer(model.target_encoder, 0).bias += 5.0
    model(*views())
    assert int(online.num_batches_tracked) == int(target.num_batches_tracked) == 2
    before = target.running_mean.clone()
    assert (before - online.running_mean).min() > 0.5
    model.update_target(0.0)
    torch.testing.assert_close(target.running_mean, before)
    torch.testing.assert_close(target.weight, online.weight)


def test_averaged_statistics_replace_the_targets_own() -> None:
    """EMAN: the target normalises by averages of the online network's running statistics."""
    torch.manual_seed(0)
    model = Byol(tiny_encoder(), HeadConfig(hidden=32, out=8), target_norm="average")
    model.train()
    assert model.encoder.training
    assert not any(m.training for m in model.target_encoder.modules())
    online = layer(model.encoder, 1)
    target = layer(model.target_encoder, 1)
    before = target.running_var.clone()
    model(*views())
    assert torch.equal(target.running_var, before)  # its own passes leave them
    model.update_target(0.9)
    torch.testing.assert_close(target.running_var, 0.9 * before + 0.1 * online.running_var)
    one, other = (model._target(view) for view in views())
    whole = model._target(torch.cat(views()))
    torch.testing.assert_close(torch.cat([one, other]), whole)  # images do not see each other


def test_more_views_are_each_predicted_against_the_mean_of_the_others() -> None:
    first, second = views()
    third = views(seed=2)[1]
    model = tiny_byol().eval()  # running statistics, so that a second pass changes nothing
    found, _ = model(first, second, third)
    targets = [model._target(view) for view in (first, second, third)]
    total = torch.zeros(())
    for i, view in enumerate((first, second, third)):
        others = [t for j, t in enumerate(targets) if j != i]
        prediction = model.predictor(model.projector(model.encoder(view)))
        total = total + byol_loss(prediction, (others[0] + others[1]) / 2)
    torch.testing.assert_close(found, total * 2 / 3)


def test_views_are_normalised_apart() -> None:
    """Running means after one step see each view alone: 0.9·0.1·m₁ + 0.1·m₂, not their mean."""
    model = tiny_byol()
    first, second = views()
    second = second + 3.0
    conv, norm = layer(model.encoder, 0), layer(model.encoder, 1)
    with torch.no_grad():
        means = [conv(v).mean((0, 2, 3)) for v in (first, second)]
    model(first, second)
    torch.testing.assert_close(norm.running_mean, 0.09 * means[0] + 0.1 * means[1])


def test_spread() -> None:
    torch.manual_seed(0)
    assert spread(torch.ones(64, 8)).item() == pytest.approx(0.0, abs=1e-6)
    assert spread(torch.randn(4096, 32)).item() == pytest.approx(1.0, abs=0.03)


def _without_predictor(model: Byol, first: Tensor, second: Tensor) -> Tensor:
    """The target stays as it is; only the predictor goes (paper, table 5b)."""
    z1, z2 = (model.projector(model.encoder(v)) for v in (first, second))
    with torch.no_grad():
        t1, t2 = (model.target_projector(model.target_encoder(v)) for v in (first, second))
    return byol_loss(z1, t2) + byol_loss(z2, t1)


def _gradient_through_target(model: Byol, first: Tensor, second: Tensor) -> Tensor:
    """The predictor stays; both sides are the online network, and both are trained."""
    z1, z2 = (model.projector(model.encoder(v)) for v in (first, second))
    return byol_loss(model.predictor(z1), z2) + byol_loss(model.predictor(z2), z1)


def _as_published(model: Byol, first: Tensor, second: Tensor) -> Tensor:
    loss: Tensor = model(first, second)[0]
    return loss


Rule = Callable[[Byol, Tensor, Tensor], Tensor]


def train(rule: Rule, steps: int = 300) -> float:
    """Spread of the projections of unseen images after training by `rule`, all else the same."""
    model = tiny_byol()
    optimizer = torch.optim.SGD(model.trained_parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        loss = rule(model, *views(64, seed=step % 8))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        model.update_target(0.5)  # a fast target: a slow one takes longer to collapse
    with torch.no_grad():
        return spread(model.projector(model.encoder(views(256, seed=99)[0]))).item()


def test_byol_does_not_collapse() -> None:
    assert train(_as_published) > 0.7


@pytest.mark.parametrize("rule", [_without_predictor, _gradient_through_target])
def test_without_either_half_of_the_asymmetry_it_collapses(rule: Rule) -> None:
    assert train(rule) < 0.15
