"""Copies of indexes on a GPU: on a real one where there is one; around it on stand-ins.

A stand-in is the same kind of index on the CPU: what is tested with it is which searches a copy
gets, what is made of its answers, and what happens where it cannot answer.
"""

import logging
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
import pytest

from byol_serving.collections import gpu
from byol_serving.collections.filters import Equals, Range
from byol_serving.collections.gpu import Gpu
from byol_serving.collections.index import IndexOptions
from byol_serving.collections.opening import open_store
from byol_serving.collections.store import Store
from byol_serving.collections.types import Hit, IndexKind
from byol_serving.errors import InvalidConfig
from serving.collections.model import Model, clustered

faiss: Any = _faiss

DIM, COUNT = 16, 4500
VECTORS = clustered(COUNT, DIM, clusters=200)
QUERIES = clustered(40, DIM, seed=5, clusters=200)
IDS = [str(n) for n in range(COUNT)]
MEMORY = 64 * 2**20
KINDS: list[IndexKind] = ["flat", *gpu.KINDS]


class Standin:
    """Answers like FAISS's GPU indexes: no selector, and never over 2,048."""

    def __init__(self, index: Any) -> None:
        self.index = index
        self.searches = 0

    def search(self, queries: np.ndarray, k: int, *, params: Any) -> Any:
        assert k <= gpu.MOST
        assert params is None or (params.sel is None and params.nprobe <= gpu.MOST)
        self.searches += 1
        return self.index.search(queries, k, params=params)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Standin]:
    """The stand-ins that were made as if on a GPU."""
    found: list[Standin] = []

    def flat(resources: Any, vectors: np.ndarray) -> Standin:
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        found.append(Standin(index))
        return found[-1]

    def lists(resources: Any, index: Any) -> Standin:
        found.append(Standin(faiss.clone_index(index)))
        return found[-1]

    monkeypatch.setattr(gpu, "_FROM", 1000)
    monkeypatch.setattr(gpu, "_flat", flat)
    monkeypatch.setattr(gpu, "_lists", lists)
    monkeypatch.setattr(gpu, "_standard_resources", lambda scratch: object())
    return found


def _filled(store: Store, kind: IndexKind) -> tuple[Any, Model]:
    collection, model = store.create("c", dim=DIM, encoder_id="e", index=kind), Model()
    metadata = [{"n": n, "tenth": n % 10} for n in range(COUNT)]
    collection.upsert(IDS, VECTORS, metadata)
    model.upsert(IDS, VECTORS, metadata)
    collection.settle()
    return collection, model


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_answers_what_the_index_would(
    tmp_path: Path, made: list[Standin], kind: IndexKind
) -> None:
    """Also with items deleted, replaced and new since it was made, and under filters."""
    with Store(tmp_path, options=IndexOptions(gpu=Gpu(MEMORY))) as store:
        collection, model = _filled(store, kind)
        (copy,) = made
        for _ in range(2):
            before = copy.searches
            model.check_search(collection, QUERIES, 10)
            model.check_search(collection, QUERIES[:1], 10)
            assert copy.searches == before + 2
            model.check_search(collection, QUERIES[:3], 5, Equals("tenth", 3))
            model.check_search(collection, QUERIES[:3], 5, Range("n", lt=200))
            gone = IDS[100:130]
            assert collection.delete(gone) == model.delete(gone)
            collection.upsert(IDS[:20], QUERIES[:20])
            model.upsert(IDS[:20], QUERIES[:20])
        found = collection.search(VECTORS[:5], 10)  # at the tuned effort
        for query, hits in zip(VECTORS[:5], found, strict=True):
            assert len(hits) == 10
            model.check_hits(hits, query, frozenset(model.vectors))
        assert copy.searches >= 5
        assert collection.verify().ok


def test_what_a_gpu_cannot_the_cpu_does(tmp_path: Path, made: list[Standin]) -> None:
    with Store(tmp_path, options=IndexOptions(gpu=Gpu(MEMORY))) as store:
        collection, model = _filled(store, "flat")
        (copy,) = made
        model.check_search(collection, QUERIES[:2], gpu.MOST - 1)  # one more is asked for
        assert copy.searches == 1
        model.check_search(collection, QUERIES[:2], gpu.MOST)
        model.check_search(collection, QUERIES[:2], 5, Range("n", lt=2400))  # a filter masks many
        assert copy.searches == 1
        many = IDS[: gpu.MOST]
        assert collection.delete(many) == model.delete(many)  # with so many dead, k more are asked
        model.check_search(collection, QUERIES[:2], 5)
        assert copy.searches == 1
        collection.settle()  # compacted, and copied again
        assert len(made) == 2
        model.check_search(collection, QUERIES[:2], 5)
        assert (copy.searches, made[1].searches) == (1, 1)


