"""The kinds of approximate FAISS index: how each is made, searched and recognised.

| kind         | bytes an item, beside float32 vectors | scores    |
| hnsw         | 4 D + 272                             | exact     |
| hnsw-sq8     | D + 272                               | re-ranked |
| ivf          | 4 D + 8                               | exact     |
| ivf-fp16     | 2 D + 8                               | re-ranked |
| ivf-sq8      | D + 8                                 | re-ranked |
| ivf-pq       | D / 4 + 8  (D even)                   | re-ranked |
| ivf-rabitq   | D / 8 + 20                            | re-ranked |

Re-ranked: the index gives candidates, whose scores are then computed from the stored float32.
FAISS's own refined indexes do that too, but cannot leave out what was deleted.

Codes of a bit or two a dimension (ivf-pq, ivf-rabitq) follow a random rotation: it spreads what the
vectors differ in evenly over the codes. Without it, at the principal components of CIFAR-10's
pixels, 100 candidates of ivf-pq held .58 of the nearest ten, and .96 with it.

hnsw-sq8 is rotated too: no component of a unit vector is then far larger than the others, so that
all are bytes of one scale, which need no training and are compared as integers.
"""

import math
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np

from byol_serving.collections.faiss_library import faiss
from byol_serving.collections.types import Vectors

ApproximateKind = Literal["hnsw", "hnsw-sq8", "ivf", "ivf-fp16", "ivf-sq8", "ivf-pq", "ivf-rabitq"]
KINDS: tuple[ApproximateKind, ...] = get_args(ApproximateKind)

_LINKS = 32
# How widely a new node's neighbours are sought. FAISS's default of 40 builds in a quarter of the
# time, but of 100,000 vectors .95 then takes a walk of 62 instead of 46, and .99 of 213, not 120.
_BUILD_WIDTH = 200
_LINK_BYTES = 8 * _LINKS + 16
_TRAIN_PER_LIST = 64
_MAX_EFFORT = 4096
# 4-bit codes are packed for FAISS's fast scan: two dimensions a code.
_PQ_DIMS = 2


def is_graph(kind: ApproximateKind) -> bool:
    """Whether it is a graph (searched by width), not lists (searched by how many)."""
    return kind in ("hnsw", "hnsw-sq8")


def is_lossy(kind: ApproximateKind) -> bool:
    """Whether its scores are approximate, so that candidates must be re-ranked."""
    return kind not in ("hnsw", "ivf")


def is_packed(kind: ApproximateKind) -> bool:
    """Whether its codes are laid out for FAISS's fast scan."""
    return kind in ("ivf-pq", "ivf-rabitq")


def item_bytes(kind: ApproximateKind, dim: int) -> int:
    """Memory an item takes in the index, beside its float32 vector; see the table above."""
    match kind:
        case "hnsw":
            return 4 * dim + _LINK_BYTES
        case "hnsw-sq8":
            return dim + _LINK_BYTES
        case "ivf":
            return 4 * dim + 8
        case "ivf-fp16":
            return 2 * dim + 8
        case "ivf-sq8":
            return dim + 8
        case "ivf-pq":
            return math.ceil(_codes(dim) / 2) + 8
        case "ivf-rabitq":
            return math.ceil(dim / 8) + 20


