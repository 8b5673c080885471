"""Files that are whole or absent: written aside, synced, renamed."""

import os
import zlib
from pathlib import Path

_PIECE = 1 << 22


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Gives a finished file or folder its name, durably."""
    sync(temporary)
    temporary.replace(final)
    sync(final.parent)


def checksum(path: Path) -> int:
    """Crc32 of a file's bytes."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc
