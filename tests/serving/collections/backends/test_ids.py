"""Collections of integer ids, in every backend."""

import pytest

from byol_serving.collections.types import Store
from byol_serving.errors import InvalidRequest, UnknownId
from serving.collections.backends.items import DIM, VECTORS
from serving.collections.backends.places import NAMES

INTEGERS = [-(2**63), -10, -9, 0, 7, 10, 2**53 + 1, 2**63 - 1]
WRONG = ["a", "7 ", "+7", "07", "-0", "-", "1.0", "1e3", "٣", str(2**63), str(-(2**63) - 1)]


def test_integer_ids_are_digits_of_64_bits_and_nothing_else(store: Store) -> None:
    made = store.create(next(NAMES), dim=DIM, encoder_id="e", id_type="int64")
    assert made.info.id_type == store.get(made.info.name).info.id_type == "int64"
    ids = [str(each) for each in INTEGERS]
    assert made.upsert(ids, VECTORS[: len(ids)], [{"n": n} for n in INTEGERS]).inserted == len(ids)
    for wrong in WRONG:
        with pytest.raises(InvalidRequest, match="64-bit integer in plain digits"):
            made.upsert(["1", wrong], VECTORS[:2])
        with pytest.raises(InvalidRequest, match="64-bit integer"):
            made.set_metadata([wrong], [{}])
        with pytest.raises(UnknownId):
            made.get([wrong])
    assert made.delete(WRONG) == 0
    assert made.info.count == len(ids)
    items = made.get(ids[::-1])
    assert [item.int_id for item in items] == INTEGERS[::-1]
    assert [item.metadata["n"] for item in items] == INTEGERS[::-1]
    (hits,) = made.search(VECTORS[6:7], 1)
    assert (hits[0].id, hits[0].int_id) == (str(2**53 + 1), 2**53 + 1)
    assert made.upsert(["7"], VECTORS[20:21]).updated == 1
    assert made.delete(["7", "-9"]) == 2
    assert {item.int_id for item in made.page("", 100).items} == set(INTEGERS) - {7, -9}


def test_ids_are_strings_unless_said_otherwise(store: Store) -> None:
    made = store.create(next(NAMES), dim=DIM, encoder_id="e")
    assert made.info.id_type == "string"
    made.upsert(["07", "7"], VECTORS[:2])
    assert made.info.count == 2
    # What a caller without types could send.
    with pytest.raises(InvalidRequest, match="id type 'uuid' is unknown: use string or int64"):
        store.create(next(NAMES), dim=DIM, encoder_id="e", id_type="uuid")  # type: ignore[arg-type]
