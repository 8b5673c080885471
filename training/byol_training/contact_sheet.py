"""Pictures: what the encoder thinks is alike."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from byol_serving.images import Pixels

CELL = 80
GAP = 6
RIGHT, WRONG, UNKNOWN = (38, 150, 80), (200, 60, 50), (150, 150, 150)


def neighbour_sheet(
    path: Path,
    queries: Sequence[Pixels],
    neighbours: Sequence[Sequence[tuple[Pixels, float, bool | None]]],
    *,
    title: str,
) -> None:
    """Writes one PNG: each row a query and its neighbours, best first.

    Args:
        path: where to write.
        queries: uint8 [H, W, 3] each.
        neighbours: for each query (picture, cosine, whether its label is the query's, or None where
            there are no labels); the frame is green, red or grey accordingly.
        title: one line above.
    """
    columns = 1 + max((len(row) for row in neighbours), default=0)
    top, row_height = 30, CELL + 18
    width = GAP * 3 + columns * (CELL + GAP) + 12
    sheet = Image.new("RGB", (max(width, 420), top + 22 + len(queries) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    draw.text((GAP, 8), title, fill="black", font=ImageFont.load_default(14))
    draw.text((GAP, top), "query", fill="black", font=font)
    draw.text(
        (GAP * 3 + CELL + GAP, top), "nearest, with cosine similarity", fill="black", font=font
    )
    for number, (query, row) in enumerate(zip(queries, neighbours, strict=True)):
        y = top + 20 + number * row_height
        sheet.paste(_thumbnail(query), (GAP, y))
        for place, (pixels, score, same) in enumerate(row):
            x = GAP * 3 + (place + 1) * (CELL + GAP)
            colour = UNKNOWN if same is None else RIGHT if same else WRONG
            draw.rectangle((x - 3, y - 3, x + CELL + 2, y + CELL + 2), fill=colour)
            sheet.paste(_thumbnail(pixels), (x, y))
            draw.text((x, y + CELL + 2), f"{score:.2f}", fill=colour, font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _thumbnail(pixels: Pixels) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    cell = Image.new("RGB", (CELL, CELL), "white")
    resized = picture.resize(size, Image.Resampling.BICUBIC)
    cell.paste(resized, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell
