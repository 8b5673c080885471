"""Which backend a store's address names."""

from pathlib import Path

from byol_serving.collections.types import Store

MILVUS = "milvus:"


def open_store(address: Path | str) -> Store:
    """A folder on this machine, or `milvus:` and the address of a server or a Milvus Lite file.

    `milvus:http://localhost:19530`, `milvus:lite.db`; the backend is imported when it is named.

    Raises:
        StoreLocked, StoreCorrupt, StoreError, Unavailable: it cannot be opened.
    """
    text = str(address)
    if text.startswith(MILVUS):
        from byol_serving.collections.milvus import MilvusStore

        return MilvusStore(text.removeprefix(MILVUS))
    from byol_serving.collections.store import Store as LocalStore

    return LocalStore(address)
