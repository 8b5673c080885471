"""Similarity search: raw FAISS (the limit), ours in process and over gRPC, and four peers.

Every engine answers the same queries, top 10, each at the least effort that reaches the recall.
Raw FAISS searches the very graph that ours built, read from its snapshot: the difference is ours.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import faiss as _faiss
import numpy as np

from byol_serving.client import Client, SearchOptions
from byol_serving.collections.collection import LocalCollection
from byol_serving.collections.filters import Range
from byol_serving.collections.index import IndexOptions
from byol_serving.collections.store import Store
from harness import Options, Peer, Rate, interleaved, options, report
from search_data import CIFAR, DIM, Data, Vectors, clustered, pictures
from search_server import Server, durable_inserts

faiss: Any = _faiss  # its stubs describe the C++ signatures, not Python's

K = 10
BATCH = 64
PEERS = ("hnswlib", "qdrant", "milvus", "lancedb")
SHARES = {"0.1%": 1, "1%": 10, "10%": 100, "50%": 500}
EFFORTS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_CORES = len(os.sched_getaffinity(0))
_AT_ONCE = 5000
_SLOW = {"milvus": 64, "lancedb": 64}
_SLOW_FILTERED = {"hnswlib": 16, "milvus": 64, "lancedb": 64}
"""Queries of a round where all would take minutes; hnswlib's filter is a Python function."""
_ALL = 1 << 20
_MILVUS_MOST = 200_000  # its create_index times out at a million
_OPTIONS = IndexOptions(snapshot_every=10**9)

Ask: TypeAlias = Callable[[int, int, int, int | None], tuple[float, Sequence[Sequence[int]]]]
"""(count, batch, effort, below) -> (queries/s, ids)."""


@dataclass
class Measured:
    """What goes into the report."""

    results: dict[str, Rate]
    ratios: dict[str, float]
    facts: dict[str, Any]


def main() -> None:
    """Measures and prints."""
    chosen = options(__doc__ or "")
    count, queries = (10_000, 256) if chosen.quick else (1_000_000, 2048)
    datasets = [("", clustered(count, queries))]
    if not chosen.quick and CIFAR.exists():
        datasets.append(("cifar10 ", pictures(queries)))
    measured = Measured({}, {}, {})
    for prefix, data in datasets:
        measured.facts[f"{prefix}data"] = data.name
        with tempfile.TemporaryDirectory() as scratch:
            measure(chosen, data, Path(scratch), prefix, measured)
    packages = ["byol-server", "faiss-cpu", "grpcio", "numpy"]
    report(
        "search",
        chosen,
        measured.results,
        measured.ratios,
        packages=packages,
        facts=measured.facts,
    )


def measure(chosen: Options, data: Data, scratch: Path, prefix: str, into: Measured) -> None:
    """Everything about one data set."""
    with ExitStack() as stack:
        started = time.perf_counter()
        store = Store(scratch / "store", options=_OPTIONS)
        ours = filled(store, data)
        into.facts[f"{prefix}ours build_s"] = round(time.perf_counter() - started, 1)
        stats = ours.stats()
        into.facts[f"{prefix}ours recall measured"] = round(stats.recall, 3)
        engines: dict[str, Ask] = {}
        if chosen.peers:
            engines |= peers(chosen, stack, data, scratch, prefix, into)
        engines["ours"] = asking(ours, data)
        (graph,) = (scratch / "store" / "c").glob("index-*.faiss")
        engines["faiss"] = asking_faiss(faiss.read_index(str(graph)), data)
        repeats = 2 if chosen.quick else 5
        unfiltered(engines, data, repeats, prefix, into)
        filtered(engines, data, repeats, prefix, into)
        store.backup(scratch / "served")
        store.close()
        for file in (scratch / "store" / "c").glob("index-*"):
            shutil.copy(file, scratch / "served" / "c" / file.name)
        over_grpc(scratch / "served", engines["faiss"], data, repeats, prefix, into, stats.effort)
        startup(scratch / "store", prefix, into)


def filled(store: Store, data: Data) -> LocalCollection:
    """Our collection of the data, its graph built and its snapshot written."""
    collection = store.create("c", dim=DIM, encoder_id="bench", index="hnsw")
    for start in range(0, len(data.vectors), _AT_ONCE):
        part = data.vectors[start : start + _AT_ONCE]
        picks = data.picks[start : start + _AT_ONCE].tolist()
        ids = [str(start + n) for n in range(len(part))]
        collection.upsert(ids, part, [{"pick": pick} for pick in picks])
    collection.settle()
    collection.snapshot()
    return collection


