"""`byol embed`: from a folder, archive or bucket to files of vectors."""

from pathlib import Path
from typing import Any, Literal

import click

from byol_cli.offline import Engine, engine_options, finish, offline_bar, plan_options, quiet_option
from byol_cli.output import json_option


@click.command()
@click.argument("source")
@engine_options
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder to write to; running again with the same one goes on.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["parquet", "npy"]),
    default="parquet",
    show_default=True,
    help="Parquet shards, or .npy with .jsonl beside them.",
)
@click.option(
    "--features", help="Also the dense maps of these stages of the bundle, like layer3,layer4."
)
@click.option(
    "--unnormalized", is_flag=True, help="Vectors as they are before they are brought to length 1."
)
@plan_options
@quiet_option
@json_option
def command(
    source: str,
    bundle_path: Path,
    engine: Engine,
    out: Path,
    kind: Literal["parquet", "npy"],
    features: str | None,
    unnormalized: bool,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Embed SOURCE into files: a folder, tars, Parquet files, a list of paths, or a URL.

    Stop it at any point and start it again: finished shards are kept. Exit code 3 says that some
    files were rejected; OUT/_byol/rejected.jsonl says which and why.

    \b
    Example:  byol embed photos --bundle bundles/photos --out vectors
              byol embed s3://bucket/photos --bundle bundles/photos --out vectors --sync
              byol embed photos --bundle bundles/photos --out vectors --engine ray
              byol embed photos --bundle bundles/photos --out maps --features layer4
    """
    from byol_serving.bundle import load_bundle
    from byol_serving.indexing.columns import columns_of
    from byol_serving.indexing.plan import EmbedPlan
    from byol_serving.indexing.sinks import NpySink, ParquetSink

    plan = EmbedPlan(source=source, out=out, **settings)
    bundle = load_bundle(bundle_path)
    info = bundle.info
    stages = features.split(",") if features else ()
    columns = columns_of(info, stages, normalize=not unnormalized)
    sink = (
        ParquetSink(info.dim, info.encoder_id, columns)
        if kind == "parquet"
        else NpySink(info.dim, columns)
    )
    with offline_bar(quiet or as_json) as on_progress:
        summary = engine.run(plan, bundle, sink, on_progress)
    finish(summary, as_json)
