"""What a source lists, and what names and side-cars say: shared by every kind of source."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

from byol_serving.collections.types import Metadata
from byol_serving.errors import InvalidImage

IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"]
)
SIDECAR_LIMIT = 2**20
"""Bytes of one JSON side-car; more is not metadata, and memory is bounded."""


@dataclass(frozen=True)
class Loaded:
    """An image file's bytes and what is known of it."""

    data: bytes
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class Entry:
    """One image, listed and not yet read."""

    name: str
    """Unique in the source; the row's id unless ids are content hashes."""
    source: str
    """Where it lies: a path or URL, for people."""
    fingerprint: str
    """Changes when the file or its side-car does: sizes and times, never contents."""
    load: Callable[[int], Loaded]
    """load(limit) reads at most limit + 1 bytes; raises OSError or InvalidImage. Thread-safe."""


class Source(Protocol):
    """A pile of images."""

    @property
    def location(self) -> str:
        """Kind and place, recorded in the manifest: a run resumes only on the same one."""
        ...

    def entries(self) -> Iterator[Entry]:
        """All entries, in an order that depends on their names only.

        Raises:
            InvalidSource: it cannot be listed.
        """
        ...

    def count(self) -> int | None:
        """How many entries, for the time left; None where counting costs as much as reading."""
        ...


def is_image(name: str) -> bool:
    """Whether a file name is that of an image, and not hidden."""
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def label_of(name: str) -> dict[str, str]:
    """{"label": first folder of `name`}, or nothing where it lies in none."""
    folder, slash, _ = name.partition("/")
    return {"label": folder} if slash else {}


def parse_sidecar(name: str, data: bytes) -> Metadata:
    """A side-car's JSON object; raises InvalidImage, so that the one file is rejected."""
    try:
        if len(data) > SIDECAR_LIMIT:
            raise ValueError(f"over {SIDECAR_LIMIT} bytes")
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError(f"a JSON {type(value).__name__}")
    except ValueError as error:
        raise InvalidImage(f"its side-car {name} is not a JSON object ({error})") from error
    return value
