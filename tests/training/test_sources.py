"""Shards, tables and lists give the images that a folder gives."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from byol_serving.errors import InvalidSource
from byol_training.data import Images, list_images, load_images, read_images
from byol_training.sources import list_source, stamp
from training.test_data import pack, png, write


def shades(images: Images) -> list[int]:
    return [int(v) for v in images.pixels[:, 0, 0, 0]]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    pack(tmp_path / "s-0.tar", {"a.png": png(1), "a.cls": b"0", "b.png": png(2)})
    pack(tmp_path / "s-1.tar", {"c.png": png(3), "a.png": png(4), "bad.jpg": b"no"})
    return tmp_path


@pytest.mark.parametrize("name", ["", "s-{0..1}.tar"])
def test_tar_shards(shards: Path, name: str) -> None:
    images = load_images(shards / name, 8)
    assert images.names == ["a.png", "a@s-1.png", "b.png", "c.png"]
    assert shades(images) == [1, 4, 2, 3]
    assert images.labels is None
    assert [r.path for r in images.rejected] == ["bad.jpg"]
    assert dict(read_images(shards / name, ["a@s-1.png"])) == {"a@s-1.png": png(4)}


def test_missing_shards_are_named(shards: Path) -> None:
    with pytest.raises(InvalidSource, match=r"1 of the 3 shards .* the first: s-2.tar"):
        load_images(shards / "s-{0..2}.tar", 8)


@pytest.mark.parametrize("labelled", [True, False])
def test_parquet(tmp_path: Path, labelled: bool) -> None:
    pa = pytest.importorskip("pyarrow", reason="an extra of its own")
    import pyarrow.parquet as pq

    rows: list[bytes | None] = [png(1), png(2), b"no", None]
    column: Any = [{"bytes": row, "path": None} for row in rows] if labelled else rows
    columns: dict[str, Any] = {"image": column}
    if labelled:
        columns["label"] = [1, 0, 0, 1]
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    for source in (tmp_path, tmp_path / "t.parquet"):
        images = load_images(source, 8)
        assert sorted(shades(images)) == [1, 2]
        assert len(images.rejected) == 2
        assert images.classes == (["0", "1"] if labelled else [])


def test_a_table_without_images(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="an extra of its own")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "t.parquet")
    with pytest.raises(InvalidSource, match="no column of bytes among x"):
        load_images(tmp_path / "t.parquet", 8)
    (tmp_path / "u.parquet").write_bytes(b"nothing")
    with pytest.raises(InvalidSource, match="no readable Parquet file"):
        load_images(tmp_path / "u.parquet", 8)


def test_list(tmp_path: Path) -> None:
    write(tmp_path, {"x/1.png": png(1), "y/2.png": png(2), "y/3.png": png(3)})
    (tmp_path / "some.txt").write_text("# those that matter\ny/3.png\n\nx/1.png\ny/gone.png\n")
    images = load_images(tmp_path / "some.txt", 8)
    assert images.names == ["x/1.png", "y/3.png"]
    assert shades(images) == [1, 3]
    assert [r.path for r in images.rejected] == ["y/gone.png"]
    (tmp_path / "no.txt").write_bytes(bytes(range(128, 256)))
    with pytest.raises(InvalidSource, match="cannot be read as a list"):
        load_images(tmp_path / "no.txt", 8)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InvalidSource, match=r"cannot be listed \(Permission denied\); check its"):
        load_images(tmp_path, 8)


def test_listing_is_one_pass_and_reads_nothing(tmp_path: Path) -> None:
    """20,000 files in a small part of 10 s (0.15 s when idle): a million in seconds."""
    for folder in range(20):
        (tmp_path / str(folder)).mkdir()
        for number in range(1000):
            (tmp_path / str(folder) / f"{number}.jpg").touch()
    started = time.monotonic()
    names = list_images(tmp_path)
    assert time.monotonic() - started < 10
    assert len(names) == 20_000
    assert names == sorted(names)


def test_the_stamp_changes_with_any_file(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": png(1), "b.png": png(2)})
    before = stamp(list_source(tmp_path))
    assert stamp(list_source(tmp_path)) == before
    os.utime(tmp_path / "b.png", ns=(1, 1))
    assert stamp(list_source(tmp_path)) != before
