"""Uses of search for both clients: `client.analysis.duplicates("photos", min_score=0.97)`."""

from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

from byol_serving.client_batches import ExampleLike, example_message
from byol_serving.client_calls import COLLECTIONS, Call, filter_message
from byol_serving.collections.classifying import Classification, LabelVotes
from byol_serving.collections.duplicates import DuplicateGroup, Duplicates
from byol_serving.collections.outliers import Outlier
from byol_serving.collections.pairs import AcceptRate, Calibration
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.rpc.filters import Where, scalar_of

Out = TypeVar("Out")
PairLike: TypeAlias = tuple[ExampleLike, ExampleLike]


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """One pair's cosine similarity, and whether it reaches the threshold."""

    score: float
    same: bool


class Send(Protocol):
    """How the synchronous client sends a call."""

    def __call__(self, call: Call[Out]) -> Out:
        """Sends it and waits for the answer."""
        ...


class SendAsync(Protocol):
    """How the asynchronous client sends a call."""

    def __call__(self, call: Call[Out]) -> Awaitable[Out]:
        """Sends it."""
        ...


class Analysis:
    """What a collection tells about its items. Long work: give the client a long timeout."""

    def __init__(self, send: Send) -> None:
        """Made by `Client`."""
        self._send = send

    def duplicates(
        self,
        collection: str,
        *,
        min_score: float,
        where: Where | None = None,
        exact: bool | None = None,
        limit: int = 0,
    ) -> Duplicates:
        """Groups of items that pairs of cosine >= min_score connect, largest first.

        `exact` looks at every pair; by default for up to 100,000 items, beyond that at what the
        index finds. `limit` 0: all groups.
        """
        return self._send(duplicates(collection, min_score, where, exact, limit))

    def outliers(
        self, collection: str, *, k: int = 10, limit: int = 20, where: Where | None = None
    ) -> list[Outlier]:
        """The items whose k nearest are farthest away on average, farthest first."""
        return self._send(outliers(collection, k, limit, where))

    def classify(
        self,
        collection: str,
        queries: Iterable[ExampleLike],
        *,
        key: str,
        k: int = 20,
        temperature: float = 0.07,
        where: Where | None = None,
    ) -> list[Classification]:
        """A label for each query by votes of the k nearest items that have metadata[key].

        A vote weighs exp(similarity / temperature) (Wu et al. 2018, arXiv 1805.01978).
        """
        return self._send(classify(collection, queries, key, k, temperature, where))

    def verify_pairs(
        self, collection: str, pairs: Iterable[PairLike], *, threshold: float
    ) -> list[PairResult]:
        """Whether both of each pair show the same: cosine >= threshold."""
        return self._send(verify_pairs(collection, pairs, threshold))

    def calibrate_pairs(
        self,
        collection: str,
        pairs: Iterable[PairLike],
        same: Sequence[bool],
        *,
        max_false_accepts: float | None = None,
    ) -> Calibration:
        """A threshold from pairs known to be the same or not, and what it is worth.

        The most accurate one, or the one that accepts at most this part of the different pairs.
        """
        return self._send(calibrate_pairs(collection, pairs, same, max_false_accepts))


class AsyncAnalysis:
    """`Analysis` with coroutines."""

    def __init__(self, send: SendAsync) -> None:
        """Made by `AsyncClient`."""
        self._send = send

    async def duplicates(
        self,
        collection: str,
        *,
        min_score: float,
        where: Where | None = None,
        exact: bool | None = None,
        limit: int = 0,
    ) -> Duplicates:
        """See `Analysis.duplicates`."""
        return await self._send(duplicates(collection, min_score, where, exact, limit))

    async def outliers(
        self, collection: str, *, k: int = 10, limit: int = 20, where: Where | None = None
    ) -> list[Outlier]:
        """See `Analysis.outliers`."""
        return await self._send(outliers(collection, k, limit, where))

    async def classify(
        self,
        collection: str,
        queries: Iterable[ExampleLike],
        *,
        key: str,
        k: int = 20,
        temperature: float = 0.07,
        where: Where | None = None,
    ) -> list[Classification]:
        """See `Analysis.classify`."""
        return await self._send(classify(collection, queries, key, k, temperature, where))

    async def verify_pairs(
        self, collection: str, pairs: Iterable[PairLike], *, threshold: float
    ) -> list[PairResult]:
        """See `Analysis.verify_pairs`."""
        return await self._send(verify_pairs(collection, pairs, threshold))

    async def calibrate_pairs(
        self,
        collection: str,
        pairs: Iterable[PairLike],
        same: Sequence[bool],
        *,
        max_false_accepts: float | None = None,
    ) -> Calibration:
        """See `Analysis.calibrate_pairs`."""
        return await self._send(calibrate_pairs(collection, pairs, same, max_false_accepts))