def test_a_search_that_fails_on_the_gpu_is_answered_by_the_cpu(
    tmp_path: Path, made: list[Standin], caplog: pytest.LogCaptureFixture
) -> None:
    with Store(tmp_path, options=IndexOptions(gpu=Gpu(MEMORY))) as store:
        collection, model = _filled(store, "ivf")

        def full(*_: Any, **__: Any) -> Any:
            raise RuntimeError("Error in allocMemory: out of memory\nat some line")

        made[0].search = full  # type: ignore[method-assign]
        model.check_search(collection, QUERIES[:2], 5)
    assert "the CPU does: Error in allocMemory: out of memory" in caplog.text
    assert "some line" not in caplog.text


def test_a_copy_is_made_anew_when_many_have_come_and_gives_its_memory_back(
    tmp_path: Path, made: list[Standin]
) -> None:
    device = Gpu(MEMORY)
    empty = device.free
    with Store(tmp_path, options=IndexOptions(gpu=device)) as store:
        collection, model = _filled(store, "flat")
        first = empty - device.free
        assert VECTORS.nbytes <= first <= 1.3 * VECTORS.nbytes
        collection.upsert([f"new-{n}" for n in range(100)], clustered(100, DIM, seed=8))
        collection.settle()
        assert len(made) == 1
        collection.upsert([f"more-{n}" for n in range(400)], clustered(400, DIM, seed=9))
        collection.settle()
        assert len(made) == 2
        assert first < empty - device.free < 1.2 * first
        store.drop("c")
        del collection, model
    assert device.free == empty


def test_what_does_not_fit_stays_on_the_cpu_and_says_so(
    tmp_path: Path, made: list[Standin], caplog: pytest.LogCaptureFixture
) -> None:
    with Store(tmp_path, options=IndexOptions(gpu=Gpu(400_000))) as store:
        collection, model = _filled(store, "flat")
        model.check_search(collection, QUERIES[:2], 5)
        assert collection.info.index == "flat"
    assert made == []
    (said,) = [each.message for each in caplog.records if each.levelno == logging.WARNING]
    assert said == (
        "an index (flat, 4500 items) would take 360000 bytes on the GPU, 300000 of 400000 are free:"
        " it stays on the CPU; raise --index-gpu-memory, or use ivf-fp16 or ivf-sq8"
    )


def test_a_kind_that_faiss_has_not_on_gpus_stays_and_says_so(
    tmp_path: Path, made: list[Standin], caplog: pytest.LogCaptureFixture
) -> None:
    with Store(tmp_path, options=IndexOptions(gpu=Gpu(MEMORY))) as store:
        _filled(store, "ivf-pq")
    assert made == []
    assert "FAISS has no ivf-pq index for GPUs: it is searched on the CPU" in caplog.text


# This machine, as it is


def test_without_a_gpu_the_bound_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if faiss.get_num_gpus():
        pytest.skip("FAISS sees a GPU here")
    assert Gpu.found(0) is None
    assert caplog.text == ""
    store = open_store(tmp_path / "store", gpu_memory=MEMORY)
    assert "FAISS sees no GPU: searches run on the CPU" in caplog.text
    collection = store.create("c", dim=DIM, encoder_id="e")
    collection.upsert(IDS[:10], VECTORS[:10])
    assert collection.search(VECTORS[3:4], 1)[0][0].id == "3"
    store.close()


def test_milvus_has_gpus_of_its_own() -> None:
    with pytest.raises(InvalidConfig, match="for local stores"):
        open_store("milvus:nowhere.db", gpu_memory=MEMORY)


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_gpu_gives_the_same_answers(tmp_path: Path, kind: IndexKind) -> None:
    if not faiss.get_num_gpus():
        pytest.skip("FAISS sees no GPU (needs faiss-gpu and a device)")
    device = Gpu(MEMORY)
    with Store(tmp_path, options=IndexOptions(gpu=device)) as store:
        collection, model = _filled(store, kind)
        assert device.free < Gpu(MEMORY).free
        gone = IDS[100:130]
        assert collection.delete(gone) == model.delete(gone)
        collection.upsert(["new"], QUERIES[:1])
        model.upsert(["new"], QUERIES[:1])
        truth = np.sort(QUERIES @ np.stack(list(model.vectors.values())).T, axis=1)[:, ::-1]
        for k in (1, 10, 300):
            found = collection.search(QUERIES, k, effort=1000)  # all lists
            np.testing.assert_allclose(_scores(found), truth[:, :k], atol=1e-4)
        on_gpu = collection.search(QUERIES, 10)
    with Store(tmp_path) as store:
        on_cpu = store.get("c").search(QUERIES, 10)
    np.testing.assert_allclose(_scores(on_gpu), _scores(on_cpu), atol=1e-4)


def _scores(found: list[list[Hit]]) -> np.ndarray:
    return np.array([[hit.score for hit in hits] for hits in found])
