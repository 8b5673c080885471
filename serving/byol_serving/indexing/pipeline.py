"""The offline run: list, decode, encode and write, each a few steps ahead of the next.

    entries ─> decode ────────────> batches ─> encode ──────> shards ─> write
               (threads; at most               (a thread per            (one thread;
                `windows` images)               encoder)                 three shards)

Every stage is `ahead`: it keeps a bounded number of calls going and gives results in order, and
takes in no more until one is taken from it. So a slow stage holds back those before it, memory is
bounded, and as batches are the same each time, a resumed run writes the same bits.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidSource, StoreCorrupt
from byol_serving.indexing.journal import Journal, Line, Manifest
from byol_serving.indexing.ledger import Kept, Ledger
from byol_serving.indexing.meter import Meter
from byol_serving.indexing.plan import EmbedPlan, Progress, Summary
from byol_serving.indexing.shards import Shard, held_records, planned
from byol_serving.indexing.sinks import Sink
from byol_serving.indexing.sources import Entry, Source, open_source
from byol_serving.indexing.stages import Decoded, Rejected, Row, decode, encode

In = TypeVar("In")
Out = TypeVar("Out")

SHARDS_IN_MEMORY = 3
"""One is filled, one waits for the writer, one is being written."""
PROGRESS_SECONDS = 0.2


def run(
    plan: EmbedPlan,
    encoders: Sequence[Encoder],
    sink: Sink,
    *,
    on_progress: Callable[[Progress], None] | None = None,
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
        StoreError: the disk refused; what is finished is kept.
    """
    source = open_source(plan.source, image_column=plan.image_column, id_column=plan.id_column)
    manifest = Manifest(
        encoder_id=encoders[0].bundle.info.encoder_id,
        source=source.location,
        shard_size=plan.shard_size,
        ids=plan.ids,
        output=sink.kind,
    )
    with Journal(plan.out, manifest) as journal, Ledger(journal.state / "ledger.sqlite3") as ledger:
        return _Run(plan, encoders, sink, journal, ledger, on_progress).go(source)


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


