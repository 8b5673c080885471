"""Copies of indexes on a GPU, where faiss-gpu is installed and sees one.

A copy answers searches; the index it was made of stays on the CPU, is saved and added to, and
answers what the copy cannot. What FAISS's GPU indexes are, as of 1.15:

- Flat and IVF with float32, float16 or 8-bit codes can be copied; graphs, 4-bit product and RaBitQ
  codes cannot;
- k and lists read are limited to 2,048;
- a selector of ids is ignored without a word, and nothing can be removed: so none is passed, and of
  more than k answers the masked are dropped. Where that would take over 2,048, the CPU answers;
- neither an index nor its resources may be used by two threads at once: hence one lock.
"""

import logging
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from byol_serving.collections.exact import Bits, Found, bits_at, unpack
from byol_serving.collections.faiss_library import faiss
from byol_serving.collections.kinds import ApproximateKind
from byol_serving.collections.types import Vectors
from byol_serving.cuda_threads import apart_from_recordings

if TYPE_CHECKING:
    from byol_serving.collections.index import View

_log = logging.getLogger(__name__)

MOST = 2048
"""FAISS's limit on k and on lists read on a GPU."""
KINDS: tuple[ApproximateKind, ...] = ("ivf", "ivf-fp16", "ivf-sq8")
_DEVICE = 0
_SCRATCH_SHARE = 4
_MOST_SCRATCH = 512 * 2**20
"""FAISS's working memory: a quarter of the bound, at most this."""
_ROOM = 1.25
"""For what FAISS's allocations add to the arithmetic of a copy."""
_FROM = 4096
"""Items from which a copy is made; fewer are scanned in less time than a call to a GPU takes."""
_STALE_SHARE = 16
"""A copy is made anew when a sixteenth of the items have come since."""


class Copy:
    """An index's positions 0 to `size` on the GPU. Its memory is given back with the object."""

    def __init__(self, index: Any, size: int, nbytes: int, lock: threading.Lock) -> None:
        """`lock` is held while the GPU works."""
        self.size = size
        self.nbytes = nbytes
        self._index = index
        self._lock = lock

    def __del__(self) -> None:
        """The memory is given back next, by this thread."""
        apart_from_recordings()

    def search(
        self, queries: Vectors, k: int, alive: Bits | None, lists: int | None
    ) -> Found | None:
        """The k best of each query whose bit is set; None where the CPU has to answer.

        Args:
            queries: float32 [Q, D].
            k: how many, at least 1.
            alive: bitmap over at least `size` positions; None for all.
            lists: how many are read; None of a Flat index.
        """
        masked = 0
        if alive is not None:
            masked = self.size - int(np.count_nonzero(unpack(alive, self.size)))
        if k + masked > MOST or (lists or 0) > MOST:
            return None
        apart_from_recordings()
        parameters = None if lists is None else faiss.SearchParametersIVF(nprobe=lists)
        try:
            with self._lock:
                scores, positions = self._index.search(queries, k + masked, params=parameters)
        except RuntimeError as error:
            _log.warning("the GPU did not search, the CPU does: %s", _first_line(error))
            return None
        if alive is not None:
            there = bits_at(alive, positions)
            order = np.argsort(~there, axis=1, kind="stable")[:, :k]
            positions = np.take_along_axis(np.where(there, positions, -1), order, axis=1)
            scores = np.take_along_axis(scores, order, axis=1)
        scores[positions < 0] = -np.inf
        return scores, positions


