"""Images for training: a folder or a tar archive becomes one uint8 array.

Every picture is decoded once, by the project's only decoder, and kept at a fixed size. One that
cannot be read is skipped and listed, never fatal.
"""

import hashlib
import os
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from byol_serving import images as decoding
from byol_serving.errors import ByolError, InvalidSource

SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"]
)
IN_MEMORY_LIMIT = 4 * 2**30
"""Bytes of pixels held in memory; beyond, they lie in a temporary file, memory-mapped."""


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A file that was to be an image and could not be read."""

    path: str
    """Relative to the source."""
    reason: str
    """One line."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """Decoded images of one size, in the order of their names."""

    pixels: NDArray[np.uint8]
    """uint8 [N, S, S, 3], RGB."""
    names: list[str]
    """N paths relative to the source, with / between parts."""
    labels: NDArray[np.int64] | None
    """int64 [N], positions in `classes`; None without class sub-folders. For scoring only."""
    classes: list[str]
    """Names of the class sub-folders, sorted; empty without."""
    rejected: list[Rejected]
    """Files that could not be read, in the order of their names."""
    fingerprint: str
    """sha256, in hex, over names and sizes in bytes: tells one data set from another."""

    @property
    def on_disk(self) -> bool:
        """Whether the pixels are a memory-mapped file."""
        return isinstance(self.pixels, np.memmap)

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.names)


@dataclass(frozen=True)
class _Entry:
    """One candidate: where it is named, and how its bytes are had (in a worker thread)."""

    row: int
    name: str
    read: Callable[[], bytes]


def load_images(
    source: Path,
    size: int,
    *,
    workers: int | None = None,
    resize: Literal["short_side", "squash"] = "short_side",
    only: Collection[str] | None = None,
    crop_fraction: float = 1.0,
) -> Images:
    """Reads every image under a folder, or in a tar archive.

    Args:
        source: a folder, searched to any depth, or a tar archive, compressed or not. Files whose
            suffix is that of an image count; hidden ones do not.
        size: side of the stored square. At the side of the views, crops are enlarged, never
            shrunk; store more where the pictures are larger and fine detail matters.
        workers: decoding threads; as many as there are processors by default.
        resize: short_side keeps the aspect and the centre; squash keeps everything.
        only: names, as `list_images` gives them, to read; all by default.
        crop_fraction: part of the short side that the centre crop keeps.

    Raises:
        InvalidSource: nothing there, unreadable, or not one readable image in it.
    """
    how = decoding.Preprocess(size=size, resize=resize, crop_fraction=crop_fraction)
    wanted = None if only is None else frozenset(only)
    if source.is_dir():
        names = [name for name in _scan(source) if wanted is None or name in wanted]
        entries: Iterable[_Entry] = (
            _Entry(row, name, (source / name).read_bytes) for row, name in enumerate(names)
        )
        return _gather(source, names, entries, how, workers, [])
    return _load_tar(source, how, workers, wanted)


def list_images(source: Path) -> list[str]:
    """Names of the candidate images in a folder or tar archive, sorted; nothing is decoded.

    Raises:
        InvalidSource: nothing there, or unreadable.
    """
    if source.is_dir():
        return _scan(source)
    members, _ = _tar_members(source)
    return sorted(str(PurePosixPath(name)) for name in members)


def read_images(source: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """(name, encoded bytes) of the named images, in the source's order; raises InvalidSource."""
    if source.is_dir():
        for name in names:
            yield name, (source / name).read_bytes()
        return
    wanted = frozenset(names)
    members, _ = _tar_members(source)
    order = {position: position for position in range(len(members))}
    for entry in _tar_entries(source, [str(PurePosixPath(name)) for name in members], order):
        if entry.name in wanted:
            yield entry.name, entry.read()


