"""Milvus Lite, answering the requests of benchmarks/search.py."""

import numpy as np
from numpy.typing import NDArray
from pymilvus import DataType, MilvusClient

from search_loop import Search, serve

_AT_ONCE = 5000


def build(vectors: NDArray[np.float32], picks: NDArray[np.int64], folder: str) -> Search:
    """HNSW with the links and build effort of the others."""
    client = MilvusClient(f"{folder}/milvus.db")
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("pick", DataType.INT64)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
    client.create_collection("c", schema=schema)
    for start in range(0, len(vectors), _AT_ONCE):
        stop = min(start + _AT_ONCE, len(vectors))
        rows = [{"id": n, "pick": int(picks[n]), "vector": vectors[n]} for n in range(start, stop)]
        client.insert("c", rows)
    index = client.prepare_index_params()
    index.add_index(
        "vector",
        index_type="HNSW",
        metric_type="IP",
        params={"M": 32, "efConstruction": 200},
    )
    client.create_index("c", index)
    client.load_collection("c")

    def search(
        queries: NDArray[np.float32], k: int, effort: int, below: int | None
    ) -> list[list[int]]:
        found = client.search(
            "c",
            data=list(queries),
            limit=k,
            filter="" if below is None else f"pick < {below}",
            search_params={"params": {"ef": effort}},
        )
        return [[int(hit["id"]) for hit in hits] for hits in found]

    return search


if __name__ == "__main__":
    serve(build)
