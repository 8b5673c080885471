"""Upserts of several threads in one transaction, so that they wait for one sync of the disk.

Who comes while a transaction is being committed waits in a queue. Then the first of them commits
all that wait. Nobody waits longer for company: a lone writer commits at once.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from byol_serving.collections.types import UpsertCounts, Vectors
from byol_serving.errors import StoreError

_MAX_ROWS = 8192
"""Rows of one transaction of several batches; a larger batch has one to itself."""


@dataclass(eq=False, kw_only=True)
class Batch:
    """One caller's checked items, and what became of them."""

    ids: Sequence[str]
    texts: Sequence[str]
    vectors: Vectors
    """float32 [N, D], unit."""
    counts: UpsertCounts | None = None
    """Set once it is on disk and in the index."""
    error: Exception | None = None


class Committing:
    """The queue. `commit` gets some batches, in the order they came, and sets their `counts`."""

    def __init__(self, commit: Callable[[Sequence[Batch]], None]) -> None:
        self._commit = commit
        self._changed = threading.Condition()
        self._waiting: list[Batch] = []
        self._committing = False

    def upsert(self, batch: Batch) -> UpsertCounts:
        """Returns once the batch is on disk.

        Raises what kept its transaction from that: then none of the batches in it are stored.
        """
        with self._changed:
            self._waiting.append(batch)
        while batch.counts is None and batch.error is None:
            with self._changed:
                if self._committing:
                    self._changed.wait()
                    continue
                if not self._waiting:  # another has committed this one in the meantime
                    continue
                some = self._first()
                self._committing = True
            self._try(some)
        if batch.error is not None:
            raise batch.error
        assert batch.counts is not None
        return batch.counts

    def _try(self, some: Sequence[Batch]) -> None:
        try:
            self._commit(some)
        except BaseException as error:
            interrupted = StoreError("the write was interrupted: send it again")
            for batch in some:
                if batch.counts is None:
                    batch.error = error if isinstance(error, Exception) else interrupted
            if not isinstance(error, Exception):  # meant for this thread alone
                raise
        finally:
            with self._changed:
                self._committing = False
                self._changed.notify_all()

    def _first(self) -> Sequence[Batch]:
        """Takes those that came first out of the queue, as many as go into one transaction."""
        rows = 0
        for count, batch in enumerate(self._waiting):
            rows += len(batch.ids)
            if count and rows > _MAX_ROWS:
                break
        else:
            count = len(self._waiting)
        some, self._waiting = self._waiting[:count], self._waiting[count:]
        return some
