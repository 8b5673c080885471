"""Buckets that fill at a rate up to a size, and of which each request takes one.

`Bucket` counts for one process, `SharedBucket` for several of a machine, in a small file.
"""

import fcntl
import os
import struct
import time
from pathlib import Path

_STATE = struct.Struct("<dd")
"""What is in the bucket, and as of when: on time.monotonic()'s clock, which all processes share."""


class Bucket:
    """Of this process alone. Not thread-safe."""

    def __init__(self, rate: float, size: float) -> None:
        """Full; `rate` is what flows in each second."""
        self._rate, self._size = rate, size
        self.level, self.at = size, time.monotonic()

    def spend(self) -> float:
        """Takes one out and returns 0; or else takes none, and returns the seconds until it can."""
        now = time.monotonic()
        self.level = min(self._size, self.level + (now - self.at) * self._rate)
        self.at = now
        if self.level >= 1.0:
            self.level -= 1.0
            return 0.0
        return (1.0 - self.level) / self._rate


class SharedBucket:
    """Of all processes that name the same file. Not thread-safe within one of them."""

    def __init__(self, rate: float, size: float, path: Path) -> None:
        """Full if the file is new, else as it is."""
        self._rate, self._size = rate, size
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __del__(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def spend(self) -> float:
        """As that of `Bucket`; waits while another process is at it, some microseconds."""
        bucket = Bucket(self._rate, self._size)
        fcntl.flock(self._file, fcntl.LOCK_EX)  # the system releases it if this process dies
        try:
            if len(state := os.pread(self._file, _STATE.size, 0)) == _STATE.size:
                bucket.level, bucket.at = _STATE.unpack(state)
            wait = bucket.spend()
            os.pwrite(self._file, _STATE.pack(bucket.level, bucket.at), 0)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        return wait
