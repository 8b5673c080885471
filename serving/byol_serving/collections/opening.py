"""Which backend a store's address names."""

from pathlib import Path

from byol_serving.collections.types import Store
from byol_serving.errors import InvalidConfig

MILVUS = "milvus:"


def open_store(address: Path | str, *, gpu_memory: int = 0) -> Store:
    """A folder on this machine, or `milvus:` and the address of a server or a Milvus Lite file.

    `milvus:http://localhost:19530`, `milvus:lite.db`; the backend is imported when it is named.
    `gpu_memory` bounds, in bytes, what a local store's indexes take of a GPU's memory; 0: nothing.

    Raises:
        InvalidConfig: `gpu_memory` for Milvus, which has its own settings.
        StoreLocked, StoreCorrupt, StoreError, Unavailable: it cannot be opened.
    """
    text = str(address)
    if text.startswith(MILVUS):
        if gpu_memory:
            raise InvalidConfig(
                f"--index-gpu-memory {gpu_memory} is for local stores: leave it out, and give"
                " Milvus's query nodes the GPU"
            )
        from byol_serving.collections.milvus import MilvusStore

        return MilvusStore(text.removeprefix(MILVUS))
    from byol_serving.collections.gpu import Gpu
    from byol_serving.collections.index import IndexOptions
    from byol_serving.collections.store import Store as LocalStore

    return LocalStore(address, options=IndexOptions(gpu=Gpu.found(gpu_memory)))
