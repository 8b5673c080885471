"""What Milvus cannot do it says by name; its own index kinds."""

from pathlib import Path

import pytest

from byol_serving.collections.opening import open_store
from byol_serving.collections.types import IndexKind
from byol_serving.errors import (
    FailedPrecondition,
    InvalidRequest,
    Unavailable,
)
from serving.collections.backends.items import (
    COUNT,
    DIM,
    IDS,
    RNG,
    VECTORS,
    unit,
)
from serving.collections.backends.places import HAS_MILVUS, NAMES, address_of


def test_what_milvus_cannot_do_it_says_by_name(tmp_path: Path) -> None:
    store = open_store(address_of("milvus", tmp_path))
    made = store.create(next(NAMES), dim=DIM, encoder_id="e")
    assert made.info.version is None
    for call, feature in (
        (lambda: made.stats(), "stats"),
        (lambda: made.verify(), "verify"),
        (
            lambda: store.create("x", dim=DIM, encoder_id="e", index="ivf-rabitq"),
            "ivf-rabitq index",
        ),
        (lambda: store.backup(tmp_path / "b"), "backup"),
        (lambda: store.restore(tmp_path / "b", "c"), "restore"),
    ):
        with pytest.raises(FailedPrecondition, match=f"milvus backend has no {feature}"):
            call()
    made.upsert(["a"], VECTORS[:1])
    with pytest.raises(InvalidRequest, match="milvus backend, which holds 4096 terms"):
        made.upsert(["b"], VECTORS[:1], [{f"k{n}": n for n in range(2000)}])
    with pytest.raises(InvalidRequest, match="milvus backend takes at most 65536"):
        made.upsert(["b"], VECTORS[:1], [{"text": "x" * 65_536}])
    with pytest.raises(InvalidRequest, match="dimension in fours"):
        store.create(next(NAMES), dim=DIM, encoder_id="e", index="ivf-pq")
    store.close()


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "ivf-sq8", "ivf-pq", "auto"])
def test_index_kinds_of_milvus(kind: IndexKind, tmp_path: Path) -> None:
    store = open_store(address_of("milvus", tmp_path))
    made = store.create(next(NAMES), dim=8, encoder_id="e", index=kind)
    rows = unit(RNG.standard_normal((COUNT, 8)))
    made.upsert(IDS, rows)
    assert (made.info.index, made.info.recall) == (kind, None)
    for effort in (None, 1000):
        assert made.search(rows[30:31], 1, effort=effort)[0][0].id == "i30"
    with pytest.raises(InvalidRequest, match="effort 0"):
        made.search(rows[:1], 1, effort=0)
    store.close()


def test_a_milvus_that_is_not_there() -> None:
    if not HAS_MILVUS:
        pytest.skip("pymilvus is not installed (extra: milvus)")
    with pytest.raises(Unavailable, match="does not answer"):
        open_store("milvus:http://127.0.0.1:1")