def images_from_arrays(
    pixels: NDArray[np.uint8],
    names: list[str] | None = None,
    labels: NDArray[np.int64] | None = None,
    classes: list[str] | None = None,
) -> Images:
    """Images that are in memory already.

    Args:
        pixels: uint8 [N, S, S, 3].
        names: N names; numbers by default.
        labels: int64 [N], positions in `classes`.
        classes: names of the classes; numbers by default.

    Raises:
        InvalidSource: another shape or type, or lengths that differ.
    """
    shape = pixels.shape
    if pixels.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
        raise InvalidSource(f"pixels are {pixels.dtype} {shape}; give uint8 [N, S, S, 3]")
    names = [f"{i:08d}" for i in range(len(pixels))] if names is None else names
    if len(names) != len(pixels) or (labels is not None and len(labels) != len(pixels)):
        raise InvalidSource(f"{len(pixels)} images do not match their names or labels in number")
    if labels is not None and classes is None:
        classes = [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
    digest = hashlib.sha256("\n".join(names).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return Images(
        pixels=np.require(pixels, requirements=["C", "W"]),
        names=names,
        labels=labels,
        classes=classes or [],
        rejected=[],
        fingerprint=digest.hexdigest(),
    )


def common_labels(
    bank: Images, queries: Images
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Both sets' labels as positions in one list of classes; None unless both have labels."""
    if bank.labels is None or queries.labels is None:
        return None
    classes = sorted({*bank.classes, *queries.classes})
    maps = (np.array([classes.index(name) for name in each.classes]) for each in (bank, queries))
    bank_map, query_map = maps
    return bank_map[bank.labels], query_map[queries.labels]


def _scan(folder: Path) -> list[str]:
    """Relative names of candidate files, sorted; about a million a few seconds (os.scandir)."""
    found: list[str] = []
    pending, seen = [""], {os.path.realpath(folder)}
    while pending:
        inside = pending.pop()
        try:
            with os.scandir(folder / inside) as entries:
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
        except OSError as error:
            raise InvalidSource(
                f"{folder / inside} cannot be listed ({error.strerror}); check its permissions"
            ) from error
    return sorted(found)


def _is_candidate(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 - called a million times


def _load_tar(
    source: Path, how: decoding.Preprocess, workers: int | None, wanted: frozenset[str] | None
) -> Images:
    """Two passes: headers, to know how many there are; then bytes, in the archive's own order."""
    members, broken = _tar_members(source)
    names = [str(PurePosixPath(name)) for name in members]
    rows = [i for i in range(len(names)) if wanted is None or names[i] in wanted]
    rows.sort(key=names.__getitem__)
    row_of = {position: row for row, position in enumerate(rows)}
    entries = _tar_entries(source, names, row_of)
    return _gather(source, [names[i] for i in rows], entries, how, workers, broken)


def _tar_members(source: Path) -> tuple[list[str], list[Rejected]]:
    """Names of the candidates in the archive's order, and what was wrong with its end."""
    if not source.exists():
        raise InvalidSource(f"{source} does not exist; give a folder or a tar archive of images")
    names: list[str] = []
    broken: list[Rejected] = []
    try:
        with tarfile.open(source) as archive:
            try:
                names.extend(m.name for m in archive if _is_member(m))
            except (tarfile.TarError, OSError, EOFError) as error:  # truncated: keep what is there
                broken.append(Rejected(path=source.name, reason=f"archive ends early ({error})"))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InvalidSource(
            f"{source} is no readable tar archive ({error}); give a folder or a tar archive"
        ) from error
    return names, broken


def _is_member(member: tarfile.TarInfo) -> bool:
    hidden = any(p.startswith(".") for p in PurePosixPath(member.name).parts)
    return member.isfile() and not hidden and _is_candidate(member.name)


def _tar_entries(source: Path, names: list[str], row_of: dict[int, int]) -> Iterator[_Entry]:
    """Entries with their bytes read here: an archive has one position for all workers."""
    with tarfile.open(source) as archive:
        position = 0
        while position < len(names) and (member := archive.next()) is not None:
            if not _is_member(member):
                continue
            row, name = row_of.get(position), names[position]
            position += 1
            if row is None:
                continue
            try:
                file = archive.extractfile(member)
                data = file.read() if file else b""
            except (tarfile.TarError, OSError, EOFError):
                data = b""
            yield _Entry(row, name, lambda data=data: data)  # type: ignore[misc]


def _gather(
    source: Path,
    names: list[str],
    entries: Iterable[_Entry],
    how: decoding.Preprocess,
    workers: int | None,
    rejected: list[Rejected],
) -> Images:
    """Decodes in threads (decoders release the interpreter lock) into rows, then drops the gaps."""
    pixels = _allocate((len(names), how.size, how.size, 3))
    sizes = np.full(len(names), -1, dtype=np.int64)
    reasons: dict[int, str] = {}

    def work(entry: _Entry) -> None:
        try:
            data = entry.read()
            pixels[entry.row] = decoding.load_input(data, how)
            sizes[entry.row] = len(data)
        except (ByolError, OSError) as error:
            reasons[entry.row] = str(error)

    _run(work, entries, workers or os.cpu_count() or 1)
    rejected = rejected + [
        Rejected(path=names[row], reason=reasons[row]) for row in sorted(reasons)
    ]
    kept = np.flatnonzero(sizes >= 0)
    if len(kept) == 0:
        first = f", the first: {rejected[0].path}: {rejected[0].reason}" if rejected else ""
        raise InvalidSource(
            f"no readable image in {source} ({len(rejected)} rejected{first});"
            f" give files ending in {' '.join(sorted(SUFFIXES))}"
        )
    for new, old in enumerate(kept):
        if new != old:
            pixels[new] = pixels[old]
    kept_names = [names[row] for row in kept]
    labels, classes = _classes(kept_names)
    return Images(
        pixels=pixels[: len(kept)],
        names=kept_names,
        labels=labels,
        classes=classes,
        rejected=rejected,
        fingerprint=_fingerprint(kept_names, sizes[kept]),
    )


def _run(work: Callable[[_Entry], None], entries: Iterable[_Entry], workers: int) -> None:
    """A pool with few tasks ahead, so that an archive's bytes do not pile up in memory."""
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        for entry in entries:
            waiting.append(pool.submit(work, entry))
            if len(waiting) > 8 * workers:
                waiting.popleft().result()
        for future in waiting:
            future.result()


def _allocate(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if np.prod(shape, dtype=np.int64) <= IN_MEMORY_LIMIT:
        return np.zeros(shape, np.uint8)
    # Nameless: the file goes when the array does, or when the process is killed.
    with tempfile.TemporaryFile(prefix="byol-") as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)


def _classes(names: list[str]) -> tuple[NDArray[np.int64] | None, list[str]]:
    """Labels from the first folder that tells images apart; None where they lie flat."""
    parts = [PurePosixPath(name).parts for name in names]
    folders = [p[:-1] for p in parts]
    depth = 0  # folders around all of them
    for level in zip(*folders, strict=False):
        if len(set(level)) > 1:
            break
        depth += 1
    if any(len(p) < depth + 2 for p in parts):
        return None, []
    classes = sorted({p[depth] for p in parts})
    position = {name: i for i, name in enumerate(classes)}
    return np.array([position[p[depth]] for p in parts], np.int64), classes


def _fingerprint(names: list[str], sizes: NDArray[np.int64]) -> str:
    digest = hashlib.sha256()
    for name, size in zip(names, sizes, strict=True):
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
