"""Every kind of index: recall as asked, masks respected, upkeep that nobody notices."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest

from byol_serving.collections import kinds, tuning
from byol_serving.collections.approximate import Approximate, ReadersWriter, Stopped
from byol_serving.collections.collection import LocalCollection
from byol_serving.collections.exact import Bits, Positions, nearest, pack, rescored
from byol_serving.collections.filters import Range
from byol_serving.collections.index import IndexOptions
from byol_serving.collections.kinds import ApproximateKind
from byol_serving.collections.store import Store
from byol_serving.collections.types import IndexKind, Vectors
from byol_serving.errors import InvalidRequest
from serving.collections.model import Model, clustered

DIM = 32
COUNT = 4000
VECTORS = clustered(COUNT, DIM, clusters=200)
QUERIES = clustered(256, DIM, seed=5, clusters=200)
NEW = QUERIES[:100]
SAMPLED = 0.02
"""What recall@10 of 256 queries may differ by from that of as many others: three deviations."""
BETWEEN = 0.05
"""At shares between all and a tenth, where nothing is measured, the effort is interpolated; with
one or two lists read, as here, it cannot be fine."""
OPTIONS = IndexOptions(approximate_from=1000, absorb_from=64, compact_from=64, auto_from=1000)


def _recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float((found[:, :, None] == truth[:, None, :]).any(axis=1).mean())


@pytest.fixture(scope="module")
def built() -> dict[ApproximateKind, Approximate]:
    return {
        kind: Approximate.build(kind, VECTORS, lambda: False, target=0.95) for kind in kinds.KINDS
    }


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_the_tuned_recall_holds_for_new_queries(
    built: dict[ApproximateKind, Approximate], kind: ApproximateKind
) -> None:
    index = built[kind]
    assert index.tuning.recall >= index.tuning.target == 0.95
    (scores, found), covered = index.search(QUERIES, 10, VECTORS, None, 1.0)
    assert covered == COUNT
    truth, best = nearest(QUERIES, VECTORS, 10, None, 0)
    assert _recall(found, best) >= index.tuning.target - SAMPLED
    own = np.take_along_axis(QUERIES @ VECTORS.T, found, axis=1)
    np.testing.assert_allclose(scores, own, atol=2e-6)  # re-ranked by true scores
    assert np.all(np.diff(scores, axis=1) <= 0)
    assert truth.shape == scores.shape


@pytest.mark.parametrize("kind", kinds.KINDS)
@pytest.mark.parametrize("kept", [0.1, 0.2, 0.5, 0.9])
def test_masked_positions_are_never_found(
    built: dict[ApproximateKind, Approximate], kind: ApproximateKind, kept: float
) -> None:
    mask = np.random.default_rng(0).random(COUNT) < kept
    (_, found), _ = built[kind].search(QUERIES, 10, VECTORS, pack(mask), kept)
    assert mask[found[found >= 0]].all()
    _, best = nearest(QUERIES, VECTORS, 10, pack(mask), int((~mask).sum()))
    short = SAMPLED if kept == 0.1 else BETWEEN
    assert _recall(found, best) >= built[kind].tuning.target - short


@pytest.mark.parametrize("kind", kinds.KINDS)
@pytest.mark.parametrize("size", [3999, 3993, 2001])
def test_positions_beyond_the_callers_view_are_never_found(
    built: dict[ApproximateKind, Approximate], kind: ApproximateKind, size: int
) -> None:
    """The index may have grown since the view was taken."""
    for bits in (None, pack(np.ones(size, np.bool_))):
        (_, found), covered = built[kind].search(QUERIES, 10, VECTORS[:size], bits, 1.0)
        assert covered == size
        assert found.max() < size


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_saving_adding_and_more_effort(
    built: dict[ApproximateKind, Approximate], kind: ApproximateKind, tmp_path: Path
) -> None:
    built[kind].save(tmp_path / "index")
    again = Approximate.load(kind, tmp_path / "index", DIM, built[kind].tuning)
    (_, before), _ = built[kind].search(QUERIES, 10, VECTORS, None, 1.0)
    (_, after), _ = again.search(QUERIES, 10, VECTORS, None, 1.0)
    np.testing.assert_array_equal(before, after)
    again.add(NEW, lambda: False)
    more = np.concatenate([VECTORS, NEW])
    (_, found), covered = again.search(NEW, 1, more, None, 1.0, effort=10**6)
    assert covered == again.size == COUNT + len(NEW)
    assert np.mean(found[:, 0] == np.arange(COUNT, covered)) > 0.98
    for other in kinds.KINDS:
        if other != kind:
            with pytest.raises(ValueError, match=f"holds no {other} index"):
                Approximate.load(other, tmp_path / "index", DIM, built[kind].tuning)
    with pytest.raises(ValueError, match="of 8 dimensions"):
        Approximate.load(kind, tmp_path / "index", 8, built[kind].tuning)


@pytest.mark.parametrize("dim", [1, 2, 5, 48])
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_any_dimension(kind: ApproximateKind, dim: int) -> None:
    vectors = clustered(300, dim)
    index = Approximate.build(kind, vectors, lambda: False)
    (scores, _), _ = index.search(vectors[:5], 1, vectors, None, 1.0, effort=1000)
    np.testing.assert_allclose(scores, np.ones((5, 1)), atol=1e-5)


def test_a_target_out_of_reach_is_reported_as_what_was_reached() -> None:
    index = Approximate.build("ivf-rabitq", VECTORS, lambda: False, target=1.1)
    assert index.tuning.target == 1.1
    assert 0.5 < index.tuning.recall <= 1
    assert index.tuning.effort == kinds.lists_for("ivf-rabitq", COUNT)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_uneven_directions_do_not_keep_it_from_its_target(kind: ApproximateKind) -> None:
    """Principal components: a few directions hold nearly all that vectors differ in."""
    vectors = clustered(COUNT + 64, 32) * np.geomspace(1, 0.01, 32, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    stored, queries = vectors[:COUNT].copy(), vectors[COUNT:].copy()
    index = Approximate.build(kind, stored, lambda: False, target=0.95)
    assert index.tuning.recall >= 0.95
    (_, found), _ = index.search(queries, 10, stored, None, 1.0)
    assert _recall(found, nearest(queries, stored, 10, None, 0)[1]) > 0.88


def test_of_what_reaches_the_target_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    monkeypatch.setattr(tuning, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    vectors, queries = clustered(500, 8)[:450], clustered(500, 8)[450:]

    def search(
        queries: Vectors, k: int, alive: Bits | None, effort: int, depth: float
    ) -> Positions:
        """Needs an effort of 4 at depth 1 and of 2 at greater ones; each costs time."""
        seconds[0] += effort + depth
        found = nearest(queries, vectors, k, None, 0)[1]
        if effort < (4 if depth == 1 else 2) or (alive is not None and effort < 5):
            found[:, 5:] = -1
        return found

    found = tuning.tuned(
        search, vectors, queries, 0.9, efforts=[1, 2, 3, 4, 5, 6], depths=[1, 2, 3]
    )
    assert (found.effort, found.depth) == (2, 2)
    assert found.recall == 1
    never = tuning.tuned(search, vectors, queries, 1.1, efforts=[1, 2, 3], depths=[1, 2])
    assert (never.effort, never.depth, never.recall) == (3, 2, 1)


def test_a_build_can_be_stopped() -> None:
    with pytest.raises(Stopped):
        Approximate.build("hnsw", VECTORS, lambda: True)


def test_an_ivf_index_is_outgrown_by_much_more_and_not_by_itself() -> None:
    for count in (40, 4096, 5000, 6000, 20_000):
        index = Approximate.build("ivf", clustered(count, 4), lambda: False)
        assert not index.outgrown(count)
        assert index.outgrown(100 * count)


def test_rescoring_leaves_out_what_is_missing() -> None:
    candidates = np.full((3, 4), -1)
    candidates[0] = [5, 6, 7, 8]
    candidates[1, :2] = [9, 1]
    scores, found = rescored(QUERIES[:3], VECTORS, candidates, 3)
    assert set(found[0]) < {5, 6, 7, 8}
    assert set(found[1]) == {9, 1, -1}
    assert np.isneginf(scores[2]).all()
    assert (found[2] == -1).all()


@pytest.mark.parametrize("kind", get_args(IndexKind))
def test_a_collection_of_every_kind(tmp_path: Path, kind: IndexKind) -> None:
    """Built, added to, deleted from, compacted, restarted: answers stay right."""
    model, ids = Model(), [f"i{n}" for n in range(1500)]
    metadata = [{"n": n} for n in range(1500)]
    with Store(tmp_path, options=OPTIONS) as store:
        collection = store.create("c", dim=DIM, encoder_id="e", index=kind)
        for part in (slice(0, 1200), slice(1200, 1500)):
            collection.upsert(ids[part], VECTORS[part], metadata[part])
            model.upsert(ids[part], VECTORS[part], metadata[part])
            collection.settle()
        collection.upsert(["new"], QUERIES[:1], [{"n": -1}])
        model.upsert(["new"], QUERIES[:1], [{"n": -1}])
        assert collection.search(QUERIES[:1], 1)[0][0].id == "new"
        assert collection.delete(ids[:500]) == model.delete(ids[:500])
        for _ in range(2):
            queries = QUERIES[:20]
            for k, condition in ((10, None), (10, Range("n", gte=700)), (5, Range("n", lt=510))):
                found = collection.search(queries, k, condition=condition)
                allowed = frozenset(model.matching(condition))
                for query, hits in zip(queries, found, strict=True):
                    assert len(hits) == k
                    model.check_hits(hits, query, allowed)
            collection.settle()
        assert collection.stats().deleted == 0
        answering = collection.stats().answering
        assert answering == {"flat": "flat", "auto": "hnsw-sq8"}.get(kind, kind)
        before = collection.stats()
    with Store(tmp_path, options=OPTIONS) as store:
        assert store.get("c").stats() == before or store.get("c").stats().answering == answering
        model.check_all(store.get("c"))


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_collections_recall_is_what_its_stats_say(tmp_path: Path, kind: IndexKind) -> None:
    """At the tuned effort, of queries it never saw; also after a restart and with items deleted."""
    vectors = {str(n): row for n, row in enumerate(VECTORS)}
    with Store(tmp_path, options=OPTIONS) as store:
        collection = store.create("c", dim=DIM, encoder_id="e", index=kind)
        collection.upsert(list(vectors), VECTORS)
        collection.settle()
        stats = collection.stats()
        assert stats.recall >= stats.recall_target == 0.95
        assert _found(collection, vectors) >= stats.recall_target - SAMPLED
        gone = [str(n) for n in range(0, COUNT, 50)]
        collection.delete(gone)
        for each in gone:
            del vectors[each]
        assert _found(collection, vectors) >= stats.recall_target - SAMPLED
    with Store(tmp_path, options=OPTIONS) as store:
        assert _found(store.get("c"), vectors) >= stats.recall_target - SAMPLED


def _found(collection: LocalCollection, vectors: dict[str, Vectors]) -> float:
    """Recall@10 of QUERIES by ids."""
    ids = np.array(list(vectors))
    best = np.argsort(-(QUERIES @ np.stack(list(vectors.values())).T), axis=1)[:, :10]
    answers = collection.search(QUERIES, 10, with_metadata=False)
    return float(
        np.mean(
            [
                len({hit.id for hit in hits} & set(ids[row].tolist())) / 10
                for hits, row in zip(answers, best, strict=True)
            ]
        )
    )


def test_stats_and_effort(tmp_path: Path) -> None:
    with Store(tmp_path, options=OPTIONS) as store:
        collection = store.create("c", dim=DIM, encoder_id="e", index="auto")
        collection.upsert(["a", "b"], VECTORS[:2])
        stats = collection.stats()
        assert (stats.kind, stats.answering, stats.wanted) == ("auto", "flat", "flat")
        assert (stats.recall, stats.effort, stats.count) == (1.0, None, 2)
        collection.upsert([str(n) for n in range(COUNT)], VECTORS)
        collection.settle()
        collection.upsert(["late"], QUERIES[:1])
        stats = collection.stats()
        assert (stats.answering, stats.wanted, stats.unabsorbed) == ("hnsw-sq8", "hnsw-sq8", 1)
        assert stats.recall >= stats.recall_target == 0.95
        assert stats.effort is not None
        assert stats.vector_bytes >= 4 * DIM * stats.count
        assert stats.index_bytes > DIM / 4 * stats.count
        with pytest.raises(InvalidRequest, match="effort 0"):
            collection.search(QUERIES[:1], 1, effort=0)
        assert collection.search(QUERIES[:1], 1, effort=500)[0][0].id == "late"
        assert collection.stats().effort == stats.effort  # a request changes nothing for others


def test_auto_serves_exactly_while_it_builds(tmp_path: Path) -> None:
    building, go_on = threading.Event(), threading.Event()
    build = Approximate.build

    def slowly(*args: object, **options: object) -> Approximate:
        building.set()
        assert go_on.wait(30)
        return build(*args, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, Store(tmp_path, options=OPTIONS) as store:
        patch.setattr(Approximate, "build", slowly)
        collection = store.create("c", dim=DIM, encoder_id="e", index="auto")
        collection.upsert([str(n) for n in range(COUNT)], VECTORS)
        assert building.wait(30)
        assert (collection.stats().answering, collection.stats().wanted) == ("flat", "hnsw-sq8")
        collection.upsert(["meanwhile"], QUERIES[:1])
        collection.delete(["7"])
        assert collection.search(QUERIES[:1], 1)[0][0].id == "meanwhile"
        go_on.set()
        collection.settle()
        assert collection.stats().answering == "hnsw-sq8"
        assert collection.search(QUERIES[:1], 1)[0][0].id == "meanwhile"
        assert collection.search(VECTORS[7:8], 1)[0][0].id != "7"
        assert collection.verify().ok


def test_many_read_or_one_writes() -> None:
    lock, inside, order = ReadersWriter(), threading.Barrier(3, timeout=10), []

    def read() -> None:
        with lock.reading:
            inside.wait()  # both readers and the test are here: they share

    def write() -> None:
        with lock.writing():
            order.append("write")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    with lock.reading:
        writer = threading.Thread(target=write)
        writer.start()
        writer.join(0.05)
        assert order == []
        inside.wait()
        order.append("read")
    for thread in (*readers, writer):
        thread.join(10)
    assert order == ["read", "write"]


@pytest.mark.parametrize("kind", ["hnsw", "hnsw-sq8", "ivf-pq"])
def test_an_index_that_is_outgrown_is_built_and_tuned_anew(tmp_path: Path, kind: IndexKind) -> None:
    few, more = COUNT // 4, COUNT * 3 // 8
    with Store(tmp_path, options=OPTIONS) as store:
        collection = store.create("c", dim=DIM, encoder_id="e", index=kind)
        collection.upsert([str(n) for n in range(few)], VECTORS[:few])
        collection.settle()
        first = collection._index.view.approximate
        collection.upsert([str(n) for n in range(few, more)], VECTORS[few:more])
        collection.settle()
        assert collection._index.view.approximate is first  # added to
        collection.upsert([str(n) for n in range(more, COUNT)], VECTORS[more:])
        collection.settle()
        second = collection._index.view.approximate
        assert first is not None
        assert second is not None
        assert first.tuning.items < few
        assert second.tuning.items > more
        assert collection.verify().ok


def test_tuning_is_what_a_snapshot_brings_back(tmp_path: Path) -> None:
    with Store(tmp_path, options=OPTIONS) as store:
        collection = store.create("c", dim=DIM, encoder_id="e", index="ivf-pq")
        collection.upsert([str(n) for n in range(COUNT)], VECTORS)
        collection.settle()
        collection.snapshot()
        before = collection.stats()
    with Store(tmp_path, options=OPTIONS, read_only=True) as store:
        after = store.get("c").stats()
    assert (after.effort, after.recall, after.recall_target) == (
        before.effort,
        before.recall,
        before.recall_target,
    )
