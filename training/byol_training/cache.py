"""Decoded images as files that runs map into memory: decoded once, and used again.

A cache is a folder named by a key: the bytes of the pixels, and what belongs to them as JSON. It is
made under a temporary name and renamed, so that it is whole or not there.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from byol_serving.errors import StoreError

PIXELS, FACTS = "pixels.u8", "images.json"


def find(folder: Path, key: str) -> tuple[NDArray[np.uint8], dict[str, Any]] | None:
    """The pixels, mapped copy-on-write, and their facts; None where the cache has none."""
    place = folder / key
    try:
        facts: dict[str, Any] = json.loads((place / FACTS).read_text())
        shape = tuple(facts["shape"])
        return np.memmap(place / PIXELS, np.uint8, "c", shape=shape), facts
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):  # cut off or altered by someone: made anew
        shutil.rmtree(place, ignore_errors=True)
        return None


class Draft:
    """A cache in the making.

    Args:
        folder: of all caches; made if missing.
        key: of this one.
        shape: of the pixels, rows first; fewer rows may be kept in the end.

    Raises:
        StoreError: there is no room for it.
    """

    def __init__(self, folder: Path, key: str, shape: tuple[int, ...]) -> None:
        self._final = folder / key
        self._draft = folder / f"{key}.{os.getpid()}.tmp"
        size = int(np.prod(shape, dtype=np.int64))
        try:
            self._draft.mkdir(parents=True, exist_ok=True)
            with (self._draft / PIXELS).open("wb") as file:
                # Before it is mapped: writing to a map on a full disk kills the process.
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            self.discard()
            raise StoreError(
                f"no room for {size / 2**30:.2g} GiB of decoded images in {folder}"
                f" ({error.strerror}); set --cache to a folder with room, or store less with"
                " --store-scale"
            ) from error
        self.pixels: NDArray[np.uint8] = np.memmap(
            self._draft / PIXELS, np.uint8, "r+", shape=shape
        )

    def keep(self, rows: int, facts: dict[str, Any]) -> NDArray[np.uint8]:
        """Makes the first `rows` rows and the facts a cache; returns its pixels."""
        shape = (rows, *self.pixels.shape[1:])
        self.pixels.flush()  # type: ignore[attr-defined]  # a memmap
        os.truncate(self._draft / PIXELS, int(np.prod(shape, dtype=np.int64)))
        (self._draft / FACTS).write_text(json.dumps({**facts, "shape": shape}))
        shutil.rmtree(self._final, ignore_errors=True)
        self._draft.rename(self._final)
        return np.memmap(self._final / PIXELS, np.uint8, "c", shape=shape)

    def discard(self) -> None:
        """Removes what was written."""
        shutil.rmtree(self._draft, ignore_errors=True)
