"""The Collections service: a thin layer over the store, plus embedding for calls with images."""

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import grpc
import numpy as np

from byol_serving.collections.checks import collection_name
from byol_serving.collections.types import Collection, IdType, IndexKind, Item, Page, Store, Vectors
from byol_serving.errors import FailedPrecondition, InvalidRequest
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.pb.byol.v1 import byol_pb2_grpc
from byol_serving.rpc import analysis
from byol_serving.rpc.calls import deadline_of
from byol_serving.rpc.checks import check_claimed_encoder, check_lengths
from byol_serving.rpc.convert import struct_to_metadata, tensor_to_vectors
from byol_serving.rpc.filters import from_message
from byol_serving.rpc.items import (
    collection_message,
    item_message,
    stats_message,
    verification_message,
)
from byol_serving.rpc.models import Models
from byol_serving.rpc.pools import BlockingCalls, in_order
from byol_serving.rpc.queries import Leaf, filter_of, images_of, leaves_of, run_search

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Out = TypeVar("Out")
Claiming: TypeAlias = (
    pb.UpsertRequest
    | pb.SearchRequest
    | pb.ClassifyRequest
    | pb.VerifyPairsRequest
    | pb.CalibratePairsRequest
)
_PAGE_SIZE = 100
_NO_ROWS: Vectors = np.empty((0, 0), np.float32)


