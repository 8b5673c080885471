"""Queries on the wire as vectors: by image, vector, id, and by examples of what to be like."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from byol_serving.collections.checks import unit_vectors
from byol_serving.collections.filters import Filter
from byol_serving.collections.grouping import find_groups
from byol_serving.collections.querying import (
    UNLIKE_WEIGHT,
    Query,
    Wanted,
    examples_vector,
    find,
    find_columns,
)
from byol_serving.collections.types import Collection, Columns, Vectors
from byol_serving.errors import FailedPrecondition, InvalidRequest, InvalidVector
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.rpc.convert import tensor_to_vectors
from byol_serving.rpc.filters import from_message
from byol_serving.rpc.items import fill_columns, groups_message, hits_message

Leaf: TypeAlias = pb.Query | pb.Example
"""A message with at most one of image, vector and id."""


def leaves_of(queries: Sequence[pb.Query]) -> list[Leaf]:
    """All that has to become a vector, in order."""
    leaves: list[Leaf] = []
    for query in queries:
        if query.WhichOneof("by") == "examples":
            leaves += [*query.examples.like, *query.examples.unlike]
        else:
            leaves.append(query)
    return leaves


def images_of(leaves: Sequence[Leaf]) -> list[bytes]:
    """The encoded images among them, in order."""
    return [each.image for each in leaves if each.WhichOneof("by") == "image"]


def vectors_of(
    collection: Collection, leaves: Sequence[Leaf], embedded: Vectors, what: str = "query"
) -> list[Query]:
    """Each as a vector; blocks.

    Args:
        collection: where ids are looked up.
        leaves: images, vectors and ids.
        embedded: float32 [I, D], the embeddings of the images, in their order.
        what: what the caller calls one of them.

    Raises:
        InvalidRequest: one of them is empty.
        InvalidVector: another dimension, or not finite, or zero.
        UnknownId: an id that is not there.
    """
    ids = [each.id for each in leaves if each.WhichOneof("by") == "id"]
    stored = iter(collection.get(ids, with_vectors=True) if ids else ())
    images = iter(embedded)
    found: list[Query] = []
    for position, leaf in enumerate(leaves):
        match leaf.WhichOneof("by"):
            case "image":
                found.append(Query(vector=next(images)))
            case "vector":
                row = tensor_to_vectors(leaf.vector, ndim=1)
                _check_dimension(len(row), collection, f"{what} {position}: ")
                found.append(Query(vector=_unit(row, f"{what} {position}")))
            case "id":
                item = next(stored)
                found.append(Query(vector=np.asarray(item.vector), own_ids=frozenset({item.id})))
            case _:
                raise InvalidRequest(f"{what} {position} is empty; set image, vector or id")
    return found


def run_search(
    collection: Collection, request: pb.SearchRequest, embedded: Vectors
) -> pb.SearchResponse:
    """Answers every query; blocks.

    Args:
        collection: to search.
        request: `queries` come first, then the rows of `vectors`.
        embedded: float32 [I, D], the embeddings of the images of `leaves_of(request.queries)`.

    Raises:
        InvalidRequest: no query, an empty query, or numbers that cannot be answered.
        InvalidVector, UnknownId: as `vectors_of`.
        FailedPrecondition: the collection is not of the version asked for.
    """
    if not request.queries and not request.HasField("vectors"):
        raise InvalidRequest("the request has no query; send an image, a vector or an id")
    version = collection.info.version
    _check_version(request, collection, version)
    wanted = _wanted(request)
    answer = pb.SearchResponse(version=version)
    if request.columns:
        fill_columns(answer.columns, _columns(collection, request, embedded, wanted))
    elif queries := [*_queries(collection, request.queries, embedded), *_rows(collection, request)]:
        if request.group_by:
            groups = find_groups(
                collection, queries, wanted, key=request.group_by, size=request.group_size or 1
            )
            answer.results.extend(map(groups_message, groups))
        else:
            answer.results.extend(map(hits_message, find(collection, queries, wanted)))
    if request.HasField("version"):  # a change may have come in between
        _check_version(request, collection, collection.info.version)
    return answer


def _columns(
    collection: Collection, request: pb.SearchRequest, embedded: Vectors, wanted: Wanted
) -> Columns:
    if request.group_by:
        raise InvalidRequest("groups do not come as columns: ask for one or the other")
    vectors = _vectors(collection, request)
    if vectors is not None and len(vectors) and not request.queries and wanted.mmr_lambda is None:
        return find_columns(collection, vectors, wanted)
    queries = [*_queries(collection, request.queries, embedded), *_rows(collection, request)]
    plain = replace(wanted, with_metadata=False, with_vectors=False)
    return Columns.of(find(collection, queries, plain) if queries else [])


def _queries(
    collection: Collection, queries: Sequence[pb.Query], embedded: Vectors
) -> Iterator[Query]:
    found = iter(vectors_of(collection, leaves_of(queries), embedded))
    for query in queries:
        if query.WhichOneof("by") != "examples":
            yield next(found)
            continue
        examples = query.examples
        like = [next(found) for _ in examples.like]
        unlike = [next(found) for _ in examples.unlike]
        weight = examples.unlike_weight if examples.HasField("unlike_weight") else UNLIKE_WEIGHT
        own_ids = frozenset[str]().union(*(each.own_ids for each in like + unlike))
        vector = examples_vector(_stack(like, collection), _stack(unlike, collection), weight)
        yield Query(vector=vector, own_ids=own_ids)


def _rows(collection: Collection, request: pb.SearchRequest) -> list[Query]:
    vectors = _vectors(collection, request)
    return [] if vectors is None else [Query(vector=row) for row in vectors]


def _vectors(collection: Collection, request: pb.SearchRequest) -> Vectors | None:
    if not request.HasField("vectors"):
        return None
    rows = tensor_to_vectors(request.vectors, ndim=2)
    _check_dimension(rows.shape[1], collection)
    return rows


def _stack(queries: Sequence[Query], collection: Collection) -> Vectors:
    if not queries:
        return np.empty((0, collection.info.dim), np.float32)
    return np.stack([each.vector for each in queries])


def filter_of(
    request: pb.SearchRequest
    | pb.ListItemsRequest
    | pb.FindDuplicatesRequest
    | pb.FindOutliersRequest
    | pb.ClassifyRequest,
) -> Filter | None:
    """The request's filter, where it has one."""
    return from_message(request.filter) if request.HasField("filter") else None


