"""Ids met and rows of the last run, in a scratch database: memory does not grow with the source."""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from byol_serving.indexing.entries import Entry
from byol_serving.indexing.journal import Line


@dataclass(frozen=True, slots=True)
class Kept:
    """An unchanged entry's row in the last run's output."""

    id: str
    shard: int


class Ledger:
    """Answers two questions: is this id new, and did the last run have this entry?

    For one thread. The file is made anew by each run from the journal: losing it loses nothing.
    """

    def __init__(self, path: Path) -> None:
        """Begins an empty ledger at `path`."""
        self._path = path
        path.unlink(missing_ok=True)
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode = EXCLUSIVE;"
            "CREATE TABLE old (name BLOB PRIMARY KEY, fingerprint TEXT, id TEXT, shard INTEGER)"
            " WITHOUT ROWID; CREATE TABLE seen (id TEXT PRIMARY KEY) WITHOUT ROWID; BEGIN"
        )

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Removes the file."""
        self._database.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def remember(self, records: Iterable[tuple[int, list[Line]]]) -> None:
        """Takes in the last run's rows, for `kept` and `gone`."""
        for shard, lines in records:
            self._database.executemany(
                "INSERT OR REPLACE INTO old VALUES (?, ?, ?, ?)",
                (
                    (_key(line.name), line.fingerprint, line.text, shard)
                    for line in lines
                    if line.state == "ok"
                ),
            )

    def kept(self, entry: Entry) -> Kept | None:
        """The last run's row of an entry, if there was one and the entry did not change."""
        row = self._database.execute(
            "SELECT id, shard FROM old WHERE name = ? AND fingerprint = ?",
            (_key(entry.name), entry.fingerprint),
        ).fetchone()
        return None if row is None else Kept(*row)

    def add(self, id_: str) -> bool:
        """Notes an id of this run's output; False if it was there already."""
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (id_,)).rowcount > 0

    def forget(self, id_: str) -> None:
        """Takes an id back: its row did not come to be."""
        self._database.execute("DELETE FROM seen WHERE id = ?", (id_,))

    def add_all(self, lines: Iterable[Line]) -> None:
        """Notes the ids of a shard that is left as it is."""
        self._database.executemany(
            "INSERT OR IGNORE INTO seen VALUES (?)",
            ((line.text,) for line in lines if line.state == "ok"),
        )

    def gone(self) -> Iterator[str]:
        """Ids of the last run that this one's output has not."""
        rows = self._database.execute("SELECT id FROM old WHERE id NOT IN (SELECT id FROM seen)")
        return (row[0] for row in rows)


def _key(name: str) -> bytes:
    """File names need not be UTF-8 (the ids, checked before, are)."""
    return name.encode("utf-8", "surrogateescape")
