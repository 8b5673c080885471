"""Where images come from: a folder, tar archives, Parquet files, or a list of files.

Each gives the names of its candidates first, without reading one, and then their bytes, in the
order that the source is read fastest in. What is broken in a source is listed, not fatal.
"""

import functools
import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from byol_serving.errors import InvalidSource
from byol_training.tables import list_table, read_table

SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"]
)
Kind = Literal["folder", "tar", "parquet", "list"]
Read = Callable[[], bytes]


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A file that was to be an image and could not be read."""

    path: str
    """Relative to the source."""
    reason: str
    """One line."""


@dataclass(kw_only=True)
class Listing:
    """What a source holds, seen from outside."""

    kind: Kind
    files: list[Path]
    """The archives or tables, in order; a folder or list is the only one."""
    names: list[str] = field(default_factory=list)
    """Of the candidates, in the order they are read in, unique; with / between parts."""
    broken: list[Rejected] = field(default_factory=list)
    """Archives that end early."""


def list_source(source: Path) -> Listing:
    """Names of the candidates; nothing is decoded.

    Args:
        source: a folder, searched to any depth (files whose suffix is that of an image count,
            hidden ones do not); a folder of .tar or .parquet files; one of them; several, as
            `name-{0000..0123}.tar`; or a .txt file with a path in each line, relative to it.

    Raises:
        InvalidSource: nothing there, or unreadable.
    """
    kind, files = _recognise(source)
    listing = Listing(kind=kind, files=files)
    match kind:
        case "folder":
            listing.names = _scan(source)
        case "list":
            listing.names = _listed(source)
        case "tar" | "parquet":
            members = _tar_members if kind == "tar" else _table_rows
            taken: set[str] = set()
            for file in files:
                listing.names += _unique(members(file, listing.broken), file, taken)
    return listing


def stamp(listing: Listing) -> str:
    """Hex digest over names, sizes and times of change: another as soon as something changed.

    Apart from listing: of a million files it takes several times as long, and few need it.
    """
    digest = hashlib.sha256(listing.kind.encode())
    for name, path in _stamped(listing):
        try:
            about = os.stat(path)  # noqa: PTH116 - no Path: called a million times
            facts = f"{about.st_size}\0{about.st_mtime_ns}"
        except OSError:  # one that is missing is rejected when it is read
            facts = ""
        digest.update(f"{name}\0{facts}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _stamped(listing: Listing) -> Iterator[tuple[str, str]]:
    """Names and paths of the files that lie on disk."""
    match listing.kind:
        case "folder" | "list":
            first = listing.files[0]
            root = first if listing.kind == "folder" else first.parent
            return ((name, os.path.join(root, name)) for name in listing.names)  # noqa: PTH118 - likewise
        case "tar" | "parquet":
            return ((file.name, str(file)) for file in listing.files)


def read_source(listing: Listing) -> Iterator[tuple[int, Read]]:
    """(position in `names`, its bytes when called), for all; may be called in any thread."""
    match listing.kind:
        case "folder" | "list":
            root = listing.files[0] if listing.kind == "folder" else listing.files[0].parent
            for position, name in enumerate(listing.names):
                yield position, (root / name).read_bytes
        case "tar" | "parquet":
            # Read here, in order: an archive has one position for all threads.
            read = _read_tar if listing.kind == "tar" else read_table
            everything = (data for file in listing.files for data in read(file))
            for position, data in zip(range(len(listing.names)), everything, strict=False):
                yield position, functools.partial(bytes, data)


def _recognise(source: Path) -> tuple[Kind, list[Path]]:
    """The kind of source, and its files."""
    if found := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", source.name):
        head, first, last, rest = found.groups()
        names = [f"{head}{i:0{len(first)}d}{rest}" for i in range(int(first), int(last) + 1)]
        files = [source.parent / name for name in names]
        if missing := [file.name for file in files if not file.exists()]:
            raise InvalidSource(
                f"{len(missing)} of the {len(files)} shards of {source} do not exist, the first:"
                f" {missing[0]}; give those that do"
            )
        return ("parquet" if rest.endswith(".parquet") else "tar"), files
    if source.is_dir():
        return _recognise_folder(source)
    if not source.exists():
        raise InvalidSource(
            f"{source} does not exist; give a folder, a tar archive, a Parquet file or a list"
        )
    match source.suffix.lower():
        case ".parquet":
            return "parquet", [source]
        case ".txt" | ".lst":
            return "list", [source]
        case _:
            return "tar", [source]


def _recognise_folder(folder: Path) -> tuple[Kind, list[Path]]:
    """A folder of archives or tables counts as them, unless it holds images too."""
    shards: list[Path] = []
    with _listed_folder(folder) as entries:
        for entry in entries:
            if _is_candidate(entry.name) and not entry.is_dir():
                return "folder", [folder]
            if entry.name.endswith((".tar", ".parquet")) and not entry.name.startswith("."):
                shards.append(Path(entry.path))
    for kind in ("tar", "parquet"):
        if files := sorted(file for file in shards if file.suffix == f".{kind}"):
            return kind, files
    return "folder", [folder]


def _scan(folder: Path) -> list[str]:
    """Relative names of candidate files, sorted; a million in seconds (benchmarks/listing.py)."""
    found: list[str] = []
    pending, seen = [""], {os.path.realpath(folder)}
    while pending:
        inside = pending.pop()
        with _listed_folder(folder / inside) as entries:
            for entry in entries:
                name = inside + entry.name
                if entry.name.startswith("."):
                    continue
                if not entry.is_dir():
                    if _is_candidate(name):
                        found.append(name)
                elif not entry.is_symlink():
                    pending.append(name + "/")
                elif (real := os.path.realpath(entry.path)) not in seen:  # links may loop
                    seen.add(real)
                    pending.append(name + "/")
    return sorted(found)


@contextmanager
def _listed_folder(folder: Path) -> Iterator[Iterator[os.DirEntry[str]]]:
    try:
        with os.scandir(folder) as entries:
            yield entries
    except OSError as error:
        raise InvalidSource(
            f"{folder} cannot be listed ({error.strerror}); check its permissions"
        ) from error


def _is_candidate(name: str) -> bool:
    return name[name.rfind(".") :].lower() in SUFFIXES  # no Path: called a million times


def _listed(file: Path) -> list[str]:
    """Paths in the lines of a text file; empty lines and those that begin with # are none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSource(f"{file} cannot be read as a list of paths ({error})") from error
    stripped = (line.strip() for line in lines)
    return list(dict.fromkeys(line for line in stripped if line and not line.startswith("#")))


