"""What an offline run is told, and what it tells."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from byol_serving.errors import InvalidConfig
from byol_serving.images import ImageLimits

Ids = Literal["name", "sha256"]


@dataclass(frozen=True, kw_only=True)
class EmbedPlan:
    """One run. Its memory is at most `in_flight` images and three shards' rows."""

    source: str | Path
    """See `sources.open_source`."""
    out: Path
    """Folder of the journal and, for file sinks, of the vectors."""
    ids: Ids = "name"
    """sha256: an item's id is the hash of its file, so that duplicates are embedded once."""
    sync: bool = False
    """Take over what changed in the source since the last run: embed new and changed files,
    try rejected ones again, remove what is gone."""
    shard_size: int = 4096
    """Entries a shard: what a stop at any point costs at most."""
    batch_size: int = 64
    """Images a call of the encoder. Batches end with their shard, so that a resumed run makes
    the same ones, and the same bits."""
    decode_threads: int = 0
    """0: one per processor."""
    in_flight: int = 0
    """Images read or decoded and not yet encoded; 0: one per thread, and two batches more than
    there are encoders."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    image_column: str | None = None
    """Parquet sources: see `sources.open_source`."""
    id_column: str | None = None

    def __post_init__(self) -> None:
        """Raises InvalidConfig."""
        for name, low, high in (
            ("shard_size", 1, 1_000_000),
            ("batch_size", 1, 8192),
            ("decode_threads", 0, 1024),
            ("in_flight", 0, 1_000_000),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidConfig(f"{name} {value} is outside {low}..{high}")
        if self.ids not in ("name", "sha256"):
            raise InvalidConfig(f"ids {self.ids!r} is unknown; use name or sha256")
        if 0 < self.in_flight <= self.batch_size:
            raise InvalidConfig(
                f"in_flight {self.in_flight} is not above batch_size {self.batch_size}: no batch"
                " could be filled; raise it, or leave it 0"
            )

    @property
    def threads(self) -> int:
        """Decoding threads."""
        return self.decode_threads or len(os.sched_getaffinity(0))

    def windows(self, encoders: int) -> tuple[int, int]:
        """Images with the decoders and batches with the encoders, at most.

        By default each encoder has a batch and one more waits, while two are being decoded. Their
        sum with the batch that is being filled is `in_flight`.
        """
        if not self.in_flight:
            return self.batch_size + self.threads, encoders + 1
        batches = min(encoders + 1, (self.in_flight - 1) // self.batch_size)
        return self.in_flight - batches * self.batch_size, batches


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands."""

    done: int
    """Embedded by this run."""
    skipped: int
    """Embedded by an earlier run and unchanged."""
    rejected: int
    """Files that cannot be read or decoded, earlier runs' included."""
    duplicates: int
    """Files whose id another file has: the first in the source's order counts."""
    total: int | None
    """Entries in the source, once counted."""
    seconds: float
    rate: float
    """Embedded images a second."""
    seconds_left: float | None
    busy: Mapping[str, float]
    """Of decode, encode and write, the part of the time its workers worked, 0 .. 1: the stage
    near 1 is the bottleneck."""
    peak_rss: int
    """Bytes of memory the process held at most."""


@dataclass(frozen=True, kw_only=True)
class Summary(Progress):
    """What a finished run came to."""

    removed: int
    """Items taken out because their files are gone or changed (sync)."""
    shards: int
    out: Path
    rejected_file: Path
    """One JSON object a line: path and reason."""
