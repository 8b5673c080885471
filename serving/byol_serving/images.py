"""Bytes to pixels: the only place in the project that decodes and resizes.

Training's evaluation, export's golden pairs, the server and the offline pipeline all come through
here, because the same file decoded twice by different libraries differs by 1 to 2 of 255 a pixel.

JPEG goes through libjpeg-turbo (simplejpeg), which scales while it decodes where the target is
small: to 224 pixels from VGA photographs this is 1.7 times as fast as Pillow's full decode.
Everything else, and every JPEG that is not plain RGB or grey, goes through Pillow.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, ImageFile, UnidentifiedImageError, _imaging

from byol_serving.decode_time import TimedFile, check_estimate
from byol_serving.errors import ImageTooLarge, InvalidImage, InvalidRequest
from byol_serving.jpeg_header import Jpeg, plain_jpeg
from byol_serving.tiff_header import pieces

Pixels = NDArray[np.uint8]

# The limit is ours, checked from the header before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None
ImageFile.LOAD_TRUNCATED_IMAGES = False
# Pillow keeps the memory of so many images for the next ones, instead of giving it back: the page
# faults of three fresh buffers an image are an eighth of the time of a VGA photograph.
_imaging.set_blocks_max(8)

# Its decoder's own threads would neither be counted nor leave the other images theirs.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Not all that Pillow knows: among that is EPS, which it has another program run."""
_MAX_SCANS = 100
"""Of a progressive JPEG: a file of 100 kB may hold thousands, and take minutes."""
_MAX_PIECES = 65536
"""Of a TIFF: enough for strips of one row each, and half a second of Pillow's time."""
_WIDE_BLOCK = 2**20
"""Values of a 16-bit image that are made 8-bit at a time, as float64."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image file becomes the encoder's input; written in the bundle."""

    size: int
    """Height and width of the encoder's input, in pixels."""
    crop_fraction: float = 1.0
    """Part of the short side that the crop keeps: 0.875 is 224 of 256 (paper, appendix C.1)."""
    resize: Literal["short_side", "squash"] = "short_side"
    """short_side: keep the aspect and crop the centre; squash: scale both sides to `size`."""

    def __post_init__(self) -> None:
        """Refuses values that no image could be brought to."""
        if not 1 <= self.size <= 4096:
            raise InvalidRequest(f"input size {self.size} is outside 1..4096 pixels")
        if not 0.1 <= self.crop_fraction <= 1.0:
            raise InvalidRequest(f"crop_fraction {self.crop_fraction} is outside 0.1..1")


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What is refused before it costs anything."""

    max_bytes: int = 32 * 2**20
    """Size of one encoded image."""
    max_pixels: int = 100_000_000
    """Width x height in the header; a 50,000 x 50,000 PNG of a few kB would need 7.5 GB."""
    max_seconds: float = 10.0
    """CPU time of decoding; 0: no limit. How it is held: `decode_time`."""


def decode(data: bytes, limits: ImageLimits | None = None) -> Pixels:
    """The picture in `data` at full size as RGB, upright.

    EXIF orientation is applied; greyscale, CMYK, palette, 16-bit and transparent images (over
    white) become 8-bit RGB; of an animation the first frame counts.

    Args:
        data: an image file: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PPM.
        limits: see `ImageLimits`.

    Returns:
        uint8 [H, W, 3].

    Raises:
        InvalidImage: the bytes are empty, not an image, truncated or damaged.
        ImageTooLarge: more bytes or pixels than the limits.
        ImageTooSlow: more time to decode than they allow.
    """
    raster = _decode(data, limits or ImageLimits(), at_least=0)
    return _upright(raster.pixels, raster.orientation)


def upright_size(data: bytes) -> tuple[int, int]:
    """(height, width) of the picture in `data`, upright, from its header; raises as `decode`."""
    with _open(data, ImageLimits()) as header:
        width, height = header.size
        turned = header.getexif().get(0x0112, 1) >= 5
    return (width, height) if turned else (height, width)


def to_input(pixels: Pixels, how: Preprocess) -> Pixels:
    """Resizes and crops uint8 [H, W, 3] to the encoder's input, uint8 [size, size, 3].

    Bilinear with antialiasing (Pillow's); one resize does both, from a box of the source.
    """
    height, width = pixels.shape[:2]
    return _fit(_Raster(pixels, width, height), how)


def load_input(
    data: bytes, how: Preprocess, limits: ImageLimits | None = None, header: Jpeg | None = None
) -> Pixels:
    """An image file as the encoder's input, uint8 [size, size, 3]; raises as `decode` does.

    The same as `to_input(decode(data), how)`, but that a JPEG much larger than the input is scaled
    down while it is decoded, which changes the pixels by 0.5 to 2 of 255 on average.

    Args:
        data: an image file.
        how: what it is to become.
        limits: see `ImageLimits`.
        header: what `plain_jpeg` says of it, where it was asked before.
    """
    at_least = math.ceil(how.size / how.crop_fraction)
    raster = _decode(data, limits or ImageLimits(), at_least, header)
    # Both crops are symmetric, so the turn may wait until there are few pixels to turn.
    return _upright(_fit(raster, how), raster.orientation)


class _Raster(NamedTuple):
    """Decoded pixels as they lie in the file, and what they are of the whole picture."""

    pixels: Pixels
    width: int
    """Of the picture in the file, in pixels before any scaling."""
    height: int
    eighths: int = 8
    """Scale of `pixels`: n of 8. Each pixel covers exactly 8 / n of the picture's, which the last
    row and column may overhang."""
    orientation: int = 1
    """EXIF tag 0x0112: how to turn `pixels` upright."""


def _decode(data: bytes, limits: ImageLimits, at_least: int, header: Jpeg | None = None) -> _Raster:
    """As `decode`; where `at_least` > 0, the short side may be scaled down as far as that."""
    _check_bytes(data, limits)
    if (plain := header or plain_jpeg(data)) is not None:
        _check_pixels(plain.width, plain.height, limits)
        return _decode_jpeg(data, plain, limits, at_least)
    opened = _open(data, limits)
    try:
        with opened:
            if opened.format == "JPEG" and opened.mode in ("RGB", "L"):
                jpeg = Jpeg(*opened.size, orientation=opened.getexif().get(0x0112, 1))
                return _decode_jpeg(data, jpeg, limits, at_least)
            kind = opened.format or ""
            scans = _scans(data) if kind in ("JPEG", "MPO") else 1
            check_estimate(kind, *opened.size, len(data), limits.max_seconds, scans=scans)
            opened.load()  # which turns a TIFF
            pixels = _upright(_to_rgb(opened), opened.getexif().get(0x0112, 1))
            return _Raster(pixels, pixels.shape[1], pixels.shape[0])
    except InvalidImage:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds of their own
        raise InvalidImage(f"damaged {opened.format} file ({_one_line(error)})") from error


def _fit(raster: _Raster, how: Preprocess) -> Pixels:
    """uint8 [size, size, 3] from the part of the picture that `how` keeps.

    The box is measured on the whole picture and scaled exactly. Measured on the scaled pixels it
    would be off by up to a pixel, which doubles the error of scaled decoding.
    """
    width, height, scale = raster.width, raster.height, raster.eighths / 8
    if (height, width) == (how.size, how.size) and how.crop_fraction == scale == 1.0:
        return raster.pixels
    if how.resize == "squash":
        left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    else:
        side = min(height, width) * how.crop_fraction
        left, top = (width - side) / 2, (height - side) / 2
        right, bottom = left + side, top + side
    resized = Image.fromarray(raster.pixels).resize(
        (how.size, how.size),
        Image.Resampling.BILINEAR,
        box=(left * scale, top * scale, right * scale, bottom * scale),
    )
    return np.asarray(resized)


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    """Reads the header only, and holds the size against the limits."""
    _check_bytes(data, limits)
    if (count := pieces(data)) > _MAX_PIECES:
        raise InvalidImage(f"TIFF file of {count} pieces; the limit is {_MAX_PIECES}, save it anew")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = Image.open(TimedFile(data, limits.max_seconds), formats=_FORMATS)
    except InvalidImage:
        raise
    except UnidentifiedImageError as error:
        raise InvalidImage(
            f"not an image file ({len(data)} bytes beginning {data[:8]!r});"
            " send JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000 or PPM"
        ) from error
    except Exception as error:
        raise InvalidImage(f"unreadable header ({_one_line(error)})") from error
    try:
        _check_pixels(*header.size, limits)
    except ImageTooLarge:
        header.close()
        raise
    return header


def _check_bytes(data: bytes, limits: ImageLimits) -> None:
    if not data:
        raise InvalidImage("empty: 0 bytes; send the bytes of an image file")
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(
            f"{len(data)} bytes is over the limit of {limits.max_bytes} bytes;"
            " send a smaller file or raise max_bytes"
        )


def _check_pixels(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"{width} x {height} pixels is over the limit of {limits.max_pixels} pixels;"
            " send a smaller image or raise max_pixels"
        )


def _decode_jpeg(data: bytes, header: Jpeg, limits: ImageLimits, at_least: int) -> _Raster:
    width, height = header.width, header.height
    scans = _scans(data) if header.many_scans else 1
    check_estimate("JPEG", width, height, len(data), limits.max_seconds, scans=scans)
    eighths = _eighths(min(width, height), at_least)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            data,
            colorspace="RGB",
            fastdct=False,
            fastupsample=False,
            min_height=-(-height * eighths // 8),
            min_width=-(-width * eighths // 8),
            min_factor=1,
        )
    except ValueError as error:
        raise InvalidImage(f"damaged JPEG file ({_one_line(error)})") from error
    return _Raster(pixels, width, height, eighths, header.orientation)


def _scans(data: bytes) -> int:
    """Of a JPEG; a normal progressive file has about 10. Each costs a pass over all pixels."""
    # In coded data a byte ff is always followed by 00, so this counts scans (and at worst those
    # of a thumbnail).
    if (scans := data.count(b"\xff\xda")) > _MAX_SCANS:
        raise InvalidImage(f"JPEG file of {scans} scans; the limit is {_MAX_SCANS}, save it anew")
    return scans


def _eighths(short: int, at_least: int) -> int:
    """The scale n / 8 to decode at, so that the short side keeps `at_least` pixels (0: all).

    Scales over 5/8 have no SIMD code and take longer than full size does.
    """
    wanted = -(-8 * at_least // short) if at_least > 0 else 8
    return wanted if wanted <= 5 else 8


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Applies EXIF tag 0x0112 (EXIF 2.32, section 4.6.4)."""
    match orientation:
        case 2:
            turned = pixels[:, ::-1]
        case 3:
            turned = pixels[::-1, ::-1]
        case 4:
            turned = pixels[::-1]
        case 5:
            turned = pixels.transpose(1, 0, 2)
        case 6:
            turned = pixels.transpose(1, 0, 2)[:, ::-1]
        case 7:
            turned = pixels[::-1, ::-1].transpose(1, 0, 2)
        case 8:
            turned = pixels.transpose(1, 0, 2)[::-1]
        case _:
            return pixels
    return np.ascontiguousarray(turned)


def _to_rgb(image: Image.Image) -> Pixels:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "palette images with transparency ...": handled below
        if image.mode.startswith(("I", "F")):
            return _wide_to_rgb(np.asarray(image))
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
        return np.asarray(image.convert("RGB"))


def _wide_to_rgb(values: NDArray[np.generic]) -> Pixels:
    """16-bit integers keep their top 8 bits; 32-bit and float images are stretched to 0..255."""
    if not np.isfinite(values).all():
        raise InvalidImage("the floating-point pixels are not all finite")
    low, high = float(values.min()), float(values.max())
    if values.dtype.itemsize == 2 or (255 < high <= 65535 and low >= 0):
        black, scale = 0.0, 1 / 257
    elif low >= 0 and high <= 255 and values.dtype.kind in "iu":
        black, scale = 0.0, 1.0
    else:
        black, scale = low, 255.0 / (high - low) if high > low else 0.0
    grey = np.empty(values.shape, np.uint8)
    rows = max(1, _WIDE_BLOCK // values.shape[1])
    for at in range(0, len(values), rows):
        block = values[at : at + rows].astype(np.float64)
        grey[at : at + rows] = np.rint((block - black) * scale)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
