"""Where images come from: each source lists entries cheaply, in an order that never varies.

Listing costs names, sizes and times only; bytes are had by `Entry.load`, in a decoding thread.
`open_source` finds out what a path or URL is.
"""

import glob
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Protocol

from byol_serving.collections.types import Metadata
from byol_serving.errors import InvalidImage, InvalidSource

IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"]
)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LIST_SUFFIXES = (".txt", ".lst")
SIDECAR_LIMIT = 2**20
"""Bytes of one JSON side-car; more is not metadata, and memory is bounded."""


@dataclass(frozen=True)
class Loaded:
    """An image file's bytes and what is known of it."""

    data: bytes
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class Entry:
    """One image, listed and not yet read."""

    name: str
    """Unique in the source; the row's id unless ids are content hashes."""
    source: str
    """Where it lies: a path or URL, for people."""
    fingerprint: str
    """Changes when the file or its side-car does: sizes and times, never contents."""
    load: Callable[[int], Loaded]
    """load(limit) reads at most limit + 1 bytes; raises OSError or InvalidImage. Thread-safe."""


class Source(Protocol):
    """A pile of images."""

    @property
    def location(self) -> str:
        """Kind and place, recorded in the manifest: a run resumes only on the same one."""
        ...

    def entries(self) -> Iterator[Entry]:
        """All entries, in an order that depends on their names only.

        Raises:
            InvalidSource: it cannot be listed.
        """
        ...

    def count(self) -> int | None:
        """How many entries, for the time left; None where counting costs as much as reading."""
        ...


def open_source(
    place: str | Path, *, image_column: str | None = None, id_column: str | None = None
) -> Source:
    """The source at `place`.

    Args:
        place: a folder of images; a folder of (or a glob for) tar shards or Parquet files; one tar
            or Parquet file; a text file of paths or URLs, one a line; or an fsspec URL of a folder,
            a tar, a Parquet file or an image.
        image_column: Parquet column of image bytes or paths; by default looked for by its name.
        id_column: Parquet column of unique names; by default `id` or `key`, else file and row.

    Raises:
        InvalidSource: nothing there, or nothing that can be read as a source.
    """
    from byol_serving.indexing import archives, remote, tables

    text = str(place)
    if "://" in text:
        return remote.open_url(text, image_column=image_column, id_column=id_column)
    files = [Path(each) for each in sorted(glob.glob(text))] if glob.has_magic(text) else []  # noqa: PTH207
    path = Path(text)
    if path.is_dir():
        files = _shards_in(path)
        if not files:
            return FolderSource(path)
    elif path.is_file():
        files = [path]
    if not files:
        raise InvalidSource(
            f"{text} does not exist; name a folder, a tar, a Parquet file, a list of paths or a URL"
        )
    names = [file.name.lower() for file in files]
    if all(name.endswith(TAR_SUFFIXES) for name in names):
        return archives.TarSource(text, [archives.local_archive(file) for file in files])
    if all(name.endswith(".parquet") for name in names):
        opened = [tables.local_table(file) for file in files]
        return tables.ParquetSource(text, opened, image_column=image_column, id_column=id_column)
    if len(files) == 1 and names[0].endswith(LIST_SUFFIXES):
        return ListSource(files[0])
    raise InvalidSource(
        f"{text} is of no known kind; wanted a folder, {', '.join(TAR_SUFFIXES)}, .parquet or .txt"
    )


class FolderSource:
    """Every image under a folder, to any depth; hidden files and linked folders do not count.

    Memory: the names of one folder and of those above it. Metadata: `label`, the first
    sub-folder, and the JSON object in NAME.jpg.json or NAME.json beside the file.
    """

    def __init__(self, root: Path) -> None:
        """Lists nothing yet."""
        self._root = root

    @property
    def location(self) -> str:
        """`folder:` and the absolute path."""
        return f"folder:{self._root.resolve()}"

    def entries(self) -> Iterator[Entry]:
        """In the order of their paths."""
        for parent, found, beside in _walk(self._root, ""):
            name = parent + found.name
            sidecar = _sidecar(found.name, beside)
            path = Path(found.path)
            side_path = None if sidecar is None else path.with_name(sidecar)
            seen = _stamp(path) + ("" if side_path is None else f"+{_stamp(side_path)}")
            yield Entry(name, str(path), seen, partial(_load_file, path, side_path, name))

    def count(self) -> int | None:
        """Walks the folder without looking at sizes."""
        return sum(1 for _ in _walk(self._root, ""))


