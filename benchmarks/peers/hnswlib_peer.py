"""hnswlib, answering the requests of benchmarks/search.py."""

import hnswlib
import numpy as np
from numpy.typing import NDArray

from search_loop import Search, serve


def build(vectors: NDArray[np.float32], picks: NDArray[np.int64], folder: str) -> Search:
    """In memory only: it has no store. Its filter is a Python function called for each item."""
    index = hnswlib.Index(space="ip", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), M=32, ef_construction=200)
    index.add_items(vectors)

    def search(
        queries: NDArray[np.float32], k: int, effort: int, below: int | None
    ) -> list[list[int]]:
        index.set_ef(effort)
        wanted = None if below is None else (lambda label: bool(picks[label] < below))
        try:
            found, _ = index.knn_query(queries, k=k, filter=wanted)
        except RuntimeError:  # it found fewer than k, and then gives none: more effort is needed
            return [[] for _ in queries]
        ids: list[list[int]] = found.tolist()
        return ids

    return search


if __name__ == "__main__":
    serve(build)
