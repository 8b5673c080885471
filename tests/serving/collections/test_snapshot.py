"""Snapshots: used where they can be trusted, rebuilt where they cannot."""

import json
import logging
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from byol_serving.collections import snapshot
from byol_serving.collections.index import IndexOptions
from byol_serving.collections.store import Store
from serving.collections.model import Model, clustered

DIM = 8
OPTIONS = IndexOptions(approximate_from=64, absorb_from=16, compact_from=8)
IDS = [f"i{n}" for n in range(300)]
VECTORS = clustered(300, DIM)


def _fill(path: Path, index: str = "flat", *, snapshots: int = 1) -> Model:
    """A store whose snapshots cover 300, 280, ... items, and that was left as by a crash."""
    model = Model()
    with Store(path / "live", options=OPTIONS) as store:
        collection = store.create("c", dim=DIM, encoder_id="e", index=index)  # type: ignore[arg-type]
        collection.upsert(IDS, VECTORS)
        model.upsert(IDS, VECTORS)
        collection.settle()
        for n in range(snapshots):
            collection.snapshot()
            gone = IDS[n * 20 : n * 20 + 20]
            assert collection.delete(gone) == model.delete(gone)
        added = clustered(30, DIM, seed=3)
        collection.upsert([f"late{n}" for n in range(30)], added)
        model.upsert([f"late{n}" for n in range(30)], added)
        shutil.copytree(path / "live", path / "store")  # as it is on disk right now
    shutil.rmtree(path / "live")
    return model


def _check(path: Path, model: Model) -> None:
    with Store(path / "store", options=OPTIONS) as store:
        assert store.failed == {}
        collection = store.get("c")
        model.check_all(collection)
        if collection.info.index == "flat":
            model.check_search(collection, VECTORS[:5], 20)


def _files(path: Path, suffix: str) -> list[Path]:
    return sorted((path / "store" / "c").glob(f"index-*{suffix}"))


@pytest.mark.parametrize("index", ["flat", "hnsw", "ivf"])
def test_a_start_catches_up_from_the_snapshot(
    tmp_path: Path, index: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = _fill(tmp_path, index, snapshots=2)
    assert len(_files(tmp_path, ".json")) == 2
    assert len(_files(tmp_path, ".faiss")) == (0 if index == "flat" else 2)
    with caplog.at_level(logging.WARNING):
        _check(tmp_path, model)
    assert caplog.messages == []


def _flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x10
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": lambda file: _flip(file, file.stat().st_size // 2),
    "first byte": lambda file: _flip(file, 0),
    "last byte": lambda file: _flip(file, -1),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("suffix", [".json", ".vectors", ".faiss"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_snapshot_is_seen_and_made_good(
    tmp_path: Path, suffix: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = _fill(tmp_path, "ivf")
    (file,) = _files(tmp_path, suffix)
    DAMAGE[damage](file)
    with caplog.at_level(logging.WARNING):
        _check(tmp_path, model)
    missing_manifest = (suffix, damage) == (".json", "missing")
    assert missing_manifest or "rebuilding from the store" in caplog.text
    # The store was closed in good order, so there is a sound one now.
    caplog.clear()
    _check(tmp_path, model)
    assert caplog.messages == []
    assert len(_files(tmp_path, ".json")) >= 1


def test_the_snapshot_before_serves_where_the_newest_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = _fill(tmp_path, snapshots=2)
    older, newer = _files(tmp_path, ".vectors")
    _flip(newer, 100)
    kept = older.stat().st_ino
    with Store(tmp_path / "store", options=OPTIONS) as store:
        assert f"{newer.stem}.json is not used" in caplog.text
        assert caplog.text.count("is not used") == 1
        assert older.stat().st_ino == kept
        model.check_all(store.get("c"))


def test_a_snapshot_of_another_collection_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _fill(tmp_path / "one")
    foreign = tmp_path / "foreign"
    (tmp_path / "one" / "store" / "c").rename(foreign)
    model = _fill(tmp_path)
    for file in _files(tmp_path, ""):
        file.unlink()
    for file in foreign.glob("index-*"):
        shutil.copy(file, tmp_path / "store" / "c" / file.name)
    _check(tmp_path, model)
    assert "belongs to another collection" in caplog.text


def test_a_database_put_back_from_a_backup_outvotes_newer_snapshots(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "store" / "c"
    model = Model()
    with Store(tmp_path / "store") as store:
        collection = store.create("c", dim=DIM, encoder_id="e")
        collection.upsert(IDS[:30], VECTORS[:30])
        model.upsert(IDS[:30], VECTORS[:30])
        collection.backup(tmp_path / "then.sqlite3")
        collection.upsert(IDS, VECTORS)
    shutil.copy(tmp_path / "then.sqlite3", folder / "data.sqlite3")
    for log in folder.glob("data.sqlite3-*"):
        log.unlink()
    _check(tmp_path, model)
    assert "the store ends at" in caplog.text


def test_rows_that_a_snapshot_lacks_make_it_worthless(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its checksums hold and its manifest is plausible, yet an item is missing."""
    model = _fill(tmp_path)
    (manifest,) = _files(tmp_path, ".json")
    facts = json.loads(manifest.read_text())
    file = manifest.with_suffix(".vectors")
    rows = np.delete(np.fromfile(file, np.int64, 300), 150)
    vectors = np.fromfile(file, np.float32, offset=300 * 8).reshape(300, DIM)
    content = rows.tobytes() + np.delete(vectors, 150, axis=0).tobytes()
    file.write_bytes(content)
    facts |= {"size": 299, "vectors_crc": zlib.crc32(content)}
    del facts["crc"]
    manifest.write_text(snapshot.sealed(facts))
    _check(tmp_path, model)
    assert "lacks stored rows" in caplog.text


def test_old_snapshots_and_unfinished_files_go(tmp_path: Path) -> None:
    _fill(tmp_path, "ivf", snapshots=4)
    (tmp_path / "store" / "c" / "index-9999.vectors.tmp").write_bytes(b"half")
    with Store(tmp_path / "store", options=OPTIONS) as store:
        store.get("c").snapshot()
    assert len(_files(tmp_path, ".json")) == 2
    assert len(_files(tmp_path, "")) == 6
