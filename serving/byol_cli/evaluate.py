"""`byol evaluate`: is the encoder any good, with labels and without."""

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
@json_option
def command(run: Path, source: Path, queries: Path | None, as_json: bool) -> None:
    """Measure the trained RUN on SOURCE: kNN, linear probe, retrieval, and label-free measures.

    Class sub-folders are the labels. Without them only the label-free measures are given. Beside
    the encoder stand the same encoder untrained, and raw pixels.

    \b
    Example:  byol evaluate runs/photos photos/ --queries held-back/
    """
    from byol_training.evaluate import evaluate_run

    scores = evaluate_run(run, source, queries)
    if as_json:
        emit(scores, as_json)
        return
    measures = list(next(iter(scores.values())))
    rows = [
        (name.replace("_", " "), *(each[name] for each in scores.values())) for name in measures
    ]
    table(["measure", *scores], rows)
