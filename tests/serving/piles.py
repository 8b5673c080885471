"""Piles of images in every form that a source may have, and what a run makes of them."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from byol_serving.encoder import Encoder
from byol_serving.images import load_input
from byol_serving.indexing.pipeline import run
from byol_serving.indexing.plan import EmbedPlan, Summary
from byol_serving.indexing.sinks import ParquetSink
from serving.support import png, random_pixels, reference

Files = Mapping[str, bytes]
Rows = dict[str, dict[str, Any]]


def image_files(
    count: int, *, seed: int = 0, labels: Sequence[str] = ("cat", "dog")
) -> dict[str, bytes]:
    """LABEL/NNN.png and the bytes of as many different images."""
    return {
        f"{labels[number % len(labels)]}/{number:03}.png": png(pixels)
        for number, pixels in enumerate(random_pixels(count, seed=seed))
    }


def write_folder(root: Path, files: Files) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_tar(path: Path, files: Files, mode: Literal["w", "w:gz", "w:bz2", "w:xz"] = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def embed(source: Path | str, out: Path, encoder: Encoder, **settings: Any) -> Summary:
    """A run into Parquet files, with small shards and batches."""
    plan = small_plan(source, out, **settings)
    info = encoder.bundle.info
    return run(plan, [encoder], ParquetSink(info.dim, info.encoder_id))


def small_plan(source: Path | str, out: Path, **settings: Any) -> EmbedPlan:
    small: dict[str, Any] = {"shard_size": 8, "batch_size": 4, "decode_threads": 2}
    return EmbedPlan(source=source, out=out, **{**small, **settings})


def rows_in(out: Path) -> Rows:
    """The rows by id, as any reader of Parquet folders finds them; no id may be there twice."""
    found = pq.read_table(out).to_pylist()
    rows = {row.pop("id"): {**row, "metadata": json.loads(row["metadata"])} for row in found}
    assert len(rows) == len(found)
    return rows


def file_bytes(out: Path) -> dict[str, bytes]:
    """Everything that a run leaves behind, byte for byte."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def assert_vectors(rows: Rows, files: Files, encoder: Encoder) -> None:
    """Every row's vector is that of the file whose name it bears."""
    assert_close(((row["embedding"], files[name]) for name, row in rows.items()), encoder)


def assert_close(
    pairs: Iterable[tuple[Sequence[float] | NDArray[np.float32], bytes]], encoder: Encoder
) -> None:
    """Every vector is what the reference computes from the image file beside it."""
    vectors, files = zip(*pairs, strict=True)
    how = encoder.bundle.info.preprocess
    wanted = reference(np.stack([load_input(data, how) for data in files]))
    np.testing.assert_allclose(np.array(vectors, np.float32), wanted, atol=1e-5)