class ListSource:
    """Paths or URLs in a text file, one a line; relative to the file; `#` begins a comment line.

    A line that names no readable file is rejected when it is read. Changes behind a URL are not
    noticed: asking for each would cost a request each.
    """

    def __init__(self, path: Path) -> None:
        """Reads nothing yet."""
        self._path = path

    @property
    def location(self) -> str:
        """`list:` and the absolute path."""
        return f"list:{self._path.resolve()}"

    def entries(self) -> Iterator[Entry]:
        """In the list's own order; a line that stands twice is an error of `pipeline.run`."""
        from byol_serving.indexing import remote

        for line in self._lines():
            if "://" in line:
                yield Entry(line, line, "url", partial(remote.load_url, line))
            else:
                path = self._path.parent / line
                yield Entry(line, str(path), _stamp(path), partial(_load_file, path, None, ""))

    def count(self) -> int | None:
        """Reads the list once."""
        return sum(1 for _ in self._lines())

    def _lines(self) -> Iterator[str]:
        try:
            with self._path.open(encoding="utf-8") as file:
                stripped = (line.strip() for line in file)
                yield from (line for line in stripped if line and not line.startswith("#"))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidSource(f"{self._path} cannot be read as a UTF-8 list ({error})") from error


def is_image(name: str) -> bool:
    """Whether a file name is that of an image, and not hidden."""
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def label_of(name: str) -> dict[str, str]:
    """{"label": first folder of `name`}, or nothing where it lies in none."""
    folder, slash, _ = name.partition("/")
    return {"label": folder} if slash else {}


def parse_sidecar(name: str, data: bytes) -> Metadata:
    """A side-car's JSON object; raises InvalidImage, so that the one file is rejected."""
    try:
        if len(data) > SIDECAR_LIMIT:
            raise ValueError(f"over {SIDECAR_LIMIT} bytes")
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError(f"a JSON {type(value).__name__}")
    except ValueError as error:
        raise InvalidImage(f"its side-car {name} is not a JSON object ({error})") from error
    return value


def _shards_in(folder: Path) -> list[Path]:
    """Tar or Parquet files that lie at a folder's top with no image beside them."""
    names = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    if any(is_image(name) for name in names):
        return []
    for suffixes in (TAR_SUFFIXES, (".parquet",)):
        if shards := [folder / name for name in names if name.lower().endswith(suffixes)]:
            return shards
    return []


def _walk(folder: Path, parent: str) -> Iterator[tuple[str, "os.DirEntry[str]", frozenset[str]]]:
    """(folder within the root, image file, JSON files beside it), in the order of full paths."""
    try:
        with os.scandir(folder) as scan:
            found = [each for each in scan if not each.name.startswith(".")]
    except OSError as error:
        raise InvalidSource(f"{folder} cannot be listed ({error.strerror})") from error
    beside = frozenset(each.name for each in found if each.name.lower().endswith(".json"))
    below = [(each, each.is_dir(follow_symlinks=False)) for each in found]
    # A folder sorts as NAME/, so that the whole order is that of the full paths.
    for each, is_folder in sorted(below, key=lambda pair: pair[0].name + "/" * pair[1]):
        if is_folder:
            yield from _walk(Path(each.path), f"{parent}{each.name}/")
        elif is_image(each.name):
            yield parent, each, beside


def _sidecar(name: str, beside: frozenset[str]) -> str | None:
    candidates = (f"{name}.json", f"{PurePosixPath(name).stem}.json")
    return next((each for each in candidates if each in beside), None)


def _stamp(path: Path) -> str:
    try:
        facts = path.stat()
    except OSError:
        return "missing"  # reading it says why, and rejects it
    return f"{facts.st_size}-{facts.st_mtime_ns}"


def _load_file(path: Path, sidecar: Path | None, name: str, limit: int) -> Loaded:
    metadata: dict[str, object] = dict(label_of(name))
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if sidecar is not None:
        with sidecar.open("rb") as file:
            metadata |= parse_sidecar(sidecar.name, file.read(SIDECAR_LIMIT + 1))
    # Values are JSON, which the two readers above made sure of and `object` does not say.
    return Loaded(data, metadata)  # type: ignore[arg-type]
