"""Compiles a filter to a SQL expression over an item's JSON metadata.

The expression gives 0 or 1 and never NULL, so that NOT means what `filters.matches` says it means.
"""

import math
import re
from dataclasses import dataclass

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

Param = str | int | float

MAX_DEPTH = 100
"""Nesting of a filter; SQLite's own limit on an expression's depth is 1000."""
MAX_PARAMS = 10_000
"""Values in one filter; SQLite's own limit is 32,766."""

# Keys that SQLite's JSON path syntax takes between double quotes as they are.
_PLAIN_KEY = re.compile(r'[^"\\\x00-\x1f\x7f]+')
_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True)
class Compiled:
    """A SQL expression over the column `metadata` and its parameters."""

    sql: str
    params: tuple[Param, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal questions only: 1, 1.0 and True compare equal in Python, not here."""
        return (self.sql, tuple((type(each), each) for each in self.params))


_NEVER = Compiled("0", ())


def compile_filter(condition: Filter) -> Compiled:
    """The condition as SQL.

    Raises:
        InvalidRequest: nested deeper than MAX_DEPTH or with more than MAX_PARAMS values.
    """
    compiled = _compile(condition, 1)
    if len(compiled.params) > MAX_PARAMS:
        raise InvalidRequest(
            f"the filter has {len(compiled.params)} values, at most {MAX_PARAMS} are allowed: "
            "split it into several requests"
        )
    return compiled


def _compile(condition: Filter, depth: int) -> Compiled:
    if depth > MAX_DEPTH:
        raise InvalidRequest(
            f"the filter is nested more than {MAX_DEPTH} deep: flatten it with all, any and in"
        )
    match condition:
        case Equals(key, value):
            return _one_of(key, (value,))
        case In(key, values):
            return _one_of(key, values)
        case Range(key):
            return _range(key, condition)
        case Exists(key):
            return _leaf(key, "{type} IS NOT NULL", ())
        case All(filters):
            return _joined(" AND ", "1", [_compile(each, depth + 1) for each in filters])
        case Any(filters):
            return _joined(" OR ", "0", [_compile(each, depth + 1) for each in filters])
        case Not(inner):
            compiled = _compile(inner, depth + 1)
            return Compiled(f"(NOT {compiled.sql})", compiled.params)


def _joined(operator: str, if_none: str, parts: list[Compiled]) -> Compiled:
    """Parts joined as a balanced tree: a chain of n operators would be n deep for SQLite."""
    if not parts:
        return Compiled(if_none, ())
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    left = _joined(operator, if_none, parts[:half])
    right = _joined(operator, if_none, parts[half:])
    return Compiled(f"({left.sql}{operator}{right.sql})", left.params + right.params)


def _one_of(key: str, values: tuple[Scalar, ...]) -> Compiled:
    booleans = [value for value in values if isinstance(value, bool)]
    strings = [value for value in values if isinstance(value, str) and _storable(value)]
    numbers = [
        number
        for value in values
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        for number in _exact_number(value)
    ]
    parts = [
        _leaf(key, f"{{type}} IS '{'true' if value else 'false'}'", ())
        for value in sorted(set(booleans))
    ]
    if strings:
        marks = ",".join("?" * len(strings))
        # IN of a NULL value is NULL, but type has then been false: (false AND NULL) is false.
        parts.append(_leaf(key, f"{{type}} IS 'text' AND {{value}} IN ({marks})", tuple(strings)))
    if numbers:
        marks = ",".join("?" * len(numbers))
        parts.append(_leaf(key, f"{_IS_NUMBER} AND {{value}} IN ({marks})", tuple(numbers)))
    return _joined(" OR ", "0", parts)


_IS_NUMBER = "({type} IS 'integer' OR {type} IS 'real')"


def _range(key: str, bounds: Range) -> Compiled:
    tests: list[str] = [_IS_NUMBER]
    params: list[Param] = []
    for operator, bound in (
        (">=", bounds.gte),
        (">", bounds.gt),
        ("<=", bounds.lte),
        ("<", bounds.lt),
    ):
        if bound is None:
            continue
        if isinstance(bound, float) and math.isnan(bound):
            return _NEVER
        operator, bound = _representable(operator, bound)
        tests.append(f"{{value}} {operator} ?")
        params.append(bound)
    return _leaf(key, " AND ".join(tests), tuple(params))


def _leaf(key: str, test: str, params: tuple[Param, ...]) -> Compiled:
    """`test` of the key's {type} and {value}; false where the item lacks the key."""
    if not _storable(key):
        return _NEVER
    if _PLAIN_KEY.fullmatch(key):
        path = f'$."{key}"'
        sql = test.replace("{type}", "json_type(metadata, ?)")
        sql = sql.replace("{value}", "json_extract(metadata, ?)")
        # Each mention of type or value takes the path as a parameter of its own, in order.
        rest = iter(params)
        tokens = re.findall(r"\{type\}|\{value\}|\?", test)
        ordered = tuple(next(rest) if token == "?" else path for token in tokens)
        return Compiled(f"({sql})", ordered)
    sql = test.replace("{type}", "type").replace("{value}", "atom")
    each = f"EXISTS (SELECT 1 FROM json_each(metadata) WHERE key = ? AND ({sql}))"
    return Compiled(each, (key, *params))


def _storable(text: str) -> bool:
    """Whether metadata can hold the text at all (see `checks.metadata_text`)."""
    if "\x00" in text:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _exact_number(value: int | float) -> list[int | float]:
    """The number as SQLite can hold it, or none where no stored number can equal it."""
    if isinstance(value, float):
        return [] if math.isnan(value) else [value]
    if value in _INT64:
        return [value]
    try:
        nearest = float(value)
    except OverflowError:
        return []
    return [nearest] if nearest == value else []


def _representable(operator: str, bound: int | float) -> tuple[str, int | float]:
    """The same comparison for every storable number, with a bound that SQLite can hold.

    Outside int64 only floats are stored and none lies between an integer and its nearest float,
    so `x >= bound` is `x > nearest` where the nearest float is below the bound.
    """
    if isinstance(bound, float) or bound in _INT64:
        return operator, bound
    try:
        nearest = float(bound)
    except OverflowError:
        # Beyond every finite float; infinities are not JSON and never stored.
        return operator[0], math.inf if bound > 0 else -math.inf
    if nearest == bound:
        return operator, nearest
    match operator[0], nearest < bound:
        case ">", below:
            return (">" if below else ">="), nearest
        case _, below:
            return ("<=" if below else "<"), nearest
