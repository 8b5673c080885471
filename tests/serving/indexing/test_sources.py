"""Each kind of source gives the same images, names and metadata; a damaged one is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidSource
from byol_serving.indexing.sources import open_source
from serving.piles import assert_vectors, embed, image_files, rows_in, write_folder, write_tar

FILES = image_files(10)
LABELS = {name: {"label": name.split("/")[0]} for name in FILES}


def as_folder(root: Path) -> Path:
    return write_folder(root / "folder", FILES)


def as_tar(root: Path) -> Path:
    return write_tar(root / "images.tar", FILES)


def as_gz(root: Path) -> Path:
    return write_tar(root / "images.tar.gz", FILES, "w:gz")


def as_tgz(root: Path) -> Path:
    return write_tar(root / "images.tgz", FILES, "w:gz")


def as_bz2(root: Path) -> Path:
    return write_tar(root / "images.tar.bz2", FILES, "w:bz2")


def as_xz(root: Path) -> Path:
    return write_tar(root / "images.tar.xz", FILES, "w:xz")


@pytest.mark.parametrize("make", [as_folder, as_tar, as_gz, as_tgz, as_bz2, as_xz])
def test_folders_and_archives_name_images_by_path_and_label_them_by_folder(
    make: Callable[[Path], Path], encoder: Encoder, tmp_path: Path
) -> None:
    summary = embed(make(tmp_path), tmp_path / "out", encoder)
    rows = rows_in(tmp_path / "out")
    assert (summary.done, summary.rejected, summary.total) == (10, 0, 10)
    assert {name: row["metadata"] for name, row in rows.items()} == LABELS
    assert {name: row["bytes"] for name, row in rows.items()} == {
        name: len(data) for name, data in FILES.items()
    }
    assert_vectors(rows, FILES, encoder)


def test_a_list_of_paths_relative_to_itself(encoder: Encoder, tmp_path: Path) -> None:
    write_folder(tmp_path / "images", FILES)
    lines = ["# chosen by hand", "", *(f"images/{name}" for name in FILES), "images/none.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    summary = embed(tmp_path / "list.txt", tmp_path / "out", encoder)
    assert (summary.done, summary.rejected) == (10, 1)
    rows = rows_in(tmp_path / "out")
    assert_vectors(rows, {f"images/{name}": data for name, data in FILES.items()}, encoder)


@pytest.mark.parametrize("place", ["shards", "shards/*.tar"])
def test_webdataset_shards_bring_metadata_beside_each_image(
    place: str, encoder: Encoder, tmp_path: Path
) -> None:
    (tmp_path / "shards").mkdir()
    names = list(FILES)
    for number, some in enumerate((names[:6], names[6:])):
        members: dict[str, bytes] = {}
        for at, name in enumerate(some):
            members[f"{number}{at}.png"] = FILES[name]
            members[f"{number}{at}.json"] = json.dumps({"was": name, "n": at}).encode()
            members[f"{number}{at}.cls"] = b"3"
        write_tar(tmp_path / "shards" / f"{number}.tar", members)
    embed(tmp_path / place, tmp_path / "out", encoder)
    rows = rows_in(tmp_path / "out")
    assert rows.keys() == {
        f"{n}.tar/{n}{at}.png" for n, count in ((0, 6), (1, 4)) for at in range(count)
    }
    assert rows["1.tar/12.png"]["metadata"] == {"was": names[8], "n": 2}
    assert_vectors({row["metadata"]["was"]: row for row in rows.values()}, FILES, encoder)


def test_sidecars_beside_files_by_either_name(encoder: Encoder, tmp_path: Path) -> None:
    files = dict(list(FILES.items())[:3])
    first, second, third = files
    source = write_folder(tmp_path / "folder", files)
    (source / f"{first}.json").write_text('{"title": "Tom", "label": "tiger"}')
    (source / second).with_suffix(".json").write_text('{"tags": ["a", "b"]}')
    (source / f"{third}.json").write_text("[1, 2]")
    summary = embed(source, tmp_path / "out", encoder)
    rows = rows_in(tmp_path / "out")
    assert rows[first]["metadata"] == {"title": "Tom", "label": "tiger"}
    assert rows[second]["metadata"] == {"label": "dog", "tags": ["a", "b"]}
    assert third not in rows
    assert "is not a JSON object" in summary.rejected_file.read_text()


@pytest.mark.parametrize("row_group_size", [3, 100])
def test_parquet_with_bytes_ids_and_columns(
    row_group_size: int, encoder: Encoder, tmp_path: Path
) -> None:
    table = pa.table(
        {
            "id": list(FILES),
            "image": [{"bytes": data, "path": name} for name, data in FILES.items()],
            "price": [number / 2 for number in range(10)],
            "day": pa.array([None, *range(9)], pa.date32()),
        }
    )
    pq.write_table(table, tmp_path / "images.parquet", row_group_size=row_group_size)
    embed(tmp_path / "images.parquet", tmp_path / "out", encoder)
    rows = rows_in(tmp_path / "out")
    assert_vectors(rows, FILES, encoder)
    names = list(FILES)
    assert rows[names[0]]["metadata"] == {"path": names[0], "price": 0.0}
    assert rows[names[4]]["metadata"] == {"path": names[4], "price": 2.0, "day": "1970-01-04"}


def test_parquet_with_plain_bytes_named_by_option(encoder: Encoder, tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"key": range(10), "picture": list(FILES.values()), "name": list(FILES)}),
        tmp_path / "images.parquet",
    )
    with pytest.raises(InvalidSource, match="has no image column"):
        embed(tmp_path / "images.parquet", tmp_path / "out", encoder)
    with pytest.raises(InvalidSource, match="has no column nome; it has key, picture, name"):
        embed(
            tmp_path / "images.parquet",
            tmp_path / "out2",
            encoder,
            image_column="picture",
            id_column="nome",
        )
    embed(
        tmp_path / "images.parquet",
        tmp_path / "out3",
        encoder,
        image_column="picture",
        id_column="name",
    )
    rows = rows_in(tmp_path / "out3")
    assert_vectors(rows, FILES, encoder)
    assert [rows[name]["metadata"] for name in FILES] == [{"key": number} for number in range(10)]


def test_parquet_shards_with_paths_and_rows_for_names(encoder: Encoder, tmp_path: Path) -> None:
    names = list(FILES)
    write_folder(tmp_path / "shards" / "images", FILES)
    shards: list[list[str | None]] = [[*names[:6]], [*names[6:], None]]
    for number, some in enumerate(shards):
        paths = [name and f"images/{name}" for name in some]
        table = pa.table({"path": paths, "n": range(len(paths))})
        pq.write_table(table, tmp_path / "shards" / f"{number}.parquet")
    summary = embed(tmp_path / "shards", tmp_path / "out", encoder)
    rows = rows_in(tmp_path / "out")
    assert summary.rejected == 1
    assert "holds a NoneType, no image" in summary.rejected_file.read_text()
    assert rows["1.parquet#3"]["metadata"] == {"path": f"images/{names[9]}", "n": 3}
    assert_vectors(
        {row["metadata"]["path"].removeprefix("images/"): row for row in rows.values()},
        FILES,
        encoder,
    )


def test_what_is_no_source_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.doc").write_text("hello")
    (tmp_path / "short.tar").write_bytes(
        write_tar(tmp_path / "whole.tar", FILES).read_bytes()[:999]
    )
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    for name, reason in {
        "nowhere": "does not exist",
        "notes.doc": "is of no known kind",
        "empty": "holds no image",
        "short.tar": "cannot be read as a tar",
        "broken.parquet": "cannot be read as Parquet",
    }.items():
        with pytest.raises(InvalidSource, match=reason):
            embed(tmp_path / name, tmp_path / f"out-{name}", encoder)


def test_a_folder_is_listed_in_the_order_of_full_paths(tmp_path: Path) -> None:
    names = ["a.png", "a/1.png", "a/b/2.png", "a-b/3.png", "b.png", ".hidden.png", "notes.txt"]
    write_folder(tmp_path, dict.fromkeys(names, b""))
    (tmp_path / "loop").symlink_to(tmp_path)
    found = [entry.name for entry in open_source(tmp_path).entries()]
    assert found == sorted(name for name in names if name.endswith("png") and name[0] != ".")
    assert open_source(tmp_path).count() == len(found)
