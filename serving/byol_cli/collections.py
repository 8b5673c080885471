"""`byol collections`: make, inspect, keep and drop them; by a server, or on an unserved store."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from byol_cli import analysis, items
from byol_cli.options import (
    LONG_S,
    connected,
    id_type_option,
    index_option,
    server_option,
    store_option,
)
from byol_cli.output import emit, json_option, table
from byol_serving.errors import FailedPrecondition

if TYPE_CHECKING:
    from byol_serving.collections.store import Store
    from byol_serving.collections.types import IdType, IndexKind


@click.group()
def command() -> None:
    """Collections: their items, their upkeep, and what they tell.

    \b
    Example:  byol collections list
              byol collections create photos --index auto
              byol collections duplicates -c photos --min-score 0.97
              byol collections backup monday
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
        with connected(server) as client:
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
@index_option("flat")
@id_type_option
@server_option
@json_option
def create(
    name: str,
    dim: int,
    encoder_id: str,
    index: "IndexKind",
    id_type: "IdType",
    server: str,
    as_json: bool,
) -> None:
    """Create a collection on a running server.

    \b
    Example:  byol collections create photos --index auto
    """
    with connected(server) as client:
        info = client.create_collection(
            name,
            dim=dim,
            encoder_id=encoder_id,
            index=index,
            id_type=id_type,
        )
    emit(asdict(info), as_json)


@command.command()
@click.argument("name")
@server_option
@json_option
def stats(name: str, server: str, as_json: bool) -> None:
    """Show one collection's facts, and how its index stands: measured recall, memory.

    \b
    Example:  byol collections stats photos --json
    """
    with connected(server) as client:
        facts = asdict(client.collection(name))
        with suppress(FailedPrecondition):  # a backend that does not tell
            facts |= asdict(client.stats(name))
    emit(facts, as_json)


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
    with connected(server) as client:
        client.drop_collection(name)
    emit({"dropped": name}, as_json)


@command.command()
@click.argument("name")
@server_option
@store_option
@json_option
def verify(name: str, server: str, store: Path | None, as_json: bool) -> None:
    """Compare a collection's index with its store; exit code 1 where something is wrong.

    \b
    Example:  byol collections verify photos
              byol collections verify photos --store store
    """
    if store is not None:
        with _opened(store) as opened:
            found = opened.get(name).verify()
    else:
        with connected(server, timeout=LONG_S) as client:
            found = client.verify(name)
    emit({"collection": name, "ok": found.ok} | asdict(found), as_json)
    if not found.ok:
        sys.exit(1)


@command.command()
@click.argument("name")
@server_option
@store_option
@json_option
def backup(name: str, server: str, store: Path | None, as_json: bool) -> None:
    """Copy all collections to a backup NAME while the server serves them.

    It comes to lie in the server's --backups folder. With --store, NAME is a path on this machine.

    \b
    Example:  byol collections backup monday
              byol collections backup /mnt/backups/monday --store store
    """
    if store is not None:
        with _opened(store) as opened:
            opened.backup(Path(name))
            result = {"path": name, "collections": [info.name for info in opened.list()]}
    else:
        with connected(server, timeout=LONG_S) as client:
            result = asdict(client.backup(name))
    emit(result, as_json)


@command.command()
@click.argument("backup")
@click.argument("collection")
@click.option("--name", default="", help="Under another name than its own.")
@server_option
@store_option
@json_option
def restore(
    backup: str, collection: str, name: str, server: str, store: Path | None, as_json: bool
) -> None:
    """Bring COLLECTION back from a BACKUP while the server serves the others.

    Every byte is checked before it is taken over. With --store, BACKUP is a path on this machine.

    \b
    Example:  byol collections restore monday photos --name photos-monday
              byol collections restore /mnt/backups/monday photos --store store
    """
    if store is not None:
        with _opened(store, read_only=False) as opened:
            info = opened.restore(Path(backup) / collection, name or collection).info
    else:
        with connected(server, timeout=LONG_S) as client:
            info = client.restore(backup, collection, name=name)
    emit(asdict(info), as_json)


for each in (*items.COMMANDS, *analysis.COMMANDS):
    command.add_command(each)


@contextmanager
def _opened(path: Path, *, read_only: bool = True) -> "Iterator[Store]":
    from byol_serving.collections.store import Store

    with Store(path, read_only=read_only) as store:
        yield store
