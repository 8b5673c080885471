"""Items page by page, in the order of their rows."""

import json
import sqlite3

from byol_serving.collections import rows
from byol_serving.collections.filters import All, Filter
from byol_serving.collections.sql import compile_filter
from byol_serving.collections.types import Item, Page
from byol_serving.errors import InvalidRequest

MAX_PAGE = 10_000


def row_of(after: str) -> int:
    """The row that a page's `after` names, 0 for the beginning. Raises InvalidRequest."""
    if not after:
        return 0
    if not (after.isascii() and after.isdigit() and len(after) < 19):
        raise InvalidRequest(f"page token {after[:40]!r} is not one that a page gave: start anew")
    return int(after)


def limit_of(limit: int) -> int:
    """Raises InvalidRequest for a page size outside 1 to MAX_PAGE."""
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"page size {limit} is outside 1 to {MAX_PAGE}: ask for less at once")
    return limit


def page(
    connection: sqlite3.Connection,
    dim: int,
    row: int,
    limit: int,
    condition: Filter | None,
    *,
    with_metadata: bool,
    with_vectors: bool,
) -> Page:
    """Up to `limit` items above a row, vectors float32 [dim]; see `types.Collection.page`."""
    limit_of(limit)
    where = compile_filter(condition or All(()))
    statement = f"SELECT row, id FROM items WHERE row > ? AND {where.sql} ORDER BY row LIMIT ?"
    found = connection.execute(statement, (row, *where.params, limit + 1)).fetchall()
    kept = dict(found[:limit])
    texts = rows.texts_by_row(connection, list(kept)) if with_metadata else {}
    vectors = rows.vectors_by_row(connection, list(kept), dim) if with_vectors else {}
    items = [
        Item(id=each, metadata=json.loads(texts.get(row, "{}")), vector=vectors.get(row))
        for row, each in kept.items()
    ]
    return Page(items=items, after=str(found[limit - 1][0]) if len(found) > limit else "")
