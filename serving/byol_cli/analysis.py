"""Uses of search: near-duplicates, outliers, labels, and whether two images show the same."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from byol_cli.options import (
    LONG_S,
    collection_option,
    connected,
    example,
    server_option,
    where_option,
)
from byol_cli.output import emit, json_option, table

_SHOWN = 20
_TRUE, _FALSE = {"1", "true", "yes"}, {"0", "false", "no"}


@click.command()
@collection_option
@click.option("--min-score", default=0.95, show_default=True, help="Least cosine similarity.")
@where_option
@click.option("--exact/--indexed", default=None, help="Every pair, or what the index finds.")
@click.option("--limit", default=0, help="Groups, the largest first; 0: all.")
@click.option(
    "--picture", type=click.Path(path_type=Path), help="Draw the largest groups to this file."
)
@click.option(
    "--images",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder that ids are paths in, for the picture.",
)
@server_option
@json_option
def duplicates(
    collection: str,
    min_score: float,
    where: Any,
    exact: bool | None,
    limit: int,
    picture: Path | None,
    images: Path | None,
    server: str,
    as_json: bool,
) -> None:
    """Find groups of items that are nearly the same.

    Up to 100,000 items every pair is looked at, beyond that what the index finds.

    \b
    Example:  byol collections duplicates -c photos --min-score 0.97
              byol collections duplicates -c photos --images photos --picture duplicates.png
    """
    if (picture is None) != (images is None):
        raise click.UsageError("--picture needs --images, the folder of the image files, and back")
    with connected(server, timeout=LONG_S) as client:
        found = client.analysis.duplicates(
            collection, min_score=min_score, where=where, exact=exact, limit=limit
        )
    drawn = 0
    if picture is not None and images is not None:
        from byol_cli.sheets import draw_groups

        drawn = draw_groups(picture, images, [group.ids for group in found.groups])
    if as_json:
        emit(asdict(found) | {"drawn": drawn}, as_json)
        return
    rows = ((len(g.ids), f"{g.weakest:.3f}", f"{g.strongest:.3f}", g.ids[:4]) for g in found.groups)
    table(["items", "weakest", "strongest", "ids"], rows)
    facts = {"groups": len(found.groups), "pairs": found.pairs, "items": found.items}
    emit(facts | {"every pair": found.exact}, as_json)


@click.command()
@collection_option
@click.option("-k", default=10, show_default=True, help="Neighbours whose distance counts.")
@click.option("--limit", default=20, show_default=True, help="Items to show.")
@where_option
@server_option
@json_option
def outliers(collection: str, k: int, limit: int, where: Any, server: str, as_json: bool) -> None:
    """Find the items that are like no other: farthest from their k nearest.

    \b
    Example:  byol collections outliers -c photos --limit 10
    """
    with connected(server, timeout=LONG_S) as client:
        found = client.analysis.outliers(collection, k=k, limit=limit, where=where)
    if as_json:
        emit({"collection": collection, "outliers": [asdict(each) for each in found]}, as_json)
    else:
        table(["distance", "id"], ((f"{each.distance:.4f}", each.id) for each in found))


@click.command()
@click.argument("queries", nargs=-1, required=True)
@collection_option
@click.option("--key", required=True, help="Metadata key that holds the labels.")
@click.option("-k", default=20, show_default=True, help="Neighbours that vote.")
@click.option("--temperature", default=0.07, show_default=True, help="Lower: the nearest decide.")
@where_option
@server_option
@json_option
def classify(
    queries: tuple[str, ...],
    collection: str,
    key: str,
    k: int,
    temperature: float,
    where: Any,
    server: str,
    as_json: bool,
) -> None:
    """Label images, or items written as id:NAME, by votes of their nearest labelled neighbours.

    \b
    Example:  byol collections classify new.jpg id:cats/12.jpg -c photos --key label
    """
    with connected(server) as client:
        found = client.analysis.classify(
            collection,
            map(example, queries),
            key=key,
            k=k,
            temperature=temperature,
            where=where,
        )
    rows = [
        {"query": query, "label": each.label, "confidence": each.confidence}
        | {"labels": [asdict(votes) for votes in each.labels]}
        for query, each in zip(queries, found, strict=True)
    ]
    if as_json:
        emit({"collection": collection, "results": rows}, as_json)
    else:
        table(["query", "label", "confidence"], ([*row.values()][:3] for row in rows))


@click.command("verify-pairs")
@click.argument("left")
@click.argument("right")
@collection_option
@click.option("--threshold", type=float, help="Least cosine similarity of the same thing.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Or a file that `calibrate-pairs` wrote.",
)
@server_option
@json_option
def verify_pairs(
    left: str,
    right: str,
    collection: str,
    threshold: float | None,
    calibration: Path | None,
    server: str,
    as_json: bool,
) -> None:
    """Say whether LEFT and RIGHT (images, or items as id:NAME) show the same thing.

    \b
    Example:  byol collections verify-pairs a.jpg b.jpg -c faces --threshold 0.8
              byol collections verify-pairs a.jpg id:anna/1.jpg -c faces --calibration faces.json
    """
    if (threshold is None) == (calibration is None):
        raise click.UsageError("give either --threshold or --calibration")
    if calibration is not None:
        threshold = float(json.loads(calibration.read_text())["threshold"])
    assert threshold is not None
    with connected(server) as client:
        (found,) = client.analysis.verify_pairs(
            collection, [(example(left), example(right))], threshold=threshold
        )
    emit({"same": found.same, "score": found.score, "threshold": threshold}, as_json)


@click.command("calibrate-pairs")
@click.argument("pairs", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@collection_option
@click.option(
    "--max-false-accepts", type=float, help="Accept at most this part of the different pairs."
)
@click.option("--out", type=click.Path(path_type=Path), help="Keep the result as JSON.")
@server_option
@json_option
def calibrate_pairs(
    pairs: Path,
    collection: str,
    max_false_accepts: float | None,
    out: Path | None,
    server: str,
    as_json: bool,
) -> None:
    """Find a threshold from labelled PAIRS: a CSV file of left, right, same (1 or 0).

    Left and right are images (paths beside the CSV file) or items as id:NAME. Without
    --max-false-accepts the threshold is the most accurate one.

    \b
    Example:  byol collections calibrate-pairs pairs.csv -c faces --out faces.json
    """
    lines = _pairs(pairs)
    with connected(server, timeout=LONG_S) as client:
        found = client.analysis.calibrate_pairs(
            collection,
            [(left, right) for left, right, _ in lines],
            [same for *_, same in lines],
            max_false_accepts=max_false_accepts,
        )
    rates = [asdict(each) for each in found.rates]
    result: dict[str, Any] = {
        "collection": collection,
        "pairs": len(lines),
        "threshold": found.threshold,
        "accuracy": found.accuracy,
    }
    if out is not None:
        out.write_text(json.dumps(result | {"rates": rates}, indent=2) + "\n")
    if as_json:
        emit(result | {"rates": rates}, as_json)
        return
    table(["false accepts", "true accepts", "threshold"], (list(rate.values()) for rate in rates))
    emit(result, as_json)


COMMANDS = (duplicates, outliers, classify, calibrate_pairs, verify_pairs)


def _pairs(path: Path) -> list[tuple[Any, Any, bool]]:
    found = []
    with path.open(newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            answer = row[2].strip().lower() if len(row) == 3 else ""
            if answer not in _TRUE | _FALSE:
                if number == 1:  # a heading
                    continue
                raise click.UsageError(f"{path} line {number}: wanted left,right,1 or 0; got {row}")
            left, right = (_beside(path, each.strip()) for each in row[:2])
            found.append((left, right, answer in _TRUE))
    return found


def _beside(path: Path, text: str) -> Any:
    found = example(text)
    return path.parent / found if isinstance(found, Path) else found
