"""An approximate index: safe to add to while it is searched, tuned to a recall when it is built."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np

from byol_serving.collections import kinds
from byol_serving.collections.exact import (
    SEARCHING,
    Bits,
    Found,
    Positions,
    marked,
    nearest,
    nearest_among,
    nothing,
    pack,
    rescored,
    share_cores,
    unpack,
)
from byol_serving.collections.kinds import ApproximateKind
from byol_serving.collections.types import Vectors

faiss: Any = _faiss  # its stubs describe the C++ signatures, not Python's

# Vectors added while searches wait, and queries searched while adding waits: each a few
# milliseconds on one core. Their sum bounds how long a reader waits for a writer.
_ADD_AT_ONCE_GRAPH, _ADD_AT_ONCE_LISTS = 16, 512
_SEARCH_AT_ONCE = 256
_BUILD_AT_ONCE = 4096
_HELD_BACK = 256
_RECALL_AT = 10


class Stopped(Exception):
    """A build was given up because the collection is closing."""


class ReadersWriter:
    """Many readers or one writer; a waiting writer goes before new readers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._waiting = 0
        self._writing = False
        self.reading = _Reading(self)
        """Held together with other readers: `with lock.reading`."""

    def begin_reading(self) -> None:
        """Waits until nobody writes or is about to."""
        with self._changed:
            while self._writing or self._waiting:
                self._changed.wait()
            self._readers += 1

    def end_reading(self) -> None:
        """Lets a waiting writer go on."""
        with self._changed:
            self._readers -= 1
            if not self._readers and self._waiting:
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
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


