"""Sixty items with all sorts of metadata, and what brute force says of them."""

from collections.abc import Iterable

import numpy as np

from byol_serving.collections.filters import Filter, matches
from byol_serving.collections.types import Collection, Hit, Item, Json, Metadata, Vectors
from byol_serving.collections.walking import pages

DIM, COUNT = 6, 60
RNG = np.random.default_rng(21)


def unit(rows: np.ndarray) -> Vectors:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


VECTORS = unit(RNG.standard_normal((COUNT, DIM)))
VECTORS[50:] = VECTORS[:10]
IDS = [f"i{n:02}" for n in range(COUNT)]
VALUES: list[Json] = [
    "cat",
    "1",
    "",
    'q"uo\\te',
    "ü\n",
    1,
    0,
    -3,
    2.5,
    1e300,
    2**53 + 1,
    True,
    False,
    None,
]
KEYS = ["a", "b b", 'c"\\', "ü"]


def metadata_of(n: int) -> Metadata:
    found: dict[str, Json] = {"n": n}
    for step, key in enumerate(KEYS, 1):
        if n % (step + 2):
            found[key] = VALUES[n * step % len(VALUES)]
    return found | {"a": ["cat", {"deep": 1}]} if n % 11 == 5 else found


METADATA = [metadata_of(n) for n in range(COUNT)]


def everything(collection: Collection) -> dict[str, Item]:
    found = pages(collection, with_metadata=True)
    return {item.id: item for page in found for item in page.items}


def origins(found: Iterable[Hit | str]) -> list[str]:
    """Ids, a copy's as its original's: their scores may differ in the last bit, either way."""
    ids = [each if isinstance(each, str) else each.id for each in found]
    return [f"i0{each[2]}" if each[1] == "5" else each for each in ids]


def ranked(vector: Vectors, condition: Filter | None = None) -> list[str]:
    """Best first, an item before its copy."""
    scores = VECTORS @ vector
    scores[50:] = scores[:10]
    return [
        IDS[n]
        for n in np.lexsort((np.arange(COUNT), -scores))
        if condition is None or matches(condition, METADATA[n])
    ]
