"""The same stages as Ray Data operators, on as many machines as a Ray cluster has.

    driver: shards to do ─> decode ─────────> encode ──────────> driver: settle, write, record
                            (tasks, a shard   (actors: one a GPU,
                             at a time)        or one a CPU)

The driver keeps the books, so that a shard is recorded once and in full whatever becomes of a node:
Ray runs lost tasks again, and a run whose driver was killed resumes from the journal, on Ray or
not. Batches are those of the local engine, and so are the rows. Under content-hash ids equal files
are embedded once each, since no node knows what the others met, and recorded once.

Source and bundle have to be where every node finds them under the same path or URL.
"""

import logging
import pickle
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from byol_serving.bundle import Bundle, load_bundle
from byol_serving.encoder import Device, Encoder
from byol_serving.errors import Unavailable
from byol_serving.images import Preprocess
from byol_serving.indexing import books
from byol_serving.indexing.books import Books, OnProgress
from byol_serving.indexing.entries import Entry
from byol_serving.indexing.ledger import Kept
from byol_serving.indexing.pipeline import SHARDS_IN_MEMORY, ahead
from byol_serving.indexing.plan import EmbedPlan, Summary
from byol_serving.indexing.shards import Shard
from byol_serving.indexing.sinks import Sink
from byol_serving.indexing.stages import Decoded, Rejected, Row, decode, encode

Results = dict[int, Row | Rejected]
"""Of a shard's entries, by position."""

SHARDS_AT_ONCE = 64
"""One execution of the operators. It bounds the driver's memory, whatever the source's size."""
BLOCK_BYTES = 16 * 2**20
"""A batch of 64 images at 224 pixels; Ray's own 128 MB would let encoders wait for eight."""
DECODE_CPUS, ENCODE_CPUS = 0.5, 0.25
"""Logical, and small enough that actors find room again when half of the nodes are lost."""


def run(
    plan: EmbedPlan,
    bundle: Bundle,
    sink: Sink,
    *,
    address: str | None = None,
    device: Device = "auto",
    on_progress: OnProgress | None = None,
) -> Summary:
    """As `pipeline.run`, on Ray.

    Args:
        plan: what to do; `decode_threads` and `in_flight` are Ray's to choose.
        bundle: whose encoder each actor loads.
        sink: where rows go; written to by this process.
        address: of an existing cluster (`auto`: the one this machine is in); None: a new local one.
        device: of each encoder; on a cluster with GPUs an actor is given one of its own.
        on_progress: as in `pipeline.run`.

    Raises:
        Unavailable: no cluster at the address.
        ByolError: as `pipeline.run`.
    """
    with _connected(address):
        resources = ray.cluster_resources()
        cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        on_gpu = gpus > 0 and device != "cpu"
        actors = gpus if on_gpu else cpus
        workers = {"decode": cpus, "encode": actors, "write": 1}
        operators = _Operators(
            plan=plan,
            bundle=bundle,
            outputs=sink.columns.outputs,
            device=device if on_gpu else "cpu",
            actors=actors,
        )
        with (
            books.opened(plan, bundle.info.encoder_id, sink, workers, on_progress) as opened,
            ThreadPoolExecutor(1) as listing,
            ThreadPoolExecutor(1) as writing,
        ):
            filled = _filled(opened, operators, opened.shards(listing))
            deque(ahead(writing, opened.write, filled, SHARDS_IN_MEMORY), maxlen=0)
            return opened.close()


def _filled(opened: Books, operators: "_Operators", shards: Iterator[Shard]) -> Iterator[Shard]:
    """Settles shards in order, as their results come in; gives each that is whole."""
    while wave := list(islice(shards, SHARDS_AT_ONCE)):
        kept: dict[int, dict[int, Kept]] = {}
        fresh: dict[int, list[tuple[int, Entry]]] = {}
        for shard in wave:
            if not shard.done:
                met = [(at, opened.kept(entry)) for at, entry in enumerate(shard.entries)]
                kept[shard.number] = {at: each for at, each in met if each is not None}
                todo = [(at, shard.entries[at]) for at, each in met if each is None]
                if todo:
                    fresh[shard.number] = todo
        arriving = operators.results(fresh, opened)
        arrived: dict[int, Results] = {}
        for shard in wave:
            if shard.done:
                opened.pass_over(shard)
                continue
            while shard.number in fresh and shard.number not in arrived:
                number, results = next(arriving)
                arrived[number] = results
            _settle(opened, shard, kept[shard.number], arrived.pop(shard.number, {}))
            yield shard