def peers(
    chosen: Options, stack: ExitStack, data: Data, scratch: Path, prefix: str, into: Measured
) -> dict[str, Ask]:
    """The peers, built one after another."""
    files: dict[str, Any] = {
        name: str(scratch / f"{name}.npy") for name in ("vectors", "picks", "queries")
    }
    for name, file in files.items():
        np.save(file, getattr(data, name))
    found: dict[str, Ask] = {}
    fewer = 8 if chosen.quick else 1
    for name in PEERS:
        if name == "milvus" and (chosen.quick or len(data.vectors) > _MILVUS_MOST):
            why = "takes minutes" if chosen.quick else f"not run above {_MILVUS_MOST:,}"
            into.facts[f"{prefix}milvus"] = why
            continue
        peer = stack.enter_context(Peer(f"{name}_peer.py", **files))
        into.facts[f"{prefix}{name} build_s"] = round(peer.setup["build_s"], 1)
        into.facts[f"{prefix}{name} peak_mb"] = peer.setup["peak_mb"]
        found[name] = asking_peer(
            peer, _SLOW.get(name, _ALL) // fewer, _SLOW_FILTERED.get(name, _ALL) // fewer
        )
    return found


# How each is asked


def asking(collection: LocalCollection, data: Data) -> Ask:
    """Ours, in process."""

    def ask(
        count: int, batch: int, effort: int, below: int | None
    ) -> tuple[float, Sequence[Sequence[int]]]:
        condition = None if below is None else Range("pick", lt=below)
        found = []
        started = time.perf_counter()
        for start in range(0, count, batch):
            found += collection.search(
                data.queries[start : start + batch],
                K,
                condition=condition,
                with_metadata=False,
                effort=effort,
            )
        seconds = time.perf_counter() - started
        return count / seconds, [[int(hit.id) for hit in hits] for hits in found]

    return ask


def asking_faiss(index: Any, data: Data) -> Ask:
    """FAISS and nothing else; under a filter the better of a masked walk and an exact scan."""
    masks = {below: np.packbits(data.picks < below, bitorder="little") for below in SHARES.values()}
    chosen = {below: np.flatnonzero(data.picks < below) for below in SHARES.values()}

    def walk(queries: Vectors, effort: int, below: int | None) -> Any:
        selector = None if below is None else faiss.IDSelectorBitmap(masks[below])
        parameters = faiss.SearchParametersHNSW(efSearch=effort, sel=selector)
        return index.search(queries, K, params=parameters)[1]

    def scan(queries: Vectors, below: int) -> Any:
        kept = chosen[below]
        _, found = faiss.knn(queries, data.vectors[kept], K, faiss.METRIC_INNER_PRODUCT)
        return kept[found]

    def ask(
        count: int, batch: int, effort: int, below: int | None
    ) -> tuple[float, Sequence[Sequence[int]]]:
        faiss.omp_set_num_threads(_CORES if batch > 1 else 1)  # the best for each
        found: list[list[int]] = []
        started = time.perf_counter()
        for start in range(0, count, batch):
            part = data.queries[start : start + batch]
            exact = below is not None and below <= 10
            ids = scan(part, below or 0) if exact else walk(part, effort, below)
            found += ids.tolist()
        return count / (time.perf_counter() - started), found

    return ask


