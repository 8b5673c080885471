"""The books of a run: what became of each entry, kept in the source's order by any engine.

An engine decodes and encodes as it likes; what it finds is settled here, shard after shard, by one
thread. `opened` begins a run and `Books.close` ends one.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager

from byol_serving.errors import InvalidSource, StoreCorrupt
from byol_serving.indexing.entries import Entry, Source
from byol_serving.indexing.journal import Journal, Line, Manifest
from byol_serving.indexing.ledger import Kept, Ledger
from byol_serving.indexing.meter import Meter
from byol_serving.indexing.plan import EmbedPlan, Progress, Summary
from byol_serving.indexing.shards import Shard, held_records, planned
from byol_serving.indexing.sinks import Sink
from byol_serving.indexing.sources import open_source
from byol_serving.indexing.stages import Decoded, Rejected, Row

PROGRESS_SECONDS = 0.2
OnProgress = Callable[[Progress], None]


@contextmanager
def opened(
    plan: EmbedPlan,
    encoder_id: str,
    sink: Sink,
    workers: Mapping[str, int],
    on_progress: OnProgress | None,
) -> "Iterator[Books]":
    """The books of a new run; `workers`: of each stage, how many.

    Raises:
        InvalidSource: the source cannot be opened.
        InvalidConfig: a shard's maps would not fit in memory.
        StoreLocked, StoreError, EncoderMismatch, InvalidConfig, StoreCorrupt: see `Journal`.
    """
    sink.columns.check(plan.shard_size)
    source = open_source(plan.source, image_column=plan.image_column, id_column=plan.id_column)
    manifest = Manifest(
        encoder_id=encoder_id,
        source=source.location,
        shard_size=plan.shard_size,
        ids=plan.ids,
        output=sink.kind,
        columns=sink.columns.facts,
    )
    with Journal(plan.out, manifest) as journal, Ledger(journal.state / "ledger.sqlite3") as ledger:
        books = Books(plan, source, sink, journal, ledger, Meter(workers), on_progress)
        if plan.sync:
            ledger.remember(held_records(journal, sink))
        if on_progress is not None:
            threading.Thread(target=books.count, name="count", daemon=True).start()
        yield books


class Books:
    """See the module. All but `write` is for one thread."""

    def __init__(
        self,
        plan: EmbedPlan,
        source: Source,
        sink: Sink,
        journal: Journal,
        ledger: Ledger,
        meter: Meter,
        on_progress: OnProgress | None,
    ) -> None:
        """Made by `opened` only."""
        self.plan, self.meter = plan, meter
        self._source, self._sink, self._journal, self._ledger = source, sink, journal, ledger
        self.outputs = sink.columns.outputs
        """Of the graph, that rows are made of."""
        self._on_progress, self._told = on_progress, 0.0
        self._shards = 0

    def shards(self, lister: Executor) -> Iterator[Shard]:
        """All shards in order, as `planned`."""
        for shard in planned(self._source.entries(), self.plan, self._journal, self._sink, lister):
            self._shards += 1
            yield shard

    def kept(self, entry: Entry) -> Kept | None:
        """In a sync, the last run's row of an entry that did not change."""
        return self._ledger.kept(entry) if self.plan.sync else None

    def pass_over(self, shard: Shard) -> None:
        """Settles a shard that is done."""
        lines = shard.record or []
        self._ledger.add_all(lines)
        states = [line.state for line in lines]
        self.meter.skipped += states.count("ok")
        self.meter.rejected += states.count("rejected")
        self.meter.duplicates += states.count("duplicate")
        self.tell()

    def settle(self, shard: Shard, result: Decoded | Row | Rejected | Kept) -> bool:
        """Settles a shard's next entry; whether its row has a place in the output."""
        entry = shard.entries[len(shard.lines)]
        line = self._line(entry, result)
        shard.lines.append(line)
        if line.state == "ok" and isinstance(result, Kept):
            shard.kept[line.text] = result.shard
            self.meter.skipped += 1
        self.tell()
        return line.state == "ok"

    def put(self, shard: Shard, at: int, result: Row | Rejected) -> None:
        """Takes in the row of a settled entry, or why there is none after all."""
        match result:
            case Row():
                shard.rows[result.id] = result
                self.meter.done += 1
            case Rejected(reason=reason):
                line = shard.lines[at]
                self._ledger.forget(line.text)
                shard.lines[at] = Line(line.name, line.fingerprint, "rejected", reason)
                self.meter.rejected += 1

    def write(self, shard: Shard) -> None:
        """Brings a settled shard to disk and records it; in any thread."""
        with self.meter.timed("write"):
            staged = self.plan.sync
            if shard.lines != shard.record:
                folder = self._journal.vectors(staged=staged)
                self._sink.write(folder, shard.number, self._rows(shard))
            self._journal.finish(shard.number, shard.lines, staged=staged)

    def close(self) -> Summary:
        """Ends a run whose shards are all written: removes what is gone, and sums up."""
        if self._shards == 0:
            raise InvalidSource(f"{self.plan.source} holds no image; is it the right place?")
        removed = self._sink.remove(self._ledger.gone()) if self.plan.sync else 0
        self._journal.commit(self._shards, staged=self.plan.sync)
        met = self.meter
        rejected_file = self._journal.write_rejected(some=met.rejected > 0)
        met.total = met.done + met.skipped + met.rejected + met.duplicates
        self.tell(at_once=True)
        return Summary(
            **met.measured(),
            removed=removed,
            shards=self._shards,
            out=self.plan.out,
            rejected_file=rejected_file,
        )

    def tell(self, *, at_once: bool = False) -> None:
        """Calls `on_progress` if it is time to."""
        now = time.monotonic()
        if self._on_progress is not None and (at_once or now - self._told > PROGRESS_SECONDS):
            self._told = now
            self._on_progress(Progress(**self.meter.measured()))

    def count(self) -> None:
        """Counts the source, for the time left; in a thread of its own."""
        # Whatever keeps it from counting is said where the source is listed.
        with contextlib.suppress(Exception):
            self.meter.total = self._source.count()

    def _line(self, entry: Entry, result: Decoded | Row | Rejected | Kept) -> Line:
        if isinstance(result, Rejected):
            self.meter.rejected += 1
            return Line(entry.name, entry.fingerprint, "rejected", result.reason)
        if self._ledger.add(result.id):
            return Line(entry.name, entry.fingerprint, "ok", result.id)
        if self.plan.ids == "name":
            raise InvalidSource(
                f"{entry.name!r} stands twice in {self.plan.source}; remove one of them,"
                " or use --ids sha256"
            )
        self.meter.duplicates += 1
        return Line(entry.name, entry.fingerprint, "duplicate", result.id)

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
                f"{self.plan.out} lacks the row of {missing[0]!r}, which an earlier run recorded;"
                " choose another output"
            )
        return [rows[id_] for id_ in wanted]
