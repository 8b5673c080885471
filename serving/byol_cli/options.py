"""Options that several commands share, and how their values are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from byol_serving.client import Client, ExampleLike

Command = TypeVar("Command", bound=Callable[..., Any])
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

server_option = click.option(
    "--server", default="127.0.0.1:50051", show_default=True, help="A running server's address."
)
store_option = click.option(
    "--store",
    type=click.Path(path_type=Path, file_okay=False),
    help="Or a store on disk, unserved.",
)
where_option = click.option(
    "--where",
    callback=lambda _ctx, _param, text: parsed(text),
    help='Filter on metadata as JSON, like \'{"label": "cat"}\'.',
)


def index_option(default: str) -> Callable[[Command], Command]:
    """Adds `--index`."""
    return click.option(
        "--index",
        type=click.Choice(INDEX_KINDS),
        default=default,
        show_default=True,
        help="Flat is exact; auto chooses by size.",
    )


id_type_option = click.option(
    "--id-type",
    type=click.Choice(["string", "int64"]),
    default="string",
    show_default=True,
    help="What ids are: any text, or 64-bit integers only.",
)
collection_option = click.option("--collection", "-c", required=True, help="Collection to use.")

LONG_S = 24 * 3600.0
"""Work that grows with the collection is ended by Ctrl-C, not by a default timeout."""


def parsed(text: str | None) -> Any:
    """A JSON value; None for None. Raises click.BadParameter."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not JSON ({error})") from error


def connected(server: str, *, timeout: float = 60.0) -> "Client":
    """A client of the server."""
    from byol_serving.client import Client

    return Client(server, timeout=timeout)


def example(text: str) -> "ExampleLike":
    """An image file, or an item written as id:NAME."""
    from byol_serving.client import ItemId

    return ItemId(text.removeprefix("id:")) if text.startswith("id:") else Path(text)
