"""Images as files on disk: a folder, or a list of paths and URLs."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from byol_serving.errors import InvalidSource
from byol_serving.indexing.entries import (
    SIDECAR_LIMIT,
    Entry,
    Loaded,
    is_image,
    label_of,
    parse_sidecar,
)
from byol_serving.indexing.remote import load_url


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
        for line in self._lines():
            if "://" in line:
                yield Entry(line, line, "url", partial(load_url, line))
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
