"""How benchmarks/search.py asks each engine: ours, raw FAISS on the same index, and the peers."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from byol_serving.collections import kinds
from byol_serving.collections.collection import LocalCollection
from byol_serving.collections.faiss_library import faiss
from byol_serving.collections.filters import Range
from byol_serving.collections.types import Columns
from harness import Peer
from search_data import Data, Vectors

K = 10
SHARES = {"0.1%": 1, "1%": 10, "10%": 100, "50%": 500}
"""Filters by what they keep, as `pick < n`."""
_CORES = len(os.sched_getaffinity(0))
_SCANNED = 10
"""Up to `pick` below this, raw FAISS scans what the filter keeps: faster than a masked index."""

Found = TypeVar("Found")
Answer: TypeAlias = tuple[float, Sequence[Sequence[int]]]
Ask: TypeAlias = Callable[[int, int, int | None, int | None], Answer]
"""(count, batch, effort, below) -> (queries/s, ids); effort None: what ours is tuned to.

A round lasts for so many seconds; of a slow engine there are fewer ids than queries."""


def asking(collection: LocalCollection, data: Data, seconds: float) -> Ask:
    """Ours, in process."""

    def ask(count: int, batch: int, effort: int | None, below: int | None) -> Answer:
        condition = None if below is None else Range("pick", lt=below)

        def search(part: Vectors) -> Columns:
            return collection.search_columns(part, K, condition=condition, effort=effort)

        rate, found = repeated(search, data.queries[:count], batch, seconds)
        rows = [row[:n] for part in found for row, n in zip(part.ids, part.counts, strict=True)]
        return rate, [list(map(int, row)) for row in rows]

    return ask


def repeated(
    search: Callable[[Vectors], Found], queries: Vectors, batch: int, seconds: float
) -> tuple[float, list[Found]]:
    """Queries a second over so many seconds, and what was found the first time.

    As benchmarks/peers/search_loop.py does: a few milliseconds would measure waking up.
    """
    first, done = [], 0
    started = time.perf_counter()
    while (took := time.perf_counter() - started) < seconds:
        start = done % len(queries)
        part = queries[start : start + batch]
        found = search(part)
        if done < len(queries):
            first.append(found)
        done += len(part)
    return done / took, first


def asking_faiss(folder: Path, data: Data, seconds: float) -> Ask:
    """FAISS and nothing else, on the index of a snapshot: at the same effort it does the same work.

    Under a filter the better of a masked search and an exact scan.
    """
    (file,) = folder.glob("index-*.faiss")
    index = faiss.read_index(str(file))
    tuned = json.loads(file.with_suffix(".json").read_text())
    kind: kinds.ApproximateKind = tuned["approximate"]
    masks = {below: np.packbits(data.picks < below, bitorder="little") for below in SHARES.values()}
    chosen = {below: np.flatnonzero(data.picks < below) for below in SHARES.values()}

    def search(queries: Vectors, effort: int, below: int | None) -> Any:
        selector = None if below is None else faiss.IDSelectorBitmap(masks[below])
        depth = tuned["depth"] * math.sqrt(max(1.0, effort / tuned["effort"]))
        count = kinds.candidates(kind, K + 1, depth)  # as ours
        parameters = kinds.parameters(kind, effort, selector)
        _, found = index.search(queries, count, params=parameters)
        return found if not kinds.is_lossy(kind) else best_of(queries, data.vectors, found)

    def scan(queries: Vectors, below: int) -> Any:
        kept = chosen[below]
        _, found = faiss.knn(queries, data.vectors[kept], K, faiss.METRIC_INNER_PRODUCT)
        return kept[found]

    def ask(count: int, batch: int, effort: int | None, below: int | None) -> Answer:
        faiss.omp_set_num_threads(_CORES if batch > 1 else 1)  # the best for each

        def answer(part: Vectors) -> Any:
            if below is not None and below <= _SCANNED:
                return scan(part, below)
            return search(part, effort or tuned["effort"], below)

        rate, found = repeated(answer, data.queries[:count], batch, seconds)
        return rate, np.concatenate(found).tolist()

    return ask


def best_of(queries: Vectors, vectors: Vectors, candidates: Any) -> Any:
    """The K best candidates by their true scores, as FAISS's IndexRefineFlat finds them."""
    scores = np.empty((len(queries), K), np.float32)
    best = np.empty((len(queries), K), np.int64)
    among = candidates.shape[1]
    faiss.knn_inner_products_by_idx(
        faiss.swig_ptr(queries),
        faiss.swig_ptr(vectors),
        faiss.swig_ptr(candidates),
        queries.shape[1],
        len(queries),
        len(vectors),
        among,
        K,
        faiss.swig_ptr(scores),
        faiss.swig_ptr(best),
        among,
    )
    return best


def asking_peer(peer: Peer, seconds: float) -> Ask:
    """A peer in its own process."""

    def ask(count: int, batch: int, effort: int | None, below: int | None) -> Answer:
        answer = peer.ask(
            count=count, batch=batch, k=K, effort=effort, below=below, seconds=seconds
        )
        return float(answer["queries_per_s"]), answer["ids"]

    return ask
