"""What a search can ask, and the uses of search, over real gRPC with both clients."""

import threading
import time
import uuid
from collections.abc import Callable

import grpc
import numpy as np
import pytest

from byol_serving.client import AsyncClient, Client, Examples, ItemId, SearchOptions
from byol_serving.client_calls import Call
from byol_serving.client_search import columns_of, request_of
from byol_serving.errors import (
    FailedPrecondition,
    InvalidRequest,
    InvalidVector,
    UnknownId,
)
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.pb.byol.v1 import byol_pb2_grpc
from byol_serving.rpc import analysis
from serving.support import png, random_pixels, reference

PIXELS = random_pixels(40, seed=3)
ROWS = reference(PIXELS)
IDS = [f"i{n}" for n in range(40)]
METADATA = [{"n": n, "label": "cat" if n % 2 else "dog", "shelf": n // 4} for n in range(40)]


@pytest.fixture(scope="module")
def photos(address: str) -> str:
    name = f"p-{uuid.uuid4().hex}"
    with Client(address) as client:
        client.create_collection(name)
        client.upsert(name, IDS, images=map(png, PIXELS), metadata=METADATA)
    return name


def best(vector: np.ndarray, without: tuple[int, ...] = ()) -> list[str]:
    return [IDS[n] for n in np.argsort(-(ROWS @ vector), kind="stable") if n not in without]


def rocchio(like: list[int], unlike: list[int], weight: float = 0.2) -> np.ndarray:
    return np.asarray(ROWS[like].mean(axis=0) - weight * ROWS[unlike].mean(axis=0))


def test_like_these_not_like_those(client: Client, photos: str) -> None:
    hits = client.search(
        photos, like=[png(PIXELS[3]), ItemId("i5"), 7 * ROWS[8]], unlike=[ItemId("i9")], k=10
    )
    assert [hit.id for hit in hits] == best(rocchio([3, 5, 8], [9]), (5, 9))[:10]
    assert len(client.search(photos, like=[ItemId("i5")], k=40)) == 39
    strong = Examples(like=[PIXELS[3]], unlike=[PIXELS[4], ItemId("i6")], unlike_weight=0.9)
    (found,) = client.search_many(photos, SearchOptions(k=5), queries=[strong])
    assert [hit.id for hit in found] == best(rocchio([3], [4, 6], 0.9), (6,))[:5]


def test_queries_of_every_kind_in_one_request(client: Client, photos: str) -> None:
    found = client.search_many(
        photos,
        SearchOptions(k=3),
        images=[PIXELS[0]],
        ids=["i1"],
        queries=[Examples(like=[PIXELS[2], PIXELS[3]]), ROWS[4], PIXELS[5], ItemId("i6")],
        vectors=ROWS[7:9],
    )
    wanted = [
        best(ROWS[0]),
        best(ROWS[1], (1,)),
        best(rocchio([2, 3], [0], 0.0)),
        best(ROWS[4]),
        best(ROWS[5]),
        best(ROWS[6], (6,)),
        best(ROWS[7]),
        best(ROWS[8]),
    ]
    assert [[hit.id for hit in hits] for hits in found] == [ids[:3] for ids in wanted]


def test_examples_that_cannot_be(client: Client, photos: str) -> None:
    with pytest.raises(InvalidRequest, match="exactly one of"):
        client.search(photos, id="i1", like=[ItemId("i2")])
    with pytest.raises(InvalidRequest, match="at least one positive"):
        client.search(photos, unlike=[ItemId("i2")])
    with pytest.raises(UnknownId, match="never"):
        client.search(photos, like=[ItemId("i1")], unlike=[ItemId("never")])
    with pytest.raises(InvalidVector, match="query 1: vector 0 is zero"):
        client.search(photos, like=[ROWS[0], 0 * ROWS[1]])
    with pytest.raises(InvalidVector, match="query 0: dimension 3"):
        client.search(photos, like=[np.ones(3, np.float32)])
    with pytest.raises(InvalidRequest, match=r"\[1, 16\]"):
        client.search(photos, vector=ROWS[:1])


def test_pages_and_their_version(client: Client, photos: str) -> None:
    pages = list(client.search_pages(photos, PIXELS[3], SearchOptions(k=7)))
    assert [len(page) for page in pages] == [7, 7, 7, 7, 7, 5]
    assert [hit.id for page in pages for hit in page] == best(ROWS[3])
    assert [hit.id for hit in client.search(photos, image=PIXELS[3], k=7, offset=14)] == [
        hit.id for hit in pages[2]
    ]
    (whole,) = client.search_pages(photos, ItemId("i3"), SearchOptions(k=1000))
    assert [hit.id for hit in whole] == best(ROWS[3], (3,))
    walk = client.search_pages(photos, PIXELS[3], SearchOptions(k=7))
    next(walk)
    client.set_metadata(photos, ["i0"], [METADATA[0]])
    with pytest.raises(FailedPrecondition, match="changed since version"):
        next(walk)
    with pytest.raises(InvalidRequest, match="offset -1"):
        client.search(photos, id="i3", offset=-1)


def test_groups_and_diversity(client: Client, photos: str) -> None:
    groups = client.search_groups(photos, PIXELS[3], by="shelf", size=2, options=SearchOptions(k=4))
    dealt: dict[int, list[str]] = {}
    for each in best(ROWS[3]):
        dealt.setdefault(int(each[1:]) // 4, []).append(each)
    assert [(group.value, [hit.id for hit in group.hits]) for group in groups] == [
        (shelf, ids[:2]) for shelf, ids in list(dealt.items())[:4]
    ]
    assert groups[0].hits[0].metadata["shelf"] == groups[0].value
    two = client.search_groups(photos, ItemId("i3"), by="label")
    assert {group.value for group in two} == {"cat", "dog"}
    plain = client.search(photos, image=PIXELS[3], k=5, mmr_lambda=1.0)
    assert [hit.id for hit in plain] == best(ROWS[3])[:5]
    diverse = client.search(photos, image=PIXELS[3], k=5, mmr_lambda=0.1, with_vectors=True)
    assert diverse[0].id == "i3"

    def closeness(ids: list[str]) -> float:
        rows = ROWS[[IDS.index(each) for each in ids]]
        return float((rows @ rows.T).sum())

    assert closeness([hit.id for hit in diverse]) < closeness([hit.id for hit in plain])
    assert diverse[1].vector is not None
    with pytest.raises(InvalidRequest, match="exclude each other"):
        client.search_groups(photos, PIXELS[3], by="label", options=SearchOptions(mmr_lambda=0.5))


def test_ids_and_scores_come_as_columns(client: Client, photos: str) -> None:
    found = client.search_columns(photos, ROWS, SearchOptions(k=4, offset=1))
    assert found.ids.shape == found.scores.shape == (40, 4)
    assert found.ids.tolist() == [best(row)[1:5] for row in ROWS]
    ranked = -np.sort(-(ROWS @ ROWS.T), axis=1)
    np.testing.assert_allclose(found.scores, ranked[:, 1:5], atol=1e-5)
    least = float(np.median(ROWS @ ROWS.T)) + 1e-4
    options = SearchOptions(k=40, min_score=least, where={"label": "cat"})
    uneven = client.search_columns(photos, ROWS, options)
    wanted = [
        [n for n in best(row) if int(n[1:]) % 2 and ROWS[IDS.index(n)] @ row >= least]
        for row in ROWS
    ]
    assert [[hit.id for hit in hits] for hits in uneven.hits()] == wanted
    assert len(set(uneven.counts.tolist())) > 1
    assert client.search_columns(photos, ROWS[:0]).hits() == []


def test_what_needs_no_metadata_travels_as_columns(client: Client, photos: str) -> None:
    plain = SearchOptions(k=3, with_metadata=False)
    (hits,) = client.search_many(photos, plain, ids=["i1"])
    assert [hit.id for hit in hits] == best(ROWS[1], (1,))[:3]
    assert hits[0].metadata == {}
    diverse = SearchOptions(k=3, with_metadata=False, mmr_lambda=1.0)
    (hits,) = client.search_many(photos, diverse, vectors=ROWS[:1])
    assert [hit.id for hit in hits] == best(ROWS[0])[:3]
    groups = client.search_groups(photos, PIXELS[3], by="label", options=plain)
    assert len(groups) == 2
    page = next(client.search_pages(photos, ROWS[3], plain))
    assert [hit.id for hit in page] == best(ROWS[3])[:3]
    request = request_of(photos, plain, vectors=ROWS[:1])
    request.group_by = "label"
    with pytest.raises(InvalidRequest, match="columns"):
        client._send(Call("/byol.v1.Collections/Search", request, pb.SearchResponse, columns_of))


def test_an_older_server_answers_with_hits() -> None:
    hits = [pb.Hit(id="a", score=0.5), pb.Hit(id="b", score=0.25)]
    found = columns_of(pb.SearchResponse(results=[pb.Hits(hits=hits), pb.Hits()]))
    assert found.ids.tolist() == [["a", "b"], ["", ""]]
    assert found.counts.tolist() == [2, 0]
    assert found.flat()[1].tolist() == [0.5, 0.25]


def test_a_stream_of_searches(client: Client, photos: str) -> None:
    batches = [ROWS[at : at + 5] for at in range(0, 40, 5)]
    answers = list(client.search_stream(photos, iter(batches), SearchOptions(k=1)))
    assert [hits[0].id for found in answers for hits in found] == IDS
    with pytest.raises(InvalidVector, match="dimension 3"):
        list(client.search_stream(photos, [ROWS[:1], np.ones((2, 3), np.float32)]))


def test_the_index_tells_how_it_stands(client: Client, photos: str) -> None:
    stats = client.stats(photos)
    assert (stats.kind, stats.answering, stats.wanted, stats.count) == ("flat", "flat", "flat", 40)
    assert (stats.recall, stats.effort, stats.index_bytes) == (1.0, None, 0)
    assert stats.vector_bytes >= 40 * 16 * 4
    assert client.collection(photos).recall == 1.0
    (hits,) = client.search_many(photos, SearchOptions(k=1, effort=3), ids=["i1"])
    assert hits[0].id == best(ROWS[1], (1,))[0]
    with pytest.raises(InvalidRequest, match="effort 0"):
        client.search_many(photos, SearchOptions(effort=0), ids=["i1"])


def test_items_page_by_page(client: Client, photos: str) -> None:
    items = list(client.items(photos, page_size=7, with_vectors=True))
    assert sorted(item.id for item in items) == sorted(IDS)
    by_id = {item.id: item for item in items}
    assert by_id["i4"].metadata == METADATA[4]
    np.testing.assert_allclose(np.asarray(by_id["i4"].vector), ROWS[4], atol=1e-5)
    cats = client.items(photos, where={"label": "cat", "n": {"lt": 6}}, with_metadata=False)
    assert [(item.id, item.metadata) for item in cats] == [("i1", {}), ("i3", {}), ("i5", {})]


def test_duplicates_and_outliers(client: Client, photos: str) -> None:
    similar = np.triu(ROWS @ ROWS.T, 1)
    threshold = float(np.sort(similar.ravel())[-3:].min()) - 1e-4  # three pairs
    found = client.analysis.duplicates(photos, min_score=threshold)
    assert (found.items, found.pairs, found.exact) == (40, 3, True)
    pairs = {frozenset((IDS[i], IDS[j])) for i, j in zip(*np.nonzero(similar >= threshold))}  # noqa: B905
    assert all(any(pair <= set(group.ids) for group in found.groups) for pair in pairs)
    assert sum(len(group.ids) for group in found.groups) == len(frozenset().union(*pairs))
    some = client.analysis.duplicates(photos, min_score=-1, where={"label": "cat"}, exact=False)
    assert [len(group.ids) for group in some.groups] == [20]
    others = ROWS @ ROWS.T - 4 * np.eye(40, dtype=np.float32)
    distances = 1 - np.sort(others, axis=1)[:, -3:].mean(axis=1)
    outliers = client.analysis.outliers(photos, k=3, limit=5)
    assert [each.id for each in outliers] == [IDS[n] for n in np.argsort(-distances)[:5]]


def test_labels(client: Client, photos: str) -> None:
    answers = client.analysis.classify(photos, [PIXELS[7], ItemId("i8")], key="label", k=5)
    for answer, near in zip(answers, (best(ROWS[7]), best(ROWS[8], (8,))), strict=True):
        votes = [METADATA[int(each[1:])]["label"] for each in near[:5]]
        assert {each.label: each.votes for each in answer.labels} == {
            label: votes.count(label) for label in set(votes)
        }
    assert answers[0].label == "cat"
    assert answers[0].confidence > 0.5


def test_pairs_are_calibrated_and_verified(client: Client, photos: str) -> None:
    noisy = (PIXELS.astype(int) + 4).clip(0, 255).astype(np.uint8)
    same = [(noisy[n], ItemId(IDS[n])) for n in range(20)]
    different = [(noisy[n], PIXELS[n + 20]) for n in range(20)]
    calibration = client.analysis.calibrate_pairs(
        photos, [*same, *different], [True] * 20 + [False] * 20
    )
    assert calibration.accuracy == 1.0
    assert calibration.rates[0].true_accepts == 1.0
    results = client.analysis.verify_pairs(
        photos, [same[0], different[0], (ROWS[1], ROWS[1])], threshold=calibration.threshold
    )
    assert [each.same for each in results] == [True, False, True]
    assert results[2].score == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(InvalidRequest, match="3 pairs but 1 answers"):
        client.analysis.calibrate_pairs(photos, [*same[:3]], [True])
    with pytest.raises(InvalidRequest, match="no pair"):
        client.analysis.verify_pairs(photos, [], threshold=0)


async def test_the_asynchronous_client_does_the_same(address: str, photos: str) -> None:
    async with AsyncClient(address) as client:
        hits = await client.search(photos, like=[PIXELS[3], ItemId("i5")], k=4)
        assert [hit.id for hit in hits] == best(rocchio([3, 5], [0], 0.0), (5,))[:4]
        pages = [page async for page in client.search_pages(photos, ROWS[3], SearchOptions(k=25))]
        assert [hit.id for page in pages for hit in page] == best(ROWS[3])
        columns = await client.search_columns(photos, ROWS, SearchOptions(k=1))
        assert columns.ids[:, 0].tolist() == IDS
        groups = await client.search_groups(photos, PIXELS[3], by="label")
        assert len(groups) == 2
        batches = [ROWS[:20], ROWS[20:]]
        stream = client.search_stream(photos, batches, SearchOptions(k=1))
        assert [[hits[0].id for hits in found] async for found in stream] == [IDS[:20], IDS[20:]]
        assert len([item async for item in client.items(photos, page_size=11)]) == 40
        assert (await client.stats(photos)).count == 40
        assert (await client.analysis.duplicates(photos, min_score=1)).items == 40
        assert len(await client.analysis.outliers(photos, limit=3)) == 3
        labels = await client.analysis.classify(photos, [PIXELS[7]], key="label", k=1)
        assert labels[0].label == "cat"
        pairs = [(ROWS[n], ROWS[n]) for n in range(3)] + [(ROWS[0], ROWS[n]) for n in range(1, 4)]
        calibration = await client.analysis.calibrate_pairs(photos, pairs, [True] * 3 + [False] * 3)
        verified = await client.analysis.verify_pairs(
            photos, pairs, threshold=calibration.threshold
        )
        assert [each.same for each in verified] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            pb.SearchRequest(k=1, queries=[pb.Query(examples=pb.Examples())]),
            "at least one positive",
        ),
        (
            pb.SearchRequest(k=1, queries=[pb.Query(examples=pb.Examples(like=[pb.Example()]))]),
            "query 0 is empty",
        ),
        (pb.ClassifyRequest(key="label"), "no query"),
        (pb.ClassifyRequest(queries=[pb.Example(id="i1")]), "labels is empty"),
        (pb.VerifyPairsRequest(pairs=[pb.Pair()]), "example 0 is empty"),
        (pb.FindDuplicatesRequest(min_score=2), "outside -1..1"),
        (pb.ListItemsRequest(page_token="?"), "page token"),
    ],
)
def test_requests_that_mean_nothing(
    address: str, photos: str, request_: pb.SearchRequest, message: str
) -> None:
    request_.collection = photos
    method = type(request_).__name__.removesuffix("Request")
    with grpc.insecure_channel(address) as channel:
        stub = byol_pb2_grpc.CollectionsStub(channel)
        with pytest.raises(grpc.RpcError, match=message) as caught:
            getattr(stub, method)(request_, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_long_work_ends_with_its_caller(
    address: str, photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, ended = threading.Event(), threading.Event()

    def endless(collection: object, request: object, stopping: Callable[[], bool]) -> None:
        began.set()
        deadline = time.monotonic() + 20
        while not stopping() and time.monotonic() < deadline:
            time.sleep(0.01)
        if stopping():
            ended.set()

    monkeypatch.setattr(analysis, "duplicates", endless)
    with grpc.insecure_channel(address) as channel:
        call = byol_pb2_grpc.CollectionsStub(channel).FindDuplicates.future(
            pb.FindDuplicatesRequest(collection=photos)
        )
        assert began.wait(10)
        assert not ended.is_set()
        call.cancel()
        assert ended.wait(10)
