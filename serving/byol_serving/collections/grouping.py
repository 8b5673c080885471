"""The best values of a metadata key instead of the best items, each with its own best items."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from byol_serving.collections.filters import All, Equals, Exists, Filter, In, Not, Scalar
from byol_serving.collections.querying import Query, Wanted, checked_count
from byol_serving.collections.types import Collection, Hit
from byol_serving.errors import InvalidRequest

_ROOM = 4
"""Hits asked for at first, for each that is needed: values repeat."""
MAX_GROUPS = 1000


@dataclass(frozen=True, kw_only=True)
class HitGroup:
    """One value of the key and its best items, best first."""

    value: Scalar
    hits: Sequence[Hit]


def find_groups(
    collection: Collection, queries: Sequence[Query], wanted: Wanted, *, key: str, size: int
) -> list[list[HitGroup]]:
    """The `wanted.k` values of `key` whose best items are nearest, each with up to `size` items.

    As if all items were ranked and dealt to their values; exact wherever filtered search is. Items
    without the key, or with null, a list or an object there, belong to no group.

    Raises:
        InvalidRequest: an empty key, `size` below 1, more than MAX_GROUPS groups, or together with
            `mmr_lambda`.
    """
    if not key:
        raise InvalidRequest("the key to group by is empty: name a metadata key")
    if size < 1:
        raise InvalidRequest(f"group size {size} is below 1: ask for at least one item a group")
    if wanted.mmr_lambda is not None:
        raise InvalidRequest("groups and mmr_lambda exclude each other: ask for one of them")
    if wanted.offset + wanted.k > MAX_GROUPS:
        raise InvalidRequest(
            f"{wanted.offset + wanted.k} groups are over {MAX_GROUPS}: ask for fewer, or filter"
        )
    checked_count(collection, wanted.k, limit=True)  # k counts groups here, not items
    return [_groups_of(_Asking(collection, query, wanted, key), size) for query in queries]


@dataclass
class _Group:
    value: Scalar
    hits: list[Hit] = field(default_factory=list)
    whole: bool = False
    """Whether there are no more hits than these."""


@dataclass(frozen=True)
class _Asking:
    collection: Collection
    query: Query
    wanted: Wanted
    key: str

    def hits(self, condition: Filter, k: int) -> list[Hit]:
        """The k nearest that meet the condition and the caller's own."""
        own = self.query.own_ids
        given = self.wanted.condition
        (found,) = self.collection.search(
            self.query.vector[None],
            min(k + len(own), self.collection.info.count),
            condition=condition if given is None else All((given, condition)),
            min_score=self.wanted.min_score,
            with_vectors=self.wanted.with_vectors,
            effort=self.wanted.effort,
        )
        return [hit for hit in found if hit.id not in own][:k]


def _groups_of(asking: _Asking, size: int) -> list[HitGroup]:
    count = asking.wanted.offset + asking.wanted.k
    groups = _best_groups(asking, count, size)[asking.wanted.offset :]
    for group in groups:
        if len(group.hits) < size and not group.whole:
            group.hits = asking.hits(Equals(asking.key, group.value), size)
    return [
        HitGroup(value=group.value, hits=[_shown(hit, asking.wanted) for hit in group.hits[:size]])
        for group in groups
    ]


def _best_groups(asking: _Asking, count: int, size: int) -> list[_Group]:
    """The first groups by their best hit: ranks items, then those that are in no group yet."""
    groups: dict[tuple[type, Scalar], _Group] = {}
    room = _ROOM
    while len(groups) < count:
        asked = room * (count - len(groups)) * size
        unseen = Not(In(asking.key, tuple(each.value for each in groups.values())))
        hits = asking.hits(All((Exists(asking.key), unseen)), asked)
        ended = len(hits) < asked
        found: dict[tuple[type, Scalar], _Group] = {}
        for hit in hits:
            value = hit.metadata[asking.key]
            if isinstance(value, (str, int, float)):
                found.setdefault(_kind(value), _Group(value, whole=ended)).hits.append(hit)
        groups |= found
        if ended:
            break
        if not found:  # all of them had null, a list or an object there
            room *= 2
    return list(groups.values())[:count]


def _kind(value: Scalar) -> tuple[type, Scalar]:
    """Equal for equal values of one kind: True is not 1, but 1 is 1.0."""
    return (type(value) if isinstance(value, (bool, str)) else float, value)


def _shown(hit: Hit, wanted: Wanted) -> Hit:
    return hit if wanted.with_metadata else replace(hit, metadata={})
