"""Requests with images as requests with vectors: decoded and embedded here, answered elsewhere.

So the process that owns the collections has no part in decoding and inference. The vectors carry
the id of the encoder that made them, and the owner refuses them if the collection is another's.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import grpc

from byol_serving.collections.types import Vectors
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.pb.byol.v1 import byol_pb2_grpc
from byol_serving.rpc.analysis import examples_of
from byol_serving.rpc.checks import check_claimed_encoder, check_lengths
from byol_serving.rpc.convert import pack_embeddings
from byol_serving.rpc.forwarding import Prepare
from byol_serving.rpc.models import Models
from byol_serving.rpc.queries import Leaf, images_of, leaves_of

WithLeaves: TypeAlias = (
    pb.SearchRequest | pb.ClassifyRequest | pb.VerifyPairsRequest | pb.CalibratePairsRequest
)


class ImagesToVectors:
    """Embeds the images of requests to collections, by the encoder of each's collection."""

    def __init__(self, models: Models, owner: grpc.aio.Channel) -> None:
        """`owner` leads to the process that has the collections."""
        self._models = models
        self._collections: Any = byol_pb2_grpc.CollectionsStub(owner)

    def methods(self) -> Mapping[str, Prepare]:
        """What to do with the requests of which method; for `Forwarder`."""
        return {
            "Upsert": self.upsert,
            "UpsertStream": self.upsert,
            "Search": self.search,
            "SearchStream": self.search,
            "Classify": self.search,
            "VerifyPairs": self.search,
            "CalibratePairs": self.search,
        }

    async def upsert(self, request: pb.UpsertRequest, deadline: float | None, wait: bool) -> None:
        """Images of items; raises as `Pipeline.embed_images`, InvalidRequest, EncoderMismatch."""
        if not request.images:
            return
        check_lengths(request)
        rows = await self._embed(request, request.images, deadline, wait)
        del request.images[:]
        pack_embeddings(request.vectors, rows)

    async def search(self, request: WithLeaves, deadline: float | None, wait: bool) -> None:
        """Images of queries, examples and pairs; raises as `upsert`."""
        leaves = _leaves(request)
        images = images_of(leaves)
        if not images:
            return
        rows = iter(await self._embed(request, images, deadline, wait))
        for leaf in leaves:
            if leaf.WhichOneof("by") == "image":
                pack_embeddings(leaf.vector, next(rows))

    async def _embed(
        self,
        request: pb.UpsertRequest | WithLeaves,
        images: Sequence[bytes],
        deadline: float | None,
        wait: bool,
    ) -> Vectors:
        """Vectors [N, D] of the images, and on the request the encoder that made them."""
        wanted = pb.GetCollectionRequest(name=request.collection)
        info: pb.Collection = await self._collections.GetCollection(wanted)
        check_claimed_encoder(info.name, info.encoder_id, request.encoder_id)
        with self._models.making(info.encoder_id, info.name) as model:
            rows = await model.pipeline.embed_images(images, deadline=deadline, wait=wait)
        request.encoder_id = info.encoder_id
        return rows


def _leaves(request: WithLeaves) -> list[Leaf]:
    match request:
        case pb.SearchRequest():
            return leaves_of(request.queries)
        case pb.ClassifyRequest():
            return list(request.queries)
        case pb.VerifyPairsRequest() | pb.CalibratePairsRequest():
            return list(examples_of(request.pairs))
