"""Lists of any length as requests of bounded size, for both clients."""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from byol_serving.collections.types import Metadata
from byol_serving.errors import InvalidImage, InvalidRequest
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.rpc.convert import embeddings_to_tensor, metadata_to_struct

ImageLike: TypeAlias = bytes | Path | str | Image.Image | NDArray[np.uint8]
"""Bytes of an image file, a path to one, a Pillow image, or RGB pixels uint8 [H, W, 3]."""


Ids: TypeAlias = Sequence[str] | Sequence[int]
"""Ids of items: integers where the collection's are (`id_type` int64), or their digits."""


def id_texts(ids: Ids) -> list[str]:
    """Ids as they are sent and stored."""
    return [str(each) for each in ids]


@dataclass(frozen=True)
class ItemId:
    """An item of the collection, as a query or example."""

    id: str | int


ExampleLike: TypeAlias = ImageLike | ItemId | NDArray[np.float32]
"""An image, an item, or a vector float32 [D]."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """One query "like these, not like those": mean(like) - unlike_weight x mean(unlike)."""

    like: Sequence[ExampleLike]
    unlike: Sequence[ExampleLike] = ()
    unlike_weight: float | None = None
    """None: 0.2 (see `collections.querying`)."""


QueryLike: TypeAlias = ExampleLike | Examples
Embeddings: TypeAlias = NDArray[Any]
DTypeName = Literal["float32", "float16", "int8"]
"""What `Embeddings` [N, D] hold: the dtype that was asked for."""

_MAX_REQUEST_BYTES = 32 * 2**20
"""Half of what a server accepts by default."""
_ROWS_PER_REQUEST = 1024


def image_bytes(image: ImageLike | NDArray[np.float32]) -> bytes:
    """The bytes to send: files as they are, pixels as PNG, which loses nothing.

    Raises:
        InvalidImage: the file cannot be read, or the array is not uint8 [H, W, 3].
    """
    match image:
        case bytes():
            return image
        case str() | Path():
            try:
                return Path(image).read_bytes()
            except OSError as error:
                raise InvalidImage(f"{image} cannot be read: {error.strerror}") from error
        case np.ndarray() if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InvalidImage(
                f"an array {image.dtype} {list(image.shape)} is not an image; give uint8 [H, W, 3]"
            )
        case np.ndarray():
            return _png(Image.fromarray(image))
        case _:
            return _png(image)


def example_message(example: ExampleLike) -> pb.Example:
    """An example on the wire. Raises InvalidImage as `image_bytes`."""
    match example:
        case ItemId(id):
            return pb.Example(id=str(id))
        case np.ndarray() if example.ndim == 1:
            return pb.Example(vector=packed(example.astype(np.float32)))
        case _:
            return pb.Example(image=image_bytes(example))


def query_message(query: QueryLike) -> pb.Query:
    """A query on the wire; raises as `example_message`."""
    if isinstance(query, Examples):
        examples = pb.Examples(
            like=map(example_message, query.like),
            unlike=map(example_message, query.unlike),
            unlike_weight=query.unlike_weight,
        )
        return pb.Query(examples=examples)
    example = example_message(query)
    match example.WhichOneof("by"):
        case "id":
            return pb.Query(id=example.id)
        case "vector":
            return pb.Query(vector=example.vector)
        case _:
            return pb.Query(image=example.image)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@dataclass(frozen=True)
class Batch:
    """Images of one request; `offset` is the first one's position in the whole list."""

    images: list[bytes]
    offset: int


def batches(images: Iterable[ImageLike], *, max_images: int) -> Iterator[Batch]:
    """Image files in requests of bounded count and size, read as they are needed."""
    batch: list[bytes] = []
    offset = size = 0
    for position, image in enumerate(images):
        try:
            data = image_bytes(image)
        except InvalidImage as error:
            raise error.at(position) from error
        if batch and (len(batch) == max_images or size + len(data) > _MAX_REQUEST_BYTES):
            yield Batch(batch, offset)
            batch, offset, size = [], position, 0
        batch.append(data)
        size += len(data)
    if batch:
        yield Batch(batch, offset)


def chunked(pixels: NDArray[np.uint8], size: int) -> Iterator[NDArray[np.uint8]]:
    """Consecutive slices of at most `size` images."""
    return (pixels[at : at + size] for at in range(0, len(pixels), size))


def one_request(
    images: Iterable[ImageLike] | NDArray[np.uint8],
) -> list[bytes] | NDArray[np.uint8]:
    """Images that are not split: their bytes, or pixels uint8 [N, S, S, 3] as they are."""
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return images
    return [data for part in batches(images, max_images=2**31) for data in part.images]


def joined(parts: Sequence[Embeddings], dtype: DTypeName) -> Embeddings:
    """The rows of all parts."""
    return np.concatenate(parts) if parts else np.empty((0, 0), dtype)


@dataclass(frozen=True)
class UpsertPart:
    """One request of an upsert; `offset` is its first item's position in the whole."""

    request: pb.UpsertRequest
    offset: int


def upsert_parts(
    name: str,
    ids: Ids,
    *,
    images: Iterable[ImageLike] | None,
    vectors: NDArray[np.float32] | None,
    metadata: Sequence[Metadata] | None,
    encoder_id: str,
    max_images: int,
) -> Iterator[UpsertPart]:
    """An upsert of any length as requests of bounded size.

    Raises:
        InvalidRequest: lengths differ, an id is there twice, or not one source of vectors.
    """
    if (images is None) == (vectors is None):
        raise InvalidRequest("give either images or vectors to upsert, and not both")
    if len(set(ids)) != len(ids):
        raise InvalidRequest("an id is there twice; give each item its own")
    if metadata is not None and len(metadata) != len(ids):
        raise InvalidRequest(f"{len(ids)} ids but {len(metadata)} metadata; give one for each id")

    def part(at: int, count: int, **source: Any) -> UpsertPart:
        some = slice(at, at + count)
        request = pb.UpsertRequest(
            collection=name,
            ids=id_texts(ids[some]),
            metadata=map(metadata_to_struct, metadata[some] if metadata is not None else ()),
            encoder_id=encoder_id,
            **source,
        )
        return UpsertPart(request, at)

    if vectors is not None:
        if len(vectors) != len(ids):
            raise InvalidRequest(f"{len(ids)} ids but {len(vectors)} vectors; give one for each id")
        for at in range(0, len(ids), _ROWS_PER_REQUEST):
            rows = vectors[at : at + _ROWS_PER_REQUEST]
            yield part(at, len(rows), vectors=packed(rows))
        return
    done = 0
    for batch in batches(() if images is None else images, max_images=max_images):
        done = batch.offset + len(batch.images)
        if done <= len(ids):
            yield part(batch.offset, len(batch.images), images=batch.images)
    if done != len(ids):
        raise InvalidRequest(f"{len(ids)} ids but {done} images; give one for each id")


def packed(vectors: NDArray[np.floating[Any]]) -> pb.Tensor:
    array = np.asarray(vectors)
    dtype = pb.DTYPE_FLOAT16 if array.dtype == np.float16 else pb.DTYPE_FLOAT32
    return embeddings_to_tensor(array.astype(np.float32, copy=False), dtype)
