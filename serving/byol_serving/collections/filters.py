"""Conditions on metadata, as a small tree: compiled to SQL, or evaluated with `matches`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

Scalar: TypeAlias = str | int | float | bool


@dataclass(frozen=True)
class Equals:
    """metadata[key] is `value`, of the same kind (string, number or boolean)."""

    key: str
    value: Scalar


@dataclass(frozen=True)
class In:
    """metadata[key] is one of `values`."""

    key: str
    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Range:
    """metadata[key] is a number within the given bounds."""

    key: str
    gte: float | None = None
    gt: float | None = None
    lte: float | None = None
    lt: float | None = None


@dataclass(frozen=True)
class Exists:
    """The item has metadata[key], null included."""

    key: str


@dataclass(frozen=True)
class All:
    """Every filter matches; of none: always."""

    filters: tuple["Filter", ...]


@dataclass(frozen=True)
class Any:
    """At least one filter matches; of none: never."""

    filters: tuple["Filter", ...]


@dataclass(frozen=True)
class Not:
    """The filter does not match (so an item without the key matches Not(Equals))."""

    filter: "Filter"


Filter: TypeAlias = Equals | In | Range | Exists | All | Any | Not


def matches(condition: Filter, metadata: Mapping[str, object]) -> bool:
    """Whether an item with this metadata meets the condition: what the SQL must equal."""
    match condition:
        case Equals(key, value):
            return key in metadata and _same(metadata[key], value)
        case In(key, values):
            return key in metadata and any(_same(metadata[key], value) for value in values)
        case Range(key):
            return _within(condition, metadata.get(key))
        case Exists(key):
            return key in metadata
        case All(filters):
            return all(matches(each, metadata) for each in filters)
        case Any(filters):
            return any(matches(each, metadata) for each in filters)
        case Not(inner):
            return not matches(inner, metadata)


def keys_of(condition: Filter) -> frozenset[str]:
    """The metadata keys that the condition looks at."""
    match condition:
        case Equals(key) | In(key) | Range(key) | Exists(key):
            return frozenset({key})
        case All(filters) | Any(filters):
            return frozenset().union(*map(keys_of, filters))
        case Not(inner):
            return keys_of(inner)


def _same(stored: object, wanted: Scalar) -> bool:
    """Equal and of one kind: 1 is not True, and "1" is not 1, but 1 is 1.0."""
    if isinstance(stored, bool) or isinstance(wanted, bool):
        return stored is wanted
    if isinstance(stored, (int, float)) and isinstance(wanted, (int, float)):
        return stored == wanted
    return isinstance(stored, str) and stored == wanted


def _within(bounds: Range, stored: object) -> bool:
    if isinstance(stored, bool) or not isinstance(stored, (int, float)):
        return False
    return (
        (bounds.gte is None or stored >= bounds.gte)
        and (bounds.gt is None or stored > bounds.gt)
        and (bounds.lte is None or stored <= bounds.lte)
        and (bounds.lt is None or stored < bounds.lt)
    )
