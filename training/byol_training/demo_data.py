"""The demo's images, as files on disk: a collection to learn from and queries held back.

Default: the photographs, micrographs and texture plates that ship inside scikit-image and
scikit-learn, in grey so that colour gives nothing away. Tiles of random size from the left half of
each are the collection; tiles from the right half, never seen, are the queries. The question is
"which picture is this a piece of?".
"""

import importlib.resources
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from byol_serving.errors import InvalidSource
from byol_serving.images import Pixels, decode
from byol_training.data import list_images

SKIMAGE_PICTURES = [
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
]
SKLEARN_PICTURES = ("china.jpg", "flower.jpg")

TILE = 48
"""Side of a stored tile in pixels: 1.5 times the encoder's 32, so that random crops lose little."""


MOST_COLLECTION, MOST_QUERIES = 12_000, 2_000
"""A demo takes minutes: of a larger source a random part is used."""


@dataclass(frozen=True)
class Part:
    """Some of a source's images, by name."""

    source: Path
    names: Sequence[str]


@dataclass(frozen=True)
class Held:
    """What is learned from and indexed, and what is held back to ask the questions."""

    collection: Part
    queries: Part


def prepare(data: str, out: Path) -> Held:
    """The demo's images: `default`, `cifar10`, or a folder or tar; files it makes go to `out`.

    Raises:
        InvalidSource: there are no images, or too few to hold some back.
    """
    match data:
        case "default":
            collection, queries = write_tiles(out)
        case "cifar10":
            collection, queries = write_cifar10(out)
        case path:
            return _split(Path(path))
    return Held(
        _sample(collection, list_images(collection), MOST_COLLECTION),
        _sample(queries, list_images(queries), MOST_QUERIES),
    )


def _split(source: Path) -> Held:
    """Holds back a random sixth of the source's images, the same each time."""
    names = list_images(source)
    if len(names) < 60:
        raise InvalidSource(f"{source} holds {len(names)} images; the demo needs at least 60")
    mixed = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    held = len(mixed) // 6
    return Held(
        _sample(source, mixed[held:], MOST_COLLECTION), _sample(source, mixed[:held], MOST_QUERIES)
    )


def _sample(source: Path, names: Sequence[str], most: int) -> Part:
    chosen = np.random.default_rng(1).permutation(len(names))[:most]
    return Part(source, sorted(names[i] for i in chosen))


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """How many tiles are cut, and how large."""

    collection: int = 260
    """Tiles from the left half of each picture."""
    queries: int = 50
    """Tiles from the right half of each picture."""
    smallest: float = 0.25
    """Side of the smallest tile, as a part of the half's short side."""
    largest: float = 0.75
    """Side of the largest."""
    seed: int = 0


def write_tiles(out: Path, plan: TilePlan | None = None) -> tuple[Path, Path]:
    """Writes OUT/collection/PICTURE/NNN.png and OUT/queries/PICTURE/NNN.png; returns both folders.

    Raises:
        InvalidSource: scikit-image or scikit-learn is not installed.
    """
    plan = plan or TilePlan()
    rng = np.random.default_rng(plan.seed)
    for name, picture in _pictures():
        half = picture.shape[1] // 2
        for folder, side, count in (
            ("collection", picture[:, :half], plan.collection),
            ("queries", picture[:, half:], plan.queries),
        ):
            target = out / folder / name
            target.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                tile = _tile(side, plan, rng)
                Image.fromarray(tile).save(target / f"{number:03}.png", compress_level=1)
    return out / "collection", out / "queries"


def _pictures() -> list[tuple[str, Pixels]]:
    """The 19 pictures in grey, uint8 [H, W]."""
    try:
        folders = [
            (importlib.resources.files("skimage") / "data", SKIMAGE_PICTURES),
            (importlib.resources.files("sklearn") / "datasets" / "images", SKLEARN_PICTURES),
        ]
    except ModuleNotFoundError as error:
        raise InvalidSource(
            f"the default demo reads the pictures inside {error.name}, which is not installed;"
            " pip install 'byol-server[demo]', or give --data FOLDER"
        ) from error
    grey = []
    for folder, names in folders:
        for name in names:
            picture = Image.fromarray(decode((folder / name).read_bytes())).convert("L")
            grey.append((Path(name).stem, np.asarray(picture)))
    return grey


def _tile(side: Pixels, plan: TilePlan, rng: np.random.Generator) -> Pixels:
    """One square tile of random size and place, TILE x TILE, uint8."""
    height, width = side.shape
    edge = int(min(height, width) * rng.uniform(plan.smallest, plan.largest))
    top = int(rng.integers(0, height - edge + 1))
    left = int(rng.integers(0, width - edge + 1))
    cut = Image.fromarray(side[top : top + edge, left : left + edge])
    return np.asarray(cut.resize((TILE, TILE), Image.Resampling.BILINEAR))


def write_cifar10(out: Path) -> tuple[Path, Path]:
    """CIFAR-10 through torchvision as OUT/train.tar and OUT/test.tar, CLASS/NNNNN.png inside.

    Raises:
        InvalidSource: it can neither be downloaded nor found under OUT.
    """
    from torchvision.datasets import CIFAR10

    archives = out / "train.tar", out / "test.tar"
    for archive, train in zip(archives, (True, False), strict=True):
        if archive.exists():
            continue
        try:
            images = CIFAR10(str(out), train=train, download=True)
        except Exception as error:
            raise InvalidSource(
                f"CIFAR-10 cannot be downloaded ({' '.join(str(error).split())[:120]}); put a copy"
                f" unpacked as CLASS/NAME.jpg in a folder or tar and give --data PATH"
            ) from error
        _write_tar(archive, images.data, images.targets, images.classes)
    return archives


def _write_tar(archive: Path, pixels: Pixels, labels: list[int], classes: list[str]) -> None:
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            entry = tarfile.TarInfo(f"{classes[label]}/{number:05}.png")
            entry.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(entry, buffer)
    partial.rename(archive)
