"""The asynchronous client; see `byol_serving.client`, which is where to import it from."""

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from byol_serving import client_batches
from byol_serving import client_calls as calls
from byol_serving import client_search as searching
from byol_serving.client_analysis import AsyncAnalysis
from byol_serving.client_batches import (
    DTypeName,
    Embeddings,
    ExampleLike,
    Ids,
    ImageLike,
    QueryLike,
)
from byol_serving.client_calls import BackupInfo, EncoderInfo, FeatureMaps, Target, Wanted
from byol_serving.client_connection import AsyncConnection
from byol_serving.client_progress import OnProgress, Tally
from byol_serving.client_search import SearchOptions
from byol_serving.collections.grouping import HitGroup
from byol_serving.collections.types import (
    CollectionInfo,
    Columns,
    Hit,
    IdType,
    IndexKind,
    IndexStats,
    Item,
    Metadata,
    UpsertCounts,
    Verification,
)
from byol_serving.rpc.filters import Where


class AsyncClient(AsyncConnection):
    """A connection to one server, for one event loop: `Client` with coroutines."""

    @cached_property
    def analysis(self) -> AsyncAnalysis:
        """Duplicates, outliers, labels and pairs."""
        return AsyncAnalysis(self._send)

    # --- images to vectors ----------------------------------------------------------------------

    async def encoder(self, *, model: str = "", version: str = "") -> EncoderInfo:
        """An encoder that the server has loaded: by default the one that `embed` uses."""
        return await self._send(calls.encoder(Target(model, version)))

    async def embed(
        self,
        images: Iterable[ImageLike] | NDArray[np.uint8],
        *,
        dtype: DTypeName = "float32",
        normalize: bool = True,
        model: str = "",
        version: str = "",
        progress: OnProgress | None = None,
    ) -> Embeddings:
        """Embeds images.

        Args:
            images: files, paths, Pillow images or pixels, any number of them; or one array uint8
                [N, S, S, 3] of the encoder's input size, which is sent as it is.
            dtype: of the answer; float16 and int8 (127 times the value) are smaller.
            normalize: to length 1; off: as the encoder gives them (after whitening, where the
                bundle whitens), in float32 or float16.
            model: by name; empty: the server's default.
            version: of the model; empty: the one in use.
            progress: told of each answer; see `client_progress`.

        Returns:
            [N, D] of that dtype; [0, 0] for no images.

        Raises:
            InvalidImage: names the position of the bad image.
            FailedPrecondition: a bundle too old to give embeddings that are not normalised.
        """
        wanted = Wanted(dtype=dtype, normalize=normalize, target=Target(model, version))
        if isinstance(images, np.ndarray) and images.ndim == 4:
            chunks = client_batches.chunked(images, self._batch_size)
            parts = self._spread(lambda each: self._send(calls.embed_pixels(each, wanted)), chunks)
        else:
            parts = self.embed_stream(
                images, dtype=dtype, normalize=normalize, model=model, version=version
            )
        tally, rows = Tally(progress, images), []
        async with aclosing(parts):
            async for part in parts:
                tally.add(len(part))
                rows.append(part)
        return client_batches.joined(rows, dtype)

    async def embed_stream(
        self,
        images: Iterable[ImageLike],
        *,
        dtype: DTypeName = "float32",
        normalize: bool = True,
        model: str = "",
        version: str = "",
        progress: OnProgress | None = None,
    ) -> AsyncGenerator[Embeddings]:
        """Embeds any number of images, a few requests at a time: yields [n, D] a batch, in order.

        `images` is read as the server takes them, so a generator over millions of files uses little
        memory.
        """
        # Not the EmbedStream call: where a server ends it early while the client still writes,
        # grpc.aio reports INTERNAL in place of what the server said.
        wanted = Wanted(dtype=dtype, normalize=normalize, target=Target(model, version))
        batches = client_batches.batches(images, max_images=self._batch_size)
        tally = Tally(progress, images)
        answers = self._spread(
            lambda part: self._send(calls.embed(part.images, wanted), offset=part.offset),
            batches,
        )
        async with aclosing(answers):
            async for rows in answers:
                tally.add(len(rows))
                yield rows

    async def extract_features(
        self,
        images: Sequence[ImageLike] | NDArray[np.uint8],
        stages: Sequence[str],
        *,
        dtype: DTypeName = "float32",
        with_embeddings: bool = False,
        normalize: bool = True,
        model: str = "",
        version: str = "",
    ) -> FeatureMaps:
        """Dense feature maps of named stages, for segmentation and detection heads.

        Args:
            images: as in `embed`; sent in one request, because maps are large.
            stages: names out of `encoder().stages`.
            dtype: of the answer: float32 or float16.
            with_embeddings: also the embeddings, which the same run of the encoder gives.
            normalize: the embeddings, as in `embed`.
            model: by name; empty: the server's default.
            version: of the model; empty: the one in use.
        """
        sent = client_batches.one_request(images)
        wanted = Wanted(dtype=dtype, normalize=normalize, target=Target(model, version))
        return await self._send(calls.extract(sent, stages, wanted, with_embeddings))

    # --- collections ----------------------------------------------------------------------------

    async def create_collection(
        self,
        name: str,
        *,
        dim: int = 0,
        encoder_id: str = "",
        index: IndexKind = "flat",
        id_type: IdType = "string",
    ) -> CollectionInfo:
        """Makes an empty collection; by default for vectors of the loaded encoder."""
        return await self._send(calls.create(name, dim, encoder_id, index, id_type))

    async def collection(self, name: str) -> CollectionInfo:
        """A collection's facts."""
        return await self._send(calls.collection(name))

    async def stats(self, collection: str) -> IndexStats:
        """How its index stands: what answers, its measured recall, what waits, its memory."""
        return await self._send(calls.stats(collection))

    async def collections(self) -> list[CollectionInfo]:
        """All collections."""
        return await self._send(calls.collections())

    async def drop_collection(self, name: str) -> None:
        """Deletes a collection with everything in it."""
        await self._send(calls.drop(name))

    async def upsert(
        self,
        collection: str,
        ids: Ids,
        *,
        images: Iterable[ImageLike] | None = None,
        vectors: NDArray[np.float32] | None = None,
        metadata: Sequence[Metadata] | None = None,
        encoder_id: str = "",
        progress: OnProgress | None = None,
    ) -> UpsertCounts:
        """Inserts items, or replaces those whose id exists; what it counts is on disk.

        Long lists are split into requests: each is stored whole or not at all, the list is not.

        Args:
            collection: its name.
            ids: one for each item, no two alike.
            images: to be embedded by the server; or
            vectors: float32 or float16 [N, D], made by the collection's encoder.
            metadata: JSON values for each item; absent: empty.
            encoder_id: who made `vectors`; if given and not the collection's, EncoderMismatch.
            progress: told of each answer; see `client_progress`.
        """
        parts = client_batches.upsert_parts(
            collection,
            ids,
            images=images,
            vectors=vectors,
            metadata=metadata,
            encoder_id=encoder_id,
            max_images=self._batch_size,
        )
        counts = self._spread(
            lambda part: self._send(calls.upsert(part.request), offset=part.offset), parts
        )
        tally, found = Tally(progress, ids), []
        async with aclosing(counts):
            async for each in counts:
                tally.add(each.inserted + each.updated)
                found.append(each)
        return calls.summed(found)

    async def set_metadata(self, collection: str, ids: Ids, metadata: Sequence[Metadata]) -> None:
        """Replaces metadata and leaves the vectors alone; UnknownId if one is not there."""
        await self._send(calls.set_metadata(collection, ids, metadata))

    async def delete(
        self, collection: str, ids: Ids | None = None, *, where: Where | None = None
    ) -> int:
        """Deletes by id, or what matches a filter; returns how many there were."""
        return await self._send(calls.delete(collection, ids, where))

    async def get(self, collection: str, ids: Ids, *, with_vectors: bool = False) -> list[Item]:
        """Items in the order of `ids`; UnknownId if one is not there."""
        return await self._send(calls.get(collection, ids, with_vectors))

    async def items(
        self,
        collection: str,
        *,
        where: Where | None = None,
        page_size: int = 1000,
        with_vectors: bool = False,
        with_metadata: bool = True,
    ) -> AsyncGenerator[Item]:
        """All items, or those that match, in the order they were stored; fetched page by page."""
        token = ""
        while True:
            call = calls.list_items(
                collection, where, page_size, token, with_vectors, with_metadata
            )
            page = await self._send(call)
            for item in page.items:
                yield item
            if not (token := page.after):
                return

    async def search(
        self,
        collection: str,
        *,
        image: ImageLike | None = None,
        vector: NDArray[np.float32] | None = None,
        id: str | int | None = None,
        like: Sequence[ExampleLike] = (),
        unlike: Sequence[ExampleLike] = (),
        k: int = 10,
        offset: int = 0,
        where: Where | None = None,
        min_score: float | None = None,
        mmr_lambda: float | None = None,
        with_vectors: bool = False,
        with_metadata: bool = True,
    ) -> list[Hit]:
        """The k nearest of one query, best first.

        Args:
            collection: its name.
            image: the query; or
            vector: float32 [D]; or
            id: an item of the collection, which is left out of the answer; or
            like: several examples at once (images, vectors, `ItemId`), whose mean is the query, ...
            unlike: ... less a fifth of the mean of these. Items among both are left out.
            k: from 1 to the collection's size; with `min_score` any limit.
            offset: leaves out the best so many (see also `search_pages`).
            where: condition on metadata: a dict such as {"label": "cat", "price": {"gte": 3}}
                (see `byol_serving.rpc.filters`) or a tree of `byol_serving.collections.filters`.
            min_score: leaves out neighbours with a lower cosine similarity.
            mmr_lambda: hits that differ from one another: 1 ranks by similarity to the query
                alone, 0 by difference from the hits before alone.
            with_vectors: also the neighbours' vectors.
            with_metadata: also their metadata.
        """
        options = SearchOptions(
            k=k,
            offset=offset,
            where=where,
            min_score=min_score,
            mmr_lambda=mmr_lambda,
            with_vectors=with_vectors,
            with_metadata=with_metadata,
        )
        query = searching.one_query(image=image, vector=vector, id=id, like=like, unlike=unlike)
        return (await self._send(searching.search(collection, options, queries=[query])))[0]

    async def search_many(
        self,
        collection: str,
        options: SearchOptions | None = None,
        *,
        images: Iterable[ImageLike] = (),
        ids: Iterable[str | int] = (),
        queries: Iterable[QueryLike] = (),
        vectors: NDArray[np.float32] | None = None,
    ) -> list[list[Hit]]:
        """The neighbours of many queries in one call: images, ids, any kind, rows of vectors."""
        wanted = options or SearchOptions()
        call = searching.search(
            collection, wanted, images=images, ids=ids, queries=queries, vectors=vectors
        )
        return await self._send(call)

    async def search_columns(
        self, collection: str, vectors: NDArray[np.float32], options: SearchOptions | None = None
    ) -> Columns:
        """The neighbours of each row of vectors (float32 [Q, D]), ids and scores as arrays."""
        call = searching.columns(collection, vectors, options or SearchOptions())
        return await self._send(call)

    async def search_groups(
        self,
        collection: str,
        query: QueryLike,
        *,
        by: str,
        size: int = 1,
        options: SearchOptions | None = None,
    ) -> list[HitGroup]:
        """The best `options.k` values of the metadata key `by`, each with its best `size` items."""
        options = options or SearchOptions()
        return await self._send(searching.groups(collection, query, options, by=by, size=size))

    async def search_pages(
        self, collection: str, query: QueryLike, options: SearchOptions | None = None
    ) -> AsyncGenerator[Sequence[Hit]]:
        """All hits of one query, `options.k` at a time, best first.

        All pages are of one version of the collection: after a change in between the next page
        raises FailedPrecondition (where the backend counts versions).
        """
        asking: SearchOptions | None = options or SearchOptions()
        while asking is not None:
            found = await self._send(searching.page(collection, query, asking))
            if found.hits:
                yield found.hits
            asking = searching.next_page(asking, found)

    async def search_stream(
        self,
        collection: str,
        batches: Iterable[NDArray[np.float32]],
        options: SearchOptions | None = None,
    ) -> AsyncGenerator[list[list[Hit]]]:
        """The neighbours of many batches of vectors (float32 [n, D]), in order, a few at a time.

        `batches` is read as the server takes them.
        """
        # Not the SearchStream call, for the reason that `embed_stream` gives.
        wanted = options or SearchOptions()
        answers = self._spread(
            lambda each: self._send(searching.search(collection, wanted, vectors=each)), batches
        )
        async with aclosing(answers):
            async for found in answers:
                yield found

    # --- the store ------------------------------------------------------------------------------

    async def verify(self, collection: str) -> Verification:
        """Compares a collection's index with its store, and all bytes with their checksums."""
        return await self._send(calls.verify(collection))

    async def backup(self, name: str) -> BackupInfo:
        """Copies all collections into the server's folder of backups while it serves."""
        return await self._send(calls.backup(name))

    async def restore(self, backup: str, collection: str, *, name: str = "") -> CollectionInfo:
        """Brings back one collection of a backup, under its own name or a new one."""
        return await self._send(calls.restore(backup, collection, name))
