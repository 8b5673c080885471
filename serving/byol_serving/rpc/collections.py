"""The Collections service: a thin layer over the store, plus embedding for calls with images."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias, TypeVar, cast

import grpc
import numpy as np

from byol_serving.collections.store import Store
from byol_serving.collections.types import Collection, Hit, IndexKind, Item, Vectors
from byol_serving.errors import EncoderMismatch, FailedPrecondition, InvalidRequest
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.pb.byol.v1 import byol_pb2_grpc
from byol_serving.rpc.calls import deadline_of
from byol_serving.rpc.convert import struct_to_metadata, tensor_to_vectors
from byol_serving.rpc.filters import from_message
from byol_serving.rpc.items import collection_message, hits_message, item_message
from byol_serving.rpc.models import Models
from byol_serving.rpc.pools import BlockingCalls, in_order
from byol_serving.rpc.queries import run_search

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Out = TypeVar("Out")


class CollectionsService(byol_pb2_grpc.CollectionsServicer):
    """byol.v1.Collections."""

    def __init__(
        self,
        store: Store | None,
        models: Models,
        calls: BlockingCalls,
        *,
        stream_window: int,
    ) -> None:
        """Calls are FAILED_PRECONDITION without a store, those with images without a model."""
        self._maybe_store = store
        self._models = models
        self._calls = calls
        self._window = stream_window

    async def CreateCollection(
        self, request: pb.CreateCollectionRequest, context: Context
    ) -> pb.Collection:
        """Makes an empty collection, by default for the loaded encoder."""
        store = self._store()
        if request.dim and request.encoder_id:
            dim, encoder_id = request.dim, request.encoder_id
        else:
            info = self._models.find().info
            dim, encoder_id = request.dim or info.dim, request.encoder_id or info.encoder_id
            if encoder_id == info.encoder_id and dim != info.dim:
                raise InvalidRequest(
                    f"dim {dim} is not the loaded encoder's {info.dim}; leave it 0, or name the"
                    " encoder_id of the vectors you will bring"
                )
        # The store checks the name and the index kind, which is any string on the wire.
        index = cast(IndexKind, request.index or "flat")
        collection = await self._run(
            lambda: store.create(request.name, dim=dim, encoder_id=encoder_id, index=index), context
        )
        return collection_message(collection.info)

    async def GetCollection(
        self, request: pb.GetCollectionRequest, context: Context
    ) -> pb.Collection:
        """A collection's facts."""
        return collection_message(await self._on(request.name, lambda c: c.info, context))

    async def ListCollections(
        self, request: pb.ListCollectionsRequest, context: Context
    ) -> pb.ListCollectionsResponse:
        """All collections."""
        infos = await self._run(self._store().list, context)
        return pb.ListCollectionsResponse(collections=map(collection_message, infos))

    async def DropCollection(
        self, request: pb.DropCollectionRequest, context: Context
    ) -> pb.DropCollectionResponse:
        """Deletes a collection and everything in it."""
        store = self._store()
        await self._run(lambda: store.drop(request.name), context)
        return pb.DropCollectionResponse()

    async def Upsert(self, request: pb.UpsertRequest, context: Context) -> pb.UpsertResponse:
        """Inserts or replaces; answered once it is on disk."""
        write = await self._prepare_upsert(request, context, wait=False)
        return await self._run(write, context)

    async def UpsertStream(
        self, requests: AsyncIterator[pb.UpsertRequest], context: Context
    ) -> AsyncIterator[pb.UpsertResponse]:
        """Many upserts: images are embedded ahead, writes happen in order, one after another."""
        writes = in_order(
            requests,
            lambda each: self._prepare_upsert(each, context, wait=True),
            window=self._window,
        )
        async with aclosing(writes):
            async for write in writes:
                yield await self._run(write, context)

    async def SetMetadata(
        self, request: pb.SetMetadataRequest, context: Context
    ) -> pb.SetMetadataResponse:
        """Replaces metadata only."""
        metadata = [struct_to_metadata(each) for each in request.metadata]
        if len(metadata) != len(request.ids):
            raise InvalidRequest(
                f"{len(request.ids)} ids but {len(metadata)} metadata; send one for each id"
            )
        ids = list(request.ids)
        await self._on(request.collection, lambda c: c.set_metadata(ids, metadata), context)
        return pb.SetMetadataResponse()

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse:
        """Deletes ids, or what matches a filter."""
        if request.HasField("filter") == bool(request.ids):
            raise InvalidRequest("send either ids or a filter to delete by, and not both")
        if request.ids:
            ids = list(request.ids)
            deleted = await self._on(request.collection, lambda c: c.delete(ids), context)
        else:
            where = from_message(request.filter)
            deleted = await self._on(request.collection, lambda c: c.delete_where(where), context)
        return pb.DeleteResponse(deleted=deleted)

    async def Get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:
        """Items by id."""
        ids, with_vectors = list(request.ids), request.with_vectors

        def get(collection: Collection) -> list[Item]:
            return collection.get(ids, with_vectors=with_vectors)

        items = await self._on(request.collection, get, context)
        return pb.GetResponse(items=map(item_message, items))

    async def Search(self, request: pb.SearchRequest, context: Context) -> pb.SearchResponse:
        """The nearest of each query."""
        where = from_message(request.filter) if request.HasField("filter") else None
        images = [each.image for each in request.queries if each.WhichOneof("by") == "image"]
        embedded: Vectors = np.empty((0, 0), np.float32)
        if images:
            embedded = await self._embed(request.collection, images, context, wait=False)

        def search(collection: Collection) -> list[list[Hit]]:
            return run_search(collection, request, embedded, where)

        results = await self._on(request.collection, search, context)
        return pb.SearchResponse(results=map(hits_message, results))

    async def _prepare_upsert(
        self, request: pb.UpsertRequest, context: Context, *, wait: bool
    ) -> Callable[[], pb.UpsertResponse]:
        """Everything but the write: checks, and embedding where images were sent."""
        store = self._store()
        ids = list(request.ids)
        metadata = [struct_to_metadata(each) for each in request.metadata] or None
        _check_lengths(request)
        if request.images:
            vectors = await self._embed(request.collection, request.images, context, wait=wait)
        else:
            vectors = tensor_to_vectors(request.vectors, ndim=2)

        def write() -> pb.UpsertResponse:
            collection = store.get(request.collection)
            _check_claimed_encoder(collection, request.encoder_id)
            counts = collection.upsert(ids, vectors, metadata)
            return pb.UpsertResponse(inserted=counts.inserted, updated=counts.updated)

        return write

    async def _embed(
        self, name: str, images: Sequence[bytes], context: Context, *, wait: bool
    ) -> Vectors:
        """Vectors of images by the encoder that the collection's other vectors came from."""
        info = await self._on(name, lambda c: c.info, context)
        with self._models.making(info.encoder_id, info.name) as model:
            return await model.pipeline.embed_images(
                images, deadline=deadline_of(context), wait=wait
            )

    def _store(self) -> Store:
        if self._maybe_store is None:
            raise FailedPrecondition("this server has no store; start it with --store")
        return self._maybe_store

    async def _on(self, name: str, call: Callable[[Collection], Out], context: Context) -> Out:
        """Calls with the named collection, off the event loop."""
        store = self._store()
        return await self._run(lambda: call(store.get(name)), context)

    async def _run(self, call: Callable[[], Out], context: Context) -> Out:
        return await self._calls.run(call, deadline=deadline_of(context))


def _check_claimed_encoder(collection: Collection, encoder_id: str) -> None:
    info = collection.info
    if encoder_id and encoder_id != info.encoder_id:
        raise EncoderMismatch(
            f"collection {info.name!r} holds vectors of encoder {info.encoder_id[:12]}, not of"
            f" {encoder_id[:12]}; use another collection, or serve the encoder that made it"
        )


def _check_lengths(request: pb.UpsertRequest) -> None:
    """Refuses an upsert whose parts do not belong together, before anything is decoded."""
    if not request.ids:
        raise InvalidRequest("the request has no ids; send one for each image or vector")
    if bool(request.images) == request.HasField("vectors"):
        raise InvalidRequest("send either images or vectors to upsert, and not both")
    rows: Sequence[tuple[str, int]] = [
        ("images", len(request.images)),
        ("metadata", len(request.metadata)),
    ]
    for name, count in rows:
        if count and count != len(request.ids):
            raise InvalidRequest(f"{len(request.ids)} ids but {count} {name}; send one for each id")