class CollectionsService(byol_pb2_grpc.CollectionsServicer):
    """byol.v1.Collections."""

    def __init__(
        self,
        store: Store | None,
        models: Models,
        calls: BlockingCalls,
        searches: BlockingCalls,
        *,
        stream_window: int,
        backups: Path | None = None,
    ) -> None:
        """Calls are FAILED_PRECONDITION without a store, those with images without a model.

        Searches have threads of their own, so that they do not wait behind a backup: no more than
        there are cores, since those in excess only take the cores from each other.

        `backups` is the folder of Backup and Restore, which are refused without one.
        """
        self._maybe_store = store
        self._models = models
        self._calls = calls
        self._searches = searches
        self._window = stream_window
        self._maybe_backups = backups

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
        # The store checks the name, the index kind and the id type: any strings on the wire.
        index = cast(IndexKind, request.index or "flat")
        id_type = cast(IdType, request.id_type or "string")
        collection = await self._run(
            lambda: store.create(
                request.name, dim=dim, encoder_id=encoder_id, index=index, id_type=id_type
            ),
            context,
        )
        return collection_message(collection.info)

    async def GetCollection(
        self, request: pb.GetCollectionRequest, context: Context
    ) -> pb.Collection:
        """A collection's facts."""
        return collection_message(await self._on(request.name, lambda c: c.info, context))

    async def GetCollectionStats(
        self, request: pb.GetCollectionStatsRequest, context: Context
    ) -> pb.CollectionStats:
        """How a collection's index stands."""
        return stats_message(await self._on(request.name, lambda c: c.stats(), context))

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

    async def ListItems(
        self, request: pb.ListItemsRequest, context: Context
    ) -> pb.ListItemsResponse:
        """One page of items."""
        where = filter_of(request)

        def page(collection: Collection) -> Page:
            return collection.page(
                request.page_token,
                request.page_size or _PAGE_SIZE,
                condition=where,
                with_metadata=not request.without_metadata,
                with_vectors=request.with_vectors,
            )

        found = await self._on(request.collection, page, context)
        items = map(item_message, found.items)
        return pb.ListItemsResponse(items=items, next_page_token=found.after)

    async def Search(self, request: pb.SearchRequest, context: Context) -> pb.SearchResponse:
        """The nearest of each query."""
        return await self._search(request, context, wait=False)

    async def SearchStream(
        self, requests: AsyncIterator[pb.SearchRequest], context: Context
    ) -> AsyncIterator[pb.SearchResponse]:
        """Many searches, answered in order."""
        answers = in_order(
            requests, lambda each: self._search(each, context, wait=True), window=self._window
        )
        async with aclosing(answers):
            async for answer in answers:
                yield answer

    async def FindDuplicates(
        self, request: pb.FindDuplicatesRequest, context: Context
    ) -> pb.FindDuplicatesResponse:
        """Groups of items that are nearly the same."""
        return await self._long_on(
            request.collection,
            lambda c, stopping: analysis.duplicates(c, request, stopping),
            context,
        )

    async def FindOutliers(
        self, request: pb.FindOutliersRequest, context: Context
    ) -> pb.FindOutliersResponse:
        """The items that are like no other."""
        return await self._long_on(
            request.collection,
            lambda c, stopping: analysis.outliers(c, request, stopping),
            context,
        )

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        """Labels by the votes of neighbours."""
        rows = await self._embedded(request.collection, request.queries, context)
        return await self._search_on(request, lambda c: analysis.classes(c, request, rows), context)

    async def VerifyPairs(
        self, request: pb.VerifyPairsRequest, context: Context
    ) -> pb.VerifyPairsResponse:
        """Whether both of each pair show the same."""
        examples = analysis.examples_of(request.pairs)
        rows = await self._embedded(request.collection, examples, context)
        return await self._claimed_on(
            request, lambda c: analysis.verified(c, request, rows), context
        )

    async def CalibratePairs(
        self, request: pb.CalibratePairsRequest, context: Context
    ) -> pb.CalibratePairsResponse:
        """A threshold from pairs known to be the same or not."""
        examples = analysis.examples_of(request.pairs)
        rows = await self._embedded(request.collection, examples, context)
        return await self._claimed_on(
            request, lambda c: analysis.calibrated(c, request, rows), context
        )

    async def VerifyCollection(
        self, request: pb.VerifyCollectionRequest, context: Context
    ) -> pb.VerifyCollectionResponse:
        """Compares the index with the store."""
        found = await self._on(request.collection, lambda c: c.verify(), context)
        return verification_message(found)

    async def Backup(self, request: pb.BackupRequest, context: Context) -> pb.BackupResponse:
        """Copies all collections into the folder of backups."""
        store, path = self._store(), self._backups() / collection_name(request.name, "backup")
        await self._run(lambda: store.backup(path), context)
        names = sorted(each.name for each in path.iterdir() if each.is_dir())
        return pb.BackupResponse(path=str(path.absolute()), collections=names)

    async def Restore(self, request: pb.RestoreRequest, context: Context) -> pb.Collection:
        """Brings back one collection of a backup."""
        store, backup = self._store(), collection_name(request.backup, "backup")
        source = self._backups() / backup / collection_name(request.collection)
        name = request.name or request.collection
        restored = await self._run(lambda: store.restore(source, name), context)
        return collection_message(restored.info)

    async def _search(
        self, request: pb.SearchRequest, context: Context, *, wait: bool
    ) -> pb.SearchResponse:
        leaves = leaves_of(request.queries)
        rows = await self._embedded(request.collection, leaves, context, wait=wait)
        return await self._search_on(request, lambda c: run_search(c, request, rows), context)

    async def _prepare_upsert(
        self, request: pb.UpsertRequest, context: Context, *, wait: bool
    ) -> Callable[[], pb.UpsertResponse]:
        """Everything but the write: checks, and embedding where images were sent."""
        store = self._store()
        ids = list(request.ids)
        metadata = [struct_to_metadata(each) for each in request.metadata] or None
        check_lengths(request)
        if request.images:
            vectors = await self._embed(request.collection, request.images, context, wait=wait)
        else:
            vectors = tensor_to_vectors(request.vectors, ndim=2)

        def write() -> pb.UpsertResponse:
            collection = store.get(request.collection)
            _check_claim(collection, request)
            counts = collection.upsert(ids, vectors, metadata)
            return pb.UpsertResponse(inserted=counts.inserted, updated=counts.updated)

        return write

    async def _embedded(
        self, name: str, leaves: Sequence[Leaf], context: Context, *, wait: bool = False
    ) -> Vectors:
        """Vectors of the images among them, float32 [I, D]."""
        images = images_of(leaves)
        return await self._embed(name, images, context, wait=wait) if images else _NO_ROWS

    async def _embed(
        self, name: str, images: Sequence[bytes], context: Context, *, wait: bool
    ) -> Vectors:
        """Vectors of images by the encoder that the collection's other vectors came from."""
        store = self._store()
        info = await self._searches.run(lambda: store.get(name).info, deadline=deadline_of(context))
        with self._models.making(info.encoder_id, info.name) as model:
            return await model.pipeline.embed_images(
                images, deadline=deadline_of(context), wait=wait
            )

    def _store(self) -> Store:
        if self._maybe_store is None:
            raise FailedPrecondition("this server has no store; start it with --store")
        return self._maybe_store

    def _backups(self) -> Path:
        if self._maybe_backups is None:
            raise FailedPrecondition("this server keeps no backups; start it with --backups")
        return self._maybe_backups

    async def _on(self, name: str, call: Callable[[Collection], Out], context: Context) -> Out:
        """Calls with the named collection, off the event loop."""
        store = self._store()
        return await self._run(lambda: call(store.get(name)), context)

    async def _claimed_on(
        self, request: Claiming, call: Callable[[Collection], Out], context: Context
    ) -> Out:
        """The same for a request whose vectors have to come from the collection's encoder."""
        return await self._run(self._checked(request, call), context)

    async def _search_on(
        self, request: Claiming, call: Callable[[Collection], Out], context: Context
    ) -> Out:
        """The same in the threads of searches."""
        return await self._searches.run(self._checked(request, call), deadline=deadline_of(context))

    def _checked(self, request: Claiming, call: Callable[[Collection], Out]) -> Callable[[], Out]:
        store = self._store()

        def checked() -> Out:
            collection = store.get(request.collection)
            _check_claim(collection, request)
            return call(collection)

        return checked

    async def _long_on(
        self, name: str, call: Callable[[Collection, Callable[[], bool]], Out], context: Context
    ) -> Out:
        """The same for work that asks now and then whether it should stop: its caller may leave."""
        ended = threading.Event()
        try:
            return await self._on(name, lambda c: call(c, ended.is_set), context)
        finally:
            ended.set()

    async def _run(self, call: Callable[[], Out], context: Context) -> Out:
        return await self._calls.run(call, deadline=deadline_of(context))


def _check_claim(collection: Collection, request: Claiming) -> None:
    info = collection.info
    check_claimed_encoder(info.name, info.encoder_id, request.encoder_id)
