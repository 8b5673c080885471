"""Flipped bits anywhere: said, repaired, or harmless. Never a silent change of what is stored.

Every kind of byte has its turn (headers, pages' own tables, ids, texts, vectors, checksums; rows,
vectors, graph and manifest of a snapshot), at places and with bits that hypothesis varies.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from byol_serving.collections import database, snapshot
from byol_serving.collections.checks import unit_vectors
from byol_serving.collections.index import IndexOptions
from byol_serving.collections.rows import text_crc, vector_crc
from byol_serving.collections.store import Store
from byol_serving.errors import StoreError
from serving.collections.model import Model, clustered

DIM, COUNT = 16, 200
OPTIONS = IndexOptions(approximate_from=64)
IDS = [f"item-{n:05}" for n in range(COUNT)]
VECTORS = clustered(COUNT, DIM)
STORED = unit_vectors(VECTORS, DIM)
METADATA = [{"label": f"label-{n}"} for n in range(COUNT)]
FAST = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ANYWHERE = st.floats(0, 1, exclude_max=True)
BITS = st.integers(1, 255)


@dataclass(frozen=True)
class Site:
    """A closed store, and a model of what it holds."""

    path: Path
    model: Model = field(repr=False)  # hypothesis refuses to print so much

    @property
    def data(self) -> Path:
        """The database's file."""
        return self.path / "c" / database.FILE

    def flipped(self, file: Path, where: int, bits: int) -> Path:
        """A copy of the store in which the bits of one byte are others."""
        copy = self.path.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.path, copy)
        changed = bytearray(file.read_bytes())
        changed[where] ^= bits
        (copy / file.relative_to(self.path)).write_bytes(changed)
        return copy


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """With a snapshot of a graph."""
    path, model = tmp_path_factory.mktemp("flipped") / "store", Model()
    with Store(path, options=OPTIONS) as store:
        collection = store.create("c", dim=DIM, encoder_id="e", index="hnsw")
        collection.upsert(IDS, VECTORS, METADATA)
        collection.settle()
    model.upsert(IDS, VECTORS, METADATA)
    return Site(path, model)


@pytest.fixture(scope="module")
def bare(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Without a snapshot, so that all of the database is read at the start."""
    path = tmp_path_factory.mktemp("bare") / "store"
    shutil.copytree(site.path, path)
    snapshot.discard(path / "c")
    return Site(path, site.model)


def _said(path: Path, model: Model) -> bool:
    """Whether damage is said; where it is not, all must be as it was stored."""
    with Store(path, options=OPTIONS) as store:
        if store.failed:
            assert isinstance(store.failed["c"], StoreError)
            return True
        collection = store.get("c")
        try:
            problems = collection.verify().problems
        except StoreError:
            return True
        if not problems:
            model.check_all(collection)
            model.check_search(collection, VECTORS[:3], 10)
        return bool(problems)


@cache
def _content(file: Path) -> bytes:
    return file.read_bytes()


def _as_sqlite(number: int) -> bytes:
    """A checksum as it lies in a record."""
    sizes = (1, 2, 3, 4, 6)  # signed: https://www.sqlite.org/fileformat2.html#record_format
    return number.to_bytes(next(size for size in sizes if number < 1 << (8 * size - 1)), "big")


def _checksum(n: int) -> Sequence[bytes]:
    text = f'{{"label":"label-{n}"}}'
    return (
        _as_sqlite(text_crc(IDS[n], text)),
        _as_sqlite(vector_crc(n + 1, STORED[n].tobytes())),
    )


@FAST
@given(n=st.integers(0, COUNT - 1), at=ANYWHERE, bits=BITS)
@pytest.mark.parametrize("kind", ["vector", "text", "text's checksum", "vector's checksum"])
def test_what_an_item_consists_of_cannot_change_unsaid(
    bare: Site, kind: str, n: int, at: float, bits: int
) -> None:
    match kind:
        case "vector":
            needle = STORED[n].tobytes()
        case "text":
            needle = f'{{"label":"label-{n}"}}'.encode()
        case "text's checksum":
            needle = _checksum(n)[0]
        case _:
            needle = _checksum(n)[1]
    begin = _content(bare.data).find(needle)
    assert begin >= 0
    where = begin + int(at * len(needle))
    assert _said(bare.flipped(bare.data, where, bits), bare.model)


@FAST
@given(page=ANYWHERE, at=ANYWHERE, bits=BITS)
@example(page=0, at=0, bits=1)
@pytest.mark.parametrize("kind", ["file's header", "page's header", "anywhere"])
def test_a_byte_of_the_database_is_said_or_harmless(
    bare: Site, kind: str, page: float, at: float, bits: int
) -> None:
    size = len(_content(bare.data))
    first = database.PAGE_SIZE * int(page * size / database.PAGE_SIZE)
    match kind:
        case "file's header":
            where = int(at * 100)
        case "page's header":  # the kind of page, how many cells, and where they lie
            where = first + (100 if first == 0 else 0) + int(at * 40)
        case _:
            where = int(at * size)
    _said(bare.flipped(bare.data, where, bits), bare.model)


@FAST
@given(at=ANYWHERE, bits=BITS)
@pytest.mark.parametrize("kind", ["rows", "vectors", "graph", "manifest"])
def test_a_byte_of_a_snapshot_changes_no_answer(
    site: Site, kind: str, at: float, bits: int
) -> None:
    """It is seen, and the store answers for it, or what it said is the same (a blank in JSON)."""
    suffix = {"graph": ".faiss", "manifest": ".json"}.get(kind, ".vectors")
    (file,) = (site.path / "c").glob(f"index-*{suffix}")
    size, rows = len(_content(file)), 8 * COUNT
    match kind:
        case "rows":
            where = int(at * rows)
        case "vectors":
            where = rows + int(at * (size - rows))
        case _:
            where = int(at * size)
    assert not _said(site.flipped(file, where, bits), site.model)
    with Store(site.path, read_only=True) as sound:
        tuned = sound.get("c").stats()
    with Store(site.path.with_name("copy"), options=OPTIONS) as store:
        store.get("c").settle()
        stats = store.get("c").stats()
        assert (stats.effort, stats.recall) == (tuned.effort, tuned.recall)
