"""`byol search`: ask a running server for neighbours."""

import json
from pathlib import Path
from typing import Any

import click

from byol_cli.output import emit, json_option, table


@click.command()
@click.argument("image", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option("--collection", "-c", required=True, help="Collection to search.")
@click.option("--id", "item_id", help="Search by an item of the collection instead of an image.")
@click.option("-k", default=10, show_default=True, help="How many neighbours.")
@click.option("--where", help='Filter on metadata as JSON, like \'{"label": "cat"}\'.')
@click.option("--min-score", type=float, help="Leave out neighbours below this cosine similarity.")
@click.option("--server", default="127.0.0.1:50051", show_default=True, help="Its address.")
@json_option
def command(
    image: Path | None,
    collection: str,
    item_id: str | None,
    k: int,
    where: str | None,
    min_score: float | None,
    server: str,
    as_json: bool,
) -> None:
    """Find the nearest neighbours of IMAGE, or of an item by --id, through a running server.

    \b
    Example:  byol search photo.jpg --collection photos -k 5
              byol search --id cats/12.jpg -c photos --where '{"label": "cat"}'
    """
    from byol_serving.client import Client

    if (image is None) == (item_id is None):
        raise click.UsageError("give either an IMAGE or --id")
    query: dict[str, Any] = {"image": image.read_bytes()} if image else {"id": item_id}
    condition = _filter(where)
    with Client(server) as client:
        hits = client.search(collection, k=k, where=condition, min_score=min_score, **query)
    rows = [{"id": hit.id, "score": hit.score, "metadata": dict(hit.metadata)} for hit in hits]
    if as_json:
        emit({"collection": collection, "hits": rows}, as_json)
    else:
        shown = ((f"{r['score']:.4f}", r["id"], json.dumps(r["metadata"])) for r in rows)
        table(["score", "id", "metadata"], shown)


def _filter(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not JSON ({error})", param_hint="--where") from error
