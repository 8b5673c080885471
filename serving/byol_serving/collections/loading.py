"""Brings an index in step with its store: from a snapshot where one can be trusted, or anew."""

import logging
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np

from byol_serving.collections import rows as table
from byol_serving.collections import snapshot
from byol_serving.collections.exact import Positions, pack
from byol_serving.collections.index import Index
from byol_serving.errors import StoreCorrupt

_log = logging.getLogger(__name__)


def fill(
    index: Index, connection: sqlite3.Connection, folder: Path, collection: str, *, repair: bool
) -> int:
    """Loads `index` with all that the store holds; returns the snapshot's change, or -1 for none.

    With `repair`, snapshots found wrong are deleted.

    Raises:
        StoreCorrupt: a vector fails its checksum, or items and vectors do not belong together.
    """
    seq = table.seq_of(connection)
    ids, rows = _items(connection, folder)
    loaded = snapshot.newest(folder, collection, index.dim, seq, repair=repair)
    above = 0
    if loaded is not None and not _from_snapshot(index, loaded, rows, ids):
        _log.warning("the snapshot in %s lacks stored rows; rebuilding from the store", folder)
        loaded = None
        if repair:
            snapshot.discard(folder)
    if loaded is not None and len(loaded.rows):
        above = int(loaded.rows[-1])
    position = int(np.searchsorted(rows, above, side="right"))
    index.reserve(len(rows) - position)
    for found, vectors in table.vectors_above(connection, above, index.dim):
        expected = rows[position : position + len(found)]
        if not np.array_equal(expected, found):
            raise _torn(folder)
        index.apply(seq, found, ids[position : position + len(found)], vectors, [])
        position += len(found)
    if position != len(rows):
        raise _torn(folder)
    index.load(replace(index.view, seq=seq))
    return loaded.seq if loaded is not None else -1


def _from_snapshot(index: Index, loaded: snapshot.Loaded, rows: Positions, ids: list[str]) -> bool:
    """Takes over a snapshot, dead rows masked; False where it lacks a row that it should have."""
    size = len(loaded.rows)
    covered = int(np.searchsorted(rows, loaded.rows[-1], side="right")) if size else 0
    where = np.searchsorted(loaded.rows, rows[:covered])
    if not np.array_equal(loaded.rows[where], rows[:covered]):
        return False
    names = np.full(size, "", object)
    names[where] = ids[:covered]
    alive = np.zeros(size, np.bool_)
    alive[where] = True
    index.load(
        replace(
            index.view,
            seq=loaded.seq,
            size=size,
            dead=size - covered,
            vectors=loaded.vectors,
            rows=loaded.rows,
            ids=names,
            alive=pack(alive),
            approximate=loaded.approximate,
        )
    )
    return True


def _items(connection: sqlite3.Connection, folder: Path) -> tuple[list[str], Positions]:
    cursor = connection.execute("SELECT row, id FROM items ORDER BY row")
    found = cursor.fetchall()
    ids = [each for _, each in found]
    if not all(isinstance(each, str) for each in ids):
        raise _torn(folder)
    return ids, np.fromiter((row for row, _ in found), np.int64, len(found))


def _torn(folder: Path) -> StoreCorrupt:
    return StoreCorrupt(
        f"items and vectors of {folder} do not belong together: restore it from a backup"
    )
