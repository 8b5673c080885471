"""What a collection takes and gives: plain values, free of SQLite, FAISS and gRPC."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from byol_serving.collections.filters import Filter

Vectors = NDArray[np.float32]
Json: TypeAlias = "None | bool | int | float | str | Sequence[Json] | Mapping[str, Json]"
Metadata = Mapping[str, Json]
IndexKind = Literal[
    "flat", "hnsw", "hnsw-sq8", "ivf", "ivf-fp16", "ivf-sq8", "ivf-pq", "ivf-rabitq", "auto"
]


@dataclass(frozen=True, kw_only=True)
class CollectionInfo:
    """A collection's facts."""

    name: str
    dim: int
    encoder_id: str
    count: int
    index: str
    """The index kind that answers searches now (with `auto`, the one it chose)."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One stored item; `vector` float32 [D], only if asked for."""

    id: str
    metadata: Metadata
    vector: Vectors | None = None


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One neighbour; `score` is the cosine similarity, -1 .. 1."""

    id: str
    score: float
    metadata: Metadata
    vector: Vectors | None = None


@dataclass(frozen=True, kw_only=True)
class UpsertCounts:
    """How many items were new and how many replaced one of the same id."""

    inserted: int
    updated: int


class Collection(Protocol):
    """One collection. All methods block (call them off the event loop) and are thread-safe.

    Vectors are L2-normalised on the way in, so that inner product is cosine similarity.
    """

    @property
    def info(self) -> CollectionInfo:
        """Name, dimension, encoder, count, index."""
        ...

    def upsert(
        self, ids: Sequence[str], vectors: Vectors, metadata: Sequence[Metadata] | None = None
    ) -> UpsertCounts:
        """Inserts or replaces; returns once the whole batch is on disk.

        Raises:
            InvalidRequest: lengths differ, an id is empty, over 512 bytes, or twice in the batch.
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

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        condition: Filter | None = None,
        min_score: float | None = None,
        with_metadata: bool = True,
        with_vectors: bool = False,
    ) -> list[list[Hit]]:
        """The k nearest of each query (float32 [Q, dim]), best first; exact under any filter.

        Fewer than k come back where fewer items match the filter or reach min_score.

        Raises:
            InvalidRequest: k is below 1 or above the collection's size.
            InvalidVector: as in `upsert`.
        """
        ...
