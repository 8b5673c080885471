"""One collection in Milvus: every method a request or two."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pymilvus

from byol_serving.collections import checks, paging
from byol_serving.collections.filters import Filter
from byol_serving.collections.milvus_terms import expression, id_in, numbers_of, quoted, terms_of
from byol_serving.collections.sql import compile_filter
from byol_serving.collections.types import (
    CollectionInfo,
    Columns,
    Hit,
    IdType,
    IndexKind,
    Item,
    Metadata,
    Page,
    UpsertCounts,
    Vectors,
)
from byol_serving.errors import (
    FailedPrecondition,
    InvalidRequest,
    StoreError,
    Unavailable,
    UnknownCollection,
    UnknownId,
)

MAX_K = 16_384
"""Milvus's limit on the neighbours of one query."""
_MAX_METADATA_BYTES = 65_536
"""Milvus's limit on a JSON field."""
STRONG = "Strong"
"""The consistency with which a search sees every acknowledged write."""
_EF, _NPROBE = 128, 32
"""Effort of a search where none is asked for; Milvus has no tuning to a recall."""
_NO_COLLECTION, _NO_SERVER = 100, 2


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the registry says of a collection."""

    name: str
    dim: int
    encoder_id: str
    index: IndexKind
    table: str
    """Its name in Milvus, which allows fewer characters than ours."""
    id_type: IdType = "string"
    """The registry of an earlier version does not say it: all ids were strings."""


class MilvusCollection:
    """See `types.Collection`."""

    def __init__(self, client: Any, uri: str, facts: Facts) -> None:
        """Made by the store."""
        self.facts = facts
        self._client = client
        self._uri = uri
        # Counting and writing are two requests: other servers may come between, our threads not.
        self._writing = threading.Lock()

    @property
    def info(self) -> CollectionInfo:
        """Name, dimension, encoder, count, index."""
        (row,) = self._query("", ["count(*)"], None)
        return CollectionInfo(
            name=self.facts.name,
            dim=self.facts.dim,
            encoder_id=self.facts.encoder_id,
            count=int(row["count(*)"]),
            index=self.facts.index,
            recall=1.0 if self.facts.index == "flat" else None,
            id_type=self.facts.id_type,
        )

    def stats(self) -> NoReturn:
        """Not here: raises FailedPrecondition."""
        cannot("stats", "Milvus tells how its indexes stand")

    def verify(self) -> NoReturn:
        """Not here: raises FailedPrecondition."""
        cannot("verify", "Milvus checks its own files")

    def upsert(
        self, ids: Sequence[str], vectors: Vectors, metadata: Sequence[Metadata] | None = None
    ) -> UpsertCounts:
        """Inserts or replaces. See `types.Collection`."""
        names = checks.item_ids(ids, self.facts.id_type)
        unit = checks.unit_vectors(vectors, self.facts.dim)
        checks.same_length(names, len(unit), "vectors")
        given = [{} for _ in names] if metadata is None else metadata
        rows = _rows(names, unit, given)
        with self._writing:
            known = self._known(names)
            self._upsert(rows)
        return UpsertCounts(inserted=len(names) - len(known), updated=len(known))

    def set_metadata(self, ids: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """Replaces metadata. Milvus has no such update: the vectors are read and written again."""
        names = checks.item_ids(ids, self.facts.id_type)
        _rows(names, np.empty((len(names), 0), np.float32), metadata)  # refused before any reading
        with self._writing:
            items = self.get(names, with_vectors=True)
            vectors = [np.asarray(item.vector) for item in items]
            if vectors:
                self._upsert(_rows(names, np.stack(vectors), metadata))

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes what exists of `ids`; returns how many."""
        names = [each for each in ids if checks.could_be_id(each)]
        with self._writing:
            known = self._known(names)
            if known:
                self._delete(id_in(known))
        return len(known)

    def delete_where(self, condition: Filter) -> int:
        """Deletes all items that match; returns how many."""
        test = _expression(condition)
        with self._writing:
            (row,) = self._query(test, ["count(*)"], None)
            self._delete(test)
        return int(row["count(*)"])

    def get(self, ids: Sequence[str], *, with_vectors: bool = False) -> list[Item]:
        """Items in the order of `ids`. Raises UnknownId."""
        names = [each for each in ids if checks.could_be_id(each)]
        fields = ["metadata", *(["vector"] if with_vectors else [])]
        rows = self._query(id_in(names), fields, len(names)) if names else []
        found = {row["id"]: row for row in rows}
        for each in ids:
            if each not in found:
                raise UnknownId(
                    f"collection {self.facts.name!r} has no item {each[:80]!r}: check the id"
                )
        return [_item(found[each]) for each in ids]

    def page(
        self,
        after: str,
        limit: int,
        *,
        condition: Filter | None = None,
        with_metadata: bool = True,
        with_vectors: bool = False,
    ) -> Page:
        """Up to `limit` items after an id, in the order of their ids. See `types.Collection`."""
        paging.limit_of(limit)
        if not checks.could_be_id(after):
            raise InvalidRequest(f"page token {after[:40]!r} is not one that a page gave")
        tests = [f"id > {quoted(after)}", *([_expression(condition)] if condition else [])]
        fields = _fields(with_metadata, with_vectors)
        # Of what matches, Milvus returns the first by primary key.
        rows = self._query(" and ".join(tests), fields, limit + 1)
        rows.sort(key=lambda row: str(row["id"]))
        return Page(
            items=[_item(row) for row in rows[:limit]],
            after=rows[limit - 1]["id"] if len(rows) > limit else "",
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
        unit = checks.unit_vectors(queries, self.facts.dim)
        checks.effort(effort)
        count = self.info.count
        checks.k_of(k, count)
        if k > MAX_K:
            raise InvalidRequest(f"k {k} is over {MAX_K}, the milvus backend's limit: ask for less")
        if not len(unit):
            return []
        test = "" if condition is None else _expression(condition)
        fields = _fields(with_metadata, with_vectors)
        most = min(count, MAX_K)
        asked = min(k + 1, most)
        found = self._search(unit, asked, test, fields, effort)
        while asked < most and any(_tied(hits, k, asked) for hits in found):
            asked = min(2 * asked, most)
            found = self._search(unit, asked, test, fields, effort)
        best = [sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k] for hits in found]
        if min_score is None:
            return best
        return [[hit for hit in hits if hit.score >= min_score] for hits in best]

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
        found = self.search(
            queries,
            k,
            condition=condition,
            min_score=min_score,
            with_metadata=False,
            effort=effort,
        )
        return Columns.of(found)

    # Inside

    def _search(
        self, unit: Vectors, k: int, test: str, fields: Sequence[str], effort: int | None
    ) -> list[list[Hit]]:
        match self.facts.index:
            case "hnsw":
                params = {"ef": max(effort or _EF, k)}
            case "flat" | "auto":
                params = {}
            case _:
                params = {"nprobe": effort or _NPROBE}
        with explained(self._uri):
            answers = self._client.search(
                self.facts.table,
                data=list(unit),
                limit=k,
                filter=test,
                output_fields=list(fields),
                search_params={"metric_type": "IP", "params": params},
                consistency_level=STRONG,
            )
        return [
            [_hit(row["id"], row["distance"], row.get("entity", {})) for row in answer]
            for answer in answers
        ]

    def _query(self, test: str, fields: Sequence[str], limit: int | None) -> list[dict[str, Any]]:
        with explained(self._uri):
            rows: list[dict[str, Any]] = self._client.query(
                self.facts.table,
                filter=test,
                output_fields=list(fields),
                consistency_level=STRONG,
                **({} if limit is None else {"limit": limit}),
            )
        return rows

    def _known(self, ids: Sequence[str]) -> list[str]:
        return [row["id"] for row in self._query(id_in(ids), ["id"], len(ids))] if ids else []

    def _upsert(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            with explained(self._uri):
                self._client.upsert(self.facts.table, rows)

    def _delete(self, test: str) -> None:
        with explained(self._uri):
            self._client.delete(self.facts.table, filter=test)


def _rows(
    ids: Sequence[str], vectors: Vectors, metadata: Sequence[Metadata]
) -> list[dict[str, Any]]:
    checks.same_length(ids, len(metadata), "metadata")
    for position, each in enumerate(metadata):
        size = len(checks.metadata_text(each, position).encode())
        if size > _MAX_METADATA_BYTES:
            raise InvalidRequest(
                f"metadata {position} has {size} bytes, the milvus backend takes at most"
                f" {_MAX_METADATA_BYTES}: keep large payloads elsewhere and store their address"
            )
    return [
        {
            "id": name,
            "vector": vector,
            "metadata": dict(each),
            "numbers": numbers_of(each),
            "terms": terms_of(each),
        }
        for name, vector, each in zip(ids, vectors, metadata, strict=True)
    ]


def _expression(condition: Filter) -> str:
    compile_filter(condition)  # refuses what is too deep or too long, as the local store does
    return expression(condition)


def _fields(with_metadata: bool, with_vectors: bool) -> list[str]:
    named = (("metadata", with_metadata), ("vector", with_vectors))
    return ["id", *(name for name, wanted in named if wanted)]


def _item(row: dict[str, Any]) -> Item:
    return Item(id=row["id"], metadata=row.get("metadata") or {}, vector=_vector(row))


def _hit(item_id: str, score: float, row: dict[str, Any]) -> Hit:
    clipped = max(-1.0, min(1.0, score))
    return Hit(id=item_id, score=clipped, metadata=row.get("metadata") or {}, vector=_vector(row))


def _vector(row: dict[str, Any]) -> Vectors | None:
    return np.asarray(row["vector"], np.float32) if "vector" in row else None


def _tied(hits: Sequence[Hit], k: int, asked: int) -> bool:
    return len(hits) == asked and hits[k - 1].score == hits[-1].score


def cannot(what: str, remedy: str) -> NoReturn:
    """Says by name what this backend has no counterpart to."""
    raise FailedPrecondition(f"the milvus backend has no {what}: {remedy}")


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turns Milvus's errors into ours."""
    try:
        yield
    except pymilvus.MilvusException as error:
        text = str(error.message).splitlines()[0][:200] if error.message else str(error)
        if error.code == _NO_COLLECTION:
            raise UnknownCollection(f"milvus at {uri}: {text}: it was dropped") from error
        if error.code == _NO_SERVER:
            raise Unavailable(f"milvus at {uri} does not answer: start it") from error
        raise StoreError(f"milvus at {uri}: {text}: see its log") from error
