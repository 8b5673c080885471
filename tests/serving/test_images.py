"""The only decoder: what becomes of every kind of image, and of what is none."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from byol_serving import images
from byol_serving.errors import ImageTooLarge, InvalidImage, InvalidRequest
from byol_serving.images import ImageLimits, Preprocess, decode, load_input, to_input
from serving.support import encoded

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos" / "photos.tar"


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    """Red grows to the right, green downwards: no turn or mirror image looks like another."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = np.linspace(0, 255, width).astype(np.uint8)
    pixels[:, :, 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    pixels[:, :, 2] = 90
    return Image.fromarray(pixels)


def difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_files_come_back_as_they_were(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = gradient()
    np.testing.assert_array_equal(decode(encoded(picture, kind, **options)), np.asarray(picture))


def test_jpeg_is_close_to_what_was_saved() -> None:
    assert difference(decode(encoded(gradient(), "JPEG", quality=95)), np.asarray(gradient())) < 3


def test_greyscale_fills_three_channels() -> None:
    grey = gradient().convert("L")
    wanted = np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode(encoded(grey, "PNG")), wanted)
    assert difference(decode(encoded(grey, "JPEG", quality=95)), wanted) < 2


def test_cmyk_jpeg() -> None:
    picture = gradient().convert("CMYK")
    found = decode(encoded(picture, "JPEG", quality=95))
    assert difference(found, np.asarray(picture.convert("RGB"))) < 4


def test_sixteen_bits_keep_their_top_eight() -> None:
    wide = (np.arange(24 * 40, dtype=np.uint32).reshape(24, 40) * 68).astype(np.uint16)
    found = decode(encoded(Image.fromarray(wide), "PNG"))
    np.testing.assert_array_equal(found[:, :, 0], np.rint(wide / 257).astype(np.uint8))
    np.testing.assert_array_equal(found[:, :, 0], found[:, :, 2])


def test_floats_are_stretched_and_must_be_finite() -> None:
    values = np.linspace(-3, 7, 24 * 40, dtype=np.float32).reshape(24, 40)
    found = decode(encoded(Image.fromarray(values), "TIFF"))
    assert (found.min(), found.max()) == (0, 255)
    values[3, 3] = np.nan
    with pytest.raises(InvalidImage, match="not all finite"):
        decode(encoded(Image.fromarray(values), "TIFF"))


def test_transparency_is_seen_over_white() -> None:
    clear = gradient().convert("RGBA")
    clear.putalpha(0)
    assert (decode(encoded(clear, "PNG")) == 255).all()
    palette = gradient().convert("P")
    clear_index = int(np.asarray(palette)[5, 5])
    found = decode(encoded(palette, "PNG", transparency=clear_index))
    assert (found[np.asarray(palette) == clear_index] == 255).all()
    assert (found[np.asarray(palette) != clear_index] != 255).any()


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tuple(decode(data)[4, 4]) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {}
    data = encoded(gradient(), kind, exif=exif, **options)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    upright = gradient().transpose(turns[orientation]) if orientation > 1 else gradient()
    assert difference(decode(data), np.asarray(upright)) < 3
    how = Preprocess(size=12)
    assert difference(load_input(data, how), to_input(np.asarray(upright), how)) < 4


def test_one_pixel() -> None:
    data = encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")
    assert (load_input(data, Preprocess(size=32)) == (9, 8, 7)).all()


def test_limits_hold_before_any_pixel_is_decoded() -> None:
    data = encoded(gradient(), "PNG")
    with pytest.raises(ImageTooLarge, match=f"{len(data)} bytes is over the limit of 100 bytes"):
        decode(data, ImageLimits(max_bytes=100))
    with pytest.raises(ImageTooLarge, match="40 x 24 pixels is over the limit of 959 pixels"):
        decode(data, ImageLimits(max_pixels=959))
    assert decode(data, ImageLimits(max_pixels=960)).shape == (24, 40, 3)


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = encoded(gradient(), "JPEG", progressive=True)
    scan = data[data.index(b"\xff\xda") : data.rindex(b"\xff\xd9")]
    with pytest.raises(InvalidImage, match="scans; the limit is 100"):
        decode(data[:-2] + scan * 120 + b"\xff\xd9")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_a_file_cut_anywhere_is_an_error_or_a_picture_and_never_anything_else(kind: str) -> None:
    data = encoded(gradient(), kind)
    for end in range(0, len(data) - 1, max(1, len(data) // 40)):
        with contextlib.suppress(InvalidImage):
            assert decode(data[:end]).shape == (24, 40, 3)


def test_the_crop_is_central_and_squashing_keeps_everything() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert (to_input(pixels, Preprocess(size=10)) == 200).all()
    assert (to_input(pixels, Preprocess(size=6, crop_fraction=0.5)) == 200).all()
    squashed = to_input(pixels, Preprocess(size=30, resize="squash"))
    assert (squashed[:, :8] == 0).all()
    assert (squashed[:, 12:18] == 200).all()


def test_an_image_of_the_inputs_size_is_left_alone() -> None:
    pixels = np.asarray(gradient(32, 32))
    assert to_input(pixels, Preprocess(size=32)) is pixels


def test_preprocess_refuses_what_cannot_be_done() -> None:
    with pytest.raises(InvalidRequest, match="size 0"):
        Preprocess(size=0)
    with pytest.raises(InvalidRequest, match="crop_fraction"):
        Preprocess(size=32, crop_fraction=0.0)


@pytest.mark.parametrize("at_least", [0, 1, 10, 30, 60, 61, 96, 200])
def test_scaled_decoding_keeps_the_pixels_that_are_needed(at_least: int) -> None:
    eighths = images._eighths(96, at_least)
    assert eighths in (1, 2, 3, 4, 5, 8)
    assert 96 * eighths / 8 >= min(at_least, 96)


@pytest.mark.skipif(not PHOTOS.exists(), reason="shared/data/photos is not here")
def test_scaled_decoding_of_photographs_is_within_two_levels_of_full_decoding() -> None:
    import tarfile

    how = Preprocess(size=96)
    differences = []
    with tarfile.open(PHOTOS) as archive:
        members = [member for member in archive if member.isfile()][:25]
        for member in members:
            file = archive.extractfile(member)
            assert file is not None
            data = file.read()
            differences.append(difference(load_input(data, how), to_input(decode(data), how)))
    assert max(differences) > 0.1  # scaled indeed
    assert np.mean(differences) < 2.0


def test_bytes_of_every_kind_of_rubbish() -> None:
    for data in (b"", b"\xff\xd8\xff", b"text", io.BytesIO(b"\0" * 1000).getvalue()):
        with pytest.raises(InvalidImage):
            decode(data)
