"""What holds the decoding of one image to a time: decoders are C code that nobody can interrupt.

- Decoders that do all in one call are refused where the header says that they may not be done in
  time: `check_estimate`.
- The others read their file in pieces, and are given no further piece when their time is over:
  `TimedFile`.

Time is the decoding thread's own CPU time: a busy machine makes no image a slow one.
"""

import io
import time

from byol_serving.errors import ImageTooSlow

_NS: dict[str, tuple[float, float]] = {
    "AVIF": (20, 170),
    "JPEG": (10, 40),
    "JPEG2000": (30, 170),
    "MPO": (10, 40),
    "TIFF": (80, 40),
    "WEBP": (15, 90),
}
"""Nanoseconds a pixel and a byte of the file: what flat pictures and pure noise take at most, on
one core of a server of 2023, and half as much again. TIFF is its worst kind: JPEG in many scans."""
_NS_OF_A_SCAN = 0.8
"""A pixel, for a pass that finds next to nothing; the rest is in the bytes."""


def check_estimate(
    kind: str, width: int, height: int, size: int, max_seconds: float, *, scans: int = 1
) -> None:
    """Refuses what may take too long, from its header.

    Args:
        kind: Pillow's name of the format.
        width: in pixels.
        height: in pixels.
        size: of the file, in bytes.
        max_seconds: 0: no limit.
        scans: of a JPEG, times that its decoder passes over the pixels.

    Raises:
        ImageTooSlow: names the estimate.
    """
    if kind not in _NS or max_seconds <= 0:
        return
    pixel, byte = _NS[kind]
    seconds = (width * height * (pixel + _NS_OF_A_SCAN * scans) + size * byte) / 1e9
    if seconds > max_seconds:
        raise ImageTooSlow(
            f"a {kind} file of {width} x {height} pixels, {size} bytes and {scans} scans may take"
            f" {seconds:.1f} s to decode, over the limit of {max_seconds:g} s; send a smaller or"
            " simpler one, or raise max_seconds"
        )


class TimedFile(io.BytesIO):
    """A file in memory that can be read for so long only, by the thread that opened it."""

    def __init__(self, data: bytes, max_seconds: float) -> None:
        """`max_seconds` of CPU time from now; 0: no limit."""
        super().__init__(data)
        self._max_seconds = max_seconds
        self._ends = time.thread_time() + max_seconds

    def read(self, size: int | None = -1, /) -> bytes:
        """As any file's; raises ImageTooSlow once the time is over."""
        if self._max_seconds > 0 and self._ends < time.thread_time():
            raise ImageTooSlow(
                f"it takes longer than the limit of {self._max_seconds:g} s to decode; send a"
                " smaller or simpler image, or raise max_seconds"
            )
        return super().read(size)
