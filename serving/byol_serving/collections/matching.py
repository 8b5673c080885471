"""Which positions of the index meet a filter, with answers kept while nothing changes."""

import threading
from collections import OrderedDict

import numpy as np

from byol_serving.collections.database import Database
from byol_serving.collections.exact import Positions
from byol_serving.collections.filters import Filter
from byol_serving.collections.index import Index, View
from byol_serving.collections.rows import seq_of
from byol_serving.collections.sql import Compiled, compile_filter

_MAX_KEPT = 32
_MAX_KEPT_POSITIONS = 4_000_000


class Matching:
    """Filters to positions. Thread-safe."""

    def __init__(self, database: Database, index: Index, writing: threading.Lock) -> None:
        """`writing` is held by a writer from before its commit until the index has the change."""
        self._database = database
        self._index = index
        self._writing = writing
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[object, ...], Positions] = OrderedDict()
        self._kept_for = (-1, -1)

    def positions(self, condition: Filter) -> tuple[View, Positions]:
        """A view and the positions in it, ascending, of the items that match at one moment.

        The view may be newer than that moment, never older; all that was acknowledged before the
        call is in both. Raises InvalidRequest for a filter too deep or too long.
        """
        where = compile_filter(condition)
        view = self._index.view
        kept = self._recall(view, where)
        if kept is not None:
            return view, kept
        while True:
            seq, rows = self._rows(where)
            view = self._caught_up(seq)
            positions = view.positions_of(rows)
            # Absent: deleted since and squeezed out by a rebuild. Ask again.
            if not np.any(positions < 0):
                break
        if view.seq == seq:
            self._remember(view, where, positions)
        return view, positions

    def _rows(self, where: Compiled) -> tuple[int, Positions]:
        with self._database.reading() as connection:
            seq = seq_of(connection)
            statement = f"SELECT row FROM items WHERE {where.sql} ORDER BY row"
            found = connection.execute(statement, where.params).fetchall()
        return seq, np.fromiter((row for (row,) in found), np.int64, len(found))

    def _caught_up(self, seq: int) -> View:
        """A view that includes change `seq`, which is committed and may just be being applied."""
        view = self._index.view
        while view.seq < seq:
            with self._writing:
                view = self._index.view
        return view

    def _recall(self, view: View, where: Compiled) -> Positions | None:
        with self._lock:
            if self._kept_for != (view.seq, view.generation):
                return None
            kept = self._kept.get(where.key)
            if kept is not None:
                self._kept.move_to_end(where.key)
            return kept

    def _remember(self, view: View, where: Compiled, positions: Positions) -> None:
        with self._lock:
            now = (view.seq, view.generation)
            if self._kept_for > now:
                return
            if self._kept_for != now:
                self._kept.clear()
                self._kept_for = now
            self._kept[where.key] = positions
            total = sum(map(len, self._kept.values()))
            while len(self._kept) > _MAX_KEPT or total > _MAX_KEPT_POSITIONS:
                total -= len(self._kept.popitem(last=False)[1])
