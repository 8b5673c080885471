"""The two stages that cost: an entry to pixels, a batch of pixels to rows.

Both are plain functions of what they are given, so that any engine can run them. A file that cannot
be used becomes a `Rejected`, never an exception: the run goes on.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from byol_serving.bundle import EMBEDDING
from byol_serving.collections import checks
from byol_serving.errors import InvalidImage, InvalidRequest
from byol_serving.images import ImageLimits, Pixels, Preprocess, load_input
from byol_serving.indexing.entries import Entry
from byol_serving.indexing.plan import Ids


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image that can be encoded."""

    id: str
    pixels: Pixels
    """uint8 [S, S, 3]."""
    source: str
    size: int
    """Bytes of its file."""
    metadata: str
    """A JSON object, checked and compact as collections store it."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A file that cannot be used."""

    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the output; `vector` is float32 [D]."""

    id: str
    vector: NDArray[np.float32]
    source: str
    size: int
    metadata: str
    maps: tuple[NDArray[np.float32], ...] = ()
    """[C, H, W] of each stage of the run's `Columns`."""


class Embeds(Protocol):
    """The part of an encoder that a stage needs."""

    def embed(self, pixels: Pixels) -> NDArray[np.float32]:
        """Uint8 [N, S, S, 3] to float32 [N, D]."""
        ...

    def extract(self, pixels: Pixels, outputs: Sequence[str]) -> Sequence[NDArray[np.float32]]:
        """The same to any outputs of the graph, each float32 [N, ...]."""
        ...


def decode(entry: Entry, how: Preprocess, limits: ImageLimits, ids: Ids) -> Decoded | Rejected:
    """Reads and decodes one image. Thread-safe; the decoders release the GIL."""
    try:
        loaded = entry.load(limits.max_bytes)
        pixels = load_input(loaded.data, how, limits)
        id_ = entry.name if ids == "name" else hashlib.sha256(loaded.data).hexdigest()
        checks.item_ids([id_])
        metadata = checks.metadata_text(loaded.metadata, 0)
    except OSError as error:
        return Rejected(f"cannot be read ({error.strerror or error})")
    except InvalidImage as error:
        return Rejected(error.reason)
    except InvalidRequest as error:  # of the checks, which speak of an item's place in a batch
        reason = str(error).replace("metadata 0", "its metadata", 1).replace("id 0", "its id", 1)
        return Rejected(reason)
    return Decoded(id_, pixels, _as_text(entry.source), len(loaded.data), metadata)


def encode(
    batch: Sequence[Decoded], encoder: Embeds, outputs: Sequence[str] = (EMBEDDING,)
) -> list[Row | Rejected]:
    """Encodes a batch in one call of the encoder; results in its order.

    `outputs` are those of `Columns`: a vector's name, then stages.
    """
    pixels = [each.pixels for each in batch]
    # An encoder may run a lone image in another way when it is idle: its bits would hang on chance.
    lone = [pixels[0]] if len(pixels) == 1 else []
    stacked = np.stack(pixels + lone)
    plain = tuple(outputs) == (EMBEDDING,)
    found = [encoder.embed(stacked)] if plain else encoder.extract(stacked, outputs)
    vectors, *maps = (each[: len(pixels)] for each in found)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    usable = np.isfinite(lengths) & (lengths > 0)
    return [
        Row(
            each.id,
            vectors[at],
            each.source,
            each.size,
            each.metadata,
            tuple(stage[at] for stage in maps),
        )
        if usable[at]
        else Rejected("the encoder gives no finite vector for it; collections could not hold it")
        for at, each in enumerate(batch)
    ]


def _as_text(path: str) -> str:
    """A path as valid Unicode: file names may hold any bytes, Parquet's strings may not."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
