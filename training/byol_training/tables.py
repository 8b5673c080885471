"""Parquet files with a column of encoded images, as data sets are published in."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byol_serving.errors import InvalidSource

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 64  # read at a time: large images in larger batches would fill memory


def list_table(file: Path) -> list[str]:
    """A name for each row: its number, inside a folder named as its `label`, if it has one.

    Raises:
        InvalidSource: unreadable, or no column holds images.
    """
    with _opened(file) as table:
        column = _image_column(table.schema_arrow, file)
        rows = table.metadata.num_rows
        names = [f"{file.stem}-{row:08d}.{column}" for row in range(rows)]
        if "label" not in table.schema_arrow.names:
            return names
        labels = table.read(columns=["label"]).column("label").to_pylist()
    return [f"{label}/{name}" for label, name in zip(labels, names, strict=True)]


def read_table(file: Path) -> Iterator[bytes]:
    """The encoded image of each row; none where it is null."""
    with _opened(file) as table:
        column = _image_column(table.schema_arrow, file)
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                data = value.get("bytes") if isinstance(value, dict) else value
                yield data or b""


def _opened(file: Path) -> Any:
    """A pyarrow.parquet.ParquetFile; pyarrow is an extra, and slow to import."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise InvalidSource(
            f"{file} is no readable Parquet file ({error}); give one with a column of images"
        ) from error


def _image_column(schema: "pa.Schema", file: Path) -> str:
    """The first column of bytes, or of structs with a field `bytes` (as Hugging Face writes)."""
    import pyarrow as pa

    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return str(field.name)
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return str(field.name)
    raise InvalidSource(
        f"{file} has no column of bytes among {', '.join(schema.names)};"
        " give encoded images as binary, or as a struct with a field `bytes`"
    )
