"""What the writers do: operation `n` of a writer is the same in the writer and in the check."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from byol_serving.collections.collection import LocalCollection
from byol_serving.collections.filters import All, Equals
from byol_serving.collections.index import IndexOptions
from byol_serving.collections.types import IndexKind
from byol_serving.errors import UnknownId
from serving.collections.model import Model, clustered

DIM = 16
COLLECTIONS: dict[str, IndexKind] = {"flat": "flat", "graph": "hnsw", "lists": "ivf"}
WRITERS = {"a": "flat", "b": "flat", "c": "graph", "d": "lists", "e": "flat"}
"""Each writer's collection; it changes only ids that begin with its own letter. Of several in one
collection, upserts are committed together."""
OPTIONS = IndexOptions(
    approximate_from=100, absorb_from=16, compact_from=16, compact_share=0.1, snapshot_every=300
)
_IDS = 150
_LARGEST = 60


Kind = Literal["upsert", "delete", "delete where", "set metadata"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Operation:
    """One change. Deleting by filter and setting metadata use `mark`, upserts write it."""

    kind: Kind
    writer: str
    ids: list[str]
    number: int
    mark: int

    @property
    def metadata(self) -> dict[str, str | int]:
        """What the items get: who wrote them, and when."""
        return {"writer": self.writer, "number": self.number, "mark": self.mark}

    def apply(self, collection: LocalCollection) -> None:
        """Makes the change; returns when it is acknowledged."""
        texts = [self.metadata] * len(self.ids)
        match self.kind:
            case "upsert":
                collection.upsert(self.ids, self._vectors(), texts)
            case "delete":
                collection.delete(self.ids)
            case "delete where":
                mine = All((Equals("writer", self.writer), Equals("mark", self.mark)))
                collection.delete_where(mine)
            case "set metadata":
                with suppress(UnknownId):  # and then nothing is changed, as in the model
                    collection.set_metadata(self.ids, texts)

    def apply_to(self, model: Model) -> None:
        """Makes the same change in a model of this writer's items."""
        texts = [self.metadata] * len(self.ids)
        match self.kind:
            case "upsert":
                model.upsert(self.ids, self._vectors(), texts)
            case "delete":
                model.delete(self.ids)
            case "delete where":
                model.delete(model.matching(Equals("mark", self.mark)))
            case "set metadata":
                if all(each in model.vectors for each in self.ids):
                    model.metadata |= dict(zip(self.ids, texts, strict=True))

    def _vectors(self) -> np.ndarray:
        return clustered(len(self.ids), DIM, seed=self.number)


def operation(writer: str, number: int) -> Operation:
    """The writer's `number`th change."""
    generator = np.random.default_rng([ord(writer), number])
    kind = KINDS[generator.choice(4, p=[0.6, 0.15, 0.1, 0.15])]
    count = int(generator.integers(1, _LARGEST if kind == "upsert" else 6))
    chosen = generator.choice(_IDS, count, replace=False)
    ids = [f"{writer}{each}" for each in chosen]
    return Operation(kind, writer, ids, number, int(generator.integers(0, 8)))
