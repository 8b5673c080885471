"""How a collection's index stands, for people and dashboards."""

from byol_serving.collections.index import Index, View
from byol_serving.collections.types import IndexStats


def stats_of(index: Index, view: View) -> IndexStats:
    """The facts of one view."""
    approximate = view.approximate
    tuning = approximate.tuning if approximate else None
    return IndexStats(
        kind=index.kind,
        answering=approximate.kind if approximate else "flat",
        wanted=index.wanted(view.count) or "flat",
        count=view.count,
        deleted=view.dead,
        unabsorbed=view.size - min(approximate.size, view.size) if approximate else 0,
        effort=tuning.effort if tuning else None,
        recall=tuning.recall if tuning else 1.0,
        recall_target=tuning.target if tuning else index.options.recall_target,
        vector_bytes=view.vectors.nbytes,
        index_bytes=approximate.nbytes if approximate else 0,
    )