class _Reading:
    """The reader's side as a context: a generator's would cost each search some microseconds."""

    def __init__(self, lock: ReadersWriter) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.begin_reading()

    def __exit__(self, *error: object) -> None:
        self._lock.end_reading()


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a search costs and finds, as measured when the index was built."""

    effort: int
    """Lists that a search reads (IVF), or the width of its walk (HNSW)."""
    effort_of_tenth: int
    """The same where a filter keeps a tenth of the items: their neighbours lie farther away."""
    recall: float
    """Recall@10 on held-back queries: stored vectors, each left out of its own answer."""
    target: float
    """What was asked for; `recall` is below it where no effort reaches it."""


class Approximate:
    """One FAISS index whose ids are positions 0, 1, 2, … in the order of adding.

    Nothing is ever removed from it (HNSW cannot): the caller masks positions at search and builds a
    new one when too many are dead. Adding and searching at once would crash FAISS, hence the lock.
    """

    def __init__(self, kind: ApproximateKind, index: Any, tuning: Tuning) -> None:
        self.kind: ApproximateKind = kind
        self.tuning = tuning
        self.lock = ReadersWriter()
        self._index = index

    @classmethod
    def build(
        cls,
        kind: ApproximateKind,
        vectors: Vectors,
        stopping: Callable[[], bool],
        *,
        target: float = 0.95,
    ) -> "Approximate":
        """Trains on and adds all of `vectors` (float32 [N, D]), and finds what reaches `target`.

        Raises:
            Stopped: asked to, by `stopping`.
        """
        share_cores(len(vectors))
        index = kinds.trained(kind, vectors)
        for start in range(0, len(vectors), _BUILD_AT_ONCE):
            if stopping():
                raise Stopped
            index.add(vectors[start : start + _BUILD_AT_ONCE])
        built = cls(kind, index, Tuning(effort=1, effort_of_tenth=1, recall=0, target=target))
        built._tune(vectors, target)
        return built

    @classmethod
    def load(cls, kind: ApproximateKind, path: Path, dim: int, tuning: Tuning) -> "Approximate":
        """Reads a file that `save` wrote, its checksum already verified. Raises ValueError."""
        # read_index gives the concrete class. A downcast of its answer would not keep that alive.
        index = faiss.read_index(str(path))
        if not kinds.recognised(kind, index, dim):
            raise ValueError(f"{path} holds no {kind} index of {dim} dimensions")
        return cls(kind, index, tuning)

    def save(self, path: Path) -> None:
        """Writes the index; the caller holds `lock` for reading and syncs the file."""
        faiss.write_index(self._index, str(path))

    @property
    def size(self) -> int:
        """How many positions it covers, from 0."""
        return int(self._index.ntotal)

    @property
    def nbytes(self) -> int:
        """Memory that it takes, without what an allocator adds."""
        return kinds.item_bytes(self.kind, int(self._index.d)) * self.size

    def outgrown(self, count: int) -> bool:
        """Whether it was trained for a collection much smaller than `count`."""
        graph = kinds.is_graph(self.kind)
        return not graph and kinds.lists_for(count) >= 2 * int(self._index.nlist)

    def add(self, vectors: Vectors, stopping: Callable[[], bool]) -> None:
        """Adds in small steps, so that a search never waits longer than one of them."""
        step = _ADD_AT_ONCE_GRAPH if kinds.is_graph(self.kind) else _ADD_AT_ONCE_LISTS
        for start in range(0, len(vectors), step):
            if stopping():
                return
            share_cores(1)
            with self.lock.writing():
                self._index.add(vectors[start : start + step])

    def search(
        self,
        queries: Vectors,
        k: int,
        vectors: Vectors,
        alive: Bits | None,
        kept: float,
        *,
        effort: int | None = None,
    ) -> tuple[Found, int]:
        """The k best of each query whose bit is set, and how many positions were covered.

        Args:
            queries: float32 [Q, D].
            k: how many, at least 1.
            vectors: float32 [N, D] by position. Positions beyond them are not searched.
            alive: bitmap over them; None for all.
            kept: the share of set bits: the smaller, the wider the search.
            effort: instead of the tuned one.
        """
        if effort is None:
            effort = self.tuning.effort if kept == 1 else self._widened(max(kept, 0.05))
        covered = min(self.size, len(vectors))
        bits = alive if alive is None or covered == len(vectors) else _first(alive, covered)
        with SEARCHING:
            share_cores(len(queries))
            if len(queries) <= _SEARCH_AT_ONCE:
                return self._search(queries, k, vectors, covered, bits, effort), covered
            found = nothing(len(queries), k)
            for start in range(0, len(queries), _SEARCH_AT_ONCE):
                some = slice(start, start + _SEARCH_AT_ONCE)
                found[0][some], found[1][some] = self._search(
                    queries[some], k, vectors, covered, bits, effort
                )
            return found, covered

    def _widened(self, kept: float) -> int:
        """The effort where a mask keeps this share, between and beyond the two that were tuned."""
        tuned = self.tuning
        wider = tuned.effort_of_tenth / tuned.effort
        return math.ceil(tuned.effort * float(wider ** -math.log10(kept)))

    def _search(
        self,
        queries: Vectors,
        k: int,
        vectors: Vectors,
        covered: int,
        bits: Bits | None,
        effort: int,
    ) -> Found:
        count = kinds.candidates(self.kind, k)
        if kinds.is_graph(self.kind):
            # Tuned for ten; a walk for more has to be wider.
            effort = max(effort, count if count <= _RECALL_AT + 1 else 2 * count)
        else:
            effort = min(effort, int(self._index.nlist))
        with self.lock.reading:
            if bits is not None:
                selector = faiss.IDSelectorBitmap(bits)
            elif self.size > covered:  # it grew meanwhile, beyond the caller's view
                selector = faiss.IDSelectorRange(0, covered)
            else:
                selector = None
            parameters = kinds.parameters(self.kind, effort, selector)
            scores, positions = self._index.search(queries, count, params=parameters)
        if kinds.is_lossy(self.kind):
            return rescored(queries, vectors, positions, k)
        return marked(scores, positions)

    def _tune(self, vectors: Vectors, target: float) -> None:
        """Finds the least efforts that reach the target, or the greatest there are."""
        if len(vectors) < 2:
            return
        effort, recall = self._least_effort(vectors, target, None)
        tenth = np.random.default_rng(2).random(len(vectors)) < 0.1
        of_tenth = effort
        if tenth.sum() > _RECALL_AT:
            of_tenth, _ = self._least_effort(vectors, target, pack(tenth), least=effort)
        self.tuning = Tuning(effort=effort, effort_of_tenth=of_tenth, recall=recall, target=target)

    def _least_effort(
        self, vectors: Vectors, target: float, alive: Bits | None, *, least: int = 1
    ) -> tuple[int, float]:
        """An effort and its recall on held-back queries: stored vectors, left out of answers."""
        count = len(vectors)
        k = min(_RECALL_AT, count - 1)
        number = min(_HELD_BACK, count)
        asked = np.sort(np.random.default_rng(1).choice(count, number, replace=False))
        queries = vectors[asked]
        if alive is None:
            _, best = nearest(queries, vectors, k + 1, None, 0)
        else:
            _, best = nearest_among(queries, vectors, np.flatnonzero(unpack(alive, count)), k + 1)
        truth = _without(best, asked, k)
        tried = (1, 0.0)
        for effort in kinds.efforts(self.kind, self._index):
            if effort < least:
                continue
            (_, found), _ = self.search(queries, k + 1, vectors, alive, 1.0, effort=effort)
            tried = effort, _recall(_without(found, asked, k), truth)
            if tried[1] >= target:
                break
        return tried


def _first(bits: Bits, size: int) -> Bits:
    """The first `size` bits of a bitmap: what lies behind is not set for FAISS."""
    cut = bits[: (size + 7) // 8].copy()
    if size % 8:
        cut[-1] &= (1 << size % 8) - 1
    return cut


def _without(found: Positions, own: Positions, k: int) -> Positions:
    """The first k of each row that are not the row's own position."""
    order = np.argsort(found == own[:, None], axis=1, kind="stable")[:, :k]
    return np.take_along_axis(found, order, axis=1)


def _recall(found: Positions, truth: Positions) -> float:
    hits = (found[:, :, None] == truth[:, None, :]).any(axis=1)
    return float(hits.mean())
