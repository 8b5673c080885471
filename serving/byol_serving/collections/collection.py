"""A collection on this machine: SQLite for the truth, the index for search."""

import json
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from byol_serving.collections import checks, database, loading, paging, rows, snapshot
from byol_serving.collections.committing import Batch, Committing
from byol_serving.collections.database import Database
from byol_serving.collections.disk import publish
from byol_serving.collections.exact import Found, lacking
from byol_serving.collections.filters import Filter
from byol_serving.collections.index import Index, IndexOptions, View
from byol_serving.collections.matching import Matching
from byol_serving.collections.ranking import ranked
from byol_serving.collections.sql import compile_filter
from byol_serving.collections.stats import stats_of
from byol_serving.collections.types import (
    CollectionInfo,
    Columns,
    Hit,
    IdType,
    IndexKind,
    IndexStats,
    Item,
    Metadata,
    Page,
    UpsertCounts,
    Vectors,
    Verification,
    hit_of,
)
from byol_serving.collections.upkeep import Upkeep
from byol_serving.collections.verifying import compare
from byol_serving.errors import ByolError, InvalidRequest, StoreCorrupt, UnknownId

_ATTEMPTS = 3


class LocalCollection:
    """See `types.Collection`. Opened, closed and dropped by its `Store`."""

    def __init__(self, folder: Path, name: str, *, read_only: bool, options: IndexOptions) -> None:
        """Opens a collection and brings its index in step with its store.

        Raises:
            StoreCorrupt: the database, or a vector that has to be read, is damaged.
            StoreError: it cannot be read or needs a newer program.
        """
        self.name = name
        self._folder = folder
        self._gone: ByolError | None = None
        self._writing = threading.Lock()
        self._committing = Committing(self._commit)
        self._database = Database(folder / database.FILE, read_only=read_only)
        try:
            with self._database.reading() as connection:
                facts = _facts(rows.meta_of(connection), folder)
                self._uuid, self.dim, self.encoder_id, kind, self.id_type = facts
                self._index = Index(self.dim, kind, options)
                covered = loading.fill(
                    self._index, connection, folder, self._uuid, repair=not read_only
                )
        except BaseException:
            self._database.close()
            raise
        self._matching = Matching(self._database, self._index, self._writing)
        self._upkeep = Upkeep(
            self._index, lambda: snapshot.write(folder, self._uuid, self._index), covered
        )
        if not read_only:
            self._upkeep.start()

    # Facts

    @property
    def info(self) -> CollectionInfo:
        """Name, dimension, encoder, count, index."""
        view = self._view()
        return CollectionInfo(
            name=self.name,
            dim=self.dim,
            encoder_id=self.encoder_id,
            count=view.count,
            index=view.approximate.kind if view.approximate else "flat",
            version=view.seq,
            recall=view.approximate.tuning.recall if view.approximate else 1.0,
            id_type=self.id_type,
        )

    def stats(self) -> IndexStats:
        """How the index stands: what answers, its measured recall, what waits, its memory."""
        return stats_of(self._index, self._view())

    def verify(self) -> Verification:
        """Compares the index with the store, and all stored bytes with their checksums."""
        self._view()
        with self._writing:  # the view and the transaction are of the same moment
            view = self._index.view
            held = ExitStack()
            connection = held.enter_context(self._database.reading())
            rows.seq_of(connection)  # a transaction begins with its first read
        with held:
            return compare(view, connection, self.dim)

    # Changes: committed first, then applied to the index, under one lock

    def upsert(
        self, ids: Sequence[str], vectors: Vectors, metadata: Sequence[Metadata] | None = None
    ) -> UpsertCounts:
        """Inserts or replaces; returns once the whole batch is on disk. See `types.Collection`."""
        self._view()
        names = checks.item_ids(ids, self.id_type)
        unit = checks.unit_vectors(vectors, self.dim)
        checks.same_length(names, len(unit), "vectors")
        if metadata is None:
            texts = ["{}"] * len(names)
        else:
            checks.same_length(names, len(metadata), "metadata")
            texts = [checks.metadata_text(each, i) for i, each in enumerate(metadata)]
        if not names:
            return UpsertCounts(inserted=0, updated=0)
        counts = self._committing.upsert(Batch(ids=names, texts=texts, vectors=unit))
        self._upkeep.changed(len(names))
        return counts

    def set_metadata(self, ids: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """Replaces metadata only. Raises UnknownId, and then nothing is changed."""
        self._view()
        names = checks.item_ids(ids, self.id_type)
        checks.same_length(names, len(metadata), "metadata")
        texts = [checks.metadata_text(each, i) for i, each in enumerate(metadata)]
        if not names:
            return
        with self._writing:
            self._view()
            with self._database.writing() as connection:
                seq = rows.next_seq(connection)
                rows.set_texts(connection, seq, names, texts, self._unknown)
            self._index.apply(seq, [], [], np.empty((0, self.dim), np.float32), [])

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes what exists of `ids`; returns how many."""
        names = [each for each in ids if checks.could_be_id(each)]
        return self._delete(lambda connection: rows.remove(connection, names))

    def delete_where(self, condition: Filter) -> int:
        """Deletes all items that match; returns how many."""
        where = compile_filter(condition)
        return self._delete(
            lambda connection: rows.remove_where(connection, where.sql, where.params)
        )

    # Reads

    def get(self, ids: Sequence[str], *, with_vectors: bool = False) -> list[Item]:
        """Items in the order of `ids`. Raises UnknownId."""
        self._view()
        for each in ids:
            if not checks.could_be_id(each):
                raise self._unknown(each)
        with self._database.reading() as connection:
            found = rows.texts_by_id(connection, ids)
            for each in ids:
                if each not in found:
                    raise self._unknown(each)
            wanted = [row for row, _ in found.values()] if with_vectors else []
            vectors = rows.vectors_by_row(connection, wanted, self.dim)
        return [
            Item(id=each, metadata=json.loads(text), vector=vectors.get(row))
            for each in ids
            for row, text in (found[each],)
        ]

    def page(
        self,
        after: str,
        limit: int,
        *,
        condition: Filter | None = None,
        with_metadata: bool = True,
        with_vectors: bool = False,
    ) -> Page:
        """Up to `limit` items after a page's `after`. See `types.Collection`."""
        self._view()
        with self._database.reading() as connection:
            return paging.page(
                connection,
                self.dim,
                paging.row_of(after),
                limit,
                condition,
                with_metadata=with_metadata,
                with_vectors=with_vectors,
            )

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        condition: Filter | None = None,
        min_score: float | None = None,
        with_metadata: bool = True,
        with_vectors: bool = False,
        effort: int | None = None,
    ) -> list[list[Hit]]:
        """The k nearest of each query (float32 [Q, dim]), best first. See `types.Collection`."""
        if not with_metadata and not with_vectors:
            return self.search_columns(
                queries, k, condition=condition, min_score=min_score, effort=effort
            ).hits()
        unit = checks.unit_vectors(queries, self.dim)
        checks.effort(effort)
        for _ in range(_ATTEMPTS):
            view, found = self._find(unit, k, condition, effort)
            hits = self._hits(view, found, min_score, with_metadata, with_vectors)
            if hits is not None:
                return hits
        # A hit was deleted each time between the search and the reading of its metadata.
        with self._writing:
            view, found = self._find(unit, k, condition, effort)
            hits = self._hits(view, found, min_score, with_metadata, with_vectors)
        assert hits is not None
        return hits

    def search_columns(
        self,
        queries: Vectors,
        k: int,
        *,
        condition: Filter | None = None,
        min_score: float | None = None,
        effort: int | None = None,
    ) -> Columns:
        """What `search` finds, ids and scores alone. See `types.Collection`."""
        unit = checks.unit_vectors(queries, self.dim)
        checks.effort(effort)
        view, (scores, positions) = self._find(unit, k, condition, effort)
        ids = view.ids[positions]
        if min_score is None and not lacking(positions):
            counts = _all_of(len(ids), ids.shape[1])
        else:
            there = positions >= 0 if min_score is None else scores >= min_score
            ids[~there] = ""
            counts = there.sum(axis=1)
        return Columns(ids=ids, scores=_cosines(scores), counts=counts)

    # Upkeep

    def settle(self) -> None:
        """Does all upkeep that is due now (builds, compaction) instead of in the background."""
        self._view()
        while self._index.maintain(lambda: False):
            pass

    def snapshot(self) -> None:
        """Writes a snapshot of the index, so that the next start need not read every vector."""
        self._view()
        self._upkeep.snapshot()

    def backup(self, destination: Path) -> None:
        """Writes a copy of the database, as of one moment, to a new file while serving."""
        self._view()
        temporary = destination.with_name(destination.name + ".tmp")
        self._database.backup(temporary)
        with database.explained(destination):
            publish(temporary, destination)

    def close(self, reason: ByolError, *, keep: bool = True) -> None:
        """Ends upkeep, writes a snapshot if `keep`, and answers all later calls with `reason`."""
        self._upkeep.stop(snapshot=keep and not self._database.read_only)
        with self._writing:
            self._gone = reason
            self._index.leave_gpu()
            self._database.close()

    # Inside

    def _view(self) -> View:
        if self._gone is not None:
            raise type(self._gone)(str(self._gone))
        return self._index.view

    def _unknown(self, row_id: str) -> UnknownId:
        return UnknownId(f"collection {self.name!r} has no item {row_id[:80]!r}: check the id")

    def _delete(self, remove: rows.Removal) -> int:
        with self._writing:
            self._view()
            with self._database.writing() as connection:
                gone = remove(connection)
                if gone:
                    seq = rows.next_seq(connection)
            if gone:
                self._index.apply(seq, [], [], np.empty((0, self.dim), np.float32), gone)
        self._upkeep.changed(len(gone))
        return len(gone)

    def _commit(self, batches: Sequence[Batch]) -> None:
        with self._writing:
            self._view()
            self._index.reserve(sum(len(batch.ids) for batch in batches))
            changes = []
            with self._database.writing() as connection:
                for batch in batches:
                    seq = rows.next_seq(connection)
                    gone = rows.remove(connection, batch.ids)
                    added = rows.insert(connection, seq, batch.ids, batch.texts, batch.vectors)
                    changes.append((batch, seq, added, gone))
            for batch, seq, added, gone in changes:
                self._index.apply(seq, added, batch.ids, batch.vectors, gone)
                new = len(batch.ids) - len(gone)
                batch.counts = UpsertCounts(inserted=new, updated=len(gone))

    def _find(
        self, unit: Vectors, k: int, condition: Filter | None, effort: int | None
    ) -> tuple[View, Found]:
        view = self._view()
        if condition is None:
            most = view.count
            checks.k_of(k, most)
            return view, ranked(lambda n: self._index.search(view, unit, n, effort), k, most)
        view, chosen = self._matching.positions(condition)
        checks.k_of(k, view.count)
        return view, ranked(
            lambda n: self._index.search_among(view, unit, n, chosen, effort), k, view.count
        )

    def _hits(
        self,
        view: View,
        found: Found,
        min_score: float | None,
        with_metadata: bool,
        with_vectors: bool,
    ) -> list[list[Hit]] | None:
        """Hits with what was asked for; None where one of them is gone by now."""
        scores, positions = found
        if min_score is not None:
            positions = np.where(scores >= min_score, positions, -1)
        texts: dict[int, str] | None = None
        if with_metadata:
            wanted = np.unique(view.rows[positions[positions >= 0]])
            with self._database.reading() as connection:
                texts = rows.texts_by_row(connection, wanted.tolist())
            if len(texts) < len(wanted):
                return None
        return [
            [
                hit_of(
                    view.ids[position],
                    score,
                    {} if texts is None else json.loads(texts[int(view.rows[position])]),
                    view.vectors[position].copy() if with_vectors else None,
                )
                for position, score in zip(places, values, strict=True)
                if position >= 0
            ]
            for places, values in zip(positions.tolist(), _cosines(scores).tolist(), strict=True)
        ]


def _facts(meta: dict[str, str | int], folder: Path) -> tuple[str, int, str, IndexKind, IdType]:
    """Uuid, dimension, encoder, index kind and type of ids. Raises StoreCorrupt."""
    try:
        kind = checks.index_kind(str(meta["index"]))
        dim = checks.dimension(int(meta["dim"]))
        id_type = checks.id_type(str(meta["id_type"]))
        return str(meta["uuid"]), dim, str(meta["encoder_id"]), kind, id_type
    except (KeyError, TypeError, ValueError, InvalidRequest) as error:
        raise StoreCorrupt(
            f"the facts of {folder} are damaged ({error}): restore it from a backup"
        ) from error


@lru_cache(maxsize=64)
def _all_of(queries: int, k: int) -> NDArray[np.int64]:
    """The counts of an answer that lacks nothing."""
    counts = np.full(queries, k)
    counts.flags.writeable = False
    return counts


def _cosines(scores: Vectors) -> Vectors:
    """Scores, best first, without what rounding adds."""
    if len(scores) == 1 and scores.size and scores.item(0) <= 1 and scores.item(-1) >= -1:
        return scores  # a lone query's: without NumPy's fixed costs
    return np.minimum(np.maximum(scores, np.float32(-1)), np.float32(1))
