"""hnswlib, answering the requests of benchmarks/search.py."""

import json
import sys
import time
from typing import Any

import hnswlib
import numpy as np


def main() -> None:
    """The first line builds, each further one measures a round of queries."""
    setup = json.loads(sys.stdin.readline())
    vectors, queries = np.load(setup["vectors"]), np.load(setup["queries"])
    index = hnswlib.Index(space="ip", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), M=32, ef_construction=200)
    started = time.perf_counter()
    index.add_items(vectors)
    answer({"build_s": time.perf_counter() - started})
    for line in sys.stdin:
        request = json.loads(line)
        index.set_ef(request["ef"])
        index.set_num_threads(request["threads"])
        started = time.perf_counter()
        found, _ = index.knn_query(queries, k=request["k"])
        seconds = time.perf_counter() - started
        answer({"queries_per_s": len(queries) / seconds, "ids": found.tolist()})


def answer(result: dict[str, Any]) -> None:
    """One JSON object, one line."""
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
