"""The statements on a collection's tables. Each takes a connection inside a transaction.

Every checksum covers what the value belongs to, so that intact bytes in the wrong place are seen.
"""

import sqlite3
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from byol_serving.collections.types import Vectors
from byol_serving.errors import StoreCorrupt

# Statement parameters at a time; SQLite allows 32,766.
_CHUNK = 8_000

Removal: TypeAlias = Callable[[sqlite3.Connection], list[int]]
"""Deletes items and returns the rows they had."""


def text_crc(row_id: str, metadata: str) -> int:
    """Checksum of an item's text."""
    return zlib.crc32(metadata.encode(), zlib.crc32(row_id.encode()))


def vector_crc(row: int, vector: bytes | memoryview) -> int:
    """Checksum of a vector's bytes at its row."""
    return zlib.crc32(vector, row & 0xFFFFFFFF)


def text_holds(row_id: object, metadata: object, crc: object) -> bool:
    """Whether what was read is what was written. Damage can also change a value's type."""
    return (
        isinstance(row_id, str) and isinstance(metadata, str) and text_crc(row_id, metadata) == crc
    )


def vector_holds(row: int, vector: object, crc: object, dim: int) -> bool:
    """Whether what was read is what was written, and of `dim` float32 values."""
    return isinstance(vector, bytes) and len(vector) == dim * 4 and vector_crc(row, vector) == crc


def meta_of(connection: sqlite3.Connection) -> dict[str, str | int]:
    """The collection's facts and its change sequence (`seq`)."""
    return dict(connection.execute("SELECT key, value FROM meta").fetchall())


def seq_of(connection: sqlite3.Connection) -> int:
    """The number of the last committed change. Raises StoreCorrupt where damage hides it."""
    found = connection.execute("SELECT value FROM meta WHERE key = 'seq'").fetchone()
    if found is None or not isinstance(found[0], int):
        raise StoreCorrupt("the number of the last change is damaged: restore it from a backup")
    return found[0]


def next_seq(connection: sqlite3.Connection) -> int:
    """Numbers the change being made."""
    statement = "UPDATE meta SET value = value + 1 WHERE key = 'seq' RETURNING value"
    ((value,),) = connection.execute(statement).fetchall()
    return int(value)


def remove(connection: sqlite3.Connection, ids: Sequence[str]) -> list[int]:
    """Deletes what exists of `ids`; returns the rows they had."""
    rows: list[int] = []
    for chunk in _chunks(ids):
        statement = f"DELETE FROM items WHERE id IN ({_marks(chunk)}) RETURNING row"
        rows += [row for (row,) in connection.execute(statement, chunk).fetchall()]
    _remove_vectors(connection, rows)
    return rows


def remove_where(
    connection: sqlite3.Connection, condition: str, params: Sequence[str | int | float]
) -> list[int]:
    """Deletes the items that meet a compiled filter; returns the rows they had."""
    statement = f"DELETE FROM items WHERE {condition} RETURNING row"
    rows = [row for (row,) in connection.execute(statement, params).fetchall()]
    _remove_vectors(connection, rows)
    return rows


def set_texts(
    connection: sqlite3.Connection,
    seq: int,
    ids: Sequence[str],
    texts: Sequence[str],
    unknown: Callable[[str], Exception],
) -> None:
    """Replaces metadata. Raises what `unknown` makes of the first id that does not exist."""
    statement = "UPDATE items SET seq = ?, crc = ?, metadata = ? WHERE id = ?"
    for row_id, text in zip(ids, texts, strict=True):
        if not connection.execute(statement, (seq, text_crc(row_id, text), text, row_id)).rowcount:
            raise unknown(row_id)


def _remove_vectors(connection: sqlite3.Connection, rows: Sequence[int]) -> None:
    connection.executemany("DELETE FROM vectors WHERE row = ?", ((row,) for row in rows))


