"""Images behind a URL, through fsspec: s3://, gs://, http(s)://, memory:// and others."""

import importlib
from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from byol_serving.collections.types import Metadata
from byol_serving.errors import InvalidSource
from byol_serving.indexing.entries import (
    SIDECAR_LIMIT,
    Entry,
    Loaded,
    is_image,
    label_of,
    parse_sidecar,
)


def connect(url: str) -> tuple[Any, str]:
    """Fsspec's file system and path of a URL; raises InvalidSource, naming what to install."""
    try:
        fsspec = importlib.import_module("fsspec")
    except ModuleNotFoundError as error:
        raise InvalidSource(f"{url} needs fsspec; run: pip install fsspec") from error
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise InvalidSource(f"{url}: a package is missing ({_line(error)})") from error
    except Exception as error:  # each file system raises errors of its own
        raise InvalidSource(f"{url} cannot be opened ({_line(error)})") from error
    return files, path


def load_url(url: str, limit: int) -> Loaded:
    """Fetches one file, at most limit + 1 bytes.

    Raises:
        OSError: it cannot be had; every error of the file system becomes this one.
    """
    files, path = connect(url)
    return Loaded(_read(files, path, limit), {})


def fingerprint(files: Any, path: str, url: str) -> str:
    """Changes when the file does, as far as the file system tells; raises InvalidSource."""
    return _stamp(_info(files, path, url))


class UrlFolder:
    """Every image under a URL, or the one image it is; side-cars and labels as in a folder."""

    def __init__(self, url: str, files: Any, path: str) -> None:
        """Asks nothing yet."""
        self._url = url
        self._files = files
        self._path = path

    @property
    def location(self) -> str:
        """`url:` and the URL."""
        return f"url:{self._url}"

    def entries(self) -> Iterator[Entry]:
        """In the order of full paths, folder by folder; raises InvalidSource."""
        if is_image(self._path):
            info = _info(self._files, self._path, self._url)
            yield self._entry(PurePosixPath(self._path).name, info, {})
            return
        yield from self._walk(self._path.rstrip("/"), "")

    def count(self) -> int | None:
        """None: it would cost the listing's requests twice."""
        return None

    def _walk(self, folder: str, parent: str) -> Iterator[Entry]:
        try:
            found = self._files.ls(folder, detail=True)
        except Exception as error:  # each file system raises errors of its own
            raise InvalidSource(f"{self._url}: cannot list {folder} ({_line(error)})") from error
        named = {PurePosixPath(each["name"]).name: each for each in found}
        for name, each in sorted(named.items(), key=lambda pair: pair[0] + _slash(pair[1])):
            if name.startswith(".") or each["name"].rstrip("/") == folder:
                continue
            if _slash(each):
                yield from self._walk(each["name"].rstrip("/"), f"{parent}{name}/")
            elif is_image(name):
                yield self._entry(parent + name, each, named)

    def _entry(self, name: str, info: dict[str, Any], beside: dict[str, Any]) -> Entry:
        base = PurePosixPath(name)
        sidecar = beside.get(f"{base.name}.json") or beside.get(f"{base.stem}.json")
        seen = _stamp(info) + (f"+{_stamp(sidecar)}" if sidecar else "")
        load = partial(_load, self._files, info["name"], sidecar and sidecar["name"], name)
        return Entry(name, self._files.unstrip_protocol(info["name"]), seen, load)


def _load(files: Any, path: str, sidecar: str | None, name: str, limit: int) -> Loaded:
    metadata: Metadata = label_of(name)
    data = _read(files, path, limit)
    if sidecar:
        text = _read(files, sidecar, SIDECAR_LIMIT)
        metadata = {**metadata, **parse_sidecar(sidecar, text)}
    return Loaded(data, metadata)


def _read(files: Any, path: str, limit: int) -> bytes:
    try:
        with files.open(path, "rb") as file:
            return bytes(file.read(limit + 1))
    except OSError:
        raise
    except Exception as error:  # each file system raises errors of its own
        raise OSError(f"cannot be fetched ({_line(error)})") from error


def _info(files: Any, path: str, url: str) -> dict[str, Any]:
    try:
        info: dict[str, Any] = files.info(path)
    except Exception as error:  # each file system raises errors of its own
        raise InvalidSource(f"{url} cannot be read ({_line(error)})") from error
    return info


def _stamp(info: dict[str, Any]) -> str:
    """Size and whichever mark of change the file system gives."""
    marks = (info.get(key) for key in ("ETag", "etag", "LastModified", "mtime", "created"))
    return f"{info.get('size')}-{next((str(mark) for mark in marks if mark is not None), '')}"


def _slash(info: dict[str, Any]) -> str:
    return "/" if info["type"] == "directory" else ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
