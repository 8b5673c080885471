"""Qdrant embedded (qdrant-edge-py), answering the requests of benchmarks/search.py."""

import numpy as np
import qdrant_edge as qdrant
from numpy.typing import NDArray

from search_loop import Search, serve

_AT_ONCE = 1000


def build(vectors: NDArray[np.float32], picks: NDArray[np.int64], folder: str) -> Search:
    """HNSW with the links and build effort of the others, and an index on the filtered key."""
    hnsw = qdrant.HnswIndexConfig(m=32, ef_construct=200, full_scan_threshold=1000)
    kind = qdrant.EdgeVectorParams(size=vectors.shape[1], distance=qdrant.Distance.Dot)
    config = qdrant.EdgeConfig(
        vectors={"": kind},
        hnsw_config=hnsw,
        optimizers=qdrant.EdgeOptimizersConfig(default_segment_number=1, indexing_threshold=1000),
    )
    shard = qdrant.EdgeShard.create(folder, config)
    shard.update(
        qdrant.UpdateOperation.create_field_index("pick", qdrant.PayloadSchemaType.Integer)
    )
    for start in range(0, len(vectors), _AT_ONCE):
        points = [
            qdrant.Point(start + n, vector.tolist(), {"pick": int(pick)})
            for n, (vector, pick) in enumerate(
                zip(
                    vectors[start : start + _AT_ONCE],
                    picks[start : start + _AT_ONCE],
                    strict=True,
                )
            )
        ]
        shard.update(qdrant.UpdateOperation.upsert_points(points))
    shard.optimize()

    def search(
        queries: NDArray[np.float32], k: int, effort: int, below: int | None
    ) -> list[list[int]]:
        parameters = qdrant.SearchParams(hnsw_ef=effort)
        wanted = None
        if below is not None:
            condition = qdrant.FieldCondition(key="pick", range=qdrant.RangeFloat(lt=below))
            wanted = qdrant.Filter(must=[condition])
        return [
            [
                int(point.id)
                for point in shard.search(
                    qdrant.SearchRequest(
                        query=qdrant.Query.Nearest(query.tolist()),
                        limit=k,
                        params=parameters,
                        filter=wanted,
                    )
                )
            ]
            for query in queries
        ]

    return search


if __name__ == "__main__":
    serve(build)
