"""The report's pictures: neighbours of some images, and a map of the embedding. All inline."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from byol_serving.images import Pixels
from byol_training.data import Images
from byol_training.neighbours import Embeddings, nearest

# Okabe and Ito's palette without black and yellow: told apart by the colour-blind, on any paper.
CLASS_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
MAP_IMAGES = 500
_MAP_SIZE, _MAP_THUMB = (1140, 860), 34  # width and height
_NEIGHBOURS = 6


def data_uri(pixels: Pixels, side: int) -> str:
    """uint8 [S, S, 3] as an inline JPEG, at most `side` pixels a side."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((side, side), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def contact_sheet(
    bank: Images, rows: Embeddings, queries: Images, asked: Embeddings, *, count: int = 10
) -> str:
    """Some queries spread over all, each with its nearest in the bank.

    Args:
        bank: images to look among; an image that is a query too is not its own neighbour.
        rows: their embeddings.
        queries: images to ask with.
        asked: their embeddings.
        count: how many queries.
    """
    chosen = np.linspace(0, len(queries) - 1, min(count, len(queries))).astype(int)
    cosine, index = nearest(rows, asked[chosen], _NEIGHBOURS + 1)
    lines = []
    for place, query in enumerate(chosen):
        name = queries.names[query]
        found = [
            _picture(bank, hit, f"{score:.2f}", _relation(queries, query, bank, hit))
            for score, hit in zip(cosine[place].tolist(), index[place].tolist(), strict=True)
            if bank.names[hit] != name
        ]
        own = _picture(queries, query, "asked", "asked")
        lines.append(f"<div class=row role=listitem>{own}{''.join(found[:_NEIGHBOURS])}</div>")
    return f"<div class=rows role=list>{''.join(lines)}</div>"


def embedding_map(images: Images, rows: Embeddings) -> str:
    """Thumbnails where a 2-D projection of the embedding puts them; see `project`."""
    chosen = np.linspace(0, len(images) - 1, min(MAP_IMAGES, len(images))).astype(int)
    places = _fill(project(rows[chosen]))
    placed = 4 + places * (np.array(_MAP_SIZE) - _MAP_THUMB - 8)
    coloured = images.labels is not None and len(images.classes) <= len(CLASS_COLOURS)
    marks = []
    for row, (x, y) in zip(chosen.tolist(), placed.tolist(), strict=True):
        frame = ""
        if coloured and images.labels is not None:
            frame = (
                f'<rect x="{x - 2:.0f}" y="{y - 2:.0f}" width="{_MAP_THUMB + 4}"'
                f' height="{_MAP_THUMB + 4}" fill="{CLASS_COLOURS[images.labels[row]]}"/>'
            )
        marks.append(
            f'{frame}<image x="{x:.0f}" y="{y:.0f}" width="{_MAP_THUMB}" height="{_MAP_THUMB}"'
            f' href="{data_uri(images.pixels[row], _MAP_THUMB)}">'
            f"<title>{escape(images.names[row])}</title></image>"
        )
    label = f"Map of {len(chosen)} images: those the encoder finds alike lie together"
    key = _class_key(images.classes) if coloured else ""
    return (
        f'{key}<svg class=map viewBox="0 0 {_MAP_SIZE[0]} {_MAP_SIZE[1]}" role=img'
        f' aria-label="{label}">{"".join(marks)}</svg>'
    )


def project(rows: Embeddings) -> NDArray[np.float64]:
    """Embeddings in two dimensions, [N, 2]: t-SNE where scikit-learn is installed, else PCA.

    Fewer than 30 images are always placed by PCA: t-SNE has no neighbourhoods to keep.
    """
    centred = rows.astype(np.float64) - rows.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    flat: NDArray[np.float64] = centred @ directions[:2].T
    if flat.shape[1] < 2:  # one image, or one dimension
        flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    try:
        from sklearn.manifold import TSNE
    except ModuleNotFoundError:
        return flat
    if len(rows) < 30:
        return flat
    start = 1e-4 * flat / max(float(flat[:, 0].std()), 1e-12)
    perplexity = min(30.0, len(rows) / 4)
    found = TSNE(2, perplexity=perplexity, init=start, random_state=0).fit_transform(rows)
    return np.asarray(found, np.float64)


def _fill(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Places within 0 .. 1 that use the paper: half by value, half by rank along each axis.

    By value alone a few far clusters leave the rest in a corner.
    """
    low, high = places.min(axis=0), places.max(axis=0)
    by_value = (places - low) / np.maximum(high - low, 1e-9)
    by_rank = places.argsort(axis=0).argsort(axis=0) / max(len(places) - 1, 1)
    filled: NDArray[np.float64] = (by_value + by_rank) / 2
    return filled


def _relation(queries: Images, query: int, bank: Images, hit: int) -> str:
    """Same or other: whether the neighbour is of the query's class; plain without labels."""
    if queries.labels is None or bank.labels is None:
        return "plain"
    of_query = queries.classes[queries.labels[query]]
    return "same" if of_query == bank.classes[bank.labels[hit]] else "other"


def _picture(images: Images, row: int, caption: str, kind: str) -> str:
    name = images.names[row]
    spoken = name if kind in ("asked", "plain") else f"{name}, {kind} class"
    return (
        f'<div class="pic {kind}"><img src="{data_uri(images.pixels[row], 72)}"'
        f' alt="{escape(spoken)}" title="{escape(name)}">{escape(caption)}</div>'
    )


def _class_key(classes: Sequence[str]) -> str:
    keys = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in zip(classes, CLASS_COLOURS, strict=False)
    )
    return f"<div class=key>{keys}</div>"
