"""Similarity search: raw FAISS (the limit), ours in process and over gRPC, and four peers.

Every engine answers the same queries, top 10, each at the least effort that reaches the recall.
Raw FAISS searches the very index that ours built, read from its snapshot: the difference is ours.
"""

import argparse
import shutil
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from byol_serving.client import Client, SearchOptions
from byol_serving.collections.collection import LocalCollection
from byol_serving.collections.index import IndexOptions
from byol_serving.collections.store import Store
from byol_serving.collections.types import IndexKind
from harness import Options, Peer, Rate, interleaved, options, report
from search_data import CIFAR, Data, clustered, embedded, pictures
from search_engines import SHARES, Ask, K, asking, asking_faiss, asking_peer
from search_server import Server, durable_inserts

BATCH = 64
QUERIES = 2048
PEERS = ("hnswlib", "qdrant", "milvus", "lancedb")
EFFORTS = sorted({round(2 * 1.1**step) for step in range(74)})
"""2 .. 2,100, each about a tenth above the one before, so that recalls come out nearly equal."""
_AT_ONCE = 5000
_PATIENCE_S = 900
_MILVUS_MOST = 200_000  # its create_index times out at a million
_OPTIONS = IndexOptions(snapshot_every=10**9)


@dataclass
class Measured:
    """What goes into the report."""

    results: dict[str, Rate]
    ratios: dict[str, float]
    facts: dict[str, Any]


