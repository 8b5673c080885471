"""What a row of an offline run holds: a vector, and where asked for the maps of some stages."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from byol_serving.bundle import EMBEDDING, RAW_EMBEDDING, BundleInfo, FeatureMap
from byol_serving.errors import InvalidConfig

MAX_SHARD_BYTES = 2**30
"""Of the maps of one shard: three shards are in memory."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The outputs of the graph that are written for each image."""

    normalize: bool = True
    """Off: vectors as they are before L2 normalisation."""
    maps: tuple[FeatureMap, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Their names in the graph, the vector's first."""
        vector = EMBEDDING if self.normalize else RAW_EMBEDDING
        return (vector, *(each.name for each in self.maps))

    @property
    def facts(self) -> Mapping[str, Any]:
        """As JSON, what tells them from plain embeddings; empty for these."""
        maps = {
            each.name: {"shape": list(shape(each)), "stride": each.stride} for each in self.maps
        }
        return {
            **({} if self.normalize else {"normalized": False}),
            **({"maps": maps} if maps else {}),
        }

    def check(self, shard_size: int) -> None:
        """Refuses shards that would fill the memory; raises InvalidConfig."""
        row = 4 * sum(math.prod(shape(each)) for each in self.maps)
        if row * shard_size > MAX_SHARD_BYTES:
            raise InvalidConfig(
                f"a shard of {shard_size} images with {row} bytes of maps each is over"
                f" {MAX_SHARD_BYTES} bytes; set --shard-size to at most {MAX_SHARD_BYTES // row}"
            )


def columns_of(info: BundleInfo, features: Sequence[str], *, normalize: bool) -> Columns:
    """Columns that a bundle offers.

    Args:
        info: the bundle's.
        features: names of stages, no two alike.
        normalize: off: vectors as they are before L2 normalisation.

    Raises:
        InvalidConfig: the bundle offers no such stage, or one is named twice.
        FailedPrecondition: it has no un-normalised embeddings.
    """
    if not normalize:
        info.check_raw()
    known = {each.name: each for each in info.features}
    for name in features:
        if name not in known or list(features).count(name) > 1:
            offered = ", ".join(known) or "none: export it with byol export --features"
            raise InvalidConfig(
                f"features {','.join(features)}: {name!r} is named twice, or is none of the stages"
                f" that encoder {info.name!r} offers ({offered})"
            )
    return Columns(normalize=normalize, maps=tuple(known[name] for name in features))


def shape(stage: FeatureMap) -> tuple[int, int, int]:
    """Of one image's map: channels, height, width."""
    return stage.channels, stage.side, stage.side
