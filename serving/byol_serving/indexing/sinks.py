"""Where rows go: Parquet or .npy files, one a shard, or a collection here or behind a server.

All are idempotent: a shard that was written and not yet recorded is simply written again.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from byol_serving.bundle import FeatureMap
from byol_serving.collections.types import Metadata
from byol_serving.errors import StoreCorrupt, UnknownId
from byol_serving.indexing.columns import Columns, shape
from byol_serving.indexing.durable import write_durably
from byol_serving.indexing.journal import part_name
from byol_serving.indexing.stages import Row
from byol_serving.indexing.tables import import_pyarrow

PLAIN = Columns()
_DELETE_AT_ONCE = 1000
_SAMPLE = 8


class Sink(Protocol):
    """Takes the rows of shards. Called from one thread at a time."""

    @property
    def kind(self) -> str:
        """What it writes, for the manifest."""
        ...

    @property
    def columns(self) -> Columns:
        """What its rows hold."""
        ...

    def write(self, folder: Path, number: int, rows: Sequence[Row]) -> None:
        """Brings a shard's rows to disk in full, or raises StoreError."""
        ...

    def read(self, folder: Path, number: int) -> Mapping[str, Row] | None:
        """A shard's rows by id; None where rows stay where they are, whatever shard they are of."""
        ...

    def holds(self, folder: Path, number: int, ids: Sequence[str]) -> bool:
        """Whether a recorded shard's rows are still there, as far as that is cheap to tell."""
        ...

    def remove(self, ids: Iterable[str]) -> int:
        """Deletes rows that no shard has any more; returns how many ids it was given."""
        ...


class ParquetSink:
    """part-00000.parquet: id, embedding (fixed-size list of float32), source, bytes, metadata.

    `metadata` is JSON text. Maps are columns of their stage's name, tensors of a fixed shape
    (Arrow's canonical extension type; a fixed-size list for readers that do not know it). The
    file's own metadata names the encoder, and says of other columns than plain embeddings what
    they are (`Columns.facts`).
    """

    kind = "parquet"

    def __init__(self, dim: int, encoder_id: str, columns: Columns = PLAIN) -> None:
        """Raises InvalidSource where pyarrow is missing."""
        self._arrow, self._parquet = import_pyarrow("pyarrow"), import_pyarrow("pyarrow.parquet")
        arrow, self._dim, self.columns = self._arrow, dim, columns
        self._tensors = {
            each.name: arrow.fixed_shape_tensor(arrow.float32(), shape(each))
            for each in columns.maps
        }
        facts = {"byol.columns": json.dumps(columns.facts)} if columns.facts else {}
        self._schema = arrow.schema(
            [
                arrow.field("id", arrow.string(), nullable=False),
                arrow.field("embedding", arrow.list_(arrow.float32(), dim), nullable=False),
                arrow.field("source", arrow.string(), nullable=False),
                arrow.field("bytes", arrow.int64(), nullable=False),
                arrow.field("metadata", arrow.string(), nullable=False),
                *(arrow.field(name, kind, nullable=False) for name, kind in self._tensors.items()),
            ],
            metadata={"byol.encoder_id": encoder_id, **facts},
        )

    def write(self, folder: Path, number: int, rows: Sequence[Row]) -> None:
        """Writes one file with one row group."""
        arrow, dim = self._arrow, self._dim
        flat = arrow.array(_stacked(rows, dim).reshape(-1), arrow.float32())
        table = arrow.Table.from_arrays(
            [
                arrow.array([row.id for row in rows], arrow.string()),
                arrow.FixedSizeListArray.from_arrays(flat, dim),
                arrow.array([row.source for row in rows], arrow.string()),
                arrow.array([row.size for row in rows], arrow.int64()),
                arrow.array([row.metadata for row in rows], arrow.string()),
                *(self._tensor(at, rows) for at in range(len(self._tensors))),
            ],
            schema=self._schema,
        )
        # Floats of embeddings neither repeat nor compress: both would only cost time.
        floats = [f"{name}.list.element" for name in ("embedding", *self._tensors)]
        texts = ["id", "source", "bytes", "metadata"]
        compression = {**dict.fromkeys(texts, "zstd"), **dict.fromkeys(floats, "none")}
        write_durably(
            _path(folder, number, "parquet"),
            lambda path: self._parquet.write_table(
                table,
                path,
                compression=compression,
                use_dictionary=["source", "metadata"],
                row_group_size=max(1, len(rows)),
            ),
        )

    def read(self, folder: Path, number: int) -> Mapping[str, Row] | None:
        """Reads one file; raises StoreCorrupt."""
        path = _path(folder, number, "parquet")
        try:
            table = self._parquet.read_table(path, partitioning=None)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
        vectors = table.column("embedding").combine_chunks().flatten().to_numpy()
        maps = [table.column(name).combine_chunks().to_numpy_ndarray() for name in self._tensors]
        texts = table.select(["id", "source", "bytes", "metadata"]).to_pydict()
        return _rows(vectors.reshape(-1, self._dim), zip(*texts.values(), strict=True), maps)

    def _tensor(self, at: int, rows: Sequence[Row]) -> Any:
        """The column of the map `at`."""
        stage, arrow = self.columns.maps[at], self._arrow
        flat = arrow.array(_maps(rows, at, stage).reshape(-1), arrow.float32())
        storage = arrow.FixedSizeListArray.from_arrays(flat, math.prod(shape(stage)))
        return arrow.ExtensionArray.from_storage(self._tensors[stage.name], storage)

    def holds(self, folder: Path, number: int, ids: Sequence[str]) -> bool:
        """Whether the file is there."""
        return _path(folder, number, "parquet").exists()

    def remove(self, ids: Iterable[str]) -> int:
        """Counts: the rows went with their shard's file."""
        return sum(1 for _ in ids)