def main() -> None:
    """Measures and prints."""
    chosen = options(__doc__ or "", arguments)
    given = chosen.given
    count = given.count or (20_000 if chosen.quick else 1_000_000)
    measured = Measured({}, {}, {})
    measure(chosen, clustered(count, QUERIES), "", measured)
    if CIFAR.exists() and (given.bundle or not chosen.quick):
        real = embedded(given.bundle, QUERIES) if given.bundle else pictures(QUERIES)
        measure(chosen, real, "cifar10 ", measured)
    packages = ["byol-server", "faiss-cpu", "grpcio", "numpy"]
    report(
        "search",
        chosen,
        measured.results,
        measured.ratios,
        packages=packages,
        facts=measured.facts,
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    """What only this benchmark is asked."""
    parser.add_argument("--count", type=int, metavar="N", help="clustered vectors, from 20,000")
    parser.add_argument(
        "--bundle", type=Path, help="embeds CIFAR-10 by this encoder instead of taking its pixels"
    )
    parser.add_argument(
        "--patience", type=float, default=_PATIENCE_S, metavar="SECONDS", help="for a peer's build"
    )
    parser.add_argument("--index", choices=get_args(IndexKind), default="auto", help="ours")


def measure(chosen: Options, data: Data, prefix: str, into: Measured) -> None:
    """Everything about one data set."""
    into.facts[f"{prefix}data"] = data.name
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = time.perf_counter()
        store = Store(scratch / "store", options=_OPTIONS)
        ours = filled(store, data, chosen.given.index)
        stats = ours.stats()
        into.facts |= {
            f"{prefix}ours build_s": round(time.perf_counter() - started, 1),
            f"{prefix}ours index": stats.answering,
            f"{prefix}ours recall measured": round(stats.recall, 3),
            f"{prefix}ours index_mb": stats.index_bytes // 2**20,
        }
        folder = scratch / "store" / "c"
        seconds = seconds_of(chosen)
        engines = {
            "ours": asking(ours, data, seconds),
            "faiss": asking_faiss(folder, data, seconds),
        }
        if chosen.peers:
            engines |= peers(chosen, stack, data, scratch, prefix, into)
        repeats = 2 if chosen.quick else 3
        unfiltered(engines, data, repeats, prefix, into)
        filtered(engines, data, repeats, prefix, into)
        store.backup(scratch / "served")
        store.close()
        for file in folder.glob("index-*"):
            shutil.copy(file, scratch / "served" / "c" / file.name)
        over_grpc(scratch / "served", engines["faiss"], data, repeats, prefix, into)
        startup(scratch / "store", prefix, into)


def filled(store: Store, data: Data, index: IndexKind) -> LocalCollection:
    """Our collection of the data, its index built and its snapshot written."""
    dim = data.vectors.shape[1]
    collection = store.create("c", dim=dim, encoder_id="bench", index=index)
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
    for name in PEERS:
        if name == "milvus" and (chosen.quick or len(data.vectors) > _MILVUS_MOST):
            why = "takes minutes" if chosen.quick else f"not run above {_MILVUS_MOST:,}"
            into.facts[f"{prefix}milvus"] = why
            continue
        try:
            peer = stack.enter_context(
                Peer(f"{name}_peer.py", patience=chosen.given.patience, **files)
            )
        except TimeoutError as error:
            into.facts[f"{prefix}{name}"] = str(error)
            continue
        into.facts[f"{prefix}{name} build_s"] = round(peer.setup["build_s"], 1)
        into.facts[f"{prefix}{name} peak_mb"] = peer.setup["peak_mb"]
        found[name] = asking_peer(peer, seconds_of(chosen))
    return found


# What is measured


def unfiltered(
    engines: Mapping[str, Ask], data: Data, repeats: int, prefix: str, into: Measured
) -> None:
    """Queries/s at two recalls, in batches and one at a time."""
    count = len(data.queries)
    truth = data.truth(count, K, None)
    _, found = engines["ours"](count, BATCH, None, None)
    into.facts[f"{prefix}ours recall as tuned"] = round(recall_of(found, truth), 3)

    def as_tuned(name: str) -> Callable[[], float]:
        return lambda: engines[name](count, BATCH, None, None)[0]

    both = {f"{name} as tuned": as_tuned(name) for name in ("ours", "faiss")}
    tuned = interleaved(both, unit="queries/s", repeats=2 * repeats)
    into.results |= {prefix + name: rate for name, rate in tuned.items()}
    ratio = tuned["ours as tuned"].median / tuned["faiss as tuned"].median
    into.ratios[f"{prefix}in_process_vs_faiss"] = ratio
    for target in (0.95, 0.99):
        efforts = least_efforts(engines, truth, target, None)
        for batch in (BATCH, 1):
            name = f"{prefix}recall {target} batch {batch}"
            rates = rounds(engines, efforts, batch, None, repeats, count)
            into.results |= {f"{name} {engine}": rate for engine, rate in rates.items()}
            versus(rates, f"{prefix}at_{target}_batch_{batch}_", into)
            if (target, batch) == (0.95, BATCH):
                versus(rates, prefix, into)


def filtered(
    engines: Mapping[str, Ask], data: Data, repeats: int, prefix: str, into: Measured
) -> None:
    """Queries/s at a recall of .95 under filters, in batches."""
    count = min(256, len(data.queries))
    for share, below in SHARES.items():
        truth = data.truth(count, K, below)
        efforts = least_efforts(engines, truth, 0.95, below)
        rates = rounds(engines, efforts, BATCH, below, repeats, count)
        into.results |= {f"{prefix}filter {share} {name}": rate for name, rate in rates.items()}
        versus(rates, f"{prefix}filtered_{share}_", into)


def versus(rates: dict[str, Rate], prefix: str, into: Measured) -> None:
    """Ours over each other."""
    for name, rate in rates.items():
        if name not in ("ours", "faiss"):
            into.ratios[f"{prefix}vs_{name}"] = rates["ours"].median / rate.median


def least_efforts(
    engines: Mapping[str, Ask], truth: np.ndarray, target: float, below: int | None
) -> dict[str, int]:
    """The cheapest of EFFORTS by which each finds so much; the greatest where none does."""
    count = min(512, len(truth))

    def least(ask: Ask) -> int:
        def recall(effort: int) -> float:
            return recall_of(ask(count, BATCH, effort, below)[1], truth)

        return EFFORTS[min(bisect_left(EFFORTS, target, key=recall), len(EFFORTS) - 1)]

    efforts = {name: least(ask) for name, ask in engines.items() if name != "faiss"}
    return efforts | {"faiss": efforts["ours"]}  # the same index at the same effort


def recall_of(found: Sequence[Sequence[int]], truth: np.ndarray) -> float:
    """The part of the right ones among what was found, for as many queries as were answered."""
    shares = [len({*ids} & {*right.tolist()}) / K for ids, right in zip(found, truth, strict=False)]
    return float(np.mean(shares))


def rounds(
    engines: Mapping[str, Ask],
    efforts: Mapping[str, int],
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
) -> None:
    """One client and many, and batches, against raw FAISS at the effort the server is tuned to."""
    with Server(path) as server, Client(server.address) as client, ThreadPoolExecutor(16) as pool:
        asked = SearchOptions(k=K)
        parts = [
            data.queries[start : start + BATCH] for start in range(0, len(data.queries), BATCH)
        ]

        def single(query: np.ndarray) -> None:
            client.search_columns("c", query[None], asked)

        def batch(part: np.ndarray) -> None:
            client.search_columns("c", part, asked)

        def one() -> float:
            return timed(lambda: list(map(single, data.queries[:256])), 256)

        def many() -> float:
            count = len(data.queries)
            return timed(lambda: list(pool.map(single, data.queries)), count)

        def batches() -> float:
            count = len(data.queries)
            return timed(lambda: list(pool.map(batch, parts)), count)

        rates = interleaved(
            {
                "gRPC, 1 client": one,
                "gRPC, 16 clients": many,
                f"gRPC, 16 clients, batches of {BATCH}": batches,
                "faiss as served": lambda: raw(len(data.queries), BATCH, None, None)[0],
            },
            unit="queries/s",
            repeats=repeats,
        )
        into.results |= {prefix + name: rate for name, rate in rates.items()}
        ratio = (
            rates[f"gRPC, 16 clients, batches of {BATCH}"].median / rates["faiss as served"].median
        )
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


def seconds_of(chosen: Options) -> float:
    """How long a round lasts."""
    return 0.2 if chosen.quick else 1.0


def timed(work: Callable[[], object], count: int) -> float:
    """So many a second."""
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