def _wanted(request: pb.SearchRequest) -> Wanted:
    return Wanted(
        k=request.k,
        offset=request.offset,
        condition=filter_of(request),
        min_score=request.min_score if request.HasField("min_score") else None,
        mmr_lambda=request.mmr_lambda if request.HasField("mmr_lambda") else None,
        mmr_candidates=request.mmr_candidates,
        with_metadata=not request.without_metadata,
        with_vectors=request.with_vectors,
        effort=request.effort or None,
    )


def _check_version(request: pb.SearchRequest, collection: Collection, now: int | None) -> None:
    if not request.HasField("version") or request.version == now:
        return
    name = collection.info.name
    if now is None:
        raise FailedPrecondition(
            f"the backend of collection {name!r} does not count changes: page without a version"
        )
    raise FailedPrecondition(
        f"collection {name!r} changed since version {request.version} (now {now}): begin again"
        " with the first page"
    )


def _unit(row: Vectors, what: str) -> Vectors:
    try:
        (unit,) = unit_vectors(row[None], len(row))
    except InvalidVector as error:
        raise InvalidVector(f"{what}: {error}") from error
    return np.asarray(unit)


def _check_dimension(dim: int, collection: Collection, where: str = "") -> None:
    info = collection.info
    if dim != info.dim:
        raise InvalidVector(
            f"{where}dimension {dim} is not {info.dim}, that of collection {info.name!r};"
            " embed with its encoder"
        )