def insert(
    connection: sqlite3.Connection,
    seq: int,
    ids: Sequence[str],
    texts: Sequence[str],
    vectors: Vectors,
) -> range:
    """Adds items under new rows above all rows there ever were; returns the rows."""
    found = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'items'").fetchone()
    first = (found[0] if found else 0) + 1
    rows = range(first, first + len(ids))
    blobs = memoryview(vectors.astype("<f4").tobytes())
    size = vectors.shape[1] * 4
    pieces = [blobs[start : start + size] for start in range(0, len(ids) * size, size)]
    connection.executemany(
        "INSERT INTO items (row, id, seq, crc, metadata) VALUES (?, ?, ?, ?, ?)",
        ((row, i, seq, text_crc(i, t), t) for row, i, t in zip(rows, ids, texts, strict=True)),
    )
    connection.executemany(
        "INSERT INTO vectors (row, crc, vector) VALUES (?, ?, ?)",
        ((row, vector_crc(row, piece), piece) for row, piece in zip(rows, pieces, strict=True)),
    )
    return rows


def texts_by_id(connection: sqlite3.Connection, ids: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Row and metadata text of what exists of `ids`. Raises StoreCorrupt."""
    found: dict[str, tuple[int, str]] = {}
    for chunk in _chunks(ids):
        statement = f"SELECT row, id, crc, metadata FROM items WHERE id IN ({_marks(chunk)})"
        for row, row_id, crc, text in connection.execute(statement, chunk):
            found[row_id] = (row, _checked_text(row_id, crc, text))
    return found


def texts_by_row(connection: sqlite3.Connection, rows: Sequence[int]) -> dict[int, str]:
    """Metadata text of what exists of `rows`. Raises StoreCorrupt."""
    found: dict[int, str] = {}
    for chunk in _chunks(rows):
        statement = f"SELECT row, id, crc, metadata FROM items WHERE row IN ({_marks(chunk)})"
        for row, row_id, crc, text in connection.execute(statement, chunk):
            found[row] = _checked_text(row_id, crc, text)
    return found


def vectors_by_row(
    connection: sqlite3.Connection, rows: Sequence[int], dim: int
) -> dict[int, Vectors]:
    """Vectors (float32 [dim]) of what exists of `rows`. Raises StoreCorrupt."""
    found: dict[int, Vectors] = {}
    for chunk in _chunks(rows):
        statement = f"SELECT row, crc, vector FROM vectors WHERE row IN ({_marks(chunk)})"
        for row, crc, blob in connection.execute(statement, chunk):
            if not vector_holds(row, blob, crc, dim):
                raise _corrupt_vector(connection, row)
            found[row] = np.frombuffer(blob, dtype="<f4")
    return found


def vectors_above(
    connection: sqlite3.Connection, row: int, dim: int, at_once: int = 8192
) -> Iterator[tuple[list[int], Vectors]]:
    """All (rows, float32 [n, dim]) above `row`, in order. Raises StoreCorrupt naming the id."""
    cursor = connection.execute(
        "SELECT row, crc, vector FROM vectors WHERE row > ? ORDER BY row", (row,)
    )
    while found := cursor.fetchmany(at_once):
        for each, crc, blob in found:
            if not vector_holds(each, blob, crc, dim):
                raise _corrupt_vector(connection, each)
        joined = b"".join([blob for _, _, blob in found])
        yield [each for each, _, _ in found], np.frombuffer(joined, dtype="<f4").reshape(-1, dim)


def _corrupt_vector(connection: sqlite3.Connection, row: int) -> StoreCorrupt:
    found = connection.execute("SELECT id FROM items WHERE row = ?", (row,)).fetchone()
    name = repr(found[0]) if found else f"of row {row}"
    return StoreCorrupt(
        f"the vector of item {name} fails its checksum: upsert it again or restore it"
    )


def _checked_text(row_id: str, crc: int, text: str) -> str:
    if not text_holds(row_id, text, crc):
        raise StoreCorrupt(
            f"the metadata of item {row_id!r} fails its checksum: upsert it again or restore it"
        )
    return text


def _chunks(values: Sequence[str] | Sequence[int]) -> Iterator[Sequence[str] | Sequence[int]]:
    for start in range(0, len(values), _CHUNK):
        yield values[start : start + _CHUNK]


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))
