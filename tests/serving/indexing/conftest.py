"""One encoder for all tests of the offline pipeline."""

import pytest

from byol_serving.bundle import Bundle
from byol_serving.encoder import Encoder
from serving.support import make_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def encoder(bundle: Bundle) -> Encoder:
    return Encoder(bundle, device="cpu", threads=1)
