"""What a collection must answer, worked out the slow way: a dict, and a product of matrices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from byol_serving.collections.collection import LocalCollection
from byol_serving.collections.filters import Filter, matches
from byol_serving.collections.types import Hit, Metadata, Vectors

TOLERANCE = 2e-6


@dataclass
class Model:
    """The items that a collection should hold."""

    vectors: dict[str, Vectors] = field(default_factory=dict)
    metadata: dict[str, Metadata] = field(default_factory=dict)

    def upsert(
        self, ids: Sequence[str], vectors: Vectors, metadata: Sequence[Metadata] | None = None
    ) -> None:
        """Inserts or replaces."""
        texts = [{}] * len(ids) if metadata is None else metadata
        for row_id, vector, text in zip(ids, unit(vectors), texts, strict=True):
            self.vectors[row_id], self.metadata[row_id] = vector, text

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes what exists; returns how many."""
        found = [each for each in ids if each in self.vectors]
        for each in found:
            del self.vectors[each], self.metadata[each]
        return len(found)

    def matching(self, condition: Filter | None) -> list[str]:
        """The ids that meet a condition."""
        if condition is None:
            return list(self.vectors)
        return [each for each, text in self.metadata.items() if matches(condition, text)]

    def check_search(
        self, collection: LocalCollection, queries: Vectors, k: int, condition: Filter | None = None
    ) -> None:
        """Asks the collection and compares with brute force: the same scores, and true ones."""
        ids = self.matching(condition)
        # So much effort that approximate indexes are exact: what is checked is what they hold.
        found = collection.search(queries, k, condition=condition, effort=10_000)
        matrix = np.array([self.vectors[each] for each in ids], np.float32)
        for query, hits in zip(unit(queries), found, strict=True):
            best = np.sort(matrix @ query)[::-1][:k] if ids else np.empty(0, np.float32)
            scores = [hit.score for hit in hits]
            np.testing.assert_allclose(scores, best, atol=TOLERANCE)
            self.check_hits(hits, query, frozenset(ids))

    def check_hits(self, hits: Sequence[Hit], query: Vectors, allowed: frozenset[str]) -> None:
        """Every hit is a stored item that may be found, once, with its own score and metadata."""
        names = [hit.id for hit in hits]
        assert len(set(names)) == len(names)
        for hit in hits:
            assert hit.id in allowed
            assert hit.metadata == self.metadata[hit.id]
            assert abs(hit.score - float(self.vectors[hit.id] @ query)) < TOLERANCE

    def check_all(self, collection: LocalCollection) -> None:
        """The store holds exactly these items, and its index agrees with it."""
        assert collection.info.count == len(self.vectors)
        ids = list(self.vectors)
        for item in collection.get(ids, with_vectors=True):
            assert item.metadata == self.metadata[item.id]
            assert item.vector is not None
            np.testing.assert_allclose(item.vector, self.vectors[item.id], atol=TOLERANCE)
        assert collection.verify().problems == ()


def unit(vectors: Vectors) -> Vectors:
    """Rows of length 1."""
    rows: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return rows


def clustered(count: int, dim: int, *, seed: int = 0, clusters: int = 50) -> Vectors:
    """Unit rows around `clusters` centres, float32 [count, dim]: what embeddings look like."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(1234).standard_normal((clusters, dim))
    spread = generator.standard_normal((count, dim)) * 0.5
    return unit((centres[generator.integers(0, clusters, count)] + spread).astype(np.float32))


def rows_of(metadata: Mapping[str, Metadata], condition: Filter) -> set[str]:
    """The ids whose metadata meet a condition."""
    return {each for each, text in metadata.items() if matches(condition, text)}
