"""A store: a folder of collections, owned by one process at a time."""

import fcntl
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from byol_serving.collections import checks, database
from byol_serving.collections.collection import LocalCollection
from byol_serving.collections.database import Database, explained
from byol_serving.collections.disk import publish, sync
from byol_serving.collections.index import IndexOptions
from byol_serving.collections.types import CollectionInfo, IdType, IndexKind
from byol_serving.errors import (
    AlreadyExists,
    ByolError,
    InvalidRequest,
    NotFound,
    StoreCorrupt,
    StoreError,
    StoreLocked,
    Unavailable,
    UnknownCollection,
)

_log = logging.getLogger(__name__)

# Neither can be a collection's name, which begins with a letter or digit.
_LOCK = ".lock"
_NEW = ".new-"
_TRASH = ".trash-"


class Store:
    """Collections in a folder. Thread-safe; use it as a context manager."""

    def __init__(
        self,
        path: Path | str,
        *,
        read_only: bool = False,
        options: IndexOptions | None = None,
    ) -> None:
        """Takes the folder, made if need be, and opens its collections.

        A collection that cannot be opened does not keep the others from serving: see `failed`.

        Raises:
            StoreLocked: another process owns it (many may read, if none writes).
            StoreError: the folder cannot be used.
        """
        self.path = Path(path)
        self.read_only = read_only
        self._options = options or IndexOptions()
        self._changing = threading.Lock()
        self._collections: dict[str, LocalCollection] = {}
        self._failed: dict[str, ByolError] = {}
        self._closed = False
        with explained(self.path):
            if not read_only:
                self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path, shared=read_only)
        try:
            with explained(self.path):
                if not read_only:
                    _sweep(self.path)
                self._open_all()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def failed(self) -> Mapping[str, ByolError]:
        """Collections that could not be opened, and why; `get` raises the same."""
        return dict(self._failed)

    def create(
        self,
        name: str,
        *,
        dim: int,
        encoder_id: str,
        index: IndexKind = "flat",
        id_type: IdType = "string",
    ) -> LocalCollection:
        """Makes an empty collection; it is on disk when this returns.

        Raises:
            InvalidRequest: the name, dimension, index kind or id type is not allowed.
            AlreadyExists: there is one of that name.
            StoreError: the disk refused.
        """
        checks.collection_name(name)
        meta: dict[str, str | int] = {
            "uuid": uuid.uuid4().hex,
            "dim": checks.dimension(dim),
            "encoder_id": encoder_id,
            "index": checks.index_kind(index),
            "id_type": checks.id_type(id_type),
        }
        return self._add(name, lambda file: Database.create(file, meta))

    def restore(self, source: Path, name: str) -> LocalCollection:
        """Brings back a collection from its folder in a backup. See `types.Store`."""
        checks.collection_name(name)
        if not (source / database.FILE).is_file():
            raise NotFound(f"there is no backup of a collection at {source}: check its name")

        def write(file: Path) -> None:
            shutil.copyfile(source / database.FILE, file)
            copy = LocalCollection(file.parent, name, read_only=True, options=self._options)
            try:
                verification = copy.verify()
            finally:
                copy.close(Unavailable("it was only verified"), keep=False)
            if not verification.ok:
                raise StoreCorrupt(
                    f"backup {source} is damaged ({verification.problems[0]}): use another one"
                )

        return self._add(name, write)

    def get(self, name: str) -> LocalCollection:
        """The collection. Raises UnknownCollection, or what kept it from being opened."""
        self._check_open()
        found = self._collections.get(name)
        if found is not None:
            return found
        if name in self._failed:
            error = self._failed[name]
            raise type(error)(str(error))
        raise UnknownCollection(f"there is no collection {name[:80]!r}: list them, or create it")

    def list(self) -> list[CollectionInfo]:
        """The facts of all open collections, by name."""
        self._check_open()
        infos = []
        for _, collection in sorted(self._collections.copy().items()):
            try:
                infos.append(collection.info)
            except UnknownCollection:  # dropped just now
                continue
        return infos

    def drop(self, name: str) -> None:
        """Deletes a collection, also one that could not be opened. Raises UnknownCollection."""
        with self._changing:
            self._check_open(to_write=True)
            if name not in self._failed:
                self.get(name).close(
                    UnknownCollection(f"collection {name!r} was dropped: create it anew"),
                    keep=False,
                )
            self._collections.pop(name, None)
            self._failed.pop(name, None)
            trash = self.path / f"{_TRASH}{uuid.uuid4().hex}"
            with explained(self.path / name):
                (self.path / name).rename(trash)
                sync(self.path)
            shutil.rmtree(trash, ignore_errors=True)  # what stays is swept at the next start

    def backup(self, destination: Path | str) -> None:
        """Writes a new store with copies of all collections, each as of one moment, while serving.

        Raises:
            InvalidRequest: the destination exists.
            StoreError: it cannot be written.
        """
        self._check_open()
        final = Path(destination)
        with explained(final):
            if final.exists():
                raise InvalidRequest(f"backup destination {final} exists: name a new folder")
            temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
            temporary.mkdir(parents=True)
            try:
                for name, collection in self._collections.copy().items():
                    (temporary / name).mkdir()
                    collection.backup(temporary / name / database.FILE)
                publish(temporary, final)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise

    def close(self) -> None:
        """Writes index snapshots, closes all collections and gives the folder up."""
        with self._changing:
            if self._closed:
                return
            self._closed = True
            for collection in self._collections.values():
                collection.close(Unavailable("the store is closed: the server is shutting down"))
            os.close(self._lock)

    def _add(self, name: str, write: Callable[[Path], None]) -> LocalCollection:
        """A collection whose database file `write` makes; whole and on disk, or not there."""
        with self._changing:
            self._check_open(to_write=True)
            final = self.path / name
            with explained(final):
                if final.exists():
                    raise AlreadyExists(
                        f"collection {name!r} exists: drop it or choose another name"
                    )
                temporary = self.path / f"{_NEW}{uuid.uuid4().hex}"
                temporary.mkdir()
                try:
                    write(temporary / database.FILE)
                    sync(temporary / database.FILE)
                    publish(temporary, final)
                except BaseException:
                    shutil.rmtree(temporary, ignore_errors=True)
                    raise
            self._collections[name] = self._open(name)
            return self._collections[name]

    def _check_open(self, *, to_write: bool = False) -> None:
        if self._closed:
            raise Unavailable("the store is closed: the server is shutting down")
        if to_write and self.read_only:
            raise StoreError(f"{self.path} was opened read-only: open it for writing")

    def _open(self, name: str) -> LocalCollection:
        return LocalCollection(
            self.path / name, name, read_only=self.read_only, options=self._options
        )

    def _open_all(self) -> None:
        for folder in sorted(self.path.iterdir()):
            if not folder.is_dir() or folder.name.startswith("."):
                continue
            try:
                self._collections[folder.name] = self._open(folder.name)
            except ByolError as error:
                _log.error("collection %r is not served: %s", folder.name, error)
                self._failed[folder.name] = error


def _locked(path: Path, *, shared: bool) -> int:
    """A descriptor that holds the store's lock; the kernel gives it up with the process."""
    file = path / _LOCK
    if shared:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    else:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise StoreLocked(
            f"store {path} is in use by process {owner}: stop that process or use another folder"
        ) from None
    if not shared:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _sweep(path: Path) -> None:
    """Removes what a creation or a drop that was cut short left behind."""
    for leftover in path.iterdir():
        if leftover.name.startswith((_NEW, _TRASH)):
            shutil.rmtree(leftover)
