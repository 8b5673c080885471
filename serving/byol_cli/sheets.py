"""Groups of images as one picture: a row for each group."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

_SIDE, _GAP = 96, 4
_ROWS, _COLUMNS = 24, 12


def draw_groups(target: Path, images: Path, groups: Sequence[Sequence[str]]) -> int:
    """Draws the first groups' first images, a row for each; returns how many groups.

    Args:
        target: the picture's file; its suffix chooses the format.
        images: the folder that ids are paths in.
        groups: ids; where no file of that name can be read the place stays grey, and a group
            without any is left out.
    """
    from PIL import Image

    rows = []
    for ids in groups:
        tiles = [_tile(images, each) for each in ids[:_COLUMNS]]
        if any(tile is not None for tile in tiles):
            rows.append(tiles)
        if len(rows) == _ROWS:
            break
    wide = max((len(row) for row in rows), default=1)
    step = _SIDE + _GAP
    sheet = np.full((max(1, len(rows)) * step, wide * step, 3), 255, np.uint8)
    for down, row in enumerate(rows):
        for right, tile in enumerate(row):
            place = sheet[down * step :, right * step :][:_SIDE, :_SIDE]
            place[:] = 200 if tile is None else tile
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(target)
    return len(rows)


def _tile(images: Path, item_id: str) -> "np.ndarray | None":
    """The image as uint8 [96, 96, 3]; None where there is none inside the folder."""
    from byol_serving.errors import InvalidImage
    from byol_serving.images import Preprocess, load_input

    file = images / item_id
    if not file.resolve().is_relative_to(images.resolve()) or not file.is_file():
        return None
    try:
        return load_input(file.read_bytes(), Preprocess(size=_SIDE))
    except InvalidImage:
        return None
