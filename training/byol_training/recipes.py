"""Recipes: settings that were published or measured together, as data (`recipes/*.toml`)."""

import tomllib
from dataclasses import dataclass, replace
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from byol_serving.errors import InvalidConfig
from byol_training.config import TrainConfig
from byol_training.settings import build


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A file of `recipes/`."""

    about: str
    """What it is for, one line."""
    source: str
    """Where its values were published or measured."""
    result: str = ""
    """What its source reached with it, and by which protocol."""
    config: TrainConfig
    """Every setting; those its file leaves out are the paper's defaults."""


def recipe_names() -> list[str]:
    """All recipes, sorted."""
    return sorted(file.name.removesuffix(".toml") for file in _files())


def load_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        InvalidConfig: there is none.
    """
    for file in _files():
        if file.name == f"{name}.toml":
            return build(Recipe, tomllib.loads(file.read_text(encoding="utf-8")), "")
    raise InvalidConfig(f"recipe {name!r} is unknown; choose one of {', '.join(recipe_names())}")


def small_config(**changes: Any) -> TrainConfig:
    """Recipe `small`, for small pictures on a CPU: the six-layer encoder at 32 pixels.

    Args:
        changes: fields of `TrainConfig` to set otherwise.
    """
    return replace(load_recipe("small").config, **changes)


def _files() -> list[Traversable]:
    folder = resources.files("byol_training") / "recipes"
    return [file for file in folder.iterdir() if file.name.endswith(".toml")]
