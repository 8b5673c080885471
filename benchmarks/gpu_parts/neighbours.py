"""Item 5: FAISS on the device in process, and a collection with its copy there over gRPC."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss as _faiss
from gpu_parts.rows import Asked, Row

from byol_serving.client import Client
from byol_serving.collections.store import Store
from byol_serving.collections.types import IndexKind
from search_data import DIM, Vectors, clustered
from search_server import Server

faiss: Any = _faiss  # its stubs describe the C++ signatures, not Python's

FLAT, IVF = "Flat", "IVF"
BATCHES = (1, 64, 1024)
_GPU_MEMORY = 40 * 2**30
_AT_ONCE = 5000


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
                rate = _rate(partial(_search, index), data.queries, batch, asked)
                what = f"FAISS {kind}, {count:,} x 128, batches of {batch}"
                rows.append(Row(what=what, value=rate, unit="queries/s"))
            del index
    return rows


def _search(index: Any, queries: Vectors) -> object:
    return index.search(queries, 10)


def over_grpc(asked: Asked) -> list[Row]:
    """The same through `byol serve`, its index copied to the GPU where there is one."""
    count = 5_000 if asked.quick else 1_000_000
    data, rows = clustered(count, 4096), []
    kinds: tuple[IndexKind, ...] = ("flat", "ivf")
    for kind in kinds:
        path = asked.scratch / f"store-{kind}"
        fill(path, kind, data.vectors)
        memory = _GPU_MEMORY if asked.on_gpu else 0
        with Server(path, index_gpu_memory=memory) as server, Client(server.address) as client:
            if asked.on_gpu:
                time.sleep(10)  # copies are made in the background
            for batch in BATCHES:
                search = partial(client.search_columns, "c")
                rate = _rate(search, data.queries, batch, asked)
                what = f"gRPC {kind}, {count:,} x {DIM}, batches of {batch}"
                rows.append(Row(what=what, value=rate, unit="queries/s"))
    return rows


def fill(path: Path, kind: IndexKind, vectors: Vectors) -> None:
    """A store with one collection, `c`, its index built and saved."""
    with Store(path) as store:
        collection = store.create("c", dim=DIM, encoder_id="bench", index=kind)
        for start in range(0, len(vectors), _AT_ONCE):
            part = vectors[start : start + _AT_ONCE]
            collection.upsert([str(start + n) for n in range(len(part))], part)
        collection.settle()
        collection.snapshot()


def _rate(search: Callable[[Vectors], object], queries: Vectors, batch: int, asked: Asked) -> float:
    """Queries a second, from one thread."""
    search(queries[:batch])  # allocates
    seconds = 0.1 if asked.quick else 2.0
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        start = done % (len(queries) - batch + 1)
        search(queries[start : start + batch])
        done += batch
    return done / (time.perf_counter() - began)


CHECKS = {"FAISS in process": queries_per_s, "collections over gRPC": over_grpc}
