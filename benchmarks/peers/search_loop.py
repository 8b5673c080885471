"""What every search peer does: build once, then answer rounds of queries that are timed here."""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Search: TypeAlias = Callable[[NDArray[np.float32], int, int, int | None], list[list[int]]]
"""(queries, k, effort, below) -> ids; `below` keeps the items whose `pick` is less."""
Build: TypeAlias = Callable[[NDArray[np.float32], NDArray[np.int64], str], Search]

_FIRST = 4


def serve(build: Build) -> None:
    """The first line builds, each further one measures a round."""
    setup = json.loads(sys.stdin.readline())
    vectors, picks = np.load(setup["vectors"]), np.load(setup["picks"])
    queries = np.load(setup["queries"])
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        search = build(vectors, picks, folder)
        seconds = time.perf_counter() - started
        del vectors
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        answer({"build_s": seconds, "peak_mb": peak})
        for line in sys.stdin:
            answer(measured(search, queries, json.loads(line)))


def measured(
    search: Search, queries: NDArray[np.float32], request: dict[str, Any]
) -> dict[str, Any]:
    """One round: the first `count` queries in batches, over and over for so many `seconds`.

    A few are asked before, so that an engine that is slow is known by them alone.
    """
    batch, asked = request["batch"], queries[: request["count"]]

    def ask(part: NDArray[np.float32]) -> list[list[int]]:
        return search(part, request["k"], request["effort"], request["below"])

    started = time.perf_counter()
    ids = ask(asked[:_FIRST])
    if (took := time.perf_counter() - started) > request["seconds"] / 8:
        return {"queries_per_s": len(ids) / took, "ids": ids}
    ids, done = [], 0
    started = time.perf_counter()
    while (took := time.perf_counter() - started) < request["seconds"]:
        start = done % len(asked)
        part = asked[start : start + batch]
        found = ask(part)
        if done < len(asked):
            ids += found
        done += len(part)
    return {"queries_per_s": done / took, "ids": ids}


def answer(result: dict[str, Any]) -> None:
    """One JSON object, one line."""
    print(json.dumps(result), flush=True)
