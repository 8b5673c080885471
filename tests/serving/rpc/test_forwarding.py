"""What reaches a process that does not own the collections is answered as by the one that does."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.rpc.convert import embeddings_to_tensor
from byol_serving.server import Running
from serving.rpc.two_processes import (
    Asked,
    refused,
    samples,
    until,
)
from serving.support import png, random_pixels, reference

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux spreads the connections of a port"
)

PIXELS = random_pixels(4)
FILES = [png(each) for each in PIXELS]


async def test_a_front_answers_as_the_owner_does(pair: tuple[Running, Asked]) -> None:
    running, both = pair
    rows = [
        (await each.Embed(pb.EmbedRequest(images=FILES))).embeddings.data for each in both.embedders
    ]
    assert rows[0] == rows[1]
    upsert = pb.UpsertRequest(collection="c", ids=["a", "b", "c", "d"], images=FILES)
    assert (await both.collections[1].Upsert(upsert)).inserted == 4
    assert (await both.collections[0].Upsert(upsert)).updated == 4

    def queries() -> Iterator[tuple[str, Message]]:
        images = [pb.Query(image=each) for each in FILES]
        examples = [pb.Example(image=each) for each in FILES]
        pairs = [pb.Pair(left=a, right=b) for a in examples for b in (a, pb.Example(id="b"))]
        like = pb.Examples(like=examples[:2], unlike=[pb.Example(id="d")])
        yield "Search", pb.SearchRequest(collection="c", queries=images, k=2)
        both_kinds = [pb.Query(id="a"), pb.Query(examples=like), images[3]]
        yield "Search", pb.SearchRequest(collection="c", queries=both_kinds, k=3)
        yield "Classify", pb.ClassifyRequest(collection="c", key="k", queries=examples, k=2)
        yield "VerifyPairs", pb.VerifyPairsRequest(collection="c", pairs=pairs, threshold=0.9)
        same = [True, False] * 4
        yield "CalibratePairs", pb.CalibratePairsRequest(collection="c", pairs=pairs, same=same)
        yield "Get", pb.GetRequest(collection="c", ids=["a", "d"], with_vectors=True)

    metadata = pb.SetMetadataRequest(collection="c", ids=["a", "b", "c", "d"])
    for number in range(4):
        metadata.metadata.add().update({"k": number % 2})
    await both.collections[1].SetMetadata(metadata)
    for method, request in queries():
        owner, front = [await getattr(each, method)(request) for each in both.collections]
        assert numbers_rounded(front) == numbers_rounded(owner), method
    images = {
        (labels["process"], labels["step"]): value
        for name, labels, value in await asyncio.to_thread(samples, running.metrics_port)
        if name == "byol_images_total"
    }
    # Each embedded what came to it: nothing of the front's images has reached the owner.
    assert images["0", "inference"] == images["1", "inference"] > 0


def numbers_rounded(message: Message) -> str:
    """As text, with scores to five digits: a vector that has travelled is normalised once more."""
    number = re.compile(r"(?<=: )-?\d[\d.e+-]*")
    return number.sub(lambda found: f"{float(found[0]):.5f}", str(message))


async def test_a_front_refuses_as_the_owner_does(pair: tuple[Running, Asked]) -> None:
    _, both = pair
    await both.collections[0].CreateCollection(
        pb.CreateCollectionRequest(name="foreign", dim=16, encoder_id="another")
    )
    row = embeddings_to_tensor(reference(PIXELS[:1]))
    mine = [pb.Query(image=FILES[0])]
    bad = [pb.Query(image=FILES[0]), pb.Query(image=b"none")]
    wrong: list[tuple[str, Message]] = [
        ("Search", pb.SearchRequest(collection="none", queries=mine, k=1)),
        ("Search", pb.SearchRequest(collection="c", queries=mine, k=9)),
        ("Search", pb.SearchRequest(collection="c", queries=bad, k=1)),
        ("Search", pb.SearchRequest(collection="foreign", queries=mine, k=1)),
        ("Search", pb.SearchRequest(collection="c", queries=mine, k=1, encoder_id="x")),
        ("Search", pb.SearchRequest(collection="c", vectors=row, k=1, encoder_id="x")),
        ("Upsert", pb.UpsertRequest(collection="c", ids=["a"], images=FILES)),
        ("Upsert", pb.UpsertRequest(collection="c", ids=["a"], images=FILES[:1], vectors=row)),
        ("Upsert", pb.UpsertRequest(collection="foreign", ids=["a"], images=FILES[:1])),
        ("Upsert", pb.UpsertRequest(collection="c", ids=["a"], vectors=row, encoder_id="x")),
        ("Get", pb.GetRequest(collection="c", ids=["unknown"])),
        ("Restore", pb.RestoreRequest(backup="b", collection="c")),
    ]
    for method, request in wrong:
        owner, front = [await refused(getattr(each, method)(request)) for each in both.collections]
        assert front.code() is owner.code(), (method, request)
        assert front.details() == owner.details()
        trailers = [dict(tuple(each.trailing_metadata() or ())) for each in (owner, front)]
        for each in trailers:
            assert each.pop("x-request-id")
        assert trailers[0] == trailers[1]
    raw: Any = both.channels[1].unary_unary("/byol.v1.Collections/Search")
    assert (await refused(raw(b"\xff"))).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_request_id_goes_along(pair: tuple[Running, Asked]) -> None:
    _, both = pair
    call = both.collections[1].GetCollection(
        pb.GetCollectionRequest(name="c"), metadata=(("x-request-id", "mine-1"),)
    )
    await call
    assert (await call.trailing_metadata())["x-request-id"] == "mine-1"


async def read_all(call: Any) -> tuple[int, grpc.StatusCode]:
    """How many answers a stream had, and how it ended."""
    answers = 0
    with suppress(grpc.aio.AioRpcError):
        async for _ in call:
            answers += 1
    return answers, await call.code()


async def test_streams_through_a_front(pair: tuple[Running, Asked]) -> None:
    _, both = pair
    front = both.collections[1]
    writes = [
        pb.UpsertRequest(collection="c", ids=[f"{n}"], images=[FILES[n % 4]]) for n in range(40)
    ]
    counts = [each.inserted async for each in front.UpsertStream(iter(writes))]
    assert counts == [1] * 40
    asks = [
        pb.SearchRequest(collection="c", queries=[pb.Query(image=FILES[n % 4])], k=1)
        for n in range(20)
    ]
    found = [each.results[0].hits[0].id async for each in front.SearchStream(iter(asks))]
    assert found == [f"{n % 4}" for n in range(20)]

    # What was sent before a bad request is answered, wherever the bad one is found out.
    good, own = asks[0], pb.SearchRequest(collection="c", queries=[pb.Query(id="unknown")], k=1)
    bad = pb.SearchRequest(collection="c", queries=[pb.Query(image=b"none")], k=1)
    codes = grpc.StatusCode
    for wrong, code in ((bad, codes.INVALID_ARGUMENT), (own, codes.NOT_FOUND)):
        for stub in both.collections:
            ended = await read_all(stub.SearchStream(iter([good, good, wrong, good])))
            assert ended == (2, code)


async def test_deadline_and_cancellation_go_along(pair: tuple[Running, Asked]) -> None:
    running, both = pair
    request = pb.SearchRequest(collection="c", queries=[pb.Query(image=FILES[0])], k=1)
    error = await refused(both.collections[1].Search(request, timeout=1e-4))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    upsert = pb.UpsertRequest(collection="c", ids=["a"], images=FILES[:1])

    async def one_and_wait() -> AsyncIterator[pb.UpsertRequest]:
        yield upsert
        await asyncio.Event().wait()

    stream = both.collections[1].UpsertStream(one_and_wait(), timeout=2.0)
    assert await read_all(stream) == (1, grpc.StatusCode.DEADLINE_EXCEEDED)
    call = both.collections[1].UpsertStream(one_and_wait())
    await call.read()
    call.cancel()

    def in_flight() -> float:
        return sum(
            value
            for name, _, value in samples(running.metrics_port)
            if name == "byol_requests_in_flight"
        )

    await until(lambda: in_flight() == 0)
