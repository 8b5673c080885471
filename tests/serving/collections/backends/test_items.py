"""Items of every backend are written, replaced, deleted and read."""

import numpy as np
import pytest

from byol_serving.collections.filters import All, Equals, Range
from byol_serving.collections.types import Collection
from byol_serving.errors import (
    InvalidRequest,
    InvalidVector,
    UnknownId,
)
from serving.collections.backends.items import DIM, IDS, METADATA, VECTORS, everything


def test_items_are_inserted_replaced_and_read(empty: Collection) -> None:
    assert empty.upsert(IDS[:4], VECTORS[:4]).inserted == 4
    again = empty.upsert(["i03", "new"], VECTORS[10:12], [{"x": [1, None]}, {"y": 0.5}])
    assert (again.inserted, again.updated) == (1, 1)
    items = empty.get(["new", "i03", "i00"], with_vectors=True)
    assert [item.id for item in items] == ["new", "i03", "i00"]
    assert [item.metadata for item in items] == [{"y": 0.5}, {"x": [1, None]}, {}]
    rows = np.stack([np.asarray(item.vector) for item in items])
    np.testing.assert_allclose(rows, VECTORS[[11, 10, 0]], atol=1e-6)
    assert empty.get(["i00"])[0].vector is None
    assert empty.get([]) == []
    with pytest.raises(UnknownId, match="never"):
        empty.get(["i00", "never"])
    assert empty.info.count == 5


def test_metadata_alone_is_replaced_whole_or_not(empty: Collection) -> None:
    empty.upsert(IDS[:3], VECTORS[:3], [{"a": 1}, {"b": 2}, {}])
    empty.set_metadata(IDS[1:3], [{"c": 3}, {"d": True}])
    with pytest.raises(UnknownId, match="never"):
        empty.set_metadata(["i00", "never"], [{"z": 1}, {"z": 1}])
    found = everything(empty)
    assert [found[each].metadata for each in IDS[:3]] == [{"a": 1}, {"c": 3}, {"d": True}]
    np.testing.assert_allclose(np.asarray(found["i02"].vector), VECTORS[2], atol=1e-6)
    assert [h.id for h in empty.search(VECTORS[:1], 3, condition=Equals("d", True))[0]] == ["i02"]


def test_items_are_deleted(empty: Collection) -> None:
    empty.upsert(IDS[:20], VECTORS[:20], METADATA[:20])
    assert empty.delete(["i03", "never", "i04"]) == 2
    assert empty.delete(["i03"]) == 0
    assert empty.delete([]) == 0
    assert empty.delete_where(Range("n", gte=15)) == 5
    assert empty.delete_where(Range("n", gte=15)) == 0
    assert sorted(everything(empty)) == [each for each in IDS[:15] if each not in ("i03", "i04")]
    assert empty.info.count == 13
    assert all(hit.id != "i03" for hit in empty.search(VECTORS[3:4], 13)[0])
    assert empty.delete_where(All(())) == 13
    with pytest.raises(InvalidRequest, match="empty"):
        empty.search(VECTORS[:1], 1)


def test_a_batch_that_is_wrong_changes_nothing(empty: Collection) -> None:
    empty.upsert(["a"], VECTORS[:1], [{"x": 1}])
    zero, nan = np.zeros((1, DIM), np.float32), np.full((1, DIM), np.nan, np.float32)
    for ids, rows, metadata, error in (
        (["b", ""], VECTORS[:2], None, InvalidRequest),
        (["b", "b"], VECTORS[:2], None, InvalidRequest),
        (["b", "x" * 513], VECTORS[:2], None, InvalidRequest),
        (["b"], VECTORS[:2], None, InvalidRequest),
        (["b"], VECTORS[:1], [{}, {}], InvalidRequest),
        (["b"], VECTORS[:1], [{"x": float("nan")}], InvalidRequest),
        (["b"], VECTORS[:1, :3], None, InvalidVector),
        (["a", "b"], np.concatenate([VECTORS[1:2], zero]), None, InvalidVector),
        (["a", "b"], np.concatenate([VECTORS[1:2], nan]), None, InvalidVector),
    ):
        with pytest.raises(error):
            empty.upsert(ids, rows, metadata)
    found = everything(empty)
    assert list(found) == ["a"]
    assert found["a"].metadata == {"x": 1}
    np.testing.assert_allclose(np.asarray(found["a"].vector), VECTORS[0], atol=1e-6)
    assert empty.upsert([], VECTORS[:0]).inserted == 0


def test_ids_may_hold_any_text(empty: Collection) -> None:
    ids = [
        "a b",
        'quo"te',
        "back\\slash",
        "new\nline",
        "ü€😀",
        "'",
        "%",
        "id",
        "x" * 512,
        "\t",
        "é",
    ]
    empty.upsert(ids, VECTORS[: len(ids)], [{"n": n} for n in range(len(ids))])
    for n, each in enumerate(ids):
        assert empty.get([each])[0].metadata == {"n": n}
    assert set(everything(empty)) == set(ids)
    assert [hit.id for hit in empty.search(VECTORS[3:4], 1)[0]] == ["new\nline"]
    assert empty.delete(ids[:5]) == 5
    assert set(everything(empty)) == set(ids[5:])
