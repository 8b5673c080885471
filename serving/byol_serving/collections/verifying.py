"""Compares an index with its store, bit for bit."""

import sqlite3

import numpy as np

from byol_serving.collections.exact import unpack
from byol_serving.collections.index import View
from byol_serving.collections.rows import text_holds, vector_holds
from byol_serving.collections.types import Verification

_MAX_NAMED = 100


def compare(view: View, connection: sqlite3.Connection, dim: int) -> Verification:
    """Compares a view with the transaction of the same moment."""
    problems = [
        f"database: {line}"
        for (line,) in connection.execute("PRAGMA integrity_check(20)")
        if line != "ok"
    ]
    living = np.flatnonzero(unpack(view.alive, view.size))
    positions = dict(zip(view.rows[living].tolist(), living.tolist(), strict=True))
    stored = 0
    statement = """
        SELECT row, id, items.crc, metadata, vectors.crc, vector
        FROM items LEFT JOIN vectors USING (row)
    """
    for row, row_id, crc, metadata, blob_crc, blob in connection.execute(statement):
        stored += 1
        position = positions.pop(row, None)
        if not text_holds(row_id, metadata, crc):
            problems.append(f"item {row_id!r}: its metadata fails its checksum")
        if not vector_holds(row, blob, blob_crc, dim):
            problems.append(f"item {row_id!r}: its vector is missing or fails its checksum")
        elif position is None:
            problems.append(f"item {row_id!r}: it is not in the index")
        elif view.ids[position] != row_id or view.vectors[position].tobytes() != blob:
            problems.append(f"item {row_id!r}: the index holds another id or vector for it")
    problems += [f"item {view.ids[each]!r}: it is only in the index" for each in positions.values()]
    return Verification(stored=stored, indexed=view.count, problems=tuple(problems[:_MAX_NAMED]))
