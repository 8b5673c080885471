"""Every recipe loads, cites its source and can be built."""

import pytest

from byol_serving.errors import InvalidConfig
from byol_training.pretrain import build_model
from byol_training.recipes import load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_recipe(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.about
    assert recipe.source
    assert "\n" not in recipe.about + recipe.source + recipe.result
    first, second = recipe.config.augment.first, recipe.config.augment.second
    assert (first.solarise_p, second.solarise_p) == (0.0, 0.2)  # asymmetric, as the paper's
    assert first.jitter_p == second.jitter_p == 0.8
    model = build_model(recipe.config)
    assert model.predictor[-1].out_features == recipe.config.head.out


def test_published_values() -> None:
    """Of the sources' own files; lightly's loss is a quarter of ours, so its rate is too."""
    cifar, lightly = (load_recipe(name).config for name in ("cifar", "cifar-lightly"))
    assert (cifar.optimizer.lr, cifar.optimizer.trust_coefficient) == (1.0, 0.02)
    assert cifar.optimizer.trust_clip
    assert lightly.optimizer.lr * lightly.batch_size / 256 == pytest.approx(0.06 / 4)
    assert lightly.optimizer.lr * lightly.optimizer.weight_decay == pytest.approx(0.12 * 5e-4)
    imagenet = load_recipe("imagenet").config
    assert (imagenet.batch_size, imagenet.epochs, imagenet.tau_base) == (4096, 1000, 0.996)
    assert imagenet.augment.first.blur_p == 1.0


def test_unknown_recipe() -> None:
    with pytest.raises(InvalidConfig, match="'imagnet' is unknown; choose one of cifar, "):
        load_recipe("imagnet")
