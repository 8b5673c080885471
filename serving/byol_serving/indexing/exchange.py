"""A collection's items in Parquet files: out of one backend and into another, or anywhere else.

Columns `id` (string, or int64 where the collection's ids are), `embedding` (fixed-size list of
float32, L2-normalised) and `metadata` (JSON text); the file's own metadata names the encoder.
`byol embed` writes the same columns and more.
Both directions hold one row group in memory. pyarrow is imported when a file is opened.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byol_serving.collections.disk import publish
from byol_serving.collections.types import IdType, Item, Metadata, Vectors
from byol_serving.errors import InvalidSource, StoreError
from byol_serving.indexing.tables import import_pyarrow

ENCODER_KEY = "byol.encoder_id"
ROWS_PER_GROUP = 8192


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Items of one row group, in the file's order."""

    ids: list[str]
    vectors: Vectors
    """float32 [N, D]"""
    metadata: list[Metadata]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What all files of an import have in common."""

    dim: int
    encoder_id: str
    """Empty where the files do not name it."""
    rows: int
    id_type: IdType


def write_items(
    path: Path,
    items: Iterable[Item],
    *,
    dim: int,
    encoder_id: str,
    id_type: IdType = "string",
) -> int:
    """Writes items with vectors to a new file, whole or not at all; returns how many.

    Raises:
        InvalidSource: pyarrow is not installed.
        StoreError: the disk refused.
    """
    arrow, parquet = import_pyarrow("pyarrow"), import_pyarrow("pyarrow.parquet")
    schema = arrow.schema(
        [
            arrow.field("id", getattr(arrow, id_type)(), nullable=False),
            arrow.field("embedding", arrow.list_(arrow.float32(), dim), nullable=False),
            arrow.field("metadata", arrow.string(), nullable=False),
        ],
        metadata={ENCODER_KEY: encoder_id},
    )
    temporary = path.with_name(f".{path.name}.tmp")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Floats of embeddings neither repeat nor compress: both would only cost time.
        with parquet.ParquetWriter(
            temporary,
            schema,
            compression={"id": "zstd", "metadata": "zstd", "embedding.list.element": "none"},
            use_dictionary=False,
        ) as writer:
            for group in _grouped(items):
                count += len(group)
                writer.write_table(_table(arrow, schema, group), row_group_size=len(group))
        publish(temporary, path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def files_of(source: Path) -> list[Path]:
    """The Parquet file, or those in the folder, in their names' order. Raises InvalidSource."""
    found = [source] if source.is_file() else sorted(source.glob("*.parquet"))
    if not found:
        raise InvalidSource(f"{source} is no Parquet file and no folder with one: check the path")
    return found


def header_of(files: Sequence[Path]) -> Header:
    """Dimension, encoder and kind of ids of the files.

    Raises:
        InvalidSource: a file is not Parquet, lacks a column, or differs from the first.
    """
    opened = [_opened(path) for path in files]
    heads = [
        (_dim(path, file), _encoder(file), _id_type(file))
        for path, file in zip(files, opened, strict=True)
    ]
    for path, head in zip(files, heads, strict=True):
        if head != heads[0]:
            raise InvalidSource(
                f"{path} has dimension, encoder and ids {head}, {files[0]} {heads[0]}: import them"
                " into collections of their own"
            )
    dim, encoder_id, id_type = heads[0]
    rows = sum(int(file.metadata.num_rows) for file in opened)
    return Header(dim=dim, encoder_id=encoder_id, rows=rows, id_type=id_type)


def read_items(path: Path) -> Iterator[Batch]:
    """A file's items, one row group at a time.

    Raises:
        InvalidSource: not such a file, damaged, or metadata that is not a JSON object.
    """
    file = _opened(path)
    dim = _dim(path, file)
    has_metadata = "metadata" in file.schema_arrow.names
    columns = ["id", "embedding", *(["metadata"] if has_metadata else [])]
    for group in range(file.metadata.num_row_groups):
        try:
            table = file.read_row_group(group, columns=columns)
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise InvalidSource(f"{path} is damaged in row group {group} ({error})") from error
        if any(column.null_count for column in table.columns):
            raise InvalidSource(f"{path} has an empty id, embedding or metadata: fill or drop it")
        flat = table.column("embedding").combine_chunks().flatten().to_numpy()
        if flat.size != table.num_rows * dim:
            raise InvalidSource(f"{path} holds embeddings that are not all of dimension {dim}")
        ids = [str(each) for each in table.column("id").to_pylist()]
        metadata: list[Metadata] = [{}] * len(ids)
        if has_metadata:
            metadata = [_parsed(path, each) for each in table.column("metadata").to_pylist()]
        vectors = flat.reshape(-1, dim).astype(np.float32)
        yield Batch(ids=ids, vectors=vectors, metadata=metadata)


def _grouped(items: Iterable[Item]) -> Iterator[list[Item]]:
    group: list[Item] = []
    for item in items:
        group.append(item)
        if len(group) == ROWS_PER_GROUP:
            yield group
            group = []
    if group:
        yield group


def _table(arrow: Any, schema: Any, group: Sequence[Item]) -> Any:
    vectors = np.stack([np.asarray(item.vector, np.float32) for item in group])
    texts = [json.dumps(item.metadata, ensure_ascii=False) for item in group]
    kind = schema.field("id").type
    ids = [item.int_id if kind == arrow.int64() else item.id for item in group]
    columns = [
        arrow.array(ids, kind),
        arrow.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1]),
        arrow.array(texts, arrow.string()),
    ]
    return arrow.Table.from_arrays(columns, schema=schema)


def _opened(path: Path) -> Any:
    parquet = import_pyarrow("pyarrow.parquet")
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise InvalidSource(f"{path} cannot be read as Parquet ({error})") from error


def _dim(path: Path, file: Any) -> int:
    names = file.schema_arrow.names
    for wanted in ("id", "embedding"):
        if wanted not in names:
            raise InvalidSource(f"{path} has no column {wanted!r}; it has {', '.join(names)}")
    kind = file.schema_arrow.field("embedding").type
    size = getattr(kind, "list_size", 0)
    if not size:
        raise InvalidSource(f"{path} holds embeddings as {kind}, wanted a fixed-size list of float")
    return int(size)


def _encoder(file: Any) -> str:
    facts = file.schema_arrow.metadata or {}
    return str(facts.get(ENCODER_KEY.encode(), b"").decode())


def _id_type(file: Any) -> IdType:
    integers = import_pyarrow("pyarrow").types.is_integer
    return "int64" if integers(file.schema_arrow.field("id").type) else "string"


def _parsed(path: Path, text: str) -> Metadata:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InvalidSource(f"{path} has metadata that is not a JSON object: {text[:80]!r}")
    return found
