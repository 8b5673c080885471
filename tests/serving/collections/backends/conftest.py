"""A store of each backend, and its collections."""

from collections.abc import Iterator

import pytest

from byol_serving.collections.opening import open_store
from byol_serving.collections.types import Collection, Store
from serving.collections.backends.items import COUNT, DIM, IDS, METADATA, VECTORS
from serving.collections.backends.places import BACKENDS, NAMES, address_of


@pytest.fixture(scope="session", params=BACKENDS)
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Store]:
    opened = open_store(address_of(request.param, tmp_path_factory.mktemp(request.param)))
    yield opened
    opened.close()


@pytest.fixture
def empty(store: Store) -> Collection:
    return store.create(next(NAMES), dim=DIM, encoder_id="e")


@pytest.fixture(scope="session")
def filled(store: Store) -> Collection:
    """Only read."""
    made = store.create(next(NAMES), dim=DIM, encoder_id="e")
    counts = made.upsert(IDS, VECTORS * 3, METADATA)
    assert (counts.inserted, counts.updated) == (COUNT, 0)
    return made
