"""One decoder for both sides: what the server embeds is what training's evaluation embeds.

Training stores images with `load_images` and brings them to the encoder's input with `to_input`;
the server decodes with `load_input`, which scales large JPEGs down while it decodes them.
"""

import asyncio
import io
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from byol_serving.config import ServeConfig
from byol_serving.encoder import Encoder
from byol_serving.images import Preprocess, decode, load_input, to_input
from byol_serving.rpc.pipeline import Pipeline
from byol_training.data import load_images
from serving.support import DIM, SIZE, make_bundle

# Mean absolute differences of an image's pixels, of 255: scaled decoding averages other pixels than
# a resize does, which shows most in fine texture made very small.
MEAN_TOLERANCE, WORST_TOLERANCE = 2.5, 6.0
PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos" / "photos.tar"
COUNT = 40


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real photographs, of many sizes and some of them grey."""
    if not PHOTOS.exists():
        pytest.skip("needs real photographs in ../shared/data/photos")
    folder = tmp_path_factory.mktemp("photos")
    with tarfile.open(PHOTOS) as archive:
        for number, member in enumerate(islice((m for m in archive if m.isfile()), COUNT)):
            file = archive.extractfile(member)
            assert file is not None
            (folder / f"{number:03}.jpg").write_bytes(file.read())
    return folder


def assert_near(differences: list[float]) -> None:
    assert np.mean(differences) < MEAN_TOLERANCE
    assert max(differences) < WORST_TOLERANCE


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("crop", [1.0, 0.875])
def test_scaled_decoding_stays_near_the_full_one(photos: Path, size: int, crop: float) -> None:
    how = Preprocess(size=size, crop_fraction=crop)
    differences: list[float] = []
    for path in photos.iterdir():
        data = path.read_bytes()
        full, scaled = to_input(decode(data), how), load_input(data, how)
        differences.append(np.abs(full.astype(int) - scaled.astype(int)).mean())
    assert_near(differences)


@pytest.mark.parametrize("size", [32, 224])
def test_ours_is_what_pillow_gives(photos: Path, size: int) -> None:
    """Against a decoder and a crop that share no code with ours."""
    differences: list[float] = []
    for path in photos.iterdir():
        with Image.open(path) as image:
            picture = image.convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        box = (left, top, left + side, top + side)
        wanted = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
        found = load_input(path.read_bytes(), Preprocess(size=size))
        differences.append(np.abs(np.asarray(wanted).astype(int) - found.astype(int)).mean())
    assert_near(differences)


async def test_the_server_embeds_what_evaluation_embeds(photos: Path, tmp_path: Path) -> None:
    encoder = Encoder(make_bundle(tmp_path / "bundle"), device="cpu")
    stored = load_images(photos, SIZE)
    evaluated = encoder.embed(stored.pixels)
    config = ServeConfig(
        bundle=encoder.bundle.path, max_batch=8, inference_workers=2, decode_workers=2
    )
    pipeline = Pipeline(encoder.embed, encoder.bundle.info.preprocess, config)
    served = await asyncio.gather(
        *(pipeline.embed_images([(photos / name).read_bytes()]) for name in stored.names)
    )
    await pipeline.close()
    rows: NDArray[np.float32] = np.concatenate(served)
    assert rows.shape == (COUNT, DIM)
    # The same pixels, since the decoder and the size are; sums in another order remain.
    np.testing.assert_allclose(rows, evaluated, atol=1e-5)


def test_an_image_of_the_inputs_size_is_left_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    np.testing.assert_array_equal(load_input(buffer.getvalue(), Preprocess(size=SIZE)), pixels)
