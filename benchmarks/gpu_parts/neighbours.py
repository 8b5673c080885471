"""Item 5: FAISS on the device, in process. The server's collections search on the processor."""

import time
from typing import Any

import faiss as _faiss
from gpu_parts.rows import Asked, Row

from search_data import Vectors, clustered

faiss: Any = _faiss  # its stubs describe the C++ signatures, not Python's

FLAT, IVF = "Flat", "IVF"
BATCHES = (1, 64, 1024)


def build(kind: str, vectors: Vectors) -> Any:
    """An index of the vectors on the processor, by inner product."""
    dim = vectors.shape[1]
    lists = max(16, int(4 * len(vectors) ** 0.5))
    description = "Flat" if kind == FLAT else f"IVF{lists},Flat"
    index = faiss.index_factory(dim, description, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[: 50 * lists])
    index.add(vectors)
    if kind == IVF:
        index.nprobe = 32
    return index


def to_device(index: Any, asked: Asked) -> Any:
    """A copy on the GPU; the index itself where none was asked for."""
    if not asked.on_gpu:
        return index
    if not hasattr(faiss, "StandardGpuResources"):
        raise ImportError("this FAISS has no GPU code: install faiss-gpu-cuvs or faiss-gpu")
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)


def queries_per_s(asked: Asked) -> list[Row]:
    """Queries a second for the ten nearest, in batches."""
    rows = []
    for count in (5_000,) if asked.quick else (1_000_000, 10_000_000):
        data = clustered(count, 4096)
        for kind in (FLAT, IVF):
            index = to_device(build(kind, data.vectors), asked)
            for batch in BATCHES:
                rate = _rate(index, data.queries, batch, 0.1 if asked.quick else 2.0)
                what = f"FAISS {kind}, {count:,} x 128, batches of {batch}"
                rows.append(Row(what=what, value=rate, unit="queries/s"))
            del index
    return rows


def _rate(index: Any, queries: Vectors, batch: int, seconds: float) -> float:
    index.search(queries[:batch], 10)  # allocates
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        start = done % (len(queries) - batch + 1)
        index.search(queries[start : start + batch], 10)
        done += batch
    return done / (time.perf_counter() - began)


CHECKS = {"FAISS in process": queries_per_s}
