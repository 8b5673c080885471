"""Snapshots of the index: a cache on disk that is checked, and rebuilt rather than trusted.

    index-<seq>.vectors   rows int64 [N], then vectors float32 [N, D]
    index-<seq>.faiss     the approximate index, if there is one
    index-<seq>.json      the manifest, written last: what the others must be, byte for byte, and
                          a checksum of its own: a digit of `effort` may not change unseen

FAISS itself loads files with flipped bits without a word, hence checksums of our own.
"""

import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from byol_serving.collections.approximate import Approximate
from byol_serving.collections.disk import checksum, publish, sync
from byol_serving.collections.exact import Positions
from byol_serving.collections.index import Index
from byol_serving.collections.kinds import ApproximateKind
from byol_serving.collections.tuning import Tuning
from byol_serving.collections.types import Vectors

_log = logging.getLogger(__name__)
_FORMAT = 4
_KEEP = 2


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a snapshot holds."""

    format: int
    collection: str
    """The collection's `uuid`: a folder of the same name may be another collection."""
    seq: int
    size: int
    dim: int
    vectors_crc: int
    approximate: ApproximateKind | None
    approximate_crc: int
    effort: int
    depth: int
    effort_of_tenth: int
    recall: float
    target: float
    """The approximate index's tuning; zeros without one."""
    items: int = 0
    """Of the tuning too; earlier versions did not write it."""


@dataclass(frozen=True)
class Loaded:
    """A snapshot read back: which rows are alive is for the store to say."""

    seq: int
    rows: Positions
    vectors: Vectors
    approximate: Approximate | None


def write(folder: Path, collection: str, index: Index) -> int:
    """Writes a snapshot of the index as it is now and drops old ones; returns its sequence."""
    with index.maintaining:  # positions stay, and the approximate index grows no more
        view = index.view
        base = folder / f"index-{view.seq:016d}"
        vectors, approximate = base.with_suffix(".vectors"), base.with_suffix(".faiss")
        with _aside(vectors).open("wb") as file:
            view.rows[: view.size].tofile(file)
            view.vectors[: view.size].tofile(file)
        vectors_crc = checksum(_aside(vectors))
        approximate_crc = 0
        if view.approximate is not None:
            view.approximate.save(_aside(approximate))
            approximate_crc = checksum(_aside(approximate))
            publish(_aside(approximate), approximate)
        publish(_aside(vectors), vectors)
    none = Tuning(target=0)
    tuning = view.approximate.tuning if view.approximate else none
    manifest = Manifest(
        format=_FORMAT,
        collection=collection,
        seq=view.seq,
        size=view.size,
        dim=index.dim,
        vectors_crc=vectors_crc,
        approximate=view.approximate.kind if view.approximate else None,
        approximate_crc=approximate_crc,
        effort=tuning.effort,
        depth=tuning.depth,
        effort_of_tenth=tuning.effort_of_tenth,
        recall=tuning.recall,
        items=tuning.items,
        target=tuning.target,
    )
    final = base.with_suffix(".json")
    _aside(final).write_text(sealed(asdict(manifest)))
    publish(_aside(final), final)
    _prune(folder)
    return view.seq


def newest(folder: Path, collection: str, dim: int, seq: int, *, repair: bool) -> Loaded | None:
    """The newest snapshot that is what its manifest says and no newer than `seq`.

    One that is not is logged and, with `repair`, deleted: a snapshot from the future of a database
    that was put back must not come to look right once the store has passed its sequence.
    """
    for path in sorted(folder.glob("index-*.json"), reverse=True):
        try:
            return _load(path, collection, dim, seq)
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RuntimeError,
            MemoryError,
        ) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            _log.warning("snapshot %s is not used: %s; rebuilding from the store", path, reason)
            if repair:
                path.unlink()
                sync(folder)
    return None


def sealed(facts: Mapping[str, object]) -> str:
    """A manifest's text, with its checksum."""
    return json.dumps({**facts, "crc": _crc(facts)})


def discard(folder: Path) -> None:
    """Deletes all snapshots and what is left of unfinished ones."""
    for path in folder.glob("index-*"):
        path.unlink(missing_ok=True)
    sync(folder)


def _load(path: Path, collection: str, dim: int, seq: int) -> Loaded:
    facts = json.loads(path.read_text())
    if facts.pop("crc") != _crc(facts):
        raise ValueError("its manifest fails its checksum")
    manifest = Manifest(**facts)
    if manifest.format != _FORMAT or manifest.collection != collection or manifest.dim != dim:
        raise ValueError("it belongs to another collection or version")
    if manifest.seq > seq:
        raise ValueError(f"it covers change {manifest.seq}, the store ends at {seq}")
    file = path.with_suffix(".vectors")
    if file.stat().st_size != manifest.size * (8 + dim * 4):
        raise ValueError("its vectors are truncated")
    if checksum(file) != manifest.vectors_crc:
        raise ValueError("its vectors fail their checksum")
    rows = np.fromfile(file, np.int64, manifest.size)
    vectors = np.fromfile(file, np.float32, offset=manifest.size * 8).reshape(-1, dim)
    if np.any(rows[1:] <= rows[:-1]):
        raise ValueError("its rows are out of order")
    approximate = None
    if manifest.approximate is not None:
        file = path.with_suffix(".faiss")
        if checksum(file) != manifest.approximate_crc:
            raise ValueError("its approximate index fails its checksum")
        tuning = Tuning(
            effort=manifest.effort,
            depth=manifest.depth,
            effort_of_tenth=manifest.effort_of_tenth,
            recall=manifest.recall,
            items=manifest.items,
            target=manifest.target,
        )
        approximate = Approximate.load(manifest.approximate, file, dim, tuning)
        if approximate.size > manifest.size:
            raise ValueError("its approximate index covers more than its vectors")
    return Loaded(manifest.seq, rows, vectors, approximate)


def _prune(folder: Path) -> None:
    manifests = sorted(folder.glob("index-*.json"), reverse=True)
    kept = {path.stem for path in manifests[:_KEEP]}
    for path in folder.glob("index-*"):
        if path.name.split(".")[0] not in kept:
            path.unlink(missing_ok=True)


def _crc(facts: Mapping[str, object]) -> int:
    return zlib.crc32(json.dumps(facts).encode())


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