def lists_for(kind: ApproximateKind, count: int) -> int:
    """How many lists an IVF index of so many items gets."""
    # Packed codes are read so fast that few long lists cost least: of 100,000 items, at a recall of
    # .95, 256 lists took 90 us a query, 1024 took 115 and 2048 142. FAISS wants 39 vectors a list.
    fine = math.sqrt(count) * (1 if is_packed(kind) else 4)
    return int(np.clip(min(fine, count // 39), 1, 65_536))


def trained(kind: ApproximateKind, vectors: Vectors) -> Any:
    """An empty index for vectors like these (float32 [N, D])."""
    count, dim = vectors.shape
    metric = faiss.METRIC_INNER_PRODUCT
    lists = f"IVF{lists_for(kind, count)}"
    match kind:
        case "hnsw":
            index = faiss.IndexHNSWFlat(dim, _LINKS, metric)
            index.hnsw.efConstruction = _BUILD_WIDTH
            return index
        case "hnsw-sq8":
            return _graph_of_bytes(dim)
        case "ivf":
            index = faiss.index_factory(dim, f"{lists},Flat", metric)
        case "ivf-fp16":
            index = faiss.index_factory(dim, f"{lists},SQfp16", metric)
        case "ivf-sq8":
            index = faiss.index_factory(dim, f"{lists},SQ8", metric)
        case "ivf-pq":
            index = faiss.index_factory(dim, f"RR{dim},{lists},PQ{_codes(dim)}x4fs", metric)
        case "ivf-rabitq":
            index = faiss.index_factory(dim, f"RR{dim},{lists},RaBitQfs", metric)
    # Centroids of unit vectors, compared by inner product.
    faiss.extract_index_ivf(index).cp.spherical = True
    index.train(_sample(vectors, max(lists_for(kind, count) * _TRAIN_PER_LIST, 4096)))
    return index


def _graph_of_bytes(dim: int) -> Any:
    """A graph over the bytes of rotated unit vectors.

    The nearest by L2 are those by inner product, since all lengths are 1. A rotated component is
    about normal, with a standard deviation of 1 / sqrt(dim): bytes reach to seven of these.
    """
    graph = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_8bit_direct, _LINKS, faiss.METRIC_L2)
    graph.hnsw.efConstruction = _BUILD_WIDTH
    rotation = faiss.RandomRotationMatrix(dim, dim)
    rotation.init(0)
    scale = 127 / min(1, 7 / math.sqrt(dim))
    to_bytes = faiss.LinearTransform(dim, dim, True)
    faiss.copy_array_to_vector(faiss.vector_to_array(rotation.A) * np.float32(scale), to_bytes.A)
    faiss.copy_array_to_vector(np.full(dim, 128.5, np.float32), to_bytes.b)  # FAISS rounds down
    to_bytes.is_trained = True
    return faiss.IndexPreTransform(to_bytes, graph)


def lists_of(index: Any) -> int:
    """How many lists an IVF index has."""
    return int(faiss.extract_index_ivf(index).nlist)


def random_memory(index: Any) -> list[tuple[int, int]]:
    """Address and bytes of what a walk through a graph reads here and there: links and codes."""
    graph = _inner(index)
    links, codes = graph.hnsw.neighbors, faiss.downcast_index(graph.storage).codes
    return [(int(links.data()), 4 * links.size()), (int(codes.data()), codes.size())]


def parameters(kind: ApproximateKind, effort: int, selector: Any) -> Any:
    """FAISS's parameters of one search: how wide a graph is walked, or how many lists are read."""
    if selector is None:
        return _unmasked(is_graph(kind), effort)
    if is_graph(kind):
        return faiss.SearchParametersHNSW(efSearch=effort, sel=selector)
    return faiss.SearchParametersIVF(nprobe=effort, sel=selector)


@lru_cache(maxsize=256)
def _unmasked(graph: bool, effort: int) -> Any:
    """Made once, since a lone search in memory notices; no search changes them."""
    if graph:
        # The same walk with another heap, 1 to 3% quicker. It would disregard a selector.
        return faiss.SearchParametersHNSW(efSearch=effort, bounded_queue=False)
    return faiss.SearchParametersIVF(nprobe=effort)


def efforts(kind: ApproximateKind, index: Any) -> list[int]:
    """Efforts to try, cheapest first, each about a quarter above the one before."""
    least, most = (16, 1024) if is_graph(kind) else (1, min(lists_of(index), _MAX_EFFORT))
    steps = math.ceil(math.log(most / least, 1.25)) if most > least else 0
    ladder = {min(most, math.ceil(least * 1.25**step)) for step in range(steps + 1)}
    return sorted(ladder)


def depths(kind: ApproximateKind) -> tuple[int, ...]:
    """How many candidates for each hit are worth trying, fewest first."""
    match kind:
        case "ivf-pq":
            return (3, 6, 9, 14, 21)
        case "ivf-rabitq":  # a bit a dimension
            return (10, 15, 25, 40)
        case _:
            return (1,)


def candidates(kind: ApproximateKind, k: int, depth: float) -> int:
    """How many an index is asked for, so that the best by true score are among them.

    Args:
        kind: of the index.
        k: the wanted, and one more, by which a tie at the border is seen.
        depth: of `Tuning`.
    """
    match kind:
        case "hnsw" | "ivf":
            return k
        case "hnsw-sq8" | "ivf-fp16" | "ivf-sq8":
            return k + max(8, k // 2)
        case "ivf-pq" | "ivf-rabitq":
            return math.ceil(depth * max(1, k - 1)) + 10


def recognised(kind: ApproximateKind, index: Any, dim: int) -> bool:
    """Whether an index that was read from a file is of this kind."""
    match kind:
        case "hnsw":
            wanted: tuple[Any, str | None] = (faiss.IndexHNSWFlat, None)
        case "hnsw-sq8":
            wanted = (faiss.IndexHNSWSQ, "QT_8bit_direct")
        case "ivf":
            wanted = (faiss.IndexIVFFlat, None)
        case "ivf-fp16":
            wanted = (faiss.IndexIVFScalarQuantizer, "QT_fp16")
        case "ivf-sq8":
            wanted = (faiss.IndexIVFScalarQuantizer, "QT_8bit")
        case "ivf-pq":
            wanted = (faiss.IndexIVFPQFastScan, None)
        case "ivf-rabitq":
            wanted = (faiss.IndexIVFRaBitQFastScan, None)
    kind_of, scalar = wanted
    rotated = isinstance(index, faiss.IndexPreTransform)
    if index.d != dim or rotated != (is_packed(kind) or kind == "hnsw-sq8"):
        return False
    inner = _inner(index)
    if not isinstance(inner, kind_of):
        return False
    coded = faiss.downcast_index(inner.storage) if is_graph(kind) else inner
    return scalar is None or bool(coded.sq.qtype == getattr(faiss.ScalarQuantizer, scalar))


def _inner(index: Any) -> Any:
    """What comes after the rotation, if there is one."""
    rotated = isinstance(index, faiss.IndexPreTransform)
    return faiss.downcast_index(index.index) if rotated else index


def _codes(dim: int) -> int:
    """Codes of a product quantiser, which must divide the dimensions evenly."""
    return dim // _PQ_DIMS if dim % _PQ_DIMS == 0 else dim


def _sample(vectors: Vectors, most: int) -> Vectors:
    if len(vectors) <= most:
        return vectors
    chosen = np.random.default_rng(0).choice(len(vectors), most, replace=False)
    return vectors[np.sort(chosen)]
