"""Where the backends are: a folder, and Milvus embedded or the server of BYOL_TEST_MILVUS."""

import importlib.util
import itertools
import os
import uuid
from pathlib import Path

import pytest

BACKENDS = ["local", "milvus"]
HAS_MILVUS = bool(importlib.util.find_spec("pymilvus") and importlib.util.find_spec("milvus_lite"))
RUN = uuid.uuid4().hex[:8]
NAMES = (f"c-{RUN}.{n}" for n in itertools.count())  # a server may hold those of other runs


def address_of(backend: str, folder: Path) -> str:
    if backend == "local":
        return str(folder / "store")
    if server := os.environ.get("BYOL_TEST_MILVUS"):
        return f"milvus:{server}"
    if not HAS_MILVUS:
        pytest.skip("pymilvus or milvus-lite is not installed (extra: milvus)")
    return f"milvus:{folder / 'lite.db'}"
