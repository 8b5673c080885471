"""What both clients share: each call as a request and a way to read its answer, and when to retry.

A `Call` is plain data, so that the synchronous and the asynchronous client differ in nothing but
how they send it.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from byol_serving.client_batches import DTypeName, Embeddings, Ids, id_texts
from byol_serving.collections.types import (
    CollectionInfo,
    IdType,
    IndexKind,
    IndexStats,
    Item,
    Metadata,
    Page,
    UpsertCounts,
    Verification,
)
from byol_serving.errors import ByolError, InvalidImage, Overloaded, Unavailable
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.rpc.convert import (
    metadata_to_struct,
    pixels_to_tensor,
    raw_array,
)
from byol_serving.rpc.filters import Where, parse_where, to_message
from byol_serving.rpc.items import collection_info, item_value, stats_value, verification_value

Out = TypeVar("Out")


_DTYPES: Mapping[str, pb.DType.ValueType] = {
    "float32": pb.DTYPE_FLOAT32,
    "float16": pb.DTYPE_FLOAT16,
    "int8": pb.DTYPE_INT8,
}
EMBED_STREAM = "/byol.v1.Embedder/EmbedStream"
_EMBEDDER, COLLECTIONS = "/byol.v1.Embedder/", "/byol.v1.Collections/"


@dataclass(frozen=True)
class Call(Generic[Out]):
    """One call, ready to be sent."""

    method: str
    request: Message
    answer: type[Message]
    parse: Callable[[Any], Out]
    repeatable: bool = True
    """Whether doing it twice ends as doing it once: then it is tried again on UNAVAILABLE."""


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """The encoder that a server has loaded."""

    encoder_id: str
    name: str
    image_size: int
    dim: int
    precision: str
    provider: str
    model: str = ""
    """The name that requests call it by."""
    version: str = ""
    stages: Sequence["Stage"] = ()
    """What `extract_features` can be asked for."""
    unnormalized: bool = False
    """Whether `embed` can be called with normalize=False."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of an encoder and its feature map."""

    name: str
    channels: int
    side: int
    """Height and width of the map."""
    stride: int
    """Pixels of the encoder's input from one column, or row, to the next."""


@dataclass(frozen=True, kw_only=True)
class FeatureMaps:
    """Dense features of some images."""

    stages: Mapping[str, Stage]
    """In the order asked for."""
    maps: Mapping[str, NDArray[Any]]
    """[N, channels, side, side] of each stage, in the dtype that was asked for."""
    embeddings: NDArray[Any] | None
    """[N, D], if asked for."""


@dataclass(frozen=True, kw_only=True)
class BackupInfo:
    """What a server copied."""

    path: str
    """On the server."""
    collections: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Exponential backoff with full jitter, never shorter than the server's own hint."""

    attempts: int = 5
    """Tries altogether; 1 never tries again."""
    first_s: float = 0.05
    """Upper bound of the first pause; it doubles each time ..."""
    longest_s: float = 2.0
    """... up to this."""

    def pause(self, error: ByolError, call: Call[Any], tried: int, left_s: float) -> float | None:
        """Seconds to wait before trying again, or None to give up.

        Overloaded says that nothing was done, so it is safe for any call; after Unavailable the
        server may have done the work, so only repeatable calls are sent again.
        """
        match error:
            case Overloaded(retry_after_s=least):
                pass
            case Unavailable() if call.repeatable:
                least = 0.0
            case _:
                return None
        most = min(self.longest_s, self.first_s * 2.0 ** (tried - 1))
        pause = least + random.uniform(0, most)
        return pause if tried < self.attempts and pause < left_s else None


def moved(error: ByolError, offset: int) -> ByolError:
    """The error of one part of a split request, with the position in the whole."""
    if isinstance(error, InvalidImage) and error.position is not None:
        return error.at(error.position + offset)
    return error


# --- Embedder -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Which model a call is for."""

    model: str = ""
    """Empty: the server's default."""
    version: str = ""
    """Empty: the version in use."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which embeddings a call is for, and in which form."""

    dtype: DTypeName
    normalize: bool
    target: Target


def embed_request(images: Sequence[bytes], wanted: Wanted) -> pb.EmbedRequest:
    """A request with image files."""
    return pb.EmbedRequest(
        images=images,
        dtype=_DTYPES[wanted.dtype],
        unnormalized=not wanted.normalize,
        model=wanted.target.model,
        version=wanted.target.version,
    )


def embed_answer(response: pb.EmbedResponse) -> Embeddings:
    """[N, D] in the dtype that was asked for."""
    return raw_array(response.embeddings)


def embed(images: Sequence[bytes], wanted: Wanted) -> Call[Embeddings]:
    """Embed image files."""
    request = embed_request(images, wanted)
    return Call(_EMBEDDER + "Embed", request, pb.EmbedResponse, embed_answer)


def embed_pixels(pixels: NDArray[np.uint8], wanted: Wanted) -> Call[Embeddings]:
    """Embed uint8 [N, S, S, 3]."""
    request = embed_request((), wanted)
    request.pixels.CopyFrom(pixels_to_tensor(pixels))
    return Call(_EMBEDDER + "Embed", request, pb.EmbedResponse, embed_answer)


def encoder(target: Target) -> Call[EncoderInfo]:
    """What is loaded."""

    def parse(answer: pb.Encoder) -> EncoderInfo:
        return EncoderInfo(
            encoder_id=answer.encoder_id,
            name=answer.name,
            image_size=answer.image_size,
            dim=answer.dim,
            precision=answer.precision,
            provider=answer.provider,
            model=answer.model,
            version=answer.version,
            stages=tuple(map(_stage, answer.stages)),
            unnormalized=answer.unnormalized,
        )

    request = pb.GetEncoderRequest(model=target.model, version=target.version)
    return Call(_EMBEDDER + "GetEncoder", request, pb.Encoder, parse)


def extract(
    images: Sequence[bytes] | NDArray[np.uint8],
    stages: Sequence[str],
    wanted: Wanted,
    with_embeddings: bool,
) -> Call[FeatureMaps]:
    """Dense feature maps of image files, or of pixels uint8 [N, S, S, 3]."""
    pixels = isinstance(images, np.ndarray)
    request = pb.ExtractFeaturesRequest(
        images=() if pixels else images,
        pixels=pixels_to_tensor(images) if isinstance(images, np.ndarray) else None,
        dtype=_DTYPES[wanted.dtype],
        model=wanted.target.model,
        version=wanted.target.version,
        stages=stages,
        with_embeddings=with_embeddings,
        unnormalized=not wanted.normalize,
    )

    def parse(answer: pb.ExtractFeaturesResponse) -> FeatureMaps:
        return FeatureMaps(
            stages={each.stage.name: _stage(each.stage) for each in answer.maps},
            maps={each.stage.name: raw_array(each.values) for each in answer.maps},
            embeddings=raw_array(answer.embeddings) if answer.HasField("embeddings") else None,
        )

    return Call(_EMBEDDER + "ExtractFeatures", request, pb.ExtractFeaturesResponse, parse)


def _stage(stage: pb.Stage) -> Stage:
    return Stage(name=stage.name, channels=stage.channels, side=stage.side, stride=stage.stride)


# --- Collections --------------------------------------------------------------------------------


def create(
    name: str, dim: int, encoder_id: str, index: IndexKind, id_type: IdType
) -> Call[CollectionInfo]:
    """Make a collection."""
    request = pb.CreateCollectionRequest(
        name=name, dim=dim, encoder_id=encoder_id, index=index, id_type=id_type
    )
    method = COLLECTIONS + "CreateCollection"
    return Call(method, request, pb.Collection, collection_info, repeatable=False)


def collection(name: str) -> Call[CollectionInfo]:
    """A collection's facts."""
    request = pb.GetCollectionRequest(name=name)
    return Call(COLLECTIONS + "GetCollection", request, pb.Collection, collection_info)


def collections() -> Call[list[CollectionInfo]]:
    """All collections."""

    def parse(answer: pb.ListCollectionsResponse) -> list[CollectionInfo]:
        return [collection_info(each) for each in answer.collections]

    request = pb.ListCollectionsRequest()
    return Call(COLLECTIONS + "ListCollections", request, pb.ListCollectionsResponse, parse)


