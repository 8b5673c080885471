"""Filters on the wire, as trees, and as the plain dicts that people like to write.

    {"label": "cat"}                           Equals("label", "cat");  also {"equals": "cat"}
    {"label": ["cat", "dog"]}                  In("label", ("cat", "dog"));  also {"in": [...]}
    {"price": {"gte": 3, "lt": 10}}            Range("price", gte=3, lt=10)
    {"label": {"not": "cat"}}                  Not(Equals("label", "cat"))
    {"seen": {"exists": True}}                 Exists("seen")
    {"label": "cat", "price": {"gt": 1}}       All of them
    {"$any": [{...}, {...}]}                   Any;  also "$all" and "$not"

The tree is what a collection takes; see `byol_serving.collections.filters`.
"""

from collections.abc import Mapping
from typing import TypeAlias

from google.protobuf.struct_pb2 import Value

from byol_serving.collections.filters import (
    All,
    Any,
    Equals,
    Exists,
    Filter,
    In,
    Not,
    Range,
    Scalar,
)
from byol_serving.errors import InvalidRequest
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.rpc.convert import json_to_value, value_to_json

Where: TypeAlias = Filter | Mapping[str, object]
_BOUNDS = ("gte", "gt", "lte", "lt")


def from_message(message: pb.Filter) -> Filter:
    """The tree of a message.

    Raises:
        InvalidRequest: an empty condition, an empty key, or a value that is not a string, number
            or boolean.
    """
    match message.WhichOneof("condition"):
        case "equals":
            value = scalar_of(message.equals.value)
            return Equals(_key(message.equals.key), value)
        case "one_of":
            values = tuple(scalar_of(each) for each in message.one_of.values)
            return In(_key(message.one_of.key), values)
        case "range":
            given = {each: getattr(message.range, each) for each in _BOUNDS if _has(message, each)}
            return _range(_key(message.range.key), given)
        case "exists":
            return Exists(_key(message.exists))
        case "all":
            return All(tuple(map(from_message, message.all.filters)))
        case "any":
            return Any(tuple(map(from_message, message.any.filters)))
        case "negated":
            return Not(from_message(message.negated))
        case _:
            raise InvalidRequest("a filter has no condition; set equals, one_of, range or another")


def to_message(condition: Filter) -> pb.Filter:
    """The message of a tree."""
    match condition:
        case Equals(key, value):
            return pb.Filter(equals=pb.Filter.Equals(key=key, value=json_to_value(value)))
        case In(key, values):
            return pb.Filter(one_of=pb.Filter.In(key=key, values=map(json_to_value, values)))
        case Range(key, gte, gt, lte, lt):
            return pb.Filter(range=pb.Filter.Range(key=key, gte=gte, gt=gt, lte=lte, lt=lt))
        case Exists(key):
            return pb.Filter(exists=key)
        case All(filters):
            return pb.Filter(all=pb.Filter.All(filters=map(to_message, filters)))
        case Any(filters):
            return pb.Filter(any=pb.Filter.Any(filters=map(to_message, filters)))
        case Not(inner):
            return pb.Filter(negated=to_message(inner))


def parse_where(where: Where) -> Filter:
    """The tree of a dict as shown above; a tree is returned as it is.

    Raises:
        InvalidRequest: an operator or value that is not known.
    """
    if not isinstance(where, Mapping):
        return where
    parts = tuple(_parse_entry(key, value) for key, value in where.items())
    return parts[0] if len(parts) == 1 else All(parts)


def _parse_entry(key: str, value: object) -> Filter:
    match key, value:
        case "$all", list() | tuple():
            return All(tuple(map(parse_where, value)))
        case "$any", list() | tuple():
            return Any(tuple(map(parse_where, value)))
        case "$not", Mapping():
            return Not(parse_where(value))
        case _, Mapping():
            parts = _parse_operators(_key(key), value)
            return parts[0] if len(parts) == 1 else All(parts)
        case _, list() | tuple() | set() | frozenset():
            return In(_key(key), tuple(map(_scalar, value)))
        case _:
            return Equals(_key(key), _scalar(value))


def _parse_operators(key: str, operators: Mapping[str, object]) -> tuple[Filter, ...]:
    parts: list[Filter] = []
    bounds = {name: value for name, value in operators.items() if name in _BOUNDS}
    if bounds or not operators:
        parts.append(_range(key, bounds))
    for name, value in operators.items():
        match name, value:
            case (("gte" | "gt" | "lte" | "lt"), _):
                continue
            case "in", list() | tuple() | set() | frozenset():
                parts.append(In(key, tuple(map(_scalar, value))))
            case "equals", _:
                parts.append(Equals(key, _scalar(value)))
            case "exists", bool():
                parts.append(Exists(key) if value else Not(Exists(key)))
            case "not", _:
                parts.append(Not(_parse_entry(key, value)))
            case _:
                raise InvalidRequest(
                    f"filter {{{key!r}: {{{name!r}: {value!r}}}}} is not understood;"
                    " use equals, in, gte, gt, lte, lt, exists or not"
                )
    return tuple(parts)


def _range(key: str, bounds: Mapping[str, object]) -> Range:
    if not bounds:
        raise InvalidRequest(f"the range on {key!r} has no bound; give gte, gt, lte or lt")
    numbers: dict[str, float] = {}
    for name, bound in bounds.items():
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or bound != bound:
            raise InvalidRequest(f"bound {name} {bound!r} on {key!r} is not a number")
        numbers[name] = float(bound)
    return Range(key, **numbers)


def _has(message: pb.Filter, bound: str) -> bool:
    # The stub wants one of the names themselves, which a variable is not.
    return message.range.HasField(bound)  # type: ignore[arg-type]


def _key(key: str) -> str:
    if not key:
        raise InvalidRequest("a filter's key is empty; name a metadata key")
    return key


def scalar_of(message: Value) -> Scalar:
    """A string, number or boolean. Raises InvalidRequest for another value."""
    return _scalar(value_to_json(message))


def _scalar(value: object) -> Scalar:
    if isinstance(value, (str, int, float)):
        return value
    raise InvalidRequest(
        f"filter value {value!r} is not a string, number or boolean; use exists to test for null"
    )
