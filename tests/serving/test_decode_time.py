"""Images that would keep a decoder busy: refused from the header, or stopped on the way."""

import contextlib
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from byol_serving.client import AsyncClient
from byol_serving.config import ServeConfig
from byol_serving.errors import ImageTooSlow, InvalidImage
from byol_serving.images import ImageLimits, decode
from byol_serving.server import serving
from byol_serving.tiff_header import pieces
from serving.support import encoded, make_bundle, png, random_pixels, reference

NO_LIMIT = ImageLimits(max_seconds=0)


def seconds(data: bytes, limits: ImageLimits) -> float:
    """CPU time of decoding, or of refusing."""
    began = time.thread_time()
    with contextlib.suppress(InvalidImage):
        decode(data, limits)
    return time.thread_time() - began


def scan_bomb(side: int, scans: int) -> bytes:
    """A small file of a flat picture, and that many passes over all of it."""
    data = encoded(Image.new("L", (side, side), 99), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + b"\xff\xd9"


def noise(side: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_a_scan_bomb_is_refused_for_the_time_that_it_would_take() -> None:
    data = scan_bomb(4000, 90)
    assert len(data) < 500_000
    with pytest.raises(ImageTooSlow, match=r"4000 x 4000 pixels, \d+ bytes and 90 scans may take"):
        decode(data, ImageLimits(max_seconds=1.0))
    assert seconds(data, ImageLimits(max_seconds=1.0)) < 0.2
    assert seconds(data, NO_LIMIT) > 0.1  # it is what it is made for
    assert seconds(scan_bomb(200, 90), ImageLimits()) < 0.2  # the same of few pixels may be tried


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "JPEG2000", "TIFF"])
@pytest.mark.parametrize("flat", [True, False])
def test_what_cannot_be_stopped_is_estimated_as_no_faster_than_it_is(
    kind: str, flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 2**26)
    options: dict[str, dict[str, Any]] = {
        "AVIF": {"speed": 10},
        "JPEG": {"progressive": True, "quality": 100, "subsampling": 0},
        "TIFF": {"compression": "jpeg"},
    }
    data = encoded(
        Image.new("RGB", (800, 800)) if flat else noise(800), kind, **options.get(kind, {})
    )
    took = min(seconds(data, NO_LIMIT) for _ in range(2))
    # Estimates are for a machine that is neither the slowest nor idle: half will do.
    with pytest.raises(ImageTooSlow):
        decode(data, ImageLimits(max_seconds=took / 2))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM"])
def test_other_decoders_are_stopped_when_their_time_is_over(kind: str) -> None:
    data = encoded(noise(2000), kind, **({"compress_level": 1} if kind == "PNG" else {}))
    whole = seconds(data, NO_LIMIT)
    with pytest.raises(ImageTooSlow, match="longer than the limit of"):
        decode(data, ImageLimits(max_seconds=whole / 20))
    assert seconds(data, ImageLimits(max_seconds=whole / 20)) < whole / 2


def tiff(count: int, *, order: str = "<", big: bool = False, size: int = 100) -> bytes:
    """A TIFF of size x size grey pixels, whose one strip is named `count` times."""
    entries = [
        (256, size),
        (257, size),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 0),
        (277, 1),
        (278, size),
        (279, 0),
    ]
    head = struct.pack(order + "2sH", b"II" if order == "<" else b"MM", 43 if big else 42)
    head += struct.pack(order + "HHQ", 8, 0, 16) if big else struct.pack(order + "I", 8)
    body = struct.pack(order + ("Q" if big else "H"), len(entries))
    after = len(head) + len(body) + len(entries) * (20 if big else 12) + (8 if big else 4)
    for tag, value in entries:
        amount = count if tag in (273, 279) else 1
        if amount > 1:
            value = after + (4 * count if tag == 279 else 0)
        body += struct.pack(order + ("HHQQ" if big else "HHII"), tag, 4, amount, value)
    body += bytes(8 if big else 4)
    pixels = after + 8 * count
    body += struct.pack(order + "I", pixels) * count
    body += struct.pack(order + "I", size * size) * count
    return head + body + b"\x55" * size * size


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [True, False])
def test_the_pieces_of_a_tiff_are_counted(order: str, big: bool) -> None:
    data = tiff(300, order=order, big=big)
    assert pieces(data) == 300
    for end in (1, 3, 7, 30, 60):
        assert pieces(data[:end]) == 0
    if not big:  # of which Pillow reads few
        assert (decode(data) == 0x55).all()
    assert pieces(encoded(noise(64), "TIFF")) == 1
    assert pieces(encoded(noise(64), "PNG")) == 0


def test_a_tiff_of_endless_pieces_is_refused_at_once() -> None:
    data = tiff(400_000)
    with pytest.raises(InvalidImage, match="400000 pieces; the limit is 65536"):
        decode(data)
    assert seconds(data, ImageLimits()) < 0.1


def test_a_format_that_runs_another_program_is_none() -> None:
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(InvalidImage, match="not an image file"):
        decode(page)


async def test_a_slow_image_fails_its_own_request_only(tmp_path: Path) -> None:
    config = ServeConfig(
        bundle=make_bundle(tmp_path / "tiny").path,
        port=0,
        decode_workers=1,
        limits=ImageLimits(max_seconds=1.0),
    )
    pixels = random_pixels(2)
    async with serving(config) as running, AsyncClient(running.address) as client:
        with pytest.raises(ImageTooSlow, match="image 1: a JPEG file") as caught:
            await client.embed([png(pixels[0]), scan_bomb(4000, 90)])
        assert caught.value.position == 1
        found = await client.embed(list(map(png, pixels)))
    np.testing.assert_allclose(found, reference(pixels), atol=1e-5)
