"""Searches as calls, for both clients: what can be asked, and how the answer is read."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from byol_serving.client_batches import (
    ExampleLike,
    Examples,
    ImageLike,
    ItemId,
    QueryLike,
    packed,
    query_message,
)
from byol_serving.client_calls import COLLECTIONS, Call, filter_message
from byol_serving.collections.grouping import HitGroup
from byol_serving.collections.types import Columns, Hit
from byol_serving.errors import InvalidRequest
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.rpc.filters import Where
from byol_serving.rpc.items import columns_value, groups_value, hits_value

SEARCH_STREAM = COLLECTIONS + "SearchStream"
_BELOW_ALL = -2.0
"""A min_score that leaves nothing out; with one, k may be above the collection's size."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What a search answers with, for one query or many."""

    k: int = 10
    """From 1 to the collection's size; any number with min_score."""
    where: Where | None = None
    """Condition on metadata (see `byol_serving.rpc.filters`)."""
    min_score: float | None = None
    """Leaves out neighbours with a lower cosine similarity."""
    offset: int = 0
    """Leaves out the best so many. Equal scores are in the order their items were stored."""
    version: int | None = None
    """FailedPrecondition if the collection has changed since; see `CollectionInfo.version`."""
    mmr_lambda: float | None = None
    """Maximal marginal relevance: 1 ranks by similarity alone, 0 by difference alone."""
    mmr_candidates: int = 0
    """The nearest so many are its choice; 0: four for each hit, at least 64."""
    with_vectors: bool = False
    with_metadata: bool = True
    effort: int | None = None
    """Lists read (IVF) or width of the walk (HNSW) instead of what the index was tuned to."""
    encoder_id: str = ""
    """Who made the vectors that are searched with; if given and not the collection's,
    EncoderMismatch."""


@dataclass(frozen=True, kw_only=True)
class HitPage:
    """The hits of one query from one version of the collection."""

    hits: Sequence[Hit]
    version: int | None


def request_of(
    name: str,
    options: SearchOptions,
    queries: Iterable[QueryLike] = (),
    vectors: NDArray[np.float32] | None = None,
) -> pb.SearchRequest:
    """A request with queries of any kind, and the rows of `vectors` after them.

    What needs neither metadata nor vectors is asked for as columns, which are cheaper.
    """
    if options.k < 1:
        raise InvalidRequest(f"k {options.k} is below 1; ask for at least one neighbour")
    if options.effort is not None and options.effort < 1:
        raise InvalidRequest(f"effort {options.effort} is below 1: leave it out for the tuned one")
    if options.offset < 0:
        raise InvalidRequest(f"offset {options.offset} is below 0; begin with the first page")
    return pb.SearchRequest(
        collection=name,
        queries=map(query_message, queries),
        vectors=None if vectors is None else packed(vectors),
        k=options.k,
        filter=filter_message(options.where),
        min_score=options.min_score,
        offset=options.offset,
        version=options.version,
        mmr_lambda=options.mmr_lambda,
        mmr_candidates=options.mmr_candidates,
        with_vectors=options.with_vectors,
        without_metadata=not options.with_metadata,
        effort=options.effort or 0,
        columns=not options.with_metadata and not options.with_vectors,
        encoder_id=options.encoder_id,
    )


def answer_of(answer: pb.SearchResponse) -> list[list[Hit]]:
    """The hits of each query."""
    if answer.HasField("columns"):
        return columns_value(answer.columns).hits()
    return [hits_value(each) for each in answer.results]


def columns_of(answer: pb.SearchResponse) -> Columns:
    """The hits of all queries as columns."""
    if answer.HasField("columns"):
        return columns_value(answer.columns)
    return Columns.of(answer_of(answer))  # an older server knows no columns


def search(
    name: str,
    options: SearchOptions,
    *,
    images: Iterable[ImageLike] = (),
    ids: Iterable[str | int] = (),
    queries: Iterable[QueryLike] = (),
    vectors: NDArray[np.float32] | None = None,
) -> Call[list[list[Hit]]]:
    """The neighbours of each query: images first, ids, any kind, then the rows of vectors."""
    everything = itertools.chain(images, map(ItemId, ids), queries)
    request = request_of(name, options, everything, vectors)
    return Call(COLLECTIONS + "Search", request, pb.SearchResponse, answer_of)


def columns(name: str, vectors: NDArray[np.float32], options: SearchOptions) -> Call[Columns]:
    """The neighbours of each row of vectors, as columns."""
    plain = replace(options, with_metadata=False, with_vectors=False)
    request = request_of(name, plain, vectors=vectors)
    return Call(COLLECTIONS + "Search", request, pb.SearchResponse, columns_of)


def groups(
    name: str, query: QueryLike, options: SearchOptions, *, by: str, size: int
) -> Call[list[HitGroup]]:
    """The best values of a metadata key."""
    request = request_of(name, options, [query])
    request.group_by, request.group_size, request.columns = by, size, False

    def parse(answer: pb.SearchResponse) -> list[HitGroup]:
        return groups_value(answer.results[0])

    return Call(COLLECTIONS + "Search", request, pb.SearchResponse, parse)


def page(name: str, query: QueryLike, options: SearchOptions) -> Call[HitPage]:
    """One page of one query's hits; it may be short or empty."""
    if options.min_score is None:
        options = replace(options, min_score=_BELOW_ALL)
    request = request_of(name, options, [query])

    def parse(answer: pb.SearchResponse) -> HitPage:
        version = answer.version if answer.HasField("version") else None
        return HitPage(hits=answer_of(answer)[0], version=version)

    return Call(COLLECTIONS + "Search", request, pb.SearchResponse, parse)


def next_page(options: SearchOptions, found: HitPage) -> SearchOptions | None:
    """What to ask after a page; None after the last."""
    if len(found.hits) < options.k:
        return None
    return replace(options, offset=options.offset + options.k, version=found.version)


def one_query(
    *,
    image: ImageLike | None,
    vector: NDArray[np.float32] | None,
    id: str | int | None,
    like: Sequence[ExampleLike],
    unlike: Sequence[ExampleLike],
) -> QueryLike:
    """The query of a search by exactly one of image, vector, id and examples."""
    given = [each is not None for each in (image, vector, id)] + [bool(like) or bool(unlike)]
    if sum(given) != 1:
        raise InvalidRequest("give exactly one of image, vector, id and like to search by")
    if vector is not None:
        row = np.asarray(vector)
        if row.ndim != 1:
            raise InvalidRequest(f"the vector has shape {list(row.shape)}, wanted [D]; reshape it")
        return row
    if id is not None:
        return ItemId(id)
    return Examples(like=like, unlike=unlike) if image is None else image