class NpySink:
    """part-00000.npy, float32 [N, D], and part-00000.jsonl: id, source, bytes, metadata a row.

    Maps are part-00000.STAGE.npy, float32 [N, C, H, W].
    """

    kind = "npy"

    def __init__(self, dim: int, columns: Columns = PLAIN) -> None:
        """Nothing is opened."""
        self._dim, self.columns = dim, columns

    def write(self, folder: Path, number: int, rows: Sequence[Row]) -> None:
        """Writes the texts, then the maps, then the vectors."""
        lines = [
            f'{{"id": {json.dumps(row.id)}, "source": {json.dumps(row.source)},'
            f' "bytes": {row.size}, "metadata": {row.metadata}}}\n'
            for row in rows
        ]
        write_durably(
            _path(folder, number, "jsonl"),
            lambda path: _write_text(path, "".join(lines)),
        )
        for at, stage in enumerate(self.columns.maps):
            write_durably(
                _path(folder, number, f"{stage.name}.npy"),
                partial(_write_array, array=_maps(rows, at, stage)),
            )
        write_durably(
            _path(folder, number, "npy"),
            partial(_write_array, array=_stacked(rows, self._dim)),
        )

    def read(self, folder: Path, number: int) -> Mapping[str, Row] | None:
        """Reads its files; raises StoreCorrupt."""
        path = _path(folder, number, "npy")
        try:
            vectors = np.load(path)
            maps = [np.load(each) for each in self._map_paths(folder, number)]
            text = _path(folder, number, "jsonl").read_text(encoding="utf-8")
            facts = [json.loads(line) for line in text.split("\n")[:-1]]
            keys = ("id", "source", "bytes", "metadata")
            columns = ((*(fact[k] for k in keys[:3]), _compact(fact["metadata"])) for fact in facts)
            return _rows(vectors, columns, maps)
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise _damaged(path, error) from error

    def holds(self, folder: Path, number: int, ids: Sequence[str]) -> bool:
        """Whether its files are there."""
        texts, vectors = (_path(folder, number, kind) for kind in ("jsonl", "npy"))
        return all(path.exists() for path in (texts, vectors, *self._map_paths(folder, number)))

    def remove(self, ids: Iterable[str]) -> int:
        """Counts: the rows went with their shard's files."""
        return sum(1 for _ in ids)

    def _map_paths(self, folder: Path, number: int) -> list[Path]:
        return [_path(folder, number, f"{each.name}.npy") for each in self.columns.maps]


class Target(Protocol):
    """The part of a collection that a sink needs; here or behind a server."""

    def upsert(
        self, ids: Sequence[str], vectors: NDArray[np.float32], metadata: Sequence[Metadata]
    ) -> object:
        """Inserts or replaces; on disk when it returns."""
        ...

    def delete(self, ids: Sequence[str]) -> object:
        """Deletes what exists of `ids`."""
        ...

    def get(self, ids: Sequence[str]) -> object:
        """Raises UnknownId where one is not there."""
        ...


class CollectionSink:
    """Rows as items of a collection. Its metadata is theirs; source and size are not kept."""

    columns = PLAIN

    def __init__(self, name: str, collection: Target) -> None:
        """`name` is the collection's."""
        self.kind = f"collection {name}"
        self._collection = collection

    def write(self, folder: Path, number: int, rows: Sequence[Row]) -> None:
        """Upserts them; the collection raises StoreError where its disk refuses."""
        if rows:
            ids = [row.id for row in rows]
            vectors = np.stack([row.vector for row in rows])
            self._collection.upsert(ids, vectors, [json.loads(row.metadata) for row in rows])

    def read(self, folder: Path, number: int) -> Mapping[str, Row] | None:
        """None: an item is found by its id, and stays where it is."""
        return None

    def holds(self, folder: Path, number: int, ids: Sequence[str]) -> bool:
        """Asks for a few of the ids. None there: the collection was dropped or set back since.

        A single one there will do, because others may have been deleted on purpose.
        """
        return not ids or any(self._has(each) for each in ids[:: max(1, len(ids) // _SAMPLE)])

    def remove(self, ids: Iterable[str]) -> int:
        """Deletes them from the collection."""
        ids, count = iter(ids), 0
        while part := list(islice(ids, _DELETE_AT_ONCE)):
            self._collection.delete(part)
            count += len(part)
        return count

    def _has(self, id_: str) -> bool:
        try:
            self._collection.get([id_])
        except UnknownId:
            return False
        return True


def _path(folder: Path, number: int, suffix: str) -> Path:
    return folder / f"{part_name(number)}.{suffix}"


def _stacked(rows: Sequence[Row], dim: int) -> NDArray[np.float32]:
    """Float32 [N, dim], also for N = 0."""
    return np.stack([row.vector for row in rows]) if rows else np.empty((0, dim), np.float32)


def _maps(rows: Sequence[Row], at: int, stage: FeatureMap) -> NDArray[np.float32]:
    """Float32 [N, C, H, W] of the map `at`."""
    if not rows:
        return np.empty((0, *shape(stage)), np.float32)
    return np.stack([row.maps[at] for row in rows])


def _rows(
    vectors: NDArray[np.float32],
    texts: Iterable[tuple[Any, ...]],
    maps: Sequence[NDArray[np.float32]],
) -> dict[str, Row]:
    parts = zip(vectors, texts, *maps, strict=True)
    return {
        id_: Row(id_, vector, source, size, metadata, tuple(of_stages))
        for vector, (id_, source, size, metadata), *of_stages in parts
    }


def _compact(metadata: Metadata) -> str:
    return json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_array(path: Path, array: NDArray[np.float32]) -> None:
    with path.open("wb") as file:  # np.save itself would add a suffix to the name
        np.save(file, array)


def _damaged(path: Path, error: Exception) -> StoreCorrupt:
    return StoreCorrupt(f"{path} is damaged ({error}); delete it: its shard is made again")
