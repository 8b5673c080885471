"""What a collection takes and gives: plain values, free of SQLite, FAISS and gRPC."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from byol_serving.collections.filters import Filter

Vectors = NDArray[np.float32]
Json: TypeAlias = "None | bool | int | float | str | Sequence[Json] | Mapping[str, Json]"
Metadata = Mapping[str, Json]
IndexKind = Literal[
    "flat", "hnsw", "hnsw-sq8", "ivf", "ivf-fp16", "ivf-sq8", "ivf-pq", "ivf-rabitq", "auto"
]


IdType = Literal["string", "int64"]
"""What ids may be. They are text everywhere; of an int64 collection, the decimal digits of one."""


@dataclass(frozen=True, kw_only=True)
class CollectionInfo:
    """A collection's facts."""

    name: str
    dim: int
    encoder_id: str
    count: int
    index: str
    """The index kind that answers searches now (with `auto`, the one it chose)."""
    version: int | None = None
    """Grows with every change; None where the backend does not count them."""
    recall: float | None = None
    """The part of the true nearest that the index finds; None until it is measured."""
    id_type: IdType = "string"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One stored item; `vector` float32 [D], only if asked for."""

    id: str
    metadata: Metadata
    vector: Vectors | None = None

    @property
    def int_id(self) -> int:
        """The id of an item whose collection has `id_type` int64. Raises ValueError for others."""
        return int(self.id)


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One neighbour; `score` is the cosine similarity, -1 .. 1."""

    id: str
    score: float
    metadata: Metadata
    vector: Vectors | None = None

    @property
    def int_id(self) -> int:
        """The id of an item whose collection has `id_type` int64. Raises ValueError for others."""
        return int(self.id)


def hit_of(name: str, score: float, metadata: Metadata, vector: Vectors | None = None) -> Hit:
    """A Hit, past its class's own __init__: that of a frozen dataclass takes three times as long,
    and ten of them for each query were a third of a search in memory.
    """
    hit = object.__new__(Hit)
    fields = hit.__dict__
    fields["id"], fields["score"], fields["metadata"], fields["vector"] = (
        name,
        score,
        metadata,
        vector,
    )
    return hit


class Columns(NamedTuple):
    """The neighbours of many queries as arrays, best first: an object for each takes longer to make
    than an index takes to find it.
    """

    ids: NDArray[np.object_]
    """str [Q, K]; empty strings behind a query's last."""
    scores: Vectors
    """float32 [Q, K]: cosine similarities, -1 .. 1."""
    counts: NDArray[np.int64]
    """int64 [Q]: how many neighbours each query has."""

    @classmethod
    def of(cls, answers: Sequence[Sequence[Hit]]) -> "Columns":
        """The reverse of `hits`."""
        flat = [hit for hits in answers for hit in hits]
        scores = np.array([hit.score for hit in flat], np.float32)
        counts = np.array([len(hits) for hits in answers], np.int64)
        return cls.filled([hit.id for hit in flat], scores, counts)

    @classmethod
    def filled(cls, ids: Sequence[str], scores: Vectors, counts: NDArray[np.int64]) -> "Columns":
        """From the neighbours of all queries one after another: ids, and scores float32 [sum]."""
        shape = len(counts), int(counts.max(initial=0))
        if len(scores) == math.prod(shape):  # nothing is lacking, as mostly
            names = np.array(ids, object).reshape(shape)
            return cls(ids=names, scores=scores.reshape(shape), counts=counts)
        names, values = np.full(shape, "", object), np.full(shape, -1, np.float32)
        there = np.arange(shape[1]) < counts[:, None]
        names[there], values[there] = ids, scores
        return cls(ids=names, scores=values, counts=counts)

    def flat(self) -> tuple[list[str], Vectors]:
        """The reverse of `filled`."""
        if int(self.counts.sum()) == self.ids.size:
            return self.ids.ravel().tolist(), self.scores.ravel()
        there = np.arange(self.ids.shape[1]) < self.counts[:, None]
        return self.ids[there].tolist(), self.scores[there]

    def after(self, offset: int) -> "Columns":
        """Without the best so many of each query."""
        return Columns(
            ids=self.ids[:, offset:],
            scores=self.scores[:, offset:],
            counts=np.maximum(self.counts - offset, 0),
        )

    def hits(self) -> list[list[Hit]]:
        """The same as hits, without metadata."""
        rows = zip(self.ids.tolist(), self.scores.tolist(), self.counts.tolist(), strict=True)
        return [
            [hit_of(name, score, {}) for name, score in zip(names[:count], scores, strict=False)]
            for names, scores, count in rows
        ]


@dataclass(frozen=True, kw_only=True)
class Page:
    """Consecutive items, in the order they were stored (in Milvus: in the order of their ids)."""

    items: Sequence[Item]
    after: str
    """Where the next page begins; empty after the last item."""


@dataclass(frozen=True, kw_only=True)
class UpsertCounts:
    """How many items were new and how many replaced one of the same id."""

    inserted: int
    updated: int


