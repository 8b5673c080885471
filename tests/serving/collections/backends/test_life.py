"""Collections of every backend come and go, and outlive their process."""

from pathlib import Path

import pytest

from byol_serving.collections.opening import open_store
from byol_serving.collections.types import Store
from byol_serving.errors import (
    AlreadyExists,
    InvalidRequest,
    Unavailable,
    UnknownCollection,
)
from serving.collections.backends.items import (
    COUNT,
    DIM,
    IDS,
    METADATA,
    VECTORS,
    origins,
)
from serving.collections.backends.places import BACKENDS, NAMES, address_of


def test_collections_come_and_go(store: Store) -> None:
    name = next(NAMES)
    made = store.create(name, dim=DIM, encoder_id="e" * 64)
    info = made.info
    assert (info.name, info.dim, info.encoder_id, info.count) == (name, DIM, "e" * 64, 0)
    assert (info.index, info.recall) == ("flat", 1.0)
    assert store.get(name).info == info
    assert info in store.list()
    assert [each.name for each in store.list()] == sorted(each.name for each in store.list())
    with pytest.raises(AlreadyExists, match=name):
        store.create(name, dim=DIM, encoder_id="e")
    made.upsert(IDS[:3], VECTORS[:3])
    store.drop(name)
    with pytest.raises(UnknownCollection, match=name):
        store.get(name)
    with pytest.raises(UnknownCollection):
        store.drop(name)
    with pytest.raises(UnknownCollection):
        made.search(VECTORS[:1], 1)
    assert store.create(name, dim=3, encoder_id="f").info.count == 0
    assert store.get(name).info.dim == 3


@pytest.mark.parametrize(
    ("name", "dim", "index"),
    [("", DIM, "flat"), ("../x", DIM, "flat"), ("ok", 0, "flat"), ("ok", DIM, "tree")],
)
def test_collections_that_cannot_be(store: Store, name: str, dim: int, index: str) -> None:
    with pytest.raises(InvalidRequest):  # what a caller without types could send
        store.create(name, dim=dim, encoder_id="e", index=index)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_stored_is_there_after_a_restart(backend: str, tmp_path: Path) -> None:
    address = address_of(backend, tmp_path)
    kept, gone = next(NAMES), next(NAMES)
    store = open_store(address)
    store.create(kept, dim=DIM, encoder_id="e").upsert(IDS, VECTORS, METADATA)
    store.create(gone, dim=DIM, encoder_id="e")
    store.get(kept).delete(IDS[:5])
    store.drop(gone)
    store.close()
    with pytest.raises(Unavailable, match="shutting down"):
        store.get(kept)
    store.close()
    again = open_store(address)
    counts = {info.name: info.count for info in again.list()}
    assert counts[kept] == COUNT - 5
    assert gone not in counts
    assert origins(again.get(kept).search(VECTORS[9:10], 2)[0]) == ["i09", "i09"]
    again.close()