def _settle(opened: Books, shard: Shard, kept: Mapping[int, Kept], results: Results) -> None:
    for at in range(len(shard.entries)):
        result = kept[at] if at in kept else results[at]
        if opened.settle(shard, result) and isinstance(result, Row):
            opened.put(shard, at, result)


@dataclass(frozen=True, kw_only=True)
class _Operators:
    """The part of a run that is done in the cluster."""

    plan: EmbedPlan
    bundle: Bundle
    outputs: tuple[str, ...]
    device: Device
    actors: int

    def results(
        self, fresh: Mapping[int, list[tuple[int, Entry]]], opened: Books
    ) -> Iterator[tuple[int, Results]]:
        """Shards' results, each shard once, as they get done."""
        if not fresh:
            return
        tables = [
            ray.put(pa.table({"shard": [number], "entries": [pickle.dumps(entries)]}))
            for number, entries in fresh.items()
        ]
        how = self.bundle.info.preprocess
        gpu = {"num_gpus": 1} if self.device != "cpu" else {}
        rows = (
            ray.data.from_arrow_refs(tables)
            .map_batches(
                _decode_shard,
                fn_args=(self.plan, how),
                batch_size=1,
                batch_format="numpy",
                num_cpus=DECODE_CPUS,
            )
            .map_batches(
                _Encoding,
                fn_constructor_args=(self.bundle.path.absolute(), self.device, self.outputs),
                batch_size=1,
                batch_format="numpy",
                num_cpus=ENCODE_CPUS,
                compute=ray.data.ActorPoolStrategy(size=self.actors),
                **gpu,
            )
        )
        parts: dict[int, Results] = {number: {} for number in fresh}
        for row in rows.iter_rows():
            number = int(row["shard"])
            opened.meter.worked("decode", float(row["decoding"]))
            opened.meter.worked("encode", float(row["encoding"]))
            parts[number].update(pickle.loads(row["results"]))
            opened.tell()
            if len(parts[number]) == len(fresh[number]):
                yield number, parts.pop(number)


def _decode_shard(
    batch: Mapping[str, Any], plan: EmbedPlan, how: Preprocess
) -> Iterator[dict[str, Any]]:
    """One shard to batches for the encoder, a row each: a row is what Ray never splits."""
    began = time.monotonic()
    images: list[tuple[int, Decoded]] = []
    rejected: Results = {}
    for at, entry in pickle.loads(batch["entries"][0]):
        result = decode(entry, how, plan.limits, plan.ids)
        if isinstance(result, Rejected):
            rejected[at] = result
        else:
            images.append((at, result))
        if len(images) == plan.batch_size:
            yield _row(batch, images, rejected, began)
            images, rejected, began = [], {}, time.monotonic()
    if images or rejected:
        yield _row(batch, images, rejected, began)


def _row(
    batch: Mapping[str, Any], images: list[tuple[int, Decoded]], rejected: Results, began: float
) -> dict[str, Any]:
    return {
        "shard": batch["shard"],
        "images": [pickle.dumps((images, rejected), protocol=5)],
        "decoding": np.array([time.monotonic() - began]),
    }


class _Encoding:
    """An actor: one encoder, loaded once."""

    def __init__(self, bundle: Path, device: Device, outputs: tuple[str, ...]) -> None:
        threads = 1 if device == "cpu" else 0
        self._outputs = outputs
        self._encoder = Encoder(load_bundle(bundle), device=device, threads=threads, workers=1)
        self._encoder.check_golden()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Encodes one row of `_decode_shard`."""
        began = time.monotonic()
        images, results = pickle.loads(batch["images"][0])
        if images:
            encoded = encode([image for _, image in images], self._encoder, self._outputs)
            results |= dict(zip((at for at, _ in images), encoded, strict=True))
        return {
            "shard": batch["shard"],
            "results": [pickle.dumps(results)],
            "decoding": batch["decoding"],
            "encoding": np.array([time.monotonic() - began]),
        }


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """A session on the cluster, with blocks of a batch's size; ended if it was begun here."""
    begun = not ray.is_initialized()
    if begun:
        logging.getLogger("ray.data").setLevel("ERROR")  # the run has a progress bar of its own
        try:
            if address not in (None, "auto", "local"):
                _reach(address)
            ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise Unavailable(
                f"no Ray cluster at {address or 'local'} ({reason}); start one with ray start"
                " --head, or leave the address out"
            ) from error
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size, context.enable_progress_bars
    context.target_max_block_size, context.enable_progress_bars = BLOCK_BYTES, False
    try:
        yield
    finally:
        context.target_max_block_size, context.enable_progress_bars = before
        if begun:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raises OSError or ValueError at once; Ray itself tries for minutes, then ends the process."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=10).close()
