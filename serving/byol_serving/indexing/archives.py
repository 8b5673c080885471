"""Images in tar archives: one, or WebDataset shards.

A plain local tar is read in place, at each member's offset and by any thread at once. A compressed
or remote one is first unpacked to an unnamed temporary file, because neither can be read from the
middle: its disk space is that of one archive at a time.
"""

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

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
from byol_serving.indexing.remote import fingerprint

COPY_BYTES = 2**20
_UNPACK: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".tgz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}


class OpenArchive:
    """A tar's bytes, read at offsets; closed when the last entry that needs it is gone."""

    def __init__(self, file: IO[bytes], reopen: "Callable[[], OpenArchive]") -> None:
        """Takes over a real file's descriptor; `file` itself may be closed.

        `reopen` opens the same archive again, in another process.
        """
        self.descriptor = os.dup(file.fileno())
        self._reopen = reopen
        weakref.finalize(self, os.close, self.descriptor)

    def __reduce__(self) -> "tuple[Callable[[], OpenArchive], tuple[()]]":
        """Entries travel to other processes: what arrives there opens the archive anew."""
        return self._reopen, ()

    def read(self, offset: int, size: int) -> bytes:
        """Reads without a seek, so that threads do not disturb each other."""
        return os.pread(self.descriptor, size, offset)


@dataclass(frozen=True)
class Archive:
    """One tar of a source."""

    path: str
    fingerprint: str
    """Of the archive: members carry no times that can be trusted (WebDataset writes any)."""
    open: Callable[[], OpenArchive]
    cheap: bool
    """Listing needs no unpacking."""


def local_archive(path: Path) -> Archive:
    """A tar on disk, compressed or not."""
    facts = path.stat()
    opener, cheap = partial(_open_local, path), path.suffix.lower() == ".tar"
    return Archive(str(path), f"{facts.st_size}-{facts.st_mtime_ns}", opener, cheap)


def remote_archive(files: Any, path: str, url: str) -> Archive:
    """A tar behind a URL: `path` of an fsspec file system; raises InvalidSource."""
    opener = partial(_open_remote, files, path)
    return Archive(url, fingerprint(files, path, url), opener, cheap=False)


class TarSource:
    """Images in one tar or several, in the archives' order and the members' own.

    Names: the member's, after the archive's file name where there are several. Metadata: `label`,
    the member's first folder, and the JSON object in KEY.json, which stands next to KEY.jpg as
    WebDataset has it (a key is the name up to its first dot).
    """

    def __init__(self, place: str, archives: list[Archive]) -> None:
        """Opens nothing yet."""
        self._place = place
        self._archives = archives

    @property
    def location(self) -> str:
        """`tar:` and the place as an absolute path, or the URL."""
        remote = "://" in self._place
        return f"tar:{self._place if remote else Path(self._place).absolute()}"

    def entries(self) -> Iterator[Entry]:
        """Reads headers only; raises InvalidSource where an archive is damaged."""
        several = len(self._archives) > 1
        for archive in self._archives:
            prefix = f"{PurePosixPath(archive.path).name}/" if several else ""
            try:
                yield from _entries(archive, prefix)
            except (tarfile.TarError, EOFError, OSError, lzma.LZMAError) as error:
                raise InvalidSource(
                    f"{archive.path} cannot be read as a tar ({error}); it may be truncated:"
                    " copy it again"
                ) from error

    def count(self) -> int | None:
        """Counts headers; None for archives that would have to be unpacked."""
        if not all(archive.cheap for archive in self._archives):
            return None
        return sum(1 for _ in self.entries())


def _entries(archive: Archive, prefix: str) -> Iterator[Entry]:
    opened = archive.open()
    with os.fdopen(os.dup(opened.descriptor), "rb") as file:
        for group in _groups(file):
            texts = [each for each in group if each.name.lower().endswith(".json")]
            for member in group:
                name = member.name.removeprefix("./")
                if is_image(name):
                    yield Entry(
                        prefix + name,
                        f"{archive.path}::{name}",
                        f"{member.size}-{member.mtime:.0f}-{archive.fingerprint}",
                        partial(_load_member, opened, member, texts[0] if texts else None, name),
                    )


def _groups(file: IO[bytes]) -> Iterator[list[tarfile.TarInfo]]:
    """Neighbouring members of one key."""
    group: list[tarfile.TarInfo] = []
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every member: at 10 million images, 10 GB
            if member.isfile():
                if group and _key(group[0].name) != _key(member.name):
                    yield group
                    group = []
                group.append(member)
    if group:
        yield group


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _load_member(
    archive: OpenArchive,
    member: tarfile.TarInfo,
    sidecar: tarfile.TarInfo | None,
    name: str,
    limit: int,
) -> Loaded:
    metadata: Metadata = label_of(name)
    data = archive.read(member.offset_data, min(member.size, limit + 1))
    if sidecar is not None:
        text = archive.read(sidecar.offset_data, min(sidecar.size, SIDECAR_LIMIT + 1))
        metadata = {**metadata, **parse_sidecar(sidecar.name, text)}
    return Loaded(data, metadata)


def _open_local(path: Path) -> OpenArchive:
    reopen = partial(_open_local, path)
    with path.open("rb") as file:
        if path.suffix.lower() == ".tar":
            return OpenArchive(file, reopen)
        return _spool(file, path.name, reopen)


def _open_remote(files: Any, path: str) -> OpenArchive:
    with files.open(path, "rb") as file:
        return _spool(file, path, partial(_open_remote, files, path))


def _spool(file: IO[bytes], name: str, reopen: Callable[[], OpenArchive]) -> OpenArchive:
    """Copies a tar, unpacking it if its name says so, to a temporary file without a name."""
    unpack = _UNPACK.get(PurePosixPath(name).suffix.lower())
    with tempfile.TemporaryFile() as copy:
        if unpack is None:
            shutil.copyfileobj(file, copy, COPY_BYTES)
        else:
            with unpack(file) as unpacked:
                shutil.copyfileobj(unpacked, copy, COPY_BYTES)
        copy.flush()
        return OpenArchive(copy, reopen)
