"""Which positions of the index meet a filter. Answers are kept, and brought up to date by changes.

The first time, a filter is asked of every item. After that only of the items that changed since.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from byol_serving.collections.database import Database
from byol_serving.collections.exact import Positions, bits_at
from byol_serving.collections.filters import Filter
from byol_serving.collections.index import Index, View
from byol_serving.collections.rows import seq_of
from byol_serving.collections.sql import Compiled, compile_filter

_MAX_KEPT = 32
_MAX_KEPT_POSITIONS = 4_000_000
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class _Answer:
    """What met a filter as of a change: rows of the store, and their positions in a view."""

    seq: int
    generation: int
    rows: Positions
    positions: Positions


class Matching:
    """Filters to positions. Thread-safe."""

    def __init__(self, database: Database, index: Index, writing: threading.Lock) -> None:
        """`writing` is held by a writer from before its commit until the index has the change."""
        self._database = database
        self._index = index
        self._writing = writing
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[object, ...], _Answer] = OrderedDict()

    def positions(self, condition: Filter) -> tuple[View, Positions]:
        """A view and the positions in it, ascending, of the items that match in it.

        All that was acknowledged before the call is in the view. Raises InvalidRequest for a
        filter too deep or too long.
        """
        where = compile_filter(condition)
        kept = self._recall(where)
        view = self._index.view
        if kept is not None and (kept.seq, kept.generation) == (view.seq, view.generation):
            return view, kept.positions
        for _ in range(_ATTEMPTS):
            seq, rows = self._rows(where, kept)
            view = self._caught_up(seq)
            if view.seq == seq:
                break
        else:  # a change came between each time: keep changes away
            with self._writing:
                _, rows = self._rows(where, kept)
                view = self._index.view
        answer = _located(view, rows)
        self._remember(where, answer)
        return view, answer.positions

    def _rows(self, where: Compiled, kept: _Answer | None) -> tuple[int, Positions]:
        """A moment, and the rows that matched at it; among them may be some that are deleted."""
        with self._database.reading() as connection:
            seq = seq_of(connection)
            if kept is None:
                statement = f"SELECT row FROM items WHERE {where.sql} ORDER BY row"
                found = connection.execute(statement, where.params).fetchall()
                return seq, np.fromiter((row for (row,) in found), np.int64, len(found))
            statement = f"SELECT row, {where.sql} FROM items WHERE seq > ?"
            changes = connection.execute(statement, (*where.params, kept.seq)).fetchall()
        changed = np.array([row for row, _ in changes], np.int64)
        matching = np.array([row for row, matches in changes if matches], np.int64)
        unchanged = kept.rows[~np.isin(kept.rows, changed)]
        return seq, np.sort(np.concatenate([unchanged, matching]))

    def _caught_up(self, seq: int) -> View:
        """A view that includes change `seq`, which is committed and may just be being applied."""
        view = self._index.view
        while view.seq < seq:
            with self._writing:
                view = self._index.view
        return view

    def _recall(self, where: Compiled) -> _Answer | None:
        with self._lock:
            kept = self._kept.get(where.key)
            if kept is not None:
                self._kept.move_to_end(where.key)
            return kept

    def _remember(self, where: Compiled, answer: _Answer) -> None:
        with self._lock:
            known = self._kept.get(where.key)
            if known is not None and known.seq > answer.seq:
                return
            self._kept[where.key] = answer
            total = sum(len(each.rows) for each in self._kept.values())
            while len(self._kept) > _MAX_KEPT or total > _MAX_KEPT_POSITIONS:
                total -= len(self._kept.popitem(last=False)[1].rows)


def _located(view: View, rows: Positions) -> _Answer:
    """The living among the rows, and where they are."""
    positions = view.positions_of(rows)
    known = positions >= 0
    rows, positions = rows[known], positions[known]
    living = bits_at(view.alive, positions)
    return _Answer(view.seq, view.generation, rows[living], positions[living])
