"""One SearchRequest on one collection: queries by image, vector and id, answered in their order."""

import numpy as np

from byol_serving.collections.filters import Filter
from byol_serving.collections.types import Collection, Hit, Vectors
from byol_serving.errors import InvalidRequest, InvalidVector
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.rpc.convert import tensor_to_vectors


def run_search(
    collection: Collection, request: pb.SearchRequest, embedded: Vectors, where: Filter | None
) -> list[list[Hit]]:
    """Answers every query; blocks.

    Args:
        collection: to search.
        request: `queries` come first, then the rows of `vectors`.
        embedded: float32 [I, D], the embeddings of the queries by image, in their order.
        where: the request's filter.

    Raises:
        InvalidRequest: no query, an empty query, or k outside 1 .. the collection's size.
        InvalidVector: a query of another dimension, or not finite.
        UnknownId: a query by an id that is not there.
    """
    if not request.queries and not request.HasField("vectors"):
        raise InvalidRequest("the request has no query; send an image, a vector or an id")
    count = collection.info.count
    if not 1 <= request.k <= count:
        raise InvalidRequest(
            f"k {request.k} is outside 1..{count}, the size of collection"
            f" {collection.info.name!r}; ask for fewer, or add items first"
        )
    vectors, own_ids = _gather(collection, request, embedded)
    # One more where a query is an item itself, which is then left out of its own answer.
    k = min(request.k + 1, count) if any(own_ids) else request.k
    found = collection.search(
        vectors,
        k,
        condition=where,
        min_score=request.min_score if request.HasField("min_score") else None,
        with_metadata=not request.without_metadata,
        with_vectors=request.with_vectors,
    )
    return [
        [hit for hit in hits if hit.id != own][: request.k]
        for hits, own in zip(found, own_ids, strict=True)
    ]


def _gather(
    collection: Collection, request: pb.SearchRequest, embedded: Vectors
) -> tuple[Vectors, list[str | None]]:
    """All queries as float32 [Q, D], and for each its own id where it is one of the items."""
    ids = [each.id for each in request.queries if each.WhichOneof("by") == "id"]
    stored = iter(collection.get(ids, with_vectors=True) if ids else ())
    images = iter(embedded)
    rows: list[Vectors] = []
    own_ids: list[str | None] = []
    for position, query in enumerate(request.queries):
        own: str | None = None
        match query.WhichOneof("by"):
            case "image":
                row = next(images)
            case "vector":
                row = _checked(tensor_to_vectors(query.vector, ndim=1), collection, position)
            case "id":
                item = next(stored)
                row, own = np.asarray(item.vector), item.id
            case _:
                raise InvalidRequest(f"query {position} is empty; set image, vector or id")
        rows.append(row)
        own_ids.append(own)
    vectors = np.stack(rows) if rows else np.empty((0, collection.info.dim), np.float32)
    if not request.HasField("vectors"):
        return vectors, own_ids
    more = tensor_to_vectors(request.vectors, ndim=2)
    if more.shape[1] != collection.info.dim:
        raise _wrong_dimension(more.shape[1], collection)
    both = np.concatenate([vectors, more]) if rows else more
    return both, own_ids + [None] * len(more)


def _checked(row: Vectors, collection: Collection, position: int) -> Vectors:
    if len(row) != collection.info.dim:
        raise _wrong_dimension(len(row), collection, f"query {position}: ")
    return row


def _wrong_dimension(dim: int, collection: Collection, where: str = "") -> InvalidVector:
    info = collection.info
    return InvalidVector(
        f"{where}dimension {dim} is not {info.dim}, that of collection {info.name!r};"
        " embed with its encoder"
    )
