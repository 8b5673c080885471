"""Images for training: a source becomes one uint8 array.

Every picture is decoded once, by the project's only decoder, and kept at a fixed size: in memory,
in a temporary file, or in a cache that later runs use again. One that cannot be read is skipped and
listed, never fatal.
"""

import hashlib
import os
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from byol_serving import images as decoding
from byol_serving.errors import ByolError, InvalidSource
from byol_training import cache as caches
from byol_training.sources import SUFFIXES, Listing, Read, Rejected, list_source, read_source, stamp

__all__ = ["Images", "Rejected", "images_from_arrays", "list_images", "load_images", "read_images"]

Resize = Literal["short_side", "squash", "whole"]
IN_MEMORY_LIMIT = 4 * 2**30
"""Bytes of pixels held in memory; beyond, they lie in a temporary file, memory-mapped."""


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
    shapes: NDArray[np.int64] | None = None
    """int64 [N, 2]: height and width of the pictures that were squashed whole; None where the
    pixels have their aspect."""

    @property
    def on_disk(self) -> bool:
        """Whether the pixels are a memory-mapped file."""
        return isinstance(self.pixels, np.memmap)

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.names)

    def squares(self, rows: NDArray[np.int64]) -> decoding.Pixels:
        """Some of the images, with their own aspect, and the centres of those that are not square.

        Args:
            rows: int64 [n].

        Returns:
            uint8 [n, S, S, 3].
        """
        if self.shapes is None:
            return self.pixels[rows]
        pairs = zip(self.pixels[rows], self.shapes[rows], strict=True)
        return np.stack([_centre(pixels, *shape) for pixels, shape in pairs])


def _centre(pixels: decoding.Pixels, height: int, width: int) -> decoding.Pixels:
    """The centre of a squashed picture of that height and width, uint8 [S, S, 3] again."""
    side = len(pixels)
    rows = max(1, round(side * min(1.0, width / height)))
    columns = max(1, round(side * min(1.0, height / width)))
    top, left = (side - rows) // 2, (side - columns) // 2
    kept = np.ascontiguousarray(pixels[top : top + rows, left : left + columns])
    return decoding.to_input(kept, decoding.Preprocess(size=side, resize="squash"))


def load_images(
    source: Path,
    size: int,
    *,
    workers: int | None = None,
    resize: Resize = "short_side",
    only: Collection[str] | None = None,
    crop_fraction: float = 1.0,
    cache: Path | None = None,
) -> Images:
    """Reads every image of a source.

    Args:
        source: a folder, tar archives, Parquet files or a list; see `sources.list_source`.
        size: side of the stored square. At the side of the views, crops are enlarged, never
            shrunk; store more where the pictures are larger and fine detail matters.
        workers: decoding threads; as many as there are processors by default.
        resize: short_side keeps the aspect and the centre; squash keeps everything, out of shape;
            whole does too, and remembers the shapes, so that crops are as those of the pictures.
        only: names, as `list_images` gives them, to read; all by default.
        crop_fraction: part of the short side that the centre crop keeps.
        cache: a folder to keep the decoded images in; the next run with the same source, unchanged,
            reads them from there.

    Raises:
        InvalidSource: nothing there, unreadable, or not one readable image in it.
        StoreError: no room in the cache.
    """
    listing = list_source(source)
    how = decoding.Preprocess(
        size=size, resize="squash" if resize == "whole" else resize, crop_fraction=crop_fraction
    )
    if cache is None:
        return _gather(source, listing, how, workers, only, whole=resize == "whole")
    key = _key(listing, how, resize, only)
    found = caches.find(cache, key)
    if found is not None:
        return _from_cache(*found)
    return _gather(
        source, listing, how, workers, only, whole=resize == "whole", cache=cache, key=key
    )


def list_images(source: Path) -> list[str]:
    """Names of the candidate images of a source, sorted; nothing is decoded.

    Raises:
        InvalidSource: nothing there, or unreadable.
    """
    return sorted(list_source(source).names)