def duplicates(
    name: str, min_score: float, where: Where | None, exact: bool | None, limit: int
) -> Call[Duplicates]:
    """Near-duplicate groups."""

    def parse(answer: pb.FindDuplicatesResponse) -> Duplicates:
        groups = [
            DuplicateGroup(ids=tuple(each.ids), weakest=each.weakest, strongest=each.strongest)
            for each in answer.groups
        ]
        return Duplicates(groups=groups, items=answer.items, pairs=answer.pairs, exact=answer.exact)

    request = pb.FindDuplicatesRequest(
        collection=name,
        min_score=min_score,
        filter=filter_message(where),
        exact=exact,
        limit=limit,
    )
    return Call(COLLECTIONS + "FindDuplicates", request, pb.FindDuplicatesResponse, parse)


def outliers(name: str, k: int, limit: int, where: Where | None) -> Call[list[Outlier]]:
    """Items like no other."""

    def parse(answer: pb.FindOutliersResponse) -> list[Outlier]:
        return [Outlier(id=each.id, distance=each.distance) for each in answer.outliers]

    request = pb.FindOutliersRequest(
        collection=name, k=k, limit=limit, filter=filter_message(where)
    )
    return Call(COLLECTIONS + "FindOutliers", request, pb.FindOutliersResponse, parse)


def classify(
    name: str,
    queries: Iterable[ExampleLike],
    key: str,
    k: int,
    temperature: float,
    where: Where | None,
) -> Call[list[Classification]]:
    """Labels by votes."""

    def votes(message: pb.LabelVotes) -> LabelVotes:
        label = scalar_of(message.label)
        return LabelVotes(label=label, votes=message.votes, share=message.share)

    def parse(answer: pb.ClassifyResponse) -> list[Classification]:
        return [Classification(labels=list(map(votes, each.labels))) for each in answer.results]

    request = pb.ClassifyRequest(
        collection=name,
        key=key,
        queries=map(example_message, queries),
        k=k,
        temperature=temperature,
        filter=filter_message(where),
    )
    return Call(COLLECTIONS + "Classify", request, pb.ClassifyResponse, parse)


def verify_pairs(name: str, pairs: Iterable[PairLike], threshold: float) -> Call[list[PairResult]]:
    """The same thing or not."""

    def parse(answer: pb.VerifyPairsResponse) -> list[PairResult]:
        return [PairResult(score=each.score, same=each.same) for each in answer.results]

    request = pb.VerifyPairsRequest(collection=name, pairs=map(_pair, pairs), threshold=threshold)
    return Call(COLLECTIONS + "VerifyPairs", request, pb.VerifyPairsResponse, parse)


def calibrate_pairs(
    name: str,
    pairs: Iterable[PairLike],
    same: Sequence[bool],
    max_false_accepts: float | None,
) -> Call[Calibration]:
    """A threshold from labelled pairs."""

    def parse(answer: pb.CalibratePairsResponse) -> Calibration:
        rates = [
            AcceptRate(
                false_accepts=each.false_accepts,
                true_accepts=each.true_accepts,
                threshold=each.threshold,
            )
            for each in answer.rates
        ]
        return Calibration(threshold=answer.threshold, accuracy=answer.accuracy, rates=rates)

    request = pb.CalibratePairsRequest(
        collection=name,
        pairs=map(_pair, pairs),
        same=same,
        max_false_accepts=max_false_accepts,
    )
    return Call(COLLECTIONS + "CalibratePairs", request, pb.CalibratePairsResponse, parse)


def _pair(pair: PairLike) -> pb.Pair:
    left, right = pair
    return pb.Pair(left=example_message(left), right=example_message(right))
