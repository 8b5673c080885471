"""The index of one collection: vectors in memory by position, searched exactly or approximately.

Positions only grow: an item's vector stays at its position until a rebuild. Deleting clears a bit.
A search works on one `View`, which never changes, so that it sees all of a batch of changes or
nothing of it, and never waits for a writer. The approximate index may cover fewer positions than
there are; the rest is scanned exactly, so that a new vector is found as soon as it is applied.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from byol_serving.collections.approximate import Approximate, Stopped
from byol_serving.collections.exact import (
    Bits,
    Found,
    Positions,
    bits_at,
    lacking,
    merged,
    nearest,
    nearest_among,
    pack,
    unpack,
)
from byol_serving.collections.gpu import Gpu, Placement
from byol_serving.collections.kinds import ApproximateKind
from byol_serving.collections.types import IndexKind, Vectors


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """When the index reorganises itself."""

    approximate_from: int = 4096
    """Items from which approximate kinds are so; below, a scan is as fast and exact."""
    recall_target: float = 0.95
    """Recall@10 that an approximate index is tuned to when it is built."""
    auto_from: int = 20_000
    """Items from which `auto` walks a graph of bytes; below, it scans."""
    exact_share: float = 0.05
    """A filter that keeps fewer than this share of the items is answered exactly."""
    compact_share: float = 0.25
    compact_from: int = 1024
    """Dead positions are squeezed out above this share of all, once there are so many."""
    absorb_from: int = 1024
    """Vectors scanned beside the approximate index before they are added to it."""
    snapshot_every: int = 200_000
    """Changes after which a snapshot is written in the background."""
    gpu: Gpu | None = None
    """Where copies of the indexes are searched."""


@dataclass(frozen=True, slots=True)
class View:
    """The index at one moment. Arrays are longer than `size`: a writer appends behind it."""

    seq: int
    """The change it includes, with all before."""
    size: int
    dead: int
    vectors: Vectors
    """float32 [capacity, D]"""
    rows: Positions
    """int64 [capacity]: the store's row of each position, ascending."""
    ids: NDArray[np.object_]
    """str [capacity]"""
    alive: Bits
    """A bit for each of the `size` positions."""
    approximate: Approximate | None
    generation: int
    """Changes when a rebuild moves vectors to other positions."""

    @property
    def count(self) -> int:
        """Items that are not deleted."""
        return self.size - self.dead

    def positions_of(self, rows: Positions) -> Positions:
        """The position of each row (ascending); -1 where the view does not hold it."""
        known = self.rows[: self.size]
        found = np.searchsorted(known, rows)
        inside = found < self.size
        held = np.zeros(len(rows), np.bool_)
        held[inside] = known[found[inside]] == rows[inside]
        return np.where(held, found, -1).astype(np.int64)


class Index:
    """Holds the current view. One thread applies changes, any number search, one maintains."""

    def __init__(self, dim: int, kind: IndexKind, options: IndexOptions) -> None:
        self.dim = dim
        self.kind = kind
        self.options = options
        self._lock = threading.Lock()
        self._maintaining = threading.Lock()
        self._placement = Placement(options.gpu)
        self._view = View(
            seq=0,
            size=0,
            dead=0,
            vectors=np.empty((0, dim), np.float32),
            rows=np.empty(0, np.int64),
            ids=np.empty(0, object),
            alive=np.empty(0, np.uint8),
            approximate=None,
            generation=0,
        )

    @property
    def view(self) -> View:
        """The index as of the last applied change."""
        return self._view

    def load(self, view: View) -> None:
        """Starts from a view made elsewhere (a snapshot)."""
        with self._lock:
            self._view = view

    def reserve(self, count: int) -> None:
        """Makes room, so that `apply` of `count` vectors cannot fail for want of memory."""
        with self._lock:
            self._view = _with_room(self._view, count)

    def apply(
        self, seq: int, rows: Sequence[int], ids: Sequence[str], vectors: Vectors, gone: list[int]
    ) -> None:
        """Appends vectors under rows above all before, and drops the rows `gone`, in one step."""
        with self._lock:
            view = _with_room(self._view, len(rows))  # a rebuild may have taken the reserve
            size = view.size + len(rows)
            view.vectors[view.size : size] = vectors
            view.rows[view.size : size] = rows
            view.ids[view.size : size] = ids
            alive = np.zeros((size + 7) // 8, np.uint8)
            alive[: len(view.alive)] = view.alive
            fresh = np.arange(view.size, size)
            np.bitwise_or.at(alive, fresh >> 3, (1 << (fresh & 7)).astype(np.uint8))
            dead = view.positions_of(np.sort(np.asarray(gone, np.int64)))
            dead = dead[dead >= 0]
            np.bitwise_and.at(alive, dead >> 3, ~(1 << (dead & 7)).astype(np.uint8))
            self._view = replace(view, seq=seq, size=size, dead=view.dead + len(dead), alive=alive)

    def search(self, view: View, queries: Vectors, k: int, effort: int | None = None) -> Found:
        """The k best of each query (float32 [Q, D], unit) in the view."""
        if view.approximate is None:
            return self._exactly(view, queries, k)
        return self._approximately(view, view.approximate, queries, k, None, effort)

    def search_among(
        self, view: View, queries: Vectors, k: int, chosen: Positions, effort: int | None = None
    ) -> Found:
        """The k best of each query among positions (ascending), which count as alive."""
        few = len(chosen) <= max(k, self.options.exact_share * view.size)
        if view.approximate is None or few:
            return nearest_among(queries, view.vectors[: view.size], chosen, k)
        return self._approximately(view, view.approximate, queries, k, chosen, effort)

    def _exactly(self, view: View, queries: Vectors, k: int) -> Found:
        vectors = view.vectors[: view.size]
        copy = self._placement.copy_of(view)
        if copy is not None:
            bits = view.alive if view.dead else None
            found = copy.search(queries, k, bits, None)
            if found is not None:
                return _with_rest(found, copy.size, queries, k, vectors, bits)
        return nearest(queries, vectors, k, view.alive, view.dead)

    def _approximately(
        self,
        view: View,
        approximate: Approximate,
        queries: Vectors,
        k: int,
        chosen: Positions | None,
        effort: int | None,
    ) -> Found:
        vectors = view.vectors[: view.size]
        count = view.count if chosen is None else len(chosen)
        bits = None if count == view.size else view.alive
        if chosen is not None and bits is not None:
            mask = np.zeros(view.size, np.bool_)
            mask[chosen] = True
            bits = pack(mask)
        share = count / max(view.size, 1)
        copy = self._placement.copy_of(view)
        answer = None
        if copy is not None:
            answer = approximate.search_copy(copy, queries, k, vectors, bits, share, effort=effort)
        if answer is None:
            answer = approximate.search(queries, k, vectors, bits, share, effort=effort)
        found, covered = answer
        found = _with_rest(found, covered, queries, k, vectors, bits)
        # A graph walk may end early between masked nodes; k are there, so such a query is scanned.
        wanted = min(k, count)
        if wanted and lacking(found[1] if wanted == k else found[1][:, :wanted]):
            short = np.flatnonzero(found[1][:, wanted - 1] < 0)
            found[0][short], found[1][short] = nearest(
                queries[short], vectors, k, bits, view.size - count
            )
        return found

    # Upkeep, off the path of requests.

    def maintain(self, stopping: Callable[[], bool]) -> bool:
        """Does what upkeep is due; returns whether there was any."""
        with self._maintaining:
            view = self._view
            kind = self.wanted(view.count)
            stale = view.approximate is not None and (
                view.approximate.outgrown(view.count)
                or (kind is not None and kind != view.approximate.kind)
            )
            options = self.options
            crowded = (
                view.dead >= options.compact_from and view.dead > options.compact_share * view.size
            )
            if crowded or stale or (view.approximate is None and kind is not None):
                self._rebuild(view, kind, stopping)
                return True
            if view.approximate is not None:
                covered = view.approximate.size
                if view.size - covered >= options.absorb_from:
                    view.approximate.add(view.vectors[covered : view.size], stopping)
                    return True
            return self._placement.renew(view)

    def leave_gpu(self) -> None:
        """Gives back what is taken of a GPU; after upkeep has ended."""
        self._placement.leave()

    @property
    def maintaining(self) -> threading.Lock:
        """Held during upkeep; hold it to keep positions and the approximate index as they are."""
        return self._maintaining

    def wanted(self, count: int) -> ApproximateKind | None:
        """The approximate index that so many items call for; None for none."""
        options = self.options
        match self.kind:
            case "flat":
                return None
            case "auto":
                return "hnsw-sq8" if count >= options.auto_from else None
            case kind:
                return kind if count >= options.approximate_from else None

    def _rebuild(
        self, old: View, kind: ApproximateKind | None, stopping: Callable[[], bool]
    ) -> None:
        """Builds aside from the living, then adds what came meanwhile and swaps."""
        kept = np.flatnonzero(unpack(old.alive, old.size))
        capacity = len(kept) + max(1024, len(kept) // 8)
        vectors = np.empty((capacity, self.dim), np.float32)
        np.take(old.vectors, kept, axis=0, out=vectors[: len(kept)])
        approximate = None
        if kind is not None:
            try:
                target = self.options.recall_target
                approximate = Approximate.build(kind, vectors[: len(kept)], stopping, target=target)
            except Stopped:
                return
        with self._lock:
            now = self._view
            came = now.size - old.size
            moved = np.concatenate([kept, np.arange(old.size, now.size)])
            living = bits_at(now.alive, moved)
            rebuilt = replace(
                now,
                size=len(kept),
                vectors=vectors,
                rows=_grown(now.rows[kept], len(kept), capacity),
                ids=_grown(now.ids[kept], len(kept), capacity),
            )
            rebuilt = _with_room(rebuilt, came)
            rebuilt.vectors[len(kept) : len(moved)] = now.vectors[old.size : now.size]
            rebuilt.rows[len(kept) : len(moved)] = now.rows[old.size : now.size]
            rebuilt.ids[len(kept) : len(moved)] = now.ids[old.size : now.size]
            self._view = replace(
                rebuilt,
                size=len(moved),
                dead=int(len(moved) - living.sum()),
                alive=pack(living),
                approximate=approximate,
                generation=now.generation + 1,
            )


def _with_rest(
    found: Found, covered: int, queries: Vectors, k: int, vectors: Vectors, bits: Bits | None
) -> Found:
    """An answer over the first `covered` vectors, and over the others that are alive."""
    if covered == len(vectors):
        return found
    rest = np.arange(covered, len(vectors))
    if bits is not None:
        rest = rest[bits_at(bits, rest)]
    return merged(found, nearest_among(queries, vectors, rest, k), k)


def _with_room(view: View, count: int) -> View:
    needed = view.size + count
    if needed <= len(view.rows):
        return view
    capacity = max(needed, view.size + view.size // 2, 1024)
    return replace(
        view,
        vectors=_grown(view.vectors, view.size, capacity),
        rows=_grown(view.rows, view.size, capacity),
        ids=_grown(view.ids, view.size, capacity),
    )


def _grown(old: np.ndarray, size: int, capacity: int) -> np.ndarray:
    grown = np.empty((capacity, *old.shape[1:]), old.dtype)
    grown[:size] = old[:size]
    return grown
