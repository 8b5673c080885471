"""`byol report`: a run on one HTML page."""

from pathlib import Path

import click

from byol_cli.output import emit, json_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("source", type=click.Path(path_type=Path, exists=True), required=False)
@click.option(
    "--queries",
    type=click.Path(path_type=Path, exists=True),
    help="Images held back from SOURCE; default: every sixth of SOURCE.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="The page; default: report.html in RUN."
)
@json_option
def command(
    run: Path, source: Path | None, queries: Path | None, out: Path | None, as_json: bool
) -> None:
    """Put the trained RUN on one self-contained HTML page: curves, scores, neighbours, a map.

    SOURCE, a folder or tar, is where neighbours and the map come from, and what the run is scored
    on unless byol evaluate has done so; without it the page shows the 64 images that the run kept.

    \b
    Example:  byol report runs/photos photos/
    """
    from byol_training.report import write_report

    path = write_report(run, out or run / "report.html", source=source, queries=queries)
    emit({"report": path, "bytes": path.stat().st_size}, as_json)
