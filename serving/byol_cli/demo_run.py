"""What `byol demo` does, step by step: each step is the real thing, none is simulated."""

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from byol_cli.progress import training_bar
from byol_serving.client import Client
from byol_serving.collections.types import Hit
from byol_serving.errors import Unavailable
from byol_training import demo_data
from byol_training.contact_sheet import neighbour_sheet
from byol_training.data import Images, common_labels, load_images, read_images
from byol_training.demo_data import Part
from byol_training.evaluate import pixel_embeddings, untrained
from byol_training.export import export_run
from byol_training.neighbours import Embeddings, Labels, knn_accuracy
from byol_training.pretrain import pretrain
from byol_training.recipes import small_config

Item = TypeVar("Item")

COLLECTION = "demo"
NEIGHBOURS = 6
ROWS = 12


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo measured; accuracies are None where the images have no labels."""

    knn_trained: float | None
    """Of the bundle, by the embeddings that the server gave."""
    knn_untrained: float | None
    """Of the same architecture with its initial weights."""
    knn_pixels: float | None
    """Of standardised raw pixels."""
    parity_max_cosine_distance: float
    """ONNX Runtime against PyTorch."""
    indexed: int
    queries: int
    """Answered over gRPC, one call each."""
    search_p50_ms: float
    """Image in, neighbours out, as the client sees it."""
    seconds: float
    bundle: str
    store: str
    picture: str
    example_query: str
    """A held-back image as a file."""


@dataclass(frozen=True)
class Answer:
    """The server's answer to one query."""

    hits: tuple[Hit, ...]
    seconds: float


def run_demo(data: str, out: Path, *, train_seconds: float, quiet: bool) -> DemoResult:
    """Runs the demo into `out`; raises ByolError where a step fails."""
    started = time.monotonic()
    say = _silent if quiet else _loud
    say(f"1/5 images: {data}")
    out.mkdir(parents=True, exist_ok=True)
    held = demo_data.prepare(data, out / "data")
    config = small_config(max_seconds=train_seconds)
    bank, queries = (_load(part, config.image_size) for part in (held.collection, held.queries))
    say(f"    {len(bank):,} to learn from, {len(queries):,} held back")

    say(f"2/5 pretraining with BYOL for {train_seconds:.0f} s, without labels")
    run = _fresh(out / "run")
    with training_bar(quiet) as on_step:
        pretrain(_load(held.collection, demo_data.TILE), config, run, on_step=on_step)

    say("3/5 exporting the encoder, checking ONNX Runtime against PyTorch")
    bundle = export_run(run, out / "bundle", name="demo", overwrite=True)
    store = _fresh(out / "store")
    with _server(bundle.path, store, out / "server.log") as address, Client(address) as client:
        say(f"4/5 indexing through the gRPC server at {address}")
        _index(client, held.collection.source, bank)
        bank_vectors = _stored(client, bank.names)
        say("5/5 asking it with the images held back")
        answers = _query(client, held.queries.source, queries)
        query_vectors = _embed(client, held.queries.source, queries)

    picture, example = out / "neighbours.png", out / f"query{Path(queries.names[0]).suffix}"
    _draw(picture, bank, queries, answers)
    example.write_bytes(next(read_images(held.queries.source, queries.names[:1]))[1])
    labels = common_labels(bank, queries)
    fresh = untrained(config)
    return DemoResult(
        knn_trained=_knn(labels, bank_vectors, query_vectors),
        knn_untrained=_knn(labels, fresh.embed(bank.pixels), fresh.embed(queries.pixels)),
        knn_pixels=_knn(labels, pixel_embeddings(bank.pixels), pixel_embeddings(queries.pixels)),
        parity_max_cosine_distance=bundle.info.scores["parity_max_cosine_distance"],
        indexed=len(bank),
        queries=len(answers),
        search_p50_ms=1000 * statistics.median(answer.seconds for answer in answers.values()),
        seconds=time.monotonic() - started,
        bundle=str(bundle.path),
        store=str(store),
        picture=str(picture),
        example_query=str(example),
    )


def _load(part: Part, size: int) -> Images:
    return load_images(part.source, size, only=part.names)


def _knn(
    labels: tuple[Labels, Labels] | None, bank: Embeddings, queries: Embeddings
) -> float | None:
    if labels is None:
        return None
    return knn_accuracy(bank, labels[0], queries, labels[1])


@contextmanager
def _server(bundle: Path, store: Path, log: Path) -> Iterator[str]:
    """A real server in a process of its own; yields its address, drains it afterwards."""
    command = [sys.executable, "-m", "byol_cli.main", "serve", "--json", "--port", "0"]
    command += ["--bundle", str(bundle), "--store", str(store)]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise Unavailable(f"the server did not start; its log is {log}")
        yield json.loads(line)["serving"]
    finally:
        process.terminate()
        process.wait(timeout=60)
        process.stdout.close()


def _index(client: Client, source: Path, bank: Images) -> None:
    client.create_collection(COLLECTION)
    classes = _class_of(bank)
    for batch in batched(read_images(source, bank.names), 256):
        names = [name for name, _ in batch]
        metadata = [{"label": classes[name]} if name in classes else {} for name in names]
        client.upsert(COLLECTION, names, images=[data for _, data in batch], metadata=metadata)


def _stored(client: Client, names: list[str]) -> Embeddings:
    """The vectors that the collection holds, in the order of the names."""
    rows = [
        item.vector
        for part in batched(names, 1000)
        for item in client.get(COLLECTION, part, with_vectors=True)
        if item.vector is not None
    ]
    return np.stack(rows)


def _query(client: Client, source: Path, queries: Images) -> dict[str, Answer]:
    """One call for each image held back."""
    answers: dict[str, Answer] = {}
    for name, data in read_images(source, queries.names):
        started = time.perf_counter()
        hits = client.search(COLLECTION, image=data, k=NEIGHBOURS)
        answers[name] = Answer(tuple(hits), time.perf_counter() - started)
    return answers


def _embed(client: Client, source: Path, queries: Images) -> Embeddings:
    """The server's embeddings of the images held back, in the order of their names."""
    encoded = dict(read_images(source, queries.names))
    return client.embed([encoded[name] for name in queries.names])


def _draw(picture: Path, bank: Images, queries: Images, answers: dict[str, Answer]) -> None:
    """A sheet of queries spread over the classes, with their neighbours."""
    rows = np.linspace(0, len(queries) - 1, min(ROWS, len(queries))).astype(int)
    bank_row = {name: row for row, name in enumerate(bank.names)}
    bank_class, query_class = _class_of(bank), _class_of(queries)

    def same(query: str, hit: str) -> bool | None:
        return query_class[query] == bank_class[hit] if query in query_class else None

    neighbours = [
        [
            (bank.pixels[bank_row[hit.id]], hit.score, same(queries.names[row], hit.id))
            for hit in answers[queries.names[row]].hits
        ]
        for row in rows
    ]
    title = "Held-back images and their nearest neighbours, as the server answered"
    neighbour_sheet(picture, [queries.pixels[row] for row in rows], neighbours, title=title)


def _class_of(images: Images) -> dict[str, str]:
    """Class name by image name; empty without labels."""
    if images.labels is None:
        return {}
    return {
        name: images.classes[label] for name, label in zip(images.names, images.labels, strict=True)
    }


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter (itertools.batched comes with Python 3.12)."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _fresh(folder: Path) -> Path:
    """Removes what an earlier demo left there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _loud(line: str) -> None:
    print(line, flush=True)


def _silent(line: str) -> None:
    """Says nothing: --json prints one object only."""
