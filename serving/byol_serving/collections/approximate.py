"""An approximate index: safe to add to while it is searched, tuned to a recall when it is built."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byol_serving.collections import kinds
from byol_serving.collections.desk import desk_for
from byol_serving.collections.exact import (
    SEARCHING,
    Bits,
    Found,
    Positions,
    marked,
    nothing,
    rescored,
    share_cores,
    threads_for,
)
from byol_serving.collections.faiss_library import faiss
from byol_serving.collections.gpu import Copy, Gpu
from byol_serving.collections.huge_pages import prefer_huge_pages
from byol_serving.collections.kinds import ApproximateKind
from byol_serving.collections.tuning import RECALL_AT, Tuning, held_back, tuned
from byol_serving.collections.types import Vectors

if TYPE_CHECKING:
    from byol_serving.collections.byte_graph import ByteGraph

# Vectors added while searches wait, and queries searched while adding waits: each a few
# milliseconds on one core. Their sum bounds how long a reader waits for a writer.
_ADD_AT_ONCE_GRAPH, _ADD_AT_ONCE_LISTS = 16, 512
_SEARCH_AT_ONCE = 256
_BUILD_AT_ONCE = 4096
_OUTGROWN = 2
"""For so many times the items a graph is built anew. To find as much takes a wider walk (.95 of
20,000 vectors 32, of 100,000 46), and that many are built with all cores, but added with one."""


class Stopped(Exception):
    """A build was given up because the collection is closing."""


class ReadersWriter:
    """Many readers or one writer; a waiting writer goes before new readers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._readers = 0
        self._waiting = 0
        self._writing = False
        self.reading = _Reading(self)
        """Held together with other readers: `with lock.reading`."""

    def begin_reading(self) -> None:
        """Waits until nobody writes or is about to."""
        with self._lock:  # the condition's own `with` costs each search some microseconds more
            while self._writing or self._waiting:
                self._changed.wait()
            self._readers += 1

    def end_reading(self) -> None:
        """Lets a waiting writer go on."""
        with self._lock:
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
        self.size = int(index.ntotal)
        """How many positions it covers, from 0."""
        self._graph, self._lossy = kinds.is_graph(kind), kinds.is_lossy(kind)
        self._walks = _byte_graph(index) if kind == "hnsw-sq8" else None
        self._lists = 0 if self._graph else kinds.lists_of(index)
        _place(kind, index)

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

        It is tuned with the last of them as queries, before they are added.

        Raises:
            Stopped: asked to, by `stopping`.
        """
        share_cores(len(vectors))
        held = len(vectors) - held_back(len(vectors))
        index = kinds.trained(kind, vectors)
        for start in range(0, held, _BUILD_AT_ONCE):
            if stopping():
                raise Stopped
            index.add(vectors[start : min(held, start + _BUILD_AT_ONCE)])
            _place(kind, index)
        built = cls(kind, index, Tuning(target=target))

        def search(
            queries: Vectors, k: int, alive: Bits | None, effort: int, depth: float
        ) -> Positions:
            return built._search(queries, k, vectors[:held], held, alive, effort, depth)[1]

        efforts, depths = kinds.efforts(kind, index), kinds.depths(kind)
        queries = vectors[held:]
        built.tuning = tuned(
            search, vectors[:held], queries, target, efforts=efforts, depths=depths
        )
        index.add(queries)
        built.size = len(vectors)
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
    def nbytes(self) -> int:
        """Memory that it takes, without what an allocator adds."""
        return kinds.item_bytes(self.kind, int(self._index.d)) * self.size

    def outgrown(self, count: int) -> bool:
        """Whether it was trained, or its walk measured, for far fewer items than `count`."""
        if self._graph:
            return count >= _OUTGROWN * self.tuning.items
        return kinds.lists_for(self.kind, count) >= 2 * self._lists

    def add(self, vectors: Vectors, stopping: Callable[[], bool]) -> None:
        """Adds in small steps, so that a search never waits longer than one of them."""
        step = _ADD_AT_ONCE_GRAPH if self._graph else _ADD_AT_ONCE_LISTS
        for start in range(0, len(vectors), step):
            if stopping():
                return
            share_cores(1)
            with self.lock.writing():
                self._index.add(vectors[start : start + step])
                self.size = int(self._index.ntotal)
        _place(self.kind, self._index)

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
        depth = float(self.tuning.depth)
        if effort is None:
            effort = self._effort(kept)
        if effort > self.tuning.effort:  # to miss less: then also more near misses compete
            depth *= math.sqrt(effort / self.tuning.effort)
        covered = min(self.size, len(vectors))
        bits = alive if alive is None or covered == len(vectors) else _first(alive, covered)
        if len(queries) <= _SEARCH_AT_ONCE:
            return self._search(queries, k, vectors, covered, bits, effort, depth), covered
        found = nothing(len(queries), k)
        for start in range(0, len(queries), _SEARCH_AT_ONCE):
            some = slice(start, start + _SEARCH_AT_ONCE)
            found[0][some], found[1][some] = self._search(
                queries[some], k, vectors, covered, bits, effort, depth
            )
        return found, covered

    def copied(self, gpu: Gpu) -> Copy | None:
        """A copy on a GPU, of a kind that can be there; None where it does not fit."""
        with self.lock.reading:
            return gpu.copy_lists(self.kind, self._index, self.nbytes)

    def search_copy(
        self,
        copy: Copy,
        queries: Vectors,
        k: int,
        vectors: Vectors,
        alive: Bits | None,
        kept: float,
        *,
        effort: int | None = None,
    ) -> tuple[Found, int] | None:
        """As `search`, by its copy on a GPU; None where that cannot."""
        lists = min(effort or self._effort(kept), self._lists)
        asked = kinds.candidates(self.kind, k, self.tuning.depth)
        found = copy.search(queries, asked, alive, lists)
        if found is not None and self._lossy:
            found = rescored(queries, vectors, found[1], k)
        return None if found is None else (found, copy.size)

    def _effort(self, kept: float) -> int:
        return self.tuning.effort if kept == 1 else self._widened(max(kept, 0.05))

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
        depth: float,
    ) -> Found:
        count = kinds.candidates(self.kind, k, depth)
        if self._graph:
            # Tuned for ten; a walk for more has to be wider.
            effort = max(effort, count if k <= RECALL_AT + 1 else 2 * count)
        else:
            effort = min(effort, self._lists)
        if self._walks is None:
            return self._ask_library(queries, k, vectors, covered, bits, effort, count)
        self.lock.begin_reading()
        try:
            nodes = self.size
            if len(queries) == 1:
                return self._walks.search(
                    queries, k, vectors, nodes, covered, bits, effort, count, 1
                )
            with SEARCHING:
                threads = threads_for(len(queries))
                return self._walks.search(
                    queries, k, vectors, nodes, covered, bits, effort, count, threads
                )
        finally:
            self.lock.end_reading()

    def _ask_library(
        self,
        queries: Vectors,
        k: int,
        vectors: Vectors,
        covered: int,
        bits: Bits | None,
        effort: int,
        count: int,
    ) -> Found:
        desk = desk_for(queries, count, k)
        with SEARCHING, self.lock.reading:
            share_cores(len(queries))
            if bits is not None:
                selector = faiss.IDSelectorBitmap(bits)
            elif self.size > covered:  # it grew meanwhile, beyond the caller's view
                selector = faiss.IDSelectorRange(0, covered)
            else:
                selector = None
            parameters = kinds.parameters(self.kind, effort, selector)
            if desk is not None:
                desk.search(self._index, queries, parameters)
            else:
                scores, positions = self._index.search(queries, count, params=parameters)
        if desk is not None:
            return desk.rescored(vectors) if self._lossy else desk.candidates()
        if self._lossy:
            return rescored(queries, vectors, positions, k)
        return marked(scores, positions)


def _byte_graph(index: Any) -> "ByteGraph":
    # Imported here, since it is compiled then: 0.3 s, and 3 the first time on a machine.
    from byol_serving.collections.byte_graph import ByteGraph

    return ByteGraph(index)


def _place(kind: ApproximateKind, index: Any) -> None:
    """Where it pays, moves an index that nobody adds to meanwhile to huge pages."""
    if kinds.is_graph(kind):
        for address, nbytes in kinds.random_memory(index):
            prefer_huge_pages(address, nbytes)


def _first(bits: Bits, size: int) -> Bits:
    """The first `size` bits of a bitmap: what lies behind is not set for FAISS."""
    cut = bits[: (size + 7) // 8].copy()
    if size % 8:
        cut[-1] &= (1 << size % 8) - 1
    return cut
