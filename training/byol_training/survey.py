"""A first look at a source: how many images, and how large they are."""

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path

from byol_serving.errors import ByolError, InvalidSource
from byol_serving.images import upright_size
from byol_training.sources import list_source, read_source

_LOOKED_AT = 64
_STORED_BYTES = 100 * 2**30  # of decoded images at most, unless their views need more


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the first images of a source tell."""

    count: int
    """Candidates in the source."""
    short_side: int
    """Median height or width in pixels, whichever is shorter."""

    def stored_side(self, image_size: int) -> int:
        """Side of stored images so that crops keep their detail.

        A crop of half the picture's area has 0.7 of its side: twice the side of the views keeps
        every detail that a view can show of crops down to a quarter of the picture; more than the
        pictures have is of no use.
        """
        room = int((_STORED_BYTES / (3 * self.count)) ** 0.5)
        return max(image_size, min(self.short_side, 2 * image_size, room))


def survey(source: Path) -> Survey:
    """Lists a source and reads the headers of its first images.

    Raises:
        InvalidSource: nothing there, unreadable, or none of the first files is an image.
    """
    listing = list_source(source)
    sides, reason = [], "it is empty"
    for _, read in itertools.islice(read_source(listing), _LOOKED_AT):
        try:
            sides.append(min(upright_size(read())))
        except (ByolError, OSError) as error:
            reason = str(error)
    if not sides:
        raise InvalidSource(f"no readable image among the first files of {source} ({reason})")
    return Survey(count=len(listing.names), short_side=round(statistics.median(sides)))
