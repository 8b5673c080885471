"""Filters: what SQL answers is what `matches` says, for any filter and any metadata."""

import json
import math
import sqlite3
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from byol_serving.collections.checks import metadata_text
from byol_serving.collections.filters import (
    All,
    Any,
    Equals,
    Exists,
    Filter,
    In,
    Not,
    Range,
    keys_of,
    matches,
)
from byol_serving.collections.sql import MAX_DEPTH, MAX_PARAMS, compile_filter
from byol_serving.collections.types import Metadata
from byol_serving.errors import InvalidRequest

# Few keys and values, so that filters hit; among them those that are easily confused.
KEYS = st.sampled_from(["a", "b", "", "a.b", "$", 'quo"te', "back\\slash", "it's", "ключ", "[0]"])
NUMBERS = st.sampled_from(
    [0, 1, -1, 1.0, 0.5, -0.0, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), 1e300, 5e-324, float(2**63)]
)
STRINGS = st.sampled_from(
    ["", "1", "true", "null", "x", "X", "it's", 'say "hi"', "é", "\U0001f600"]
)
STORED = st.one_of(
    NUMBERS,
    STRINGS,
    st.booleans(),
    st.none(),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 3), max_size=2),
)
METADATA = st.dictionaries(KEYS, STORED, max_size=4)
WANTED = st.one_of(
    NUMBERS,
    STRINGS,
    st.booleans(),
    st.sampled_from([2**64, -(2**64), 10**400, math.inf, -math.inf, math.nan, "a\x00b", "\ud800"]),
)
BOUND = st.none() | NUMBERS | st.sampled_from([2**64, -(10**400), math.inf, -math.inf, math.nan])
LEAVES = st.one_of(
    st.builds(Equals, KEYS, WANTED),
    st.builds(In, KEYS, st.lists(WANTED, max_size=4).map(tuple)),
    st.builds(Range, KEYS, BOUND, BOUND, BOUND, BOUND),
    st.builds(Exists, KEYS),
)


def _branches(children: st.SearchStrategy[Filter]) -> st.SearchStrategy[Filter]:
    several = st.lists(children, max_size=3).map(tuple)
    return st.one_of(st.builds(All, several), st.builds(Any, several), st.builds(Not, children))


FILTERS: st.SearchStrategy[Filter] = st.recursive(LEAVES, _branches, max_leaves=6)


@pytest.fixture(scope="module")
def connection() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE items (row INTEGER PRIMARY KEY, metadata TEXT)")
    yield connection
    connection.close()


@settings(max_examples=600, deadline=None)
@given(condition=FILTERS, items=st.lists(METADATA, max_size=8))
@example(condition=Not(Equals("a", 1)), items=[{}, {"a": None}, {"a": True}, {"a": 1.0}])
@example(condition=Equals("a", True), items=[{"a": 1}, {"a": True}, {"a": "true"}])
@example(condition=Equals("a", 2**53 + 1), items=[{"a": 2**53}, {"a": float(2**53)}])
@example(condition=Range("a", gte=2**63), items=[{"a": 2**63 - 1}, {"a": float(2**63)}])
@example(condition=All((Exists("a"), Not(Any(())))), items=[{"a": None}, {"b": 1}])
def test_sql_is_what_matches_says(
    connection: sqlite3.Connection, condition: Filter, items: list[Metadata]
) -> None:
    connection.execute("DELETE FROM items")
    texts = [metadata_text(each, n) for n, each in enumerate(items)]
    connection.executemany("INSERT INTO items VALUES (?, ?)", enumerate(texts))
    where = compile_filter(condition)
    statement = f"SELECT row, {where.sql} FROM items ORDER BY row"
    found = connection.execute(statement, where.params).fetchall()
    stored = [json.loads(text) for text in texts]
    assert found == [(n, int(matches(condition, each))) for n, each in enumerate(stored)]


def test_equal_questions_have_equal_keys_and_others_do_not() -> None:
    keys = [compile_filter(Equals("a", each)).key for each in (1, 1.0, True, "1")]
    assert len(set(keys)) == 4
    assert compile_filter(In("a", (1, 2))).key == compile_filter(In("a", (1, 2))).key


def test_filters_too_deep_or_too_long_are_refused() -> None:
    deep: Filter = Exists("a")
    for _ in range(MAX_DEPTH - 1):
        deep = Not(deep)
    compile_filter(deep)
    with pytest.raises(InvalidRequest, match=f"more than {MAX_DEPTH} deep"):
        compile_filter(Not(deep))
    with pytest.raises(InvalidRequest, match=f"at most {MAX_PARAMS}"):
        compile_filter(In("a", tuple(map(str, range(MAX_PARAMS)))))


@pytest.mark.parametrize("count", [1000, 3000])
def test_wide_filters_stay_within_what_sqlite_can_parse(
    connection: sqlite3.Connection, count: int
) -> None:
    where = compile_filter(Any(tuple(Exists(f"k{n}") for n in range(count))))
    connection.execute(f"SELECT row FROM items WHERE {where.sql}", where.params).fetchall()


def test_the_keys_of_a_filter() -> None:
    condition = All((Equals("a", 1), Not(Any((Range("b", gt=0), In("c", ()), Exists("d"))))))
    assert keys_of(condition) == {"a", "b", "c", "d"}
    assert keys_of(All(())) == frozenset()
