"""From plain values (JSON, TOML) to frozen dataclasses, and the limits their fields keep."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from byol_serving.errors import InvalidConfig

T = TypeVar("T")


def check_within(name: str, value: float, low: float, high: float) -> None:
    """Raises InvalidConfig unless low <= value <= high."""
    if not low <= value <= high:
        raise InvalidConfig(f"{name} {value} is outside {low}..{high}; set it within")


def check_range(name: str, value: tuple[float, float], low: float, high: float) -> None:
    """Raises InvalidConfig unless low <= value[0] <= value[1] <= high."""
    if not low <= value[0] <= value[1] <= high:
        raise InvalidConfig(
            f"{name} {list(value)} is not a rising pair within {low}..{high}; set it so"
        )


def check_choice(name: str, value: str, allowed: Any) -> None:
    """Raises InvalidConfig unless `value` is one of the Literal `allowed`."""
    names = typing.get_args(allowed)
    if value not in names:
        raise InvalidConfig(f"{name} {value!r} is unknown; choose one of {', '.join(names)}")


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of dataclass `cls` from plain values; `where` is the path for messages.

    Raises:
        InvalidConfig: an unknown field, or a value of the wrong type.
    """
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
        return build(hint, value, where + ".")
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