@dataclass(frozen=True, kw_only=True)
class IndexStats:
    """One moment of an index."""

    kind: str
    """What the collection was created with."""
    answering: str
    """What answers searches now."""
    wanted: str
    """What its size calls for: differs from `answering` while that is being built."""
    count: int
    deleted: int
    """Positions of deleted items, not yet squeezed out."""
    unabsorbed: int
    """New items that are scanned beside the approximate index."""
    effort: int | None
    """Lists read (IVF) or width of the walk (HNSW) of a search; None for an exact index."""
    recall: float
    """Recall@10 when the index was built, of queries it had not been given: the newest 256 items,
    which were added after. 1 for an exact index."""
    recall_target: float
    vector_bytes: int
    """Memory of the float32 vectors."""
    index_bytes: int
    """Memory of the approximate index."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a comparison found. Lists name at most 100 items."""

    stored: int
    """Items in the store."""
    indexed: int
    """Items in the index."""
    problems: tuple[str, ...]
    """One line each; none where all is well."""

    @property
    def ok(self) -> bool:
        """Whether index and store agree and every checksum holds."""
        return not self.problems


class Collection(Protocol):
    """One collection. All methods block (call them off the event loop) and are thread-safe.

    Vectors are L2-normalised on the way in, so that inner product is cosine similarity.
    """

    @property
    def info(self) -> CollectionInfo:
        """Name, dimension, encoder, count, index."""
        ...

    def stats(self) -> IndexStats:
        """How the index stands.

        Raises:
            FailedPrecondition: the backend does not tell.
        """
        ...

    def verify(self) -> Verification:
        """Compares the index with the store, and all stored bytes with their checksums.

        Raises:
            FailedPrecondition: the backend cannot.
        """
        ...

    def upsert(
        self, ids: Sequence[str], vectors: Vectors, metadata: Sequence[Metadata] | None = None
    ) -> UpsertCounts:
        """Inserts or replaces; returns once the whole batch is on disk.

        Raises:
            InvalidRequest: lengths differ, or an id is empty, over 512 bytes, twice in the batch,
                or not the decimal digits of a 64-bit integer where the collection's ids are such.
            InvalidVector: not [N, dim], not finite, or zero.
            StoreError: the disk refused; nothing of the batch is stored.
        """
        ...

    def set_metadata(self, ids: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """Replaces metadata only. Raises UnknownId, and then nothing is changed."""
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes what exists of `ids`; returns how many."""
        ...

    def delete_where(self, condition: Filter) -> int:
        """Deletes all items that match; returns how many."""
        ...

    def get(self, ids: Sequence[str], *, with_vectors: bool = False) -> list[Item]:
        """Items in the order of `ids`. Raises UnknownId."""
        ...

    def page(
        self,
        after: str,
        limit: int,
        *,
        condition: Filter | None = None,
        with_metadata: bool = True,
        with_vectors: bool = False,
    ) -> Page:
        """Up to `limit` items after a page's `after`, from the first where it is empty.

        Walking all pages gives every item that is there throughout once. Raises InvalidRequest for
        an `after` that no page gave.
        """
        ...

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
        """The k nearest of each query (float32 [Q, dim]), best first; exact under any filter.

        Equal scores are in the order of pages, so that the k best are always the
        beginning of the k + 1 best (of an exact index; an approximate one may find more with more).
        Fewer than k come back where fewer items match the filter or reach min_score. `effort`
        replaces, for this call, what an approximate index was tuned to: lists that are read (IVF)
        or the width of the walk (HNSW).

        Raises:
            InvalidRequest: k is below 1 or above the collection's size.
            InvalidVector: as in `upsert`.
        """
        ...

    def search_columns(
        self,
        queries: Vectors,
        k: int,
        *,
        condition: Filter | None = None,
        min_score: float | None = None,
        effort: int | None = None,
    ) -> Columns:
        """What `search` finds, ids and scores alone: the fastest way to ask."""
        ...


class Store(Protocol):
    """A set of collections by name. All methods block and are thread-safe."""

    def create(
        self,
        name: str,
        *,
        dim: int,
        encoder_id: str,
        index: IndexKind = "flat",
        id_type: IdType = "string",
    ) -> Collection:
        """Makes an empty collection; it is stored when this returns.

        Raises:
            InvalidRequest: the name, dimension, index kind or id type is not allowed.
            AlreadyExists: there is one of that name.
            StoreError: the backend refused.
        """
        ...

    def get(self, name: str) -> Collection:
        """The collection. Raises UnknownCollection, or what kept it from being opened."""
        ...

    def list(self) -> list[CollectionInfo]:
        """The facts of all collections, by name."""
        ...

    def drop(self, name: str) -> None:
        """Deletes a collection with everything in it. Raises UnknownCollection."""
        ...

    def backup(self, destination: Path) -> None:
        """Copies all collections into a new folder, each as of one moment, while serving.

        Raises:
            InvalidRequest: the destination exists.
            FailedPrecondition: the backend cannot.
            StoreError: it cannot be written.
        """
        ...

    def restore(self, source: Path, name: str) -> Collection:
        """Brings back one collection from its folder in a backup, while serving.

        Raises:
            NotFound: there is no such folder.
            AlreadyExists: there is a collection of that name.
            FailedPrecondition: the backend cannot.
            StoreCorrupt: the copy is damaged; nothing is restored.
        """
        ...

    def close(self) -> None:
        """Gives the store up; later calls are Unavailable."""
        ...
