"""`byol collections`: list, create, inspect, drop; by a server, or on an unserved store."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from byol_cli.output import emit, json_option, table

if TYPE_CHECKING:
    from byol_serving.collections.store import Store
    from byol_serving.collections.types import IndexKind

server_option = click.option(
    "--server", default="127.0.0.1:50051", show_default=True, help="A running server's address."
)
store_option = click.option(
    "--store",
    type=click.Path(path_type=Path, file_okay=False),
    help="Or a store on disk, unserved.",
)


@click.group()
def command() -> None:
    """List, create, inspect and drop collections.

    \b
    Example:  byol collections list
              byol collections create photos --index auto
              byol collections list --store store
    """


@command.command("list")
@server_option
@store_option
@json_option
def list_(server: str, store: Path | None, as_json: bool) -> None:
    """List the collections with their size, dimension and encoder.

    \b
    Example:  byol collections list --store store
    """
    if store is not None:
        with _opened(store) as opened:
            infos = opened.list()
    else:
        from byol_serving.client import Client

        with Client(server) as client:
            infos = client.collections()
    if as_json:
        emit({"collections": [asdict(info) for info in infos]}, as_json)
        return
    rows = [(i.name, i.count, i.dim, i.index, i.encoder_id[:12]) for i in infos]
    table(["name", "items", "dim", "index", "encoder"], rows)


@command.command()
@click.argument("name")
@click.option("--dim", default=0, help="Dimension; default: the loaded encoder's.")
@click.option("--encoder-id", default="", help="Default: the loaded encoder's.")
@click.option(
    "--index",
    type=click.Choice(
        ["flat", "hnsw", "hnsw-sq8", "ivf", "ivf-fp16", "ivf-sq8", "ivf-pq", "ivf-rabitq", "auto"]
    ),
    default="flat",
    show_default=True,
    help="Flat is exact; auto chooses by size.",
)
@server_option
@json_option
def create(
    name: str, dim: int, encoder_id: str, index: "IndexKind", server: str, as_json: bool
) -> None:
    """Create a collection on a running server.

    \b
    Example:  byol collections create photos --index auto
    """
    from byol_serving.client import Client

    with Client(server) as client:
        info = client.create_collection(
            name,
            dim=dim,
            encoder_id=encoder_id,
            index=index,
        )
    emit(asdict(info), as_json)


@command.command()
@click.argument("name")
@server_option
@json_option
def stats(name: str, server: str, as_json: bool) -> None:
    """Show one collection's facts.

    \b
    Example:  byol collections stats photos --json
    """
    from byol_serving.client import Client

    with Client(server) as client:
        emit(asdict(client.collection(name)), as_json)


@command.command()
@click.argument("name")
@click.confirmation_option(prompt="Drop the collection and everything in it?")
@server_option
@json_option
def drop(name: str, server: str, as_json: bool) -> None:
    """Drop a collection for good.

    \b
    Example:  byol collections drop photos --yes
    """
    from byol_serving.client import Client

    with Client(server) as client:
        client.drop_collection(name)
    emit({"dropped": name}, as_json)


@contextmanager
def _opened(path: Path) -> "Iterator[Store]":
    from byol_serving.collections.store import Store

    with Store(path) as store:
        yield store
