"""The SQLite file of one collection: the only truth about what is stored.

`items` holds ids and metadata, `vectors` the vectors, both by row number. They are apart so that a
filter reads no vectors and a metadata update rewrites none. A row number is never reused and its
vector never changes: replacing an id gives it a new row. So an index that holds the rows up to R is
caught up by dropping the rows that are gone and adding those above R; no change log is needed.

The statements on them are in `rows`.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from byol_serving.errors import ByolError, StoreCorrupt, StoreError

FILE = "data.sqlite3"
# 512-d vectors, a thousand a transaction: 26,154 rows/s with 16 KiB pages, 18,469 with 4 KiB,
# and a file of 226 MB against 394 MB.
PAGE_SIZE = 16_384

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
    CREATE TABLE items (
        row INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        seq INTEGER NOT NULL,
        crc INTEGER NOT NULL,
        metadata TEXT NOT NULL
    );
    CREATE TABLE vectors (row INTEGER PRIMARY KEY, crc INTEGER NOT NULL, vector BLOB NOT NULL);
    """,
    # What changed since a moment, without reading every item: a filter's answer is kept up to date.
    "CREATE INDEX items_seq ON items (seq)",
    # Before, all ids were strings. A program that does not know the other type must not write.
    "INSERT INTO meta VALUES ('id_type', 'string')",
)
"""Step i brings a file from schema version i (`user_version`) to i + 1, in one transaction."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns SQLite's and the system's errors into StoreError or StoreCorrupt, naming the remedy."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None) or 0
        match code & 0xFF:
            case sqlite3.SQLITE_FULL:
                raise StoreError(f"the disk of {path} is full: free space and retry") from error
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
                raise StoreError(f"{path} is read-only: grant write access") from error
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                raise StoreCorrupt(
                    f"{path} is damaged ({error}): restore it from a backup"
                ) from error
            case _ if "Could not decode to UTF-8" in str(error):  # Python's own, without a code
                raise StoreCorrupt(
                    f"{path} is damaged ({error}): restore it from a backup"
                ) from error
            case _:
                raise StoreError(f"{path}: {error}: check the disk and retry") from error
    except UnicodeDecodeError as error:
        raise StoreCorrupt(f"{path} is damaged ({error}): restore it from a backup") from error
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}: check the disk and retry") from error


class Database:
    """One writer connection and a pool of readers. Thread-safe; `writing` serialises itself."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Opens the file and brings its schema up to date.

        Raises:
            StoreError: it cannot be opened, or was written by a newer version.
            StoreCorrupt: it is not a database, or damaged.
        """
        self.path = path
        self.read_only = read_only
        self._lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        with explained(path):
            if not path.is_file():
                raise StoreCorrupt(f"{path} is missing: restore it from a backup")
            self._writer = self._connect()
            self._migrate()

    @staticmethod
    def create(path: Path, meta: dict[str, str | int]) -> None:
        """Writes a new file that holds `meta`, complete on disk when this returns."""
        with explained(path):
            connection = sqlite3.connect(path, isolation_level=None)
            try:
                connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
                _set_up(connection)
                for step in range(len(MIGRATIONS)):
                    _step(connection, step)
                connection.execute("BEGIN")
                rows = [*meta.items(), ("seq", 0)]
                connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)
                connection.execute("COMMIT")
            finally:
                connection.close()

    def close(self) -> None:
        """Closes idle connections now and borrowed ones when they come back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for each in idle:
            each.close()
        self._writer.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: committed, on disk, when the block ends; undone if anything is raised."""
        if self.read_only:
            raise StoreError(f"{self.path} was opened read-only: open it for writing")
        with explained(self.path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A read transaction: all it reads is of one moment, however long it takes."""
        with self._lock:
            if self._closed:
                raise StoreError(f"{self.path} is closed: open the store again")
            connection = self._idle.pop() if self._idle else None
        with explained(self.path):
            connection = connection or self._connect()
            try:
                connection.execute("BEGIN")
                yield connection
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                self._give_back(connection)

    def _give_back(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def backup(self, destination: Path) -> None:
        """Copies the database as of one moment, while it is written to."""
        with self.reading() as source, explained(destination):
            target = sqlite3.connect(destination)
            try:
                source.backup(target)
                target.execute("PRAGMA journal_mode = DELETE").fetchall()
            finally:
                target.close()

    def _connect(self) -> sqlite3.Connection:
        mode = "rw"
        if self.read_only:
            log = self.path.with_name(self.path.name + "-wal")
            # Without a log the file is all there is; immutable then reads it where even the
            # shared-memory file cannot be made. The store's shared lock keeps writers away.
            mode = "ro" if log.exists() and log.stat().st_size else "ro&immutable=1"
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=30,
        )
        try:
            if not self.read_only:
                _set_up(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _migrate(self) -> None:
        try:
            (version,) = self._writer.execute("PRAGMA user_version").fetchone()
            if version > len(MIGRATIONS):
                raise StoreError(
                    f"{self.path} has schema version {version}, this program knows "
                    f"{len(MIGRATIONS)}: upgrade it"
                )
            if version <= 0:  # SQLite's is signed
                raise StoreCorrupt(f"{self.path} is not a collection: restore it from a backup")
            if version < len(MIGRATIONS) and self.read_only:
                raise StoreError(f"{self.path} needs an upgrade: open it for writing once")
            for step in range(version, len(MIGRATIONS)):
                _step(self._writer, step)
        except (sqlite3.Error, ByolError):
            self._writer.close()
            raise


def _set_up(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL").fetchall()
    # FULL: each commit is synced before it returns. That is what "acknowledged" promises.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA cache_size = -16384")


def _step(connection: sqlite3.Connection, step: int) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in MIGRATIONS[step].split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {step + 1}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
