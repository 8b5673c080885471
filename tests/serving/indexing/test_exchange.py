"""Items to Parquet and back: exact, row group by row group, clear about what is no such file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from byol_serving.collections.types import Item
from byol_serving.errors import InvalidSource
from byol_serving.indexing import exchange
from byol_serving.indexing.exchange import files_of, header_of, read_items, write_items

DIM = 3
ROWS = np.random.default_rng(4).standard_normal((50, DIM)).astype(np.float32)
ITEMS = [
    Item(id=f"ü{n}", metadata={"n": n, "deep": [None, {"x": 0.5}]} if n % 2 else {}, vector=row)
    for n, row in enumerate(ROWS)
]


def test_what_was_written_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "ROWS_PER_GROUP", 20)
    path = tmp_path / "new" / "items.parquet"
    assert write_items(path, iter(ITEMS), dim=DIM, encoder_id="e1") == 50
    assert pq.ParquetFile(path).metadata.num_row_groups == 3
    header = header_of(files_of(path))
    assert (header.dim, header.encoder_id, header.rows) == (DIM, "e1", 50)
    batches = list(read_items(path))
    assert [len(batch.ids) for batch in batches] == [20, 20, 10]
    assert [each for batch in batches for each in batch.ids] == [item.id for item in ITEMS]
    assert [each for batch in batches for each in batch.metadata] == [i.metadata for i in ITEMS]
    np.testing.assert_array_equal(np.concatenate([batch.vectors for batch in batches]), ROWS)
    assert [each.name for each in path.parent.iterdir()] == ["items.parquet"]


def test_integer_ids_are_a_column_of_integers(tmp_path: Path) -> None:
    numbers = [7, -(2**63), 2**63 - 1]
    items = [Item(id=str(n), metadata={}, vector=ROWS[0]) for n in numbers]
    path = tmp_path / "items.parquet"
    write_items(path, items, dim=DIM, encoder_id="e", id_type="int64")
    assert pq.read_table(path).column("id").to_pylist() == numbers
    assert header_of([path]).id_type == "int64"
    assert [each for batch in read_items(path) for each in batch.ids] == [i.id for i in items]
    write_items(tmp_path / "text.parquet", items, dim=DIM, encoder_id="e")
    assert header_of([tmp_path / "text.parquet"]).id_type == "string"
    with pytest.raises(InvalidSource, match="'int64'"):
        header_of([tmp_path / "text.parquet", path])


def test_an_export_that_fails_leaves_nothing_new(tmp_path: Path) -> None:
    def broken() -> Iterator[Item]:
        yield ITEMS[0]
        raise KeyboardInterrupt

    path = tmp_path / "items.parquet"
    write_items(path, ITEMS[:2], dim=DIM, encoder_id="e")
    with pytest.raises(KeyboardInterrupt):
        write_items(path, broken(), dim=DIM, encoder_id="e")
    assert [each.name for each in tmp_path.iterdir()] == ["items.parquet"]
    assert header_of([path]).rows == 2
    assert write_items(tmp_path / "none.parquet", [], dim=DIM, encoder_id="e") == 0
    assert list(read_items(tmp_path / "none.parquet")) == []


def test_the_files_of_a_folder_belong_together(tmp_path: Path) -> None:
    for n, encoder in enumerate(("e", "e", "f")):
        write_items(tmp_path / f"part-{n}.parquet", ITEMS[:5], dim=DIM, encoder_id=encoder)
    files = files_of(tmp_path)
    assert [each.name for each in files] == [f"part-{n}.parquet" for n in range(3)]
    assert header_of(files[:2]).rows == 10
    with pytest.raises(InvalidSource, match=r"part-2\.parquet has dimension, encoder and ids"):
        header_of(files)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidSource, match="no folder with one"):
        files_of(tmp_path / "empty")


def vectors(values: list[Any]) -> pa.Array:
    return pa.array(values, pa.list_(pa.float32(), DIM))


GOOD = vectors([[1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"name": ["a"], "embedding": GOOD}, "no column 'id'; it has name, embedding"),
        ({"id": ["a"]}, "no column 'embedding'"),
        ({"id": ["a"], "embedding": [[1.0, 2.0]]}, "wanted a fixed-size list"),
        ({"id": ["a", None], "embedding": vectors([[1.0] * 3] * 2)}, "empty id"),
        ({"id": ["a", "b"], "embedding": vectors([[1.0] * 3, None])}, "empty id, embedding"),
        ({"id": ["a"], "embedding": GOOD, "metadata": ["[1]"]}, "not a JSON object"),
        ({"id": ["a"], "embedding": GOOD, "metadata": ["{"]}, "not a JSON object"),
    ],
)
def test_files_that_hold_no_items(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = tmp_path / "odd.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(InvalidSource, match=message):
        list(read_items(path))


def test_a_file_of_others_needs_no_metadata(tmp_path: Path) -> None:
    path = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"id": ["a"], "embedding": GOOD, "more": [1]}), path)
    (batch,) = read_items(path)
    assert (batch.ids, batch.metadata, batch.vectors.tolist()) == (["a"], [{}], [[1.0, 2.0, 3.0]])
    assert header_of([path]).encoder_id == ""
    path.write_bytes(b"not Parquet")
    with pytest.raises(InvalidSource, match="cannot be read as Parquet"):
        header_of([path])
