"""Approximate FAISS indexes: HNSW and IVF-Flat, safe to add to while they are searched."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import faiss as _faiss
import numpy as np

from byol_serving.collections.exact import Bits, Found, share_cores
from byol_serving.collections.types import Vectors

faiss: Any = _faiss  # its stubs describe the C++ signatures, not Python's

ApproximateKind = Literal["hnsw", "ivf"]

_HNSW_LINKS = 32
_EF_SEARCH = 64
# Vectors added while searches wait: about 5 ms, the bound on how long a reader waits for a writer.
_ADD_AT_ONCE = {"hnsw": 16, "ivf": 512}
_BUILD_AT_ONCE = 4096
_TRAIN_PER_LIST = 64


class Stopped(Exception):
    """A build was given up because the collection is closing."""


class ReadersWriter:
    """Many readers or one writer; a waiting writer goes before new readers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._waiting = 0
        self._writing = False

    @contextmanager
    def read(self) -> Iterator[None]:
        """Held together with other readers."""
        with self._changed:
            while self._writing or self._waiting:
                self._changed.wait()
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                if not self._readers:
                    self._changed.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        """Held alone."""
        with self._changed:
            self._waiting += 1
            while self._writing or self._readers:
                self._changed.wait()
            self._waiting -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()


class Approximate:
    """One FAISS index whose ids are positions 0, 1, 2, … in the order of adding.

    Nothing is ever removed from it (HNSW cannot): the caller masks positions at search and builds a
    new one when too many are dead. Adding and searching at once would crash FAISS, hence the lock.
    """

    def __init__(self, kind: ApproximateKind, index: Any) -> None:
        self.kind: ApproximateKind = kind
        self.lock = ReadersWriter()
        self._index = index

    @classmethod
    def build(
        cls, kind: ApproximateKind, vectors: Vectors, stopping: Callable[[], bool]
    ) -> "Approximate":
        """Trains on and adds all of `vectors` (float32 [N, D]). Raises Stopped if asked to."""
        dim = vectors.shape[1]
        share_cores(len(vectors))
        match kind:
            case "hnsw":
                index = faiss.IndexHNSWFlat(dim, _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            case "ivf":
                index = _trained_ivf(vectors)
        for start in range(0, len(vectors), _BUILD_AT_ONCE):
            if stopping():
                raise Stopped
            index.add(vectors[start : start + _BUILD_AT_ONCE])
        return cls(kind, index)

    @classmethod
    def load(cls, kind: ApproximateKind, path: Path, dim: int) -> "Approximate":
        """Reads a file that `save` wrote, its checksum already verified. Raises ValueError."""
        # read_index gives the concrete class. A downcast of its answer would not keep that alive.
        index = faiss.read_index(str(path))
        wanted = faiss.IndexHNSWFlat if kind == "hnsw" else faiss.IndexIVFFlat
        if not isinstance(index, wanted) or index.d != dim:
            raise ValueError(f"{path} holds no {kind} index of {dim} dimensions")
        return cls(kind, index)

    def save(self, path: Path) -> None:
        """Writes the index; the caller holds `lock` for reading and syncs the file."""
        faiss.write_index(self._index, str(path))

    @property
    def size(self) -> int:
        """How many positions it covers, from 0."""
        return int(self._index.ntotal)

    def outgrown(self, count: int) -> bool:
        """Whether it was trained for a collection much smaller than `count`."""
        return self.kind == "ivf" and _lists_for(count) >= 2 * int(self._index.nlist)

    def add(self, vectors: Vectors, stopping: Callable[[], bool]) -> None:
        """Adds in small steps, so that a search never waits longer than one of them."""
        step = _ADD_AT_ONCE[self.kind]
        for start in range(0, len(vectors), step):
            if stopping():
                return
            share_cores(1)
            with self.lock.write():
                self._index.add(vectors[start : start + step])

    def search(
        self, queries: Vectors, k: int, alive: Bits | None, kept: float
    ) -> tuple[Found, int]:
        """The k best of each query whose bit is set, and how many positions were covered.

        Args:
            queries: float32 [Q, D].
            k: how many, at least 1.
            alive: bitmap over positions; those beyond it are not searched. None for all.
            kept: the share of set bits: the smaller, the wider the search.
        """
        share_cores(len(queries))
        selector = None if alive is None else faiss.IDSelectorBitmap(alive)
        widening = 1.0 / max(kept, 0.05)
        with self.lock.read():
            match self.kind:
                case "hnsw":
                    ef = int(max(_EF_SEARCH, 2 * k) * math.sqrt(widening))
                    parameters = faiss.SearchParametersHNSW(efSearch=ef, sel=selector)
                case "ivf":
                    lists = int(self._index.nlist)
                    probes = min(lists, int(max(8, lists // 32) * math.sqrt(widening)))
                    parameters = faiss.SearchParametersIVF(nprobe=probes, sel=selector)
            scores, positions = self._index.search(queries, k, params=parameters)
            covered = self.size
        scores[positions < 0] = -np.inf
        return (scores, positions), covered


def _lists_for(count: int) -> int:
    # FAISS wants 39 training vectors a list.
    return int(np.clip(min(4 * math.sqrt(count), count // 39), 1, 65_536))


def _trained_ivf(vectors: Vectors) -> Any:
    count, dim = vectors.shape
    lists = _lists_for(count)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical = True  # centroids of unit vectors compared by inner product
    sample = np.random.default_rng(0).permutation(count)[: lists * _TRAIN_PER_LIST]
    index.train(vectors[np.sort(sample)])
    return index
