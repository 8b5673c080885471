"""Runs that write feature maps and un-normalised vectors, stopped and taken up again."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from byol_cli.embed import command
from byol_serving.bundle import Bundle, FeatureMap
from byol_serving.encoder import Encoder
from byol_serving.errors import FailedPrecondition, InvalidConfig, StoreError
from byol_serving.images import decode
from byol_serving.indexing.columns import Columns, columns_of
from byol_serving.indexing.pipeline import run
from byol_serving.indexing.sinks import NpySink, ParquetSink, Sink
from byol_serving.indexing.stages import Row
from serving.piles import file_bytes, image_files, rows_in, small_plan, write_folder
from serving.support import DIM, reference, reference_cells, reference_raw

FILES = image_files(20)
NAMES = sorted(FILES)
PIXELS = np.stack([decode(FILES[name]) for name in NAMES])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images", FILES)


@pytest.fixture
def columns(bundle: Bundle) -> Columns:
    return columns_of(bundle.info, ["doubled", "cells"], normalize=False)


def tensors(table: pa.Table, name: str) -> NDArray[np.float32]:
    found: NDArray[np.float32] = table.column(name).combine_chunks().to_numpy_ndarray()
    return found


def test_parquet_has_a_tensor_a_stage_and_says_what_it_is(
    source: Path, encoder: Encoder, columns: Columns, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(small_plan(source, out), [encoder], ParquetSink(DIM, "abc", columns))
    table = pq.read_table(out)
    assert table["id"].to_pylist() == NAMES
    assert table.schema.field("cells").type == pa.fixed_shape_tensor(pa.float32(), (3, 4, 4))
    np.testing.assert_allclose(tensors(table, "cells"), reference_cells(PIXELS), atol=1e-6)
    np.testing.assert_allclose(tensors(table, "doubled"), 2 * reference_cells(PIXELS), atol=1e-6)
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, DIM)
    np.testing.assert_allclose(vectors, reference_raw(PIXELS), atol=1e-5)
    facts = {
        "normalized": False,
        "maps": {
            "doubled": {"shape": [3, 4, 4], "stride": 8},
            "cells": {"shape": [3, 4, 4], "stride": 8},
        },
    }
    assert json.loads(table.schema.metadata[b"byol.columns"]) == facts
    assert json.loads((out / "_byol" / "manifest.json").read_text())["columns"] == facts


def test_npy_has_a_file_a_stage(source: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [str(source), "--bundle", str(bundle.path), "--out", str(out), "--shard-size", "8"]
    ran = CliRunner().invoke(command, [*words, "--format", "npy", "--features", "cells", "-q"])
    assert ran.exit_code == 0, ran.output
    maps = [np.load(path) for path in sorted(out.glob("part-*.cells.npy"))]
    np.testing.assert_allclose(np.concatenate(maps), reference_cells(PIXELS), atol=1e-6)
    vectors = np.concatenate([np.load(path) for path in sorted(out.glob("part-?????.npy"))])
    np.testing.assert_allclose(vectors, reference(PIXELS), atol=1e-5)
    (out / "part-00001.cells.npy").unlink()  # made again, like any part
    before = file_bytes(out)
    ran = CliRunner().invoke(
        command, [*words, "--format", "npy", "--features", "cells", "--json", "-q"]
    )
    assert json.loads(ran.stdout)["done"] == 8
    after = file_bytes(out)
    assert after.keys() - before.keys() == {"part-00001.cells.npy"}
    np.testing.assert_array_equal(np.load(out / "part-00001.cells.npy"), maps[1])


SINKS: dict[str, Callable[[Columns], Sink]] = {
    "parquet": lambda columns: ParquetSink(DIM, "abc", columns),
    "npy": lambda columns: NpySink(DIM, columns),
}


@pytest.mark.parametrize("make", SINKS.values(), ids=SINKS)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    source: Path,
    encoder: Encoder,
    columns: Columns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Columns], Sink],
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(small_plan(source, whole, shard_size=2), [encoder], make(columns))
    failing = make(columns)
    write = failing.write

    def full(folder: Path, number: int, rows: Sequence[Row]) -> None:
        if number == 4:
            raise StoreError("the disk is full")
        write(folder, number, rows)

    monkeypatch.setattr(failing, "write", full)
    plan = small_plan(source, cut, shard_size=2)
    with pytest.raises(StoreError):
        run(plan, [encoder], failing)
    summary = run(plan, [encoder], make(columns))
    assert summary.skipped + summary.done == 20
    assert 8 <= summary.skipped <= 18
    assert file_bytes(cut) == file_bytes(whole)


@pytest.mark.parametrize("make", SINKS.values(), ids=SINKS)
def test_a_sync_carries_maps_over(
    source: Path,
    encoder: Encoder,
    columns: Columns,
    tmp_path: Path,
    make: Callable[[Columns], Sink],
) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    run(small_plan(source, out), [encoder], make(columns))
    (source / NAMES[0]).unlink()
    (source / "zebra").mkdir()
    (source / "zebra" / "1.png").write_bytes(FILES[NAMES[3]])
    summary = run(small_plan(source, out, sync=True), [encoder], make(columns))
    assert (summary.done, summary.removed) == (1, 1)
    run(small_plan(source, fresh, batch_size=4), [encoder], make(columns))
    for path in fresh.glob("part-*.npy"):
        np.testing.assert_allclose(np.load(out / path.name), np.load(path), atol=1e-6)
    for path in fresh.glob("part-*.parquet"):
        ours, theirs = pq.read_table(out / path.name), pq.read_table(path)
        for name in ("cells", "doubled"):
            np.testing.assert_allclose(tensors(ours, name), tensors(theirs, name), atol=1e-6)


def test_an_output_goes_on_with_the_columns_it_was_begun_with(
    source: Path, encoder: Encoder, columns: Columns, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(small_plan(source, out), [encoder], ParquetSink(DIM, "abc"))
    with pytest.raises(InvalidConfig, match=r"was begun with columns {}, not {'normalized': False"):
        run(small_plan(source, out), [encoder], ParquetSink(DIM, "abc", columns))
    manifest = out / "_byol" / "manifest.json"
    facts = json.loads(manifest.read_text())
    del facts["columns"]  # as it was before there were any
    manifest.write_text(json.dumps(facts))
    assert run(small_plan(source, out), [encoder], ParquetSink(DIM, "abc")).skipped == 20
    assert "cells" not in next(iter(rows_in(out).values()))


def test_what_cannot_be_written(
    source: Path, bundle: Bundle, encoder: Encoder, tmp_path: Path
) -> None:
    for stages in (["layer9"], ["cells", "cells"]):
        with pytest.raises(InvalidConfig, match=r"stages that encoder 'tiny' offers \(cells"):
            columns_of(bundle.info, stages, normalize=True)
    old = replace(bundle.info, raw_embedding=False, features=())
    with pytest.raises(InvalidConfig, match="none: export it with byol export --features"):
        columns_of(old, ["cells"], normalize=True)
    with pytest.raises(FailedPrecondition, match="export it again"):
        columns_of(old, [], normalize=False)
    huge = Columns(maps=(FeatureMap(name="cells", channels=512, side=56, stride=4),))
    with pytest.raises(InvalidConfig, match=r"over 1073741824 bytes; set --shard-size to at most"):
        run(small_plan(source, tmp_path, shard_size=4096), [encoder], ParquetSink(DIM, "abc", huge))
