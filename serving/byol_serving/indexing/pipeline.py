"""The offline run: list, decode, encode and write, each a few steps ahead of the next.

    entries ─> decode ────────────> batches ─> encode ──────> shards ─> write
               (threads; at most               (a thread per            (one thread;
                `windows` images)               encoder)                 three shards)

Every stage is `ahead`: it keeps a bounded number of calls going and gives results in order, and
takes in no more until one is taken from it. So a slow stage holds back those before it, memory is
bounded, and as batches are the same each time, a resumed run writes the same bits.
"""

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from byol_serving.encoder import Encoder
from byol_serving.indexing import books
from byol_serving.indexing.books import Books, OnProgress
from byol_serving.indexing.entries import Entry
from byol_serving.indexing.ledger import Kept
from byol_serving.indexing.plan import EmbedPlan, Summary
from byol_serving.indexing.shards import Shard
from byol_serving.indexing.sinks import Sink
from byol_serving.indexing.stages import Decoded, Rejected, Row, decode, encode

In = TypeVar("In")
Out = TypeVar("Out")

SHARDS_IN_MEMORY = 3
"""One is filled, one waits for the writer, one is being written."""


def run(
    plan: EmbedPlan,
    encoders: Sequence[Encoder],
    sink: Sink,
    *,
    on_progress: OnProgress | None = None,
) -> Summary:
    """Embeds a source into a sink; what an earlier run finished is left as it is.

    Args:
        plan: what to do.
        encoders: of one bundle; each is given a batch at a time, so one a device, or the same one
            several times.
        sink: where rows go.
        on_progress: called a few times a second, from this thread.

    Raises:
        InvalidSource: the source cannot be listed, is empty, holds a name twice, or changed since
            the last run (and `plan.sync` is off).
        StoreLocked, EncoderMismatch, InvalidConfig, StoreCorrupt: see `Journal`.
        InvalidConfig: shards of so many maps would fill the memory.
        StoreError: the disk refused; what is finished is kept.
    """
    encoder_id = encoders[0].bundle.info.encoder_id
    workers = {"decode": plan.threads, "encode": len(encoders), "write": 1}
    with books.opened(plan, encoder_id, sink, workers, on_progress) as opened:
        images, batches = plan.windows(len(encoders))
        stages = _Stages(opened, encoders)
        with (
            _pool(1, "list") as listing,
            _pool(plan.threads, "decode") as decoding,
            _pool(len(encoders), "encode") as encoding,
            _pool(1, "write") as writing,
        ):
            decoded = ahead(decoding, stages.decode, stages.tasks(listing), images)
            encoded = ahead(encoding, stages.encode, stages.batches(decoded), batches)
            written = ahead(writing, opened.write, stages.filled(encoded), SHARDS_IN_MEMORY)
            deque(written, maxlen=0)
        return opened.close()


@dataclass(frozen=True)
class _Task:
    """One entry of a shard, or, for a shard that is done, the shard as a whole."""

    shard: Shard
    entry: Entry | None = None
    kept: Kept | None = None


@dataclass
class _Batch:
    """Images for one call of an encoder, all of one shard."""

    shard: Shard
    last: bool = False
    """Whether the shard ends with it."""
    images: list[Decoded] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    """Position of each image among the shard's lines."""


class _Stages:
    """What is done at each step. All but `decode` and `encode` is for the caller's thread."""

    def __init__(self, opened: Books, encoders: Sequence[Encoder]) -> None:
        self._books, self._plan, self._meter = opened, opened.plan, opened.meter
        self._how = encoders[0].bundle.info.preprocess
        self._idle: queue.SimpleQueue[Encoder] = queue.SimpleQueue()
        for each in encoders:
            self._idle.put(each)

    def tasks(self, listing: Executor) -> Iterator[_Task]:
        """Every entry that has to be looked at."""
        for shard in self._books.shards(listing):
            if shard.done:
                yield _Task(shard)
                continue
            for entry in shard.entries:
                yield _Task(shard, entry, self._books.kept(entry))

    def decode(self, task: _Task) -> tuple[_Task, Decoded | Rejected | Kept | None]:
        """In a thread."""
        if task.entry is None or task.kept is not None:
            return task, task.kept
        with self._meter.timed("decode"):
            return task, decode(task.entry, self._how, self._plan.limits, self._plan.ids)

    def batches(
        self, decoded: Iterable[tuple[_Task, Decoded | Rejected | Kept | None]]
    ) -> Iterator[_Batch]:
        """Settles entries in the source's order, and gathers what has to be encoded."""
        batch: _Batch | None = None
        for task, result in decoded:
            shard = task.shard
            if result is None:
                self._books.pass_over(shard)
                continue
            batch = batch or _Batch(shard)
            if self._books.settle(shard, result) and isinstance(result, Decoded):
                batch.images.append(result)
                batch.lines.append(len(shard.lines) - 1)
            if shard.settled or len(batch.images) == self._plan.batch_size:
                batch.last = shard.settled
                yield batch
                batch = None

    def encode(self, batch: _Batch) -> tuple[_Batch, list[Row | Rejected]]:
        """In a thread; each encoder has one batch at a time."""
        if not batch.images:
            return batch, []
        encoder = self._idle.get()
        try:
            with self._meter.timed("encode"):
                return batch, encode(batch.images, encoder, self._books.outputs)
        finally:
            self._idle.put(encoder)
            batch.images.clear()  # pixels are not needed any more

    def filled(self, encoded: Iterable[tuple[_Batch, list[Row | Rejected]]]) -> Iterator[Shard]:
        """Puts rows where they belong; gives each shard that is whole."""
        for batch, results in encoded:
            for at, result in zip(batch.lines, results, strict=True):
                self._books.put(batch.shard, at, result)
            if batch.last:
                yield batch.shard


def ahead(
    pool: Executor, call: Callable[[In], Out], items: Iterable[In], limit: int
) -> Iterator[Out]:
    """`call` of each item in the pool, in order; at most `limit` taken in and not yet given out."""
    pending: deque[Future[Out]] = deque()
    for item in items:
        pending.append(pool.submit(call, item))
        while pending and (len(pending) >= limit or pending[0].done()):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextmanager
def _pool(workers: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that finish what they are at when the block ends, and begin nothing more."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
