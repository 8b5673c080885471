"""Images in Parquet files: a column of bytes (plain, or Hugging Face's {bytes, path}), or of paths.

The other columns become metadata. pyarrow is imported when a source is opened.
"""

import datetime
import decimal
import importlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from byol_serving.collections.types import Json
from byol_serving.errors import InvalidImage, InvalidSource
from byol_serving.indexing.entries import Entry, Loaded
from byol_serving.indexing.remote import fingerprint, load_url

IMAGE_COLUMNS = ("image", "image_bytes", "bytes", "content", "jpg", "png", "path", "file", "url")
ID_COLUMNS = ("id", "key", "__key__")
OPEN_ROW_GROUPS = 2
"""Row groups held in memory: entries are read in order, so two bridge the border between them."""


@dataclass(frozen=True)
class Table:
    """One Parquet file of a source."""

    path: str
    fingerprint: str
    """Of the file: rows have none of their own."""
    open: Callable[[], Any]
    """Gives a pyarrow.parquet.ParquetFile."""


def local_table(path: Path) -> Table:
    """A Parquet file on disk."""
    facts = path.stat()
    opener = partial(import_pyarrow("pyarrow.parquet").ParquetFile, str(path))
    return Table(str(path), f"{facts.st_size}-{facts.st_mtime_ns}", opener)


def remote_table(files: Any, path: str, url: str) -> Table:
    """A Parquet file behind a URL: `path` of an fsspec file system; raises InvalidSource."""
    return Table(url, fingerprint(files, path, url), partial(_open_remote, files, path))


def import_pyarrow(module: str) -> Any:
    """Pyarrow or a module of it; raises InvalidSource, naming what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InvalidSource(
            "Parquet needs pyarrow, which is not installed; run: pip install 'byol-server[parquet]'"
        ) from error


class ParquetSource:
    """Rows of Parquet files, in the files' order and the rows' own.

    Memory: two row groups. Names: the id column's, else FILE#ROW.
    """

    def __init__(
        self,
        place: str,
        tables: list[Table],
        *,
        image_column: str | None = None,
        id_column: str | None = None,
    ) -> None:
        """Opens nothing yet; see `open_source` for the columns."""
        self._place = place
        self._tables = tables
        self._image_column = image_column
        self._id_column = id_column

    @property
    def location(self) -> str:
        """`parquet:` and the place as an absolute path, or the URL."""
        remote = "://" in self._place
        return f"parquet:{self._place if remote else Path(self._place).absolute()}"

    def entries(self) -> Iterator[Entry]:
        """Reads the id column only; raises InvalidSource where a file or a column is unfit."""
        for table in self._tables:
            try:
                rows = _RowGroups(table, self._image_column, self._id_column)
                yield from _entries(table, rows)
            except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
                raise InvalidSource(f"{table.path} cannot be read as Parquet ({error})") from error

    def count(self) -> int | None:
        """From the files' footers."""
        return sum(int(table.open().metadata.num_rows) for table in self._tables)


class _RowGroups:
    """A Parquet file's rows by row group and position, the last groups kept. Thread-safe."""

    def __init__(self, table: Table, image: str | None, name: str | None) -> None:
        self._given = (table, image, name)
        self.file = table.open()
        columns = self.file.schema_arrow.names
        found = _choose(table.path, columns, image, IMAGE_COLUMNS)
        if found is None:
            raise InvalidSource(
                f"{table.path} has no image column (its columns are {', '.join(columns)});"
                " name it with image_column"
            )
        self.image = found
        self.id = _choose(table.path, columns, name, ID_COLUMNS)
        self._open: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Entries travel to other processes: what arrives there opens the file anew."""
        return _RowGroups, self._given

    def row(self, group: int, position: int) -> dict[str, Any]:
        """One row; the lock is held while a group is read, since every waiter needs it.

        Raises:
            OSError: the group is damaged.
        """
        with self._lock:
            if group not in self._open:
                try:
                    self._open[group] = self.file.read_row_group(group).to_pylist()
                except ValueError as error:  # pyarrow's own errors are ValueErrors
                    raise OSError(f"row group {group} is damaged: {error}") from error
                while len(self._open) > OPEN_ROW_GROUPS:
                    self._open.popitem(last=False)
            return self._open[group][position]


def _entries(table: Table, rows: _RowGroups) -> Iterator[Entry]:
    file_name, row = PurePosixPath(table.path).name, 0
    for group in range(rows.file.metadata.num_row_groups):
        names: list[object] = [None] * rows.file.metadata.row_group(group).num_rows
        if rows.id is not None:
            names = rows.file.read_row_group(group, columns=[rows.id]).column(0).to_pylist()
        for position, name in enumerate(names):
            place = f"{file_name}#{row}"
            yield Entry(
                place if name is None else str(name),
                f"{table.path}#{row}",
                table.fingerprint,
                partial(_load_row, rows, group, position, PurePosixPath(table.path).parent),
            )
            row += 1


def _load_row(
    rows: _RowGroups, group: int, position: int, folder: PurePosixPath, limit: int
) -> Loaded:
    row = dict(rows.row(group, position))
    image = row.pop(rows.image)
    if rows.id is not None:
        del row[rows.id]
    if isinstance(image, dict):
        row |= {"path": image["path"]} if image.get("path") else {}
        image = image.get("bytes") or image.get("path")
    match image:
        case bytes():
            data = image[: limit + 1]
        case str() if "://" in image:
            data = load_url(image, limit).data
            row["path"] = image
        case str():
            with Path(folder / image).open("rb") as file:
                data = file.read(limit + 1)
            row["path"] = image
        case _:
            raise InvalidImage(f"column {rows.image} holds a {type(image).__name__}, no image")
    return Loaded(data, {key: _json(value) for key, value in row.items() if value is not None})


def _choose(
    path: str, columns: list[str], wanted: str | None, usual: tuple[str, ...]
) -> str | None:
    if wanted is None:
        return next((each for each in usual if each in columns), None)
    if wanted not in columns:
        raise InvalidSource(f"{path} has no column {wanted}; it has {', '.join(columns)}")
    return wanted


def _json(value: object) -> Json:
    """A Parquet value as JSON has it; what JSON lacks becomes text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): _json(each) for key, each in value.items()}
        case list() | tuple():
            return [_json(each) for each in value]
        case decimal.Decimal():
            return float(value)
        case datetime.date() | datetime.time():
            return value.isoformat()
        case bytes():
            return f"{len(value)} bytes"
        case _:
            return str(value)


def _open_remote(files: Any, path: str) -> Any:
    return import_pyarrow("pyarrow.parquet").ParquetFile(files.open(path, "rb"))
