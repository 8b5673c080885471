"""A store: its folder, its lock, and the life of its collections."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from byol_serving.collections.store import Store
from byol_serving.errors import (
    AlreadyExists,
    InvalidRequest,
    StoreError,
    StoreLocked,
    Unavailable,
    UnknownCollection,
)

EYE = np.eye(4, dtype=np.float32)


def test_collections_come_back_after_a_restart(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        made = store.create("one", dim=4, encoder_id="e", index="hnsw")
        made.upsert(["a", "b"], EYE[:2], [{"n": 1}, {}])
        store.create("two", dim=7, encoder_id="f")
        before = store.list()
    with Store(tmp_path) as store:
        assert store.list() == before
        assert [(each.name, each.dim, each.encoder_id, each.count) for each in before] == [
            ("one", 4, "e", 2),
            ("two", 7, "f", 0),
        ]
        item = store.get("one").get(["a"], with_vectors=True)[0]
        assert item.metadata == {"n": 1}
        np.testing.assert_array_equal(item.vector, EYE[0])
        assert store.failed == {}


def test_names_dimensions_and_kinds_are_checked(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for name in ("", ".", "..", "a/b", ".lock", "é", "a" * 65, "-a", "a\n"):
            with pytest.raises(InvalidRequest, match="collection name"):
                store.create(name, dim=4, encoder_id="e")
        for dim in (0, -1, 65_537):
            with pytest.raises(InvalidRequest, match=f"dimension {dim}"):
                store.create("a", dim=dim, encoder_id="e")
        with pytest.raises(InvalidRequest, match="index kind 'tree'"):
            store.create("a", dim=4, encoder_id="e", index="tree")  # type: ignore[arg-type]
        store.create("a" * 64, dim=65_536, encoder_id="e")
        with pytest.raises(AlreadyExists, match="exists"):
            store.create("a" * 64, dim=4, encoder_id="e")
        assert [each.name for each in store.list()] == ["a" * 64]


def test_a_dropped_collection_is_gone_and_its_name_free(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        old = store.create("a", dim=4, encoder_id="e")
        old.upsert(["x"], EYE[:1])
        store.drop("a")
        for call in (lambda: old.get(["x"]), lambda: old.upsert(["y"], EYE[:1]), lambda: old.info):
            with pytest.raises(UnknownCollection, match="was dropped"):
                call()
        with pytest.raises(UnknownCollection, match="no collection 'a'"):
            store.get("a")
        with pytest.raises(UnknownCollection):
            store.drop("a")
        assert store.create("a", dim=3, encoder_id="f").info.count == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == [".lock", "a"]


def test_leftovers_of_a_creation_or_drop_are_swept(tmp_path: Path) -> None:
    Store(tmp_path).close()
    for name in (".new-1", ".trash-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.sqlite3").write_bytes(b"half")
    with Store(tmp_path) as store:
        assert store.list() == []
    assert [each.name for each in tmp_path.iterdir()] == [".lock"]


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path)
    collection = store.create("a", dim=4, encoder_id="e")
    store.close()
    store.close()
    for call in (store.list, lambda: store.get("a"), lambda: collection.search(EYE, 1)):
        with pytest.raises(Unavailable, match="closed"):
            call()


OWNER = """
import sys, time
from byol_serving.collections.store import Store
store = Store(sys.argv[1], read_only=sys.argv[2] == "shared")
print("held", flush=True)
time.sleep(60)
"""


def _owner(path: Path, mode: str) -> subprocess.Popen[str]:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(path), mode], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    return owner


def test_a_second_owner_is_told_who_the_first_is(tmp_path: Path) -> None:
    with _owner(tmp_path, "alone") as owner:
        for read_only in (False, True):
            with pytest.raises(StoreLocked, match=f"in use by process {owner.pid}"):
                Store(tmp_path, read_only=read_only)
        owner.kill()
    Store(tmp_path).close()


def test_many_may_read_while_nobody_writes(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.create("a", dim=4, encoder_id="e").upsert(["x"], EYE[:1])
        with pytest.raises(StoreLocked, match=f"in use by process {os.getpid()}"):
            Store(tmp_path)
    with _owner(tmp_path, "shared") as owner, Store(tmp_path, read_only=True) as store:
        assert store.get("a").search(EYE[:1], 1)[0][0].id == "x"
        with pytest.raises(StoreLocked):
            Store(tmp_path)
        owner.kill()


def test_a_read_only_store_refuses_every_change(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        Store(tmp_path / "absent", read_only=True)
    with Store(tmp_path) as store:
        store.create("a", dim=4, encoder_id="e").upsert(["x"], EYE[:1])
    files = {each: each.read_bytes() for each in (tmp_path / "a").iterdir()}
    with Store(tmp_path, read_only=True) as store:
        collection = store.get("a")
        for call in (
            lambda: store.create("b", dim=4, encoder_id="e"),
            lambda: store.drop("a"),
            lambda: collection.upsert(["y"], EYE[:1]),
            lambda: collection.set_metadata(["x"], [{}]),
            lambda: collection.delete(["x"]),
        ):
            with pytest.raises(StoreError, match="read-only"):
                call()
        assert collection.get(["x"])[0].id == "x"
        assert collection.verify().ok
    assert {each: each.read_bytes() for each in (tmp_path / "a").iterdir()} == files


def test_a_backup_is_a_store_of_its_own(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        collection = store.create("a", dim=4, encoder_id="e")
        collection.upsert(["x", "y"], EYE[:2], [{"n": 1}, {"n": 2}])
        store.create("empty", dim=2, encoder_id="f")
        store.backup(tmp_path / "copy")
        collection.delete(["x"])
        with pytest.raises(InvalidRequest, match="exists"):
            store.backup(tmp_path / "copy")
        with Store(tmp_path / "copy") as copy:
            assert [(each.name, each.count) for each in copy.list()] == [("a", 2), ("empty", 0)]
            assert copy.get("a").get(["x"])[0].metadata == {"n": 1}
            assert copy.get("a").verify().ok
    assert sorted(each.name for each in tmp_path.iterdir()) == ["copy", "store"]