def read_images(source: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """(name, encoded bytes) of the named images, in the source's order; raises InvalidSource."""
    wanted, listing = frozenset(names), list_source(source)
    for position, read in read_source(listing):
        if listing.names[position] in wanted:
            yield listing.names[position], read()


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


def _gather(
    source: Path,
    listing: Listing,
    how: decoding.Preprocess,
    workers: int | None,
    only: Collection[str] | None,
    *,
    whole: bool,
    cache: Path | None = None,
    key: str = "",
) -> Images:
    """Decodes in threads (decoders release the interpreter lock) into rows, then drops the gaps."""
    wanted = None if only is None else frozenset(only)
    rows = [i for i, name in enumerate(listing.names) if wanted is None or name in wanted]
    rows.sort(key=listing.names.__getitem__)
    names = [listing.names[i] for i in rows]
    row_of = {position: row for row, position in enumerate(rows)}
    shape = (len(names), how.size, how.size, 3)
    draft = None if cache is None or not names else caches.Draft(cache, key, shape)
    pixels = _allocate(shape) if draft is None else draft.pixels
    shapes = np.zeros((len(names), 2), np.int64)
    sizes = np.full(len(names), -1, np.int64)
    reasons: dict[int, str] = {}

    def work(position: int, read: Read) -> None:
        row = row_of[position]
        try:
            data = read()
            pixels[row] = decoding.load_input(data, how)
            if whole:
                shapes[row] = decoding.upright_size(data)
            sizes[row] = len(data)
        except (ByolError, OSError) as error:
            reasons[row] = str(error)

    try:
        todo = (each for each in read_source(listing) if each[0] in row_of)
        _run(work, todo, workers or os.cpu_count() or 1)
        broken = [Rejected(path=names[row], reason=reasons[row]) for row in sorted(reasons)]
        kept = np.flatnonzero(sizes >= 0)
        _refuse_empty(source, kept, listing.broken + broken)
        for new, old in enumerate(kept):
            if new != old:
                pixels[new] = pixels[old]
        facts = {
            "names": [names[row] for row in kept],
            "rejected": [asdict(each) for each in listing.broken + broken],
            "fingerprint": _fingerprint([names[row] for row in kept], sizes[kept]),
            "shapes": shapes[kept].tolist() if whole else None,
        }
        stored = pixels[: len(kept)] if draft is None else draft.keep(len(kept), facts)
    except BaseException:
        if draft is not None:
            draft.discard()
        raise
    return _from_cache(stored, facts)


def _from_cache(pixels: NDArray[np.uint8], facts: dict[str, Any]) -> Images:
    labels, classes = _classes(facts["names"])
    return Images(
        pixels=pixels,
        names=facts["names"],
        labels=labels,
        classes=classes,
        rejected=[Rejected(**each) for each in facts["rejected"]],
        fingerprint=facts["fingerprint"],
        shapes=None if facts["shapes"] is None else np.array(facts["shapes"], np.int64),
    )


def _key(
    listing: Listing, how: decoding.Preprocess, resize: Resize, only: Collection[str] | None
) -> str:
    """The same for the same files, unchanged, decoded the same way."""
    chosen = "" if only is None else "\n".join(sorted(only))
    text = f"1\0{stamp(listing)}\0{how}\0{resize}\0{chosen}"
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:24]


def _refuse_empty(source: Path, kept: NDArray[np.intp], rejected: list[Rejected]) -> None:
    if len(kept) == 0:
        first = f", the first: {rejected[0].path}: {rejected[0].reason}" if rejected else ""
        raise InvalidSource(
            f"no readable image in {source} ({len(rejected)} rejected{first});"
            f" give files ending in {' '.join(sorted(SUFFIXES))}"
        )


def _run(work: Callable[[int, Read], None], todo: Iterator[tuple[int, Read]], workers: int) -> None:
    """A pool with few tasks ahead, so that an archive's bytes do not pile up in memory."""
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        for position, read in todo:
            waiting.append(pool.submit(work, position, read))
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