def drop(name: str) -> Call[None]:
    """Delete a collection."""
    request = pb.DropCollectionRequest(name=name)
    method = COLLECTIONS + "DropCollection"
    return Call(method, request, pb.DropCollectionResponse, _nothing, repeatable=False)


def upsert_answer(answer: pb.UpsertResponse) -> UpsertCounts:
    """How many were new, and how many replaced."""
    return UpsertCounts(inserted=answer.inserted, updated=answer.updated)


def summed(counts: Iterable[UpsertCounts]) -> UpsertCounts:
    """The counts of all parts."""
    inserted = updated = 0
    for each in counts:
        inserted += each.inserted
        updated += each.updated
    return UpsertCounts(inserted=inserted, updated=updated)


def upsert(request: pb.UpsertRequest) -> Call[UpsertCounts]:
    """Insert or replace."""
    return Call(COLLECTIONS + "Upsert", request, pb.UpsertResponse, upsert_answer)


def set_metadata(name: str, ids: Ids, metadata: Sequence[Metadata]) -> Call[None]:
    """Replace metadata."""
    structs = map(metadata_to_struct, metadata)
    request = pb.SetMetadataRequest(collection=name, ids=id_texts(ids), metadata=structs)
    return Call(COLLECTIONS + "SetMetadata", request, pb.SetMetadataResponse, _nothing)


def delete(name: str, ids: Ids | None, where: Where | None) -> Call[int]:
    """Delete by id or by filter; sent again, it would count fewer, so it is not repeatable."""
    request = pb.DeleteRequest(
        collection=name, ids=id_texts(ids or ()), filter=filter_message(where)
    )
    method = COLLECTIONS + "Delete"
    return Call(method, request, pb.DeleteResponse, lambda answer: answer.deleted, repeatable=False)


def get(name: str, ids: Ids, with_vectors: bool) -> Call[list[Item]]:
    """Items by id."""

    def parse(answer: pb.GetResponse) -> list[Item]:
        return [item_value(each) for each in answer.items]

    request = pb.GetRequest(collection=name, ids=id_texts(ids), with_vectors=with_vectors)
    return Call(COLLECTIONS + "Get", request, pb.GetResponse, parse)


def list_items(
    name: str,
    where: Where | None,
    page_size: int,
    page_token: str,
    with_vectors: bool,
    with_metadata: bool,
) -> Call[Page]:
    """One page of items."""

    def parse(answer: pb.ListItemsResponse) -> Page:
        items = [item_value(each) for each in answer.items]
        return Page(items=items, after=answer.next_page_token)

    request = pb.ListItemsRequest(
        collection=name,
        filter=filter_message(where),
        page_size=page_size,
        page_token=page_token,
        with_vectors=with_vectors,
        without_metadata=not with_metadata,
    )
    return Call(COLLECTIONS + "ListItems", request, pb.ListItemsResponse, parse)


def stats(name: str) -> Call[IndexStats]:
    """How its index stands."""
    request = pb.GetCollectionStatsRequest(name=name)
    return Call(COLLECTIONS + "GetCollectionStats", request, pb.CollectionStats, stats_value)


def verify(name: str) -> Call[Verification]:
    """Compare index and store."""
    request = pb.VerifyCollectionRequest(collection=name)
    method = COLLECTIONS + "VerifyCollection"
    return Call(method, request, pb.VerifyCollectionResponse, verification_value)


def backup(name: str) -> Call[BackupInfo]:
    """Copy all collections; a second try would find the first one's folder."""

    def parse(answer: pb.BackupResponse) -> BackupInfo:
        return BackupInfo(path=answer.path, collections=tuple(answer.collections))

    request = pb.BackupRequest(name=name)
    method = COLLECTIONS + "Backup"
    return Call(method, request, pb.BackupResponse, parse, repeatable=False)


def restore(backup: str, name: str, new_name: str) -> Call[CollectionInfo]:
    """Bring back a collection; a second try would find the first one's."""
    request = pb.RestoreRequest(backup=backup, collection=name, name=new_name)
    method = COLLECTIONS + "Restore"
    return Call(method, request, pb.Collection, collection_info, repeatable=False)


def filter_message(where: Where | None) -> pb.Filter | None:
    """A filter on the wire."""
    return None if where is None else to_message(parse_where(where))


def _nothing(answer: Message) -> None:
    return None