class Gpu:
    """The GPU's memory that indexes may take, shared by all collections. Thread-safe."""

    def __init__(self, memory: int) -> None:
        """Of `memory` bytes a part is FAISS's scratch memory, taken with the first copy."""
        self.memory = memory
        self._scratch = min(memory // _SCRATCH_SHARE, _MOST_SCRATCH)
        self._copies: weakref.WeakSet[Copy] = weakref.WeakSet()
        self._copying = threading.Lock()
        self._searching = threading.Lock()
        self._resources: Any = None

    @classmethod
    def found(cls, memory: int) -> "Gpu | None":
        """The first GPU that FAISS sees; None without `memory`, and with a warning without one."""
        if not memory:
            return None
        if not faiss.get_num_gpus():  # asked first: StandardGpuResources ends a process without one
            _log.warning(
                "%d bytes of GPU memory are allowed for indexes, but FAISS sees no GPU: searches"
                " run on the CPU; install faiss-gpu (extra gpu), or leave --index-gpu-memory out",
                memory,
            )
            return None
        return cls(memory)

    @property
    def free(self) -> int:
        """Bytes that are left for copies."""
        return self.memory - self._scratch - sum(copy.nbytes for copy in self._copies)

    def copy_flat(self, vectors: Vectors) -> Copy | None:
        """A copy of float32 [N, D], to be searched exactly; None where it does not fit."""
        size = len(vectors)
        return self._copied("flat", vectors.nbytes, size, lambda given: _flat(given, vectors))

    def copy_lists(self, kind: ApproximateKind, index: Any, nbytes: int) -> Copy | None:
        """A copy of an IVF index of `nbytes`, which nobody adds to; None where it does not fit."""
        size, centroids = int(index.ntotal), 4 * int(index.d) * int(index.nlist)
        return self._copied(kind, nbytes + centroids, size, lambda given: _lists(given, index))

    def _copied(self, kind: str, nbytes: int, size: int, move: Callable[[Any], Any]) -> Copy | None:
        apart_from_recordings()
        taken = int(_ROOM * nbytes)
        with self._copying:
            if taken > self.free:
                _log.warning(
                    "an index (%s, %d items) would take %d bytes on the GPU, %d of %d are free: it"
                    " stays on the CPU; raise --index-gpu-memory, or use ivf-fp16 or ivf-sq8",
                    *(kind, size, taken, self.free, self.memory),
                )
                return None
            try:
                with self._searching:
                    if self._resources is None:
                        self._resources = _standard_resources(self._scratch)
                    index = move(self._resources)
            except RuntimeError as error:
                reason = _first_line(error)
                _log.warning("an index (%s, %d items) stays on the CPU: %s", kind, size, reason)
                return None
            copy = Copy(index, size, taken, self._searching)
            self._copies.add(copy)
        _log.info("an index (%s, %d items) is searched on the GPU", kind, size)
        return copy


class Placement:
    """The copy that one collection's index has on the GPU, and when it is made anew."""

    def __init__(self, gpu: Gpu | None) -> None:
        """Without a GPU there never is one."""
        self._gpu = gpu
        self._placed: tuple[int, Copy] | None = None
        """The generation of positions that the copy is of, and the copy: read in one step."""
        self._tried = (-1, 0)
        """Of which generation and size a copy was last made, or could not be."""

    def copy_of(self, view: "View") -> Copy | None:
        """The copy, if its positions are those of the view."""
        if (placed := self._placed) is None:
            return None
        generation, copy = placed
        return copy if generation == view.generation and copy.size <= view.size else None

    def leave(self) -> None:
        """Gives the copy up for good, as soon as no search is in it."""
        self._gpu = self._placed = None

    def renew(self, view: "View") -> bool:
        """Makes a copy where one is due; returns whether it tried. For the upkeep thread alone."""
        approximate = view.approximate
        size = view.size if approximate is None else approximate.size
        generation, before = self._tried
        new = size - (before if generation == view.generation else 0)
        if self._gpu is None or size < _FROM or new <= size // _STALE_SHARE:
            return False
        self._placed = None  # the CPU answers meanwhile, so that two need not have room at once
        self._tried = (view.generation, size)
        copy = None
        if approximate is None:
            copy = self._gpu.copy_flat(view.vectors[:size])
        elif approximate.kind in KINDS:
            copy = approximate.copied(self._gpu)
        else:
            _log.warning(
                "FAISS has no %s index for GPUs: it is searched on the CPU; use flat or %s",
                approximate.kind,
                ", ".join(KINDS),
            )
        self._placed = None if copy is None else (view.generation, copy)
        return True


def _standard_resources(scratch: int) -> Any:
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(scratch)
    return resources


def _flat(resources: Any, vectors: Vectors) -> Any:
    config = faiss.GpuIndexFlatConfig()
    config.device = _DEVICE
    index = faiss.GpuIndexFlatIP(resources, vectors.shape[1], config)
    index.add(vectors)
    return index


def _lists(resources: Any, index: Any) -> Any:
    return faiss.index_cpu_to_gpu(resources, _DEVICE, index, faiss.GpuClonerOptions())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
