"""The whole path on real images: train on CIFAR-10, index 50,000 images, ask with the test set.

    .venv/bin/python benchmarks/end_to_end.py --out runs/cifar --budget 60m
    .venv/bin/python benchmarks/end_to_end.py --out runs/cifar --run runs/proof/ours --whiten

Every step is the command a user would type: `byol train` (or the run that is named), `byol export`,
`byol serve`, `byol index --server`. Then the test images go to the server as files, one a call, and
come back as their ten nearest neighbours: by one client for the latency, by many for the rate. The
precision@10 is the part of these neighbours that are of the query's class; raw pixels and the
untrained encoder, ranked by brute force, stand beside it.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from byol_serving.client import Client
from byol_training.checkpoint import load_encoder
from byol_training.data import Images, common_labels, list_images, load_images, read_images
from byol_training.evaluate import pixel_embeddings, untrained
from byol_training.neighbours import Embeddings, retrieval
from harness import Options, Rate, report

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
COLLECTION = "cifar10"
K = 10
CLIENTS = 16


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the command line said."""

    out: Path
    run: Path | None
    budget: str
    whiten: bool
    quick: bool
    json: bool


@dataclass(frozen=True)
class Asked:
    """What the server answered to all queries."""

    precision: float
    """Part of the hits that are of the query's class."""
    latencies: Sequence[float]
    """Of one client, in seconds, of the first queries."""
    rate: float
    """Queries a second of all clients together."""


def main() -> None:
    """Trains, serves, indexes, asks."""
    plan = options()
    bank, queries = CIFAR / "train.tar", CIFAR / "test.tar"
    if not bank.exists():
        raise SystemExit(f"{bank} is not there; see benchmarks/README.md")
    plan.out.mkdir(parents=True, exist_ok=True)
    if plan.quick:
        bank, queries = subset(bank, plan.out / "bank", 40), subset(queries, plan.out / "ask", 10)
    run = plan.run or train(plan, bank)
    bundle, store = plan.out / "bundle", plan.out / "store"
    whiten = ["--whiten", str(bank)] if plan.whiten else []
    byol("export", str(run), "--out", str(bundle), "--overwrite", *whiten)
    with serving(bundle, store) as address:
        indexed = index(bank, bundle, address)
        asked = ask(address, queries)
    show(plan, run, {"bank": bank, "queries": queries}, indexed, asked)


def options() -> Plan:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where everything goes")
    parser.add_argument("--run", type=Path, help="a trained run; else one is trained")
    parser.add_argument("--budget", default="60m", help="of `byol train`")
    parser.add_argument("--whiten", action="store_true", help="whiten at export")
    parser.add_argument("--quick", action="store_true", help="few images, seconds of training")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    given = parser.parse_args()
    return Plan(**vars(given))


def subset(tar: Path, folder: Path, each: int) -> Path:
    """The first images of every class as files."""
    chosen: dict[str, list[str]] = {}
    for name in list_images(tar):
        of_class = chosen.setdefault(name.split("/")[-2], [])
        if len(of_class) < each:
            of_class.append(name)
    for name, data in read_images(tar, sorted(chain(*chosen.values()))):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def byol(*arguments: str) -> dict[str, Any]:
    """Runs a command of ours to its end, and gives the object that it ends with."""
    print("byol", *arguments, flush=True)
    command = [sys.executable, "-m", "byol_cli.main", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def train(plan: Plan, bank: Path) -> Path:
    """`byol train` within the budget."""
    run = plan.out / "run"
    how = ["--max-seconds", "10"] if plan.quick else ["--budget", plan.budget]
    byol("train", str(bank), "--out", str(run), *how)
    return run


@contextmanager
def serving(bundle: Path, store: Path) -> Iterator[str]:
    """`byol serve` in a process of its own; yields its address."""
    command = [sys.executable, "-m", "byol_cli.main", "serve", "--json", "--port", "0"]
    command += ["--bundle", str(bundle), "--store", str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield json.loads(server.stdout.readline())["serving"]
        finally:
            server.terminate()


def index(bank: Path, bundle: Path, address: str) -> float:
    """`byol index` through the server; images a second."""
    with Client(address) as client:
        if COLLECTION in [each.name for each in client.collections()]:
            client.drop_collection(COLLECTION)  # of an earlier encoder
    given = ["--bundle", str(bundle), "--server", address, "-c", COLLECTION, "--index", "auto"]
    began = time.perf_counter()
    summary = byol("index", str(bank), *given, "--quiet")
    return float(summary["done"]) / (time.perf_counter() - began)


def ask(address: str, queries: Path) -> Asked:
    """Every image of the test set once by many clients, the first also by one alone."""
    images = list(read_images(queries, list_images(queries)))
    with Client(address) as client, ThreadPoolExecutor(CLIENTS) as clients:

        def search(image: tuple[str, bytes]) -> float:
            name, data = image
            hits = client.search(COLLECTION, image=data, k=K)
            label = name.split("/")[-2]
            return sum((hit.metadata or {}).get("label") == label for hit in hits) / K

        latencies = []
        for image in islice(images, 500):
            began = time.perf_counter()
            search(image)
            latencies.append(time.perf_counter() - began)
        began = time.perf_counter()
        precision = float(np.mean(list(clients.map(search, images))))
        return Asked(precision, latencies, len(images) / (time.perf_counter() - began))


def show(plan: Plan, run: Path, sources: dict[str, Path], indexed: float, asked: Asked) -> None:
    """The table, with both baselines."""
    _, config = load_encoder(run)
    bank, queries = (load_images(source, config.image_size) for source in sources.values())
    p50, p99 = np.percentile(asked.latencies, (50, 99)) * 1000
    percent = {
        "precision@10, as served": asked.precision,
        "precision@10, untrained encoder": precision(untrained(config).embed, bank, queries),
        "precision@10, raw pixels": precision(pixel_embeddings, bank, queries),
    }
    results = {name: Rate("%", (100 * value,)) for name, value in percent.items()}
    results |= {
        "indexed through the server": Rate("images/s", (indexed,)),
        f"image queries, {CLIENTS} clients": Rate("queries/s", (asked.rate,)),
        "image query, one client, p50": Rate("ms", (p50,)),
        "image query, one client, p99": Rate("ms", (p99,)),
    }
    report(
        "end_to_end",
        Options(quick=plan.quick, json=plan.json, peers=False),
        results,
        {
            "gain_over_pixels": percent["precision@10, as served"]
            / percent["precision@10, raw pixels"]
        },
        packages=["byol-server", "torch", "onnxruntime", "faiss-cpu", "grpcio"],
        facts={
            "indexed": len(bank),
            "queries": len(queries),
            "encoder": config.encoder,
            "image size": config.image_size,
            "epochs": config.epochs,
            "whitened": plan.whiten,
        },
    )


def precision(embed: Any, bank: Images, queries: Images) -> float:
    """precision@10 of an embedding by brute force."""
    labels = common_labels(bank, queries)
    assert labels is not None
    rows: tuple[Embeddings, Embeddings] = embed(bank.pixels), embed(queries.pixels)
    return retrieval(rows[0], labels[0], rows[1], labels[1], k=K).precision


if __name__ == "__main__":
    main()
