"""Vectors for benchmarks/search.py: synthetic ones that are not too kind, and real pictures."""

import io
import itertools
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from byol_serving.bundle import load_bundle
from byol_serving.collections.faiss_library import faiss
from byol_serving.encoder import Encoder
from byol_serving.images import load_input

Vectors = NDArray[np.float32]
CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10" / "train.tar"
DIM = 128
_EMBED_AT_ONCE = 64
PICKS = 1000
"""Items carry `pick`, 0 to 999 evenly: `pick < n` keeps n in a thousand."""


@dataclass(frozen=True)
class Data:
    """What is searched, and what is asked."""

    name: str
    vectors: Vectors
    queries: Vectors
    picks: NDArray[np.int64]

    def truth(self, count: int, k: int, below: int | None) -> NDArray[np.int64]:
        """The right ids of the first queries, [count, k], by brute force."""
        kept = np.arange(len(self.vectors)) if below is None else np.flatnonzero(self.picks < below)
        _, found = faiss.knn(
            self.queries[:count], self.vectors[kept], k, faiss.METRIC_INNER_PRODUCT
        )
        ids: NDArray[np.int64] = kept[found]
        return ids


def clustered(count: int, queries: int) -> Data:
    """Clusters of very different sizes, each spread along a few shared directions, plus noise.

    So lists are uneven and neighbours reach across them, as with learned embeddings. Separate
    Gaussian balls, the usual choice, let an inverted file find everything in its first list.
    """
    shared = np.random.default_rng(0)
    centres = shared.standard_normal((2000, DIM)) * 0.6
    directions = shared.standard_normal((24, DIM)) / np.sqrt(24)
    sizes = shared.pareto(1.2, 2000) + 0.05

    def draw(number: int, seed: int) -> Vectors:
        generator = np.random.default_rng(seed)
        rows = np.empty((number, DIM), np.float32)
        for start in range(0, number, 50_000):  # in pieces: float64 of a million takes 1 GB
            size = min(50_000, number - start)
            rows[start : start + size] = (
                centres[generator.choice(2000, size, p=sizes / sizes.sum())]
                + generator.standard_normal((size, 24)) @ directions
                + generator.standard_normal((size, DIM)) * 0.25
            )
        return _unit(rows)

    return _data(f"{count:,} x {DIM} clustered", draw(count, 1), draw(queries, 2))


def pictures(queries: int) -> Data:
    """CIFAR-10's training images as pixels, reduced to 128 principal components."""
    pixels = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(data)).convert("RGB").reduce(2), np.float32).ravel()
            for data in _files()
        ]
    )
    pixels -= pixels.mean(axis=0)
    _, vectors = np.linalg.eigh(pixels.T @ pixels)
    return _split("CIFAR-10 pixels", (pixels @ vectors[:, -DIM:]).astype(np.float32), queries)


def embedded(bundle: Path, queries: int) -> Data:
    """CIFAR-10's training images as the encoder of a bundle embeds them."""
    encoder = Encoder(load_bundle(bundle))
    how = encoder.bundle.info.preprocess
    batches = _batched(_files(), _EMBED_AT_ONCE)
    rows = [encoder.embed(np.stack([load_input(data, how) for data in each])) for each in batches]
    return _split(f"CIFAR-10 by {encoder.bundle.info.name}", np.concatenate(rows), queries)


def _files() -> Iterator[bytes]:
    with tarfile.open(CIFAR) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None:
                yield file.read()


def _batched(files: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    while some := list(itertools.islice(files, size)):
        yield some


def _split(name: str, rows: Vectors, queries: int) -> Data:
    """Some of the pictures as queries, the others to be searched."""
    mixed = _unit(rows[np.random.default_rng(0).permutation(len(rows))])
    name = f"{len(mixed) - queries:,} x {mixed.shape[1]} {name}"
    return _data(name, mixed[queries:], mixed[:queries])


def _data(name: str, vectors: Vectors, queries: Vectors) -> Data:
    picks = np.random.default_rng(3).integers(0, PICKS, len(vectors))
    return Data(name, np.ascontiguousarray(vectors), np.ascontiguousarray(queries), picks)


def _unit(rows: Vectors) -> Vectors:
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows
