"""The Collections service over real gRPC, with a real store."""

import asyncio
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

import grpc
import numpy as np
import pytest

from byol_serving.client import AsyncClient, Client, ItemId, SearchOptions, UpsertCounts
from byol_serving.collections.database import FILE
from byol_serving.collections.filters import Equals, Range
from byol_serving.config import ServeConfig
from byol_serving.errors import (
    AlreadyExists,
    EncoderMismatch,
    FailedPrecondition,
    InvalidRequest,
    InvalidVector,
    UnknownCollection,
    UnknownId,
)
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.pb.byol.v1 import byol_pb2_grpc
from byol_serving.server import serving
from serving.support import DIM, make_bundle, png, random_pixels, reference

PIXELS = random_pixels(20)
IDS = [f"i{n}" for n in range(20)]
METADATA = [{"n": n, "label": "cat" if n % 2 else "dog"} for n in range(20)]


@pytest.fixture
def name() -> str:
    return f"c-{uuid.uuid4().hex}"


@pytest.fixture
def filled(client: Client, name: str) -> str:
    client.create_collection(name)
    counts = client.upsert(name, IDS, images=map(png, PIXELS), metadata=METADATA)
    assert counts == UpsertCounts(inserted=20, updated=0)
    return name


def test_a_collection_from_creation_to_drop(client: Client, name: str) -> None:
    made = client.create_collection(name)
    assert (made.name, made.dim, made.count, made.index) == (name, DIM, 0, "flat")
    assert made.encoder_id == client.encoder().encoder_id
    assert client.collection(name) == made
    assert made in client.collections()
    with pytest.raises(AlreadyExists, match="exists"):
        client.create_collection(name)
    client.drop_collection(name)
    with pytest.raises(UnknownCollection):
        client.collection(name)


def test_search_by_image_vector_and_id(client: Client, filled: str) -> None:
    wanted = np.argsort(-(reference(PIXELS) @ reference(PIXELS[3:4])[0]))
    best = [IDS[n] for n in wanted]
    by_image = client.search(filled, image=png(PIXELS[3]), k=5)
    assert [hit.id for hit in by_image] == best[:5]
    assert by_image[0].score == pytest.approx(1)
    assert by_image[0].metadata == METADATA[3]
    assert by_image[0].vector is None
    by_vector = client.search(filled, vector=reference(PIXELS[3:4])[0], k=5, with_vectors=True)
    assert [hit.id for hit in by_vector] == best[:5]
    assert by_vector[0].vector is not None
    np.testing.assert_allclose(by_vector[0].vector, reference(PIXELS[3:4])[0], atol=1e-5)
    by_id = client.search(filled, id="i3", k=5, with_metadata=False)
    assert [hit.id for hit in by_id] == best[1:6]
    assert by_id[0].metadata == {}
    assert len(client.search(filled, id="i3", k=20)) == 19


def test_search_with_filters_and_a_least_score(client: Client, filled: str) -> None:
    cats = client.search(filled, image=png(PIXELS[3]), k=20, where={"label": "cat"})
    assert {hit.metadata["label"] for hit in cats} == {"cat"}
    assert len(cats) == 10
    tree = client.search(filled, id="i3", k=20, where=Range("n", gte=15.0))
    assert {hit.id for hit in tree} == set(IDS[15:])
    near = client.search(filled, id="i3", k=20, min_score=0.5)
    assert all(hit.score >= 0.5 for hit in near)
    assert len(near) < 19


def test_many_queries_are_answered_in_their_order(client: Client, filled: str) -> None:
    rows = reference(PIXELS)
    found = client.search_many(
        filled,
        SearchOptions(k=1),
        images=[PIXELS[4]],
        ids=["i5"],
        vectors=rows[6:9].astype(np.float16).astype(np.float32),
    )
    assert [hits[0].id for hits in found[:1] + found[2:]] == ["i4", "i6", "i7", "i8"]
    assert found[1][0].id != "i5"


def test_get_set_metadata_and_delete(client: Client, filled: str) -> None:
    items = client.get(filled, ["i2", "i1"], with_vectors=True)
    assert [item.id for item in items] == ["i2", "i1"]
    assert items[0].vector is not None
    np.testing.assert_allclose(items[0].vector, reference(PIXELS[2:3])[0], atol=1e-5)
    client.set_metadata(filled, ["i1"], [{"n": 100, "tags": ["a", None, {"b": 1.5}]}])
    assert client.get(filled, ["i1"])[0].metadata == {"n": 100, "tags": ["a", None, {"b": 1.5}]}
    assert client.delete(filled, ["i1", "i2", "never"]) == 2
    assert client.delete(filled, where=Equals("label", "dog")) == 9
    assert client.collection(filled).count == 9
    with pytest.raises(UnknownId, match="i1"):
        client.get(filled, ["i1"])
    with pytest.raises(UnknownId):
        client.set_metadata(filled, ["i3", "i1"], [{}, {}])
    with pytest.raises(UnknownId):
        client.search(filled, id="i1", k=1)


