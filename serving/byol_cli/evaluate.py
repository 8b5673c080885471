"""`byol evaluate`: is the encoder any good, with labels and without."""

import json
from pathlib import Path

import click

from byol_cli.output import emit, json_option, table


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--queries",
    type=click.Path(path_type=Path, exists=True),
    help="Labelled images held back from SOURCE; default: every sixth of SOURCE.",
)
@click.option("--device", default="auto", show_default=True, help="Of a run's encoder.")
@json_option
def command(run: Path, source: Path, queries: Path | None, device: str, as_json: bool) -> None:
    """Measure RUN, a trained run or a bundle, on the images in SOURCE, a folder or a tar.

    Class sub-folders are the labels: kNN, retrieval, linear probes, few-shot. Without them only the
    label-free measures are given. Beside the encoder stand the same encoder untrained, and raw
    pixels. In a run directory the scores are kept as evaluation.json, for byol report.

    \b
    Example:  byol evaluate runs/photos photos/ --queries held-back/
              byol evaluate bundles/photos photos/
    """
    from byol_training.evaluate import EVALUATION_FILE, evaluate, is_run

    scores = evaluate(run, source, queries, device=device)
    if is_run(run):
        (run / EVALUATION_FILE).write_text(json.dumps(scores, indent=2) + "\n")
    if as_json:
        emit(scores, as_json)
        return
    rows = [
        (measure.replace("_", " "), *(each.get(measure) for each in scores.values()))
        for measure in scores["trained"]
    ]
    table(["measure", *scores], rows)
