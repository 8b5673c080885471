"""LanceDB, answering the requests of benchmarks/search.py."""

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import BTree, HnswSq
from numpy.typing import NDArray

from search_loop import Search, serve


def build(vectors: NDArray[np.float32], picks: NDArray[np.int64], folder: str) -> Search:
    """IVF-HNSW-SQ with re-ranking, and a scalar index on the filtered key."""
    flat = pa.array(vectors.reshape(-1))
    table = lancedb.connect(folder).create_table(
        "c",
        pa.table(
            {
                "id": np.arange(len(vectors)),
                "pick": picks,
                "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
            }
        ),
    )
    lists = max(1, len(vectors) // 500_000)
    graph = HnswSq(distance_type="dot", num_partitions=lists, m=32, ef_construction=200)
    table.create_index("vector", config=graph)
    table.create_index("pick", config=BTree())

    def search(
        queries: NDArray[np.float32], k: int, effort: int, below: int | None
    ) -> list[list[int]]:
        answers = []
        for query in queries:
            asked = table.search(query).distance_type("dot").nprobes(20).ef(max(effort, 3 * k))
            asked = asked.refine_factor(3).select(["id", "_distance"]).limit(k)
            if below is not None:
                asked = asked.where(f"pick < {below}", prefilter=True)
            answers.append([int(each) for each in asked.to_arrow()["id"].to_pylist()])
        return answers

    return search


if __name__ == "__main__":
    serve(build)
