"""What is to be done with each shard: nothing, or which of its entries anew.

A shard is a run of consecutive entries, recorded as a whole. A run without `sync` resumes: shards
with a record of the same entries are done, and a record of others means that the source changed. A
sync takes changes over: it makes every shard anew that differs from its record, into next/, from
rows of the last run where an entry is unchanged. What it made there stays good for as long as no
earlier shard changes again.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import count, islice

from byol_serving.errors import InvalidSource
from byol_serving.indexing.entries import Entry
from byol_serving.indexing.journal import Journal, Line, matches
from byol_serving.indexing.plan import EmbedPlan
from byol_serving.indexing.sinks import Sink
from byol_serving.indexing.stages import Row


@dataclass(eq=False, kw_only=True)
class Shard:
    """One shard on its way through the stages."""

    number: int
    entries: list[Entry]
    record: list[Line] | None
    """What an earlier run wrote of it, if that is still there."""
    done: bool
    """Whether the record stands as it is."""
    lines: list[Line] = field(default_factory=list)
    """What became of its entries, as far as they are settled."""
    rows: dict[str, Row] = field(default_factory=dict)
    """Embedded by this run, by id."""
    kept: dict[str, int] = field(default_factory=dict)
    """Shard of the last run that has the row, by id."""

    @property
    def settled(self) -> bool:
        """Whether every entry has its line."""
        return len(self.lines) == len(self.entries)


def planned(
    entries: Iterator[Entry], plan: EmbedPlan, journal: Journal, sink: Sink, lister: Executor
) -> Iterator[Shard]:
    """The source's shards in order, the next one listed while one is worked on.

    Raises:
        InvalidSource: the source changed since the last run, and `sync` was not asked for.
    """
    choose = _Sync(plan, journal, sink) if plan.sync else _Resume(plan, journal, sink)
    numbers = count()
    for part in _listed(entries, plan.shard_size, lister):
        yield choose(next(numbers), part)
    if not plan.sync and journal.record(next(numbers)) is not None:
        raise _changed(plan, "it holds fewer images")


def held(journal: Journal, sink: Sink, number: int) -> list[Line] | None:
    """The record of a shard whose rows are still there."""
    lines = journal.record(number)
    if lines is None:
        return None
    ids = [line.text for line in lines if line.state == "ok"]
    return lines if sink.holds(journal.vectors(), number, ids) else None


def held_records(journal: Journal, sink: Sink) -> Iterator[tuple[int, list[Line]]]:
    """All records whose rows are still there."""
    for number, _ in journal.records():
        if (lines := held(journal, sink, number)) is not None:
            yield number, lines


class _Resume:
    """Chooses for a run that goes on where the last one stopped."""

    def __init__(self, plan: EmbedPlan, journal: Journal, sink: Sink) -> None:
        self._plan, self._journal, self._sink = plan, journal, sink

    def __call__(self, number: int, entries: list[Entry]) -> Shard:
        record = held(self._journal, self._sink, number)
        if record is not None and not matches(record, entries):
            raise _changed(self._plan, _difference(record, entries))
        return Shard(number=number, entries=entries, record=record, done=record is not None)


class _Sync:
    """Chooses for a run that takes changes over."""

    def __init__(self, plan: EmbedPlan, journal: Journal, sink: Sink) -> None:
        self._plan, self._journal, self._sink = plan, journal, sink
        self._made = False
        """Whether a shard was chosen to be made: what is staged after it is out of date."""
        self._differs = False
        """Whether an earlier shard may hold other ids than it did."""

    def __call__(self, number: int, entries: list[Entry]) -> Shard:
        record = held(self._journal, self._sink, number)
        staged = self._journal.record(number, staged=True)
        if staged is not None and matches(staged, entries):
            self._differs = True
            return Shard(number=number, entries=entries, record=staged, done=True)
        if record is not None and matches(record, entries) and self._stands(record):
            return Shard(number=number, entries=entries, record=record, done=True)
        if not self._made:
            self._journal.drop_staged_from(number)
        self._made = self._differs = True
        return Shard(number=number, entries=entries, record=record, done=False)

    def _stands(self, record: list[Line]) -> bool:
        """Whether a record of the same entries holds: rejected files are tried again, and of
        equal files the first counts, so that content ids depend on all earlier shards.
        """
        if self._plan.ids == "sha256" and self._differs:
            return False
        return all(line.state != "rejected" for line in record)


def _listed(entries: Iterator[Entry], size: int, lister: Executor) -> Iterator[list[Entry]]:
    """Parts of `size` entries; the next is listed in the background."""

    def take() -> list[Entry]:
        return list(islice(entries, size))

    future = lister.submit(take)
    while part := future.result():
        future = lister.submit(take)
        yield part


def _changed(plan: EmbedPlan, how: str) -> InvalidSource:
    return InvalidSource(
        f"{plan.source} has changed since it was begun ({how}): add --sync to take that over,"
        " or choose another output"
    )


def _difference(lines: Iterable[Line], entries: Iterable[Entry]) -> str:
    for line, entry in zip(lines, entries, strict=False):
        if line.name != entry.name:
            return f"{entry.name!r} stands where {line.name!r} stood"
        if line.fingerprint != entry.fingerprint:
            return f"{entry.name!r} is another file"
    return "its last shard has another size"
