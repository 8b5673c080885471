"""The walk through a graph of byte codes, compiled for the processor at hand.

Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using Hierarchical
Navigable Small World graphs", 2016: a greedy descent through the upper layers, then algorithm 2 in
the lowest. FAISS builds the graph and keeps it. Its own walk waits for each code to come from
memory; here those of a node's neighbours are fetched together, before the first is looked at.

The arrays, throughout:
    codes: uint8 [N * D], each 128 more than what it stands for.
    links: int32, the neighbours of all nodes; a layer ends with -1 where there are fewer.
    offsets: int64 [N + 1], where a node's links begin.
    layers: int64 [L + 1], where in a node's links those of each layer begin, the lowest first.
    bits: uint8, the bitmap of what may be found; empty for all.
    seen: uint8 [N + 1], the walk that last came to a node; behind them the walk's own number.
    keys: int64, best first: a score, a node, and whether its neighbours have been looked at.
"""

from typing import TypeAlias

import numpy as np
from numba import types
from numpy.typing import NDArray

from byol_serving.collections.byte_products import dot, fetch
from byol_serving.collections.compiling import array, compiled, compiled_as

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]
Query: TypeAlias = NDArray[np.int8]
Links: TypeAlias = NDArray[np.int32]
Words: TypeAlias = NDArray[np.int64]

_LINE = 64
"""Bytes that come from memory together."""
_WALKS = 255
_DONE = 1


@compiled
def _insert(keys: Words, size: int, key: int) -> int:
    """Puts a key among the first `size` - 1, and says where; what was behind it moves back."""
    at = size - 1
    while at > 0 and keys[at - 1] < key:
        keys[at] = keys[at - 1]
        at -= 1
    keys[at] = key
    return at


@compiled
def _descend(
    query: Query, codes: Bytes, dim: int, links: Links, offsets: Words, layers: Words, entry: int
) -> int:
    """From the entry, through all layers but the lowest, to the node nearest to the query."""
    node, best = entry, dot(query, codes, entry * dim, dim)
    for layer in range(len(layers) - 2, 0, -1):
        moved = True
        while moved:
            moved = False
            begin = offsets[node]
            for at in range(begin + layers[layer], begin + layers[layer + 1]):
                other = int(links[at])
                if other < 0:
                    break
                score = dot(query, codes, other * dim, dim)
                if score > best:
                    node, best, moved = other, score, True
    return node


@compiled
def _fresh(
    node: int,
    codes: Bytes,
    dim: int,
    links: Links,
    offsets: Words,
    layers: Words,
    seen: Bytes,
    found: Links,
) -> int:
    """A node's neighbours that the walk has not come to before; their codes are on the way."""
    walk, count = seen[-1], 0
    for at in range(offsets[node], offsets[node] + layers[1]):
        other = int(links[at])
        if other < 0:
            break
        if seen[other] != walk:
            seen[other] = walk
            found[count] = other
            count += 1
            for line in range(other * dim, other * dim + dim, _LINE):
                fetch(codes, line)
    return count


@compiled
def _is_set(bits: Bytes, node: int) -> bool:
    return len(bits) == 0 or (bits[node >> 3] >> (node & 7)) & 1 == 1


@compiled
def _next(keys: Words, at: int, size: int) -> int:
    """The first key from `at` on whose node's neighbours have not been looked at; or `size`."""
    while at < size and keys[at] & _DONE:
        at += 1
    return at