def _unique(names: list[str], file: Path, taken: set[str]) -> list[str]:
    """Names that another shard has too get this one's in theirs."""
    found = []
    for name in names:
        path = PurePosixPath(name)
        if name in taken:
            name = str(path.with_name(f"{path.stem}@{file.stem}{path.suffix}"))
        taken.add(name)
        found.append(name)
    return found


def _table_rows(file: Path, broken: list[Rejected]) -> list[str]:
    return list_table(file)


def _tar_members(file: Path, broken: list[Rejected]) -> list[str]:
    """Names of an archive's candidates, in its order; those before its end, where it is cut off."""
    names: list[str] = []
    try:
        with tarfile.open(file) as archive:
            try:
                names.extend(str(PurePosixPath(m.name)) for m in archive if _is_member(m))
            except (tarfile.TarError, OSError, EOFError) as error:
                broken.append(Rejected(path=file.name, reason=f"archive ends early ({error})"))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InvalidSource(
            f"{file} is no readable tar archive ({error}); give a folder or a tar archive"
        ) from error
    return names


def _is_member(member: tarfile.TarInfo) -> bool:
    hidden = any(p.startswith(".") for p in PurePosixPath(member.name).parts)
    return member.isfile() and not hidden and _is_candidate(member.name)


def _read_tar(file: Path) -> Iterator[bytes]:
    """The bytes of an archive's candidates, in its order; none for one that is cut off."""
    with tarfile.open(file) as archive:
        while True:
            try:
                member = archive.next()
            except (tarfile.TarError, OSError, EOFError):
                return
            if member is None:
                return
            if _is_member(member):
                try:
                    content = archive.extractfile(member)
                    yield content.read() if content else b""
                except (tarfile.TarError, OSError, EOFError):
                    yield b""
