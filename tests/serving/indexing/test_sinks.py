"""Where rows go: files that others read, and collections."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from byol_serving.collections.store import Store
from byol_serving.encoder import Encoder
from byol_serving.errors import StoreCorrupt
from byol_serving.indexing.journal import Journal, Manifest
from byol_serving.indexing.pipeline import run
from byol_serving.indexing.sinks import CollectionSink, NpySink, ParquetSink, Sink
from byol_serving.indexing.stages import Row
from serving.piles import assert_close, image_files, small_plan, write_folder
from serving.support import DIM

FILES = image_files(20)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images", FILES)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as store:
        yield store


def test_parquet_has_a_plain_schema_and_hides_the_journal(
    source: Path, encoder: Encoder, tmp_path: Path
) -> None:
    info = encoder.bundle.info
    summary = run(
        small_plan(source, tmp_path / "out"), [encoder], ParquetSink(info.dim, info.encoder_id)
    )
    table = pq.read_table(tmp_path / "out")  # the whole folder, as pandas would
    assert table.schema.names == ["id", "embedding", "source", "bytes", "metadata"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), DIM)
    assert table.schema.metadata[b"byol.encoder_id"].decode() == info.encoder_id
    assert table.num_rows == 20
    assert {path.name for path in (tmp_path / "out").glob("*")} == {
        "_byol",
        *(f"part-{number:05d}.parquet" for number in range(3)),
    }
    assert summary.shards == 3
    sources = table.column("source").to_pylist()
    assert [Path(path).read_bytes() for path in sources] == [
        FILES[i] for i in table["id"].to_pylist()
    ]


def test_npy_shards_and_their_texts(source: Path, encoder: Encoder, tmp_path: Path) -> None:
    run(small_plan(source, tmp_path / "out"), [encoder], NpySink(DIM))
    vectors = np.concatenate([np.load(path) for path in sorted((tmp_path / "out").glob("*.npy"))])
    lines = [
        json.loads(line)
        for path in sorted((tmp_path / "out").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert vectors.shape == (20, DIM)
    assert vectors.dtype == np.float32
    assert [line["id"] for line in lines] == sorted(FILES)
    assert lines[0]["metadata"] == {"label": "cat"}
    pairs = zip(vectors, (FILES[line["id"]] for line in lines), strict=True)
    assert_close(pairs, encoder)


def test_a_collection_on_this_machine(
    source: Path, encoder: Encoder, store: Store, tmp_path: Path
) -> None:
    collection = store.create("pets", dim=DIM, encoder_id=encoder.bundle.info.encoder_id)
    plan = small_plan(source, tmp_path / "journal")
    run(plan, [encoder], CollectionSink("pets", collection))
    items = collection.get(sorted(FILES), with_vectors=True)
    assert collection.info.count == 20
    assert items[1].metadata == {"label": "cat"}
    vectors = [item.vector for item in items if item.vector is not None]
    assert_close(zip(vectors, (FILES[item.id] for item in items), strict=True), encoder)


def test_a_collection_that_was_dropped_meanwhile_is_filled_again(
    source: Path, encoder: Encoder, store: Store, tmp_path: Path
) -> None:
    encoder_id = encoder.bundle.info.encoder_id
    plan = small_plan(source, tmp_path / "journal")
    first = CollectionSink("pets", store.create("pets", dim=DIM, encoder_id=encoder_id))
    assert run(plan, [encoder], first).done == 20
    assert run(plan, [encoder], first).done == 0
    store.get("pets").delete(["cat/000.png", "cat/002.png"])  # on purpose: stays away
    assert run(plan, [encoder], first).done == 0
    assert store.get("pets").info.count == 18
    store.drop("pets")
    again = CollectionSink("pets", store.create("pets", dim=DIM, encoder_id=encoder_id))
    assert run(plan, [encoder], again).done == 20
    assert store.get("pets").info.count == 20


ROWS = [
    Row("plain", np.arange(DIM, dtype=np.float32), "/a/b.png", 12, '{"label":"x"}'),
    Row("ünï\u2028cödé \"'\n", np.full(DIM, 0.1, np.float32), "s3://b/c", 2**40, "{}"),
    Row("odd", np.full(DIM, -1e-30, np.float32), "", 0, '{"a":[1,{"b":"\x85"}],"c":null}'),
]


@pytest.mark.parametrize("sink", [ParquetSink(DIM, "abc"), NpySink(DIM)], ids=["parquet", "npy"])
def test_files_give_back_what_was_written(sink: Sink, tmp_path: Path) -> None:
    for number, rows in enumerate((ROWS, [])):
        sink.write(tmp_path, number, rows)
        assert sink.holds(tmp_path, number, [])
        found = sink.read(tmp_path, number)
        assert found is not None
        assert list(found) == [row.id for row in rows]
        for row in rows:
            same = found[row.id]
            np.testing.assert_array_equal(same.vector, row.vector)
            assert (same.source, same.size, same.metadata) == (row.source, row.size, row.metadata)
    assert not sink.holds(tmp_path, 2, [])


@pytest.mark.parametrize("sink", [ParquetSink(DIM, "abc"), NpySink(DIM)], ids=["parquet", "npy"])
def test_a_damaged_file_is_named(sink: Sink, tmp_path: Path) -> None:
    sink.write(tmp_path, 0, ROWS)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StoreCorrupt, match=r"part-00000\.\w+ is damaged"):
        sink.read(tmp_path, 0)


def test_a_journal_that_is_damaged_is_named(tmp_path: Path) -> None:
    manifest = Manifest(encoder_id="e", source="s", shard_size=1, ids="name", output="o")
    with Journal(tmp_path, manifest) as journal:
        journal.finish(0, [], staged=False)
        (journal.state / "journal" / "part-00000.jsonl").write_text('["a"')
        with pytest.raises(StoreCorrupt, match="delete it"):
            journal.record(0)
    (tmp_path / "_byol" / "manifest.json").write_text("{")
    with pytest.raises(StoreCorrupt, match="is damaged"):
        Journal(tmp_path, manifest)
    (tmp_path / "_byol" / "manifest.json").unlink()
    with pytest.raises(StoreCorrupt, match="missing beside a journal"):
        Journal(tmp_path, manifest)
