"""Uses of search as answers on the wire: duplicates, outliers, labels, pairs. All of it blocks."""

from collections.abc import Callable, Sequence

import numpy as np

from byol_serving.collections.classifying import NEIGHBOURS as VOTERS
from byol_serving.collections.classifying import TEMPERATURE, Classification, classify
from byol_serving.collections.duplicates import find_duplicates
from byol_serving.collections.outliers import NEIGHBOURS, find_outliers
from byol_serving.collections.pairs import calibrate
from byol_serving.collections.types import Collection, Vectors
from byol_serving.errors import InvalidRequest
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.rpc.convert import json_to_value
from byol_serving.rpc.queries import filter_of, vectors_of

_LIMIT = 20


def duplicates(
    collection: Collection, request: pb.FindDuplicatesRequest, stopping: Callable[[], bool]
) -> pb.FindDuplicatesResponse:
    """Groups of items that are nearly the same."""
    found = find_duplicates(
        collection,
        request.min_score,
        condition=filter_of(request),
        exact=request.exact if request.HasField("exact") else None,
        limit=request.limit,
        stopping=stopping,
    )
    groups = [
        pb.DuplicateGroup(ids=each.ids, weakest=each.weakest, strongest=each.strongest)
        for each in found.groups
    ]
    return pb.FindDuplicatesResponse(
        groups=groups, items=found.items, pairs=found.pairs, exact=found.exact
    )


def outliers(
    collection: Collection, request: pb.FindOutliersRequest, stopping: Callable[[], bool]
) -> pb.FindOutliersResponse:
    """The items farthest from their neighbours."""
    found, items = find_outliers(
        collection,
        k=request.k or NEIGHBOURS,
        limit=request.limit or _LIMIT,
        condition=filter_of(request),
        stopping=stopping,
    )
    rows = [pb.Outlier(id=each.id, distance=each.distance) for each in found]
    return pb.FindOutliersResponse(outliers=rows, items=items)


def classes(
    collection: Collection, request: pb.ClassifyRequest, embedded: Vectors
) -> pb.ClassifyResponse:
    """A label for each query."""
    if not request.queries:
        raise InvalidRequest("the request has no query; send an image, a vector or an id")
    found = classify(
        collection,
        vectors_of(collection, request.queries, embedded),
        request.key,
        k=request.k or VOTERS,
        temperature=request.temperature or TEMPERATURE,
        condition=filter_of(request),
    )
    return pb.ClassifyResponse(results=map(_classification, found))


def verified(
    collection: Collection, request: pb.VerifyPairsRequest, embedded: Vectors
) -> pb.VerifyPairsResponse:
    """Each pair's similarity, held against the threshold."""
    scores = _similarities(collection, request.pairs, embedded)
    results = [
        pb.PairResult(score=each, same=each >= request.threshold) for each in scores.tolist()
    ]
    return pb.VerifyPairsResponse(results=results)


def calibrated(
    collection: Collection, request: pb.CalibratePairsRequest, embedded: Vectors
) -> pb.CalibratePairsResponse:
    """A threshold from labelled pairs."""
    if len(request.same) != len(request.pairs):
        raise InvalidRequest(
            f"{len(request.pairs)} pairs but {len(request.same)} answers; say for each whether it"
            " is the same"
        )
    found = calibrate(
        _similarities(collection, request.pairs, embedded),
        np.array(request.same, np.bool_),
        max_false_accepts=(
            request.max_false_accepts if request.HasField("max_false_accepts") else None
        ),
    )
    rates = [
        pb.AcceptRate(
            false_accepts=each.false_accepts,
            true_accepts=each.true_accepts,
            threshold=each.threshold,
        )
        for each in found.rates
    ]
    return pb.CalibratePairsResponse(
        threshold=found.threshold, accuracy=found.accuracy, rates=rates
    )


def examples_of(pairs: Sequence[pb.Pair]) -> list[pb.Example]:
    """Left and right of each pair, in order."""
    return [example for pair in pairs for example in (pair.left, pair.right)]


def _similarities(collection: Collection, pairs: Sequence[pb.Pair], embedded: Vectors) -> Vectors:
    """Cosine similarity of each pair, float32 [N]."""
    if not pairs:
        raise InvalidRequest("the request has no pair; send at least one")
    found = vectors_of(collection, examples_of(pairs), embedded, "example")
    rows = np.stack([each.vector for each in found])
    similarities: Vectors = np.einsum("nd,nd->n", rows[::2], rows[1::2])
    return np.clip(similarities, np.float32(-1), np.float32(1))


def _classification(found: Classification) -> pb.Classification:
    return pb.Classification(
        labels=[
            pb.LabelVotes(label=json_to_value(each.label), votes=each.votes, share=each.share)
            for each in found.labels
        ]
    )
