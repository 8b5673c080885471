"""Collections on a Milvus server or cluster (or embedded: Milvus Lite), behind the same protocols.

For collections that outgrow one machine; docs/scaling.md says when. Milvus keeps its own promises
about durability and has no counterpart to some things of a local store; asked for those, calls are
FailedPrecondition and name them. Two more differences: the order of items, and of equal scores, is
that of their ids; and all-or-nothing holds for a batch that Milvus takes as one request.

Several servers may share one Milvus: what a collection is stands in a registry collection there.
"""

import logging
import os
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pymilvus

from byol_serving.collections import checks
from byol_serving.collections.milvus_collection import (
    MAX_K,
    STRONG,
    Facts,
    MilvusCollection,
    cannot,
    explained,
)
from byol_serving.collections.milvus_terms import MAX_TERMS, TERM_LENGTH, id_in
from byol_serving.collections.types import CollectionInfo, IdType, IndexKind
from byol_serving.errors import AlreadyExists, InvalidRequest, Unavailable, UnknownCollection

TOKEN_VARIABLE = "BYOL_MILVUS_TOKEN"
_REGISTRY = "byol_collections"
_PREFIX = "byol_"
_INDEXES: dict[IndexKind, tuple[str, dict[str, int]]] = {
    "flat": ("FLAT", {}),
    "hnsw": ("HNSW", {"M": 32, "efConstruction": 200}),
    "ivf": ("IVF_FLAT", {"nlist": 1024}),
    "ivf-sq8": ("IVF_SQ8", {"nlist": 1024}),
    "ivf-pq": ("IVF_PQ", {"nlist": 1024, "nbits": 8}),
    "auto": ("AUTOINDEX", {}),
}

logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs what it raises as well


class MilvusStore:
    """See `types.Store`."""

    def __init__(self, uri: str) -> None:
        """Connects; the environment's BYOL_MILVUS_TOKEN, if set, is who we are.

        Args:
            uri: http://HOST:19530, https://..., or the path of a Milvus Lite file.

        Raises:
            Unavailable: nobody answers there.
            StoreError: Milvus refused.
        """
        self._uri = uri
        self._changing = threading.Lock()
        self._open: dict[str, MilvusCollection] = {}
        self._closed = False
        with explained(uri):
            self._client: Any = pymilvus.MilvusClient(uri, token=os.environ.get(TOKEN_VARIABLE, ""))
            if not self._client.has_collection(_REGISTRY):
                fields = {"facts": pymilvus.DataType.JSON}
                _create(self._client, _REGISTRY, 2, "flat", fields)

    def create(
        self,
        name: str,
        *,
        dim: int,
        encoder_id: str,
        index: IndexKind = "flat",
        id_type: IdType = "string",
    ) -> "MilvusCollection":
        """Makes an empty collection. See `types.Store`."""
        self._check_open()
        checks.collection_name(name)
        if checks.index_kind(index) not in _INDEXES:
            cannot(f"{index} index", f"use {', '.join(_INDEXES)}")
        if index == "ivf-pq" and dim % 4:
            raise InvalidRequest(f"ivf-pq on milvus needs a dimension in fours, not {dim}")
        facts = Facts(
            name=name,
            dim=checks.dimension(dim),
            encoder_id=encoder_id,
            index=index,
            table=f"{_PREFIX}{uuid.uuid4().hex}",
            id_type=checks.id_type(id_type),
        )
        with self._changing, explained(self._uri):
            if self._registered(name):
                raise AlreadyExists(f"collection {name!r} exists: drop it or choose another name")
            fields = {"metadata": pymilvus.DataType.JSON, "numbers": pymilvus.DataType.JSON}
            _create(self._client, facts.table, dim, index, fields, terms=True)
            row = {"id": name, "vector": [1.0, 0.0], "facts": vars(facts)}
            try:
                self._client.upsert(_REGISTRY, [row])
            except BaseException:
                self._client.drop_collection(facts.table)  # nobody would find it again
                raise
        return self.get(name)

    def get(self, name: str) -> "MilvusCollection":
        """The collection. Raises UnknownCollection."""
        self._check_open()
        with explained(self._uri):
            found = self._registered(name)
        if not found:
            raise UnknownCollection(
                f"there is no collection {name[:80]!r}: list them, or create it"
            )
        known = self._open.get(name)
        if known is None or known.facts != found[0]:
            known = self._open[name] = MilvusCollection(self._client, self._uri, found[0])
        return known

    def list(self) -> list[CollectionInfo]:
        """The facts of all collections, by name."""
        self._check_open()
        with explained(self._uri):
            names = sorted(facts.name for facts in self._registered(None))
        infos = []
        for name in names:
            try:
                infos.append(self.get(name).info)
            except UnknownCollection:  # dropped just now
                continue
        return infos

    def drop(self, name: str) -> None:
        """Deletes a collection with everything in it. Raises UnknownCollection."""
        with self._changing:
            facts = self.get(name).facts
            with explained(self._uri):
                self._client.delete(_REGISTRY, ids=[name])
                self._client.drop_collection(facts.table)
            self._open.pop(name, None)

    def backup(self, destination: Path) -> NoReturn:
        """Not here: raises FailedPrecondition."""
        cannot("backup", "use milvus-backup, or export to Parquet")

    def restore(self, source: Path, name: str) -> NoReturn:
        """Not here: raises FailedPrecondition."""
        cannot("restore", "use milvus-backup, or import from Parquet")

    def close(self) -> None:
        """Gives the connection up; later calls are Unavailable."""
        if not self._closed:
            self._closed = True
            self._client.close()

    def _registered(self, name: str | None) -> Sequence[Facts]:
        rows = self._client.query(
            _REGISTRY,
            filter="" if name is None else id_in([name]),
            output_fields=["facts"],
            limit=MAX_K,
            consistency_level=STRONG,
        )
        return [Facts(**row["facts"]) for row in rows]

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the store is closed: the server is shutting down")


def _create(
    client: Any,
    table: str,
    dim: int,
    index: IndexKind,
    fields: dict[str, Any],
    *,
    terms: bool = False,
) -> None:
    kinds = pymilvus.DataType
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", kinds.VARCHAR, is_primary=True, max_length=checks.MAX_ID_BYTES)
    schema.add_field("vector", kinds.FLOAT_VECTOR, dim=dim)
    for name, kind in fields.items():
        schema.add_field(name, kind)
    if terms:
        schema.add_field(
            "terms",
            kinds.ARRAY,
            element_type=kinds.VARCHAR,
            max_capacity=MAX_TERMS,
            max_length=TERM_LENGTH,
        )
    name, params = _INDEXES[index]
    if index == "ivf-pq":
        params = {**params, "m": dim // 4}  # a byte for four dimensions, as in the local store
    indexes = client.prepare_index_params()
    indexes.add_index("vector", index_type=name, metric_type="IP", params=params)
    client.create_collection(table, schema=schema, index_params=indexes, consistency_level=STRONG)
