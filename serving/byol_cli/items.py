"""Items of a collection: show, change, delete; all of them out to Parquet and in again."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from byol_cli.offline import quiet_option
from byol_cli.options import LONG_S, connected, index_option, parsed, server_option, where_option
from byol_cli.output import emit, json_option, table
from byol_cli.progress import client_bar
from byol_serving.errors import UnknownCollection

if TYPE_CHECKING:
    from byol_serving.client import Client, Item


@click.command()
@click.argument("name")
@click.argument("ids", nargs=-1, required=True)
@click.option("--vectors", is_flag=True, help="Also their vectors, in the JSON.")
@server_option
@json_option
def get(name: str, ids: tuple[str, ...], vectors: bool, server: str, as_json: bool) -> None:
    """Show items of collection NAME by their IDS.

    \b
    Example:  byol collections get photos cats/12.jpg dogs/3.jpg
    """
    with connected(server) as client:
        _show(name, client.get(name, ids, with_vectors=vectors), as_json)


@click.command("items")
@click.argument("name")
@where_option
@click.option("--limit", default=100, show_default=True, help="Items at most.")
@server_option
@json_option
def list_(name: str, where: Any, limit: int, server: str, as_json: bool) -> None:
    """List the items of collection NAME in the order they were stored.

    \b
    Example:  byol collections items photos --where '{"label": "cat"}' --limit 20
    """
    from itertools import islice

    with connected(server) as client:
        found = client.items(name, where=where, page_size=max(1, min(limit, 1000)))
        _show(name, list(islice(found, limit)), as_json)


@click.command("set-metadata")
@click.argument("name")
@click.argument("item_id", metavar="ID")
@click.argument("metadata")
@server_option
@json_option
def set_metadata(name: str, item_id: str, metadata: str, server: str, as_json: bool) -> None:
    """Replace the metadata of item ID with METADATA, a JSON object; its vector stays.

    \b
    Example:  byol collections set-metadata photos cats/12.jpg '{"label": "cat", "seen": true}'
    """
    value = parsed(metadata)
    if not isinstance(value, dict):
        raise click.UsageError(f"METADATA {metadata!r} is not a JSON object")
    with connected(server) as client:
        client.set_metadata(name, [item_id], [value])
    emit({"collection": name, "id": item_id, "metadata": value}, as_json)


@click.command()
@click.argument("name")
@click.argument("ids", nargs=-1)
@where_option
@server_option
@json_option
def delete(name: str, ids: tuple[str, ...], where: Any, server: str, as_json: bool) -> None:
    """Delete items of collection NAME by their IDS, or all that match --where.

    \b
    Example:  byol collections delete photos cats/12.jpg
              byol collections delete photos --where '{"year": {"lt": 2001}}'
    """
    if bool(ids) == (where is not None):
        raise click.UsageError("give either IDS or --where")
    with connected(server, timeout=LONG_S) as client:
        deleted = client.delete(name, ids or None, where=where)
    emit({"collection": name, "deleted": deleted}, as_json)


@click.command("export")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@where_option
@server_option
@json_option
def export(name: str, file: Path, where: Any, server: str, as_json: bool) -> None:
    """Write the items of collection NAME to a Parquet FILE: id, embedding, metadata.

    Reads page by page, so that neither side holds the collection in memory. Whether it changed
    meanwhile is said in the end.

    \b
    Example:  byol collections export photos photos.parquet
    """
    from byol_serving.indexing.exchange import write_items

    with connected(server, timeout=LONG_S) as client:
        before = client.collection(name)
        rows = write_items(
            file,
            client.items(name, where=where, page_size=_page_size(before.dim), with_vectors=True),
            dim=before.dim,
            encoder_id=before.encoder_id,
            id_type=before.id_type,
        )
        changed = client.collection(name).version != before.version
    result = {"collection": name, "file": str(file), "items": rows, "changed_meanwhile": changed}
    emit(result, as_json)


@click.command("import")
@click.argument("name")
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.option("--encoder-id", default="", help="Where the files do not name the encoder.")
@index_option("auto")
@server_option
@quiet_option
@json_option
def import_(
    name: str,
    source: Path,
    encoder_id: str,
    index: Any,
    server: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Bring Parquet files into collection NAME, made if need be.

    SOURCE is a file or a folder of them, as `byol collections export` or `byol embed` writes. Ids
    that exist are replaced; running it again does no harm. A column of integer ids makes a
    collection of such.

    \b
    Example:  byol collections import photos photos.parquet
    """
    from byol_serving.client_progress import Tally
    from byol_serving.indexing.exchange import files_of, header_of, read_items

    files = files_of(source)
    header = header_of(files)
    encoder = encoder_id or header.encoder_id
    with connected(server, timeout=LONG_S) as client:
        if not _exists(client, name):
            if not encoder:
                raise click.UsageError(f"{source} does not name the encoder; give --encoder-id")
            client.create_collection(
                name, dim=header.dim, encoder_id=encoder, index=index, id_type=header.id_type
            )
        inserted = updated = 0
        with client_bar(quiet or as_json) as progress:
            tally = Tally(progress, header.rows)
            for batch in chain.from_iterable(map(read_items, files)):
                counts = client.upsert(
                    name,
                    batch.ids,
                    vectors=batch.vectors,
                    metadata=batch.metadata,
                    encoder_id=encoder,
                )
                tally.add(len(batch.ids))
                inserted, updated = inserted + counts.inserted, updated + counts.updated
    emit({"collection": name, "inserted": inserted, "updated": updated}, as_json)


COMMANDS = (get, list_, set_metadata, delete, export, import_)


def _show(name: str, items: "list[Item]", as_json: bool) -> None:
    if as_json:
        emit({"collection": name, "items": list(_rows(items))}, as_json)
    else:
        table(["id", "metadata"], ((item.id, json.dumps(item.metadata)) for item in items))


def _rows(items: "list[Item]") -> Iterator[dict[str, Any]]:
    for item in items:
        vector = {} if item.vector is None else {"vector": item.vector.tolist()}
        yield {"id": item.id, "metadata": item.metadata} | vector


def _page_size(dim: int) -> int:
    """Items whose vectors take about 8 MiB."""
    return max(1, min(2**21 // dim, 4096))


def _exists(client: "Client", name: str) -> bool:
    try:
        client.collection(name)
    except UnknownCollection:
        return False
    return True
