"""`byol search`: ask a running server for neighbours."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from byol_cli.options import collection_option, connected, example, server_option, where_option
from byol_cli.output import emit, json_option, table

if TYPE_CHECKING:
    from byol_serving.client import ExampleLike, Hit


@click.command()
@click.argument("images", nargs=-1, type=click.Path(path_type=Path, dir_okay=False))
@collection_option
@click.option("--id", "item_ids", multiple=True, help="Search by an item of the collection.")
@click.option("--vector", type=click.Path(path_type=Path, exists=True), help="By a .npy file, [D].")
@click.option("--unlike", multiple=True, help="Not like this image, or item as id:NAME.")
@click.option("--unlike-weight", type=float, help="How much that counts.  [default: 0.2]")
@click.option("-k", default=10, show_default=True, help="How many neighbours (or groups).")
@click.option("--offset", default=0, help="Leave out the best so many: the next page.")
@where_option
@click.option("--min-score", type=float, help="Leave out neighbours below this cosine similarity.")
@click.option("--group-by", help="The best values of this metadata key instead of items.")
@click.option("--group-size", default=1, show_default=True, help="Items of each value.")
@click.option(
    "--mmr-lambda", type=float, help="Hits that differ: 1 is by similarity alone, 0 by difference."
)
@click.option("--effort", type=int, help="Of an approximate index, instead of the tuned one.")
@server_option
@json_option
def command(
    images: tuple[Path, ...],
    collection: str,
    item_ids: tuple[str, ...],
    vector: Path | None,
    unlike: tuple[str, ...],
    unlike_weight: float | None,
    group_by: str | None,
    group_size: int,
    server: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the nearest neighbours of IMAGES, or of items by --id, through a running server.

    Several are searched by at once: their mean, less that of what --unlike names.

    \b
    Example:  byol search photo.jpg --collection photos -k 5
              byol search --id cats/12.jpg -c photos --where '{"label": "cat"}'
              byol search a.jpg b.jpg --unlike id:dogs/3.jpg -c photos
              byol search a.jpg -c photos --group-by label --group-size 3
    """
    from byol_serving.client import SearchOptions

    query = _query(images, item_ids, vector, unlike, unlike_weight)
    asked = SearchOptions(**options)
    with connected(server) as client:
        if group_by is None:
            (hits,) = client.search_many(collection, asked, queries=[query])
            rows = _rows(hits)
            if as_json:
                emit({"collection": collection, "hits": rows}, as_json)
            else:
                table(["score", "id", "metadata"], map(_line, rows))
            return
        groups = client.search_groups(
            collection, query, by=group_by, size=group_size, options=asked
        )
    if as_json:
        found = [{"value": each.value, "hits": _rows(each.hits)} for each in groups]
        emit({"collection": collection, "groups": found}, as_json)
    else:
        lines = ([each.value, *_line(hit)] for each in groups for hit in _rows(each.hits))
        table([group_by, "score", "id", "metadata"], lines)


def _query(
    images: Sequence[Path],
    item_ids: Sequence[str],
    vector: Path | None,
    unlike: Sequence[str],
    unlike_weight: float | None,
) -> Any:
    """One query of all that was given."""
    import numpy as np

    from byol_serving.client import Examples, ItemId

    like: list[ExampleLike] = [*images, *map(ItemId, item_ids)]
    if vector is not None:
        like.append(np.load(vector, allow_pickle=False).astype(np.float32))
    if not like:
        raise click.UsageError("give an IMAGE, --id or --vector")
    if len(like) == 1 and not unlike:
        return like[0]
    return Examples(like=like, unlike=list(map(example, unlike)), unlike_weight=unlike_weight)


def _rows(hits: "Sequence[Hit]") -> list[dict[str, Any]]:
    return [{"id": hit.id, "score": hit.score, "metadata": dict(hit.metadata)} for hit in hits]


def _line(hit: dict[str, Any]) -> list[str]:
    return [f"{hit['score']:.4f}", hit["id"], json.dumps(hit["metadata"])]
