"""Random sequences of everything a collection can do, restarts included, against a model."""

import shutil
import tempfile
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from byol_serving.collections.filters import All, Equals, Exists, Filter, In, Not, Range
from byol_serving.collections.index import IndexOptions
from byol_serving.collections.store import Store
from byol_serving.collections.types import IdType, IndexKind, Metadata
from byol_serving.errors import UnknownId
from serving.collections.model import Model, clustered

DIM = 4
# So small that every reorganisation happens within a few steps.
OPTIONS = IndexOptions(
    approximate_from=48, absorb_from=8, compact_from=4, compact_share=0.1, snapshot_every=40
)
IDS = st.lists(st.integers(0, 60).map(str), min_size=1, max_size=24, unique=True)
SEEDS = st.integers(0, 2**16)
METADATA = st.fixed_dictionaries({"n": st.integers(0, 9)}, optional={"odd": st.booleans()})
FILTERS: st.SearchStrategy[Filter] = st.one_of(
    st.builds(Equals, st.just("odd"), st.booleans()),
    st.builds(In, st.just("n"), st.tuples(st.integers(0, 9), st.integers(0, 9))),
    st.builds(Range, st.just("n"), gte=st.integers(0, 9)),
    st.just(Exists("odd")),
    st.just(Not(Exists("odd"))),
    st.just(All((Range("n", lt=5), Not(Equals("odd", True))))),
)


class Machine(RuleBasedStateMachine):
    """One collection in a store that is also closed, or abandoned as by a crash."""

    kind: IndexKind = "flat"
    id_type: IdType = "string"

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.model = Model()
        self.lives = 0

    @initialize()
    def create(self) -> None:
        self.store = Store(self.root / "0", options=OPTIONS)
        self.collection = self.store.create(
            "c", dim=DIM, encoder_id="e", index=self.kind, id_type=self.id_type
        )

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root)

    @rule(ids=IDS, seed=SEEDS, data=st.data())
    def upsert(self, ids: list[str], seed: int, data: st.DataObject) -> None:
        vectors = clustered(len(ids), DIM, seed=seed)
        metadata: list[Metadata] = data.draw(
            st.lists(METADATA, min_size=len(ids), max_size=len(ids))
        )
        counts = self.collection.upsert(ids, vectors, metadata)
        known = sum(each in self.model.vectors for each in ids)
        assert (counts.inserted, counts.updated) == (len(ids) - known, known)
        self.model.upsert(ids, vectors, metadata)

    @rule(ids=IDS)
    def delete(self, ids: list[str]) -> None:
        assert self.collection.delete(ids) == self.model.delete(ids)

    @rule(condition=FILTERS)
    def delete_where(self, condition: Filter) -> None:
        doomed = self.model.matching(condition)
        assert self.collection.delete_where(condition) == self.model.delete(doomed)

    @rule(ids=IDS, text=METADATA)
    def set_metadata(self, ids: list[str], text: Metadata) -> None:
        if all(each in self.model.vectors for each in ids):
            self.collection.set_metadata(ids, [text] * len(ids))
            self.model.metadata |= dict.fromkeys(ids, text)
        else:
            with pytest.raises(UnknownId):
                self.collection.set_metadata(ids, [text] * len(ids))

    @precondition(lambda self: self.model.vectors)
    @rule(seed=SEEDS, queries=st.sampled_from([1, 5]), condition=FILTERS | st.none())
    def search(self, seed: int, queries: int, condition: Filter | None) -> None:
        k = min(5, len(self.model.vectors))
        self.model.check_search(self.collection, clustered(queries, DIM, seed=seed), k, condition)

    @rule()
    def snapshot(self) -> None:
        self.collection.snapshot()

    @rule()
    def settle(self) -> None:
        self.collection.settle()

    @rule(kind=st.sampled_from(["closed", "abandoned"]))
    def restart(self, kind: Literal["closed", "abandoned"]) -> None:
        """`abandoned` goes on with the files as they lie on disk at this moment."""
        here, there = self.root / str(self.lives), self.root / str(self.lives + 1)
        if kind == "closed":
            self.store.close()
            here.rename(there)
        else:
            with self.collection._upkeep._snapshotting:  # a crash is of one moment, a copy is not
                shutil.copytree(here, there)
            self.store.close()
            shutil.rmtree(here)
        self.lives += 1
        self.store = Store(there, options=OPTIONS)
        assert self.store.failed == {}
        self.collection = self.store.get("c")
        assert self.collection.id_type == self.id_type

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "collection"):
            self.model.check_all(self.collection)


@pytest.mark.parametrize(
    ("kind", "id_type"), [("flat", "int64"), ("hnsw", "string"), ("ivf", "string")]
)
def test_any_sequence(kind: IndexKind, id_type: IdType) -> None:
    run_state_machine_as_test(
        type("Machine", (Machine,), {"kind": kind, "id_type": id_type}),
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