def test_upsert_replaces_and_splits_long_lists(address: str, name: str) -> None:
    pixels = random_pixels(50)
    ids = [f"x{n}" for n in range(50)]
    with Client(address, batch_size=8) as client:
        client.create_collection(name)
        assert client.upsert(name, ids, images=pixels).inserted == 50
        again = client.upsert(name, [*ids[:30], "new"], images=random_pixels(31, seed=1))
        assert again == UpsertCounts(inserted=1, updated=30)
        vectors = np.tile(reference(pixels), (50, 1))
        many = [f"y{n}" for n in range(len(vectors))]
        assert client.upsert(name, many, vectors=vectors).inserted == 2500
        broken: list[object] = [*pixels[:12], b"bad"]
        with pytest.raises(Exception, match="image 12"):
            client.upsert(name, ids[:13], images=broken)  # type: ignore[arg-type]


def test_upserts_whose_parts_do_not_fit(client: Client, filled: str) -> None:
    with pytest.raises(InvalidRequest, match="2 ids but 1 images"):
        client.upsert(filled, ["a", "b"], images=[PIXELS[0]])
    with pytest.raises(InvalidRequest, match="1 ids but 2 metadata"):
        client.upsert(filled, ["a"], images=[PIXELS[0]], metadata=[{}, {}])
    with pytest.raises(InvalidRequest, match="either images or vectors"):
        client.upsert(filled, ["a"])
    with pytest.raises(InvalidRequest, match="twice"):
        client.upsert(filled, ["a", "a"], images=PIXELS[:2])
    with pytest.raises(InvalidVector, match=r"\[1, 17\]"):
        client.upsert(filled, ["a"], vectors=np.ones((1, DIM + 1), np.float32))
    assert client.collection(filled).count == 20


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.UpsertRequest(ids=["a", "b"], images=[b"x"]), "2 ids but 1 images"),
        (pb.UpsertRequest(images=[b"x"]), "no ids"),
        (pb.UpsertRequest(ids=["a"]), "either images or vectors"),
        (pb.UpsertRequest(ids=["a"], images=[b"x"], vectors=pb.Tensor()), "either images"),
        (pb.SetMetadataRequest(ids=["a"]), "1 ids but 0 metadata"),
        (pb.DeleteRequest(), "either ids or a filter"),
        (pb.SearchRequest(k=1), "no query"),
        (pb.SearchRequest(k=1, queries=[pb.Query()]), "query 0 is empty"),
        (pb.SearchRequest(k=1, queries=[pb.Query(id="i1")], filter=pb.Filter()), "no condition"),
    ],
)
def test_requests_that_mean_nothing(
    address: str, filled: str, request_: pb.UpsertRequest, message: str
) -> None:
    request_.collection = filled
    method = type(request_).__name__.removesuffix("Request")
    with grpc.insecure_channel(address) as channel:
        stub = byol_pb2_grpc.CollectionsStub(channel)
        with pytest.raises(grpc.RpcError, match=message) as caught:
            getattr(stub, method)(request_, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_vectors_of_another_encoder_are_refused(client: Client, name: str) -> None:
    client.create_collection(name, dim=3, encoder_id="elsewhere")
    vectors = np.eye(3, dtype=np.float32)
    assert client.upsert(name, ["a", "b", "c"], vectors=vectors).inserted == 3
    assert client.search(name, vector=vectors[1], k=1)[0].id == "b"
    with pytest.raises(EncoderMismatch, match="elsewhere"):
        client.upsert(name, ["d"], images=[PIXELS[0]])
    with pytest.raises(EncoderMismatch, match="elsewhere"):
        client.search(name, image=PIXELS[0], k=1)
    with pytest.raises(EncoderMismatch):
        client.upsert(name, ["d"], vectors=vectors[:1], encoder_id="another")
    for claimed in ("elsewhere", ""):
        assert client.search_many(name, SearchOptions(k=1, encoder_id=claimed), vectors=vectors)
    with pytest.raises(EncoderMismatch, match="not of another"):
        client.search_many(name, SearchOptions(encoder_id="another"), vectors=vectors)
    with pytest.raises(InvalidRequest, match="not the loaded encoder's"):
        client.create_collection("x", dim=3)


def test_integer_ids_go_in_and_come_out(client: Client, name: str) -> None:
    assert client.create_collection(name, id_type="int64").id_type == "int64"
    assert client.collection(name).id_type == "int64"
    ids = [2**63 - 1, -4, 0]
    assert client.upsert(name, ids, images=PIXELS[:3]).inserted == 3
    client.set_metadata(name, [-4], [{"n": 4}])
    assert [item.int_id for item in client.get(name, ids)] == ids
    assert client.search(name, image=PIXELS[1], k=1)[0].int_id == -4
    assert -4 not in [hit.int_id for hit in client.search(name, id=-4, k=2)]
    (found,) = client.search_many(name, SearchOptions(k=1), ids=[0])
    assert found[0].int_id != 0
    assert client.search(name, like=[ItemId(-4)], k=1, where={"n": 4}) == []
    with pytest.raises(InvalidRequest, match="id 0 \\('x'\\) is no 64-bit integer"):
        client.upsert(name, ["x"], images=PIXELS[:1])
    assert client.delete(name, [0, 1]) == 1
    with pytest.raises(InvalidRequest, match="id type 'uuid' is unknown"):
        client.create_collection("other", id_type="uuid")  # type: ignore[arg-type]


def test_an_upsert_stream_acknowledges_each_request(address: str, filled: str) -> None:
    requests = [
        pb.UpsertRequest(collection=filled, ids=[f"s{n}"], images=[png(PIXELS[n])])
        for n in range(20)
    ]
    requests.append(pb.UpsertRequest(collection=filled, ids=["bad"], images=[b"text"]))
    with grpc.insecure_channel(address) as channel:
        stub = byol_pb2_grpc.CollectionsStub(channel)
        answers = stub.UpsertStream(iter(requests), timeout=10)
        for _ in range(20):
            assert next(answers).inserted == 1
        with pytest.raises(grpc.RpcError, match="image 0: not an image"):
            next(answers)
    with Client(address) as client:
        assert client.collection(filled).count == 40


async def test_the_asynchronous_client_does_the_same(address: str, name: str) -> None:
    async with AsyncClient(address, batch_size=8) as client:
        await client.create_collection(name)
        await client.upsert(name, IDS, images=map(png, PIXELS), metadata=METADATA)
        hits = await client.search(name, image=png(PIXELS[3]), k=3, where={"label": "cat"})
        assert hits[0].id == "i3"
        many = await client.search_many(name, SearchOptions(k=2), ids=IDS)
        assert len(many) == 20
        await client.set_metadata(name, ["i1"], [{"seen": True}])
        assert (await client.get(name, ["i1"]))[0].metadata == {"seen": True}
        assert await client.delete(name, where={"label": ["cat", "dog"]}) == 19
        assert (await client.collection(name)).count == 1
        assert name in [each.name for each in await client.collections()]
        await client.drop_collection(name)
        with pytest.raises(UnknownCollection):
            await client.collection(name)


async def test_searches_do_not_wait_behind_the_threads_of_writers(tmp_path: Path) -> None:
    async with (
        serving(ServeConfig(store=tmp_path / "store", port=0, collection_workers=1)) as running,
        AsyncClient(running.address) as client,
    ):
        await client.create_collection("x", dim=2, encoder_id="mine")
        await client.upsert("x", ["a"], vectors=np.ones((1, 2), np.float32))
        with closing(sqlite3.connect(tmp_path / "store" / "x" / FILE)) as other:
            other.execute("BEGIN IMMEDIATE")
            write = client.upsert("x", ["b"], vectors=np.ones((1, 2), np.float32))
            held = asyncio.ensure_future(write)
            await asyncio.sleep(0.1)
            hits = await client.search("x", vector=np.ones(2, np.float32), k=1)
            assert [hit.id for hit in hits] == ["a"]
            assert not held.done()
            other.rollback()
        assert (await held).inserted == 1


async def test_a_server_may_lack_the_encoder_or_the_store(tmp_path: Path) -> None:
    async with (
        serving(ServeConfig(store=tmp_path / "store", port=0)) as running,
        AsyncClient(running.address) as client,
    ):
        await client.create_collection("x", dim=2, encoder_id="mine")
        await client.upsert("x", ["a"], vectors=np.ones((1, 2), np.float32))
        for call in (client.embed([b"x"]), client.encoder(), client.create_collection("y")):
            with pytest.raises(FailedPrecondition, match="no encoder"):
                await call
    bundle = make_bundle(tmp_path / "bundle").path
    async with (
        serving(ServeConfig(bundle=bundle, port=0)) as running,
        AsyncClient(running.address) as client,
    ):
        assert (await client.embed(PIXELS)).shape == (20, DIM)
        with pytest.raises(FailedPrecondition, match="no store"):
            await client.collections()
