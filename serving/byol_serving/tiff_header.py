"""How many pieces a TIFF file says that its first picture is cut into.

Pillow makes a Python object of each, and offers each to the decoder: a file of 32 MB can name four
million for a picture of 100 pixels, and keep it busy for 20 s. Sources: TIFF 6.0, section 2; the
BigTIFF design of libtiff for files whose offsets have 8 bytes.
"""

import struct

_STRIP_OFFSETS, _TILE_OFFSETS = 273, 324


def pieces(data: bytes) -> int:
    """The larger count of StripOffsets and TileOffsets; 0 for what is no TIFF, or a cut one."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return 0
    try:
        (version,) = struct.unpack_from(order + "H", data, 2)
        match version:
            case 42:
                (at,) = struct.unpack_from(order + "I", data, 4)
                (entries,), at = struct.unpack_from(order + "H", data, at), at + 2
                entry = struct.Struct(order + "HHI4x")
            case 43:
                (at,) = struct.unpack_from(order + "Q", data, 8)
                (entries,), at = struct.unpack_from(order + "Q", data, at), at + 8
                entry = struct.Struct(order + "HHQ8x")
            case _:
                return 0
        found = 0
        for number in range(min(entries, 65536)):  # of BigTIFF's count, as many as TIFF allows
            tag, _, count = entry.unpack_from(data, at + number * entry.size)
            if tag in (_STRIP_OFFSETS, _TILE_OFFSETS):
                found = max(found, count)
    except struct.error:
        return 0
    return found
