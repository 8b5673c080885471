"""How a collection's index stands, for people and dashboards."""

from dataclasses import dataclass

from byol_serving.collections.index import Index, View


@dataclass(frozen=True, kw_only=True)
class IndexStats:
    """One moment of an index."""

    kind: str
    """What the collection was created with."""
    answering: str
    """What answers searches now."""
    wanted: str
    """What its size calls for: differs from `answering` while that is being built."""
    count: int
    deleted: int
    """Positions of deleted items, not yet squeezed out."""
    unabsorbed: int
    """New items that are scanned beside the approximate index."""
    effort: int | None
    """Lists read (IVF) or width of the walk (HNSW) of a search; None for an exact index."""
    recall: float
    """Recall@10 on held-back queries when the index was built; 1 for an exact index."""
    recall_target: float
    vector_bytes: int
    """Memory of the float32 vectors."""
    index_bytes: int
    """Memory of the approximate index."""


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