@compiled
def _fetch_links(links: Links, offsets: Words, layers: Words, node: int) -> None:
    begin = offsets[node]
    for at in range(begin, begin + layers[1], _LINE // 4):
        fetch(links, at)


@compiled
def _walk(
    query: Query,
    codes: Bytes,
    dim: int,
    links: Links,
    offsets: Words,
    layers: Words,
    entry: int,
    covered: int,
    bits: Bytes,
    seen: Bytes,
    keys: Words,
    best: Words,
) -> int:
    """Fills `best` with what may be found, and says how many; `keys` is as wide as the walk."""
    everything = len(bits) == 0 and covered == len(seen) - 1
    found = np.empty(layers[1], np.int32)
    node = _descend(query, codes, dim, links, offsets, layers, entry)
    seen[node] = seen[-1]
    found[0] = node
    size, hits, at, fresh = 0, 0, -1, 1
    while True:
        first = len(keys)
        for number in range(fresh):
            node = int(found[number])
            key = (int(dot(query, codes, node * dim, dim)) << 32) | (node << 1)
            near = not everything and (hits < len(best) or key > best[-1])
            if near and node < covered and _is_set(bits, node):
                hits = min(hits + 1, len(best))
                _insert(best, hits, key)
            if size < len(keys):
                size += 1
            elif key <= keys[-1]:
                continue
            place = _insert(keys, size, key)
            if place < first:
                first = place
                _fetch_links(links, offsets, layers, node)
        at = _next(keys, min(at + 1, first), size)
        if at == size:
            break
        node = (keys[at] & 0xFFFFFFFF) >> 1
        keys[at] |= _DONE
        after = _next(keys, at + 1, size)
        if after < size:
            _fetch_links(links, offsets, layers, (keys[after] & 0xFFFFFFFF) >> 1)
        fresh = _fresh(node, codes, dim, links, offsets, layers, seen, found)
    if everything:
        hits = min(size, len(best))
        best[:hits] = keys[:hits]
    return hits


@compiled
def _rotate(queries: Floats, rotation: Floats) -> NDArray[np.int8]:
    """The queries as bytes, int8 [Q, D]."""
    count, dim = queries.shape
    rotated = np.empty((count, dim), np.int8)
    for at in range(dim):  # a row of the rotation at a time, since it is larger than the queries
        axis = rotation[at]
        for row in range(count):
            query, value = queries[row], np.float32(0.5)
            for other in range(dim):
                value += axis[other] * query[other]
            rotated[row, at] = min(max(np.floor(value), np.float32(-128)), np.float32(127))
    return rotated


@compiled
def _rank(query: Floats, vectors: Floats, best: Words, scores: Floats, positions: Words) -> None:
    """Orders candidates by their true scores, and keeps as many as there is room for."""
    dim, kept = len(query), 0
    for key in best:
        row = vectors[(key & 0xFFFFFFFF) >> 1]
        for at in range(0, dim, _LINE // 4):
            fetch(row, at)
    for key in best:
        node = (key & 0xFFFFFFFF) >> 1
        row, score = vectors[node], np.float32(0)
        for at in range(dim):
            score += query[at] * row[at]
        if kept < len(scores):
            kept += 1
        elif score <= scores[-1]:
            continue
        at = kept - 1
        while at > 0 and scores[at - 1] < score:
            scores[at], positions[at] = scores[at - 1], positions[at - 1]
            at -= 1
        scores[at], positions[at] = score, node
    scores[kept:], positions[kept:] = -np.inf, -1


_SEARCH = types.void(
    array(types.uint8, 1),
    array(types.int32, 1),
    *[array(types.int64, 1)] * 2,
    types.int64,
    *[array(types.float32, 2)] * 2,
    types.int64,
    array(types.uint8, 1),
    *[types.int64] * 2,
    array(types.float32, 2),
    array(types.uint8, 1, filled=True),
    array(types.float32, 2, filled=True),
    array(types.int64, 2, filled=True),
)


@compiled_as(_SEARCH)
def search(
    codes: Bytes,
    links: Links,
    offsets: Words,
    layers: Words,
    entry: int,
    rotation: Floats,
    vectors: Floats,
    covered: int,
    bits: Bytes,
    effort: int,
    candidates: int,
    queries: Floats,
    seen: Bytes,
    scores: Floats,
    positions: Words,
) -> None:
    """The nearest of each query.

    Args:
        codes: see above, as for `links`, `offsets`, `layers`, `bits` and `seen`.
        links: see above.
        offsets: see above.
        layers: see above.
        entry: the node where each walk begins.
        rotation: float32 [D, D], which brings vectors to the scale of the codes.
        vectors: float32 [N, D], by node.
        covered: nodes from here on may not be found.
        bits: see above.
        effort: how wide a walk is, at least `candidates`.
        candidates: how many are ranked by their true scores.
        queries: float32 [Q, D].
        seen: see above; changed, and no other thread's meanwhile.
        scores: float32 [Q, K], filled, best first; -inf where there are fewer.
        positions: int64 [Q, K], filled; -1 where there are fewer.
    """
    dim = queries.shape[1]
    keys, best = np.empty(effort, np.int64), np.empty(candidates, np.int64)
    rotated = _rotate(queries, rotation)
    for row in range(len(queries)):
        if seen[-1] == _WALKS:
            seen[:] = 0
        seen[-1] += 1
        query = rotated[row]
        hits = _walk(
            query, codes, dim, links, offsets, layers, entry, covered, bits, seen, keys, best
        )
        _rank(queries[row], vectors, best[:hits], scores[row], positions[row])
