"""Our reading of a JPEG's header against Pillow's."""

import io

import numpy as np
import pytest
from PIL import Image

from byol_serving.images import decode
from byol_serving.jpeg_header import Jpeg, plain_jpeg
from serving.support import encoded


def picture(width: int = 41, height: int = 23, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("restarts", [0, 4])
def test_plain_files_are_read_as_pillow_reads_them(
    mode: str, progressive: bool, restarts: int
) -> None:
    data = encoded(
        picture(300, 200, mode), "JPEG", progressive=progressive, restart_marker_blocks=restarts
    )
    assert plain_jpeg(data) == Jpeg(300, 200, many_scans=progressive)
    with Image.open(io.BytesIO(data)) as header:
        assert header.size == (300, 200)


def test_what_is_special_is_left_to_pillow() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert plain_jpeg(encoded(picture(), "JPEG", exif=exif)) is None
    assert plain_jpeg(encoded(picture(mode="CMYK"), "JPEG")) is None
    assert plain_jpeg(encoded(picture(), "JPEG", icc_profile=b"profile")) is None
    assert plain_jpeg(encoded(picture(), "PNG")) is None
    assert decode(encoded(picture(), "JPEG", exif=exif)).shape == (41, 23, 3)


def test_a_sequential_file_with_a_scan_for_each_component_may_have_more() -> None:
    data = bytearray(encoded(picture(), "JPEG"))
    data[data.index(b"\xff\xda") + 4] = 1
    assert plain_jpeg(bytes(data)) == Jpeg(41, 23, many_scans=True)


def test_damaged_headers_are_left_to_pillow() -> None:
    data = encoded(picture(), "JPEG")
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    for end in range(scan + 4):
        assert plain_jpeg(data[:end]) is None
    nothing = bytearray(data)
    nothing[frame + 5 : frame + 7] = b"\0\0"
    twelve_bits = bytearray(data)
    twelve_bits[frame + 4] = 12
    no_frame = data[:frame] + data[frame + 2 + int.from_bytes(data[frame + 2 : frame + 4]) :]
    for each in (bytes(nothing), bytes(twelve_bits), no_frame):
        assert plain_jpeg(each) is None
