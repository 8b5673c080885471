"""The thread that keeps an index in shape and its snapshots recent."""

import logging
import threading
from collections.abc import Callable

from byol_serving.collections.index import Index

_log = logging.getLogger(__name__)


class Upkeep:
    """Runs `Index.maintain` after changes and writes a snapshot after many."""

    def __init__(self, index: Index, write_snapshot: Callable[[], int], covered: int) -> None:
        """`covered` is the change that the snapshot on disk includes, -1 for none."""
        self._index = index
        self._write_snapshot = write_snapshot
        self._covered = covered
        self._changes = 0
        self._snapshotting = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="index-upkeep", daemon=True)

    def start(self) -> None:
        """Begins; what is due is done at once."""
        self._wake.set()
        self._thread.start()

    def changed(self, count: int) -> None:
        """Says that so many items were changed."""
        self._changes += count  # a lost update between threads only delays a snapshot
        self._wake.set()

    def snapshot(self) -> None:
        """Writes a snapshot now. Raises OSError, RuntimeError (FAISS) where that fails."""
        with self._snapshotting:
            self._changes = 0
            self._covered = self._write_snapshot()

    def stop(self, *, snapshot: bool) -> None:
        """Ends the thread; a last snapshot is written if anything changed since the one before."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        if snapshot and self._index.view.seq != self._covered and self._index.view.size:
            self._try_snapshot()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait()
            self._wake.clear()
            try:
                while not self._stopping.is_set() and self._index.maintain(self._stopping.is_set):
                    pass
            except Exception:
                # Searches stay right without upkeep, only slower: the unindexed is scanned.
                _log.exception("index upkeep failed; it is tried again after the next change")
            if self._changes >= self._index.options.snapshot_every and not self._stopping.is_set():
                self._try_snapshot()

    def _try_snapshot(self) -> None:
        try:
            self.snapshot()
        except (OSError, RuntimeError) as error:
            # Only the next start is slower: the store has everything.
            _log.warning("no index snapshot was written: %s", error)
