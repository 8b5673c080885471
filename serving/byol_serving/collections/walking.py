"""All items of a collection, from first to last."""

from collections.abc import Callable, Iterator

import numpy as np

from byol_serving.collections.filters import Filter
from byol_serving.collections.types import Collection, Page, Vectors
from byol_serving.errors import DeadlinePassed

_AT_ONCE = 4096


def pages(
    collection: Collection,
    *,
    condition: Filter | None = None,
    with_metadata: bool = False,
    with_vectors: bool = True,
) -> Iterator[Page]:
    """Every page, in order; no item is there twice, unless it was replaced meanwhile."""
    after = ""
    while True:
        page = collection.page(
            after,
            _AT_ONCE,
            condition=condition,
            with_metadata=with_metadata,
            with_vectors=with_vectors,
        )
        yield page
        if not page.after:
            return
        after = page.after


def ids_and_vectors(
    collection: Collection, condition: Filter | None = None
) -> tuple[list[str], Vectors]:
    """All ids and their vectors, float32 [N, D], in memory."""
    found: dict[str, Vectors] = {}
    for page in pages(collection, condition=condition):
        found.update((item.id, np.asarray(item.vector)) for item in page.items)
    if not found:
        return [], np.empty((0, collection.info.dim), np.float32)
    return list(found), np.stack(list(found.values()))


def never() -> bool:
    """Work that is never called off."""
    return False


def go_on(stopping: Callable[[], bool]) -> None:
    """Raises DeadlinePassed where nobody waits for the answer any more."""
    if stopping():
        raise DeadlinePassed("the caller is gone or its deadline passed: the work was stopped")