class _Run:
    """One run's stages. The caller's thread does all but `_decode`, `_encode` and `_write`."""

    def __init__(
        self,
        plan: EmbedPlan,
        encoders: Sequence[Encoder],
        sink: Sink,
        journal: Journal,
        ledger: Ledger,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self._plan, self._sink, self._journal, self._ledger = plan, sink, journal, ledger
        self._how = encoders[0].bundle.info.preprocess
        self._encoders = len(encoders)
        self._idle: queue.SimpleQueue[Encoder] = queue.SimpleQueue()
        for each in encoders:
            self._idle.put(each)
        workers = {"decode": plan.threads, "encode": self._encoders, "write": 1}
        self._meter = Meter(workers)
        self._on_progress, self._told = on_progress, 0.0
        self._shards = 0

    def go(self, source: Source) -> Summary:
        """Runs to the end."""
        if self._plan.sync:
            self._ledger.remember(held_records(self._journal, self._sink))
        if self._on_progress is not None:
            threading.Thread(target=self._count, args=(source,), daemon=True).start()
        images, batches = self._plan.windows(self._encoders)
        with (
            _pool(1, "list") as listing,
            _pool(self._plan.threads, "decode") as decoding,
            _pool(self._encoders, "encode") as encoding,
            _pool(1, "write") as writing,
        ):
            tasks = self._tasks(source, listing)
            decoded = ahead(decoding, self._decode, tasks, images)
            encoded = ahead(encoding, self._encode, self._batches(decoded), batches)
            written = ahead(writing, self._write, self._filled(encoded), SHARDS_IN_MEMORY)
            deque(written, maxlen=0)
        if self._shards == 0:
            raise InvalidSource(f"{self._plan.source} holds no image; is it the right place?")
        removed = self._sink.remove(self._ledger.gone()) if self._plan.sync else 0
        self._journal.commit(self._shards, staged=self._plan.sync)
        rejected_file = self._journal.write_rejected()
        met = self._meter
        met.total = met.done + met.skipped + met.rejected + met.duplicates
        self._tell(at_once=True)
        return Summary(
            **met.measured(),
            removed=removed,
            shards=self._shards,
            out=self._plan.out,
            rejected_file=rejected_file,
        )

    def _tasks(self, source: Source, listing: Executor) -> Iterator[_Task]:
        for shard in planned(source.entries(), self._plan, self._journal, self._sink, listing):
            self._shards += 1
            if shard.done:
                yield _Task(shard)
                continue
            for entry in shard.entries:
                kept = self._ledger.kept(entry) if self._plan.sync else None
                yield _Task(shard, entry, kept)

    def _decode(self, task: _Task) -> tuple[_Task, Decoded | Rejected | None]:
        if task.entry is None or task.kept is not None:
            return task, None
        with self._meter.timed("decode"):
            return task, decode(task.entry, self._how, self._plan.limits, self._plan.ids)

    def _batches(
        self, decoded: Iterable[tuple[_Task, Decoded | Rejected | None]]
    ) -> Iterator[_Batch]:
        """Settles entries in the source's order, and gathers what has to be encoded."""
        batch: _Batch | None = None
        for task, result in decoded:
            shard = task.shard
            if task.entry is None:
                self._pass_over(shard)
                continue
            batch = batch or _Batch(shard)
            line = self._line(task.entry, task.kept or result)
            if line.state == "ok" and isinstance(result, Decoded):
                batch.images.append(result)
                batch.lines.append(len(shard.lines))
            elif line.state == "ok" and task.kept is not None:
                shard.kept[line.text] = task.kept.shard
                self._meter.skipped += 1
            shard.lines.append(line)
            if shard.settled or len(batch.images) == self._plan.batch_size:
                batch.last = shard.settled
                yield batch
                batch = None
            self._tell()

    def _pass_over(self, shard: Shard) -> None:
        lines = shard.record or []
        self._ledger.add_all(lines)
        states = [line.state for line in lines]
        self._meter.skipped += states.count("ok")
        self._meter.rejected += states.count("rejected")
        self._meter.duplicates += states.count("duplicate")
        self._tell()

    def _line(self, entry: Entry, result: Decoded | Rejected | Kept | None) -> Line:
        match result:
            case Decoded(id=id_) | Kept(id=id_):
                if self._ledger.add(id_):
                    return Line(entry.name, entry.fingerprint, "ok", id_)
                if self._plan.ids == "name":
                    raise InvalidSource(
                        f"{entry.name!r} stands twice in {self._plan.source}; remove one of them,"
                        " or use --ids sha256"
                    )
                self._meter.duplicates += 1
                return Line(entry.name, entry.fingerprint, "duplicate", id_)
            case Rejected(reason=reason):
                self._meter.rejected += 1
                return Line(entry.name, entry.fingerprint, "rejected", reason)
            case None:
                raise AssertionError("an entry without a result")

    def _encode(self, batch: _Batch) -> tuple[_Batch, list[Row | Rejected]]:
        if not batch.images:
            return batch, []
        encoder = self._idle.get()
        try:
            with self._meter.timed("encode"):
                return batch, encode(batch.images, encoder)
        finally:
            self._idle.put(encoder)
            batch.images.clear()  # pixels are not needed any more

    def _filled(self, encoded: Iterable[tuple[_Batch, list[Row | Rejected]]]) -> Iterator[Shard]:
        """Puts rows where they belong; gives each shard that is whole."""
        for batch, results in encoded:
            shard = batch.shard
            for at, result in zip(batch.lines, results, strict=True):
                match result:
                    case Row():
                        shard.rows[result.id] = result
                        self._meter.done += 1
                    case Rejected(reason=reason):
                        line = shard.lines[at]
                        self._ledger.forget(line.text)
                        shard.lines[at] = Line(line.name, line.fingerprint, "rejected", reason)
                        self._meter.rejected += 1
            if batch.last:
                yield shard

    def _write(self, shard: Shard) -> None:
        with self._meter.timed("write"):
            staged = self._plan.sync
            if shard.lines != shard.record:
                folder = self._journal.vectors(staged=staged)
                self._sink.write(folder, shard.number, self._rows(shard))
            self._journal.finish(shard.number, shard.lines, staged=staged)

    def _rows(self, shard: Shard) -> list[Row]:
        """The shard's rows in order, those of the last run among them if the sink moves rows."""
        rows = dict(shard.rows)
        for number in sorted(set(shard.kept.values())):
            old = self._sink.read(self._journal.vectors(), number)
            if old is None:
                return list(rows.values())
            rows.update((id_, row) for id_, row in old.items() if shard.kept.get(id_) == number)
        wanted = [line.text for line in shard.lines if line.state == "ok"]
        if missing := [id_ for id_ in wanted if id_ not in rows]:
            raise StoreCorrupt(
                f"{self._plan.out} lacks the row of {missing[0]!r}, which an earlier run recorded;"
                " choose another output"
            )
        return [rows[id_] for id_ in wanted]

    def _count(self, source: Source) -> None:
        # Whatever keeps it from counting is said where the source is listed.
        with contextlib.suppress(Exception):
            self._meter.total = source.count()

    def _tell(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._on_progress is not None and (at_once or now - self._told > PROGRESS_SECONDS):
            self._told = now
            self._on_progress(Progress(**self._meter.measured()))


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


@contextlib.contextmanager
def _pool(workers: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that finish what they are at when the block ends, and begin nothing more."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
