"""The `--index` option: which index a collection that is made gets."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

# Those of collections.types.IndexKind, which would load NumPy; a test compares the two.
INDEX_KINDS = (
    "flat",
    "hnsw",
    "hnsw-sq8",
    "ivf",
    "ivf-fp16",
    "ivf-sq8",
    "ivf-pq",
    "ivf-rabitq",
    "auto",
)


def index_option(*, default: str) -> Callable[[Command], Command]:
    """Adds `--index` (parameter `index`)."""
    return click.option(
        "--index",
        type=click.Choice(INDEX_KINDS),
        default=default,
        show_default=True,
        help="Of a collection that is made: flat is exact, auto chooses by size"
        " (docs/collections.md has the others).",
    )
