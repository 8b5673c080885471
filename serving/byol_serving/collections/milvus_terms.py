"""Metadata as Milvus can filter it exactly, and filters as its boolean expressions.

Milvus's own comparisons of JSON disagree between versions on kinds (is 1 the same as true?), null,
and what NOT means for an item without the key. So every item carries terms, fixed-size digests of
facts such as "label is the string cat", in an array, and its numbers in a JSON object by the digest
of their key. Both exist for every item, which makes each test true or false and NOT its opposite.
"""

import json
import math
from collections.abc import Iterable
from hashlib import blake2b

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
from byol_serving.collections.types import Metadata
from byol_serving.errors import InvalidRequest

MAX_TERMS = 4096
"""Milvus's limit on an array's length."""
TERM_LENGTH = 32
ALWAYS, NEVER = 'id != ""', 'id == ""'  # ids are never empty


def terms_of(metadata: Metadata) -> list[str]:
    """The terms of an item: for each key that it exists, what it equals, and if it is a number.

    Raises:
        InvalidRequest: more keys than fit.
    """
    terms: list[str] = []
    for key, value in metadata.items():
        terms.append(_term("exists", key))
        if isinstance(value, (str, int, float)):
            terms.append(_value_term(key, value))
        if _is_number(value):
            terms.append(_term("number", key))
    if len(terms) > MAX_TERMS:
        raise InvalidRequest(
            f"metadata with {len(metadata)} keys does not fit into the milvus backend, which holds"
            f" {MAX_TERMS} terms an item, up to three a key: nest what is not filtered by"
        )
    return terms


def numbers_of(metadata: Metadata) -> dict[str, float]:
    """The item's numbers by the term of their key."""
    return {
        _term("number", key): value
        for key, value in metadata.items()
        if isinstance(value, (int, float)) and _is_number(value)
    }


def expression(condition: Filter) -> str:
    """The condition in Milvus's language; means what `filters.matches` says."""
    match condition:
        case Equals(key, value):
            return _has([_value_term(key, value)])
        case In(key, values):
            return _has([_value_term(key, value) for value in values])
        case Range(key):
            return _within(condition, _term("number", key))
        case Exists(key):
            return _has([_term("exists", key)])
        case All(filters):
            return _joined(" and ", filters, ALWAYS)
        case Any(filters):
            return _joined(" or ", filters, NEVER)
        case Not(inner):
            return f"(not {expression(inner)})"


def id_in(ids: Iterable[str]) -> str:
    """The test that an item has one of these ids."""
    return f"id in [{', '.join(map(quoted, ids))}]"


def quoted(text: str) -> str:
    """A string literal."""
    return json.dumps(text, ensure_ascii=False)


def _has(terms: list[str]) -> str:
    if not terms:
        return f"({NEVER})"
    return f"array_contains_any(terms, [{', '.join(map(quoted, terms))}])"


def _joined(operator: str, filters: tuple[Filter, ...], if_none: str) -> str:
    return f"({operator.join(map(expression, filters)) or if_none})"


def _within(bounds: Range, term: str) -> str:
    tests = [_has([term])]
    for sign, bound in ((">=", bounds.gte), (">", bounds.gt), ("<=", bounds.lte), ("<", bounds.lt)):
        if bound is None:
            continue
        if math.isfinite(bound):
            tests.append(f'numbers["{term}"] {sign} {bound!r}')
        elif math.isnan(bound) or (sign[0] == ">") == (bound > 0):  # beyond every number
            tests.append(NEVER)
    return f"({' and '.join(tests)})"


def _value_term(key: str, value: Scalar) -> str:
    match value:
        case bool():
            return _term("boolean", key, str(value))
        case str():
            return _term("string", key, value)
        case float() if value.is_integer():  # 1.0 equals 1
            return _term("equals", key, str(int(value)))
        case _:
            return _term("equals", key, repr(value))


def _term(*parts: str) -> str:
    """Which parts, and where they end, in 128 bits: that two differ and agree here is not seen."""
    text = json.dumps(parts)
    return blake2b(text.encode(), digest_size=TERM_LENGTH // 2).hexdigest()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