def asking_peer(peer: Peer, most: int, most_filtered: int) -> Ask:
    """A peer in its own process, asked so many queries a round at most."""

    def ask(
        count: int, batch: int, effort: int, below: int | None
    ) -> tuple[float, Sequence[Sequence[int]]]:
        limit = most if below is None else most_filtered
        count = min(count, limit if batch > 1 else max(1, limit // 8))
        answer = peer.ask(count=count, batch=batch, k=K, effort=effort, below=below)
        return float(answer["queries_per_s"]), answer["ids"]

    return ask


# What is measured


def unfiltered(
    engines: dict[str, Ask], data: Data, repeats: int, prefix: str, into: Measured
) -> None:
    """Queries/s at two recalls, in batches and one at a time."""
    truth = data.truth(len(data.queries), K, None)
    for target in (0.95, 0.99):
        efforts = {name: least_effort(ask, truth, target, None) for name, ask in engines.items()}
        for batch in (BATCH, 1):
            name = f"{prefix}recall {target} batch {batch}"
            rates = rounds(engines, efforts, batch, None, repeats, len(data.queries))
            into.results |= {f"{name} {engine}": rate for engine, rate in rates.items()}
            versus(rates, f"{prefix}at_{target}_batch_{batch}_", into)
            if (target, batch) == (0.95, BATCH):
                ratio = rates["ours"].median / rates["faiss"].median
                into.ratios[f"{prefix}in_process_vs_faiss"] = ratio
                versus(rates, prefix, into)


def filtered(
    engines: dict[str, Ask], data: Data, repeats: int, prefix: str, into: Measured
) -> None:
    """Queries/s at a recall of .95 under filters, in batches."""
    count = min(256, len(data.queries))
    for share, below in SHARES.items():
        truth = data.truth(count, K, below)
        efforts = {name: least_effort(ask, truth, 0.95, below) for name, ask in engines.items()}
        rates = rounds(engines, efforts, BATCH, below, repeats, count)
        into.results |= {f"{prefix}filter {share} {name}": rate for name, rate in rates.items()}
        versus(rates, f"{prefix}filtered_{share}_", into)


def versus(rates: dict[str, Rate], prefix: str, into: Measured) -> None:
    """Ours over each other."""
    for name, rate in rates.items():
        if name not in ("ours", "faiss"):
            into.ratios[f"{prefix}vs_{name}"] = rates["ours"].median / rate.median


def least_effort(ask: Ask, truth: np.ndarray, target: float, below: int | None) -> int:
    """The cheapest of EFFORTS that finds so much; the last where none does."""
    for effort in EFFORTS:
        _, ids = ask(min(256, len(truth)), BATCH, effort, below)
        recall = np.mean(
            [
                len({*found} & {*right.tolist()}) / K
                for found, right in zip(ids, truth, strict=False)
            ]
        )
        if recall >= target:
            return effort
    return EFFORTS[-1]


def rounds(
    engines: dict[str, Ask],
    efforts: dict[str, int],
    batch: int,
    below: int | None,
    repeats: int,
    count: int,
) -> dict[str, Rate]:
    """All engines in turn."""

    def measure(name: str, ask: Ask) -> Callable[[], float]:
        return lambda: ask(count, batch, efforts[name], below)[0]

    candidates = {name: measure(name, ask) for name, ask in engines.items()}
    return interleaved(candidates, unit="queries/s", repeats=repeats)


def over_grpc(
    path: Path,
    raw: Ask,
    data: Data,
    repeats: int,
    prefix: str,
    into: Measured,
    effort: int | None,
) -> None:
    """One client and many, and batches, against raw FAISS at the effort the server is tuned to."""
    with Server(path) as server, Client(server.address) as client, ThreadPoolExecutor(16) as pool:
        asked = SearchOptions(k=K, with_metadata=False)
        parts = [
            data.queries[start : start + BATCH] for start in range(0, len(data.queries), BATCH)
        ]

        def single(query: Vectors) -> None:
            client.search_many("c", asked, vectors=query[None])

        def batch(part: Vectors) -> None:
            client.search_many("c", asked, vectors=part)

        def one() -> float:
            return timed(lambda: list(map(single, data.queries[:256])), 256)

        def many() -> float:
            count = len(data.queries)
            return timed(lambda: list(pool.map(single, data.queries)), count)

        def batches() -> float:
            count = len(data.queries)
            with ThreadPoolExecutor(4) as few:
                return timed(lambda: list(few.map(batch, parts)), count)

        rates = interleaved(
            {
                "gRPC, 1 client": one,
                "gRPC, 16 clients": many,
                f"gRPC, batches of {BATCH}": batches,
                "faiss as served": lambda: raw(len(data.queries), BATCH, effort or 1, None)[0],
            },
            unit="queries/s",
            repeats=repeats,
        )
        into.results |= {prefix + name: rate for name, rate in rates.items()}
        ratio = rates[f"gRPC, batches of {BATCH}"].median / rates["faiss as served"].median
        into.ratios[f"{prefix}grpc_batch_vs_faiss"] = ratio
        into.facts[f"{prefix}server_mb"] = server.memory_mb()
        if not prefix:
            inserts = durable_inserts(server.address, data.vectors[: 40 * _AT_ONCE], repeats)
            into.results["durable inserts"] = inserts
            into.ratios["durable_inserts_per_s"] = inserts.median


def startup(path: Path, prefix: str, into: Measured) -> None:
    """A start from the snapshot against one that has to read and build everything."""

    def start() -> float:
        started = time.perf_counter()
        with Store(path, options=_OPTIONS) as store:
            store.get("c").settle()
            return time.perf_counter() - started

    from_snapshot = [start() for _ in range(3)]
    for file in (path / "c").glob("index-*"):
        file.unlink()
    rebuild = start()
    into.results[f"{prefix}start from snapshot"] = Rate("s", tuple(from_snapshot))
    into.results[f"{prefix}start by rebuild"] = Rate("s", (rebuild,))
    into.ratios[f"{prefix}startup_vs_rebuild"] = sorted(from_snapshot)[1] / rebuild


def timed(work: Callable[[], object], count: int) -> float:
    """So many a second."""
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
