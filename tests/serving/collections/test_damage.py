"""Disks that fill up, refuse, or lie; files of other versions; clocks that jump."""

import errno
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest

from byol_serving.collections import database, snapshot
from byol_serving.collections.checks import unit_vectors
from byol_serving.collections.database import MIGRATIONS
from byol_serving.collections.filters import Exists
from byol_serving.collections.store import Store
from byol_serving.errors import StoreCorrupt, StoreError
from serving.collections.crash.migrating import forget_what_is_newer
from serving.collections.model import Model, clustered

DIM = 64
IDS = [f"item-{n:05}" for n in range(500)]
VECTORS = clustered(500, DIM)
STORED = unit_vectors(VECTORS, DIM)
METADATA = [{"label": f"label-{n}"} for n in range(500)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed store of 500 items with no snapshot."""
    with Store(tmp_path / "store") as store:
        store.create("c", dim=DIM, encoder_id="e").upsert(IDS, VECTORS, METADATA)
    snapshot.discard(tmp_path / "store" / "c")
    return tmp_path / "store"


@pytest.fixture
def model() -> Model:
    model = Model()
    model.upsert(IDS, VECTORS, METADATA)
    return model


def _data(path: Path) -> Path:
    return path / "c" / database.FILE


# Flipped bytes in the database


def _flip(file: Path, needle: bytes) -> None:
    content = bytearray(file.read_bytes())
    where = content.find(needle)
    assert where >= 0
    content[where] ^= 0x01
    file.write_bytes(content)


def test_a_flipped_bit_in_a_vector_is_named_and_keeps_only_its_collection_away(path: Path) -> None:
    with Store(path) as store:
        store.create("sound", dim=DIM, encoder_id="e").upsert(IDS[:1], VECTORS[:1])
    snapshot.discard(path / "c")
    _flip(_data(path), STORED[123].tobytes())
    with Store(path) as store:
        with pytest.raises(StoreCorrupt, match=r"vector of item 'item-00123' fails its checksum"):
            store.get("c")
        assert "item-00123" in str(store.failed["c"])
        assert store.get("sound").info.count == 1
        store.drop("c")
        assert store.failed == {}


def test_a_flipped_bit_in_a_vector_that_a_snapshot_covers_is_found_by_verify(
    path: Path, model: Model
) -> None:
    Store(path).close()  # writes a snapshot
    _flip(_data(path), STORED[123].tobytes())
    with Store(path) as store:
        collection = store.get("c")
        model.check_search(collection, VECTORS[120:126], 10)  # the snapshot is sound
        assert collection.verify().problems == (
            "item 'item-00123': its vector is missing or fails its checksum",
        )
        with pytest.raises(StoreCorrupt, match="item-00123"):
            collection.get(["item-00123"], with_vectors=True)
        collection.upsert(["item-00123"], VECTORS[123:124], [METADATA[123]])  # the remedy
        assert collection.verify().ok
        model.check_all(collection)


def test_a_flipped_bit_in_metadata_is_seen_when_it_is_read(path: Path) -> None:
    _flip(_data(path), b'{"label":"label-77"}'[2:])
    with Store(path) as store:
        collection = store.get("c")
        with pytest.raises(StoreCorrupt, match="metadata of item 'item-00077'"):
            collection.get(["item-00077"])
        with pytest.raises(StoreCorrupt, match="item-00077"):
            collection.search(VECTORS[77:78], 1)
        assert collection.get(["item-00078"])[0].metadata == METADATA[78]
        assert collection.verify().problems == (
            "item 'item-00077': its metadata fails its checksum",
        )


def test_a_file_that_is_no_database(path: Path) -> None:
    _data(path).write_bytes(b"not a database at all" * 1000)
    with Store(path) as store, pytest.raises(StoreCorrupt, match="damaged"):
        store.get("c")
    _data(path).unlink()
    with Store(path) as store, pytest.raises(StoreCorrupt, match="missing"):
        store.get("c")
    _data(path).touch()
    with Store(path) as store, pytest.raises(StoreCorrupt, match="not a collection"):
        store.get("c")


@pytest.mark.parametrize(
    "damage",
    ["DELETE FROM meta WHERE key = 'seq'", "UPDATE meta SET value = x'00' WHERE key = 'seq'"],
)
def test_the_number_of_the_last_change_is_gone(path: Path, damage: str) -> None:
    with closing(sqlite3.connect(_data(path), isolation_level=None)) as connection:
        connection.execute(damage)
    with Store(path) as store, pytest.raises(StoreCorrupt, match="last change is damaged"):
        store.get("c")


def test_items_and_vectors_that_do_not_belong_together(path: Path) -> None:
    with sqlite3.connect(_data(path)) as connection:
        connection.execute("DELETE FROM vectors WHERE row = 400")
    connection.close()
    with Store(path) as store, pytest.raises(StoreCorrupt, match="do not belong together"):
        store.get("c")


# Disks that are full or refuse

FILLER = """
import resource, signal, sys
import numpy as np
from byol_serving.collections.store import Store
from byol_serving.errors import StoreError
mode, path = sys.argv[1:]
with Store(path) as store:
    collection = store.get("c")
    if mode == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))
    for batch in range(1000):
        ids = [f"{batch}-{n}" for n in range(100)]
        vectors = np.random.default_rng(batch).standard_normal((100, 64), np.float32)
        try:
            collection.upsert(ids, vectors)
        except StoreError as error:
            print("refused", batch, error, flush=True)
            break
        print("acknowledged", batch, flush=True)
    first = collection.search(vectors[:1], 1)[0][0]  # still serving
    print("serving", first.id, collection.info.count, collection.verify().ok, flush=True)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs needs the right to mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def _fill_up(mode: str, path: Path) -> tuple[int, str]:
    """Writes until it is refused; the acknowledged batches, and what was said."""
    with Store(path) as store:
        store.create("c", dim=64, encoder_id="e")
    done = subprocess.run(
        [sys.executable, "-c", FILLER, mode, str(path)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    acknowledged = sum(line.startswith("acknowledged") for line in lines)
    (refused,) = (line for line in lines if line.startswith("refused"))
    assert lines[-1].endswith(f"{acknowledged * 100} True")
    return acknowledged, refused


def _check_filled(path: Path, acknowledged: int) -> None:
    with Store(path) as store:
        collection = store.get("c")
        assert collection.info.count == acknowledged * 100
        assert collection.verify().ok
        assert len(collection.get([f"{acknowledged - 1}-{n}" for n in range(100)])) == 100


def test_a_full_disk_refuses_the_batch_and_keeps_what_was_acknowledged(small_disk: Path) -> None:
    acknowledged, said = _fill_up("disk", small_disk / "store")
    assert acknowledged > 0
    assert "the disk of" in said
    assert "is full: free space and retry" in said
    _check_filled(small_disk / "store", acknowledged)


def test_a_file_that_may_not_grow_does_the_same(tmp_path: Path) -> None:
    acknowledged, said = _fill_up("limit", tmp_path / "store")
    assert acknowledged > 0
    assert "check the disk and retry" in said or "is full" in said
    _check_filled(tmp_path / "store", acknowledged)


def test_a_snapshot_that_cannot_be_written_costs_only_the_next_start(
    path: Path, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    with Store(path) as store:
        model.upsert(["late"], VECTORS[:1])
        store.get("c").upsert(["late"], VECTORS[:1])
        monkeypatch.setattr(snapshot, "sync", refuse)
        monkeypatch.setattr(snapshot, "publish", lambda temporary, final: refuse(final))
    assert "no index snapshot was written" in caplog.text
    monkeypatch.undo()
    with Store(path) as store:
        model.check_all(store.get("c"))


# Versions


def test_a_newer_schema_is_refused(path: Path) -> None:
    with sqlite3.connect(_data(path)) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    with (
        Store(path) as store,
        pytest.raises(StoreError, match=f"schema version {len(MIGRATIONS) + 1}.*upgrade it"),
    ):
        store.get("c")


@pytest.mark.parametrize("version", [0, -1, -(2**31)])
def test_a_version_that_never_was_is_damage(path: Path, version: int) -> None:
    with closing(sqlite3.connect(_data(path), isolation_level=None)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    with Store(path) as store, pytest.raises(StoreCorrupt, match="is not a collection"):
        store.get("c")


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS)))
def test_older_schemas_are_brought_up_to_date(tmp_path: Path, version: int) -> None:
    path = tmp_path / "store"
    with mock.patch.object(database, "MIGRATIONS", MIGRATIONS[:version]), Store(path) as store:
        store.create("c", dim=DIM, encoder_id="e").upsert(IDS, VECTORS, METADATA)
    forget_what_is_newer(path)
    old = sqlite3.connect(_data(path))
    assert old.execute("PRAGMA user_version").fetchone() == (version,)
    old.close()
    with (
        Store(path, read_only=True) as store,
        pytest.raises(StoreError, match="open it for writing once"),
    ):
        store.get("c")
    for _ in range(2):
        with Store(path) as store:
            collection = store.get("c")
            assert collection.info.count == 500
            assert collection.verify().ok
            assert collection.get(["item-00123"])[0].metadata == METADATA[123]
            assert collection.info.id_type == "string"
    new = sqlite3.connect(_data(path))
    assert new.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    new.close()


def test_a_migration_that_fails_leaves_the_old_version(path: Path, model: Model) -> None:
    broken = (*MIGRATIONS, "CREATE TABLE more (a); CREATE TABLE items (b)")
    with (
        mock.patch.object(database, "MIGRATIONS", broken),
        Store(path) as store,
        pytest.raises(StoreError, match="already exists"),
    ):
        store.get("c")
    with Store(path) as store:
        model.check_all(store.get("c"))


# Time


def test_nothing_depends_on_the_clock(
    path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for now in (2e9, 1.0, 1e9):  # forward, back to 1970, and between
        monkeypatch.setattr(time, "time", lambda now=now: now)
        monkeypatch.setattr(time, "time_ns", lambda now=now: int(now * 1e9))
        with Store(path) as store:
            collection = store.get("c")
            collection.upsert([f"at {now}"], VECTORS[:1], [{"late": now}])
            model.upsert([f"at {now}"], VECTORS[:1], [{"late": now}])
            collection.snapshot()
            model.check_all(collection)
    with Store(path) as store:
        model.check_search(store.get("c"), VECTORS[:3], 3, Exists("late"))
