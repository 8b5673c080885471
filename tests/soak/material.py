"""What the soak sends, and what must come back: photographs and each one's golden embedding."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from byol_serving.images import Preprocess, load_input
from serving.support import SIZE, make_bundle, reference, reference_cells

MODEL = "soak"
SEEDS = {"v1": 1, "v2": 2}
"""Version → seed of its encoder: their embeddings of one image have nothing in common."""
WORK = 10
"""Convolutions, about 3 ms an image on one core: the server's encoder is to be what is overloaded,
and not the program that sends."""
BAD = {
    "text": b"this is no image",
    "empty": b"",
    "bomb": bytes.fromhex("89504e470d0a1a0a0000000d494844520000c3500000c350080200000000000000"),
}


@dataclass(frozen=True)
class Material:
    """Images as files, and the embedding and feature map of each."""

    files: list[bytes]
    golden: dict[str, NDArray[np.float32]]
    """encoder_id → float32 [N, D]."""
    cells: NDArray[np.float32]
    """The feature map `cells`, [N, 3, 4, 4], the same for both versions."""
    folder: Path
    """Of the bundles, for --models."""


def make_material(folder: Path, count: int = 64) -> Material:
    """Bundles, and `count` JPEG files of 160 x 120 pixels, no two alike."""
    random = np.random.default_rng(0)
    files = [_photograph(random) for _ in range(count)]
    pixels = np.stack([load_input(file, Preprocess(size=SIZE)) for file in files])
    golden = {}
    for version, seed in SEEDS.items():
        bundle = make_bundle(folder / MODEL / version, seed=seed, work=WORK)
        golden[bundle.info.encoder_id] = reference(pixels, seed)
    return Material(files, golden, reference_cells(pixels), folder)


def _photograph(random: np.random.Generator) -> bytes:
    coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
